"""Checkpoints, from which a trial goes on after its process, its node or its driver is gone: a file in the home folder.

The file holds the state of the training after an epoch and all reports up to it, so that neither store misses an epoch
that the dead driver had not written yet. It is of use for the very same work alone (`identity`), and is deleted when the
trial's result stands in MLflow. Read without pickle: a home folder is a place that a plan's user names.
"""

from __future__ import annotations

import hashlib
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from features.store.folders import FULL, atomic_file, save_torch
from study.home import Home

Message = tuple[int, dict[str, float], bool, dict[str, str | bytes], int]
"""An epoch as it travels to the driver: number, metrics, final, artifacts, wall clock in milliseconds."""


def checkpoint_path(home: Path, experiment: str, trial: str) -> Path:
    """Return where a trial's checkpoint lies. The name is a hash: nothing that a plan says becomes a path."""
    return Home(home).checkpoints(experiment) / f"{hashlib.sha256(trial.encode()).hexdigest()[:32]}.pt"


@dataclass(frozen=True)
class Checkpoint:
    """A place that a training goes on from."""

    state: Mapping[str, Any]
    """State of the training, see `trainables.trial.Report.state`."""
    epochs: Sequence[Message]
    """All reports up to it."""


def read_checkpoint(path: Path, identity: str) -> Checkpoint | None:
    """Read the checkpoint; None where there is none, another work's, or half of one: then training starts anew."""
    import pickle

    import torch

    try:
        document = torch.load(path, map_location="cpu", weights_only=True)  # the trainable moves it to its device
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, zlib.error):
        return None
    if not isinstance(document, dict) or document.get("identity") != identity:
        return None
    return Checkpoint(document["state"], [tuple(epoch) for epoch in document["epochs"]])


class CheckpointWriter:
    """Writes a trial's checkpoint every so many seconds."""

    def __init__(self, path: Path, identity: str, seconds: float) -> None:
        self._path, self._identity, self._seconds = path, identity, seconds
        self._written = time.monotonic()

    def offer(self, state: Any, epochs: Sequence[Message]) -> None:
        """Write a checkpoint when the last one is old enough; a full disk costs the checkpoint, not the trial."""
        if time.monotonic() - self._written < self._seconds:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(self._path) as beside:
                save_torch({"identity": self._identity, "state": state(), "epochs": list(epochs)}, beside)
        except OSError as error:
            if error.errno not in FULL:
                raise
        self._written = time.monotonic()
