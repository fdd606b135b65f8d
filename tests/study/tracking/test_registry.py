"""The winner of a cell in the Model Registry, and what it recommends."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from mlflow import MlflowClient

from features.domains.domain import open_domain
from features.errors import InputError
from study.home import Home
from study.specs import Cell
from study.tracking import tags
from study.tracking.local_store import default_uri
from study.tracking.registry import ALIAS, _described, load, model_name, recommend, register
from study.tracking.results import Results, load_results
from trainables.interface import load_model
from trainables.tasks.rating import load_held_out
from trainables.trial import run

from ...trainables.models_in_files import CONSTANT, drop
from ...trainables.sequence_worlds import build_world, make_sequence_world
from ...trainables.worlds import build, make_world
from ..store import MUSIC, Store, empty_store
from ..tiny import study, write_plan
from ..tiny_sequences import write_sequences

CELL = Cell(source="film", target="song", ratio=1.0)


def log_score(
    store: Store,
    cell: Cell,
    row: str,
    model: str,
    folders: Any,
    config: Mapping[str, Any],
    metrics: Mapping[str, float],
) -> str:
    """A finished score as the engine logs it; returns the run's id."""
    run_tags = {
        tags.PART: "score", tags.TRIAL: f"score/{cell.name}/{row}/test", tags.CELL: cell.name, tags.TASK: cell.task,
        tags.RATIO: f"{cell.ratio:g}", tags.ROW: row, tags.MODEL: model, tags.COMMAND: "study rerun X",
    }  # fmt: skip
    document = {
        "row": row, "model": model, "config": dict(config), "cell": asdict(cell), "task_dir": str(folders.task_dir),
        "test_dir": str(folders.test_dir), "seeds": [0],
    }  # fmt: skip
    run_id = str(store.client.create_run(store.experiment_id, tags=run_tags).info.run_id)
    store.client.log_text(run_id, yaml.safe_dump(document), "config.yaml")
    for name, value in metrics.items():
        store.client.log_metric(run_id, name, value)
    store.client.set_terminated(run_id)
    return run_id


def registered(store: Store, folder: Path, rows: Sequence[str]) -> list[str]:
    """What registering says."""
    domains = {domain.name: domain for domain in map(open_domain, (folder / "domains").glob("*-*"))}
    results: Results = load_results(store.uri, store.experiment, MUSIC)
    return register(results, domains, Home(folder), rows)


def test_a_kept_model_is_registered_and_recommends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))  # loading puts the model's own packages before all others
    folders, store, home = build_world(make_sequence_world(0), tmp_path), empty_store(tmp_path), Home(tmp_path)
    client, name = store.client, model_name("tiny", CELL)
    capsys.readouterr()  # what MLflow says of a new database
    config = {"epochs": 1, "encoder_epochs": 1, "steps": 5, "negatives": 16}
    *_, _ = run("lgcd", config, str(folders.task_dir), [0], str(folders.test_dir))
    run_id = log_score(store, CELL, "lgcd", "lgcd", folders, config, {"test_ndcg10": 0.5})
    with pytest.raises(InputError, match="no version with the alias best; run `study score`"):
        load(client, name)

    assert registered(store, tmp_path, ["lgcd"]) == [f"{CELL.name}: registered as {name}, version 1, alias best"]
    version = client.get_model_version_by_alias(name, ALIAS)
    assert version.run_id == run_id
    assert version.tags == {
        "study.cell": CELL.name, "study.row": "lgcd", "study.command": "study rerun X", "study.run": run_id,
    }  # fmt: skip
    assert "| test_ndcg10 | 0.5000 |" in version.description
    stored = Path(version.source.removeprefix("file://"))
    assert (stored / "input_example.json").is_file()
    assert not list(stored.rglob("*.pkl"))

    model, _ = load(client, name)
    users = np.load(folders.test_dir / "user_id.npy")[:3]
    answers = [recommend(client, "tiny", [CELL], home, str(user), 5) for user in users]
    together = model.predict(pd.DataFrame({"history": [list(one.history["item"]) for one in answers]}), params={"n": 5})
    for one, ids, scores in zip(answers, together["items"], together["scores"], strict=True):
        assert list(one.items["item"]) == list(ids), "no user's list depends on another user"
        np.testing.assert_allclose(one.items["score"], scores, rtol=1e-4)
        assert all(item.startswith("s") for item in ids)
        assert all(item.startswith("f") for item in one.history["item"])
    asked = pd.DataFrame({"history": [list(answers[0].history["item"])], "candidates": [["s001", "s002"]]})
    assert sorted(model.predict(asked)["items"][0]) == ["s001", "s002"]
    with pytest.raises(InputError, match="user nobody: has nothing in the domain film"):
        recommend(client, "tiny", [CELL], home, "nobody", 5)
    assert capsys.readouterr().err == ""
    plan = write_sequences(tmp_path, tasks=[["film", "song"]])
    ran = study("recommend", plan, "--home", tmp_path, "-n", 5, "--user", users[0])
    assert (ran.code, ran.err) == (0, "")
    assert re.findall(r"\b[fs]\d{3}\b", ran.out) == [*answers[0].history["item"], *answers[0].items["item"]]
    assert f"model  models:/{name}@best (version 1)\n" in ran.out

    changed = replace(load_model("lgcd"), VERSION=2)
    monkeypatch.setattr("trainables.serving.load_model", lambda _: changed)
    with pytest.raises(InputError, match="this is version 1 of lgcd, which is at 2 here; score the plan again"):
        load(client, name)


def test_a_rating_model_is_registered_once_answers_and_keeps_its_alias(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    world = make_world(users=60, overlap=45, items=30, each=10)
    folders = build(world, tmp_path, "ratings")
    config = {"epochs": 2, "feature_epochs": 1, "side_epochs": 1}
    *_, last = run("music", config, str(folders.task_dir), [0], str(folders.test_dir))
    cell = Cell(source="source", target="target", ratio=0.3)
    store, name = empty_store(tmp_path), model_name("tiny", cell)
    log_score(store, cell, "music", "music", folders, config, {"test_rmse": last.metrics["test_rmse"]})

    assert registered(store, tmp_path, ["music"]) == [f"{cell.name}: registered as {name}, version 1, alias best"]
    assert registered(store, tmp_path, ["music"]) == []
    store.client.delete_registered_model_alias(name, ALIAS)
    assert registered(store, tmp_path, ["music"]) == [f"{cell.name}: {name}, version 1 has the alias best again"]
    assert int(store.client.get_model_version_by_alias(name, ALIAS).version) == 1

    model, _ = load(store.client, name)
    test, users = load_held_out(folders.test_dir), np.load(folders.test_dir / "user_id.npy")
    raw = test.source[torch.arange(len(users))] * test.source.scale + test.source.centre
    asked = pd.DataFrame({"features": raw.double().tolist(), "source_offset": test.source_offset.double().tolist()})
    rated = model.predict(asked, params={"n": 30})
    assert [len(scores) for scores in rated["scores"]] == [30] * len(users)
    for scores in rated["scores"]:
        assert scores == sorted(scores, reverse=True)
        assert 1 <= scores[-1] <= scores[0] <= 5
    ids = np.load(folders.task_dir / "item_id.npy")
    known = [dict(zip(*row, strict=True)) for row in rated[["items", "scores"]].to_numpy()]
    places = zip(test.ratings.user.tolist(), test.ratings.item.tolist(), test.ratings.rating.tolist(), strict=True)
    squares = [(known[user][ids[item]] - rating) ** 2 for user, item, rating in places]
    assert np.mean(squares) ** 0.5 == pytest.approx(last.metrics["test_rmse"], rel=1e-5), "the model that was scored"
    few = asked.assign(candidates=[["t003", "t001"]] * len(users))
    assert [set(items) for items in model.predict(few)["items"]] == [{"t001", "t003"}] * len(users)

    rows, nothing = list(asked["features"]), [math.nan] * 4
    for bad, message in (
        (asked.assign(features=[row[:3] for row in rows]), "features: have 3 numbers, and the model reads 4"),
        (asked.assign(features=[rows[0][:3], *rows[1:]]), "features: have 3 to 4 numbers"),
        (asked.assign(features=[nothing, *rows[1:]]), "features: row 0 has a number that is not finite"),
        (asked.assign(source_offset=[0.0, math.inf] + [0.0] * (len(users) - 2)), "source_offset: row 1 has a number"),
        (asked[:0], "users: there is no row"),
    ):
        with pytest.raises(InputError, match=message):
            model.predict(bad)

    tables = {side: {"reader": "table", "interactions": f"{side}.parquet"} for side in ("source", "target")}
    plan = write_plan(tmp_path, tasks=[["source", "target"]], cold_ratios=[0.3], domains=tables, drop=("simulate",))
    words = ("recommend", plan, "--home", tmp_path, "-n", 3, "--user")
    ran = study(*words, users[1])
    assert (ran.code, ran.err) == (0, "")
    chosen = sorted(world.source.loc[world.source["user_id"] == users[1], "item_id"])
    assert sorted(re.findall(r"s\d{3}", ran.out)) == chosen  # without times their order says nothing
    assert re.findall(r"t\d{3}", ran.out) == rated["items"][1][:3]
    assert f"{rated['scores'][1][0]:.3f}" in ran.out
    assert f"model  models:/{name}@best (version 1)\n" in ran.out
    assert study(*words, "nobody").fault == "user nobody: has nothing in the domain source; give the id of one who has"
    alone = next(user for user in world.source["user_id"] if user not in set(world.target["user_id"]))
    assert study(*words, alone).fault.startswith(f"user {alone}: is not among the users of both domains")


def test_a_rivals_winner_is_registered_on_request_under_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    folders = build(make_world(users=60, overlap=45, items=30, each=10), tmp_path, "ratings")
    cell, store = Cell(source="source", target="target", ratio=0.3), empty_store(tmp_path)
    for row, rate in (("music", 1e-3), ("music_fast", 1e-1)):
        config = {"epochs": 1, "feature_epochs": 1, "side_epochs": 1, "lr": rate, "calibrate": False}
        *_, _ = run("music", config, str(folders.task_dir), [0], str(folders.test_dir))
        log_score(store, cell, row, "music", folders, config, {"test_rmse": 1.0})
    drop("constant", CONSTANT, tmp_path, monkeypatch)
    log_score(store, cell, "constant", "constant", folders, {}, {"test_rmse": 1.0})

    subject, rival = model_name("tiny", cell), model_name("tiny", cell, "music_fast")
    assert (subject, rival) == ("tiny.source-to-target.0.3", "tiny.music_fast.source-to-target.0.3")
    assert registered(store, tmp_path, ["music"]) == [f"{cell.name}: registered as {subject}, version 1, alias best"]
    assert registered(store, tmp_path, ["music", "music_fast", "constant"]) == [
        f"{cell.name}: registered as {rival}, version 1, alias best",
        "constant: not registered, because the model constant offers no `unpack`",
    ]
    assert [model.name for model in store.client.search_registered_models()] == sorted([subject, rival])
    user = str(np.load(folders.test_dir / "user_id.npy")[0])
    answers = [recommend(store.client, "tiny", [cell], Home(tmp_path), user, 30, row) for row in (None, "music_fast")]
    assert [answer.model for answer in answers] == [subject, rival]
    assert list(answers[0].items["score"]) != list(answers[1].items["score"])
    remedy = "has no version with the alias best; run `study score` on the plan with --register constant"
    with pytest.raises(InputError, match=remedy):
        recommend(store.client, "tiny", [cell], Home(tmp_path), user, 5, "constant")


def test_a_model_that_was_not_kept_says_how_to_make_it(tmp_path: Path) -> None:
    folders = build(make_world(users=60, overlap=45, items=30, each=10), tmp_path, "ratings")
    cell, store = Cell(source="source", target="target", ratio=0.3), empty_store(tmp_path)
    run_id = log_score(store, cell, "music", "music", folders, {"epochs": 9}, {"test_rmse": 1.0})
    assert registered(store, tmp_path, ["music"]) == [
        f"{cell.name}: its scored model was not kept; `study rerun {run_id} --home {tmp_path}` makes it, then `study score`"
    ]


def test_the_description_names_the_server_without_its_password() -> None:
    client = MlflowClient("http://me:secret@mlflow:5000")
    text = _described(
        client, "m", {"model": "music", "config": {}}, {tags.CELL: "c", tags.COMMAND: "study rerun X"}, {}
    )
    assert "mlflow.set_tracking_uri('http://me@mlflow:5000')" in text
    assert "secret" not in text


@pytest.mark.parametrize(("home", "loads"), [("a", '@best")'), ("10%", '@best", dst_path=tempfile.mkdtemp())')])
def test_the_description_loads_the_model_whatever_the_home_is_called(home: str, loads: str) -> None:
    client = cast(MlflowClient, SimpleNamespace(tracking_uri=default_uri(Path("/") / home)))
    text = _described(
        client, "m", {"model": "music", "config": {}}, {tags.CELL: "c", tags.COMMAND: "study rerun X"}, {}
    )
    assert f'mlflow.pyfunc.load_model("models:/m{loads}' in text
