"""What a search makes of its trials: stopped early, several objectives, budgets, failures; and that it is any good."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState
from scipy.stats import wilcoxon

from search_spaces import Space, load_space
from study.engine.ledger import Ledger
from study.engine.optuna_storage import open_journal
from study.engine.worker import reset
from study.specs import Budget, Objective, SearchSpec

from .. import inline
from ..inline import MemoryTracker, analytic

BASE = {"method": "plain", "lr": 0.1, "depth": 4, "decay": 0.5, "cut": 0.0, "epochs": analytic.EPOCHS}
ASHA = {"pruner": "SuccessiveHalvingPruner", "pruner_args": {"min_resource": 1, "reduction_factor": 3}}
MEDIAN = {"pruner": "MedianPruner", "pruner_args": {"n_startup_trials": 4, "n_warmup_steps": 1}}


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Space:
    folder = tmp_path_factory.mktemp("space")
    (folder / "space.yaml").write_text(analytic.SPACE)
    return load_space(f"{folder}/space.yaml/v", analytic.FIELDS)


def spec(trials: int = 16, **fields: Any) -> SearchSpec:
    return SearchSpec(trials=trials, seeds=(0, 1, 2), **fields)


def search(space: Space, search: SearchSpec, **how: Any) -> tuple[Ledger, MemoryTracker, list[Any]]:
    """Run a search; returns what ran, what MLflow would hold, and Optuna's trials."""
    storage, tracker = how.pop("storage", None) or InMemoryStorage(), how.pop("tracker", None) or MemoryTracker()
    base = {**BASE, **how.pop("base", {})}
    how.setdefault("folder", Path(space.name).parents[1])
    ledger = inline.search(storage=storage, tracker=tracker, space=space, spec=search, base=base, **how)
    (name,) = optuna.get_all_study_names(storage)
    return ledger, tracker, optuna.load_study(study_name=name, storage=storage).trials


@pytest.mark.parametrize("pruner", [ASHA, MEDIAN], ids=["asha", "median"])
def test_stopped_trials_are_pruned_in_both_stores(space: Space, pruner: dict[str, Any]) -> None:
    ledger, tracker, trials = search(space, spec(**pruner))
    assert (ledger.complete, ledger.failures) == (True, ())
    states = {trial.state for trial in trials}
    assert states == {TrialState.COMPLETE, TrialState.PRUNED}
    for trial in trials:
        run = tracker.run(trial.number)
        epochs = tracker.epochs[run.trial]
        assert list(trial.intermediate_values) == epochs == list(range(1, len(epochs) + 1))
        if trial.state == TrialState.COMPLETE:
            assert (run.status, run.metrics["val_rmse"]) == ("FINISHED", trial.value)
            assert trial.user_attrs["replicates"] == {"std": 0.01, "count": 3}
        else:
            assert (run.status, run.pruned, run.metrics) == ("KILLED", True, {})
            assert run.reason == f"after epoch {epochs[-1]} by {pruner['pruner']}"
            assert trial.value == trial.intermediate_values[epochs[-1]]
    best = min(run.metrics["val_rmse"] for run in tracker.all_runs if run.status == "FINISHED")
    cell = ledger._cells[inline.KEY]
    assert (cell.best, cell.planned, cell.ended, cell.failed) == (best, 16, 16, 0), "no pruned trial is ever the best"
    again, _, _ = search(space, spec(**pruner), tracker=tracker, storage=ledger._studies.cells[inline.KEY]._storage)
    assert again._decision.todo == ()
    assert again._cells == ledger._cells


def test_optuna_s_own_loop_stops_the_same_trials(space: Space) -> None:
    """The reference: ask, report every epoch, should_prune, tell."""
    _, _, ours = search(space, spec(30, **ASHA, sampler="RandomSampler"))
    study = optuna.create_study(pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3))
    for trial in ours:
        theirs = study.ask()
        stopped = False
        config = {**BASE, **trial.params}
        for report in analytic.run("", config, "", (0,)):
            if not report.final and not stopped:
                theirs.report(report.metrics["val_rmse"], report.epoch)
                stopped = theirs.should_prune()
        study.tell(theirs, None if stopped else analytic.value(config), state=TrialState(2 if stopped else 1))
    assert [trial.state for trial in study.trials] == [trial.state for trial in ours]
    assert [trial.last_step for trial in study.trials] == [trial.last_step for trial in ours]


@pytest.mark.parametrize("pruner", [ASHA, MEDIAN], ids=["asha", "median"])
def test_how_epochs_come_in_messages_changes_nothing(space: Space, pruner: dict[str, Any]) -> None:
    one, three, whole = (
        [(t.params, t.state, t.value, t.intermediate_values) for t in search(space, spec(**pruner), batch=size)[2]]
        for size in (1, 3, 100)
    )
    assert one == three == whole


@pytest.mark.parametrize("pruner", [ASHA, MEDIAN], ids=["asha", "median"])
def test_the_best_of_an_interrupted_search_is_that_of_an_uninterrupted_one(
    tmp_path: Path, space: Space, pruner: dict[str, Any]
) -> None:
    def results(trials: list[Any]) -> list[Any]:
        return [(trial.params, trial.state, trial.value, trial.intermediate_values) for trial in trials]

    _, whole_tracker, whole = search(space, spec(**pruner))
    tracker = MemoryTracker()
    for die_at in ((2, 1), (0, 2), (3, 3), (1, 1), None):
        storage = open_journal(tmp_path / "study.log")
        ledger, _, parts = search(space, spec(**pruner), storage=storage, tracker=tracker, batch=2, die_at=die_at)
    assert ledger.complete
    assert results(parts) == results(whole)
    best = [
        min((run.metrics["val_rmse"], run.trial) for run in t.all_runs if run.status == "FINISHED")
        for t in (tracker, whole_tracker)
    ]
    assert best[0] == best[1]


def test_what_a_dead_driver_closed_in_mlflow_is_told_to_optuna(space: Space) -> None:
    """It was killed between the two."""
    ledger, tracker, trials = search(space, spec(**ASHA))
    fresh = InMemoryStorage()
    search(space, spec(**ASHA), storage=fresh, die_at=(0, 1))
    (trial,) = (trial for trial in tracker.runs if trial.endswith("0000"))
    closed = MemoryTracker({trial: [replace(tracker.runs[trial][0], status="KILLED", pruned=True, metrics={})]})
    ledger, _, trials = search(space, spec(**ASHA), storage=fresh, tracker=closed, trials=1)
    assert (ledger.ran, trials[0].state) == (0, TrialState.PRUNED)


def test_several_objectives(space: Space) -> None:
    both = (Objective(metric="val_rmse", direction="minimize"), Objective(metric="val_cost", direction="minimize"))
    _, tracker, trials = search(
        space, spec(20, objectives=both, sampler="NSGAIISampler", sampler_args={"population_size": 5})
    )
    for trial in trials:
        metrics = tracker.run(trial.number).metrics
        assert trial.values == [metrics["val_rmse"], metrics["val_cost"]]
    missing = (both[0], Objective(metric="val_nothing", direction="maximize"))
    ledger, _, trials = search(space, spec(2, objectives=missing))
    assert [trial.state for trial in trials] == [TrialState.FAIL] * 2
    assert ledger.failures[0].reason == "KeyError: 'val_nothing'"


def test_a_nan_is_a_failed_trial_in_both_stores(space: Space) -> None:
    ledger, tracker, trials = search(
        space, spec(3), trainable="fake_trial:run", base={"x": 1.0, "seconds": 0, "fail": "nan"}
    )
    assert {trial.state for trial in trials} == {TrialState.FAIL}
    assert {(run.status, run.reason) for run in tracker.all_runs} == {
        ("FAILED", "FloatingPointError: val_rmse is nan at epoch 9")
    }
    assert len(ledger.failures) == 3


@pytest.mark.parametrize(("limit", "name"), [({"hours": 1.0}, "hours"), ({"trial_hours": 1.0}, "trial_hours")])
def test_a_budget_stops_a_search_that_a_larger_one_continues(
    space: Space, limit: dict[str, float], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0

    def tick() -> float:
        nonlocal now
        now += 100.0  # seconds between two looks at the clock
        return now

    monkeypatch.setattr("study.engine.budget.time.monotonic", tick)
    storage, tracker = InMemoryStorage(), MemoryTracker()
    first, _, trials = search(space, spec(30, budget=Budget(**limit)), storage=storage, tracker=tracker)
    assert first.complete
    assert first.stopped is not None
    assert first.stopped.startswith(f"search.budget.{name}: 1")
    assert 0 < first.ran == len(trials) < 30
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}, "what had begun was finished"
    again, _, _ = search(space, spec(30, budget=Budget(**limit)), storage=storage, tracker=tracker)
    assert again.ran == 0
    assert again.stopped is not None
    more, _, trials = search(space, spec(30, budget=Budget()), storage=storage, tracker=tracker)
    assert (more.ran, more.stopped, len(trials)) == (30 - first.ran, None, 30)
    monkeypatch.undo()
    _, _, whole = search(space, spec(30))
    assert [trial.params for trial in trials] == [trial.params for trial in whole], "as if it had not been stopped"


def best_within(tracker: MemoryTracker, budget: int) -> float:
    """The best result by the time so many epochs were trained, less the optimum."""
    spent, best = 0, math.inf
    for run in tracker.all_runs:
        spent += len(tracker.epochs[run.trial])
        if spent <= budget and run.status == "FINISHED":
            best = min(best, run.metrics["val_rmse"] - analytic.OPTIMUM)
    return best


def test_tpe_that_stops_early_beats_random_search_of_the_same_budget(space: Space) -> None:
    """20 seeds, paired; the budget are the epochs of 30 whole trials."""
    budget = 30 * analytic.EPOCHS
    tpe, by_chance = [], []
    for seed in range(20):
        tpe.append(best_within(search(space, spec(60, seed=seed, **ASHA))[1], budget))
        by_chance.append(best_within(search(space, spec(30, seed=seed, sampler="RandomSampler"))[1], budget))
    assert max(by_chance) < math.inf
    assert wilcoxon(tpe, by_chance, alternative="less").pvalue < 0.01
    assert np.median(tpe) < 0.5 * np.median(by_chance)


def test_the_optimum_is_where_it_is_said_to_be() -> None:
    assert analytic.value({"method": "decayed", "lr": 0.01, "depth": 5, "decay": 0.7}) == analytic.OPTIMUM
    generator = np.random.default_rng(0)
    for _ in range(200):
        drawn = {
            "method": generator.choice(["plain", "decayed", "cut"]), "lr": math.exp(generator.uniform(-11, 0)),
            "depth": int(generator.integers(1, 9)), "decay": generator.uniform(), "cut": generator.uniform(-5, 5),
        }  # fmt: skip
        assert analytic.value(drawn) > analytic.OPTIMUM


def test_nothing_of_a_trial_reaches_the_next(space: Space) -> None:
    """All trials run in one process, as on a reused worker."""
    try:
        _, tracker, _ = search(space, spec(3), trainable="dirty:run")
    finally:
        reset(1)
    one, two, three = (run.metrics for run in tracker.all_runs)
    assert one == two == three
    assert {name: one[name] for name in one if name not in ("val_rmse", "torch", "numpy", "python")} == {
        "bits": 32.0, "grad": 1.0, "threads": 1.0, "exact": 0.0, "device": 0.0, "anomaly": 0.0, "product": 0.0,
        "denormal": 0.0, "raises": 0.0,
    }  # fmt: skip
