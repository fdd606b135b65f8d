"""Blocks of work handed to workers: threads of this process, or actors of Ray Data.

A worker takes one block (an Arrow table), writes what it made to the store itself, and answers with one line.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import torch

from features.errors import InputError
from features.store import KEY_TYPE

Progress = Callable[[int, int], None]  # texts done, texts to do in this call
Worker = Callable[[pa.Table], pa.Table]  # a block -> its `result`

RAY_TEXTS = 100_000  # fewer texts than this are done before Ray's 5 to 7 s of start-up have paid off
_THREADS = 8  # Python threads that still scale: beyond, they wait for the interpreter lock between operators


def result(texts: int = 0, failed: Mapping[bytes, str] | None = None, refused: str | None = None) -> pa.Table:
    """One row: texts read, failed row keys with their reasons, and why the worker could not start at all."""
    failed = failed or {}
    return pa.table(
        {
            "texts": [texts],
            "failed": pa.array([list(failed)], pa.list_(KEY_TYPE)),
            "reasons": pa.array([list(failed.values())], pa.list_(pa.string())),
            "refused": pa.array([refused], pa.string()),
        }
    )


def run_blocks(
    blocks: Sequence[pa.Table],
    make_worker: Callable[[], Worker],
    texts: int,
    *,
    workers: int | None,
    use_ray: bool | None,
    progress: Progress | None,
) -> dict[bytes, str]:
    """All blocks done by workers; failed row keys with their reasons.

    texts: what is to do in all. workers: threads, or Ray actors (None: one per GPU if there are any, else one per core).
    use_ray: None lets the number of texts decide. progress: called with (texts done, texts).
    """
    run = _run_ray if (texts >= RAY_TEXTS if use_ray is None else use_ray) else _run_threads
    failed: dict[bytes, str] = {}
    done = 0
    for answer in run(blocks, make_worker, workers) if blocks else ():
        done += answer["texts"]
        failed |= zip(answer["failed"], answer["reasons"], strict=True)
        if progress is not None:
            progress(done, texts)
    return failed


def _run_threads(
    blocks: Sequence[pa.Table], make_worker: Callable[[], Worker], workers: int | None
) -> Iterator[dict[str, Any]]:
    """One model shared by several threads of one torch thread each; results as they come."""
    before = torch.get_num_threads()
    threads = workers or (1 if torch.cuda.is_available() else min(len(os.sched_getaffinity(0)), _THREADS))
    worker = make_worker()
    pool = ThreadPoolExecutor(threads)
    try:
        running = {pool.submit(worker, block) for block in blocks}
        while running:
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                yield from future.result().to_pylist()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def _run_ray(
    blocks: Sequence[pa.Table], make_worker: Callable[[], Worker], workers: int | None
) -> Iterator[dict[str, Any]]:
    """One actor per GPU (or core), each with its own model; one Ray Data block per macro-batch."""
    import ray

    with _ray_session():
        cluster: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        gpus = int(cluster.get("GPU", 0))
        cores = int(cluster.get("CPU", 0)) or 1  # an elastic cluster may start empty
        size = min(workers or gpus or cores, len(blocks))
        # from_arrow with a table per macro-batch: a single block would keep a single actor busy, whatever the pool.
        results = ray.data.from_arrow(list(blocks)).map_batches(
            _Actor,
            fn_constructor_args=(make_worker,),
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=size),
            num_cpus=1,
            num_gpus=1 if gpus else 0,
        )
        for row in results.iter_rows():
            if row["refused"] is not None:
                raise InputError(row["refused"])
            yield row


class _Actor:
    """Worker whose model loads with the first block, and whose InputError travels as a value.

    Raised in a constructor, Ray would report a dead actor; raised in a call, Ray Data keeps only the traceback's text.
    """

    def __init__(self, make_worker: Callable[[], Worker]) -> None:
        self.make_worker = make_worker
        self.worker: Worker | None = None

    def __call__(self, block: pa.Table) -> pa.Table:
        try:
            self.worker = self.worker or self.make_worker()
        except InputError as error:
            return result(refused=str(error))
        return self.worker(block)


@contextmanager
def _ray_session() -> Iterator[None]:
    """The running Ray, or one of our own for the extraction; Ray Data's bars and log lines are off meanwhile."""
    import ray
    from ray.data import DataContext

    own = not ray.is_initialized()
    logger = logging.getLogger("ray.data")
    level = logger.level
    try:
        if own:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        logger.setLevel(logging.ERROR)
        context = DataContext.get_current()
        bars, context.enable_progress_bars = context.enable_progress_bars, False
        try:
            yield
        finally:
            context.enable_progress_bars = bars
    finally:
        logger.setLevel(level)
        if own:
            ray.shutdown()
