"""Whole trials counted for a while, in as many processes as asked for: the engine on a shared GPU, without Ray."""

from __future__ import annotations

import multiprocessing
import time
from typing import Any

import torch

from trainables.devices import share_gpu
from trainables.trial import run


def trials_per_hour(
    task: str, config: dict[str, Any], device: str, processes: int, seconds: float, threads: int = 1
) -> float:
    """Trials of one seed that so many processes end in an hour; each has trained one before the time runs.

    On a GPU each has its share of the memory. RuntimeError where one of them fails.
    """
    context = multiprocessing.get_context("spawn")
    ready, counts = context.Barrier(processes + 1), context.Queue()
    arguments = (task, config, device, 1 / processes, seconds, threads, ready, counts)
    workers = [context.Process(target=_count, args=arguments) for _ in range(processes)]
    for worker in workers:
        worker.start()
    try:
        ready.wait(timeout=120)
        rates = [counts.get(timeout=120 + 10 * seconds) for _ in workers]
    except Exception as error:
        raise RuntimeError(f"{processes} processes on {device}: one ended ({type(error).__name__})") from error
    finally:
        for worker in workers:
            worker.join(timeout=10)
            worker.kill()
    return 3600 * sum(rates)


def _count(
    task: str, config: dict[str, Any], device: str, share: float, seconds: float, threads: int, ready: Any, counts: Any
) -> None:  # fmt: skip
    torch.set_num_threads(threads)
    if device == "cuda":
        share_gpu(share)
    try:
        list(run("music", config, task, [0], device=device))
    except BaseException:
        ready.abort()
        raise
    ready.wait(timeout=120)
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        done += 1
        list(run("music", config, task, [done], device=device))
    counts.put(done / (time.perf_counter() - began))
