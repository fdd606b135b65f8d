"""Calls that are computed side by side before any trial: by processes of this machine, or by the running cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from multiprocessing.process import BaseProcess
from threading import Thread
from typing import Any

from features.cores import usable_cores
from study.specs import Resources


def run_calls(
    function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], resources: Resources, *, on_ray: bool
) -> Iterator[Any]:
    """Yield the function's values, in the order of the calls.

    Each call has what a trial has: more torch threads than that may change the last bits, and on a busy machine make
    small models ten times slower. Where calls need a GPU, those on this machine share its first one.
    """
    if not on_ray:
        processes = max(1, min(len(calls), usable_cores() // resources.threads))
        if resources.gpus > 0:
            processes = min(processes, max(1, int(1 / resources.gpus)))
        pool = ProcessPoolExecutor(
            processes, mp_context=get_context("spawn"), initializer=_begin, initargs=(resources.threads,)
        )
        try:
            for future in [pool.submit(function, *call) for call in calls]:
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)  # else an error, or Ctrl-C, waits for all calls that are left
        return
    import ray

    remote = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus)(function)
    for reference in [remote.remote(*call) for call in calls]:
        yield ray.get(reference)


def _begin(threads: int) -> None:
    """Let each process end with the one that started it, whatever ended that: an idle one would wait for ever."""
    import torch

    torch.set_num_threads(threads)
    Thread(target=_end_with, args=(parent_process(),), daemon=True).start()


def _end_with(process: BaseProcess) -> None:
    process.join()
    os._exit(1)
