"""The one door through which every model is trained, tuned, scored and asked for predictions.

A model is a file in `trainables/models/` with `TASK_TYPE` (of the tasks it trains on, see `trainables.task_types`), `Config` (a
frozen dataclass), `train(config, task, seed)` (a generator of `Epoch`, and of `Stage` before the first), `SELECTION`
(the metric that selects, and its direction), `ABLATIONS` (name -> `Variant`) and `FIGURES` (config field -> `Figure`). It
may offer `prepare(config, task, seeds)`, which makes what its trials share ahead of them, with `shared(config, task,
seeds)`, the folders that hold it, by their paths in the folder of all tasks; and, with `Epoch.pack`,
`unpack(config, state, seed)`, which gives back a trained model as a function from what is known of users (`TaskType.query`)
to scores of all items of the target domain [U, J]. Nothing else is registered anywhere.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from features.errors import InputError
from features.store.folders import atomic_file
from features.store.tables import digest
from trainables.interface import Epoch, Stage, State, load_model, make_config
from trainables.task_types import Measured, Predict, task_type_at, task_type_of


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a trial says after an epoch: means over its seeds; the last report holds the trial's result.

    One without metrics is no epoch: it is there for its state.
    """

    epoch: int
    metrics: dict[str, float]
    final: bool = False
    artifacts: dict[str, str | bytes] = field(default_factory=dict)
    state: State | None = None  # what `run` goes on from after this epoch; None: the model cannot


def run(
    model: str,
    config: Mapping[str, Any],
    task_dir: str,
    seeds: Sequence[int],
    test_dir: str | None = None,
    rows: bool = False,
    state: Mapping[str, Any] | None = None,
) -> Iterator[Report]:
    """Train a configuration over its seeds in lockstep; the generator that a trial runs.

    `state` is that of a report of the same training, which then goes on behind that report.

    Metrics are means over seeds: `val_...` of the task's kind and the model's own. The final report adds `<metric>_std`,
    `<metric>/seed_<seed>`, `selected_epoch`, `seconds`, and, where `test_dir` is given, the same `test_...` and the
    artifact `per_user.csv`; then the seed that is best on validation is kept at `kept_at`. `rows`: also the artifact
    `val_per_user.csv`, for comparisons paired by user.
    """
    began = time.perf_counter()
    task, module = _task(task_dir), load_model(model)
    task_type = task_type_of(task)
    if task_type.name != module.TASK_TYPE:
        raise InputError(
            f"{task_dir}: its task is of type {task_type.name}, which model {model} does not take; change the model"
        )
    settings = make_config(model, config, f"config of {model}")
    number = 0
    if state is None:
        trainings = [module.train(settings, task, seed) for seed in seeds]
    else:
        trainings = [module.train(settings, task, seed, of) for seed, of in zip(seeds, state["seeds"], strict=True)]
        torch.set_rng_state(state["rng"])
        number, began = state["epoch"], began - state["seconds"]
    current: list[Epoch | None] = [None] * len(seeds)
    for passed in zip_longest(*trainings):
        if underway := [place for place in passed if isinstance(place, Stage)]:
            yield Report(epoch=number, metrics={}, state=partial(_state, number, began, underway))
            continue
        number += 1
        current = [new or old for new, old in zip(passed, current, strict=True)]
        reached = [epoch for epoch in current if epoch]
        if not all(epoch.last for epoch in reached):
            keep = partial(_state, number, began, reached) if all(epoch.state for epoch in reached) else None
            yield Report(epoch=number, metrics=_means([dict(epoch.metrics) for epoch in reached]), state=keep)
    final = [epoch for epoch in current if epoch is not None]
    measured = [{**epoch.metrics, "selected_epoch": float(epoch.number)} for epoch in final]
    artifacts: dict[str, str | bytes] = {}
    if test_dir is not None:
        test = task_type.load_held_out(Path(test_dir))
        per_seed = {}
        for seed, epoch, metrics in zip(seeds, final, measured, strict=True):
            per_seed[seed], scores = score(epoch.predict, test, task, seed)
            metrics |= scores
        artifacts["per_user.csv"] = per_user_csv(per_seed)
        _keep(kept_at(model, config, task_dir, seeds), model, settings, seeds, final)
    validation = {seed: epoch.validation for seed, epoch in zip(seeds, final, strict=True) if epoch.validation}
    if rows and len(validation) == len(seeds):
        artifacts["val_per_user.csv"] = per_user_csv(validation)
    metrics = _means(measured)
    for name in measured[0]:
        values = [entry[name] for entry in measured]
        metrics[f"{name}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        metrics |= {f"{name}/seed_{seed}": value for seed, value in zip(seeds, values, strict=True)}
    metrics["seconds"] = time.perf_counter() - began
    yield Report(epoch=number, metrics=metrics, final=True, artifacts=artifacts)


def _state(number: int, began: float, places: Sequence[Epoch | Stage]) -> dict[str, Any]:
    seeds = [place.state() for place in places if place.state]
    return {"epoch": number, "seconds": time.perf_counter() - began, "rng": torch.get_rng_state(), "seeds": seeds}


def kept_at(model: str, config: Mapping[str, Any], task_dir: str, seeds: Sequence[int]) -> Path:
    """File of the model that scoring this configuration leaves: beside the tasks, named by all that it depends on."""
    settings = make_config(model, config, f"config of {model}")
    document = {"model": model, "config": asdict(settings), "task": Path(task_dir).parent.name, "seeds": list(seeds)}
    return Path(task_dir).parent.parent / "models" / f"{digest(document)[:16]}.pt"


def _keep(path: Path, model: str, settings: Any, seeds: Sequence[int], final: Sequence[Epoch]) -> None:
    """Write the seed with the best validation metric, the first of equals; models that cannot be packed leave nothing."""
    metric, direction = load_model(model).SELECTION
    sign = 1.0 if direction == "minimize" else -1.0
    seed, best = min(zip(seeds, final, strict=True), key=lambda pair: sign * pair[1].metrics[metric])
    if best.pack is None:
        return
    path.parent.mkdir(exist_ok=True)
    with atomic_file(path) as beside:
        torch.save({"model": model, "config": asdict(settings), "seed": seed, "state": best.pack()}, beside)


def run_predictor(
    model: str,
    config: Mapping[str, Any],
    task_dir: str,
    seeds: Sequence[int],
    test_dir: str | None = None,
    rows: bool = False,
) -> Iterator[Report]:
    """One of the simple predictors in the place of a model: `config` is `{"predictor": name}`; nothing is trained."""
    began = time.perf_counter()
    task = _task(task_dir)
    task_type = task_type_of(task)
    predict = task_type.as_predict(config["predictor"])
    (seed,) = seeds
    validation, metrics = validate(predict, task, seed)
    artifacts: dict[str, str | bytes] = {"val_per_user.csv": per_user_csv({seed: validation})} if rows else {}
    if test_dir is not None:
        measured, scores = score(predict, task_type.load_held_out(Path(test_dir)), task, seed)
        metrics |= scores
        artifacts["per_user.csv"] = per_user_csv({seed: measured})
    metrics["seconds"] = time.perf_counter() - began
    yield Report(epoch=0, metrics=metrics, final=True, artifacts=artifacts)


def has_shared(model: str) -> bool:
    """Whether the model's trials share something that can be made ahead of them."""
    return hasattr(load_model(model), "prepare")


def prepare(model: str, config: Mapping[str, Any], task_dir: str, seeds: Sequence[int]) -> None:
    """Make what trials of this configuration and these seeds share, see `has_shared`."""
    load_model(model).prepare(make_config(model, config, f"config of {model}"), _task(task_dir), seeds)


def shared(model: str, config: Mapping[str, Any], task_dir: str, seeds: Sequence[int]) -> list[Path]:
    """Folders that `prepare` makes, made or not, relative to the folder of all tasks."""
    if not has_shared(model):
        return []
    folders: list[Path] = load_model(model).shared(
        make_config(model, config, f"config of {model}"), _task(task_dir), seeds
    )
    return folders


def validation_metrics(predict: Predict, task: Any, seed: int, *, full: bool = False) -> dict[str, float]:
    """`val_...` metrics of a prediction; `full` adds what is dear to measure: the full ranking of sequences."""
    return validate(predict, task, seed, full=full)[1]


def validate(
    predict: Predict, task: Any, seed: int, *, full: bool = False
) -> tuple[Measured, dict[str, float]]:  # fmt: skip
    """What each validation user contributes, and `validation_metrics`."""
    measured = task_type_of(task).measure(task.validation, predict, task, seed, full=full)
    return measured, {f"val_{name}": value for name, value in measured.metrics.items()}


def score(predict: Predict, test: Any, task: Any, seed: int) -> tuple[Measured, dict[str, float]]:
    """What each test user contributes, and the `test_...` metrics."""
    measured = task_type_of(task).measure(test, predict, task, seed, full=True)
    return measured, {f"test_{name}": value for name, value in measured.metrics.items()}


def per_user_csv(measured: Mapping[int, Measured]) -> str:
    """Column seed, then those of the kind, see `trainables.task_types`."""
    frames = [pd.DataFrame({"seed": seed, **found.columns}) for seed, found in measured.items()]
    return pd.concat(frames).to_csv(index=False, float_format="%.9g", lineterminator="\n")


@lru_cache(maxsize=4)
def _task(task_dir: str) -> Any:
    """Tasks stay open in a worker process: its trials share the arrays."""
    return task_type_at(Path(task_dir)).load_task(Path(task_dir))


def _means(measured: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([entry[name] for entry in measured])) for name in measured[0]}
