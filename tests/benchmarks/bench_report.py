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
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from mlflow import MlflowClient

CELLS = [(f"{source}->{target}", ratio) for source, target in (("books", "movies"), ("movies", "books"))
         for ratio in (0.2, 0.5, 0.8)]  # fmt: skip
USERS = 300
COMPARED = [
    *(("sweep:steps", "music", f"steps={steps}") for steps in (2, 5, 10, 20, 50)),
    *(("sweep:activation", "music", f"activation={name}") for name in ("tanh", "relu", "softmax")),
    *(("ablate", "music", name) for name in ("full", "wo_mllm", "wo_diffusion", "wo_side")),
    *(("score", row, "test") for row in ("music", "global_mean", "item_mean", "source_offset")),
]  # part, row and name of what each cell has beside its search


def fill(folder: Path, trials: int, epochs: int) -> str:
    """A store with `trials` finished trials over six cells; returns its address.

    In each cell two sweeps, the ablations and the scores, of 3 seeds with their users' rows; all others are search trials.
    """
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    experiment = MlflowClient(uri).create_experiment("large", artifact_location=str(folder / "artifacts"))
    rng = np.random.default_rng(0)
    with sqlite3.connect(folder / "mlflow.db") as base:
        for number in range(trials):
            cell, place = CELLS[number % len(CELLS)], number // len(CELLS)
            lr, dropout, steps = 10 ** rng.uniform(-5, -3), rng.uniform(0.1, 0.5), int(rng.integers(2, 51))
            rmse = 0.9 - 0.02 * np.log10(lr) + 0.1 * dropout + rng.normal(0, 0.01)
            params: dict[str, object] = {
                "lr": lr,
                "dropout": dropout,
                "steps": steps,
                "activation": "tanh",
                "seeds": "0",
            }
            searched = ("search", "music", f"{place - len(COMPARED):04d}")
            part, row, name = COMPARED[place] if place < len(COMPARED) else searched
            if part != "search":
                field, _, value = name.partition("=")
                params |= {"seeds": "0,1,2"} | ({field: value} if value else {})
            run = f"{number:032x}"
            _log(base, folder / "artifacts" / run, int(experiment), number, cell, (part, row, name), params)
            seeds = {seed: rmse + rng.normal(0, 0.005) for seed in range(1 if part == "search" else 3)}
            if part != "search":
                rows = _rows(rng, seeds)
                for file in ("val_per_user.csv", "per_user.csv")[: 1 + (part == "score")]:
                    (folder / "artifacts" / run).mkdir(parents=True, exist_ok=True)
                    rows.to_csv(folder / "artifacts" / run / file, index=False)
            last = {"val_rmse": rmse, "val_mae": 0.8 * rmse, "val_ndcg20": 1.5 - rmse, "seconds": 20.0 + steps}
            last |= {
                f"val_{k}/seed_{seed}": v * f for seed, v in seeds.items() for k, f in (("rmse", 1.0), ("mae", 0.8))
            }
            _measure(base, run, 1_000 * number, last, rmse + np.exp(-np.arange(epochs) / 10))
    return uri


def _log(
    base: sqlite3.Connection, artifacts: Path, experiment: int, number: int, place: tuple[str, float],
    trial: tuple[str, str, str], params: Mapping[str, object],
) -> None:  # fmt: skip
    """Write the run of a trial, (part, row, name), without its metrics."""
    (task, ratio), (part, row, name), run, start = place, trial, artifacts.name, 1_000 * number
    cell = f"{task}@{ratio:g}"
    base.execute(
        "insert into runs (run_uuid, name, status, start_time, end_time, lifecycle_stage, artifact_uri,"
        " experiment_id, source_type, user_id) values (?, ?, 'FINISHED', ?, ?, 'active', ?, ?, 'LOCAL', 'bench')",
        (run, f"{part} {cell}", start, start + 60_000, str(artifacts), experiment),
    )
    tags = {"part": part, "cell": cell, "task": task, "ratio": f"{ratio:g}", "trial": f"{part}/{cell}/{row}/{name}"}
    tags |= {"row": row, "model": row if row == "music" else "baseline", "variant": name.partition("=")[2] or name}
    base.executemany(
        "insert into tags (key, value, run_uuid) values (?, ?, ?)", [(f"study.{k}", v, run) for k, v in tags.items()]
    )
    base.executemany(
        "insert into params (key, value, run_uuid) values (?, ?, ?)",
        [(k, str(v), run) for k, v in {**params, "task": task, "ratio": ratio}.items()],
    )


def _measure(
    base: sqlite3.Connection, run: str, start: int, last: Mapping[str, float], curve: npt.NDArray[np.float64]
) -> None:
    """A trial's final metrics and its epochs."""
    series = [("epoch/val_rmse", float(v), start + k, k) for k, v in enumerate(curve)]
    series += [("epoch/train_loss", float(v), start + k, k) for k, v in enumerate(curve)]
    rows = [(k, float(v), start, 0) for k, v in last.items()]
    columns = "(key, value, timestamp, step, run_uuid, is_nan)"
    base.executemany(f"insert into metrics {columns} values (?, ?, ?, ?, '{run}', 0)", rows + series)
    newest = [*rows, series[len(curve) - 1], series[-1]]
    base.executemany(f"insert into latest_metrics {columns} values (?, ?, ?, ?, '{run}', 0)", newest)


def _rows(rng: np.random.Generator, seeds: Mapping[int, float]) -> pd.DataFrame:
    """What each user contributes to an RMSE of about that of the seed."""
    frames = []
    for seed, rmse in seeds.items():
        error = np.abs(rng.normal(0, rmse, (USERS, 8)))
        known = {"n": 8, "sum_abs_error": error.sum(axis=1), "sum_squared_error": (error**2).sum(axis=1), "ndcg20": 0.9}
        frames.append(pd.DataFrame({"seed": seed, "user": range(USERS), **known}))
    return pd.concat(frames)


BEGIN = """
import sys, time
from pathlib import Path
from study.report.report import redraw, report
from study.labels import labels_of
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
            ("one figure", "redraw(uri, 'large', labels_of('music'), out, 'history')"),
            ("report", "report(uri, 'large', labels_of('music'), out)"),
        ):
            whole, alone, memory = timed(call, uri, str(folder / "out"))
            print(
                f"{trials} trials x {epochs} epochs: {what} {alone:.1f} s, {whole:.1f} s with the start of Python and all "
                f"imports, peak memory {memory:.0f} MiB",
                flush=True,
            )


if __name__ == "__main__":
    main()
