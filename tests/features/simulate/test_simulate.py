"""Simulated domains: their exact size, their bytes from a seed, and what can be learnt from them."""

import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from features.errors import InputError
from features.simulate import vocabulary
from features.simulate.simulator import DomainSize, SimulateSpec, _by_taste, _latent, _match, simulate
from features.store.folders import SIMULATED

SIZE = {"users": 60, "items": 40, "ratings": 500}


def lines(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") as stream:
        return [json.loads(line) for line in stream]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = SimulateSpec(domains={"books": SIZE, "movies": SIZE}, overlap=25, images=0.5, missing=0.2, short_reviews=0.1)
    return simulate(spec, tmp_path_factory.mktemp("simulated") / "out")


def test_counts_are_exact_and_pairs_unique(small: Path) -> None:
    users = {}
    for name in ("books", "movies"):
        reviews, items = lines(small / f"{name}.jsonl.gz"), lines(small / f"meta_{name}.jsonl.gz")
        users[name] = {review["user_id"] for review in reviews}
        assert (
            len(reviews) == len({(review["user_id"], review["parent_asin"]) for review in reviews}) == SIZE["ratings"]
        )
        assert len(users[name]) == SIZE["users"]
        assert len(items) == SIZE["items"]
        assert {review["parent_asin"] for review in reviews} == {item["parent_asin"] for item in items}
        assert min(Counter(review["user_id"] for review in reviews).values()) == 7  # 0.92 of the mean of 8.3
        assert {review["rating"] for review in reviews} <= {1.0, 2.0, 3.0, 4.0, 5.0}
    assert len(users["books"] & users["movies"]) == 25


def test_layout_is_that_of_amazon_2023_and_labelled(small: Path) -> None:
    review, item = lines(small / "books.jsonl.gz")[0], lines(small / "meta_books.jsonl.gz")[0]
    assert {"rating", "title", "text", "images", "asin", "parent_asin", "user_id", "timestamp"} < set(review)
    assert {"title", "description", "categories", "images", "store", "parent_asin"} < set(item)
    assert review["user_id"].startswith("SIM")
    assert item["parent_asin"].startswith("SIM")
    assert json.loads((small / SIMULATED).read_text())["simulated"] is True


def test_some_reviews_are_short_and_some_items_bare(small: Path) -> None:
    words = [len(review["text"].split()) for review in lines(small / "books.jsonl.gz")]
    assert 0.05 < np.mean(np.array(words) < 10) < 0.15
    items = lines(small / "meta_books.jsonl.gz")
    bare = [not item["description"] for item in items]
    assert 0.05 < np.mean(bare) < 0.4


def test_images_are_real_files_of_the_popular_half(small: Path) -> None:
    items = lines(small / "meta_books.jsonl.gz")
    named = {item["images"][0]["large"] for item in items if item["images"]}
    written = {str(path.relative_to(small)) for path in (small / "images/books").rglob("*.jpg")}
    assert named == written
    assert len(named) == 20  # the popular half; items without image come from the other one
    for path in named:
        with Image.open(small / path) as picture:
            picture.load()
            assert (picture.format, picture.size) == ("JPEG", (64, 64))


def test_images_show_the_factors(small: Path, tmp_path: Path) -> None:
    """Items of one category look more alike than items of its opposite: the colour follows the factor."""
    folder = simulate(
        SimulateSpec(domains={"a": {"users": 60, "items": 200, "ratings": 600}}, overlap=0), tmp_path / "s"
    )
    colours: dict[str, list[float]] = {"Noir": [], "Feel-Good": []}
    for item in lines(folder / "meta_a.jsonl.gz"):
        if item["categories"][1] in colours and item["images"]:
            with Image.open(folder / item["images"][0]["large"]) as picture:
                colours[item["categories"][1]].append(float(np.asarray(picture)[:8, :8, 0].mean()))
    assert np.mean(colours["Feel-Good"]) - np.mean(colours["Noir"]) > 60  # red is factor 1, in 0..255


def test_bytes_depend_on_the_spec_alone(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from features.simulate.simulator import *\n"
        f"spec = SimulateSpec(domains={{'books': {SIZE}, 'movies': {SIZE}}}, overlap=25, seed=int(sys.argv[1]))\n"
        "simulate(spec, Path(sys.argv[2]))"
    )
    for seed, name in (("1", "a"), ("1", "b"), ("2", "c")):
        environment = {**os.environ, "PYTHONHASHSEED": str(ord(name))}
        subprocess.run([sys.executable, "-c", code, seed, str(tmp_path / name)], check=True, env=environment)
    first, second, third = (files(tmp_path / name) for name in "abc")
    assert first == second
    assert len(first) > 5
    assert first["books.jsonl.gz"] != third["books.jsonl.gz"]


def test_a_domain_does_not_depend_on_the_others(tmp_path: Path) -> None:
    alone = simulate(SimulateSpec(domains={"movies": SIZE}, overlap=25), tmp_path / "alone")
    both = simulate(SimulateSpec(domains={"books": SIZE, "movies": SIZE}, overlap=25), tmp_path / "both")
    assert (alone / "movies.jsonl.gz").read_bytes() == (both / "movies.jsonl.gz").read_bytes()


def test_progress_counts_every_line(tmp_path: Path) -> None:
    spec = SimulateSpec(domains={"books": SIZE}, overlap=0, images=0.0)
    done: list[int] = []
    simulate(spec, tmp_path / "out", done.append)
    assert sum(done) == spec.rows == 540


def test_the_same_simulation_is_kept_and_another_refused(tmp_path: Path) -> None:
    spec = SimulateSpec(domains={"books": SIZE}, overlap=0, images=0.0)
    out = simulate(spec, tmp_path / "out")
    before = (out / "books.jsonl.gz").stat().st_mtime_ns
    assert simulate(spec, out) == out
    assert (out / "books.jsonl.gz").stat().st_mtime_ns == before
    with pytest.raises(InputError, match=r"out: holds something else already; name a new folder"):
        simulate(SimulateSpec(domains={"books": SIZE}, overlap=0, images=0.0, seed=1), out)


def test_a_crash_leaves_nothing(tmp_path: Path) -> None:
    def crash(rows: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(SimulateSpec(domains={"books": SIZE}, overlap=0), tmp_path / "out", crash)
    assert list(tmp_path.iterdir()) == []


def test_dense_domains_still_have_unique_pairs(tmp_path: Path) -> None:
    spec = SimulateSpec(domains={"d": DomainSize(users=40, items=30, ratings=300)}, overlap=0, images=0.0)  # a quarter
    reviews = lines(simulate(spec, tmp_path / "out") / "d.jsonl.gz")
    assert len({(review["user_id"], review["parent_asin"]) for review in reviews}) == 300


def test_matching_keeps_every_count() -> None:
    rng = np.random.default_rng(0)
    activity, popularity = np.array([3, 1, 4, 2, 2]), np.array([4, 3, 2, 2, 1])
    item = _match(activity, popularity, rng)
    pairs = set(zip(np.repeat(np.arange(5), activity).tolist(), item.tolist(), strict=True))
    assert len(pairs) == 12
    assert np.bincount(item).tolist() == popularity.tolist()


def test_choice_by_taste_keeps_every_count_and_raises_the_liking() -> None:
    rng = np.random.default_rng(0)
    spec = SimulateSpec(domains={"d": {"users": 200, "items": 80, "ratings": 1600}}, overlap=0)
    latent, activity = _latent(spec, "d"), np.full(200, 8)
    user = np.repeat(np.arange(200), 8)
    chance = _match(activity, latent.popularity, rng)

    def liking(item: np.ndarray) -> float:
        return float(np.einsum("nf,nf->n", latent.taste[user], latent.factors[item]).mean())

    chosen = [_by_taste(chance, activity, latent, choice, rng) for choice in (0.0, 1.0, 3.0)]
    assert abs(liking(chosen[0])) < 0.1
    assert liking(chosen[1]) > 0.6
    assert liking(chosen[2]) > liking(chosen[1]) + 0.3
    for item in chosen:
        assert np.bincount(item).tolist() == latent.popularity.tolist()
        assert len(set(zip(user.tolist(), item.tolist(), strict=True))) == 1600


def test_exchanges_reach_the_distribution_that_they_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two users, two items, one each: the match that is liked more by 4 is exp(4 * choice) times as likely."""
    monkeypatch.setattr("features.simulate.simulator.SWEEPS", 12)
    spec = SimulateSpec(domains={"d": SIZE}, overlap=0)
    opposite = np.array([[1.0], [-1.0]], np.float32)
    latent = replace(_latent(spec, "d"), taste=opposite, factors=opposite, popularity=np.array([1, 1]))
    rng, one_each = np.random.default_rng(0), np.array([0, 1], np.int32)
    drawn = [_by_taste(one_each, np.array([1, 1]), latent, 0.5, rng)[0] == 0 for _ in range(1500)]
    assert np.mean(drawn) == pytest.approx(1 / (1 + np.exp(-2.0)), abs=0.03)  # 0.881, standard deviation 0.008


def test_matching_gives_up_where_there_is_no_way() -> None:
    with pytest.raises(InputError, match="no way to keep each user-item pair unique; ask for fewer ratings"):
        _match(np.array([2, 1]), np.array([3]), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"domains": {}}, r"simulate: domains must map names to sizes, not \{\}; name at least one"),
        ({"domains": {"a/b": SIZE}}, r"domain name 'a/b'; use letters"),
        ({"domains": {"a": {"users": 3}}}, r"domains.a has the fields \['users'\]; give users, items and ratings"),
        ({"domains": {"a": 5}}, r"domains.a is 5; give users, items and ratings"),
        ({"domains": {"a": {**SIZE, "ratings": 601}}}, r"domains.a.ratings is 601; .* whole number from 60 to 600"),
        ({"domains": {"a": {**SIZE, "users": 1}}}, r"domains.a.users is 1; give a whole number from 2"),
        ({"overlap": 61}, r"overlap is 61; give a whole number from 0 to 60"),
        ({"overlap": 1.5}, r"overlap is 1.5; give a whole number"),
        ({"seed": -1}, r"seed is -1; give a whole number from 0"),
        ({"seed": True}, r"seed is True; give a whole number"),
        ({"factors": 9}, r"factors is 9; give a whole number from 1 to 8"),
        ({"choice": 11}, r"choice is 11; give a number from 0 to 10"),
        ({"noise": float("nan")}, r"noise is nan; give a number from 0 to 5"),
        ({"images": 2}, r"images is 2; give a number from 0 to 1"),
        ({"missing": "0.1"}, r"missing is '0.1'; give a number"),
        ({"image_size": 4}, r"image_size is 4; give a whole number from 8 to 1024"),
    ],
)
def test_bad_values_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        SimulateSpec(**{"domains": {"a": SIZE}, "overlap": 0, **change})
    assert "\n" not in str(caught.value)


def test_no_phrase_needs_escaping_in_json() -> None:
    banks = [getattr(vocabulary, name) for name in dir(vocabulary) if name.isupper() and name != "FACTORS"]
    every = [phrase for bank in banks for row in bank for phrase in row]
    assert len(every) > 150
    assert [phrase for phrase in every if json.dumps(phrase) != f'"{phrase}"'] == []


# --- what can be learnt -------------------------------------------------------------------------------------------


class Learnable:
    """One simulation read back: a task books -> movies in which half of the 300 overlapping users are cold."""

    def __init__(self, folder: Path) -> None:
        self.reviews = {name: lines(folder / f"{name}.jsonl.gz") for name in ("books", "movies")}
        self.items = lines(folder / "meta_movies.jsonl.gz")
        source_users = {review["user_id"] for review in self.reviews["books"]}
        shared = sorted(source_users & {review["user_id"] for review in self.reviews["movies"]})
        self.cold = set(shared[::2])
        self.known = set(shared[1::2])

    def residuals(self, name: str, hidden: set[str]) -> tuple[dict[str, float], list[tuple[str, str, float, float]]]:
        """Item means over the users not hidden, and (user, item, rating, item mean) of every review."""
        total: dict[str, list[float]] = {}
        seen = [review["rating"] for review in self.reviews[name] if review["user_id"] not in hidden]
        mean = float(np.mean(seen))
        for review in self.reviews[name]:
            if review["user_id"] not in hidden:
                total.setdefault(review["parent_asin"], []).append(review["rating"] - mean)
        means = {item: mean + sum(ratings) / (len(ratings) + 3) for item, ratings in total.items()}
        rows = [
            (review["user_id"], review["parent_asin"], review["rating"], means.get(review["parent_asin"], mean))
            for review in self.reviews[name]
        ]
        return means, rows


def bag(texts: dict[str, list[str]], width: int) -> dict[str, np.ndarray]:
    """Mean word counts per key, reduced to `width` principal components of unit variance."""
    words = sorted({word for group in texts.values() for text in group for word in text.lower().split()})
    column = {word: index for index, word in enumerate(words)}
    table = np.zeros((len(texts), len(words)))
    for row, group in enumerate(texts.values()):
        for text in group:
            for word in text.lower().split():
                table[row, column[word]] += 1 / len(group)
    table -= table.mean(0)
    left, _, _ = np.linalg.svd(table, full_matrices=False)
    return dict(zip(texts, left[:, :width] * np.sqrt(len(texts)), strict=True))


@pytest.fixture(scope="module")
def learnable(tmp_path_factory: pytest.TempPathFactory) -> Learnable:
    size = {"users": 400, "items": 200, "ratings": 10_000}
    spec = SimulateSpec(domains={"books": size, "movies": size}, overlap=300, images=0.0)
    return Learnable(simulate(spec, tmp_path_factory.mktemp("learnable") / "out"))


def ridge(x: np.ndarray, y: np.ndarray, strength: float) -> np.ndarray:
    weights: np.ndarray = np.linalg.solve(x.T @ x + strength * np.eye(x.shape[1]), x.T @ y)
    return weights


def user_texts(task: Learnable, name: str) -> dict[str, list[str]]:
    texts: dict[str, list[str]] = {}
    for review in task.reviews[name]:
        texts.setdefault(review["user_id"], []).append(review["text"])
    return texts


def source_offsets(task: Learnable) -> dict[str, float]:
    offsets: dict[str, list[float]] = {}
    for user, _, rating, mean in task.residuals("books", set())[1]:
        offsets.setdefault(user, []).append(rating - mean)
    return {user: sum(values) / (len(values) + 3) for user, values in offsets.items()}


def poles(texts: list[str]) -> np.ndarray:
    """Mean pole (-1 or 1) of the words about each of the six factors."""
    sides = {
        word: row
        for bank in (vocabulary.ADJECTIVES, vocabulary.NOUNS)
        for row, words in enumerate(bank)
        for word in words
    }
    counts = np.zeros((8, 2))
    for text in texts:
        for word in text.lower().replace(".", "").replace(",", "").split():
            if word in sides:
                counts[divmod(sides[word], 2)] += 1
    read: np.ndarray = (counts[:, 1] - counts[:, 0])[:6] / max(1.0, counts.sum())
    return read


def test_each_step_of_knowledge_predicts_cold_users_better(learnable: Learnable) -> None:
    """Global mean < item mean < + the user's source offset < + taste read from the words of the source reviews."""
    task = learnable
    offset = source_offsets(task)
    preferences = {
        user: [text.split(". ")[-1] for text in texts if "things about" in text]
        for user, texts in user_texts(task, "books").items()
    }
    users = {user: poles(texts) for user, texts in preferences.items()}
    items = {item["parent_asin"]: poles([item["title"], *item["description"]]) for item in task.items}
    _, rows = task.residuals("movies", task.cold)
    train = [row for row in rows if row[0] in task.known]
    test = [row for row in rows if row[0] in task.cold]
    y_train, y = np.array([row[2] - row[3] for row in train]), np.array([row[2] - row[3] for row in test])
    o_train, o = (np.array([[offset[row[0]]] for row in part]) for part in (train, test))
    # Bilinear in the source words: what a rotation between the domains' tastes needs.
    b_train, b = (np.array([np.outer(users[u], items[i]).ravel() for u, i, *_ in part]) for part in (train, test))
    slope = ridge(o_train, y_train, 1.0)
    taste = ridge(b_train / b_train.std(), y_train - o_train @ slope, 300.0) / b_train.std()

    def rmse(error: np.ndarray) -> float:
        return float(np.sqrt(np.mean(error**2)))

    level = float(np.mean([row[2] for row in rows if row[0] not in task.cold]))
    ratings = np.array([row[2] for row in test])
    scores = [rmse(ratings - level), rmse(y), rmse(y - o @ slope), rmse(y - o @ slope - b @ taste)]
    assert (-np.diff(scores) > [0.08, 0.07, 0.04]).all(), scores


def test_words_tell_leniency(learnable: Learnable) -> None:
    """The words of half of the users predict the offsets of the other half."""
    offset = source_offsets(learnable)
    words = bag(user_texts(learnable, "books"), 30)
    names = sorted(words)
    x, y = np.array([words[name] for name in names]), np.array([offset[name] for name in names])
    weights = ridge(x[::2], y[::2] - y.mean(), 30.0)
    assert np.corrcoef(x[1::2] @ weights, y[1::2])[0, 1] > 0.7


def test_metadata_tell_quality(learnable: Learnable) -> None:
    means, _ = learnable.residuals("movies", set())
    described = [item for item in learnable.items if item["description"]]
    words = ["outstanding", "award-winning", "well", "praised", "standard", "ordinary", "modest", "badly", "flawed"]
    x = np.array([[word in item["description"][0] for word in words] for item in described], dtype=float)
    y = np.array([means[item["parent_asin"]] for item in described])
    x, y = x - x.mean(0), y - y.mean()
    assert np.corrcoef(x @ ridge(x, y, 1.0), y)[0, 1] > 0.6
