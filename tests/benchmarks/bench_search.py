"""Whether TPE that stops bad trials early beats random search of the same budget, through Ray, Optuna and MLflow.

    python tests/benchmarks/bench_search.py HOME [--seeds 20] [--whole 30]

The analytic objective of tests/study/fakes (conditional parameters, known optimum 0), per seed one study by TPE with ASHA
and one by random search, of `--whole` times the epochs of a whole trial each. Prints both distances to the optimum, and
Wilcoxon's paired test. What HOME already holds is not trained again, so it may be interrupted.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path

import numpy as np
from scipy.stats import wilcoxon

FAKES = Path(__file__).parents[1] / "study" / "fakes"
ASHA = {"pruner": "SuccessiveHalvingPruner", "pruner_args": {"min_resource": 1, "reduction_factor": 3}}


def search(home: Path, name: str, trials: int, seed: int, **how: object) -> None:
    """One study of one cell, finished."""
    import analytic

    from search_spaces import load_space
    from study.engine.run import run_jobs
    from study.specs import Cell, Job, Recipe, RowRecipe, SearchSpec, trial_name
    from trainables.interface import Selection

    (home / "space.yaml").write_text(analytic.SPACE)
    row = RowRecipe(
        trainable="analytic:run", model="fake",
        base={"method": "plain", "lr": 0.1, "depth": 4, "decay": 0.5, "cut": 0.0, "epochs": analytic.EPOCHS},
        space=load_space(f"{home}/space.yaml/v", analytic.FIELDS),
        search=SearchSpec(trials=trials, seeds=(0, 1), seed=seed, **how),  # type: ignore[arg-type]
    )  # fmt: skip
    jobs = [
        Job(
            part="search", cell=Cell(source="books", target="movies", ratio=0.2), row="row", model="fake",
            name=trial_name(number), config=None, seeds=(0, 1), feature_set="m", task_dir=str(home),
        )
        for number in range(trials)
    ]  # fmt: skip
    run_jobs(Recipe(experiment=name, home=home, rows={"row": row}, selection=Selection("val_rmse", "minimize")), jobs)


def best_within(home: Path, name: str, budget: int) -> float:
    """The best finished result by the time so many epochs were trained, less the optimum; equal in both stores."""
    import analytic
    import optuna

    from study.engine.optuna_storage import open_journal
    from study.tracking import runs as tracking
    from study.tracking import tags

    storage = open_journal(home / "optuna" / f"{name}.log")
    (study,) = optuna.get_all_study_names(storage)
    client = tracking.connect(tracking.default_uri(home))
    experiment = client.get_experiment_by_name(name)
    logged = {
        run.data.tags[tags.TRIAL][-4:]: run
        for run in tracking.find_runs(client, experiment.experiment_id)
        if tags.TRIAL in run.data.tags
    }
    spent, best = 0, math.inf
    for trial in optuna.load_study(study_name=study, storage=storage).trials:
        run = logged[f"{trial.number:04d}"]
        finished = trial.state == optuna.trial.TrialState.COMPLETE
        assert (run.info.status == "FINISHED") == finished
        assert (tags.PRUNED in run.data.tags) == (trial.state == optuna.trial.TrialState.PRUNED)
        spent += analytic.EPOCHS if finished else trial.last_step or 0
        if finished and spent <= budget:
            assert trial.value == run.data.metrics["val_rmse"]
            best = min(best, trial.value - analytic.OPTIMUM)
    return best


def main() -> None:
    """Run what is left, print the pairs and the test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("home", type=Path)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--whole", type=int, default=30, help="the budget, in whole trials")
    args = parser.parse_args()
    sys.path.insert(0, str(FAKES))
    paths = [str(FAKES), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # by which Ray's workers find the fakes
    import analytic

    home, budget = args.home, args.whole * analytic.EPOCHS
    home.mkdir(parents=True, exist_ok=True)
    pairs = []
    for seed in range(args.seeds):
        search(home, f"tpe-{seed}", 2 * args.whole, seed, **ASHA)
        search(home, f"random-{seed}", args.whole, seed, sampler="RandomSampler")
        pairs.append([best_within(home, f"{name}-{seed}", budget) for name in ("tpe", "random")])
        print(f"seed {seed:2d}: TPE with ASHA {pairs[-1][0]:.4f}, random {pairs[-1][1]:.4f}", flush=True)
    tpe, by_chance = np.array(pairs).T
    test = wilcoxon(tpe, by_chance, alternative="less")
    print(
        f"distance to the optimum at {budget} epochs, median of {args.seeds} seeds: TPE with ASHA {np.median(tpe):.4f}, "
        f"random {np.median(by_chance):.4f}; TPE better in {int((tpe < by_chance).sum())}; Wilcoxon p = {test.pvalue:.2g}"
    )


if __name__ == "__main__":
    main()
