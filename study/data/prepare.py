"""From a plan to the task folders of its cells: raw files -> domains -> feature tables -> tasks. Nothing is made twice.

What differs between the kinds of tasks is here and nowhere else in the study: `_Ratings` and `_Sequences`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from multiprocessing import get_context, parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from typing import Any, Protocol

from features.domains.domain import Domain, prepare_domain
from features.domains.splits import read_split
from features.encoders.encoder import EncoderSpec
from features.errors import InputError
from features.extraction.extract import Estimate, estimate, extract_tables
from features.extraction.workers import Actors
from features.pseudo.generate import History, Means, describe_generator, item_titles, make_pseudo, read_value
from features.pseudo.generator import GeneratorSpec
from features.pseudo.table import PseudoTable
from features.simulate.simulator import simulate
from features.store.folders import write_json
from features.store.tables import FeatureTable, digest
from study import parts
from study.engine.node_cache import bring_home, locate, task_server
from study.plan.schema import Plan
from study.specs import PREDICTOR, Cell, Resources
from trainables import trial
from trainables.interface import load_model
from trainables.tasks.arrays import TaskFolders
from trainables.tasks.rating_build import TextVectors, build_task
from trainables.tasks.sequential_build import TrainingUsers, build_sequences, training_users


class Told(Protocol):
    """Takes how much is done, and where it is known how many tokens that were, and how long workers have worked on it."""

    def __call__(self, done: int, tokens: int = 0, seconds: float | None = None, /) -> None: ...


Watch = Callable[[str, int], Told]
"""(what is being done, its size or 0) -> a function that is told how much of it is done."""


def unwatched(what: str, size: int) -> Told:
    """A `Watch` that shows nothing."""
    return lambda done, tokens=0, seconds=None: None


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """All that the trials of a plan read."""

    domains: Mapping[str, Domain]
    tasks: Mapping[tuple[str, str], TaskFolders]  # (cell name, feature_set) -> folders
    pseudo: Mapping[str, PseudoTable]  # pair of domains and ratio -> pseudo-items of its training users
    tables: Mapping[str, FeatureTable]  # `<domain>-<kind>` -> vectors by a language model
    data_key: str
    feature_key: str

    @property
    def simulated(self) -> bool:
        """Whether any domain was made by the simulator."""
        return any(domain.simulated for domain in self.domains.values())

    def cells(self, plan: Plan) -> list[dict[str, Any]]:
        """Counts of each cell's split."""
        return [
            {**asdict(cell), **dict(self.tasks[cell.name, plan.features.main].counts)}
            for cell in (*plan.cells, *plan.swept_cells)
        ]  # fmt: skip


def feature_sets(plan: Plan) -> list[str]:
    """Flavours of features that the plan's jobs read: its main one, and those of its ablations."""
    ablations = load_model(plan.model).ABLATIONS
    variants = plan.ablate.variants if plan.ablate else ()
    others = [ablations[name].features for name in variants if ablations[name].features]
    return list(dict.fromkeys([plan.features.main, *others]))


def data_folder(plan: Plan, data: Path | None, home: Path, watch: Watch) -> Path:
    """The folder of the raw files: the given one, one folder below it that holds them, or a simulated one."""
    if plan.simulate is not None:
        if data is not None:
            raise InputError(f"--data {data}: plan {plan.name} simulates its domains; leave the option out")
        spec = plan.simulate
        out = home / "simulated" / digest(asdict(spec))[:12]
        simulate(spec, out, _summed(watch("simulating domains", spec.rows)))
        return out
    needed = list(dict.fromkeys([spec.interactions for spec in plan.domains.values()]))
    if plan.sequences.users is not None:
        needed.append(plan.sequences.users)
    if data is None:
        raise InputError(f"plan {plan.name}: reads {', '.join(needed)}; say where they are with --data DIR")
    for folder in [data, *sorted(path for path in data.glob("*") if path.is_dir())]:
        if all((folder / name).is_file() for name in needed):
            return folder
    return data  # reading it gives the error that names the missing file


def prepare_domains(plan: Plan, data: Path | None, home: Path, watch: Watch) -> dict[str, Domain]:
    """All domains of the plan."""
    folder = data_folder(plan, data, home, watch)
    return {
        name: prepare_domain(spec, folder, home / "domains", _summed(watch(f"reading {name}", 0)))
        for name, spec in plan.domains.items()
    }


def estimates(plan: Plan, domains: Mapping[str, Domain], home: Path) -> dict[tuple[str, str], Estimate]:
    """What extraction would still do, by domain and kind; empty for rating-based vectors."""
    text = plan.features.text
    if text is None:
        return {}
    return {
        (name, kind): estimate(text.spec(kind), domains[name], home / "store") for name, kind in _tables(plan)
    }  # fmt: skip


def prepare(
    plan: Plan, data: Path | None, home: Path, watch: Watch, *, on_ray: bool = False, actors: Actors | None = None
) -> Inputs:
    """Everything the plan's trials read, made where it is missing.

    on_ray: by the cluster that this process has joined. actors: that extract there (None: as many as it holds now).
    """
    made = _Made(plan, data, home, watch, on_ray, actors, prepare_domains(plan, data, home, watch))
    maker = _Sequences(made) if plan.task_type.name == "sequences" else _Ratings(made)
    wanted = [(cell, feature_set) for cell in plan.cells for feature_set in feature_sets(plan)]
    wanted += [(cell, plan.features.main) for cell in plan.swept_cells]
    told = watch("building tasks", len(wanted))
    tasks = {}
    for number, (cell, feature_set) in enumerate(wanted, start=1):
        tasks[cell.name, feature_set] = maker.task(cell, feature_set)
        told(number)
    _prepare_model(made, tasks)
    return Inputs(
        domains=made.domains,
        tasks=tasks,
        pseudo=maker.pseudo,
        tables={f"{name}-{kind}": table for (name, kind), table in made.tables.items()},
        data_key=digest({name: domain.key for name, domain in made.domains.items()}),
        feature_key=digest(maker.document()),
    )


@dataclass(frozen=True)
class _Made:
    """What there is before the first task: the domains, and the feature tables as they are asked for."""

    plan: Plan
    data: Path | None
    home: Path
    watch: Watch
    on_ray: bool
    actors: Actors | None
    domains: Mapping[str, Domain]

    @cached_property
    def tables(self) -> Mapping[tuple[str, str], FeatureTable]:
        """(domain, items | users) -> its vectors."""
        text = self.plan.features.text
        if text is None:
            return {}
        by_encoder: dict[EncoderSpec, list[tuple[str, str]]] = {}
        for name, kind in _tables(self.plan):
            by_encoder.setdefault(text.spec(kind).encoder, []).append((name, kind))
        tables: dict[tuple[str, str], FeatureTable] = {}
        for names in by_encoder.values():
            told = _by_phase(self.watch, " and ".join(dict.fromkeys(kind for _, kind in names)))
            made = extract_tables(
                [(text.spec(kind), self.domains[name]) for name, kind in names], self.home / "store",
                workers=self.actors, use_ray=self.on_ray or None, progress=partial(told, "encoding"),
                image_progress=lambda domain, *count, told=told: told(f"finding images of {domain}", *count),
            )  # fmt: skip
            tables |= zip(names, made, strict=True)
        return {which: tables[which] for which in _tables(self.plan)}

    @property
    def feature_keys(self) -> dict[str, str]:
        """Of the tables."""
        return {f"{name}-{kind}": table.key for (name, kind), table in self.tables.items()}


class _Ratings:
    """Tasks of ratings (MuSiC)."""

    pseudo: Mapping[str, PseudoTable] = {}

    def __init__(self, made: _Made) -> None:
        self._made = made
        made.tables  # noqa: B018  (before the tasks, for the bars tell them apart)

    def task(self, cell: Cell, feature_set: str) -> TaskFolders:
        """Its folders."""
        made, plan = self._made, self._made.plan
        vectors = plan.features.ratings if feature_set == "ratings" else _vectors(cell, made.tables)
        source, target = made.domains[cell.source], made.domains[cell.target]
        return build_task(plan.split.at(cell.ratio), source, target, vectors, made.home / "tasks")

    def document(self) -> dict[str, Any]:
        """What trials depend on beside the domains."""
        plan = self._made.plan
        return {"text": self._made.feature_keys, "ratings": asdict(plan.features.ratings), "split": asdict(plan.split)}


class _Sequences:
    """Tasks of sequences (LGCD)."""

    def __init__(self, made: _Made) -> None:
        self._made = made
        made.tables  # noqa: B018
        self._split = None
        if made.plan.sequences.users is not None:
            self._split = given_split(made.plan, data_folder(made.plan, made.data, made.home, made.watch))
        self.pseudo: dict[str, PseudoTable] = {}
        if made.plan.features.pseudo is not None:
            for pair in pairs_of(made.plan):
                for ratio in ratios_of(made.plan):
                    self.pseudo[pair_name(pair, ratio)] = self._make_pseudo(made.plan.features.pseudo, pair, ratio)

    def task(self, cell: Cell, feature_set: str) -> TaskFolders:
        """Its folders."""
        made = self._made
        text = {name: made.tables[name, "items"] for name in (cell.source, cell.target)}
        return build_sequences(
            made.plan.sequences.at(cell.ratio), made.domains[cell.source], made.domains[cell.target], self._split, text,
            self.pseudo.get(pair_name((cell.source, cell.target), cell.ratio)), made.home / "tasks",
        )  # fmt: skip

    def document(self) -> dict[str, Any]:
        """What trials depend on beside the domains."""
        plan = self._made.plan
        return {
            "text": self._made.feature_keys, "sequences": asdict(plan.sequences),
            "split": digest(self._split) if self._split is not None else None,
            "pseudo": describe_generator(plan.features.pseudo) if plan.features.pseudo else None,
        }  # fmt: skip

    def _make_pseudo(self, spec: GeneratorSpec, pair: tuple[str, str], ratio: float) -> PseudoTable:
        """Items for the users of one domain who train at this ratio."""
        made, (source, target) = self._made, pair
        text = made.plan.features.text
        assert text is not None, "the plan's checks ask for it"
        found = training_users(made.plan.sequences.at(ratio), made.domains[source], made.domains[target], self._split)
        name = pair_name(pair, ratio)
        told = _by_phase(made.watch, f"pseudo-items of {name}")
        means = Means(progress=told, workers=made.actors, use_ray=made.on_ray or None)
        titles = {domain: item_titles(made.domains[domain]) for domain in pair}
        tables = {domain: made.tables[domain, "items"] for domain in pair}
        encoder = text.spec("items").encoder
        return make_pseudo(spec, encoder, histories(found, pair), titles, tables, made.home / "store", means)


def _prepare_model(made: _Made, tasks: Mapping[tuple[str, str], TaskFolders]) -> None:
    """What the planned trials share, by task and seed; on a cluster by workers, for the head may be no place to train.

    One direction of each pair of domains comes first, for what it makes may serve the other.
    """
    plan = made.plan
    if not trial.has_shared(plan.model):
        return
    jobs = [job for jobs in parts.planned(plan).values() for job in jobs if not job.name.startswith(PREDICTOR)]
    wanted = sorted(
        {(job.cell.source > job.cell.target, job.cell.name, job.features, seed) for job in jobs for seed in job.seeds}
    )
    told, done = made.watch("preparing the model", len(wanted)), 0
    server = task_server() if made.on_ray else None
    for direction in (False, True):
        calls = [
            (
                server,
                plan.model,
                {**plan.config, **plan.by_cell.get(cell, {})},
                tasks[cell, feature_set].task_dir,
                [seed],
            )
            for reverse, cell, feature_set, seed in wanted
            if reverse == direction
        ]
        for _ in _called(_prepare_one, calls, plan.resources, made.on_ray):
            done += 1
            told(done)


def _prepare_one(server: Any, model: str, config: Mapping[str, Any], task_dir: Path, seeds: Sequence[int]) -> None:
    """Where the home folder is not seen, what is there is fetched, and what is made is brought there."""
    here = str(locate(task_dir, server))
    made = []
    if here != str(task_dir):
        folders = [task_dir.parent.parent / folder for folder in trial.shared(model, config, here, seeds)]
        made = [folder for folder in folders if not locate(folder, server).is_dir()]
    trial.prepare(model, config, here, seeds)
    for folder in made:
        bring_home(folder, server)


def _called(
    function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], resources: Resources, on_ray: bool
) -> Iterator[Any]:
    """The function's values, in the order of the calls: computed side by side, by the running cluster or by processes here.

    Each has what a trial has: more torch threads than that may change the last bits, and on a busy machine make
    small models ten times slower.
    """
    if not on_ray:
        processes = max(1, min(len(calls), len(os.sched_getaffinity(0)) // resources.threads))
        with ProcessPoolExecutor(
            processes, mp_context=get_context("spawn"), initializer=_begin, initargs=(resources.threads,)
        ) as pool:
            for future in [pool.submit(function, *call) for call in calls]:
                yield future.result()
        return
    import ray

    remote = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus)(function)
    for reference in [remote.remote(*call) for call in calls]:
        yield ray.get(reference)


def _begin(threads: int) -> None:
    """Each process ends with the one that started it, whatever ended that: an idle one would wait for work for ever."""
    import torch

    torch.set_num_threads(threads)
    Thread(target=_end_with, args=(parent_process(),), daemon=True).start()


def _end_with(process: BaseProcess) -> None:
    process.join()
    os._exit(1)


def pairs_of(plan: Plan) -> list[tuple[str, str]]:
    """Pairs of domains, whatever the direction of their tasks."""
    return list(dict.fromkeys((min(task), max(task)) for task in plan.tasks))


def ratios_of(plan: Plan) -> list[float]:
    """Of all cells."""
    return list(dict.fromkeys(cell.ratio for cell in (*plan.cells, *plan.swept_cells)))


def pair_name(pair: tuple[str, str], ratio: float) -> str:
    """`books-movies@0.5`, whatever the direction."""
    return f"{min(pair)}-{max(pair)}@{ratio:g}"


def histories(found: TrainingUsers, pair: tuple[str, str]) -> list[History]:
    """What each training user has in the source and in the target domain of `pair`."""
    users = []
    for number, user in enumerate(found.user):
        own = slice(found.starts[number], found.starts[number + 1])
        item, in_target = found.item[own], found.in_target[own]
        users.append(History(user=str(user), items={pair[0]: list(item[~in_target]), pair[1]: list(item[in_target])}))
    return users


def _by_phase(watch: Watch, what: str) -> Callable[..., None]:
    """One bar after the other for (phase, done, total[, tokens, seconds])."""
    bars: dict[str, Told] = {}

    def told(phase: str, done: int, total: int, *more: Any) -> None:
        if phase not in bars:
            bars[phase] = watch(f"{what}: {phase}", total)
        bars[phase](done, *more)

    return told


def given_split(plan: Plan, folder: Path) -> Mapping[str, str] | None:
    """Who trains, validates and tests, as the data says it."""
    rules = plan.sequences
    return read_split(folder / rules.users, rules.columns) if rules.users is not None else None


def feature_figures(tables: Mapping[str, FeatureTable]) -> dict[str, float]:
    """How each feature table was made, as metrics: rows, failures, and the speed of the call that finished it."""
    figures: dict[str, float] = {}
    for name, table in tables.items():
        rows, speed = table.manifest["rows"], table.manifest.get("speed", {})
        counts = {"rows": rows["done"], "failed": len(rows["failed"]), "tokens": table.manifest["tokens"]}
        if "without_image" in rows:
            counts["without_image"] = len(rows["without_image"])
        for figure, value in {**speed, **counts, "seconds": table.manifest["seconds"]}.items():
            if value is not None:
                figures[f"features/{name}/{figure}"] = float(value)
    return figures


def describe_data(plan: Plan, inputs: Inputs, folder: Path) -> dict[str, Path]:
    """Write `domains.json`, `cells.json` and `pseudo.json`, what the report's tables of the data are made from."""
    folder.mkdir(parents=True, exist_ok=True)
    contents: dict[str, Any] = {
        "domains.json": [dict(domain.manifest) for domain in inputs.domains.values()],
        "cells.json": inputs.cells(plan),
        "pseudo.json": [{"pair": name, **row} for name, table in inputs.pseudo.items() for row in read_value(table)],
    }
    for name, content in contents.items():
        write_json(folder / name, content)
    return {name: folder / name for name in contents}


def _tables(plan: Plan) -> list[tuple[str, str]]:
    """Feature tables that the tasks read: of ratings users of every domain, items of the targets; of sequences items."""
    used = [name for name in plan.domains if any(name in task for task in plan.tasks)]
    if plan.task_type.name == "sequences":
        return [(name, "items") for name in used]
    targets = [name for name in used if any(name == target for _, target in plan.tasks)]
    return [*((name, "users") for name in used), *((name, "items") for name in targets)]


def _vectors(cell: Cell, tables: Mapping[tuple[str, str], FeatureTable]) -> TextVectors:
    return TextVectors(
        source_users=tables[cell.source, "users"],
        target_users=tables[cell.target, "users"],
        items=tables[cell.target, "items"],
    )


def _summed(told: Told) -> Callable[[int], None]:
    """From a callback that takes what was done in all to one that takes what was done since."""
    done = 0

    def more(rows: int) -> None:
        nonlocal done
        done += rows
        told(done)

    return more
