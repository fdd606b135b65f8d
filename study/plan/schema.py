"""Plans: what a study is made from, as frozen dataclasses. `study.plan.load` reads them from YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any

from features.domains.domain import DomainSpec
from features.encoders.spec import EncoderSpec
from features.errors import InputError
from features.extraction.spec import FeatureSpec
from features.factorisation import FactorSpec
from features.images.gather import ImageSpec
from features.pseudo.generator import GeneratorSpec
from features.reviews import ReviewSpec
from features.simulate.simulator import SimulateSpec
from search_spaces import Space, load_space
from study.specs import ARROW, GRID, Cell, Faults, Resources, SearchSpec
from trainables.interface import OURS, Selection, load_model, make_config
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
    reviews: ReviewSpec | None = None  # words of reviews, for models that read them (CATN, OmniMatch)


@dataclass(frozen=True, kw_only=True)
class SplitPlan:
    """What all cells' splits share."""

    validation_share: float = 0.2  # of the overlapping users that are not test users
    data_seed: int = 0
    clip: bool = True  # predictions are cut to the rating scale before their errors are taken

    def __post_init__(self) -> None:
        self.at(0.5)  # has the checks

    def at(self, ratio: float) -> SplitSpec:
        """The split of a cell."""
        shared = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return SplitSpec(cold_ratio=ratio, **shared)


@dataclass(frozen=True, kw_only=True)
class SequencePlan:
    """What all cells' sequences share, see `trainables.tasks.sequential`."""

    users: str | None = None  # file that says which users train, validate and test; None: drawn by C2DSR's rule
    columns: Mapping[str, str] = field(default_factory=dict)  # user_id and split -> their names in that file
    protocols: tuple[str, ...] = PROTOCOLS
    rank_seen: str = "last"
    negatives: int = 999
    validation_share: float = 0.1
    test_share: float = 0.1
    data_seed: int = 0
    unlisted: str = "refuse"  # users whom the file of users does not name: refuse | train

    def __post_init__(self) -> None:
        self.at(1.0)  # has the checks

    def at(self, ratio: float) -> SequenceSpec:
        """The sequences of a cell."""
        shared = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        del shared["users"], shared["columns"]
        return SequenceSpec(overlap_ratio=ratio, **shared)


OF_TASK_TYPE = {  # keys of a plan that models of one task type alone read; the first holds the rules of its splits
    "ratings": ("split", "features.ratings", "features.reviews", "cold_ratios"),
    "sequences": ("sequences", "features.pseudo", "overlap_ratios"),
}


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """One field varied, everything else as where it starts: the cell's best, the row's base, or a run's configuration.

    `cold_ratio` or `overlap_ratio` is the cell's own: other cells are trained, with the best of the plan's one ratio.
    """

    values: tuple[Any, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    start: str = "best"  # best | base | id of an MLflow run
    models: tuple[str, ...] = ()  # rows that are swept; the word `all` in a plan: every row; empty: the subject alone
    compare: str = "validation"  # users whom the values are compared on: validation | test


@dataclass(frozen=True, kw_only=True)
class AblationPlan:
    """Variants of the configuration that it starts from, beside the full model."""

    variants: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    start: str = "best"  # as of a sweep
    models: tuple[str, ...] = ()  # rows of the subject's model that are ablated; empty: the subject alone
    compare: str = "validation"  # as of a sweep


@dataclass(frozen=True, kw_only=True)
class ScorePlan:
    """Scores on test users; sweeps and ablations read them where they say `compare: test`."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)


@dataclass(frozen=True, kw_only=True)
class RowSearchPlan:
    """What a rival's search has other than the subject's; tables say it where it has less."""

    trials: int  # configurations per cell; 0: none, the row's own setting is scored


@dataclass(frozen=True, kw_only=True)
class RowPlan:
    """A rival: searched and scored like the subject, in the same cells, with the same budget and seeds."""

    model: str | None = None  # a file in trainables/models; None: the row's name is the model's
    preset: str = OURS  # of its model's PRESETS
    space: str | None = None  # as of the plan; needed for a search
    base: Mapping[str, Any] = field(default_factory=dict)  # as of the plan
    search: RowSearchPlan | None = None  # None: as the subject's
    title: str | None = None  # what tables call the row; None: the model's NAME
    published: bool = True  # false: not the system that papers print; no printed row and no claim is its own


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the study's table: a model, its space, base and search; the subject, or one of its rivals."""

    name: str
    model: str
    title: str
    space: str | None
    base: Mapping[str, Any]
    search: SearchSpec | None
    place: str  # of its keys in the plan: empty for the subject, else `compare.<name>.`
    preset: str = OURS
    published: bool = True

    @property
    def shared(self) -> dict[str, Any]:
        """The fields of the preset, under those of `base` that hold in every cell."""
        preset = {} if self.preset == OURS else load_model(self.model).PRESETS[self.preset]
        return {**preset, **{name: value for name, value in self.base.items() if ARROW not in name}}

    @property
    def preset_tag(self) -> str:
        """The preset, and the fields that `base` sets over it: `ours`, `paper`, `paper+lr+steps`."""
        own = [] if self.preset == OURS else sorted(name for name in self.base if ARROW not in name)
        return "+".join([self.preset, *own])

    def of_cell(self, cell: Cell) -> Mapping[str, Any]:
        """The fields of `base` that hold in this cell alone."""
        fields_of_cell: Mapping[str, Any] = self.base.get(cell.name, {})
        return fields_of_cell

    @property
    def config(self) -> dict[str, Any]:
        """Every field of the model's config: the shared fields of `base` over the preset over the defaults."""
        return asdict(make_config(self.model, self.shared, f"{self.place}base"))

    def search_with_first_point(self) -> SearchSpec | None:
        """The search with its first trials: the plan's points, else the row's own setting, as far as it lies in the space.

        So no row is worse than its published setting for lack of luck. A grid holds every configuration anyway.
        """
        space = self.load_space()
        if self.search is None or space is None or self.search.points_to_evaluate or self.search.sampler == GRID:
            return self.search
        return replace(self.search, points_to_evaluate=(space.within(self.config),))

    def load_space(self) -> Space | None:
        """The search space, or None."""
        config_class: Any = load_model(self.model).Config
        names = [entry.name for entry in fields(config_class)]
        return load_space(self.space, names) if self.space else None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole study: a subject, whose paper, figures, sweeps, ablations and claims it is about, and its rivals."""

    name: str  # MLflow experiment; letters, digits, - and _
    model: str  # the subject: a file in trainables/models
    domains: Mapping[str, DomainSpec]
    tasks: tuple[tuple[str, str], ...]  # source, target
    cold_ratios: tuple[float, ...] = ()  # of ratings: shares of the overlapping users that are test users, in (0, 1)
    overlap_ratios: tuple[
        float, ...
    ] = ()  # of sequences: shares of the training overlapping users that keep their link
    space: str | None = None  # e.g. music/paper; needed for a search
    preset: str = OURS  # of the model's PRESETS, e.g. paper; ours: the defaults
    base: Mapping[str, Any] = field(default_factory=dict)  # config fields other than the preset's; see study.plan.start
    compare: Mapping[str, RowPlan] = field(default_factory=dict)  # row -> rival
    split: SplitPlan = field(default_factory=SplitPlan)  # of ratings
    sequences: SequencePlan = field(default_factory=SequencePlan)  # in the place of split, for models of sequences
    most_shared: float = 0.05  # share of the shared users' target interactions that may stand in the source as they are
    features: FeaturesPlan = field(default_factory=FeaturesPlan)
    simulate: SimulateSpec | None = None  # the data folder is made by the simulator instead of given
    search: SearchSpec | None = None
    sweeps: Mapping[str, SweepPlan] = field(default_factory=dict)
    ablate: AblationPlan | None = None
    score: ScorePlan | None = None
    published: str | None = None  # numbers that the tables lay beside the measured ones, e.g. lgcd/food-kitchen
    resources: Resources = field(default_factory=Resources)
    faults: Faults = field(default_factory=Faults)
    note: str = ""  # what readers of its numbers have to know, e.g. what its data lacks
    tracking_uri: str | None = None  # MLflow store; default: a SQLite file in the home folder

    @property
    def ratios(self) -> tuple[float, ...]:
        """Those of the cells, cold or overlap ratios by task type."""
        ratios: tuple[float, ...] = getattr(self, f"{self.ratio_field}s")
        return ratios

    @property
    def ratio_field(self) -> str:
        """`cold_ratio` or `overlap_ratio`, as a sweep over the cells' ratio is named."""
        return f"{self.task_type.ratio}_ratio"

    @property
    def cells(self) -> list[Cell]:
        """All cells, tasks first."""
        return [Cell(source=s, target=t, ratio=ratio) for s, t in self.tasks for ratio in self.ratios]

    @property
    def swept_cells(self) -> list[Cell]:
        """Cells that a sweep of the ratio adds."""
        swept = self.sweeps[self.ratio_field].values if self.ratio_field in self.sweeps else ()
        cells = [Cell(source=s, target=t, ratio=ratio) for s, t in self.tasks for ratio in swept]
        return [cell for cell in cells if cell not in self.cells]

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The subject, named by its model, then its rivals."""
        subject = Row(
            name=self.model, model=self.model, title=titled(self.model, self.preset), space=self.space, base=self.base,
            search=self.search, place="", preset=self.preset,
        )  # fmt: skip
        return (subject, *(self._rival(name, rival) for name, rival in self.compare.items()))

    def _rival(self, name: str, rival: RowPlan) -> Row:
        model, search = rival.model or name, self.search
        if search is not None:  # points are of the subject's space
            trials = rival.search.trials if rival.search is not None else search.trials
            search = replace(search, trials=trials, points_to_evaluate=()) if trials else None
        return Row(
            name=name, model=model, title=rival.title or titled(model, rival.preset), space=rival.space, base=rival.base,
            search=search, place=f"compare.{name}.", preset=rival.preset, published=rival.published,
        )  # fmt: skip

    @property
    def subject(self) -> Row:
        """The row whose paper the study is about."""
        return self.rows[0]

    def row(self, name: str) -> Row:
        """The row of that name; InputError where there is none."""
        for row in self.rows:
            if row.name == name:
                return row
        raise InputError(
            f"plan {self.name}: has no row {name!r}; choose from {', '.join(row.name for row in self.rows)}"
        )

    @property
    def feature_set(self) -> str:
        """What trials read, but those of ablations that say otherwise: text, or by task type ratings | ids."""
        return "text" if self.features.text else {"ratings": "ratings", "sequences": "ids"}[self.task_type.name]

    @property
    def task_type(self) -> TaskType:
        """That of the subject's tasks, hence of all rows'."""
        return TASK_TYPES[load_model(self.model).TASK_TYPE]

    @property
    def baselines(self) -> tuple[str, ...]:
        """Simple baselines that can be scored: those that read titles need a text encoder."""
        needs = self.task_type.baseline_needs
        return tuple(
            name for name in self.task_type.baselines if self.features.text or "titles" not in needs.get(name, ())
        )

    @property
    def rules(self) -> SplitPlan | SequencePlan:
        """How the cells are split."""
        rules: SplitPlan | SequencePlan = getattr(self, OF_TASK_TYPE[self.task_type.name][0])
        return rules

    @property
    def selection(self) -> Selection:
        """Metric that selects, of all rows, and its direction."""
        selection: Selection = load_model(self.model).SELECTION
        return selection


def titled(model: str, preset: str) -> str:
    """What tables call a row that has no title of its own: the model's name, and its preset where that is not `ours`."""
    name = load_model(model).NAME
    return name if preset == OURS else f"{name} ({preset})"


def swept_rows(plan: Plan, parameter: str) -> list[Row]:
    """Rows whose sensitivity a sweep shows: those that it names, else the subject."""
    names = plan.sweeps[parameter].models
    return [row for row in plan.rows if row.name in names] if names else [plan.subject]


def ablated_rows(plan: Plan) -> list[Row]:
    """Rows that the part `ablate` takes apart: those that it names, else the subject."""
    names = plan.ablate.models if plan.ablate else ()
    return [row for row in plan.rows if row.name in names] if names else [plan.subject]
