"""What a plan's data hold, as tables: domains, what each filter left, overlap, users of each split, and what is odd.

`study check` prints them before anything is made, `study extract` at its end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from rich.table import Table
from rich.text import Text

from features.domains.domain import Domain, DomainSpec, matching_files, raw_interactions, raw_items
from features.domains.notes import Notes
from features.domains.overlap import Overlap, compare_domains
from features.errors import InputError
from study.data.pseudo_items import domain_pairs
from study.data.tasks import task_rules
from study.plan.schema import Plan

SMALL = 40_000_000  # bytes of all raw files together: domains of less are read whole by `study check`
SAMPLE = 200_000  # rows of a larger file that are read
FEW_USERS = 30  # held-out users of a cell; with fewer, differences between configurations are chance
FEW_ROWS = 100  # their ratings


def data_tables(plan: Plan, domains: Mapping[str, Domain], split: Mapping[str, str] | None) -> Iterator[Table | Text]:
    """Yield the tables; raises InputError for a cell that cannot be split."""
    yield _domain_table(domains)
    if (steps := _ladder_table(domains)) is not None:
        yield steps
    overlaps = [compare_domains(domains[source], domains[target]) for source, target in domain_pairs(plan)]
    yield _overlap_table(overlaps)
    notes = [f"{name}: {note}" for name, domain in domains.items() for note in _domain_notes(plan, domain)]
    notes += [note for overlap in overlaps for note in overlap.notes]
    yield from note_lines(notes)  # before the cells: they may say why these cannot be split
    notes = []
    cells = Table("cell", "part", "users", plan.task_type.rows, title="users of each split")
    for cell in (*plan.cells, *plan.swept_cells):
        for part, (users, rows) in task_rules(plan).split_sizes(plan, domains, split, cell).items():
            cells.add_row(cell.name, part, f"{users:,}", f"{rows:,}" if rows is not None else "")
            if part in ("validation", "test") and (users < FEW_USERS or (rows is not None and rows < FEW_ROWS)):
                shown = f" with {rows:,} {plan.task_type.rows}" if rows is not None else ""
                notes.append(
                    f"{cell.name}: {users:,} {part} users{shown} cannot carry a study: differences are mostly chance"
                )
    yield cells
    yield from note_lines(notes)


def note_lines(notes: Sequence[str]) -> Iterator[Text]:
    """Yield notes as lines of text, never as markup."""
    for note in notes:
        yield Text(f"note: {note}")


def check_leaks(plan: Plan, domains: Mapping[str, Domain]) -> None:
    """Raise InputError where more of the shared users' target interactions stand in the source than the plan allows."""
    for source, target in plan.tasks:
        overlap = compare_domains(domains[source], domains[target])
        share = overlap.verbatim_share
        if share > plan.most_shared:
            raise InputError(
                f"task {source}->{target}: {overlap.verbatim:,} of {overlap.target_rows:,} interactions ({share:.0%}) that "
                f"the shared users have in {target} stand in {source} as they are, so what is predicted is known; take "
                f"them out of one domain, or set most_shared (now {plan.most_shared:g}) if this is meant"
            )


def sample_tables(plan: Plan, data: Path) -> Iterator[Table | Text]:
    """Yield what the first rows of each file hold, where the files are too large to be read whole in seconds."""
    table = Table("domain", "file", "rows read", "users", "items", "ratings", title="sample of the data")
    lines: list[str] = []
    for name, spec in plan.domains.items():
        for kind in ("interactions", "items"):
            for file in (file for pattern in spec.files(kind) for file in matching_files(data, pattern)):
                notes = Notes()
                table.add_row(Text(name), Text(file), *_sampled(spec, kind, data / file, notes))
                lines += [f"{name}: {note}" for note in notes.lines()]
    table.caption = (
        f"at most {SAMPLE:,} rows of each file; counts after filters, overlap and splits are told by `study extract`"
    )
    yield table
    yield from note_lines(lines)


def is_large(plan: Plan, data: Path) -> bool:
    """Return whether the raw files are too large to be read whole by `study check`; packed ones count four times."""
    size = 0
    for spec in plan.domains.values():
        for name in (*spec.files("interactions"), *spec.files("items")):
            for file in matching_files(data, name):
                packed = file.lower().endswith((".gz", ".parquet", ".pq"))
                size += (data / file).stat().st_size * (4 if packed else 1)
    return size > SMALL


def _sampled(spec: DomainSpec, kind: str, path: Path, notes: Notes) -> list[str]:
    """Return rows, users, items and range of ratings of a file's first rows."""
    rows, users, items = 0, set[str](), set[str]()
    low, high = float("inf"), float("-inf")
    batches: Iterator[pa.RecordBatch] = (raw_interactions if kind == "interactions" else raw_items)(spec, [path], notes)
    for batch in islice(batches, 10_000):
        rows += batch.num_rows
        items.update(pc.unique(batch["item_id"]).to_pylist())
        if kind == "interactions":
            users.update(pc.unique(batch["user_id"]).to_pylist())
            ends = pc.min_max(batch["rating"]).as_py()
            if ends["min"] is not None:
                low, high = min(low, ends["min"]), max(high, ends["max"])
        if rows >= SAMPLE:
            break
    ratings = f"{low:g} to {high:g}" if low <= high else ""
    return [f"{rows:,}", f"{len(users):,}" if users else "", f"{len(items):,}", ratings]


def _domain_table(domains: Mapping[str, Domain]) -> Table:
    table = Table(
        "domain",
        "users",
        "items",
        "interactions",
        "ratings",
        "times",
        "same time",
        "items without text",
        title="domains",
    )
    for name, domain in domains.items():
        counts, profile = domain.manifest["counts"][-1], domain.manifest["profile"]
        numbers = (counts["users"], profile["items"], counts["interactions"])
        table.add_row(
            name, *(f"{number:,}" for number in numbers), _ratings(domain), _times(profile), f"{profile['tied']:,}",
            f"{profile['items_without_text']:,}",
        )  # fmt: skip
    table.caption = "after filters; same time: interactions that share user and time with another"
    return table


def _ratings(domain: Domain) -> str:
    rating = domain.manifest["profile"]["rating"]
    if rating["lowest"] is None:
        return "none"
    step = ", with fractions" if rating["fractions"] else ""
    return f"{rating['lowest']:g} to {rating['highest']:g}{step}"


def _times(profile: Mapping[str, Any]) -> str:
    kind, first, last = profile["times"]["kind"], profile["first"], profile["last"]
    if kind == "none" or first is None:
        return "none"
    if kind == "order":
        return f"numbers, {first:,} to {last:,}"
    try:
        days = [datetime.fromtimestamp(moment / 1000, UTC).strftime("%Y-%m-%d") for moment in (first, last)]
    except (OverflowError, ValueError, OSError):
        return f"numbers, {first:,} to {last:,}"
    return " to ".join(days)


def _ladder_table(domains: Mapping[str, Domain]) -> Table | None:
    """Return what each step left; None where nothing but reading was done."""
    table = Table("domain", "step", "interactions", "users", "items", title="what each step left")
    for name, domain in domains.items():
        for row in domain.manifest["counts"]:
            table.add_row(name, row["step"], *(f"{row[key]:,}" for key in ("interactions", "users", "items")))
    whole = all(
        len({(row["interactions"], row["users"], row["items"]) for row in domain.manifest["counts"]}) == 1
        for domain in domains.values()
    )
    return None if whole else table


def _overlap_table(overlaps: Sequence[Overlap]) -> Table:
    table = Table("domains", "shared users", "shared item ids", "same user and item", "verbatim", title="overlap")
    for overlap in overlaps:
        numbers = (overlap.users, overlap.items, overlap.pairs, overlap.verbatim)
        table.add_row(f"{overlap.source}, {overlap.target}", *(f"{number:,}" for number in numbers))
    table.caption = "verbatim: with the same rating and time in both domains"
    return table


def _domain_notes(plan: Plan, domain: Domain) -> Iterator[str]:
    """Yield what is odd about a domain."""
    yield from domain.manifest["notes"]
    profile, counts = domain.manifest["profile"], domain.manifest["counts"][-1]
    duplicates = domain.manifest["duplicates"]
    if duplicates["rows"]:
        rule = {
            "mean": "their mean rating counts", "last": "the last counts", "first": "the first counts",
            "keep": "each that has a time of its own is kept",
        }  # fmt: skip
        yield f"{duplicates['rows']:,} interactions repeat a user and item; {rule[duplicates['rule']]} (duplicates)"
    if profile["tied"]:
        yield (
            f"{profile['tied']:,} of {counts['interactions']:,} interactions share user and time with another; a seeded "
            "hash puts them in order, and nothing of the data"
        )
    several = profile["users_of_several"]
    if several and profile["users_unordered"] == several and profile["times"]["kind"] != "none":
        yield "no user has interactions at two times, so the domain has no order to speak of, and sequences say little"
    if profile["times"]["missing"] and profile["times"]["kind"] != "none":
        yield f"{profile['times']['missing']:,} interactions have no time"
    if plan.features.text is not None and profile["items_without_text"]:
        yield (
            f"{profile['items_without_text']:,} of {profile['items']:,} items have no title, categories or description; "
            "they get the mean vector of the others; filters.require_text leaves them out"
        )
    rating = profile["rating"]
    if rating["lowest"] is not None and rating["lowest"] == rating["highest"]:
        yield f"every rating is {rating['lowest']:g}, as feedback without ratings is often written: feedback: implicit"
    elif rating["lowest"] is not None:
        low, high = domain.rating_scale
        if rating["highest"] <= low + (high - low) / 2 and rating["values"] > 1:
            yield (
                f"ratings run from {rating['lowest']:g} to {rating['highest']:g} on a scale of {low:g} to {high:g}; "
                "rating_scale tells the scale"
            )
    if profile["items_alone"]:
        yield f"{profile['items_alone']:,} items of the catalogue have no interaction; they are candidates and negatives"
