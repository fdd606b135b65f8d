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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from features.checks import at_least, choice, dropout_share, number, refuse, step_size
from trainables.diffusion import Diffusion, SameForAll, normal_like, random_steps, timestep_embedding
from trainables.interface import Epoch, Selection, Setup, Variant
from trainables.sequences.blocks import Dropout
from trainables.sequences.labels import Halves, paired, training_labels
from trainables.sequences.losses import distinct, draw_shared, next_item_loss, picked, step
from trainables.sequences.ranking import Scorer, unpacked
from trainables.sequences.views import Bag, Range, both, inside, newest_of_each
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
    lr: float = 3e-3  # Adam's (ours; the paper's 1e-3 learns Kitchen too slowly for `epochs`)
    weight_decay: float = 1e-6  # Adam's
    batch: int = 2048  # rows, half of them of each domain
    epochs: int = 120  # each of a quarter of the rows (ours)
    patience: int = 12  # epochs without a better validation NDCG@10 before training ends (ours)

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
        self.dropout = Dropout(config.dropout)
        self.diffusion = Diffusion(exponential(config.steps))

    def pooled(self, bags: Sequence[Bag], vector_UD: Tensor) -> Tensor:
        """Return h of each bag: mean over a row's items of what each reads of all of them, [B, P, D]; 0 without items.

        (W_Q e)'(W_K e') = e'W_Q'W_K e' maps distinct items, once in the place of twice. W_V goes behind the sums, and
        mean_i sum_j a_ij e_j = sum_j (mean_i a_ij) e_j adds a row's items up once.
        """
        asked_UD = vector_UD @ (self.query.weight.T @ self.key.weight / math.sqrt(WIDTH))
        pools = []
        for bag in bags:
            rows = bag.real.any(dim=1).nonzero().squeeze(1)  # most have no item of the other domain
            item_RL, real_RL = bag.item[rows], bag.real[rows]
            vector_RLD, asked_RLD = picked(vector_UD, item_RL), picked(asked_UD, item_RL)
            # keys j before queries i: a softmax over a short last dimension is four times as dear
            logits_RJI = (vector_RLD @ asked_RLD.mT).masked_fill(~real_RL[..., None], -torch.inf)
            weight_RL = real_RL.to(logits_RJI.dtype)
            share_RI1 = (weight_RL / weight_RL.sum(dim=1, keepdim=True))[..., None]
            read_RD = ((logits_RJI.softmax(dim=1) @ share_RI1).mT @ vector_RLD).squeeze(1)
            pools.append(read_RD.new_zeros(len(bag.item), WIDTH).index_copy(0, rows, read_RD))
        pool: Tensor = self.value(torch.stack(pools, dim=1))
        return pool

    def condition(self, source: Bag, target: Bag, domain: int, vector_UD: Tensor) -> Tensor:
        """c: both domains' pools, weighed by the indicator of the wanted domain, [B, D]; Phi where both are empty."""
        bags = [both(source, target)] if self.config.mixed_history else [source, target]
        pool_BPD = self.pooled(bags, vector_UD)
        present_BP = torch.stack([bag.real.any(dim=1) for bag in bags], dim=1)
        indicator = self.wanted[domain if self.config.indicator else 0]
        logits_BP = pool_BPD @ indicator / math.sqrt(WIDTH) * float(self.config.attention)
        weight_BP = logits_BP.masked_fill(~present_BP, torch.finfo(logits_BP.dtype).min).softmax(dim=1)
        mixed_BD: Tensor = self.dropout(torch.einsum("bp,bpd->bd", weight_BP, pool_BPD))
        return torch.where(present_BP.any(dim=1, keepdim=True), mixed_BD, self.nothing)

    def predicted(self, xt_BD: Tensor, t_B: Tensor, condition_BD: Tensor) -> Tensor:
        """f: prediction of x_0, [B, D]."""
        step_T, place_B = torch.unique(t_B, return_inverse=True)  # no more than T of them
        time_BD = picked(self.time(timestep_embedding(step_T, WIDTH)), place_B)
        out: Tensor = self.denoiser(torch.cat([xt_BD, condition_BD.expand_as(xt_BD), time_BD], dim=1))
        return out

    def guided(self, xt_BD: Tensor, t_B: Tensor, condition_BD: Tensor) -> Tensor:
        """(1 + w) f(x_t, c, t) - w f(x_t, Phi, t), [B, D]."""
        w, with_condition = self.config.guidance, self.predicted(xt_BD, t_B, condition_BD)
        return (1 + w) * with_condition - w * self.predicted(xt_BD, t_B, self.nothing) if w else with_condition

    def users(self, history: Sequences, domain: Range) -> Tensor:
        """What is generated for the target domain, [R, D]; all rows have the same noise, drawn from the seed."""
        source, target = (newest_of_each(history, part, self.config.max_length) for part in (self.source, self.target))
        wanted, (source_at, target_at) = distinct(len(self.item.weight), source.item, target.item)
        vector_UD = picked(self.item.weight, wanted)
        condition_RD = self.condition(Bag(source_at, source.real), Bag(target_at, target.real), 1, vector_UD)
        if not self.config.diffusion:
            return condition_RD
        noise = SameForAll(torch.Generator().manual_seed(self.seed))
        start_RD = normal_like(condition_RD, noise)
        return self.diffusion.generate(lambda x, t, c: self.guided(x, t, condition_RD), None, start_RD, noise)

    def items(self, domain: Range) -> Tensor:
        """Vectors of a domain's items, [J, D]."""
        vector_JD = self.item.weight[domain[0] : domain[1]]
        return nn.functional.normalize(vector_JD, dim=1) if self.config.score == "cosine" else vector_JD


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What some labels of one domain are learned from."""

    domain: int
    source: Bag  # [B, L] source items before the label, and
    target: Bag  # target items
    label_B: Tensor  # int64 [B] item number
    drawn_K: Tensor  # int64 [K] items of the softmax beside the label


class Loss:
    """Loss of rows of each domain: the squared error of the prediction, and its softmax among drawn items."""

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

    def rows(self, domain: int, number_B: Tensor) -> Rows:
        """Draw what is hidden and what is offered beside these labels of a domain."""
        config, label_B = self.config, self.labels.item[number_B]
        parts = list(self.halves.before(self.labels, number_B, config.max_length))
        hidden_B = (
            self._random(len(label_B), label_B.device) < self.hidden * self.overlapping[self.labels.row[number_B]]
        )
        parts[domain] = parts[domain].kept(~hidden_B[:, None])
        drawn_K = draw_shared([self.domains[domain]], config.negatives, self.rng)[0].to(label_B.device)
        return Rows(domain=domain, source=parts[0], target=parts[1], label_B=label_B, drawn_K=drawn_K)

    def __call__(self, network: CDCDR, *rows: Rows) -> Tensor:
        """Sum over domains by their weights; items are looked up once, for the gradient of a look-up is a whole table."""
        wanted, places = distinct(
            self.items, *(item for row in rows for item in (row.source.item, row.target.item, row.label_B, row.drawn_K))
        )
        vector_UD, losses = picked(network.item.weight, wanted), []
        for row, *at in zip(rows, places[::4], places[1::4], places[2::4], places[3::4], strict=True):
            source, target = Bag(at[0], row.source.real), Bag(at[1], row.target.real)
            condition_BD = network.condition(source, target, row.domain, vector_UD)
            loss = self._loss(network, row, condition_BD, picked(vector_UD, at[2]), picked(vector_UD, at[3]))
            losses.append(DOMAIN_WEIGHTS[row.domain] * loss)
        return torch.stack(losses).sum()

    def _loss(self, network: CDCDR, row: Rows, condition_BD: Tensor, label_BD: Tensor, drawn_KD: Tensor) -> Tensor:
        config, device = self.config, label_BD.device

        def ranked(user_BD: Tensor) -> Tensor:
            low, high = self.domains[row.domain]
            return next_item_loss(user_BD, row.label_B, label_BD, row.drawn_K, drawn_KD, high - low) / len(label_BD)

        if not config.diffusion:
            return ranked(condition_BD)
        dropped_B = self._random(len(label_BD), device) < config.drop
        condition_BD = torch.where(dropped_B[:, None], network.nothing, condition_BD)
        x0_BD = label_BD.detach()
        t_B = random_steps(len(label_BD), config.steps, self.generator, device)
        noised_BD = network.diffusion.noised(x0_BD, t_B, normal_like(x0_BD, self.generator))
        found_BD = network.predicted(noised_BD, t_B, condition_BD)
        loss: Tensor = (found_BD - x0_BD).square().mean()
        return loss + config.rank_weight * ranked(found_BD) if config.rank_weight else loss

    def _random(self, rows: int, device: torch.device) -> Tensor:
        return torch.from_numpy(self.rng.random(rows)).to(device)


def variance(vector_ID: Tensor) -> float:
    """Return the mean of the columns' variances; `var(dim=0)` takes as long as a step."""
    return float((vector_ID - vector_ID.mean(dim=0)).square_().sum() / ((len(vector_ID) - 1) * vector_ID.shape[1]))


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
            losses.append(step(optimiser, loss(network, *(loss.rows(k, halves[k]) for k in range(2)))))
        metrics = {
            "train_loss": sum(losses) / len(losses),
            "item_variance": variance(network.item.weight.detach()),  # 0: all items have become equal
        }
        yield Epoch(predict=scorer, metrics=metrics, pack=pack)


def unpack(config: Config, state: Mapping[str, Any], seed: int) -> Callable[[Sequences], Tensor]:
    """Return a trained model: users' histories -> scores of all target-domain items, [U, J]."""
    source, target = tuple(state["source"]), tuple(state["target"])
    return unpacked(CDCDR(config, len(state["network"]["item.weight"]), source, target, seed), state).scores
