"""Models as files for tests: quick ones of each kind, dropped into the models package."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from trainables import models

CONSTANT = '''
"""Ratings: predicts a constant that its configuration holds."""
from dataclasses import dataclass
import torch
from trainables.interface import Epoch, Variant
from trainables.trial import validation_metrics

TASK_TYPE = "ratings"
SELECTION = ("val_mae", "minimize")
ABLATIONS = {"three": Variant(config={"value": 3.0})}
FIGURES = {}

@dataclass(frozen=True, kw_only=True)
class Config:
    value: float = 4.0
    epochs: int = 2

def train(config, task, seed):
    def predict(held_out, task, seed):
        vectors = torch.arange(2.0 * len(held_out.source)).reshape(-1, 2)
        return torch.full((len(held_out.ratings),), config.value + 0.5 * seed), vectors
    for number in range(1, config.epochs + seed + 1):
        last = number == config.epochs + seed
        metrics = {**validation_metrics(predict, task, seed), "train_loss": float(seed)}
        yield Epoch(number=number, metrics=metrics, predict=predict, last=last)
'''

POPULAR = '''
"""Sequences: counts the items of each group of training users, weighs overlapping users' by the configuration."""
from dataclasses import dataclass
from pathlib import Path
import torch
from trainables.interface import Epoch, Figure, Variant
from trainables.trial import validation_metrics
from trainables.tasks.sequential import OVERLAPPING

TASK_TYPE = "sequences"
SELECTION = ("val_ndcg10", "maximize")
ABLATIONS = {"wo_weight": Variant(config={"weight": 1.0})}
FIGURES = {"weight": Figure(name="figure_3_weight", title="Weight (a paper's Figure 3)", label="Weight of overlap")}

@dataclass(frozen=True, kw_only=True)
class Config:
    weight: float = 2.0
    guidance: str = "id"
    epochs: int = 2

def prepare(config, task, seeds):
    for seed in seeds:
        (Path(task.folder) / f"shared-{seed}.txt").write_text(str(config.weight))

def shared(config, task, seeds):
    return [Path("shared") / str(seed) for seed in seeds]

def train(config, task, seed):
    weight = torch.where(task.group == OVERLAPPING, config.weight, 1.0)[task.train.row]
    counts = torch.zeros(task.items).index_add_(0, task.train.item, weight)
    counts += 1e-3 * torch.rand(task.items, generator=torch.Generator().manual_seed(seed))
    def predict(held_out, task, seed, candidates):
        if candidates is None:
            return counts[task.target[0]:task.target[1]].expand(len(held_out), -1)
        return counts[candidates.long()]
    for number in range(1, config.epochs + 1):
        last = number == config.epochs
        metrics = {**validation_metrics(predict, task, seed, full=last), "train_loss": 1.0 / number}
        yield Epoch(number=number, metrics=metrics, predict=predict, last=last)
'''


def drop(name: str, text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make `name` a model of this text until the test ends."""
    (folder / f"{name}.py").write_text(text)
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(folder)])
    monkeypatch.delitem(sys.modules, f"{models.__name__}.{name}", raising=False)
    return name
