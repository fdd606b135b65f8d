"""Training and evaluation of MuSiC beside the usual loop of this field's public code, on one thread.

    python tests/benchmarks/bench_training.py

The usual loop: single ratings in a TensorDataset, a DataLoader that collates them sample by sample, feature vectors in
nn.Embedding tables that dense Adam updates whole, and every network run once per rating. Same networks, same joint loss,
same ratings in every batch. Ours runs the networks once per user and item of a batch and leaves the tables alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from measure import rate
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from trainables.models.music import Config, MuSiC, _Trainer, constants_of
from trainables.tasks.arrays import FeatureRows
from trainables.tasks.rating import HeldOut, Ratings, Task
from trainables.trial import score

WIDTH = 384  # of MiniLM's vectors
CONFIG = Config(epochs=1, feature_epochs=0, side_epochs=0)


@dataclass(frozen=True)
class Size:
    """Users and items of a task; only `overlapping` users have ratings."""

    overlapping: int = 1_200
    side: int = 2_000
    items: int = 12_000
    each: int = 30  # ratings of a user
    held_out: int = 433  # 13,000 ratings


def make_task(size: Size, spread: int = 1) -> Task:
    """A task of random numbers; `spread` times more ids, on the same ratings."""
    draw = np.random.default_rng(0)

    def rows(count: int) -> FeatureRows:
        table = draw.standard_normal((1_000, WIDTH)).astype(np.float16)
        return FeatureRows(np.resize(table, (count, WIDTH)), np.arange(count), np.zeros(WIDTH, np.float32), 1.0)

    def ratings(users: int, count: int) -> Ratings:
        user = torch.arange(users).repeat_interleave(count)
        popularity = 1 / np.arange(10, size.items + 10)
        item = draw.choice(size.items, len(user), p=popularity / popularity.sum()) * spread
        return Ratings(
            user, torch.from_numpy(item), torch.from_numpy(draw.integers(1, 6, len(user)).astype(np.float32))
        )

    train_ratings, items = ratings(size.overlapping, size.each), size.items * spread
    return Task(
        source=rows(size.overlapping), source_offset=torch.zeros(size.overlapping),
        source_ratings=train_ratings, source_items=items,
        target=rows(size.overlapping + size.side * spread), items=rows(items),
        train=train_ratings, overlapping=train_ratings,
        validation=HeldOut(
            source=rows(size.held_out), source_row=torch.arange(size.held_out),
            source_offset=torch.zeros(size.held_out),
            ratings=ratings(size.held_out, size.each), cold_item=torch.zeros(size.held_out * size.each, dtype=torch.bool),
        ),
        mean=3.0, item_offset=torch.zeros(items), slope=0.5, rating_scale=(1.0, 5.0), source_scale=(1.0, 5.0), clip=True,
    )  # fmt: skip


class Usual(nn.Module):
    """MuSiC's networks over embedding tables, once per rating."""

    def __init__(self, task: Task, *, tables_train: bool) -> None:
        super().__init__()
        self.model = MuSiC(CONFIG, constants_of(CONFIG, task))
        self.x0 = torch.randn(len(task.target), CONFIG.dim)
        self.source_offset = task.source_offset

        def table(rows: FeatureRows) -> nn.Embedding:
            return nn.Embedding.from_pretrained(rows[torch.arange(len(rows))].clone(), freeze=not tables_train)

        self.source, self.target, self.items = table(task.source), table(task.target), table(task.items)

    def loss(self, user_N: Tensor, item_N: Tensor, rating_N: Tensor, generator: torch.Generator) -> Tensor:
        """Eq. 13 over single ratings."""
        model, x0 = self.model, self.x0[user_N]
        condition = model.user_mlp(self.source(user_N))
        t = torch.randint(1, CONFIG.steps + 1, (len(user_N),), generator=generator)
        eps = torch.randn(x0.shape, generator=generator)
        generated = model.unet(model.process.noised(x0, t, eps), t, condition)
        predicted = model.offset(item_N, self.source_offset[user_N])
        predicted = predicted + (generated * model.item_mlp(self.items(item_N))).sum(dim=-1)
        reconstruction, rating = functional.mse_loss(generated, x0), functional.mse_loss(predicted, rating_N)
        return CONFIG.beta * reconstruction + (1 - CONFIG.beta) * rating


def usual_epochs(task: Task, *, collate: bool, tables_train: bool) -> Iterator[int]:
    """Trains for ever; yields the number of ratings after each batch."""
    trainer, ratings = _Trainer(CONFIG, task, 0), task.overlapping
    usual = Usual(task, tables_train=tables_train)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam([p for p in usual.parameters() if p.requires_grad], lr=CONFIG.lr)
    data = TensorDataset(ratings.user, ratings.item, ratings.rating)
    usual.train()
    while True:
        batches = [rows for _, _, rows in trainer._batches(ratings)]
        loader: Any = DataLoader(data, batch_sampler=[rows.tolist() for rows in batches])
        for user, item, rating in loader if collate else (data[rows] for rows in batches):
            optimizer.zero_grad()
            loss = usual.loss(user, item, rating, generator)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            yield len(user)


def our_epochs(task: Task) -> Iterator[int]:
    """Trains for ever; yields the number of ratings after each epoch of the joint stage."""
    trainer = _Trainer(CONFIG, task, 0)
    trainer.progress["x0"] = torch.randn(len(task.target), CONFIG.dim)
    while True:
        trainer._joint_epoch()
        yield len(task.overlapping)


def evaluation(task: Task) -> float:
    """Seconds to generate all validation vectors (T = 10), predict their ratings and take the metrics; best of 7."""
    model, times = _Trainer(CONFIG, task, 0).model, []
    for _ in range(7):
        began = time.process_time()
        score(model.predict, task.validation, task, 0)
        times.append(time.process_time() - began)
    return min(times)


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=8.0, help="CPU seconds per row")
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    size = Size()
    task, large = make_task(size), make_task(size, spread=20)
    rows: list[tuple[str, Callable[[], Iterator[int]]]] = [
        ("usual loop", lambda: usual_epochs(task, collate=True, tables_train=True)),
        ("usual loop, tables frozen", lambda: usual_epochs(task, collate=True, tables_train=False)),
        ("usual loop, batches sliced", lambda: usual_epochs(task, collate=False, tables_train=True)),
        ("ours", lambda: our_epochs(task)),
        ("usual loop, 20 times the ids", lambda: usual_epochs(large, collate=True, tables_train=True)),
        ("ours, 20 times the ids", lambda: our_epochs(large)),
    ]
    print(f"{size.overlapping * size.each:,} ratings, {size.items:,} items of {WIDTH} numbers, one thread\n")
    print("| loop | ratings/s | times the usual loop |\n|---|---:|---:|")
    first = 0.0
    for name, work in rows:
        measured = rate(work(), seconds)
        first = first or measured
        print(f"| {name} | {measured:,.0f} | {measured / first:.2f} |", flush=True)
    count = len(task.validation.ratings)
    print(f"\nEvaluation of {count:,} ratings with all {CONFIG.steps} steps: {evaluation(task) * 1000:.0f} ms")


if __name__ == "__main__":
    main()
