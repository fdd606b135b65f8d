"""Samplers and pruners by Optuna's own names, made from the plain values of a plan."""

from __future__ import annotations

import hashlib
import inspect
import random
import warnings
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import optuna
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler, PartialFixedSampler

from features.errors import InputError
from search_spaces import Space, SpaceError
from study.specs import GRID, SearchSpec

# Samplers whose draws depend on the seed and the finished trials alone. True: the seed names one sequence that all trials
# share (scrambled Sobol points are only spread out within one scrambling), so it must not change from trial to trial.
SAMPLERS: Mapping[str, bool] = {
    "TPESampler": False,
    "RandomSampler": False,
    "GPSampler": False,
    "QMCSampler": True,
    "CmaEsSampler": False,
    "NSGAIISampler": False,
    "NSGAIIISampler": False,
    "GridSampler": True,
}
PRUNERS = ("SuccessiveHalvingPruner", "MedianPruner")
MOST_GRID = 100_000  # configurations; they are shuffled in memory


def fixed_points(spec: SearchSpec, space: Space) -> Sequence[Mapping[str, Any]]:
    """Return parameters that are given instead of drawn, by trial number; of a grid search the whole grid, shuffled.

    The grid is ours: Optuna's own has no conditional parameters. It takes Optuna's argument `search_space`.
    """
    if spec.sampler == GRID:
        if spec.points_to_evaluate:
            raise InputError("search.points_to_evaluate: the grid holds every configuration; leave them out")
        if set(spec.sampler_args) - {"search_space"}:
            raise InputError(f"search.sampler_args: {GRID} takes search_space alone, got {list(spec.sampler_args)}")
        given = spec.sampler_args.get("search_space", {})
        if not isinstance(given, Mapping) or not all(isinstance(values, list) for values in given.values()):
            raise InputError("search.sampler_args.search_space: give a list of values for each parameter")
        try:
            grid = list(islice(space.grid(given), MOST_GRID + 1))
        except SpaceError as error:
            raise _faulty("search.sampler_args.search_space", error) from error
        if len(grid) > MOST_GRID:
            raise InputError(f"search.sampler: the grid has more than {MOST_GRID:,} configurations; give fewer values")
        random.Random(spec.seed).shuffle(grid)
        return grid
    points: list[dict[str, Any]] = []
    for number, point in enumerate(spec.points_to_evaluate):
        try:
            points.append(space.fit(point, whole=False))
        except SpaceError as error:
            raise _faulty(f"search.points_to_evaluate[{number}]", error) from error
    return points


def study_seed(seed: int, row: str, cell: str) -> int:
    """Return the sampler's seed for one row in one cell, from the plan's: no two searches get the same start-up draws."""
    words = np.frombuffer(hashlib.sha256(f"{row} {cell}".encode()).digest(), np.uint32)
    return int(np.random.SeedSequence([seed, *words.tolist()]).generate_state(1)[0])


def make_sampler(spec: SearchSpec, number: int, points: Sequence[Mapping[str, Any]] = ()) -> BaseSampler:
    """Make the sampler of trial `number`, a function of the specification, that number and `fixed_points`."""
    words = [spec.seed] if SAMPLERS[spec.sampler] else [spec.seed, number]
    seed = int(np.random.SeedSequence(words).generate_state(1)[0])
    if spec.sampler == GRID:
        sampler: BaseSampler = optuna.samplers.RandomSampler(seed=seed)
    else:
        sampler = _make(optuna.samplers, spec.sampler, {**_quiet(spec.sampler), **spec.sampler_args, "seed": seed})
    if number < len(points):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return PartialFixedSampler(dict(points[number]), sampler)
    return sampler


def make_pruner(spec: SearchSpec) -> BasePruner:
    """Make the pruner; without one in the specification, one that never stops a trial."""
    if spec.pruner is None:
        return optuna.pruners.NopPruner()
    pruner: BasePruner = _make(optuna.pruners, spec.pruner, spec.pruner_args)
    return pruner


def _make(module: Any, name: str, arguments: Mapping[str, Any]) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # deprecated
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return getattr(module, name)(**arguments)
    except (TypeError, ValueError, ImportError) as error:
        raise InputError(f"search: {name} refuses its arguments: {' '.join(str(error).split())}") from error


def _quiet(name: str) -> dict[str, bool]:
    """Switch warnings off: every sampler but TPE draws conditional parameters independently, in each trial."""
    parameters = inspect.signature(getattr(optuna.samplers, name)).parameters
    return {word: False for word in parameters if word.startswith("warn_") and parameters[word].default is True}


def _faulty(place: str, error: SpaceError) -> InputError:
    return InputError("\n".join(f"{place}: {fault}" for fault in error.faults))
