"""The jobs of each part of a plan: what has to be trained, under which name. Pure functions; nothing runs here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from study.plan.schema import Plan
from study.specs import PREDICTOR, RATIO, Cell, Job, trial_name
from trainables.interface import load_model
from trainables.tasks.arrays import TaskFolders

Folders = Callable[[Cell, str], TaskFolders | None]
"""(cell, feature_set) -> its task, or None where only names are asked for."""
Configs = Mapping[str, Mapping[str, Any]]
"""Cell name -> the configuration that a part starts from."""


def search_jobs(plan: Plan, folders: Folders) -> list[Job]:
    """Trials of the search; cells take turns, so that none waits for another."""
    if plan.search is None:
        return []
    return [
        _job("search", cell, trial_name(number), None, plan.search.seeds, plan.features.main, folders)
        for number in range(plan.search.trials)
        for cell in plan.cells
    ]


def sweep_jobs(plan: Plan, parameter: str, folders: Folders, start: Configs) -> list[Job]:
    """One field varied over its values in every cell; for the ratio, the cells are what varies."""
    sweep = plan.sweeps[parameter]
    jobs = []
    for value in sweep.values:
        for cell in plan.cells:
            config = dict(start.get(cell.name, {}))
            at = cell
            if parameter == RATIO:
                at = replace(cell, ratio=value)
            else:
                config[parameter] = value
            name = f"{parameter}={value}"
            jobs.append(_job(f"sweep:{parameter}", at, name, config, sweep.seeds, plan.features.main, folders))
    return jobs


def ablation_jobs(plan: Plan, folders: Folders, start: Configs) -> list[Job]:
    """The full model (`full`) and its variants in every cell."""
    if plan.ablate is None:
        return []
    ablations = load_model(plan.model).ABLATIONS
    jobs = []
    for cell in plan.cells:
        config = start.get(cell.name, {})
        jobs.append(_job("ablate", cell, "full", config, plan.ablate.seeds, plan.features.main, folders))
        for name in plan.ablate.variants:
            feature_set = ablations[name].features or plan.features.main
            changed = {**config, **ablations[name].config}
            jobs.append(_job("ablate", cell, name, changed, plan.ablate.seeds, feature_set, folders))
    return jobs


def score_jobs(plan: Plan, folders: Folders, best: Configs) -> list[Job]:
    """The best configuration of every cell, on test."""
    if plan.score is None:
        return []
    return [
        _job("score", cell, "best", best.get(cell.name, {}), plan.score.seeds, plan.features.main, folders, score=True)
        for cell in plan.cells
    ]


def predictor_jobs(plan: Plan, part: str, folders: Folders) -> list[Job]:
    """The simple predictors that stand beside a part's trials; they have no seed, so one run is all there is.

    With the scores all of them, on test; with a sweep of the ratio the bar alone, for it knows the ratio's training data.
    """
    task_type = plan.task_type
    if part == "score" and plan.score:
        names, cells = task_type.predictors, plan.cells
    elif part == f"sweep:{RATIO}" and RATIO in plan.sweeps:
        names = (task_type.reference,)
        cells = [replace(cell, ratio=value) for value in plan.sweeps[RATIO].values for cell in plan.cells]
    else:
        return []
    return [
        _job(part, cell, f"{PREDICTOR}{name}", {"predictor": name}, (-1,), plan.features.main, folders, part == "score")
        for cell in cells
        for name in names
    ]


def part_names(plan: Plan) -> list[str]:
    """Parts that train, in the order of `study run`."""
    names = ["search"] if plan.search else []
    names += [f"sweep:{parameter}" for parameter in plan.sweeps]
    return names + (["ablate"] if plan.ablate else []) + (["score"] if plan.score else [])


def planned(plan: Plan) -> dict[str, list[Job]]:
    """Every job of every part by name only, without folders or configurations."""

    def nowhere(cell: Cell, feature_set: str) -> None:
        return None

    jobs = {"search": search_jobs(plan, nowhere)}
    jobs |= {f"sweep:{parameter}": sweep_jobs(plan, parameter, nowhere, {}) for parameter in plan.sweeps}
    jobs["ablate"] = ablation_jobs(plan, nowhere, {})
    jobs["score"] = score_jobs(plan, nowhere, {})
    return {part: [*jobs[part], *predictor_jobs(plan, part, nowhere)] for part in part_names(plan)}


def _job(
    part: str, cell: Cell, name: str, config: Mapping[str, Any] | None, seeds: tuple[int, ...], feature_set: str,
    folders: Folders, score: bool = False,
) -> Job:  # fmt: skip
    found = folders(cell, feature_set)
    return Job(
        part=part, cell=cell, name=name, config=config, seeds=seeds, features=feature_set, score=score,
        task_dir=str(found.task_dir) if found else "",
        test_dir=(str(found.test_dir) if found else "") if score else None,
    )  # fmt: skip
