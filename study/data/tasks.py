"""From domains, vectors and pseudo-items to the task folders of cells.

What differs between task types is here and nowhere else in the study's data: `RatingTasks` and `SequenceTasks`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from features.domains.domain import Domain
from features.pseudo.generate import describe_generator
from features.pseudo.table import PseudoTable
from features.reviews import open_words
from features.store.tables import FeatureTable, digest
from study.data.pseudo_items import pair_name
from study.plan.schema import Plan
from study.specs import Cell
from trainables.tasks.arrays import TaskFolders
from trainables.tasks.rating_build import TextVectors, build_task, split_users
from trainables.tasks.sequential_build import build_sequences, sequence_document, sequence_sizes

TableName = tuple[str, str]
"""Domain, and whose vectors the table holds: `items` or `users`."""


@dataclass(frozen=True, kw_only=True)
class Materials:
    """What the tasks of a plan are built from."""

    domains: Mapping[str, Domain]
    tables: Mapping[TableName, FeatureTable]  # empty where the plan has no text features
    table_keys: Mapping[str, str]
    pseudo: Mapping[str, PseudoTable]  # by `pair_name`; empty where the plan has no pseudo-items
    split: Mapping[str, str] | None  # user id -> train | valid | test, where the data says it


class TaskRules(Protocol):
    """How tasks of one type are built."""

    previewed: bool
    """Whether domains are read ahead for `study check`."""

    def table_names(self, plan: Plan) -> list[TableName]:
        """Feature tables that the tasks read, where the plan has text features."""

    def build(self, plan: Plan, materials: Materials, cell: Cell, feature_set: str, store: Path) -> TaskFolders:
        """Build a cell's task, or find it built."""

    def split_sizes(
        self, plan: Plan, domains: Mapping[str, Domain], split: Mapping[str, str] | None, cell: Cell
    ) -> dict[str, tuple[int, int | None]]:
        """Users of each part of a cell's split, and their interactions in the target domain where these are predicted."""

    def document(self, plan: Plan, materials: Materials) -> dict[str, Any]:
        """What trials depend on beside the domains and the cell; its digest is the tag study.feature_key."""


class RatingTasks:
    """Tasks of ratings, such as MuSiC's."""

    previewed = False  # what language models have to do is told by their tables

    def table_names(self, plan: Plan) -> list[TableName]:
        """Users of every domain, items of the target domains."""
        domains = _used_domains(plan)
        targets = {target for _, target in plan.tasks}
        return [*((name, "users") for name in domains), *((name, "items") for name in domains if name in targets)]

    def build(self, plan: Plan, materials: Materials, cell: Cell, feature_set: str, store: Path) -> TaskFolders:
        """Build a cell's task with vectors by language models or from ratings."""
        tables, vectors = materials.tables, plan.features.ratings
        source, target = materials.domains[cell.source], materials.domains[cell.target]
        words = open_words(plan.features.reviews, store.parent / "words") if plan.features.reviews else None
        if feature_set == "ratings":
            return build_task(plan.split.at(cell.ratio), source, target, vectors, store, words)
        text = TextVectors(
            source_users=tables[cell.source, "users"], target_users=tables[cell.target, "users"],
            items=tables[cell.target, "items"],
        )  # fmt: skip
        return build_task(plan.split.at(cell.ratio), source, target, text, store, words)

    def split_sizes(
        self, plan: Plan, domains: Mapping[str, Domain], split: Mapping[str, str] | None, cell: Cell
    ) -> dict[str, tuple[int, int | None]]:
        """Return users and target ratings of training, validation and test, and of those who are of the target alone."""
        source, target = domains[cell.source], domains[cell.target]
        ratings = target.users().set_index("user_id")["interactions"]
        source_users = list(source.users()["user_id"])
        parts = split_users(source_users, list(ratings.index), plan.split.at(cell.ratio), f"task {cell.task}")
        side = ratings.index.difference([*parts.train, *parts.validation, *parts.test])
        users = {"train": parts.train, "target alone": side, "validation": parts.validation, "test": parts.test}
        chosen = {name: list(ids) for name, ids in users.items()}
        return {name: (len(ids), int(ratings[ids].sum())) for name, ids in chosen.items()}

    def document(self, plan: Plan, materials: Materials) -> dict[str, Any]:
        """Return keys of the tables, and the rules of factors and split."""
        document = {
            "text": dict(materials.table_keys), "ratings": asdict(plan.features.ratings),
            "split": asdict(plan.split),
        }  # fmt: skip
        return document | ({"reviews": asdict(plan.features.reviews)} if plan.features.reviews else {})


class SequenceTasks:
    """Tasks of sequences, such as LGCD's."""

    previewed = True

    def table_names(self, plan: Plan) -> list[TableName]:
        """Items of every domain: sequences hold items of both."""
        return [(name, "items") for name in _used_domains(plan)]

    def build(self, plan: Plan, materials: Materials, cell: Cell, feature_set: str, store: Path) -> TaskFolders:
        """Build a cell's task; without text features it holds no vectors of titles."""
        pair = (cell.source, cell.target)
        text = {name: materials.tables[name, "items"] for name in pair} if materials.tables else None
        return build_sequences(
            plan.sequences.at(cell.ratio), materials.domains[cell.source], materials.domains[cell.target],
            materials.split, text, materials.pseudo.get(pair_name(pair, cell.ratio)), store,
        )  # fmt: skip

    def split_sizes(
        self, plan: Plan, domains: Mapping[str, Domain], split: Mapping[str, str] | None, cell: Cell
    ) -> dict[str, tuple[int, int | None]]:
        """Return training users by group, and held-out users whose last item is of the target domain."""
        spec = plan.sequences.at(cell.ratio)
        sizes = sequence_sizes(spec, domains[cell.source], domains[cell.target], split)
        return {name: (users, None) for name, users in sizes.items()}

    def document(self, plan: Plan, materials: Materials) -> dict[str, Any]:
        """Return keys of the tables, and the rules of sequences, split and generator."""
        return {
            "text": dict(materials.table_keys), "sequences": sequence_document(plan.sequences),
            "split": digest(materials.split) if materials.split is not None else None,
            "pseudo": describe_generator(plan.features.pseudo) if plan.features.pseudo else None,
        }  # fmt: skip


RULES: Mapping[str, TaskRules] = {"ratings": RatingTasks(), "sequences": SequenceTasks()}


def task_rules(plan: Plan) -> TaskRules:
    """Return the rules of the plan's task type."""
    return RULES[plan.task_type.name]


def _used_domains(plan: Plan) -> list[str]:
    """Domains that some task names, in the plan's order."""
    return [name for name in plan.domains if any(name in task for task in plan.tasks)]
