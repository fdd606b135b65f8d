"""The Optuna study of a row in a cell: draws that survive their driver."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from optuna.trial import TrialState

from features.errors import InputError
from search_spaces import Space
from study.engine.budget import Spent
from study.engine.optuna_storage import close_storage, open_database
from study.engine.optuna_study import CellStudy, OptunaTrial, drawn_for
from study.engine.samplers import SAMPLERS, make_sampler, study_seed
from study.specs import Cell, Job

from .searches import make_space, open_search, run, spec


@pytest.fixture
def space(tmp_path: Path) -> Space:
    return make_space(tmp_path)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_interrupted_search_equals_an_uninterrupted_one(tmp_path: Path, space: Space, sampler: str) -> None:
    whole = run(open_search(tmp_path / "whole", space, spec(sampler)), range(16))
    first = open_search(tmp_path / "parts", space, spec(sampler))
    parts = run(first, range(6))
    lost = first.ask(6)  # the driver dies while trial 6 trains
    second = open_search(tmp_path / "parts", space, spec(sampler))
    assert second.state(6) == TrialState.RUNNING
    assert second.ask(6) == lost, "read back, not drawn again"
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
from searches import make_space, open_search, run, spec
space = make_space(Path({str(tmp_path)!r}))
print(json.dumps(run(open_search(Path({str(tmp_path / "there")!r}), space, spec()), range(14))))
"""
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert json.loads(out.stdout) == here
        (tmp_path / "there" / "optuna" / "study.log").unlink()


def test_telling_twice_keeps_the_first_result(tmp_path: Path, space: Space) -> None:
    study = open_search(tmp_path, space, spec())
    study.ask(0)
    study.complete(0, {"val_rmse": 1.5, "val_rmse_std": 0.25}, 3)
    study.complete(0, {"val_rmse": 2.5}, 1)
    study.ask(1)
    study.fail(1)
    study.complete(1, {"val_rmse": 3.5}, 1)
    again = open_search(tmp_path, space, spec())
    assert [again.state(number) for number in range(3)] == [TrialState.COMPLETE, TrialState.FAIL, None]
    first = again._study.trials[0]
    assert (first.value, first.user_attrs["replicates"]) == (1.5, {"std": 0.25, "count": 3})


def test_a_snapshot_says_what_ended_and_with_which_parameters(tmp_path: Path, space: Space) -> None:
    study = open_search(tmp_path, space, spec())
    drawn = run(study, range(2)) + [study.ask(2)]
    half = study._study.ask()
    half.suggest_float("x", 0.0, 1.0)  # a driver was killed before it drew the rest
    assert open_search(tmp_path, space, spec()).trials() == [
        OptunaTrial(ended=True, params=drawn[0]), OptunaTrial(ended=True, params=drawn[1]),
        OptunaTrial(ended=False, params=drawn[2]), OptunaTrial(ended=False, params=None),
    ]  # fmt: skip


def test_what_was_spent_is_kept(tmp_path: Path, space: Space) -> None:
    study = open_search(tmp_path, space, spec())
    assert study.spent == Spent()
    study.spend(Spent(clock=1.5, trials=2.0))
    study.spend(Spent(clock=0.5, trials=3.0))
    assert open_search(tmp_path, space, spec()).spent == Spent(clock=2.0, trials=5.0)


def test_a_finished_trial_is_read_back(tmp_path: Path, space: Space) -> None:
    drawn = run(open_search(tmp_path, space, spec()), range(3))
    again = open_search(tmp_path, space, spec())
    assert [again.ask(number) for number in range(3)] == drawn


def test_points_come_first_and_their_rest_is_drawn(tmp_path: Path, space: Space) -> None:
    points = ({"x": 0.25, "kind": "b", "y": 0.5}, {"x": 0.75})
    search = open_search(tmp_path, space, replace(spec(), points_to_evaluate=points))
    drawn = run(search, range(3))
    assert drawn[0] == points[0]
    assert drawn[1]["x"] == 0.75
    assert drawn[1]["kind"] in ("a", "b")
    again = open_search(tmp_path, space, replace(spec(), points_to_evaluate=points))
    assert [again.ask(number) for number in range(3)] == drawn
    assert drawn[2] == run(open_search(tmp_path / "other", space, spec()), range(3))[2], (
        "start-up draws are independent"
    )


def test_a_trial_that_is_read_back_is_not_drawn_a_second_time(tmp_path: Path, space: Space) -> None:
    """CMA-ES would write the generation of the new draw over that of the parameters that are there."""
    search = open_search(tmp_path, space, spec("CmaEsSampler", popsize=4))
    run(search, range(2))
    lost = search.ask(2)
    run(search, range(3, 9))
    before = search._frozen(2)
    again = open_search(tmp_path, space, spec("CmaEsSampler", popsize=4))
    assert again.ask(2) == lost
    assert again._frozen(2) == before


def test_a_database_belongs_to_one_home(tmp_path: Path, space: Space) -> None:
    database = open_database(f"sqlite:///{tmp_path}/optuna.db", "search.storage")

    def opened(owner: str, name: str = "plan/cell/row/0") -> CellStudy:
        return open_search(tmp_path, space, spec(), name, storage=database, owner=owner)

    drawn = run(opened("one"), range(3))
    assert [opened("one").ask(number) for number in range(3)] == drawn
    assert drawn == run(open_search(tmp_path, space, spec()), range(3)), "as in a journal"
    with pytest.raises(
        InputError, match=r"search.storage: its study 'plan/cell/row/0' belongs to another home folder or MLf"
    ):
        opened("two")
    assert opened("two", "other/cell/row/0").state(0) is None
    close_storage(database)


def test_cells_do_not_mix(tmp_path: Path, space: Space) -> None:
    run(open_search(tmp_path, space, spec(), name="one"), range(3))
    assert open_search(tmp_path, space, spec(), name="two").state(0) is None


def test_only_sequences_share_a_seed() -> None:
    assert make_sampler(spec("QMCSampler"), 0)._seed == make_sampler(spec("QMCSampler"), 1)._seed
    one, two = (make_sampler(spec("RandomSampler"), n)._rng.rng.random() for n in (0, 1))
    assert one != two


def test_no_two_searches_of_a_plan_get_the_same_seed() -> None:
    """Else all cells of a study try the same first configurations."""
    pairs = [(row, cell) for row in ("music", "emcdr") for cell in ("a->b@0.2", "a->b@0.5", "b->a@0.2")]
    seeds = {study_seed(seed, *pair) for seed in (0, 1) for pair in pairs}
    assert len(seeds) == 2 * len(pairs)
    assert study_seed(0, "music", "books->movies@0.2") == 1695960510, "in every process and version"


def test_both_directions_draw_alike_where_one_training_serves_them() -> None:
    cells = [Cell(source="a", target="b", ratio=0.2), Cell(source="b", target="a", ratio=0.2)]

    def places(model: str) -> list[str]:
        jobs = [
            Job(
                part="search", cell=cell, row="row", model=model, name="0000", config=None, seeds=(0,), feature_set="ids",
                task_dir="task",
            )
            for cell in cells
        ]  # fmt: skip
        return [drawn_for(job) for job in jobs]

    assert places("sasrec") == ["a+b@0.2", "a+b@0.2"]
    assert places("tri_cdr") == ["a->b@0.2", "b->a@0.2"]
