"""A worker whose device fails in the middle of an extraction, and one that goes on: the layer below Ray's actors."""

from __future__ import annotations

import multiprocessing
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch

from features.encoders.inputs import EncoderInput, input_key
from features.encoders.spec import EncoderSpec
from features.encoders.text import TextEncoder
from features.extraction.encoding import ShardWorker
from features.extraction.planning import input_block
from features.extraction.workers import run_blocks
from features.store.shards import VectorStore, mark_store
from tests.gpu import language

KEY = "0" * 64  # of the encoder
BLOCKS, INPUTS, FAILS_AT = 4, 8, 2  # blocks of so many inputs; the one at which the device fails


def _encoder(device: str) -> TextEncoder:
    torch.manual_seed(0)
    spec = EncoderSpec(model="random", dtype="bfloat16", max_tokens=128)
    model = language.causal_model(language.TINY, torch.device(device)).model
    return TextEncoder(model, language.Numbers(language.TINY["vocab_size"]), spec)


def _inputs() -> list[EncoderInput]:
    texts = language.texts_of(language.review_lengths(BLOCKS * INPUTS), language.TINY["vocab_size"])
    return [EncoderInput(texts=(text,)) for text in texts]


def work(store: str, device: str, fails: bool) -> None:
    """Encode the blocks that the store lacks; where the device fails, end this process as Ray's actor does."""
    vectors = VectorStore.open(Path(store), KEY)
    left = [one for one in _inputs() if input_key(one) not in vectors.index()]
    keyed = [(input_key(one), one) for one in left]
    blocks = [input_block(keyed[start : start + INPUTS]) for start in range(0, len(keyed), INPUTS)]
    encoder, begun = _encoder(device), [0]
    whole = encoder.encode

    def encode(inputs: Any) -> Any:
        begun[0] += 1
        if fails and begun[0] == FAILS_AT:
            _break(device)
        return whole(inputs)

    encoder.encode = encode  # type: ignore[method-assign]
    make = partial(ShardWorker, lambda: encoder, vectors, "float16", mark_store(Path(store)))
    try:
        run_blocks(blocks, make, len(left), name="Encode", workers=1, use_ray=False, progress=None)
    except torch.AcceleratorError:
        os._exit(1)  # as `features.extraction.workers._Actor` does


def _break(device: str) -> None:
    """Make the device unusable: an index out of bounds fails an assertion on a GPU; on a CPU the error is raised alone."""
    if device == "cuda":
        torch.zeros(3, device=device)[torch.tensor([5], device=device)].cpu()
    raise torch.AcceleratorError("CUDA error: device-side assert triggered")


def rows_after_a_failure(store: Path, device: str) -> dict[str, Any]:
    """Run a worker that loses its device, then another; rows in the store after each, and how the first one ended."""
    context = multiprocessing.get_context("spawn")
    found: dict[str, Any] = {"rows": BLOCKS * INPUTS}
    for name, fails in (("failing", True), ("next", False)):
        worker = context.Process(target=work, args=(str(store), device, fails))
        worker.start()
        worker.join(timeout=180)
        worker.kill()
        found[f"{name}_worker"] = {
            "exit_code": worker.exitcode, "rows_stored": len(VectorStore.open(store, KEY).index())
        }  # fmt: skip
    return found
