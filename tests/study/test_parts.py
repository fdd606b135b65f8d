"""The jobs of each part: names, order, configurations, and who is given test data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from study import parts
from study.plan.load import load_plan
from study.plan.schema import Plan
from study.specs import Cell, Job
from trainables.task_types import RATINGS
from trainables.tasks.arrays import TaskFolders

from .tiny import WORK, write_plan

MakePlan = Callable[..., Plan]
BEST = {
    ("music", "books->movies@0.2"): {"lr": 0.1, "steps": 7},
    ("music", "books->movies@0.5"): {"lr": 0.2, "steps": 9},
}


@pytest.fixture
def make(tmp_path: Path) -> MakePlan:
    return lambda **changes: load_plan(str(write_plan(tmp_path, **changes)))


def folders(cell: Cell, feature_set: str) -> TaskFolders:
    root = Path("/tasks") / f"{cell.name}-{feature_set}"
    return TaskFolders(key="k", task_dir=root / "search", test_dir=root / "test", counts={})


def shown(jobs: list[Job]) -> list[tuple[float, str, Any]]:
    return [(job.cell.ratio, job.name, job.config) for job in jobs]


def test_cells_take_turns_in_a_search(make: MakePlan) -> None:
    jobs = parts.search_jobs(make(), folders)
    assert shown(jobs) == [(0.2, "0000", None), (0.5, "0000", None), (0.2, "0001", None), (0.5, "0001", None)]
    assert {job.seeds for job in jobs} == {(0,)}
    assert jobs[1].task_dir == "/tasks/books->movies@0.5-ratings/search"


def test_a_sweep_changes_one_field_of_the_best(make: MakePlan) -> None:
    jobs = parts.sweep_jobs(make(), "steps", folders, BEST)
    assert shown(jobs) == [
        (0.2, "steps=2", {"lr": 0.1, "steps": 2}), (0.5, "steps=2", {"lr": 0.2, "steps": 2}),
        (0.2, "steps=5", {"lr": 0.1, "steps": 5}), (0.5, "steps=5", {"lr": 0.2, "steps": 5}),
    ]  # fmt: skip


def test_a_sweep_from_nothing_changes_one_field_of_the_base(make: MakePlan) -> None:
    jobs = parts.sweep_jobs(make(), "steps", folders, {})
    assert [job.config for job in jobs] == [{"steps": 2}] * 2 + [{"steps": 5}] * 2


def test_ablations_stand_beside_the_full_model(make: MakePlan) -> None:
    jobs = parts.ablation_jobs(make(cold_ratios=[0.2], ablate__variants=["wo_side", "wo_mllm"]), folders, BEST)
    best = BEST["music", "books->movies@0.2"]
    assert shown(jobs) == [(0.2, "full", best), (0.2, "wo_side", {**best, "side": False}), (0.2, "wo_mllm", best)]


def test_only_the_ablation_of_text_reads_other_features(make: MakePlan) -> None:
    text = {"text": {"encoder": {"model": "minilm"}}}
    plan = make(cold_ratios=[0.2], features=text, ablate__variants=["wo_side", "wo_mllm"])
    jobs = parts.ablation_jobs(plan, folders, BEST)
    assert [(job.name, job.feature_set) for job in jobs] == [
        ("full", "text"),
        ("wo_side", "text"),
        ("wo_mllm", "ratings"),
    ]
    assert jobs[2].task_dir == "/tasks/books->movies@0.2-ratings/search"


def test_only_scores_are_given_test_data(make: MakePlan) -> None:
    plan = make()
    scores = [*parts.score_jobs(plan, folders, BEST), *parts.baseline_jobs(plan, "score", folders)]
    assert {(job.score, job.test_dir) for job in scores} == {
        (True, f"/tasks/{cell.name}-ratings/test") for cell in plan.cells
    }
    others = [
        *parts.search_jobs(plan, folders), *parts.sweep_jobs(plan, "steps", folders, BEST),
        *parts.ablation_jobs(plan, folders, BEST),
    ]  # fmt: skip
    assert {(job.score, job.test_dir) for job in others} == {(False, None)}


def test_scores_are_the_best_and_the_simple_baselines(make: MakePlan) -> None:
    plan = make(cold_ratios=[0.2])
    (best,) = parts.score_jobs(plan, folders, BEST)
    assert (best.name, best.config, best.seeds) == ("test", BEST["music", "books->movies@0.2"], (0, 1))
    rows = parts.baseline_jobs(plan, "score", folders)
    assert [(job.row, job.model, job.name, job.config, job.seeds) for job in rows] == [
        (name, "baseline", "test", {"baseline": name}, (-1,)) for name in RATINGS.baselines
    ]


def test_what_is_planned_is_what_is_run(make: MakePlan) -> None:
    plan = make()
    planned = {part: [job.trial for job in jobs] for part, jobs in parts.planned(plan).items()}
    assert list(planned) == parts.part_names(plan) == ["search", "sweep:steps", "ablate", "score"]
    assert {part: len(set(names)) for part, names in planned.items()} == WORK
    assert planned["search"] == [job.trial for job in parts.search_jobs(plan, folders)]
    assert planned["sweep:steps"] == [job.trial for job in parts.sweep_jobs(plan, "steps", folders, BEST)]
    assert planned["ablate"] == [job.trial for job in parts.ablation_jobs(plan, folders, BEST)]


def test_parts_that_are_left_out_have_no_jobs(make: MakePlan) -> None:
    plan = make(drop=("search", "sweeps", "ablate", "score"))
    assert parts.part_names(plan) == []
    assert parts.planned(plan) == {}
    assert parts.search_jobs(plan, folders) == parts.ablation_jobs(plan, folders, {}) == []
    assert parts.score_jobs(plan, folders, {}) == parts.baseline_jobs(plan, "score", folders) == []
