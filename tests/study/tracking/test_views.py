"""The experiment's description and views, whatever the number of cells."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from study.tracking import tags
from study.tracking.views import describe, place
from trainables.interface import Selection

RMSE = Selection("val_rmse", "minimize")
NDCG = Selection("val_ndcg10", "maximize")


class Client:
    """In the place of MLflow's: an experiment's tags, none longer than MLflow 3.17 takes."""

    def __init__(self) -> None:
        self.tags: dict[str, str] = {}
        self.run_tags: dict[str, str] = {}

    def get_experiment(self, experiment_id: str) -> Any:
        return SimpleNamespace(tags=dict(self.tags))

    def set_experiment_tag(self, experiment_id: str, key: str, value: str) -> None:
        assert len(value) <= 20_000, key
        self.tags[key] = value

    def delete_experiment_tag(self, experiment_id: str, key: str) -> None:
        del self.tags[key]

    def set_tag(self, run_id: str, key: str, value: str) -> None:
        assert key == tags.PLACE
        self.run_tags[run_id] = value

    def view(self, key: str) -> dict[str, Any]:
        """The state of a saved view."""
        state: dict[str, Any] = json.loads(json.loads(self.tags[f"{tags.VIEW}{key}"])["state"])
        return state


def run(row: str, cell: str, metrics: dict[str, float], params: dict[str, str] | None = None, **more: str) -> Any:
    """A finished trial."""
    trial = f"search/{cell}/{row}/0000"
    run_tags = {tags.ROW: row, tags.CELL: cell, tags.TRIAL: trial, tags.COMMAND: f"study rerun {row}"} | more
    data = SimpleNamespace(tags=run_tags, metrics=metrics, params=params or {})
    return SimpleNamespace(info=SimpleNamespace(run_id=f"{cell} {row}"), data=data)


def describe_runs(
    client: Client, runs: list[Any], selection: Selection, best: list[Any] | None = None, **more: Any
) -> str:
    """The description after a search of these trials; `best`: those that are the best of their row and cell."""
    chosen = {(one.data.tags[tags.ROW], one.data.tags[tags.CELL]): one for one in (runs if best is None else best)}
    describe(client, "1", finished=runs, best=chosen, selection=selection, **more)  # type: ignore[arg-type]
    return client.tags[tags.NOTE]


def test_all_rows_of_a_cell_stand_in_one_list_the_best_first() -> None:
    client = Client()
    runs = [
        run("music", "b->m@0.2", {"val_rmse": 1.2}), run("emcdr", "b->m@0.2", {"val_rmse": 1.1}),
        run("music", "b->m@0.5", {"val_rmse": 1.3}), run("emcdr", "b->m@0.5", {"val_rmse": 1.4}),
    ]  # fmt: skip
    text = describe_runs(client, runs, RMSE)
    lines = [[cell.strip() for cell in line.split("|")[1:6]] for line in text.splitlines() if line.startswith("| b->m")]
    assert [(line[0], line[1], line[3]) for line in lines] == [
        ("b->m@0.2", "emcdr", "1.1000"), ("b->m@0.2", "music", "1.2000"),
        ("b->m@0.5", "music", "1.3000"), ("b->m@0.5", "emcdr", "1.4000"),
    ]  # fmt: skip
    assert client.run_tags == {
        "b->m@0.2 emcdr": "b->m@0.2 01", "b->m@0.2 music": "b->m@0.2 02",
        "b->m@0.5 music": "b->m@0.5 01", "b->m@0.5 emcdr": "b->m@0.5 02",
    }  # fmt: skip
    for key, columns in (
        ("best", ["tags.`study.cell`", "tags.`study.row`", "metrics.`val_rmse`"]),
        ("score", ["tags.`study.cell`", "tags.`study.row`", "metrics.`test_rmse`"]),
    ):
        view = client.view(key)
        assert (view["orderByKey"], view["orderByAsc"]) == ("tags.`study.place`", True)
        assert view["selectedColumns"] == view["columnOrder"] == columns
    assert client.view("score")["searchFilter"] == (
        'tags."study.trial" LIKE \'score/%\' AND tags."study.superseded" IS NULL'
    )
    assert client.view("cell-1")["searchFilter"].endswith(
        "tags.\"study.cell\" = 'b->m@0.2' AND tags.\"study.row\" = 'music'"
    )


def test_trials_without_a_result_say_why_where_all_are_listed() -> None:
    client = Client()
    runs = [run("music", "x", {"val_rmse": 1.0})]
    describe_runs(client, runs, RMSE, reasons=[tags.PRUNED])
    places = ["tags.`study.cell`", "tags.`study.row`"]
    assert client.view("search")["selectedColumns"] == [*places, "tags.`study.pruned`", "metrics.`val_rmse`"]
    assert client.view("best")["selectedColumns"] == [*places, "metrics.`val_rmse`"]


@pytest.mark.parametrize(("maximize", "order"), [(False, ["a", "b", "c", "d"]), (True, ["b", "a", "c", "d"])])
def test_places_follow_the_metric_then_the_row(maximize: bool, order: list[str]) -> None:
    client, metric = Client(), "test_rmse"
    values = {"d": float("nan"), "b": 2.0, "a": 1.0, "c": None}
    runs = [run(row, "x", {} if value is None else {metric: value}) for row, value in values.items()]
    ranked = place(client, runs, metric, maximize=maximize)  # type: ignore[arg-type]
    assert [one.data.tags[tags.ROW] for one in ranked] == order
    assert client.run_tags == {f"x {row}": f"x {number:02d}" for number, row in enumerate(order, start=1)}


def test_a_place_that_is_right_is_not_written_again() -> None:
    client = Client()
    placed = run("a", "x", {"val_rmse": 1.0}, **{tags.PLACE: "x 01"})
    place(client, [placed], "val_rmse", maximize=False)  # type: ignore[arg-type]
    assert client.run_tags == {}


def test_parameters_are_those_that_vary_within_a_row() -> None:
    client = Client()
    params = [("music", {"lr": "1", "steps": "5"}), ("music", {"lr": "2", "steps": "5"}), ("emcdr", {"width": "8"})]
    runs = [run(row, "x", {"val_rmse": 1.0}, {**own, "row": row}) for row, own in params]
    describe_runs(client, runs, RMSE, best=runs[1:])
    assert client.view("best")["selectedColumns"][2:] == ["metrics.`val_rmse`", "params.`lr`"]
    assert [client.view(f"cell-{n}")["compareRunCharts"][0]["selectedParams"] for n in range(2)] == [[], ["lr"]]


def test_a_table_that_is_too_long_says_what_is_left_out() -> None:
    client = Client()
    runs = [run("music", f"books->movies@{number:03}", {"val_rmse": 1.0}) for number in range(200)]
    text = describe_runs(client, runs, RMSE)
    lines = [line for line in text.splitlines() if line.startswith("| books")]
    assert sum(tag.startswith(f"{tags.VIEW}cell-") for tag in client.tags) == 200
    assert 60 < len(lines) < 150
    assert text.endswith(f"\n\n... and {200 - len(lines)} more: filter `tags.\"study.best\" = 'true'`\n")
    text = describe_runs(client, runs[:3], RMSE)
    assert sum(tag.startswith(f"{tags.VIEW}cell-") for tag in client.tags) == 3, "those of the earlier plan are gone"
    assert text.count("| books->") == 3
    assert "more" not in text


def test_columns_of_one_protocol_do_not_hide_the_metric_that_selects() -> None:
    client = Client()
    names = ("val_hr5", "val_hr5_inter", "val_ndcg10", "val_ndcg10_inter", "val_ndcg10_std", "test_hr5")
    describe_runs(client, [run("lgcd", "x", dict.fromkeys(names, 1.0))], NDCG, best=[])
    assert client.view("search")["selectedColumns"][2:] == ["metrics.`val_ndcg10`", "metrics.`val_hr5`"]
    assert client.view("score")["selectedColumns"][2:] == ["metrics.`test_ndcg10`", "metrics.`test_hr5`"]
