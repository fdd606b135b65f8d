"""Two pytest processes share the machine's cores, so each of them, and what it starts, computes in one thread.

With a thread per core in each, threads of OpenMP spin while they wait for threads that have no core: tests of small
models took 3 to 30 times as long (docs/log/2026-11-27.md).
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
