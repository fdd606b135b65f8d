"""The comparisons of claims as this study measured them: the trained configurations that claims name, each read once.

A system is found by the name that its paper gives it (a model's `NAME`), in the scores and in sweeps of the ratio;
ablations and swept values are the subject's. A claim about ablations may name a system too: that is then the system's
selected configuration, from its score, on the users that the ablations are compared on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd

from features.errors import InputError
from study.labels import in_group
from study.papers.reader import Claim, Paper
from study.report.claims.contrasts import Contrast, Sides, Source, sign_of
from study.report.statistics import Sample, Spread, UserTotals, combine, pool, pooled_spread, samples
from study.tracking.results import Results, compared_on, is_baseline, per_seed

UNREAD = "cannot be read"


@dataclass(frozen=True)
class _Arm:
    """One trained configuration and the file that its users' rows are in."""

    run: pd.Series
    path: str

    @property
    def key(self) -> tuple[str, str]:
        return str(self.run["run_id"]), self.path


class Measured(Source):
    """Comparisons of the study's finished runs, with `row` as the paper's model."""

    def __init__(self, results: Results, paper: Paper, row: str) -> None:
        super().__init__(results.labels)
        self._results, self._group = results, paper.group
        self._ratio_sweep = f"sweep:{results.labels.ratio_field}"
        self._samples: dict[tuple[str, str], dict[str, Sample] | str] = {}
        self._spreads: dict[tuple[str, str, str], Spread | None] = {}
        places = results.trials[["part", "cell", "task", "ratio"]].drop_duplicates().sort_values(["task", "ratio"])
        self._cells = [(str(part), str(cell), str(task), float(ratio)) for part, cell, task, ratio in places.to_numpy()]
        self._runs: dict[tuple[str, str, str], pd.Series] = {}
        self._trained: dict[tuple[str, str], list[pd.Series]] = {}  # row, cell -> runs
        subject, rows = results.labels.row(row).paper_name, results.labels.rows_by_paper_name()
        systems = {other: name for name, other in rows.items() if name != subject} | {row: subject}
        for _, run in results.finished().iterrows():
            part, cell, run_row = str(run["part"]), str(run["cell"]), str(run["row"])
            if not is_baseline(run):
                self._trained.setdefault((run_row, cell), []).append(run)
            if part in ("score", self._ratio_sweep) and run_row in systems:
                self._runs[part, cell, systems[run_row]] = run
            elif part not in ("search", "score", self._ratio_sweep) and run_row == row:
                self._runs[part, cell, _variant(part, str(run["name"]))] = run

    def cells(self, claim: Claim) -> list[str]:
        """Return the cells of the study; those of its sweep of the ratio where the claim is about that."""
        between = claim.part == self._ratio_sweep
        cells = [
            cell
            for part, cell, task, ratio in self._cells
            if (part == self._ratio_sweep) == between and claim.speaks_of(task, ratio)
        ]
        return list(dict.fromkeys(cells))

    def swept(self, part: str, cell: str) -> list[str]:
        """Return the values of a sweep that have finished trials, ascending."""
        names = [name for run_part, run_cell, name in self._runs if (run_part, run_cell) == (part, cell)]
        return sorted((name for name in names if _is_number(name)), key=float)

    def filled(self, contrast: Contrast, part: str, sides: Sides) -> Contrast:
        """Return the contrast of the sides' means; a mean of several names goes without those that were not run, if few."""
        split = self._split(part, contrast.cell, sides)
        terms: list[tuple[float, Sample]] = []
        rows: set[str] = set()
        lacking: list[str] = []
        sign = sign_of(self._task_type, contrast.metric)
        for weight, names in zip((sign, -sign), sides, strict=True):
            arms = {name: self._arm(part, contrast.cell, name, split) for name in names}
            read = {name: self._sample(arm, part, name, contrast.metric) for name, arm in arms.items()}
            there = [sample for sample in read.values() if isinstance(sample, Sample)]
            lacking += [sample for sample in read.values() if isinstance(sample, str)]
            if names and 2 * len(there) <= len(names):
                return replace(contrast, lacking=tuple(lacking))
            terms += [(weight / len(there), sample) for sample in there]
            rows |= {str(arm.run["row"]) for arm in arms.values() if arm is not None}
        column = f"{'test' if split == 'test' else 'val'}_{in_group(contrast.metric, self._group)}"
        spread = self._spread(contrast.cell, column, sorted(rows))
        level = sum(weight * sample.value for weight, sample in terms if weight * sign > 0) * sign
        return replace(
            contrast, effect=combine(terms, spread), level=level, split=split, lacking=tuple(lacking)
        )  # fmt: skip

    def between(self, contrast: Contrast, part: str, better: str, worse: str) -> Contrast:
        """Return the contrast of the subject in two cells, whose users are not the same."""
        name = self._labels.subject.paper_name
        one, two = (
            self.filled(replace(contrast, cell=cell), part, ((name,), ())) for cell in (better, worse)
        )  # fmt: skip
        if one.effect is None or two.effect is None:
            return replace(contrast, lacking=tuple(dict.fromkeys(one.lacking + two.lacking)))
        effects = [(1.0, one.effect), (-1.0, two.effect)]
        return replace(contrast, effect=pool(effects, [contrast.cell] * 2), level=one.level, split=one.split)

    def _split(self, part: str, cell: str, sides: Sides) -> str:
        """Return on which users a part's trials are compared: on test users where all of them were."""
        if part == "score":
            return "test"
        runs = [self._runs.get((part, cell, name)) for side in sides for name in side]
        return compared_on(run for run in runs if run is not None)

    def _arm(self, part: str, cell: str, name: str, split: str) -> _Arm | None:
        run = self._runs.get((part, cell, name))
        if run is None and part == "ablate":
            run = self._runs.get(("score", cell, name))
        return None if run is None else _Arm(run, "per_user.csv" if split == "test" else "val_per_user.csv")

    def _sample(self, arm: _Arm | None, part: str, name: str, metric: str) -> Sample | str:
        """Return one arm of a comparison, or why there is none."""
        if arm is None:
            return f"no finished run of {name} in {part}"
        if arm.key not in self._samples:
            self._samples[arm.key] = self._read(arm)
        sample = self._samples[arm.key]
        return sample if isinstance(sample, str) else sample.get(metric, f"{name} logged no {metric}")

    def _read(self, arm: _Arm) -> dict[str, Sample] | str:
        """Return every metric from users' rows, or why there is none."""
        run, column = arm.run, self._task_type.group_column
        try:
            frame = self._results.per_user(str(run["run_id"]), arm.path)
            if self._group and column in frame.columns:
                frame = frame[frame[column] == self._group]
            totals = [UserTotals.from_frame(frame, self._task_type.metrics)]
            if (cold := self._task_type.cold_items) and cold[0].count in frame.columns:
                totals.append(UserTotals.from_frame(frame[frame[cold[0].count] > 0], cold))
        except InputError:  # the report lists it, see `judge.unread`
            return f"{run['part']}/{run['cell']}/{run['row']}/{run['name']}: {arm.path} {UNREAD}"
        found = (samples(each, fixed=is_baseline(run), resamples=0) for each in totals)
        return {name: sample for each in found for name, sample in each.items()}

    def _spread(self, cell: str, column: str, rows: Sequence[str]) -> Spread | None:
        """Return how seeds vary in a cell, by all trials of the rows that are compared."""
        key = (cell, column, ",".join(rows))
        if key not in self._spreads:
            runs = [run for row in rows for run in self._trained.get((row, cell), [])]
            self._spreads[key] = pooled_spread([per_seed(run, column) for run in runs])
        return self._spreads[key]


def _variant(part: str, name: str) -> str:
    """Return what claims call a trial of the subject: a point of a sweep by its value, an ablation by its name."""
    if not part.startswith("sweep:"):
        return name
    value = name.partition("=")[2]
    return f"{float(value):g}" if _is_number(value) else value


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
