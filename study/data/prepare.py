"""From a plan to everything that its trials read: domains -> tables -> pseudo-items -> tasks -> pretraining.

Nothing is made twice: each step finds by its content key what is stored.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from features.domains.domain import Domain
from features.extraction.workers import Actors
from features.pseudo.generate import read_recall
from features.pseudo.table import PseudoTable
from features.store.folders import write_json
from features.store.tables import FeatureTable, digest
from study.data.domains import data_folder, given_split, prepare_domains
from study.data.pretrain import pretrain
from study.data.pseudo_items import make_pseudo_tables
from study.data.summary import check_leaks
from study.data.tables import make_tables, table_keys
from study.data.tasks import Materials, task_rules
from study.home import Home
from study.plan.schema import Plan
from study.progress import StartProgress
from trainables.interface import load_model
from trainables.tasks.arrays import TaskFolders


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """All that the trials of a plan read."""

    domains: Mapping[str, Domain]
    tasks: Mapping[tuple[str, str], TaskFolders]  # (cell name, feature set) -> folders
    pseudo: Mapping[str, PseudoTable]  # pair of domains and ratio -> pseudo-items of its training users
    tables: Mapping[str, FeatureTable]  # `<domain>-<kind>` -> vectors by a language model
    data_key: str
    feature_key: str

    @property
    def simulated(self) -> bool:
        """Whether any domain was made by the simulator."""
        return any(domain.simulated for domain in self.domains.values())

    def cells(self, plan: Plan) -> list[dict[str, Any]]:
        """Return the counts of each cell's split."""
        return [
            {**asdict(cell), **dict(self.tasks[cell.name, plan.feature_set].counts)}
            for cell in (*plan.cells, *plan.swept_cells)
        ]  # fmt: skip


def feature_sets(plan: Plan) -> list[str]:
    """Return the feature sets that the plan's jobs read: its main one, and those of the subject's ablations."""
    ablations = load_model(plan.model).ABLATIONS
    variants = plan.ablate.variants if plan.ablate else ()
    others = [feature_set for name in variants if (feature_set := ablations[name].features)]
    return list(dict.fromkeys([plan.feature_set, *others]))


def prepare(
    plan: Plan, data: Path | None, home: Home, start_progress: StartProgress, *,
    only: Collection[str] = (), on_ray: bool = False, actors: Actors | None = None,
) -> Inputs:  # fmt: skip
    """Make everything that the plan's trials read, where it is missing.

    only: rows whose models are pretrained; none named: all. on_ray: by the cluster that this process has joined. actors:
    those that extract there (None: as many as it holds now).
    """
    domains = prepare_domains(plan, data, home, start_progress)
    check_leaks(plan, domains)
    tables = make_tables(plan, domains, home, start_progress, on_ray=on_ray, actors=actors)
    split = None
    if plan.sequences.users is not None:
        split = given_split(plan, data_folder(plan, data, home, start_progress))
    pseudo = make_pseudo_tables(plan, domains, split, tables, home, start_progress, on_ray=on_ray, actors=actors)
    materials = Materials(domains=domains, tables=tables, table_keys=table_keys(tables), pseudo=pseudo, split=split)
    tasks = _build_tasks(plan, materials, home, start_progress)
    pretrain(plan, tasks, start_progress, only=only, on_ray=on_ray)
    return Inputs(
        domains=domains,
        tasks=tasks,
        pseudo=pseudo,
        tables={f"{name}-{kind}": table for (name, kind), table in tables.items()},
        data_key=digest({name: domain.key for name, domain in domains.items()}),
        feature_key=digest(task_rules(plan).document(plan, materials)),
    )


def _build_tasks(
    plan: Plan, materials: Materials, home: Home, start_progress: StartProgress
) -> dict[tuple[str, str], TaskFolders]:
    """Return the folders of each cell and feature set; of cells that a sweep adds, the main feature set alone."""
    wanted = [(cell, feature_set) for cell in plan.cells for feature_set in feature_sets(plan)]
    wanted += [(cell, plan.feature_set) for cell in plan.swept_cells]
    rules, advance = task_rules(plan), start_progress("building tasks", len(wanted))
    tasks = {}
    for number, (cell, feature_set) in enumerate(wanted, start=1):
        tasks[cell.name, feature_set] = rules.build(plan, materials, cell, feature_set, home.tasks)
        advance(number)
    return tasks


def describe_data(plan: Plan, inputs: Inputs, folder: Path) -> dict[str, Path]:
    """Write `domains.json`, `cells.json` and `pseudo.json`, which the report's tables of the data are made from."""
    folder.mkdir(parents=True, exist_ok=True)
    contents: dict[str, Any] = {
        "domains.json": [dict(domain.manifest) for domain in inputs.domains.values()],
        "cells.json": inputs.cells(plan),
        "pseudo.json": [{"pair": name, **row} for name, table in inputs.pseudo.items() for row in read_recall(table)],
    }
    for name, content in contents.items():
        write_json(folder / name, content)
    return {name: folder / name for name in contents}
