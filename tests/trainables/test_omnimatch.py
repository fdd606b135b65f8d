"""OmniMatch: known answers, a slow reference, whose reviews stand for a cold-start user's, and a planted word."""

from __future__ import annotations

import io
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from features.errors import InputError
from trainables.base_factors import fitted_offsets, source_interactions
from trainables.baselines.rating import PREDICTORS
from trainables.interface import load_model, make_config
from trainables.models.omnimatch import (
    ITEM,
    TARGET,
    Config,
    OmniMatch,
    Reversal,
    auxiliary_rows,
    contrast,
    reversal_factor,
    train,
)
from trainables.tasks.arrays import TaskFolders
from trainables.tasks.rating import Ratings, Task, Words, load_task
from trainables.trial import run

from .training import train_seed
from .worlds import normal, random_task, rewritten, spoken

SMALL: dict[str, Any] = {"filters": 4, "common": 3, "dropout": 0.0}


def model_of(task: Task, **config: Any) -> OmniMatch:
    return OmniMatch(Config(**{**SMALL, **config}), task, torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize(("ratings", "expected"), [((4.0, 5.0), 0.551445), ((5.0, 5.0), 1.218111)])
def test_contrast_of_two_rows(ratings: tuple[float, float], expected: float) -> None:
    views = torch.eye(2, dtype=torch.float64)
    assert contrast(views, views, torch.tensor(ratings), 1.0).item() == pytest.approx(expected, abs=1e-6)


def test_the_reversal_is_the_identity_with_a_gradient_turned_round() -> None:
    assert [reversal_factor(share) for share in (0, 0.1, 0.5, 1)] == pytest.approx(
        [0, 0.462117, 0.986614, 0.999909], abs=1e-6
    )
    x = normal(0, 3).requires_grad_()
    turned = Reversal.apply(x, 0.462117)  # type: ignore[no-untyped-call]
    assert torch.equal(turned, x)
    (gradient,) = torch.autograd.grad(turned @ normal(1, 3), x)
    torch.testing.assert_close(gradient, -0.462117 * normal(1, 3))


# --- the slow reference -------------------------------------------------------------------------------------------


class Slow:
    """Row by row from the text, float64."""

    def __init__(self, model: OmniMatch) -> None:
        self.model, self.task = model, model.task
        self.weight = {name: value.detach().numpy() for name, value in model.named_parameters()}
        assert self.task.word_vectors is not None
        self.vectors = self.task.word_vectors.double().numpy()

    def h(self, side: int, reviews: list[list[int]]) -> np.ndarray:
        """The largest of each filter over all words of these reviews, each cut to its first words."""
        largest = np.zeros(3 * self.model.config.filters)
        for review in reviews:
            e = self.vectors[review[: self.model.config.words_per_review]]
            outputs = []
            for number, window in enumerate((3, 4, 5)):
                kernel, before = self.weight[f"encoders.{side}.weights.{number}"], (window - 1) // 2
                padded = np.vstack([np.zeros((before, e.shape[1])), e, np.zeros((window, e.shape[1]))])
                outputs.append([np.einsum("cek,ke->c", kernel, padded[t : t + window]) for t in range(len(e))])
            pooled = np.hstack([np.max(rows, axis=0) for rows in outputs]) + self.weight[f"encoders.{side}.bias"]
            largest = np.maximum(largest, pooled)
        return largest

    def layer(self, name: str, x: np.ndarray) -> np.ndarray:
        made: np.ndarray = np.maximum(x, 0) @ self.weight[f"{name}.weight"].T + self.weight[f"{name}.bias"]
        return made

    def user(self, side: int, reviews: list[list[int]]) -> list[np.ndarray]:
        h = self.h(side, reviews)
        return [self.layer("common", h), self.layer(f"specific.{side}", h)]

    def source_of_user(self, user: int, own: int = -1) -> list[list[int]]:
        return [review(self.task.source_ratings, n) for n in rows(self.task.source_ratings.user, user) if n != own]

    def target_of_user(self, user: int, own: int = -1) -> list[list[int]]:
        if user < len(self.task.source):
            return [review(self.task.train, n) for n in rows(self.task.train.user, user) if n != own]
        starts, kept = self.model.texts.target_users.starts, self.model.texts.target_users.rows
        number = len(self.task.target) + user  # the auxiliary document as it was drawn
        drawn = kept[starts[number] : starts[number + 1]] - len(self.task.source_ratings)
        return [review(self.task.train, n) for n in drawn.tolist()]

    def item(self, ratings: Ratings, item: int, own: int = -1) -> np.ndarray:
        return self.layer("item", self.h(2, [review(ratings, n) for n in rows(ratings.item, item) if n != own]))

    def term(self, user: list[np.ndarray], v: np.ndarray) -> float:
        return float(self.layer("head", np.hstack([*user, v]))[0])

    def unit(self, user: list[np.ndarray], v: np.ndarray) -> np.ndarray:
        y = self.layer("view", np.hstack([*user, v]))
        unit: np.ndarray = y / np.linalg.norm(y)
        return unit

    def entropy(self, name: str, x: np.ndarray, label: int) -> float:
        logit = x @ self.weight[f"{name}.weight"].T + self.weight[f"{name}.bias"]
        return float(np.log(np.exp(logit).sum()) - logit[label])


def rows(code_N: Tensor, code: int) -> list[int]:
    return (code_N == code).nonzero().flatten().tolist()


def review(ratings: Ratings, row: int) -> list[int]:
    assert ratings.words is not None
    return ratings.words.number[ratings.words.starts[row] : ratings.words.starts[row + 1]].tolist()


def test_predictions_against_the_slow_reference() -> None:
    task = spoken(random_task(seed=3))
    model = model_of(task, words_per_review=3)
    slow, ratings = Slow(model), task.validation.ratings
    with torch.no_grad():
        made = model.term(task.validation)
    for place in (0, 7, 19):
        user, item = int(task.validation.source_row[ratings.user[place]]), int(ratings.item[place])
        expected = slow.term(slow.user(1, slow.target_of_user(user)), slow.item(task.train, item))
        assert made[place].item() == pytest.approx(expected, abs=1e-9)
    assert made.std() > 0.01


def test_the_loss_against_the_slow_reference() -> None:
    """Two overlapping users and one who is held out; the users of the domain losses are drawn before."""
    task = spoken(random_task(seed=3))
    model = model_of(task, batch=4)
    slow, users, config = Slow(model), [4, 15, 9], model.config
    draw = torch.Generator().manual_seed(5)
    torch.rand(3, generator=draw)
    others_t = torch.randint(12, 20, (2,), generator=draw).tolist()
    others_s = torch.randint(12, 21, (2,), generator=draw).tolist()

    offsets = fitted_offsets(source_interactions(task), "source_offset")
    errors, views, ratings = [], [], []
    for user in users:
        for domain, own in [*((0, n) for n in rows(task.train.user, user) if user < 12),
                            *((1, n) for n in rows(task.source_ratings.user, user))]:  # fmt: skip
            one = (task.train, task.source_ratings)[domain]
            item, rating = int(one.item[own]), float(one.rating[own])
            target = slow.user(1, slow.target_of_user(user, own if domain == 0 else -1))
            source = slow.user(0, slow.source_of_user(user, own if domain == 1 else -1))
            v = slow.item(one, item, own)
            offset = offsets.item[item] + offsets.user[user]
            if domain == 0:
                offset = task.mean + float(task.item_offset[item]) + task.slope * float(task.source_offset[user])
            errors.append(rating - offset - slow.term(target, v))
            views.append((slow.unit(source, v), slow.unit(target, v)))
            ratings.append(rating)
    contrasts = []
    for a, (anchor, own_view) in enumerate(views):
        candidates = [(own_view, True)]
        for b, both in enumerate(views):
            candidates += [(view, ratings[a] == ratings[b]) for view in both if b != a]
        total = np.log(sum(np.exp(anchor @ y / config.temperature) for y, _ in candidates))
        contrasts.append(np.mean([total - anchor @ y / config.temperature for y, same in candidates if same]))
    domain = 0.0
    for side, others in ((0, others_s), (1, others_t)):
        for user in others:
            reviews = slow.source_of_user(user) if side == 0 else [
                review(task.train, n) for n in rows(task.train.user, user)
            ]  # fmt: skip
            c, p = slow.user(side, reviews)
            domain += (slow.entropy("domains.0", c, side) + slow.entropy("domains.1", p, side)) / 2
    expected = np.mean(np.square(errors)) + config.contrast_weight * np.mean(contrasts) + config.domain_weight * domain
    made = model.loss(torch.tensor(users), torch.Generator().manual_seed(5))
    assert len(errors) == 25
    assert made.item() == pytest.approx(expected, abs=1e-5)


def test_the_domain_gradient_grows_and_is_turned_round_for_the_common_half_alone() -> None:
    model = model_of(spoken(random_task()), batch=27, epochs=10)
    assert model.steps == 10
    h, gradients = normal(0, 4, 12).abs(), []
    for steps in (0, 1, 10):
        model.progress.fill_(steps)
        model.zero_grad()
        model.domain_loss(h, 1).backward()  # type: ignore[no-untyped-call]
        grown = (model.common.weight.grad, model.specific[1].weight.grad, model.domains[0].weight.grad)
        gradients.append([gradient.clone() for gradient in grown if isinstance(gradient, Tensor)])
    for number, factor in enumerate((0.0, 0.462117, 0.999909)):
        torch.testing.assert_close(gradients[number][0], factor * gradients[2][0] / 0.999909, atol=1e-6, rtol=1e-5)
        assert torch.equal(gradients[number][1], gradients[0][1])
        assert torch.equal(gradients[number][2], gradients[0][2])
    assert gradients[2][0].abs().max() > 1e-3


# --- documents ----------------------------------------------------------------------------------------------------


def test_helpers_are_overlapping_users_who_rated_the_same_item_alike() -> None:
    """By hand over every rating; whoever is held out helps nobody, and no review is drawn but of the training's."""
    task = random_task(overlapping=30, held_out=20)
    source = list(zip(*(column.tolist() for column in (task.source_ratings.user, task.source_ratings.item,
                                                       task.source_ratings.rating)), strict=True))  # fmt: skip
    drawn = [auxiliary_rows(task, torch.Generator().manual_seed(seed)).tolist() for seed in range(20)]
    for place, (user, item, rating) in enumerate(source):
        helpers = {u for u, j, r in source if (j, r) == (item, rating) and u != user and u < 30}
        chosen = {int(task.train.user[row[place]]) for row in drawn if row[place] >= 0}
        assert chosen <= helpers
        assert all((row[place] >= 0) == bool(helpers) for row in drawn)
    assert max(len(set(places)) for places in zip(*drawn, strict=True)) > 5  # other helpers, other reviews of them
    assert {int(task.train.user[n]) for row in drawn for n in row if n >= 0} == set(range(30))


def test_no_document_holds_a_word_of_a_held_out_target_review(worded: TaskFolders) -> None:
    """Documents are of visible rows alone: an auxiliary one is of target reviews by training overlapping users."""
    task = load_task(worded.task_dir)
    texts = OmniMatch(Config(**SMALL), task, torch.Generator().manual_seed(0)).texts
    row_K, document_K = texts.target_users.of(len(task.target) + torch.arange(len(task.source_ratings.starts) - 1))
    helper_K = task.train.user[row_K - len(task.source_ratings)]
    assert ((helper_K >= 0) & (helper_K < len(task.source))).all()
    assert (helper_K != document_K).all()
    held_out = task.validation.source_row
    lengths = texts.target_users.starts.diff()[len(task.target) + held_out]
    assert (lengths > 5).all()
    assert len(texts.words.starts) == 1 + len(task.source_ratings) + len(task.train) + len(task.items)


@pytest.mark.parametrize("exclude_own", [True, False])
def test_a_review_is_not_seen_by_the_prediction_of_its_own_rating(exclude_own: bool) -> None:
    """In the item's document, nor in the user's, where the other ratings of the user see it."""
    task, users = spoken(random_task(seed=3)), torch.tensor([4])
    changed = rewritten(task, int(task.overlapping.starts[4]) + 1)
    read = []
    for one in (task, changed):
        model = model_of(one, exclude_own=exclude_own, filters=20)
        pairs = model.pairs(users)
        assert (pairs.own is not None) == exclude_own
        with torch.no_grad():
            user = model.read(TARGET, users, pairs.place, pairs.own)
            item = model.read(ITEM, pairs.item, torch.arange(len(pairs.item)), pairs.own)
        read.append((user[:5], item[:5]))
    same = [
        [torch.equal(first, second) for first, second in zip(*pair, strict=True)] for pair in zip(*read, strict=True)
    ]
    assert same[0] == [False, exclude_own, False, False, False]
    assert same[1] == [True, exclude_own, True, True, True]


def test_the_order_of_reviews_and_padding_change_nothing() -> None:
    """Each user's reviews from the last to the first; and a long review by another user, which pads all others."""
    task = spoken(random_task(seed=3))
    ratings, words = task.train, task.train.words
    assert words is not None
    pieces = list(words.number.split(words.starts.diff().tolist()))
    order = torch.arange(len(ratings)).view(-1, 5).flip(1).flatten()

    def with_words(texts: list[Tensor], order: Tensor) -> Task:
        lengths = torch.tensor([len(text) for text in texts])
        other = Words(torch.cat(texts), torch.cat([words.starts[:1], lengths.cumsum(0)]))
        return replace(task, train=Ratings(ratings.user, ratings.item[order], ratings.rating[order], other))

    turned = with_words([pieces[k] for k in order.tolist()], order)
    longer = with_words([*pieces[:-1], torch.arange(9, dtype=torch.int32)], torch.arange(len(ratings)))
    users = torch.arange(12)
    with torch.no_grad():
        first, *others = (model_of(one).read(TARGET, torch.arange(20), users, None) for one in (task, turned, longer))
    for other in others:
        torch.testing.assert_close(first, other, atol=1e-12, rtol=0)


def test_identical_documents_leave_a_linear_function_of_the_item() -> None:
    """Nobody has an auxiliary document: a rating is d(v) w and what is the same for all."""
    task = spoken(random_task())
    model = model_of(task, contrast_weight=0.0, domain_weight=0.0, auxiliary=False)
    ratings = task.validation.ratings
    model.loss(torch.arange(12), torch.Generator().manual_seed(0)).backward()  # type: ignore[no-untyped-call]
    assert all(value.grad is None for name, value in model.encoders[0].named_parameters())
    with torch.no_grad():
        item_I = model.item(model.read_whole(ITEM, task.source_items + torch.arange(len(task.items)))).relu()
        left = model.term(task.validation) - (item_I @ model.head.weight[0, 6:])[ratings.item]
    assert left.std().item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("text", ["none", "metadata"])
def test_an_item_without_visible_reviews_has_no_document_or_its_own_text(text: str) -> None:
    task = spoken(random_task())
    cold = int(task.train.item[0])
    assert task.train.words is not None
    lengths = task.train.words.starts.diff()
    silent = torch.where(task.train.item == cold, 0, lengths)  # who rated it wrote nothing
    kept = torch.repeat_interleave(task.train.item, lengths) != cold
    words = Words(task.train.words.number[kept], torch.cat([lengths.new_zeros(1), silent.cumsum(0)]))
    model = model_of(replace(task, train=replace(task.train, words=words)), cold_item_text=text)
    with torch.no_grad():
        h = model.read_whole(ITEM, task.source_items + torch.arange(len(task.items)))
    assert task.item_words is not None
    own = task.item_words.number[task.item_words.starts[cold] : task.item_words.starts[cold + 1]].tolist()
    expected = Slow(model).h(2, [own] if text == "metadata" else [])
    torch.testing.assert_close(h[cold], torch.from_numpy(expected))
    other = (cold + 1) % len(task.items)
    reviews = [review(task.train, n) for n in rows(task.train.item, other)]
    torch.testing.assert_close(h[other], torch.from_numpy(Slow(model).h(2, reviews)))


def test_training_users_are_read_by_their_auxiliary_document_as_often_as_asked() -> None:
    task, users = spoken(random_task()), torch.arange(20).repeat(100)
    for share, expected in ((0.0, 0.0), (0.5, 0.5), (1.0, 1.0)):
        number = model_of(task, auxiliary_share=share).target_documents(users, torch.Generator().manual_seed(0))
        auxiliary = number == len(task.target) + users
        assert auxiliary[users >= 12].all()
        assert auxiliary[users < 12].double().mean().item() == pytest.approx(expected, abs=0.05)
        assert torch.equal(number[~auxiliary], users[~auxiliary])


# --- training -----------------------------------------------------------------------------------------------------


def planted(users: int, held_out: int, side: int = 10, items: int = 30) -> Task:
    """Users like or dislike all there is; the target domain's reviews say so, the source domain's have no word of it."""
    draw = np.random.default_rng(0)
    keen, each = draw.integers(0, 2, users + held_out + side) * 2 - 1, 8

    def ratings(people: np.ndarray, words: bool) -> Ratings:
        item = np.concatenate([np.sort(draw.choice(items, each, replace=False)) for _ in people])
        mood = keen[people].repeat(each)
        filler = draw.integers(2, 9, (len(item), 2))
        verdict = (mood + 1) // 2 if words else draw.integers(2, 9, len(item))
        number = np.column_stack([filler[:, 0], verdict, filler[:, 1]]).astype(np.int32).ravel()
        texts = Words(torch.from_numpy(number), torch.arange(len(item) + 1) * 3)
        user = torch.arange(len(people)).repeat_interleave(each)
        return Ratings(user, torch.from_numpy(item), torch.from_numpy(3 + mood).float(), texts)

    number = np.arange(users + held_out + side)
    target = ratings(np.concatenate([number[:users], number[users + held_out :]]), True)
    task = random_task(overlapping=users, side=side, held_out=held_out, items=items)
    wanted = replace(ratings(number[users : users + held_out], True), words=None)
    validation = replace(
        task.validation, ratings=wanted, source_row=torch.arange(users, users + held_out),
        cold_item=torch.zeros(len(wanted), dtype=torch.bool),
    )  # fmt: skip
    end = users * each
    return replace(
        task, source_ratings=ratings(number[: users + held_out], False), source_items=items, train=target,
        overlapping=Ratings(target.user[:end], target.item[:end], target.rating[:end]), validation=validation,
        item_words=Words(torch.zeros(0, dtype=torch.int32), torch.zeros(items + 1, dtype=torch.int64)),
        mean=3.0, slope=0.0, item_offset=torch.zeros(items), word_vectors=normal(1, 9, 8).float(),
    )  # fmt: skip


def test_a_planted_word_is_found_in_what_like_minded_users_say() -> None:
    """The item mean errs by 1 everywhere; half of that is to go, for users who are new, through others' reviews alone."""
    task = planted(users=60, held_out=20)
    settings: dict[str, Any] = {
        **SMALL, "filters": 12, "common": 8, "lr": 5e-3, "batch": 4, "epochs": 3, "rating_offset": "item_mean",
    }  # fmt: skip
    assert train_seed("omnimatch", Config(**settings), task, 0)[-1].metrics["val_rmse"] < 0.5
    without = train_seed("omnimatch", Config(**settings | {"auxiliary": False, "epochs": 1}), task, 0)[-1].metrics[
        "val_rmse"
    ]
    assert without > 0.9


def test_the_same_seed_gives_the_same_bits_and_goes_on_after_a_kill(worded: TaskFolders) -> None:
    config = {**SMALL, "dropout": 0.2, "epochs": 3, "words": 30, "filters": 3, "batch": 32}
    state = None
    for report in run("omnimatch", config, str(worded.task_dir), [0, 1], str(worded.test_dir)):
        if report.epoch == 2 and report.state is not None:
            torch.save(report.state(), file := io.BytesIO())
            file.seek(0)
            state = torch.load(file, weights_only=True)
    first = {name: value for name, value in report.metrics.items() if "seconds" not in name}
    *_, again = run("omnimatch", config, str(worded.task_dir), [0, 1], str(worded.test_dir), state=state)
    assert {name: value for name, value in again.metrics.items() if "seconds" not in name} == first
    *_, alone = run("omnimatch", config, str(worded.task_dir), [1])
    assert alone.metrics["val_rmse"] == first["val_rmse/seed_1"]
    task = load_task(worded.task_dir)
    error_N = PREDICTORS["source_offset"](task.validation, task) - task.validation.ratings.rating
    assert first["val_rmse"] < float(error_N.square().mean().sqrt()) + 0.03


def test_every_ablation_and_the_authors_optimiser_train() -> None:
    task, model = spoken(random_task()), load_model("omnimatch")
    assert (model.NAME, model.NEEDS) == ("OmniMatch", ("reviews",))
    assert set(model.ABLATIONS) == {
        "plain", "wo_contrast", "wo_adversarial", "wo_specific", "wo_auxiliary", "mixed_auxiliary", "item_metadata",
    }  # fmt: skip
    changes = [{}, {"optimiser": "adadelta", "lr": 0.02}, *(dict(one.config) for one in model.ABLATIONS.values())]
    losses = [
        train_seed("omnimatch", Config(**{**SMALL, "dropout": 0.4, "epochs": 1, **one}), task, 0)[-1].metrics[
            "train_loss"
        ]
        for one in changes
    ]
    assert np.isfinite(losses).all()
    assert all(first != second for (a, first), (b, second) in product(enumerate(losses), repeat=2) if a < b and b < 8)


def test_bad_input_is_refused_in_one_line() -> None:
    with pytest.raises(
        InputError, match=r"^this task holds no reviews, which OmniMatch reads; set features\.reviews in the plan$"
    ):
        next(train(Config(), random_task(), 0))
    alone = random_task(side=0)
    with pytest.raises(InputError, match=r"^this task has no side users, .* domain losses read; set domain_weight: 0$"):
        next(train(Config(), spoken(alone), 0))
    next(train(Config(domain_weight=0.0), spoken(alone), 0))
    with pytest.raises(InputError, match=r"cold_item_text is 'title'; choose from none, metadata"):
        make_config("omnimatch", {"cold_item_text": "title"}, "here")
    with pytest.raises(InputError, match=r"auxiliary_share is 2; give a number"):
        make_config("omnimatch", {"auxiliary_share": 2}, "here")
