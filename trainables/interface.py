"""What a model file offers: the contract that every file in `trainables/models/` keeps, and how it is found and checked.

A model is a file (or a folder) in `trainables/models/` with one YAML of search spaces in `search_spaces/`:

    NAME        the paper's name, by which published rows and claims are found
    TASK_TYPE   of the tasks it trains on: ratings | sequences (see `trainables.task_types`)
    SELECTION   the validation metric that selects, and its direction
    Config      a frozen dataclass of bool, int, float and str fields, each with a default; the runner reads `epochs`,
                `patience` and `keep` where it has them
    train       (config, task, seed), a generator of `Setup` (at most one, before all else), `Stage` and `Epoch`

and, where it wants to: NEEDS, NOTE, PRESETS, ABLATIONS, FIGURES; VERSION, raised where its code has changed so that its
trials must be trained again; BOTH_DIRECTIONS, where one training serves both directions of a pair of domains, for its
epochs have `turned`; `prepare(config, task, seeds)`, which makes what its trials share ahead of them, with
`shared(config, task, seeds)`, the folders that hold it, by their paths in the folder of all tasks; and, with
`Epoch.pack`, `unpack(config, state, seed)`, which gives back a trained model as a function from what is known of users
(`TaskType.query`) to scores of all items of the target domain [U, J].

Everything else is the runner's (`trainables.trial`): random numbers per seed, training and evaluation mode, measuring,
the best epoch, early stopping, checkpoints, devices. Nothing is registered anywhere.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import pkgutil
import re
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from features.errors import InputError, named_line
from trainables import models
from trainables.task_types import TASK_TYPES, Predict

NEEDS = ("features", "titles", "pseudo_items", "reviews")  # what a model may read of a task beside ids and interactions
OURS = "ours"  # the preset that is the defaults; no model declares it
KEEP = ("best", "last")
FIELD_TYPES = ("bool", "int", "float", "str")  # what a plan and a search space can say
_REQUIRED = ("NAME", "TASK_TYPE", "SELECTION", "Config", "train")
_CONSTANTS = (
    *("NAME", "TASK_TYPE", "SELECTION", "NEEDS", "NOTE", "VERSION", "BOTH_DIRECTIONS"),
    *("PRESETS", "ABLATIONS", "FIGURES"),
)
_ARGUMENTS = {
    "train": ("config", "task", "seed"),
    "prepare": ("config", "task", "seeds"),
    "shared": ("config", "task", "seeds"),
    "unpack": ("config", "state", "seed"),
}
_NAME = re.compile(r"[a-z][a-z0-9_]*")  # of a preset; becomes part of a tag
_ABLATION = re.compile(r"[\w.:=,+-]+")  # becomes the name of a job


@dataclass(frozen=True)
class Selection:
    """The validation metric that selects an epoch and a configuration, and which way is better."""

    metric: str  # as reported, e.g. val_rmse
    direction: Literal["minimize", "maximize"]

    @property
    def sign(self) -> float:
        """What a value is multiplied by so that lower is better."""
        return -1.0 if self.direction == "maximize" else 1.0

    def better(self, value: float, other: float) -> bool:
        """Whether `value` is better than `other`; NaN is worse than every number, and equals are not better."""
        return self.sign * value < self.sign * other or (math.isnan(other) and not math.isnan(value))

    def best(self, values: Iterable[float]) -> float:
        """Return the best of the values; NaN only where there is no number."""
        best = math.nan
        for value in values:
            best = value if self.better(value, best) else best
        return best


@dataclass(frozen=True, kw_only=True)
class Variant:
    """An ablation: what changes against the full model."""

    config: Mapping[str, Any] = field(default_factory=dict)  # fields of the config
    features: str | None = None  # feature set of the task; None: the plan's
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # preset -> fields in the place of `config`

    def config_of(self, preset: str) -> Mapping[str, Any]:
        """Return the fields that the ablation changes under a preset."""
        return self.presets.get(preset, self.config)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """How the sensitivity to one config field is shown. With a name it is a figure of the paper: the report asks for it."""

    name: str = ""  # of its files; empty: sensitivity_<field>
    title: str = ""  # empty: Sensitivity to <field>
    metrics: tuple[str, ...] = ()  # one panel each; empty: those of the model's task type
    label: str = ""  # of the axis; empty: the field's name
    order: tuple[str, ...] = ()  # of categories, as the paper lists them


Part = nn.Module | Optimizer | LRScheduler | torch.Generator | np.random.Generator | dict[str, Any]
"""What a checkpoint holds of a training. A dict holds tensors, plain values, and lists and dicts of them, under text keys;
it is filled in place where training goes on."""


class Setup:
    """What training changes: yielded at most once, before all else, with everything as it is before the first epoch.

    The runner moves the network to the device of the task and keeps its weights of the best epoch. Where it goes on after
    a kill, it loads all parts before it asks for the next place, so that `train` continues behind the place that the
    checkpoint was taken at. A model without a Setup starts anew after a kill.
    """

    def __init__(self, network: nn.Module, **parts: Part) -> None:
        self.network = network
        self.parts: dict[str, Part] = {"network": network, **parts}


@dataclass(frozen=True)
class Stage:
    """A place before the first epoch where a checkpoint may be taken; measures nothing. All seeds pass the same ones."""


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """An epoch of training that is measured on the validation users."""

    predict: Predict
    """(held_out, task, seed) -> ratings [N] of `held_out.ratings`, not cut to the rating scale; or scores [R, J] of all
    target-domain items. Reads the network of the Setup as it is when called, because the runner puts the best epoch's
    weights back before it scores."""
    turned: Predict | None = None  # the same for the opposite direction; None: it has a training of its own
    metrics: Mapping[str, float] = field(default_factory=dict)  # the model's own, e.g. train_loss
    validation: Tensor | None = (
        None  # predictions of `task.validation` where they are made another way than by `predict`
    )
    pack: Callable[[], dict[str, Any]] | None = None  # the state that `unpack` takes: tensors and plain values


Place = Setup | Stage | Epoch


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model that has passed `check_model`; what its file leaves out has its default."""

    NAME: str
    TASK_TYPE: str
    SELECTION: Selection
    Config: Callable[..., Any]
    train: Callable[[Any, Any, int], Generator[Place]]
    NEEDS: tuple[str, ...] = ()
    PRESETS: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    NOTE: str = ""  # printed beside the model in tables, e.g. reconstruction
    VERSION: int = 1  # of its code: finished trials of another version count no more
    BOTH_DIRECTIONS: bool = False  # whether one training serves both directions of a pair of domains
    ABLATIONS: Mapping[str, Variant] = field(default_factory=dict)
    FIGURES: Mapping[str, Figure] = field(default_factory=dict)
    prepare: Callable[..., None] | None = None
    shared: Callable[..., Any] | None = None
    unpack: Callable[..., Any] | None = None


def model_names() -> list[str]:
    """Return the names of all models: those of their files."""
    return sorted(module.name for module in pkgutil.iter_modules(models.__path__))


def load_model(name: str) -> Model:
    """Return a model; InputError for an unknown name, a file that cannot be imported, and what `check_model` finds."""
    if name not in model_names():
        raise InputError(f"model: unknown {name!r}; choose from {', '.join(model_names())}")
    try:
        module = importlib.import_module(f"{models.__name__}.{name}")
    except Exception as error:
        reason = named_line(error)
        raise InputError(f"model {name}: its file cannot be imported ({reason}); correct it") from error
    return check_model(module, name)


@lru_cache(maxsize=64)
def check_model(module: ModuleType, name: str) -> Model:
    """Return what a module offers; InputError with every fault of it at once."""
    missing = [required for required in _REQUIRED if not hasattr(module, required)]
    faults = [f"{required} is missing; {_missing_hint(required, module)}" for required in missing]
    faults += _misspelt(module)
    faults += _constant_faults(module)
    faults += _selection_faults(module)
    for function, arguments in _ARGUMENTS.items():
        if hasattr(module, function):
            faults += _function_faults(module, function, arguments)
    if hasattr(module, "prepare") != hasattr(module, "shared"):
        faults.append("prepare and shared belong together; offer both, or neither")
    if "Config" not in missing:
        config_faults = _config_faults(module.Config)
        faults += config_faults
        if not config_faults:
            faults += _named_field_faults(module)
    if faults:
        raise InputError(f"model {name}: " + "; ".join(faults))
    return Model(**{entry.name: getattr(module, entry.name) for entry in fields(Model) if hasattr(module, entry.name)})


# --- the faults of a model file -----------------------------------------------------------------------------------


def _missing_hint(required: str, module: ModuleType) -> str:
    hints = {
        "NAME": "give the paper's name, by which its published rows are found",
        "TASK_TYPE": f"choose from {', '.join(TASK_TYPES)}",
        "SELECTION": 'give e.g. Selection("val_rmse", "minimize")',
        "Config": "give a frozen dataclass of the hyperparameters",
        "train": "give a generator function of (config, task, seed)",
    }
    near = difflib.get_close_matches(required, vars(module), n=1, cutoff=0.8)
    return f"did you mean {near[0]} by it?" if near else hints[required]


def _misspelt(module: ModuleType) -> list[str]:
    """Constants that are almost one of the optional names of the contract, where that is missing."""
    absent = [name for name in _CONSTANTS if name not in _REQUIRED and not hasattr(module, name)]
    near = {name: difflib.get_close_matches(name, absent, n=1, cutoff=0.85) for name in vars(module) if name.isupper()}
    return [f"{name} is no name of the contract; did you mean {close[0]!r}?" for name, close in near.items() if close]


def _constant_faults(module: ModuleType) -> list[str]:
    """Constants of the wrong type or with values that are not known."""
    faults = []
    name, task_type = getattr(module, "NAME", "x"), getattr(module, "TASK_TYPE", None)
    if not isinstance(name, str) or not name.strip():
        faults.append(f"NAME is {name!r}; give the paper's name as text")
    if hasattr(module, "TASK_TYPE") and task_type not in TASK_TYPES:
        faults.append(f"TASK_TYPE is {task_type!r}; choose from {', '.join(TASK_TYPES)}")
    note, needs = getattr(module, "NOTE", ""), getattr(module, "NEEDS", ())
    if not isinstance(note, str):
        faults.append(f"NOTE is {note!r}; give text")
    if type(version := getattr(module, "VERSION", 1)) is not int or version < 1:
        faults.append(f"VERSION is {version!r}; give a whole number of at least 1")
    if not isinstance(both := getattr(module, "BOTH_DIRECTIONS", False), bool):
        faults.append(f"BOTH_DIRECTIONS is {both!r}; give True or False")
    if not isinstance(needs, tuple):
        faults.append(f"NEEDS is {needs!r}; give a tuple of text, e.g. {NEEDS[:1]!r}")
    else:
        faults += [f"NEEDS holds {need!r}; {_near(need, NEEDS)}" for need in needs if need not in NEEDS]
    for constant, kind in (("ABLATIONS", Variant), ("FIGURES", Figure)):
        mapping = getattr(module, constant, {})
        if not isinstance(mapping, Mapping):
            faults.append(f"{constant} is of type {type(mapping).__name__}; give a mapping of {kind.__name__}")
            continue
        faults += [
            f"{constant}[{key!r}] is of type {type(value).__name__}; give a {kind.__name__}"
            for key, value in mapping.items()
            if not isinstance(value, kind)
        ]
    return faults


def _selection_faults(module: ModuleType) -> list[str]:
    """A SELECTION of another type, by a metric that its task type does not measure, or in the wrong direction."""
    selection: Any = getattr(module, "SELECTION", None)
    task_type = TASK_TYPES.get(getattr(module, "TASK_TYPE", ""))
    if not hasattr(module, "SELECTION"):
        return []
    if not isinstance(selection, Selection):
        return [f'SELECTION is {selection!r}; give e.g. Selection("val_rmse", "minimize")']
    if selection.direction not in ("minimize", "maximize"):
        return [f"SELECTION.direction is {selection.direction!r}; choose from minimize, maximize"]
    if task_type is None:
        return []
    directions = task_type.validation_directions
    if selection.metric not in directions:
        return [f"SELECTION.metric is {selection.metric!r}; {_near(selection.metric, directions)}"]
    if selection.direction != directions[selection.metric]:
        return [
            f"SELECTION.direction is {selection.direction}; {selection.metric} is to {directions[selection.metric]}"
        ]
    return []


def _function_faults(module: ModuleType, name: str, arguments: tuple[str, ...]) -> list[str]:
    """A function that cannot be called with its arguments, or a `train` that is no generator."""
    function = getattr(module, name)
    call = f"{name}({', '.join(arguments)})"
    if not callable(function):
        return [f"{name} is of type {type(function).__name__}; give a function {call}"]
    faults = []
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        faults.append(f"{name}{inspect.signature(function)} cannot be called as {call}; change its arguments")
    if name == "train" and not inspect.isgeneratorfunction(function):
        faults.append("train is no generator function; yield its places (Setup, Stage, Epoch)")
    return faults


def _config_faults(config_class: Any) -> list[str]:
    """A Config that is no frozen dataclass, or a field that a plan cannot say or leave out."""
    if not (inspect.isclass(config_class) and is_dataclass(config_class)):
        return [f"Config is of type {type(config_class).__name__}; give a frozen dataclass"]
    faults = []
    if not config_class.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        faults.append("Config is a dataclass that can be changed; give @dataclass(frozen=True, kw_only=True)")
    for name, kind in field_types(config_class).items():
        default = config_class.__dataclass_fields__[name].default
        if kind not in FIELD_TYPES:
            faults.append(
                f"Config.{name} is of type {kind}, which a plan cannot say; choose from {', '.join(FIELD_TYPES)}"
            )
        elif default is MISSING:
            faults.append(f"Config.{name} has no default; give one")
        elif not _fits(default, kind):
            faults.append(f"Config.{name} has the default {default!r}; give a value of type {kind}")
    if not faults:
        try:
            config_class()
        except InputError as error:
            faults.append(f"Config refuses its own defaults ({error}); change them")
    return faults


def _named_field_faults(module: ModuleType) -> list[str]:
    """Ablations and figures that name fields which the config does not have, or values that it refuses."""
    ablations, figures = getattr(module, "ABLATIONS", {}), getattr(module, "FIGURES", {})
    known = list(field_types(module.Config))
    faults = _preset_faults(module)
    for name, variant in ablations.items() if isinstance(ablations, Mapping) else ():
        if not isinstance(name, str) or not _ABLATION.fullmatch(name):
            faults.append(f"ABLATIONS: {name!r} is the name of a job; use letters, digits and . : = , + - _ only")
        if isinstance(variant, Variant):
            values_faults = _value_faults(module.Config, variant.config)
            faults += [f"ABLATIONS[{name!r}]: {fault}" for fault in values_faults]
    task_type = TASK_TYPES.get(getattr(module, "TASK_TYPE", ""))
    known += [f"{task_type.ratio}_ratio"] if task_type else []  # a sweep over the cells' ratio has a figure too
    for name in figures if isinstance(figures, Mapping) else ():
        if name not in known:
            faults.append(f"FIGURES: unknown field {name!r}; {_near(name, known)}")
    return faults


def _preset_faults(module: ModuleType) -> list[str]:
    """Presets with a bad name or values that the config refuses, and ablations that name another preset."""
    presets, ablations = getattr(module, "PRESETS", {}), getattr(module, "ABLATIONS", {})
    if not isinstance(presets, Mapping):
        return [f"PRESETS is of type {type(presets).__name__}; give a mapping of presets"]
    faults = []
    for name, values in presets.items():
        if name == OURS:
            faults.append(f"PRESETS: {OURS!r} is the defaults' own name; give another one")
        elif not isinstance(name, str) or not _NAME.fullmatch(name):
            faults.append(f"PRESETS: {name!r} is part of a tag; use small letters, digits and _ only")
        if not isinstance(values, Mapping):
            faults.append(f"PRESETS[{name!r}] is of type {type(values).__name__}; give a mapping of fields")
            continue
        faults += [f"PRESETS[{name!r}]: {fault}" for fault in _value_faults(module.Config, values)]
    variants = ablations.items() if isinstance(ablations, Mapping) else ()
    for name, preset, values in (
        (name, preset, values)
        for name, variant in variants
        if isinstance(variant, Variant)
        for preset, values in variant.presets.items()
    ):
        if not isinstance(presets.get(preset), Mapping):
            remedy = _near(preset, presets) if presets else "declare it in PRESETS"
            faults.append(f"ABLATIONS[{name!r}].presets: unknown preset {preset!r}; {remedy}")
            continue
        merged = {**presets[preset], **values}
        faults += [f"ABLATIONS[{name!r}].presets[{preset!r}]: {f}" for f in _value_faults(module.Config, merged)]
    return faults


# --- configurations -----------------------------------------------------------------------------------------------


def field_types(config_class: Any) -> dict[str, str]:
    """Return the names of a config's fields and of their types, as its file writes them."""
    return {
        entry.name: entry.type if isinstance(entry.type, str) else _type_name(entry.type)
        for entry in fields(config_class)
    }


def _type_name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not hasattr(kind, "__args__") else str(kind)


def make_config(model: str, values: Mapping[str, Any], place: str) -> Any:
    """Return the model's config from plain values; InputError with every unknown field and bad value."""
    config_class = load_model(model).Config
    if faults := _value_faults(config_class, values):
        raise InputError(f"{place}: " + "; ".join(faults))
    return config_class(**values)


def _value_faults(config_class: Callable[..., Any], values: Mapping[str, Any]) -> list[str]:
    """Fields that the config does not have, values of the wrong type, and what the config itself refuses."""
    known = field_types(config_class)
    faults = [f"unknown field {name!r}; {_near(name, known)}" for name in values if name not in known]
    for name, value in values.items():
        if name in known and not _fits(value, known[name]):
            finite = not isinstance(value, float) or math.isfinite(value)
            wanted = f"a value of type {known[name]}" if finite else "a finite number"
            faults.append(f"{name} is {value!r}; give {wanted}")
    fitting = {name: value for name, value in values.items() if name in known and _fits(value, known[name])}
    try:
        config_class(**fitting)
    except InputError as error:
        faults.append(str(error))
    return faults


def _near(name: object, known: Iterable[str]) -> str:
    """What to write in the place of an unknown name."""
    names = list(known)
    near = difflib.get_close_matches(str(name), names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(names)}"


def _fits(value: Any, kind: str) -> bool:
    if kind == "bool" or isinstance(value, bool):
        return kind == "bool" and isinstance(value, bool)
    if kind == "float":
        return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    return isinstance(value, {"int": int, "str": str}[kind])
