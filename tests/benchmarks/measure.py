"""How the benches measure: in CPU seconds of this process, for other work on the machine does not count then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator


def rate(work: Iterator[int], seconds: float, *, warm_ups: int = 1) -> float:
    """Return what the work yields (samples, rows) per CPU second, for at least so many, after some warm-ups."""
    for _ in range(warm_ups):
        next(work)
    began, done = time.process_time(), 0
    while time.process_time() - began < seconds:
        done += next(work)
    return done / (time.process_time() - began)


def cpu_seconds(work: Callable[[], object], *, best_of: int = 1) -> float:
    """Return the CPU seconds that the work takes, the least of some runs."""
    taken = []
    for _ in range(best_of):
        began = time.process_time()
        work()
        taken.append(time.process_time() - began)
    return min(taken)
