"""The study's tables: numbers as a frame, and the same as Markdown, CSV, HTML cells and terminal rows.

Test intervals are bootstraps over users (seeds averaged), validation intervals Student's t over seeds, both at 95%.
A table that the store cannot fill raises MissingError; a row that it lacks is left out and named in the notes. What the
metrics are, and which way is better, says the study's labels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich.table import Table as Terminal
from rich.text import Text

from study.labels import Labels, in_group, scale
from study.report.comparison import Comparison, Row, compare, over_seeds, printed, shown_name
from study.report.statistics import Interval
from study.specs import PREDICTOR
from study.tracking.results import MissingError, Results, per_seed
from trainables.task_types import Metric


@dataclass(frozen=True)
class Table:
    """`frame` holds the numbers, `shown` the same rows as text for a page."""

    name: str  # of its files
    caption: str
    frame: pd.DataFrame
    shown: pd.DataFrame
    notes: tuple[str, ...] = ()
    folded: bool = False  # long, and shown on a page when asked for

    def markdown(self) -> str:
        """Caption, table and notes."""
        header = [_escape(str(name)) for name in self.shown.columns]
        rows = [[_escape(str(cell)) for cell in row] for row in self.shown.itertuples(index=False)]
        lines = [f"**{self.caption}**", "", _line(header), _line(["---"] * len(header)), *map(_line, rows)]
        return "\n".join([*lines, *(line for note in self.notes for line in ("", f"*{note}*"))]) + "\n"

    def save(self, folder: Path) -> dict[str, Path]:
        """Write `<name>.md` and `<name>.csv`; returns them by their ending."""
        paths = {ending: folder / f"{self.name}.{ending}" for ending in ("md", "csv")}
        paths["md"].write_text(self.markdown(), encoding="utf-8")
        self.frame.to_csv(paths["csv"], index=False, lineterminator="\n")
        return paths


def domains_table(results: Results) -> Table:
    """Table 1: users, items and interactions of both domains of every task, after the filters, and their overlap."""
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
    shown = pd.DataFrame({"Task": frame["task"].map(_arrow)})
    for side in ("source", "target"):
        for key, label in (("users", "users"), ("items", "items"), ("interactions", results.labels.task_type.rows)):
            shown[f"{side.capitalize()} {label}"] = [_count(value) for value in frame[f"{side}_{key}"]]
    shown["Overlapping users"] = [_count(value) for value in frame["overlapping_users"]]
    return Table("table_1_domains", _caption("Table 1. Domains after filtering", results), frame, shown, tuple(notes))


def splits_table(results: Results) -> Table:
    """What the part "data" counted per cell (train, validation, test and side users, ratings), as logged."""
    if not results.cells:
        raise MissingError("splits: no finished run of part data with cells; run `study extract`")
    frame = pd.DataFrame([{k: v for k, v in cell.items() if not isinstance(v, (dict, list))} for cell in results.cells])
    frame = frame.sort_values(["source", "target", "ratio"], ignore_index=True)
    shown = pd.DataFrame(
        {
            "Task": frame["source"] + " → " + frame["target"],
            results.labels.ratio: frame["ratio"].map("{:.0%}".format),
        }
    )
    for name in frame.columns.drop(["source", "target", "ratio"]):
        shown[str(name).replace("_", " ").capitalize()] = [_count(value) for value in frame[name]]
    return Table("splits", _caption("Splits per cell", results), frame, shown)


def comparison_table(comparison: Comparison, results: Results) -> Table:
    """Table 2: every row of every cell; bold is the best row of a cell (and protocol) by the headline metric."""
    caption = "Table 2. Test users"
    return _comparison_table("table_2_comparison", caption, comparison, results)


def full_ranking_table(results: Results) -> Table:
    """Table 4 of sequences: the same rows ranked among all items of the target domain instead of sampled ones."""
    comparison = compare(results, full=True)
    return _comparison_table("table_4_full_ranking", "Table 4. Full ranking, test users", comparison, results)


def _comparison_table(name: str, head: str, comparison: Comparison, results: Results) -> Table:
    labels, metrics, headline = comparison.labels, comparison.metrics, comparison.headline
    bar, digits = labels.task_type.reference, labels.task_type.digits
    shown = []
    for row in comparison.rows:
        bold = "**" if (row.cell, row.group, row.name) in comparison.best else ""
        line = {"Task": _arrow(row.task), labels.ratio: f"{row.ratio:.0%}"}
        if row.group:
            line[labels.task_type.group_column.capitalize()] = row.group
        line["Row"] = f"{bold}{row.name}{bold}"
        line |= {
            f"Val. {m.label}": _number(row.validation[m.name].value, digits)
            for m in metrics
            if m.name in row.validation
        }
        line |= {
            f"Test {m.label}": interval_text(row.test[m.name], digits=digits) for m in metrics if m.name in row.test
        }
        versus = row.difference[headline.name] if row.difference else None
        text = interval_text(versus, signed=True, digits=digits) if versus else "–"
        shown.append(line | {f"Test {headline.label} minus {bar}": text})
    caption = f"{head}: {_measures(metrics)}; mean over seeds, 95% bootstrap intervals over users"
    frame = pd.DataFrame([_flat(comparison, row) for row in comparison.rows])
    return Table(name, _caption(caption, results), frame, pd.DataFrame(shown).fillna("–"), comparison.notes)


def ablation_table(results: Results) -> Table:
    """Table 3: variants of the selected configuration, on validation (test is read by the score part alone).

    The column `full` is the ablation part's own, else the score part's run of the selected configuration. Published
    ablations stand below as they are printed; they are of test users.
    """
    runs = results.finished("ablate")
    if runs.empty:
        raise MissingError("Table 3: no finished run of part ablate; run `study ablate`")
    notes, records = [], []
    variants = sorted({str(name) for name in runs["name"]} - {"full"}) + ["full"]
    scores = results.finished("score")
    for cell, of_cell in runs.groupby("cell", sort=True):
        named = {str(run["name"]): run for _, run in of_cell.iterrows()}
        if "full" not in named:
            selected = scores[(scores["cell"] == cell) & ~scores["name"].str.startswith(PREDICTOR)]
            if not selected.empty:
                named["full"] = selected.iloc[0]
        notes += [f"{cell}: no finished run of {name}." for name in variants if name not in named]
        records += _ablation_records(results, str(cell), {name: named[name] for name in variants if name in named})
    if any(record[-1].n == 0 for record in records):
        notes.append("Published numbers are of test users, measured ones of validation users.")
    group_column = results.labels.task_type.group_column  # none: one group of all rows
    head = ["cell", "task", "ratio", group_column, "metric", "label", "variant"]
    frame = pd.DataFrame(
        [(*names, i.value, i.low, i.high, i.n) for *names, i in records],
        columns=[*head, "mean", "low", "high", "seeds"],
    ).drop(columns=["label", *([] if group_column else [""])])
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for cell_name, task, ratio, group, _, label, name, interval in records:
        line = {"Task": _arrow(task), results.labels.ratio: f"{ratio:.0%}"}
        line |= {group_column.capitalize(): group} if group_column else {}
        text = interval_text(interval, digits=results.labels.task_type.digits)
        lines.setdefault((cell_name, group, label), line | {"Validation": label})[_variant(name)] = text
    columns = ["Task", results.labels.ratio, *filter(None, [group_column.capitalize()]), "Validation"]
    shown = pd.DataFrame(list(lines.values()), columns=[*columns, *map(_variant, variants)])
    metrics = [
        metric for metric in results.labels.task_type.metrics if metric.name in results.labels.task_type.ablation
    ]
    caption = f"Table 3. Ablations on validation users: {_measures(metrics)} (mean over seeds, 95% t intervals)"
    return Table("table_3_ablations", _caption(caption, results), frame, shown.fillna("–"), tuple(notes))


def _ablation_records(results: Results, cell: str, named: Mapping[str, pd.Series]) -> list[tuple[Any, ...]]:
    """(cell, task, ratio, group, metric, its label, variant, interval) of a cell, and of what was published of it."""
    task_type, published = results.labels.task_type, results.labels.published
    first = next(iter(named.values()))
    head = (cell, str(first["task"]), float(first["ratio"]))
    records: list[tuple[Any, ...]] = []
    for group in task_type.groups:
        for metric in (metric for metric in task_type.metrics if metric.name in task_type.ablation):
            column = f"val_{in_group(metric.name, group)}"
            of = {name: run for name, run in named.items() if per_seed(run, column)}
            names = (f"val_{metric.name}", metric.label)
            records += [(*head, group, *names, name, over_seeds(run, column)) for name, run in of.items()]
            if of and published is not None and published.paper.group == group:
                names = (f"published_{metric.name}", f"{metric.label} (published, test)")
                values = {name: published.ablations.value(name, cell, metric.name) for name in named}
                records += [
                    (*head, group, *names, name, printed(value)) for name, value in values.items() if value is not None
                ]
    return records


def cold_item_table(results: Results) -> Table:
    """Table 4: test ratings of items that never occur in training, by cold-start users."""
    scores = results.finished("score")
    column = "metrics.test_cold_item_n"
    runs = scores[scores[column] > 0] if column in scores.columns else scores.iloc[:0]
    if runs.empty:
        raise MissingError("Table 4: no scored run has test ratings of cold items; run `study score`")
    labels = results.labels
    order = {f"{PREDICTOR}{name}": k for k, name in enumerate(labels.task_type.predictors)}
    runs = runs.assign(_order=[order.get(str(name), len(order)) for name in runs["name"]])
    runs = runs.sort_values(["cell", "_order", "name"])
    frame = pd.DataFrame(
        {
            "cell": runs["cell"],
            "task": runs["task"],
            "ratio": runs["ratio"],
            "row": [shown_name(results, run) for _, run in runs.iterrows()],
            "ratings": runs[column].astype(int),
            "mae": runs["metrics.test_cold_item_mae"],
            "rmse": runs["metrics.test_cold_item_rmse"],
        }
    ).reset_index(drop=True)
    shown = pd.DataFrame(
        {
            "Task": frame["task"].map(_arrow),
            labels.ratio: frame["ratio"].map("{:.0%}".format),
            "Row": frame["row"],
            "Test ratings": frame["ratings"].map(_count),
            "MAE": [_number(value, labels.task_type.digits) for value in frame["mae"]],
            "RMSE": [_number(value, labels.task_type.digits) for value in frame["rmse"]],
        }
    )
    caption = "Table 4. Dual cold start: cold users and cold items (rating points)"
    return Table("table_4_cold_items", _caption(caption, results), frame, shown)


def pseudo_table(results: Results) -> Table:
    """What pseudo-items are worth: recall of what overlapping users have, who were kept out of the generator's training."""
    if not results.pseudo:
        raise MissingError("pseudo-items: no finished run of part data measured them; run `study extract`")
    frame = pd.DataFrame(list(results.pseudo)).sort_values(["pair", "source", "target", "at"], kind="stable")
    shown = pd.DataFrame(
        {
            "Training users": frame["pair"],
            "Task": (frame["source"] + "->" + frame["target"]).map(_arrow),
            "Items": frame["items"],
            "Length": frame["at"].map(_count),
            "Recall": [_number(value, 4) for value in frame["recall"]],
            "Users with a hit": frame["hit"].map("{:.1%}".format),
            "Users": frame["users"].map(_count),
            "Different items": frame["different"].map(_count),
        }
    )
    caption = (
        "Pseudo-items: share of a user's real items of the other domain in lists of equal length (higher is better)"
    )
    return Table("pseudo_items", _caption(caption, results), frame.reset_index(drop=True), shown)


def published_table(results: Results, comparison: Comparison) -> Table:
    """Every published row as printed, and below them the rows of this study that they can be held against."""
    published = results.labels.published
    if published is None:
        raise MissingError("published numbers: the plan names none; set `published` in it")
    grid, group = published.comparison, published.paper.group
    lines: dict[tuple[bool, str], dict[tuple[str, str], float]] = {
        (False, name): {
            (cell, metric): value
            for cell, values in of.items()
            for metric, value in zip(grid.columns, values, strict=True)
        }
        for name, of in grid.rows.items()
    }
    for row in comparison.rows:
        if row.seeds and row.group == group and row.cell in grid.cells:
            values = {(row.cell, metric.name): row.test[metric.name].value for metric in comparison.metrics}
            lines.setdefault((True, row.name), {}).update(values)
    columns = [(cell, metric) for cell in grid.cells for metric in grid.columns]
    frame = pd.DataFrame(
        [("measured" if ours else "published", name, *(line.get(key, math.nan) for key in columns))
         for (ours, name), line in lines.items()],
        columns=["source", "row", *(f"{cell}_{metric}" for cell, metric in columns)],
    )  # fmt: skip
    labels = {metric.name: metric.label for metric in comparison.metrics}
    shown = pd.DataFrame({"Source": frame["source"], "Row": frame["row"]})
    for cell, metric in columns:
        column = frame[f"{cell}_{metric}"].tolist()
        shown[f"{_arrow(cell)} {labels[metric]}"] = [
            "–" if math.isnan(value) else _number(value, 4) for value in column
        ]
    protocol = f", protocol {group}" if group else ""
    caption = f"Published beside measured: {published.name}, test users{protocol}"
    return Table("published", _caption(caption, results), frame, shown, (published.paper.note,))


def difference_table(results: Results, comparison: Comparison) -> Table:
    """The model's row of each cell that the paper prints: measured, published, and the one less the other."""
    published = results.labels.published
    if published is None:
        raise MissingError("measured less published: the plan names no published numbers; set `published` in it")
    grid, group = published.comparison, published.paper.group
    records = []
    for row in comparison.rows:
        if row.seeds and row.group == group and row.name == results.labels.model:
            for metric in comparison.metrics:
                value = grid.value(published.paper.method, row.cell, metric.name)
                if value is not None:
                    found = row.test[metric.name]
                    records.append((row.cell, metric.label, found.value, found.low, found.high, value))
    if not records:
        raise MissingError(
            f"measured less published: no scored cell is among those of {published.name}; run `study score`"
        )
    frame = pd.DataFrame(records, columns=["cell", "metric", "measured", "low", "high", "published"])
    frame["difference"] = frame["measured"] - frame["published"]
    numbers = [tuple(map(float, record[2:])) for record in records]  # measured, low, high, published
    less = [Interval(value - print_, low - print_, high - print_, 0) for value, low, high, print_ in numbers]
    shown = pd.DataFrame(
        {
            "Cell": frame["cell"].map(_arrow),
            "Metric": frame["metric"],
            "Measured [95%]": [
                interval_text(Interval(value, low, high, 0), digits=4) for value, low, high, _ in numbers
            ],
            "Published": [_number(each[3], 4) for each in numbers],
            "Difference [95%]": [interval_text(each, signed=True, digits=4) for each in less],
        }
    )
    caption = f"Measured less published: {published.paper.method} on test users"
    return Table("measured_less_published", _caption(caption, results), frame, shown, (published.paper.note,))


def summary_table(results: Results, comparison: Comparison | None = None) -> Terminal:
    """The table that `study run` ends with; 80 columns wide. Raises MissingError where nothing is scored."""
    comparison = comparison or compare(results)
    labels, metrics = comparison.labels, comparison.metrics
    names = ", ".join(metric.label for metric in metrics)
    title = _caption(f"{names}: validation, and test with 95% intervals over users", results)
    table = Terminal(title=title, box=None, header_style="bold", title_style="bold", padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    validation = metrics if len(metrics) <= 3 else (comparison.headline,)  # what 80 columns hold
    for split, found in (("val", validation), ("test", metrics)):
        for metric in found:
            table.add_column(f"{split}\n{_narrow(metric, metrics)}", justify="right", no_wrap=True)
    shown = None
    for cell, group in dict.fromkeys((row.cell, row.group) for row in comparison.rows):
        rows = [row for row in comparison.rows if (row.cell, row.group) == (cell, group)]
        if cell != shown:
            table.add_row(Text(_head(labels, rows[0]), style="cyan", overflow="ignore"))
            shown = cell
        if group:
            table.add_row(Text(f" {group}", style="cyan"))
        for row in rows:
            values = [f"{row.validation[m.name].value:.3f}" if m.name in row.validation else "–" for m in validation]
            values += [_short(row.test[m.name]) if m.name in row.test else "–" for m in metrics]
            bold = (cell, group, row.name) in comparison.best
            table.add_row(f"  {row.name}", *values, style="bold" if bold else "")
    if labels.published is not None and any(row.seeds == 0 for row in comparison.rows):
        table.caption = labels.published.paper.note  # a published row is never of quite the same data
    return table


def _head(labels: Labels, row: Row) -> str:
    """The cell's name; where rows are in groups their metrics leave no room for what the ratio is called."""
    return f"{_arrow(row.task)}, {row.ratio:.0%}" if row.group else labels.cell(row.task, row.ratio)


def interval_text(interval: Interval, signed: bool = False, digits: int = 3) -> str:
    """`0.927 [0.915, 0.939]`; the value alone where there is no interval."""
    show = f"{{:{'+' if signed else ''}.{digits}f}}".format
    if not math.isfinite(interval.low):
        return show(interval.value)
    return f"{show(interval.value)} [{show(interval.low)}, {show(interval.high)}]"


def _flat(comparison: Comparison, row: Row) -> dict[str, Any]:
    task_type = comparison.labels.task_type
    flat: dict[str, Any] = {"cell": row.cell, "task": row.task, "ratio": row.ratio}
    flat |= {task_type.group_column: row.group} if task_type.group_column else {}
    flat |= {"row": row.name, "seeds": row.seeds, "users": row.users, task_type.rows: row.size}
    groups = (("val", row.validation), ("test", row.test), (f"minus_{task_type.reference}", row.difference or {}))
    for group, intervals in groups:
        for metric in comparison.metrics:
            interval = intervals.get(metric.name, Interval(math.nan, math.nan, math.nan, 0))
            key = f"{group}_{metric.name}"
            flat |= {key: interval.value, f"{key}_low": interval.low, f"{key}_high": interval.high}
    return flat


def _raw(domain: Mapping[str, Any]) -> str:
    first, last = domain["counts"][0], domain["counts"][-1]
    repeated = domain.get("duplicates", {})
    text = f"{domain['name']}: {_count(first['interactions'])} interactions read, {_count(last['interactions'])} kept"
    if repeated.get("rows"):
        text += f"; {_count(repeated['rows'])} repeated user-item rows settled by the rule {repeated['rule']!r}"
    return text + "."


def _overlap(cell: Mapping[str, Any]) -> Any:
    return next((value for key, value in cell.items() if "overlap" in key), None)


def _caption(text: str, results: Results) -> str:
    return f"{text} — simulated data" if results.simulated else text


def _arrow(task: str) -> str:
    return task.replace("->", " → ")


def _variant(name: str) -> str:
    return name.replace("wo_", "w/o ", 1).replace("_", " ") if name.startswith("wo_") else name


def _count(value: Any) -> str:
    if value is None or isinstance(value, str) or pd.isna(value):
        return str(value) if isinstance(value, str) else "–"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.3f}"


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}"


def _measures(metrics: Sequence[Metric]) -> str:
    """`MAE, RMSE (rating points, lower is better), NDCG@20 (0 to 1, higher is better)`."""
    scales = [scale(metric) for metric in metrics]
    ends = [k + 1 == len(scales) or scales[k + 1] != scales[k] for k in range(len(scales))]
    return ", ".join(
        f"{metric.label} {scales[k]}" if ends[k] else metric.label for k, metric in enumerate(metrics)
    )  # fmt: skip


def _narrow(metric: Metric, metrics: Sequence[Metric]) -> str:
    """The label without its cut-off where that tells nothing apart."""
    short, _, _ = metric.label.partition("@")
    return short if [other.label.partition("@")[0] for other in metrics].count(short) == 1 else metric.label


def _short(interval: Interval) -> str:
    if not math.isfinite(interval.low):
        return f"{interval.value:.3f}"
    return f"{interval.value:.3f}±{interval.half_width:.3f}"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
