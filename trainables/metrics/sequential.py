"""Metrics of next-item prediction: HR@k and NDCG@k of one target among its candidates. Shapes: R rows, C candidates.

Candidates of equal score stand in random order: a metric is its expectation over all orders, so that a constant score
gets what chance gets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainables.tasks.sequential import HeldOut

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class SequenceErrors:
    """What each row contributes to every metric: enough to average, to resample and to pair."""

    user: NDArray[np.int64]  # [R] held-out user
    protocol: NDArray[np.int64]  # [R] place in the task's protocols
    hr5: Floats  # [R] chance that the target is among the first 5 candidates
    hr10: Floats
    ndcg5: Floats  # [R] 1 / log2(rank + 1) where the rank, counted from 1, is up to 5
    ndcg10: Floats
    full_hr5: Floats | None = None  # the same with all target-domain items as candidates; None: not measured
    full_hr10: Floats | None = None
    full_ndcg5: Floats | None = None
    full_ndcg10: Floats | None = None

    @staticmethod
    def joined(parts: Sequence[SequenceErrors]) -> SequenceErrors:
        """Return the rows of all parts, in order; the parts have measured the same."""
        columns: dict[str, Any] = {}
        for entry in fields(SequenceErrors):
            values = [getattr(part, entry.name) for part in parts]
            columns[entry.name] = None if values[0] is None else np.concatenate(values)
        return SequenceErrors(**columns)

    def columns(self) -> dict[str, Floats]:
        """Each metric that was measured, by row."""
        values = {field.name: getattr(self, field.name) for field in fields(self)[2:]}
        return {name: value for name, value in values.items() if value is not None}

    def metrics(self, protocols: Sequence[str]) -> dict[str, float]:
        """`<metric>_<protocol>`: mean over users; `<metric>`: mean of these over protocols."""
        found = {}
        for name, value in self.columns().items():
            by = [float(value[self.protocol == place].mean()) for place in range(len(protocols))]
            found[name] = sum(by) / len(by)
            found |= {f"{name}_{protocol}": mean for protocol, mean in zip(protocols, by, strict=True)}
        return found


def sequence_errors(
    held_out: HeldOut, scores_RC: Tensor, full_RI: Tensor | None = None, first: int = 0
) -> SequenceErrors:
    """Metrics of each row. `scores_RC`: of its candidates; `full_RI`: of all target-domain items, from number `first`.

    Raises FloatingPointError for a score that is NaN or infinity: no rank would mean anything.
    """
    measured = _at_cuts("", *target_ranks(scores_RC, torch.zeros_like(held_out.target)))
    if full_RI is not None:
        measured |= _at_cuts("full_", *target_ranks(full_RI, held_out.target - first))
    return SequenceErrors(user=held_out.user.cpu().numpy(), protocol=held_out.protocol.cpu().numpy(), **measured)


def target_ranks(scores_RC: Tensor, target_R: Tensor) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many candidates score above the one in column `target`, and how many others the same, both [R]."""
    if not float(scores_RC.amax()) < torch.inf:  # the largest of numbers with a NaN among them is NaN
        bad = int((~(scores_RC < torch.inf)).sum())
        raise FloatingPointError(f"{bad} of {scores_RC.numel()} scores are NaN or infinity: the model has diverged")
    target_R1 = scores_RC.gather(1, target_R[:, None])
    return _counted(scores_RC > target_R1), _counted(scores_RC == target_R1) - 1


def _counted(true_RC: Tensor) -> NDArray[np.int64]:
    """How many are true in each row, [R]."""
    counts: NDArray[np.int64]
    if true_RC.device.type != "cpu":
        counts = true_RC.sum(dim=1).cpu().numpy()
        return counts
    # NumPy counts true values a byte at a time; torch's sum takes five times as long.
    counts = np.count_nonzero(true_RC.numpy(), axis=1)
    return counts


def hit_rate(above_R: NDArray[np.int64], tied_R: NDArray[np.int64], at: int) -> Floats:
    """HR@`at`: the share of the places above .. above + tied that are among the first `at`."""
    hit: Floats = np.clip(at - above_R, 0, tied_R + 1) / (tied_R + 1)
    return hit


def ndcg(above_R: NDArray[np.int64], tied_R: NDArray[np.int64], at: int) -> Floats:
    """NDCG@`at` of one relevant item: the mean of 1 / log2(place + 2) over those places, 0 from place `at` on."""
    summed = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(at) + 2.0))])
    gain: Floats = (summed[np.minimum(above_R + tied_R + 1, at)] - summed[np.minimum(above_R, at)]) / (tied_R + 1)
    return gain


def _at_cuts(prefix: str, above_R: NDArray[np.int64], tied_R: NDArray[np.int64]) -> dict[str, Floats]:
    """Both metrics at 5 and 10."""
    return {
        f"{prefix}{name}{at}": metric(above_R, tied_R, at)
        for name, metric in (("hr", hit_rate), ("ndcg", ndcg))
        for at in (5, 10)
    }
