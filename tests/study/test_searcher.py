"""Draws that survive their driver, and the order in which jobs are handed out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from features.errors import InputError
from search_spaces import Space, load_space
from study.draws import SAMPLERS, CellSearch, check_sampler, make_sampler, open_journal
from study.jobs import Cell, Job, SearchSpec, trial_name
from study.searcher import JobSearcher
from study.tracking import EpochReport

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
    return CellSearch(storage=storage, name=name, space=space, spec=spec, direction="minimize")


def run(search: CellSearch, numbers: Sequence[int]) -> list[dict[str, Any]]:
    drawn = []
    for number in numbers:
        drawn.append(search.draw(number))
        search.tell(number, value(drawn[-1]))
    return drawn


def spec(sampler: str = "TPESampler", seed: int = 7, **args: Any) -> SearchSpec:
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
    assert len({json.dumps(drawn) for drawn in parts}) == 16, "no start-up draw is repeated"


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
    search.tell(0, 1.5)
    search.tell(0, 2.5)
    search.draw(1)
    search.tell(1, None)
    search.tell(1, 3.5)
    again = open_search(tmp_path, space, spec())
    assert [again.state(number) for number in range(3)] == [TrialState.COMPLETE, TrialState.FAIL, None]
    assert again._study.trials[0].value == 1.5


def test_a_told_trial_is_read_back(tmp_path: Path, space: Space) -> None:
    drawn = run(open_search(tmp_path, space, spec()), range(3))
    again = open_search(tmp_path, space, spec())
    assert [again.draw(number) for number in range(3)] == drawn


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


@pytest.mark.parametrize(
    ("sampler", "args", "fault"),
    [
        (
            "TpeSampler",
            {},
            "search.sampler: must be one of TPESampler, RandomSampler, GPSampler, QMCSampler, got 'TpeS",
        ),
        ("TPESampler", {"n_startup_trails": 3}, "search.sampler_args: TPESampler refuses them: .*'n_startup_trails'"),
        ("TPESampler", {"seed": 3}, "search.sampler_args.seed: is set from search.seed"),
        ("QMCSampler", {"qmc_type": "sobl"}, "search.sampler_args: QMCSampler refuses them"),
    ],
)
def test_bad_samplers_are_refused(sampler: str, args: dict[str, Any], fault: str) -> None:
    with pytest.raises(InputError, match=fault):
        check_sampler(SearchSpec(trials=1, seeds=(0,), sampler=sampler, sampler_args=args))


def test_only_sequences_share_a_seed() -> None:
    assert make_sampler(spec("QMCSampler"), 0)._seed == make_sampler(spec("QMCSampler"), 1)._seed
    one, two = (make_sampler(spec("RandomSampler"), n)._rng.rng.random() for n in (0, 1))
    assert one != two


class Notes:
    """A ledger that only writes down."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.closed: list[str] = []

    def start(self, job: Job) -> dict[str, Any]:
        self.started.append(f"{job.cell.ratio}/{job.name}")
        return {"name": job.name}

    def report(self, job: Job, epochs: Sequence[EpochReport]) -> None:
        raise AssertionError("not called")

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
