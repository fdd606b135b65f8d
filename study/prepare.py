"""From a plan to the task folders of its cells: raw files -> domains -> feature tables -> tasks. Nothing is made twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from features.domain import Domain, prepare_domain
from features.errors import InputError
from features.extract import Estimate, estimate, extract, feature_key
from features.folders import write_json
from features.simulate import simulate
from features.store import FeatureTable, digest
from study.jobs import Cell
from study.plan import Plan
from trainables.door import load_model
from trainables.task import TaskFolders, TextVectors, build_task

Watch = Callable[[str, int], Callable[[int], None]]
"""(what is being done, its size or 0) -> a function that is told how much of it is done."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """All that the trials of a plan read."""

    domains: Mapping[str, Domain]
    tasks: Mapping[tuple[str, str], TaskFolders]  # (cell name, flavour) -> folders
    data_key: str
    feature_key: str

    @property
    def simulated(self) -> bool:
        """Whether any domain was made by the simulator."""
        return any(domain.simulated for domain in self.domains.values())

    def cells(self, plan: Plan) -> list[dict[str, Any]]:
        """Counts of each cell's split."""
        return [
            {**asdict(cell), **dict(self.tasks[cell.name, plan.features.main].counts)} for cell in plan.cells
        ]  # fmt: skip


def flavours(plan: Plan) -> list[str]:
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
    needed = [spec.interactions for spec in plan.domains.values()]
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


def prepare(plan: Plan, data: Path | None, home: Path, watch: Watch, *, on_ray: bool = False) -> Inputs:
    """Everything the plan's trials read, made where it is missing."""
    domains = prepare_domains(plan, data, home, watch)
    tables: dict[tuple[str, str], FeatureTable] = {}
    text = plan.features.text
    if text is not None:
        for name, kind in _tables(plan):
            told = watch(f"encoding {kind} of {name}", 0)
            tables[name, kind] = extract(
                text.spec(kind), domains[name], home / "store", use_ray=on_ray or None,
                progress=lambda done, total, told=told: told(done),  # type: ignore[misc]
            )  # fmt: skip
    tasks = {}
    wanted = [(cell, flavour) for cell in plan.cells for flavour in flavours(plan)]
    told = watch("building tasks", len(wanted))
    for number, (cell, flavour) in enumerate(wanted, start=1):
        vectors = plan.features.ratings if flavour == "ratings" else _vectors(cell, tables)
        tasks[cell.name, flavour] = build_task(
            plan.split.at(cell.ratio), domains[cell.source], domains[cell.target], vectors, home / "tasks"
        )
        told(number)
    features = {f"{name}-{kind}": feature_key(text.spec(kind), domains[name]) for name, kind in tables} if text else {}
    return Inputs(
        domains=domains,
        tasks=tasks,
        data_key=digest({name: domain.key for name, domain in domains.items()}),
        feature_key=digest({"text": features, "ratings": asdict(plan.features.ratings), "split": asdict(plan.split)}),
    )


def describe_data(plan: Plan, inputs: Inputs, folder: Path) -> dict[str, Path]:
    """Write `domains.json` and `cells.json`, what the report's tables of the data are made from."""
    folder.mkdir(parents=True, exist_ok=True)
    contents: dict[str, Any] = {
        "domains.json": [dict(domain.manifest) for domain in inputs.domains.values()],
        "cells.json": inputs.cells(plan),
    }
    for name, content in contents.items():
        write_json(folder / name, content)
    return {name: folder / name for name in contents}


def _tables(plan: Plan) -> list[tuple[str, str]]:
    """Feature tables that the tasks read: users of every domain, items of the targets."""
    users = [(name, "users") for name in plan.domains if any(name in task for task in plan.tasks)]
    return users + [(name, "items") for name in plan.domains if any(name == target for _, target in plan.tasks)]


def _vectors(cell: Cell, tables: Mapping[tuple[str, str], FeatureTable]) -> TextVectors:
    return TextVectors(
        source_users=tables[cell.source, "users"],
        target_users=tables[cell.target, "users"],
        items=tables[cell.target, "items"],
    )


def _summed(told: Callable[[int], None]) -> Callable[[int], None]:
    """From a callback that takes what was done in all to one that takes what was done since."""
    done = 0

    def more(rows: int) -> None:
        nonlocal done
        done += rows
        told(done)

    return more
