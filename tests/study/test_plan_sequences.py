"""Plans of sequences: what they hold, what only one kind of model reads, sweeps of the ratio, published numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from study import parts
from study.plan.load import PlanError, load_plan
from study.plan.schema import Plan, SequencePlan, SplitPlan
from study.specs import Cell
from trainables.interface import Selection
from trainables.task_types import RATINGS, SEQUENCES
from trainables.tasks.arrays import TaskFolders
from trainables.tasks.rating_build import SplitSpec
from trainables.tasks.sequential import SequenceSpec

from . import tiny
from .tiny_sequences import PLAN, WORK, write_sequences

BASE = {**PLAN["base"], "pseudo_items": 0}
TEXT = {"text": {"encoder": {"model": "minilm"}}}
MakePlan = Callable[..., Plan]


@pytest.fixture
def make(tmp_path: Path) -> MakePlan:
    return lambda **changes: load_plan(str(write_sequences(tmp_path, features=TEXT, base=BASE, **changes)))


def faults(make: MakePlan, **changes: Any) -> tuple[str, ...]:
    with pytest.raises(PlanError, match=r"\S") as caught:
        make(**changes)
    return caught.value.faults


def folders(cell: Cell, feature_set: str) -> TaskFolders:
    root = Path("/tasks") / cell.name
    return TaskFolders(key="k", task_dir=root / "search", test_dir=root / "test", counts={})


# --- plans --------------------------------------------------------------------------------------------------------


def test_a_plan_of_sequences_is_bound(make: MakePlan) -> None:
    plan = make(sequences__data_seed=3)
    assert plan.task_type is SEQUENCES
    assert plan.rules == SequencePlan(users="users.parquet", negatives=19, data_seed=3)
    assert plan.rules.at(0.2) == SequenceSpec(overlap_ratio=0.2, negatives=19, data_seed=3)
    assert plan.selection == Selection("val_ndcg10", "maximize")
    assert plan.feature_set == "text"
    assert [cell.name for cell in plan.cells] == ["film->song@1", "song->film@1"]
    assert [cell.name for cell in plan.swept_cells] == ["film->song@0.5", "song->film@0.5"]
    bare = make(drop=("sequences", "sweeps"))
    assert bare.rules == SequencePlan()
    assert bare.swept_cells == []


def test_a_plan_of_ratings_keeps_its_split(tmp_path: Path) -> None:
    plan = load_plan(str(tiny.write_plan(tmp_path, split={"data_seed": 4})))
    assert plan.task_type is RATINGS
    assert plan.rules == SplitPlan(data_seed=4)
    assert plan.rules.at(0.2) == SplitSpec(cold_ratio=0.2, data_seed=4)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (
            {"overlap_ratios": [0.0]},
            "plan.yaml: overlap_ratios: sequences.overlap_ratio is 0.0; give a number above 0, up to 1",
        ),
        (
            {"overlap_ratios": [1.5]},
            "plan.yaml: overlap_ratios: sequences.overlap_ratio is 1.5; give a number above 0, up to 1",
        ),
        (
            {"sequences": {"protocols": ["inter", "outer"]}},
            "plan.yaml: sequences.protocols is ('inter', 'outer'); give one or more of as-given, inter, each once",
        ),
        (
            {"sequences": {"negatives": 0}},
            "plan.yaml: sequences.negatives is 0; give a whole number of at least 1",
        ),
        ({"sequences": {"user": "x"}}, "plan.yaml: sequences.unknown key 'user'; did you mean 'users'?"),
        (
            {"sequences": {"data_seed": -1}},
            "plan.yaml: sequences.data_seed is -1; give a whole number of at least 0",
        ),
        (
            {"split": {"validation_share": 0.2}},
            "plan.yaml: split is for models of ratings, and lgcd is one of sequences; leave it out",
        ),
        (
            {"features": {**TEXT, "ratings": {"factors": 4}}},
            "plan.yaml: features.ratings is for models of ratings, and lgcd is one of sequences; leave it out",
        ),
        ({"features": {}}, "plan.yaml: features.text is missing, and lgcd reads titles; set its encoder"),
        (
            {"published": "lgcd/food"},
            "plan.yaml: published: unknown 'lgcd/food'; choose from lgcd/food-kitchen, lgcd/movie-book, music/amazon",
        ),
        (
            {"published": "lgcd/food-kitchen"},
            "plan.yaml: published: lgcd/food-kitchen has no numbers of film->song, song->film; it has kitchen->food, "
            "food->kitchen: name the domains so, or leave published out",
        ),
        (
            {"sweeps__overlap_ratio__values": []},
            "plan.yaml: sweeps.overlap_ratio.values is []; give at least one, each once",
        ),
        (
            {"sweeps__overlap_ratio__values": [0.5, 2]},
            "plan.yaml: sweeps.overlap_ratio: sequences.overlap_ratio is 2; give a number above 0, up to 1",
        ),
        (
            {"sweeps__overlap_ratio__values": ["half"]},
            "plan.yaml: sweeps.overlap_ratio: sequences.overlap_ratio is 'half'; give a number above 0, up to 1",
        ),
        (
            {"sweeps__overlap_ratio__values": [0.5, 0.50000001]},
            "plan.yaml: sweeps.overlap_ratio: names keep 6 digits, so two of [0.5, 0.50000001] are one cell; "
            "keep one of them",
        ),
        (
            {"overlap_ratios": [0.5, 1.0]},
            "plan.yaml: sweeps.overlap_ratio: starts from the best of one ratio, but overlap_ratios are [0.5, 1.0]; "
            "keep one",
        ),
    ],
)
def test_one_fault(tmp_path: Path, changes: dict[str, Any], fault: str) -> None:
    def make(**changes: Any) -> Plan:
        return load_plan(str(write_sequences(tmp_path, **{"features": TEXT, "base": BASE, **changes})))

    assert faults(make, **changes) == (fault,)


@pytest.mark.parametrize(
    ("changes", "place", "value"),
    [
        ({"base": {**PLAN["base"], "pseudo_items": 6}}, "base", 6),
        ({"sweeps": {"pseudo_items": {"values": [1, 5, 20]}}}, "sweeps.pseudo_items", 20),
        (
            {"space_file": "v: {pseudo_items: {CategoricalDistribution: {choices: [1, 10]}}}"},
            "space {folder}/space.yaml/v", 10,
        ),
        (
            {"space_file": "v: {pseudo_items: {IntDistribution: {low: 1, high: 12}}}"},
            "space {folder}/space.yaml/v", 12,
        ),
    ],
)  # fmt: skip
def test_more_pseudo_items_than_texts_are_generated(
    tmp_path: Path, changes: dict[str, Any], place: str, value: int
) -> None:
    """A silent cap would draw a flat curve."""
    features, base = {**TEXT, "pseudo": {"texts": 5}}, {**PLAN["base"], "pseudo_items": 5}

    def make(**changes: Any) -> Plan:
        return load_plan(str(write_sequences(tmp_path, **{"features": features, "base": base, **changes})))

    assert faults(make, **changes) == (
        f"plan.yaml: {place.format(folder=tmp_path)}: pseudo_items is {value}, and features.pseudo.texts generates 5 a "
        "user; give at most 5, or generate more texts",
    )
    assert make(sweeps={"pseudo_items": {"values": [1, 5]}}).sweeps["pseudo_items"].values == (1, 5)


def test_sequences_are_not_for_ratings(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="sequences is for models of sequences, and music is one of ratings;"):
        load_plan(str(tiny.write_plan(tmp_path, sequences={"negatives": 9})))


# --- jobs ---------------------------------------------------------------------------------------------------------


def test_a_sweep_of_the_ratio_trains_the_best_in_other_cells(make: MakePlan) -> None:
    best = {("lgcd", "film->song@1"): {"dropout": 0.1}, ("lgcd", "song->film@1"): {"dropout": 0.2}}
    jobs = parts.sweep_jobs(make(), "overlap_ratio", folders, best)
    assert [(job.cell.name, job.name, job.config, job.task_dir) for job in jobs] == [
        ("film->song@0.5", "overlap_ratio=0.5", {"dropout": 0.1}, "/tasks/film->song@0.5/search"),
        ("song->film@0.5", "overlap_ratio=0.5", {"dropout": 0.2}, "/tasks/song->film@0.5/search"),
        ("film->song@1", "overlap_ratio=1.0", {"dropout": 0.1}, "/tasks/film->song@1/search"),
        ("song->film@1", "overlap_ratio=1.0", {"dropout": 0.2}, "/tasks/song->film@1/search"),
    ]
    assert {job.seeds for job in jobs} == {(0, 1)}


def test_the_bar_stands_beside_it_on_validation(make: MakePlan) -> None:
    plan = make()
    jobs = parts.baseline_jobs(plan, "sweep:overlap_ratio", folders)
    assert [(job.cell.name, job.row, job.name, job.test_dir) for job in jobs] == [
        (cell, "item_knn", f"overlap_ratio={ratio}", None)
        for ratio, cells in (("0.5", ("film->song@0.5", "song->film@0.5")), ("1.0", ("film->song@1", "song->film@1")))
        for cell in cells
    ]
    assert parts.baseline_jobs(plan, "sweep:steps", folders) == []
    scores = parts.baseline_jobs(plan, "score", folders)
    assert [(job.row, job.name) for job in scores[:3]] == [(name, "test") for name in SEQUENCES.baselines]
    assert {job.test_dir for job in scores} == {"/tasks/film->song@1/test", "/tasks/song->film@1/test"}


def test_without_titles_no_baseline_reads_them(tmp_path: Path) -> None:
    plan = write_sequences(tmp_path, features={}, model="sasrec", base={}, drop=("search", "sweeps", "ablate", "space"))
    jobs = parts.planned(load_plan(str(plan)))["score"]
    assert {job.row for job in jobs} == {"sasrec", "popularity", "item_knn"}
    assert all(job.feature_set == "ids" for job in jobs)


def test_what_is_planned(make: MakePlan) -> None:
    planned = {part: [job.trial for job in jobs] for part, jobs in parts.planned(make()).items()}
    assert {part: len(set(names)) for part, names in planned.items()} == WORK
    assert "sweep:overlap_ratio/film->song@0.5/item_knn/overlap_ratio=0.5" in planned["sweep:overlap_ratio"]


def test_a_sweep_of_the_cold_ratio_is_one_of_cells_too(tmp_path: Path) -> None:
    plan = load_plan(
        str(tiny.write_plan(tmp_path, cold_ratios=[0.5], sweeps__cold_ratio={"values": [0.2, 0.5, 0.8], "seeds": [0]}))
    )
    assert [cell.name for cell in plan.swept_cells] == ["books->movies@0.2", "books->movies@0.8"]
    assert parts.baseline_jobs(plan, "sweep:cold_ratio", folders)[0].row == "source_offset"
