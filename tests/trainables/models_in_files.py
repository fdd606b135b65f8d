"""Models as files for tests: quick ones of each kind, dropped into the models package."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from trainables import models

CONSTANT = '''
"""Ratings: predicts a constant that its configuration holds; seed s ends by itself after `rounds` + s epochs."""
from dataclasses import dataclass
import torch
from trainables.interface import Epoch, Selection, Variant

NAME = "Constant"
TASK_TYPE = "ratings"
SELECTION = Selection("val_mae", "minimize")
ABLATIONS = {"three": Variant(config={"value": 3.0})}

@dataclass(frozen=True, kw_only=True)
class Config:
    value: float = 4.0
    rounds: int = 2

def train(config, task, seed):
    def predict(held_out, task, seed):
        return torch.full((len(held_out.ratings),), config.value + 0.5 * seed)
    for number in range(1, config.rounds + seed + 1):
        yield Epoch(predict=predict, metrics={"train_loss": seed + 1.0 / number})
'''

POPULAR = '''
"""Sequences: counts the items of each group of training users, weighs overlapping users' by the configuration."""
from dataclasses import dataclass
from pathlib import Path
import torch
from trainables.interface import Epoch, Figure, Selection, Variant
from trainables.tasks.sequential import OVERLAPPING

NAME = "Popular"
TASK_TYPE = "sequences"
SELECTION = Selection("val_ndcg10", "maximize")
ABLATIONS = {"wo_weight": Variant(config={"weight": 1.0})}
FIGURES = {"weight": Figure(name="figure_3_weight", title="Weight (a paper's Figure 3)", label="Weight of overlap")}

@dataclass(frozen=True, kw_only=True)
class Config:
    weight: float = 2.0
    guidance: str = "id"
    epochs: int = 2

def prepare(config, task, seeds):
    for folder in shared(config, task, seeds):
        (task.folder.parents[1] / folder).mkdir(parents=True)

def shared(config, task, seeds):
    return [Path("shared") / f"{task.train_key}-{config.weight}-{seed}" for seed in seeds]

def train(config, task, seed):
    weight = torch.where(task.group == OVERLAPPING, config.weight, 1.0)[task.train.row]
    counts = torch.zeros(task.items, device=task.device).index_add_(0, task.train.item, weight)
    counts += 1e-3 * torch.rand(task.items, generator=torch.Generator().manual_seed(seed)).to(task.device)
    def predict(held_out, task, seed):
        return counts[task.target[0]:task.target[1]].expand(len(held_out), -1)
    while True:
        yield Epoch(predict=predict, metrics={"train_loss": 1.0})
'''

NOISY = '''
"""Ratings: a random walk that draws from every generator that a model may have, among them torch's global one."""
from dataclasses import dataclass
import numpy as np
import torch
from torch import nn
from trainables.interface import Epoch, Selection, Setup, Stage

NAME = "Noisy"
TASK_TYPE = "ratings"
SELECTION = Selection("val_rmse", "minimize")

@dataclass(frozen=True, kw_only=True)
class Config:
    epochs: int = 6
    patience: int = 2
    ends: int = 0  # 0: never by itself

class Walk(nn.Module):
    def __init__(self):
        super().__init__()
        self.place = nn.Parameter(3 + torch.rand(()))
        self.dropout = nn.Dropout(0.5)

def train(config, task, seed):
    walk = Walk()
    adam = torch.optim.Adam(walk.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(adam, 2)
    generator, rng, progress = torch.Generator().manual_seed(seed), np.random.default_rng(seed), {"done": 0, "seen": []}
    yield Setup(walk, adam=adam, schedule=schedule, generator=generator, rng=rng, progress=progress)
    if progress["done"] == 0:
        progress["seen"].append(torch.rand(2))
        progress["done"] = 1
        yield Stage()
    def predict(held_out, task, seed):
        assert not walk.training and not torch.is_grad_enabled()
        return walk.place + 1e-3 * torch.randn(len(held_out.ratings))
    while config.ends == 0 or progress["done"] <= config.ends:
        assert walk.training and torch.is_grad_enabled()
        draw = torch.rand(()) + torch.rand((), generator=generator) + float(rng.random()) + progress["seen"][-1].sum()
        loss = walk.dropout(walk.place * torch.ones(9)).mean() * (draw - 2.5)
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
        progress["seen"] = [*progress["seen"][-1:], torch.rand(2)]
        progress["done"] += 1
        pack = lambda: {"place": walk.place.detach()}
        yield Epoch(predict=predict, metrics={"train_loss": loss.item()}, pack=pack)

def unpack(config, state, seed):
    return lambda users: state["place"].expand(len(users.features), 5)
'''


def drop(name: str, text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make `name` a model of this text until the test ends."""
    (folder / f"{name}.py").write_text(text)
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(folder)])
    monkeypatch.delitem(sys.modules, f"{models.__name__}.{name}", raising=False)
    return name
