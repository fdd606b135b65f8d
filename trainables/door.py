"""The one door through which every model is trained, tuned, scored and asked for predictions.

A model is a file in `trainables/models/` with `Config` (a frozen dataclass), `train(config, task, seed)` (a generator
of `Epoch`), `SELECTION` (the metric that selects, and its direction) and `ABLATIONS` (name -> `Variant`). Nothing else is
registered anywhere.
"""

from __future__ import annotations

import difflib
import importlib
import io
import pkgutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from features.errors import InputError
from trainables import models
from trainables.metrics import UserErrors, user_errors
from trainables.predictors import as_predict
from trainables.task import HeldOut, Task, load_held_out, load_task

Predict = Callable[[HeldOut, Task, int], tuple[Tensor, Tensor]]
"""(held-out users, task, seed) -> ratings [N], not cut to the rating scale, and the users' vectors [U, D]."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """An ablation: what changes against the full model."""

    config: Mapping[str, Any] = field(default_factory=dict)  # fields of the config
    features: str | None = None  # flavour of task features; None: the plan's


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """The state after an epoch: validation metrics, and the model that gave them."""

    number: int  # counted from 1; of the last one: the epoch that was selected
    metrics: Mapping[str, float]
    predict: Predict
    last: bool = False

    @classmethod
    def measured(
        cls, number: int, predict: Predict, task: Task, seed: int, *, loss: float, spread: float, last: bool = False,
        validated: tuple[Tensor, Tensor] | None = None,
    ) -> Epoch:  # fmt: skip
        """Measure the validation users, predicted here or already (`validated`).

        `spread`: mean variance per dimension of the real target vectors.
        """
        predicted, vectors = validated or predict(task.validation, task, seed)
        errors = _user_errors(task.validation, predicted, task)
        metrics = {f"val_{name}": value for name, value in errors.metrics().items()}
        variance = float(vectors.var(dim=0, correction=0).mean())
        metrics["variance_ratio"] = variance / spread if spread else float("nan")
        return cls(number=number, metrics={**metrics, "train_loss": loss}, predict=predict, last=last)


class Model(Protocol):
    """What a file in `trainables/models/` offers."""

    Config: Callable[..., Any]
    SELECTION: tuple[str, str]
    ABLATIONS: Mapping[str, Variant]

    def train(self, config: Any, task: Task, seed: int) -> Iterator[Epoch]:
        """Train one seed."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a trial says after an epoch: means over its seeds; the last report holds the trial's result."""

    epoch: int
    metrics: dict[str, float]
    final: bool = False
    artifacts: dict[str, str | bytes] = field(default_factory=dict)


def model_names() -> list[str]:
    """Names of all models."""
    return sorted(module.name for module in pkgutil.iter_modules(models.__path__))


def load_model(name: str) -> Any:
    """The module of a model; InputError for an unknown name. Typed as `Model` describes it."""
    if name not in model_names():
        raise InputError(f"model: unknown {name!r}; choose from {', '.join(model_names())}")
    return importlib.import_module(f"{models.__name__}.{name}")


def make_config(model: str, values: Mapping[str, Any], place: str) -> Any:
    """The model's config from plain values; InputError with every unknown field and bad value."""
    config_class = load_model(model).Config
    known = {field.name: getattr(field.type, "__name__", str(field.type)) for field in fields(config_class)}
    faults = [f"unknown field {name!r}; {_near(name, known)}" for name in values if name not in known]
    for name, value in values.items():
        if name in known and not _fits(value, known[name]):
            faults.append(f"{name} is {value!r}; give a value of type {known[name]}{number_hint(value)}")
    fitting = {name: value for name, value in values.items() if name in known and _fits(value, known[name])}
    try:
        config = config_class(**fitting)
    except InputError as error:
        faults.append(str(error))
    if faults:
        raise InputError(f"{place}: " + "; ".join(faults))
    return config


def _near(name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


def _fits(value: Any, kind: str) -> bool:
    if kind == "bool" or isinstance(value, bool):
        return kind == "bool" and isinstance(value, bool)
    if kind == "float":
        return isinstance(value, int | float)
    return isinstance(value, {"int": int, "str": str}[kind])


def number_hint(value: Any) -> str:
    """What to write instead of `1e-5`, which YAML 1.1 reads as text; empty for every other value."""
    try:
        number = repr(float(value)) if isinstance(value, str) and "e" in value.lower() else ""
    except ValueError:
        return ""
    pointed = number if "." in number else number.replace("e", ".0e")
    return f" (YAML reads this as text; write {pointed})" if number else ""


def run(
    model: str, config: Mapping[str, Any], task_dir: str, seeds: Sequence[int], test_dir: str | None = None
) -> Iterator[Report]:
    """Train a configuration over its seeds in lockstep; the generator that a trial runs.

    Metrics are means over seeds: `val_mae`, `val_rmse` (rating points), `val_ndcg20`, `variance_ratio`, `train_loss`.
    The final report adds `<metric>_std`, `<metric>/seed_<seed>`, `selected_epoch`, `seconds`, and, where `test_dir` is
    given, the same `test_...` and the artifact `per_user.csv`.
    """
    began = time.perf_counter()
    task, module = _task(task_dir), load_model(model)
    settings = make_config(model, config, f"config of {model}")
    trainings = [module.train(settings, task, seed) for seed in seeds]
    current: list[Epoch | None] = [None] * len(seeds)
    number = 0
    for number, epochs in enumerate(zip_longest(*trainings), start=1):
        current = [new or old for new, old in zip(epochs, current, strict=True)]
        if not all(epoch and epoch.last for epoch in current):
            yield Report(epoch=number, metrics=_means([dict(epoch.metrics) for epoch in current if epoch]))
    final = [epoch for epoch in current if epoch is not None]
    measured = [{**epoch.metrics, "selected_epoch": float(epoch.number)} for epoch in final]
    artifacts: dict[str, str | bytes] = {}
    if test_dir is not None:
        test = load_held_out(Path(test_dir))
        per_seed = {}
        for seed, epoch, metrics in zip(seeds, final, measured, strict=True):
            per_seed[seed], scores = score(epoch.predict, test, task, seed)
            metrics |= scores
        artifacts["per_user.csv"] = per_user_csv(per_seed)
    metrics = _means(measured)
    for name in measured[0]:
        values = [entry[name] for entry in measured]
        metrics[f"{name}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        metrics |= {f"{name}/seed_{seed}": value for seed, value in zip(seeds, values, strict=True)}
    metrics["seconds"] = time.perf_counter() - began
    yield Report(epoch=number, metrics=metrics, final=True, artifacts=artifacts)


def run_predictor(
    model: str, config: Mapping[str, Any], task_dir: str, seeds: Sequence[int], test_dir: str | None = None
) -> Iterator[Report]:
    """One of the simple predictors in the place of a model: `config` is `{"predictor": name}`; nothing is trained."""
    began = time.perf_counter()
    task, predict = _task(task_dir), as_predict(config["predictor"])
    (seed,) = seeds
    errors = _user_errors(task.validation, predict(task.validation, task, seed)[0], task)
    metrics = {f"val_{name}": value for name, value in errors.metrics().items()}
    artifacts: dict[str, str | bytes] = {}
    if test_dir is not None:
        errors, scores = score(predict, load_held_out(Path(test_dir)), task, seed)
        metrics |= scores
        artifacts["per_user.csv"] = per_user_csv({seed: errors})
    metrics["seconds"] = time.perf_counter() - began
    yield Report(epoch=0, metrics=metrics, final=True, artifacts=artifacts)


def score(predict: Predict, test: HeldOut, task: Task, seed: int) -> tuple[UserErrors, dict[str, float]]:
    """Errors per test user, and `test_mae`, `test_rmse`, `test_ndcg20`, `test_cold_item_{mae,rmse,n}`."""
    predicted, _ = predict(test, task, seed)
    errors = _user_errors(test, predicted, task)
    scores = {f"test_{name}": value for name, value in errors.metrics().items()}
    cold = test.cold_item
    scores["test_cold_item_n"] = float(cold.sum())
    if cold.any():
        error = (predicted.clamp(*task.rating_scale) - test.ratings.rating)[cold].double()
        scores["test_cold_item_mae"] = float(error.abs().mean())
        scores["test_cold_item_rmse"] = float(error.square().mean().sqrt())
    return errors, scores


def per_user_csv(errors: Mapping[int, UserErrors]) -> str:
    """Rows seed,user,n,sum_abs_error,sum_squared_error,ndcg20."""
    out = io.StringIO()
    out.write("seed,user,n,sum_abs_error,sum_squared_error,ndcg20\n")
    for seed, e in errors.items():
        rows = zip(e.user, e.n, e.sum_abs_error, e.sum_squared_error, e.ndcg, strict=True)
        out.writelines(f"{seed},{u},{n},{a:.9g},{s:.9g},{g:.9g}\n" for u, n, a, s, g in rows)
    return out.getvalue()


@lru_cache(maxsize=4)
def _task(task_dir: str) -> Task:
    """Tasks stay open in a worker process: its trials share the arrays."""
    return load_task(Path(task_dir))


def _user_errors(held_out: HeldOut, predicted: Tensor, task: Task) -> UserErrors:
    ratings = held_out.ratings
    return user_errors(ratings.user.numpy(), predicted.numpy(), ratings.rating.numpy(), task.rating_scale)


def _means(measured: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([entry[name] for entry in measured])) for name in measured[0]}
