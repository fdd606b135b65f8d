"""LGCD's losses: diffusion, guesser, alignment and recommendation (arXiv 2604.05365, eqs. 17, 21, 22, 25).

Shapes: B batch of rows, D vector width, J items of the target domain, K drawn items.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainables.diffusion import normal_like, random_steps
from trainables.models.lgcd.conditions import Rows
from trainables.models.lgcd.network import Condition, Network
from trainables.sequences.losses import next_item_loss
from trainables.sequences.views import Range

# Share of rows without condition in training, for classifier-free guidance (Ho & Salimans 2022).
CONDITION_DROPPED = 0.1
SOFTMAX_BYTES = 64 * 2**20  # of the logits that a softmax over all items holds at once

SQUARES: Mapping[str, Callable[[Tensor], Tensor]] = {  # ||.||^2 of eqs. 17, 21, 22, [B, D] -> [B]
    "mean": lambda difference_BD: difference_BD.square().mean(dim=1),
    "sum": lambda difference_BD: difference_BD.square().sum(dim=1),
}
ALIGNED: Mapping[str, Callable[[Tensor], Tensor]] = {  # rows that eq. 21 is about, from which of them are real
    "single": lambda real_B: ~real_B,
    "overlapping": lambda real_B: real_B,
    "both": torch.ones_like,
}


def losses(network: Network, rows: Rows, generator: torch.Generator, way: int = 0) -> tuple[Tensor, Tensor]:
    """Return h_final of the rows [B, D], and the sum of all losses but L_rec (eqs. 17, 21, 22).

    Each is a mean over the rows that it is about, of the norm that `loss_norm` says.
    """
    config, diffusion, real = network.config, network.diffusion, rows.real
    condition = network.condition(rows.id, rows.text, rows.real, way)
    if not config.diffusion:
        return network.final(condition, None), condition.whole.new_zeros(())
    square = SQUARES[config.loss_norm]
    guess = network.guess(condition, way)
    start = torch.where(rows.has_feature[:, None], rows.feature, guess.detach())
    t_B = random_steps(len(rows), config.steps, generator, start.device)
    noise = normal_like(start, generator)
    given = condition
    if config.guidance == "cfg":
        kept = torch.rand(len(rows), 1, generator=generator).to(start.device) >= CONDITION_DROPPED
        given = Condition(condition.tokens, condition.hidden, condition.whole * kept)
    noisy = diffusion.noised(start, t_B, noise)
    predicted = network.denoiser(noisy, t_B, given)
    learns = rows.has_feature & ((real & config.overlap_diffusion) | (~real & config.pseudo_diffusion))
    wanted = noise if config.predicts == "noise" else rows.feature
    loss = _mean_over(learns, square(predicted - wanted))  # (17)
    if config.guesser:
        learns = rows.has_feature & real & config.overlap_diffusion
        loss = loss + _mean_over(learns, square(guess - rows.feature))  # (22)
    if config.train_reverse == "one_step":
        generated = diffusion.clean(noisy, t_B, predicted) if config.predicts == "noise" else predicted
    else:
        generated = generated_in_training(network, guess, condition, generator)
    if config.alignment:
        loss = loss + _mean_over(ALIGNED[config.align_on](real), square(generated - condition.whole))  # (21)
    return network.final(condition, generated), loss


def generated_in_training(
    network: Network, guess_BD: Tensor, condition: Condition, generator: torch.Generator
) -> Tensor:
    """Return h_rev as the experts and L_align see it in training, by `train_reverse`.

    `guess`: one prediction from the noised guess at lambda T, where inference starts. `chain`: the whole reverse process,
    whose last step has a gradient.
    (`one_step`: the prediction that L_diff is about, which starts from the true feature.)
    """
    if network.config.train_reverse == "chain":
        return network.reverse(guess_BD, condition, generator)
    noisy = network.start(guess_BD, generator)
    return network.cleaner(condition)(noisy, torch.full((len(noisy),), network.first, device=noisy.device))


def _mean_over(chosen_B: Tensor, loss_B: Tensor) -> Tensor:
    """Mean over the chosen rows; 0 where none is chosen."""
    return (loss_B * chosen_B).sum() / chosen_B.sum().clamp(min=1)


# --- recommendation -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SampledSoftmax:
    """L_rec among drawn items of the domain, which stand for all of them (ours)."""

    items: Tensor  # E_fusion of the domain, float32 [J, D]
    domain: Range
    count: int  # K
    rng: np.random.Generator

    def __call__(self, state_BD: Tensor, label_B: Tensor) -> Tensor:
        """Return the sum of -log p(label) (eq. 25)."""
        low, high = self.domain
        drawn = torch.from_numpy(self.rng.integers(low, high, self.count)).to(self.items.device)
        return next_item_loss(
            state_BD, label_B, self.items[label_B - low], drawn, self.items[drawn - low], high - low
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FullSoftmax:
    """L_rec among all items of the domain, in chunks of them."""

    items: Tensor  # E_fusion of the domain, float32 [J, D]
    domain: Range

    def __call__(self, state_BD: Tensor, label_B: Tensor) -> Tensor:
        """Return the sum of -log p(label) (eq. 25)."""
        chunk = max(1, SOFTMAX_BYTES // (state_BD.element_size() * max(1, len(state_BD))))
        label_score_B = (state_BD * self.items[label_B - self.domain[0]]).sum(dim=-1)
        return (log_sum_exp(state_BD, self.items, chunk) - label_score_B).sum()


def log_sum_exp(state_BD: Tensor, items_JD: Tensor, chunk: int) -> Tensor:
    """Return log sum_j exp(state . item_j), [B], `chunk` items at a time; its gradient is of the states alone."""
    found: Tensor = _LogSumExp.apply(state_BD, items_JD, chunk)  # type: ignore[no-untyped-call]
    return found


class _LogSumExp(torch.autograd.Function):
    """One pass over the items holds the running maximum, sum and gradient; a chunk's logits are gone after it."""

    @staticmethod
    def forward(ctx: Any, state_BD: Tensor, items_JD: Tensor, chunk: int) -> Tensor:
        most_B = state_BD.new_full((len(state_BD),), -torch.inf)
        total_B, mean_BD = torch.zeros_like(most_B), torch.zeros_like(state_BD)
        for items in torch.split(items_JD, chunk):
            logits = state_BD @ items.T
            rising = torch.maximum(most_B, logits.amax(dim=1))
            share = logits.sub_(rising[:, None]).exp_()
            before = (most_B - rising).exp()
            total_B = total_B * before + share.sum(dim=1)
            mean_BD = torch.addmm(mean_BD * before[:, None], share, items)
            most_B = rising
        ctx.save_for_backward(mean_BD / total_B[:, None])  # the gradient: items weighted by their probability
        return most_B + total_B.log()

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, None, None]:
        (mean_BD,) = ctx.saved_tensors
        return gradient[0][:, None] * mean_BD, None, None
