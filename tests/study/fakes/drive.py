"""A driver in a process of its own, for tests that kill it: `python drive.py HOME TRIALS SECONDS CONCURRENT`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from search_spaces import load_space
from study.engine.run import Progress, RunSummary, run_jobs
from study.specs import BASELINE, Cell, Cluster, Faults, Job, Recipe, RowRecipe, SearchSpec, trial_name
from trainables.interface import Selection

CELLS = tuple(Cell(source="books", target="movies", ratio=ratio) for ratio in (0.2, 0.5))
SUBJECT = "subject"
SEEDS = (0, 1)
BASE = {"x": 0.5, "epochs": 4, "seconds": 0.0, "fail": ""}
SPACE = "v:\n  x: {FloatDistribution: {low: 0.0, high: 1.0}}\n"
SELECTION = Selection("val_rmse", "minimize")


def task_of(home: Path, cell: Cell) -> str:
    """Make the folder of a cell's task, which is empty, and return it."""
    task = home / "tasks" / cell.name
    task.mkdir(parents=True, exist_ok=True)
    return str(task)


def search_jobs(
    home: Path, trials: int, rows: Sequence[str] = (SUBJECT,), cells: Sequence[Cell] = CELLS, seeds: Sequence[int] = SEEDS
) -> list[Job]:  # fmt: skip
    """`trials` drawn jobs of each row in each cell."""
    return [
        Job(
            part="search", cell=cell, row=row, model=row, name=trial_name(number), config=None, seeds=tuple(seeds),
            feature_set="main", task_dir=task_of(home, cell),
        )
        for row in rows
        for cell in cells
        for number in range(trials)
    ]  # fmt: skip


def fixed_job(
    home: Path, name: str, part: str = "sweep:x", row: str = SUBJECT, cell: Cell = CELLS[0], **config: Any
) -> Job:
    """One job with a configuration."""
    return Job(
        part=part, cell=cell, row=row, model=row, name=name, config=config, seeds=(0,), feature_set="main",
        task_dir=task_of(home, cell),
    )  # fmt: skip


def baseline_job(home: Path, name: str, part: str = "score", cell: Cell = CELLS[0]) -> Job:
    """The job of a simple baseline, a row of its own."""
    return Job(
        part=part, cell=cell, row=name, model=BASELINE, name="test", config={BASELINE: name}, seeds=(-1,),
        feature_set="main", task_dir=task_of(home, cell),
    )  # fmt: skip


def recipe(
    home: Path, rows: Sequence[str] = (SUBJECT,), *, search: Mapping[str, Any] | None = None,
    base: Mapping[str, Any] = BASE, baselines: Sequence[str] = (), **fields: Any,
) -> Recipe:  # fmt: skip
    """The recipe of a part; with `search`, fields of a SearchSpec, the rows are drawn. `fields`: of the Recipe."""
    row: dict[str, Any] = {"trainable": "fake_trial:run", "base": base}
    if search is not None:
        (home / "space.yaml").write_text(SPACE)
        row["space"] = load_space(f"{home}/space.yaml/v", ["x"])
        row["search"] = SearchSpec(**{"trials": 1, "seeds": SEEDS, "seed": 3, **search})
    recipes = {name: RowRecipe(model=name, **row) for name in rows}
    recipes |= {name: RowRecipe(trainable="fake_trial:baseline", model=BASELINE, base={}) for name in baselines}
    given = {"faults": Faults(max_failures=1, checkpoint_seconds=0), **fields}
    return Recipe(experiment="study", home=home, rows=recipes, selection=SELECTION, **given)


def search(
    home: Path, trials: int, *, rows: Sequence[str] = (SUBJECT,), only: Sequence[str] | None = None,
    concurrent: int | None = None, how: Mapping[str, Any] | None = None, **base: Any,
) -> RunSummary:  # fmt: skip
    """Run the search of the rows (of those in `only`); every progress message is a line on stdout.

    `how`: fields of the SearchSpec.
    """
    planned = search_jobs(home, trials, rows)
    chosen = [job for job in planned if only is None or job.row in only]
    return run_jobs(
        recipe(
            home, rows, search={"trials": trials, **(how or {})}, base={**BASE, **base},
            cluster=Cluster(max_concurrent=concurrent), planned={job.trial for job in planned},
        ),
        chosen,
        show,
    )  # fmt: skip


def show(progress: Progress) -> None:
    print(f"{progress.done}/{progress.total} {progress.running}", flush=True)


if __name__ == "__main__":
    folder, trials, seconds, concurrent = sys.argv[1:]
    summary = search(Path(folder), int(trials), concurrent=int(concurrent), seconds=float(seconds))
    print(f"ran {summary.ran} failed {len(summary.failures)}", flush=True)
