"""GRU4Rec: recurrent recommendation (Hidasi, Karatzoglou, Baltrunas & Tikk, ICLR 2016, arXiv 1511.06939).

A gated recurrent network reads a user's items one after the other; its state after each item scores the item that comes
next. The paper reads sessions; here a sequence is all that a user did in both domains, over one item table, and at each
position the next item is asked for among those of its own domain (ours). Losses: BPR-max of the second paper (Hidasi &
Karatzoglou, CIKM 2018, arXiv 1706.03847), or a sampled softmax with log(size/K) correction (ours).
Shapes: B sequences, L positions, N labels of a batch, U distinct items of a batch, P domains, K drawn items, R rows,
J items of a domain, D vector width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, pad

from features.checks import at_least, choice, flag, number, refuse, step_size
from trainables.interface import Epoch, Selection, Setup, Variant
from trainables.sequences.blocks import Dropout
from trainables.sequences.labels import SEQUENCES_READ, Batch, domains_read, training_labels
from trainables.sequences.losses import distinct, draw_weighted, softmax_loss, step
from trainables.sequences.ranking import Scorer, by_length, unpacked
from trainables.sequences.views import Range, inside
from trainables.tasks.sequential import Sequences, SequenceTask

DEVIATION = 0.02  # of the item table's start (ours)
LOSSES = ("softmax", "bpr_max")

NAME = "GRU4Rec"
TASK_TYPE = "sequences"
SELECTION = Selection("val_ndcg10", "maximize")
BOTH_DIRECTIONS = True
ABLATIONS = {
    "target_only": Variant(config={"sequences": "target"}),
    "paper_loss": Variant(config={"loss": "bpr_max"}),
    "untied": Variant(config={"tied": False}),
    "popular_negatives": Variant(config={"sample_alpha": 0.5}),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Hyperparameters; (ours) marks where the papers have none or another."""

    sequences: str = "merged"  # merged | target: both domains' items are read, or the target domain's alone (ours)
    loss: str = "softmax"  # softmax (ours) | bpr_max
    bpreg: float = 1.0  # weight of the drawn items' squared scores; read by `bpr_max` only
    negatives: int = 1024  # K, items drawn for each batch and domain, shared by its labels (ours; 2,048 in their code)
    sample_alpha: float = 0.0  # items are drawn by (times seen in training) ** sample_alpha; 0: evenly
    width: int = 64  # D, of item vectors and states (ours)
    layers: int = 1
    tied: bool = True  # one item table for input and output; False: two
    dropout_embed: float = 0.3  # of inputs (ours)
    dropout_hidden: float = 0.0  # of each layer's states (ours)
    max_length: int = 50  # newest items of a history that are read (ours)
    lr: float = 1e-3  # Adam's (ours; Adagrad in the papers)
    batch: int = 256  # sequences (ours)
    epochs: int = 60  # (ours)
    patience: int = 5  # epochs without a better validation NDCG@10 before training ends (ours)

    def __post_init__(self) -> None:
        refuse(
            choice(self, "sequences", SEQUENCES_READ),
            choice(self, "loss", LOSSES),
            *(at_least(self, name, 1) for name in ("negatives", "width", "layers", "max_length")),
            *(at_least(self, name, 1) for name in ("batch", "epochs", "patience")),
            *(at_least(self, name, 0) for name in ("bpreg", "sample_alpha")),
            *(number(self, name, least=0, below=1) for name in ("dropout_embed", "dropout_hidden")),
            *(flag(self, "tied"), step_size(self)),
        )


class GRU4Rec(nn.Module):
    """Item table, item biases and GRU layers. Score of item j after position t: h_t . e_j + b_j."""

    def __init__(self, config: Config, items: int) -> None:
        super().__init__()
        self.max_length = config.max_length
        self.item = nn.Embedding(items, config.width)
        self.output = self.item if config.tied else nn.Embedding(items, config.width)
        for table in (self.item, self.output):
            nn.init.normal_(table.weight, std=DEVIATION)
        self.bias = nn.Parameter(torch.zeros(items))
        # torch's GRU resets after the product with the state, r * (U h + c), and keeps h by z: h' = (1 - z) n + z h.
        # The paper resets before it, U (r * h), and keeps h by 1 - z (eqs. 2-5): of equal use.
        self.layers = nn.ModuleList(nn.GRU(config.width, config.width, batch_first=True) for _ in range(config.layers))
        self.dropout_embed, self.dropout_hidden = Dropout(config.dropout_embed), Dropout(config.dropout_hidden)

    def encode(self, vector_BLD: Tensor) -> Tensor:
        """State after each item beside a 1 that takes the item's bias, [B, L, D + 1]; padding is at the end, unread."""
        state = self.dropout_embed(vector_BLD)
        for layer in self.layers:
            state = self.dropout_hidden(layer(state)[0])
        return pad(state, (0, 1), value=1.0)

    def users(self, history: Sequences, domain: Range) -> Tensor:
        """State after the last item of each history, [R, D + 1]."""

        def last(item_BL: Tensor, length_B: Tensor) -> Tensor:
            state_BLD = self.encode(self.item(item_BL))
            return state_BLD[torch.arange(len(length_B), device=length_B.device), length_B - 1]

        return by_length(history, self.max_length, last)

    def items(self, domain: Range) -> Tensor:
        """Output vectors of a domain's items beside their biases, [J, D + 1]."""
        return self.scored_by(torch.arange(*domain, device=self.bias.device))

    def scored_by(self, item_U: Tensor) -> Tensor:
        """What the states of `encode` are multiplied by to score these items, [U, D + 1]."""
        return torch.cat([self.output(item_U), self.bias[item_U, None]], dim=1)


def bpr_max(score_N: Tensor, drawn_NK: Tensor, bpreg: float) -> Tensor:
    """-log sum_k w_k sigma(r+ - r_k) + bpreg sum_k w_k r_k^2, w = softmax(r_1 .. r_K) (second paper): [N].

    A drawn item of score -inf has no weight.
    """
    log_w_NK = drawn_NK.log_softmax(dim=1)
    kept_NK = drawn_NK.masked_fill(drawn_NK == -torch.inf, 0.0)
    won_N = (log_w_NK + logsigmoid(score_N[:, None] - kept_NK)).logsumexp(dim=1)
    return bpreg * (log_w_NK.exp() * kept_NK.square()).sum(dim=1) - won_N


class Loss:
    """Mean over a batch's labels of the loss against drawn items of their own domain."""

    def __init__(self, config: Config, task: SequenceTask, rng: np.random.Generator) -> None:
        self.config, self.rng = config, rng
        self.domains = domains_read(task, config.sequences)
        count_I = torch.bincount(task.train.item, minlength=task.items)
        self.weight_I = count_I.clamp(min=1).double() ** config.sample_alpha  # an item never seen counts as one (ours)

    def __call__(self, network: GRU4Rec, batch: Batch) -> Tensor:
        drawn, inverse = draw_weighted(self.domains, self.config.negatives, self.rng, self.weight_I)
        drawn, inverse = drawn.to(batch.label.device), inverse.to(batch.label.device)
        wanted, (input_BL, label_at, drawn_at) = distinct(len(self.weight_I), batch.item, batch.label, drawn)
        state_ND = network.encode(network.item(wanted)[input_BL])[batch.row, batch.column]
        vector_UD = network.scored_by(wanted)
        label_ND, drawn_PKD = vector_UD[label_at], vector_UD[drawn_at]
        if self.config.loss == "softmax":
            return softmax_loss(state_ND, batch.label, label_ND, self.domains, drawn, drawn_PKD, inverse)
        loss = state_ND.new_zeros(())
        for domain, drawn_K, drawn_KD in zip(self.domains, drawn, drawn_PKD, strict=True):
            own = inside(batch.label, domain)
            is_label_NK = drawn_K == batch.label[own, None]
            drawn_NK = (state_ND[own] @ drawn_KD.T).masked_fill(is_label_NK, -torch.inf)
            loss = loss + bpr_max((state_ND[own] * label_ND[own]).sum(dim=1), drawn_NK, self.config.bpreg).sum()
        return loss / len(batch.label)


def train(config: Config, task: SequenceTask, seed: int) -> Iterator[Setup | Epoch]:
    """Train one seed, an epoch at a time, by back-propagation through whole sequences (ours)."""
    network, rng = GRU4Rec(config, task.items), np.random.default_rng(seed)
    optimiser = torch.optim.Adam(network.parameters(), lr=config.lr, fused=True)
    yield Setup(network, optimiser=optimiser, rng=rng)
    labels, loss = training_labels(task, config.sequences), Loss(config, task, rng)
    scorer = Scorer.of_task(network, task, config.sequences)
    while True:
        losses = [
            step(optimiser, loss(network, batch)) for batch in labels.batches(config.batch, config.max_length, rng)
        ]
        metrics = {"train_loss": sum(losses) / len(losses)}
        yield Epoch(predict=scorer, turned=scorer.turned, metrics=metrics, pack=scorer.pack)


def unpack(config: Config, state: Mapping[str, Any], seed: int) -> Callable[[Sequences], Tensor]:
    """Return a trained model: users' histories -> scores of all target-domain items, [U, J]."""
    return unpacked(GRU4Rec(config, len(state["network"]["item.weight"])), state).scores
