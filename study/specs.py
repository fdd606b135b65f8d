"""What the engine is asked to do: cells, jobs, rows, and how a search draws. Frozen values, no behaviour."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from search_spaces import Space
    from trainables.interface import Selection

Direction = Literal["minimize", "maximize"]
ARROW = "->"  # between source and target in the name of a cell, and in no name of a field
GRID = "GridSampler"  # the sampler that tries every configuration
BASELINE = "baseline"  # the model of a row that is a simple baseline; the row has the baseline's name

# Names become tags, file names and MLflow filters; an alphabet without quotes, slashes or blanks needs no escaping.
_NAME = re.compile(r"[\w.:=,+-]+")


def is_name(value: str) -> bool:
    """Whether cells, parts and the like may have this name."""
    return _NAME.fullmatch(value) is not None


def _check_name(owner: str, value: str) -> None:
    if not is_name(value):
        raise ValueError(f"{owner}: use letters, digits and . : = , + - _ only, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One directed pair of domains at one ratio."""

    source: str
    """Name of the domain the taste is known in (the papers' auxiliary)."""
    target: str
    """Name of the domain that ratings or items are predicted in."""
    ratio: float
    """Cold ratio (MuSiC) or overlap ratio (LGCD), in (0, 1]."""

    def __post_init__(self) -> None:
        _check_name("cell source", self.source)
        _check_name("cell target", self.target)

    @property
    def task(self) -> str:
        """`books->movies`."""
        return f"{self.source}{ARROW}{self.target}"

    @property
    def name(self) -> str:
        """`books->movies@0.2`."""
        return f"{self.task}@{self.ratio:g}"

    @property
    def pair(self) -> str:
        """`books+movies@0.2`: the same for both directions."""
        return f"{'+'.join(sorted((self.source, self.target)))}@{self.ratio:g}"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One configuration in one cell, trained over its seeds in one trial."""

    part: str
    """`search`, `sweep:<field>`, `ablate` or `score`."""
    cell: Cell
    row: str
    """Row of the study: the subject's or a rival's name, or that of a simple baseline."""
    model: str
    """File in trainables/models, or `baseline`."""
    name: str
    """Unique within part, cell and row: `steps=10`, `wo_side`, `test`; of a search the trial number, see `trial_name`."""
    config: Mapping[str, Any] | None
    """Fields that differ from the row's base configuration; None: the row's Optuna study of this cell is asked."""
    seeds: tuple[int, ...]
    """Training seeds; their mean is the trial's result."""
    feature_set: str
    """What the task holds: vectors of texts (`text`) or from ratings (`ratings`), or no vectors (`ids`)."""
    task_dir: str
    """Folder of task tensors, a path that workers can read."""
    score: bool = False
    """The test folder is opened too: in `score`, and in a sweep or ablation that says `compare: test`."""
    preset: str = "ours"
    """Preset of the row, with the fields that its base sets over it, see `study.plan.schema.Row.preset_tag`."""
    test_dir: str | None = None
    """Folder of the test data; given exactly when `score` is true."""

    def __post_init__(self) -> None:
        for owner, value in (("part", self.part), ("row", self.row), ("name", self.name)):
            _check_name(f"job {owner}", value)
        if not self.seeds:
            raise ValueError(f"job {self.trial}: needs at least one seed")
        if self.score != (self.test_dir is not None):
            raise ValueError(f"job {self.trial}: test_dir belongs to score jobs and to them only, got {self.test_dir}")

    @property
    def trial(self) -> str:
        """`<part>/<cell>/<row>/<name>`: the identity that MLflow's tag `study.trial` holds."""
        return f"{self.part}/{self.cell.name}/{self.row}/{self.name}"


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """A finished search whose trials the sampler knows from the start, cell by cell."""

    plan: str
    """Name of the plan that made it."""
    storage: str | None = None
    """Where Optuna kept it, as in `SearchSpec.storage`, or the path of a journal file; None: this home folder."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """One of several numbers that a search optimises."""

    metric: str
    """As a trial logs it, e.g. val_rmse."""
    direction: Direction
    """minimize | maximize."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a search may cost. When it is spent, running trials finish and no new ones start."""

    hours: float | None = None
    """By the clock, all calls and rows together; None: any."""
    trial_hours: float | None = None
    """Sum over a row's trials of the time that each ran, in all cells; each row may spend as much. None: any."""


@dataclass(frozen=True, kw_only=True)
class SearchSpec:
    """How each cell's search draws its trials."""

    trials: int
    """Configurations per cell."""
    seeds: tuple[int, ...]
    """Training seeds of each configuration."""
    sampler: str = "TPESampler"
    """Class in optuna.samplers; `study.engine.samplers.SAMPLERS` lists those that are supported."""
    sampler_args: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of that class's constructor, seed excepted."""
    seed: int = 0
    """Seed of the samplers. Each row and cell has its own, made from it, so no two get the same start-up draws (but both
    directions do where one training serves them); trial n draws from (that seed, n) alone, whatever ran before in this
    process."""
    points_to_evaluate: tuple[Mapping[str, Any], ...] = ()
    """Parameters of the first trials; what a point leaves out is drawn."""
    warm_start: WarmStart | None = None
    """Trials of another search that the sampler starts from; they are no trials of this one."""
    storage: str | None = None
    """Database URL that Optuna keeps the search in, for several machines; None: a journal file in the home folder."""
    pruner: str | None = None
    """Class in optuna.pruners that stops bad trials early: SuccessiveHalvingPruner (ASHA) or MedianPruner.

    It is shown the selection metric of each epoch, a mean over the seeds: replicates go on or stop together.
    """
    pruner_args: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of that class's constructor, in epochs."""
    objectives: tuple[Objective, ...] = ()
    """Numbers that are optimised together; the selection metric is one of them. Empty: the selection metric alone."""
    budget: Budget = field(default_factory=Budget)
    """What the search may cost."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one trial holds while it runs."""

    cpus: float = 1
    """Cores; also the number of torch threads (rounded down, at least 1)."""
    gpus: float = 0
    """GPUs; a fraction shares one."""

    @property
    def threads(self) -> int:
        """Torch threads of a trial."""
        return max(1, int(self.cpus))


@dataclass(frozen=True, kw_only=True)
class Faults:
    """What a study does about processes and nodes that die."""

    max_failures: int = 3
    """How often a trial is started again after its process or node went, in one run of the study; at least 0."""
    checkpoint_seconds: float = 30
    """A trial's state is kept this often, so that at most this (and the epoch in progress) is trained again."""

    def __post_init__(self) -> None:
        if self.max_failures < 0:
            raise ValueError(f"max_failures is {self.max_failures}; give a number of at least 0")
        if not self.checkpoint_seconds >= 0:
            raise ValueError(f"checkpoint_seconds is {self.checkpoint_seconds}; give a number of at least 0")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where the trials run and what Ray may use of it."""

    address: str | None = None
    """Address of a running cluster (`auto`: the one on this machine); None: start Ray here, with all cores."""
    max_concurrent: int | None = None
    """Trials side by side; None: as many as the resources hold."""
    log: Path | None = None
    """File for what Ray logs, and for what goes to file number 2 of this process once it works; None: no file."""
    resume: str | None = None
    """Command that goes on: where a head is lost, this process says so and ends; None: Ray ends it in its own way."""


@dataclass(frozen=True, kw_only=True)
class RowRecipe:
    """How the jobs of one row are trained."""

    trainable: str
    """`module:function`, importable on the workers, with the signature of `trainables.trial.run`."""
    model: str
    """File in trainables/models, or `baseline`."""
    base: Mapping[str, Any]
    """Configuration under each job's own fields."""
    version: int = 1
    """Of the model's code, see `trainables.interface`."""
    space: Space | None = None
    """What drawn jobs are drawn from."""
    search: SearchSpec | None = None
    """How they are drawn."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What all jobs of a part share."""

    experiment: str
    home: Path
    """Folder of the study; workers can write there."""
    rows: Mapping[str, RowRecipe]
    selection: Selection
    """Metric that selects, the same for all rows, and its direction."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """On every run; whether an old result still counts does not depend on them, see `study.engine.fingerprint`."""
    resources: Resources = field(default_factory=Resources)
    faults: Faults = field(default_factory=Faults)
    cluster: Cluster = field(default_factory=Cluster)
    tracking_uri: str | None = None
    """MLflow store; None: a SQLite file in the home folder."""
    planned: Collection[str] | None = None
    """All trials that the plan asks for in this part, those that this call leaves alone included; None: its jobs."""


def trial_name(number: int) -> str:
    """A search job's name, from the number that Optuna gives its trial: `0007`."""
    return f"{number:04d}"
