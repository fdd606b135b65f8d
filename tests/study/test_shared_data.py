"""The real data beside the checkout: what the plans' readers and tasks make of it, against its README."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from features.domains.domain import Domain, prepare_domain
from features.domains.splits import read_split
from study.plan.load import load_plan
from study.plan.schema import Plan
from trainables.tasks.rating_build import build_task
from trainables.tasks.sequential import load_held_out
from trainables.tasks.sequential_build import build_sequences

SHARED = Path(__file__).parents[3] / "shared" / "data"
DOUBAN = {  # training, validation, test and side users
    "books->music@0.2": (651, 163, 204, 142), "books->music@0.5": (407, 102, 509, 142),
    "books->music@0.8": (163, 41, 814, 142), "music->books@0.2": (651, 163, 204, 678),
    "music->books@0.5": (407, 102, 509, 678), "music->books@0.8": (163, 41, 814, 678),
}  # fmt: skip


def plan_and_domains(name: str, folder: str, store: Path) -> tuple[Plan, dict[str, Domain]]:
    if not (SHARED / folder).is_dir():
        pytest.skip(f"{SHARED / folder} is not there")
    plan = load_plan(name)
    data = SHARED if name == "movie-book" else SHARED / folder
    return plan, {key: prepare_domain(spec, data, store) for key, spec in plan.domains.items()}


def test_douban_has_the_users_of_its_readme_in_every_cell(tmp_path: Path) -> None:
    plan, domains = plan_and_domains("douban-book-music", "douban-book-music", tmp_path / "domains")
    read = {name: domain.manifest["counts"][0] for name, domain in domains.items()}
    assert [(read[name]["users"], read[name]["items"], read[name]["interactions"]) for name in ("books", "music")] == [
        (2110, 6777, 96041), (1672, 5567, 69709),
    ]  # fmt: skip
    assert plan.split.data_seed == 2027
    factors = replace(plan.features.ratings, factors=2, sweeps=1)
    for cell in plan.cells:
        source, target = domains[cell.source], domains[cell.target]
        built = build_task(plan.split.at(cell.ratio), source, target, factors, tmp_path / "tasks")
        users = [built.counts[f"{part}_users"] for part in ("train", "validation", "test", "side")]
        assert tuple(users) == DOUBAN[cell.name], cell.name


def test_movie_book_has_the_papers_test_rows_and_catalogue_and_says_what_it_lacks(tmp_path: Path) -> None:
    plan, domains = plan_and_domains("movie-book", "movie-book", tmp_path / "domains")
    items = {name: domain.items() for name, domain in domains.items()}
    assert {name: len(table) for name, table in items.items()} == {"movie": 12875, "book": 93860}
    assert {name: int(table["title"].notna().sum()) for name, table in items.items()} == {"movie": 12875, "book": 9315}
    split = read_split(SHARED / str(plan.sequences.users), plan.sequences.columns)
    tests = {}
    for cell in plan.cells:
        rules = plan.sequences.at(cell.ratio)
        built = build_sequences(
            rules, domains[cell.source], domains[cell.target], split, None, None, tmp_path / "tasks"
        )
        counts = built.counts
        tests[cell.target] = counts["test_users"]
        assert counts["train_overlapping"] == 6652
        assert {counts["train_source_only"], counts["train_target_only"]} == {12185, 0}, (
            "book-only sequences are missing"
        )
        first, last = {name: (0, 93860) if name == "book" else (93860, 106735) for name in domains}[cell.target]
        candidates = load_held_out(built.test_dir).candidates
        assert (int(candidates.min()) >= first, int(candidates.max()) < last) == (True, True)
        assert candidates.shape[1] == 1000
    assert tests == {"movie": 311, "book": 525}
    assert "124,889 book-only training sequences are missing" in plan.note
    assert "nine tenths of the book titles" in plan.note
