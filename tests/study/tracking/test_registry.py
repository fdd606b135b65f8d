"""The winner of a cell in the Model Registry, and what it recommends."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from features.domain import open_domain
from features.errors import InputError
from study.jobs import Cell
from study.tracking.registry import ALIAS, _register, load, model_name, recommend
from study.tracking.runs import connect, default_uri
from trainables.door import kept_at, run

from ...trainables.sequence_worlds import build_world, make_sequence_world

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
