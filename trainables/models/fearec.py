"""FEARec: frequency-enhanced self-attention (Du et al., SIGIR 2023, arXiv 2304.09184).

Each layer attends to one band of the frequencies of the sequence (a ramp, from high to low), and beside it over time
lags that auto-correlation finds; contrast and a frequency loss tie two views of a user. Filters and lags mix later items
into earlier positions, so a pass reads one history and predicts the one item after it; nothing else may be a label.
What is ours: padding is 0 in every filter; lags are chosen for each row, in training as in scoring; a history is read at
the shortest of LENGTHS that holds it; the recommendation's own pass is the first view; rows of the same label are no
negatives of each other.
What saves time: maps are taken of items alone, not of padding, and in the last layer of each history's last item.
Shapes: B histories, n positions, N items of some histories, D vector width, H heads, U distinct items of a batch, K drawn
items, R rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, one_hot

from features.checks import at_least, choice, dropout_share, number, refuse, step_size
from trainables.interface import Epoch, Selection, Setup, Variant
from trainables.sequences.blocks import Dropout
from trainables.sequences.labels import SEQUENCES_READ, Labels, SameLabel, domains_read, training_labels
from trainables.sequences.losses import contrast, distinct, draw_shared, softmax_loss, step
from trainables.sequences.ranking import Scorer, by_length, unpacked
from trainables.sequences.views import Range, batches
from trainables.tasks.sequential import Sequences, SequenceTask

WIDTH = 64  # D, as of all systems of a comparison
HEADS, LAYERS = 2, 2
DEVIATION = 0.02  # of the tables' start
LENGTHS = (8, 16, 32, 50)  # n; the newest 50 items are read

NAME = "FEARec"
TASK_TYPE = "sequences"
SELECTION = Selection("val_ndcg10", "maximize")
BOTH_DIRECTIONS = True
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
    lr: float = 1e-3  # Adam's; 3e-3 takes half the epochs, level on food and 0.02 NDCG@10 behind on kitchen
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


@lru_cache(maxsize=8)
def lag_of_pairs(n: int) -> Tensor:
    """Return which lag s - t mod n each pair (s, t) of places has, 1 there and else 0: [n n, n]."""
    place = torch.arange(n)
    return one_hot((place[:, None] - place) % n, n).flatten(0, 1).double()


@dataclass(frozen=True)
class Frame:
    """Histories that are read at one length n: each ends at the last of n places."""

    real_Bn: Tensor  # bool, places that hold an item
    place_N: Tensor  # int64, place of each item among the B n

    def spread(self, x_ND: Tensor) -> Tensor:
        """[N, D] of the items -> [B, n, D], 0 where there is none."""
        (B, n), D = self.real_Bn.shape, x_ND.shape[1]
        return x_ND.new_zeros(B * n, D).index_copy_(0, self.place_N, x_ND).view(B, n, D)

    def packed(self, x_BnD: Tensor) -> Tensor:
        """[B, n, D] -> [N, D] of the items."""
        return x_BnD.flatten(0, 1).index_select(0, self.place_N)


class FrequencyLayer(nn.Module):
    """Both attentions of one band, then two maps of each position, each within LayerNorm(x + Dropout(g(x)))."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.config, self.layer, self.last = config, layer, layer == LAYERS - 1
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.map = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.norm, self.map_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.dropout = Dropout(config.dropout)

    def forward(self, x_ND: Tensor, frames: Sequence[Frame], last_B: Tensor) -> Tensor:
        """States of the frames' items, [N, D] -> [N, D], or of the histories' last ones alone, `last`: [B, D]."""
        parts = self.query_key_value(x_ND).split([len(frame.place_N) for frame in frames])
        read = torch.cat([self._read(part, frame) for part, frame in zip(parts, frames, strict=True)])
        x = self.norm((x_ND[last_B] if self.last else x_ND) + self.dropout(self.out(read)))
        out: Tensor = self.map_norm(x + self.dropout(self.map(x)))
        return out

    def _read(self, part_ND: Tensor, frame: Frame) -> Tensor:
        """What both attentions read, [N, D] or [B, D]. P, the filter, is applied to n x n: P K (P Q)' = P (K Q') P.

        Matrices [s, t] hold what position t reads of position s: a softmax is quicker over s than over a short last axis.
        """
        config, (B, n) = self.config, frame.real_Bn.shape
        query, key, value = frame.spread(part_ND).view(B, n, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        band = band_filter(n, self.layer, config.global_ratio).to(part_ND)
        asking = slice(n - 1, n) if self.last else slice(n)
        gram = key @ query.transpose(2, 3)  # [B, H, n, n]
        weight = part_ND.new_zeros(())
        if config.time_share > 0:
            past = torch.ones(n, n, dtype=torch.bool, device=part_ND.device).triu()[:, asking]
            logits = band @ (gram @ band[:, asking]) / math.sqrt(WIDTH / HEADS)
            unread = ~(past & frame.real_Bn[:, None, :, None])
            attention = logits.masked_fill(unread, torch.finfo(logits.dtype).min).softmax(dim=2)
            weight = config.time_share * (band @ self.dropout(attention))
        if config.time_share < 1:
            correlation_Bn = correlation(gram.sum(dim=1).transpose(1, 2), band) / WIDTH
            weight = (
                weight + (1 - config.time_share) * lag_weights(correlation_Bn, config.topk_factor)[:, None, :, asking]
            )
        read = (weight.transpose(2, 3) @ value).transpose(1, 2).flatten(2)
        return read[:, 0] if self.last else frame.packed(read)


def correlation(gram_Bnn: Tensor, band: Tensor) -> Tensor:
    """Return sum_t (P Q)[(t + tau) mod n] . k[t] for each lag tau, from Q K' (eqs. 13-15): [B, n].

    P is circulant, so that it may as well filter the sums over the diagonals of Q K'.
    """
    return gram_Bnn.flatten(1) @ lag_of_pairs(len(band)).to(band) @ band.T


def lag_weights(correlation_Bn: Tensor, factor: float) -> Tensor:
    """Return with what weight position t reads position s, [B, s, t]: the softmax of the best lags, s - t mod n."""
    n = correlation_Bn.shape[1]
    best, lag = correlation_Bn.topk(min(n, max(1, int(factor * math.log(n)))), dim=1)
    weight_Bn = torch.zeros_like(correlation_Bn).scatter(1, lag, best.softmax(dim=1))
    return (weight_Bn @ lag_of_pairs(n).to(weight_Bn).T).view(-1, n, n)


class FEARec(nn.Module):
    """Item and position embeddings, and a layer for each band of frequencies."""

    def __init__(self, config: Config, items: int) -> None:
        super().__init__()
        self.item, self.position = nn.Embedding(items, WIDTH), nn.Embedding(LENGTHS[-1], WIDTH)
        for table in (self.item, self.position):
            nn.init.normal_(table.weight, std=DEVIATION)
        self.layers = nn.ModuleList(FrequencyLayer(config, layer) for layer in range(LAYERS))
        self.norm, self.dropout = nn.LayerNorm(WIDTH), Dropout(config.dropout)

    def encode(self, vector_UD: Tensor, item_BL: Tensor, length_B: Tensor) -> Tensor:
        """State of the last item of each history, [B, D]; `item`: places in the table `vector`, padded at the end."""
        order_B = length_B.argsort(stable=True)  # then the items of a frame are neighbours
        item_BL, length_B = item_BL[order_B], length_B[order_B]
        place_L = torch.arange(item_BL.shape[1], device=length_B.device)
        real_BL = place_L < length_B[:, None]
        position_N = (place_L + LENGTHS[-1] - length_B[:, None])[real_BL]
        x = self.dropout(self.norm(embedding(item_BL[real_BL], vector_UD) + self.position(position_N)))
        frames, last_B = self._frames(length_B), length_B.cumsum(0) - 1
        for layer in self.layers:
            x = layer(x, frames, last_B)
        state_BD: Tensor = x.index_select(0, order_B.argsort())
        return state_BD

    @staticmethod
    def _frames(length_B: Tensor) -> list[Frame]:
        """Return the frames of histories by ascending length, each history in the shortest that holds it."""
        frames, shorter = [], 0
        for n in LENGTHS:
            length = length_B[(length_B > shorter) & (length_B <= n)]
            if len(length):
                real_Bn = torch.arange(n, device=length.device) >= n - length[:, None]
                frames.append(Frame(real_Bn, real_Bn.flatten().nonzero().squeeze(1)))
            shorter = n
        return frames

    def users(self, history: Sequences, domain: Range) -> Tensor:
        """State after the last item of each history, [R, D]."""
        return by_length(
            history, LENGTHS[-1], lambda item_BL, length_B: self.encode(self.item.weight, item_BL, length_B)
        )

    def items(self, domain: Range) -> Tensor:
        """The table serves input and output, [J, D]."""
        return self.item.weight[domain[0] : domain[1]]


class Loss:
    """Loss of one random label of each history: the softmax, and what ties it to another history of the same label."""

    def __init__(self, config: Config, task: SequenceTask, labels: Labels, rng: np.random.Generator) -> None:
        self.config, self.items, self.labels, self.rng = config, task.items, labels, rng
        self.domains = domains_read(task, config.sequences)
        self.twins = SameLabel(labels) if config.contrast > 0 or config.frequency_weight > 0 else None

    def __call__(self, network: FEARec, number_B: Tensor) -> Tensor:
        label_B = self.labels.item[number_B]
        drawn = draw_shared(self.domains, self.config.negatives, self.rng).to(label_B.device)
        read = torch.cat([number_B, self.twins.draw(number_B, self.rng)]) if self.twins else number_B
        item_BL, length_B = self.labels.histories(read, LENGTHS[-1])
        wanted, (item_at, label_at, drawn_at) = distinct(self.items, item_BL, label_B, drawn)
        vector_UD = network.item(wanted)
        state_BD, other_BD = network.encode(vector_UD, item_at, length_B).tensor_split([len(label_B)])
        loss = softmax_loss(state_BD, label_B, vector_UD[label_at], self.domains, drawn, vector_UD[drawn_at])
        if self.twins is None:
            return loss
        tied = contrast(state_BD, other_BD, self.config.tau, label_B)
        spectrum = torch.fft.rfft(state_BD - other_BD, norm="ortho")
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
        for part in batches(labels.at[chosen].clamp(max=LENGTHS[-1] - 1), config.batch, rng):
            losses.append(step(optimiser, loss(network, chosen[part])))
        metrics = {"train_loss": sum(losses) / len(losses)}
        yield Epoch(predict=scorer, turned=scorer.turned, metrics=metrics, pack=scorer.pack)


def unpack(config: Config, state: Mapping[str, Any], seed: int) -> Callable[[Sequences], Tensor]:
    """Return a trained model: users' histories -> scores of all target-domain items, [U, J]."""
    return unpacked(FEARec(config, len(state["network"]["item.weight"])), state).scores
