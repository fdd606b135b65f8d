"""The verdict on each claim of the paper: it holds in this study, it does not, that is undecided, or it was not measured.

A claim is a set of comparisons (`contrasts`), each with an effect, above 0 where it goes the claim's way, and two one-sided
p values. "Holds" is tested as "true in at least so many of them" (all, unless the claim says less), "does not hold" as its
opposite, see `statistics.in_at_least`; the smaller of the two, doubled, is the claim's p value. A comparison that has no
runs, or no users' rows, counts as not shown. A claim whose runs could decide it neither way, because systems or
configurations that it names were not run, is *not measured*; it stands outside Holm's correction, which comes last and is
over all other claims. Sweeps and ablations are compared on validation users, scores on test users.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from study.labels import Labels
from study.papers.reader import Claim
from study.report.claims.contrasts import Contrast, Unit, units_of
from study.report.claims.in_print import beside_print, in_print
from study.report.claims.measured import UNREAD, Measured
from study.report.claims.need import need
from study.report.statistics import LEVEL, holm, in_at_least
from study.tracking.results import Results

HOLDS, FAILS, UNDECIDED, NOT_MEASURED = "holds", "does not hold", "undecided", "not measured"
VERDICTS = (HOLDS, FAILS, UNDECIDED, NOT_MEASURED)
ALPHA = 1 - LEVEL  # share of studies without any effect that may give one false verdict


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A claim and what this study says of it."""

    claim: Claim
    verdict: str
    p: float
    """Corrected; NaN: not measured."""
    why: str
    """In words: what was compared, and what an undecided claim needs."""
    decisive: Contrast
    """The comparison that the verdict depends on."""
    contrasts: tuple[Contrast, ...]
    agreeing: int
    """Measured comparisons that go the claim's way."""
    in_print: tuple[int, int] | None
    """Of the paper's own numbers: those that go the claim's way, and all."""

    @property
    def measured(self) -> int:
        """Comparisons that this study has runs for."""
        return sum(contrast.effect is not None for contrast in self.contrasts)


def judge(results: Results) -> list[Judged]:
    """Judge every claim of the subject's paper about this study's cells, in the paper's order; none without a paper."""
    labels = results.labels
    if labels.paper is None:
        return []
    source = Measured(results, labels.paper)
    dataset = labels.subject_published.dataset if labels.subject_published else ""
    asked: list[tuple[Claim, list[Unit]]] = []
    for claim in labels.paper.claims:
        if not claim.dataset or claim.dataset == dataset:
            units = beside_print(list(units_of(claim, source)), claim, labels)
            if units:
                asked.append((claim, units))
    tails = [_tails(claim, units) for claim, units in asked]
    tested = [k for k, (claim, units) in enumerate(asked) if _can_be_decided(claim, units)]
    corrected = dict(zip(tested, holm([min(1.0, 2 * min(tails[k])) for k in tested]), strict=True))
    level = ALPHA / max(1, len(tested))
    return [
        _judged(claim, units, tails[k], corrected.get(k, math.nan), level, labels)
        for k, (claim, units) in enumerate(asked)
    ]


def counts(judged: Sequence[Judged]) -> str:
    """Return `3 hold, 1 does not hold, 12 undecided, 5 not measured`."""
    number = {verdict: sum(one.verdict == verdict for one in judged) for verdict in VERDICTS}
    hold = f"{number[HOLDS]} hold{'s' if number[HOLDS] == 1 else ''}"
    fail = f"{number[FAILS]} do{'es' if number[FAILS] == 1 else ''} not hold"
    return f"{hold}, {fail}, {number[UNDECIDED]} undecided, {number[NOT_MEASURED]} not measured"


def unread(judged: Sequence[Judged]) -> list[str]:
    """Return a line on the files of users' rows that the claims had to do without, where there are any."""
    reasons = dict.fromkeys(reason for one in judged for contrast in one.contrasts for reason in contrast.lacking)
    files = [reason.removesuffix(f" {UNREAD}") for reason in reasons if reason.endswith(UNREAD)]
    if not files:
        return []
    named = ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
    return [
        f"claims: users' rows that cannot be read, so that nothing is measured with them: {named}; put the files back, or"
        " delete their runs in MLflow (study ui): `study run` then trains the trials again"
    ]


def _least(claim: Claim, units: int) -> int:
    """Return in how many of its comparisons the claim has to hold."""
    return {"all": units, "most": units // 2 + 1, "some": 1}[claim.at_least]


def _tails(claim: Claim, units: Sequence[Unit]) -> tuple[float, float]:
    """Return the p values of "holds" and of "does not hold"."""
    least = _least(claim, len(units))
    holds = in_at_least([unit.tail for unit in units], least)
    return holds, in_at_least([unit.against for unit in units], len(units) - least + 1)


def _can_be_decided(claim: Claim, units: Sequence[Unit]) -> bool:
    """Return whether the runs at hand can show the claim or its opposite, whatever they say."""
    measured, least = sum(unit.is_measured for unit in units), _least(claim, len(units))
    return measured >= min(least, len(units) - least + 1)


def _judged(
    claim: Claim, units: Sequence[Unit], tails: tuple[float, float], p: float, level: float, labels: Labels
) -> Judged:
    contrasts = tuple(contrast for unit in units for contrast in unit.contrasts)
    holds, against = tails
    verdict = NOT_MEASURED if math.isnan(p) else UNDECIDED if p >= ALPHA else HOLDS if holds <= against else FAILS
    least, measured = _least(claim, len(units)), [unit for unit in units if unit.is_measured] or units[:1]
    if verdict == FAILS:
        unit = sorted(measured, key=lambda unit: unit.against)[len(units) - least]
        decisive = unit.opposing
    else:
        unit = sorted(measured, key=lambda unit: unit.tail)[min(least, len(measured)) - 1]
        decisive = unit.decisive
    agreeing = sum(contrast.effect is not None and contrast.effect.value > 0 for contrast in contrasts)
    why = _why(contrasts, agreeing)
    if verdict == UNDECIDED and decisive.effect is not None:
        factors = (len(units) - least + 1) * unit.tried[0], least * unit.tried[1]  # see `_tails`
        needed = need(decisive, decisive.effect, (level / factors[0], level / factors[1]))
        why = [needed, *why] if needed else why
    return Judged(
        claim=claim, verdict=verdict, p=p, why="; ".join(why), decisive=decisive, contrasts=contrasts, agreeing=agreeing,
        in_print=in_print(claim, labels),
    )  # fmt: skip


def _why(contrasts: Sequence[Contrast], agreeing: int) -> list[str]:
    """Return how many comparisons go the claim's way, and what others lack."""
    measured = sum(contrast.effect is not None for contrast in contrasts)
    why = [f"{agreeing} of {measured} comparisons go its way"] if measured > 1 else []
    if lacking := list(dict.fromkeys(reason for contrast in contrasts for reason in contrast.lacking)):
        why.append("; ".join(lacking[:3]) + (f"; and {len(lacking) - 3} more" if len(lacking) > 3 else ""))
    return why
