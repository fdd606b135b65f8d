"""Inputs of unequal length put into batches under a token budget, and their vectors put together by row.

What does not fit into memory is halved, what fails costs itself only. Legend: B inputs of a batch, L tokens of
the longest of them, N rows, F width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from features.errors import one_line
from features.extraction.prompts import Row

T = TypeVar("T")
Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Encoded:
    """Vectors of rows.

    vectors: [N, F] float32, NaN where failed. tokens: [N] real tokens read. padded: tokens computed, padding included.
    failed: row number -> reason.
    """

    vectors: Vectors
    tokens: NDArray[np.int32]
    padded: int
    failed: Mapping[int, str]


class Means:
    """The mean over each row's units, accumulated batch by batch in float64; a unit is one text, with the row's image.

    Equal units of whatever rows are one. `units`: all that are to be encoded. failed: rows that are not (number -> why).
    """

    def __init__(self, rows: Sequence[Row], width: int, failed: Mapping[int, str]) -> None:
        owners: dict[tuple[str, str | None], list[int]] = {}
        for i, row in enumerate(rows):
            for text in row.texts if i not in failed else ():
                owners.setdefault((text, row.image), []).append(i)
        self.units, self._owners = list(owners), list(owners.values())
        self._counts = np.array([[max(len(row.texts), 1)] for row in rows])
        self._sums, self._read = np.zeros((len(rows), width)), np.zeros(len(rows), np.int32)
        self._failed, self._padded = dict(failed), 0

    def add(
        self,
        units: Sequence[int],
        vectors: Vectors,
        lengths: NDArray[np.int64],
        padded: int,
        failed: Mapping[int, str],
    ) -> None:
        """One batch: numbers of its units [B], their vectors [B, F], lengths [B]; failed: place in the batch -> reason.

        padded: tokens that were computed, padding included.
        """
        self.fail({units[i]: reason for i, reason in failed.items()})
        mine = [row for i in units for row in self._owners[i]]
        repeats = [len(self._owners[i]) for i in units]
        np.add.at(self._sums, mine, np.repeat(vectors, repeats, axis=0))
        np.add.at(self._read, mine, np.repeat(lengths, repeats))
        self._padded += padded

    def fail(self, units: Mapping[int, str]) -> None:
        """Units that have no vector (number -> reason), and so all rows they are part of."""
        self._failed |= {row: reason for i, reason in units.items() for row in self._owners[i]}

    def encoded(self) -> Encoded:
        """The rows' vectors."""
        means = (self._sums / self._counts).astype(np.float32)
        means[list(self._failed)] = np.nan
        return Encoded(means, self._read, self._padded, self._failed)


def pool(states: Sequence[torch.Tensor], mask_BL: torch.Tensor) -> torch.Tensor:
    """Mean over layers, then over real tokens, in float32: states of [B, L, F], mask 1 = real -> [B, F]."""
    mean_BLF = torch.stack([state.float() for state in states]).mean(0)
    mask_BL1 = mask_BL.unsqueeze(-1).float()
    return (mean_BLF * mask_BL1).sum(1) / mask_BL1.sum(1)


class Budget:
    """Padded tokens of one forward pass at most. Halved for good by each out-of-memory: what failed once fails again."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def halve(self, used: int) -> None:
        """After a batch of `used` padded tokens did not fit."""
        self.tokens = max(1, min(self.tokens, used // 2))


def token_batches(lengths: NDArray[np.int64], budget: Budget, *, exact: bool) -> Iterator[NDArray[np.int64]]:
    """Indices of the inputs of each batch: longest first, at most `budget` padded tokens; empty inputs are left out.

    exact: only inputs of equal length share a batch. It wastes no token, and makes a vector's bits independent of the
    texts around it (one thread, measured on MKL): that is how a changed review of one user changes no other user's
    features. A GPU needs the larger batches.
    """
    order = np.argsort(-lengths, kind="stable")
    order = order[lengths[order] > 0]
    falling = -lengths[order]
    start = 0
    while start < len(order):
        end = start + max(1, budget.tokens // -int(falling[start]))
        if exact:
            end = min(end, int(np.searchsorted(falling, falling[start], side="right")))
        yield order[start:end]
        start = end


def packs(lengths: NDArray[np.int64], budget: Budget) -> Iterator[NDArray[np.int64]]:
    """Indices of the inputs of each batch: longest first, at most `budget` tokens without any padding; no empty input."""
    order = np.argsort(-lengths, kind="stable")
    order = order[lengths[order] > 0]
    ends = np.cumsum(lengths[order])
    start = 0
    while start < len(order):
        before = int(ends[start - 1]) if start else 0
        end = max(start + 1, int(np.searchsorted(ends, before + budget.tokens, side="right")))
        yield order[start:end]
        start = end


def padded_size(batch: Sequence[Sized]) -> int:
    """Tokens of a batch in which each input is as long as the longest."""
    return len(batch) * max(map(len, batch))


def packed_size(batch: Sequence[Sized]) -> int:
    """Tokens of a batch without padding."""
    return sum(map(len, batch))


def run_batch(
    batch: Sequence[T],
    run: Callable[[Sequence[T]], Vectors],
    size: Callable[[Sequence[T]], int],
    budget: Budget,
    width: int,
) -> tuple[Vectors, dict[int, str]]:
    """Vectors [B, F] of a batch, and the reasons of those that failed (zeros there). size: tokens of a batch.

    A batch that raises is cut into halves, down to the input that raises alone; one that is out of memory also halves
    the budget of the batches to come. Raises torch.AcceleratorError where the device is of no more use.
    """
    try:
        return run(batch), {}
    except (RuntimeError, ValueError, IndexError) as error:
        out_of_memory = is_out_of_memory(error)
        if isinstance(error, torch.AcceleratorError) and not out_of_memory:
            raise  # of the device, not of an input: after an illegal access, all that this process asks of it fails
        reason = f"{type(error).__name__}: {one_line(error)}"
    if out_of_memory:
        if len(batch) > 1 or size(batch) <= budget.tokens:  # an input above the budget says nothing of those within it
            budget.halve(size(batch))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if len(batch) == 1:
        return np.zeros((1, width), np.float32), {0: reason}
    middle = len(batch) // 2
    left, left_failed = run_batch(batch[:middle], run, size, budget, width)
    right, right_failed = run_batch(batch[middle:], run, size, budget, width)
    return np.concatenate([left, right]), left_failed | {middle + i: why for i, why in right_failed.items()}


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU, by torch or by CUDA itself, or of torch's CPU allocator, which has no exception of its own."""
    said = ("can't allocate memory", "CUDA error: out of memory")
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in said)
