"""The comparisons that a claim is made of: one in each cell, metric and pair of names, or between swept values.

A `Source` fills them, with what this study measured (`measured.Measured`) or with what the paper prints (`in_print.Print`).
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from study.labels import Labels
from study.papers.reader import Claim, Difference, Optimum, Order, Unimodal
from study.report.statistics import Effect
from trainables.task_types import TaskType


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """`better` against `worse` in one cell, as the claim orders them."""

    cell: str
    metric: str
    better: str
    worse: str
    effect: Effect | None = None
    """Above 0 where it goes the claim's way; None: not measured."""
    lacking: tuple[str, ...] = ()
    """Why it is not measured."""
    printed: float | None = None
    """The published difference, above 0 where it goes the claim's way."""

    def tail(self, sign: int = 1) -> float:
        """Return the one-sided p value of the claim's way (sign 1) or of its opposite (sign -1); not measured: 1."""
        return self.effect.tail(sign) if self.effect is not None else 1.0


@dataclass(frozen=True)
class Unit:
    """What counts once: a contrast, or the contrasts of one swept parameter in one cell."""

    contrasts: tuple[Contrast, ...]
    tail: float
    """One-sided p of the claim's way; above 1 where a correction makes it so."""
    against: float
    """One-sided p of its opposite."""
    decisive: Contrast
    """The contrast that `tail` depends on."""
    opposing: Contrast
    """The contrast that `against` depends on."""
    tried: tuple[int, int] = (1, 1)
    """Of how many contrasts `tail` and `against` are the smallest."""

    @property
    def is_measured(self) -> bool:
        """Whether any of its contrasts has runs."""
        return any(contrast.effect is not None for contrast in self.contrasts)


class Source(ABC):
    """What the comparisons of claims are filled from."""

    def __init__(self, labels: Labels) -> None:
        self._labels, self._task_type = labels, labels.task_type

    @abstractmethod
    def cells(self, claim: Claim) -> list[str]:
        """Return the cells that the claim speaks of."""

    @abstractmethod
    def swept(self, part: str, cell: str) -> list[str]:
        """Return the values of a sweep, ascending; those that are not numbers are left out."""

    @abstractmethod
    def _filled(self, contrast: Contrast, part: str, better: tuple[str, str], worse: tuple[str, str]) -> Contrast:
        """Return a contrast filled from two configurations, (cell, name)."""

    def contrast(self, claim: Claim, cell: str, metric: str, better: str, worse: str) -> Contrast:
        """Compare two configurations in one cell."""
        bare = Contrast(cell=cell, metric=metric, better=better, worse=worse)
        return self._filled(bare, claim.part, (cell, better), (cell, worse))

    def between_cells(self, claim: Claim, task: str, metric: str, better: str, worse: str) -> Contrast:
        """Compare the subject at two ratios of one task."""
        bare = Contrast(cell=task, metric=metric, better=better, worse=worse)
        one, two = ((f"{task}@{ratio}", self._labels.subject.paper_name) for ratio in (better, worse))
        return self._filled(bare, claim.part, one, two)


def units_of(claim: Claim, source: Source) -> Iterator[Unit]:
    """Yield all that the claim compares, filled from a source."""
    cells = source.cells(claim)
    if claim.across_ratios:
        yield from _across_ratios(claim, source, cells)
    elif claim.more_at is not None:
        yield from _more_at(claim, source, cells, claim.more_at)
    else:
        for cell, metric in itertools.product(cells, claim.metrics):
            yield from _within(claim, source, cell, metric)


def _within(claim: Claim, source: Source, cell: str, metric: str) -> Iterator[Unit]:
    form = claim.form
    if isinstance(form, Order):
        for better, worse in form.pairs:
            yield _single(source.contrast(claim, cell, metric, better, worse))
    elif isinstance(form, Difference):
        yield _single(source.contrast(claim, cell, metric, form.better, form.worse))
    else:
        values = source.swept(claim.part, cell)
        if isinstance(form, Optimum):
            inside = [value for value in values if form.low <= float(value) <= form.high]
            outside = [value for value in values if value not in inside]
        else:
            inside, outside = values[1:-1], [values[0], values[-1]] if len(values) > 2 else []
        if not inside or not outside:
            lacking = f"{cell}: no sweep of {claim.part.partition(':')[2]} with {_asked(form)}"
            yield _single(Contrast(cell=cell, metric=metric, better="", worse="", lacking=(lacking,)))
        else:
            yield _peak(claim, source, cell, metric, inside, outside)


def _asked(form: Optimum | Unimodal) -> str:
    """Return the values that a sweep needs to be judged."""
    if isinstance(form, Unimodal):
        return "three values"
    best = f"{form.low:g}" if form.low == form.high else f"a value from {form.low:g} to {form.high:g}"
    return f"{best} and another one"


def _peak(
    claim: Claim, source: Source, cell: str, metric: str, inside: Sequence[str], outside: Sequence[str]
) -> Unit:  # fmt: skip
    """Return the unit of a peak: one of `inside` is better than all of `outside`.

    Against it speaks that one of `outside` is better than all of `inside`.
    """
    grid = {(v, o): source.contrast(claim, cell, metric, v, o) for v in inside for o in outside}
    hardest = [max((grid[v, o] for o in outside), key=lambda contrast: contrast.tail(1)) for v in inside]
    best = min(hardest, key=lambda contrast: contrast.tail(1))
    opposing = [max((grid[v, o] for v in inside), key=lambda contrast: contrast.tail(-1)) for o in outside]
    other = min(opposing, key=lambda contrast: contrast.tail(-1))
    return Unit(
        tuple(grid.values()),
        len(inside) * best.tail(1),
        len(outside) * other.tail(-1),
        best,
        other,
        (len(inside), len(outside)),
    )


def _single(contrast: Contrast) -> Unit:
    return Unit((contrast,), contrast.tail(1), contrast.tail(-1), contrast, contrast)


def _across_ratios(claim: Claim, source: Source, cells: Sequence[str]) -> Iterator[Unit]:
    """Yield the comparisons of ratios, which are the names of the order: the subject in each task's cells."""
    pairs = claim.form.pairs if isinstance(claim.form, Order) else ()
    for task in dict.fromkeys(cell.partition("@")[0] for cell in cells):
        for metric, (better, worse) in itertools.product(claim.metrics, pairs):
            yield _single(source.between_cells(claim, task, metric, better, worse))


def _more_at(claim: Claim, source: Source, cells: Sequence[str], ratios: tuple[float, float]) -> Iterator[Unit]:
    """Yield the difference at one ratio less that at another, in each task that has both."""
    pairs = claim.form.pairs if isinstance(claim.form, Order) else ()
    more, less = (f"{ratio:g}" for ratio in ratios)
    for task in dict.fromkeys(cell.partition("@")[0] for cell in cells):
        for metric, (better, worse) in itertools.product(claim.metrics, pairs):
            one, two = (source.contrast(claim, f"{task}@{ratio}", metric, better, worse) for ratio in (more, less))
            effect = one.effect.minus(two.effect) if one.effect and two.effect else None
            printed = one.printed - two.printed if one.printed is not None and two.printed is not None else None
            yield _single(
                Contrast(
                    cell=f"{task}@{more} less @{less}", metric=metric, better=better, worse=worse, effect=effect,
                    lacking=one.lacking + two.lacking, printed=printed,
                )
            )  # fmt: skip


def sign_of(task_type: TaskType, metric: str) -> int:
    """Return 1 where a higher value of the metric is better, else -1."""
    higher = {known.name for known in (*task_type.metrics, *task_type.full) if known.better == "higher"}
    return 1 if metric in higher else -1
