"""The comparisons of claims in the paper's own tables: what is printed beside what is measured, and how much agrees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from study.labels import Labels
from study.papers.reader import Claim, Difference, Grid, Published
from study.report.claims.contrasts import Component, Contrast, Sides, Source, components_of, sign_of


class Print(Source):
    """Contrasts that hold `printed` where the paper's tables have all numbers."""

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

    def filled(self, contrast: Contrast, part: str, sides: Sides) -> Contrast:
        """Return the contrast with the printed difference of the sides' means, where all their numbers are printed."""
        means = [self._mean(part, contrast.cell, side, contrast.metric) for side in sides]
        return self._less(contrast, *means)

    def between(self, contrast: Contrast, part: str, better: str, worse: str) -> Contrast:
        """Return the contrast with the printed difference of the subject in two cells."""
        name = (self._labels.subject.paper_name,)
        return self._less(contrast, *(self._mean(part, cell, name, contrast.metric) for cell in (better, worse)))

    def _less(self, contrast: Contrast, better: float | None, worse: float | None) -> Contrast:
        if better is None or worse is None:
            return contrast
        sign = sign_of(self._task_type, contrast.metric)
        return replace(contrast, printed=sign * (better - worse), printed_level=better)

    def _mean(self, part: str, cell: str, names: Sequence[str], metric: str) -> float | None:
        values = [self._value(part, cell, name, metric) for name in names]
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if len(known) == len(values) else None

    def _grids(self, part: str) -> list[Grid]:
        published = self._published
        cold = [published.cold_items] if published.cold_items is not None else []
        return [*([published.ablations] if part == "ablate" else []), published.comparison, *cold]

    def _value(self, part: str, cell: str, name: str, metric: str) -> float | None:
        values = (grid.value(name, cell, metric) for grid in self._grids(part))
        return next((value for value in values if value is not None), None)


def printed_components(claim: Claim, labels: Labels, metric: str) -> list[Component]:
    """Return what the paper's tables say of a claim; nothing where the study is held against none of them."""
    published = labels.subject_published
    return components_of(claim, Print(labels, published), metric) if published is not None else []


def in_print(claim: Claim, labels: Labels) -> tuple[int, int] | None:
    """Return how many of the paper's own numbers go the claim's way, and of how many; None where it prints none."""
    printed = [
        contrast.printed
        for metric in claim.metrics
        for component in printed_components(claim, labels, metric)
        for contrast in component.contrasts
        if contrast.printed is not None
    ]
    return (sum(value > 0 for value in printed), len(printed)) if printed else None


def is_contradicted(claim: Claim, labels: Labels, cells: Sequence[str]) -> bool:
    """Return whether the paper's own numbers disagree with the claim, read as the study's are.

    They are those of the claim's primary metric, the mean of the study's cells where these are printed, else of all.
    """
    means = []
    for component in printed_components(claim, labels, claim.metrics[0]):
        shares = {c.cell: c.printed_share for c in component.contrasts if c.printed_share is not None}
        ours = [share for cell, share in shares.items() if cell in cells]
        if shares:
            means.append(float(np.mean(ours or list(shares.values()))))
    return bool(means) and (max(means) <= 0 if claim.at_least == "some" else min(means) <= 0)


def beside_print(components: Sequence[Component], claim: Claim, labels: Labels) -> list[Component]:
    """Return the components with the published differences: of the sentence, of the cell, or the mean of all cells."""
    if not components:
        return []
    sentence = claim.form.printed if isinstance(claim.form, Difference) else None
    sign = sign_of(labels.task_type, components[0].metric)
    printed = {
        (component.better, component.worse): {c.cell: c for c in component.contrasts if c.printed is not None}
        for component in printed_components(claim, labels, components[0].metric)
    }

    def beside(contrast: Contrast) -> Contrast:
        if sentence is not None:
            return replace(contrast, printed=sign * (sentence[0] - sentence[1]), printed_level=sentence[0])
        cells = printed.get((contrast.better, contrast.worse))
        if not cells:
            return contrast
        own = [cells[contrast.cell]] if contrast.cell in cells else list(cells.values())
        return replace(
            contrast, printed=float(np.mean([c.printed for c in own])),
            printed_level=float(np.mean([c.printed_level for c in own])),
        )  # fmt: skip

    return [replace(c, contrasts=tuple(map(beside, c.contrasts))) for c in components]
