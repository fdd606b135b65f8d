"""What a study calls things: its rows, the metrics of its task type and which way is better, and what was published."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from study.papers.reader import Paper, Published, load_paper, load_published
from study.specs import BASELINE
from trainables.interface import OURS, Figure, Selection, load_model
from trainables.task_types import TASK_TYPES, Metric, TaskType

_SPLITS = {"val_": "Validation", "test_": "Test"}
_FIELDS = {"lr": "Learning rate", "dropout": "Dropout rate"}  # of any model
_READS = {"ratings": "ratings", "sequences": "ids"}  # what every model of a task type reads
_NEEDS = {"pseudo_items": "pseudo-items"}  # in words, where they are other ones


@dataclass(frozen=True, kw_only=True)
class RowLabels:
    """What tables and figures say of one row of the study."""

    row: str
    """As the plan and the tag `study.row` have it."""
    model: str
    """File in trainables/models, or `baseline`."""
    name: str
    """Shown: the plan's title, or the model's `NAME`."""
    paper_name: str
    """The model's `NAME`, by which published rows and claims are found; empty for a baseline and a row that is no published
    system."""
    reads: str
    """What of the data the model sees: `ids, titles`."""
    preset: str = OURS
    """Of the model's configuration."""
    note: str = ""
    """What the model says of itself, e.g. reconstruction."""


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Names and directions of everything that a study shows."""

    model: str
    """Whose paper, figures and claims these are; the subject's row has its name."""
    task_type: TaskType
    selection: Selection
    figures: Mapping[str, Figure]
    """Config field -> how its sensitivity is shown."""
    rows: Mapping[str, RowLabels]
    """The subject, then the rivals in the order of the plan."""
    published: Published | None = None
    paper: Paper | None = None
    """The paper whose claims are judged: the subject's."""
    note: str = ""
    """What the plan says that readers have to know."""
    parts: tuple[str, ...] | None = None
    """Parts of the plan; None: not known, and all that the paper has is asked for."""

    def asks_for(self, part: str) -> bool:
        """Return whether the study is to have a part, as far as is known."""
        return self.parts is None or part in self.parts

    @property
    def subject(self) -> RowLabels:
        """The row that the study is about."""
        return self.rows[self.model]

    @property
    def table_order(self) -> tuple[str, ...]:
        """All rows as tables have them: simple baselines, the paper's systems as it prints them, then the others."""
        systems = list(self.published.comparison.rows) if self.published else []
        place = {name: k for k, name in enumerate(systems)}
        rows = sorted(self.rows.values(), key=lambda row: place.get(row.paper_name, len(systems)))
        return (*self.task_type.baselines, *(row.row for row in rows))

    @property
    def subject_published(self) -> Published | None:
        """What is published, where it is the subject's own paper: ablations and claims are of its subject alone."""
        published = self.published
        return published if published is not None and published.name.startswith(f"{self.model}/") else None

    @property
    def dataset(self) -> str:
        """The data set of the subject's paper that the study is held against; empty: none."""
        return self.subject_published.dataset if self.subject_published else ""

    def row(self, row: str) -> RowLabels:
        """Return what is known of a row: of the plan, or a simple baseline."""
        if row in self.rows:
            return self.rows[row]
        reads = _reads(self.task_type, self.task_type.baseline_needs.get(row, ()))
        return RowLabels(row=row, model=BASELINE, name=row, paper_name="", reads=reads)

    def rows_by_paper_name(self) -> Mapping[str, str]:
        """Return the row that stands for each system of a paper.

        Of several rows of one model it is the one that is named by the model, else the first of the plan.
        """
        ordered = sorted((row for row in self.rows.values() if row.paper_name), key=lambda row: row.row != row.model)
        return {row.paper_name: row.row for row in reversed(ordered)}

    @property
    def higher(self) -> bool:
        """Whether a higher value of the selection metric is better."""
        return self.selection.direction == "maximize"

    @property
    def ratio(self) -> str:
        """`Cold ratio`."""
        return f"{self.task_type.ratio.capitalize()} ratio"

    @property
    def ratio_field(self) -> str:
        """`cold_ratio`: the name of a sweep of the cell's ratio."""
        return f"{self.task_type.ratio}_ratio"

    def cell(self, task: str, ratio: float) -> str:
        """Return `books → movies, cold 20%`."""
        return f"{task.replace('->', ' → ')}, {self.task_type.ratio} {ratio:.0%}"

    def label(self, name: str) -> str:
        """Return what stands on an axis: of a metric as it is logged, of the ratio, or of a field of the config."""
        for prefix, split in _SPLITS.items():
            if name.startswith(prefix):
                return f"{split} {self._metric(name.removeprefix(prefix))}"
        if name == "seconds":
            return "Time of a trial\n(seconds, lower is better)"
        if name == self.ratio_field:
            return f"{self.ratio}\n({self.task_type.ratio_of})"
        named = self.figures[name].label if name in self.figures else ""
        return named or _FIELDS.get(name) or name.replace("_", " ").capitalize()

    def _metric(self, name: str) -> str:
        if name == "seconds":
            return "time\n(seconds, lower is better)"
        for metric in (*self.task_type.metrics, *self.task_type.full):
            for group in dict.fromkeys(("", *self.task_type.groups)):
                if name == in_group(metric.name, group):
                    return f"{metric.label}{f', {group}' if group else ''}\n{scale(metric)}"
        return name.replace("_", " ")


def scale(metric: Metric) -> str:
    """Return `(rating points, lower is better)`."""
    return f"({metric.unit}, {metric.better} is better)"


def in_group(metric: str, group: str) -> str:
    """Return the metric's name in one group of rows, as it is logged: `ndcg10_inter`; without groups its own."""
    return f"{metric}_{group}" if group else metric


def labels_of(
    model: str, published: str | None = None, compare: Mapping[str, tuple[str, str]] | None = None
) -> Labels:  # fmt: skip
    """Return the labels of a study of `model` beside published numbers by name.

    `compare` holds the rivals, row -> (model, title), in the order of the plan; an empty title is the model's `NAME`.
    """
    module = load_model(model)
    task_type = TASK_TYPES[module.TASK_TYPE]
    rows = {model: (model, ""), **(compare or {})}
    return Labels(
        model=model,
        task_type=task_type,
        selection=module.SELECTION,
        figures=getattr(module, "FIGURES", {}),
        rows={row: _row_labels(row, *named, task_type) for row, named in rows.items()},
        published=load_published(published) if published else None,
        paper=load_paper(model),
    )


def _row_labels(row: str, model: str, title: str, task_type: TaskType) -> RowLabels:
    module = load_model(model)
    return RowLabels(
        row=row,
        model=model,
        name=title or module.NAME,
        paper_name=module.NAME,
        reads=_reads(task_type, getattr(module, "NEEDS", ())),
        note=getattr(module, "NOTE", ""),
    )


def _reads(task_type: TaskType, needs: Iterable[str]) -> str:
    return ", ".join([_READS[task_type.name], *(_NEEDS.get(need, need) for need in needs)])
