"""Draws that survive their driver, and the order in which jobs are handed out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FrozenTrial, TrialState

from features.errors import InputError
from search_spaces import Space, load_space
from study.engine.optuna_study import CellSearch, close_storage, open_database, open_journal
from study.engine.ray_tune import JobSearcher
from study.engine.reconcile import PartLedger, Recipe
from study.engine.samplers import SAMPLERS, make_sampler
from study.engine.warm_start import warm_trials
from study.specs import Cell, Faults, Job, SearchSpec, WarmStart, trial_name
from study.tracking.runs import EpochReport

SPACE = """
v:
  x: {FloatDistribution: {low: 0.0, high: 1.0}}
  kind: {CategoricalDistribution: {choices: [a, b]}}
  y: {when: {kind: b}, FloatDistribution: {low: 0.001, high: 1.0, log: true}}
"""


@pytest.fixture
def space(tmp_path: Path) -> Space:
    (tmp_path / "space.yaml").write_text(SPACE)
    return load_space(f"{tmp_path}/space.yaml/v", ["x", "kind", "y"])


def value(drawn: dict[str, Any]) -> float:
    return float((drawn["x"] - 0.3) ** 2 + drawn.get("y", 0.5))


def open_search(folder: Path, space: Space, spec: SearchSpec, name: str = "cell") -> CellSearch:
    storage = open_journal(folder / "optuna" / "study.log")
    return CellSearch(storage=storage, name=name, space=space, spec=spec, directions=["minimize"])


def run(search: CellSearch, numbers: Sequence[int]) -> list[dict[str, Any]]:
    drawn = []
    for number in numbers:
        drawn.append(search.draw(number))
        search.tell(number, [value(drawn[-1])])
    return drawn


def spec(sampler: str = "TPESampler", seed: int = 7, **args: Any) -> SearchSpec:
    if sampler == "GridSampler":
        args.setdefault("search_space", {"x": [0.1, 0.2, 0.4, 0.8], "y": [0.01, 0.1, 1.0]})
    if sampler.startswith("NSGA"):
        args.setdefault("population_size", 4)
    return SearchSpec(trials=16, seeds=(0,), sampler=sampler, sampler_args=args, seed=seed)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_interrupted_search_equals_an_uninterrupted_one(tmp_path: Path, space: Space, sampler: str) -> None:
    whole = run(open_search(tmp_path / "whole", space, spec(sampler)), range(16))
    first = open_search(tmp_path / "parts", space, spec(sampler))
    parts = run(first, range(6))
    lost = first.draw(6)  # the driver dies while trial 6 trains
    second = open_search(tmp_path / "parts", space, spec(sampler))
    assert second.state(6) == TrialState.RUNNING
    assert second.draw(6) == lost, "read back, not drawn again"
    parts += run(second, range(6, 16))
    assert parts == whole
    startup = parts[:4] if sampler.startswith("NSGA") else parts  # children of one population may be alike
    assert len({json.dumps(drawn) for drawn in startup}) == len(startup), "no start-up draw is repeated"


def test_another_seed_draws_otherwise(tmp_path: Path, space: Space) -> None:
    one = run(open_search(tmp_path / "1", space, spec(seed=1)), range(4))
    two = run(open_search(tmp_path / "2", space, spec(seed=2)), range(4))
    assert one != two


def test_a_new_process_with_another_hash_seed_draws_the_same(tmp_path: Path, space: Space) -> None:
    here = run(open_search(tmp_path / "here", space, spec()), range(14))
    code = f"""
import json, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_searcher import load_space, open_search, run, spec
space = load_space({str(tmp_path / "space.yaml/v")!r}, ["x", "kind", "y"])
print(json.dumps(run(open_search(Path({str(tmp_path / "there")!r}), space, spec()), range(14))))
"""
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert json.loads(out.stdout) == here
        (tmp_path / "there" / "optuna" / "study.log").unlink()


def test_telling_twice_keeps_the_first_result(tmp_path: Path, space: Space) -> None:
    search = open_search(tmp_path, space, spec())
    search.draw(0)
    search.tell(0, [1.5])
    search.tell(0, [2.5])
    search.draw(1)
    search.tell(1, None)
    search.tell(1, [3.5])
    again = open_search(tmp_path, space, spec())
    assert [again.state(number) for number in range(3)] == [TrialState.COMPLETE, TrialState.FAIL, None]
    assert again._study.trials[0].value == 1.5


def test_a_told_trial_is_read_back(tmp_path: Path, space: Space) -> None:
    drawn = run(open_search(tmp_path, space, spec()), range(3))
    again = open_search(tmp_path, space, spec())
    assert [again.draw(number) for number in range(3)] == drawn


def test_points_come_first_and_their_rest_is_drawn(tmp_path: Path, space: Space) -> None:
    points = ({"x": 0.25, "kind": "b", "y": 0.5}, {"x": 0.75})
    search = open_search(tmp_path, space, replace(spec(), points_to_evaluate=points))
    drawn = run(search, range(3))
    assert drawn[0] == points[0]
    assert drawn[1]["x"] == 0.75
    assert drawn[1]["kind"] in ("a", "b")
    again = open_search(tmp_path, space, replace(spec(), points_to_evaluate=points))
    assert [again.draw(number) for number in range(3)] == drawn
    assert drawn[2] == run(open_search(tmp_path / "other", space, spec()), range(3))[2], (
        "start-up draws are independent"
    )


def test_a_trial_that_is_read_back_is_not_drawn_a_second_time(tmp_path: Path, space: Space) -> None:
    """CMA-ES would write the generation of the new draw over that of the parameters that are there."""
    search = open_search(tmp_path, space, spec("CmaEsSampler", popsize=4))
    run(search, range(2))
    lost = search.draw(2)
    run(search, range(3, 9))
    before = search._frozen(2)
    again = open_search(tmp_path, space, spec("CmaEsSampler", popsize=4))
    assert again.draw(2) == lost
    assert again._frozen(2) == before


def source(folder: Path, space: Space, trials: int = 8) -> None:
    """A finished search of plan `old` in cell `a->b@0.2`, under an older identity too."""
    journal = open_journal(folder / "optuna" / "old.log")
    for identity, count in (("0", 2), ("1", trials)):
        old = CellSearch(
            storage=journal, name=f"a->b@0.2/{identity}", space=space, spec=spec(seed=1), directions=["minimize"]
        )
        run(old, range(count))
    old.draw(trials)  # interrupted; it is not taken


def warm(folder: Path, space: Space, **fields: Any) -> dict[str, list[FrozenTrial]]:
    given = {"source": WarmStart(plan="old"), "cells": ["a->b@0.2", "a->b@0.5"], "directions": ["minimize"], **fields}
    return warm_trials(home=folder, space=space, **given)


def test_a_warm_start_is_known_to_the_sampler_and_is_no_trial_of_its_own(tmp_path: Path, space: Space) -> None:
    source(tmp_path, space)
    journal = open_journal(tmp_path / "optuna" / "new.log")

    def open_warm(known: Any) -> CellSearch:
        how: dict[str, Any] = {"space": space, "spec": spec(), "directions": ["minimize"]}
        return CellSearch(storage=journal, name="a->b@0.2/2", warm=known, **how)

    search = open_warm(lambda: warm(tmp_path, space)["a->b@0.2"])
    assert search.state(0) is None
    drawn = run(search, range(12))
    trials = search._study.trials
    assert len(trials) == 8 + 12
    assert [trial.user_attrs.get("warm_start") for trial in trials[6:9]] == ["a->b@0.2/1#6", "a->b@0.2/1#7", None]
    assert trials[8].params == drawn[0]
    cold = run(open_search(tmp_path / "cold", space, spec()), range(12))
    assert drawn[:2] == cold[:2], "ten start-up trials, eight of which were known"
    assert drawn[2] != cold[2]
    (tmp_path / "optuna" / "old.log").unlink()
    again = open_warm(lambda: pytest.fail("the source is not needed a second time"))
    assert [again.draw(number) for number in range(12)] == drawn


def test_trials_outside_of_the_space_are_left_behind(tmp_path: Path, space: Space) -> None:
    source(tmp_path, space)
    (tmp_path / "space.yaml").write_text(SPACE.replace("high: 1.0}}\n  kind", "high: 0.5}}\n  kind"))
    half = load_space(f"{tmp_path}/space.yaml/v", ["x", "kind", "y"])
    found = warm(tmp_path, half)
    assert found["a->b@0.5"] == []
    assert 0 < len(found["a->b@0.2"]) < 8
    assert all(trial.params["x"] <= 0.5 for trial in found["a->b@0.2"])
    assert all(trial.distributions["x"].high == 0.5 for trial in found["a->b@0.2"])
    (tmp_path / "space.yaml").write_text("v:\n  x: {FloatDistribution: {low: 0.0, high: 1.0}}\n")
    with pytest.raises(
        InputError, match=r"search.warm_start: no trial of old lies in this space \(e.g. a->b@0.2/1#0: "
    ):
        warm(tmp_path, load_space(f"{tmp_path}/space.yaml/v", ["x"]))


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"source": WarmStart(plan="nowhere")}, r"search.warm_start: .*optuna/nowhere.log: no such journal; run that"),
        (
            {"source": WarmStart(plan="old", storage="space.yaml")},
            "search.warm_start: space.yaml: is not a journal of O",
        ),
        (
            {"directions": ["maximize"]},
            "search.warm_start: old searched to minimize, this plan to maximize; start from",
        ),
        ({"cells": ["x->y@0.2"]}, r"no trial of old lies in this space \(it has no complete trial in x->y@0.2\)"),
    ],
)
def test_a_warm_start_from_elsewhere_is_refused(
    tmp_path: Path, space: Space, fields: dict[str, Any], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source(tmp_path, space, trials=1)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=fault):
        warm(tmp_path, space, **fields)


def test_a_database_belongs_to_one_home(tmp_path: Path, space: Space) -> None:
    database = open_database(f"sqlite:///{tmp_path}/optuna.db", "search.storage")

    def opened(owner: str, name: str = "plan/cell/0") -> CellSearch:
        how: dict[str, Any] = {"space": space, "spec": spec(), "directions": ["minimize"]}
        return CellSearch(storage=database, name=name, owner=owner, **how)

    drawn = run(opened("one"), range(3))
    assert [opened("one").draw(number) for number in range(3)] == drawn
    assert drawn == run(open_search(tmp_path, space, spec()), range(3)), "as in a journal"
    with pytest.raises(
        InputError, match=r"search.storage: its study 'plan/cell/0' belongs to another home folder or MLf"
    ):
        opened("two")
    assert opened("two", "other/cell/0").state(0) is None
    storage = f"sqlite:///{tmp_path}/optuna.db"
    known = warm(tmp_path, space, source=WarmStart(plan="plan", storage=storage), cells=["cell"])
    assert [trial.params for trial in known["cell"]] == drawn
    close_storage(database)


def test_a_server_that_is_not_there_is_one_line() -> None:
    with pytest.raises(
        InputError, match=r"^search.storage: postgresql\+psycopg://u:\*\*\*@127.0.0.1:1/d cannot be used"
    ):
        open_database("postgresql+psycopg://u:secret@127.0.0.1:1/d", "search.storage")


def test_cells_do_not_mix(tmp_path: Path, space: Space) -> None:
    run(open_search(tmp_path, space, spec(), name="one"), range(3))
    assert open_search(tmp_path, space, spec(), name="two").state(0) is None


@pytest.mark.parametrize("torn", [b'{"op_code":4,"wor', b"\xff" * 9000])
def test_a_journal_with_a_torn_tail_goes_on(tmp_path: Path, space: Space, torn: bytes) -> None:
    drawn = run(open_search(tmp_path, space, spec()), range(3))
    journal = tmp_path / "optuna" / "study.log"
    whole = journal.read_bytes()
    journal.write_bytes(whole + torn)
    more = run(open_search(tmp_path, space, spec()), range(3, 5))
    assert journal.read_bytes().startswith(whole + b"{")
    again = open_search(tmp_path, space, spec())
    assert [again.draw(number) for number in range(5)] == drawn + more


def test_a_lock_of_a_killed_driver_is_broken_within_seconds(tmp_path: Path, space: Space) -> None:
    run(open_search(tmp_path, space, spec()), range(1))
    (tmp_path / "optuna" / "study.log.lock").symlink_to(tmp_path / "optuna" / "study.log")
    assert len(run(open_search(tmp_path, space, spec()), range(1, 2))) == 1


def test_what_a_plan_does_not_use_is_not_in_its_identity() -> None:
    """Studies of weeks hang on these hashes: what is new in a search enters them only where it is set."""
    space = load_space(
        "music/paper", ["steps", "beta", "dropout", "lr", "epochs", "activation", "schedule", "variance_end"]
    )
    search = SearchSpec(trials=3, seeds=(0, 1), sampler_args={"n_startup_trials": 4}, seed=2)

    def fingerprint(part: str, config: dict[str, Any] | None, search: SearchSpec) -> str:
        ledger = object.__new__(PartLedger)
        ledger._recipe = Recipe(
            experiment="e", trainable="t:r", model="music", base={"lr": 0.1, "steps": 5}, space=space, search=search,
            selection=("val_rmse", "minimize"), tags={"study.data_key": "d", "study.feature_key": "f"}, threads=1,
            home=Path(), faults=Faults(),
        )  # fmt: skip
        cell = Cell(source="a", target="b", ratio=0.2)
        seeds = (0, 1) if config is None else (0,)
        name = "0000" if config is None else "steps=5"
        return ledger._fingerprint(
            Job(part=part, cell=cell, name=name, config=config, seeds=seeds, features="text", task_dir="/x/task-1")
        )

    known = "23325fe17b4fcebc63164a3a9de12ca77886935699c4230b78367a027975e72d"
    assert fingerprint("search", None, search) == known
    assert fingerprint("sweep:steps", {"steps": 5}, search).startswith("53b5dea7dad44fec9d84a068b9bc364efe813ca52e57")
    assert fingerprint("search", None, replace(search, storage="sqlite:///x.db", trials=9)) == known
    assert fingerprint("search", None, replace(search, points_to_evaluate=({"lr": 1e-3},))) != known
    assert fingerprint("search", None, replace(search, warm_start=WarmStart(plan="p"))) != known


def test_only_sequences_share_a_seed() -> None:
    assert make_sampler(spec("QMCSampler"), 0)._seed == make_sampler(spec("QMCSampler"), 1)._seed
    one, two = (make_sampler(spec("RandomSampler"), n)._rng.rng.random() for n in (0, 1))
    assert one != two


class Notes:
    """A ledger that only writes down."""

    def __init__(self, limit: int = 100) -> None:
        self.limit = limit
        self.started: list[str] = []
        self.closed: list[str] = []

    def start(self, job: Job) -> dict[str, Any]:
        self.started.append(f"{job.cell.ratio}/{job.name}")
        return {"name": job.name}

    def report(self, job: Job, epochs: Sequence[EpochReport]) -> bool:
        raise AssertionError("not called")

    def exhausted(self) -> bool:
        return len(self.started) == self.limit

    def failed(self, job: Job, *, reason: str, detail: str) -> None:
        raise AssertionError("not called")

    def lost(self, job: Job, *, reason: str, detail: str) -> None:
        raise AssertionError("not called")

    def close(self, job: Job) -> None:
        if job.name == "0002":
            raise OSError("the disk is full")
        self.closed.append(f"{job.cell.ratio}/{job.name}")


def jobs(cells: int, trials: int) -> list[Job]:
    return [
        Job(
            part="search", cell=Cell(source="a", target="b", ratio=ratio), name=trial_name(number), config=None,
            seeds=(0,), features="main", task_dir="task",
        )
        for ratio in (0.2, 0.5, 0.8)[:cells]
        for number in range(trials)
    ]  # fmt: skip


def test_no_cell_waits_for_another() -> None:
    notes = Notes()
    searcher = JobSearcher(jobs(cells=3, trials=2), notes)
    assert searcher.suggest("t0") == {"payload": {"name": "0000"}}
    searcher.suggest("t1")
    searcher.suggest("t2")
    searcher.suggest("t3")
    assert notes.started == ["0.2/0000", "0.5/0000", "0.8/0000", "0.2/0001"]
    searcher.on_trial_complete("t1", result={})
    searcher.suggest("t4")
    searcher.suggest("t5")
    assert notes.started[4:] == ["0.5/0001", "0.8/0001"]
    assert notes.closed == ["0.5/0000"]
    assert searcher.suggest("t6") is None, "one whose process goes is handed out again"
    for number in (0, 2, 3, 4, 5):
        searcher.on_trial_complete(f"t{number}", result={})
    assert searcher.suggest("t6") == JobSearcher.FINISHED


def test_nothing_starts_beyond_the_budget() -> None:
    searcher = JobSearcher(jobs(cells=2, trials=3), Notes(limit=4))
    assert [isinstance(searcher.suggest(f"t{number}"), dict) for number in range(6)] == [True] * 4 + [False] * 2
    assert searcher.suggest("t6") == JobSearcher.FINISHED


def test_a_broken_store_ends_the_search() -> None:
    notes = Notes()
    searcher = JobSearcher(jobs(cells=1, trials=5), notes)
    for number in range(3):
        searcher.suggest(f"t{number}")
    with pytest.raises(OSError, match="the disk is full"):
        searcher.on_trial_complete("t2", result={})
    assert isinstance(searcher.broken, OSError)
    assert searcher.suggest("t3") == JobSearcher.FINISHED


@pytest.mark.parametrize(
    ("field", "fault"),
    [
        ({"part": "it's"}, "job part: use letters, digits and"),
        ({"name": "a/b"}, "job name: use letters, digits and"),
        ({"seeds": ()}, "job search/a->b@0.2/x: needs at least one seed"),
        ({"score": True}, "test_dir belongs to score jobs and to them only, got None"),
        ({"test_dir": "x"}, "test_dir belongs to score jobs and to them only, got x"),
    ],
)
def test_jobs_check_themselves(field: dict[str, Any], fault: str) -> None:
    good: dict[str, Any] = {
        "part": "search", "cell": Cell(source="a", target="b", ratio=0.2), "name": "x", "config": {}, "seeds": (0,),
        "features": "main", "task_dir": "task",
    }  # fmt: skip
    assert Job(**good).trial == "search/a->b@0.2/x"
    with pytest.raises(ValueError, match=fault):
        Job(**{**good, **field})


def test_cells_check_themselves() -> None:
    with pytest.raises(ValueError, match="cell source: use letters"):
        Cell(source="a b", target="c", ratio=0.2)
