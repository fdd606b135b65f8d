"""LGCD's rivals beside the usual loop of public code, in labels per second of CPU, on one thread.

    python tests/benchmarks/bench_sequence_rivals.py [--only NAME ...]

The usual loop: every label is a sample of its own, its history padded to 50 items by a Dataset and collated by a
DataLoader, 128 samples a batch, dense Adam. What it computes follows each system's public code: a recurrent or a
Transformer encoder (CODE: its blocks, passes over it, or a mean of items for systems that read sets), then a softmax over
all items of both domains, or a few negatives, drawn until they are none of the user's. FEARec's layers are `Frequency`:
Fourier transforms over the 50 places, and values rolled by each lag in turn. Two systems walk all items in each step:
UniSRec's adaptor of titles, PLCR's prompts. CTT and UCLR have no public code; theirs is the loop of their kin. Ours
is an epoch of the model as it is trained, with all that it does beside the labels: contrasts, graphs, augmented sequences.
Sequences have Food-Kitchen's lengths and numbers of items.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from bench_sequences import make_task
from measure import rate
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from trainables.interface import Epoch, load_model, make_config
from trainables.models import llmcdsr, plcr, sscdr_sequences, tri_cdr
from trainables.models.fearec import kept_bins
from trainables.models.unisrec import Adaptor
from trainables.sequences.labels import halved_labels, training_labels
from trainables.sequences.views import inside
from trainables.tasks.sequential import OVERLAPPING, SequenceTask

LENGTH, WIDTH, BATCH = 50, 64, 128


@dataclass(frozen=True, kw_only=True)
class Code:
    """What a system's public code computes for a batch."""

    cell: str = "attention"  # attention | frequency | gru | mean
    passes: int = 1  # over an encoder of its own
    blocks: int = 2
    heads: int = 1
    inner: int = 1  # width of a block's maps, in D; with more than 1 they have a tanh-GELU, else ReLU
    causal: bool = True
    loss: str = "softmax"  # softmax over all items | bce
    negatives: int = 1  # of bce
    walked: str = ""  # titles | prompts: what is worked out for all items in each step


CODE = {
    "gru4rec": Code(cell="gru"),
    "sasrec": Code(loss="bce"),
    "fearec": Code(cell="frequency", passes=3),
    "diffurec": Code(blocks=4, heads=4, inner=4, causal=False),
    "unisrec": Code(walked="titles"),
    "tri_cdr": Code(passes=3, loss="bce"),
    "mgcl": Code(passes=2, loss="bce"),
    "ctt": Code(passes=3),
    "da_dan": Code(passes=2, blocks=1),
    "llmcdsr": Code(loss="bce"),
    "plcr": Code(walked="prompts"),
    "sscdr_sequences": Code(cell="mean", loss="bce"),
    "unicdr": Code(cell="mean", passes=2, loss="bce", negatives=10),
    "uclr": Code(cell="mean", passes=2),
    "cd_cdr": Code(cell="mean", passes=2),
}


# --- the usual loop -----------------------------------------------------------------------------------------------


class Prefixes(Dataset[tuple[Tensor, int, Tensor]]):
    """Each label with the items before it, padded on the left with 0, and items that its user has not."""

    def __init__(self, task: SequenceTask, negatives: int) -> None:
        self.sequences, self.items, self.negatives = task.train, task.items, negatives
        self.place = [
            (start, end)
            for start, last in zip(task.train.starts[:-1].tolist(), task.train.starts[1:].tolist(), strict=True)
            for end in range(start + 1, last)
        ]

    def __len__(self) -> int:
        return len(self.place)

    def __getitem__(self, number: int) -> tuple[Tensor, int, Tensor]:
        start, end = self.place[number]
        shown = self.sequences.item[max(start, end - LENGTH) : end]
        padded = torch.zeros(LENGTH, dtype=torch.int64)
        padded[LENGTH - len(shown) :] = shown + 1
        own, others = set(self.sequences.item[start : end + 1].tolist()), list[int]()
        while len(others) < self.negatives:
            drawn = int(np.random.randint(self.items))
            others += [drawn] if drawn not in own else []
        return padded, int(self.sequences.item[end]), torch.tensor(others)


class Frequency(nn.Module):
    """A layer of FEARec's code (sudaada/FEARec and its port in RecBole, with the published script's settings).

    Spectra of query, key and value over the places, those of padding too; bins of the layer's band are kept. Attention of
    two heads over the filtered signals, and beside it values as they stand some lags later: the best floor(ln 50) = 3 lags
    of the batch's mean auto-correlation, weighted by the softmax of each row's own. Then maps of width 4 D. LayerNorm
    after each.
    """

    def __init__(self, layer: int, layers: int) -> None:
        super().__init__()
        self.band = slice(*kept_bins(LENGTH, layer, layers, 0.6))
        self.maps = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out, self.norm, self.map_norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.map = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        B, L, D = x_BLD.shape
        parts = [linear(x_BLD).view(B, L, 2, D // 2).permute(0, 2, 3, 1) for linear in self.maps]  # [B, H, K, L]
        spectra = []
        for part in parts:
            whole = torch.fft.rfft(part)
            kept = torch.zeros_like(whole)
            kept[..., self.band] = whole[..., self.band]
            spectra.append(kept)
        query, key, value = (torch.fft.irfft(spectrum, n=L).transpose(2, 3) for spectrum in spectra)  # [B, H, L, K]
        correlation_BL = torch.fft.irfft(spectra[0] * spectra[1].conj(), n=L).mean(dim=(1, 2))
        lags = correlation_BL.mean(dim=0).topk(int(math.log(L))).indices
        weight_BK, later = correlation_BL[:, lags].softmax(dim=1), torch.zeros_like(parts[2])
        for place, lag in enumerate(lags.tolist()):
            later = later + parts[2].roll(-lag, dims=3) * weight_BK[:, place, None, None, None]
        mask = nn.Transformer.generate_square_subsequent_mask(L)
        attention = self.dropout((query @ key.transpose(2, 3) / math.sqrt(D / 2) + mask).softmax(dim=3))
        read = 0.1 * (attention @ value) + 0.9 * later.transpose(2, 3)
        x = self.norm(x_BLD + self.dropout(self.out(read.transpose(1, 2).reshape(B, L, D))))
        out: Tensor = self.map_norm(x + self.dropout(self.map(x)))
        return out


class Encoder(nn.Module):
    """State of the last of 50 places."""

    def __init__(self, code: Code) -> None:
        super().__init__()
        self.code, self.position = code, nn.Parameter(torch.zeros(LENGTH, WIDTH))
        if code.cell == "gru":
            self.cell: nn.Module = nn.GRU(WIDTH, WIDTH, batch_first=True)
        elif code.cell == "frequency":
            self.cell = nn.Sequential(*(Frequency(layer, code.blocks) for layer in range(code.blocks)))
        elif code.cell == "attention":
            activation = partial(functional.gelu, approximate="tanh") if code.inner > 1 else functional.relu
            block = nn.TransformerEncoderLayer(
                WIDTH, code.heads, code.inner * WIDTH, activation=activation, batch_first=True, norm_first=True
            )
            self.cell = nn.TransformerEncoder(block, code.blocks, enable_nested_tensor=False)
        else:
            self.cell = nn.Linear(WIDTH, WIDTH)

    def forward(self, vector_BLD: Tensor) -> Tensor:
        """[B, L, D] -> [B, D]."""
        if self.code.cell == "mean":
            return self.cell(vector_BLD.mean(dim=1))  # type: ignore[no-any-return]
        if self.code.cell == "gru":
            return self.cell(vector_BLD)[0][:, -1]  # type: ignore[no-any-return]
        if self.code.cell == "frequency":
            return self.cell(vector_BLD + self.position)[:, -1]  # type: ignore[no-any-return]
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH) if self.code.causal else None
        return self.cell(vector_BLD + self.position, mask=mask, is_causal=self.code.causal)[:, -1]  # type: ignore[no-any-return]


def usual(task: SequenceTask, code: Code) -> Iterator[int]:
    """Trains for ever; yields the number of labels after each batch."""
    item = nn.Embedding(task.items + 1, WIDTH, padding_idx=0)
    encoders = nn.ModuleList(Encoder(code) for _ in range(code.passes))
    walk = {"titles": Adaptor(task.titles().shape[1], 8, 0.2), "prompts": plcr.PromptEncoder(plcr.Config())}.get(
        code.walked
    )
    context = torch.zeros(5, WIDTH)
    optimiser = torch.optim.Adam([p for part in (item, encoders, walk) if part is not None for p in part.parameters()])
    while True:
        for padded_BL, label_B, other_BK in DataLoader(Prefixes(task, code.negatives), batch_size=BATCH, shuffle=True):
            state_BD = torch.stack([encoder(item(padded_BL)) for encoder in encoders]).sum(dim=0)
            vectors = item.weight[1:]
            if code.walked == "titles":
                vectors = vectors + walk(task.titles())  # type: ignore[misc]
            elif code.walked == "prompts":
                vectors = walk(vectors, context)  # type: ignore[misc]
            if code.loss == "softmax":
                loss = functional.cross_entropy(state_BD @ vectors.T, label_B)
            else:
                right, wrong = (
                    (state_BD[:, None] * vectors[items]).sum(dim=2) for items in (label_B[:, None], other_BK)
                )
                loss = functional.softplus(-right).mean() + functional.softplus(wrong).mean()
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            yield len(label_B)


# --- ours ---------------------------------------------------------------------------------------------------------


def labels_of_an_epoch(name: str, task: SequenceTask) -> int:
    """Return how many labels a model's epoch predicts."""
    merged, halves = training_labels(task, "merged"), halved_labels(task)
    target = inside(merged.item, task.target)
    each = [int((~target).sum()), int(target.sum())]
    kept = [len(torch.unique(halves.row[inside(halves.item, span)])) for span in (task.source, task.target)]
    if name in ("gru4rec", "sasrec", "unisrec", "llmcdsr"):
        return len(merged)
    if name in ("fearec", "diffurec"):
        return len(torch.unique(merged.row))  # one label a sequence
    if name in ("tri_cdr", "mgcl", "ctt"):
        return int((target & (task.group[merged.row] == OVERLAPPING)).sum())
    if name == "da_dan":  # beside all source halves: the shorter side starts again
        sources = len(torch.unique(task.train.row[inside(task.train.item, task.source)]))
        target_labels = int(inside(halves.item, task.target).sum())
        return round(target_labels * max(1.0, sources / kept[1]))
    return {
        "plcr": 2 * max(kept), "unicdr": 2 * max(each), "cd_cdr": 2 * round(max(each) / 4), "uclr": each[1],
        "sscdr_sequences": len(task.train.item),
    }[name]  # fmt: skip


def ours(name: str, task: SequenceTask) -> float:
    """Labels per CPU second of the second epoch of a model; of the metric spaces, which are all that SSCDR learns."""
    labels = labels_of_an_epoch(name, task)
    if name == "sscdr_sequences":
        users, rng = len(sscdr_sequences._users(task)[0]), np.random.default_rng(0)
        spaces = sscdr_sequences.Spaces(users, task.items)
        optimiser = torch.optim.Adam(spaces.parameters(), fused=True)
        began = time.process_time()
        sscdr_sequences._spaces_epoch(task, spaces, optimiser, rng)
        return labels / (time.process_time() - began)
    model = load_model(name)
    stages = {"stage_epochs": 1} if name == "uclr" else {}
    began, epochs = 0.0, 0
    for place in model.train(make_config(name, stages, name), task, 0):
        if isinstance(place, Epoch):
            epochs += 1
            if epochs == 2:
                break
            began = time.process_time()
    return labels / (time.process_time() - began)


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=8.0, help="CPU seconds of each usual loop")
    parser.add_argument("--users", type=int, default=6_000)
    parser.add_argument("--only", nargs="*", default=list(CODE), choices=list(CODE))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for module, constant in ((tri_cdr, "ENCODER_EPOCHS"), (plcr, "READER_EPOCHS"), (llmcdsr, "TEXT_EPOCHS")):
        setattr(module, constant, 1)  # shared by all trials, and not measured here
    with tempfile.TemporaryDirectory() as folder:
        random = make_task(arguments.users)
        pseudo = torch.randint(random.items, (arguments.users, 10)).masked_fill((random.group == 0)[:, None], -1)
        task = replace(random, folder=Path(folder) / "task" / "search", pseudo=pseudo)
        print(
            f"{len(task.train):,} sequences, {len(task.train.item):,} interactions, {task.items:,} items, one thread\n"
        )
        print("| system | usual loop, labels/s | ours, labels/s | times |\n|---|---:|---:|---:|")
        loops: dict[Code, float] = {}
        for name in arguments.only:
            code = CODE[name]
            if code not in loops:
                loops[code] = rate(usual(task, code), arguments.seconds)
            found = ours(name, task)
            print(
                f"| {load_model(name).NAME} | {loops[code]:,.0f} | {found:,.0f} | {found / loops[code]:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
