"""Cached generation: answers of a generator by the content of their prompts, written block by block.

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

from features.extraction.workers import Actors, block_result, run_blocks
from features.progress import Progress
from features.pseudo.generator import Generator, ResolvedGenerator, load_generator
from features.pseudo.prompts import PseudoPrompt
from features.store.shards import KEY_BYTES, KEY_TYPE, check_mark, clean_shards, mark_store, read_shards, write_shard
from features.store.tables import digest

_BLOCK_PROMPTS = (32, 512)  # few enough to lose to a kill, enough for full batches
_BLOCKS = 16  # and small jobs are cut into this many


def prompt_key(prompt: PseudoPrompt) -> bytes:
    """Return the content key of a prompt, KEY_BYTES long."""
    return bytes.fromhex(digest(asdict(prompt)))[:KEY_BYTES]


def generate_cached(
    prompts: Sequence[PseudoPrompt],
    resolved: ResolvedGenerator,
    store: Path,
    *,
    progress: Progress | None = None,
    workers: int | Actors | None = None,
    use_ray: bool | None = None,
    loader: Callable[[ResolvedGenerator], Generator] = load_generator,
) -> list[str]:
    """Return the answer to each prompt; those that the store holds are not generated again.

    progress: told of texts, without tokens. The other arguments are those of `features.extraction.extract`.
    """
    folder = store / "answers" / resolved.key[:12]
    clean_shards(folder)
    keys = [prompt_key(prompt) for prompt in prompts]
    blocks = _blocks(dict(zip(keys, prompts, strict=True)), _read(folder, resolved.key))
    texts = resolved.spec.texts
    make_worker = partial(GenerationWorker, partial(loader, resolved), folder, resolved.key, texts, mark_store(store))
    left = texts * sum(block.num_rows for block in blocks)
    run_blocks(blocks, make_worker, left, name="GenerateTexts", workers=workers, use_ray=use_ray, progress=progress)
    answers = _read(folder, resolved.key)
    lost = sum(key not in answers for key in keys)
    if lost:
        raise RuntimeError(f"{folder}: {lost} of {len(keys)} answers were lost; run it again, finished ones are kept")
    return [answers[key] for key in keys]


def _read(folder: Path, generator_key: str) -> dict[bytes, str]:
    """Return prompt key -> answer of all that is stored."""
    answers: dict[bytes, str] = {}
    for shard in read_shards(folder, "generator", generator_key):
        answers.update(zip(shard["key"].to_pylist(), shard["answer"].to_pylist(), strict=True))
    return answers


def _blocks(prompts: Mapping[bytes, PseudoPrompt], stored: Mapping[bytes, str]) -> list[pa.Table]:
    """Cut all prompts by key order, then keep what is left of each piece: a resumed run has the pieces of a whole one."""
    planned = sorted(prompts)
    size = min(max(len(planned) // _BLOCKS, _BLOCK_PROMPTS[0]), _BLOCK_PROMPTS[1])
    pieces = (planned[start : start + size] for start in range(0, len(planned), size))
    left = ([key for key in piece if key not in stored] for piece in pieces)
    return [
        pa.table({"key": pa.array(keys, KEY_TYPE)} | _columns([prompts[key] for key in keys])) for keys in left if keys
    ]


def _columns(prompts: Sequence[PseudoPrompt]) -> dict[str, pa.Array]:
    columns = {name: pa.array([getattr(prompt, name) for prompt in prompts]) for name in ("user", "source", "target")}
    return columns | {"titles": pa.array([list(prompt.titles) for prompt in prompts], pa.list_(pa.string()))}


class GenerationWorker:
    """Answers one block of prompts and writes its shard; called from threads, or by Ray Data as an actor."""

    def __init__(self, load: Callable[[], Generator], folder: Path, generator_key: str, texts: int, mark: Path) -> None:
        check_mark(mark)
        self.generator = load()
        self.folder, self.generator_key, self.texts = folder, generator_key, texts

    def __call__(self, block: pa.Table) -> pa.Table:
        torch.set_num_threads(1)  # as in features.extraction.encoding.ShardWorker
        rows = block.to_pylist()
        prompts = [
            PseudoPrompt(user=row["user"], source=row["source"], target=row["target"], titles=tuple(row["titles"]))
            for row in rows
        ]
        start = time.perf_counter()
        answers = pa.array(self.generator.generate(prompts), pa.large_string())
        seconds = time.perf_counter() - start
        shard = pa.table({"key": block["key"].combine_chunks(), "answer": answers})
        write_shard(self.folder, shard, "generator", self.generator_key)
        return block_result(figures={"texts": self.texts * len(rows), "seconds": seconds})
