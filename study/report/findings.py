"""What a study found, in sentences: what a page opens with.

The verdict counts of each preset, the best row of each cell beside the paper's, and one sentence for each figure or table
that claims are about.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from study.labels import Labels
from study.report.claims.judge import UNDECIDED, Judged, counts
from study.report.claims.tables import UNTESTED, effect_text, split_of
from study.report.comparison import Comparison
from study.report.table import arrow, number


@dataclass(frozen=True)
class Finding:
    """A sentence on the page, with what it is about in front."""

    subject: str
    sentence: str


def findings(labels: Labels, claims: Sequence[Judged], comparison: Comparison | None) -> list[Finding]:
    """Return all sentences; none of what there are no runs for."""
    found = []
    if claims:
        found = [Finding("Claims", f"{counts(claims)}.")]
    if comparison is not None:
        found += _best_rows(comparison)
    return [*found, *_by_part(labels, claims)]


def _best_rows(comparison: Comparison) -> Iterator[Finding]:
    """Yield the best row of each cell (and protocol), and the subject beside it, measured and printed."""
    headline, digits = comparison.headline, comparison.labels.task_type.digits
    for cell, group in dict.fromkeys((row.cell, row.group) for row in comparison.rows if row.seeds):
        rows = {row.labels.row: row for row in comparison.rows if (row.cell, row.group) == (cell, group) and row.seeds}
        (best,) = (row for name, row in rows.items() if (cell, group, name) in comparison.best)
        text = f"best is {best.name} with {headline.label} {number(best.test[headline.name].value, digits)}"
        for row in rows.values():
            if row.labels.model != comparison.labels.model:
                continue
            own = "" if row is best else f"; {row.name} has {number(row.test[headline.name].value, digits)}"
            printed = row.printed.get(headline.name)
            text += own + ("" if printed is None else f" (printed {number(printed, digits)})")
        yield Finding(f"{arrow(cell)}{f', {group}' if group else ''}", f"{text}.")


def _by_part(labels: Labels, claims: Sequence[Judged]) -> Iterator[Finding]:
    """Yield a sentence for each figure or table and preset that has a tested claim."""
    tested = [one for one in claims if one.verdict not in UNTESTED]
    digits = labels.task_type.digits + 1
    for part, preset in dict.fromkeys((one.claim.part, one.preset) for one in tested):
        ones = [one for one in tested if (one.claim.part, one.preset) == (part, preset)]
        texts = []
        for one in ones:
            effect = one.component.effect
            assert effect is not None, "a tested claim has one"
            margin = "" if one.margin is None else f", margin {one.margin.value:.{digits}f}"
            words = one.claim.name.replace("wo-", "w/o ").replace("-", " ")
            size = "" if one.verdict == UNDECIDED else f" ({effect_text(effect, digits)}{margin})"
            texts.append(f"“{words}” {'is ' if one.verdict == UNDECIDED else ''}{one.verdict}{size}")
        split = split_of(ones[0].component)
        yield Finding(f"{_place(labels, ones)}, {preset}", f"{'; '.join(texts)} ({split} users).")


def _place(labels: Labels, ones: Sequence[Judged]) -> str:
    """Return `Figure 3, Diffusion steps`, or `Table 3`."""
    part = ones[0].claim.part
    (place,) = re.findall(r"(?:Figure|Table) \d+", ones[0].claim.place)[-1:] or [ones[0].claim.place]
    field = part.partition(":")[2]
    return f"{place}, {labels.label(field).partition(chr(10))[0]}" if field else place
