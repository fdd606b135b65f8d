"""A home folder that was copied, renamed and given a name full of signs works whole, and leaves the first one alone."""

from __future__ import annotations

import gzip
import json
import shlex
import shutil
from pathlib import Path

import pytest

from study.home import Home
from study.plan.load import load_plan
from study.study import Study
from study.tracking import local_store, tags
from study.tracking.runs import connect, default_uri, find_runs

from .conftest import Finished
from .tiny import study

NAME = "a b%2F?#[x]'é/runs"


@pytest.fixture(scope="module")
def copy(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished home, copied to another place under an odd name."""
    from mlflow.tracking._tracking_service import utils

    utils._artifact_repos_cache.clear()  # of this process, by run id: a home that moves in its sight is a test's alone
    return Path(shutil.copytree(finished.home, tmp_path_factory.mktemp("elsewhere") / NAME))


def files(home: Path) -> dict[str, tuple[int, int]]:
    """Path -> size and time of change of every file."""
    paths = [path for path in home.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


def test_a_copy_is_a_home_of_its_own(finished: Finished, copy: Path) -> None:
    before = files(finished.home)
    ran = study("run", finished.plan, "--home", copy)
    assert (ran.code, ran.err) == (0, "")
    assert "Nothing was left to train." in ran.out
    assert f"report  {copy}/reports/tiny/report.html" in ran.out
    assert "no scored run can be read" not in ran.out
    (printed,) = [line for line in ran.out.splitlines() if line.startswith("MLflow  ")]
    assert shlex.split(printed)[1:] == ["study", "ui", str(finished.plan), "--home", str(copy)]
    assert files(finished.home) == before
    client = connect(default_uri(copy))
    experiment = client.get_experiment_by_name("tiny")
    assert experiment.artifact_location == Home(copy).artifacts.as_uri()
    trials = [run for run in find_runs(client, experiment.experiment_id) if tags.COMMAND in run.data.tags]
    assert len(trials) == 20
    for run in trials:
        words = shlex.split(run.data.tags[tags.COMMAND])
        assert words == ["study", "rerun", run.info.run_id, "--home", str(copy)]
        assert run.info.artifact_uri == f"{Home(copy).artifacts.as_uri()}/{run.info.run_id}/artifacts"


def test_the_best_are_read_trained_again_and_served_in_the_copy(finished: Finished, copy: Path) -> None:
    assert study("best", finished.plan, "--home", copy).out == study("best", finished.plan, "--home", finished.home).out
    best = Study(load_plan(str(finished.plan)), home=copy).best()
    run_id = best["music", "books->movies@0.2"][0].run_id
    assert study("rerun", run_id, "--home", copy).out.splitlines()[-1] == "the same to the last bit"
    (raw,) = copy.glob("simulated/*/books.jsonl.gz")
    with gzip.open(raw, "rt") as file:
        user = json.loads(file.readline())["user_id"]
    told = [study("recommend", finished.plan, "--home", home, "--user", user) for home in (finished.home, copy)]
    assert [ran.code for ran in told] == [0, 0]
    assert told[0].out == told[1].out
    checked = study("check", finished.plan, "--home", copy)
    assert (checked.code, checked.err) == (0, "")


def test_mlflow_itself_loads_a_model_of_the_copy(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    client = connect(default_uri(copy))
    name = min(model.name for model in client.search_registered_models())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", default_uri(copy))  # as the model's description says
    model = mlflow.pyfunc.load_model(f"models:/{name}@best", dst_path=str(tmp_path))
    assert model.metadata.run_id == client.get_model_version_by_alias(name, "best").run_id


def test_a_copy_that_cannot_be_written_is_read_all_the_same(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = shutil.copytree(finished.home, tmp_path / "first")
    ours = Study(load_plan(str(finished.plan)), home=first)
    best = ours.best()
    first.rename(tmp_path / "second")
    monkeypatch.setattr(local_store, "_writable", lambda database: False)
    moved = Study(load_plan(str(finished.plan)), home=tmp_path / "second")
    assert moved.best() == best
    experiment = connect(default_uri(tmp_path / "second")).get_experiment_by_name("tiny")
    assert experiment.artifact_location == Home(first).artifacts.as_uri()
    assert [domain["name"] for domain in moved.results().domains] == ["books", "movies"]


def test_extract_in_a_home_of_an_odd_name(finished: Finished, tmp_path: Path) -> None:
    ran = study("extract", finished.plan, "--home", tmp_path / NAME)
    assert (ran.code, ran.err) == (0, "")
    made = {path.name for path in (tmp_path / NAME / "tasks").iterdir()}
    assert made >= {path.name for path in (finished.home / "tasks").iterdir() if path.name.startswith("books-movies-")}
    assert [path.name for path in tmp_path.iterdir()] == ["a b%2F?#[x]'é"]
