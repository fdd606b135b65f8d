"""What a claim compares: for each thing that it says of a metric one component, pooled over the cells that it speaks of.

A component is one side against another: two systems, a value of a sweep against the mean of the others, or the difference
at one ratio less that at another. A `Source` fills its contrasts, one a cell, with what this study measured
(`measured.Measured`) or with what the paper prints (`in_print.Print`).
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

from study.labels import Labels
from study.papers.reader import Claim, Difference, Optimum, Order, Unimodal
from study.report.statistics import Effect, pool
from trainables.task_types import TaskType

OTHERS = "the other values"


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """`better` against `worse` in one cell, as the claim orders them."""

    cell: str
    metric: str
    better: str
    worse: str
    effect: Effect | None = None
    """Above 0 where it goes the claim's way; None: not measured."""
    level: float | None = None
    """Measured value of the better side."""
    split: str = ""
    """Users that it was measured on: test or validation."""
    lacking: tuple[str, ...] = ()
    """Why it is not measured, or what is left out of it."""
    printed: float | None = None
    """The published difference, above 0 where it goes the claim's way."""
    printed_level: float | None = None
    """Published value of the better side."""

    @property
    def task(self) -> str:
        """`books->movies`."""
        return self.cell.partition("@")[0]

    @property
    def printed_share(self) -> float | None:
        """The published difference as a share of the published value."""
        return self.printed / self.printed_level if self.printed is not None and self.printed_level else None


@dataclass(frozen=True, kw_only=True)
class Component:
    """One thing that a claim says, in all cells that it speaks of."""

    metric: str
    better: str
    worse: str
    contrasts: tuple[Contrast, ...]
    rivals: tuple[Component, ...] = ()
    """Of an optimum: the same side against each other value by itself."""

    @property
    def measured(self) -> tuple[Contrast, ...]:
        """Contrasts that this study has runs for."""
        return tuple(contrast for contrast in self.contrasts if contrast.effect is not None)

    @property
    def effect(self) -> Effect | None:
        """The mean of the measured cells, equally weighted."""
        effects = [contrast.effect for contrast in self.contrasts if contrast.effect is not None]
        share = 1 / max(1, len(effects))
        return pool([(share, effect) for effect in effects], [c.task for c in self.measured]) if effects else None


Sides = tuple[tuple[str, ...], tuple[str, ...]]


class Source(ABC):
    """What the comparisons of claims are filled from."""

    def __init__(self, labels: Labels) -> None:
        self._labels, self._task_type = labels, labels.task_type

    def optima(self, claim: Claim, cell: str) -> list[Optimum]:
        """Return where the paper's claims put the best value of the same sweep in a cell."""
        task, _, ratio = cell.partition("@")
        return [
            other.optimum
            for other in (self._labels.paper.claims if self._labels.paper else ())
            if other.part == claim.part and other.optimum is not None and other.dataset in ("", self._labels.dataset)
            and other.speaks_of(task, float(ratio))
        ]  # fmt: skip

    @abstractmethod
    def cells(self, claim: Claim) -> list[str]:
        """Return the cells that the claim speaks of."""

    @abstractmethod
    def swept(self, part: str, cell: str) -> list[str]:
        """Return the values of a sweep, ascending; those that are not numbers are left out."""

    @abstractmethod
    def filled(self, contrast: Contrast, part: str, sides: Sides) -> Contrast:
        """Return a contrast filled from the configurations of each side, of which it takes the mean."""

    @abstractmethod
    def between(self, contrast: Contrast, part: str, better: str, worse: str) -> Contrast:
        """Return a contrast filled from the subject in two cells."""


def components_of(claim: Claim, source: Source, metric: str) -> list[Component]:
    """Return all that the claim says of a metric, filled from a source; nothing where it speaks of no cell."""
    cells = source.cells(claim)
    if not cells:
        return []
    if claim.across_ratios:
        return _across_ratios(claim, source, cells, metric)
    if claim.more_at is not None:
        return _more_at(claim, source, cells, metric, claim.more_at)
    form = claim.form
    if isinstance(form, Order | Difference):
        return [
            _component([_within(claim, source, cell, metric, sides) for cell in cells]) for sides in _named_sides(claim)
        ]
    return _peak(claim, source, cells, metric, form)


def _named_sides(claim: Claim) -> list[Sides]:
    """Return the sides of an order or a difference: pairs of names, or the mean of one level against that of the next."""
    form = claim.form
    if isinstance(form, Difference):
        return [((form.better,), (form.worse,))]
    assert isinstance(form, Order)
    if claim.at_least == "most":
        return list(itertools.pairwise(form.levels))
    return [((better,), (worse,)) for better, worse in form.pairs]


def _within(
    claim: Claim, source: Source, cell: str, metric: str, sides: Sides, names: tuple[str, str] = ("", "")
) -> Contrast:
    """Compare two sides in one cell."""
    better, worse = (name or side_text(side) for name, side in zip(names, sides, strict=True))
    return source.filled(Contrast(cell=cell, metric=metric, better=better, worse=worse), claim.part, sides)


def side_text(names: Sequence[str]) -> str:
    """Return `CMF`, or `the mean of CMF, EMCDR`."""
    return names[0] if len(names) == 1 else f"the mean of {', '.join(names)}"


def _component(contrasts: Sequence[Contrast], rivals: Sequence[Component] = ()) -> Component:
    first = contrasts[0]
    return Component(
        metric=first.metric, better=first.better, worse=first.worse, contrasts=tuple(contrasts), rivals=tuple(rivals)
    )


def _peak(
    claim: Claim, source: Source, cells: Sequence[str], metric: str, form: Optimum | Unimodal
) -> list[Component]:  # fmt: skip
    """Return the components of a peak.

    Of an optimum it is one: the best values less the mean of the others. Of a fall and a rise they are two: the peak less
    either end.
    """
    field = claim.part.partition(":")[2]
    swept = {cell: source.swept(claim.part, cell) for cell in cells}
    inside = {cell: _inside(claim, source, cell, values, form) for cell, values in swept.items()}
    if isinstance(form, Optimum):
        best = f"{form.low:g}" if form.low == form.high else f"{form.low:g} to {form.high:g}"
        outside = {cell: [tuple(value for value in swept[cell] if value not in inside[cell])] for cell in cells}
        names, asked = [(best, OTHERS)], f"{best} and another one"
    else:
        outside = {cell: [(swept[cell][0],), (swept[cell][-1],)] if inside[cell] else [] for cell in cells}
        names, asked = [("the peak", "the least"), ("the peak", "the most")], "three values"
    components = []
    for k, (better, worse) in enumerate(names):
        contrasts = []
        for cell in cells:
            if inside[cell] and outside[cell][k]:
                better = side_text(inside[cell]) if isinstance(form, Unimodal) else better
                worse = outside[cell][k][0] if isinstance(form, Unimodal) else worse
                contrasts.append(
                    _within(claim, source, cell, metric, (inside[cell], outside[cell][k]), (better, worse))
                )
            else:
                lacking = (f"{cell}: no sweep of {field} with {asked}",)
                contrasts.append(Contrast(cell=cell, metric=metric, better=better, worse=worse, lacking=lacking))
        rivals = _rivals(claim, source, metric, inside, outside, better) if isinstance(form, Optimum) else []
        components.append(_component(sorted(contrasts, key=lambda contrast: contrast.effect is None), rivals))
    return components


def _inside(
    claim: Claim, source: Source, cell: str, values: Sequence[str], form: Optimum | Unimodal
) -> tuple[str, ...]:
    """Return the values that are to be the best: those that the paper names, else all but the ends."""
    if isinstance(form, Optimum):
        return tuple(value for value in values if form.low <= float(value) <= form.high)
    between = values[1:-1]
    peaks = source.optima(claim, cell)
    named = [v for v in between if any(peak.low <= float(v) <= peak.high for peak in peaks)]
    return tuple(named or between)


def _rivals(
    claim: Claim, source: Source, metric: str, inside: dict[str, tuple[str, ...]],
    outside: dict[str, list[tuple[str, ...]]], better: str,
) -> list[Component]:  # fmt: skip
    """Return the best values of an optimum against each of the others, over the cells that have it."""
    rivals = []
    for value in dict.fromkeys(value for ((*values,),) in outside.values() for value in values):
        cells = [cell for cell, (values,) in outside.items() if value in values and inside[cell]]
        found = [_within(claim, source, c, metric, (inside[c], (value,)), (better, value)) for c in cells]
        if found:
            rivals.append(_component(found))
    return rivals


def _across_ratios(claim: Claim, source: Source, cells: Sequence[str], metric: str) -> list[Component]:
    """Return the comparisons of ratios, which are the names of the order: the subject in each task's cells."""
    tasks = dict.fromkeys(cell.partition("@")[0] for cell in cells)
    pairs = claim.form.pairs if isinstance(claim.form, Order) else ()
    return [
        _component(
            [
                source.between(
                    Contrast(cell=task, metric=metric, better=better, worse=worse),
                    claim.part, f"{task}@{better}", f"{task}@{worse}",
                )
                for task in tasks
            ]
        )
        for better, worse in pairs
    ]  # fmt: skip


def _more_at(
    claim: Claim, source: Source, cells: Sequence[str], metric: str, ratios: tuple[float, float]
) -> list[Component]:  # fmt: skip
    """Return the difference at one ratio less that at another, in each task."""
    more, less = (f"{ratio:g}" for ratio in ratios)
    tasks = dict.fromkeys(cell.partition("@")[0] for cell in cells)
    components = []
    for sides in _named_sides(claim):
        contrasts = []
        for task in tasks:
            one, two = (_within(claim, source, f"{task}@{ratio}", metric, sides) for ratio in (more, less))
            effect = pool([(1.0, one.effect), (-1.0, two.effect)], [task] * 2) if one.effect and two.effect else None
            printed = one.printed - two.printed if one.printed is not None and two.printed is not None else None
            contrasts.append(
                replace(one, cell=f"{task}@{more} less @{less}", effect=effect, lacking=one.lacking + two.lacking,
                        printed=printed)
            )  # fmt: skip
        components.append(_component(contrasts))
    return components


def sign_of(task_type: TaskType, metric: str) -> int:
    """Return 1 where a higher value of the metric is better, else -1."""
    higher = {known.name for known in (*task_type.metrics, *task_type.full) if known.better == "higher"}
    return 1 if metric in higher else -1
