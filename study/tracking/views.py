"""What a person who opens the experiment in MLflow's UI sees first: a description, and views to click on.

A view is a filter, an order, columns and charts, in the form in which MLflow 3.17's own UI keeps what its users save: an
experiment tag each. The UI lists them, and a link can name one. It sorts by one key alone, so that runs that are compared
across rows have a tag that says their cell and their place in it (`study.place`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from study.tracking import tags

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

    from trainables.interface import Selection

_NOTE_LENGTH = 19_900  # MLflow takes 20,000 characters in an experiment's tag; the end of a cut table needs some
_COUNTS = f'tags."{tags.SUPERSEDED}" IS NULL'
_BEST = f"tags.\"{tags.BEST}\" = 'true'"
_ALL = f"tags.\"{tags.TRIAL}\" LIKE 'search/%' AND {_COUNTS}"  # the part's own run has no trial
_SCORES = f"tags.\"{tags.TRIAL}\" LIKE 'score/%' AND {_COUNTS}"

_WIDTHS = {f"tags.`{tags.CELL}`": 180, f"tags.`{tags.ROW}`": 130}  # pixels: a usual name is not cut

Key = tuple[str, str]
"""Row, and name of the cell."""


def describe(
    client: MlflowClient, experiment_id: str, *, finished: Sequence[Run], best: Mapping[Key, Run], selection: Selection,
    reasons: Sequence[str] = (),
) -> None:  # fmt: skip
    """Write the description and the views of a search: its finished trials, and the best one of each row and cell.

    `reasons`: tags that say why trials have no result, shown where all trials are.
    """
    metric = selection.metric
    varied = {row: _varied(runs) for row, runs in _by_row(finished).items()}
    main = {name for run in finished for name in run.data.metrics if _is_main(name)} | {metric}
    # The metric that selects comes first; metrics of one protocol alone would push it out of sight.
    measured = sorted(name for name in main - {metric} if not any(name.startswith(f"{other}_") for other in main))
    names = [metric, *measured]
    all_varied = list(dict.fromkeys(name for fields in varied.values() for name in fields))
    places = _tags([tags.CELL, tags.ROW])
    columns = [*places, *_metrics(names), *_params(all_varied)]
    scores = [*places, *_metrics(name.replace("val_", "test_", 1) for name in names)]
    by_metric = {"orderByKey": f"metrics.`{metric}`", "orderByAsc": selection.direction == "minimize"}
    by_place = {"orderByKey": f"tags.`{tags.PLACE}`", "orderByAsc": True}
    views = {
        "best": ("Best trial of each cell", _BEST, by_place, columns),
        "search": ("All search trials", _ALL, by_metric, [*places, *_tags(reasons), *columns[len(places) :]]),
        "score": ("Scores on test users", _SCORES, by_place, scores),
    }
    for key, (name, condition, order, selected) in views.items():
        _save(client, experiment_id, key, name, {"searchFilter": condition, **order, **_selected(selected)})
    ranked = place(client, best.values(), metric, maximize=selection.direction == "maximize")
    keys = [_key(run) for run in ranked]
    for number, (row, cell) in enumerate(keys):
        condition = f"{_ALL} AND tags.\"{tags.CELL}\" = '{cell}' AND tags.\"{tags.ROW}\" = '{row}'"
        own_columns = [*places, *_metrics(names), *_params(varied.get(row, []))]
        state = {
            "searchFilter": condition,
            **by_metric,
            **_selected(own_columns),
            **_parallel(varied.get(row, []), metric),
        }
        _save(client, experiment_id, f"cell-{number}", f"Parallel coordinates: {cell}, {row}", state)
    _drop_views(client, experiment_id, len(keys))
    links = " · ".join(f"[{views[key][0]}]({_link(experiment_id, key)})" for key in views)
    lines = [
        f"| {cell} | {row} | [{_name(run)}](#/experiments/{experiment_id}/runs/{run.info.run_id}) "
        f"| {run.data.metrics[metric]:.4f} | [compare]({_link(experiment_id, f'cell-{number}')}&compareRunsMode=CHART) "
        f"| `{run.data.tags.get(tags.COMMAND, '')}` |\n"
        for number, ((row, cell), run) in enumerate(zip(keys, ranked, strict=True))
    ]
    text = f"{links}\n\nThe best trial of each row and cell by validation `{metric}`, of {len(finished)} finished ones:\n\n"
    head = f"| cell | row | trial | {metric} | all trials | trains it again |\n|---|---|---|---|---|---|\n"
    client.set_experiment_tag(experiment_id, tags.NOTE, _fitting(text + head, lines))


def place(client: MlflowClient, runs: Iterable[Run], metric: str, *, maximize: bool) -> list[Run]:
    """Tag runs with their cell and their place in it by a metric, `books->movies@0.2 01` the best; returns them so sorted.

    Equal ones, and those without the metric, which come last, are in the order of their rows' names.
    """

    def cost(run: Run) -> float:
        value = run.data.metrics.get(metric, math.nan)
        return math.inf if math.isnan(value) else -value if maximize else value

    ranked = sorted(runs, key=lambda run: (run.data.tags[tags.CELL], cost(run), run.data.tags[tags.ROW]))
    counts: dict[str, int] = {}
    for run in ranked:
        cell = run.data.tags[tags.CELL]
        counts[cell] = counts.get(cell, 0) + 1
        text = f"{cell} {counts[cell]:02d}"
        if run.data.tags.get(tags.PLACE) != text:
            client.set_tag(run.info.run_id, tags.PLACE, text)
    return ranked


def _key(run: Run) -> Key:
    return run.data.tags[tags.ROW], run.data.tags[tags.CELL]


def _name(run: Run) -> str:
    """The trial's name within its row and cell."""
    name: str = run.data.tags[tags.TRIAL].rpartition("/")[2]
    return name


def _by_row(runs: Iterable[Run]) -> dict[str, list[Run]]:
    rows: dict[str, list[Run]] = {}
    for run in runs:
        rows.setdefault(run.data.tags[tags.ROW], []).append(run)
    return rows


def _fitting(text: str, lines: Sequence[str]) -> str:
    """The text with as many of the lines as MLflow takes, and how many were left out."""
    count = len(lines)
    while len(text) + sum(map(len, lines[:count])) > _NOTE_LENGTH:
        count -= 1
    left = len(lines) - count
    return text + "".join(lines[:count]) + (f"\n... and {left} more: filter `{_BEST}`\n" if left else "")


def _varied(runs: Sequence[Run]) -> list[str]:
    """Config fields that took more than one value over the trials of one row, sorted."""
    names = {name for run in runs for name in run.data.params} - tags.NOT_CONFIG
    return sorted(name for name in names if len({run.data.params.get(name) for run in runs}) > 1)


def _is_main(name: str) -> bool:
    return name.startswith("val_") and "/" not in name and not name.endswith("_std")


def _tags(names: Iterable[str]) -> list[str]:
    return [f"tags.`{name}`" for name in names]


def _metrics(names: Iterable[str]) -> list[str]:
    return [f"metrics.`{name}`" for name in names]


def _params(names: Iterable[str]) -> list[str]:
    return [f"params.`{name}`" for name in names]


def _selected(columns: Sequence[str]) -> dict[str, Any]:
    """Columns in this order; by itself the UI shows metrics, parameters and tags, each sorted by name."""
    return {"selectedColumns": list(columns), "columnOrder": list(columns), "columnWidths": _WIDTHS}


def _link(experiment_id: str, key: str) -> str:
    return f"#/experiments/{experiment_id}/runs?viewStateShareKey={key}"


def _parallel(varied: Sequence[str], metric: str) -> dict[str, Any]:
    """One chart over the whole width, all runs in it."""
    chart = {
        "type": "PARALLEL", "uuid": "parallel", "metricSectionId": "study", "isGenerated": False, "deleted": False,
        "selectedParams": list(varied), "selectedMetrics": [metric], "showAllRuns": True,
    }  # fmt: skip
    section = {
        "uuid": "study", "name": "Search", "display": True, "isReordered": False, "deleted": False,
        "isGenerated": False, "columns": 1, "cardHeight": 420,
    }  # fmt: skip
    return {
        "compareRunCharts": [chart], "compareRunSections": [section], "isAccordionReordered": True,
        "runsHiddenMode": "SHOWALL",
    }  # fmt: skip


def _drop_views(client: MlflowClient, experiment_id: str, count: int) -> None:
    """Delete the views of rows and cells beyond `count`, which an earlier form of the plan has left."""
    left = {tag for tag in client.get_experiment(experiment_id).tags if tag.startswith(f"{tags.VIEW}cell-")}
    for tag in left - {f"{tags.VIEW}cell-{number}" for number in range(count)}:
        client.delete_experiment_tag(experiment_id, tag)


def _save(client: MlflowClient, experiment_id: str, key: str, name: str, state: Mapping[str, Any]) -> None:
    fixed = {"startTime": "ALL", "lifecycleFilter": "Active", "datasetsFilter": [], "modelVersionFilter": "All Runs"}
    value = json.dumps({"name": name, "createdAt": 0, "state": json.dumps({**fixed, **state})})
    client.set_experiment_tag(experiment_id, f"{tags.VIEW}{key}", value)
