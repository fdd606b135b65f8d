"""What no single field of a plan can know: rules between fields, and against the model, its space and the papers."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from features.errors import InputError
from search_spaces import Space, SpaceError
from study.engine.search_checks import check_search
from study.papers.reader import load_published
from study.plan.binding import shown_value
from study.plan.schema import OF_TASK_TYPE, Plan
from study.plan.start import base_faults, fault_of
from study.specs import RATIO, Objective, SearchSpec
from trainables.interface import load_model, make_config

MOST_TRIALS = 100_000  # of a cell; each is a job in memory
MOST_SEED = 2**63 - 1  # that all generators take
_DRAWS = 200  # configurations of a space that are held against the model's config


def check_plan(plan: Plan, document: Mapping[str, Any], place: str) -> list[str]:
    """What no single field can know."""
    faults = _caught(lambda: load_model(plan.model), place)
    known = not faults
    if known:
        faults += _task_type_checks(plan, document, place)
    if not _is_plain(plan.name):
        faults.append(f"{place}: name is {shown_value(plan.name)}; use letters, digits, - and _, at most 100")
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


def _task_type_checks(plan: Plan, document: Mapping[str, Any], place: str) -> list[str]:
    """What only models of another kind read, and what this kind cannot do without."""
    kind = plan.task_type.name
    features = document.get("features") or {}
    given = {*document, *(f"features.{key}" for key in features)}
    faults = [
        f"{place}: {key} is for models of {other}, and {plan.model} is one of {kind}; leave it out"
        for other, keys in OF_TASK_TYPE.items()
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
            shown = shown_value(list(sweep.values))
            faults.append(f"{place}: sweeps.{parameter}.values is {shown}; give at least one, each once")
        for value in sweep.values if parameter != RATIO else ():
            values = {**plan.shared, parameter: value}
            faults += _caught(lambda v=values, p=parameter: make_config(plan.model, v, f"{place}: sweeps.{p}"), "")
    if RATIO in plan.sweeps:
        faults += _ratio_checks(plan, plan.sweeps[RATIO].values, f"{place}: sweeps.{RATIO}")
    variants = plan.ablate.variants if plan.ablate else ("",)
    if not variants or len(set(variants)) < len(variants):
        faults.append(f"{place}: ablate.variants is {shown_value(list(variants))}; give at least one, each once")
    for variant in plan.ablate.variants if plan.ablate else ():
        if variant not in ablations:
            known = ", ".join(ablations)
            faults.append(f"{place}: ablate.variants: unknown {variant!r}; {plan.model} has {known}")
    for name, seeds in _seeds(plan):
        if not seeds or len(set(seeds)) < len(seeds):
            faults.append(f"{place}: {name} is {list(seeds)}; give at least one, each once")
        if not all(0 <= seed <= MOST_SEED for seed in seeds):
            shown = shown_value(list(seeds) if name.endswith("seeds") else seeds[0])
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
        faults.append(f"search.warm_start.plan is {shown_value(search.warm_start.plan)}; give the name of a plan")
    if search.objectives:
        faults += _objective_faults(plan, search.objectives)
    return faults + check_search(search, _space_or_none(plan)) if search.seed >= 0 and not faults else faults


def _objective_faults(plan: Plan, objectives: Sequence[Objective]) -> list[str]:
    """Metrics that the model's kind measures on validation, each in its own direction, the selecting one among them."""
    ways = {"lower": "minimize", "higher": "maximize"}
    groups = ["", *(f"_{group}" for group in plan.task_type.groups if group)]
    known = {f"val_{metric.name}{group}": ways[metric.better] for metric in plan.task_type.metrics for group in groups}
    known |= {plan.selection[0]: plan.selection[1], "seconds": "minimize"}
    faults = []
    for number, objective in enumerate(objectives):
        place = f"search.objectives[{number}]"
        if objective.metric not in known:
            faults.append(f"{place}.metric is {shown_value(objective.metric)}; choose from {', '.join(known)}")
        elif objective.direction != known[objective.metric]:
            shown = shown_value(objective.direction)
            faults.append(f"{place}.direction is {shown}; {objective.metric} is to {known[objective.metric]}")
    names = [objective.metric for objective in objectives]
    if len(names) < 2 or len(set(names)) < len(names) or plan.selection[0] not in names:
        faults.append(f"search.objectives are {names}; give two or more, each once, {plan.selection[0]} among them")
    return faults


def _seeds(plan: Plan) -> list[tuple[str, tuple[int, ...]]]:
    parts = {"search": plan.search, "ablate": plan.ablate, "score": plan.score}
    single = {
        f"{OF_TASK_TYPE[plan.task_type.name][0]}.data_seed": plan.rules.data_seed,
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
