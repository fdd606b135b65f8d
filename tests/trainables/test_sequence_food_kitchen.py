"""LGCD's own data: the counts of its Table 2 and what simple predictors were measured to reach on its test rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from features.domains.domain import Domain, DomainSpec, prepare_domain
from features.domains.splits import read_split
from features.store.tables import FeatureTable
from trainables.baselines.sequential import as_predict
from trainables.task_types import SEQUENCES
from trainables.tasks.arrays import TaskFolders
from trainables.tasks.sequential import OVERLAPPING, SOURCE_ONLY, TARGET_ONLY, SequenceSpec, load_held_out, load_task
from trainables.tasks.sequential_build import build_sequences, training_users

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "food-kitchen"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"Food-Kitchen is not at {DATA}")
SPEC = SequenceSpec()


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Domain]:
    store = tmp_path_factory.mktemp("domains")

    def spec(name: str) -> DomainSpec:
        return DomainSpec(
            name=name, reader="table", interactions="interactions.parquet", items="items.parquet",
            columns={"timestamp": "position"}, where={"domain": name}, feedback="implicit",
        )  # fmt: skip

    return {name: prepare_domain(spec(name), DATA, store) for name in ("food", "kitchen")}


@pytest.fixture(scope="module")
def folders(domains: dict[str, Domain], tmp_path_factory: pytest.TempPathFactory) -> dict[str, TaskFolders]:
    """Target domain -> task; texts say nothing."""
    store = tmp_path_factory.mktemp("tasks")

    def text(domain: Domain) -> FeatureTable:
        ids = list(domain.items()["item_id"])
        vectors = np.random.default_rng(0).normal(size=(len(ids), 2)).astype(np.float16)
        return FeatureTable(domain.path, domain.key, ids, vectors, {})  # type: ignore[arg-type]

    tables = {name: text(domain) for name, domain in domains.items()}
    split = read_split(DATA / "users.parquet", {})
    food, kitchen = domains["food"], domains["kitchen"]
    return {
        "food": build_sequences(SPEC, kitchen, food, split, tables, None, store),
        "kitchen": build_sequences(SPEC, food, kitchen, split, tables, None, store),
    }


@pytest.mark.parametrize(
    ("target", "single", "validation", "test"),
    [("food", (38_191, 5_472), 363, 300), ("kitchen", (5_472, 38_191), 597, 637)],
)
def test_counts(
    folders: dict[str, TaskFolders], target: str, single: tuple[int, int], validation: int, test: int
) -> None:
    task, rows = load_task(folders[target].task_dir), load_held_out(folders[target].test_dir)
    assert task.items == 36_298
    assert task.target[1] - task.target[0] == {"food": 8_661, "kitchen": 27_637}[target]
    assert [int((task.group == group).sum()) for group in (OVERLAPPING, SOURCE_ONLY, TARGET_ONLY)] == [7_501, *single]
    assert (len(task.validation), len(rows)) == (2 * validation, 2 * test)
    assert rows.candidates.shape == (2 * test, 1_000)
    assert bool((rows.history.lengths > 0).all())
    assert len(task.train.item) == 402_268


def test_both_directions_share_what_training_reads(folders: dict[str, TaskFolders]) -> None:
    food, kitchen = (load_task(folders[name].task_dir) for name in ("food", "kitchen"))
    assert food.train_key == kitchen.train_key
    assert food.train.item.equal(kitchen.train.item)


def test_a_fifth_of_the_overlap(domains: dict[str, Domain]) -> None:
    split = read_split(DATA / "users.parquet", {})
    people = training_users(SequenceSpec(overlap_ratio=0.2), domains["food"], domains["kitchen"], split)
    assert np.bincount(people.group).tolist() == [1_500, 5_472 + 6_001, 38_191 + 6_001]
    assert len(people.item) == 402_268


@pytest.mark.parametrize(
    ("target", "name", "protocol", "hr5", "ndcg5"),
    [
        ("food", "item_knn", "as-given", 0.26, 0.19),
        ("kitchen", "item_knn", "as-given", 0.21, 0.14),
        ("food", "item_knn", "inter", 0.093, 0.064),
        ("kitchen", "item_knn", "inter", 0.122, 0.084),
        ("food", "popularity", "as-given", 0.033, 0.02),
        ("kitchen", "popularity", "as-given", 0.025, 0.02),
    ],
)
def test_simple_predictors_reach_what_was_measured(
    folders: dict[str, TaskFolders], target: str, name: str, protocol: str, hr5: float, ndcg5: float
) -> None:
    """Measured before this project, with other negatives: 0.015 is about what drawing them anew changes."""
    task, rows = load_task(folders[target].task_dir), load_held_out(folders[target].test_dir)
    found = SEQUENCES.measure(rows, as_predict(name), task, 0, full=False).metrics
    assert found[f"hr5_{protocol}"] == pytest.approx(hr5, abs=0.015)
    assert found[f"ndcg5_{protocol}"] == pytest.approx(ndcg5, abs=0.015)
