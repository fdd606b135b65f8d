"""What Ray Tune, Optuna and MLflow add to a trial, beside the obvious use of the three, in one run.

    python tests/benchmarks/bench_overhead.py [--trials 20] [--long 30]

Trivial trials of 60 epochs that cost nothing, one at a time, so that all time is overhead:
  obvious   Tuner + OptunaSearch (in memory) + Ray's MLflowLoggerCallback (SQLite), one report per epoch
  ours      run_jobs
then one trial of `--long` seconds and 60 epochs through run_jobs: its overhead as a share, and the milliseconds that
the driver spends on each message of a worker. Start-up (Ray, first worker, tables of MLflow) is paid once and left out.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FAKES = Path(__file__).parents[1] / "study" / "fakes"
EPOCHS = 60
SPACE = "v:\n  x: {FloatDistribution: {low: 0.0, high: 1.0}}\n"


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def obvious_trial(config: dict[str, Any]) -> None:
    from ray import tune

    for epoch in range(1, EPOCHS + 1):
        loss = (config["x"] - 0.3) ** 2 + 1.0 / epoch
        tune.report({"val_rmse": loss, "train_loss": loss})


def obvious(home: Path, trials: int) -> tuple[float, float]:
    """Seconds of wall and of driver CPU per trial."""
    from ray import tune
    from ray.air.integrations.mlflow import MLflowLoggerCallback
    from ray.tune.search.optuna import OptunaSearch

    def run(count: int) -> None:
        callback = MLflowLoggerCallback(tracking_uri=f"sqlite:///{home}/obvious.db", experiment_name="obvious")
        tune.Tuner(
            tune.with_resources(obvious_trial, {"cpu": 1}),
            param_space={"x": tune.uniform(0.0, 1.0)},
            tune_config=tune.TuneConfig(
                search_alg=OptunaSearch(), num_samples=count, max_concurrent_trials=1, metric="val_rmse", mode="min"
            ),
            run_config=tune.RunConfig(storage_path=str(home / "obvious"), callbacks=[callback], verbose=0),
        ).fit()

    with contextlib.redirect_stdout(io.StringIO()):
        run(1)  # the tables of the store
        wall, cpu = time.perf_counter(), cpu_seconds()
        run(trials)
    return (time.perf_counter() - wall) / trials, (cpu_seconds() - cpu) / trials


def ours(home: Path, trials: int, seconds: float, name: str) -> list[tuple[float, float]]:
    """(wall, driver CPU) at the start of the first trial and at the end of each, trials one after the other."""
    from search_spaces import load_space
    from study.engine.run import Progress, run_jobs
    from study.specs import Cell, Cluster, Job, Recipe, RowRecipe, SearchSpec, trial_name
    from trainables.interface import Selection

    cell = Cell(source="a", target="b", ratio=0.5)
    (home / "space.yaml").write_text(SPACE)
    marks: list[tuple[float, float]] = []

    def progress(state: Progress) -> None:
        if state.running == (0 if marks else 1):
            marks.append((time.perf_counter(), cpu_seconds()))

    row = RowRecipe(
        trainable="fake_trial:run", model="fake", base={"x": 0.5, "epochs": EPOCHS, "seconds": seconds, "fail": ""},
        space=load_space(f"{home}/space.yaml/v", ["x"]), search=SearchSpec(trials=trials, seeds=(0,)),
    )  # fmt: skip
    jobs = [
        Job(
            part="search", cell=cell, row="row", model="fake", name=trial_name(number), config=None, seeds=(0,),
            feature_set="m", task_dir=str(home),
        )
        for number in range(trials)
    ]  # fmt: skip
    recipe = Recipe(
        experiment=name, home=home, rows={"row": row}, selection=Selection("val_rmse", "minimize"),
        cluster=Cluster(max_concurrent=1),
    )  # fmt: skip
    run_jobs(recipe, jobs, progress)
    return marks


def timed(function: Callable[..., str], spent: list[float]) -> Callable[..., str]:
    def wrapper(*args: Any, **kwargs: Any) -> str:
        began = time.perf_counter()
        answer = function(*args, **kwargs)
        spent.append(time.perf_counter() - began)
        return answer

    return wrapper


def main() -> None:
    """Run both and print the lines that the README shows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--long", type=float, default=30.0, help="seconds of the long trial")
    args = parser.parse_args()
    sys.path.insert(0, str(FAKES))
    paths = [str(FAKES), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # by which Ray's workers find the fakes
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        marks = ours(home, args.trials + 1, 0.0, "short")
        (wall, cpu), (wall_end, cpu_end) = marks[1], marks[-1]  # the first trial pays for its worker
        wall, cpu = (wall_end - wall) / args.trials, (cpu_end - cpu) / args.trials
        print(f"s per trivial trial of {EPOCHS} epochs: ours {wall:.2f}", flush=True)

        from study.engine.ray_tune import JobScheduler

        spent: list[float] = []
        JobScheduler.on_trial_result = timed(JobScheduler.on_trial_result, spent)  # type: ignore[method-assign]
        long_marks = ours(home, 2, args.long, "long")
        long = long_marks[2][0] - long_marks[1][0] - args.long
        messages = spent[len(spent) // 2 :]
        print(
            f"a trial of {args.long:g} s in {len(messages)} messages: {long:+.2f} s, {100 * long / args.long:.1f} % of it\n"
            f"driver, ms per message: mean {1e3 * sum(messages) / len(messages):.1f}, max {1e3 * max(messages):.1f}",
            flush=True,
        )
        slow_wall, slow_cpu = obvious(home, max(3, args.trials // 4))
    print(f"s per trivial trial: obvious {slow_wall:.2f}, ours {wall:.2f}: {slow_wall / wall:.1f}x")
    print(
        f"driver CPU, ms per epoch: ours {1e3 * cpu / EPOCHS:.2f}, obvious {1e3 * slow_cpu / EPOCHS:.1f}: "
        f"{slow_cpu / cpu:.0f}x"
    )


if __name__ == "__main__":
    main()
