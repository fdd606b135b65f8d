"""A study with rows: a subject and its rivals in one plan. What a plan may say, and which jobs come of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from features.errors import InputError
from study import parts
from study.plan.load import PlanError, load_plan
from study.plan.schema import Plan, swept_rows
from study.study import Study

from .test_parts import folders
from .tiny import write_plan

COMPARE = {
    "emcdr": {"space": "emcdr/paper"},
    "emcdr_plain": {
        "model": "emcdr", "space": "emcdr/paper", "search": {"trials": 1}, "title": "EMCDR as published",
        "base": {"rating_offset": "none", "calibrate": False},
    },
}  # fmt: skip
MakePlan = Callable[..., Plan]


@pytest.fixture
def make(tmp_path: Path) -> MakePlan:
    return lambda **changes: load_plan(str(write_plan(tmp_path, **{"compare": COMPARE, **changes})))


def faults(make: MakePlan, **changes: Any) -> tuple[str, ...]:
    with pytest.raises(PlanError, match=r"\S") as caught:
        make(**changes)
    return caught.value.faults


def test_the_subject_comes_first_and_has_the_name_of_its_model(make: MakePlan) -> None:
    subject, emcdr, plain = make().rows
    assert [row.name for row in (subject, emcdr, plain)] == ["music", "emcdr", "emcdr_plain"]
    assert [row.title for row in (subject, emcdr, plain)] == ["MuSiC", "EMCDR", "EMCDR as published"]
    assert (plain.model, plain.config["rating_offset"], plain.config["calibrate"]) == ("emcdr", "none", False)
    assert emcdr.config["rating_offset"] == "source_offset", "the default"
    assert subject.search is not None
    assert emcdr.search is not None
    assert plain.search is not None
    assert (subject.search.trials, emcdr.search.trials, plain.search.trials) == (2, 2, 1)
    assert emcdr.search.seeds == subject.search.seeds


def test_points_of_the_search_are_of_the_subjects_space(make: MakePlan) -> None:
    subject, emcdr, _ = make(search__points_to_evaluate=[{"steps": 2}]).rows
    assert subject.search is not None
    assert emcdr.search is not None
    assert (len(subject.search.points_to_evaluate), emcdr.search.points_to_evaluate) == (1, ())


def test_rows_and_cells_take_turns_in_a_search(make: MakePlan) -> None:
    jobs = parts.search_jobs(make(), folders)
    assert [(job.name, job.cell.ratio, job.row) for job in jobs] == [
        *(("0000", ratio, row) for ratio in (0.2, 0.5) for row in ("music", "emcdr", "emcdr_plain")),
        *(("0001", ratio, row) for ratio in (0.2, 0.5) for row in ("music", "emcdr")),
    ]
    assert {job.trial for job in jobs} >= {"search/books->movies@0.2/emcdr_plain/0000"}
    assert {(job.row, job.model) for job in jobs} == {
        ("music", "music"), ("emcdr", "emcdr"), ("emcdr_plain", "emcdr"),
    }  # fmt: skip


def test_every_row_is_scored_with_its_own_best(make: MakePlan) -> None:
    best = {("emcdr", "books->movies@0.2"): {"dim": 8}}
    jobs = {job.trial: job for job in parts.score_jobs(make(), folders, best)}
    assert len(jobs) == 6
    assert jobs["score/books->movies@0.2/emcdr/test"].config == {"dim": 8}
    assert jobs["score/books->movies@0.2/emcdr_plain/test"].config == {}
    assert all(job.score for job in jobs.values())


def test_sweeps_are_of_the_subject_unless_they_name_rows(make: MakePlan) -> None:
    sweep = {"values": [0.2, 0.8], "seeds": [0], "models": "all"}
    plan = make(cold_ratios=[0.5], sweeps={"cold_ratio": sweep, "steps": {"values": [2]}})
    assert [row.name for row in swept_rows(plan, "cold_ratio")] == ["music", "emcdr", "emcdr_plain"]
    assert [row.name for row in swept_rows(plan, "steps")] == ["music"]
    jobs = parts.sweep_jobs(plan, "cold_ratio", folders, {("emcdr", "books->movies@0.5"): {"dim": 16}})
    assert [(job.cell.ratio, job.row, job.config) for job in jobs[:3]] == [
        (0.2, "music", {}), (0.2, "emcdr", {"dim": 16}), (0.2, "emcdr_plain", {}),
    ]  # fmt: skip


def test_ablations_are_of_the_subject(make: MakePlan) -> None:
    assert {job.row for job in parts.ablation_jobs(make(), folders, {})} == {"music"}


def test_dropping_a_row_changes_no_other_jobs(make: MakePlan) -> None:
    more, less = (parts.planned(make(compare=rows)) for rows in (COMPARE, {"emcdr": COMPARE["emcdr"]}))
    for part, jobs in less.items():
        kept = [job for job in more[part] if job.row != "emcdr_plain"]
        assert kept == jobs


def test_jobs_of_some_rows(make: MakePlan) -> None:
    jobs = parts.planned(make())["score"]
    assert {job.row for job in parts.of_rows(jobs, ["emcdr"])} == {"emcdr"}
    assert parts.of_rows(jobs, []) == jobs


def test_only_takes_rows_of_the_plan(make: MakePlan, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^plan tiny: has no row 'cmf'; choose from music, emcdr, emcdr_plain$"):
        Study(make(), home=tmp_path, only=["cmf"])


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (
            {"compare": {"music": {"space": "music/paper"}}},
            "plan.yaml: compare.music is music, which is the subject; name a row with letters, digits, - and _, and as no "
            "other row or baseline",
        ),
        (
            {"compare": {"item_mean": {"model": "emcdr", "space": "emcdr/paper"}}},
            "plan.yaml: compare.item_mean is 'item_mean'; name a row with letters, digits, - and _, and as no other row or "
            "baseline",
        ),
        (
            {"compare": {"baselines": {"model": "emcdr", "space": "emcdr/paper"}}},
            "plan.yaml: compare.baselines is 'baselines'; name a row with letters, digits, - and _, and as no other row or "
            "baseline",
        ),
        (
            {"compare": {"lgcd": {"space": "lgcd/paper"}}},
            "plan.yaml: compare.lgcd: lgcd trains on tasks of sequences, and music on ratings; name a model of the "
            "subject's task type",
        ),
        (
            {"compare": {"emcdr": {}}},
            "plan.yaml: search needs a space; set `compare.emcdr.space`, e.g. emcdr/paper",
        ),
        (
            {"compare": {"emcdr": {"space": "emcdr/paper", "base": {"dims": 3}}}},
            "plan.yaml: compare.emcdr.base: unknown field 'dims'; did you mean 'dim'?",
        ),
        (
            {"compare": {"emcdr": {"space": "emcdr/paper", "search": {"trials": -1}}}},
            "plan.yaml: compare.emcdr.search.trials is -1; give 1 to 100,000",
        ),
        (
            {"sweeps": {"steps": {"values": [2], "models": ["cmf"]}}},
            "plan.yaml: sweeps.steps.models names cmf; choose from music, emcdr, emcdr_plain, or say all",
        ),
        (
            {"sweeps": {"steps": {"values": [2], "models": ["emcdr"]}}},
            "plan.yaml: sweeps.steps: unknown field 'steps'; choose from mapping",
        ),
        (
            {"published": "lgcd/food-kitchen"},
            "plan.yaml: published: lgcd/food-kitchen has no numbers of books->movies;",
        ),
    ],
)
def test_one_fault(make: MakePlan, changes: dict[str, Any], fault: str) -> None:
    (line,) = faults(make, **changes)
    assert line.startswith(fault)
