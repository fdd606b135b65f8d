"""What is left of a part and what counts: decided from values, without a store."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from search_spaces import load_space
from study.engine.fingerprint import fingerprint, fingerprints
from study.engine.optuna_study import OptunaTrial, Studies
from study.engine.reconcile import (
    NEW_SEEDS,
    NOT_PLANNED,
    OTHER_DRAW,
    OTHER_QUESTION,
    SECOND_RUN,
    Decision,
    carry_out,
    decide,
)  # fmt: skip
from study.specs import Cell, Job, Recipe, RowRecipe, SearchSpec, trial_name
from study.tracking.runs import FAILED, FINISHED, KILLED, TrialRun
from trainables.interface import Selection

CELL = Cell(source="a", target="b", ratio=0.2)
NUMBERS = itertools.count()


def recipe(planned: Sequence[str] | None = None, rows: Sequence[str] = ("music", "cmf"), **base: Any) -> Recipe:
    row = RowRecipe(
        trainable="t:r", model="m", base={"epochs": 4, **base}, space=load_space("music/paper", FIELDS),
        search=SearchSpec(trials=2, seeds=(0, 1)),
    )  # fmt: skip
    return Recipe(
        experiment="e", home=Path(), rows=dict.fromkeys(rows, row), selection=Selection("val_rmse", "minimize"),
        planned=planned,
    )  # fmt: skip


FIELDS = ["steps", "beta", "dropout", "lr", "epochs", "activation", "schedule", "variance_end"]


def job(name: str, config: Mapping[str, Any] | None, row: str = "music", seeds: tuple[int, ...] = (0, 1)) -> Job:
    part = "search" if config is None else "sweep:lr"
    return Job(
        part=part, cell=CELL, row=row, model="m", name=name, config=config, seeds=seeds, feature_set="text",
        task_dir="/tasks/t/search",
    )  # fmt: skip


def fixed(name: str = "lr=1", lr: float = 1.0, **fields: Any) -> Job:
    return job(name, {"lr": lr}, **fields)


def drawn(number: int = 0, **fields: Any) -> Job:
    return job(trial_name(number), None, **fields)


def run(answered: Job, status: str = FINISHED, **fields: Any) -> TrialRun:
    """A run of the job; finished ones have a result."""
    given: dict[str, Any] = {
        "run_id": f"r{next(NUMBERS)}",
        "trial": answered.trial,
        "status": status,
        "fingerprint": fingerprint(recipe(), answered),
        "seeds": answered.seeds,
        "params": {"lr": "0.1"},
        "metrics": {"val_rmse": 1.0} if status == FINISHED else {},
        **fields,
    }
    return TrialRun(**given)


def settle(
    jobs: Sequence[Job], runs: Sequence[TrialRun], *, plan: Recipe | None = None, draws: Sequence[OptunaTrial] = ()
) -> Decision:
    """Decide; what was decided, carried out, leaves nothing to write to MLflow a second time.

    `runs`: newest first. `draws`: Optuna's trials of every row.
    """
    plan = plan or recipe()
    by_trial: dict[str, list[TrialRun]] = {}
    for trial_run in runs:
        by_trial.setdefault(trial_run.trial, []).append(trial_run)
    optuna_trials = {(name, CELL.name): draws for name in plan.rows}
    hashes = fingerprints(plan, jobs)
    decision = decide(plan, jobs, hashes, runs=by_trial, drawn=optuna_trials)
    reasons: dict[str, str | None] = {**why(decision), **{run.run_id: None for run in decision.restore}}
    after = {
        trial: [replace(run, superseded=reasons.get(run.run_id, run.superseded)) for run in trial_runs]
        for trial, trial_runs in by_trial.items()
    }
    again = decide(plan, jobs, hashes, runs=after, drawn=optuna_trials)
    assert (again.supersede, again.restore) == ((), ())
    assert again.todo == decision.todo
    assert again.values == decision.values
    return decision


def why(decision: Decision) -> dict[str, str]:
    return {run.run_id: reason for run, reason in decision.supersede}


DRAW = OptunaTrial(ended=False, params={"lr": 0.1})
ENDED = OptunaTrial(ended=True, params={"lr": 0.1})


# --- fixed jobs -------------------------------------------------------------------------------------------------------


def test_a_finished_trial_is_done_and_a_new_one_is_left() -> None:
    one, two = fixed(), fixed("lr=2", 2.0)
    decision = settle([one, two], [run(one, metrics={"val_rmse": 0.25})])
    assert decision == Decision(todo=(two,), values={one.trial: 0.25})


@pytest.mark.parametrize("status", [KILLED, FAILED])
def test_an_interrupted_or_failed_trial_goes_on_in_its_run(status: str) -> None:
    one = fixed()
    attempt = run(one, status, failure="trial" if status == FAILED else None)
    assert settle([one], [attempt]) == Decision(todo=(one,), resume=(attempt,))


def test_another_configuration_under_the_name_is_another_question() -> None:
    before, now = fixed(lr=1.0), fixed(lr=2.0)
    finished, attempt = run(before), run(before, KILLED)
    decision = settle([now], [attempt, finished])
    assert decision.todo == (now,)
    assert why(decision) == {finished.run_id: OTHER_QUESTION, attempt.run_id: OTHER_QUESTION}
    assert decision.replaced == {}


def test_a_run_that_is_asked_for_again_counts_again_and_is_not_trained() -> None:
    one, two = fixed(lr=1.0), fixed(lr=2.0)
    first, second = run(one, superseded=OTHER_QUESTION), run(two)
    decision = settle([one], [second, first])
    assert decision.todo == ()
    assert decision.restore == (first,)
    assert why(decision) == {second.run_id: OTHER_QUESTION}
    assert decision.values == {one.trial: 1.0}


def test_what_the_plan_has_no_more_counts_no_more() -> None:
    one, gone = fixed(), fixed("lr=2", 2.0)
    kept, dropped, earlier = run(one), run(gone), run(gone, superseded="before")
    assert why(settle([one], [kept, dropped, earlier])) == {dropped.run_id: NOT_PLANNED}


def test_planned_trials_that_a_call_leaves_alone_stay_as_they_are() -> None:
    mine, other = fixed(row="music"), fixed(row="cmf")
    plan = recipe(planned=[mine.trial, other.trial])
    theirs = [run(other), run(other, KILLED), run(other, superseded="before", fingerprint="another configuration")]
    assert settle([mine], theirs, plan=plan) == Decision(todo=(mine,))


def test_a_result_with_other_seeds_counts_until_its_successor_is_finished() -> None:
    few, more = fixed(seeds=(0,)), fixed(seeds=(0, 1, 2))
    old = run(few)
    decision = settle([more], [old])
    assert decision == Decision(todo=(more,), replaced={more.trial: old})
    attempt = run(more, KILLED)
    assert settle([more], [attempt, old]) == Decision(todo=(more,), resume=(attempt,), replaced={more.trial: old})
    new = run(more)
    decision = settle([more], [new, old])
    assert why(decision) == {old.run_id: NEW_SEEDS}, "a driver died between the two"
    back = settle([few], [replace(new, status=KILLED, metrics={}), old])
    assert (back.todo, why(back)) == ((), {new.run_id: NEW_SEEDS}), "the plan wants the old seeds again"


def test_the_newest_of_several_stand_ins_is_taken() -> None:
    old, older, now = run(fixed(seeds=(0, 1))), run(fixed(seeds=(0,)), superseded=NEW_SEEDS), fixed(seeds=(5,))
    decision = settle([now], [old, older])
    assert decision.replaced == {now.trial: old}
    assert (decision.restore, decision.supersede) == ((), ())


def test_of_two_runs_of_one_question_the_finished_one_counts() -> None:
    one = fixed()
    finished, attempt = run(one, superseded="before"), run(one, KILLED)
    decision = settle([one], [attempt, finished])
    assert (decision.todo, decision.restore) == ((), (finished,))
    assert why(decision) == {attempt.run_id: SECOND_RUN}


def test_a_row_is_no_part_of_the_question_but_of_the_trial() -> None:
    assert settle([fixed(row="cmf")], [run(fixed(row="music"))], plan=recipe(planned=[fixed(row="music").trial])).todo


# --- drawn jobs -------------------------------------------------------------------------------------------------------


def test_optuna_learns_what_only_mlflow_knows() -> None:
    jobs = [drawn(0), drawn(1), drawn(2)]
    runs = [
        run(jobs[0]), run(jobs[1], FAILED, failure="trial", reason="ValueError: x"), run(jobs[2], KILLED, pruned=True)
    ]  # fmt: skip
    decision = settle(jobs, runs, draws=[DRAW] * 3)
    assert decision.todo == ()
    assert decision.tell == tuple(zip(jobs, runs, strict=True))
    assert decision.values == {jobs[0].trial: 1.0}
    assert decision.failures == {jobs[1].trial: "ValueError: x"}
    assert settle(jobs, runs, draws=[ENDED] * 3).tell == ()


def test_a_lost_worker_says_nothing_about_the_parameters() -> None:
    one = drawn()
    lost = run(one, FAILED, failure="worker")
    assert settle([one], [lost], draws=[DRAW]) == Decision(todo=(one,), resume=(lost,))


def test_a_draw_that_mlflow_does_not_have_is_trained() -> None:
    assert settle([drawn()], [], draws=[DRAW]) == Decision(todo=(drawn(),))
    assert settle([drawn()], [], draws=[ENDED]) == Decision(todo=(drawn(),)), "a person deleted its run"
    assert settle([drawn()], [], draws=[]) == Decision(todo=(drawn(),))


@pytest.mark.parametrize(
    "draws",
    [[], [OptunaTrial(ended=False, params={"lr": 0.2})], [OptunaTrial(ended=False, params=None)]],
    ids=["none", "another", "half"],
)
def test_a_run_of_another_draw_does_not_answer(draws: list[OptunaTrial]) -> None:
    """The journal was lost, and the number is drawn anew."""
    one = drawn()
    old = run(one)
    decision = settle([one], [old], draws=draws)
    assert (decision.todo, why(decision)) == ((one,), {old.run_id: OTHER_DRAW})
    attempt = run(one, KILLED, params={"lr": "0.2"})
    decision = settle(
        [one], [attempt, replace(old, superseded=OTHER_DRAW)], draws=[OptunaTrial(ended=False, params={"lr": 0.2})]
    )
    assert (decision.resume, decision.restore) == ((attempt,), ()), "the old result stays superseded"


def test_a_run_whose_driver_died_before_its_parameters_goes_on() -> None:
    one = drawn()
    begun = run(one, KILLED, params={}, seeds=())
    assert settle([one], [begun], draws=[DRAW]).resume == (begun,)


def test_a_smaller_search_keeps_its_trials_and_a_larger_one_has_them_back() -> None:
    jobs = [drawn(0), drawn(1)]
    runs = [run(one) for one in jobs]
    shrunk = settle(jobs[:1], runs, draws=[ENDED] * 2)
    assert why(shrunk) == {runs[1].run_id: NOT_PLANNED}
    tagged = replace(runs[1], superseded=NOT_PLANNED)
    grown = settle(jobs, [runs[0], tagged], draws=[ENDED] * 2)
    assert (grown.todo, grown.restore) == ((), (tagged,))


def test_a_pruned_or_failed_draw_has_its_end_back_too() -> None:
    one = drawn()
    for end in ({"pruned": True}, {"failure": "trial", "reason": "no"}):
        old = run(one, FAILED if "failure" in end else KILLED, superseded=NOT_PLANNED, **end)
        decision = settle([one], [old], draws=[ENDED])
        assert (decision.todo, decision.restore) == ((), (old,))


def test_the_seeds_of_a_search_are_a_part_of_it() -> None:
    few, more = drawn(seeds=(0,)), drawn()
    old = run(few)
    decision = settle([more], [old], draws=[])
    assert decision.replaced == {}
    assert why(decision) == {old.run_id: OTHER_QUESTION}


# --- carried out ------------------------------------------------------------------------------------------------------


def test_mlflow_is_written_before_optuna() -> None:
    """With stand-ins for both stores, which write one list."""
    written: list[tuple[Any, ...]] = []

    class Store:
        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, verb: str) -> Any:
            return lambda *words: written.append((self._name, verb, *words))

    jobs = [drawn(0), drawn(1), drawn(2)]
    ends = [run(jobs[0]), run(jobs[1], FAILED, failure="trial"), run(jobs[2], KILLED, pruned=True)]
    old, back, attempt = run(fixed()), run(fixed("lr=2")), run(fixed("lr=3"), KILLED)
    decision = Decision(
        supersede=((old, "why"),), restore=(back,), resume=(attempt,), tell=tuple(zip(jobs, ends, strict=True))
    )
    carry_out(decision, Store("mlflow"), Studies({("music", CELL.name): Store("optuna")}))  # type: ignore[arg-type, dict-item]
    assert written == [
        ("mlflow", "supersede", old, "why"), ("mlflow", "restore", back), ("mlflow", "resume", attempt),
        ("optuna", "complete", 0, {"val_rmse": 1.0}, 2), ("optuna", "fail", 1), ("optuna", "prune", 2),
    ]  # fmt: skip
