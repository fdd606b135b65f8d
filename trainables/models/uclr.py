"""UCLR: robust cross-domain recommendation via contrastive learning (Yang et al., WWW 2024, doi 10.1145/3589334.3645357).

A reconstruction: no code is public, and the abstract alone could be read. Known from it: a global user embedding over all
domains is made first; a dual-stream autoencoder draws it and a domain's own embedding together by a contrast with a
temperature of each user's own, so that users with few interactions are served; the whole is fine-tuned in each domain by
LoRA. Title, words and a shared author point to iSogCLR (Qiu et al., ICML 2023), whose loss is taken here. All else is ours:
    global stream   g(H) = |H|^(-1/2) sum of the items' vectors in the SVD of the normalised user-item matrix (rank 64)
    own stream      |H_D|^(-1/2) sum of the domain's own item vectors
    decoders        scores of a domain's items by a multinomial loss (sampled softmax)
Shapes: S sequences, B users, L items, I items of both domains, D vector width, K drawn items, R rows that are scored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from features.checks import at_least, dropout_share, number, refuse, step_size
from trainables import pretraining
from trainables.devices import seeded
from trainables.interface import Epoch, Place, Selection, Setup, Stage, Variant
from trainables.sequences.labels import Halves, training_labels
from trainables.sequences.losses import distinct, draw_shared, next_item_loss, step
from trainables.sequences.ranking import Scorer, unpacked
from trainables.sequences.views import Bag, Range, newest, newest_of_each
from trainables.tasks.sequential import OVERLAPPING, Sequences, SequenceTask

WIDTH = 64  # D, and the rank of the decomposition
MAX_LENGTH = 50  # newest items of each domain that are read
ALPHA = 16.0  # of LoRA
TEMPERATURE, LEAST, MOST = 0.1, 0.05, 0.7  # start and bounds of users' temperatures
MOVING, MOMENTUM, TEMPERATURE_LR = 0.9, 0.9, 0.01  # gamma, and the temperatures' momentum and step
POWER_ITERATIONS = 10  # three leave the first singular value at 0.989 instead of 1
PRETRAINING_VERSION = 2  # of the decomposition; part of its key

NAME = "UCLR"
TASK_TYPE = "sequences"
SELECTION = Selection("val_ndcg10", "maximize")
NOTE = "reconstruction"
ABLATIONS = {
    "wo_global": Variant(config={"global_stream": False}),
    "wo_contrast": Variant(config={"contrast": 0.0}),
    "wo_individual": Variant(config={"individual": False}),
    "wo_lora": Variant(config={"tuning": "none"}),
    "full_tuning": Variant(config={"tuning": "full"}),
}
TUNINGS = ("lora", "full", "none")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Hyperparameters of the reconstruction; all are ours but the choice of iSogCLR's defaults for `rho`."""

    global_stream: bool = True  # False: the domain's own stream alone
    contrast: float = 0.1  # omega
    rho: float = 0.3  # what keeps temperatures from growing
    individual: bool = True  # False: one temperature, 0.1, for all users
    tuning: str = "lora"  # lora | full | none: of what is fine-tuned on next items of the target domain
    rank: int = 8  # r of LoRA
    hidden: int = 128  # of the global stream
    stage_epochs: int = 20  # of the autoencoder, before the fine-tuning
    hide_own: float = 0.5  # share of overlapping users' rows that are tuned without items of the target domain
    dropout: float = 0.3  # share of a user's items that the autoencoder does not see
    negatives: int = 1024  # items of a softmax beside the label, drawn for each batch and domain
    lr: float = 1e-3  # Adam's
    batch: int = 512  # users; twice as many rows in the fine-tuning
    epochs: int = 20
    patience: int = 4  # epochs without a better validation NDCG@10 before training ends

    def __post_init__(self) -> None:
        refuse(
            "" if self.tuning in TUNINGS else f"tuning is {self.tuning!r}; choose from {', '.join(TUNINGS)}",
            *(at_least(self, name, 0) for name in ("contrast", "rho")),
            number(self, "hide_own", least=0, most=1),
            *(
                at_least(self, name, 1)
                for name in ("rank", "hidden", "stage_epochs", "negatives", "epochs", "patience")
            ),
            at_least(self, "batch", 2),
            dropout_share(self),
            step_size(self),
        )


# --- the global stream's items ------------------------------------------------------------------------------------


def _document(task: SequenceTask, seed: int) -> dict[str, Any]:
    return {"version": PRETRAINING_VERSION, "train": task.train_key, "rank": WIDTH, "seed": seed}


def global_items(task: SequenceTask, seed: int) -> Tensor:
    """Return what each item adds to the global stream, [I, D]: D_i^(-1/2) S^(-1/2) V_i of R~ = U S V'.

    R~ is the user-item matrix over the roots of users' and items' counts; for a training user g = U S^(1/2),
    times the root of the number of users (ours), so that its numbers are about as large as a layer's inputs are wont to be.
    """

    def make(kept: Path) -> dict[str, Any]:
        row, item = task.train.row, task.train.item
        users, items = (
            torch.bincount(part, minlength=size) for part, size in ((row, len(task.train)), (item, task.items))
        )
        value = (users[row] * items[item]).double() ** -0.5
        size = (len(task.train), task.items)
        matrix = torch.sparse_coo_tensor(torch.stack([row, item]), value, size, check_invariants=False)
        rank = min(WIDTH, *size)
        with seeded(seed, task.device):
            _, s, v = torch.svd_lowrank(matrix, q=min(rank + 16, *size), niter=POWER_ITERATIONS)
        share = items.clamp(min=1).double()[:, None] / len(task.train)
        vector = share**-0.5 * v[:, :rank] / s[:rank].clamp(min=1e-6).sqrt()
        return {"item": nn.functional.pad(vector, (0, WIDTH - rank)).float()}

    found: Tensor = pretraining.kept_once(task, "uclr", _document(task, seed), make)["item"]
    return found


def prepare(config: Config, task: SequenceTask, seeds: Sequence[int]) -> None:
    """Decompose what the trials share, where it is missing."""
    for seed in seeds:
        global_items(task, seed)


def shared(config: Config, task: SequenceTask, seeds: Sequence[int]) -> list[Path]:
    """Folders of the decompositions, in that of all tasks."""
    return [pretraining.folder_of("uclr", _document(task, seed)) for seed in seeds]


# --- the autoencoder ----------------------------------------------------------------------------------------------


class Matrix(nn.Module):
    """A matrix [out, in] that LoRA can lay a low-rank one over: W + (alpha / r) P Q, P = 0 at its start."""

    def __init__(self, out: int, width: int, rank: int, deviation: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, width) * deviation)
        self.left, self.right = nn.Parameter(torch.zeros(out, rank)), nn.Parameter(torch.randn(rank, width) * 0.02)
        self.scale = ALPHA / rank

    def rows(self, index: Tensor | slice = slice(None)) -> Tensor:
        """These rows, [..., in]."""
        return self.weight[index] + self.scale * self.left[index] @ self.right

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return x @ self.rows().T


def summed(bag: Bag, vector_UD: Tensor) -> Tensor:
    """Sum of the vectors of a row's items, [B, D]; `bag` holds places in `vector_UD`."""
    row_N, _ = bag.real.nonzero(as_tuple=True)
    return vector_UD.new_zeros(len(bag.item), vector_UD.shape[1]).index_add(0, row_N, vector_UD[bag.item[bag.real]])


class UCLR(nn.Module):
    """Both streams and the decoder of all items."""

    global_item: Tensor  # [I, D]

    def __init__(self, config: Config, global_item: Tensor, source: Range, target: Range) -> None:
        super().__init__()
        self.config, self.source, self.target = config, source, target
        self.register_buffer("global_item", global_item)
        items = len(global_item)

        def matrix(out: int, width: int) -> Matrix:
            return Matrix(out, width, config.rank, width**-0.5)

        self.inner, self.outer = matrix(config.hidden, WIDTH), matrix(WIDTH, config.hidden)
        self.own = nn.ModuleList(matrix(WIDTH, WIDTH) for _ in range(2))  # source, target
        self.inner_bias, self.own_bias = nn.Parameter(torch.zeros(config.hidden)), nn.Parameter(torch.zeros(2, WIDTH))
        self.item, self.decoder = matrix(items, WIDTH), matrix(items, WIDTH)
        self.bias = nn.Parameter(torch.zeros(items))

    def global_user(self, bags: Sequence[Bag]) -> Tensor:
        """z_G, [B, D]."""
        total = sum(summed(bag, self.global_item) for bag in bags)
        count = sum(bag.length for bag in bags)
        g_BD = total / torch.as_tensor(count).clamp(min=1).sqrt()[:, None]
        out: Tensor = self.outer((self.inner(g_BD) + self.inner_bias).tanh())
        return out

    def own_user(self, bag: Bag, domain: int, vector_UD: Tensor) -> Tensor:
        """z_D, [B, D]; 0 for a user without items; `bag` holds places in `vector_UD`."""
        total = summed(bag, vector_UD) / bag.length.clamp(min=1).sqrt()[:, None]
        out: Tensor = self.own[domain]((total + self.own_bias[domain]).tanh())
        return out * (bag.length > 0)[:, None]

    def joined(self, bags: Sequence[Bag], places: Sequence[Bag], vector_UD: Tensor) -> Tensor:
        """z_G + z_B beside a 1 for the biases, [B, D + 1]."""
        user_BD = self.own_user(places[1], 1, vector_UD)
        if self.config.global_stream:
            user_BD = user_BD + self.global_user(bags)
        return torch.cat([user_BD, user_BD.new_ones(len(user_BD), 1)], dim=1)

    def scored_by(self, item: Tensor) -> Tensor:
        """Decoder rows beside biases, [..., D + 1]."""
        return torch.cat([self.decoder.rows(item), self.bias[item][..., None]], dim=-1)

    def users(self, history: Sequences, domain: Range) -> Tensor:
        """Vectors for the target domain, [R, D + 1]."""
        bags = [newest_of_each(history, part, MAX_LENGTH) for part in (self.source, self.target)]
        return self.joined(bags, bags, self.item.rows())

    def items(self, domain: Range) -> Tensor:
        """Decoder rows of a domain's items, [J, D + 1]."""
        return self.scored_by(torch.arange(*domain, device=self.bias.device))

    def parts(self, lora: bool) -> list[nn.Parameter]:
        """What a stage trains: the low-rank matrices and the biases of items, or everything but them."""
        low = {id(m.left): m.left for m in self.modules() if isinstance(m, Matrix)}
        low |= {id(m.right): m.right for m in self.modules() if isinstance(m, Matrix)}
        if lora:
            return [*low.values(), self.bias]
        return [parameter for parameter in self.parameters() if id(parameter) not in low]


class Temperatures:
    """iSogCLR's estimator: every user's moving average of exponentials, and temperature (Qiu et al. 2023, algorithm 1)."""

    def __init__(self, users: int, config: Config, device: torch.device) -> None:
        self.config = config
        self.state: dict[str, Any] = {
            "average": torch.zeros(
                users, 4, device=device
            ),  # of exponentials, for each domain and direction; 0: none yet
            "temperature": torch.full((users,), TEMPERATURE, device=device),
            "gradient": torch.zeros(users, device=device),  # of the temperature, with momentum
        }

    def loss(self, user_B: Tensor, one_BD: Tensor, other_BD: Tensor, kind: int) -> Tensor:
        """Value whose gradient is the contrast's: `one` of a user against `other` of all users of the batch."""
        state, B = self.state, len(user_B)
        similarity = normalize(one_BD, dim=1) @ normalize(other_BD, dim=1).T
        difference = similarity - similarity.diagonal()[:, None]
        others = ~torch.eye(B, dtype=torch.bool, device=difference.device)
        tau = state["temperature"][user_B]
        exponential = (difference.detach() / tau[:, None]).exp() * others
        mean, before = exponential.sum(dim=1) / (B - 1), state["average"][user_B, kind]
        average = torch.where(before > 0, MOVING * mean + (1 - MOVING) * before, mean)
        state["average"][user_B, kind] = average
        weight = exponential / average[:, None].clamp(min=1e-12)
        if self.config.individual:
            drift = (weight * difference.detach()).sum(dim=1) / (B - 1) / tau
            gradient = average.clamp(min=1e-12).log() + self.config.rho - drift
            moved = MOMENTUM * state["gradient"][user_B] + (1 - MOMENTUM) * gradient
            state["gradient"][user_B] = moved
            state["temperature"][user_B] = (tau - TEMPERATURE_LR * moved).clamp(LEAST, MOST)
        total: Tensor = (weight * difference).sum(dim=1).mean() / (B - 1)
        return total


class Recovered:
    """Mean over users of the mean over their items of -log softmax of an item among it and the drawn ones.

    Drawn items that a user has are left out, so that a user's drawn scores serve all of the user's items.
    """

    def __init__(self, bag: Bag, label_ND: Tensor, drawn_K: Tensor, drawn_KD: Tensor, size: int) -> None:
        self.label_ND, self.drawn_KD, self.shift = label_ND, drawn_KD, math.log(size / len(drawn_K))
        self.row_N, _ = bag.real.nonzero(as_tuple=True)
        self.share_N = 1 / bag.length[self.row_N] / max(1, int(bag.real.any(dim=1).sum()))
        self.had_BK = torch.zeros(len(bag.item), len(drawn_K), dtype=torch.bool, device=drawn_K.device)
        ascending, order = drawn_K.sort()
        label_N = bag.item[bag.real]
        first_N, end_N = (torch.searchsorted(ascending, label_N, right=right) for right in (False, True))
        while len(again := (first_N < end_N).nonzero().squeeze(1)):  # as often as an item has been drawn
            self.had_BK[self.row_N[again], order[first_N[again]]] = True
            first_N = first_N + 1

    def __call__(self, user_BD: Tensor) -> Tensor:
        """The loss of users' vectors, [B, D], which get a 1 beside them for the items' biases."""
        user = nn.functional.pad(user_BD, (0, 1), value=1.0)
        drawn_BK = user @ self.drawn_KD.T + self.shift
        drawn_B = drawn_BK.masked_fill(self.had_BK, torch.finfo(drawn_BK.dtype).min).logsumexp(dim=1)
        score_N = (user[self.row_N] * self.label_ND).sum(dim=1)
        total: Tensor = (self.share_N * (torch.logaddexp(score_N, drawn_B[self.row_N]) - score_N)).sum()
        return total


class Trainer:
    """The losses of both stages."""

    def __init__(self, config: Config, task: SequenceTask, rng: np.random.Generator) -> None:
        self.config, self.task, self.rng = config, task, rng
        self.halves, self.domains = Halves.of_task(task), (task.source, task.target)
        self.temperatures = Temperatures(len(task.train), config, task.device)
        self.labels = training_labels(task, "merged")
        low, high = task.target
        self.numbers = ((self.labels.item >= low) & (self.labels.item < high)).nonzero().squeeze(1)
        self.hidden = config.hide_own if "inter" in task.protocols else 0.0
        self.overlapping = task.group == OVERLAPPING

    def shuffled(self, number_N: Tensor, size: int) -> Sequence[Tensor]:
        """The numbers in random batches."""
        return torch.split(number_N[torch.from_numpy(self.rng.permutation(len(number_N))).to(number_N.device)], size)

    def autoencoder(self, network: UCLR, user_B: Tensor) -> Tensor:
        """Stage 2: both streams give back a user's items in each domain, and are drawn together."""
        config, parts = self.config, (self.halves.source, self.halves.target)
        bags = [newest(part, user_B, part.lengths[user_B], MAX_LENGTH) for part in parts]
        read = [bag.kept(self._random(bag.real.shape) >= config.dropout) for bag in bags]
        drawn_PK = draw_shared(self.domains, config.negatives, self.rng).to(user_B.device)
        wanted, (*places, drawn_at) = distinct(self.task.items, *(bag.item for bag in bags), drawn_PK)
        vector_UD, scored_UD = network.item.rows(wanted), network.scored_by(wanted)
        global_BD, loss = network.global_user(read), user_B.new_zeros((), dtype=torch.float32)
        for domain, (bag, place) in enumerate(zip(bags, places, strict=True)):
            own_BD = network.own_user(Bag(place, read[domain].real), domain, vector_UD)
            low, high = self.domains[domain]
            label_ND, drawn_KD = scored_UD[place[bag.real]], scored_UD[drawn_at[domain]]
            recovered = Recovered(bag, label_ND, drawn_PK[domain], drawn_KD, high - low)
            loss = loss + recovered(own_BD)
            if not config.global_stream:
                continue
            loss = loss + recovered(global_BD)
            has = read[domain].real.any(dim=1)  # of what the streams read: own_user is 0 for a row without items
            if config.contrast and int(has.sum()) > 1:
                for kind, (one, other) in enumerate(((global_BD, own_BD), (own_BD, global_BD))):
                    tied = self.temperatures.loss(user_B[has], one[has], other[has], 2 * domain + kind)
                    loss = loss + config.contrast * tied
        return loss

    def tuning(self, network: UCLR, number_B: Tensor) -> Tensor:
        """Stage 3: the next item of the target domain."""
        config, label_B = self.config, self.labels.item[number_B]
        bags = list(self.halves.before(self.labels, number_B, MAX_LENGTH))
        hidden_B = self._random(len(label_B)) < self.hidden * self.overlapping[self.labels.row[number_B]]
        bags[1] = bags[1].kept(~hidden_B[:, None])
        drawn_K = draw_shared([self.task.target], config.negatives, self.rng)[0].to(label_B.device)
        wanted, (source_at, target_at) = distinct(self.task.items, bags[0].item, bags[1].item)
        places = [Bag(source_at, bags[0].real), Bag(target_at, bags[1].real)]
        user = network.joined(bags, places, network.item.rows(wanted))
        low, high = self.task.target
        label_ND, drawn_KD = network.scored_by(label_B), network.scored_by(drawn_K)
        return next_item_loss(user, label_B, label_ND, drawn_K, drawn_KD, high - low) / len(label_B)

    def _random(self, shape: Any) -> Tensor:
        return torch.from_numpy(self.rng.random(shape)).to(self.task.device)


def train(config: Config, task: SequenceTask, seed: int) -> Generator[Place]:
    """Train one seed: the autoencoder, then the fine-tuning; without it, the autoencoder's epochs are what is measured."""
    network, rng = UCLR(config, global_items(task, seed), task.source, task.target), np.random.default_rng(seed)
    trainer, progress = Trainer(config, task, rng), {"staged": 0}
    optimisers = {
        f"optimiser_{lora:d}": torch.optim.Adam(network.parts(lora), lr=config.lr, fused=True) for lora in (False, True)
    }
    temperatures = trainer.temperatures.state
    yield Setup(network, rng=rng, progress=progress, temperatures=temperatures, **optimisers)
    scorer, users = Scorer.of_task(network, task, "merged"), torch.arange(len(task.train), device=task.device)

    def pack() -> dict[str, Any]:
        return {**scorer.pack(), "source": list(task.source)}

    def autoencode() -> float:
        batches = [part for part in trainer.shuffled(users, config.batch) if len(part) > 1]
        losses = [step(optimisers["optimiser_0"], trainer.autoencoder(network, part)) for part in batches]
        return sum(losses) / len(losses)

    if config.tuning == "none":
        while True:
            yield Epoch(predict=scorer, metrics={"train_loss": autoencode()}, pack=pack)
    while progress["staged"] < config.stage_epochs:
        autoencode()
        progress["staged"] += 1
        yield Stage()
    optimiser = optimisers["optimiser_1" if config.tuning == "lora" else "optimiser_0"]
    while True:
        parts = trainer.shuffled(trainer.numbers, 2 * config.batch)
        losses = [step(optimiser, trainer.tuning(network, part)) for part in parts]
        yield Epoch(predict=scorer, metrics={"train_loss": sum(losses) / len(losses)}, pack=pack)


def unpack(config: Config, state: Mapping[str, Any], seed: int) -> Callable[[Sequences], Tensor]:
    """Return a trained model: users' histories -> scores of all target-domain items, [U, J]."""
    source, target = tuple(state["source"]), tuple(state["target"])
    return unpacked(UCLR(config, state["network"]["global_item"], source, target), state).scores
