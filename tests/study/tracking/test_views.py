"""The experiment's description and views, whatever the number of cells."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

from study.tracking.views import describe


class Client:
    """In the place of MLflow's: an experiment's tags, none longer than MLflow 3.17 takes."""

    def __init__(self) -> None:
        self.tags: dict[str, str] = {}

    def get_experiment(self, experiment_id: str) -> Any:
        return SimpleNamespace(tags=dict(self.tags))

    def set_experiment_tag(self, experiment_id: str, key: str, value: str) -> None:
        assert len(value) <= 20_000, key
        self.tags[key] = value

    def delete_experiment_tag(self, experiment_id: str, key: str) -> None:
        del self.tags[key]


def described(client: Client, cells: int) -> tuple[str, int]:
    """The description, and how many cells have a view."""
    best = {}
    for number in range(cells):
        tags = {"study.trial": f"search/{number:03}/0000", "study.command": f"study rerun {number:032} --home /home/me"}
        data = SimpleNamespace(tags=tags, metrics={"val_rmse": 1.0}, params={"lr": str(number)})
        best[f"books->movies@{number:03}"] = SimpleNamespace(info=SimpleNamespace(run_id=f"{number:032}"), data=data)
    runs: Any = list(best.values())
    describe(client, "1", finished=runs, best=best, metric="val_rmse", direction="minimize")  # type: ignore[arg-type]
    return client.tags["mlflow.note.content"], sum(
        tag.startswith("mlflow.sharedViewState.cell-") for tag in client.tags
    )


def test_a_table_that_is_too_long_says_what_is_left_out() -> None:
    client = Client()
    text, views = described(client, 200)
    rows = [line for line in text.splitlines() if line.startswith("| books")]
    assert views == 200
    assert 60 < len(rows) < 100
    assert text.endswith(f"\n\n... and {200 - len(rows)} more: filter `tags.\"study.best\" = 'true'`\n")
    text, views = described(client, 3)
    assert views == 3, "those of the earlier plan are gone"
    assert text.count("| books->") == 3
    assert "more" not in text


def test_columns_of_one_protocol_do_not_hide_the_metric_that_selects() -> None:
    client, names = (
        Client(),
        ("val_hr5", "val_hr5_inter", "val_ndcg10", "val_ndcg10_inter", "val_ndcg10_std", "test_hr5"),
    )
    data = SimpleNamespace(tags={}, metrics=dict.fromkeys(names, 1.0), params={"lr": "1"})
    run: Any = SimpleNamespace(data=data)
    describe(client, "1", finished=[run], best={}, metric="val_ndcg10", direction="maximize")  # type: ignore[arg-type]
    view = json.loads(json.loads(client.tags["mlflow.sharedViewState.search"])["state"])
    assert view["selectedColumns"] == ["metrics.`val_ndcg10`", "metrics.`val_hr5`"]
    scores = json.loads(json.loads(client.tags["mlflow.sharedViewState.score"])["state"])
    assert scores["selectedColumns"] == ["metrics.`test_ndcg10`", "metrics.`test_hr5`"]
