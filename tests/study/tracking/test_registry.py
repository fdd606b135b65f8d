"""The winner of a cell in the Model Registry, and what it recommends."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from mlflow import MlflowClient

from features.domains.domain import open_domain
from features.errors import InputError
from study.specs import Cell
from study.tracking.registry import ALIAS, _described, _register, load, model_name, recommend, register
from study.tracking.results import load_results
from study.tracking.runs import connect, default_uri
from trainables.tasks.rating import load_held_out
from trainables.trial import kept_at, run

from ...trainables.sequence_worlds import build_world, make_sequence_world
from ...trainables.worlds import build, make_world
from ..store import MUSIC, empty_store
from ..tiny import study, write_plan
from ..tiny_sequences import write_sequences

CELL = Cell(source="film", target="song", ratio=1.0)


def test_a_kept_model_is_registered_and_recommends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))  # loading puts the model's own packages before all others
    folders = build_world(make_sequence_world(0), tmp_path)
    domains = {domain.name: domain for domain in map(open_domain, (tmp_path / "domains").glob("*-*"))}
    config = {"epochs": 1, "encoder_epochs": 1, "steps": 5, "negatives": 16}
    *_, _ = run("lgcd", config, str(folders.task_dir), [0], str(folders.test_dir))
    client = connect(default_uri(tmp_path))
    experiment = client.create_experiment("tiny", artifact_location=(tmp_path / "artifacts").as_uri())
    run_id = client.create_run(experiment, tags={"study.command": "study rerun X"}).info.run_id
    cell = {"source": CELL.source, "target": CELL.target, "ratio": CELL.ratio}
    document = {"model": "lgcd", "config": config, "cell": cell, "task_dir": str(folders.task_dir), "seeds": [0]}
    client.log_text(run_id, yaml.safe_dump(document), "config.yaml")
    client.log_metric(run_id, "test_ndcg10", 0.5)
    name = model_name("tiny", CELL)
    with pytest.raises(InputError, match="no version with the alias best; run `study score`"):
        load(client, name)

    kept = kept_at("lgcd", config, str(folders.task_dir), [0])
    row = pd.Series({"run_id": run_id, "cell": CELL.name})
    assert _register(client, name, row, document, kept, domains) == "1"
    version = client.get_model_version_by_alias(name, ALIAS)
    assert (version.run_id, version.tags["study.command"]) == (run_id, "study rerun X")
    assert "| test_ndcg10 | 0.5000 |" in version.description
    stored = Path(version.source.removeprefix("file://"))
    assert (stored / "input_example.json").is_file()
    assert not list(stored.rglob("*.pkl"))

    model, _ = load(client, name)
    users = np.load(folders.test_dir / "user_id.npy")[:3]
    told = [recommend(client, "tiny", [CELL], tmp_path, str(user), 5) for user in users]
    together = model.predict(pd.DataFrame({"history": [list(each.history["item"]) for each in told]}), params={"n": 5})
    for each, ids, scores in zip(told, together["items"], together["scores"], strict=True):
        assert list(each.items["item"]) == list(ids), "no user's list hangs on another user"
        np.testing.assert_allclose(each.items["score"], scores, rtol=1e-4)
        assert all(item.startswith("s") for item in ids)
        assert all(item.startswith("f") for item in each.history["item"])
    asked = pd.DataFrame({"history": [list(told[0].history["item"])], "candidates": [["s001", "s002"]]})
    assert sorted(model.predict(asked)["items"][0]) == ["s001", "s002"]
    with pytest.raises(InputError, match="user nobody: has nothing in the domain film"):
        recommend(client, "tiny", [CELL], tmp_path, "nobody", 5)
    assert capsys.readouterr().err == ""
    plan = write_sequences(tmp_path, tasks=[["film", "song"]])
    ran = study("recommend", plan, "--home", tmp_path, "-n", 5, "--user", users[0])
    assert (ran.code, ran.err) == (0, "")
    assert re.findall(r"\b[fs]\d{3}\b", ran.out) == [*told[0].history["item"], *told[0].items["item"]]
    assert f"model  models:/{name}@best (version 1)\n" in ran.out


def test_a_rating_model_is_registered_once_answers_and_keeps_its_alias(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    world = make_world(users=60, overlap=45, items=30, each=10)
    folders = build(world, tmp_path, "ratings")
    domains = {domain.name: domain for domain in map(open_domain, (tmp_path / "domains").glob("*-*"))}
    config = {"epochs": 2, "feature_epochs": 1, "side_epochs": 1}
    *_, last = run("music", config, str(folders.task_dir), [0], str(folders.test_dir))
    cell = Cell(source="source", target="target", ratio=0.3)
    document = {
        "model": "music", "config": config, "cell": asdict(cell), "task_dir": str(folders.task_dir), "seeds": [0],
    }  # fmt: skip
    store = empty_store(tmp_path)
    files = {"config.yaml": yaml.safe_dump(document)}
    store.add("score", cell.task, cell.ratio, "best", {"test_rmse": last.metrics["test_rmse"]}, artifacts=files)
    results, name = load_results(store.uri, store.experiment, MUSIC), model_name("tiny", cell)

    assert register(results, domains, tmp_path) == [f"{cell.name}: registered as {name}, version 1, alias best"]
    assert register(results, domains, tmp_path) == []
    store.client.delete_registered_model_alias(name, ALIAS)
    assert register(results, domains, tmp_path) == [f"{cell.name}: {name}, version 1 has the alias best again"]
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
    plan = write_plan(tmp_path, tasks=[["source", "target"]], ratios=[0.3], domains=tables, drop=("simulate",))
    words = ("recommend", plan, "--home", tmp_path, "-n", 3, "--user")
    ran = study(*words, users[1])
    assert (ran.code, ran.err) == (0, "")
    assert re.findall(r"s\d{3}", ran.out) == sorted(world.source.loc[world.source["user_id"] == users[1], "item_id"])
    assert re.findall(r"t\d{3}", ran.out) == rated["items"][1][:3]
    assert f"{rated['scores'][1][0]:.3f}" in ran.out
    assert f"model  models:/{name}@best (version 1)\n" in ran.out
    assert study(*words, "nobody").fault == "user nobody: has nothing in the domain source; give the id of one who has"
    alone = next(user for user in world.source["user_id"] if user not in set(world.target["user_id"]))
    assert study(*words, alone).fault.startswith(f"user {alone}: is not among the users of both domains")


def test_the_description_names_the_server_without_its_password() -> None:
    client = MlflowClient("http://me:secret@mlflow:5000")
    text = _described(
        client, "m", {"model": "music", "config": {}}, {"study.cell": "c", "study.command": "study rerun X"}, {}
    )
    assert "mlflow.set_tracking_uri('http://me@mlflow:5000')" in text
    assert "secret" not in text
