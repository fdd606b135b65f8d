"""Pretraining of LGCD's encoders and training of its diffusion beside the usual loop of this field, on one thread.

    python tests/benchmarks/bench_sequences.py

The usual loop: sequences padded to 50 items in a Dataset, a DataLoader that collates them one by one, two Transformer
encoders (ID and text) of 2 blocks and width 64, a full softmax over all items of the domain at every position of the
sequence, dense Adam. Ours has the same encoders, batch and sequences; it pads to the longest of a batch of sequences of
like length and draws 1,024 items for the softmax. Sequences have Food-Kitchen's lengths and numbers of items.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as functional
from measure import rate
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from trainables.models.lgcd.config import Config
from trainables.models.lgcd.encoders import DomainEncoders, Encoders, PretrainSpec
from trainables.models.lgcd.pretraining import pretraining_loss
from trainables.models.lgcd.training import _Trainer
from trainables.sequences.views import batches, padded, windows
from trainables.tasks.arrays import FeatureRows
from trainables.tasks.sequential import HeldOut, Sequences, SequenceTask

FOOD, KITCHEN, TEXT = 8_661, 27_637, 384  # items, items, width of MiniLM's vectors
SPEC = PretrainSpec()


def make_task(users: int) -> SequenceTask:
    """A task of random items: one user in six overlaps, as in Food-Kitchen (7,501 of 51,164)."""
    draw = np.random.default_rng(0)
    group = draw.choice(3, users, p=[0.15, 0.75, 0.10]).astype(np.int8)
    length = np.where(group == 0, 5 + draw.geometric(0.12, users), 5 + draw.geometric(0.4, users)).clip(max=100)
    starts = np.concatenate([[0], length.cumsum()])
    kitchen = np.repeat(np.where(group == 0, 0.54, np.where(group == 1, 1.0, 0.0)), length)
    inside = draw.random(starts[-1]) < kitchen
    item = np.where(inside, FOOD + draw.integers(KITCHEN, size=starts[-1]), draw.integers(FOOD, size=starts[-1]))
    vectors = draw.standard_normal((FOOD + KITCHEN, TEXT)).astype(np.float32)
    nobody = torch.zeros(0, dtype=torch.int64)
    return SequenceTask(
        folder=Path(), items=FOOD + KITCHEN, source=(FOOD, FOOD + KITCHEN), target=(0, FOOD),
        text=FeatureRows(vectors, np.arange(len(vectors)), np.zeros(TEXT, np.float32), 1.0),
        train=Sequences(torch.from_numpy(item), torch.from_numpy(starts)), group=torch.from_numpy(group),
        pseudo=torch.full((users, 0), -1), similarity=torch.zeros(users, 0), generated=torch.full((users, 0), -1),
        generated_texts=None, protocols=("as-given", "inter"), rank_seen="last",
        validation=HeldOut(
            history=Sequences(nobody, torch.zeros(1, dtype=torch.int64)), protocol=nobody, user=nobody, target=nobody,
            candidates=torch.zeros(0, 1_000, dtype=torch.int32),
        ),
        train_key="",
    )  # fmt: skip


class Padded(Dataset[tuple[Tensor, Tensor]]):
    """Each sequence as 50 inputs and 50 targets, -1 where there is none."""

    def __init__(self, task: SequenceTask) -> None:
        self.sequences = task.train

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        start, end = self.sequences.starts[number : number + 2].tolist()
        items = self.sequences.item[max(start, end - SPEC.max_length - 1) : end]
        both = torch.full((2, SPEC.max_length), -1)
        both[0, : len(items) - 1], both[1, : len(items) - 1] = items[:-1], items[1:]
        return both[0].clamp(min=0), both[1]


def usual(task: SequenceTask) -> Iterator[int]:
    """Trains for ever; yields the number of sequences after each batch."""
    encoders = Encoders(SPEC, task.titles()).train()
    optimiser = torch.optim.Adam(encoders.parameters(), lr=SPEC.lr)
    while True:
        for items_BL, target_BL in DataLoader(Padded(task), batch_size=SPEC.batch, shuffle=True):
            state_BLD = encoders.fuse(*encoders(*encoders.look_up(items_BL)))
            loss = torch.zeros(())
            for low, high in (task.source, task.target):
                inside = (target_BL >= low) & (target_BL < high)
                logits = state_BLD[inside] @ encoders.fuse_items(*encoders.look_up(torch.arange(low, high))).T
                loss = loss + functional.cross_entropy(logits, target_BL[inside] - low)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            yield len(items_BL)


def ours(task: SequenceTask) -> Iterator[int]:
    """The same with our batches and loss: the inner loop of `sequence_encoders.pretrain`."""
    encoders, rng = Encoders(SPEC, task.titles()).train(), np.random.default_rng(0)
    optimiser = torch.optim.Adam(encoders.parameters(), lr=SPEC.lr, fused=True)
    first, length = windows(task.train.starts, SPEC.max_length + 1)
    while True:
        for batch in batches(length, SPEC.batch, rng):
            items_BL, real_BL = padded(task.train.item, first[batch], length[batch])
            loss = pretraining_loss(encoders, (task.source, task.target), items_BL, real_BL, SPEC.negatives, rng)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            yield len(batch)


def diffusion(task: SequenceTask) -> Iterator[int]:
    """The diffusion of a trial over frozen encoders; yields the number of rows after each batch."""
    pair = Encoders(SPEC, task.titles()).eval()
    trainer = _Trainer(Config(), task, 0, DomainEncoders({task.source: pair, task.target: pair}))
    trainer.network.train()
    while True:
        trainer._step(0)
        yield 2 * trainer.config.batch


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="CPU seconds per row")
    parser.add_argument("--users", type=int, default=12_000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    task = make_task(arguments.users)
    mean = len(task.train.item) / len(task.train)
    print(f"{len(task.train):,} sequences of {mean:.1f} items on average, {task.items:,} items, one thread\n")
    print("| loop | per CPU second | times the usual loop |\n|---|---:|---:|")
    loops: list[tuple[str, Callable[[SequenceTask], Iterator[int]]]] = [
        ("usual loop, sequences", usual), ("ours, sequences", ours), ("ours, rows of a trial's diffusion", diffusion),
    ]  # fmt: skip
    first = 0.0
    for name, work in loops:
        measured = rate(work(task), arguments.seconds, warm_ups=3)
        first = first or measured
        ratio = f"{measured / first:.1f}" if "sequences" in name else ""
        print(f"| {name} | {measured:,.0f} | {ratio} |", flush=True)


if __name__ == "__main__":
    main()
