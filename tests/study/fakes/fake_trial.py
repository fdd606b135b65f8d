"""A trainable without a model, with the signature and the reports of `trainables.trial.run`."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Report:
    epoch: int
    metrics: Mapping[str, float]
    final: bool = False
    artifacts: Mapping[str, str | bytes] = field(default_factory=dict)
    state: Callable[[], dict[str, Any]] | None = None
    caught_up: bool = False


def loss(x: float, epoch: int = 0) -> float:
    return (x - 0.3) ** 2 + 1.0 / (1 + epoch)


def note(folder: str, name: str, line: str) -> None:
    with (Path(folder) / name).open("a") as file:
        file.write(f"{line}\n")


def run(
    model: str,
    config: Mapping[str, Any],
    task_dir: str,
    seeds: Sequence[int],
    test_dir: str | None = None,
    rows: bool = False,
    device: str = "cpu",
    state: Mapping[str, Any] | None = None,
) -> Iterator[Report]:
    """`config`: x, epochs, seconds (of the whole trial), fail ("", "raise", "nan", "die", "die_once", "unfinished").

    Every start is a line of `attempts.txt` in the task's folder: x, first epoch, model. Every epoch is one of
    `epochs.txt`: x, epoch, process, model.
    """
    first = state["epoch"] + 1 if state else 1
    note(task_dir, "attempts.txt", f"{config['x']!r} {first} {model}")
    for epoch in range(first, config["epochs"] + 1):
        time.sleep(config["seconds"] / config["epochs"])
        if config["fail"] == "raise":
            raise ValueError("the data set\nis empty")
        if config["fail"] == "die" or (config["fail"] == "die_once" and epoch == 3 and first == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        note(task_dir, "epochs.txt", f"{config['x']!r} {epoch} {os.getpid()} {model}")
        metrics = {"val_rmse": loss(config["x"], epoch), "train_loss": 1.0 / epoch}
        yield Report(epoch=epoch, metrics=metrics, state=lambda epoch=epoch: {"epoch": epoch})
    if config["fail"] == "unfinished":
        return
    import torch

    value = float("nan") if config["fail"] == "nan" else loss(config["x"], config["epochs"])
    metrics = {"val_rmse": value, "val_rmse_std": 0.0, "seconds": config["seconds"], "threads": torch.get_num_threads()}
    metrics |= {f"val_rmse/seed_{seed}": value for seed in seeds} | {"cuda": float(device == "cuda")}
    yield Report(
        epoch=config["epochs"],
        metrics=metrics,
        final=True,
        artifacts={"per_user.csv": "seed,user\n0,a\n", "raw.bin": b"\x00\x01"},
    )


def baseline(
    model: str, config: Mapping[str, Any], task_dir: str, seeds: Sequence[int], **options: Any
) -> Iterator[Report]:
    """In the place of a simple baseline: `config` is {"baseline": name}; nothing is trained."""
    note(task_dir, "baselines.txt", config["baseline"])
    yield Report(epoch=0, metrics={"val_rmse": 2.0, "seconds": 0.0}, final=True)
