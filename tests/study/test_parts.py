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
from trainables.interface import load_model
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


def paper_rows() -> dict[str, Any]:
    """A second row of the subject's model, as printed."""
    row = {"model": "music", "preset": "paper", "base": {"user_mlps": "two", "epochs": 3}, "space": "music/paper"}
    return {"compare": {"music_paper": row}, "features": {"ratings": {"factors": 4}}}


def test_a_preset_lies_between_the_defaults_and_the_base(make: MakePlan) -> None:
    ours, paper = make(**paper_rows()).rows
    assert (ours.preset_tag, paper.preset_tag) == ("ours", "paper+epochs+user_mlps")
    preset = load_model("music").PRESETS["paper"]
    assert {name: paper.config[name] for name in preset if name != "epochs"} == {
        name: value for name, value in preset.items() if name != "epochs"
    }
    assert (paper.config["epochs"], paper.config["user_mlps"], paper.config["dim"]) == (3, "two", 32)
    assert ours.config == make().subject.config
    subject = make(preset="paper", drop=("base",)).subject
    assert (subject.preset_tag, subject.config["epochs"]) == ("paper", 100)


def test_ablations_of_both_presets_stand_beside_their_own_full_model(make: MakePlan) -> None:
    plan = make(**paper_rows(), ablate={"variants": ["wo_mllm", "wo_side"], "models": ["music", "music_paper"]})
    jobs = [job for job in parts.ablation_jobs(plan, folders, {}) if job.cell.ratio == 0.2]
    assert [(job.row, job.name, job.config, job.preset) for job in jobs] == [
        ("music", "full", {}, "ours"),
        ("music", "wo_mllm", {}, "ours"),
        ("music", "wo_side", {"side": False}, "ours"),
        ("music_paper", "full", {}, "paper+epochs+user_mlps"),
        ("music_paper", "wo_mllm", {"user_mlps": "two"}, "paper+epochs+user_mlps"),
        ("music_paper", "wo_side", {"side": False}, "paper+epochs+user_mlps"),
    ]


def test_parts_that_are_compared_on_test_users_are_given_them_and_no_search_is(make: MakePlan) -> None:
    plan = make(sweeps__steps__compare="test", ablate__compare="test")
    jobs = {part: parts.part_jobs(plan, part, folders, {}) for part in parts.part_names(plan)}
    assert {part: {job.score for job in made} for part, made in jobs.items()} == {
        "search": {False}, "sweep:steps": {True}, "ablate": {True}, "score": {True},
    }  # fmt: skip
    assert {job.test_dir for job in jobs["search"]} == {None}
    assert {job.test_dir for job in jobs["ablate"]} == {f"/tasks/{cell.name}-ratings/test" for cell in plan.cells}


def test_the_baseline_beside_a_sweep_of_the_ratio_is_measured_on_the_same_users(make: MakePlan) -> None:
    """Else the figure of the sweep finds validation users alone that all of its rows were measured on."""
    for compare, on_test in (("validation", False), ("test", True)):
        sweep = {"values": [0.2, 0.5], "seeds": [1], "start": "base", "compare": compare}
        jobs = parts.part_jobs(make(cold_ratios=[0.2], sweeps={"cold_ratio": sweep}), "sweep:cold_ratio", folders, {})
        assert {(job.row, job.score, job.test_dir is not None) for job in jobs} == {
            (RATINGS.reference, on_test, on_test), ("music", on_test, on_test),
        }  # fmt: skip


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
