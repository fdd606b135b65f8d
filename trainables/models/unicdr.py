"""UniCDR: towards universal cross-domain recommendation (Cao et al., WSDM 2023, doi 10.1145/3539597.3570366).

A user has a vector for each domain, an aggregate of what they chose there, and one that domains share, an aggregate of
all. Masks make the shared aggregator carry what transfers: items of the history are left out, and in training it reads
the other domain alone. A discriminator ties both vectors.
What is ours: a user has no ID vector (`id_share` 0; the paper's is 0.5), for nobody who is scored has one; a row's
items are those before its label, so that the label is never among them (in the authors' code it is); `hide_own` rows
train as strict cold start scores; labels are learned by a softmax over many drawn items; the learning rate is constant.
The item similarities of the authors' code are left out.
Shapes: B rows, N items of all of them, D vector width, K drawn items, R rows that are scored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from features.checks import at_least, choice, dropout_share, number, refuse, step_size
from trainables.interface import Epoch, Selection, Setup, Variant
from trainables.sequences.blocks import Dropout
from trainables.sequences.labels import Halves, paired, training_labels
from trainables.sequences.losses import Unseen, bce_loss, distinct, draw_shared, next_item_loss, picked, step
from trainables.sequences.ranking import Scorer, unpacked
from trainables.sequences.views import Packed, Range, both, inside, newest_of_each
from trainables.tasks.sequential import OVERLAPPING, Sequences, SequenceTask

WIDTH = 64  # D; 128 in the authors' code, 64 for all systems of a comparison
DEVIATION = 0.02  # of the tables' start (ours)
AGGREGATORS, LOSSES = ("mean", "attention"), ("softmax", "bce")

NAME = "UniCDR"
TASK_TYPE = "sequences"
SELECTION = Selection("val_ndcg10", "maximize")
VERSION = 3  # 1: each direction had a training; 2: its one loss was bce
BOTH_DIRECTIONS = True
ABLATIONS = {
    "wo_contrast": Variant(config={"mix": 1.0}),
    "wo_domain_mask": Variant(config={"domain_mask": False}),
    "wo_interaction_mask": Variant(config={"mask_rate": 0.0}),
    "wo_specific": Variant(config={"specific": False}),
    "wo_shared": Variant(config={"shared": False}),
    "wo_hidden": Variant(config={"hide_own": 0.0}),
    "with_ids": Variant(config={"id_share": 0.5}),
    "paper_loss": Variant(config={"loss": "bce"}),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Hyperparameters. Defaults are those of the authors' code where it gives a value; (ours) marks where it is silent."""

    aggregator: str = "mean"  # mean | attention, by one learned query each (ours: the code's is the user's ID)
    mix: float = 0.4  # lambda, weight of the ratings' loss; 1 - lambda is that of the contrast
    mask_rate: float = 0.1  # share of a row's own items that are left out in training
    # In training the shared aggregator reads the other domain alone; of a row that has nothing there, its own (ours: rows
    # without a shared vector teach it nothing of what it reads in prediction).
    domain_mask: bool = True
    specific: bool = True  # the domain's own vector
    shared: bool = True  # the vector of all domains
    hide_own: float = 0.5  # share of overlapping users' rows that are trained without items of their own domain (ours)
    id_share: float = 0.0  # lambda_a, weight of the user's ID vector; it is the unknown user's half of the time
    max_length: int = 10  # newest items of each domain that are read
    dropout: float = 0.3
    loss: str = "softmax"  # softmax: many drawn items a label (ours) | bce: few, as published, which learns far less
    negatives: int = 1024  # items of the softmax beside the label, drawn for each batch and domain (ours)
    bce_negatives: int = 10  # items of the label's domain that the user has not, for each label
    lr: float = 3e-3  # Adam's (ours; the public 1e-3 is for 50,000 steps)
    weight_decay: float = 1e-5  # Adam's
    batch: int = 1024  # rows, half of them of each domain
    epochs: int = 30  # (ours)
    patience: int = 10  # epochs without a better validation NDCG@10 before training ends (ours; at first it falls)

    def __post_init__(self) -> None:
        refuse(
            choice(self, "aggregator", AGGREGATORS),
            choice(self, "loss", LOSSES),
            *(number(self, name, least=0, most=1) for name in ("mix", "hide_own", "id_share")),
            number(self, "mask_rate", least=0, below=1),
            "" if self.specific or self.shared else "specific and shared are both false; a user needs one of them",
            *(at_least(self, name, 1) for name in ("max_length", "negatives", "bce_negatives", "epochs", "patience")),
            *(at_least(self, name, least) for name, least in (("batch", 2), ("weight_decay", 0))),
            dropout_share(self),
            step_size(self),
        )


class Aggregator(nn.Module):
    """W of the mean of a row's items, or of their mean weighted by attention; 0 for a row without items."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.map = nn.Linear(WIDTH, WIDTH, bias=False)
        self.key = nn.Linear(WIDTH, WIDTH) if kind == "attention" else None
        self.query = nn.Parameter(torch.randn(WIDTH) * DEVIATION) if kind == "attention" else None

    def forward(self, vector_ND: Tensor, items: Packed) -> Tensor:
        """Vectors of the rows' items, [N, D] -> [B, D]."""
        if self.key is None or self.query is None:
            weight_N1 = vector_ND.new_ones(len(vector_ND), 1)
        else:
            logits_N1 = self.key(vector_ND).tanh() @ self.query[:, None]
            weight_N1 = (logits_N1 - logits_N1.detach().max()).exp()  # bounded: a tanh times one query
        total_B1 = items.sum(weight_N1)
        pooled: Tensor = self.map(items.sum(weight_N1 * vector_ND) / total_B1.clamp(min=1e-30))
        return pooled


class UniCDR(nn.Module):
    """One item table, an aggregator for each domain and a shared one, and a discriminator for each domain."""

    def __init__(self, config: Config, items: int, users: int, source: Range, target: Range) -> None:
        super().__init__()
        self.config, self.source, self.target = config, source, target
        self.item = nn.Embedding(items, WIDTH)
        nn.init.normal_(self.item.weight, std=DEVIATION)
        self.specific = nn.ModuleList(Aggregator(config.aggregator) for _ in range(2))  # source, target
        self.all = Aggregator(config.aggregator)
        self.tie = nn.ModuleList(nn.Bilinear(WIDTH, WIDTH, 1) for _ in range(2))
        self.user = (
            nn.Embedding(3 * users + 3, WIDTH) if config.id_share else None
        )  # source, target, shared; unknown last
        if self.user is not None:
            nn.init.normal_(self.user.weight, std=DEVIATION)
        self.dropout = Dropout(config.dropout)

    def aggregated(
        self, domain: int, visible: Packed, read: Packed, vector_UD: Tensor, user_B: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The domain's own vector of each row, and the shared one, [B, D] each.

        `visible`, `read`: items as places in `vector_UD`; `user_B`: sequences of training users, None: unknown users.
        """
        vector_ND = picked(vector_UD, torch.cat([visible.item, read.item]))
        own_ND, read_ND = torch.split(vector_ND, [len(visible.item), len(read.item)])
        specific_BD, shared_BD = self.specific[domain](own_ND, visible), self.all(read_ND, read)
        if self.user is None:
            return specific_BD, shared_BD
        share, unknown = self.config.id_share, (self.user.num_embeddings - 3) // 3
        user_B = torch.full((len(specific_BD),), unknown, device=specific_BD.device) if user_B is None else user_B
        own_id, shared_id = (self.user(user_B + place * (unknown + 1)) for place in (domain, 2))
        return share * own_id + (1 - share) * specific_BD, share * shared_id + (1 - share) * shared_BD

    def joined(self, specific_BD: Tensor, shared_BD: Tensor) -> Tensor:
        """What items are multiplied by, [B, D]."""
        parts = [
            part for part, wanted in ((specific_BD, self.config.specific), (shared_BD, self.config.shared)) if wanted
        ]
        return torch.stack([self.dropout(part) for part in parts]).sum(dim=0)

    def users(self, history: Sequences, domain: Range) -> Tensor:
        """Vectors for a domain: own from its items, shared from both domains', [R, D]."""
        domains = (self.source, self.target)
        bags, asked = [newest_of_each(history, part, self.config.max_length) for part in domains], domains.index(domain)
        visible, other = bags[asked], bags[1 - asked]
        read = both(other, visible).packed()
        return self.joined(*self.aggregated(asked, visible.packed(), read, self.item.weight))

    def items(self, domain: Range) -> Tensor:
        """Vectors of a domain's items, [J, D]."""
        return self.item.weight[domain[0] : domain[1]]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What some labels of one domain are learned from."""

    domain: int
    user_B: Tensor | None  # int64, whose ID vectors are read; None: of nobody
    visible: Packed  # items of the domain before the label
    read: Packed  # what the shared aggregator reads
    tied_B: Tensor  # bool, whether both domains are seen: own and shared vector are contrasted
    label_B: Tensor  # int64
    drawn: Tensor  # int64, items beside the labels: [K], or [B, K] of each


class Loss:
    """Loss of rows of each domain: their labels against drawn items, and own vectors against shared ones."""

    def __init__(self, config: Config, task: SequenceTask, rng: np.random.Generator) -> None:
        self.config, self.rng, self.items = config, rng, task.items
        self.labels, self.halves = training_labels(task, "merged"), Halves.of_task(task)
        self.domains = (task.source, task.target)
        self.unseen = Unseen(task.train, self.domains)
        self.overlapping = task.group == OVERLAPPING
        self.hidden = config.hide_own if "inter" in task.protocols else 0.0
        in_target = inside(self.labels.item, task.target)
        self.numbers = ((~in_target).nonzero().squeeze(1), in_target.nonzero().squeeze(1))  # labels of each domain

    def rows(self, domain: int, number_B: Tensor) -> Rows:
        """Draw what is masked and what is offered beside these labels of a domain."""
        config, device = self.config, number_B.device
        row_B, label_B = self.labels.row[number_B], self.labels.item[number_B]
        parts = self.halves.before(self.labels, number_B, config.max_length)
        visible, other = parts[domain], parts[1 - domain]
        hidden_B = self._random(len(row_B), device) < self.hidden * self.overlapping[row_B]
        visible = visible.kept(~hidden_B[:, None])
        visible = visible.kept(self._random(visible.real.shape, device) >= config.mask_rate)
        lacks_B = other.length == 0
        read = both(other, visible.kept(lacks_B[:, None]) if config.domain_mask else visible)
        if config.loss == "softmax":
            drawn = draw_shared([self.domains[domain]], config.negatives, self.rng)[0].to(device)
        else:
            drawn = self.unseen.draw(row_B, label_B, config.bce_negatives, self.rng)
        user_B = None
        if config.id_share:
            user_B = torch.where(self._random(len(row_B), device) < 0.5, len(self.overlapping), row_B)
        tied_B = (visible.length > 0) & ~lacks_B
        return Rows(
            domain=domain, user_B=user_B, visible=visible.packed(), read=read.packed(), tied_B=tied_B,
            label_B=label_B, drawn=drawn,
        )  # fmt: skip

    def __call__(self, network: UniCDR, *rows: Rows) -> Tensor:
        """Sum over domains; items are looked up once for all of them, for the gradient of a look-up is a whole table."""
        wanted, places = distinct(
            self.items, *(item for row in rows for item in (row.visible.item, row.read.item, row.label_B, row.drawn))
        )
        vector_UD = picked(network.item.weight, wanted)
        item_UD, losses = network.dropout(vector_UD), []
        for row, own_at, read_at, label_at, drawn_at in zip(rows, *(places[at::4] for at in range(4)), strict=True):
            visible, read = replace(row.visible, item=own_at), replace(row.read, item=read_at)
            vectors = network.aggregated(row.domain, visible, read, vector_UD, row.user_B)
            user_BD, label_BD, drawn = network.joined(*vectors), picked(item_UD, label_at), picked(item_UD, drawn_at)
            if self.config.loss == "softmax":
                low, high = self.domains[row.domain]
                rated = next_item_loss(user_BD, row.label_B, label_BD, row.drawn, drawn, high - low) / len(label_BD)
            else:
                rated = bce_loss(user_BD, label_BD, drawn)
            tied = self._tied(network, row.domain, row.tied_B, *vectors)
            losses.append(self.config.mix * rated + (1 - self.config.mix) * tied)
        return torch.stack(losses).sum()

    def _tied(
        self, network: UniCDR, domain: int, tied_B: Tensor, specific_BD: Tensor, shared_BD: Tensor
    ) -> Tensor:  # fmt: skip
        """Own and shared vector of a user against those of two users, over rows that see both domains."""
        rows = tied_B.nonzero().squeeze(1)
        if len(rows) < 2 or self.config.mix == 1:
            return specific_BD.new_zeros(())
        tie, specific, shared = network.tie[domain], picked(specific_BD, rows), picked(shared_BD, rows)
        assert isinstance(tie, nn.Bilinear)
        mapped = specific @ tie.weight[0]  # x'W of x'W y + b, once for the user's own y and for another's
        true, false = ((part * shared).sum(dim=1) + tie.bias for part in (mapped, mapped.roll(1, 0)))
        return softplus(-true).mean() + softplus(false).mean()

    def _random(self, shape: Any, device: torch.device) -> Tensor:
        return torch.from_numpy(self.rng.random(shape)).to(device)


def train(config: Config, task: SequenceTask, seed: int) -> Iterator[Setup | Epoch]:
    """Train one seed; both domains take part in each step alike, so it is the same for both directions."""
    way = task.one_way()
    network, rng = UniCDR(config, way.items, len(way.train), way.source, way.target), np.random.default_rng(seed)
    optimiser = torch.optim.Adam(network.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    yield Setup(network, optimiser=optimiser, rng=rng)
    loss, scorer = Loss(config, way, rng), Scorer.of_task(network, task, "merged")

    def pack() -> dict[str, Any]:
        return {**scorer.pack(), "domains": [list(way.source), list(way.target)], "users": len(way.train)}

    while True:
        losses = [
            step(optimiser, loss(network, loss.rows(0, source_B), loss.rows(1, target_B)))
            for source_B, target_B in paired(*loss.numbers, config.batch, rng)
        ]
        metrics = {"train_loss": sum(losses) / len(losses)}
        yield Epoch(predict=scorer, turned=scorer.turned, metrics=metrics, pack=pack)


def unpack(config: Config, state: Mapping[str, Any], seed: int) -> Callable[[Sequences], Tensor]:
    """Return a trained model: users' histories -> scores of all target-domain items, [U, J]."""
    items = len(state["network"]["item.weight"])
    source, target = map(tuple, state["domains"])
    return unpacked(UniCDR(config, items, state["users"], source, target), state).scores
