"""A study on three nodes whose driver, trials and nodes are killed at random, and what must hold of it in the end.

    python -m tests.study.chaos [--kills 20] [--seed 0]

A search of two rows (subject and rival) in 4 cells x 4 configurations x 3 seeds, then scores of both and of a simple
baseline, trials of seconds. A kill is SIGKILL, SIGTERM or SIGINT of the driver, SIGKILL of a trial's process, or the end of
a raylet (another one comes). Prints each, and checks the stores trial by trial.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.patience import PATIENCE_S

FAKES = Path(__file__).parent / "fakes"
KINDS = ("SIGKILL", "SIGTERM", "SIGINT", "trial", "raylet")
ROWS, BASELINE_ROW = ("subject", "rival"), "item_mean"
PARTS = ("search", "score")
EPOCHS, EPOCH_S, CHECKPOINT_S = 8, 0.25, 0.5


@dataclass(frozen=True)
class Outcome:
    """What a study under fire came to."""

    kills: Mapping[str, int]
    trials: int
    """Those that are trained; the baseline's are not."""
    restarts: int
    again: int
    """Epochs that were trained more than once."""


def survive(home: Path, *, cells: int, trials: int, kinds: list[str], seed: int) -> Outcome:
    """Run the study through the kills, and check it."""
    from ray.cluster_utils import Cluster

    choice = random.Random(seed)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(3)]
    done: Counter[str] = Counter()
    parts = list(PARTS)
    driver = start(home, cluster.address, parts[0], cells, trials)
    try:
        for kind in kinds:
            seen = len(lines(home, "epochs.txt"))
            while len(lines(home, "epochs.txt")) < seen + 3 and driver.poll() is None:
                time.sleep(0.1)
            time.sleep(choice.random())
            if driver.poll() is not None:
                finish(driver, home)
                del parts[0]
                if not parts:
                    break
                driver = start(home, cluster.address, parts[0], cells, trials)
            if kind == "raylet":
                node = choice.choice(nodes)
                nodes.remove(node)
                cluster.remove_node(node, allow_graceful=False)
                nodes.append(cluster.add_node(num_cpus=1))
            elif kind == "trial":
                with contextlib.suppress(ProcessLookupError):  # which has ended since
                    os.kill(int(lines(home, "epochs.txt")[-1].split()[2]), signal.SIGKILL)
            else:
                driver.send_signal(getattr(signal, kind))
                driver.wait(timeout=PATIENCE_S)
                driver = start(home, cluster.address, parts[0], cells, trials)
            done[kind] += 1
            print(f"{time.strftime('%H:%M:%S')} {kind}, {len(lines(home, 'epochs.txt'))} epochs so far", flush=True)
        finish(driver, home)
        for part in parts[1:]:
            driver = start(home, cluster.address, part, cells, trials)
            finish(driver, home)
    finally:
        driver.kill()
        driver.wait()
        cluster.shutdown()
    trained = cells * (trials + 1) * len(ROWS)
    again = len(lines(home, "epochs.txt")) - trained * EPOCHS
    restarts = len(lines(home, "attempts.txt")) - trained
    check(home, cells, trials)
    return Outcome(dict(done), trained, restarts, again)


def finish(driver: subprocess.Popen[bytes], home: Path) -> None:
    """Wait for a driver that ends by itself, without a failed trial."""
    assert driver.wait(timeout=PATIENCE_S) == 0, (home / "driver.txt").read_text()[-3000:]


def start(home: Path, address: str, part: str, cells: int, trials: int) -> subprocess.Popen[bytes]:
    """A driver of the study in a process of its own."""
    words = [sys.executable, str(FAKES / "drive_cells.py"), str(home), address, part, str(cells), str(trials)]
    numbers = [str(EPOCHS), str(EPOCHS * EPOCH_S), str(CHECKPOINT_S)]
    with (home / "driver.txt").open("ab") as out:
        return subprocess.Popen([*words, *numbers], cwd=FAKES, stdout=out, stderr=subprocess.STDOUT)


def lines(home: Path, name: str) -> list[str]:
    """Lines of a file in all cells' folders, the file that was written last at the end."""
    paths = sorted((home / "tasks").glob(f"*/{name}"), key=lambda path: path.stat().st_mtime)
    return [line for path in paths for line in path.read_text().splitlines()]


def check(home: Path, cells: int, trials: int) -> None:
    """Every planned trial has one run, finished and equal in both stores; nothing is open or superseded."""
    import optuna

    from study.engine.optuna_storage import open_journal
    from study.tracking import runs as tracking
    from study.tracking import tags

    client = tracking.connect(tracking.default_uri(home))
    experiment = client.get_experiment_by_name("study")
    runs: dict[str, Any] = {}
    for run in tracking.find_runs(client, experiment.experiment_id, superseded=True):
        assert run.info.status == "FINISHED", (run.info.run_name, run.info.status)
        assert tags.SUPERSEDED not in run.data.tags
        if tags.TRIAL in run.data.tags:
            assert runs.setdefault(run.data.tags[tags.TRIAL], run) is run, "a trial has one run"
    assert len(runs) == cells * (trials * len(ROWS) + len(ROWS) + 1)
    storage = open_journal(home / "optuna" / "study.log")
    names = optuna.get_all_study_names(storage)
    assert len(names) == cells * len(ROWS)
    for name in names:
        cell, row, _ = name.split("/")
        drawn = optuna.load_study(study_name=name, storage=storage).trials
        assert len(drawn) == trials
        for trial in drawn:
            run = runs[f"search/{cell}/{row}/{trial.number:04d}"]
            assert trial.state == optuna.trial.TrialState.COMPLETE
            assert trial.value == run.data.metrics["val_rmse"]
            assert float(run.data.params["x"]) == trial.params["x"]
            assert (run.data.params["row"], run.data.params["model"]) == (row, row)
    for trial, run in runs.items():
        if run.data.params["row"] == BASELINE_ROW:
            assert run.data.metrics["val_rmse"] == 2.0
            continue
        assert run.data.params["seeds"] == "0,1,2"
        assert {f"val_rmse/seed_{seed}" for seed in range(3)} <= run.data.metrics.keys()
        steps = [entry.step for entry in client.get_metric_history(run.info.run_id, "epoch/val_rmse")]
        assert steps == list(range(1, EPOCHS + 1)), (trial, steps)


def main() -> None:
    """The whole test, and what it came to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    choice = random.Random(args.seed)
    kinds = [kind for _ in range(-(-args.kills // len(KINDS))) for kind in choice.sample(KINDS, len(KINDS))]
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        outcome = survive(Path(folder), cells=4, trials=4, kinds=kinds[: args.kills], seed=args.seed)
    shown = ", ".join(f"{count} {kind}" for kind, count in sorted(outcome.kills.items()))
    print(
        f"{sum(outcome.kills.values())} kills ({shown}) in {time.monotonic() - began:.0f} s: {outcome.trials} trials of "
        f"{EPOCHS} epochs and 3 seeds, each once and equal in Optuna and MLflow, none open; "
        f"{outcome.restarts} restarts, {outcome.again} epochs trained again"
    )


if __name__ == "__main__":
    main()
