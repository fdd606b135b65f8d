"""Whether the thousandth trial costs more than the first, and what the driver's memory does meanwhile.

    python tests/benchmarks/bench_many_trials.py [--trials 1000] [--cells 1] [--rows 1] [--concurrent 2]

Trivial trials of three epochs through run_jobs (Ray Tune, TPE in a journal, MLflow in SQLite). All time is overhead.
Prints for each tenth of the trials: seconds of wall and of driver CPU per trial, and the driver's resident memory.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import resource
import sys
import tempfile
import time
from pathlib import Path

FAKES = Path(__file__).parents[1] / "study" / "fakes"
SPACE = """
v:
  x: {FloatDistribution: {low: 0.0, high: 1.0}}
  lr: {FloatDistribution: {low: 1.0e-5, high: 1.0, log: true}}
  depth: {IntDistribution: {low: 1, high: 8}}
  act: {CategoricalDistribution: {choices: [tanh, relu, softmax]}}
"""


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def measure(home: Path, trials: int, cells: int, rows: int, concurrent: int) -> list[tuple[float, float, float]]:
    """(wall, driver CPU, MiB) when the first trial has started and after each that ended."""
    from search_spaces import load_space
    from study.engine.run import Progress, run_jobs
    from study.specs import Cell, Cluster, Job, Recipe, RowRecipe, SearchSpec, trial_name
    from trainables.interface import Selection

    (home / "space.yaml").write_text(SPACE)
    marks: list[tuple[float, float, float]] = []
    done = -1

    def progress(state: Progress) -> None:
        nonlocal done
        if state.done > done and state.running:
            usage = resource.getrusage(resource.RUSAGE_SELF)
            marks.append((time.perf_counter(), usage.ru_utime + usage.ru_stime, resident_mib()))
            done = state.done

    row = RowRecipe(
        trainable="fake_trial:run", model="fake", base={"epochs": 3, "seconds": 0.0, "fail": ""},
        space=load_space(f"{home}/space.yaml/v", ["x", "lr", "depth", "act"]),
        search=SearchSpec(trials=trials // cells // rows, seeds=(0,)),
    )  # fmt: skip
    names = [f"row{number}" for number in range(rows)]
    jobs = [
        Job(
            part="search", cell=Cell(source="a", target="b", ratio=(cell + 1) / cells), row=name, model="fake",
            name=trial_name(number), config=None, seeds=(0,), feature_set="m", task_dir=str(home),
        )
        for number in range(trials // cells // rows)
        for cell in range(cells)
        for name in names
    ]  # fmt: skip
    recipe = Recipe(
        experiment="many", home=home, rows=dict.fromkeys(names, row), selection=Selection("val_rmse", "minimize"),
        cluster=Cluster(max_concurrent=concurrent),
    )  # fmt: skip
    run_jobs(recipe, jobs, progress)
    return marks


def main() -> None:
    """Run and print a line per tenth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--cells", type=int, default=1)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--concurrent", type=int, default=2)
    parser.add_argument("--profile", action="store_true", help="print where the driver's main thread spends its time")
    args = parser.parse_args()
    sys.path.insert(0, str(FAKES))
    paths = [str(FAKES), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # by which Ray's workers find the fakes
    profile = cProfile.Profile()
    with tempfile.TemporaryDirectory() as folder:
        if args.profile:
            profile.enable()
        marks = measure(Path(folder), args.trials, args.cells, args.rows, args.concurrent)
        profile.disable()
    tenth = (len(marks) - 1) // 10
    print(f"{args.trials} trials of {args.rows} rows in {args.cells} cells, {args.concurrent} side by side")
    for start in range(0, 10 * tenth, tenth):
        (wall, cpu, _), (wall_end, cpu_end, memory) = marks[start], marks[start + tenth]
        print(
            f"trials {start + 1:5d} to {start + tenth:5d}: {(wall_end - wall) / tenth:.3f} s, driver CPU "
            f"{(cpu_end - cpu) / tenth:.3f} s a trial; {memory:.0f} MiB"
        )
    if args.profile:
        pstats.Stats(profile).sort_stats("cumulative").print_stats(70)


if __name__ == "__main__":
    main()
