"""FEARec: frequency-enhanced self-attention (Du et al., SIGIR 2023, arXiv 2304.09184).

Each layer attends to one band of the frequencies of the sequence (a ramp, from high to low), and beside it over time
lags that auto-correlation finds; contrast and a frequency loss tie two views of a user. Filters and lags mix later items
into earlier positions, so a pass reads one history and predicts the one item after it; nothing else may be a label.
What is ours: padding is 0 in every filter; lags are chosen for each row, in training as in scoring; a history is read at
the shortest of LENGTHS that holds it; the recommendation's own pass is the first view; rows of the same label are no
negatives of each other.
Shapes: B histories, n positions, D vector width, H heads, U distinct items of a batch, K drawn items, R rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from features.checks import at_least, choice, dropout_share, number, refuse, step_size
from trainables.interface import Epoch, Selection, Setup, Variant
from trainables.sequence_tools import (
    SEQUENCES_READ,
    Labels,
    Range,
    SameLabel,
    Scorer,
    by_length,
    contrast,
    distinct,
    draw_shared,
    softmax_loss,
    step,
    training_labels,
    unpacked,
)
from trainables.tasks.sequential import Sequences, SequenceTask

WIDTH = 64  # D, as of all systems of a comparison
HEADS, LAYERS = 2, 2
DEVIATION = 0.02  # of the tables' start
LENGTHS = (8, 16, 32, 50)  # n; the newest 50 items are read

NAME = "FEARec"
TASK_TYPE = "sequences"
SELECTION = Selection("val_ndcg10", "maximize")
ABLATIONS = {
    "wo_lag": Variant(config={"time_share": 1.0}),
    "wo_time": Variant(config={"time_share": 0.0}),
    "wo_ramp": Variant(config={"global_ratio": 1.0}),
    "wo_contrast": Variant(config={"contrast": 0.0}),
    "wo_frequency": Variant(config={"frequency_weight": 0.0}),
    "target_only": Variant(config={"sequences": "target"}),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Hyperparameters. Defaults are the authors' script's where it gives a value; (ours) marks where it is silent."""

    sequences: str = "merged"  # merged | target: both domains' items are read, or the target domain's alone (ours)
    global_ratio: float = 0.6  # alpha, share of the frequencies that a layer keeps; 1 / LAYERS at least
    time_share: float = (
        0.1  # gamma, weight of the attention over time beside that over lags; `spatial_ratio` in the code
    )
    topk_factor: float = 1.0  # c; floor(c ln n) lags are read, n at most
    contrast: float = 0.1  # weight of the contrast of both views
    tau: float = 1.0  # its temperature
    frequency_weight: float = 0.1  # weight of the distance of both views' spectra
    dropout: float = 0.5  # of embeddings, attention and maps (ours: one value)
    negatives: int = 1024  # items of the softmax beside the label, drawn for each batch and domain (ours)
    lr: float = 1e-3  # Adam's
    batch: int = 128  # histories (ours; 256)
    epochs: int = 60  # of one random label a sequence (ours)
    patience: int = 5  # epochs without a better validation NDCG@10 before training ends (ours)

    def __post_init__(self) -> None:
        refuse(
            choice(self, "sequences", SEQUENCES_READ),
            number(self, "global_ratio", above=0, most=1),
            number(self, "time_share", least=0, most=1),
            number(self, "topk_factor", above=0),
            number(self, "tau", above=0),
            *(at_least(self, name, 0) for name in ("contrast", "frequency_weight")),
            *(at_least(self, name, 1) for name in ("negatives", "batch", "epochs", "patience")),
            dropout_share(self),
            step_size(self),
        )


def kept_bins(n: int, layer: int, layers: int, ratio: float) -> tuple[int, int]:
    """Return the first frequency bin that a layer keeps of n // 2 + 1, and the one after the last: highest ones first."""
    bins = n // 2 + 1
    if ratio > 1 / layers:
        width, stride = ratio, float(math.floor(round(bins * (1 - ratio) / max(1, layers - 1), 9)))
    else:
        width, stride = 1 / layers, bins / layers
    left, right = bins * (1 - width) - layer * stride, bins - layer * stride
    return int(round(left, 9)), int(round(right, 9))  # rounded first: 5 * (1 - 0.8) is below 1 in floating point


@lru_cache(maxsize=64)
def band_filter(n: int, layer: int, ratio: float) -> Tensor:
    """Return the real circulant matrix [n, n] that keeps a layer's bins of a signal's spectrum.

    P[t, s] = (1/n) sum_f c_f cos(2 pi f (t - s) / n), c_f = 1 for f = 0 and n / 2, else 2. It equals rfft, a mask and
    irfft along the positions, and is a product of n x n instead.
    """
    left, right = kept_bins(n, layer, LAYERS, ratio)
    frequency = torch.arange(left, right, dtype=torch.float64)
    weight = torch.where((frequency == 0) | (2 * frequency == n), 1.0, 2.0).double()
    place = torch.arange(n, dtype=torch.float64)
    angle = 2 * math.pi / n * (place[:, None] - place)[..., None] * frequency
    return (angle.cos() * weight).sum(dim=-1) / n


class FrequencyLayer(nn.Module):
    """Both attentions of one band, then two maps of each position, each within LayerNorm(x + Dropout(g(x)))."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)
        self.map = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.norm, self.map_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BnD: Tensor, real_Bn: Tensor) -> Tensor:
        """[B, n, D] -> [B, n, D]; padding stands before the history."""
        config, n = self.config, x_BnD.shape[1]
        query, key, value = (
            linear(x_BnD).masked_fill(~real_Bn[..., None], 0.0) for linear in (self.query, self.key, self.value)
        )
        band = band_filter(n, self.layer, config.global_ratio).to(x_BnD)
        filtered = band @ query
        read = x_BnD.new_zeros(())
        if config.time_share > 0:
            read = config.time_share * self._over_time(filtered, band @ key, band @ value, real_Bn)
        if config.time_share < 1:
            read = read + (1 - config.time_share) * over_lags(filtered, key, value, config.topk_factor)
        x = self.norm(x_BnD + self.dropout(self.out(read)))
        out: Tensor = self.map_norm(x + self.dropout(self.map(x)))
        return out

    def _over_time(self, query_BnD: Tensor, key_BnD: Tensor, value_BnD: Tensor, real_Bn: Tensor) -> Tensor:
        """Causal attention of the filtered signals, [B, n, D]."""
        B, n, D = query_BnD.shape
        query, key, value = (
            part.view(B, n, HEADS, D // HEADS).transpose(1, 2) for part in (query_BnD, key_BnD, value_BnD)
        )  # fmt: skip
        past = torch.ones(n, n, dtype=torch.bool, device=real_Bn.device).tril()
        logits = query @ key.transpose(2, 3) / math.sqrt(D / HEADS)
        logits = logits.masked_fill(~(past & real_Bn[:, None, None, :]), torch.finfo(logits.dtype).min)
        read: Tensor = (self.dropout(logits.softmax(dim=-1)) @ value).transpose(1, 2).reshape(B, n, D)
        return read


def over_lags(filtered_BnD: Tensor, key_BnD: Tensor, value_BnD: Tensor, factor: float) -> Tensor:
    """Return the values that stand each of the best lags later, weighted by the lags' softmax, [B, n, D].

    R(tau) = (1/D) sum_t q~[(t + tau) mod n] . k[t], the correlation of the filtered query and key (eqs. 13-15); position t
    reads V[(t + tau) mod n].
    """
    n, D = filtered_BnD.shape[1:]
    place = torch.arange(n, device=filtered_BnD.device)
    later = (place[:, None] + place) % n  # [t, tau]
    gram = filtered_BnD @ key_BnD.transpose(1, 2)
    correlation_Bn = gram[:, later, place[:, None]].sum(dim=1) / D
    best, lag = correlation_Bn.topk(min(n, max(1, int(factor * math.log(n)))), dim=1)
    weight_Bn = torch.zeros_like(correlation_Bn).scatter(1, lag, best.softmax(dim=1))
    return weight_Bn[:, (place - place[:, None]) % n] @ value_BnD  # [t, s]: the weight of lag s - t


class FEARec(nn.Module):
    """Item and position embeddings, and a layer for each band of frequencies."""

    def __init__(self, config: Config, items: int) -> None:
        super().__init__()
        self.item, self.position = nn.Embedding(items, WIDTH), nn.Embedding(LENGTHS[-1], WIDTH)
        for table in (self.item, self.position):
            nn.init.normal_(table.weight, std=DEVIATION)
        self.layers = nn.ModuleList(FrequencyLayer(config, layer) for layer in range(LAYERS))
        self.norm, self.dropout = nn.LayerNorm(WIDTH), nn.Dropout(config.dropout)

    def encode(self, vector_BLD: Tensor, length_B: Tensor) -> Tensor:
        """State of the last item of each history, [B, D]; items begin at the first place, padding is after them."""
        state_BD = vector_BLD.new_zeros(len(vector_BLD), WIDTH)
        shorter = 0
        for n in LENGTHS:
            chosen = ((length_B > shorter) & (length_B <= n)).nonzero().squeeze(1)
            if len(chosen):
                state_BD = state_BD.index_copy(0, chosen, self._encode(vector_BLD[chosen], length_B[chosen], n))
            shorter = n
        return state_BD

    def _encode(self, vector_BLD: Tensor, length_B: Tensor, n: int) -> Tensor:
        """The same at one length: every history ends at place n - 1, and positions are counted from there."""
        place_n = torch.arange(n, device=length_B.device)
        from_Bn = place_n - (n - length_B[:, None])
        real_Bn = from_Bn >= 0
        vector = vector_BLD.gather(1, from_Bn.clamp(min=0)[..., None].expand(-1, -1, WIDTH))
        x = self.dropout(self.norm(vector + self.position.weight[LENGTHS[-1] - n :]))
        for layer in self.layers:
            x = layer(x, real_Bn)
        last: Tensor = x[:, -1]
        return last

    def users(self, history: Sequences) -> Tensor:
        """State after the last item of each history, [R, D]."""
        return by_length(history, LENGTHS[-1], lambda item_BL, length_B: self.encode(self.item(item_BL), length_B))

    def items(self, domain: Range) -> Tensor:
        """The table serves input and output, [J, D]."""
        return self.item.weight[domain[0] : domain[1]]


class Loss:
    """Loss of one random label of each history: the softmax, and what ties it to another history of the same label."""

    def __init__(self, config: Config, task: SequenceTask, labels: Labels, rng: np.random.Generator) -> None:
        self.config, self.items, self.labels, self.rng = config, task.items, labels, rng
        self.domains = [task.target] if config.sequences == "target" else [task.source, task.target]
        self.twins = SameLabel(labels) if config.contrast > 0 or config.frequency_weight > 0 else None

    def __call__(self, network: FEARec, item_BL: Tensor, length_B: Tensor, label_B: Tensor, number_B: Tensor) -> Tensor:
        drawn = draw_shared(self.domains, self.config.negatives, self.rng).to(label_B.device)
        other_BL, other_length_B = (
            self.labels.histories(self.twins.draw(number_B, self.rng), LENGTHS[-1])
            if self.twins
            else (item_BL[:0], length_B[:0])
        )
        wanted, (item_at, other_at, label_at, drawn_at) = distinct(self.items, item_BL, other_BL, label_B, drawn)
        vector_UD = network.item(wanted)
        state_BD = network.encode(vector_UD[item_at], length_B)
        loss = softmax_loss(state_BD, label_B, vector_UD[label_at], self.domains, drawn, vector_UD[drawn_at])
        if self.twins is None:
            return loss
        other_BD = network.encode(vector_UD[other_at], other_length_B)
        tied = contrast(state_BD, other_BD, self.config.tau, label_B)
        spectrum = torch.fft.rfft(state_BD, norm="ortho") - torch.fft.rfft(other_BD, norm="ortho")
        apart = self.config.frequency_weight * spectrum.abs().mean()
        return loss + self.config.contrast * tied + apart  # type: ignore[no-any-return]


def train(config: Config, task: SequenceTask, seed: int) -> Iterator[Setup | Epoch]:
    """Train one seed, an epoch of one random label a sequence at a time."""
    network, rng = FEARec(config, task.items), np.random.default_rng(seed)
    optimiser = torch.optim.Adam(network.parameters(), lr=config.lr, fused=True)
    yield Setup(network, optimiser=optimiser, rng=rng)
    labels = training_labels(task, config.sequences)
    loss, scorer = Loss(config, task, labels, rng), Scorer.of_task(network, task, config.sequences)
    while True:
        chosen, losses = labels.one_each(rng), []
        for batch in labels[chosen].batches(config.batch, LENGTHS[-1], rng):
            number_B = chosen[batch.number]
            losses.append(step(optimiser, loss(network, batch.item, batch.length, batch.label, number_B)))
        yield Epoch(predict=scorer, metrics={"train_loss": sum(losses) / len(losses)}, pack=scorer.pack)


def unpack(config: Config, state: Mapping[str, Any], seed: int) -> Callable[[Sequences], Tensor]:
    """Return a trained model: users' histories -> scores of all target-domain items, [U, J]."""
    return unpacked(FEARec(config, len(state["network"]["item.weight"])), state).scores
