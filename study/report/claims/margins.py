"""The margin of a claim: the smallest difference that would still make its sentence true, stated before anything runs.

It is `margin` of the claim in `study/papers/*.yaml`; else half of the printed difference; else, where a figure prints no
number, half of the paper's mean improvement over the best other system in that metric and data set. Each is a share of the
full row (levels differ): 21% printed makes 10.5% of the measured value. Half of an effect is what trials of non-inferiority
usually keep (FDA 2016, Non-Inferiority Clinical Trials, IV.C).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np

from study.labels import Labels
from study.papers.reader import Claim, Grid, Tables
from study.report.claims.contrasts import Component, sign_of
from study.report.statistics import small_telescopes

KEPT = 0.5  # of the published difference


@dataclass(frozen=True, kw_only=True)
class Margin:
    """A difference on the scale of the metric, and where it comes from."""

    value: float
    share: float
    """Of the measured value of the better side."""
    rule: str
    """In words."""
    telescopes: float | None = None
    """What the paper's own number of users would have seen with a power of a third (Simonsohn 2015)."""


def margin_of(claim: Claim, component: Component, labels: Labels) -> Margin | None:
    """Return the margin of one component; None where the paper says nothing that a margin could be made of."""
    measured = component.measured
    if not measured:
        return None
    printed = [contrast.printed_share for contrast in measured]
    if claim.margin is not None:
        shares, rule = [claim.margin] * len(measured), "stated for this claim"
    elif all(share is not None for share in printed):
        shares, rule = [KEPT * (share or 0.0) for share in printed], "half of the printed difference"
    else:
        improvement = mean_improvement(labels, component.metric, {contrast.task for contrast in measured})
        if improvement is None:
            return None
        shares, rule = [KEPT * improvement] * len(measured), "half of the paper's mean improvement"
    levels = [abs(contrast.level or 0.0) for contrast in measured]
    value = float(np.mean(np.multiply(shares, levels)))
    if value <= 0:
        return None
    return Margin(
        value=value, share=value / float(np.mean(levels)), rule=rule, telescopes=_telescopes(component, labels)
    )  # fmt: skip


def _telescopes(component: Component, labels: Labels) -> float | None:
    """Return the margin by the paper's own users; None where their number is not known."""
    effect, published = component.effect, labels.subject_published
    users = published.users if published is not None else {}
    cells = [contrast.cell for contrast in component.measured if contrast.cell in users] or list(users)
    if effect is None or not cells:
        return None
    per_cell = sum(users[cell] for cell in cells) / len(cells)
    return small_telescopes(effect, per_cell * len(component.measured))


def mean_improvement(labels: Labels, metric: str, tasks: Collection[str]) -> float | None:
    """Return the subject's mean improvement over the best other system, as a share, over the printed cells of these tasks.

    Where none of them is printed, or the study is held against no data set, it is over all of the paper.
    """
    if labels.paper is None:
        return None
    published = labels.subject_published
    tables: Iterable[Tables] = (
        [labels.paper.datasets[published.dataset]] if published is not None else labels.paper.datasets.values()
    )
    shares: dict[str, float] = {}
    for each in tables:
        for grid in (each.comparison, *([each.cold_items] if each.cold_items is not None else [])):
            if metric in grid.columns:
                shares |= _improvements(grid, labels.subject.paper_name, metric, sign_of(labels.task_type, metric))
    ours = [share for cell, share in shares.items() if cell.partition("@")[0] in tasks]
    return float(np.mean(ours or list(shares.values()))) if shares else None


def _improvements(grid: Grid, subject: str, metric: str, sign: int) -> dict[str, float]:
    """Return cell -> (subject less the best other row) over the best other row, above 0 where the subject is ahead."""
    column, shares = grid.columns.index(metric), {}
    for cell, values in grid.rows[subject].items():
        best = sign * max(sign * cells[cell][column] for name, cells in grid.rows.items() if name != subject)
        shares[cell] = sign * (values[column] - best) / best
    return shares
