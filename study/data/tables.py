"""From domains to feature tables: vectors of users and items by language models."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from features.domains.domain import Domain
from features.encoders.spec import EncoderSpec
from features.extraction.extract import Estimate, estimate, extract_tables
from features.extraction.workers import Actors
from features.store.tables import FeatureTable
from study.data.tasks import TableName, task_rules
from study.home import Home
from study.plan.schema import Plan
from study.progress import StartProgress, phase_progress


def estimates(plan: Plan, domains: Mapping[str, Domain], home: Home) -> dict[TableName, Estimate]:
    """Return what extraction has left to do for each table; empty where the plan has no text features."""
    text = plan.features.text
    if text is None:
        return {}
    return {
        (name, kind): estimate(text.spec(kind), domains[name], home.store)
        for name, kind in task_rules(plan).table_names(plan)
    }


def make_tables(
    plan: Plan, domains: Mapping[str, Domain], home: Home, start_progress: StartProgress, *, on_ray: bool = False,
    actors: Actors | None = None,
) -> dict[TableName, FeatureTable]:  # fmt: skip
    """Extract the tables that tasks read, or find them stored; empty where the plan has no text features.

    Tables of one encoder are made by one job, so that its weights are loaded once. on_ray and actors: as of `prepare`.
    """
    text = plan.features.text
    if text is None:
        return {}
    names = task_rules(plan).table_names(plan)
    by_encoder: dict[EncoderSpec, list[TableName]] = {}
    for name, kind in names:
        by_encoder.setdefault(text.spec(kind).encoder, []).append((name, kind))
    tables: dict[TableName, FeatureTable] = {}
    for group in by_encoder.values():
        progress = phase_progress(start_progress, " and ".join(dict.fromkeys(kind for _, kind in group)))
        extracted = extract_tables(
            [(text.spec(kind), domains[name]) for name, kind in group], home.store, workers=actors,
            use_ray=on_ray or None, progress=partial(progress, "encoding"),
            image_progress=lambda domain, *counts, progress=progress: progress(f"finding images of {domain}", *counts),
        )  # fmt: skip
        tables |= zip(group, extracted, strict=True)
    return {name: tables[name] for name in names}


def table_keys(tables: Mapping[TableName, FeatureTable]) -> dict[str, str]:
    """Return the content key of each table, by `<domain>-<kind>`."""
    return {f"{name}-{kind}": table.key for (name, kind), table in tables.items()}


def table_metrics(tables: Mapping[str, FeatureTable]) -> dict[str, float]:
    """Return how each table was made, as metrics: rows, failures, and the throughput of the call that finished it."""
    metrics: dict[str, float] = {}
    for name, table in tables.items():
        rows, throughput = table.manifest["rows"], table.manifest.get("throughput", {})
        counts = {"rows": rows["done"], "failed": len(rows["failed"]), "tokens": table.manifest["tokens"]}
        if "without_image" in rows:
            counts["without_image"] = len(rows["without_image"])
        for metric, value in {**throughput, **counts, "seconds": table.manifest["seconds"]}.items():
            if value is not None:
                metrics[f"features/{name}/{metric}"] = float(value)
    return metrics
