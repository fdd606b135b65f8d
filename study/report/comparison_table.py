"""Table 2 on the page and in the terminal, the same in the full ranking, and what is measured less what is printed."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import pandas as pd
from rich.markup import escape
from rich.table import Table as Terminal
from rich.text import Text

from study.report.comparison import ComparedRow, Comparison, compare
from study.report.statistics import Interval
from study.report.table import (
    NONE,
    Table,
    arrow,
    caption,
    half_width_text,
    interval_text,
    number,
    p_text,
    scales,
)  # fmt: skip
from study.specs import BASELINE
from study.tracking.results import MissingError, Results
from trainables.task_types import Metric

COMPARISON = "table_2_comparison"  # name of the files of the study's main table


def comparison_table(comparison: Comparison, results: Results) -> Table:
    """Return Table 2: every row of every cell; bold is the best of a cell (and protocol) by the headline metric."""
    return _table(COMPARISON, "Table 2. Test users", comparison, results)


def full_ranking_table(results: Results) -> Table:
    """Return Table 4 of sequences: the same rows ranked among all items of the target domain instead of sampled ones."""
    comparison = compare(results, full=True)
    return _table("table_4_full_ranking", "Table 4. Full ranking, test users", comparison, results)


def _table(name: str, title: str, comparison: Comparison, results: Results) -> Table:
    labels, headline = comparison.labels, comparison.headline
    digits, subject = labels.task_type.digits, labels.subject.name
    lines = []
    for row in comparison.rows:
        bold = "**" if (row.cell, row.group, row.labels.row) in comparison.best else ""
        line = {"Cell": _cell(comparison, row), "Row": f"{bold}{row.name}{bold}\n{row.labels.note}".strip()}
        line["Reads"] = row.labels.reads if row.seeds else "\nnot run"
        selected = row.validation.get(headline.name)
        line[f"Val. {headline.label}"] = number(selected.value, digits) if selected else ""
        for metric in comparison.metrics:
            measured = half_width_text(row.test[metric.name], digits) if metric.name in row.test else ""
            printed = f"\nprinted {number(row.printed[metric.name], digits)}" if metric.name in row.printed else ""
            line[f"Test {metric.label}"] = f"{measured}{printed}"
        line[f"{headline.label} minus {subject}"] = _difference(row, digits) if row.seeds else ""
        line["Trials, hours"] = _spent(row) if row.seeds else ""
        lines.append(line)
    text = (
        f"{title}: {scales(comparison.metrics)}; mean over seeds ± half of the 95% bootstrap interval over users;"
        f" bold: best {headline.label}"
    )
    notes = (
        f"{headline.label} minus {subject}: 95% interval over users and training seeds, paired by both; p two-sided,"
        " corrected by Holm for the rows of the cell. Trials: those of the row's search in the cell; hours: trial-hours of"
        " its search and score.",
        *comparison.notes,
    )
    frame = pd.DataFrame([_flat(comparison, row) for row in comparison.rows])
    return Table(name, caption(text, results), frame, pd.DataFrame(lines), notes, block="Cell")


def _cell(comparison: Comparison, row: ComparedRow) -> str:
    """Return `kitchen → food, overlap 100%, protocol as-given`."""
    text = comparison.labels.cell(row.task, row.ratio)
    return f"{text}, {comparison.labels.task_type.group_column} {row.group}" if row.group else text


def _spent(row: ComparedRow) -> str:
    """Return the trials of a row's search, and below them the hours; a simple baseline has no search."""
    trials = NONE if row.labels.model == BASELINE else str(row.trials)
    return trials if math.isnan(row.hours) else f"{trials}\n{row.hours:.2f} h"


def _difference(row: ComparedRow, digits: int) -> str:
    """Return value and p value, and below them the interval."""
    if row.to_subject is None:
        return NONE
    interval, p = row.to_subject.interval, row.to_subject.p_holm
    tested = "" if math.isnan(p) else f", {p_text(p)}"
    value, _, ends = interval_text(interval, signed=True, digits=digits).partition(" ")
    return f"{value}{tested}\n{ends}".strip()


def _flat(comparison: Comparison, row: ComparedRow) -> dict[str, Any]:
    """Return all numbers of a line, for the CSV."""
    task_type = comparison.labels.task_type
    flat: dict[str, Any] = {"cell": row.cell, "task": row.task, "ratio": row.ratio}
    flat |= {task_type.group_column: row.group} if task_type.group_column else {}
    flat |= {"row": row.labels.row, "model": row.labels.model, "name": row.name, "reads": row.labels.reads}
    flat |= {"note": row.labels.note, "seeds": row.seeds, "users": row.users, task_type.rows: row.size}
    flat |= {"trials": row.trials, "hours": row.hours}
    difference = {comparison.headline.name: row.to_subject.interval} if row.to_subject else {}
    groups = (
        ("val", comparison.metrics, row.validation),
        ("test", comparison.metrics, row.test),
        (f"minus_{task_type.reference}", comparison.metrics, row.to_reference or {}),
        ("minus_subject", (comparison.headline,), difference),
    )
    for group, metrics, intervals in groups:
        for metric in metrics:
            interval = intervals.get(metric.name, Interval(math.nan, math.nan, math.nan, 0))
            key = f"{group}_{metric.name}"
            flat |= {key: interval.value, f"{key}_low": interval.low, f"{key}_high": interval.high}
    flat["minus_subject_p"] = row.to_subject.p if row.to_subject else math.nan
    flat["minus_subject_p_holm"] = row.to_subject.p_holm if row.to_subject else math.nan
    return flat | {f"printed_{metric.name}": row.printed.get(metric.name, math.nan) for metric in comparison.metrics}


def difference_table(results: Results, comparison: Comparison) -> Table:
    """Return for each row and cell that the paper prints: measured, printed, and the one less the other."""
    published = results.labels.published
    if published is None:
        raise MissingError("measured less printed: the plan names no published numbers; set `published` in it")
    records = [
        (row.cell, row.group, row.labels.row, row.name, metric.label, test.value, test.low, test.high, printed)
        for row in comparison.rows
        for metric in comparison.metrics
        if (test := row.test.get(metric.name)) and (printed := row.printed.get(metric.name)) is not None
    ]
    if not records:
        raise MissingError(
            f"measured less printed: no scored row and cell is among those of {published.name}; run `study score`"
        )
    columns = ["cell", "group", "row", "name", "metric", "measured", "low", "high", "printed"]
    frame = pd.DataFrame(records, columns=columns).drop(columns="group")
    frame["difference"] = frame["measured"] - frame["printed"]
    measured, less = [], []
    for record in records:
        value, low, high, printed = (float(part) for part in record[5:])
        measured.append(interval_text(Interval(value, low, high, 0), digits=4))
        less.append(
            interval_text(Interval(value - printed, low - printed, high - printed, 0), signed=True, digits=4)
        )  # fmt: skip
    cells = pd.DataFrame(
        {
            "Cell": frame["cell"].map(arrow),
            "Row": frame["name"],
            "Metric": frame["metric"],
            "Measured [95%]": measured,
            "Printed": [number(record[8], 4) for record in records],
            "Difference [95%]": less,
        }
    )
    title = caption(f"Measured less printed in {published.paper.title}: test users", results)
    return Table(
        "measured_less_printed", title, frame, cells, (published.paper.note,), folded=True, block="Cell"
    )  # fmt: skip


# --- in the terminal ----------------------------------------------------------------------------------------------


_NAME_WIDTH = 24  # characters of the first column
TABLE_WIDTH = 120  # characters that hold every column; a narrower terminal wraps lines instead of cutting numbers


def summary_table(results: Results, comparison: Comparison | None = None) -> Terminal:
    """Return the table that `study run` ends with, at most TABLE_WIDTH wide. Raises MissingError where nothing is scored.

    Printed systems that were not run are counted below it; the report has their numbers.
    """
    comparison = comparison or compare(results)
    labels, metrics, headline = comparison.labels, comparison.metrics, comparison.headline
    names = ", ".join(metric.label for metric in metrics)
    title = caption(f"{names}: test users, ± half of the 95% interval", results)
    table = Terminal(
        title=title, box=None, header_style="bold", title_style="bold", padding=(0, 1, 0, 0), pad_edge=False
    )
    with_printed = any(row.printed for row in comparison.rows)
    table.add_column("", no_wrap=True, max_width=_NAME_WIDTH)
    table.add_column("reads", max_width=13, min_width=12)
    with_validation = len(metrics) <= 3  # what 100 columns hold
    columns = [f"val\n{_narrow(headline, metrics)}"] if with_validation else []
    columns += [f"test\n{_narrow(metric, metrics)}" for metric in metrics]
    columns += [f"printed\n{_narrow(headline, metrics)}"] if with_printed else []
    columns += [f"minus\n{escape(labels.subject.name)}", "p\n(Holm)", "trials"]
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    measured = [row for row in comparison.rows if row.seeds]
    last_cell = ""
    for cell, group in dict.fromkeys((row.cell, row.group) for row in measured):
        rows = [row for row in measured if (row.cell, row.group) == (cell, group)]
        if cell != last_cell:
            table.add_row(Text(_terminal_cell(comparison, rows[0]), style="cyan", overflow="ignore"))
        if group:
            table.add_row(Text(f" {group}", style="cyan"))
        last_cell = cell
        for row in rows:
            bold = (row.cell, row.group, row.labels.row) in comparison.best
            selected = row.validation.get(headline.name) if with_validation else None
            note = textwrap.wrap(row.labels.note, _NAME_WIDTH - 4)
            cells = [escape("\n    ".join([f"  {row.name}", *note])), escape(row.labels.reads)]
            cells += [number(selected.value, 3) if selected else NONE] if with_validation else []
            cells += _terminal_numbers(row, metrics, headline, with_printed)
            table.add_row(*cells, style="bold" if bold else "")
    table.caption = escape("\n".join(_below(comparison)))
    return table


def _terminal_cell(comparison: Comparison, row: ComparedRow) -> str:
    """Return the cell's name; where rows are in groups their metrics leave no room for what the ratio is called."""
    return f"{arrow(row.task)}, {row.ratio:.0%}" if row.group else comparison.labels.cell(row.task, row.ratio)


def _terminal_numbers(
    row: ComparedRow, metrics: Sequence[Metric], headline: Metric, with_printed: bool
) -> list[str]:  # fmt: skip
    """Return what was measured on test users, what is printed, and the difference to the subject."""
    cells = []
    for metric in metrics:
        interval = row.test[metric.name]
        cells.append(half_width_text(interval) if metric == headline else number(interval.value, 3))
    if with_printed:
        cells.append(number(row.printed[headline.name], 3) if headline.name in row.printed else NONE)
    if row.to_subject is None:
        return [*cells, NONE, NONE, _spent(row).partition("\n")[0]]
    p = row.to_subject.p_holm
    tested = NONE if math.isnan(p) else f"{p:.3f}" if p >= 0.001 else "<0.001"
    return [*cells, f"{row.to_subject.interval.value:+.3f}", tested, _spent(row).partition("\n")[0]]


def _below(comparison: Comparison) -> list[str]:
    """Return what stands below the terminal's table: what is not in it, and how printed numbers are to be read."""
    systems = dict.fromkeys(row.name for row in comparison.rows if not row.seeds)
    lines = [f"{len(systems)} printed systems were not run: {', '.join(systems)}."] if systems else []
    published = comparison.labels.published
    if published is not None and any(row.printed for row in comparison.rows):
        lines.append(published.paper.note)
    return lines


def _narrow(metric: Metric, metrics: Sequence[Metric]) -> str:
    """Return the label without its cut-off where that tells nothing apart."""
    short, _, _ = metric.label.partition("@")
    return short if [other.label.partition("@")[0] for other in metrics].count(short) == 1 else metric.label
