"""The verdict on each claim of the paper, for every row of the subject's model that has a preset of its own.

A claim is one component or several (`contrasts`), each an effect on its primary metric, the mean of the cells that the
sentence speaks of, above 0 where it goes the claim's way, with a margin (`margins`): the smallest difference that would
still make the sentence true. One-sided tests of each component:

    holds                              effect > 0 is shown, and no cell is shown reversed
    holds, smaller than printed        effect < margin is shown too
    does not hold: reversed            effect < 0 is shown
    does not hold: nothing of that size    effect < margin is shown (a test of inferiority)
    undecided                          none of these

Of several components all have to be above 0 (an intersection: the largest p value), or one of them where the sentence says
"some"; one that is below its margin, and is not above 0 by itself, refutes (the smallest p value times their number).
Holm's correction of each test over all tested claims of the page keeps both kinds of error, a false "holds" (effect <= 0)
and a false "does not hold" (effect >= margin), at 5% of pages each. Two
verdicts stand outside of it: *not tested*, where an arm is missing, and *contradicted in print*, where the paper's own
numbers disagree with the sentence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

from study.labels import Labels
from study.papers.reader import Claim
from study.report.claims.contrasts import Component, Contrast, components_of
from study.report.claims.in_print import beside_print, in_print, is_contradicted
from study.report.claims.margins import Margin, margin_of
from study.report.claims.measured import UNREAD, Measured
from study.report.claims.need import need
from study.report.statistics import LEVEL, holm, opposite_signs
from study.tracking.results import Results

HOLDS, SMALLER = "holds", "holds, smaller than printed"
NOTHING, REVERSED = "does not hold: nothing of that size", "does not hold: reversed"
UNDECIDED, NOT_TESTED, CONTRADICTED = "undecided", "not tested", "contradicted in print"
VERDICTS = (HOLDS, SMALLER, NOTHING, REVERSED, UNDECIDED, NOT_TESTED, CONTRADICTED)
ALPHA = 1 - LEVEL  # share of pages that may have a false verdict of a kind


@dataclass(frozen=True)
class Tails:
    """One-sided p values of a claim: small where the data say so."""

    above: float
    """Of "effect > 0"."""
    smaller: float
    """Of "effect < margin"."""
    nothing: float
    """The same, but for components that are above 0 by themselves, which refute nothing."""
    below: float
    """Of "effect < 0"."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A claim and what this study says of it, with one row of the study as the paper's model."""

    claim: Claim
    row: str
    preset: str
    verdict: str
    p: float
    """Of the verdict, corrected; undecided: the smallest; NaN: not tested."""
    why: str
    """In words: what was compared, and what an undecided claim needs."""
    components: tuple[Component, ...]
    """Of the primary metric."""
    margins: tuple[Margin | None, ...]
    decisive: int
    """The component that the verdict depends on."""
    others: tuple[Component, ...]
    """Of the other metrics: shown, not tested."""
    in_print: tuple[int, int] | None
    """Of the paper's own numbers: those that go the claim's way, and all."""

    @property
    def component(self) -> Component:
        """The component that the verdict depends on."""
        return self.components[self.decisive]

    @property
    def margin(self) -> Margin | None:
        """The margin of that component."""
        return self.margins[self.decisive]

    @property
    def contrasts(self) -> tuple[Contrast, ...]:
        """Every comparison behind the claim, of all metrics, cell by cell."""
        return tuple(contrast for component in (*self.components, *self.others) for contrast in component.contrasts)

    @property
    def measured(self) -> int:
        """Comparisons of the primary metric that this study has runs for."""
        return sum(len(component.measured) for component in self.components)

    @property
    def agreeing(self) -> int:
        """Those of them that go the claim's way."""
        return sum(c.effect is not None and c.effect.value > 0 for part in self.components for c in part.measured)


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """A claim with all that its verdict is made of."""

    claim: Claim
    row: str
    components: tuple[Component, ...]
    margins: tuple[Margin | None, ...]
    others: tuple[Component, ...]
    contradicted: bool
    tails: Tails

    @property
    def is_tested(self) -> bool:
        """Whether the runs at hand could show something, whatever they say."""
        return not self.contradicted and any(component.measured for component in self.components)


def judge(results: Results) -> list[Judged]:
    """Judge every claim of the subject's paper about this study's cells, row by row, in the paper's order."""
    labels = results.labels
    if labels.paper is None:
        return []
    asked = [one for row in judged_rows(labels) for one in _ask(results, labels, row)]
    tested = [k for k, one in enumerate(asked) if one.is_tested]
    kinds = [holm([kind(asked[k].tails) for k in tested]) for kind in _KINDS]
    corrected = {k: Tails(*(kind[j] for kind in kinds)) for j, k in enumerate(tested)}
    level = ALPHA / max(1, len(tested))
    return [_judged(one, corrected.get(k), level, labels) for k, one in enumerate(asked)]


_KINDS = tuple(map(attrgetter, ("above", "smaller", "nothing", "below")))


def judged_rows(labels: Labels) -> list[str]:
    """Return the rows that claims are judged for: of the subject's model, the first of each preset."""
    rows: dict[str, str] = {}
    for row in sorted(labels.rows.values(), key=lambda row: row.row != labels.model):
        if row.model == labels.model:
            rows.setdefault(row.preset, row.row)
    return list(rows.values())


def counts(judged: Sequence[Judged]) -> str:
    """Return `3 hold (1 smaller than printed), 2 do not hold, 4 undecided; 5 not tested, 1 contradicted in print`.

    With several presets each has its own, after its name.
    """
    presets = list(dict.fromkeys(one.preset for one in judged))
    if len(presets) > 1:
        return " | ".join(f"{name}: {_counted([one for one in judged if one.preset == name])}" for name in presets)
    return _counted(judged)


def _counted(judged: Sequence[Judged]) -> str:
    number = {verdict: sum(one.verdict == verdict for one in judged) for verdict in VERDICTS}
    hold, fail = number[HOLDS] + number[SMALLER], number[NOTHING] + number[REVERSED]
    smaller = f" ({number[SMALLER]} smaller than printed)" if number[SMALLER] else ""
    reversed_ = f" ({number[REVERSED]} reversed)" if number[REVERSED] else ""
    text = f"{hold} hold{'s' if hold == 1 else ''}{smaller}, {fail} do{'es' if fail == 1 else ''} not hold{reversed_}"
    text += f", {number[UNDECIDED]} undecided; {number[NOT_TESTED]} not tested"
    return text + (f", {number[CONTRADICTED]} contradicted in print" if number[CONTRADICTED] else "")


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


def verdict_of(corrected: Tails, cell_reversed: bool = False) -> str:
    """Return what corrected p values say of a claim that was tested."""
    if corrected.above < ALPHA and not cell_reversed:
        return SMALLER if corrected.smaller < ALPHA else HOLDS
    if corrected.below < ALPHA:
        return REVERSED
    return NOTHING if corrected.nothing < ALPHA else UNDECIDED


def tails_of(claim: Claim, components: Sequence[Component], margins: Sequence[Margin | None]) -> Tails:
    """Return the p values of a claim from those of its components; what was not measured shows nothing."""
    each = [_tails(component, margin) for component, margin in zip(components, margins, strict=True)]
    above, smaller, nothing, below = ([kind(tails) for tails in each] for kind in _KINDS)
    count = len(each)
    if claim.at_least == "some":
        return Tails(min(1.0, count * min(above)), max(smaller), max(smaller), max(below))
    if count > 1:
        nothing = [1.0 if above[k] < ALPHA else p for k, p in enumerate(nothing)]
    return Tails(max(above), *(min(1.0, count * min(tails)) for tails in (smaller, nothing, below)))


def _tails(component: Component, margin: Margin | None) -> Tails:
    effect = component.effect
    if effect is None:
        return Tails(1.0, 1.0, 1.0, 1.0)
    smaller = effect.tail(-1, margin.value if margin else 0.0)
    return Tails(effect.tail(1), smaller, smaller, effect.tail(-1))


def reversed_cells(component: Component) -> list[str]:
    """Return the cells of several in which the opposite is shown, corrected for their number."""
    cells = len(component.measured)
    shown = (c.cell for c in component.measured if c.effect is not None and cells * c.effect.tail(-1) < ALPHA)
    return list(shown) if cells > 1 else []


def _ask(results: Results, labels: Labels, row: str) -> list[_Asked]:
    """Return the claims about this study's cells, filled from what was measured."""
    assert labels.paper is not None
    source = Measured(results, labels.paper, row)
    asked = []
    for claim in labels.paper.claims:
        if claim.dataset and claim.dataset != labels.dataset:
            continue
        primary, *others = (beside_print(components_of(claim, source, m), claim, labels) for m in claim.metrics)
        if not primary:
            continue
        margins = tuple(margin_of(claim, component, labels) for component in primary)
        asked.append(
            _Asked(
                claim=claim, row=row, components=tuple(primary), margins=margins,
                others=tuple(component for each in others for component in each),
                contradicted=is_contradicted(claim, labels, source.cells(claim)),
                tails=tails_of(claim, primary, margins),
            )
        )  # fmt: skip
    return asked


def _judged(one: _Asked, corrected: Tails | None, level: float, labels: Labels) -> Judged:
    claim, components = one.claim, one.components
    lacks_arm = not all(component.measured for component in components)
    at_hand = [components[_decisive(one, HOLDS)]] if claim.at_least == "some" else components
    crossed = [cell for component in at_hand for cell in reversed_cells(component)]
    if corrected is None:
        verdict, p = (CONTRADICTED if one.contradicted else NOT_TESTED), math.nan
    else:
        verdict = verdict_of(corrected, bool(crossed))
        by_verdict = {
            HOLDS: corrected.above,
            SMALLER: corrected.above,
            NOTHING: corrected.nothing,
            REVERSED: corrected.below,
        }
        p = by_verdict.get(verdict, min(corrected.above, corrected.nothing))
        if verdict == UNDECIDED and lacks_arm:
            verdict, p = NOT_TESTED, math.nan
    decisive = _decisive(one, verdict)
    why = _why(components, crossed)
    at, margin = components[decisive], one.margins[decisive]
    if verdict == UNDECIDED and at.effect is not None:
        factor = 1 if len(components) == 1 else len(components)  # see `tails_of`
        why = [need(at.effect, margin.value if margin else None, level / factor), *why]
    return Judged(
        claim=claim, row=one.row, preset=labels.rows[one.row].preset, verdict=verdict, p=p, why="; ".join(why),
        components=components, margins=one.margins, decisive=decisive, others=one.others,
        in_print=in_print(claim, labels),
    )  # fmt: skip


def _decisive(one: _Asked, verdict: str) -> int:
    """Return the component that the verdict depends on: the one that refutes most, or that is shown least."""
    each = [_tails(component, margin) for component, margin in zip(one.components, one.margins, strict=True)]
    measured = [k for k, component in enumerate(one.components) if component.measured] or [0]
    some = one.claim.at_least == "some"
    if verdict in (NOTHING, REVERSED):
        if verdict == REVERSED:
            return (max if some else min)(measured, key=lambda k: each[k].below)
        refuting = [k for k in measured if each[k].above >= ALPHA] or measured
        return (max if some else min)(refuting, key=lambda k: each[k].smaller)
    return (min if some else max)(measured, key=lambda k: each[k].above)


def _why(components: Sequence[Component], crossed: Sequence[str]) -> list[str]:
    """Return how many comparisons go the claim's way, whether cells disagree, and what others lack."""
    contrasts = [contrast for component in components for contrast in component.contrasts]
    measured = [contrast for contrast in contrasts if contrast.effect is not None]
    agreeing = sum(c.effect is not None and c.effect.value > 0 for c in measured)
    why = [f"{agreeing} of {len(measured)} comparisons go its way"] if len(measured) > 1 else []
    if crossed:
        why.append(f"shown reversed in {', '.join(dict.fromkeys(crossed))}")
    for component in components:
        signs = opposite_signs([c.effect for c in component.measured if c.effect is not None])
        if signs < ALPHA:
            why.append(f"cells go opposite ways (Gail-Simon p {signs:.2g}, {component.better} over {component.worse})")
    if lacking := list(dict.fromkeys(reason for contrast in contrasts for reason in contrast.lacking)):
        why.append("; ".join(lacking[:3]) + (f"; and {len(lacking) - 3} more" if len(lacking) > 3 else ""))
    return why


def behind_best(component: Component) -> float | None:
    """Return by how much the value that the paper calls the best is behind the best of a sweep at most, at 95%.

    Multiple comparisons with the best (Hsu 1981), as an intersection over the other values; None: not an optimum.
    """
    effects = [rival.effect for rival in component.rivals if rival.effect is not None]
    if not effects:
        return None
    return max(0.0, *(-effect.lower_end() for effect in effects))
