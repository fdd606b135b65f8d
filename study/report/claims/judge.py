"""The verdict on each claim of the paper: does it hold in this study, does it not, or is that undecided, and by which test.

A claim is a set of comparisons, one in each cell, metric and pair of names (for an optimum: between swept values). Each
has an effect, above 0 where it goes the claim's way, and two one-sided p values. "Holds" is tested as "true in at least so
many of them" (all, unless the claim says less), "does not hold" as its opposite, see `statistics.in_at_least`; the smaller
of the two, doubled, is the claim's p value, and Holm's correction over all claims that were measured comes last. What was
not measured counts as not shown, and so does what has no users' rows: without them a difference is one of these users
alone. Sweeps and ablations are compared on validation users, scores on test users.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from features.errors import InputError
from study.labels import Labels, in_group
from study.papers.reader import Claim, Difference, Grid, Optimum, Order, Published
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
from study.specs import PREDICTOR, RATIO
from study.tracking.results import Results, per_seed
from trainables.task_types import TaskType

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"
VERDICTS = (HOLDS, FAILS, UNDECIDED)
ALPHA = 1 - LEVEL  # share of studies without any effect that may give one false verdict
_UNREAD = "cannot be read"


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """`better` against `worse` in one cell, as the claim orders them."""

    cell: str
    metric: str
    better: str
    worse: str
    found: Effect | None  # None: not measured
    lacking: tuple[str, ...] = ()  # why
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
    tail: float  # one-sided p of the claim's way; above 1 where a correction makes it so
    against: float  # and of its opposite
    decisive: Contrast
    opposing: Contrast
    tried: tuple[int, int] = (1, 1)  # of how many contrasts `tail` and `against` are the smallest


def judge(results: Results) -> list[Judged]:
    """Every claim of the paper that speaks of this study's cells, in the paper's order; empty where there is no paper."""
    labels = results.labels
    if labels.paper is None:
        return []
    arms = _Arms(results)
    dataset = labels.published.dataset if labels.published else ""
    found: list[tuple[Claim, list[_Unit]]] = []
    for claim in labels.paper.claims:
        if not claim.dataset or claim.dataset == dataset:
            units = _beside_print(list(_units(claim, arms)), claim, labels)
            if units:
                found.append((claim, units))
    tails = [_tails(claim, units) for claim, units in found]
    measured = [k for k, (_, units) in enumerate(found) if _is_measured(units)]
    corrected = dict(zip(measured, holm([min(1.0, 2 * min(tails[k])) for k in measured]), strict=True))
    level = ALPHA / max(1, len(measured))
    return [
        _judged(claim, units, tails[k], corrected.get(k, math.nan), level, labels)
        for k, (claim, units) in enumerate(found)
    ]


def counts(judged: Sequence[Judged]) -> str:
    """`3 hold, 1 does not hold, 12 undecided`."""
    number = {verdict: sum(each.verdict == verdict for each in judged) for verdict in VERDICTS}
    hold = f"{number[HOLDS]} hold{'s' if number[HOLDS] == 1 else ''}"
    fail = f"{number[FAILS]} do{'es' if number[FAILS] == 1 else ''} not hold"
    return f"{hold}, {fail}, {number[UNDECIDED]} undecided"


def unread(judged: Sequence[Judged]) -> list[str]:
    """A line on the files of users' rows that the claims had to do without, where there are any."""
    reasons = dict.fromkeys(reason for each in judged for contrast in each.contrasts for reason in contrast.lacking)
    files = [reason.removesuffix(f" {_UNREAD}") for reason in reasons if reason.endswith(_UNREAD)]
    if not files:
        return []
    shown = ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
    return [
        f"claims: users' rows that cannot be read, so that nothing is measured with them: {shown}; put the files back, or"
        " delete their runs in MLflow (study ui): `study run` then trains the trials again"
    ]


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
    claim: Claim, units: Sequence[_Unit], tails: tuple[float, float], p: float, level: float, labels: Labels
) -> Judged:
    contrasts = tuple(contrast for unit in units for contrast in unit.contrasts)
    holds, against = tails
    verdict = UNDECIDED if not p < ALPHA else HOLDS if holds <= against else FAILS
    least, known = _least(claim, len(units)), [unit for unit in units if _is_measured([unit])] or units[:1]
    if verdict == FAILS:
        unit = sorted(known, key=lambda unit: unit.against)[len(units) - least]
        decisive = unit.opposing
    else:
        unit = sorted(known, key=lambda unit: unit.tail)[min(least, len(known)) - 1]
        decisive = unit.decisive
    measured = [contrast for contrast in contrasts if contrast.found is not None]
    agreeing = sum(contrast.found is not None and contrast.found.value > 0 for contrast in measured)
    why = [f"{agreeing} of {len(measured)} comparisons go its way"] if len(measured) > 1 else []
    if lacking := list(dict.fromkeys(reason for contrast in contrasts for reason in contrast.lacking)):
        why.append("; ".join(lacking[:3]) + (f"; and {len(lacking) - 3} more" if len(lacking) > 3 else ""))
    if verdict == UNDECIDED and decisive.found is not None:
        factors = (len(units) - least + 1) * unit.tried[0], least * unit.tried[1]  # see `_tails`
        need = _need(decisive, decisive.found, (level / factors[0], level / factors[1]))
        why = [need, *why] if need else why
    return Judged(
        claim=claim, verdict=verdict, p=p, why="; ".join(why), decisive=decisive, contrasts=contrasts, agreeing=agreeing,
        in_print=in_print(claim, labels),
    )  # fmt: skip


def _need(contrast: Contrast, found: Effect, levels: tuple[float, float]) -> str:
    """What it takes to see the published difference, or the measured one, with POWER; empty where it is seen by now.

    `levels` are those of two-sided tests of this contrast, for the claim and against it.
    """
    if math.isnan(found.error):
        return "needs at least 2 seeds: nothing in this cell tells how seeds vary"
    if any(2 * found.tail(sign) < level for sign, level in zip((1, -1), levels, strict=True)):
        return ""  # the claim waits for comparisons that are not measured
    published = contrast.printed is not None and contrast.printed > 0
    size, which = (contrast.printed or 0.0, "published") if published else (abs(found.value), "measured")
    if size == 0:
        return "no difference at all was measured"
    against = not published and found.value < 0
    level = levels[against]
    digits = max(4, 1 - math.floor(math.log10(size)))  # two that say something
    what = f"the {which} difference ({size:.{digits}f}{', against the claim' if against else ''})"
    if published and (chance := power(found, size, level)) >= POWER:
        smaller = "what there is, is smaller" if found.interval().high < size else "it is still within the interval"
        return f"{what} would have been seen (power {chance:.0%}); {smaller}"
    seeds = seeds_needed(found, size, level)
    if seeds is not None:
        return f"needs about {seeds} seeds to see {what}"
    asked = "another data set"
    if (both := users_needed(found, size, level)) is not None:
        users, seeds = both
        asked = f"about {users:,} users" + (f" and {seeds:,} seeds" if seeds > found.seeds else "")
    return f"no number of seeds shows {what} on {found.users:,} users; needs {asked}"


# --- its comparisons ----------------------------------------------------------------------------------------------


class _Source(ABC):
    """What a claim's comparisons are filled from."""

    def __init__(self, labels: Labels) -> None:
        assert labels.paper is not None, "it has claims"
        self._paper, self._task_type = labels.paper, labels.task_type

    @abstractmethod
    def cells(self, claim: Claim) -> list[str]:
        """Those that the claim speaks of."""

    @abstractmethod
    def swept(self, part: str, cell: str) -> list[str]:
        """Values of a sweep, ascending; those that are not numbers are left out."""

    @abstractmethod
    def _made(self, contrast: Contrast, part: str, ours: tuple[str, str], theirs: tuple[str, str]) -> Contrast:
        """A contrast, filled from two configurations: (cell, name)."""

    def contrast(self, claim: Claim, cell: str, metric: str, better: str, worse: str) -> Contrast:
        """Two configurations in one cell."""
        bare = Contrast(cell=cell, metric=metric, better=better, worse=worse, found=None)
        return self._made(bare, claim.part, (cell, better), (cell, worse))

    def between_cells(self, claim: Claim, task: str, metric: str, better: str, worse: str) -> Contrast:
        """The model at two ratios of one task."""
        bare = Contrast(cell=task, metric=metric, better=better, worse=worse, found=None)
        ours, theirs = ((f"{task}@{ratio}", self._paper.method) for ratio in (better, worse))
        return self._made(bare, claim.part, ours, theirs)


def _units(claim: Claim, arms: _Source) -> Iterator[_Unit]:
    cells = arms.cells(claim)
    if claim.across == RATIO:
        yield from _across_ratios(claim, arms, cells)
    elif claim.more_at is not None:
        yield from _more_at(claim, arms, cells)
    else:
        for cell, metric in itertools.product(cells, claim.metrics):
            yield from _within(claim, arms, cell, metric)


def _within(claim: Claim, arms: _Source, cell: str, metric: str) -> Iterator[_Unit]:
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
            yield _single(Contrast(cell=cell, metric=metric, better="", worse="", found=None, lacking=(lacking,)))
        else:
            yield _peak(claim, arms, cell, metric, inside, outside)


def _peak(
    claim: Claim, arms: _Source, cell: str, metric: str, inside: Sequence[str], outside: Sequence[str]
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
        len(inside) * tail(best, 1),
        len(outside) * tail(other, -1),
        best,
        other,
        (len(inside), len(outside)),
    )


def _single(contrast: Contrast) -> _Unit:
    found = contrast.found
    tails = (1.0, 1.0) if found is None else (found.tail(), found.tail(-1))
    return _Unit((contrast,), *tails, contrast, contrast)


def _across_ratios(claim: Claim, arms: _Source, cells: Sequence[str]) -> Iterator[_Unit]:
    """The names of the order are ratios: the model in each task's cells."""
    assert isinstance(claim.form, Order), "across: ratio orders ratios"
    for task in dict.fromkeys(cell.partition("@")[0] for cell in cells):
        for metric, (better, worse) in itertools.product(claim.metrics, claim.form.pairs):
            yield _single(arms.between_cells(claim, task, metric, better, worse))


def _more_at(claim: Claim, arms: _Source, cells: Sequence[str]) -> Iterator[_Unit]:
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
                    lacking=one.lacking + two.lacking, printed=printed,
                )
            )  # fmt: skip


class _Arms(_Source):
    """The trained configurations that claims name, each read once."""

    def __init__(self, results: Results) -> None:
        super().__init__(results.labels)
        self._results = results
        self._samples: dict[str, dict[str, Sample] | str] = {}
        self._spreads: dict[tuple[str, str], Spread | None] = {}
        rows = results.trials[["part", "cell", "task", "ratio"]].drop_duplicates().sort_values(["task", "ratio"])
        self._cells = [(str(part), str(cell), str(task), float(ratio)) for part, cell, task, ratio in rows.to_numpy()]
        finished = results.finished()
        self._runs = {
            (str(run["part"]), str(run["cell"]), self._name(str(run["part"]), str(run["name"]))): run
            for _, run in finished.iterrows()
        }

    def _name(self, part: str, name: str) -> str:
        """As claims call it: the model's row by the paper's name, a sweep's point by its value."""
        if name.startswith(PREDICTOR):
            return name
        if part in ("score", f"sweep:{RATIO}"):
            return self._paper.method
        return _number(name.partition("=")[2]) if part.startswith("sweep:") else name

    def cells(self, claim: Claim) -> list[str]:
        """Of the study; at other ratios too where the claim compares ratios."""
        between = claim.part == f"sweep:{RATIO}"
        found = [cell for part, cell, task, ratio in self._cells
                 if (part == f"sweep:{RATIO}") == between and claim.speaks_of(task, ratio)]  # fmt: skip
        return list(dict.fromkeys(found))

    def swept(self, part: str, cell: str) -> list[str]:
        """Of finished trials."""
        names = [name for p, c, name in self._runs if (p, c) == (part, cell) and _is_number(name)]
        return sorted(names, key=float)

    def _made(self, contrast: Contrast, part: str, ours: tuple[str, str], theirs: tuple[str, str]) -> Contrast:
        one, two = (self._sample(part, cell, name, contrast.metric) for cell, name in (ours, theirs))
        if isinstance(one, str) or isinstance(two, str):
            return replace(contrast, lacking=tuple(each for each in (one, two) if isinstance(each, str)))
        column = f"{'test' if part == 'score' else 'val'}_{in_group(contrast.metric, self._paper.group)}"
        spread = self._spread(ours[0], column)
        higher = _sign(self._task_type, contrast.metric) > 0
        return replace(contrast, found=effect(one, two, higher=higher, spread=spread))

    def _sample(self, part: str, cell: str, name: str, metric: str) -> Sample | str:
        """One arm, or why there is none."""
        run = self._runs.get((part, cell, name))
        if run is None:
            return f"no finished run of {name} in {part}"
        run_id = str(run["run_id"])
        if run_id not in self._samples:
            self._samples[run_id] = self._read(run)
        found = self._samples[run_id]
        return found if isinstance(found, str) else found.get(metric, f"{name} logged no {metric}")

    def _read(self, run: pd.Series) -> dict[str, Sample] | str:
        """Every metric from users' rows, or why there is none."""
        path = "per_user.csv" if run["part"] == "score" else "val_per_user.csv"
        column = self._task_type.group_column
        try:
            frame = self._results.per_user(str(run["run_id"]), path)
            if self._paper.group and column in frame.columns:
                frame = frame[frame[column] == self._paper.group]
            errors = UserErrors.from_frame(frame, self._task_type.metrics)
        except InputError:  # the report lists it, see `unread`
            return f"{run['part']}/{run['cell']}/{run['name']}: {path} {_UNREAD}"
        seeds = sorted(int(seed) for seed in frame["seed"].unique())
        return samples(errors, seeds, fixed=str(run["name"]).startswith(PREDICTOR))

    def _spread(self, cell: str, column: str) -> Spread | None:
        if (cell, column) not in self._spreads:
            rows = [run for (_, c, name), run in self._runs.items() if c == cell and not name.startswith(PREDICTOR)]
            self._spreads[cell, column] = pooled_spread([per_seed(run, column) for run in rows])
        return self._spreads[cell, column]


def _number(text: str) -> str:
    return f"{float(text):g}" if _is_number(text) else text


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


# --- in print -----------------------------------------------------------------------------------------------------


class _Print(_Source):
    """The paper's own tables: contrasts that hold `printed` where they have both numbers."""

    def __init__(self, labels: Labels, published: Published) -> None:
        super().__init__(labels)
        self._published = published

    def cells(self, claim: Claim) -> list[str]:
        """Of the tables that the claim's part has rows in."""
        cells = dict.fromkeys(cell for grid in self._grids(claim.part) for cell in grid.cells)
        return [cell for cell in cells if claim.speaks_of(cell.split("@")[0], float(cell.split("@")[1]))]

    def swept(self, part: str, cell: str) -> list[str]:
        """None: figures print no numbers."""
        return []

    def _grids(self, part: str) -> list[Grid]:
        published = self._published
        cold = [published.cold_items] if published.cold_items is not None else []
        return [*([published.ablations] if part == "ablate" else []), published.comparison, *cold]

    def _made(self, contrast: Contrast, part: str, ours: tuple[str, str], theirs: tuple[str, str]) -> Contrast:
        one, two = (self._value(part, cell, name, contrast.metric) for cell, name in (ours, theirs))
        if one is None or two is None:
            return contrast
        return replace(contrast, printed=_sign(self._task_type, contrast.metric) * (one - two))

    def _value(self, part: str, cell: str, name: str, metric: str) -> float | None:
        values = (grid.value(name, cell, metric) for grid in self._grids(part))
        return next((value for value in values if value is not None), None)


def in_print(claim: Claim, labels: Labels) -> tuple[int, int] | None:
    """How many of the paper's own numbers go the claim's way, and of how many; None where it prints none."""
    printed = [value for contrast in _of_print(claim, labels) if (value := contrast.printed) is not None]
    return (sum(value > 0 for value in printed), len(printed)) if printed else None


def _of_print(claim: Claim, labels: Labels) -> list[Contrast]:
    if labels.published is None:
        return []
    return [each for unit in _units(claim, _Print(labels, labels.published)) for each in unit.contrasts]


def _beside_print(units: Sequence[_Unit], claim: Claim, labels: Labels) -> list[_Unit]:
    """With the published difference: that of the sentence, else of the cell, else the mean of all the claim's cells."""
    sentence = claim.form.printed if isinstance(claim.form, Difference) else None
    found: dict[tuple[str, str, str], dict[str, float]] = {}  # metric, better, worse -> cell -> difference
    for of in _of_print(claim, labels):
        if of.printed is not None:
            found.setdefault((of.metric, of.better, of.worse), {})[of.cell] = of.printed

    def beside(contrast: Contrast) -> Contrast:
        if sentence is not None:
            return replace(contrast, printed=_sign(labels.task_type, contrast.metric) * (sentence[0] - sentence[1]))
        cells = found.get((contrast.metric, contrast.better, contrast.worse))
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


def _sign(task_type: TaskType, metric: str) -> int:
    """1 where higher is better."""
    return (
        1
        if any(each.name == metric and each.better == "higher" for each in (*task_type.metrics, *task_type.full))
        else -1
    )
