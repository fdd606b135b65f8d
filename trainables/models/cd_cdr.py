"""CD-CDR: conditional diffusion-based item generation (anonymous SIGIR 2025 submission, repository Adamli12/CD-CDR).

One diffusion model generates item vectors of both domains. Its condition holds what a user chose in each domain, pooled
by attention and mixed by the indicator of the wanted domain; items are ranked by what is generated. Built on DreamRec.
In the paper's order: aggregates and condition, diffusion, guidance, training, recommendation.
What is ours, where text and code are silent or contradict each other: the pool is a mean, so that length does not scale
it; DreamRec's exponential variances, whose product of 1 - beta is the same for every T; the squared error moves the network
alone and a softmax (`rank_weight`) trains the table, for the squared error alone is best when all items are equal;
`hide_own` rows train as strict cold start scores; an epoch is a random quarter of the rows.
Shapes: B rows, L items of a row, D vector width, T steps, K drawn items, R rows that are scored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from features.checks import at_least, choice, dropout_share, number, refuse, step_size
from trainables.diffusion import Diffusion, SameForAll, normal_like, random_steps, timestep_embedding
from trainables.interface import Epoch, Selection, Setup, Variant
from trainables.sequence_tools import (
    Bag,
    Halves,
    Range,
    Scorer,
    attend,
    distinct,
    draw_shared,
    inside,
    newest_of_each,
    paired,
    softmax_loss,
    step,
    training_labels,
    unpacked,
)
from trainables.tasks.sequential import OVERLAPPING, Sequences, SequenceTask

WIDTH = 64  # D
DEVIATION = 0.1  # of the item table's start (ours); at 1 a dozen epochs do nothing but shrink the scores
DOMAIN_WEIGHTS = (0.2, 0.8)  # of the source's and the target's rows
VARIANCE_START, VARIANCE_END = 0.1, 10.0  # beta_0 and beta_1 of DreamRec's schedule
EPOCH_SHARE = 0.25  # of the rows
DENOISERS, SCORES = ("mlp1", "mlp2"), ("dot", "cosine")

NAME = "CD-CDR"
TASK_TYPE = "sequences"
SELECTION = Selection("val_ndcg10", "maximize")
ABLATIONS = {
    "mixed_history": Variant(config={"mixed_history": True}),
    "wo_attention": Variant(config={"attention": False}),
    "wo_indicator": Variant(config={"indicator": False}),
    "wo_diffusion": Variant(config={"diffusion": False}),
    "wo_guidance": Variant(config={"guidance": 0.0}),
    "wo_rank": Variant(config={"rank_weight": 0.0}),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Hyperparameters. Defaults are the paper's where it gives a value; (ours) marks where it is silent."""

    steps: int = 100  # T
    guidance: float = 2.0  # w
    drop: float = 0.1  # p, share of rows that are trained without a condition
    denoiser: str = "mlp1"  # mlp1 | mlp2: one linear map, or two with a GELU
    rank_weight: float = 1.0  # omega, of the softmax (ours)
    score: str = "dot"  # dot | cosine; the paper does not say, the code has both
    mixed_history: bool = False  # one pool of all items in the place of one for each domain
    attention: bool = True  # False: the mean of both domains' pools
    indicator: bool = True  # False: one vector stands for either wanted domain
    diffusion: bool = True  # False: items are ranked by the condition
    hide_own: float = 0.5  # share of overlapping users' rows that are trained without items of their own domain (ours)
    max_length: int = 10  # newest items of each domain that are read
    dropout: float = 0.1  # of the condition (ours)
    negatives: int = 256  # items of the softmax beside the label, drawn for each batch and domain (ours)
    lr: float = 1e-3  # Adam's
    weight_decay: float = 1e-6  # Adam's
    batch: int = 2048  # rows, half of them of each domain
    epochs: int = 60  # each of a quarter of the rows (ours)
    patience: int = 6  # epochs without a better validation NDCG@10 before training ends (ours)

    def __post_init__(self) -> None:
        refuse(
            choice(self, "denoiser", DENOISERS),
            choice(self, "score", SCORES),
            number(self, "drop", least=0, below=1),
            number(self, "hide_own", least=0, most=1),
            *(at_least(self, name, 1) for name in ("steps", "max_length", "negatives", "epochs", "patience")),
            *(at_least(self, name, least) for name, least in (("batch", 2), ("weight_decay", 0), ("guidance", 0))),
            at_least(self, "rank_weight", 0),
            dropout_share(self),
            step_size(self),
        )


def exponential(steps: int) -> Tensor:
    """Return DreamRec's variances, float64 [T]: 1 - exp(-b0 / T - (2 t - 1) (b1 - b0) / (2 T^2)); abar_T = e^-5.05."""
    t = torch.arange(1, steps + 1, dtype=torch.float64)
    rise = (2 * t - 1) * (VARIANCE_END - VARIANCE_START) / (2 * steps**2)
    return -torch.expm1(-VARIANCE_START / steps - rise)


class CDCDR(nn.Module):
    """Item table, condition, and denoiser; `nothing` is the condition of a row that has none."""

    def __init__(self, config: Config, items: int, source: Range, target: Range, seed: int) -> None:
        super().__init__()
        self.config, self.source, self.target, self.seed = config, source, target, seed
        self.item = nn.Embedding(items, WIDTH)
        nn.init.normal_(self.item.weight, std=DEVIATION)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.wanted = nn.Parameter(torch.randn(2, WIDTH))  # v, indicators of source and target
        self.nothing = nn.Parameter(torch.randn(WIDTH))  # Phi
        self.time = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        hidden = 2 * WIDTH
        self.denoiser = (
            nn.Linear(3 * WIDTH, WIDTH)
            if config.denoiser == "mlp1"
            else nn.Sequential(nn.Linear(3 * WIDTH, hidden), nn.GELU(), nn.Linear(hidden, WIDTH))
        )
        self.dropout = nn.Dropout(config.dropout)
        self.diffusion = Diffusion(exponential(config.steps))

    def pooled(self, bag: Bag, vector_UD: Tensor) -> Tensor:
        """h: mean over a row's items of what each reads of all of them, [B, D]; 0 for a row without items.

        (W_Q e)'(W_K e') = e'W_Q'W_K e', and W_V goes behind the sums: one map of each item in the place of three.
        """
        vector_BLD, real_BL = vector_UD[bag.item], bag.real
        query_BLD = vector_BLD @ (self.query.weight.T @ self.key.weight)
        vector = vector_BLD[:, None]
        read_BLD = attend(query_BLD[:, None], vector, vector, real_BL[:, None, None])[:, 0]
        total_BD = (read_BLD * real_BL[..., None]).sum(dim=1)
        pool: Tensor = self.value(total_BD / real_BL.sum(dim=1, keepdim=True).clamp(min=1))
        return pool

    def condition(self, source: Bag, target: Bag, domain: int, vector_UD: Tensor) -> Tensor:
        """c: both domains' pools, weighed by the indicator of the wanted domain, [B, D]; Phi where both are empty."""
        if self.config.mixed_history:
            both = Bag(torch.cat([source.item, target.item], dim=1), torch.cat([source.real, target.real], dim=1))
            pool_BPD, present_BP = self.pooled(both, vector_UD)[:, None], both.real.any(dim=1, keepdim=True)
        else:
            bags = (source, target)
            pool_BPD = torch.stack([self.pooled(bag, vector_UD) for bag in bags], dim=1)
            present_BP = torch.stack([bag.real.any(dim=1) for bag in bags], dim=1)
        indicator = self.wanted[domain if self.config.indicator else 0]
        logits_BP = pool_BPD @ indicator / math.sqrt(WIDTH) * float(self.config.attention)
        weight_BP = logits_BP.masked_fill(~present_BP, torch.finfo(logits_BP.dtype).min).softmax(dim=1)
        mixed_BD: Tensor = self.dropout(torch.einsum("bp,bpd->bd", weight_BP, pool_BPD))
        return torch.where(present_BP.any(dim=1, keepdim=True), mixed_BD, self.nothing)

    def predicted(self, xt_BD: Tensor, t_B: Tensor, condition_BD: Tensor) -> Tensor:
        """f: prediction of x_0, [B, D]."""
        time_BD = self.time(timestep_embedding(t_B, WIDTH))
        out: Tensor = self.denoiser(torch.cat([xt_BD, condition_BD.expand_as(xt_BD), time_BD], dim=1))
        return out

    def guided(self, xt_BD: Tensor, t_B: Tensor, condition_BD: Tensor) -> Tensor:
        """(1 + w) f(x_t, c, t) - w f(x_t, Phi, t), [B, D]."""
        w, with_condition = self.config.guidance, self.predicted(xt_BD, t_B, condition_BD)
        return (1 + w) * with_condition - w * self.predicted(xt_BD, t_B, self.nothing) if w else with_condition

    def users(self, history: Sequences) -> Tensor:
        """What is generated for the target domain, [R, D]; all rows have the same noise, drawn from the seed."""
        source, target = (newest_of_each(history, part, self.config.max_length) for part in (self.source, self.target))
        condition_RD = self.condition(source, target, 1, self.item.weight)
        if not self.config.diffusion:
            return condition_RD
        noise = SameForAll(torch.Generator().manual_seed(self.seed))
        start_RD = normal_like(condition_RD, noise)
        return self.diffusion.generate(lambda x, t, c: self.guided(x, t, condition_RD), None, start_RD, noise)

    def items(self, domain: Range) -> Tensor:
        """Vectors of a domain's items, [J, D]."""
        vector_JD = self.item.weight[domain[0] : domain[1]]
        return nn.functional.normalize(vector_JD, dim=1) if self.config.score == "cosine" else vector_JD


class Loss:
    """Loss of rows of one domain: the squared error of the prediction, and its softmax among drawn items."""

    def __init__(
        self, config: Config, task: SequenceTask, rng: np.random.Generator, generator: torch.Generator
    ) -> None:
        self.config, self.items, self.rng, self.generator = config, task.items, rng, generator
        self.domains = (task.source, task.target)
        self.labels, self.halves = training_labels(task, "merged"), Halves.of_task(task)
        self.overlapping = task.group == OVERLAPPING
        self.hidden = config.hide_own if "inter" in task.protocols else 0.0
        in_target = inside(self.labels.item, task.target)
        self.numbers = ((~in_target).nonzero().squeeze(1), in_target.nonzero().squeeze(1))  # labels of each domain

    def quarter(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield half-batches of both domains' rows, a random quarter of them in all."""
        parts = []
        for number_N in self.numbers:
            count = max(1, round(EPOCH_SHARE * len(number_N)))
            parts.append(
                number_N[torch.from_numpy(self.rng.choice(len(number_N), count, replace=False)).to(number_N.device)]
            )
        yield from paired(parts[0], parts[1], self.config.batch, self.rng)

    def __call__(self, network: CDCDR, domain: int, number_B: Tensor) -> Tensor:
        config, label_B = self.config, self.labels.item[number_B]
        parts = list(self.halves.before(self.labels, number_B, config.max_length))
        hidden_B = (
            self._random(len(label_B), label_B.device) < self.hidden * self.overlapping[self.labels.row[number_B]]
        )
        parts[domain] = parts[domain].kept(~hidden_B[:, None])
        drawn_PK = draw_shared([self.domains[domain]], config.negatives, self.rng).to(label_B.device)
        wanted, (source_at, target_at, label_at, drawn_at) = distinct(
            self.items, parts[0].item, parts[1].item, label_B, drawn_PK
        )
        vector_UD = network.item(wanted)
        condition_BD = network.condition(
            Bag(source_at, parts[0].real), Bag(target_at, parts[1].real), domain, vector_UD
        )
        label_BD = vector_UD[label_at]
        if not config.diffusion:
            return softmax_loss(
                condition_BD, label_B, label_BD, [self.domains[domain]], drawn_PK, vector_UD[drawn_at]
            )  # fmt: skip
        dropped_B = self._random(len(label_B), label_B.device) < config.drop
        condition_BD = torch.where(dropped_B[:, None], network.nothing, condition_BD)
        x0_BD = label_BD.detach()
        t_B = random_steps(len(label_B), config.steps, self.generator, label_B.device)
        noised_BD = network.diffusion.noised(x0_BD, t_B, normal_like(x0_BD, self.generator))
        found_BD = network.predicted(noised_BD, t_B, condition_BD)
        loss: Tensor = (found_BD - x0_BD).square().mean()
        if config.rank_weight:
            ranked = softmax_loss(found_BD, label_B, label_BD, [self.domains[domain]], drawn_PK, vector_UD[drawn_at])
            loss = loss + config.rank_weight * ranked
        return loss

    def _random(self, rows: int, device: torch.device) -> Tensor:
        return torch.from_numpy(self.rng.random(rows)).to(device)


def train(config: Config, task: SequenceTask, seed: int) -> Iterator[Setup | Epoch]:
    """Train one seed; both domains take part in each step by their weights."""
    network = CDCDR(config, task.items, task.source, task.target, seed)
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(network.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    yield Setup(network, optimiser=optimiser, rng=rng, generator=generator)
    loss, scorer = Loss(config, task, rng, generator), Scorer.of_task(network, task, "merged")

    def pack() -> dict[str, Any]:
        return {**scorer.pack(), "source": list(task.source)}

    while True:
        losses = []
        for halves in loss.quarter():
            parts = [weight * loss(network, k, halves[k]) for k, weight in enumerate(DOMAIN_WEIGHTS)]
            losses.append(step(optimiser, parts[0] + parts[1]))
        metrics = {
            "train_loss": sum(losses) / len(losses),
            "item_variance": float(network.item.weight.detach().var(dim=0).mean()),  # 0: all items have become equal
        }
        yield Epoch(predict=scorer, metrics=metrics, pack=pack)


def unpack(config: Config, state: Mapping[str, Any], seed: int) -> Callable[[Sequences], Tensor]:
    """Return a trained model: users' histories -> scores of all target-domain items, [U, J]."""
    source, target = tuple(state["source"]), tuple(state["target"])
    return unpacked(CDCDR(config, len(state["network"]["item.weight"]), source, target, seed), state).scores
