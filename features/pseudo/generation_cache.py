"""Answers of a generator, kept by content: one per user and what the prompt shows, written block by block.

<store>/answers/<generator key[:12]>/<block>.arrow      key, answer
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pyarrow as pa
import torch

from features.extraction.workers import Actors, Progress, result, run_blocks
from features.pseudo.generator import Generator, ResolvedGenerator, load_generator
from features.pseudo.prompts import Wish
from features.store.tables import (
    KEY_BYTES,
    KEY_TYPE,
    check_mark,
    clean_shards,
    digest,
    mark_store,
    read_shards,
    write_shard,
)

_BLOCK_WISHES = (32, 512)  # few enough to lose to a kill, enough for full batches
_BLOCKS = 16  # and small jobs are cut into this many


def wish_key(wish: Wish) -> bytes:
    """Content key of a wish, KEY_BYTES long."""
    return bytes.fromhex(digest(asdict(wish)))[:KEY_BYTES]


def answer(
    wishes: Sequence[Wish],
    resolved: ResolvedGenerator,
    store: Path,
    *,
    progress: Progress | None = None,
    workers: int | Actors | None = None,
    use_ray: bool | None = None,
    loader: Callable[[ResolvedGenerator], Generator] = load_generator,
) -> list[str]:
    """The answer to each wish; those that the store holds are not generated again.

    progress: called with (texts done, texts to do in this call, 0, seconds of work). The other arguments are those of
    `features.extraction.extract`.
    """
    folder = store / "answers" / resolved.key[:12]
    clean_shards(folder)
    keys = [wish_key(wish) for wish in wishes]
    by_key = dict(zip(keys, wishes, strict=True))
    done = _read(folder, resolved.key)
    blocks = _blocks(by_key, done)
    each = resolved.spec.texts
    make_worker = partial(AnswerWorker, partial(loader, resolved), folder, resolved.key, each, mark_store(store))
    todo = each * sum(block.num_rows for block in blocks)
    run_blocks(blocks, make_worker, todo, name="GenerateTexts", workers=workers, use_ray=use_ray, progress=progress)
    done = _read(folder, resolved.key)
    lost = sum(key not in done for key in keys)
    if lost:
        raise RuntimeError(f"{folder}: {lost} of {len(keys)} answers were lost; run it again, finished ones are kept")
    return [done[key] for key in keys]


def _read(folder: Path, generator_key: str) -> dict[bytes, str]:
    done: dict[bytes, str] = {}
    for shard in read_shards(folder, "generator", generator_key):
        done.update(zip(shard["key"].to_pylist(), shard["answer"].to_pylist(), strict=True))
    return done


def _blocks(wishes: Mapping[bytes, Wish], done: Mapping[bytes, str]) -> list[pa.Table]:
    """All wishes cut by key order, then what is left of each piece: a resumed run has the pieces of a whole one."""
    planned = sorted(wishes)
    size = min(max(len(planned) // _BLOCKS, _BLOCK_WISHES[0]), _BLOCK_WISHES[1])
    pieces = (planned[start : start + size] for start in range(0, len(planned), size))
    left = ([key for key in piece if key not in done] for piece in pieces)
    return [
        pa.table({"key": pa.array(keys, KEY_TYPE)} | _columns([wishes[key] for key in keys])) for keys in left if keys
    ]


def _columns(wishes: Sequence[Wish]) -> dict[str, pa.Array]:
    columns = {name: pa.array([getattr(wish, name) for wish in wishes]) for name in ("user", "source", "target")}
    return columns | {"titles": pa.array([list(wish.titles) for wish in wishes], pa.list_(pa.string()))}


class AnswerWorker:
    """Answers one block of wishes and writes its shard; called from threads, or by Ray Data as an actor."""

    def __init__(self, load: Callable[[], Generator], folder: Path, generator_key: str, texts: int, mark: Path) -> None:
        check_mark(mark)
        self.generator = load()
        self.folder, self.generator_key, self.texts = folder, generator_key, texts

    def __call__(self, block: pa.Table) -> pa.Table:
        torch.set_num_threads(1)  # as in features.extraction.extract.ShardWorker
        rows = block.to_pylist()
        wishes = [
            Wish(user=row["user"], source=row["source"], target=row["target"], titles=tuple(row["titles"]))
            for row in rows
        ]
        start = time.perf_counter()
        answers = pa.array(self.generator.generate(wishes), pa.large_string())
        seconds = time.perf_counter() - start
        made = pa.table({"key": block["key"].combine_chunks(), "answer": answers})
        write_shard(self.folder, made, "generator", self.generator_key)
        return result(figures={"texts": self.texts * len(rows), "seconds": seconds})
