"""One trial inside a Ray worker: runs the trainable and reports its epochs in batches.

An exception of the training is a result (Optuna FAIL, MLflow FAILED), not a crash: it travels to the driver as data,
and the worker process is reused. Only a lost process, or a node that cannot fetch or return what the trial needs, reaches
Ray Tune as an error.
"""

from __future__ import annotations

import importlib
import math
import os
import random
import socket
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, cast

from features.errors import named_line
from features.store.folders import FULL
from study.engine.checkpoints import CheckpointWriter, Message, read_checkpoint
from study.engine.node_cache import bring_home, cached, locate
from study.home import Home
from study.provenance import device, versions
from study.tracking import tags
from trainables import interface, trial
from trainables.devices import share_gpu

CLOSE_S = 600
"""How long a trial that is stopped may take to close; with Ray's 2 s the one that is handed the process next is lost."""
_MIN_INTERVAL_S, _MAX_INTERVAL_S, _INTERVAL_SHARE, _WAITS = 0.5, 10.0, 0.05, 10.0


class NodeError(Exception):
    """The node cannot fetch, keep or return what a trial needs, which says nothing about the trial."""


@contextmanager
def _node_errors() -> Iterator[None]:
    """Tell errors of Ray or of the disk in the block from those that the training raises."""
    try:
        yield
    except Exception as error:
        from ray.exceptions import RayError

        if isinstance(error, (OSError, RayError)):
            raise NodeError(f"{socket.gethostname()}: {error}") from error
        raise


def full_disk(error: BaseException | None) -> str:
    """Return host, path and message of the full disk that an error comes from, here or beside the driver; else nothing."""
    while error is not None:
        # An error of a Ray actor arrives as one of its class, without its number.
        remote = getattr(error, "cause", None)
        origin = remote or error
        if isinstance(origin, OSError) and origin.errno in FULL:
            return f"{'the node of the driver' if remote else socket.gethostname()}: {origin}"
        error = error.__cause__
    return ""


def resolve(path: str) -> Callable[..., Generator[Any]]:
    """Import the function that `module:function` names; raises ImportError or AttributeError."""
    module, _, name = path.partition(":")
    return cast(Callable[..., Generator[Any]], getattr(importlib.import_module(module), name))


def train(config: dict[str, Any], server: Any = None) -> None:
    """Train as Ray Tune's trainable; `config["payload"]` is what `Ledger.start` returned.

    `server`: of `study.engine.node_cache`, for nodes that do not see the home folder. Raises NodeError.
    """
    from ray import tune

    os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", str(CLOSE_S))  # read in this process, by the next trial
    payload = config["payload"]
    outbox = Outbox(lambda message: tune.report(message), payload["device"])
    try:
        run_trial(payload, outbox, server)
    except Exception as error:
        if isinstance(error, NodeError) and not full_disk(error):
            raise
        outbox.fail(error)
    outbox.send()


def run_trial(payload: dict[str, Any], outbox: Outbox, server: Any = None) -> None:
    """Train and put every epoch into the outbox.

    `payload`: trainable, model, config, task_dir, seeds, test_dir, rows, metrics (that are optimised), threads (of
    torch), device (`cpu`, which never touches CUDA, or `cuda`), gpus (below 1: the share of one, and of its memory),
    checkpoint (path, identity, seconds). Where that file is, training goes on from it, and its epochs are sent again.

    Raises what the training raises, FloatingPointError when a metric that is optimised is not a number, RuntimeError when
    the training ends without its final report, and NodeError.
    """
    reset(payload["threads"])
    if payload["device"] == "cuda" and payload["gpus"] < 1:
        share_gpu(payload["gpus"])
    folders = TrialFolders(payload, server)
    try:
        _train(payload, outbox, folders)
    finally:
        folders.leave()


def _train(payload: dict[str, Any], outbox: Outbox, folders: TrialFolders) -> None:
    trainable = resolve(payload["trainable"])
    path, identity = folders.checkpoint, payload["checkpoint"]["identity"]
    writer = CheckpointWriter(path, identity, payload["checkpoint"]["seconds"])
    checkpoint = read_checkpoint(path, identity)
    epochs = list(checkpoint.epochs) if checkpoint else []
    for epoch in epochs:
        outbox.add(epoch)
    if epochs:
        outbox.send()  # the driver may stop the trial by them, before an epoch is trained in vain
    final = False
    reports = trainable(
        payload["model"], payload["config"], folders.task_dir, payload["seeds"], test_dir=folders.test_dir,
        rows=payload["rows"], device=payload["device"], **({"state": checkpoint.state} if checkpoint else {}),
    )  # fmt: skip
    with closing(reports):  # Ray ends a trial that it stops by SystemExit, out of the outbox
        for report in reports:
            metrics = {key: float(value) for key, value in report.metrics.items()}
            final = report.final
            for name in payload["metrics"] if final else ():
                if not math.isfinite(metrics[name]):
                    raise FloatingPointError(f"{name} is {metrics[name]} at epoch {report.epoch}")
            if final:
                folders.return_model()
            if metrics:
                epochs.append((report.epoch, metrics, report.final, dict(report.artifacts), int(time.time() * 1000)))
                outbox.add(epochs[-1])
            if report.caught_up:
                outbox.send()  # as above
            if report.state is not None:
                with _node_errors():
                    writer.offer(report.state, epochs)
    if not final:
        raise RuntimeError(f"{payload['trainable']} ended without a final report")


class TrialFolders:
    """The folders of a trial: at home, or in this node's cache where the node does not see the home folder."""

    def __init__(self, payload: dict[str, Any], server: Any) -> None:
        home, test = Path(payload["task_dir"]), payload["test_dir"]
        with _node_errors():
            task = locate(home, server)
            self.test_dir = None if test is None else str(locate(Path(test), server))
        self._server, self._cached, self._model = server, task != home, None
        self.task_dir = str(task)
        checkpoint = Path(payload["checkpoint"]["path"])
        self.checkpoint = cached(checkpoint) if self._cached else checkpoint
        if self._cached and payload["model"] in interface.model_names():
            model, config, seeds = payload["model"], payload["config"], payload["seeds"]
            with _node_errors():
                for folder in trial.shared(model, config, self.task_dir, seeds):
                    locate(Home.of_task(home).tasks / folder, server)
            self._model = trial.kept_at(model, config, payload["task_dir"], seeds)

    def return_model(self) -> None:
        """Send home the model that scoring has kept, before the result counts."""
        if self._model is not None:
            with _node_errors():
                bring_home(self._model, self._server)

    def leave(self) -> None:
        """Delete what only this node sees and nobody needs, however the training ended."""
        if self._cached:
            self.checkpoint.unlink(missing_ok=True)
        if self._model is not None:
            cached(self._model).unlink(missing_ok=True)


def reset(threads: int) -> None:
    """Bring a reused process to the state of a new one, so that nothing of a trial reaches the next.

    Trials draw from generators of their own; code that draws from the global ones finds them the same in every trial.
    Nothing here touches CUDA in a process that has not used it.
    """
    import numpy as np
    import torch

    # More threads than cores make small models ten times slower; a reused process keeps the last trial's setting.
    torch.set_num_threads(threads)
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.set_grad_enabled(True)
    torch.set_float32_matmul_precision("highest")
    torch.set_flush_denormal(False)
    torch.autograd.set_detect_anomaly(False)
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = False
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
    np.seterr(divide="warn", over="warn", under="ignore", invalid="warn")
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def pause(age: float, waited: float) -> float:
    """Return the seconds to a trial's next message, from its age and the seconds that the driver took for the last one.

    The first come fast enough to watch, later ones grow rarer; and a driver with hundreds of trials is not drowned by
    them, because they wait longer the longer it takes to answer.
    """
    return max(_MIN_INTERVAL_S, min(_MAX_INTERVAL_S, _INTERVAL_SHARE * age), _WAITS * waited)


class Outbox:
    """Collects epochs and sends them together."""

    def __init__(self, send: Callable[[dict[str, Any]], None], device: str = "cpu") -> None:
        """`device`: what trains, `cpu` or `cuda`."""
        self._send = send
        self._device = device
        self._epochs: list[Message] = []
        self._failure: dict[str, str] | None = None
        self._began = self._sent = time.monotonic()
        self._waited = 0.0

    def add(self, epoch: Message) -> None:
        """Take an epoch, and send all when the last sending is long enough ago; a final one waits for `send`."""
        self._epochs.append(epoch)
        now = time.monotonic()
        if now - self._sent >= pause(now - self._began, self._waited) and not epoch[2]:
            self.send()

    def fail(self, error: Exception) -> None:
        """Note the exception that ended the training; `full`: a full disk did, which says nothing about the trial."""
        reason = named_line(error)
        detail = "".join(traceback.format_exception(error))
        self._failure = {"reason": reason, "detail": detail, "full": full_disk(error)}

    def send(self) -> None:
        """Hand over everything that has not been sent."""
        began = time.monotonic()
        epochs, self._epochs = self._epochs, []
        run_tags = {}
        if any(epoch[2] for epoch in epochs):
            run_tags = {tags.DEVICE: device(self._device), tags.VERSIONS: versions()}
        self._send({"epochs": epochs, "failure": self._failure, "tags": run_tags})
        self._sent = time.monotonic()
        self._waited = self._sent - began
