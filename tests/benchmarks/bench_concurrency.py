"""Wall time of the same three trials one after the other, two side by side, and three side by side; threads against trials.

    python tests/benchmarks/bench_concurrency.py MODEL TASK_DIR [--config JSON]

    python tests/benchmarks/bench_concurrency.py music HOME/tasks/books-movies-.../search
    python tests/benchmarks/bench_concurrency.py lgcd HOME/tasks/kitchen-food-.../search --config '{"epochs": 3}'

Trials run as in a study: in processes that stay, each warm from a trial of one epoch before. Run it on a machine that does
nothing else, or under `chrt -f 1`, which takes the cores from all other work.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

BASE: dict[str, dict[str, Any]] = {"music": {"epochs": 60, "patience": 60}, "lgcd": {"epochs": 3, "patience": 3}}


def trial(model: str, config: dict[str, Any], task_dir: str, threads: int) -> float:
    """Train; CPU seconds."""
    import torch

    from trainables.trial import run

    torch.set_num_threads(threads)
    began = time.process_time()
    for _ in run(model, config, task_dir, [0]):
        pass
    return time.process_time() - began


def timed(of: tuple[str, dict[str, Any], str], trials: int, side_by_side: int, threads: int) -> tuple[float, float]:
    """Wall seconds until the last of the trials is done, and their CPU seconds."""
    model, config, task_dir = of
    with ProcessPoolExecutor(side_by_side, mp_context=get_context("spawn")) as pool:

        def start(count: int, **changes: Any) -> list[Future[float]]:
            return [pool.submit(trial, model, {**config, **changes}, task_dir, threads) for _ in range(count)]

        for warm in start(side_by_side, epochs=1):  # all at once, so that each process has one
            warm.result()
        began = time.perf_counter()
        cpu = sum(done.result() for done in start(trials))
        return time.perf_counter() - began, cpu


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=sorted(BASE))
    parser.add_argument("task_dir", type=Path)
    parser.add_argument("--config", type=json.loads, default={})
    arguments = parser.parse_args()
    of = (arguments.model, {**BASE[arguments.model], **arguments.config}, str(arguments.task_dir))
    print(f"{arguments.model}, {os.cpu_count()} cores\n")
    print("| trials | side by side | threads each | wall s | CPU s |\n|---:|---:|---:|---:|---:|")
    for trials, side_by_side, threads in ((3, 1, 1), (3, 2, 1), (3, 3, 1), (2, 1, 2), (2, 2, 1)):
        wall, cpu = timed(of, trials, side_by_side, threads)
        print(f"| {trials} | {side_by_side} | {threads} | {wall:.1f} | {cpu:.1f} |", flush=True)


if __name__ == "__main__":
    main()
