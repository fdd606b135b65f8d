"""Blocks of work handed to workers: threads of this process, or actors of Ray Data.

A worker takes one block (an Arrow table), writes what it made to the store itself, and answers with one line.
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

from features.errors import InputError
from features.store.tables import KEY_TYPE

# texts done, texts to do in this call, tokens read or written so far, seconds since the first worker began
Progress = Callable[[int, int, int, float], None]
Worker = Callable[[pa.Table], pa.Table]  # a block -> its `result`

RAY_TEXTS = 100_000  # fewer texts than this are done before Ray's 5 to 7 s of start-up have paid off
_TRIES = 4  # of a macro-batch whose worker or node dies
_THREADS = 8  # Python threads that still scale: beyond, they wait for the interpreter lock between operators


@dataclass(frozen=True)
class Actors:
    """Workers that a cluster holds, each on a node of its own choice."""

    count: int
    on_gpu: bool  # a GPU each; else a core


@dataclass(kw_only=True)
class Done:
    """What workers have done so far."""

    texts: int = 0
    tokens: int = 0  # real ones, padding not counted
    seconds: float = 0.0  # that workers were busy, summed over them
    began: float = math.inf  # `time.monotonic` of the first worker's begin, as its answer tells: start-up is not work
    elapsed: float = 0.0  # seconds from there to the last answer
    operations: float = 0.0  # floating-point operations of the model's matrices, on padding too, once for a shared text
    peak: float = 0.0  # operations that the devices' measured matrix peaks would have done meanwhile
    failed: dict[bytes, str] = field(default_factory=dict)  # row key -> reason

    def add(self, answer: Mapping[str, Any]) -> None:
        """One worker's `result`."""
        self.failed |= zip(answer["failed"], answer["reasons"], strict=True)
        for name in ("texts", "tokens", "seconds", "operations", "peak"):
            setattr(self, name, getattr(self, name) + answer[name])
        now = time.monotonic()
        self.began = min(self.began, now - answer["seconds"])
        self.elapsed = now - self.began

    @property
    def share_of_peak(self) -> float | None:
        """Of the measured matrix peak; None where nothing was measured."""
        return self.operations / self.peak if self.peak else None


def result(
    failed: Mapping[bytes, str] | None = None, refused: str | None = None, *, figures: Mapping[str, float] | None = None
) -> pa.Table:
    """One row: failed row keys with their reasons, why the worker could not go on at all, and the figures of `Done`."""
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
) -> Done:
    """All blocks done by workers, or as many as it takes until more than `most_failed` rows have failed.

    blocks: the list is emptied, so that each is in memory once and until it is done.
    texts: what is to do in all. name: of the work, as Ray's dashboard shows it. workers: threads, or Ray actors (None:
    one per GPU if there are any, else one per core); `Actors` may be more than the cluster holds now, and then asks its
    autoscaler for them all. use_ray: None lets the number of texts decide. progress: called with (texts done, texts,
    tokens, seconds of work), first with zeros while the workers start.
    Raises InputError: what a worker raised, or one that died again and again.
    """
    by_ray = texts >= RAY_TEXTS if use_ray is None else use_ray
    done = Done()
    if not blocks:
        return done
    if progress is not None:
        progress(0, texts, 0, 0.0)
    if by_ray:
        answers = _run_ray(blocks, make_worker, workers, name)
    else:
        answers = _run_threads(blocks, make_worker, workers if isinstance(workers, int) else None)
    with closing(answers):
        for answer in answers:
            done.add(answer)
            if progress is not None:
                progress(done.texts, texts, done.tokens, done.elapsed)
            if len(done.failed) > most_failed:
                break
    return done


def count_threads() -> int:
    """Workers of this process, where nobody says how many."""
    return 1 if torch.cuda.is_available() else min(len(os.sched_getaffinity(0)), _THREADS)


def count_actors() -> Actors:
    """Workers of the running Ray as it is now, where nobody says how many."""
    import ray

    cluster: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    gpus = int(cluster.get("GPU", 0))
    return Actors(gpus or int(cluster.get("CPU", 0)) or 1, gpus > 0)


def _run_threads(
    blocks: list[pa.Table], make_worker: Callable[[], Worker], workers: int | None
) -> Generator[dict[str, Any]]:
    """One model shared by several threads of one torch thread each; results as they come."""
    before = torch.get_num_threads()
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
        torch.set_num_threads(before)


def _run_ray(
    blocks: list[pa.Table], make_worker: Callable[[], Worker], workers: int | Actors | None, name: str
) -> Generator[dict[str, Any]]:
    """One actor per GPU (or core), each with its own model; one row of Ray Data's per macro-batch."""
    import ray

    with _ray_session():
        actors = workers if isinstance(workers, Actors) else count_actors()
        count = workers if isinstance(workers, int) else actors.count
        size = min(count, len(blocks))
        # Ray Data gets their numbers only. Of a table it asks for the size by a task on a core, which a cluster that
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
    """How often each macro-batch was begun: one that ends its process is begun by Ray Data again and again."""

    def __init__(self) -> None:
        self.of: Counter[int] = Counter()

    def begin(self, number: int) -> int:
        self.of[number] += 1
        return self.of[number]


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
            return result(
                refused=f"{_TRIES} workers died at the same macro-batch, the last on {socket.gethostname()}; the logs "
                "there say why (/tmp/ray/session_latest/logs); mend it and run it again, finished macro-batches are kept"
            )
        try:
            self.worker = self.worker or self.make_worker()
            return self.worker(ray.get(self.blocks[number]))
        except InputError as error:
            return result(refused=str(error))
        except torch.AcceleratorError:
            # This process has no device any more, and would be the fastest of all to fail; Ray starts another.
            traceback.print_exc()
            os._exit(1)


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
            ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
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
