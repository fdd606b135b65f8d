"""One trial inside a Ray worker: runs the model's door and reports its epochs in batches.

An exception of the training is a result (Optuna FAIL, MLflow FAILED), not a crash: it travels to the driver as data,
and the worker process is reused. Only a lost process, or a node that cannot fetch or return what the trial needs, reaches
Ray Tune as an error.
"""

from __future__ import annotations

import importlib
import math
import random
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from features.store.folders import FULL
from study.engine.checkpoints import Keeper, Message, read_checkpoint
from study.engine.node_cache import bring_home, cached, locate
from study.provenance import device, versions
from trainables import interface, trial

_MIN_INTERVAL_S, _MAX_INTERVAL_S, _INTERVAL_SHARE, _WAITS = 0.5, 10.0, 0.05, 10.0


class NodeError(Exception):
    """The node cannot fetch, keep or return what a trial needs, which says nothing about the trial."""


@contextmanager
def _node_errors() -> Iterator[None]:
    """Tells what fails in the block, of Ray or of the disk, from what the training raises."""
    try:
        yield
    except Exception as error:
        from ray.exceptions import RayError

        if isinstance(error, (OSError, RayError)):
            raise NodeError(f"{socket.gethostname()}: {error}") from error
        raise


def full_disk(error: BaseException | None) -> str:
    """Host, path and message of the full disk that an error comes from, on this node or beside the driver; else empty."""
    while error is not None:
        # What a Ray actor raised arrives as an error of its class, without its number.
        remote = getattr(error, "cause", None)
        found = remote or error
        if isinstance(found, OSError) and found.errno in FULL:
            return f"{'the node of the driver' if remote else socket.gethostname()}: {found}"
        error = error.__cause__
    return ""


def resolve(path: str) -> Callable[..., Iterator[Any]]:
    """The function that `module:function` names; raises ImportError or AttributeError."""
    module, _, name = path.partition(":")
    return cast(Callable[..., Iterator[Any]], getattr(importlib.import_module(module), name))


def train(config: dict[str, Any], server: Any = None) -> None:
    """The Ray Tune trainable; `config["payload"]` is what `PartLedger.start` returned.

    server: of `study.engine.node_cache`, for nodes that do not see the home folder. Raises NodeError.
    """
    from ray import tune

    outbox = Outbox(lambda message: tune.report(message))
    try:
        run_trial(config["payload"], outbox, server)
    except Exception as error:
        if isinstance(error, NodeError) and not full_disk(error):
            raise
        outbox.fail(error)
    outbox.send()


def run_trial(payload: dict[str, Any], outbox: Outbox, server: Any = None) -> None:
    """Train and put every epoch into the outbox.

    `payload`: trainable, model, config, task_dir, seeds, test_dir, rows, metrics (that are optimised), threads (of
    torch), checkpoint (path, identity, seconds). Where that file is, training goes on from it, and its epochs are sent
    again.

    Raises what the training raises, FloatingPointError when a metric that is optimised is not a number, RuntimeError when
    the training ends without its final report, and NodeError.
    """
    reset(payload["threads"])
    place = Place(payload, server)
    try:
        _train(payload, outbox, place)
    finally:
        place.leave()


def _train(payload: dict[str, Any], outbox: Outbox, place: Place) -> None:
    door = resolve(payload["trainable"])
    path, identity = place.checkpoint, payload["checkpoint"]["identity"]
    keeper = Keeper(path, identity, payload["checkpoint"]["seconds"])
    found = read_checkpoint(path, identity)
    epochs = list(found.epochs) if found else []
    for epoch in epochs:
        outbox.add(epoch)
    final = False
    for report in door(
        payload["model"], payload["config"], place.task_dir, payload["seeds"],
        test_dir=place.test_dir, rows=payload["rows"], **({"state": found.state} if found else {}),
    ):  # fmt: skip
        metrics = {key: float(value) for key, value in report.metrics.items()}
        final = report.final
        for name in payload["metrics"] if final else ():
            if not math.isfinite(metrics[name]):
                raise FloatingPointError(f"{name} is {metrics[name]} at epoch {report.epoch}")
        if final:
            place.finish()
        if metrics:
            epochs.append((report.epoch, metrics, report.final, dict(report.artifacts), int(time.time() * 1000)))
            outbox.add(epochs[-1])
        if report.state is not None:
            with _node_errors():
                keeper.offer(report.state, epochs)
    if not final:
        raise RuntimeError(f"{payload['trainable']} ended without a final report")


class Place:
    """Where a trial reads and writes: at home, or in this node's cache where the node does not see the home folder."""

    def __init__(self, payload: dict[str, Any], server: Any) -> None:
        home, test = Path(payload["task_dir"]), payload["test_dir"]
        with _node_errors():
            task = locate(home, server)
            self.test_dir = None if test is None else str(locate(Path(test), server))
        self._server, self._sent, self._kept = server, task != home, None
        self.task_dir = str(task)
        checkpoint = Path(payload["checkpoint"]["path"])
        self.checkpoint = cached(checkpoint) if self._sent else checkpoint
        if self._sent and payload["model"] in interface.model_names():
            model, config, seeds = payload["model"], payload["config"], payload["seeds"]
            with _node_errors():
                for folder in trial.shared(model, config, self.task_dir, seeds):
                    locate(home.parent.parent / folder, server)
            self._kept = trial.kept_at(model, config, payload["task_dir"], seeds)

    def finish(self) -> None:
        """Before the result counts, bring home what scoring has kept."""
        if self._kept is not None:
            with _node_errors():
                bring_home(self._kept, self._server)

    def leave(self) -> None:
        """However the training ended: of what only this node sees, nothing is of use to anyone."""
        if self._sent:
            self.checkpoint.unlink(missing_ok=True)
        if self._kept is not None:
            cached(self._kept).unlink(missing_ok=True)


def reset(threads: int) -> None:
    """Bring a reused process to the state of a new one, so that nothing of a trial reaches the next.

    Trials draw from generators of their own; whoever draws from the global ones finds them the same in every trial.
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
    np.seterr(divide="warn", over="warn", under="ignore", invalid="warn")
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def pause(age: float, waited: float) -> float:
    """Seconds to the next message of a trial of that age, of whose last one the driver took `waited` seconds.

    The first come fast enough to watch, later ones grow rarer; and a driver with hundreds of trials is not drowned by
    them, for they wait longer the longer it takes to answer.
    """
    return max(_MIN_INTERVAL_S, min(_MAX_INTERVAL_S, _INTERVAL_SHARE * age), _WAITS * waited)


class Outbox:
    """Collects epochs and sends them together."""

    def __init__(self, send: Callable[[dict[str, Any]], None]) -> None:
        self._send = send
        self._epochs: list[Message] = []
        self._failure: dict[str, str] | None = None
        self._began = self._sent = time.monotonic()
        self._waited = 0.0

    def add(self, epoch: Message) -> None:
        """Keep an epoch, and send all when the last sending is long enough ago; a final one waits for `send`."""
        self._epochs.append(epoch)
        now = time.monotonic()
        if now - self._sent >= pause(now - self._began, self._waited) and not epoch[2]:
            self.send()

    def fail(self, error: Exception) -> None:
        """Note the exception that ended the training; `full`: a full disk did, which says nothing about the trial."""
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        detail = "".join(traceback.format_exception(error))
        self._failure = {"reason": reason, "detail": detail, "full": full_disk(error)}

    def send(self) -> None:
        """Hand over everything kept so far."""
        began = time.monotonic()
        epochs, self._epochs = self._epochs, []
        tags = {"study.device": device(), "study.versions": versions()} if any(epoch[2] for epoch in epochs) else {}
        self._send({"epochs": epochs, "failure": self._failure, "tags": tags})
        self._sent = time.monotonic()
        self._waited = self._sent - began
