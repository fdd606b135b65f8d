"""Pseudo-items of training users of one domain, by a language model: one table for each pair of domains and ratio."""

from __future__ import annotations

from collections.abc import Mapping

from features.domains.domain import Domain
from features.extraction.workers import Actors
from features.pseudo.generate import Execution, History, item_titles, make_pseudo
from features.pseudo.table import PseudoTable
from features.store.tables import FeatureTable
from study.home import Home
from study.plan.schema import Plan
from study.progress import StartProgress, phase_progress
from trainables.tasks.sequential import OVERLAPPING
from trainables.tasks.sequential_build import TrainingUsers, training_users

Pair = tuple[str, str]
"""Two domains, sorted by name: both directions of a task share what is made for them."""


def domain_pairs(plan: Plan) -> list[Pair]:
    """Return the pairs of domains, whatever the direction of their tasks."""
    return list(dict.fromkeys((min(task), max(task)) for task in plan.tasks))


def all_ratios(plan: Plan) -> list[float]:
    """Return the ratios of all cells, those of a sweep included."""
    return list(dict.fromkeys(cell.ratio for cell in (*plan.cells, *plan.swept_cells)))


def pair_name(pair: tuple[str, str], ratio: float) -> str:
    """Return `books-movies@0.5`, whatever the direction."""
    return f"{min(pair)}-{max(pair)}@{ratio:g}"


def make_pseudo_tables(
    plan: Plan, domains: Mapping[str, Domain], split: Mapping[str, str] | None,
    tables: Mapping[tuple[str, str], FeatureTable], home: Home, start_progress: StartProgress, *, on_ray: bool = False,
    actors: Actors | None = None,
) -> dict[str, PseudoTable]:  # fmt: skip
    """Generate items for the training users of one domain, or find them stored; by `pair_name`.

    split: user id -> train | valid | test, where the data says it. Empty where the plan has no pseudo-items.
    """
    spec, text = plan.features.pseudo, plan.features.text
    if spec is None:
        return {}
    assert text is not None, "the plan's checks ask for it"
    pseudo = {}
    for pair in domain_pairs(plan):
        titles = {domain: item_titles(domains[domain]) for domain in pair}
        item_tables = {domain: tables[domain, "items"] for domain in pair}
        for ratio in all_ratios(plan):
            name, (source, target) = pair_name(pair, ratio), pair
            users = training_users(plan.sequences.at(ratio), domains[source], domains[target], split)
            progress = phase_progress(start_progress, f"pseudo-items of {name}")
            pseudo[name] = make_pseudo(
                spec, text.spec("items").encoder, histories(users, pair), titles, item_tables, home.store,
                Execution(progress=progress, workers=actors, use_ray=on_ray or None),
            )  # fmt: skip
    return pseudo


def histories(users: TrainingUsers, pair: tuple[str, str]) -> list[History]:
    """Return what each training user has in the source and in the target domain of `pair`."""
    result = []
    for number, user in enumerate(users.user):
        items_of_user = slice(users.starts[number], users.starts[number + 1])
        item, in_target = users.item[items_of_user], users.in_target[items_of_user]
        items = {pair[0]: list(item[~in_target]), pair[1]: list(item[in_target])}
        result.append(History(user=str(user), items=items))
    return result


def users_to_generate_for(
    plan: Plan, domains: Mapping[str, Domain], split: Mapping[str, str] | None
) -> dict[str, int]:  # fmt: skip
    """Count the training users of one domain, by `pair_name`; empty where the plan has no pseudo-items."""
    users = {}
    for source, target in domain_pairs(plan) if plan.features.pseudo else ():
        for ratio in all_ratios(plan):
            training = training_users(plan.sequences.at(ratio), domains[source], domains[target], split)
            users[pair_name((source, target), ratio)] = int((training.group != OVERLAPPING).sum())
    return users
