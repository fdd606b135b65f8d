"""A table of the report: numbers as a frame, and the same as Markdown, CSV and cells of a page; and words for its cells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from study.labels import scale
from study.report.statistics import Interval
from study.tracking.results import Results
from trainables.task_types import Metric

NONE = "–"


@dataclass(frozen=True)
class Table:
    """Numbers, and what a page shows of them.

    A cell of `cells` may have several lines; those after the first are printed smaller.
    """

    name: str
    """Of its files."""
    caption: str
    frame: pd.DataFrame
    cells: pd.DataFrame
    notes: tuple[str, ...] = ()
    folded: bool = False
    """Long, and shown on a page when asked for."""
    block: str = ""
    """Column of `cells` that a page writes across the table, once for all rows that have the same."""

    def markdown(self) -> str:
        """Return caption, table and notes."""
        header = [_escape(str(name)) for name in self.cells.columns]
        rows = [[_escape(str(cell)) for cell in row] for row in self.cells.itertuples(index=False)]
        lines = [f"**{self.caption}**", "", _line(header), _line(["---"] * len(header)), *map(_line, rows)]
        return "\n".join([*lines, *(line for note in self.notes for line in ("", f"*{note}*"))]) + "\n"

    def save(self, folder: Path) -> dict[str, Path]:
        """Write `<name>.md` and `<name>.csv`; return them by their ending."""
        paths = {ending: folder / f"{self.name}.{ending}" for ending in ("md", "csv")}
        paths["md"].write_text(self.markdown(), encoding="utf-8")
        self.frame.to_csv(paths["csv"], index=False, lineterminator="\n")
        return paths


def caption(text: str, results: Results) -> str:
    """Return the caption, which says so where data are simulated."""
    return f"{text} — simulated data" if results.simulated else text


def arrow(task: str) -> str:
    """Return `books → movies`."""
    return task.replace("->", " → ")


def count(value: Any) -> str:
    """Return a number of things: `12,345`; text as it is."""
    if value is None or isinstance(value, str) or pd.isna(value):
        return str(value) if isinstance(value, str) else NONE
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.3f}"


def number(value: float, digits: int) -> str:
    """Return a number with so many digits after the point."""
    return f"{value:.{digits}f}"


def interval_text(interval: Interval, signed: bool = False, digits: int = 3) -> str:
    """Return `0.927 [0.915, 0.939]`; the value alone where there is no interval."""
    show = f"{{:{'+' if signed else ''}.{digits}f}}".format
    if not math.isfinite(interval.low):
        return show(interval.value)
    return f"{show(interval.value)} [{show(interval.low)}, {show(interval.high)}]"


def half_width_text(interval: Interval, digits: int = 3) -> str:
    """Return `0.927±0.012`; the value alone where there is no interval."""
    if not math.isfinite(interval.low):
        return number(interval.value, digits)
    return f"{number(interval.value, digits)}±{number(interval.half_width, digits)}"


def p_text(p: float) -> str:
    """Return a p value: `p 0.031`, `p<0.001`."""
    return f"p {p:.3f}" if p >= 0.001 else "p<0.001"


def scales(metrics: Sequence[Metric]) -> str:
    """Return `MAE, RMSE (rating points, lower is better), NDCG@20 (0 to 1, higher is better)`."""
    units = [scale(metric) for metric in metrics]
    ends = [k + 1 == len(units) or units[k + 1] != units[k] for k in range(len(units))]
    return ", ".join(
        f"{metric.label} {units[k]}" if ends[k] else metric.label for k, metric in enumerate(metrics)
    )  # fmt: skip


def _escape(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split("\n")).strip()


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
