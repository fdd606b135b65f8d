"""What a model file offers: the contract that every file in `trainables/models/` keeps, and how it is found and held against it."""

from __future__ import annotations

import difflib
import importlib
import math
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol

from features.errors import InputError
from trainables import models
from trainables.task_types import Measured, Predict


@dataclass(frozen=True, kw_only=True)
class Variant:
    """An ablation: what changes against the full model."""

    config: Mapping[str, Any] = field(default_factory=dict)  # fields of the config
    features: str | None = None  # feature_set of task features; None: the plan's


@dataclass(frozen=True)
class Selection:
    """The metric that selects epochs and trials, and whether small or large values of it are good."""

    metric: str  # as validation logs it, e.g. val_rmse
    direction: Literal["minimize", "maximize"]

    @property
    def sign(self) -> float:
        """1.0 where small values are good, -1.0 where large ones are: the product with a value is a cost."""
        return 1.0 if self.direction == "minimize" else -1.0

    def better(self, one: float, other: float) -> bool:
        """Whether `one` is better than `other`."""
        return self.sign * one < self.sign * other

    def best(self, values: Iterable[float]) -> float:
        """Return the best of the values."""
        return min(values, key=lambda value: self.sign * value)


State = Callable[[], dict[str, Any]]
"""Gives tensors and plain values that `torch.load(weights_only=True)` reads; they may be the living ones, not copies."""


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """The state after an epoch: validation metrics, and the model that gave them."""

    number: int  # counted from 1; of the last one: the epoch that was selected
    metrics: Mapping[str, float]  # `validation_metrics` and the model's own
    predict: Predict
    validation: Measured | None = None  # what each validation user contributes, see `validate`
    last: bool = False
    state: State | None = None  # what `train` goes on from after this epoch; called before the next one is asked for
    pack: Callable[[], dict[str, Any]] | None = None  # the state that `unpack` takes: tensors and plain values


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A place before the first epoch, in a stage of training that measures nothing; all seeds pass the same ones."""

    state: State  # what `train` goes on from


@dataclass(frozen=True, kw_only=True)
class Figure:
    """How the sensitivity to one config field is shown. With a name it is a figure of the paper: the report asks for it."""

    name: str = ""  # of its files; empty: sensitivity_<field>
    title: str = ""  # empty: Sensitivity to <field>
    metrics: tuple[str, ...] = ()  # one panel each; empty: those of the model's kind
    label: str = ""  # of the axis; empty: the field's name
    order: tuple[str, ...] = ()  # of categories, as the paper lists them


class Model(Protocol):
    """What a file in `trainables/models/` offers."""

    TASK_TYPE: str
    Config: Callable[..., Any]
    SELECTION: tuple[str, str]
    ABLATIONS: Mapping[str, Variant]
    FIGURES: Mapping[str, Figure]

    def train(self, config: Any, task: Any, seed: int, state: dict[str, Any] | None = None) -> Iterator[Epoch | Stage]:
        """Train one seed; from `state`, what comes after the place that gave it, to the last bit as without a stop.

        A model whose epochs have no state need not take any.
        """


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
            finite = not isinstance(value, float) or math.isfinite(value)
            wanted = f"a value of type {known[name]}" if finite else "a finite number"
            faults.append(f"{name} is {value!r}; give {wanted}{number_hint(value)}")
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
        return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    return isinstance(value, {"int": int, "str": str}[kind])


def number_hint(value: Any) -> str:
    """What to write instead of `1e-5`, which YAML 1.1 reads as text; empty for every other value."""
    try:
        number = repr(float(value)) if isinstance(value, str) and "e" in value.lower() else ""
    except ValueError:
        return ""
    pointed = number if "." in number else number.replace("e", ".0e")
    return f" (YAML reads this as text; write {pointed})" if number else ""
