"""Training that trials share: done once per task, specification and seed, and kept beside the tasks.

A stage that no searched field changes is made by `prepare` of a model, or by the first trial that asks, and read by all
others, on every node. Both directions of a pair of domains find what depends on the training users alone.
"""

from __future__ import annotations

import copy
import pickle
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from features.store.folders import FULL, atomic_file, locked, save_torch, whole_folder, write_json
from features.store.tables import digest
from trainables.devices import on_cpu, on_device, random_states, seeded, set_random_states
from trainables.tasks.sequential import SequenceTask

State = dict[str, Any]
"""Tensors and plain values under text keys."""
_UNREADABLE = (  # what half a file raises, or one of another format
    *(OSError, RuntimeError, EOFError, pickle.UnpicklingError, zlib.error),
    *(ValueError, TypeError, KeyError, AttributeError),
)


class Stateful(Protocol):
    """A network, an optimiser or a schedule."""

    def state_dict(self) -> dict[str, Any]:
        """Return its state."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Take a state over."""


def folder_of(kind: str, document: Mapping[str, Any]) -> Path:
    """Return where `kept_once` keeps what the document describes, relative to the folder of all tasks."""
    return Path(kind) / digest(dict(document))[:16]


def kept_once(task: SequenceTask, kind: str, document: Mapping[str, Any], make: Callable[[Path], State]) -> State:
    """Return what `make` makes, loaded where it is there, else made and kept; on the device of the task.

    `document` names all that it depends on, the task's `train_key` and the seed among them; `make` is given a file that
    the epochs under way may be kept in, see `pretrain`. Of several processes that ask at once, one makes it.
    """
    folder = task.folder.parent.parent / folder_of(kind, document)
    if not (folder / "manifest.json").is_file():
        lock = folder.with_suffix(".lock")
        with locked(lock):
            if not (folder / "manifest.json").is_file():  # else another process has made it meanwhile
                kept = folder.with_suffix(".pt")
                with whole_folder(folder) as work:
                    save_torch(on_cpu(make(kept)), work / "state.pt")
                    write_json(work / "manifest.json", document)
                kept.unlink(missing_ok=True)
            lock.unlink(missing_ok=True)  # who locks another file after this one finds the folder
    state: State = on_device(torch.load(folder / "state.pt", weights_only=True), task.device)
    return state


def pretrain(
    build: Callable[[], nn.Module],
    epoch: Callable[[nn.Module, Optimizer, np.random.Generator], None],
    *,
    epochs: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    seed: int,
    task: SequenceTask,
    kept: Path,
) -> State:
    """Train a network by Adam for a fixed number of epochs, and return its state.

    `kept`: file of the state after the last epoch, which training goes on from where one that was stopped has left it;
    a disk without room for it costs the file, not the training.
    """
    with seeded(seed, task.device):
        network, rng = build().to(task.device), np.random.default_rng(seed)
        optimiser = torch.optim.Adam(network.parameters(), lr=lr, betas=betas, fused=True)
        network.train()
        parts: dict[str, Stateful] = {"network": network, "optimiser": optimiser}
        for number in range(restored(kept, parts, rng, task.device) + 1, epochs + 1):
            epoch(network, optimiser, rng)
            keep(kept, number, parts, rng, task.device)
        return dict(network.state_dict())


def keep(
    path: Path, number: int, parts: Mapping[str, Stateful], rng: np.random.Generator, device: torch.device
) -> None:  # fmt: skip
    """Write all that the epochs after this one depend on; a disk without room for it costs the file, not the training."""
    state: State = {name: part.state_dict() for name, part in parts.items()}
    state |= {"number": number, "rng": rng.bit_generator.state, "torch": random_states(device)}
    try:
        with atomic_file(path) as beside:
            save_torch(on_cpu(state), beside)
    except OSError as error:
        if error.errno not in FULL:
            raise


def restored(path: Path, parts: Mapping[str, Stateful], rng: np.random.Generator, device: torch.device) -> int:
    """Read it back; return the number of finished epochs: 0 where there is no file, or none that can be read."""
    if not path.is_file():
        return 0
    before = copy.deepcopy({name: part.state_dict() for name, part in parts.items()})
    drawn = rng.bit_generator.state, random_states(device)
    try:
        state = torch.load(path, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        rng.bit_generator.state = state["rng"]
        set_random_states(state["torch"], device)
        return int(state["number"])
    except _UNREADABLE:
        for name, part in parts.items():
            part.load_state_dict(before[name])
        rng.bit_generator.state = drawn[0]
        set_random_states(drawn[1], device)
        return 0
