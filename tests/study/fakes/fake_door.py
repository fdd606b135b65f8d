"""A trainable without a model, with the signature and the reports of `trainables.door.run`."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Report:
    epoch: int
    metrics: Mapping[str, float]
    final: bool = False
    artifacts: Mapping[str, str | bytes] = field(default_factory=dict)


def loss(x: float, epoch: int = 0) -> float:
    return (x - 0.3) ** 2 + 1.0 / (1 + epoch)


def run(
    model: str,
    config: Mapping[str, Any],
    task_dir: str,
    seeds: Sequence[int],
    test_dir: str | None = None,
    rows: bool = False,
) -> Iterator[Report]:
    """`config`: x, epochs, seconds (of the whole trial), fail ("", "raise", "nan", "die", "unfinished")."""
    marks = Path(task_dir) / "attempts.txt"
    with marks.open("a") as file:
        file.write(f"{config['x']!r}\n")
    for epoch in range(1, config["epochs"] + 1):
        time.sleep(config["seconds"] / config["epochs"])
        if config["fail"] == "raise":
            raise ValueError("the data set\nis empty")
        if config["fail"] == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        yield Report(epoch=epoch, metrics={"val_rmse": loss(config["x"], epoch), "train_loss": 1.0 / epoch})
    if config["fail"] == "unfinished":
        return
    import torch

    value = float("nan") if config["fail"] == "nan" else loss(config["x"], config["epochs"])
    metrics = {"val_rmse": value, "val_rmse_std": 0.0, "seconds": config["seconds"], "threads": torch.get_num_threads()}
    metrics |= {f"val_rmse/seed_{seed}": value for seed in seeds}
    yield Report(
        epoch=config["epochs"],
        metrics=metrics,
        final=True,
        artifacts={"per_user.csv": "seed,user\n0,a\n", "raw.bin": b"\x00\x01"},
    )
