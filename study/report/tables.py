"""Tables of the data, of ablations, of cold items and of pseudo-items.

Validation intervals are Student's t over seeds, at 95%. A table that the store cannot fill raises MissingError; a row that
it lacks is left out and named in the notes. What the metrics are, and which way is better, is in the study's labels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from study.labels import Labels, in_group
from study.report.comparison import over_seeds
from study.report.statistics import Interval
from study.report.table import NONE, Table, arrow, caption, count, interval_text, number, scales
from study.tracking.results import MissingError, Results, compared_on, per_seed


def domains_table(results: Results) -> Table:
    """Return Table 1: users, items and interactions of both domains of every task, after the filters, and their overlap."""
    if not results.domains or not results.cells:
        raise MissingError("Table 1: no finished run of part data with domains and cells; run `study extract`")
    last = {str(domain["name"]): domain["counts"][-1] for domain in results.domains}
    notes = [_raw(domain) for domain in results.domains]
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for cell in results.cells:
        source, target = str(cell["source"]), str(cell["target"])
        row: dict[str, Any] = {"task": f"{source}->{target}"}
        for side, name in (("source", source), ("target", target)):
            counts = last.get(name, {})
            row |= {f"{side}_{key}": counts.get(key) for key in ("users", "items", "interactions")}
        rows.setdefault((source, target), row | {"overlapping_users": _overlap(cell)})
    frame = pd.DataFrame([rows[key] for key in sorted(rows)])
    cells = pd.DataFrame({"Task": frame["task"].map(arrow)})
    for side in ("source", "target"):
        for key, label in (("users", "users"), ("items", "items"), ("interactions", results.labels.task_type.rows)):
            cells[f"{side.capitalize()} {label}"] = [count(value) for value in frame[f"{side}_{key}"]]
    cells["Overlapping users"] = [count(value) for value in frame["overlapping_users"]]
    return Table("table_1_domains", caption("Table 1. Domains after filtering", results), frame, cells, tuple(notes))


def splits_table(results: Results) -> Table:
    """Return what the part "data" counted per cell (train, validation, test and side users, ratings), as logged."""
    if not results.cells:
        raise MissingError("splits: no finished run of part data with cells; run `study extract`")
    frame = pd.DataFrame([{k: v for k, v in cell.items() if not isinstance(v, (dict, list))} for cell in results.cells])
    frame = frame.sort_values(["source", "target", "ratio"], ignore_index=True)
    cells = pd.DataFrame(
        {
            "Task": frame["source"] + " → " + frame["target"],
            results.labels.ratio: frame["ratio"].map("{:.0%}".format),
        }
    )
    for name in frame.columns.drop(["source", "target", "ratio"]):
        cells[str(name).replace("_", " ").capitalize()] = [count(value) for value in frame[name]]
    return Table("splits", caption("Splits per cell", results), frame, cells)


def ablation_table(results: Results) -> Table:
    """Return Table 3: variants of the subject's model, on the users that the part is compared on.

    Rows of the model, such as one of each preset, stand below one another. The column `full` is the ablation part's own,
    else the score part's run of the selected configuration. Printed ablations stand below as they are printed; they are of
    test users.
    """
    labels, rows = results.labels, results.rows_in("ablate")
    runs, scores = results.finished("ablate"), results.finished("score")
    if runs.empty:
        raise MissingError("Table 3: no finished run of part ablate; run `study ablate`")
    split = compared_on(run for _, run in runs.iterrows())
    notes: list[str] = []
    records: list[_Ablation] = []
    variants = sorted({str(name) for name in runs["name"]} - {"full"}) + ["full"]
    for cell, row in itertools.product(sorted(runs["cell"].unique()), rows):
        at = [trials[(trials["cell"] == cell) & (trials["row"] == row)] for trials in (runs, scores)]
        named = {str(run["name"]): run for _, run in at[0].iterrows()}
        if "full" not in named and named and not at[1].empty:
            named["full"] = at[1].iloc[0]
        place = f"{cell}, {labels.row(row).name}" if len(rows) > 1 else cell
        notes += [f"{place}: no finished run of {name}." for name in variants if name not in named]
        present = {name: named[name] for name in variants if name in named}
        records += _ablations(labels, present, "test" if split == "test" else "val", row == rows[-1])
    users = split.capitalize()
    if any(record.is_printed for record in records) and split == "validation":
        notes.append("Printed numbers are of test users, measured ones of validation users.")
    group_column = labels.task_type.group_column
    flat = [record.flat(group_column) for record in records]
    lines: dict[tuple[str, str, str, str], dict[str, str]] = {}
    for record in records:
        line = {"Task": arrow(record.task), labels.ratio: f"{record.ratio:.0%}"}
        line |= {"Row": "" if record.is_printed else labels.row(record.row).name} if len(rows) > 1 else {}
        line |= {group_column.capitalize(): record.group} if group_column else {}
        key = (record.cell, record.row, record.group, record.label)
        line = lines.setdefault(key, line | {users: record.label})
        line[_variant(record.variant)] = interval_text(record.interval, digits=labels.task_type.digits)
    columns = [
        "Task",
        labels.ratio,
        *(["Row"] if len(rows) > 1 else []),
        *filter(None, [group_column.capitalize()]),
        users,
    ]
    cells = pd.DataFrame(list(lines.values()), columns=[*columns, *map(_variant, variants)])
    metrics = [metric for metric in labels.task_type.metrics if metric.name in labels.task_type.ablation]
    title = f"Table 3. Ablations on {users.lower()} users: {scales(metrics)} (mean over seeds, 95% t intervals)"
    frame = pd.DataFrame(flat)
    return Table("table_3_ablations", caption(title, results), frame, cells.fillna(NONE), tuple(notes))


@dataclass(frozen=True, kw_only=True)
class _Ablation:
    """One metric of one variant in one cell and group, measured or printed."""

    cell: str
    row: str
    task: str
    ratio: float
    group: str
    metric: str
    label: str
    variant: str
    interval: Interval

    @property
    def is_printed(self) -> bool:
        return self.interval.n == 0

    def flat(self, group_column: str) -> dict[str, Any]:
        line: dict[str, Any] = {"cell": self.cell, "row": self.row, "task": self.task, "ratio": self.ratio}
        line |= {group_column: self.group} if group_column else {}
        line |= {"metric": self.metric, "variant": self.variant, "mean": self.interval.value}
        return line | {"low": self.interval.low, "high": self.interval.high, "seeds": self.interval.n}


def _ablations(
    labels: Labels, named: Mapping[str, pd.Series], prefix: str, with_printed: bool
) -> Iterator[_Ablation]:  # fmt: skip
    """Yield a row's variants in a cell, each metric and group, with what is printed of them after the measured ones."""
    task_type, published = labels.task_type, labels.subject_published if with_printed else None
    if not named:
        return
    first = next(iter(named.values()))
    place: dict[str, Any] = {
        "cell": str(first["cell"]), "row": str(first["row"]), "task": str(first["task"]), "ratio": float(first["ratio"])
    }  # fmt: skip
    for group, metric in itertools.product(task_type.groups, task_type.metrics):
        column = f"{prefix}_{in_group(metric.name, group)}"
        measured = {name: run for name, run in named.items() if per_seed(run, column)}
        if metric.name not in task_type.ablation or not measured:
            continue
        for name, run in measured.items():
            yield _Ablation(
                **place, group=group, metric=f"{prefix}_{metric.name}", label=metric.label, variant=name,
                interval=over_seeds(run, column),
            )  # fmt: skip
        if published is None or published.paper.group != group:
            continue
        for name in named:
            value = published.ablations.value(name, place["cell"], metric.name)
            if value is not None:
                yield _Ablation(
                    **place, group=group, metric=f"printed_{metric.name}", label=f"{metric.label} (printed, test)",
                    variant=name, interval=Interval(value, math.nan, math.nan, 0),
                )  # fmt: skip


def cold_item_table(results: Results) -> Table:
    """Return Table 4: test ratings of items that never occur in training, by cold-start users."""
    labels, digits = results.labels, results.labels.task_type.digits
    scores = results.finished("score")
    column = "metrics.test_cold_item_n"
    runs = scores[scores[column] > 0] if column in scores.columns else scores.iloc[:0]
    if runs.empty:
        raise MissingError("Table 4: no scored run has test ratings of cold items; run `study score`")
    order = {row: k for k, row in enumerate(labels.table_order)}
    runs = runs.assign(_order=runs["row"].map(order)).sort_values(["cell", "_order", "row"]).reset_index(drop=True)
    rows = [labels.row(str(row)) for row in runs["row"]]
    frame = pd.DataFrame(
        {
            "cell": runs["cell"],
            "task": runs["task"],
            "ratio": runs["ratio"],
            "row": runs["row"],
            "name": [row.name for row in rows],
            "ratings": runs[column].astype(int),
            "mae": runs["metrics.test_cold_item_mae"],
            "rmse": runs["metrics.test_cold_item_rmse"],
        }
    )
    printed = labels.published.cold_items if labels.published else None
    for metric in ("mae", "rmse") if printed is not None else ():
        assert printed is not None
        places = zip(rows, runs["cell"], strict=True)
        frame[f"printed_{metric}"] = [
            printed.value(row.paper_name, str(cell), f"cold_item_{metric}") or math.nan for row, cell in places
        ]
    cells = pd.DataFrame(
        {
            "Task": frame["task"].map(arrow),
            labels.ratio: frame["ratio"].map("{:.0%}".format),
            "Row": frame["name"],
            "Test ratings": frame["ratings"].map(count),
        }
    )
    for name in frame.columns[6:]:
        heading = str(name).replace("_", " ").replace("mae", "MAE").replace("rmse", "RMSE")
        cells[heading[0].upper() + heading[1:]] = [
            NONE if math.isnan(value) else number(value, digits) for value in frame[name]
        ]
    title = "Table 4. Dual cold start: cold users and cold items (rating points)"
    return Table("table_4_cold_items", caption(title, results), frame, cells)


def pseudo_table(results: Results) -> Table:
    """Return the recall of pseudo-items: of what overlapping users have, who were kept out of the generator's training."""
    if not results.pseudo:
        raise MissingError("pseudo-items: no finished run of part data measured them; run `study extract`")
    frame = pd.DataFrame(list(results.pseudo)).sort_values(["pair", "source", "target", "at"], kind="stable")
    cells = pd.DataFrame(
        {
            "Training users": frame["pair"],
            "Task": (frame["source"] + "->" + frame["target"]).map(arrow),
            "Items": frame["items"],
            "Length": frame["at"].map(count),
            "Recall": [number(value, 4) for value in frame["recall"]],
            "Users with a hit": frame["hit"].map("{:.1%}".format),
            "Users": frame["users"].map(count),
            "Different items": frame["different"].map(count),
        }
    )
    title = "Pseudo-items: share of a user's real items of the other domain in lists of equal length (higher is better)"
    return Table("pseudo_items", caption(title, results), frame.reset_index(drop=True), cells)


def _raw(domain: Mapping[str, Any]) -> str:
    first, last = domain["counts"][0], domain["counts"][-1]
    repeated = domain.get("duplicates", {})
    text = f"{domain['name']}: {count(first['interactions'])} interactions read, {count(last['interactions'])} kept"
    if repeated.get("rows"):
        text += f"; {count(repeated['rows'])} repeated user-item rows settled by the rule {repeated['rule']!r}"
    return text + "."


def _overlap(cell: Mapping[str, Any]) -> Any:
    return next((value for key, value in cell.items() if "overlap" in key), None)


def _variant(name: str) -> str:
    return name.replace("wo_", "w/o ", 1).replace("_", " ") if name.startswith("wo_") else name
