"""The study's tables: numbers as a frame, and the same as Markdown, CSV, HTML cells and terminal rows.

Test intervals are bootstraps over users (seeds averaged), validation intervals Student's t over seeds, both at 95%.
A table that the store cannot fill raises MissingError; a row that it lacks is left out and named in the notes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from rich.table import Table as Terminal
from rich.text import Text

from features.errors import InputError
from study.results import PREDICTOR, PREDICTORS, MissingError, Results, per_seed
from study.statistics import METRICS, Interval, UserErrors, bootstrap, paired_difference, seed_interval

BASELINE = "source_offset"  # the bar that a useful model has to pass
_NAMES = {"mae": "MAE", "rmse": "RMSE", "ndcg20": "NDCG@20"}


@dataclass(frozen=True)
class Table:
    """`frame` holds the numbers, `shown` the same rows as text for a page."""

    name: str  # of its files
    caption: str
    frame: pd.DataFrame
    shown: pd.DataFrame
    notes: tuple[str, ...] = ()

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


@dataclass(frozen=True)
class Row:
    """One line of Table 2: a predictor or the model, in one cell."""

    cell: str
    task: str
    ratio: float
    name: str
    seeds: int
    users: int
    ratings: int
    validation: Mapping[str, Interval]
    test: Mapping[str, Interval]
    difference: Mapping[str, Interval] | None  # to BASELINE; None for itself and where they cannot be compared


@dataclass(frozen=True)
class Comparison:
    """All rows of Table 2, cells in order, predictors first."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    @cached_property
    def best(self) -> frozenset[tuple[str, str]]:
        """(cell, row) with the lowest test RMSE of its cell."""
        cells = {row.cell for row in self.rows}
        lowest = (
            min((row for row in self.rows if row.cell == cell), key=lambda r: r.test["rmse"].value) for cell in cells
        )
        return frozenset((row.cell, row.name) for row in lowest)


def domains_table(results: Results) -> Table:
    """Table 1: users, items and ratings of both domains of every task, after the filters, and their overlap."""
    if not results.domains or not results.cells:
        raise MissingError("Table 1: no finished run of part data; run `study extract`")
    last = {str(domain["name"]): domain["counts"][-1] for domain in results.domains}
    notes = [_raw(domain) for domain in results.domains]
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for cell in results.cells:
        source, target = str(cell["source"]), str(cell["target"])
        row: dict[str, Any] = {"task": f"{source}->{target}"}
        for side, name in (("source", source), ("target", target)):
            counts = last.get(name, {})
            row |= {f"{side}_{key}": counts.get(key) for key in ("users", "items", "interactions")}
        rows[source, target] = row | {"overlapping_users": _overlap(cell)}
    frame = pd.DataFrame([rows[key] for key in sorted(rows)])
    shown = pd.DataFrame({"Task": frame["task"].map(_arrow)})
    for side in ("source", "target"):
        for key, label in (("users", "users"), ("items", "items"), ("interactions", "ratings")):
            shown[f"{side.capitalize()} {label}"] = [_count(value) for value in frame[f"{side}_{key}"]]
    shown["Overlapping users"] = [_count(value) for value in frame["overlapping_users"]]
    return Table("table_1_domains", _caption("Table 1. Domains after filtering", results), frame, shown, tuple(notes))


def splits_table(results: Results) -> Table:
    """What the part "data" counted per cell (train, validation, test and side users, ratings), as logged."""
    if not results.cells:
        raise MissingError("splits: no finished run of part data; run `study extract`")
    frame = pd.DataFrame([{k: v for k, v in cell.items() if not isinstance(v, (dict, list))} for cell in results.cells])
    frame = frame.sort_values(["source", "target", "ratio"], ignore_index=True)
    shown = pd.DataFrame(
        {"Task": frame["source"] + " → " + frame["target"], "Cold ratio": frame["ratio"].map("{:.0%}".format)}
    )
    for name in frame.columns.drop(["source", "target", "ratio"]):
        shown[str(name).replace("_", " ").capitalize()] = [_count(value) for value in frame[name]]
    return Table("splits", _caption("Splits per cell", results), frame, shown)


def compare(results: Results) -> Comparison:
    """Predictors and the model's selected configuration on validation and test."""
    scores = results.finished("score")
    if scores.empty:
        raise MissingError("Table 2: no finished run of part score; run `study score`")
    rows: list[Row] = []
    notes: list[str] = []
    for cell, runs in scores.groupby("cell", sort=True):
        named = {str(run["name"]): run for _, run in runs.iterrows()}
        order = [f"{PREDICTOR}{name}" for name in PREDICTORS]
        order += sorted(name for name in named if not name.startswith(PREDICTOR))
        notes += [f"{cell}: no score of {name.removeprefix(PREDICTOR)}." for name in order if name not in named]
        if all(name.startswith(PREDICTOR) for name in named):
            notes.append(f"{cell}: no score of the model.")
        errors: dict[str, UserErrors] = {}
        for name in (name for name in order if name in named):
            try:
                errors[name] = _errors(results, named[name])
            except InputError as error:
                notes.append(f"{cell}, {name.removeprefix(PREDICTOR)}: {error}.")
        base = errors.get(f"{PREDICTOR}{BASELINE}")
        for name, found in errors.items():
            row, note = _row(str(cell), named[name], _shown_name(results, named[name]), found, base)
            rows.append(row)
            notes += note
    if not rows:
        raise MissingError(f"Table 2: no scored run can be read ({notes[0]}); run `study score`")
    return Comparison(tuple(rows), tuple(notes))


def comparison_table(comparison: Comparison, results: Results) -> Table:
    """Table 2: every row of every cell; bold is the lowest test RMSE of a cell."""
    shown = []
    for row in comparison.rows:
        bold = "**" if (row.cell, row.name) in comparison.best else ""
        line = {"Task": _arrow(row.task), "Cold ratio": f"{row.ratio:.0%}", "Row": f"{bold}{row.name}{bold}"}
        line |= {f"Val. {_NAMES[m]}": _number(row.validation[m].value) for m in METRICS if m in row.validation}
        line |= {f"Test {_NAMES[m]}": interval_text(row.test[m]) for m in METRICS}
        versus = row.difference["rmse"] if row.difference else None
        shown.append(line | {f"Test RMSE minus {BASELINE}": interval_text(versus, signed=True) if versus else "–"})
    caption = (
        "Table 2. Cold-start users: MAE and RMSE (rating points), NDCG@20; 95% bootstrap intervals over test users"
    )
    frame = pd.DataFrame([_flat(row) for row in comparison.rows])
    table = pd.DataFrame(shown).fillna("–")
    return Table("table_2_comparison", _caption(caption, results), frame, table, comparison.notes)


def ablation_table(results: Results, metrics: Sequence[str] = ("val_mae", "val_rmse")) -> Table:
    """Table 3: variants of the selected configuration, on validation (test is read by the score part alone).

    The column `full` is the ablation part's own, else the score part's run of the selected configuration.
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
        for metric in metrics:
            for name in (name for name in variants if name in named):
                interval = _over_seeds(named[name], metric)
                records.append((str(cell), named[name]["task"], named[name]["ratio"], metric, name, interval))
    frame = pd.DataFrame(
        [(*head, i.value, i.low, i.high, i.n) for *head, i in records],
        columns=["cell", "task", "ratio", "metric", "variant", "mean", "low", "high", "seeds"],
    )
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for cell_name, task, ratio, metric, name, interval in records:
        head = {
            "Task": _arrow(str(task)),
            "Cold ratio": f"{ratio:.0%}",
            "Validation": _NAMES[metric.removeprefix("val_")],
        }
        lines.setdefault((cell_name, metric), head)[_variant(name)] = interval_text(interval)
    shown = pd.DataFrame(list(lines.values()), columns=["Task", "Cold ratio", "Validation", *map(_variant, variants)])
    caption = "Table 3. Ablations on validation users (mean over seeds, 95% t intervals)"
    return Table("table_3_ablations", _caption(caption, results), frame, shown.fillna("–"), tuple(notes))


def cold_item_table(results: Results) -> Table:
    """Table 4: test ratings of items that never occur in training, by cold-start users."""
    scores = results.finished("score")
    column = "metrics.test_cold_item_n"
    runs = scores[scores[column] > 0] if column in scores.columns else scores.iloc[:0]
    if runs.empty:
        raise MissingError("Table 4: no scored run has test ratings of cold items; run `study score`")
    order = {f"{PREDICTOR}{name}": k for k, name in enumerate(PREDICTORS)}
    runs = runs.assign(_order=[order.get(str(name), len(order)) for name in runs["name"]])
    runs = runs.sort_values(["cell", "_order", "name"])
    frame = pd.DataFrame(
        {
            "cell": runs["cell"],
            "task": runs["task"],
            "ratio": runs["ratio"],
            "row": [_shown_name(results, run) for _, run in runs.iterrows()],
            "ratings": runs[column].astype(int),
            "mae": runs["metrics.test_cold_item_mae"],
            "rmse": runs["metrics.test_cold_item_rmse"],
        }
    ).reset_index(drop=True)
    shown = pd.DataFrame(
        {
            "Task": frame["task"].map(_arrow),
            "Cold ratio": frame["ratio"].map("{:.0%}".format),
            "Row": frame["row"],
            "Test ratings": frame["ratings"].map(_count),
            "MAE": frame["mae"].map(_number),
            "RMSE": frame["rmse"].map(_number),
        }
    )
    caption = "Table 4. Dual cold start: cold users and cold items (rating points)"
    return Table("table_4_cold_items", _caption(caption, results), frame, shown)


def summary_table(results: Results, comparison: Comparison | None = None) -> Terminal:
    """The table that `study run` ends with; 80 columns wide. Raises MissingError where nothing is scored."""
    comparison = comparison or compare(results)
    title = _caption("MAE, RMSE, NDCG@20: validation, and test with 95% intervals over users", results)
    table = Terminal(title=title, box=None, header_style="bold", title_style="bold", padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for split, names in (("val", METRICS), ("test", METRICS)):
        for name in names:
            table.add_column(f"{split}\n{_NAMES[name].removesuffix('@20')}", justify="right", no_wrap=True)
    for cell in dict.fromkeys(row.cell for row in comparison.rows):
        rows = [row for row in comparison.rows if row.cell == cell]
        table.add_row(Text(f"{_arrow(rows[0].task)}, cold {rows[0].ratio:.0%}", style="cyan", overflow="ignore"))
        for row in rows:
            values = [f"{row.validation[m].value:.3f}" if m in row.validation else "–" for m in METRICS]
            values += [_short(row.test[m]) for m in METRICS]
            table.add_row(f"  {row.name}", *values, style="bold" if (cell, row.name) in comparison.best else "")
    return table


def interval_text(interval: Interval, signed: bool = False) -> str:
    """`0.927 [0.915, 0.939]`; the value alone where there is no interval."""
    show = "{:+.3f}".format if signed else "{:.3f}".format
    if not math.isfinite(interval.low):
        return show(interval.value)
    return f"{show(interval.value)} [{show(interval.low)}, {show(interval.high)}]"


def _errors(results: Results, run: pd.Series) -> UserErrors:
    run_id = str(run["run_id"])
    return UserErrors.from_frame(results.per_user(run_id), place=f"run {run_id}: per_user.csv")


def _row(cell: str, run: pd.Series, short: str, errors: UserErrors, base: UserErrors | None) -> tuple[Row, list[str]]:
    difference, notes = None, []
    if base is not None and base is not errors:
        try:
            difference = paired_difference(errors, base)
        except InputError as error:
            notes.append(f"{cell}, {short}: {error}.")
    validation = {m: _over_seeds(run, f"val_{m}") for m in METRICS if not pd.isna(run.get(f"metrics.val_{m}"))}
    made = Row(
        cell=cell,
        task=str(run["task"]),
        ratio=float(run["ratio"]),
        name=short,
        seeds=errors.squared.shape[1],
        users=len(errors.users),
        ratings=int(errors.ratings.sum()),
        validation=validation,
        test=bootstrap(errors),
        difference=difference,
    )
    return made, notes


def _shown_name(results: Results, run: pd.Series) -> str:
    """A predictor's name, or the model's for its selected configuration."""
    name = str(run["name"])
    if name.startswith(PREDICTOR):
        return name.removeprefix(PREDICTOR)
    return str(results.config(str(run["run_id"])).get("model", name)) if name == "best" else name


def _over_seeds(run: pd.Series, metric: str) -> Interval:
    return seed_interval(per_seed(run, metric))


def _flat(row: Row) -> dict[str, Any]:
    flat: dict[str, Any] = {"cell": row.cell, "task": row.task, "ratio": row.ratio, "row": row.name}
    flat |= {"seeds": row.seeds, "users": row.users, "ratings": row.ratings}
    groups = (("val", row.validation), ("test", row.test), (f"minus_{BASELINE}", row.difference or {}))
    for group, intervals in groups:
        for metric in METRICS:
            interval = intervals.get(metric, Interval(math.nan, math.nan, math.nan, 0))
            key = f"{group}_{metric}"
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
    return next((value for key, value in cell.items() if key.startswith("overlap")), None)


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


def _number(value: float) -> str:
    return f"{value:.3f}"


def _short(interval: Interval) -> str:
    if not math.isfinite(interval.low):
        return f"{interval.value:.3f}"
    return f"{interval.value:.3f}±{interval.half_width:.3f}"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
