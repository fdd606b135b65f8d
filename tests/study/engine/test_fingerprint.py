"""Which changes of a plan ask another question, and which do not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from search_spaces import load_space
from study.engine.fingerprint import (
    checkpoint_identity,
    fingerprint,
    fingerprints,
    parse_study_name,
    study_name,
)  # fmt: skip
from study.specs import Cell, Cluster, Job, Objective, Recipe, Resources, RowRecipe, SearchSpec, WarmStart
from study.tracking import tags
from trainables.interface import Selection

FIELDS = ["steps", "beta", "dropout", "lr", "epochs", "activation", "schedule", "variance_end"]
SEARCH = SearchSpec(trials=3, seeds=(0, 1), sampler_args={"n_startup_trials": 4}, seed=2)
CELL = Cell(source="a", target="b", ratio=0.2)


def recipe(search: SearchSpec = SEARCH, base: dict[str, Any] | None = None, **fields: Any) -> Recipe:
    row = RowRecipe(
        trainable="t:r", model="music", base=base or {"lr": 0.1, "steps": 5}, space=load_space("music/paper", FIELDS),
        search=search,
    )  # fmt: skip
    given = {"rows": {"music": row}, "selection": Selection("val_rmse", "minimize"), **fields}
    return Recipe(experiment="e", home=Path(), **given)


def drawn(**fields: Any) -> Job:
    given: dict[str, Any] = {
        "part": "search", "cell": CELL, "row": "music", "model": "music", "name": "0000", "config": None, "seeds": (0, 1),
        "feature_set": "text", "task_dir": "/home/tasks/a-b-0123/search", **fields,
    }  # fmt: skip
    return Job(**given)


def fixed(**fields: Any) -> Job:
    return drawn(**{"part": "sweep:steps", "name": "steps=5", "config": {"steps": 5}, "seeds": (0,), **fields})


def test_hashes_stay_what_they_are() -> None:
    """Searches of weeks depend on them: what is new in a plan enters them only where it is set."""
    assert fingerprint(recipe(), drawn()).startswith("a318dadf57f8d1d7bff4da4d2b8daefd")
    assert fingerprint(recipe(), fixed()).startswith("6293f02140e06cfda18a54fdc5644f67")


@pytest.mark.parametrize(
    "same",
    [
        (recipe(replace(SEARCH, storage="sqlite:///x.db", trials=9)), drawn()),
        (recipe(resources=Resources(cpus=4), cluster=Cluster(max_concurrent=2)), drawn()),
        (recipe(tags={tags.DATA_KEY: "another domain came to the plan"}), drawn()),
        (recipe(), drawn(name="0007")),
        (recipe(), drawn(task_dir="/other/home/tasks/a-b-0123/search")),
    ],
    ids=["storage", "resources", "tags", "number", "home"],
)
def test_what_leaves_a_search_as_it_is(same: tuple[Recipe, Job]) -> None:
    assert fingerprint(*same) == fingerprint(recipe(), drawn())


@pytest.mark.parametrize(
    "other",
    [
        (recipe(replace(SEARCH, points_to_evaluate=({"lr": 1e-3},))), drawn()),
        (recipe(replace(SEARCH, warm_start=WarmStart(plan="p"))), drawn()),
        (recipe(replace(SEARCH, seed=3)), drawn()),
        (recipe(replace(SEARCH, sampler="RandomSampler", sampler_args={})), drawn()),
        (recipe(replace(SEARCH, pruner="MedianPruner")), drawn()),
        (recipe(replace(SEARCH, objectives=(Objective(metric="val_mae", direction="minimize"),))), drawn()),
        (recipe(selection=Selection("val_rmse", "maximize")), drawn()),
        (recipe(base={"lr": 0.2}), drawn()),
        (recipe(), drawn(seeds=(0,))),
        (recipe(), drawn(task_dir="/home/tasks/a-b-4567/search")),
        (recipe(), drawn(feature_set="ratings")),
    ],
    ids=[
        "points", "warm", "seed", "sampler", "pruner", "objectives", "selection", "base", "seeds", "task", "features"
    ],
)  # fmt: skip
def test_what_makes_another_search(other: tuple[Recipe, Job]) -> None:
    assert fingerprint(*other) != fingerprint(recipe(), drawn())


def test_a_fixed_job_is_its_whole_configuration() -> None:
    assert fingerprint(recipe(), fixed()) == fingerprint(recipe(replace(SEARCH, seed=9)), fixed())
    assert fingerprint(recipe(), fixed(config={"steps": 6})) != fingerprint(recipe(), fixed())
    assert fingerprint(recipe(base={"steps": 9, "lr": 0.1}), fixed()) == fingerprint(recipe(), fixed())
    assert fingerprint(recipe(), fixed(score=True, test_dir="test")) != fingerprint(recipe(), fixed())


def test_a_model_of_another_version_is_trained_again() -> None:
    def of_version(version: int) -> Recipe:
        known = recipe()
        return replace(known, rows={"music": replace(known.rows["music"], version=version)})

    for job in (drawn(), fixed()):
        hashes = [fingerprint(of_version(version), job) for version in (1, 2, 3)]
        assert hashes[0] == fingerprint(recipe(), job)
        assert len(set(hashes)) == 3


def test_all_numbers_of_a_search_share_its_fingerprint() -> None:
    jobs = [drawn(), drawn(name="0001"), fixed()]
    hashes = fingerprints(recipe(), jobs)
    assert hashes == {job.trial: fingerprint(recipe(), job) for job in jobs}


def test_the_name_of_a_study_says_cell_row_and_search() -> None:
    assert study_name(recipe(), drawn(), "0123456789abcdef") == "a->b@0.2/music/0123456789ab"
    shared = recipe(replace(SEARCH, storage="sqlite:///x.db"))
    assert study_name(shared, drawn(), "0123456789abcdef") == "e/a->b@0.2/music/0123456789ab"
    assert parse_study_name("a->b@0.2/music/0123456789ab") == (None, "music", "a->b@0.2")
    assert parse_study_name("e/a->b@0.2/music/0123456789ab") == ("e", "music", "a->b@0.2")
    assert parse_study_name("somebody's own") is None


def test_a_checkpoint_is_of_use_for_the_same_work_alone() -> None:
    def identity(config: dict[str, Any] | None = None, seeds: tuple[int, ...] = (0,), **fields: Any) -> str:
        job = fixed(seeds=seeds)
        return checkpoint_identity(recipe(**fields), job, fingerprint(recipe(), job), config or {"steps": 5})

    assert identity() == identity(resources=Resources(cpus=4))
    for other in (
        identity(config={"steps": 6}), identity(tags={tags.COMMIT: "other code"}),
        identity(tags={tags.VERSIONS: "other packages"}), identity(resources=Resources(gpus=1)),
        identity(seeds=(1,)),
    ):  # fmt: skip
        assert other != identity()
