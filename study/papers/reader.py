"""What a paper prints: its tables and the claims of its text, `study/papers/<model>.yaml`, laid beside what is measured.

A cell of a printed table has the name of the study's cell that it is of (`kitchen->food@1`), so that a plan that names its
domains as the file does finds its numbers. All faults of a file are reported at once, a line each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from features.errors import InputError
from search_spaces import parse_yaml

FOLDER = Path(__file__).parent
AT_LEAST = ("all", "most", "some")
FORMS = ("order", "optimum", "unimodal", "difference")


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A printed table: for each row and column group (cell or task) the values in the order of `columns`."""

    place: str
    columns: tuple[str, ...]  # metrics, or what Table 1 counts
    rows: Mapping[str, Mapping[str, tuple[float, ...]]]  # row -> cell -> values
    improvement: Mapping[str, tuple[float, ...]]  # cell -> printed percent over the best other row; may be empty

    @property
    def cells(self) -> tuple[str, ...]:
        """All cells, in the order of the first row."""
        return tuple(next(iter(self.rows.values())))

    def value(self, row: str, cell: str, column: str) -> float | None:
        """A number as printed, or None."""
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


@dataclass(frozen=True)
class Unimodal:
    """A value of the swept parameter between its ends is better than both ends."""


@dataclass(frozen=True)
class Difference:
    """`of` is better than `less`; the sentence may print both numbers."""

    of: str
    less: str
    printed: tuple[float, float] | None


Form = Order | Optimum | Unimodal | Difference


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A sentence of the paper about a hyperparameter, an ablation or a comparison, in a form that can be decided."""

    name: str
    place: str  # section or heading, then table or figure
    sentence: str  # as printed, or the part of it that says it
    part: str  # of a study, that decides it
    metrics: tuple[str, ...]
    form: Form
    dataset: str  # empty: all
    tasks: tuple[str, ...]  # empty: all
    ratios: tuple[float, ...]  # empty: all
    at_least: str  # in how many of its comparisons: all | most | some
    across: str  # `ratio`: the names of `form` are ratios, and each task's cells are compared; empty: within a cell
    more_at: tuple[float, float] | None  # the difference is larger at the first ratio than at the second

    def speaks_of(self, task: str, ratio: float) -> bool:
        """Whether a cell is among those that the sentence speaks of."""
        return (not self.tasks or task in self.tasks) and (not self.ratios or ratio in self.ratios)


@dataclass(frozen=True, kw_only=True)
class Paper:
    """All of one paper."""

    title: str
    text: str  # file that the numbers and sentences were copied from
    method: str  # the row of tables that is the study's model
    group: str  # of test rows (protocol) that the numbers are of
    note: str
    grids: Mapping[str, Mapping[str, Grid]]  # data set -> domains | comparison | ablations | cold_items -> table
    claims: tuple[Claim, ...]


@dataclass(frozen=True, kw_only=True)
class Published:
    """What a paper prints of one data set."""

    name: str  # as plans call it, e.g. lgcd/food-kitchen
    paper: Paper
    comparison: Grid
    ablations: Grid
    cold_items: Grid | None
    domains: Grid

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


def published_names() -> list[str]:
    """All names that `load_published` takes."""
    papers = ((path.stem, load_paper(path.stem)) for path in FOLDER.glob("*.yaml"))
    return sorted(f"{stem}/{name}" for stem, paper in papers if paper for name in paper.grids)


def load_published(name: str) -> Published:
    """The numbers of `<model>/<data set>`; InputError for an unknown name."""
    if name not in published_names():
        raise InputError(f"unknown {name!r}; choose from {', '.join(published_names())}")
    model, _, dataset = name.partition("/")
    paper = load_paper(model)
    assert paper is not None, "it is among the names"
    grids = paper.grids[dataset]
    return Published(
        name=name, paper=paper, comparison=grids["comparison"], ablations=grids["ablations"],
        cold_items=grids.get("cold_items"), domains=grids["domains"],
    )  # fmt: skip


@cache
def load_paper(model: str) -> Paper | None:
    """The paper of a model; None where there is no file of it."""
    path = FOLDER / f"{model}.yaml"
    return parse_paper(path.read_text(encoding="utf-8"), path.name) if path.is_file() else None


def parse_paper(text: str, place: str) -> Paper:
    """A paper's file. Raises InputError with every fault, a line each."""
    faults: list[str] = []
    document = _Part(parse_yaml(text), place, faults)
    grids = {
        name: {key: _grid(table) for key, table in dataset.parts()}
        for name, dataset in document.part("datasets").parts()
    }
    claims = tuple(
        _claim(_Part(entry, f"{place}: claims[{k}]", faults)) for k, entry in enumerate(document.list("claims"))
    )
    names = [claim.name for claim in claims]
    faults += [f"{place}: claims: id {name!r} is given twice; ids are unique" for name in dict.fromkeys(names)
               if names.count(name) > 1]  # fmt: skip
    for dataset, tables in grids.items():
        lacking = [key for key in ("domains", "comparison", "ablations") if key not in tables]
        faults += [f"{place}: datasets.{dataset}.{key} is missing; give the printed table" for key in lacking]
    paper = Paper(
        title=document.text("paper"), text=document.text("text"), method=document.text("method"),
        group=document.text("group", ""), note=document.text("note"), grids=grids, claims=claims,
    )  # fmt: skip
    document.done()
    faults += [
        f"{place}: claims: {claim.name} speaks of the data set {claim.dataset!r}; known: {', '.join(grids)}"
        for claim in claims
        if claim.dataset and claim.dataset not in grids
    ]
    if faults:
        raise InputError("\n".join(dict.fromkeys(faults)))
    return paper


class _Part:
    """A mapping of the file; what is wrong with it goes to `faults`, each key is asked for once."""

    def __init__(self, value: Any, place: str, faults: list[str]) -> None:
        self.place, self.faults = place, faults
        if not isinstance(value, Mapping):
            faults.append(f"{place} is {value!r}; give a mapping")
        self.left = dict(value) if isinstance(value, Mapping) else {}

    def take(self, key: str, fits: Callable[[Any], bool], what: str, default: Any = None) -> Any:
        """The value of a key, checked; `default` where it is absent or wrong (None: it must be there)."""
        if key not in self.left and default is not None:
            return default
        value = self.left.pop(key, None)
        if value is None:
            self.faults.append(f"{self.place}: {key} is missing; give {what}")
        elif not fits(value):
            self.faults.append(f"{self.place}: {key} is {value!r}; give {what}")
        else:
            return value
        return default

    def text(self, key: str, default: str | None = None) -> str:
        return str(self.take(key, lambda value: isinstance(value, str), "text", default) or "").strip()

    def list(self, key: str, of: type | tuple[type, ...] = object, default: list[Any] | None = None) -> list[Any]:
        fits = lambda value: isinstance(value, list) and bool(value) and all(isinstance(v, of) for v in value)  # noqa: E731
        return self.take(key, fits, "a list", default) or []

    def part(self, key: str) -> _Part:
        value = self.take(key, lambda value: isinstance(value, Mapping), "a mapping")
        return _Part(value or {}, f"{self.place}: {key}", self.faults)

    def parts(self) -> Iterable[tuple[str, _Part]]:
        """All entries as parts."""
        return [(str(key), self.part(str(key))) for key in list(self.left)]

    def done(self) -> None:
        """Fault what nobody asked for."""
        self.faults += [f"{self.place}: unknown key {key!r}; take it out" for key in self.left]


def _grid(table: _Part) -> Grid:
    place = table.text("place")
    columns = table.list("metrics" if "metrics" in table.left else "columns", str)
    rows: dict[str, dict[str, tuple[float, ...]]] = {}
    body = table.part("rows")
    for row in list(body.left):
        if isinstance(body.left[row], list):  # counts of a task: one row of numbers
            rows.setdefault("counts", {})[row] = _numbers(body, row, len(columns))
        else:
            cells = body.part(row)
            rows[row] = {cell: _numbers(cells, cell, len(columns)) for cell in list(cells.left)}
    if len({tuple(cells) for cells in rows.values()}) != 1:
        table.faults.append(f"{table.place}: rows do not all have the same cells; copy every printed number")
    percent = table.part("improvement") if "improvement" in table.left else None
    improvement = {cell: _numbers(percent, cell, len(columns)) for cell in list(percent.left)} if percent else {}
    table.done()
    return Grid(place=place, columns=tuple(columns), rows=rows or {"": {}}, improvement=improvement)


def _numbers(of: _Part, key: str, count: int) -> tuple[float, ...]:
    values = of.list(key, (int, float))
    if (values and len(values) != count) or not all(math.isfinite(value) for value in values):
        of.faults.append(f"{of.place}: {key} is {values}; give {count} finite numbers")
    return tuple(float(value) for value in values)


def _claim(entry: _Part) -> Claim:
    given = [form for form in FORMS if form in entry.left]
    if len(given) != 1:
        entry.faults.append(f"{entry.place}: has {', '.join(given) or 'no form'}; give one of {', '.join(FORMS)}")
    form = _form(entry, given[0]) if given else Unimodal()
    more_at = entry.list("more_at", (int, float), [])
    at_least = entry.text("at_least", "all")
    if at_least not in AT_LEAST:
        entry.faults.append(f"{entry.place}: at_least is {at_least!r}; choose from {', '.join(AT_LEAST)}")
    claim = Claim(
        name=entry.text("id"), place=entry.text("place"), sentence=entry.text("sentence"), part=entry.text("part"),
        metrics=tuple(entry.list("metrics", str)), form=form, dataset=entry.text("dataset", ""),
        tasks=tuple(entry.list("tasks", str, [])), at_least=at_least, across=entry.text("across", ""),
        ratios=tuple(map(float, entry.list("ratios", (int, float), []))),
        more_at=(float(more_at[0]), float(more_at[1])) if len(more_at) == 2 else None,
    )  # fmt: skip
    entry.done()
    return claim


def _form(entry: _Part, form: str) -> Form:
    if form == "unimodal":
        entry.take(form, lambda value: value is True, "true")
        return Unimodal()
    if form == "order":
        levels = entry.list(form, list)
        if len(levels) < 2 or not all(isinstance(name, str) for level in levels for name in level):
            entry.faults.append(
                f"{entry.place}: order is {levels}; give lists of names (quote numbers), the better first"
            )
        return Order(tuple(tuple(map(str, level)) for level in levels))
    body = entry.part(form)
    if form == "optimum":
        number: Callable[[Any], bool] = lambda value: isinstance(value, int | float)  # noqa: E731
        low, high = (float(body.take(key, number, "a number") or 0) for key in ("low", "high"))
        if low > high:
            entry.faults.append(f"{entry.place}: optimum.low is {low}, high {high}; give low <= high")
        body.done()
        return Optimum(low, high)
    printed = body.list("printed", (int, float), [])
    found = Difference(body.text("of"), body.text("less"), (printed[0], printed[1]) if len(printed) == 2 else None)
    body.done()
    return found
