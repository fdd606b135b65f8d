"""A driver for the chaos test: `python drive_cells.py HOME ADDRESS PART CELLS TRIALS EPOCHS SECONDS CHECKPOINT_SECONDS`.

The parts are `search`, of a subject and a rival, and `score`, of both and a simple baseline.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import drive

from study.engine.run import run_jobs
from study.specs import Cell, Cluster, Faults, Job

ROWS = ("subject", "rival")
BASELINE_ROW = "item_mean"
SEEDS = (0, 1, 2)


def cells_of(count: int) -> list[Cell]:
    """Cells of one task at several ratios."""
    return [Cell(source="books", target="movies", ratio=(index + 1) / 10) for index in range(count)]


def score_jobs(home: Path, cells: list[Cell]) -> list[Job]:
    """Both rows with a fixed configuration, and the baseline."""
    rows = [
        replace(drive.fixed_job(home, "test", part="score", row=row, cell=cell, x=0.25), seeds=SEEDS)
        for cell in cells
        for row in ROWS
    ]
    return rows + [drive.baseline_job(home, BASELINE_ROW, cell=cell) for cell in cells]


if __name__ == "__main__":
    home, address, part = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    count, trials, epochs = map(int, sys.argv[4:7])
    seconds, interval = map(float, sys.argv[7:9])
    cells = cells_of(count)
    searched = part == "search"
    summary = run_jobs(
        drive.recipe(
            home, ROWS, search={"trials": trials, "seeds": SEEDS} if searched else None,
            base={"x": 0.5, "epochs": epochs, "seconds": seconds, "fail": ""},
            baselines=() if searched else (BASELINE_ROW,),
            cluster=Cluster(address=address, max_concurrent=3),
            faults=Faults(max_failures=20, checkpoint_seconds=interval),
        ),
        drive.search_jobs(home, trials, ROWS, cells, SEEDS) if searched else score_jobs(home, cells),
    )  # fmt: skip
    sys.exit(1 if summary.failures else 0)
