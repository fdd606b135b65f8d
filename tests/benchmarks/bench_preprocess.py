"""Preprocessing: reviews per second, peak memory, and how both grow with the number of reviews.

    python tests/benchmarks/bench_preprocess.py            # 100k, 300k, 1M and 3M simulated reviews
    python tests/benchmarks/bench_preprocess.py --table-1  # also simulates MuSiC Table 1's size, without images

Each size runs in a process of its own: peak memory is that process's. CPU seconds, not wall seconds, give the exponent
(the slope of log seconds over log reviews), so that other work on the machine does not count.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from features.domains.domain import DomainSpec, FilterSpec, prepare_domain
from features.domains.readers import read_interactions
from features.simulate.simulator import DomainSize, SimulateSpec, simulate

SIZES = (100_000, 300_000, 1_000_000, 3_000_000)
# MuSiC Table 1, Task 2, shared out over its two domains
TABLE_1 = {
    "movies": DomainSize(users=26_721, items=200_000, ratings=1_000_000),
    "books": DomainSize(users=26_721, items=474_378, ratings=1_772_516),
}
MUSIC = FilterSpec(min_words=10, require_description=True, min_user_reviews=20)


def measured(work: Callable[[], object]) -> dict[str, float]:
    """Wall and CPU seconds of `work`, and this process's peak memory after it, in MiB."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "peak": peak}


def worker(step: str, ratings: int, folder: Path) -> dict[str, float]:
    """One step in this process."""
    data = folder / "data"
    if step == "simulate":
        size = DomainSize(users=ratings // 52, items=ratings // 4, ratings=ratings)
        return measured(lambda: simulate(SimulateSpec(domains={"d": size}, overlap=0, images=0.0), data))
    if step == "table-1":
        return measured(lambda: simulate(SimulateSpec(domains=TABLE_1, overlap=6_000, images=0.0), data))
    if step == "read":
        batches = read_interactions("amazon2023", data / "d.jsonl.gz", {}, (1.0, 5.0))
        return measured(lambda: sum(batch.num_rows for batch in batches))
    spec = DomainSpec(name="d", reader="amazon2023", interactions="d.jsonl.gz", items="meta_d.jsonl.gz", filters=MUSIC)
    return measured(lambda: prepare_domain(spec, data, folder / "store"))


def run(step: str, ratings: int, folder: Path) -> dict[str, float]:
    """One step in a fresh process."""
    command = [sys.executable, __file__, "--step", step, "--ratings", str(ratings), "--folder", str(folder)]
    result: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return result


def report(step: str, ratings: int, numbers: dict[str, float]) -> None:
    rate = ratings / numbers["cpu"]
    print(
        f"{step:9} {ratings:>9,} reviews  {numbers['wall']:6.1f} s wall  {numbers['cpu']:6.1f} s CPU  "
        f"{rate:9,.0f} reviews per CPU second  peak {numbers['peak']:5,.0f} MiB",
        flush=True,
    )


def main() -> None:
    """Run every size and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table-1", action="store_true")
    parser.add_argument("--step")
    parser.add_argument("--ratings", type=int)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    if given.step:
        print(json.dumps(worker(given.step, given.ratings, given.folder)))
        return
    seconds: dict[str, list[float]] = {"simulate": [], "read": [], "prepare": []}
    for ratings in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            for step, found in seconds.items():
                numbers = run(step, ratings, Path(folder))
                found.append(numbers["cpu"])
                report(step, ratings, numbers)
    for step, found in seconds.items():
        slope = np.polyfit(np.log(SIZES[:3]), np.log(found[:3]), 1)[0]
        print(f"{step}: seconds grow with reviews to the power of {slope:.2f} from {SIZES[0]:,} to {SIZES[2]:,}")
    if given.table_1:
        with tempfile.TemporaryDirectory() as folder:
            ratings = sum(size.ratings for size in TABLE_1.values())
            report("table-1", ratings, run("table-1", ratings, Path(folder)))


if __name__ == "__main__":
    main()
