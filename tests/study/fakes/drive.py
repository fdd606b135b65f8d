"""A driver in a process of its own, for tests that kill it: `python drive.py HOME TRIALS SECONDS CONCURRENT`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from search_spaces import load_space
from study.engine.run import Progress, RunSummary, run_jobs
from study.specs import Cell, Cluster, Faults, Job, SearchSpec, trial_name

CELLS = tuple(Cell(source="books", target="movies", ratio=ratio) for ratio in (0.2, 0.5))
BASE = {"x": 0.5, "epochs": 4, "seconds": 0.0, "fail": ""}
SPACE = "v:\n  x: {FloatDistribution: {low: 0.0, high: 1.0}}\n"


def search_jobs(home: Path, trials: int) -> list[Job]:
    """`trials` drawn jobs in each of two cells; their tasks are empty folders."""
    jobs = []
    for cell in CELLS:
        task = home / "tasks" / cell.name
        task.mkdir(parents=True, exist_ok=True)
        jobs += [
            Job(
                part="search", cell=cell, name=trial_name(number), config=None, seeds=(0, 1), features="main",
                task_dir=str(task),
            )
            for number in range(trials)
        ]  # fmt: skip
    return jobs


def search(
    home: Path, trials: int, *, concurrent: int | None = None, how: Mapping[str, Any] | None = None, **base: Any
) -> RunSummary:
    """Run the search; every progress message is a line on stdout. `how`: fields of the SearchSpec."""
    (home / "space.yaml").write_text(SPACE)
    return run_jobs(
        experiment="study",
        home=home,
        jobs=search_jobs(home, trials),
        trainable="fake_door:run",
        model="fake",
        base={**BASE, **base},
        space=load_space(f"{home}/space.yaml/v", ["x"]),
        search=SearchSpec(trials=trials, seeds=(0, 1), seed=3, **(how or {})),
        selection=("val_rmse", "minimize"),
        cluster=Cluster(max_concurrent=concurrent),
        faults=Faults(max_failures=1, checkpoint_seconds=0),
        on_progress=show,
    )


def show(progress: Progress) -> None:
    print(f"{progress.done}/{progress.total} {sum(progress.running.values())}", flush=True)


if __name__ == "__main__":
    folder, trials, seconds, concurrent = sys.argv[1:]
    summary = search(Path(folder), int(trials), concurrent=int(concurrent), seconds=float(seconds))
    print(f"ran {summary.ran} failed {len(summary.failures)}", flush=True)
