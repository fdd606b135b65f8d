"""A small search for tests of the engine: a space with a condition, an objective, and studies in a journal."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from search_spaces import Space, load_space
from study.engine.optuna_storage import open_journal
from study.engine.optuna_study import CellStudy, open_study
from study.specs import SearchSpec
from trainables.interface import Selection

SPACE = """
v:
  x: {FloatDistribution: {low: 0.0, high: 1.0}}
  kind: {CategoricalDistribution: {choices: [a, b]}}
  y: {when: {kind: b}, FloatDistribution: {low: 0.001, high: 1.0, log: true}}
"""
SELECTION = Selection("val_rmse", "minimize")


def make_space(folder: Path, text: str = SPACE) -> Space:
    """Write the space's file and read it."""
    (folder / "space.yaml").write_text(text)
    return load_space(f"{folder}/space.yaml/v", ["x", "kind", "y"])


def spec(sampler: str = "TPESampler", seed: int = 7, **args: Any) -> SearchSpec:
    """A search of 16 trials; `args` of the sampler."""
    if sampler == "GridSampler":
        args.setdefault("search_space", {"x": [0.1, 0.2, 0.4, 0.8], "y": [0.01, 0.1, 1.0]})
    if sampler.startswith("NSGA"):
        args.setdefault("population_size", 4)
    return SearchSpec(trials=16, seeds=(0,), sampler=sampler, sampler_args=args, seed=seed)


def open_search(folder: Path, space: Space, search: SearchSpec, name: str = "cell", **options: Any) -> CellStudy:
    """A study in the journal of a folder."""
    storage = options.pop("storage", None) or open_journal(folder / "optuna" / "study.log")
    return open_study(storage, name, space=space, search=search, selection=SELECTION, **options)


def value(params: dict[str, Any]) -> float:
    """The objective."""
    return float((params["x"] - 0.3) ** 2 + params.get("y", 0.5))


def run(study: CellStudy, numbers: Iterable[int]) -> list[dict[str, Any]]:
    """Draw and finish trials, one after the other; returns their parameters."""
    drawn = []
    for number in numbers:
        drawn.append(study.ask(number))
        study.complete(number, {"val_rmse": value(drawn[-1])}, 1)
    return drawn
