"""What a study is of: the model, what its kind calls its numbers and which way is better, and what was published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from study.papers.reader import Paper, Published, load_paper, load_published
from study.specs import Direction
from trainables.interface import Figure, load_model
from trainables.task_types import TASK_TYPES, Metric, TaskType

_SPLITS = {"val_": "Validation", "test_": "Test"}
_FIELDS = {"lr": "Learning rate", "dropout": "Dropout rate"}  # of any model


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Names and directions of everything that a study shows."""

    model: str
    task_type: TaskType
    selection: tuple[str, Direction]  # metric, and whether it is minimised or maximised
    figures: Mapping[str, Figure]  # config field -> how its sensitivity is shown
    published: Published | None = None
    paper: Paper | None = None  # whose claims are judged

    @property
    def higher(self) -> bool:
        """Whether a higher value of the selection metric is better."""
        return self.selection[1] == "maximize"

    @property
    def ratio(self) -> str:
        """`Cold ratio`."""
        return f"{self.task_type.ratio.capitalize()} ratio"

    def cell(self, task: str, ratio: float) -> str:
        """`books → movies, cold 20%`."""
        return f"{task.replace('->', ' → ')}, {self.task_type.ratio} {ratio:.0%}"

    def label(self, name: str) -> str:
        """Of an axis: a metric as it is logged, `ratio` (both explained on a second line), or a field of the config."""
        for prefix, split in _SPLITS.items():
            if name.startswith(prefix):
                return f"{split} {self._metric(name.removeprefix(prefix))}"
        if name == "seconds":
            return "Time of a trial\n(seconds, lower is better)"
        if name == "ratio":
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
    """`(rating points, lower is better)`."""
    return f"({metric.unit}, {metric.better} is better)"


def in_group(metric: str, group: str) -> str:
    """The metric's name in one group of rows, as it is logged: `ndcg10_inter`; without groups its own."""
    return f"{metric}_{group}" if group else metric


def labels_of(model: str, published: str | None = None) -> Labels:
    """Of a model by name, beside published numbers by name."""
    module = load_model(model)
    selection = module.SELECTION
    return Labels(
        model=model, task_type=TASK_TYPES[module.TASK_TYPE], selection=(selection.metric, selection.direction),
        figures=module.FIGURES,
        published=load_published(published) if published else None, paper=load_paper(model),
    )  # fmt: skip
