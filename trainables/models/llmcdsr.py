"""LLMCDSR: cross-domain sequential recommendation with large language models (Xin et al., ACM TOIS 43(5), 2025).

doi 10.1145/3715099. What a language model writes for a user of one domain (the task's pseudo-interactions) is mapped into
the space of the other domain's items, pooled into one query, and the nearest real items are inserted into the user's
sequence; a SASRec learns from both. The pooling is learned by a meta gradient: a step on sequences with recalled items is
to help the users who are really in both domains. In the paper's order: contrastive pretraining (stage 2), recall, training.
What is ours: the language model and its prompt are this project's; in stage 2 one SASRec reads the halves of both domains;
blocks are pre-norm, as in SASRec here; the meta gradient is a difference of two gradients instead of a differentiated
optimiser, takes the moments of the main one, and is taken without dropout; items are learned by a softmax over many
drawn ones (`paper_loss`: against one). In the authors' code the text of an item meets the embedding of the one before it,
the meta users are all overlapping users whatever the ratio, and the inner optimiser is new in each step, which makes its
derivative vanish; here they are as the paper says.
Pretraining depends on one searched field, `contrast`, and is kept for each of its values (`prepare`).
Shapes: B sequences, L positions, N labels, K texts of a user, R recalled items, F text width, D vector width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.optim import Adam, Optimizer

from features.checks import at_least, choice, dropout_share, refuse, step_size
from features.errors import InputError
from trainables import pretraining
from trainables.interface import Epoch, Selection, Setup, Variant
from trainables.models import sasrec
from trainables.sequences.labels import Batch, Labels, halved_labels, training_labels
from trainables.sequences.losses import (
    Unseen,
    bce_loss,
    distinct,
    draw_shared,
    drawn_log_sum,
    picked,
    softmax_loss,
    step,
)
from trainables.sequences.ranking import Scorer, unpacked
from trainables.sequences.views import inside
from trainables.tasks.sequential import OVERLAPPING, SOURCE_ONLY, Sequences, SequenceTask

WIDTH = sasrec.WIDTH  # D
BETAS = (0.9, 0.98)  # of every Adam
MAX_LENGTH = 50  # newest items of a sequence that are read
TEXT_EPOCHS, TEXT_LR, TEXT_BATCH = 10, 1e-3, 128  # of the contrastive pretraining
# h |v| of the difference that stands for the second derivative: 1e-3 crosses kinks of ReLU in the tests, 1e-4 errs by 4 to
# 9 % in single precision, this by 1 to 2 %.
DIFFERENCE = 3e-4
PRETRAINING_VERSION = 3  # of what pretraining makes; part of its key
LOSSES, SOURCES = ("bce", "softmax"), ("titles", "texts")

NAME = "LLMCDSR"
TASK_TYPE = "sequences"
SELECTION = Selection("val_ndcg10", "maximize")
VERSION = 2  # 1: each direction had a training, and the meta gradient another step
BOTH_DIRECTIONS = True
NEEDS = ("titles", "pseudo_items")
ABLATIONS = {
    "wo_pseudo": Variant(config={"aug_batch": 0}),
    "wo_contrast": Variant(config={"contrast": 0.0}),
    "wo_meta": Variant(config={"meta": False}),
    "wo_recall": Variant(config={"recall": False}),
    "paper_loss": Variant(config={"loss": "bce"}),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Hyperparameters. Defaults are the authors' where their code gives a value; (ours) marks where it is silent."""

    recall: bool = True  # False: the task's pseudo-items are inserted as they are
    recall_from: str = (
        "titles"  # titles | texts: of the items that texts were taken for, or the texts themselves (ours)
    )
    recalled: int = 10  # k, items that are inserted into a sequence
    meta: bool = True  # False: the pooling stays a mean
    meta_interval: int = 4  # steps from one meta gradient to the next (ours; 1)
    contrast: float = 0.1  # weight of the contrast of texts and items in pretraining
    aug_batch: int = 32  # single-domain users whose sequences are augmented beside each batch; 0: none
    meta_batch: int = 128  # overlapping users of a meta gradient
    loss: str = "softmax"  # softmax: many drawn items a label (ours) | bce: one, as published, which learns slower
    negatives: int = 1024  # items of the softmax beside the label, drawn for each batch and domain (ours)
    dropout: float = 0.5
    lr: float = 1e-3  # Adam's, of the recommender and of the pooling
    batch: int = 128  # sequences
    epochs: int = 30  # (ours; 200)
    patience: int = 4  # epochs without a better validation NDCG@10 before training ends (ours)

    def __post_init__(self) -> None:
        refuse(
            choice(self, "recall_from", SOURCES),
            choice(self, "loss", LOSSES),
            *(at_least(self, name, 0) for name in ("contrast", "aug_batch")),
            *(at_least(self, name, 1) for name in ("recalled", "meta_interval", "meta_batch", "negatives", "batch")),
            *(at_least(self, name, 1) for name in ("epochs", "patience")),
            dropout_share(self),
            step_size(self),
        )


# --- texts in the space of items (stage 2) ------------------------------------------------------------------------


class Texts(nn.Module):
    """A SASRec of both domains' halves, and a map of texts into the space of each domain's items."""

    def __init__(self, items: int, width: int) -> None:
        super().__init__()
        self.reader = sasrec.SASRec(sasrec.Config(), items)
        self.maps = nn.ModuleList(nn.Linear(width, WIDTH, bias=False) for _ in range(2))  # of source, of target


def text_contrast(mapped_UD: Tensor, item_UD: Tensor) -> Tensor:
    """Return the loss of texts and items of the same numbers, [U, D] both: 2U-way, the other's same item is the class.

    Rows of texts: logits [p . e', p . p']; rows of items: [e . e', e . p']; own similarities are left out.
    """
    both_ND = torch.cat([mapped_UD, item_UD])
    own_N = torch.arange(len(both_ND), device=both_ND.device)
    others_N = drawn_log_sum(both_ND, both_ND, both_ND.new_zeros(len(both_ND)), own_N, own_N)
    return others_N.mean() - (mapped_UD * item_UD).sum(dim=1).mean()


def _document(task: SequenceTask, contrast: float, seed: int) -> dict[str, Any]:
    return {
        "version": PRETRAINING_VERSION, "train": task.train_key, "epochs": TEXT_EPOCHS, "contrast": contrast, "seed": seed,
    }  # fmt: skip


def pretrained(task: SequenceTask, contrast: float, seed: int) -> Mapping[str, Tensor]:
    """Return the weights of `Texts` of a task that is `one_way`, trained where they are missing."""
    labels, unseen = halved_labels(task), Unseen(task.train, [task.source, task.target])
    titles, users = task.titles(), len(task.train)

    def epoch(network: nn.Module, optimiser: Optimizer, rng: np.random.Generator) -> None:
        assert isinstance(network, Texts)
        for batch in labels.batches(TEXT_BATCH, MAX_LENGTH, rng):
            drawn_NK = unseen.draw(labels.row[batch.number] % users, batch.label, 1, rng)
            wanted, (input_BL, label_at, drawn_at) = distinct(task.items, batch.item, batch.label, drawn_NK)
            vector_UD = network.reader.item(wanted)
            state_ND = network.reader.encode(vector_UD[input_BL], batch.length)[batch.row, batch.column]
            loss = bce_loss(state_ND, vector_UD[label_at], vector_UD[drawn_at])
            for domain, span in enumerate((task.source, task.target)) if contrast else ():
                own = inside(wanted, span).nonzero().squeeze(1)
                if len(own):
                    tied = text_contrast(network.maps[domain](titles[wanted[own]]), vector_UD[own])
                    loss = loss + contrast * tied
            step(optimiser, loss)

    def make(kept: Path) -> dict[str, Any]:
        return pretraining.pretrain(
            lambda: Texts(task.items, titles.shape[1]), epoch, epochs=TEXT_EPOCHS, lr=TEXT_LR, betas=BETAS, seed=seed,
            task=task, kept=kept,
        )  # fmt: skip

    return pretraining.kept_once(task, "llmcdsr", _document(task, contrast, seed), make)


def prepare(config: Config, task: SequenceTask, seeds: Sequence[int]) -> None:
    """Pretrain what the trials share, where it is missing."""
    for seed in seeds:
        pretrained(task.one_way(), config.contrast, seed)


def shared(config: Config, task: SequenceTask, seeds: Sequence[int]) -> list[Path]:
    """Folders of the pretrained maps, in that of all tasks."""
    return [pretraining.folder_of("llmcdsr", _document(task, config.contrast, seed)) for seed in seeds]


# --- recall and insertion -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Augmented:
    """Sequences with recalled items in them."""

    batch: Batch  # `label` are real items
    slot: Tensor  # int64 [B, L] which of the row's recalled items stands there, -1: a real item


class Recall(nn.Module):
    """Pools a user's texts into a query, and finds the real items nearest to it; phi is 0 at its start: a mean."""

    def __init__(self, config: Config, task: SequenceTask, texts: Texts) -> None:
        super().__init__()
        self.config, self.task = config, task
        self.pooling = nn.Parameter(torch.zeros(2, WIDTH))  # phi, of source and target
        self.maps = [linear.weight.detach() for linear in texts.maps if isinstance(linear, nn.Linear)]
        unit = normalize(texts.reader.item.weight.detach(), dim=1)
        self.spans = (task.source, task.target)
        self.unit = [unit[low:high] for low, high in self.spans]
        if config.recall_from == "texts":
            if task.generated_texts is None:
                raise InputError(f"{task.folder}: this task has no generated texts; set recall_from: titles")
            self.rows, self.vectors = task.generated, task.generated_texts.all()
        else:
            self.rows, self.vectors = task.pseudo, task.titles()

    def query(self, user_B: Tensor) -> tuple[Tensor, Tensor]:
        """Q of users who lack a domain, [B, D], and which they lack, [B]: 0 the source, 1 the target."""
        lacking_B = (self.task.group[user_B] == SOURCE_ONLY).long()
        rows_BK = self.rows[user_B]
        vector_BKF = self.vectors[rows_BK.clamp(min=0)]
        mapped = torch.stack([vector_BKF @ weight.T for weight in self.maps])[
            lacking_B, torch.arange(len(user_B), device=user_B.device)
        ]
        logits = torch.einsum("bkd,bd->bk", mapped, self.pooling[lacking_B])
        weight_BK = logits.masked_fill(rows_BK < 0, torch.finfo(torch.float32).min).softmax(dim=1)
        return torch.einsum("bk,bkd->bd", weight_BK, mapped), lacking_B

    @torch.no_grad()
    def nearest(self, query_BD: Tensor, lacking_B: Tensor) -> Tensor:
        """The R items nearest to each query by cosine, int64 [B, R]."""
        out = torch.zeros(len(query_BD), self.config.recalled, dtype=torch.int64, device=query_BD.device)
        for domain, (low, _) in enumerate(self.spans):
            chosen = (lacking_B == domain).nonzero().squeeze(1)
            if len(chosen):
                similar = normalize(query_BD[chosen], dim=1) @ self.unit[domain].T
                count = min(self.config.recalled, similar.shape[1])
                best = similar.topk(count, dim=1).indices
                out[chosen] = low + best[:, torch.arange(self.config.recalled, device=best.device) % count]
        return out

    def items(self, user_B: Tensor) -> tuple[Tensor, Tensor | None]:
        """Recalled items [B, R], -1: none, and their queries [B, D]; None where pseudo-items are taken as they are."""
        if not self.config.recall:
            return self.task.pseudo[user_B, : self.config.recalled], None
        query_BD, lacking_B = self.query(user_B)
        return self.nearest(query_BD, lacking_B), query_BD


def inserted(task: SequenceTask, user_B: Tensor, recalled_BR: Tensor, rng: np.random.Generator) -> Augmented:
    """Return the users' sequences with each recalled item before a random own one; never after the last."""
    device, rows = user_B.device, []
    for user, recalled in zip(user_B.tolist(), recalled_BR.tolist(), strict=True):
        own = task.train.item[int(task.train.starts[user]) : int(task.train.starts[user + 1])].tolist()
        chosen = [(slot, item) for slot, item in enumerate(recalled) if item >= 0 and item not in own]
        place = rng.integers(len(own), size=len(chosen))
        row: list[tuple[int, int]] = []
        for at, item in enumerate(own):
            row += [(chosen[k][1], chosen[k][0]) for k in np.flatnonzero(place == at)]
            row.append((item, -1))
        rows.append(row[-MAX_LENGTH - 1 :])
    longest = max(map(len, rows))
    item_BL, slot_BL = torch.zeros(len(rows), longest, dtype=torch.int64), torch.full((len(rows), longest), -1)
    for number, row in enumerate(rows):
        item_BL[number, : len(row)] = torch.tensor([item for item, _ in row])
        slot_BL[number, : len(row)] = torch.tensor([slot for _, slot in row])
    length_B = torch.tensor([len(row) for row in rows])
    real_BL = (torch.arange(longest) < length_B[:, None]) & (slot_BL < 0)
    row_N, place_N = (real_BL & (torch.arange(longest) > 0)).nonzero(as_tuple=True)
    batch = Batch(
        item=item_BL[:, :-1].to(device), length=(length_B - 1).to(device), row=row_N.to(device),
        column=(place_N - 1).to(device), label=item_BL[row_N, place_N].to(device), number=user_B[row_N.to(device)],
    )  # fmt: skip
    return Augmented(batch, slot_BL[:, :-1].to(device))


# --- training (stage 3) -------------------------------------------------------------------------------------------


class Loss:
    """Loss of the labels of sequences, with or without recalled items in them."""

    def __init__(self, config: Config, task: SequenceTask, rng: np.random.Generator) -> None:
        self.config, self.task, self.rng = config, task, rng
        self.domains = [task.source, task.target]
        self.unseen = Unseen(task.train, self.domains)

    def drawn(self, user_N: Tensor, label_N: Tensor) -> Tensor:
        """Draw negatives for these labels of these users."""
        if self.config.loss == "bce":
            return self.unseen.draw(user_N, label_N, 1, self.rng)
        return draw_shared(self.domains, self.config.negatives, self.rng).to(label_N.device)

    def __call__(
        self, network: sasrec.SASRec, batch: Batch, drawn: Tensor, slot_BL: Tensor | None = None,
        recalled_BRD: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Mean over the labels. `recalled`: vectors [B, R, D] in the place of the table's at the slots."""
        wanted, (input_BL, label_at, drawn_at) = distinct(self.task.items, batch.item, batch.label, drawn)
        vector_UD = network.item(wanted)
        vector_BLD = vector_UD[input_BL]
        if slot_BL is not None and recalled_BRD is not None:
            row = torch.arange(len(slot_BL), device=slot_BL.device)[:, None]
            vector_BLD = torch.where((slot_BL >= 0)[..., None], recalled_BRD[row, slot_BL.clamp(min=0)], vector_BLD)
        state_ND = network.encode(vector_BLD, batch.length)[batch.row, batch.column]
        if self.config.loss == "bce":
            return bce_loss(state_ND, vector_UD[label_at], vector_UD[drawn_at])
        return softmax_loss(state_ND, batch.label, vector_UD[label_at], self.domains, drawn, vector_UD[drawn_at])


def mean_over_both(one: Tensor, other: Tensor, batch: Batch, augmented: Batch) -> Tensor:
    """Return the mean over all labels of X and X' (BCE(X u X')), from the mean over the labels of either."""
    n, m = len(batch.label), len(augmented.label)
    return (n * one + m * other) / (n + m)


def step_derivative(gradient: Tensor, state: Mapping[str, Any], lr: float, eps: float) -> tuple[Tensor, Tensor]:
    """Return what Adam's next step subtracts for a gradient, and its diagonal derivative with respect to the gradient.

    With g the gradient, m and u the moments after it, m^ and u^ corrected for bias at step t:
    J = lr [(1 - b1) / (1 - b1^t) / (sqrt(u^) + eps) - m^ (1 - b2) g / ((1 - b2^t) sqrt(u^) (sqrt(u^) + eps)^2)].
    """
    (b1, b2), t = BETAS, float(state["step"]) + 1
    m = (b1 * state["exp_avg"] + (1 - b1) * gradient) / (1 - b1**t)
    u = (b2 * state["exp_avg_sq"] + (1 - b2) * gradient.square()) / (1 - b2**t)
    root = u.sqrt()
    below = root + eps
    curve = torch.where(root > 0, m * (1 - b2) * gradient / ((1 - b2**t) * root.clamp(min=1e-30) * below.square()), 0.0)
    return lr * m / below, lr * ((1 - b1) / (1 - b1**t) / below - curve)


class Meta:
    """Gradient of the overlapping users' loss, after a step on augmented sequences, with respect to the pooling."""

    def __init__(self, config: Config, task: SequenceTask, recall: Recall, loss: Loss, labels: Labels) -> None:
        self.config, self.task, self.recall, self.loss = config, task, recall, loss
        self.labels = labels[task.group[labels.row] == OVERLAPPING]
        self.waiting: Iterator[Batch] = iter(())

    def gradient(
        self, network: sasrec.SASRec, optimiser: Adam, batch: Batch, user_N: Tensor, user_B: Tensor,
        rng: np.random.Generator,
    ) -> Tensor | None:  # fmt: skip
        """Return d BCE(M; theta'(phi)) / d phi, [2, D]; None before the first step of the optimiser."""
        recalled_BR, query_BD = self.recall.items(user_B)
        if network.item.weight not in optimiser.state or query_BD is None:
            return None
        meta = self._overlapping(rng)
        augmented = inserted(self.task, user_B, recalled_BR, rng)
        drawn = [self.loss.drawn(user_N, batch.label), self.loss.drawn(augmented.batch.number, augmented.batch.label)]
        meta_drawn = self.loss.drawn(self.labels.row[meta.number], meta.label)
        fixed_BRD = network.item.weight.detach()[recalled_BR.clamp(min=0)]
        read = [number for one in (batch, augmented.batch, meta) for number in (one.item, one.label)]
        wanted, _ = distinct(self.task.items, *read, *drawn, meta_drawn)

        def augmented_loss(query: Tensor) -> Tensor:
            vector_BRD = fixed_BRD + ((query - query.detach()) / self.config.recalled)[:, None]
            return self.loss(network, augmented.batch, drawn[1], augmented.slot, vector_BRD)

        def gradients(loss: Tensor) -> list[Tensor]:
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]

        with narrowed(network, optimiser, wanted) as moments:
            parameters = list(moments)
            plain, inserted_loss = self.loss(network, batch, drawn[0]), augmented_loss(query_BD.detach())
            inner = gradients(mean_over_both(plain, inserted_loss, batch, augmented.batch))
            eps, lr = optimiser.defaults["eps"], optimiser.param_groups[0]["lr"]
            steps = [step_derivative(g, moments[p], lr, eps) for p, g in zip(parameters, inner, strict=True)]
            with moved(parameters, [-away for away, _ in steps], 1.0):
                outer = gradients(self.loss(network, meta, meta_drawn))
            v = [derivative * slope for (_, derivative), slope in zip(steps, outer, strict=True)]
            size = math.sqrt(sum(float(part.square().sum()) for part in v))
            if size == 0:
                return torch.zeros_like(self.recall.pooling)
            h, sides = DIFFERENCE / size, []
            for sign in (1.0, -1.0):
                with moved(parameters, v, sign * h):
                    query, _ = self.recall.query(user_B)
                    sides.append(torch.autograd.grad(augmented_loss(query), self.recall.pooling)[0])
        share = len(augmented.batch.label) / (len(batch.label) + len(augmented.batch.label))  # of X', which reads phi
        return -share * (sides[0] - sides[1]) / (2 * h)

    def _overlapping(self, rng: np.random.Generator) -> Batch:
        batch = next(self.waiting, None)
        if batch is None:
            self.waiting = self.labels.batches(self.config.meta_batch, MAX_LENGTH, rng)
            batch = next(self.waiting)
        return batch


class Rows(nn.Module):
    """Rows of an item table, looked up by the items' numbers."""

    def __init__(self, table_ID: Tensor, wanted_U: Tensor) -> None:
        super().__init__()
        self.place_I = torch.zeros(len(table_ID), dtype=torch.int64, device=table_ID.device)
        self.place_I[wanted_U] = torch.arange(len(wanted_U), device=table_ID.device)
        self.weight = nn.Parameter(table_ID.detach()[wanted_U])

    def forward(self, number: Tensor) -> Tensor:
        """Vectors of items among those wanted."""
        return picked(self.weight, self.place_I[number])


@contextmanager
def narrowed(
    network: sasrec.SASRec, optimiser: Adam, wanted_U: Tensor
) -> Iterator[dict[nn.Parameter, Mapping[str, Any]]]:  # fmt: skip
    """Within a block the network has these items alone; yields its parameters with their moments.

    Nothing else of the table is read, and its gradients are no larger than what is.
    """
    table = network.item
    rows = Rows(table.weight, wanted_U)
    network.item = rows  # type: ignore[assignment]
    try:
        kept = optimiser.state[table.weight]
        of_rows = kept | {name: kept[name][wanted_U] for name in ("exp_avg", "exp_avg_sq")}
        others = {p: optimiser.state[p] for p in network.parameters() if p in optimiser.state}
        yield {rows.weight: of_rows, **others}
    finally:
        network.item = table


class moved:  # noqa: N801
    """Parameters moved by `scale` times a direction within a block, and put back to the last bit after it."""

    def __init__(self, parameters: Sequence[nn.Parameter], direction: Sequence[Tensor], scale: float) -> None:
        self.parameters, self.direction, self.scale = parameters, direction, scale

    @torch.no_grad()
    def __enter__(self) -> None:
        self.before = [parameter.detach().clone() for parameter in self.parameters]
        for parameter, away in zip(self.parameters, self.direction, strict=True):
            parameter.add_(away, alpha=self.scale)

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        for parameter, value in zip(self.parameters, self.before, strict=True):
            parameter.copy_(value)


def train(config: Config, task: SequenceTask, seed: int) -> Iterator[Setup | Epoch]:
    """Train one seed, an epoch of all merged sequences at a time, with augmented ones beside each batch.

    Both domains' items are labels, and users of either one alone are augmented: it is the same for both directions.
    """
    way = task.one_way()
    texts = Texts(way.items, way.titles().shape[1])
    texts.load_state_dict(dict(pretrained(way, config.contrast, seed)))
    recall = Recall(config, way, texts.to(way.device))
    network, rng = sasrec.SASRec(sasrec.Config(dropout=config.dropout), way.items), np.random.default_rng(seed)
    optimiser = Adam(network.parameters(), lr=config.lr, betas=BETAS, fused=True)
    pooling = Adam(recall.parameters(), lr=config.lr, betas=BETAS)
    both = nn.ModuleDict({"network": network, "recall": recall})
    yield Setup(both, optimiser=optimiser, pooling=pooling, rng=rng)
    labels, loss = training_labels(way, "merged"), Loss(config, way, rng)
    meta = Meta(config, way, recall, loss, labels)
    alone = ((way.group != OVERLAPPING) & (recall.rows >= 0).any(dim=1)).nonzero().squeeze(1)
    scorer = Scorer.of_task(network, task, "merged")
    while True:
        losses, meta.waiting = [], iter(())
        for number, batch in enumerate(labels.batches(config.batch, MAX_LENGTH, rng)):
            user_N, user_B = labels.row[batch.number], alone[:0]
            if config.aug_batch and len(alone):
                chosen = rng.choice(len(alone), min(config.aug_batch, len(alone)), replace=False)
                user_B = alone[torch.from_numpy(chosen).to(alone.device)]
            if len(user_B) and config.meta and config.recall and number % config.meta_interval == 0:
                both.eval()
                slope = meta.gradient(network, optimiser, batch, user_N, user_B, rng)
                both.train()
                if slope is not None:
                    recall.pooling.grad = slope
                    pooling.step()
            total = loss(network, batch, loss.drawn(user_N, batch.label))
            if len(user_B):
                with torch.no_grad():
                    recalled_BR, _ = recall.items(user_B)
                augmented = inserted(way, user_B, recalled_BR, rng)
                drawn = loss.drawn(augmented.batch.number, augmented.batch.label)
                total = mean_over_both(total, loss(network, augmented.batch, drawn), batch, augmented.batch)
            losses.append(step(optimiser, total))
        metrics = {"train_loss": sum(losses) / len(losses)}
        yield Epoch(predict=scorer, turned=scorer.turned, metrics=metrics, pack=scorer.pack)


def unpack(config: Config, state: Mapping[str, Any], seed: int) -> Callable[[Sequences], Tensor]:
    """Return a trained model: users' histories -> scores of all target-domain items, [U, J]."""
    network = sasrec.SASRec(sasrec.Config(dropout=config.dropout), len(state["network"]["item.weight"]))
    return unpacked(network, state).scores
