"""How fast an encoder is here: of its device's matrix peak, and on a sample of what is left to do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from features.encoders.encoder import Encoder, ResolvedEncoder, load_encoder
from features.extraction.prompts import Row
from features.images.gather import images_folder

_SECONDS = 10.0  # after which a measurement begins no more texts


@dataclass(frozen=True)
class Rate:
    """Of one worker."""

    texts_per_second: float
    tokens_per_second: float


def measure_rate(
    resolved: ResolvedEncoder,
    rows: Sequence[Row],
    store: Path,
    loader: Callable[[ResolvedEncoder], Encoder] = load_encoder,
) -> Rate:
    """Encode texts of a sample with one thread (or on the GPU), twice as many each time; the rate of the most at a time.

    That is until `_SECONDS` have passed, for a large model on a CPU may need a minute for one; loading and a first text
    are not counted.
    resolved: by the driver, as the extraction's is: a worker's own "auto" might be another type.
    """
    encoder = loader(replace(resolved, images=images_folder(store)))
    texts = [Row(texts=(text,), image=row.image) for row in rows for text in row.texts]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        encoder.encode(texts[:1])
        start, done, most = time.perf_counter(), 0, (0, 0, 0.0)
        while done < len(texts) and (begun := time.perf_counter()) - start < _SECONDS:
            read = encoder.encode(texts[done : 2 * done + 1]).tokens
            most = max(most, (len(read), int(read.sum()), time.perf_counter() - begun))
            done += len(read)
    finally:
        torch.set_num_threads(before)
    count, tokens, seconds = most
    return Rate(count / seconds, tokens / seconds)


class Operations:
    """Counts the floating-point operations of a model's matrices as it computes, each thread for itself.

    Attention among tokens is left out (a few %).
    """

    def __init__(self, model: Any) -> None:
        self.model, self._mine = model, threading.local()
        for layer in model.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.register_forward_hook(self._count)

    def taken(self) -> int:
        """Those of this thread since it asked last."""
        count: int = self._mine.__dict__.pop("count", 0)
        return count

    def _count(self, layer: torch.nn.Linear, inputs: Any, output: torch.Tensor) -> None:
        self._mine.count = getattr(self._mine, "count", 0) + 2 * layer.in_features * output.numel()


@cache
def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Measured operations per second of a large matrix product, by one thread or by the GPU."""
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
