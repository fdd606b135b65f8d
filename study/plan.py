"""Plans: the YAML that a study is made from, bound to dataclasses. All faults of a file are reported at once."""

from __future__ import annotations

import difflib
import random
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from features.domain import DomainSpec
from features.encoder import EncoderSpec
from features.errors import InputError
from features.extract import FeatureSpec
from features.factorisation import FactorSpec
from features.generator import GeneratorSpec
from features.images import ImageSpec
from features.simulate import SimulateSpec
from search_spaces import Space, SpaceError, load_space, parse_yaml
from study.engine.search_checks import check_search
from study.jobs import RATIO, Cell, Faults, Objective, Resources, SearchSpec
from study.published import load_published
from study.starts import ARROW, base_faults, fault_of, read_base
from trainables.door import load_model, make_config, number_hint
from trainables.kinds import KINDS, Kind
from trainables.sequences import PROTOCOLS, SequenceSpec
from trainables.task import SplitSpec

FOLDER = Path(__file__).parent / "plans"
MOST_TRIALS = 100_000  # of a cell; each is a job in memory
MOST_SEED = 2**63 - 1  # that all generators take
_DRAWS = 200  # configurations of a space that are held against the model's config


class PlanError(InputError):
    """Everything that is wrong with a plan, one line each."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(" ".join(fault.splitlines()) for fault in faults)
        super().__init__("\n".join(self.faults))


@dataclass(frozen=True, kw_only=True)
class ItemsPlan:
    """Items' own encoder; the paper's sees their images."""

    encoder: EncoderSpec
    prompt: str = "key-features-1"  # name in features.prompts.PROMPTS
    images: ImageSpec = field(default_factory=ImageSpec)  # read where the encoder sees

    @property
    def spec(self) -> FeatureSpec:
        """Specification of the table."""
        return FeatureSpec(kind="items", encoder=self.encoder, prompt=self.prompt, images=self.images)


@dataclass(frozen=True, kw_only=True)
class TextPlan:
    """Vectors by a language model (MuSiC section 3.2)."""

    encoder: EncoderSpec
    users: str = "review_mean"  # or concat, see features.extract
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
        return SplitSpec(ratio=ratio, validation_share=self.validation_share, data_seed=self.data_seed)


@dataclass(frozen=True, kw_only=True)
class SequencePlan:
    """What all cells' sequences share, see `trainables.sequences`."""

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
        return SequenceSpec(ratio=ratio, **{name: shared[name] for name in shared if name not in ("users", "columns")})


OF_KIND = {  # keys of a plan that only one kind of model reads; the first holds the rules of its splits
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
    base: Mapping[str, Any] = field(default_factory=dict)  # config fields that are not the default; see study.starts
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
    def kind(self) -> Kind:
        """Of the model's tasks."""
        return KINDS[load_model(self.model).KIND]

    @property
    def rules(self) -> SplitPlan | SequencePlan:
        """How the cells are split."""
        found: SplitPlan | SequencePlan = getattr(self, OF_KIND[self.kind.name][0])
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


def shipped_plans() -> list[str]:
    """Names of the plans that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def full_name(name_or_path: str) -> str:
    """What `load_plan` takes in any folder: a shipped plan's name, or the file's whole path."""
    return name_or_path if name_or_path in shipped_plans() else str(Path(name_or_path).absolute())


def load_plan(name_or_path: str) -> Plan:
    """Read a shipped plan by name, or a YAML file. Raises PlanError with every fault, those of its space included."""
    path = FOLDER / f"{name_or_path}.yaml"
    if name_or_path not in shipped_plans():
        path = Path(name_or_path)
        if not path.is_file():
            raise PlanError(
                [f"plan {name_or_path!r}: no such file or shipped plan; shipped: {', '.join(shipped_plans())}"]
            )
    place = path.name
    try:
        document = parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PlanError([f"{place}: not readable as YAML ({' '.join(str(error).split())}); mend the file"]) from error
    faults: list[str] = []
    try:
        document = read_base(document, path)
    except InputError as error:
        raise PlanError([str(error)]) from error
    if isinstance(document, Mapping) and isinstance(document.get("domains"), Mapping):
        named = {
            key: {"name": key, **body} if isinstance(body, Mapping) else body
            for key, body in document["domains"].items()
        }
        document = {**document, "domains": named}
    plan = _bind(Plan, document, place, faults)
    if isinstance(plan, Plan) and not faults:
        faults = _checks(plan, document, place)
    if faults:
        raise PlanError(list(dict.fromkeys(faults)))
    assert isinstance(plan, Plan)
    return plan


def _checks(plan: Plan, document: Mapping[str, Any], place: str) -> list[str]:
    """What no single field can know."""
    faults = _caught(lambda: load_model(plan.model), place)
    known = not faults
    if known:
        faults += _kind_checks(plan, document, place)
    if not _is_plain(plan.name):
        faults.append(f"{place}: name is {_shown(plan.name)}; use letters, digits, - and _, at most 100")
    for task in plan.tasks:
        faults += [
            f"{place}: tasks: unknown domain {name!r} in {list(task)}; known: {', '.join(plan.domains) or 'none'}"
            for name in task
            if name not in plan.domains
        ]
        if task[0] == task[1]:
            faults.append(f"{place}: tasks: source and target are both {task[0]!r}; name two domains")
    for name, found in (("tasks", plan.tasks), ("ratios", plan.ratios)):
        if not found:
            faults.append(f"{place}: {name} is empty; give at least one")
        elif len(set(found)) < len(found):
            faults.append(f"{place}: {name} holds a value twice; give each once")
    for ratio in plan.ratios if known else ():
        faults += _caught(lambda ratio=ratio: plan.rules.at(ratio), f"{place}: ratios")
    if len({f"{ratio:g}" for ratio in plan.ratios}) < len(set(plan.ratios)):
        faults.append(f"{place}: ratios are {list(plan.ratios)}; names keep 6 digits, so two of these are one cell")
    if plan.simulate:
        faults += _simulated_files(plan, place)
    if plan.published is not None:
        tasks = [f"{source}->{target}" for source, target in plan.tasks]
        faults += _caught(lambda: load_published(str(plan.published)).check(tasks), f"{place}: published")
    if not known:
        return faults
    wrong_base = base_faults(plan, place)
    faults += wrong_base + _space_checks(plan, place, whole=not wrong_base)
    if not wrong_base:
        faults += _part_checks(plan, place)
    return faults


def _is_plain(name: str) -> bool:
    """Whether a plan may have the name, which becomes a file name."""
    return name.replace("-", "").replace("_", "").isalnum() and name.isascii() and len(name) <= 100


def _kind_checks(plan: Plan, document: Mapping[str, Any], place: str) -> list[str]:
    """What only models of another kind read, and what this kind cannot do without."""
    kind = plan.kind.name
    features = document.get("features") or {}
    given = {*document, *(f"features.{key}" for key in features)}
    faults = [
        f"{place}: {key} is for models of {other}, and {plan.model} is one of {kind}; leave it out"
        for other, keys in OF_KIND.items()
        for key in keys
        if other != kind and key in given
    ]
    if kind == "sequences" and plan.features.text is None:
        faults.append(f"{place}: features.text is missing, and {plan.model} reads titles; set its encoder")
    return faults


def _simulated_files(plan: Plan, place: str) -> list[str]:
    """The simulator's files against those that the domains read."""
    assert plan.simulate is not None
    made = {
        "interactions": [f"{name}.jsonl.gz" for name in plan.simulate.domains],
        "items": [f"meta_{name}.jsonl.gz" for name in plan.simulate.domains],
    }
    return [
        f"{place}: domains.{spec.name}.{key} is {file!r}, which `simulate` does not write; it writes {', '.join(made[key])}"
        for spec in plan.domains.values()
        for key, file in (("interactions", spec.interactions), ("items", spec.items))
        if file is not None and file not in made[key]
    ]


def _space_checks(plan: Plan, place: str, *, whole: bool) -> list[str]:
    """The space's own faults; then, over a faultless base, what the model's config says of configurations drawn from it."""
    try:
        space = plan.load_space()
    except SpaceError as error:
        return list(error.faults)
    if space is None or not whole:
        return []
    ends: Any = _Ends(random.Random(0))
    drawn = [space.suggest(ends) for _ in range(_DRAWS)]
    faults = [
        _caught(lambda d=d: make_config(plan.model, {**plan.shared, **d}, f"space {plan.space}"), "") for d in drawn
    ]
    return next((lines for lines in faults if lines), [])  # one drawn configuration says it; others differ in numbers


def _space_or_none(plan: Plan) -> Space | None:
    try:
        return plan.load_space()
    except SpaceError:
        return None  # which `_space_checks` says


@dataclass(frozen=True)
class _Ends:
    """In the place of an Optuna trial: draws choices, and the ends of ranges."""

    generator: random.Random

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self.generator.choice(choices)

    def suggest_int(self, name: str, low: int, high: int, **how: Any) -> int:
        return self.generator.choice((low, high))

    def suggest_float(self, name: str, low: float, high: float, **how: Any) -> float:
        return self.generator.choice((low, high))


def _part_checks(plan: Plan, place: str) -> list[str]:
    """Parts against the model."""
    faults = []
    ablations = load_model(plan.model).ABLATIONS
    starts = {f"sweeps.{parameter}": sweep.start for parameter, sweep in plan.sweeps.items()}
    starts |= {"ablate": plan.ablate.start} if plan.ablate else {}
    faults += [f"{place}: {part}.start is {fault}" for part, start in starts.items() if (fault := fault_of(start))]
    for parameter, sweep in plan.sweeps.items():
        if not sweep.values or any(value in sweep.values[:i] for i, value in enumerate(sweep.values)):
            shown = _shown(list(sweep.values))
            faults.append(f"{place}: sweeps.{parameter}.values is {shown}; give at least one, each once")
        for value in sweep.values if parameter != RATIO else ():
            values = {**plan.shared, parameter: value}
            faults += _caught(lambda v=values, p=parameter: make_config(plan.model, v, f"{place}: sweeps.{p}"), "")
    if RATIO in plan.sweeps:
        faults += _ratio_checks(plan, plan.sweeps[RATIO].values, f"{place}: sweeps.{RATIO}")
    variants = plan.ablate.variants if plan.ablate else ("",)
    if not variants or len(set(variants)) < len(variants):
        faults.append(f"{place}: ablate.variants is {_shown(list(variants))}; give at least one, each once")
    for variant in plan.ablate.variants if plan.ablate else ():
        if variant not in ablations:
            known = ", ".join(ablations)
            faults.append(f"{place}: ablate.variants: unknown {variant!r}; {plan.model} has {known}")
    for name, seeds in _seeds(plan):
        if not seeds or len(set(seeds)) < len(seeds):
            faults.append(f"{place}: {name} is {list(seeds)}; give at least one, each once")
        if not all(0 <= seed <= MOST_SEED for seed in seeds):
            shown = _shown(list(seeds) if name.endswith("seeds") else seeds[0])
            faults.append(f"{place}: {name} is {shown}; give whole numbers from 0 to {MOST_SEED}")
    if plan.search:
        faults += [f"{place}: {fault}" for fault in _search_checks(plan, plan.search)]
    if plan.resources.cpus <= 0 or plan.resources.gpus < 0:
        faults.append(f"{place}: resources are {plan.resources}; give cpus above 0, gpus of at least 0")
    return faults


def _search_checks(plan: Plan, search: SearchSpec) -> list[str]:
    """The search against its space, without the plan's name."""
    faults = []
    if plan.space is None:
        faults.append("search needs a space; set `space`, e.g. music/paper")
    if not 1 <= search.trials <= MOST_TRIALS:
        faults.append(f"search.trials is {search.trials}; give 1 to {MOST_TRIALS:,}")
    if search.warm_start is not None and not _is_plain(search.warm_start.plan):
        faults.append(f"search.warm_start.plan is {_shown(search.warm_start.plan)}; give the name of a plan")
    if search.objectives:
        faults += _objective_faults(plan, search.objectives)
    return faults + check_search(search, _space_or_none(plan)) if search.seed >= 0 and not faults else faults


def _objective_faults(plan: Plan, objectives: Sequence[Objective]) -> list[str]:
    """Metrics that the model's kind measures on validation, each in its own direction, the selecting one among them."""
    ways = {"lower": "minimize", "higher": "maximize"}
    groups = ["", *(f"_{group}" for group in plan.kind.groups if group)]
    known = {f"val_{metric.name}{group}": ways[metric.better] for metric in plan.kind.metrics for group in groups}
    known |= {plan.selection[0]: plan.selection[1], "seconds": "minimize"}
    faults = []
    for number, objective in enumerate(objectives):
        place = f"search.objectives[{number}]"
        if objective.metric not in known:
            faults.append(f"{place}.metric is {_shown(objective.metric)}; choose from {', '.join(known)}")
        elif objective.direction != known[objective.metric]:
            shown = _shown(objective.direction)
            faults.append(f"{place}.direction is {shown}; {objective.metric} is to {known[objective.metric]}")
    names = [objective.metric for objective in objectives]
    if len(names) < 2 or len(set(names)) < len(names) or plan.selection[0] not in names:
        faults.append(f"search.objectives are {names}; give two or more, each once, {plan.selection[0]} among them")
    return faults


def _seeds(plan: Plan) -> list[tuple[str, tuple[int, ...]]]:
    parts = {"search": plan.search, "ablate": plan.ablate, "score": plan.score}
    single = {
        f"{OF_KIND[plan.kind.name][0]}.data_seed": plan.rules.data_seed,
        "features.ratings.seed": plan.features.ratings.seed,
    }
    if plan.search:
        single["search.seed"] = plan.search.seed
    return [
        *((f"{name}.seeds", part.seeds) for name, part in parts.items() if part is not None),
        *((f"sweeps.{name}.seeds", sweep.seeds) for name, sweep in plan.sweeps.items()),
        *((name, (seed,)) for name, seed in single.items()),
    ]


def _ratio_checks(plan: Plan, values: Sequence[Any], place: str) -> list[str]:
    """A sweep of the ratio: its values are ratios, and it starts from the one ratio of the plan."""
    faults = []
    if len(plan.ratios) > 1:
        faults.append(f"{place}: starts from the best of one ratio, but ratios are {list(plan.ratios)}; keep one")
    for value in values:
        faults += _caught(lambda value=value: plan.rules.at(value), place)
    numbers = [value for value in values if isinstance(value, int | float)]
    if not faults and len({f"{value:g}" for value in numbers}) < len(numbers):
        faults.append(f"{place}: names keep 6 digits, so two of {list(values)} are one cell; keep one of them")
    return faults


def _caught(check: Any, place: str) -> list[str]:
    try:
        check()
    except InputError as error:
        return [f"{place}: {error}" if place else str(error)]
    return []


# --- binding ------------------------------------------------------------------------------------------------------


def _bind(kind: Any, value: Any, place: str, faults: list[str]) -> Any:
    """`value` as an object of type `kind`; what does not fit goes into `faults`."""
    if is_dataclass(kind):
        return _bind_dataclass(kind, value, place, faults)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _bind(arguments[0], value, place, faults)
    if origin is typing.Literal:
        if value not in arguments:
            faults.append(f"{place} is {_shown(value)}; choose from {', '.join(arguments)}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            faults.append(f"{place} is {_shown(value)}; give a list")
            return ()
        if arguments[-1] is not Ellipsis:
            if len(value) != len(arguments):
                faults.append(f"{place} is {_shown(value)}; give a list of {len(arguments)}")
                return ()
            kinds = arguments
        else:
            kinds = (arguments[0],) * len(value)
        return tuple(_bind(k, v, f"{place}[{i}]", faults) for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            faults.append(f"{place} is {_shown(value)}; give a mapping")
            return {}
        return {_name(key, place, faults): _bind(arguments[1], v, f"{place}.{key}", faults) for key, v in value.items()}
    return _bind_scalar(kind, value, place, faults)


def _bind_dataclass(kind: Any, value: Any, place: str, faults: list[str]) -> Any:
    if not isinstance(value, Mapping):
        faults.append(f"{place} is {_shown(value)}; give a mapping")
        return None
    hints = typing.get_type_hints(kind)
    dot = "." if " " in place or ": " in place else ": "
    before = len(faults)
    bound: dict[str, Any] = {}
    for key, entry in value.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), list(hints), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(hints)}"
            faults.append(f"{place}{dot}unknown key {_shown(key)}; {hint}")
        else:
            bound[key] = _bind(hints[key], entry, f"{place}{dot}{key}", faults)
    for entry in fields(kind):
        if entry.name not in value and entry.default is MISSING and entry.default_factory is MISSING:
            faults.append(f"{place}{dot}{entry.name} is missing; set it")
    if len(faults) > before:
        return None
    try:
        return kind(**bound)
    except (InputError, ValueError) as error:
        faults.append(f"{place}: {error}")
        return None


def _bind_scalar(kind: Any, value: Any, place: str, faults: list[str]) -> Any:
    if kind is Any:
        return value
    accepted = {int: int, float: (int, float), str: str, bool: bool}[kind]
    if (isinstance(value, bool) and kind is not bool) or not isinstance(value, accepted):  # type: ignore[arg-type]
        faults.append(f"{place} is {_shown(value)}; give a value of type {kind.__name__}{number_hint(value)}")
        return None
    if kind is float and not float("-inf") < value < float("inf"):
        faults.append(f"{place} is {value}; give a finite number")
        return None
    return value


def _name(key: Any, place: str, faults: list[str]) -> str:
    if not isinstance(key, str):
        faults.append(f"{place}: key {_shown(key)} is not text; quote it")
    return str(key)


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
