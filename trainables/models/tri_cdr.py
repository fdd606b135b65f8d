"""Tri-CDR: triple sequence learning for cross-domain recommendation (Ma et al., ACM TOIS 2023, arXiv 2304.05027).

A user's source, target and mixed sequence are encoded apart by a SASRec each; attention that knows the target's state and
the mixed mean reads each of them; a contrast and a triplet loss relate the three. In the paper's order: encoders, triple
cross-domain attention, prediction, triple contrastive learning (coarse: NT-Xent; fine: triplet).
What is ours: all that stands before a label is read, source items after the last target item too; an empty sequence is 0
(in the authors' code it is a mean over all positions, later ones included); under strict cold start a learned vector
stands for the target's state; encoders are pre-norm with masked padding, as SASRec here; they are pretrained by fields
that no trial varies (`prepare`), with a softmax over the cosine times 5, the default `scale`, whatever a trial's is.
Training users are those with both domains.
Shapes: B users, N labels, L positions, P pairs of a label and a position before it, D vector width, K drawn items, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, leaky_relu, normalize, pad, softplus
from torch.optim import Optimizer

from features.checks import at_least, choice, dropout_share, number, refuse, step_size
from trainables import pretraining
from trainables.interface import Epoch, Selection, Setup, Variant
from trainables.models import sasrec
from trainables.sequences.labels import Batch, Halves, Labels, training_labels
from trainables.sequences.losses import Unseen, contrast, distinct, draw_shared, next_item_loss, softmax_loss, step
from trainables.sequences.ranking import Scorer, unpacked
from trainables.sequences.views import Bag, Range, batches, inside, newest, newest_of_each
from trainables.tasks.sequential import OVERLAPPING, Sequences, SequenceTask

WIDTH = sasrec.WIDTH  # D
MAX_LENGTH = 50  # newest items of each sequence that are read
TAU = 0.1  # of the contrast
BETAS = 0.9, 0.98  # Adam's, in both stages: each encoder is pretrained as a SASRec
DECAY = 0.99  # of lr, an epoch
ENCODER = sasrec.Config(dropout=0.3)  # of the pretraining (ours)
ENCODER_EPOCHS = 10
SCALE = 5.0  # of the cosine in the pretraining, and where none is given in the training
PRETRAINING_VERSION = 4  # of what pretraining makes; part of its key
PARTS = ("merged", "source", "target")  # x, s, t
LOSSES = ("bce", "softmax")

NAME = "Tri-CDR"
TASK_TYPE = "sequences"
SELECTION = Selection("val_ndcg10", "maximize")
ABLATIONS = {
    "wo_attention": Variant(config={"attention": False}),
    "wo_contrast": Variant(config={"contrast": 0.0}),
    "wo_triplet": Variant(config={"triplet": 0.0}),
    "wo_mixed": Variant(config={"mixed": False}),
    "wo_pretraining": Variant(config={"pretrained": False}),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Hyperparameters. Defaults are the paper's where it gives a value; (ours) marks where it is silent."""

    loss: str = "bce"  # bce | softmax: one drawn item a label, or many (ours)
    attention: bool = True  # False: the mean of each sequence's states
    mixed: bool = True  # False: without the mixed sequence, its mean in the attention, its contrasts and the fine loss
    pretrained: bool = True  # each encoder starts as a SASRec of all training users
    contrast: float = 1.0  # weight of the coarse loss
    triplet: float = 1.0  # weight of the fine loss
    margin: float = 4.0  # of the fine loss
    rate_mixed_source: float = 1.0  # share of the pair (mixed, source) in the coarse loss; 1 each for the other two
    scale: float = SCALE  # of the cosine
    dropout: float = 0.2
    negatives: int = 512  # items of the softmax beside the label, drawn for each batch (ours)
    lr: float = 1e-3  # Adam's; times 0.99 an epoch
    batch: int = 128  # sequences
    epochs: int = 40  # (ours)
    patience: int = 5  # epochs without a better validation NDCG@10 before training ends (ours)

    def __post_init__(self) -> None:
        refuse(
            choice(self, "loss", LOSSES),
            *(at_least(self, name, 0) for name in ("contrast", "triplet", "margin", "rate_mixed_source")),
            number(self, "scale", above=0),
            *(at_least(self, name, 1) for name in ("negatives", "batch", "epochs", "patience")),
            dropout_share(self),
            step_size(self),
        )


class Attention(nn.Module):
    """Weights of a sequence's states, knowing the target's state q and the mixed mean m: 320 -> 80 -> 40 -> 1.

    The first map is linear in [h, q, h * q, q - h, m], so that only the product is worked out for each pair.
    """

    def __init__(self) -> None:
        super().__init__()
        self.state, self.query, self.mean = (nn.Linear(WIDTH, 80, bias=False) for _ in range(3))
        self.product = nn.Linear(WIDTH, 80)
        self.rest = nn.Sequential(nn.PReLU(), nn.Linear(80, 40), nn.PReLU(), nn.Linear(40, 1))

    def forward(
        self, state_BLD: Tensor, row_N: Tensor, real_NL: Tensor, query_ND: Tensor, mean_ND: Tensor
    ) -> Tensor:  # fmt: skip
        """Return sum_i softmax(a)_i h_i over the states that `real` shows each label of a row, [N, D]; 0 where none is.

        `state` and `query` are W_a - W_d and W_b + W_d of the concatenation's map: nothing is lost by learning them so.
        Pairs of a label and a state that it reads are worked out one after the other, without the others.
        """
        label_P, place_P = real_NL.nonzero(as_tuple=True)
        state_P = row_N[label_P] * state_BLD.shape[1] + place_P
        read_PD = state_BLD.flatten(0, 1).index_select(0, state_P)
        hidden = self.product(read_PD * query_ND.index_select(0, label_P))
        hidden = hidden + self.state(state_BLD).flatten(0, 1).index_select(0, state_P)
        hidden = hidden + (self.query(query_ND) + self.mean(mean_ND)).index_select(0, label_P)
        lowest = torch.full_like(real_NL, torch.finfo(hidden.dtype).min, dtype=hidden.dtype)
        logits_NL = lowest.masked_scatter(real_NL, self.rest(hidden))
        weight_P = logits_NL.softmax(dim=1)[label_P, place_P]
        return torch.zeros_like(query_ND).index_add(0, label_P, weight_P[:, None] * read_PD)


def mean_before(state_BLD: Tensor, row_N: Tensor, length_N: Tensor) -> Tensor:
    """Return the mean of the first states of each label's row, [N, D]; 0 for none."""
    sum_ND = state_BLD.cumsum(dim=1)[row_N, (length_N - 1).clamp(min=0)]
    return sum_ND * (length_N > 0)[:, None] / length_N.clamp(min=1)[:, None]


class TriCDR(nn.Module):
    """Three encoders, one attention for all, and the map of what they read."""

    def __init__(self, config: Config, items: int, source: Range, target: Range) -> None:
        super().__init__()
        self.config, self.source, self.target = config, source, target
        shape = sasrec.Config(dropout=config.dropout)
        self.encoders = nn.ModuleList(sasrec.SASRec(shape, items) for _ in PARTS)
        self.cold = nn.Parameter(torch.randn(WIDTH) * sasrec.DEVIATION)  # q_0, the state of an empty target sequence
        self.attention = Attention()
        self.inner, self.outer = nn.Linear(3 * WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.projections = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)) for _ in PARTS
        )

    @property
    def readers(self) -> list[sasrec.SASRec]:
        """The encoders of the mixed, the source and the target sequence."""
        return [encoder for encoder in self.encoders if isinstance(encoder, sasrec.SASRec)]

    def states(self, bags: Sequence[Bag], vectors: Sequence[Tensor]) -> list[Tensor]:
        """States of the mixed, source and target sequence, [B, L, D] each.

        `bags` hold places in `vectors`, one table [U, D] an encoder.
        """
        return [
            encoder.encode(embedding(bag.item, vector_UD), bag.length.clamp(min=1))  # the same bits by any threads
            for encoder, bag, vector_UD in zip(self.readers, bags, vectors, strict=True)
        ]

    def read(self, states: Sequence[Tensor], row_N: Tensor, reals: Sequence[Tensor]) -> list[Tensor]:
        """What attention reads of each sequence for some labels, [N, D] each.

        Label n reads the states that `reals`, bool [N, L] of each sequence, shows it of row `row_N[n]`: the first ones.
        """
        length_N, *_, target_N = (real.sum(dim=1) for real in reals)
        mean_ND = mean_before(states[0], row_N, length_N)
        if not self.config.mixed:
            mean_ND = torch.zeros_like(mean_ND)
        state_ND = states[2][row_N, (target_N - 1).clamp(min=0)]
        query_ND = torch.where((target_N > 0)[:, None], state_ND, self.cold)
        parts = [
            self.attention(h, row_N, real, query_ND, mean_ND)
            if self.config.attention
            else mean_before(h, row_N, real.sum(dim=1))
            for h, real in zip(states, reals, strict=True)
        ]
        if not self.config.mixed:
            parts[0] = torch.zeros_like(parts[0])
        return parts

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """U times the scale at length 1, so that its product with a unit vector is scale * cosine: [N, D]."""
        out_ND = self.outer(leaky_relu(self.inner(torch.cat(list(parts), dim=1))))
        return self.config.scale * normalize(out_ND, dim=1)

    def users(self, history: Sequences, domain: Range) -> Tensor:
        """Scaled unit vectors of users, [R, D]."""
        whole = (0, len(self.readers[0].item.weight))
        bags = [newest_of_each(history, part, MAX_LENGTH) for part in (whole, self.source, self.target)]
        states = self.states(bags, [encoder.item.weight for encoder in self.readers])
        rows = torch.arange(len(history), device=history.device)
        return self.joined(self.read(states, rows, [bag.real for bag in bags]))

    def items(self, domain: Range) -> Tensor:
        """Unit vectors of a domain's items in the target encoder's table, [J, D]."""
        return normalize(self.readers[2].item.weight[domain[0] : domain[1]], dim=1)


# --- pretraining --------------------------------------------------------------------------------------------------


def _document(task: SequenceTask, seed: int) -> dict[str, Any]:
    return {"version": PRETRAINING_VERSION, "train": task.train_key, "epochs": ENCODER_EPOCHS, "seed": seed}


def cosine_loss(network: sasrec.SASRec, batch: Batch, domains: Sequence[Range], drawn_PK: Tensor) -> Tensor:
    """Return the softmax of a batch's labels among the drawn items of their domain, of SCALE * cosine (the head above)."""
    items = len(network.item.weight)
    wanted, (input_BL, label_at, drawn_at) = distinct(items, batch.item, batch.label, drawn_PK)
    vector_UD = network.item(wanted)
    state_ND = network.encode(vector_UD[input_BL], batch.length)[batch.row, batch.column]
    user_ND, unit_UD = SCALE * normalize(state_ND, dim=1), normalize(vector_UD, dim=1)
    return softmax_loss(user_ND, batch.label, unit_UD[label_at], domains, drawn_PK, unit_UD[drawn_at])


def pretrained(task: SequenceTask, seed: int) -> Mapping[str, Tensor]:
    """Return the weights of the three SASRecs, of all training users' sequences, trained where they are missing.

    Both directions share them.
    """
    way = task.one_way()
    domains = [way.source, way.target]

    def make(kept: Path) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for place, part in enumerate(PARTS):
            labels = training_labels(way, part)

            def epoch(
                network: nn.Module, optimiser: Optimizer, rng: np.random.Generator, labels: Labels = labels
            ) -> None:
                assert isinstance(network, sasrec.SASRec)
                for batch in labels.batches(ENCODER.batch, ENCODER.max_length, rng):
                    drawn = draw_shared(domains, ENCODER.negatives, rng).to(batch.label.device)
                    step(optimiser, cosine_loss(network, batch, domains, drawn))

            build = partial(sasrec.SASRec, ENCODER, task.items)
            beside = kept.with_name(f"{kept.stem}-{part}{kept.suffix}")
            state = pretraining.pretrain(
                build, epoch, epochs=ENCODER_EPOCHS, lr=ENCODER.lr, betas=BETAS, seed=seed, task=task, kept=beside
            )  # fmt: skip
            out |= {f"{place}.{name}": value for name, value in state.items()}
        for part in PARTS:
            kept.with_name(f"{kept.stem}-{part}{kept.suffix}").unlink(missing_ok=True)
        return out

    learned = pretraining.kept_once(task, "tri_cdr", _document(task, seed), make)
    places = {"0": "0", "1": "1", "2": "2"} if way is task else {"0": "0", "1": "2", "2": "1"}
    return {places[name[0]] + name[1:]: value for name, value in learned.items()}


def prepare(config: Config, task: SequenceTask, seeds: Sequence[int]) -> None:
    """Pretrain what the trials share, where it is missing."""
    for seed in seeds if config.pretrained else ():
        pretrained(task, seed)


def shared(config: Config, task: SequenceTask, seeds: Sequence[int]) -> list[Path]:
    """Folders of the pretrained encoders, in that of all tasks."""
    return [pretraining.folder_of("tri_cdr", _document(task, seed)) for seed in seeds if config.pretrained]


# --- training -----------------------------------------------------------------------------------------------------


def triplet_loss(mixed_BD: Tensor, source_BD: Tensor, target_BD: Tensor, margin: float) -> Tensor:
    """Return the mean of max(0, |p_s - p_x| - |p_s - p_t| + margin): the source is nearer to the mixed sequence."""
    near_B, far_B = ((source_BD - other).norm(dim=1) for other in (mixed_BD, target_BD))
    loss: Tensor = (near_B - far_B + margin).clamp(min=0).mean()
    return loss


class Loss:
    """Loss of the target labels of some users, and what relates the three sequences before each user's last one."""

    def __init__(self, config: Config, task: SequenceTask, rng: np.random.Generator) -> None:
        self.config, self.task, self.rng = config, task, rng
        labels, self.halves = training_labels(task, "merged"), Halves.of_task(task)
        wanted = inside(labels.item, task.target) & (task.group[labels.row] == OVERLAPPING)
        self.labels = labels[wanted]
        self.unseen = Unseen(task.train, [task.target])

    def batches(self) -> Iterator[Tensor]:
        """Yield the numbers of all labels of some users at a time, who have about as many items: user by user."""
        users, count = torch.unique(self.labels.row, return_counts=True)
        numbers = Sequences(torch.arange(len(self.labels), device=users.device), pad(count.cumsum(0), (1, 0)))
        for part in batches(self.task.train.lengths[users], self.config.batch, self.rng):
            yield numbers.rows(part).item

    def __call__(self, network: TriCDR, number_N: Tensor) -> Tensor:
        config, labels = self.config, self.labels
        row_N, label_N = labels.row[number_N], labels.item[number_N]
        windows, reals, which_N = self.windows(number_N)
        if config.loss == "bce":
            drawn = self.unseen.draw(row_N, label_N, 1, self.rng)
        else:
            drawn = draw_shared([self.task.target], config.negatives, self.rng)[0].to(label_N.device)
        wanted, (*places, label_at, drawn_at) = distinct(
            self.task.items, *(bag.item for bag in windows), label_N, drawn
        )
        vectors = [encoder.item(wanted) for encoder in network.readers]
        looked_up = [Bag(place, window.real) for place, window in zip(places, windows, strict=True)]
        parts = network.read(network.states(looked_up, vectors), which_N, reals)
        user_ND, item_UD = network.joined(parts), normalize(vectors[2], dim=1)
        label_ND, drawn_D = item_UD[label_at], item_UD[drawn_at]
        if config.loss == "bce":
            score_N, other_N = ((user_ND * item).sum(dim=1) for item in (label_ND, drawn_D.squeeze(1)))
            loss: Tensor = softplus(-score_N).mean() + softplus(other_N).mean()
        else:
            low, high = self.task.target
            loss = next_item_loss(user_ND, label_N, label_ND, drawn, drawn_D, high - low) / len(label_N)
        return loss + self._related(network, parts, row_N)

    def windows(self, number_N: Tensor) -> tuple[list[Bag], list[Tensor], Tensor]:
        """What is read for some labels: each of their users' sequences once, [B, L], up to the user's last label.

        Also which items of it stand before each label, bool [N, L], and whose window each label's is, [N].
        """
        labels = self.labels
        _, which_N, count_B = labels.row[number_N].unique_consecutive(return_inverse=True, return_counts=True)  # type: ignore[no-untyped-call]
        last_B = number_N[count_B.cumsum(0) - 1]
        mixed = newest(self.task.train, labels.row[last_B], labels.place[last_B], MAX_LENGTH)
        windows = [mixed, *self.halves.before(labels, last_B, MAX_LENGTH)]
        reals = []
        for window, before in zip(windows, (labels.place, labels.before_source, labels.before_target), strict=True):
            older_B = before[last_B] - window.length  # items that the window leaves out
            visible_N = before[number_N] - older_B[which_N]
            place_L = torch.arange(window.item.shape[1], device=number_N.device)
            reals.append(place_L < visible_N[:, None])
        return windows, reals, which_N

    def _related(self, network: TriCDR, parts: Sequence[Tensor], row_N: Tensor) -> Tensor:
        """The coarse and the fine loss, of what is read before each user's last label."""
        config = self.config
        last_N = torch.cat([row_N[1:] != row_N[:-1], row_N.new_ones(1, dtype=torch.bool)])
        mixed, source, target = (f(part[last_N]) for f, part in zip(network.projections, parts, strict=True))
        loss: Tensor = mixed.new_zeros(())
        if config.contrast and len(mixed) > 1:
            pairs = [(source, target, 1.0)]
            if config.mixed:
                pairs = [(mixed, source, config.rate_mixed_source), (mixed, target, 1.0), *pairs]
            total = sum(rate for _, _, rate in pairs)
            for one, other, rate in pairs:
                tied = contrast(normalize(one, dim=1), normalize(other, dim=1), TAU)
                loss = loss + config.contrast * rate / total * tied
        if config.triplet and config.mixed:
            loss = loss + config.triplet * triplet_loss(mixed, source, target, config.margin)
        return loss


def train(config: Config, task: SequenceTask, seed: int) -> Iterator[Setup | Epoch]:
    """Train one seed (stage 2); users of both domains alone."""
    network, rng = TriCDR(config, task.items, task.source, task.target), np.random.default_rng(seed)
    if config.pretrained:
        network.encoders.load_state_dict(dict(pretrained(task, seed)))
    optimiser = torch.optim.Adam(network.parameters(), lr=config.lr, betas=BETAS, fused=True)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, DECAY)
    yield Setup(network, optimiser=optimiser, schedule=schedule, rng=rng)
    loss, scorer = Loss(config, task, rng), Scorer.of_task(network, task, "merged")

    def pack() -> dict[str, Any]:
        return {**scorer.pack(), "source": list(task.source)}

    while True:
        losses = [step(optimiser, loss(network, number_N)) for number_N in loss.batches()]
        schedule.step()
        yield Epoch(predict=scorer, metrics={"train_loss": sum(losses) / len(losses)}, pack=pack)


def unpack(config: Config, state: Mapping[str, Any], seed: int) -> Callable[[Sequences], Tensor]:
    """Return a trained model: users' histories -> scores of all target-domain items, [U, J]."""
    source, target = tuple(state["source"]), tuple(state["target"])
    items = len(state["network"]["encoders.0.item.weight"])
    return unpacked(TriCDR(config, items, source, target), state).scores
