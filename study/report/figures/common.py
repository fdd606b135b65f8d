"""What all figures share: the head with title and notes, the palette, and how logged values stand on an axis.

Functions that make figures raise MissingError where the store holds nothing to show. Searches only ever saw validation
data, and so do their figures; a sweep's are of test users where its plan says `compare: test`. Intervals are Student's t
over the seeds, at 95%.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from study.labels import Labels
from study.tracking.results import MissingError, Results

LOG_SPAN = 20  # positive values that span at least this factor are shown and modelled on a logarithmic axis


@dataclass(frozen=True)
class Palette:
    """All tasks and ratios of the study: a task has one colour and a ratio one marker, in every figure."""

    tasks: tuple[str, ...]
    ratios: tuple[float, ...]


@dataclass(frozen=True)
class Head:
    """What every figure carries beside its numbers."""

    labels: Labels
    name: str
    """Of its files."""
    title: str
    alt: str
    """One sentence for who cannot see it."""
    palette: Palette
    notes: tuple[str, ...] = ()
    """What is missing, what was cut."""


def palette_of(results: Results) -> Palette:
    """Return the study's palette: all of its cells, finished or not."""
    return Palette(tuple(results.tasks()), tuple(results.ratios()))


def titled(title: str, results: Results) -> str:
    """Return the title, which says so where data are simulated."""
    return f"{title} — simulated data" if results.simulated else title


def row_title(title: str, results: Results, row: str) -> str:
    """Return the title of a figure of one row, which names a rival."""
    labels = results.labels
    return titled(title if row == labels.model else f"{title}: {labels.row(row).name}", results)


def row_name(name: str, results: Results, row: str) -> str:
    """Return the name of the files of a figure of one row, which names a rival."""
    return name if row == results.labels.model else f"{name}_{row}"


def search_trials(results: Results, row: str, metric: str) -> pd.DataFrame:
    """Return a row's finished search trials with a finite metric, by cell and name."""
    trials = results.validation(row=row)
    column = f"metrics.{metric}"
    if trials.empty or column not in trials.columns:
        raise MissingError(
            f"search of {results.labels.row(row).name}: no finished trial with {metric}; run `study search`"
        )
    return trials[trials[column].map(math.isfinite)].sort_values(["cell", "name"])


def axis_values(texts: Sequence[str], order: Sequence[str] = ()) -> tuple[float | str, ...]:
    """Return numbers ascending where every text is one, else the texts, those of `order` first."""
    try:
        return tuple(sorted(float(text) for text in texts))
    except ValueError:
        return tuple(sorted(texts, key=lambda text: (order.index(text) if text in order else len(order), text)))


def is_log(values: Sequence[float | str]) -> bool:
    """Return whether the values stand on a logarithmic axis."""
    numbers = [value for value in values if isinstance(value, float)]
    return len(numbers) == len(values) > 1 and numbers[0] > 0 and numbers[-1] / numbers[0] >= LOG_SPAN


def value_text(value: float | str) -> str:
    """Return a value as short as it can be read: 0.0005 is 5e-4."""
    if isinstance(value, str):
        return value
    if value and abs(value) < 0.01:
        digits, _, exponent = f"{value:.1e}".partition("e")
        return f"{digits.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.3g}"


def worse_end(values: Sequence[float], higher: bool) -> float:
    """Return the worse end of an axis, which a few diverged trials may not stretch.

    It is at most four times the median's distance from the best.
    """
    sign = -1.0 if higher else 1.0
    if not values:
        return sign * math.inf
    ordered = sorted(sign * value for value in values)
    best, median = ordered[0], ordered[len(ordered) // 2]
    cap = median + 4 * (median - best)
    return sign * (ordered[-1] if ordered[-1] <= cap or median == best else cap)
