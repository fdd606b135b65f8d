"""Quick configurations of any model, and the training of one seed on an open task, epoch by epoch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from trainables.interface import Epoch, field_types, load_model
from trainables.task_types import Predict, task_type_of
from trainables.trial import SeedTraining, Trial

QUICK = {
    "epochs": 2, "patience": 9, "stage_epochs": 1, "feature_epochs": 1, "side_epochs": 1, "encoder_epochs": 1,
    "steps": 4, "batch": 16, "batch_users": 32, "negatives": 10, "words": 9, "aspect_width": 3, "filters": 3,
}  # fmt: skip


def quick(name: str, **changes: Any) -> dict[str, Any]:
    """A configuration of any model that trains in a second: what it has of the fields of QUICK, then `changes`."""
    known = field_types(load_model(name).Config)
    return {**{field: value for field, value in QUICK.items() if field in known}, **changes}


def variants(name: str) -> list[dict[str, Any]]:
    """Changes of a model's configuration: none, its presets, its ablations, and every category of its figures."""
    model = load_model(name)
    presets = [
        {field: value for field, value in preset.items() if field not in QUICK} for preset in model.PRESETS.values()
    ]
    ablations = [dict(variant.config) for variant in model.ABLATIONS.values()]
    categories = [{field: value} for field, figure in model.FIGURES.items() for value in figure.order]
    return [{}, *(changes for changes in (*presets, *ablations, *categories) if changes)]


@dataclass(frozen=True)
class Trained:
    """An epoch as the runner has measured it, or the result, whose `predict` has the weights of the best epoch."""

    metrics: Mapping[str, float]
    predict: Predict


def train_seed(name: str, config: Any, task: Any, seed: int, device: str = "cpu") -> list[Trained]:
    """Train as the runner does; the epochs, then the result."""
    model, yielded, trained = load_model(name), list[Epoch](), list[Trained]()

    def train(config: Any, task: Any, seed: int) -> Any:
        for place in model.train(config, task, seed):
            if isinstance(place, Epoch):
                yielded.append(place)
            yield place

    trial = Trial(
        name=name, model=replace(model, train=train), config=config, task_dir="", task=task, task_type=task_type_of(task),
        test=None, device=torch.device(device),
    )  # fmt: skip
    training = SeedTraining(trial, seed)
    while training.result is None:
        if isinstance(place := training.advance(), Epoch):
            trained.append(Trained(training.metrics, place.predict))
    best = yielded[round(training.result.metrics["selected_epoch"]) - 1]
    return [*trained, Trained(training.result.metrics, best.predict)]
