"""Plans: what a study is made from, as frozen dataclasses. `study.plan.load` reads them from YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from features.domains.domain import DomainSpec
from features.encoders.encoder import EncoderSpec
from features.extraction.extract import FeatureSpec
from features.factorisation import FactorSpec
from features.images.gather import ImageSpec
from features.pseudo.generator import GeneratorSpec
from features.simulate.simulator import SimulateSpec
from search_spaces import Space, load_space
from study.plan.start import ARROW
from study.specs import RATIO, Cell, Faults, Resources, SearchSpec
from trainables.interface import load_model, make_config
from trainables.task_types import TASK_TYPES, TaskType
from trainables.tasks.rating_build import SplitSpec
from trainables.tasks.sequential import PROTOCOLS, SequenceSpec


@dataclass(frozen=True, kw_only=True)
class ItemsPlan:
    """Items' own encoder; the paper's sees their images."""

    encoder: EncoderSpec
    prompt: str = "key-features-1"  # name in features.extraction.prompts.PROMPTS
    images: ImageSpec = field(default_factory=ImageSpec)  # read where the encoder sees

    @property
    def spec(self) -> FeatureSpec:
        """Specification of the table."""
        return FeatureSpec(kind="items", encoder=self.encoder, prompt=self.prompt, images=self.images)


@dataclass(frozen=True, kw_only=True)
class TextPlan:
    """Vectors by a language model (MuSiC section 3.2)."""

    encoder: EncoderSpec
    users: str = "review_mean"  # or concat, see features.extraction.extract
    max_reviews: int = 0  # newest reviews of a user that are read; 0: all
    items: ItemsPlan | None = None  # None: items are read by `encoder` too

    def __post_init__(self) -> None:
        self.spec("users")  # has the checks
        self.spec("items")

    def spec(self, kind: str) -> FeatureSpec:
        """Specification of the table of `items` or `users`."""
        if kind == "items" and self.items is not None:
            return self.items.spec
        if kind == "items":
            return FeatureSpec(kind="items", encoder=self.encoder)
        return FeatureSpec(kind="users", encoder=self.encoder, users=self.users, max_reviews=self.max_reviews)


@dataclass(frozen=True, kw_only=True)
class FeaturesPlan:
    """What vectors the models work with: `text` where it is given, else rating-based ones ("w/o MLLM")."""

    text: TextPlan | None = None
    pseudo: GeneratorSpec | None = None  # texts of items of the other domain, for users of one (LGCD eqs. 4-6)
    ratings: FactorSpec = field(default_factory=FactorSpec)

    @property
    def main(self) -> str:
        """Flavour that search, sweeps and scores use: text | ratings."""
        return "text" if self.text else "ratings"


@dataclass(frozen=True, kw_only=True)
class SplitPlan:
    """What all cells' splits share."""

    validation_share: float = 0.2  # of the overlapping users that are not test users
    data_seed: int = 0

    def __post_init__(self) -> None:
        self.at(0.5)  # has the checks

    def at(self, ratio: float) -> SplitSpec:
        """The split of a cell."""
        return SplitSpec(cold_ratio=ratio, validation_share=self.validation_share, data_seed=self.data_seed)


@dataclass(frozen=True, kw_only=True)
class SequencePlan:
    """What all cells' sequences share, see `trainables.tasks.sequential`."""

    users: str | None = None  # file that says which users train, validate and test; None: drawn by C2DSR's rule
    columns: Mapping[str, str] = field(default_factory=dict)  # user_id and split -> their names in that file
    protocols: tuple[str, ...] = PROTOCOLS
    negatives: int = 999
    validation_share: float = 0.1
    test_share: float = 0.1
    data_seed: int = 0

    def __post_init__(self) -> None:
        self.at(1.0)  # has the checks

    def at(self, ratio: float) -> SequenceSpec:
        """The sequences of a cell."""
        shared = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        del shared["users"], shared["columns"]
        return SequenceSpec(overlap_ratio=ratio, **shared)


OF_TASK_TYPE = {  # keys of a plan that only one kind of model reads; the first holds the rules of its splits
    "ratings": ("split", "features.ratings"),
    "sequences": ("sequences", "features.pseudo"),
}


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """One field varied, everything else as where it starts: the cell's best, the plan's base, or a run's configuration.

    The field `ratio` is the cell's own: other cells are trained, with the best of the plan's one ratio.
    """

    values: tuple[Any, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    start: str = "best"  # best | base | id of an MLflow run


@dataclass(frozen=True, kw_only=True)
class AblationPlan:
    """Variants of the configuration that it starts from, beside the full model."""

    variants: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    start: str = "best"  # as of a sweep


@dataclass(frozen=True, kw_only=True)
class ScorePlan:
    """The only part that reads test data."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole study."""

    name: str  # MLflow experiment; letters, digits, - and _
    model: str  # a file in trainables/models
    domains: Mapping[str, DomainSpec]
    tasks: tuple[tuple[str, str], ...]  # source, target
    ratios: tuple[float, ...]  # cold ratios, each between 0 and 1; of sequences overlap ratios, up to 1
    space: str | None = None  # e.g. music/paper; needed for a search
    base: Mapping[str, Any] = field(
        default_factory=dict
    )  # config fields that are not the default; see study.plan.start
    split: SplitPlan = field(default_factory=SplitPlan)  # of ratings
    sequences: SequencePlan = field(default_factory=SequencePlan)  # in the place of split, for models of sequences
    features: FeaturesPlan = field(default_factory=FeaturesPlan)
    simulate: SimulateSpec | None = None  # the data folder is made by the simulator instead of given
    search: SearchSpec | None = None
    sweeps: Mapping[str, SweepPlan] = field(default_factory=dict)
    ablate: AblationPlan | None = None
    score: ScorePlan | None = None
    published: str | None = None  # numbers that the tables lay beside the measured ones, e.g. lgcd/food-kitchen
    resources: Resources = field(default_factory=Resources)
    faults: Faults = field(default_factory=Faults)
    tracking_uri: str | None = None  # MLflow store; default: a SQLite file in the home folder

    @property
    def cells(self) -> list[Cell]:
        """All cells, tasks first."""
        return [Cell(source=s, target=t, ratio=ratio) for s, t in self.tasks for ratio in self.ratios]

    @property
    def swept_cells(self) -> list[Cell]:
        """Cells that a sweep of the ratio adds."""
        swept = self.sweeps[RATIO].values if RATIO in self.sweeps else ()
        cells = [Cell(source=s, target=t, ratio=ratio) for s, t in self.tasks for ratio in swept]
        return [cell for cell in cells if cell not in self.cells]

    @property
    def task_type(self) -> TaskType:
        """Of the model's tasks."""
        return TASK_TYPES[load_model(self.model).TASK_TYPE]

    @property
    def rules(self) -> SplitPlan | SequencePlan:
        """How the cells are split."""
        found: SplitPlan | SequencePlan = getattr(self, OF_TASK_TYPE[self.task_type.name][0])
        return found

    @property
    def shared(self) -> dict[str, Any]:
        """The fields of `base` that are of every cell."""
        return {name: value for name, value in self.base.items() if ARROW not in name}

    @property
    def by_cell(self) -> dict[str, Mapping[str, Any]]:
        """Cell -> the fields of `base` that are of this cell alone."""
        return {cell.name: self.base.get(cell.name, {}) for cell in self.cells}

    @property
    def config(self) -> dict[str, Any]:
        """Every field of the model's config: the shared fields of `base` over the defaults."""
        return asdict(make_config(self.model, self.shared, f"plan {self.name}: base"))

    def load_space(self) -> Space | None:
        """The search space, or None."""
        names = [entry.name for entry in fields(load_model(self.model).Config)]
        return load_space(self.space, names) if self.space else None

    @property
    def selection(self) -> tuple[str, Any]:
        """Metric that selects and its direction."""
        metric, direction = load_model(self.model).SELECTION
        return metric, direction
