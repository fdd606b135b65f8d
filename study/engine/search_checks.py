"""Checks of how a plan's search draws: against Optuna, its space and the databases that are within reach."""

from __future__ import annotations

import difflib
import inspect
import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import optuna
from optuna.trial import TrialState

from features.errors import InputError, named_line
from search_spaces import Space
from study.engine.optuna_storage import check_database
from study.engine.samplers import PRUNERS, SAMPLERS, fixed_points, make_pruner, make_sampler
from study.specs import GRID, Direction, SearchSpec

_PLAIN: Mapping[str, Any] = {"int": int, "float": int | float, "bool": bool, "str": str, "None": type(None)}
_PROBE = 3  # random trials that a sampler is shown, when a plan is checked, before it draws one


def check_search(spec: SearchSpec, space: Space | None) -> list[str]:
    """Return all faults of how a search draws: one line each, without the plan's name.

    Without a space, which then has faults of its own, only the checks that need none are made.
    """
    faults = _storage_faults(spec)
    if spec.sampler not in SAMPLERS:
        return [*faults, f"search.sampler: must be one of {', '.join(SAMPLERS)}, got {spec.sampler!r}"]
    faults += _pruner_faults(spec) + _budget_faults(spec)
    if spec.sampler != GRID:
        faults += _argument_faults("search.sampler_args", optuna.samplers, spec.sampler, spec.sampler_args)
    if faults or space is None:
        return faults
    try:
        points = fixed_points(spec, space)
        _probe(spec, space)
    except InputError as error:
        return str(error).splitlines()
    if spec.sampler == GRID and len(points) < spec.trials:
        return [f"search.trials is {spec.trials}, and the grid has {len(points)} configurations; give at most as many"]
    if spec.sampler != GRID and len(points) > spec.trials:
        return [f"search.points_to_evaluate are {len(points)}, and search.trials is {spec.trials}; give more trials"]
    return []


def _storage_faults(spec: SearchSpec) -> list[str]:
    """Check storages that a plan names: within reach, and nothing in them that would have to be unpickled."""
    urls = {"search.storage": spec.storage}
    faults = []
    if spec.warm_start is not None:
        urls["search.warm_start.storage"] = (
            spec.warm_start.storage if "://" in (spec.warm_start.storage or "") else None
        )
        if spec.sampler == GRID:
            faults.append("search.warm_start: a grid learns nothing; leave it out")
    for place, url in urls.items():
        try:
            if url is not None:
                check_database(url, place)
        except InputError as error:
            faults.append(str(error))
    if spec.storage is not None and spec.sampler == "CmaEsSampler":
        faults.append("search.sampler: CmaEsSampler keeps pickles in its storage; leave out search.storage")
    return faults


def _pruner_faults(spec: SearchSpec) -> list[str]:
    if spec.pruner is None:
        return ["search.pruner_args: there is no pruner; set search.pruner"] if spec.pruner_args else []
    if spec.pruner not in PRUNERS:
        return [f"search.pruner: must be one of {', '.join(PRUNERS)}, got {spec.pruner!r}"]
    if spec.objectives:
        return ["search.pruner: one number decides who stops, and there are several objectives; leave out one of them"]
    faults = _argument_faults("search.pruner_args", optuna.pruners, spec.pruner, spec.pruner_args)
    if not faults:
        try:
            make_pruner(spec)
        except InputError as error:
            faults.append(str(error))
    return faults


def _budget_faults(spec: SearchSpec) -> list[str]:
    given = {"hours": spec.budget.hours, "trial_hours": spec.budget.trial_hours}
    return [
        f"search.budget.{name} is {value:g}; give a number above 0"
        for name, value in given.items()
        if value is not None and value <= 0
    ]


def _argument_faults(place: str, module: Any, name: str, given: Mapping[str, Any]) -> list[str]:
    """Check arguments against the signature of the class. One that takes an object cannot come from a plan."""
    faults = []
    parameters = inspect.signature(getattr(module, name)).parameters
    for key, value in given.items():
        if key == "seed":
            faults.append(f"{place}.seed: is set from search.seed; remove it here")
            continue
        if key not in parameters:
            near = difflib.get_close_matches(str(key), parameters, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(set(parameters) - {'seed'})}"
            faults.append(f"{place}: {name} has no argument {key!r}; {hint}")
            continue
        annotation = parameters[key].annotation
        words = (annotation if isinstance(annotation, str) else annotation.__name__).split("|")
        kinds = [word.strip() for word in words if word.strip() in _PLAIN]
        if not set(kinds) - {"None"}:
            faults.append(f"{place}.{key}: takes an object that no plan can name; leave it out")
        elif not any(_is(value, kind) for kind in kinds):
            wanted = " or ".join("null" if kind == "None" else kind for kind in kinds)
            faults.append(f"{place}.{key} is {value!r}; give a value of type {wanted}")
        elif isinstance(value, float) and not math.isfinite(value):
            faults.append(f"{place}.{key} is {value}; give a finite number")
    return faults


def _is(value: Any, kind: str) -> bool:
    return isinstance(value, _PLAIN[kind]) and (kind == "bool" or not isinstance(value, bool))


def _probe(spec: SearchSpec, space: Space) -> None:
    """Draw one trial in memory: some arguments are refused nowhere but there."""
    arguments = dict(spec.sampler_args)
    if "n_startup_trials" in inspect.signature(getattr(optuna.samplers, spec.sampler)).parameters:
        arguments["n_startup_trials"] = min(arguments.get("n_startup_trials", _PROBE), _PROBE)
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            directions: list[Direction] = [objective.direction for objective in spec.objectives] or ["minimize"]
            study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0), directions=directions)
            for number in range(_PROBE):
                trial = study.ask()
                space.suggest(trial)
                study.tell(trial, [float(number)] * len(directions), state=TrialState.COMPLETE)
            study.sampler = make_sampler(replace(spec, sampler_args=arguments), _PROBE)
            space.suggest(study.ask())
    except InputError:
        raise
    except Exception as error:
        reason = named_line(error)
        raise InputError(f"search.sampler: {spec.sampler} cannot draw as it is set up here ({reason})") from error
    finally:
        optuna.logging.set_verbosity(level)
