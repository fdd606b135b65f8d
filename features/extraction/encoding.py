"""Encoding of blocks: a worker encodes one macro-batch and writes its shard itself, so no vector crosses a process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from features.encoders.encoder import Encoder, load_encoder
from features.encoders.inputs import EncoderInput, input_key
from features.encoders.spec import ResolvedEncoder
from features.encoders.text import TextEncoder
from features.encoders.throughput import Operations, matrix_peak
from features.encoders.vision import ImageTextEncoder
from features.extraction.planning import MACRO_TEXTS, block_inputs, count_texts, input_block, macro_batches
from features.extraction.workers import Actors, block_result, run_blocks
from features.images.gather import images_folder
from features.progress import Progress
from features.store.shards import VectorStore, check_mark, mark_store

_PEAK_AFTER = 2.0  # seconds of work after which a worker measures what its device could do


class ShardWorker:
    """Encodes one macro-batch and writes its shard; called from threads, or by Ray Data as an actor.

    It returns one row of figures, never vectors.
    """

    def __init__(self, load: Callable[[], Encoder], vectors: VectorStore, store_dtype: str, mark: Path) -> None:
        check_mark(mark)
        self.encoder = encoder = load()
        self.vectors = vectors
        self.dtype = np.dtype(store_dtype)
        self.seconds = 0.0  # of work
        self.operations = Operations(encoder.model) if isinstance(encoder, TextEncoder | ImageTextEncoder) else None

    def __call__(self, block: pa.Table) -> pa.Table:
        # One thread per worker, set explicitly: Ray's OMP_NUM_THREADS=1 holds in actors only, two threads on a busy
        # machine are ten times slower than one, and with one a vector's bits do not depend on its batch.
        torch.set_num_threads(1)
        keys: list[bytes] = block["key"].to_pylist()
        if self.vectors.holds(keys):  # Ray runs a block again when the node with its result is lost
            return block_result(figures={"texts": count_texts(block)})
        start = time.perf_counter()
        encoded = self.encoder.encode(block_inputs(block))
        seconds = time.perf_counter() - start
        with np.errstate(over="ignore"):  # the next lines find what overflows
            vectors = encoded.vectors.astype(self.dtype)
        finite = np.isfinite(vectors).all(1)
        failed = {int(i): f"vector not finite in {self.dtype}" for i in np.flatnonzero(~finite)} | dict(encoded.failed)
        good = [i for i in range(len(keys)) if i not in failed]
        if good:
            self.vectors.write([keys[i] for i in good], vectors[good], encoded.tokens[good])
        figures = {"texts": count_texts(block), "tokens": int(encoded.tokens.sum()), "seconds": seconds}
        return block_result(
            {keys[i]: reason for i, reason in failed.items()}, figures={**figures, **self._operations(seconds)}
        )

    def _operations(self, seconds: float) -> dict[str, float]:
        """Return the operations done, and those that the measured peak would have done; nothing for short work."""
        if self.operations is None:
            return {}
        operations, model = float(self.operations.take()), self.operations.model
        self.seconds += seconds
        if self.seconds < _PEAK_AFTER:
            return {}
        return {"operations": operations, "peak": matrix_peak(model.device, model.dtype) * seconds}


def encode_inputs(
    inputs: Iterable[EncoderInput],
    resolved: ResolvedEncoder,
    store: Path,
    *,
    progress: Progress | None = None,
    workers: int | Actors | None = None,
    use_ray: bool | None = None,
    loader: Callable[[ResolvedEncoder], Encoder] = load_encoder,
) -> tuple[VectorStore, dict[bytes, str]]:
    """Encode those of `inputs` that the store does not hold; return their store, and failed input keys with reasons.

    The other arguments are those of `features.extraction.extract.extract_tables`.
    """
    resolved = replace(resolved, images=images_folder(store))
    vectors = VectorStore.open(store, resolved.key)
    vectors.check_writable()
    vectors.clean()
    planned = {input_key(one): one for one in inputs}
    stored = vectors.index()
    left = input_block([(key, one) for key, one in planned.items() if key not in stored])
    blocks = macro_batches(left, {key: len(one.texts) for key, one in planned.items()}, MACRO_TEXTS) if planned else []
    make_worker = partial(ShardWorker, partial(loader, resolved), vectors, resolved.spec.store_dtype, mark_store(store))
    texts = sum(map(count_texts, blocks))
    totals = run_blocks(
        blocks, make_worker, texts, name="EncodeTexts", workers=workers, use_ray=use_ray, progress=progress
    )
    return vectors, totals.failed
