"""The verdict on each claim of the paper: does it hold in this study, does it not, or is that undecided, and by which test.

A claim is a set of comparisons, one in each cell, metric and pair of names (for an optimum: between swept values). Each
has an effect, above 0 where it goes the claim's way, and two one-sided p values. "Holds" is tested as "true in at least so
many of them" (all, unless the claim says less), "does not hold" as its opposite, see `statistics.in_at_least`; the smaller
of the two, doubled, is the claim's p value, and Holm's correction over all claims that were measured comes last. What was
not measured counts as not shown. Sweeps and ablations are compared on validation users, scores on test users.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pandas as pd

from features.errors import InputError
from study.jobs import PREDICTOR, RATIO
from study.published import Claim, Difference, Optimum, Order, Published, Unimodal
from study.report.statistics import (
    LEVEL,
    POWER,
    Effect,
    Sample,
    Spread,
    UserErrors,
    effect,
    holm,
    in_at_least,
    pooled_spread,
    power,
    samples,
    seeds_needed,
    users_needed,
)  # fmt: skip
from study.subject import Subject, in_group
from study.tracking.results import Results

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"
VERDICTS = (HOLDS, FAILS, UNDECIDED)
ALPHA = 1 - LEVEL  # share of studies without any effect that may give one false verdict


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """`better` against `worse` in one cell, as the claim orders them."""

    cell: str
    metric: str
    better: str
    worse: str
    found: Effect | None  # None: not measured
    lacking: str = ""  # why
    printed: float | None = None  # the published difference, above 0 where it goes the claim's way


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A claim and what this study says of it."""

    claim: Claim
    verdict: str
    p: float  # corrected; NaN: nothing was measured
    why: str  # in words: what was compared, and what an undecided claim needs
    decisive: Contrast  # the one that the verdict hangs on
    contrasts: tuple[Contrast, ...]
    agreeing: int  # measured contrasts that go the claim's way
    in_print: tuple[int, int] | None  # of the paper's own numbers: those that go the claim's way, and all

    @property
    def measured(self) -> int:
        """Contrasts that this study has runs for."""
        return sum(contrast.found is not None for contrast in self.contrasts)


@dataclass(frozen=True)
class _Unit:
    """What counts once: a contrast, or the contrasts of one swept parameter in one cell."""

    contrasts: tuple[Contrast, ...]
    tail: float  # one-sided p of the claim's way
    against: float  # and of its opposite
    decisive: Contrast
    opposing: Contrast


def judge(results: Results) -> list[Judged]:
    """Every claim of the paper that speaks of this study's cells, in the paper's order; empty where there is no paper."""
    subject = results.subject
    if subject.paper is None:
        return []
    arms = _Arms(results)
    found: list[tuple[Claim, list[_Unit]]] = []
    for claim in subject.paper.claims:
        dataset = subject.published.dataset if subject.published else ""
        if not claim.dataset or claim.dataset == dataset:
            units = list(_units(claim, arms, results))
            if units:
                found.append((claim, units))
    tails = [_tails(claim, units) for claim, units in found]
    measured = [k for k, (_, units) in enumerate(found) if _is_measured(units)]
    corrected = dict(zip(measured, holm([min(1.0, 2 * min(tails[k])) for k in measured]), strict=True))
    level = ALPHA / max(1, len(measured))
    return [
        _judged(claim, units, tails[k], corrected.get(k, math.nan), level, subject)
        for k, (claim, units) in enumerate(found)
    ]


def counts(judged: Sequence[Judged]) -> str:
    """`3 hold, 1 does not hold, 12 undecided`."""
    number = {verdict: sum(each.verdict == verdict for each in judged) for verdict in VERDICTS}
    hold = f"{number[HOLDS]} hold{'s' if number[HOLDS] == 1 else ''}"
    fail = f"{number[FAILS]} do{'es' if number[FAILS] == 1 else ''} not hold"
    return f"{hold}, {fail}, {number[UNDECIDED]} undecided"


# --- the verdict --------------------------------------------------------------------------------------------------


def _least(claim: Claim, units: int) -> int:
    return {"all": units, "most": units // 2 + 1, "some": 1}[claim.at_least]


def _tails(claim: Claim, units: Sequence[_Unit]) -> tuple[float, float]:
    """P values of "holds" and of "does not hold"."""
    least = _least(claim, len(units))
    holds = in_at_least([unit.tail for unit in units], least)
    return holds, in_at_least([unit.against for unit in units], len(units) - least + 1)


def _is_measured(units: Sequence[_Unit]) -> bool:
    return any(contrast.found is not None for unit in units for contrast in unit.contrasts)


def _judged(
    claim: Claim, units: Sequence[_Unit], tails: tuple[float, float], p: float, level: float, subject: Subject
) -> Judged:
    contrasts = tuple(contrast for unit in units for contrast in unit.contrasts)
    holds, against = tails
    verdict = UNDECIDED if not p < ALPHA else HOLDS if holds <= against else FAILS
    known = [unit for unit in units if any(contrast.found is not None for contrast in unit.contrasts)] or list(units)
    if verdict == FAILS:
        decisive = min(known, key=lambda unit: unit.against).opposing
    else:
        decisive = max(known, key=lambda unit: unit.tail).decisive
    measured = [contrast for contrast in contrasts if contrast.found is not None]
    agreeing = sum(contrast.found is not None and contrast.found.value > 0 for contrast in measured)
    why = f"{agreeing} of {len(measured)} comparisons go its way" if len(measured) > 1 else ""
    if len(measured) < len(contrasts):
        lacking = list(dict.fromkeys(contrast.lacking for contrast in contrasts if contrast.lacking))
        shown = "; ".join(lacking[:3]) + (f"; and {len(lacking) - 3} more" if len(lacking) > 3 else "")
        why = f"{why}; {shown}" if why else shown
    if verdict == UNDECIDED and decisive.found is not None:
        need = _need(decisive, decisive.found, level)
        why = f"{need}; {why}" if why else need
    return Judged(
        claim=claim, verdict=verdict, p=p, why=why, decisive=decisive, contrasts=contrasts, agreeing=agreeing,
        in_print=in_print(claim, subject),
    )  # fmt: skip


def _need(contrast: Contrast, found: Effect, level: float) -> str:
    """What it takes to see the published difference, or the measured one, with POWER."""
    if math.isnan(found.error):
        return "needs at least 2 seeds: nothing in this cell tells how seeds vary"
    published = contrast.printed is not None and contrast.printed > 0
    size, which = (contrast.printed or 0.0, "published") if published else (abs(found.value), "measured")
    if size == 0:
        return "no difference at all was measured"
    if published and (chance := power(found, size, level)) >= POWER:
        return f"the published difference ({size:.4f}) would have been seen (power {chance:.0%}); what there is, is smaller"
    seeds = seeds_needed(found, size, level)
    if seeds is not None:
        return f"needs about {seeds} seeds to see the {which} difference ({size:.4f})"
    users = users_needed(found, size, level)
    asked = f"about {users:,} users" if users else "another data set"
    return (
        f"no number of seeds shows the {which} difference ({size:.4f}) on {found.users or 'these'} users; needs {asked}"
    )


# --- its comparisons ----------------------------------------------------------------------------------------------


def _units(claim: Claim, arms: _Arms, results: Results) -> Iterator[_Unit]:
    cells = arms.cells(claim)
    if claim.across == RATIO:
        yield from _across_ratios(claim, arms, cells)
    elif claim.more_at is not None:
        yield from _more_at(claim, arms, cells)
    else:
        for cell, metric in itertools.product(cells, claim.metrics):
            yield from _within(claim, arms, cell, metric)


def _within(claim: Claim, arms: _Arms, cell: str, metric: str) -> Iterator[_Unit]:
    form = claim.form
    if isinstance(form, Order):
        for better, worse in form.pairs:
            yield _single(arms.contrast(claim, cell, metric, better, worse))
    elif isinstance(form, Difference):
        yield _single(arms.contrast(claim, cell, metric, form.of, form.less))
    else:
        values = arms.swept(claim.part, cell)
        if isinstance(form, Optimum):
            inside = [value for value in values if form.low <= float(value) <= form.high]
            outside = [value for value in values if value not in inside]
        else:
            inside, outside = values[1:-1], [values[0], values[-1]] if len(values) > 2 else []
        if not inside or not outside:
            what = f"{form.low:g} to {form.high:g} and another" if isinstance(form, Optimum) else "three"
            lacking = f"{cell}: no sweep of {claim.part.partition(':')[2]} with {what}"
            yield _single(Contrast(cell=cell, metric=metric, better="", worse="", found=None, lacking=lacking))
        else:
            yield _peak(claim, arms, cell, metric, inside, outside)


def _peak(
    claim: Claim, arms: _Arms, cell: str, metric: str, inside: Sequence[str], outside: Sequence[str]
) -> _Unit:  # fmt: skip
    """One of `inside` is better than all of `outside`; against it: one of `outside` is better than all of `inside`."""
    grid = {(v, o): arms.contrast(claim, cell, metric, v, o) for v in inside for o in outside}

    def tail(contrast: Contrast, sign: int) -> float:
        return contrast.found.tail(sign) if contrast.found is not None else 1.0

    best = min((max((grid[v, o] for o in outside), key=lambda c: tail(c, 1)) for v in inside), key=lambda c: tail(c, 1))
    other = min(
        (max((grid[v, o] for v in inside), key=lambda c: tail(c, -1)) for o in outside), key=lambda c: tail(c, -1)
    )
    return _Unit(
        tuple(grid.values()),
        min(1.0, len(inside) * tail(best, 1)),
        min(1.0, len(outside) * tail(other, -1)),
        best,
        other,
    )


def _single(contrast: Contrast) -> _Unit:
    found = contrast.found
    tails = (1.0, 1.0) if found is None else (found.tail(), found.tail(-1))
    return _Unit((contrast,), *tails, contrast, contrast)


def _across_ratios(claim: Claim, arms: _Arms, cells: Sequence[str]) -> Iterator[_Unit]:
    """The names of the order are ratios: the model in each task's cells."""
    assert isinstance(claim.form, Order), "across: ratio orders ratios"
    for task in dict.fromkeys(cell.partition("@")[0] for cell in cells):
        for metric, (better, worse) in itertools.product(claim.metrics, claim.form.pairs):
            yield _single(arms.between_cells(claim, task, metric, better, worse))


def _more_at(claim: Claim, arms: _Arms, cells: Sequence[str]) -> Iterator[_Unit]:
    """The difference at one ratio less that at another, in each task that has both."""
    assert claim.more_at is not None
    pairs = claim.form.pairs if isinstance(claim.form, Order) else ()
    more, less = (f"{ratio:g}" for ratio in claim.more_at)
    for task in dict.fromkeys(cell.partition("@")[0] for cell in cells):
        for metric, (better, worse) in itertools.product(claim.metrics, pairs):
            one, two = (arms.contrast(claim, f"{task}@{ratio}", metric, better, worse) for ratio in (more, less))
            found = one.found.minus(two.found) if one.found and two.found else None
            printed = one.printed - two.printed if one.printed is not None and two.printed is not None else None
            yield _single(
                Contrast(
                    cell=f"{task}@{more} less @{less}", metric=metric, better=better, worse=worse, found=found,
                    lacking=one.lacking or two.lacking, printed=printed,
                )
            )  # fmt: skip


class _Arms:
    """The trained configurations that claims name, each read once."""

    def __init__(self, results: Results) -> None:
        self._results, self._subject = results, results.subject
        self._published = results.subject.published
        self._samples: dict[tuple[str, str], dict[str, Sample]] = {}
        self._spreads: dict[tuple[str, str], Spread | None] = {}
        finished = results.finished()
        self._runs = {
            (str(run["part"]), str(run["cell"]), self._name(str(run["part"]), str(run["name"]))): run
            for _, run in finished.iterrows()
        }
        kind = results.subject.kind
        self._higher = {metric.name: metric.better == "higher" for metric in (*kind.metrics, *kind.full)}

    def _name(self, part: str, name: str) -> str:
        """As claims call it: the model's row by the paper's name, a sweep's point by its value."""
        assert self._subject.paper is not None
        if name.startswith(PREDICTOR):
            return name
        if part in ("score", f"sweep:{RATIO}"):
            return self._subject.paper.method
        return _number(name.partition("=")[2]) if part.startswith("sweep:") else name

    def cells(self, claim: Claim) -> list[str]:
        """Of the study, those that the claim speaks of; at other ratios too where it compares ratios."""
        rows = self._results.trials
        rows = rows[rows["part"] == claim.part] if claim.part == f"sweep:{RATIO}" else rows
        rows = rows if claim.part == f"sweep:{RATIO}" else rows[rows["part"] != f"sweep:{RATIO}"]
        cells = rows[["cell", "task", "ratio"]].drop_duplicates().sort_values(["task", "ratio"])
        found = zip(cells["cell"].astype(str), cells["task"].astype(str), cells["ratio"].astype(float), strict=True)
        return [cell for cell, task, ratio in found if claim.speaks_of(task, ratio)]

    def swept(self, part: str, cell: str) -> list[str]:
        """Values of a finished sweep, ascending; those that are not numbers are left out."""
        names = [name for p, c, name in self._runs if (p, c) == (part, cell) and _is_number(name)]
        return sorted(names, key=float)

    def contrast(self, claim: Claim, cell: str, metric: str, better: str, worse: str) -> Contrast:
        """Two configurations in one cell."""
        found = [self._sample(claim.part, cell, name, metric) for name in (better, worse)]
        printed = printed_difference(
            claim, self._published, cell, metric, better, worse, higher=self._is_higher(metric)
        )
        return self._made(claim, cell, metric, (better, worse), (cell, cell), found, printed)

    def between_cells(self, claim: Claim, task: str, metric: str, better: str, worse: str) -> Contrast:
        """The model at two ratios of one task."""
        assert self._subject.paper is not None
        method, cells = self._subject.paper.method, (f"{task}@{better}", f"{task}@{worse}")
        found = [self._sample(claim.part, cell, method, metric) for cell in cells]
        grid = self._published.comparison if self._published else None
        one, two = (grid.value(method, cell, metric) if grid else None for cell in cells)
        sign = 1 if self._is_higher(metric) else -1
        printed = sign * (one - two) if one is not None and two is not None else None
        return self._made(claim, task, metric, (better, worse), cells, found, printed)

    def _made(
        self, claim: Claim, where: str, metric: str, names: tuple[str, str], cells: tuple[str, str],
        found: Sequence[Sample | str], printed: float | None,
    ) -> Contrast:  # fmt: skip
        ours, theirs = found
        if isinstance(ours, str) or isinstance(theirs, str):
            lacking = ours if isinstance(ours, str) else str(theirs)
            return Contrast(
                cell=where, metric=metric, better=names[0], worse=names[1], found=None, lacking=lacking, printed=printed
            )
        spread = self._spread(cells[0], self._column(claim.part, metric))
        found_effect = effect(ours, theirs, higher=self._is_higher(metric), spread=spread)
        return Contrast(cell=where, metric=metric, better=names[0], worse=names[1], found=found_effect, printed=printed)

    def _is_higher(self, metric: str) -> bool:
        return self._higher.get(metric, False)

    def _column(self, part: str, metric: str) -> str:
        group = self._subject.paper.group if self._subject.paper else ""
        return f"metrics.{'test' if part == 'score' else 'val'}_{in_group(metric, group)}"

    def _sample(self, part: str, cell: str, name: str, metric: str) -> Sample | str:
        """One arm, or why there is none."""
        run = self._runs.get((part, cell, name))
        if run is None:
            return f"no finished run of {name} in {part}"
        key = (str(run["run_id"]), part)
        if key not in self._samples:
            self._samples[key] = self._read(run, part)
        if metric in self._samples[key]:
            return self._samples[key][metric]
        values = _logged(run, self._column(part, metric))
        return Sample(values, fixed=str(run["name"]).startswith(PREDICTOR)) if values else f"{name} logged no {metric}"

    def _read(self, run: pd.Series, part: str) -> dict[str, Sample]:
        """From users' rows; empty where they were not logged or cannot be read."""
        kind = self._subject.kind
        group = self._subject.paper.group if self._subject.paper else ""
        try:
            frame = self._results.per_user(
                str(run["run_id"]), "per_user.csv" if part == "score" else "val_per_user.csv"
            )
            if group and kind.group_column in frame.columns:
                frame = frame[frame[kind.group_column] == group]
            errors = UserErrors.from_frame(frame, kind.metrics)
        except InputError:
            return {}
        seeds = sorted(int(seed) for seed in frame["seed"].unique())
        return samples(errors, seeds, fixed=str(run["name"]).startswith(PREDICTOR))

    def _spread(self, cell: str, column: str) -> Spread | None:
        if (cell, column) not in self._spreads:
            rows = [run for (_, c, name), run in self._runs.items() if c == cell and not name.startswith(PREDICTOR)]
            self._spreads[cell, column] = pooled_spread([list(_logged(run, column).values()) for run in rows])
        return self._spreads[cell, column]


def _logged(run: pd.Series, column: str) -> dict[int, float]:
    """Seed -> value, from the metrics of a run."""
    named = ((re.fullmatch(re.escape(column) + r"/seed_(-?\d+)", str(name)), name) for name in run.index)
    found = {int(match[1]): float(run[name]) for match, name in named if match}
    return {seed: value for seed, value in found.items() if math.isfinite(value)}


def _number(text: str) -> str:
    return f"{float(text):g}" if _is_number(text) else text


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


# --- in print -----------------------------------------------------------------------------------------------------


def printed_difference(
    claim: Claim, published: Published | None, cell: str, metric: str, better: str, worse: str, *, higher: bool
) -> float | None:
    """Above 0 where the paper's numbers go the claim's way; the mean over its cells where it has not this one."""
    sign = 1 if higher else -1
    if isinstance(claim.form, Difference) and claim.form.printed is not None:
        return sign * (claim.form.printed[0] - claim.form.printed[1])
    if published is None or claim.part.startswith("sweep:"):
        return None
    value = _reader(published, claim.part)
    cells = [cell] if value(better, cell, metric) is not None else list(published.comparison.cells)
    pairs = [(value(better, each, metric), value(worse, each, metric)) for each in cells]
    found = [sign * (one - two) for one, two in pairs if one is not None and two is not None]
    return sum(found) / len(found) if found else None


def in_print(claim: Claim, subject: Subject) -> tuple[int, int] | None:
    """How many of the paper's own numbers go the claim's way, and of how many; None where it prints none."""
    published, higher = subject.published, {metric.name: metric.better == "higher" for metric in subject.kind.metrics}
    if published is None or claim.part.startswith("sweep:") or isinstance(claim.form, Optimum | Unimodal):
        return None
    form, value = claim.form, _reader(published, claim.part)
    pairs = form.pairs if isinstance(form, Order) else ((form.of, form.less),)
    spoken = [
        cell for cell in published.comparison.cells if claim.speaks_of(cell.split("@")[0], float(cell.split("@")[1]))
    ]
    if published.cold_items is not None and claim.metrics[0] in published.cold_items.columns:
        spoken = list(published.cold_items.cells)
    found: list[float] = []
    for metric in claim.metrics:
        sign = 1 if higher.get(metric, False) else -1
        if claim.across == RATIO or claim.more_at is not None:
            found += [sign * each for each in _between_ratios(claim, published, value, metric, pairs)]
        else:
            both = [(value(one, cell, metric), value(two, cell, metric)) for cell in spoken for one, two in pairs]
            found += [sign * (one - two) for one, two in both if one is not None and two is not None]
    return (sum(difference > 0 for difference in found), len(found)) if found else None


def _between_ratios(
    claim: Claim, published: Published, value: _Reader, metric: str, pairs: Sequence[tuple[str, str]]
) -> Iterator[float]:  # fmt: skip
    for task, (one, two) in itertools.product(published.tasks, pairs):
        if claim.across == RATIO:
            values = [value(published.paper.method, f"{task}@{ratio}", metric) for ratio in (one, two)]
            known = [each for each in values if each is not None]
            if len(known) == 2:
                yield known[0] - known[1]
        elif claim.more_at is not None:
            four = [value(row, f"{task}@{ratio:g}", metric) for ratio in claim.more_at for row in (one, two)]
            known = [each for each in four if each is not None]
            if len(known) == 4:
                yield (known[0] - known[1]) - (known[2] - known[3])


_Reader = Callable[[str, str, str], float | None]
"""(row, cell, metric) -> a printed number."""


def _reader(published: Published, part: str) -> _Reader:
    """Of the tables that a part's rows stand in; an ablation's rows first."""
    grids = [published.comparison, *([published.cold_items] if published.cold_items else [])]
    grids = [published.ablations, *grids] if part == "ablate" else grids

    def value(row: str, cell: str, metric: str) -> float | None:
        return next((v for grid in grids if (v := grid.value(row, cell, metric)) is not None), None)

    return value
