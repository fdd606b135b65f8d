"""What a paper prints: its tables and the claims of its text, read from `study/papers/<model>.yaml`.

The dataclasses here are the form of the file: a key is a field. A cell of a printed table has the name of the study's cell
(`kitchen->food@1`), so that a plan that names its domains as the file does finds its numbers; a row has the name that the
paper gives the system, which is a model's `NAME`. All faults of a file are reported at once, a line each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

from features.errors import InputError
from search_spaces import parse_yaml
from study.plan.binding import bind

FOLDER = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A printed table: for each row and column group (cell or task) the values in the order of `columns`."""

    place: str
    columns: tuple[str, ...]
    """Metrics, or what a table of domains counts."""
    rows: Mapping[str, Mapping[str, tuple[float, ...]]]
    """Row -> cell -> values; all rows have the same cells."""
    improvement: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Cell -> printed percent over the best other row."""

    def __post_init__(self) -> None:
        if len({tuple(cells) for cells in self.rows.values()}) != 1:
            raise InputError("rows do not all have the same cells; copy every printed number")
        named = {**self.rows, "improvement": self.improvement}
        faults = [
            f"{name}, {cell} is {list(values)}; give {len(self.columns)} numbers, one for each of columns"
            for name, cells in named.items()
            for cell, values in cells.items()
            if len(values) != len(self.columns)
        ]
        if faults:
            raise InputError("; ".join(faults))

    @property
    def cells(self) -> tuple[str, ...]:
        """All cells, in the order of the first row."""
        return tuple(next(iter(self.rows.values())))

    def value(self, row: str, cell: str, column: str) -> float | None:
        """Return a number as printed, or None."""
        values = self.rows.get(row, {}).get(cell)
        return values[self.columns.index(column)] if values and column in self.columns else None


@dataclass(frozen=True)
class Order:
    """Each name of a level is better than each name of the next level."""

    levels: tuple[tuple[str, ...], ...]

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """(better, worse)."""
        steps = zip(self.levels, self.levels[1:], strict=False)
        return tuple((better, worse) for upper, lower in steps for better in upper for worse in lower)


@dataclass(frozen=True)
class Optimum:
    """The best value of the swept parameter lies in low..high, both included."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise InputError(f"low is {self.low}, high {self.high}; give low <= high")


@dataclass(frozen=True)
class Unimodal:
    """A value of the swept parameter between its ends is better than both ends."""


@dataclass(frozen=True)
class Difference:
    """One name is better than another; the sentence may print both numbers."""

    better: str
    worse: str
    printed: tuple[float, float] | None = None


Form = Order | Optimum | Unimodal | Difference


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A sentence of the paper about a hyperparameter, an ablation or a comparison, in a form that can be decided.

    Exactly one of order, optimum, unimodal and difference is given. Names in `order` and `difference` are systems as the
    paper calls them (part `score` and sweeps of the ratio), ablations (`full`, `wo_...`), values of a sweep, or ratios.
    """

    name: str
    place: str
    """Section or heading, then table or figure."""
    sentence: str
    """In English: as printed, or the part of it that says it."""
    original: str = ""
    """As printed, where that is another language."""
    part: str
    """Of a study, that decides it."""
    metrics: tuple[str, ...]
    """The first is the primary one, which is tested; the others are shown beside it."""
    margin: float | None = None
    """Smallest difference that would still make the sentence true, a share of the full row; None: see `claims.margins`."""
    order: tuple[tuple[str, ...], ...] = ()
    """Levels of names, the better first; names that are numbers are quoted."""
    optimum: Optimum | None = None
    unimodal: bool = False
    difference: Difference | None = None
    dataset: str = ""
    """Empty: all."""
    tasks: tuple[str, ...] = ()
    """Empty: all."""
    ratios: tuple[float, ...] = ()
    """Empty: all."""
    at_least: Literal["all", "most", "some"] = "all"
    """Whether it is about every pair of an order, the mean of a level against that of the next, or any one pair."""
    across_ratios: bool = False
    """The names of `order` are ratios, and each task's cells are compared."""
    more_at: tuple[float, float] | None = None
    """The difference is larger at the first ratio than at the second."""

    def __post_init__(self) -> None:
        given = {
            "order": bool(self.order), "optimum": self.optimum is not None, "unimodal": self.unimodal,
            "difference": self.difference is not None,
        }  # fmt: skip
        named = [name for name, is_given in given.items() if is_given]
        if len(named) != 1:
            raise InputError(f"{self.name} has {' and '.join(named) or 'no form'}; give one of {', '.join(given)}")
        if self.order and (len(self.order) < 2 or not all(self.order)):
            raise InputError(f"order is {[list(level) for level in self.order]}; give two or more lists of names")
        if not self.metrics:
            raise InputError("metrics is empty; give at least one")
        if self.margin is not None and not 0 < self.margin < 1:
            raise InputError(f"margin is {self.margin}; give a share of the full row between 0 and 1")

    @property
    def form(self) -> Form:
        """What the claim says, as one of four forms."""
        given = self.optimum or self.difference or (Unimodal() if self.unimodal else None)
        return given if given is not None else Order(self.order)

    def speaks_of(self, task: str, ratio: float) -> bool:
        """Return whether a cell is among those that the sentence speaks of."""
        return (not self.tasks or task in self.tasks) and (not self.ratios or ratio in self.ratios)


@dataclass(frozen=True, kw_only=True)
class Tables:
    """The tables of one data set."""

    domains: Grid
    comparison: Grid
    ablations: Grid
    cold_items: Grid | None = None
    users: Mapping[str, int] = field(default_factory=dict)
    """Cell -> test users of the paper, where they are known."""


@dataclass(frozen=True, kw_only=True)
class Paper:
    """All of one paper: the whole of a file."""

    title: str
    text: str
    """File that the numbers and sentences were copied from."""
    group: str = ""
    """Group of test rows (protocol) that the numbers belong to."""
    note: str
    """What the numbers can and cannot be compared with."""
    datasets: Mapping[str, Tables]
    claims: tuple[Claim, ...]

    def __post_init__(self) -> None:
        names = [claim.name for claim in self.claims]
        faults = [f"{name} is given twice; names are unique" for name in dict.fromkeys(names) if names.count(name) > 1]
        faults += [
            f"{claim.name} speaks of the data set {claim.dataset!r}; known: {', '.join(self.datasets)}"
            for claim in self.claims
            if claim.dataset and claim.dataset not in self.datasets
        ]
        if faults:
            raise InputError(f"claims: {'; '.join(faults)}")


@dataclass(frozen=True, kw_only=True)
class Published:
    """What a paper prints of one data set."""

    name: str
    """As plans call it, e.g. lgcd/food-kitchen."""
    paper: Paper
    comparison: Grid
    ablations: Grid
    cold_items: Grid | None
    domains: Grid
    users: Mapping[str, int]

    @property
    def dataset(self) -> str:
        """`food-kitchen`."""
        return self.name.partition("/")[2]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks that there are numbers of."""
        return tuple(dict.fromkeys(cell.partition("@")[0] for cell in self.comparison.cells))

    def check(self, tasks: Iterable[str]) -> None:
        """Raise InputError where the paper has no numbers of any of a plan's tasks."""
        asked = list(tasks)
        if not set(asked) & set(self.tasks):
            raise InputError(
                f"{self.name} has no numbers of {', '.join(asked)}; it has {', '.join(self.tasks)}: "
                "name the domains so, or leave published out"
            )

    def check_names(self, names: Iterable[str]) -> None:
        """Raise InputError where the paper prints no row of any of a plan's systems, given by their `NAME`."""
        asked = list(dict.fromkeys(names))
        if not set(asked) & set(self.comparison.rows):
            raise InputError(
                f"{self.name} prints no row of {', '.join(asked)}; it prints {', '.join(self.comparison.rows)}: "
                "name the paper that does, or leave published out"
            )


def published_names() -> list[str]:
    """Return all names that `load_published` takes."""
    papers = ((path.stem, load_paper(path.stem)) for path in FOLDER.glob("*.yaml"))
    return sorted(f"{stem}/{name}" for stem, paper in papers if paper for name in paper.datasets)


def load_published(name: str) -> Published:
    """Return the numbers of `<model>/<data set>`; InputError for an unknown name."""
    if name not in published_names():
        raise InputError(f"unknown {name!r}; choose from {', '.join(published_names())}")
    model, _, dataset = name.partition("/")
    paper = load_paper(model)
    assert paper is not None, "it is among the names"
    return Published(name=name, paper=paper, **vars(paper.datasets[dataset]))


@cache
def load_paper(model: str) -> Paper | None:
    """Return the paper of a model; None where there is no file."""
    path = FOLDER / f"{model}.yaml"
    return parse_paper(path.read_text(encoding="utf-8"), path.name) if path.is_file() else None


def parse_paper(text: str, place: str) -> Paper:
    """Return the paper of a file's text. Raises InputError with every fault, a line each."""
    faults: list[str] = []
    paper = bind(Paper, parse_yaml(text), place, faults)
    if faults:
        raise InputError("\n".join(dict.fromkeys(faults)))
    assert isinstance(paper, Paper)
    return paper
