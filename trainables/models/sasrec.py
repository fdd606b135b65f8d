"""SASRec: self-attentive sequential recommendation (Kang & McAuley, ICDM 2018, arXiv 1808.09781).

A causal Transformer over item IDs; the state at each position predicts the item that comes next. In the paper's order:
embedding (III-A), blocks (III-B, III-C), prediction (III-D), training (III-E). Over two domains it has one catalogue and
one table, and asks at each position for the next item among those of its own domain (ours).
Shapes: B sequences, L positions, N labels of a batch, U distinct items of a batch, K drawn items, R rows, D vector width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from features.checks import at_least, choice, dropout_share, refuse, step_size
from trainables.interface import Epoch, Selection, Setup, Variant
from trainables.sequences.blocks import AttentionBlock, Dropout, causal, principal_components
from trainables.sequences.labels import SEQUENCES_READ, Batch, Labels, domains_read, training_labels
from trainables.sequences.losses import Unseen, bce_loss, distinct, draw_shared, softmax_loss, step
from trainables.sequences.ranking import Scorer, by_length, unpacked
from trainables.sequences.views import Range
from trainables.tasks.sequential import Sequences, SequenceTask

WIDTH = 64  # D; 50 in the paper, 64 for all systems of a comparison
DEVIATION = 0.02  # of the tables' start (ours)
LOSSES = ("softmax", "bce")
STARTS = ("random", "titles")

NAME = "SASRec"
TASK_TYPE = "sequences"
SELECTION = Selection("val_ndcg10", "maximize")
BOTH_DIRECTIONS = True
ABLATIONS = {
    "target_only": Variant(config={"sequences": "target"}),
    "paper_loss": Variant(config={"loss": "bce", "bce_negatives": 1}),
    "no_positions": Variant(config={"positions": False}),
    "text_start": Variant(config={"item_start": "titles"}),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Hyperparameters. Defaults are the paper's where it gives a value; (ours) marks where it is silent."""

    sequences: str = "merged"  # merged | target: both domains' items are read, or the target domain's alone (ours)
    loss: str = "softmax"  # softmax | bce; the paper's is bce with one negative, which is weaker (arXiv 2309.07602)
    negatives: int = 1024  # items of the softmax beside the label, drawn for each batch and domain (ours)
    bce_negatives: int = 1  # drawn for each label; read by `bce` only
    blocks: int = 2  # b
    heads: int = 1
    dropout: float = 0.5  # 0.5 for sparse data, 0.2 for MovieLens
    max_length: int = 50  # n, newest items of a history that are read
    positions: bool = True  # False: without position embeddings (the paper's ablation)
    item_start: str = "random"  # random | titles: start of the item table; principal components of titles (ours)
    lr: float = 1e-3  # Adam's
    weight_decay: float = 0.0  # Adam's
    batch: int = 128  # sequences
    epochs: int = 60  # (ours)
    patience: int = 5  # epochs without a better validation NDCG@10 before training ends (ours)

    def __post_init__(self) -> None:
        refuse(
            *(
                choice(self, "sequences", SEQUENCES_READ),
                choice(self, "loss", LOSSES),
                choice(self, "item_start", STARTS),
            ),
            *(at_least(self, name, 1) for name in ("negatives", "bce_negatives", "blocks", "heads", "max_length")),
            *(at_least(self, name, 1) for name in ("batch", "epochs", "patience")),
            *(at_least(self, "weight_decay", 0), dropout_share(self), step_size(self)),
            "" if self.heads > 0 and WIDTH % self.heads == 0 else f"heads is {self.heads}; give a divisor of {WIDTH}",
        )


class SASRec(nn.Module):
    """Item and position embeddings, and blocks of causal self-attention."""

    def __init__(self, config: Config, items: int) -> None:
        super().__init__()
        self.max_length = config.max_length
        self.item = nn.Embedding(items, WIDTH)
        self.position = nn.Embedding(config.max_length, WIDTH) if config.positions else None
        for table in filter(None, (self.item, self.position)):
            nn.init.normal_(table.weight, std=DEVIATION)
        self.blocks = nn.ModuleList(
            AttentionBlock(WIDTH, config.heads, WIDTH, config.dropout) for _ in range(config.blocks)
        )
        self.norm, self.dropout = nn.LayerNorm(WIDTH), Dropout(config.dropout)

    def encode(self, vector_BLD: Tensor, length_B: Tensor) -> Tensor:
        """State after each item, [B, L, D] (eqs. 1-5); the last real item of a row has the last position."""
        x, place_L = math.sqrt(WIDTH) * vector_BLD, torch.arange(vector_BLD.shape[1], device=length_B.device)
        if self.position is not None:
            x = x + self.position((place_L + self.max_length - length_B[:, None]).clamp(max=self.max_length - 1))
        x, mask = self.dropout(x), causal(len(place_L), x.device)
        for block in self.blocks:
            x = block(x, mask)
        state: Tensor = self.norm(x)
        return state

    def users(self, history: Sequences, domain: Range) -> Tensor:
        """State after the last item of each history, [R, D]."""

        def last(item_BL: Tensor, length_B: Tensor) -> Tensor:
            state_BLD = self.encode(self.item(item_BL), length_B)
            return state_BLD[torch.arange(len(length_B), device=length_B.device), length_B - 1]

        return by_length(history, self.max_length, last)

    def items(self, domain: Range) -> Tensor:
        """The table serves input and output (eq. 6), [J, D]."""
        return self.item.weight[domain[0] : domain[1]]


class Loss:
    """Loss of a batch's labels against drawn items: softmax (ours), or the paper's binary cross-entropy (eq. 7)."""

    def __init__(self, config: Config, task: SequenceTask, labels: Labels, rng: np.random.Generator) -> None:
        self.config, self.items, self.labels, self.rng = config, task.items, labels, rng
        self.domains = domains_read(task, config.sequences)
        self.unseen = Unseen(task.train, self.domains) if config.loss == "bce" else None

    def __call__(self, network: SASRec, batch: Batch) -> Tensor:
        """Mean over the labels."""
        config, label_N = self.config, batch.label
        if self.unseen is None:
            drawn = draw_shared(self.domains, config.negatives, self.rng).to(label_N.device)
        else:
            drawn = self.unseen.draw(self.labels.row[batch.number], label_N, config.bce_negatives, self.rng)
        wanted, (input_BL, label_at, drawn_at) = distinct(self.items, batch.item, label_N, drawn)
        vector_UD = network.item(wanted)
        state_ND = network.encode(vector_UD[input_BL], batch.length)[batch.row, batch.column]
        if self.unseen is None:
            return softmax_loss(state_ND, label_N, vector_UD[label_at], self.domains, drawn, vector_UD[drawn_at])
        return bce_loss(state_ND, vector_UD[label_at], vector_UD[drawn_at])


def train(config: Config, task: SequenceTask, seed: int) -> Iterator[Setup | Epoch]:
    """Train one seed, an epoch at a time (III-E)."""
    network, rng = SASRec(config, task.items), np.random.default_rng(seed)
    if config.item_start == "titles":
        network.item.weight.data.copy_(principal_components(task.titles(), WIDTH, DEVIATION))
    optimiser = torch.optim.Adam(
        network.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=config.weight_decay, fused=True
    )
    yield Setup(network, optimiser=optimiser, rng=rng)
    labels = training_labels(task, config.sequences)
    loss, scorer = Loss(config, task, labels, rng), Scorer.of_task(network, task, config.sequences)
    while True:
        losses = [
            step(optimiser, loss(network, batch)) for batch in labels.batches(config.batch, config.max_length, rng)
        ]
        metrics = {"train_loss": sum(losses) / len(losses)}
        yield Epoch(predict=scorer, turned=scorer.turned, metrics=metrics, pack=scorer.pack)


def unpack(config: Config, state: Mapping[str, Any], seed: int) -> Callable[[Sequences], Tensor]:
    """Return a trained model: users' histories -> scores of all target-domain items, [U, J]."""
    return unpacked(SASRec(config, len(state["network"]["item.weight"])), state).scores
