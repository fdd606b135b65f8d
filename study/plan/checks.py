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
from study.plan.schema import OF_TASK_TYPE, Plan, Row, swept_rows
from study.plan.start import WORDS, base_faults, fault_of
from study.specs import BASELINE, Objective, SearchSpec, is_name
from trainables.interface import OURS, load_model, make_config

N_K = "pseudo_items"  # config field
MOST_TRIALS = 100_000  # of a cell; each is a job in memory
MOST_SEED = 2**63 - 1  # that all generators take
COMPARE = ("validation", "test")
_DRAWS = 200  # configurations of a space that are held against the model's config


RESERVED_ROWS = (BASELINE, "baselines", "all")  # which tables call something else


def check_plan(plan: Plan, document: Mapping[str, Any], place: str) -> list[str]:
    """Return what no single field can know, a line a fault."""
    faults = _name_checks(plan, place) + _data_checks(plan, place)
    wrong_models = _model_checks(plan, place)
    if wrong_models:
        return faults + wrong_models
    wrong_presets = _preset_checks(plan, place)
    if wrong_presets:
        return faults + wrong_presets
    faults += _task_type_checks(plan, document, place) + _cell_checks(plan, place)
    if plan.simulate:
        faults += _simulated_files(plan, place)
    if plan.published is not None:
        faults += _published_checks(plan, place)
    if not all(is_name(domain) for task in plan.tasks for domain in task):
        return faults  # there are no such cells
    cells = [cell.name for cell in plan.cells]
    wrong_bases = {row.name: base_faults(row, cells, place) for row in plan.rows}
    for row in plan.rows:
        faults += wrong_bases[row.name] + _space_checks(row, place, whole=not wrong_bases[row.name])
    if not any(wrong_bases.values()):
        faults += _part_checks(plan, place) + _pseudo_item_checks(plan, place)
    return faults


def _name_checks(plan: Plan, place: str) -> list[str]:
    """The plan's name, and domains that its tasks name."""
    faults = []
    if not _is_plain(plan.name):
        faults.append(f"{place}: name is {shown_value(plan.name)}; use letters, digits, - and _, at most 100")
    faults += [
        f"{place}: domains: a domain is named {shown_value(name)}; use letters, digits and . : = , + - _ only"
        for name in plan.domains
        if not is_name(name)
    ]
    for task in plan.tasks:
        faults += [
            f"{place}: tasks: unknown domain {name!r} in {list(task)}; known: {', '.join(plan.domains) or 'none'}"
            for name in task
            if name not in plan.domains
        ]
        if task[0] == task[1]:
            faults.append(f"{place}: tasks: source and target are both {task[0]!r}; name two domains")
    return faults


def _data_checks(plan: Plan, place: str) -> list[str]:
    """What the plan's domains ask of its tasks."""
    faults = []
    if not 0 <= plan.most_shared <= 1:
        faults.append(f"{place}: most_shared is {plan.most_shared:g}; give a share from 0 to 1")
    ratings = _caught(lambda: load_model(plan.model), "") == [] and plan.task_type.name == "ratings"
    for spec in plan.domains.values() if ratings else ():
        if spec.implicit:
            faults.append(
                f"{place}: domains.{spec.name}.feedback is implicit, and {plan.model} predicts ratings; take a model of "
                "sequences, or a file with ratings and feedback: explicit"
            )
        if spec.listed:
            faults.append(
                f"{place}: domains.{spec.name}.catalogue is 'listed', which models of sequences read; leave it out"
            )
    for spec in plan.domains.values():
        if spec.duplicates == "keep" and ratings:
            faults.append(
                f"{place}: domains.{spec.name}.duplicates is 'keep', for models of sequences, and {plan.model} predicts "
                "one rating of a user and item; set mean, last or first"
            )
        elif spec.duplicates == "keep" and plan.sequences.rank_seen == "last":
            faults.append(
                f"{place}: domains.{spec.name}.duplicates is 'keep', so that what is to be predicted may be an item of the "
                "history, and sequences.rank_seen ranks those last; set sequences.rank_seen: plain"
            )
    return faults


def _model_checks(plan: Plan, place: str) -> list[str]:
    """The subject's model, then those of its rivals against it: tasks of one type, one metric that selects."""
    faults = _caught(lambda: load_model(plan.model), place)
    if faults:
        return faults
    subject, baselines = load_model(plan.model), plan.task_type.baselines
    for name, rival in plan.compare.items():
        key, model = f"{place}: compare.{name}", rival.model or name
        if not _is_plain(name) or name == plan.model or name in (*baselines, *RESERVED_ROWS):
            taken = f"{plan.model}, which is the subject" if name == plan.model else shown_value(name)
            faults.append(
                f"{key} is {taken}; name a row with letters, digits, - and _, and as no other row or baseline"
            )
        wrong = _caught(lambda model=model: load_model(model), key)
        faults += wrong
        if wrong:
            continue
        module = load_model(model)
        if module.TASK_TYPE != subject.TASK_TYPE:
            faults.append(
                f"{key}: {model} trains on tasks of {module.TASK_TYPE}, and {plan.model} on {subject.TASK_TYPE}; "
                "name a model of the subject's task type"
            )
        elif module.SELECTION != subject.SELECTION:
            faults.append(
                f"{key}: {model} is selected by {module.SELECTION.metric}, and {plan.model} by {subject.SELECTION.metric}; "
                "rows of one table are selected by one metric"
            )
    return faults


def _preset_checks(plan: Plan, place: str) -> list[str]:
    """Presets that the rows' models have."""
    faults = []
    for row in plan.rows:
        known = (OURS, *load_model(row.model).PRESETS)
        if row.preset not in known:
            chosen = f"{place}: {row.place}preset is {shown_value(row.preset)}"
            faults.append(f"{chosen}; {row.model} has {', '.join(known)}")
    return faults


def _cell_checks(plan: Plan, place: str) -> list[str]:
    """Tasks and ratios, each once, each one that can be split."""
    faults, ratios = [], f"{plan.ratio_field}s"
    for name, values in (("tasks", plan.tasks), (ratios, plan.ratios)):
        if not values:
            faults.append(f"{place}: {name} is empty; give at least one")
        elif len(set(values)) < len(values):
            faults.append(f"{place}: {name} holds a value twice; give each once")
    for ratio in plan.ratios:
        faults += _caught(lambda ratio=ratio: plan.rules.at(ratio), f"{place}: {ratios}")
    if len({f"{ratio:g}" for ratio in plan.ratios}) < len(set(plan.ratios)):
        faults.append(f"{place}: {ratios} are {list(plan.ratios)}; names keep 6 digits, so two of these are one cell")
    return faults


def _published_checks(plan: Plan, place: str) -> list[str]:
    """A paper that has numbers of one of the plan's tasks and of one of its rows."""
    tasks = [f"{source}->{target}" for source, target in plan.tasks]
    names = [load_model(row.model).NAME for row in plan.rows if row.published]

    def check() -> None:
        published = load_published(str(plan.published))
        published.check(tasks)
        published.check_names(names)

    return _caught(check, f"{place}: published")


def _pseudo_item_checks(plan: Plan, place: str) -> list[str]:
    """n_K, as items per user that are inserted, against the texts per user that are generated."""
    pseudo = plan.features.pseudo
    if pseudo is None:
        return []
    asked: list[tuple[str, Any]] = []
    for row in plan.rows:
        asked += [(f"{row.place}base", row.shared.get(N_K))]
        space = _space_or_none(row) if row.search else None
        asked += [(f"space {row.space}", value) for value in _largest(space, N_K)]
    asked += [(f"sweeps.{N_K}", value) for value in (plan.sweeps[N_K].values if N_K in plan.sweeps else ())]
    return [
        f"{place}: {key}: {N_K} is {value}, and features.pseudo.texts generates {pseudo.texts} a user; "
        f"give at most {pseudo.texts}, or generate more texts"
        for key, value in asked
        if isinstance(value, int) and value > pseudo.texts
    ]


def _largest(space: Space | None, name: str) -> list[Any]:
    """The largest values that a space draws of a parameter."""
    ranges = [parameter.distribution for parameter in space.parameters if parameter.name == name] if space else []
    return [value for each in ranges for value in getattr(each, "choices", None) or (getattr(each, "high", None),)]


def _is_plain(name: str) -> bool:
    """Whether a plan may have the name, which becomes a file name."""
    return name.replace("-", "").replace("_", "").isalnum() and name.isascii() and len(name) <= 100


def _task_type_checks(plan: Plan, document: Mapping[str, Any], place: str) -> list[str]:
    """Keys that models of another task type read, and what this one cannot do without."""
    task_type = plan.task_type.name
    features = document.get("features") or {}
    given = {*document, *(f"features.{key}" for key in features)}
    faults = [
        f"{place}: {key} is for models of {other}, and {plan.model} is one of {task_type}; leave it out"
        for other, keys in OF_TASK_TYPE.items()
        for key in keys
        if other != task_type and key in given
    ]
    return faults + [fault for row in plan.rows for fault in _need_checks(plan, row, place)]


def _need_checks(plan: Plan, row: Row, place: str) -> list[str]:
    """What the row's model reads of a task, against what the plan's features make."""
    needs, faults = load_model(row.model).NEEDS, []
    if "titles" in needs and plan.features.text is None:
        faults.append(f"{place}: features.text is missing, and {row.model} reads titles; set its encoder")
    if "reviews" in needs and plan.features.reviews is None:
        faults.append(
            f"{place}: features.reviews is missing, and {row.model} reads reviews; set reviews: {{vectors: minilm}}"
        )
    if "pseudo_items" in needs and plan.features.pseudo is None and row.base.get(N_K) != 0:
        faults.append(
            f"{place}: features.pseudo is missing, and {row.model} reads pseudo-items; set its generator, or "
            f"{row.place}base.{N_K}: 0"
        )
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
        for key in made
        for file in spec.files(key)
        if file not in made[key]
    ]


def _space_checks(row: Row, place: str, *, whole: bool) -> list[str]:
    """The space's own faults; then, over a faultless base, what the model's config says of configurations drawn from it."""
    if row.search is not None and row.space is None:
        return [f"{place}: search needs a space; set `{row.place}space`, e.g. {row.model}/paper"]
    try:
        space = row.load_space()
    except SpaceError as error:
        return list(error.faults)
    if space is None or not whole:
        return []
    ends: Any = _Ends(random.Random(0))
    drawn = [space.suggest(ends) for _ in range(_DRAWS)]
    faults = [_caught(lambda d=d: make_config(row.model, {**row.shared, **d}, f"space {row.space}"), "") for d in drawn]
    return next((lines for lines in faults if lines), [])  # one drawn configuration says it; others differ in numbers


def _space_or_none(row: Row) -> Space | None:
    try:
        return row.load_space()
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
    """Parts against the models of their rows."""
    faults = []
    starts = {f"sweeps.{parameter}": sweep.start for parameter, sweep in plan.sweeps.items()}
    starts |= {"ablate": plan.ablate.start} if plan.ablate else {}
    faults += [f"{place}: {part}.start is {fault}" for part, start in starts.items() if (fault := fault_of(start))]
    for parameter in plan.sweeps:
        faults += _sweep_checks(plan, parameter, place)
    faults += _ablation_checks(plan, place) + _seed_checks(plan, place)
    for row in plan.rows:
        if row.search is not None and row.space is not None:
            faults += [f"{place}: {fault}" for fault in _search_checks(plan, row, row.search)]
    if plan.resources.cpus <= 0 or plan.resources.gpus < 0:
        faults.append(f"{place}: resources are {plan.resources}; give cpus above 0, gpus of at least 0")
    return list(dict.fromkeys(faults))


def _sweep_checks(plan: Plan, parameter: str, place: str) -> list[str]:
    """A sweep's values against the config of each row that it names."""
    sweep, key = plan.sweeps[parameter], f"{place}: sweeps.{parameter}"
    faults = []
    if sweep.compare not in COMPARE:
        faults.append(f"{key}.compare is {shown_value(sweep.compare)}; choose from {', '.join(COMPARE)}")
    if not sweep.values or any(value in sweep.values[:i] for i, value in enumerate(sweep.values)):
        faults.append(f"{key}.values is {shown_value(list(sweep.values))}; give at least one, each once")
    names = [row.name for row in plan.rows]
    if unknown := [name for name in sweep.models if name not in names]:
        return [*faults, f"{key}.models names {', '.join(unknown)}; choose from {', '.join(names)}, or say all"]
    if sweep.start not in WORDS and sweep.models not in ((), (plan.subject.name,)):
        faults.append(f"{key}.start is a run, which is of one model; leave out models, or start from best or base")
    if parameter == plan.ratio_field:
        return faults + _ratio_checks(plan, sweep.values, key)
    for row in swept_rows(plan, parameter):
        for value in sweep.values:
            values = {**row.shared, parameter: value}
            faults += _caught(lambda row=row, values=values: make_config(row.model, values, key), "")
    return faults


def _ablation_checks(plan: Plan, place: str) -> list[str]:
    """Variants that the subject has, each once."""
    if plan.ablate is None:
        return []
    variants, faults = plan.ablate.variants, []
    ablations = load_model(plan.model).ABLATIONS
    if not variants or len(set(variants)) < len(variants):
        faults.append(f"{place}: ablate.variants is {shown_value(list(variants))}; give at least one, each once")
    if plan.ablate.compare not in COMPARE:
        faults.append(
            f"{place}: ablate.compare is {shown_value(plan.ablate.compare)}; choose from {', '.join(COMPARE)}"
        )
    rows = [row.name for row in plan.rows if row.model == plan.model]
    if unknown := [name for name in plan.ablate.models if name not in rows]:
        faults.append(f"{place}: ablate.models names {', '.join(unknown)}; rows of {plan.model} are {', '.join(rows)}")
    if plan.ablate.start not in WORDS and plan.ablate.models not in ((), (plan.subject.name,)):
        faults.append(f"{place}: ablate.start is a run, which is of one row; leave out models, or start from base")
    return faults + [
        f"{place}: ablate.variants: unknown {variant!r}; {plan.model} has {', '.join(ablations)}"
        for variant in variants
        if variant not in ablations
    ]


def _seed_checks(plan: Plan, place: str) -> list[str]:
    """Seeds that every generator takes, each once."""
    faults = []
    for name, seeds in _seeds(plan):
        if not seeds or len(set(seeds)) < len(seeds):
            faults.append(f"{place}: {name} is {list(seeds)}; give at least one, each once")
        if not all(0 <= seed <= MOST_SEED for seed in seeds):
            shown = shown_value(list(seeds) if name.endswith("seeds") else seeds[0])
            faults.append(f"{place}: {name} is {shown}; give whole numbers from 0 to {MOST_SEED}")
    return faults


def _search_checks(plan: Plan, row: Row, search: SearchSpec) -> list[str]:
    """The search of a row against its space, without the plan's name."""
    faults = []
    if not 1 <= search.trials <= MOST_TRIALS:
        faults.append(f"{row.place}search.trials is {search.trials}; give 1 to {MOST_TRIALS:,}")
    if search.pruner is not None and row.config.get("keep") == "last":
        faults.append(f"{row.place}base: keep is 'last', so no epoch is there for search.pruner; leave out one of them")
    if search.warm_start is not None and not _is_plain(search.warm_start.plan):
        faults.append(f"search.warm_start.plan is {shown_value(search.warm_start.plan)}; give the name of a plan")
    if search.objectives:
        faults += _objective_faults(plan, search.objectives)
    return faults + check_search(search, _space_or_none(row)) if search.seed >= 0 and not faults else faults


def _objective_faults(plan: Plan, objectives: Sequence[Objective]) -> list[str]:
    """Metrics that the task type measures on validation, each in its own direction, the selecting one among them."""
    known = plan.task_type.validation_directions
    known |= {plan.selection.metric: plan.selection.direction, "seconds": "minimize"}
    faults = []
    for number, objective in enumerate(objectives):
        place = f"search.objectives[{number}]"
        if objective.metric not in known:
            faults.append(f"{place}.metric is {shown_value(objective.metric)}; choose from {', '.join(known)}")
        elif objective.direction != known[objective.metric]:
            shown = shown_value(objective.direction)
            faults.append(f"{place}.direction is {shown}; {objective.metric} is to {known[objective.metric]}")
    names = [objective.metric for objective in objectives]
    if len(names) < 2 or len(set(names)) < len(names) or plan.selection.metric not in names:
        faults.append(f"search.objectives are {names}; give two or more, each once, {plan.selection.metric} among them")
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
        faults.append(
            f"{place}: starts from the best of one ratio, but {plan.ratio_field}s are {list(plan.ratios)}; keep one"
        )
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
