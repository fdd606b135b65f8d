"""The report of a large study: `python tests/benchmarks/bench_report.py [trials] [epochs]`.

Rows go into MLflow's tables directly (5,000 trials of 100 epochs would take hours to log); the report reads them as it
reads any store. Prints seconds of the whole report and of one figure, each in a process of its own, what of them is spent
before the first run is read (importing torch, MLflow, matplotlib), and peak memory.
"""

from __future__ import annotations

import resource
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from mlflow import MlflowClient

CELLS = [(f"{source}->{target}", ratio) for source, target in (("books", "movies"), ("movies", "books"))
         for ratio in (0.2, 0.5, 0.8)]  # fmt: skip


def fill(folder: Path, trials: int, epochs: int) -> str:
    """A store with `trials` finished search trials over six cells; returns its address."""
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    experiment = MlflowClient(uri).create_experiment("large", artifact_location=str(folder / "artifacts"))
    rng = np.random.default_rng(0)
    with sqlite3.connect(folder / "mlflow.db") as base:
        for number in range(trials):
            task, ratio = CELLS[number % len(CELLS)]
            run, cell, start = f"{number:032x}", f"{task}@{ratio:g}", 1_000 * number
            base.execute(
                "insert into runs (run_uuid, name, status, start_time, end_time, lifecycle_stage, artifact_uri,"
                " experiment_id, source_type, user_id) values (?, ?, 'FINISHED', ?, ?, 'active', ?, ?, 'LOCAL', 'bench')",
                (run, f"search {cell}", start, start + 60_000, str(folder / "artifacts" / run), int(experiment)),
            )
            name = f"{number // len(CELLS):04d}"
            tags = {
                "part": "search",
                "cell": cell,
                "task": task,
                "ratio": f"{ratio:g}",
                "trial": f"search/{cell}/{name}",
            }
            base.executemany(
                "insert into tags (key, value, run_uuid) values (?, ?, ?)",
                [(f"study.{k}", v, run) for k, v in tags.items()],
            )
            lr, dropout, steps = 10 ** rng.uniform(-5, -3), rng.uniform(0.1, 0.5), int(rng.integers(2, 51))
            params = {"lr": lr, "dropout": dropout, "steps": steps, "task": task, "ratio": ratio, "seeds": "0"}
            base.executemany(
                "insert into params (key, value, run_uuid) values (?, ?, ?)",
                [(k, str(v), run) for k, v in params.items()],
            )
            rmse = 0.9 - 0.02 * np.log10(lr) + 0.1 * dropout + rng.normal(0, 0.01)
            last = {"val_rmse": rmse, "val_ndcg20": 1.5 - rmse, "val_rmse/seed_0": rmse, "seconds": 20.0 + steps}
            curve = rmse + np.exp(-np.arange(epochs) / 10)
            series = [("epoch/val_rmse", float(v), start + k, k) for k, v in enumerate(curve)]
            series += [("epoch/train_loss", float(v), start + k, k) for k, v in enumerate(curve)]
            rows = [(k, float(v), start, 0) for k, v in last.items()]
            columns = "(key, value, timestamp, step, run_uuid, is_nan)"
            base.executemany(f"insert into metrics {columns} values (?, ?, ?, ?, '{run}', 0)", rows + series)
            newest = [*rows, series[epochs - 1], series[-1]]
            base.executemany(f"insert into latest_metrics {columns} values (?, ?, ?, ?, '{run}', 0)", newest)
    return uri


BEGIN = """
import sys, time
from pathlib import Path
from study.report.make import redraw, report
from study.subject import subject_of
from study.tracking.runs import connect
uri, out = sys.argv[1], Path(sys.argv[2])
connect(uri).get_experiment_by_name("large")
start = time.perf_counter()
{call}
print(time.perf_counter() - start)
"""


def timed(call: str, *words: str) -> tuple[float, float, float]:
    """Seconds of a Python process, of the call in it alone, and the peak memory of all processes so far in MiB."""
    start = time.perf_counter()
    words = (sys.executable, "-W", "ignore", "-c", BEGIN.format(call=call), *words)
    ran = subprocess.run(words, check=True, capture_output=True, text=True)
    took = time.perf_counter() - start
    return took, float(ran.stdout.splitlines()[-1]), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def main() -> None:
    """Make the store, time one figure and the whole report."""
    trials, epochs = (int(word) for word in (*sys.argv[1:], "5000", "100")[:2])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        uri = fill(folder, trials, epochs)
        for what, call in (
            ("one figure", "redraw(uri, 'large', subject_of('music'), out, 'history')"),
            ("report", "report(uri, 'large', subject_of('music'), out)"),
        ):
            whole, alone, memory = timed(call, uri, str(folder / "out"))
            print(
                f"{trials} trials x {epochs} epochs: {what} {alone:.1f} s, {whole:.1f} s with the start of Python and all "
                f"imports, peak memory {memory:.0f} MiB",
                flush=True,
            )


if __name__ == "__main__":
    main()
