"""Two pytest processes share the machine's cores, so each of them, and what it starts, computes in one thread.

With a thread per core in each, threads of OpenMP spin while they wait for threads that have no core: tests of small
models took 3 to 30 times as long (docs/log/2026-11-27.md).
"""

import os
import sys
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _threads_stay() -> Iterator[None]:
    """A test that sets torch's number of threads sets its own alone: with two, sums fall in another order each time."""
    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else 1
    yield
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(before)
