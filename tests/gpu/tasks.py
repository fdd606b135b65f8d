"""Simulated tasks of any size, written as the tasks of a study lie on disk: nothing is read but torch, NumPy and JSON."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tests.benchmarks.bench_trial import TASK_1, Size, point, write_task, write_vectors

SMALL = Size(
    source_users=900, target_users=700, overlap=400, items=500, ratings=9_000, source_items=500, source_ratings=9_000,
    width=64,
)  # fmt: skip
TINY = Size(
    source_users=90, target_users=70, overlap=50, items=60, ratings=900, source_items=60, source_ratings=900, width=16
)  # fmt: skip
GENRES = 8

__all__ = ["SMALL", "TASK_1", "TINY", "write_sequences", "write_task"]


def write_sequences(folder: Path, users: int, items: int, width: int, texts: int = 4) -> Path:
    """Users of two domains who stay with a genre most of the time; returns the search side.

    Half of the users are in both domains, of whom a tenth is held out; a quarter is in each domain alone.
    """
    draw = np.random.default_rng(0)
    half, sequences, group = items // 2, [], []
    for user in range(users):
        kind = 0 if user % 2 == 0 else 1 + user // 2 % 2  # overlapping, source only, target only
        genre, seen = draw.integers(GENRES), set()
        while len(seen) < 6 + user % 5:
            domain = draw.integers(2) if kind == 0 else kind - 1
            drawn = draw.integers(half // GENRES) * GENRES + (genre if draw.random() < 0.8 else draw.integers(GENRES))
            seen.add(int(domain * half + drawn))
        sequences.append(draw.permutation(list(seen)))
        group.append(kind)
    held = [user for user in range(users) if group[user] == 0 and user % 20 == 0 and (sequences[user] >= half).any()]
    kept = [user for user in range(users) if user not in set(held)]
    search, held_out = folder / "sequences" / "search", folder / "sequences" / "search" / "validation"
    held_out.mkdir(parents=True)
    write_vectors(folder / "text.npy", items, width, draw)
    point(search, "text", folder / "text.npy", np.arange(items), width)
    point(search, "generated_texts", folder / "text.npy", np.arange(items), width)
    save(search, [sequences[user] for user in kept])
    pseudo = np.full((len(kept), texts), -1)
    for place, user in enumerate(kept):
        if group[user]:
            low = half if group[user] == 1 else 0
            pseudo[place] = low + draw.permutation(half)[:texts]
    for name, array in (
        ("group", np.array([group[user] for user in kept], np.int8)), ("pseudo", pseudo), ("generated", pseudo),
        ("similarity", np.where(pseudo >= 0, 0.5, 0.0).astype(np.float32)),
    ):  # fmt: skip
        np.save(search / f"{name}.npy", array)
    target, shown = [], []
    for user in held:
        place = int(np.flatnonzero(sequences[user] >= half)[-1])
        target.append(sequences[user][place])
        shown.append(sequences[user][:place])
    save(held_out, [*shown, *[row[row < half] for row in shown]])
    others = [draw.permutation(np.setdiff1d(np.arange(half, items), [item]))[: half // 2] for item in target]
    np.save(held_out / "candidates.npy", np.column_stack([target, np.stack(others)]).astype(np.int32))
    for name, values in (
        ("user", np.tile(np.arange(len(held)), 2)), ("target", np.tile(target, 2)),
        ("protocol", np.repeat([0, 1], len(held))), ("user_id", np.array([f"u{user}" for user in held])),
    ):  # fmt: skip
        np.save(held_out / f"{name}.npy", values)
    meta = {
        "kind": "sequences", "items": items, "source": [0, half], "target": [half, items],
        "protocols": ["as-given", "inter"], "train_key": f"simulated-{users}-{items}-{width}",
    }  # fmt: skip
    (search / "task.json").write_text(json.dumps(meta))
    return search


def save(folder: Path, sequences: list[np.ndarray]) -> None:
    """Items one after the other, and where each sequence starts."""
    np.save(folder / "item.npy", np.concatenate(sequences).astype(np.int64))
    np.save(folder / "starts.npy", np.concatenate([[0], np.cumsum([len(row) for row in sequences])]).astype(np.int64))
