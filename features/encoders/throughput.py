"""Throughput of an encoder on this machine: measured on a sample, and as a share of its device's matrix peak."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from features.encoders.encoder import Encoder, load_encoder
from features.encoders.inputs import EncoderInput
from features.encoders.spec import ResolvedEncoder
from features.images.gather import images_folder

_SECONDS = 10.0  # after which a measurement begins no more texts


@dataclass(frozen=True)
class Throughput:
    """What one worker encodes in a second."""

    texts_per_second: float
    tokens_per_second: float


def measure_throughput(
    resolved: ResolvedEncoder,
    sample: Sequence[EncoderInput],
    store: Path,
    loader: Callable[[ResolvedEncoder], Encoder] = load_encoder,
) -> Throughput:
    """Encode a sample's texts with one thread (or on the GPU), twice as many in each call; the largest call counts.

    Calls go on until `_SECONDS` have passed, because a large model on a CPU may need a minute for one text. Loading and a
    first text are not counted.
    resolved: by the driver, like the extraction's: a worker's own "auto" might be another type.
    """
    encoder = loader(replace(resolved, images=images_folder(store)))
    texts = [EncoderInput(texts=(text,), image=one.image) for one in sample for text in one.texts]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        encoder.encode(texts[:1])
        start, done, largest = time.perf_counter(), 0, (0, 0, 0.0)
        while done < len(texts) and (begun := time.perf_counter()) - start < _SECONDS:
            tokens = encoder.encode(texts[done : 2 * done + 1]).tokens
            largest = max(largest, (len(tokens), int(tokens.sum()), time.perf_counter() - begun))
            done += len(tokens)
    finally:
        torch.set_num_threads(threads)
    text_count, token_count, seconds = largest
    return Throughput(text_count / seconds, token_count / seconds)


class Operations:
    """Counter of the floating-point operations of a model's matrices, for each thread by itself.

    Attention among tokens is left out (a few %).
    """

    def __init__(self, model: Any) -> None:
        self.model, self._thread = model, threading.local()
        for layer in model.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.register_forward_hook(self._count)

    def take(self) -> int:
        """Return the operations of this thread since its last call, and start again at 0."""
        count: int = self._thread.__dict__.pop("count", 0)
        return count

    def _count(self, layer: torch.nn.Linear, inputs: Any, output: torch.Tensor) -> None:
        self._thread.count = getattr(self._thread, "count", 0) + 2 * layer.in_features * output.numel()


@cache
def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the operations per second of a large matrix product, by one thread or by the GPU."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    clock = time.perf_counter if device.type == "cuda" else time.thread_time  # a busy machine is not a slow one

    def once() -> float:
        start = clock()
        torch.matmul(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - start

    return 2 * size**3 / min(once() for _ in range(6))
