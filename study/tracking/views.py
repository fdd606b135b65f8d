"""What a person who opens the experiment in MLflow's UI sees first: a description, and views to click on.

A view is a filter, an order, columns and charts, in the form in which MLflow 3.17's own UI keeps what its users save: an
experiment tag each. The UI lists them, and a link can name one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from study.specs import Direction

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

_TAG = "mlflow.sharedViewState."
_NOTE = "mlflow.note.content"
_NOTE_LENGTH = 19_900  # MLflow takes 20,000 characters in an experiment's tag; the end of a cut table needs some
_BEST = "tags.\"study.best\" = 'true'"
_ALL = "tags.\"study.trial\" LIKE 'search/%'"  # the part's own run has the tag `study.part`, and no trial


def describe(
    client: MlflowClient, experiment_id: str, *, finished: Sequence[Run], best: Mapping[str, Run], metric: str,
    direction: Direction,
) -> None:  # fmt: skip
    """Write the description and the views of a search: its finished trials, and the best one of each cell."""
    varied = _varied(finished)
    main = {name for run in finished for name in run.data.metrics if _is_main(name)} | {metric}
    # MLflow orders columns by name; those of one protocol alone would push the one that selects out of sight.
    measured = sorted(name for name in main - {metric} if not any(name.startswith(f"{other}_") for other in main))
    columns = [f"metrics.`{name}`" for name in (metric, *measured)] + [f"params.`{name}`" for name in varied]
    scores = [f"metrics.`{name.replace('val_', 'test_', 1)}`" for name in (metric, *measured)]
    order = {"orderByKey": f"metrics.`{metric}`", "orderByAsc": direction == "minimize"}
    by_name = {"orderByKey": "tags.`mlflow.runName`", "orderByAsc": True}
    views = {
        "best": ("Best trial of each cell", _BEST, by_name, columns),
        "search": ("All search trials", _ALL, order, columns),
        "score": ("Scores on test users", "tags.\"study.trial\" LIKE 'score/%'", by_name, scores),
    }
    for key, (name, condition, sort, shown) in views.items():
        _save(client, experiment_id, key, name, {"searchFilter": condition, **sort, "selectedColumns": shown})
    for number, cell in enumerate(sorted(best)):
        state = {"searchFilter": f"{_ALL} AND tags.\"study.cell\" = '{cell}'", **order, "selectedColumns": columns}
        _save(
            client, experiment_id, f"cell-{number}", f"Parallel coordinates: {cell}", state | _parallel(varied, metric)
        )
    of_cells = {tag for tag in client.get_experiment(experiment_id).tags if tag.startswith(f"{_TAG}cell-")}
    for tag in of_cells - {f"{_TAG}cell-{number}" for number in range(len(best))}:  # an earlier plan had more cells
        client.delete_experiment_tag(experiment_id, tag)
    links = " · ".join(f"[{views[key][0]}]({_link(experiment_id, key)})" for key in views)
    rows = [
        f"| {cell} | [{run.data.tags['study.trial']}](#/experiments/{experiment_id}/runs/{run.info.run_id}) "
        f"| {run.data.metrics[metric]:.4f} | [compare]({_link(experiment_id, f'cell-{number}')}&compareRunsMode=CHART) "
        f"| `{run.data.tags.get('study.command', '')}` |\n"
        for number, (cell, run) in enumerate(sorted(best.items()))
    ]
    text = f"{links}\n\nThe best trial of each cell by validation `{metric}`, of {len(finished)} finished ones:\n\n"
    head = f"| cell | trial | {metric} | all trials | trains it again |\n|---|---|---|---|---|\n"
    client.set_experiment_tag(experiment_id, _NOTE, _fitting(text + head, rows))


def _fitting(text: str, rows: Sequence[str]) -> str:
    """The text with as many of the rows as MLflow takes, and what was left out."""
    shown = len(rows)
    while len(text) + sum(map(len, rows[:shown])) > _NOTE_LENGTH:
        shown -= 1
    left = len(rows) - shown
    return text + "".join(rows[:shown]) + (f"\n... and {left} more: filter `{_BEST}`\n" if left else "")


def _varied(runs: Sequence[Run]) -> list[str]:
    """Config fields that took more than one value, and not just because of the cell."""
    cells = ("task", "source", "target", "ratio")
    names = {name for run in runs for name in run.data.params} - set(cells)
    return sorted(name for name in names if len({run.data.params.get(name) for run in runs}) > 1)


def _is_main(name: str) -> bool:
    return name.startswith("val_") and "/" not in name and not name.endswith("_std")


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


def _save(client: MlflowClient, experiment_id: str, key: str, name: str, state: Mapping[str, Any]) -> None:
    fixed = {"startTime": "ALL", "lifecycleFilter": "Active", "datasetsFilter": [], "modelVersionFilter": "All Runs"}
    value = json.dumps({"name": name, "createdAt": 0, "state": json.dumps({**fixed, **state})})
    client.set_experiment_tag(experiment_id, f"{_TAG}{key}", value)
