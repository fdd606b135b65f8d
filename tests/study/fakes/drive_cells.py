"""A driver for the chaos test: `python drive_cells.py HOME ADDRESS CELLS TRIALS EPOCHS SECONDS CHECKPOINT_SECONDS`."""

from __future__ import annotations

import sys
from pathlib import Path

from search_spaces import load_space
from study.engine.run import run_jobs
from study.specs import Cell, Cluster, Faults, Job, SearchSpec, trial_name

SPACE = "v:\n  x: {FloatDistribution: {low: 0.0, high: 1.0}}\n"


def jobs(home: Path, cells: int, trials: int) -> list[Job]:
    """Drawn jobs of three seeds; cells take turns."""
    found = []
    for number in range(trials):
        for index in range(cells):
            cell = Cell(source="books", target="movies", ratio=(index + 1) / 10)
            task = home / "tasks" / cell.name
            task.mkdir(parents=True, exist_ok=True)
            found.append(
                Job(
                    part="search", cell=cell, name=trial_name(number), config=None, seeds=(0, 1, 2), features="main",
                    task_dir=str(task),
                )
            )  # fmt: skip
    return found


if __name__ == "__main__":
    home, address = Path(sys.argv[1]), sys.argv[2]
    cells, trials, epochs = map(int, sys.argv[3:6])
    seconds, interval = map(float, sys.argv[6:8])
    space = home / "space.yaml"
    space.write_text(SPACE)
    summary = run_jobs(
        experiment="study", home=home, jobs=jobs(home, cells, trials), trainable="fake_door:run", model="fake",
        base={"x": 0.5, "epochs": epochs, "seconds": seconds, "fail": ""}, space=load_space(f"{space}/v", ["x"]),
        search=SearchSpec(trials=trials, seeds=(0, 1, 2), seed=3), selection=("val_rmse", "minimize"),
        cluster=Cluster(address=address, max_concurrent=3),
        faults=Faults(max_failures=20, checkpoint_seconds=interval),
    )  # fmt: skip
    sys.exit(1 if summary.failures else 0)
