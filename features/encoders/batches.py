"""Texts of unequal length put into batches under a token budget, and their vectors averaged by input.

A batch that does not fit into memory is halved; a text that fails costs its own input only. Legend: B texts of a batch,
L tokens of the longest of them, N inputs, F width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from features.encoders.inputs import EncoderInput
from features.errors import named_line

T = TypeVar("T")
Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Encoded:
    """Vectors of inputs.

    vectors: [N, F] float32, NaN where failed. tokens: [N] real tokens read. padded: tokens computed, padding included.
    failed: number of the input -> reason.
    """

    vectors: Vectors
    tokens: NDArray[np.int32]
    padded: int
    failed: Mapping[int, str]


class RunningMeans:
    """The mean over each input's units, accumulated batch by batch in float64.

    A unit is one text with its input's image; equal units of several inputs are one. units: all that are to be encoded.
    failed: inputs that are not encoded (number -> reason).
    """

    def __init__(self, inputs: Sequence[EncoderInput], width: int, failed: Mapping[int, str]) -> None:
        owners: dict[tuple[str, str | None], list[int]] = {}
        for i, one in enumerate(inputs):
            for text in one.texts if i not in failed else ():
                owners.setdefault((text, one.image), []).append(i)
        self.units, self._owners = list(owners), list(owners.values())
        self._counts = np.array([[max(len(one.texts), 1)] for one in inputs])
        self._sums, self._tokens = np.zeros((len(inputs), width)), np.zeros(len(inputs), np.int32)
        self._failed, self._padded = dict(failed), 0

    def add(
        self,
        units: Sequence[int],
        vectors: Vectors,
        lengths: NDArray[np.int64],
        padded: int,
        failed: Mapping[int, str],
    ) -> None:
        """Add one batch: numbers of its units [B], their vectors [B, F] and lengths [B]; failed: place in it -> reason.

        padded: tokens that were computed, padding included.
        """
        self.fail({units[i]: reason for i, reason in failed.items()})
        owners = [row for i in units for row in self._owners[i]]
        repeats = [len(self._owners[i]) for i in units]
        np.add.at(self._sums, owners, np.repeat(vectors, repeats, axis=0))
        np.add.at(self._tokens, owners, np.repeat(lengths, repeats))
        self._padded += padded

    def fail(self, units: Mapping[int, str]) -> None:
        """Mark units that have no vector (number -> reason), and so all inputs that they are part of."""
        self._failed |= {row: reason for i, reason in units.items() for row in self._owners[i]}

    def encoded(self) -> Encoded:
        """Return the inputs' vectors."""
        means = (self._sums / self._counts).astype(np.float32)
        means[list(self._failed)] = np.nan
        return Encoded(means, self._tokens, self._padded, self._failed)


def pool(states: Sequence[torch.Tensor], mask_BL: torch.Tensor) -> torch.Tensor:
    """Average over layers, then over real tokens, in float32: states of [B, L, F], mask 1 = real -> [B, F]."""
    mean_BLF = torch.stack([state.float() for state in states]).mean(0)
    mask_BL1 = mask_BL.unsqueeze(-1).float()
    return (mean_BLF * mask_BL1).sum(1) / mask_BL1.sum(1)


class TokenBudget:
    """The most padded tokens of one forward pass. Each out-of-memory halves it for good: what failed once fails again."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def halve(self, used: int) -> None:
        """Lower the budget after a batch of `used` padded tokens did not fit."""
        self.tokens = max(1, min(self.tokens, used // 2))


def token_batches(lengths: NDArray[np.int64], budget: TokenBudget, *, exact: bool) -> Iterator[NDArray[np.int64]]:
    """Yield the indices of each batch's texts: longest first, at most `budget` padded tokens; empty texts are left out.

    exact: only texts of equal length share a batch. It wastes no token, and makes a vector's bits independent of the
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


def packs(lengths: NDArray[np.int64], budget: TokenBudget) -> Iterator[NDArray[np.int64]]:
    """Yield the indices of each batch's texts: longest first, at most `budget` tokens, no padding, no empty text."""
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
    """Count the tokens of a batch in which each text is padded to the longest."""
    return len(batch) * max(map(len, batch))


def packed_size(batch: Sequence[Sized]) -> int:
    """Count the tokens of a batch without padding."""
    return sum(map(len, batch))


def run_batch(
    batch: Sequence[T],
    run: Callable[[Sequence[T]], Vectors],
    size: Callable[[Sequence[T]], int],
    budget: TokenBudget,
    width: int,
) -> tuple[Vectors, dict[int, str]]:
    """Return the vectors [B, F] of a batch, and the reasons of those that failed (zeros there). size: tokens of a batch.

    A batch that raises is cut into halves, down to the text that raises alone; one that is out of memory also halves
    the budget of the batches to come. Raises torch.AcceleratorError where the device is of no more use.
    """
    try:
        return run(batch), {}
    except (RuntimeError, ValueError, IndexError) as error:
        out_of_memory = is_out_of_memory(error)
        if isinstance(error, torch.AcceleratorError) and not out_of_memory:
            raise  # the device's fault, not the text's: after an illegal access, all that this process asks of it fails
        reason = named_line(error)
    if out_of_memory:
        if len(batch) > 1 or size(batch) <= budget.tokens:  # a text above the budget says nothing of those within it
            budget.halve(size(batch))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if len(batch) == 1:
        return np.zeros((1, width), np.float32), {0: reason}
    middle = len(batch) // 2
    left, left_failed = run_batch(batch[:middle], run, size, budget, width)
    right, right_failed = run_batch(batch[middle:], run, size, budget, width)
    return np.concatenate([left, right]), left_failed | {middle + i: reason for i, reason in right_failed.items()}


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a GPU (torch or CUDA itself) or torch's CPU allocator is out of memory.

    The CPU allocator has no exception of its own.
    """
    messages = ("can't allocate memory", "CUDA error: out of memory")
    return isinstance(error, torch.OutOfMemoryError) or any(message in str(error) for message in messages)
