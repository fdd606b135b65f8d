"""Popularity and nearest neighbours: by hand, against plain loops, and on a world with a taste."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from features.domains.domain import Domain, DomainSpec, FilterSpec, prepare_domain
from features.errors import InputError
from features.simulate.simulator import SimulateSpec, simulate
from features.store.tables import FeatureTable
from trainables.baselines.sequential import MIXES, NEEDS, PREDICTORS, RECENCY, as_predict, title_similarity
from trainables.metrics.sequential import sequence_errors
from trainables.tasks.arrays import TaskFolders
from trainables.tasks.sequential import (
    LAST,
    HeldOut,
    Sequences,
    SequenceSpec,
    SequenceTask,
    load_held_out,
    load_task,
    seen,
)
from trainables.tasks.sequential_build import build_sequences

from .sequence_worlds import build_world, lists, make_sequence_world


def candidate_scores(name: str, task: SequenceTask, rows: HeldOut) -> Tensor:
    """What ranks the candidates: LAST for items of the history, [R, C]."""
    column = rows.candidates.long() - task.target[0]
    hidden = seen(rows.history, task.target).gather(1, column)
    return as_predict(name)(rows, task, 0).gather(1, column).masked_fill(hidden, LAST)


def neighbours_by_hand(task: SequenceTask, history: list[int], item: int) -> float:
    """The definition, item by item."""
    if item in history:
        return LAST
    baskets = [set(sequence) for sequence in lists(task.train)]
    count = {i: sum(i in basket for basket in baskets) for i in (*history, item)}
    weights = [RECENCY ** (len(history) - 1 - place) for place in range(len(history))]
    total = 0.0
    for weight, old in zip(weights, history, strict=True):
        both = sum(old in basket and item in basket for basket in baskets)
        total += weight * both / np.sqrt(max(count[old] * count[item], 1))
    return total / sum(weights) if history else 0.0


def test_nearest_neighbours_against_their_definition(task: SequenceTask, scored: HeldOut) -> None:
    scores = candidate_scores("item_knn", task, scored)
    for row, history in enumerate(lists(scored.history)):
        expected = [neighbours_by_hand(task, history, item) for item in scored.candidates[row].tolist()]
        assert scores[row].tolist() == pytest.approx(expected, abs=1e-6)


def test_popularity_counts_training_sequences(task: SequenceTask, scored: HeldOut) -> None:
    scores = candidate_scores("popularity", task, scored)
    for row, history in enumerate(lists(scored.history)):
        for score, item in zip(scores[row].tolist(), scored.candidates[row].tolist(), strict=True):
            assert score == (LAST if item in history else int((task.train.item == item).sum()))


def test_title_similarity_against_its_definition(task: SequenceTask, scored: HeldOut) -> None:
    score = title_similarity(task)(scored)
    unit = torch.nn.functional.normalize(task.titles(), dim=1)
    for row, history in enumerate(lists(scored.history)):
        weight = RECENCY ** torch.arange(len(history) - 1, -1, -1).float()
        mean = (weight / weight.sum()) @ unit[history]
        torch.testing.assert_close(score[row], unit[slice(*task.target)] @ mean, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", PREDICTORS)
def test_scores_are_of_all_target_items_and_of_no_seed(name: str, task: SequenceTask, scored: HeldOut) -> None:
    predict = as_predict(name)
    scores = predict(scored, task, 0)
    assert scores.shape == (len(scored), task.target[1] - task.target[0])
    assert scores.dtype == torch.float32
    assert scores.equal(predict(scored, task, 1))


@pytest.mark.parametrize("name", PREDICTORS)
def test_other_rows_do_not_change_a_score(name: str, task: SequenceTask, scored: HeldOut) -> None:
    whole = as_predict(name)(scored, task, 0)
    for rows in torch.arange(len(scored)).split(3):  # type: ignore[no-untyped-call]
        torch.testing.assert_close(as_predict(name)(scored.rows(rows), task, 0), whole[rows])


def test_a_baseline_that_reads_titles_says_what_a_task_lacks(task: SequenceTask) -> None:
    assert NEEDS == {"item_knn_title": ("titles",)}
    with pytest.raises(InputError, match=r"this task has no titles; set features\.text in the plan"):
        as_predict("item_knn_title")(task.validation, replace(task, text=None), 0)


@pytest.mark.parametrize("name", PREDICTORS)
def test_an_empty_history_gives_numbers(name: str, task: SequenceTask, scored: HeldOut) -> None:
    empty = Sequences(torch.zeros(0, dtype=torch.int64), torch.zeros(len(scored) + 1, dtype=torch.int64))
    rows = replace(scored, history=empty)
    scores = candidate_scores(name, task, rows)
    assert scores.isfinite().all()
    if name != "popularity":
        assert (scores == 0).all()


def test_the_mix_is_the_one_that_validation_likes_best(task: SequenceTask, scored: HeldOut) -> None:
    """Of all mixes of the two plain scorers; test rows have no say."""

    def mixed(rows: HeldOut, mix: float) -> Tensor:
        knn = candidate_scores("item_knn", task, rows)
        title = title_similarity(task)(rows).gather(1, rows.candidates.long() - task.target[0])
        return (1 - mix) * knn + mix * title

    rows = task.validation
    quality = [sequence_errors(rows, mixed(rows, mix)).metrics(task.protocols)["ndcg10"] for mix in MIXES]
    best = MIXES[int(np.argmax(quality))]
    scores = candidate_scores("item_knn_title", task, scored)
    known = scores < LAST / 2
    torch.testing.assert_close(scores[~known], mixed(scored, best)[~known], atol=1e-5, rtol=1e-5)


def mean_ndcg(folders: TaskFolders) -> dict[tuple[str, str], float]:
    """Mean NDCG@10 of each predictor under each protocol, over validation and test rows."""
    task = load_task(folders.task_dir)
    found: dict[tuple[str, str], list[float]] = {}
    for rows in (task.validation, load_held_out(folders.test_dir)):
        for name in PREDICTORS:
            errors = sequence_errors(rows, candidate_scores(name, task, rows))
            for place, protocol in enumerate(task.protocols):
                found.setdefault((name, protocol), []).extend(errors.ndcg10[errors.protocol == place])
    return {name: float(np.mean(values)) for name, values in found.items()}


def test_neighbours_beat_popularity_where_taste_transfers(tmp_path: Path) -> None:
    mean = mean_ndcg(build_world(make_sequence_world(users=240, overlap=160), tmp_path))
    for protocol in ("as-given", "inter"):
        assert mean["item_knn", protocol] > mean["popularity", protocol] + 0.1
        assert mean["item_knn_title", protocol] > mean["popularity", protocol] + 0.1


def no_text(domain: Domain) -> FeatureTable:
    """Vectors that say nothing."""
    ids = list(domain.items()["item_id"])
    vectors = np.random.default_rng(0).normal(size=(len(ids), 4)).astype(np.float16)
    return FeatureTable(domain.path, domain.name, ids, vectors, {})  # type: ignore[arg-type]


def test_neighbours_beat_popularity_on_simulated_domains_where_users_choose_by_taste(tmp_path: Path) -> None:
    size = {"users": 1200, "items": 400, "ratings": 20_000}
    spec = SimulateSpec(domains={"books": size, "movies": size}, overlap=800, choice=4.0, images=0.0)
    data = simulate(spec, tmp_path / "raw")

    def prepared(name: str) -> Domain:
        of = DomainSpec(name=name, reader="amazon2023", interactions=f"{name}.jsonl.gz", filters=FilterSpec(k_core=5))
        return prepare_domain(of, data, tmp_path / "domains")

    books, movies = prepared("books"), prepared("movies")
    text = {domain.name: no_text(domain) for domain in (books, movies)}
    rule = SequenceSpec(negatives=199, validation_share=0.25, test_share=0.25)
    mean = mean_ndcg(build_sequences(rule, books, movies, None, text, None, tmp_path / "tasks"))
    assert mean["item_knn", "as-given"] > mean["popularity", "as-given"] + 0.1
    assert mean["item_knn", "inter"] > mean["popularity", "inter"] + 0.05
