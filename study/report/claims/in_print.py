"""The comparisons of claims in the paper's own tables: what is printed beside what is measured, and how much agrees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from study.labels import Labels
from study.papers.reader import Claim, Difference, Grid, Published
from study.report.claims.contrasts import Contrast, Source, Unit, sign_of, units_of


class Print(Source):
    """Contrasts that hold `printed` where the paper's tables have both numbers."""

    def __init__(self, labels: Labels, published: Published) -> None:
        super().__init__(labels)
        self._published = published

    def cells(self, claim: Claim) -> list[str]:
        """Return the cells of the tables that the claim's part has rows in."""
        cells = dict.fromkeys(cell for grid in self._grids(claim.part) for cell in grid.cells)
        return [cell for cell in cells if claim.speaks_of(cell.split("@")[0], float(cell.split("@")[1]))]

    def swept(self, part: str, cell: str) -> list[str]:
        """Return none: figures print no numbers."""
        return []

    def _grids(self, part: str) -> list[Grid]:
        published = self._published
        cold = [published.cold_items] if published.cold_items is not None else []
        return [*([published.ablations] if part == "ablate" else []), published.comparison, *cold]

    def _filled(self, contrast: Contrast, part: str, better: tuple[str, str], worse: tuple[str, str]) -> Contrast:
        one, two = (self._value(part, cell, name, contrast.metric) for cell, name in (better, worse))
        if one is None or two is None:
            return contrast
        return replace(contrast, printed=sign_of(self._task_type, contrast.metric) * (one - two))

    def _value(self, part: str, cell: str, name: str, metric: str) -> float | None:
        values = (grid.value(name, cell, metric) for grid in self._grids(part))
        return next((value for value in values if value is not None), None)


def in_print(claim: Claim, labels: Labels) -> tuple[int, int] | None:
    """Return how many of the paper's own numbers go the claim's way, and of how many; None where it prints none."""
    printed = [contrast.printed for contrast in _contrasts(claim, labels) if contrast.printed is not None]
    return (sum(value > 0 for value in printed), len(printed)) if printed else None


def beside_print(units: Sequence[Unit], claim: Claim, labels: Labels) -> list[Unit]:
    """Return the units with the published difference.

    It is that of the sentence, else of the cell, else the mean of all the claim's cells.
    """
    sentence = claim.form.printed if isinstance(claim.form, Difference) else None
    differences: dict[tuple[str, str, str], dict[str, float]] = {}  # metric, better, worse -> cell -> difference
    for contrast in _contrasts(claim, labels):
        if contrast.printed is not None:
            key = (contrast.metric, contrast.better, contrast.worse)
            differences.setdefault(key, {})[contrast.cell] = contrast.printed

    def beside(contrast: Contrast) -> Contrast:
        if sentence is not None:
            return replace(contrast, printed=sign_of(labels.task_type, contrast.metric) * (sentence[0] - sentence[1]))
        cells = differences.get((contrast.metric, contrast.better, contrast.worse))
        if cells is None:
            return contrast
        return replace(contrast, printed=cells.get(contrast.cell, sum(cells.values()) / len(cells)))

    return [
        replace(
            unit, contrasts=tuple(map(beside, unit.contrasts)), decisive=beside(unit.decisive),
            opposing=beside(unit.opposing),
        )
        for unit in units
    ]  # fmt: skip


def _contrasts(claim: Claim, labels: Labels) -> list[Contrast]:
    published = labels.subject_published
    if published is None:
        return []
    return [contrast for unit in units_of(claim, Print(labels, published)) for contrast in unit.contrasts]
