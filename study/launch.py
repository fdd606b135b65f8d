"""Ray: one Tuner for all jobs of a part, quiet, stoppable, and on whatever cluster there is."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from features.errors import InputError
from study.jobs import Cluster, Job, Resources
from study.searcher import JobCallback, JobScheduler, JobSearcher, Ledger, SilentCallback
from study.shipping import task_server
from study.worker import train


def launch(
    todo: Sequence[Job], ledger: Ledger, *, name: str, home: Path, log: Path, cluster: Cluster, resources: Resources
) -> None:
    """Train `todo`; returns when all have ended or the first SIGINT or SIGTERM has stopped the Tuner in good order.

    Raises InputError when the machine can never hold one trial, and whatever a store raised in the driver.
    """
    from ray import tune

    with _quiet(log):
        connect(cluster)
        limit = _concurrency(cluster, resources)
        searcher = JobSearcher(todo, ledger)
        storage = home.absolute() / "ray"
        # Only the stores are durable: what a former Tuner left under this name is of no use to anyone.
        shutil.rmtree(storage / name, ignore_errors=True)
        # On a cluster there may be nodes that do not see the home folder.
        trainable = tune.with_parameters(train, server=task_server()) if cluster.address is not None else train
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"cpu": resources.cpus, "gpu": resources.gpus}),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=JobScheduler(searcher, ledger),
                num_samples=-1,  # the searcher says when it is done: a trial whose process went is handed out again
                max_concurrent_trials=limit,
                reuse_actors=True,
                trial_name_creator=_trial_name,
                trial_dirname_creator=_trial_name,
            ),
            run_config=tune.RunConfig(
                name=name,
                storage_path=str(storage),
                callbacks=[JobCallback(searcher, ledger), SilentCallback()],
                verbose=0,
            ),
        )
        with _sigterm_like_sigint(), _tune_switches():
            tuner.fit()
    if searcher.broken is not None:
        raise searcher.broken


def _trial_name(trial: Any) -> str:
    return str(trial.trial_id)


def connect(cluster: Cluster) -> None:
    """Join the cluster, or start Ray here; one that this process already has is used as it is."""
    import ray

    if ray.is_initialized():
        return
    if cluster.address is not None:
        ray.init(address=cluster.address, log_to_driver=False)
    else:
        ray.init(
            address="local",  # else Ray joins whatever cluster another user of this machine has started
            num_cpus=os.cpu_count(), include_dashboard=cluster.dashboard, log_to_driver=False,
        )  # fmt: skip


def _concurrency(cluster: Cluster, resources: Resources) -> int | None:
    """How many trials to run side by side; None leaves it to Tune, on a cluster that may grow.

    Without a limit Tune draws one trial ahead; here the limit is known, so nothing is drawn before it can start.
    """
    import ray

    if cluster.address is not None:
        _refuse_impossible(resources)
        return cluster.max_concurrent
    total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    room = []
    for kind, wanted in (("CPU", resources.cpus), ("GPU", resources.gpus)):
        if wanted > total.get(kind, 0.0):
            raise InputError(
                f"resources: a trial asks for {wanted:g} {kind}, this machine has {total.get(kind, 0.0):g}"
            )
        if wanted:
            room.append(int(total[kind] / wanted))
    fits = min(room, default=1)
    return fits if cluster.max_concurrent is None else min(fits, cluster.max_concurrent)


def _refuse_impossible(resources: Resources) -> None:
    """Raise InputError when no node that is there, or that the autoscaler may start, can ever hold one trial."""
    import ray
    from ray._private.state import state  # where Ray Data too reads what an autoscaler may start

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    config = state.get_cluster_config()
    nodes += [dict(group.resources) for group in config.node_group_configs] if config else []
    wanted = {"CPU": resources.cpus, "GPU": resources.gpus}
    if not any(all(node.get(kind, 0.0) >= number for kind, number in wanted.items()) for node in nodes):
        has = sorted({f"{node.get('CPU', 0.0):g} CPU and {node.get('GPU', 0.0):g} GPU" for node in nodes})
        raise InputError(
            f"resources: a trial asks for {resources.cpus:g} CPU and {resources.gpus:g} GPU, and no node of the cluster "
            f"has them; it has nodes of {'; '.join(has)}"
        )


@contextlib.contextmanager
def _quiet(log: Path) -> Iterator[None]:
    """Send the messages of Ray and Tune to a file for the time of the block."""
    log.parent.mkdir(parents=True, exist_ok=True)
    logger = logging.getLogger("ray")
    kept, propagate = logger.handlers, logger.propagate
    handler = logging.FileHandler(log, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger.handlers, logger.propagate = [handler], False
    try:
        with warnings.catch_warnings():
            # Announcements of Ray's next versions, raised from inside Ray.
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            yield
    finally:
        logger.handlers, logger.propagate = kept, propagate
        handler.close()


@contextlib.contextmanager
def _tune_switches() -> Iterator[None]:
    """Ray's documented switches that exist as environment variables only, set for the time of the block.

    Without the first, Tune prints a table and a TensorBoard command whatever `verbose` says; without the second, it
    writes every report to CSV, JSON and TensorBoard files beside MLflow.
    """
    switches = {"RAY_AIR_NEW_OUTPUT": "0", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1"}
    before = {name: os.environ.get(name) for name in switches}
    os.environ.update(switches)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _sigterm_like_sigint() -> Iterator[None]:
    """SIGTERM stops the Tuner as Ctrl-C does; Ray's own handler exits in the middle of whatever runs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        signal.raise_signal(signal.SIGINT)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
