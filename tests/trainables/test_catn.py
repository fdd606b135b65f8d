"""CATN: known answers, a slow reference, what a prediction may not see, and a planted word."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from features.errors import InputError
from trainables.base_factors import fitted_offsets, source_interactions
from trainables.baselines.rating import PREDICTORS
from trainables.interface import load_model, make_config
from trainables.mapped_users import rows_of
from trainables.models.catn import CATN, Config, document, like_minded, train
from trainables.tasks.arrays import TaskFolders
from trainables.tasks.rating import Ratings, Task, Words, load_task
from trainables.trial import run

from .training import train_seed
from .worlds import normal, random_task, rewritten, spoken

SMALL: dict[str, Any] = {"aspects": 2, "aspect_width": 3, "filters": 4, "dropout": 0.0}


def model_of(task: Task, **config: Any) -> CATN:
    return CATN(Config(**{**SMALL, **config}), task, torch.Generator().manual_seed(0))


def test_attention_over_two_words_and_the_match_of_two_aspects() -> None:
    """Words 1 and 3 under v = ln 3 / 2 weigh 1/4 and 3/4; a = 2.5; S = 2.5, R = 0.549306."""
    model = model_of(spoken(random_task()), aspects=1, aspect_width=1, filters=1)
    network = model.directions[0]
    with torch.no_grad():
        network.project.weight.fill_(1.0)  # type: ignore[union-attr,operator]
        network.gate.weight.zero_()  # type: ignore[union-attr,operator]
        network.gate.bias.fill_(100.0)  # type: ignore[union-attr,operator]
        query = torch.tensor([[np.log(3) / 2]]).float()
        feature, review = torch.tensor([[1.0], [3.0]]), torch.tensor([0, 1])
        sums, weights = network.weighed(feature, review, 2, query)  # type: ignore[operator]
        a = document(sums, weights, torch.zeros(2, dtype=torch.int64), 1)
        assert (weights.flatten() / weights.sum()).tolist() == pytest.approx([0.25, 0.75])
        assert a.item() == pytest.approx(2.5)
        model.correlate.fill_(0.5)
        model.query.copy_(torch.tensor([[[np.log(3) / 2]], [[2.0]]]))
        model.users = lambda *_: a  # type: ignore[method-assign,assignment]
        model.items = lambda *_: torch.full((1, 1, 1), 2.0)  # type: ignore[method-assign,assignment]
        zero = torch.zeros(1, dtype=torch.int64)
        assert model.match(0, zero, zero, zero, None).item() == pytest.approx(1.373265, abs=1e-6)


def slow_term(model: CATN, user: int, item: int, own: int | None) -> float:
    """The text term and b_i of one pair in the direction of the prediction, from the text, float64."""
    weight = {name: value.detach().double().numpy() for name, value in model.named_parameters()}
    config, vectors = model.config, model.vectors_WE.double().numpy()
    shape = (config.aspects, config.aspect_width)
    of = lambda name: weight[f"directions.0.{name}"]  # noqa: E731

    def convolved(rows: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
        padded = np.vstack([np.zeros(rows.shape[1]), rows, np.zeros(rows.shape[1])])
        return np.array(
            [np.maximum(sum(kernel[:, :, k] @ padded[t + k] for k in range(3)) + bias, 0) for t in range(len(rows))]
        )

    def aspects(domain: int, reviews: list[int], query: np.ndarray, beside: bool) -> np.ndarray:
        ratings, g = model.texts[domain].ratings, []
        for row in reviews:
            assert ratings.words is not None
            numbers = ratings.words.number[ratings.words.starts[row] : ratings.words.starts[row + 1]].numpy()
            feature = convolved(vectors[numbers], of("conv"), of("conv_bias"))
            if beside:
                feature = convolved(feature, of("second"), of("second_bias"))
            for f in feature:
                gate = 1 / (1 + np.exp(-(of("gate.weight") @ f + of("gate.bias"))))
                g.append(((of("project.weight") @ f + of("project.bias")) * gate).reshape(shape))
        made = np.zeros(shape)
        for m in range(config.aspects):
            logit = np.exp([one[m] @ query[m] for one in g])
            made[m] = sum(x * one[m] for x, one in zip(logit, g, strict=True)) / logit.sum() if g else 0.0
        return made

    source, target = model.texts
    reviews = [row for row, code in enumerate(source.ratings.user.tolist()) if code == user]
    beside = [int(source.beside_N[row]) for row in reviews if int(source.beside_N[row]) >= 0]
    query = weight["query"]
    a, other = aspects(0, reviews, query[0], False), aspects(0, beside, query[0], True)
    gate = 1 / (1 + np.exp(-(np.hstack([other - a, other * a]) @ of("fuse_gate.weight").T + of("fuse_gate.bias"))))
    u = np.tanh(np.hstack([gate * other, a]) @ of("fuse.weight").T + of("fuse.bias"))
    i = aspects(
        1,
        [row for row, code in enumerate(target.ratings.item.tolist()) if code == item and row != own],
        query[1],
        False,
    )
    total = 0.0
    for m in range(config.aspects):
        for n in range(config.aspects):
            r = query[0][m] @ weight["correlate"] @ query[1][n]
            total += (r if r > 0 else 0.2 * r) * (u[m] @ weight["correlate"] @ i[n])
    return total / config.aspects**2 + float(weight["item_bias.0"][item])


def test_predictions_and_training_pairs_against_the_slow_reference() -> None:
    task = spoken(random_task(seed=3))
    model = model_of(task)
    torch.nn.init.normal_(model.item_bias[0], generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        made = model.term(task.validation)
        ratings = task.validation.ratings
        for place in (0, 7, 19):
            user, item = int(task.validation.source_row[ratings.user[place]]), int(ratings.item[place])
            assert made[place].item() == pytest.approx(slow_term(model, user, item, None), rel=1e-4, abs=1e-5)
        users = torch.tensor([4, 9])
        row, place_P = rows_of(task.overlapping.starts, users)
        pairs = model.match(0, users, place_P, task.overlapping.item[row], row)
        for place in (0, 3, 8):
            slow = slow_term(model, int(users[place_P[place]]), int(task.overlapping.item[row[place]]), int(row[place]))
            assert pairs[place].item() == pytest.approx(slow, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("exclude_own", [True, False])
def test_a_review_is_not_seen_by_the_prediction_of_its_own_rating(exclude_own: bool) -> None:
    task = spoken(random_task(seed=3))
    users = torch.tensor([4])
    row, place = rows_of(task.overlapping.starts, users)
    own = row if exclude_own else None
    terms = []
    for changed in (task, rewritten(task, int(row[1]))):
        with torch.no_grad():
            terms.append(model_of(changed).match(0, users, place, task.overlapping.item[row], own))
    same = torch.isclose(terms[0], terms[1], atol=1e-6, rtol=1e-4)
    assert same.tolist() == [True, exclude_own, True, True, True]


def test_dropout_is_on_the_aspects_of_every_document() -> None:
    """Of the user's own, of the auxiliary one (not of their fusion), and of the item's."""
    task = spoken(random_task(seed=3))
    plain, dropped = (model_of(task, dropout=rate) for rate in (0.0, 0.5))
    users, pairs = torch.arange(len(task.source)), torch.arange(4)
    both = plain.users(0, plain.texts[0], users)
    for model, changes in ((plain, False), (dropped, True)):
        model.train()
        seen = [model.users(0, model.texts[0], users) for _ in range(2)]
        assert torch.equal(*seen) != changes
        terms = [model.match(0, users, pairs, task.overlapping.item[:4], None) for _ in range(2)]
        assert torch.equal(*terms) != changes
        assert torch.equal(model.eval().users(0, model.texts[0], users), both)


def test_both_directions_fit_the_users_bias_where_it_is_part_of_what_is_predicted() -> None:
    task = spoken(random_task(seed=3))
    catn = model_of(task, rating_offset="item_mean").wanted[1]
    offsets = fitted_offsets(source_interactions(task), "item_mean")
    ratings = task.source_ratings
    torch.testing.assert_close(catn, ratings.rating - torch.from_numpy(offsets.item).float()[ratings.item])


def test_the_order_of_reviews_changes_nothing() -> None:
    """Windows end with the review."""
    task = spoken(random_task(seed=3))
    ratings, words = task.train, task.train.words
    assert words is not None
    order = (
        torch.arange(len(ratings)).view(-1, 5).flip(1).flatten()
    )  # each user's five reviews from the last to the first
    pieces = words.number.split(words.starts.diff().tolist())
    turned = Words(
        torch.cat([pieces[k] for k in order.tolist()]),
        torch.cat([words.starts[:1], words.starts.diff()[order].cumsum(0)]),
    )
    other = replace(task, train=Ratings(ratings.user, ratings.item[order], ratings.rating[order], turned))
    with torch.no_grad():
        first, second = (model_of(one).term(task.validation) for one in (task, other))
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-4)


def test_who_is_like_minded() -> None:
    """The same item and rating by a user of one domain, else by anyone else, else one point higher, then lower."""
    user, item = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3]), torch.tensor([0, 1, 2, 0, 1, 0, 3, 3])
    rating = torch.tensor([4.0, 3.0, 5.0, 4.0, 4.0, 4.0, 2.0, 1.0])
    single = user >= 2
    drawn = {
        tuple(like_minded(Ratings(user, item, rating), single, torch.Generator().manual_seed(s)).tolist())
        for s in range(9)
    }
    assert {row[0] for row in drawn} == {5}  # by user 2, who is of one domain, and not by user 1
    assert {row[1] for row in drawn} == {4}  # one point higher
    assert {row[2] for row in drawn} == {-1}  # nobody else
    assert {row[4] for row in drawn} == {1}  # one point lower
    assert {row[5] for row in drawn} == {0, 3}  # anyone else
    assert {(row[6], row[7]) for row in drawn} == {(7, 6)}


def test_an_item_without_training_ratings_has_the_offset_alone() -> None:
    task = spoken(random_task())
    cold = int(task.validation.ratings.item[0])
    kept = task.train.item != cold
    assert task.train.words is not None
    pieces = task.train.words.number.split(task.train.words.starts.diff().tolist())
    words = Words(
        torch.cat([piece for piece, keep in zip(pieces, kept.tolist(), strict=True) if keep]),
        torch.cat([task.train.words.starts[:1], task.train.words.starts.diff()[kept].cumsum(0)]),
    )
    train_ratings = Ratings(task.train.user[kept], task.train.item[kept], task.train.rating[kept], words)
    end = int((train_ratings.user < 12).sum())
    overlapping = Ratings(*(column[:end] for column in (train_ratings.user, train_ratings.item, train_ratings.rating)))
    task = replace(task, train=train_ratings, overlapping=overlapping)
    for config in ({}, {"rating_offset": "none"}):
        settings = Config(**{**SMALL, "epochs": 2, "calibrate": False, **config})
        trained = train_seed("catn", settings, task, 0)[-1]
        rows = task.validation.ratings.item == cold
        with torch.no_grad():
            rated = trained.predict(task.validation, task, 0)[rows]
        expected = PREDICTORS["source_offset"](task.validation, task)[rows] if not config else torch.zeros_like(rated)
        torch.testing.assert_close(rated, expected, atol=1e-6, rtol=0)


def test_a_task_without_reviews_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"^this task holds no reviews, which CATN reads; set features\.reviews in the plan$"
    ):
        next(train(Config(), random_task(), 0))
    model = load_model("catn")
    assert (model.NAME, model.NEEDS) == ("CATN", ("reviews",))
    assert set(model.ABLATIONS) == {"plain", "wo_auxiliary", "wo_correlation", "one_aspect", "own_review", "shared"}
    with pytest.raises(InputError, match=r"parameters is 'own'; choose from per_direction, shared"):
        make_config("catn", {"parameters": "own"}, "here")


def planted(users: int, held_out: int, items: int, seed: int = 0) -> tuple[Task, Tensor]:
    """Users who say in the source domain whether they like what items say of themselves in the target domain."""
    draw = np.random.default_rng(seed)
    keen, kind = draw.integers(0, 2, users + held_out) * 2 - 1, draw.integers(0, 2, items) * 2 - 1
    each = 12

    def ratings(people: int, item_words: bool) -> Ratings:
        item = np.concatenate([np.sort(draw.choice(items, each, replace=False)) for _ in range(people)])
        user = np.arange(people).repeat(each)
        score = 3 + (keen[user] * kind[item] if item_words else 0 * item)
        said = (kind[item] + 1) // 2 if item_words else 2 + (keen[user] + 1) // 2
        filler = draw.integers(4, 9, (len(user), 2))
        number = np.column_stack([filler[:, 0], said, filler[:, 1]]).astype(np.int32).ravel()
        words = Words(torch.from_numpy(number), torch.arange(len(user) + 1) * 3)
        return Ratings(torch.from_numpy(user), torch.from_numpy(item), torch.from_numpy(score).float(), words)

    source, target = ratings(users + held_out, False), ratings(users, True)
    item = torch.from_numpy(np.concatenate([np.sort(draw.choice(items, each, replace=False)) for _ in range(held_out)]))
    user = torch.arange(held_out).repeat_interleave(each)
    wanted = torch.from_numpy(3 + keen[users:][user.numpy()] * kind[item.numpy()]).float()
    task = random_task(overlapping=users, side=0, held_out=held_out, items=items)
    validation = replace(
        task.validation,
        ratings=Ratings(user, item, wanted),
        source_row=torch.arange(users, users + held_out),
        cold_item=torch.zeros(len(user), dtype=torch.bool),
    )
    task = replace(
        task, source_ratings=source, source_items=items, train=target, validation=validation, mean=3.0, slope=0.0,
        overlapping=Ratings(target.user, target.item, target.rating), item_offset=torch.zeros(items),
        word_vectors=normal(1, 9, 8).float(),
    )  # fmt: skip
    return task, wanted


def test_a_planted_word_that_multiplies_what_items_say_is_found() -> None:
    """The item mean errs by 1 everywhere; half of that is to go, for users who are new."""
    task, _ = planted(users=80, held_out=20, items=30)
    config = Config(aspects=2, aspect_width=8, filters=12, dropout=0.0, lr=1e-2, epochs=12, patience=12)
    best = train_seed("catn", config, task, 0)[-1]
    assert best.metrics["val_rmse"] < 0.5


def test_the_same_seed_gives_the_same_bits_and_goes_on_after_a_kill(worded: TaskFolders) -> None:
    config = {**SMALL, "dropout": 0.2, "epochs": 3, "words": 60}
    state = None
    for report in run("catn", config, str(worded.task_dir), [0, 1], str(worded.test_dir)):
        if report.epoch == 2 and report.state is not None:
            torch.save(report.state(), file := io.BytesIO())
            file.seek(0)
            state = torch.load(file, weights_only=True)
    first = {name: value for name, value in report.metrics.items() if "seconds" not in name}
    *_, again = run("catn", config, str(worded.task_dir), [0, 1], str(worded.test_dir), state=state)
    assert {name: value for name, value in again.metrics.items() if "seconds" not in name} == first
    *_, alone = run("catn", config, str(worded.task_dir), [1])
    assert alone.metrics["val_rmse"] == first["val_rmse/seed_1"]
    assert first["val_rmse"] < _bar(worded) + 0.05


def _bar(folders: TaskFolders) -> float:
    task = load_task(folders.task_dir)
    error_N = PREDICTORS["source_offset"](task.validation, task) - task.validation.ratings.rating
    return float(error_N.square().mean().sqrt())
