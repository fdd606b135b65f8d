"""Ray: one Tuner for all jobs of a part, quiet, stoppable, and on whatever cluster there is."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from features.errors import InputError
from features.extraction.workers import Actors
from features.local_ray import ROOT, start_ray
from study.engine.cluster import NodeType, at_most, autoscaled, fits, wanted_by
from study.engine.head import watch_head
from study.engine.node_cache import task_server
from study.engine.ray_tune import JobCallback, JobScheduler, JobSearcher, Ledger, SilentCallback
from study.engine.worker import train
from study.home import Home
from study.specs import Cluster, Job, Recipe, Resources

if TYPE_CHECKING:
    from ray.runtime_context import RuntimeContext


def launch(recipe: Recipe, jobs: Sequence[Job], ledger: Ledger, *, name: str) -> None:
    """Train `jobs`; returns when all have ended or the first SIGINT or SIGTERM has stopped the Tuner in good order.

    `name`: of the Tuner. Raises InputError when the machine can never hold one trial, and whatever a store raised in the
    driver.
    """
    from ray import tune

    home, resources = Home(recipe.home), recipe.resources
    with _quiet(home.ray_log(recipe.experiment)):
        connect(recipe.cluster)
        limit = _concurrency(recipe.cluster, resources)
        searcher = JobSearcher(jobs, ledger)
        # Only the stores are durable: what a former Tuner left under this name is of no use to anyone.
        shutil.rmtree(home.ray / name, ignore_errors=True)
        # On a cluster there may be nodes that do not see the home folder.
        server = task_server() if recipe.cluster.address is not None else None
        trainable = train if server is None else tune.with_parameters(train, server=server)
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
                storage_path=str(home.ray),
                callbacks=[JobCallback(searcher, ledger), SilentCallback()],
                verbose=0,
            ),
        )
        with _sigterm_like_sigint(), _tune_switches():
            try:
                tuner.fit()
            except tune.TuneError as error:  # it has the error of its scheduler as a text
                if searcher.broken is None:
                    raise
                raise searcher.broken from error
    if searcher.broken is not None:
        raise searcher.broken


def _trial_name(trial: Any) -> str:
    return str(trial.trial_id)


def connect(cluster: Cluster) -> None:
    """Join the cluster, or start Ray here; one that this process already has is used as it is.

    Raises InputError where no cluster answers, or Ray does not start.
    """
    import ray

    if ray.is_initialized():
        return
    with _quiet(cluster.log):
        if cluster.address is None:
            start_ray()
        else:
            try:
                with contextlib.chdir(ROOT):  # as `start_ray` does
                    ray.init(address=cluster.address, log_to_driver=False)
            except ConnectionError as error:
                raise InputError(f"--address {cluster.address}: {_refusal(error)}") from error
    if cluster.resume is not None:
        here = ray.get_runtime_context()
        address = here.gcs_address
        watch_head(address, cluster.resume, going=lambda: _joined(here, address))


def _joined(here: RuntimeContext, address: str) -> bool:
    """Whether this process is in the cluster of that head; it may have left it, and be in another one since."""
    try:
        return bool(here.gcs_address == address)
    except Exception:  # of whatever kind while it leaves: Ray takes its state apart attribute by attribute
        return False


def _refusal(error: ConnectionError) -> str:
    if "AuthenticationError" in str(error.__cause__):
        return (
            "the cluster asks for a token; set RAY_AUTH_MODE=token, with the head's `ray get-auth-token` in "
            "~/.ray/auth_token (`auto` on the head needs neither)"
        )
    return f"no Ray cluster answers ({' '.join(str(error).split())[:200]}); start one, or leave it out"


def _concurrency(cluster: Cluster, resources: Resources) -> int | None:
    """Return how many trials to run side by side; None leaves it to Tune, on a cluster that grows in unknown ways.

    Without a limit Tune draws one trial ahead; where the limit is known, nothing is drawn before it can start, and an
    autoscaler is asked for all the nodes that are of use at once.
    """
    import ray

    if cluster.address is None:
        total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        held = fits(total, resources)
        if not held:
            kind, wanted = next(
                (kind, wanted) for kind, wanted in wanted_by(resources).items() if wanted > total.get(kind, 0.0)
            )
            raise InputError(
                f"resources: a trial asks for {wanted:g} {kind}, this machine has {total.get(kind, 0.0):g}; ask for less"
            )
        return held if cluster.max_concurrent is None else min(held, cluster.max_concurrent)
    alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    heads = [node for node in alive if "node:__internal_head__" in node["Resources"]]
    # The file here may be of another cluster than the one that was joined.
    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    on_head = any(node["NodeManagerAddress"] == address for node in heads)
    growing, workers = autoscaled() if on_head else ([], 0)
    if all(node.resources for node in growing):  # what a file leaves out, Ray finds out on the machine
        _refuse_impossible(resources, [node["Resources"] for node in alive], growing)
        if cluster.max_concurrent is None and growing:
            held, at_head = (sum(fits(node["Resources"], resources) for node in nodes) for nodes in (alive, heads))
            return max(held, at_head + at_most(growing, workers, resources))
    return cluster.max_concurrent


def most_actors(cluster: Cluster) -> Actors | None:
    """Return the workers of an extraction on the joined cluster when it has grown; None where it does not, or unknown."""
    for gpus in (1, 0):
        with contextlib.suppress(InputError):  # no node will have a GPU, or none a core
            count = _concurrency(replace(cluster, max_concurrent=None), Resources(cpus=1, gpus=gpus))
            return None if count is None else Actors(count, gpus > 0)
    return None


def _refuse_impossible(resources: Resources, there: Sequence[Mapping[str, float]], growing: Sequence[NodeType]) -> None:
    """Raise InputError when no node that is there, or that the autoscaler may start, can ever hold one trial."""
    nodes = [*there, *(node.resources for node in growing)]
    if not any(fits(node, resources) for node in nodes):
        has = sorted({f"{node.get('CPU', 0.0):g} CPU and {node.get('GPU', 0.0):g} GPU" for node in nodes})
        raise InputError(
            f"resources: a trial asks for {resources.cpus:g} CPU and {resources.gpus:g} GPU, and no node of the cluster "
            f"has them; it has nodes of {'; '.join(has)}; ask for less"
        )


@contextlib.contextmanager
def _quiet(log: Path | None) -> Iterator[None]:
    """Send the messages of Ray and Tune to a file for the time of the block, where one is named."""
    if log is None:
        yield
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    logger = logging.getLogger("ray")
    handlers, propagate = logger.handlers, logger.propagate
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
        logger.handlers, logger.propagate = handlers, propagate
        handler.close()


@contextlib.contextmanager
def _tune_switches() -> Iterator[None]:
    """Set Ray's documented switches that exist as environment variables only, for the time of the block.

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
    """Let SIGTERM stop the Tuner as Ctrl-C does; Ray's own handler exits in the middle of the work."""
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
