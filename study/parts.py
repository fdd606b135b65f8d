"""The jobs of each part of a plan: what has to be trained, under which name. Pure functions; nothing runs here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from study.plan.schema import Plan, Row, ablated_rows, swept_rows
from study.specs import BASELINE, Cell, Job, trial_name
from trainables.interface import Variant, load_model
from trainables.tasks.arrays import TaskFolders

Folders = Callable[[Cell, str], TaskFolders | None]
"""(cell, feature set) -> its task, or None where only names are asked for."""
Configs = Mapping[tuple[str, str], Mapping[str, Any]]
"""(row, cell name) -> the configuration that a part starts from."""
TEST = "test"  # name of the jobs of the part `score`; the users of a part that is compared on them


def search_jobs(plan: Plan, folders: Folders) -> list[Job]:
    """Trials of the search of all rows; rows and cells take turns, so that none waits for another."""
    searched = [row for row in plan.rows if row.search is not None]
    most = max((row.search.trials for row in searched if row.search), default=0)
    return [
        _job(plan, folders, "search", row, cell, trial_name(number), None, row.search.seeds)
        for number in range(most)
        for cell in plan.cells
        for row in searched
        if row.search is not None and number < row.search.trials
    ]


def sweep_jobs(plan: Plan, parameter: str, folders: Folders, start: Configs) -> list[Job]:
    """One field varied over its values in every cell; for the cells' ratio, the cells are what varies."""
    sweep, part = plan.sweeps[parameter], f"sweep:{parameter}"
    jobs = []
    for value in sweep.values:
        for cell in plan.cells:
            for row in swept_rows(plan, parameter):
                config, at = dict(start.get((row.name, cell.name), {})), cell
                if parameter == plan.ratio_field:
                    at = replace(cell, ratio=value)
                else:
                    config[parameter] = value
                name, on_test = f"{parameter}={value}", sweep.compare == TEST
                jobs.append(_job(plan, folders, part, row, at, name, config, sweep.seeds, score=on_test))
    return jobs


def ablation_jobs(plan: Plan, folders: Folders, start: Configs) -> list[Job]:
    """The full model (`full`) and its variants in every cell, for each row that is ablated."""
    if plan.ablate is None:
        return []
    seeds, on_test = plan.ablate.seeds, plan.ablate.compare == TEST
    variants: dict[str, Variant] = {"full": Variant(), **load_model(plan.model).ABLATIONS}
    return [
        _job(
            plan, folders, "ablate", row, cell, name,
            {**start.get((row.name, cell.name), {}), **variants[name].config_of(row.preset)}, seeds,
            feature_set=variants[name].features, score=on_test,
        )
        for cell in plan.cells
        for row in ablated_rows(plan)
        for name in ("full", *plan.ablate.variants)
    ]  # fmt: skip


def score_jobs(plan: Plan, folders: Folders, best: Configs) -> list[Job]:
    """The best configuration of every row in every cell, on test."""
    if plan.score is None:
        return []
    return [
        _job(plan, folders, "score", row, cell, TEST, best.get((row.name, cell.name), {}), plan.score.seeds, score=True)
        for cell in plan.cells
        for row in plan.rows
    ]


def baseline_jobs(plan: Plan, part: str, folders: Folders) -> list[Job]:
    """The simple baselines that stand beside a part's trials; they have no seed, so one run is all there is.

    With the scores all of them, on test; with a sweep of the cells' ratio the reference alone, because its value changes
    with the training data.
    """
    task_type = plan.task_type
    if part == "score" and plan.score:
        names, places, on_test = plan.baselines, [(cell, TEST) for cell in plan.cells], True
    elif part == f"sweep:{plan.ratio_field}" and plan.ratio_field in plan.sweeps:
        names, on_test = (task_type.reference,), plan.sweeps[plan.ratio_field].compare == TEST
        places = [
            (replace(cell, ratio=value), f"{plan.ratio_field}={value}")
            for value in plan.sweeps[plan.ratio_field].values
            for cell in plan.cells
        ]
    else:
        return []
    jobs = []
    for cell, job_name in places:
        for name in names:
            row = Row(name=name, model=BASELINE, title=name, space=None, base={}, search=None, place="")
            jobs.append(_job(plan, folders, part, row, cell, job_name, {BASELINE: name}, (-1,), score=on_test))
    return jobs


def part_names(plan: Plan) -> list[str]:
    """Parts that train, in the order of `study run`."""
    names = ["search"] if plan.search else []
    names += [f"sweep:{parameter}" for parameter in plan.sweeps]
    return names + (["ablate"] if plan.ablate else []) + (["score"] if plan.score else [])


def part_jobs(plan: Plan, part: str, folders: Folders, start: Configs) -> list[Job]:
    """All jobs of a part, baselines first; `start`: the configurations that it starts from, read by all but the search."""
    makers: dict[str, Callable[[], list[Job]]] = {
        "search": partial(search_jobs, plan, folders),
        "ablate": partial(ablation_jobs, plan, folders, start),
        "score": partial(score_jobs, plan, folders, start),
    }
    swept = part.removeprefix("sweep:")
    make = makers.get(part) or partial(sweep_jobs, plan, swept, folders, start)
    return [*baseline_jobs(plan, part, folders), *make()]


def planned(plan: Plan) -> dict[str, list[Job]]:
    """Every job of every part by name only, without folders or configurations."""
    return {part: part_jobs(plan, part, lambda cell, feature_set: None, {}) for part in part_names(plan)}


def of_rows(jobs: Collection[Job], only: Collection[str]) -> list[Job]:
    """The jobs of these rows; all of them where no row is named."""
    return [job for job in jobs if not only or job.row in only]


def _job(
    plan: Plan, folders: Folders, part: str, row: Row, cell: Cell, name: str, config: Mapping[str, Any] | None,
    seeds: tuple[int, ...], feature_set: str | None = None, score: bool = False,
) -> Job:  # fmt: skip
    """`feature_set`: another than the plan's main one; `score`: the job opens test."""
    chosen = feature_set or plan.feature_set
    task = folders(cell, chosen)
    return Job(
        part=part, cell=cell, row=row.name, model=row.model, name=name, config=config, seeds=seeds, feature_set=chosen,
        preset=row.preset_tag, score=score, task_dir=str(task.task_dir) if task else "",
        test_dir=(str(task.test_dir) if task else "") if score else None,
    )  # fmt: skip
