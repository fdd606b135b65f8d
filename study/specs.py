"""What the engine is asked to do: cells, jobs, and how a search draws. Frozen values, no behaviour."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Direction = Literal["minimize", "maximize"]
PREDICTOR = "predictor:"  # before the name of a simple predictor, as the name of its job
RATIO = "ratio"  # swept like a field: cells at other ratios, with the best configuration of the plan's own

# Names become tags, file names and MLflow filters; an alphabet without quotes, slashes or blanks needs no escaping.
_NAME = re.compile(r"[\w.:=,+-]+")


def _check_name(owner: str, value: str) -> None:
    if not _NAME.fullmatch(value):
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
        return f"{self.source}->{self.target}"

    @property
    def name(self) -> str:
        """`books->movies@0.2`."""
        return f"{self.task}@{self.ratio:g}"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One configuration in one cell, trained over its seeds in one trial."""

    part: str
    """`search`, `sweep:<field>`, `ablate` or `score`."""
    cell: Cell
    name: str
    """Unique within part and cell: `steps=10`, `wo_side`, `best`; of a search the trial number, see `trial_name`."""
    config: Mapping[str, Any] | None
    """Fields that differ from the base configuration; None: the searcher asks the cell's Optuna study."""
    seeds: tuple[int, ...]
    """Training seeds; their mean is the trial's result."""
    features: str
    """Key of the task folder's feature_set, e.g. `main` or `ratings`."""
    task_dir: str
    """Folder of task tensors, a path that workers can read."""
    score: bool = False
    """True only in `score`: the test folder is opened too."""
    test_dir: str | None = None
    """Folder of the test data; given exactly when `score` is true."""

    def __post_init__(self) -> None:
        _check_name("job part", self.part)
        _check_name("job name", self.name)
        if not self.seeds:
            raise ValueError(f"job {self.trial}: needs at least one seed")
        if self.score != (self.test_dir is not None):
            raise ValueError(f"job {self.trial}: test_dir belongs to score jobs and to them only, got {self.test_dir}")

    @property
    def trial(self) -> str:
        """`<part>/<cell>/<name>`: the identity that MLflow's tag `study.trial` holds."""
        return f"{self.part}/{self.cell.name}/{self.name}"


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
    """What a search may cost. When it is spent no further trial starts; those that run end as they would."""

    hours: float | None = None
    """Of searching by the clock, all calls together; None: any."""
    trial_hours: float | None = None
    """Sum over the trials of the time that each ran, over all cells; None: any."""


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
    """Seed of the sampler; trial n draws from (seed, n) alone, whatever ran before in this process."""
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
    dashboard: bool = False
    """Ray's dashboard; only for a Ray that is started here."""
    max_concurrent: int | None = None
    """Trials side by side; None: as many as the resources hold."""


def trial_name(number: int) -> str:
    """A search job's name, from the number that Optuna gives its trial: `0007`."""
    return f"{number:04d}"
