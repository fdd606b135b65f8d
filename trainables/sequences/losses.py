"""Drawn negatives, the losses of next items among them, contrasts, and a step of the optimiser.

Draws come from the NumPy generator that is passed in, on the CPU, so that they do not depend on the device.
Shapes: B rows of a batch, N labels, P domains, K drawn items, U distinct items of a batch, I items of
both domains, D vector width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.optim import Optimizer

from trainables.sequences.views import Range, inside
from trainables.tasks.sequential import Sequences, SequenceTask


def draw_shared(domains: Sequence[Range], count: int, rng: np.random.Generator) -> Tensor:
    """Draw `count` items of each domain, evenly, for all labels of a batch: int64 [P, K]."""
    return torch.from_numpy(np.stack([rng.integers(*domain, count) for domain in domains]))


def draw_weighted(
    domains: Sequence[Range], count: int, rng: np.random.Generator, weight_I: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw `count` items of each domain by their weights, and return with them 1 / chance of each: [P, K] both."""
    drawn, inverse = [], []
    for low, high in domains:
        chance = weight_I[low:high].double().cpu().numpy()
        chance = chance / chance.sum()
        place = rng.choice(high - low, count, p=chance)
        drawn.append(low + place)
        inverse.append(1 / chance[place])
    return torch.from_numpy(np.stack(drawn)), torch.from_numpy(np.stack(inverse)).float()


class Unseen:
    """Even draws among the items of a label's own domain that its training sequence does not hold.

    The r-th free item of a domain is r + (taken items before it); a taken item t, the j-th of its sequence and domain, is
    before it where t - j <= r. So one sorted search replaces drawing until an item is free.
    """

    def __init__(self, train: Sequences, domains: Sequence[Range]) -> None:
        self.domains = np.array(sorted(domains))  # [P, 2]
        self.items = int(self.domains.max())
        taken = np.unique((train.row * self.items + train.item).cpu().numpy())
        row, item = np.divmod(taken, self.items)
        domain = self._domain(item)
        group = (row * len(domains) + domain)[domain >= 0]  # ascending, because a row's items are
        self.count = np.bincount(group, minlength=len(train) * len(domains))  # [S P]
        self.first = np.cumsum(self.count) - self.count
        rank = np.arange(len(group)) - self.first[group]
        self.key = group * self.items + item[domain >= 0] - self.domains[domain[domain >= 0], 0] - rank

    def draw(self, row_N: Tensor, label_N: Tensor, count: int, rng: np.random.Generator) -> Tensor:
        """Return `count` items for each label of sequence `row`, int64 [N, K]."""
        domain = self._domain(label_N.cpu().numpy())
        group = row_N.cpu().numpy() * len(self.domains) + domain
        low, high = self.domains[domain].T
        free_NK = rng.integers((high - low - self.count[group])[:, None], size=(len(group), count))
        before = np.searchsorted(self.key, (group * self.items)[:, None] + free_NK, side="right")
        drawn_NK = low[:, None] + free_NK + before - self.first[group][:, None]
        return torch.from_numpy(drawn_NK).to(label_N.device)

    def _domain(self, item: NDArray[np.int64]) -> NDArray[np.int64]:
        """Place of each item's domain in `domains`, -1 for none."""
        found = (item[:, None] >= self.domains[:, 0]) & (item[:, None] < self.domains[:, 1])
        return np.where(found.any(axis=1), found.argmax(axis=1), -1)


def distinct(items: int, *numbers: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the distinct item numbers [U], ascending, and for each tensor the places of its numbers among them.

    Looking every item up once is what makes a step cheap: the gradient of each look-up is as large as the table.
    """
    wanted_I = torch.zeros(items, dtype=torch.bool, device=numbers[0].device)
    for number in numbers:
        wanted_I[number] = True
    place_I = wanted_I.long().cumsum(0) - 1
    return wanted_I.nonzero().squeeze(1), [place_I[number] for number in numbers]


def picked(vector_UD: Tensor, place: Tensor) -> Tensor:
    """Return `vector_UD[place]`, [..., D], at less than half the cost of indexing and its gradient.

    On a GPU the gradient's sums are in no fixed order: last bits may differ from run to run.
    """
    return vector_UD.index_select(0, place.flatten()).view(*place.shape, vector_UD.shape[1])


def softmax_loss(
    state_ND: Tensor, label_N: Tensor, label_ND: Tensor, domains: Sequence[Range], drawn_PK: Tensor, drawn_PKD: Tensor,
    inverse_PK: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the mean over labels of `next_item_loss` among the drawn items of their own domain.

    `inverse_PK`: 1 / chance of each drawn item; None: they were drawn evenly.
    """
    loss = state_ND.new_zeros(())
    for place, (low, high) in enumerate(domains):
        chosen = inside(label_N, (low, high)).nonzero().squeeze(1)
        inverse = high - low if inverse_PK is None else inverse_PK[place]
        loss = loss + next_item_loss(
            state_ND[chosen], label_N[chosen], label_ND[chosen], drawn_PK[place], drawn_PKD[place], inverse
        )
    return loss / len(label_N)


def next_item_loss(
    state_ND: Tensor, label_N: Tensor, label_ND: Tensor, drawn_K: Tensor, drawn_KD: Tensor, inverse_chance: int | Tensor
) -> Tensor:
    """Return the sum of -log p(label) over a softmax of the label and K drawn items, which stand for all of its domain.

    `inverse_chance`: 1 / q of each drawn item, [K]; for even draws one number, how many items the domain has.
    log(1 / (K q)) is added to their logits (Jean et al. 2015, arXiv 1412.2007); a drawn label is left out.
    """
    share = inverse_chance / len(drawn_K)
    shift_K = torch.as_tensor(share, dtype=state_ND.dtype, device=state_ND.device).log().expand(len(drawn_K))
    label_score_N = (state_ND * label_ND).sum(dim=-1)
    drawn_score_N = drawn_log_sum(state_ND, drawn_KD, shift_K, label_N, drawn_K)
    return (torch.logaddexp(label_score_N, drawn_score_N) - label_score_N).sum()


def drawn_log_sum(state_ND: Tensor, drawn_KD: Tensor, shift_K: Tensor, label_N: Tensor, drawn_K: Tensor) -> Tensor:
    """Return log sum_k exp(state . drawn_k + shift_k) over the drawn items that are not the label, [N].

    It has no second derivative; its memory is one [N, K], and it takes 0.6 of the time of the same in steps of torch.
    """
    summed: Tensor = _DrawnLogSum.apply(state_ND, drawn_KD, shift_K, label_N, drawn_K)  # type: ignore[no-untyped-call]
    return summed


class _DrawnLogSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, state_ND: Tensor, drawn_KD: Tensor, shift_K: Tensor, label_N: Tensor, drawn_K: Tensor
    ) -> Tensor:
        logits_NK = torch.addmm(shift_K, state_ND, drawn_KD.T)
        row = torch.isin(label_N, drawn_K).nonzero().squeeze(1)  # few: to compare all takes as long as a product
        place, column = (label_N[row][:, None] == drawn_K).nonzero(as_tuple=True)
        logits_NK[row[place], column] = -torch.inf
        most_N = logits_NK.amax(dim=1).clamp(min=torch.finfo(logits_NK.dtype).min)  # of a row without items
        part_NK = logits_NK.sub_(most_N[:, None]).exp_()
        total_N = part_NK.sum(dim=1)
        ctx.save_for_backward(state_ND, drawn_KD, part_NK, total_N)
        return most_N + total_N.log()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope_N: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        state_ND, drawn_KD, part_NK, total_N = ctx.saved_tensors
        each_N1 = (slope_N / total_N.clamp(min=torch.finfo(total_N.dtype).tiny))[:, None]
        of_drawn_KD = part_NK.T @ (state_ND * each_N1) if ctx.needs_input_grad[1] else None
        return (part_NK @ drawn_KD) * each_N1, of_drawn_KD, None, None, None


def bce_loss(state_ND: Tensor, label_ND: Tensor, drawn_NKD: Tensor) -> Tensor:
    """Return the mean over labels of -log sigma(s+) - mean_k log(1 - sigma(s_k)) (SASRec eq. 10 at K = 1)."""
    label_score_N = (state_ND * label_ND).sum(dim=-1)
    drawn_NK = torch.einsum("nd,nkd->nk", state_ND, drawn_NKD)
    return functional.softplus(-label_score_N).mean() + functional.softplus(drawn_NK).mean()


class TargetLoss:
    """Loss of labels of the target domain: `bce`, each against a drawn item that its user has not, or `softmax`, all of
    them against the same drawn items.
    """

    def __init__(self, task: SequenceTask, loss: str, negatives: int, rng: np.random.Generator) -> None:
        self.target, self.loss, self.negatives, self.rng = task.target, loss, negatives, rng
        self.unseen = Unseen(task.train, [task.target])

    def __call__(self, user_ND: Tensor, row_N: Tensor, label_N: Tensor, vectors: Callable[[Tensor], Tensor]) -> Tensor:
        """Mean over the labels of the sequences `row`; `vectors` of items [K] -> what users are multiplied by, [K, D]."""
        if self.loss == "bce":
            drawn = self.unseen.draw(row_N, label_N, 1, self.rng)
        else:
            drawn = draw_shared([self.target], self.negatives, self.rng)[0].to(label_N.device)
        label_ND, drawn_KD = vectors(torch.cat([label_N, drawn.flatten()])).tensor_split([len(label_N)])
        if self.loss == "bce":
            return bce_loss(user_ND, label_ND, drawn_KD[:, None])
        size = self.target[1] - self.target[0]
        return next_item_loss(user_ND, label_N, label_ND, drawn, drawn_KD, size) / len(label_N)


def contrast(one_BD: Tensor, other_BD: Tensor, temperature: float, label_B: Tensor | None = None) -> Tensor:
    """Return the mean over 2B vectors of -log softmax of a vector's partner among all vectors but itself (InfoNCE).

    Similarity is the dot product / temperature; normalise the vectors before where it is to be the cosine. `label_B`: rows
    of the same label are left out of each other's denominators.
    """
    B = len(one_BD)
    both = torch.cat([one_BD, other_BD])
    partner = torch.arange(2 * B, device=both.device).roll(B)
    left_out = torch.eye(2 * B, dtype=torch.bool, device=both.device)
    if label_B is not None:
        label = torch.cat([label_B, label_B])
        left_out = (label[:, None] == label).scatter(1, partner[:, None], value=False)
    logits = (both @ both.T / temperature).masked_fill(left_out, -torch.inf)
    return functional.cross_entropy(logits, partner)


def contrast_with(one_BD: Tensor, other_BD: Tensor, temperature: float, label_B: Tensor) -> Tensor:
    """Return the mean over B vectors of -log softmax of their partner among the others' vectors, one way (InfoNCE).

    As in `contrast`; rows of the same label are left out of each other's denominators.
    """
    left_out = (label_B[:, None] == label_B) & ~torch.eye(len(label_B), dtype=torch.bool, device=label_B.device)
    logits = (one_BD @ other_BD.T / temperature).masked_fill(left_out, -torch.inf)
    return functional.cross_entropy(logits, torch.arange(len(label_B), device=label_B.device))


def step(optimiser: Optimizer, loss: Tensor) -> float:
    """Take one step down the gradient and return the loss; FloatingPointError where it is not finite."""
    value = float(loss.detach())
    if not math.isfinite(value):
        raise FloatingPointError(f"the loss is {value}; lower lr")
    optimiser.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimiser.step()
    return value
