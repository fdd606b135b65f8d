"""Blocks of work done by workers: threads of this process, or actors of Ray Data.

A worker takes one block (an Arrow table), writes its results to the store itself, and returns one row of figures.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import time
import traceback
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import torch

from features.cores import usable_cores
from features.errors import InputError
from features.local_ray import start_ray
from features.progress import Progress
from features.store.shards import KEY_TYPE

Worker = Callable[[pa.Table], pa.Table]  # a block -> its `block_result`

RAY_TEXTS = 100_000  # fewer texts than this are done before Ray's 5 to 7 s of start-up have paid off
_TRIES = 4  # of a macro-batch whose worker or node dies
_THREADS = 8  # Python threads that still scale: beyond, they wait for the interpreter lock between operators


@dataclass(frozen=True)
class Actors:
    """Workers that a cluster has room for; Ray places them."""

    count: int
    on_gpu: bool  # each holds a GPU; else a core


@dataclass(kw_only=True)
class WorkTotals:
    """What all workers have done so far."""

    texts: int = 0
    tokens: int = 0  # real ones, padding not counted
    seconds: float = 0.0  # that workers were busy, summed over them
    began: float = math.inf  # `time.monotonic` when the first worker began, from its result: start-up is not work
    elapsed: float = 0.0  # seconds from there to the last result
    operations: float = 0.0  # floating-point operations of the model's matrices, on padding too, once for a shared text
    peak: float = 0.0  # operations that the devices' measured matrix peaks would have done meanwhile
    failed: dict[bytes, str] = field(default_factory=dict)  # input key -> reason

    def add(self, block: Mapping[str, Any]) -> None:
        """Add the `block_result` of one block."""
        self.failed |= zip(block["failed"], block["reasons"], strict=True)
        for name in ("texts", "tokens", "seconds", "operations", "peak"):
            setattr(self, name, getattr(self, name) + block[name])
        now = time.monotonic()
        self.began = min(self.began, now - block["seconds"])
        self.elapsed = now - self.began

    @property
    def share_of_peak(self) -> float | None:
        """The operations as a share of the measured matrix peak; None where nothing was measured."""
        return self.operations / self.peak if self.peak else None


def block_result(
    failed: Mapping[bytes, str] | None = None, refused: str | None = None, *, figures: Mapping[str, float] | None = None
) -> pa.Table:
    """Return one row: failed input keys with reasons, why the worker could not go on, and figures of `WorkTotals`."""
    failed = failed or {}
    figures = {"texts": 0, "tokens": 0, "seconds": 0.0, "operations": 0.0, "peak": 0.0} | dict(figures or {})
    return pa.table(
        {
            "failed": pa.array([list(failed)], pa.list_(KEY_TYPE)),
            "reasons": pa.array([list(failed.values())], pa.list_(pa.string())),
            "refused": pa.array([refused], pa.string()),
            **{name: [figure] for name, figure in figures.items()},
        }
    )


def run_blocks(
    blocks: list[pa.Table],
    make_worker: Callable[[], Worker],
    texts: int,
    *,
    name: str,
    workers: int | Actors | None,
    use_ray: bool | None,
    progress: Progress | None,
    most_failed: float = math.inf,
) -> WorkTotals:
    """Have workers do all blocks, or stop as soon as more than `most_failed` inputs have failed.

    blocks: the list is emptied, so that each is in memory once and until it is done.
    texts: texts of all blocks. name: of the work, as Ray's dashboard shows it. workers: threads, or Ray actors (None: one
    per GPU if there are any, else one per core); `Actors` may be more than the cluster holds now, which asks its
    autoscaler for them all. use_ray: None lets the number of texts decide. progress: told of texts, first with zeros
    while the workers start.
    Raises InputError where a worker raised one, or where workers died at the same block again and again.
    """
    by_ray = texts >= RAY_TEXTS if use_ray is None else use_ray
    totals = WorkTotals()
    if not blocks:
        return totals
    if progress is not None:
        progress(0, texts, 0, 0.0)
    if by_ray:
        results = _run_ray(blocks, make_worker, workers, name)
    else:
        results = _run_threads(blocks, make_worker, workers if isinstance(workers, int) else None)
    with closing(results):
        for block in results:
            totals.add(block)
            if progress is not None:
                progress(totals.texts, texts, totals.tokens, totals.elapsed)
            if len(totals.failed) > most_failed:
                break
    return totals


def count_threads() -> int:
    """Return the default number of workers of this process."""
    return 1 if torch.cuda.is_available() else min(usable_cores(), _THREADS)


def count_actors() -> Actors:
    """Return the default workers of the running Ray, as large as it is now."""
    import ray

    cluster: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    gpus = int(cluster.get("GPU", 0))
    return Actors(gpus or int(cluster.get("CPU", 0)) or 1, gpus > 0)


def _run_threads(
    blocks: list[pa.Table], make_worker: Callable[[], Worker], workers: int | None
) -> Generator[dict[str, Any]]:
    """Share one model among several threads of one torch thread each; yield results as they come."""
    torch_threads = torch.get_num_threads()
    threads = workers or count_threads()
    worker = make_worker()
    pool = ThreadPoolExecutor(threads)
    try:
        running = {pool.submit(worker, block) for block in blocks}
        blocks.clear()
        while running:
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                yield from future.result().to_pylist()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(torch_threads)


def _run_ray(
    blocks: list[pa.Table], make_worker: Callable[[], Worker], workers: int | Actors | None, name: str
) -> Generator[dict[str, Any]]:
    """Run one actor per GPU (or core), each with its own model; a macro-batch is one row of Ray Data."""
    import ray

    with _ray_session():
        actors = workers if isinstance(workers, Actors) else count_actors()
        count = workers if isinstance(workers, int) else actors.count
        size = min(count, len(blocks))
        # Ray Data gets the blocks' numbers only. It asks for a table's size by a task on a core, which a cluster that
        # begins empty does not have; and all texts would be in memory once more.
        references = []
        while blocks:
            references.append(ray.put(blocks.pop()))
        tries = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Tries).remote()
        results = ray.data.from_items(list(range(len(references))), override_num_blocks=len(references)).map_batches(
            type(name, (_Actor,), {}),  # Ray's dashboard shows the class's name
            fn_constructor_args=(make_worker, references, tries),
            batch_size=1,  # with GPUs Ray wants one
            batch_format="pyarrow",
            # All at once: pending actors are what an autoscaler sees, and a pool that may grow asks for none of them.
            compute=ray.data.ActorPoolStrategy(size=size),
            num_cpus=1,
            num_gpus=int(actors.on_gpu),
        )
        for row in results.iter_rows():
            if row["refused"] is not None:
                raise InputError(row["refused"])
            yield row


class _Tries:
    """Counts how often each macro-batch was begun: Ray Data begins one that ends its process again and again."""

    def __init__(self) -> None:
        self.count: Counter[int] = Counter()

    def begin(self, number: int) -> int:
        self.count[number] += 1
        return self.count[number]


class _Actor:
    """Worker whose model loads with the first block, and whose InputError travels as a value.

    Raised in a constructor, Ray would report a dead actor; raised in a call, Ray Data keeps only the traceback's text.
    """

    def __init__(self, make_worker: Callable[[], Worker], blocks: Sequence[Any], tries: Any) -> None:
        self.make_worker, self.blocks, self.tries = make_worker, blocks, tries
        self.worker: Worker | None = None

    def __call__(self, numbers: pa.Table) -> pa.Table:
        import ray

        (number,) = numbers["item"].to_pylist()
        if ray.get(self.tries.begin.remote(number)) > _TRIES:
            return block_result(
                refused=f"{_TRIES} workers died at the same macro-batch, the last on {socket.gethostname()}; the logs "
                "there say why (/tmp/ray/session_latest/logs); mend it and run it again, finished macro-batches are kept"
            )
        try:
            self.worker = self.worker or self.make_worker()
            return self.worker(ray.get(self.blocks[number]))
        except InputError as error:
            return block_result(refused=str(error))
        except torch.AcceleratorError:
            # This process has lost its device, and would take block after block and fail; Ray starts another.
            traceback.print_exc()
            os._exit(1)


@contextmanager
def _ray_session() -> Iterator[None]:
    """Use the running Ray, or start one for the block; Ray Data's bars and log lines are off in it."""
    import ray
    from ray.data import DataContext

    start = not ray.is_initialized()
    logger = logging.getLogger("ray.data")
    level = logger.level
    try:
        if start:
            start_ray(logging_level=logging.ERROR)
        logger.setLevel(logging.ERROR)
        context = DataContext.get_current()
        bars, context.enable_progress_bars = context.enable_progress_bars, False
        try:
            yield
        finally:
            context.enable_progress_bars = bars
    finally:
        logger.setLevel(level)
        if start:
            ray.shutdown()
