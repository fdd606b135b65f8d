"""From a plan to task folders: where raw files are looked for, what is made, and that nothing is made twice."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from features.encoders.spec import ResolvedEncoder
from features.encoders.throughput import Throughput
from features.errors import InputError
from features.extraction import workers
from features.extraction.workers import Actors, WorkTotals
from study.data.domains import data_folder, prepare_domains
from study.data.prepare import describe_data, feature_sets, prepare
from study.data.preview import extraction_lines
from study.data.tables import estimates, table_metrics
from study.home import Home
from study.plan.load import load_plan
from study.plan.schema import Plan
from study.progress import Advance, no_progress
from study.specs import Cluster
from trainables.tasks.rating import load_task
from trainables.trial import run

from ..features.conftest import save_encoder
from ..features.seeing import save_seeing
from .tiny import SIMULATE, made, write_plan


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """The tiny plan, on given files."""
    return load_plan(str(write_plan(tmp_path, drop=("simulate",))))


def stamps(home: Home) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in home.path.rglob("*") if path.is_file()}


def test_raw_files_may_lie_one_folder_below(plan: Plan, raw: Path, tmp_path: Path) -> None:
    assert data_folder(plan, raw, Home(tmp_path), no_progress) == raw
    below = tmp_path / "all" / "amazon"
    shutil.copytree(raw, below)
    (tmp_path / "all" / "another").mkdir()
    assert data_folder(plan, tmp_path / "all", Home(tmp_path), no_progress) == below
    assert data_folder(plan, tmp_path / "all" / "another", Home(tmp_path), no_progress) == tmp_path / "all" / "another"


def test_raw_files_have_to_be_named(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"plan tiny: reads .*; say where they are with --data DIR"):
        data_folder(plan, None, Home(tmp_path), no_progress)


def test_a_simulation_is_made_once(tmp_path: Path, home: Home) -> None:
    plan = load_plan(str(write_plan(tmp_path)))
    folder = data_folder(plan, None, home, no_progress)
    before = stamps(home)
    assert {"books.jsonl.gz", "SIMULATED.json"} <= {path.name for path in folder.iterdir()}
    assert data_folder(plan, None, home, no_progress) == folder
    assert stamps(home) == before
    other = load_plan(str(write_plan(tmp_path, simulate={**SIMULATE, "seed": 4})))
    assert data_folder(other, None, home, no_progress) != folder
    with pytest.raises(InputError, match="simulates its domains; leave the option out"):
        data_folder(plan, tmp_path, home, no_progress)


def test_everything_is_made_once(plan: Plan, raw: Path, home: Home) -> None:
    steps: list[tuple[str, int]] = []

    def start_progress(what: str, size: int) -> Callable[..., None]:
        return lambda done, *counts: steps.append((what, done))

    inputs = prepare(plan, raw, home, start_progress)
    assert made(home.path) == {
        "domains": ["books", "movies"], "store/features": [], "tasks": ["books-movies", "books-movies"],
    }  # fmt: skip
    assert list(inputs.tasks) == [("books->movies@0.2", "ratings"), ("books->movies@0.5", "ratings")]
    assert inputs.simulated, "the label of the raw files stays with them"
    assert steps[-1] == ("building tasks", 2)
    before = stamps(home)
    again = prepare(plan, raw, home, no_progress)
    assert stamps(home) == before
    assert (again.data_key, again.feature_key) == (inputs.data_key, inputs.feature_key)
    assert again.tasks == inputs.tasks


def test_keys_change_with_what_they_stand_for(tmp_path: Path, raw: Path, home: Home) -> None:
    def keys(**changes: object) -> tuple[str, str]:
        changed = load_plan(str(write_plan(tmp_path, drop=("simulate",), cold_ratios=[0.5], **changes)))
        inputs = prepare(changed, raw, home, no_progress)
        return inputs.data_key, inputs.feature_key

    data, features = keys()
    assert keys(search__trials=7) == (data, features)
    assert keys(features={"ratings": {"factors": 5}})[0] == data
    assert keys(features={"ratings": {"factors": 5}})[1] != features
    assert keys(split={"data_seed": 1})[1] != features
    assert keys(domains__books__filters={"min_user_reviews": 8})[0] != data


def test_what_is_logged_of_the_data(plan: Plan, raw: Path, home: Home, tmp_path: Path) -> None:
    inputs = prepare(plan, raw, home, no_progress)
    files = describe_data(plan, inputs, tmp_path / "logs")
    domains, cells = (json.loads(files[name].read_text()) for name in ("domains.json", "cells.json"))
    assert [domain["name"] for domain in domains] == ["books", "movies"]
    assert [(cell["source"], cell["target"], cell["ratio"]) for cell in cells] == [
        ("books", "movies", 0.2), ("books", "movies", 0.5),
    ]  # fmt: skip
    for cell in cells:
        assert cell["overlapping"] == SIMULATE["overlap"]
        assert cell["test_users"] == round(SIMULATE["overlap"] * cell["ratio"])
        assert cell["train_users"] + cell["validation_users"] + cell["test_users"] == cell["overlapping"]
        ratings = cell["train_ratings"] + cell["validation_ratings"] + cell["test_ratings"]
        assert ratings == SIMULATE["domains"]["movies"]["ratings"]


def test_feature_sets_are_those_of_the_plan_and_its_ablations(tmp_path: Path) -> None:
    def sets(**changes: object) -> list[str]:
        return feature_sets(load_plan(str(write_plan(tmp_path, **changes))))

    text = {"text": {"encoder": {"model": "minilm"}}}
    assert sets() == ["ratings"]
    assert sets(features=text) == ["text"]
    assert sets(features=text, ablate__variants=["wo_mllm", "wo_side"]) == ["text", "ratings"]
    assert sets(features=text, drop=("ablate",)) == ["text"]


def test_texts_are_encoded_for_users_of_both_domains_and_items_of_the_target(
    tmp_path: Path, raw: Path, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one job, for one encoder reads them all."""
    encoder = {"model": str(save_encoder(tmp_path / "bert", "bert")), "max_tokens": 16, "max_failed_fraction": 1.0}
    plan = load_plan(
        str(
            write_plan(
                tmp_path, drop=("simulate",), features={"text": {"encoder": encoder, "max_reviews": 2}}, cold_ratios=[0.5],
                ablate__variants=["wo_mllm"],
            )
        )
    )  # fmt: skip
    domains = prepare_domains(plan, raw, home, no_progress)
    expected = {("books", "users"), ("movies", "users"), ("movies", "items")}
    left = estimates(plan, domains, home)
    assert set(left) == expected
    assert all(estimate.rows_left > 0 for estimate in left.values())
    jobs: list[dict[str, Any]] = []

    def run_blocks(*work: Any, **how: Any) -> WorkTotals:
        jobs.append(how)
        return workers.run_blocks(*work, **{**how, "workers": None})

    monkeypatch.setattr("features.extraction.extract.run_blocks", run_blocks)
    bars: list[str] = []

    def start_progress(what: str, size: int) -> Advance:
        bars.append(what)
        return no_progress(what, size)

    inputs = prepare(plan, raw, home, start_progress, actors=Actors(3, on_gpu=True))
    assert [(job["name"], job["workers"]) for job in jobs] == [("EncodeItemsAndUsers", Actors(3, on_gpu=True))]
    assert bars == ["reading books", "reading movies", "users and items: encoding", "building tasks"]
    assert list(inputs.tables) == ["books-users", "movies-users", "movies-items"]
    assert list(inputs.tasks) == [("books->movies@0.5", "text"), ("books->movies@0.5", "ratings")]
    assert made(home.path)["store/features"] == ["books-users", "movies-items", "movies-users"]
    assert {estimate.rows_left for estimate in estimates(plan, domains, home).values()} == {0}


def test_items_are_read_with_their_images_by_an_encoder_of_their_own(
    tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MuSiC's setting: users by a text model of width 32, items by a vision-language model of width 48, and a training."""
    (tmp_path / "sees").mkdir()
    users = {"model": str(save_encoder(tmp_path / "bert", "bert")), "max_tokens": 16, "max_failed_fraction": 1.0}
    items = {"model": str(save_seeing(tmp_path / "sees")), "sees": True, "max_tokens": 16, "max_pixels": 1024}
    features = {"text": {"encoder": users, "max_reviews": 2, "items": {"encoder": items}}}
    size = {"users": 70, "items": 40, "ratings": 600}
    simulate = {**SIMULATE, "images": 1.0, "domains": {"books": size, "movies": size}}
    plan = load_plan(
        str(write_plan(tmp_path, features=features, simulate=simulate, cold_ratios=[0.5], drop=("ablate", "sweeps")))
    )
    domains = prepare_domains(plan, None, home, no_progress)
    measured: list[str] = []

    def measure(resolved: ResolvedEncoder, *sample: Any) -> Throughput:
        measured.append(resolved.spec.model)
        return Throughput(texts_per_second=5.0, tokens_per_second=2.0)

    with monkeypatch.context() as patch:
        patch.setattr("study.data.preview.measure_throughput", measure)
        patch.setattr("study.data.preview.count_threads", lambda: 3)
        said = list(extraction_lines(plan, domains, home, Cluster()))
    assert len(said) == 3
    assert measured == [users["model"]], "once for each encoder, and for none that has images to find"
    for line in said[:2]:
        tokens, minutes = re.search(
            r"about ([\d,]+) tokens, .*; about ([\d.]+) min on 3 workers at 2 tok", line
        ).groups()  # type: ignore[union-attr]
        assert float(minutes) == pytest.approx(int(tokens.replace(",", "")) / 2 / 3 / 60, abs=0.06)
    assert "tokens without those of images" in said[2]
    assert sum("40 images to find first" in line for line in said) == 1
    inputs = prepare(plan, None, home, no_progress)
    table = inputs.tables["movies-items"]
    assert table.vectors.shape == (40, 48)
    assert table.manifest["rows"]["without_image"] == {}
    assert table.manifest["prompt"]["name"] == "key-features-1"
    metrics = table_metrics(inputs.tables)
    assert metrics["features/movies-items/rows"] == 40
    assert metrics["features/movies-items/without_image"] == 0
    assert metrics["features/books-users/tokens_per_second"] > 0
    task_dir = inputs.tasks["books->movies@0.5", "text"].task_dir
    task = load_task(task_dir)
    assert (task.source.width, task.items.width) == (32, 48)
    *_, last = run("music", plan.subject.config, str(task_dir), [0])
    assert 0 < last.metrics["val_rmse"] < 5
