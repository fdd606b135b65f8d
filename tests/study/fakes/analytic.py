"""An objective with a known optimum and conditional parameters, with the signature of `trainables.trial.run`."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fake_trial import Report

EPOCHS = 9
FIELDS = ("method", "lr", "depth", "decay", "cut", "epochs")
SPACE = """
v:
  method: {CategoricalDistribution: {choices: [plain, decayed, cut]}}
  lr: {FloatDistribution: {low: 1.0e-5, high: 1.0, log: true}}
  depth: {IntDistribution: {low: 1, high: 8}}
  decay: {when: {method: decayed}, FloatDistribution: {low: 0.0, high: 1.0}}
  cut: {when: {method: cut}, FloatDistribution: {low: -5.0, high: 5.0}}
"""
OPTIMUM = 0.0  # at method decayed, lr 0.01, depth 5, decay 0.7


def value(config: Mapping[str, Any]) -> float:
    """What the training converges to; 0 at the optimum, above it everywhere else."""
    lr = (math.log10(config["lr"]) + 2) / 2.5
    found = lr**2 + 0.05 * (config["depth"] - 5) ** 2
    if config["method"] == "decayed":
        return found + 4 * (config["decay"] - 0.7) ** 2
    if config["method"] == "cut":
        return found + 0.5 + 0.1 * (config["cut"] - 1) ** 2
    return found + 0.3


def run(model: str, config: Mapping[str, Any], task_dir: str, seeds: Sequence[int], **options: Any) -> Iterator[Report]:
    """Curves that fall to `value`, slowly where the rate is small; the seeds lie evenly around it.

    With `seconds` (of an epoch) in the config it takes its time, and a training that is not stopped leaves its mark; one
    that is takes `close` seconds to end.
    """
    final = value(config)
    slowness = 1 + max(0.0, -math.log10(config["lr"]) - 2)
    for epoch in range(1, config["epochs"] + 1):
        time.sleep(config.get("seconds", 0.0))
        try:
            yield Report(epoch=epoch, metrics={"val_rmse": final + 2 * math.exp(-epoch / slowness)})
        except GeneratorExit:
            time.sleep(config.get("close", 0.0))
            raise
    if config.get("seconds"):
        (Path(task_dir) / f"ended-{final:.6f}").touch()
    spread = {f"val_rmse/seed_{seed}": final + 0.01 * (seed - sum(seeds) / len(seeds)) for seed in seeds}
    metrics = {"val_rmse": final, "val_rmse_std": 0.01, "val_cost": config["depth"] / 8, **spread}
    yield Report(epoch=config["epochs"], metrics=metrics, final=True)
