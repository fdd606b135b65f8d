"""UniSRec: universal sequence representations from item texts (Hou et al., KDD 2022, arXiv 2206.05941).

An item is what a mixture of experts makes of its title's vector, and, where `ids`, an ID embedding beside it; a causal
Transformer reads a user's items, and items are ranked by cosine. In the paper's order: universal items (section 2.1),
sequences (2.2), contrastive pretraining over both domains (2.3), training (2.4). LGCD lists the system as single-domain,
so nothing is pretrained unless `pretrain_epochs` says so; both domains' titles lie in one space all the same.
Unlike the authors' code, pairs that a contrast leaves out have no weight in its denominator at all (there: exp(0) each).
Shapes: B histories, L positions, F width of a title's vector, E experts, D vector width, U distinct items, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from features.checks import at_least, choice, dropout_share, number, refuse, step_size
from trainables.interface import Epoch, Selection, Setup, Stage, Variant
from trainables.sequences.blocks import AttentionBlock, Dropout, causal
from trainables.sequences.labels import SEQUENCES_READ, Batch, Labels, domains_read, training_labels
from trainables.sequences.losses import contrast_with, distinct, draw_shared, softmax_loss, step
from trainables.sequences.ranking import Scorer, by_length, unpacked
from trainables.sequences.views import Range
from trainables.tasks.sequential import Sequences, SequenceTask

WIDTH = 64  # D; 300 in the authors' code, 64 for all systems of a comparison
HEADS, BLOCKS, INNER = 2, 2, 256
MAX_LENGTH = 50  # newest items of a history that are read
DEVIATION = 0.02  # of the tables' start
VIEW_WEIGHT = 1e-3  # of the sequence-sequence contrast in pretraining
DROPPED = 0.2  # share of the items that a second view of a history leaves out
ROWS = 4096  # items whose titles are mapped at once without gradients

NAME = "UniSRec"
TASK_TYPE = "sequences"
SELECTION = Selection("val_ndcg10", "maximize")
BOTH_DIRECTIONS = True
NEEDS = ("titles",)
ABLATIONS = {
    "text_only": Variant(config={"ids": False}),
    "wo_moe": Variant(config={"experts": 1}),
    "wo_text": Variant(config={"text": False}),
    "pretrained": Variant(config={"pretrain_epochs": 10}),
    "target_only": Variant(config={"sequences": "target"}),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Hyperparameters. Defaults are the paper's where it gives a value; (ours) marks where it is silent."""

    sequences: str = "merged"  # merged | target: both domains' items are read, or the target domain's alone (ours)
    ids: bool = True  # an ID embedding beside the title ("transductive")
    text: bool = True  # False: IDs alone, SASRec with a cosine
    experts: int = 8
    temperature: float = 0.07  # tau
    dropout: float = 0.5
    adaptor_dropout: float = 0.2
    pretrain_epochs: int = 0  # of contrastive pretraining on each domain's own sequences
    freeze: bool = True  # after pretraining the Transformer stays as it is (the paper's parameter-efficient setting)
    negatives: int = 512  # items of the softmax beside the label, drawn for each batch and domain (ours)
    lr: float = 1e-3  # Adam's
    batch: int = 256  # sequences
    epochs: int = 60  # (ours)
    patience: int = 5  # epochs without a better validation NDCG@10 before training ends (ours)

    def __post_init__(self) -> None:
        refuse(
            choice(self, "sequences", SEQUENCES_READ),
            "" if self.ids or self.text else "ids and text are both false; an item needs one of them",
            number(self, "temperature", above=0),
            *(at_least(self, name, 1) for name in ("experts", "negatives", "batch", "epochs", "patience")),
            at_least(self, "pretrain_epochs", 0),
            dropout_share(self),
            number(self, "adaptor_dropout", least=0, below=1),
            step_size(self),
        )


class Adaptor(nn.Module):
    """Mixture of parametric whitenings: sum_k g_k (Dropout(x) - b_k) W_k (eqs. 2-4)."""

    def __init__(self, features: int, experts: int, dropout: float) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(experts, features))
        self.map = nn.Parameter(torch.empty(experts, features, WIDTH))
        nn.init.normal_(self.map, std=DEVIATION)
        self.gate, self.noise = (
            nn.Parameter(torch.zeros(features, experts)),
            nn.Parameter(torch.zeros(features, experts)),
        )
        self.dropout = Dropout(dropout)

    def forward(self, x_UF: Tensor) -> Tensor:
        """[U, F] -> [U, D]; the gate is noisy in training alone."""
        logits_UE = x_UF @ self.gate
        if self.training:
            logits_UE = logits_UE + torch.randn_like(logits_UE) * (functional.softplus(x_UF @ self.noise) + 0.01)
        mapped_EUD = torch.einsum("uf,efd->eud", self.dropout(x_UF), self.map)
        mapped_EUD = mapped_EUD - torch.einsum("ef,efd->ed", self.shift, self.map)[:, None]
        return torch.einsum("ue,eud->ud", logits_UE.softmax(dim=-1), mapped_EUD)


class UniSRec(nn.Module):
    """Adaptor of titles, ID table, and causal blocks over both."""

    titles: Tensor  # float32 [I, F]

    def __init__(self, config: Config, items: int, titles: Tensor) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("titles", titles, persistent=False)  # of the task: no checkpoint holds it
        self.adaptor = Adaptor(titles.shape[1], config.experts, config.adaptor_dropout) if config.text else None
        self.item = nn.Embedding(items, WIDTH) if config.ids else None
        self.position = nn.Embedding(MAX_LENGTH, WIDTH)
        for table in filter(None, (self.item, self.position)):
            nn.init.normal_(table.weight, std=DEVIATION)
        self.blocks = nn.ModuleList(
            AttentionBlock(WIDTH, HEADS, INNER, config.dropout, norm="post", activation="gelu", joined=True)
            for _ in range(BLOCKS)
        )
        self.norm, self.dropout = nn.LayerNorm(WIDTH), Dropout(config.dropout)

    def vectors(self, item_U: Tensor) -> Tensor:
        """v_i + e_i of these items, [U, D]."""
        parts = [self.item(item_U)] if self.item is not None else []
        parts += [self.adaptor(self.titles[item_U])] if self.adaptor is not None else []
        return torch.stack(parts).sum(dim=0)

    def encode(self, vector_BLD: Tensor) -> Tensor:
        """State after each item, [B, L, D] (eqs. 5-6); padding is at the end, in nobody's past."""
        L = vector_BLD.shape[1]
        x = self.dropout(self.norm(vector_BLD + self.position.weight[:L]))
        mask = causal(L, x.device)
        for block in self.blocks:
            x = block(x, mask)
        return x  # type: ignore[no-any-return]

    def scored(self, state_BD: Tensor) -> Tensor:
        """States so that their product with a unit vector is the cosine / tau, [B, D]."""
        return functional.normalize(state_BD, dim=-1) / self.config.temperature

    def users(self, history: Sequences, domain: Range) -> Tensor:
        """Scored state after the last item of each history, [R, D]."""
        known, (place_N,) = distinct(len(self.titles), history.item)
        vector_UD = self._all(known)

        def last(place_BL: Tensor, length_B: Tensor) -> Tensor:
            return self.encode(vector_UD[place_BL])[torch.arange(len(length_B), device=length_B.device), length_B - 1]

        return self.scored(by_length(Sequences(place_N, history.starts), MAX_LENGTH, last))

    def items(self, domain: Range) -> Tensor:
        """Unit vectors of a domain's items, [J, D]."""
        return functional.normalize(self._all(torch.arange(*domain, device=self.titles.device)), dim=-1)

    def _all(self, item_U: Tensor) -> Tensor:
        return torch.cat([self.vectors(part) for part in torch.split(item_U, ROWS)])


class Pretraining:
    """Contrasts of a sequence's state with the item after it, and with a view that lacks some of its items (eqs. 7-9)."""

    def __init__(self, network: UniSRec, labels: list[Labels], rng: np.random.Generator) -> None:
        self.network, self.labels, self.rng = network, labels, rng

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield histories [B, L], lengths [B] and labels [B]; half of a batch is of each domain, until both are done."""
        parts = []
        for labels in self.labels:
            chosen = labels.one_each(self.rng)
            order = torch.from_numpy(self.rng.permutation(len(chosen))).to(chosen.device)
            parts.append(torch.split(chosen[order], size // 2))
        for at in range(max(map(len, parts))):
            rows = [
                (*labels.histories(part[at % len(part)], MAX_LENGTH), labels.item[part[at % len(part)]])
                for labels, part in zip(self.labels, parts, strict=True)
            ]
            longest = max(item_BL.shape[1] for item_BL, _, _ in rows)
            item = torch.cat([functional.pad(item_BL, (0, longest - item_BL.shape[1])) for item_BL, _, _ in rows])
            yield item, torch.cat([row[1] for row in rows]), torch.cat([row[2] for row in rows])

    def loss(self, item_BL: Tensor, length_B: Tensor, label_B: Tensor) -> Tensor:
        """Sequence-item contrast, and the sequence-sequence one by its weight."""
        network = self.network
        fewer_BL, fewer_length_B = self._without_some(item_BL, length_B)
        wanted, (item_at, fewer_at, label_at) = distinct(len(network.titles), item_BL, fewer_BL, label_B)
        vector_UD = network.vectors(wanted)
        row = torch.arange(len(label_B), device=label_B.device)
        state_BD, view_BD = (
            functional.normalize(network.encode(vector_UD[at])[row, length - 1], dim=-1)
            for at, length in ((item_at, length_B), (fewer_at, fewer_length_B))
        )
        target_BD, tau = functional.normalize(vector_UD[label_at], dim=-1), network.config.temperature
        to_item = contrast_with(state_BD, target_BD, tau, label_B)
        return to_item + VIEW_WEIGHT * contrast_with(state_BD, view_BD, tau, label_B)

    def _without_some(self, item_BL: Tensor, length_B: Tensor) -> tuple[Tensor, Tensor]:
        """The same histories without a share of their items; the first stays."""
        kept_BL = torch.from_numpy(self.rng.random(item_BL.shape) >= DROPPED).to(item_BL.device)
        kept_BL[:, 0] = True
        kept_BL &= torch.arange(item_BL.shape[1], device=item_BL.device) < length_B[:, None]
        order = (~kept_BL).to(torch.int8).argsort(dim=1, stable=True)
        length = kept_BL.sum(dim=1)
        return item_BL.gather(1, order)[:, : int(length.max())], length


class Loss:
    """Softmax over cosine / tau of every label of a batch among drawn items of its own domain (eq. 10)."""

    def __init__(self, config: Config, task: SequenceTask, rng: np.random.Generator) -> None:
        self.config, self.items, self.rng = config, task.items, rng
        self.domains = domains_read(task, config.sequences)

    def __call__(self, network: UniSRec, batch: Batch) -> Tensor:
        drawn = draw_shared(self.domains, self.config.negatives, self.rng).to(batch.label.device)
        wanted, (item_at, label_at, drawn_at) = distinct(self.items, batch.item, batch.label, drawn)
        vector_UD = network.vectors(wanted)
        state_ND = network.scored(network.encode(vector_UD[item_at])[batch.row, batch.column])
        unit_UD = functional.normalize(vector_UD, dim=-1)
        return softmax_loss(state_ND, batch.label, unit_UD[label_at], self.domains, drawn, unit_UD[drawn_at])


def train(config: Config, task: SequenceTask, seed: int) -> Iterator[Setup | Stage | Epoch]:
    """Train one seed: pretraining where it is asked for, then an epoch at a time."""
    network, rng = UniSRec(config, task.items, task.titles()), np.random.default_rng(seed)
    optimiser = torch.optim.Adam(network.parameters(), lr=config.lr, fused=True)
    progress = {"pretrained": 0}
    yield Setup(network, optimiser=optimiser, rng=rng, progress=progress)
    if config.pretrain_epochs:
        sides = sorted(("source", "target"), key=lambda side: getattr(task, side))  # alike in both directions
        pretraining = Pretraining(network, [training_labels(task, side) for side in sides], rng)
    while progress["pretrained"] < config.pretrain_epochs:
        for rows in pretraining.batches(config.batch):
            step(optimiser, pretraining.loss(*rows))
        progress["pretrained"] += 1
        yield Stage()
    if config.pretrain_epochs and config.freeze:
        for part in (network.position, network.blocks, network.norm):
            part.requires_grad_(False)
    labels, loss = training_labels(task, config.sequences), Loss(config, task, rng)
    scorer = Scorer.of_task(network, task, config.sequences)

    def pack() -> dict[str, Any]:
        return {**scorer.pack(), "titles": network.titles}

    while True:
        losses = [step(optimiser, loss(network, batch)) for batch in labels.batches(config.batch, MAX_LENGTH, rng)]
        metrics = {"train_loss": sum(losses) / len(losses)}
        yield Epoch(predict=scorer, turned=scorer.turned, metrics=metrics, pack=pack)


def unpack(config: Config, state: Mapping[str, Any], seed: int) -> Callable[[Sequences], Tensor]:
    """Return a trained model: users' histories -> scores of all target-domain items, [U, J]."""
    titles = state["titles"]
    return unpacked(UniSRec(config, len(titles), titles), state).scores
