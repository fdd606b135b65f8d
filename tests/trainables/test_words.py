"""Words of reviews: in the task for what training may see, and convolved by tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.functional import conv1d

from trainables.tasks.rating import Words, load_held_out, load_task
from trainables.words import (
    documents,
    largest_convolution,
    largest_of_documents,
    local_convolution,
    padded_words,
    word_convolution,
    words_of,
)

from .worlds import World, build, make_world, normal, word_table


@pytest.mark.parametrize("window", [1, 2, 3, 5])
def test_a_convolution_by_tables_is_conv1d_on_each_review(window: int) -> None:
    vectors, weight = normal(0, 9, 4), normal(1, 6, 4, window)
    lengths = [5, 1, 2, 8]
    review = torch.arange(4).repeat_interleave(torch.tensor(lengths))
    number = torch.randint(9, (16,), generator=torch.Generator().manual_seed(0))
    made = word_convolution(vectors, weight, number, review)
    again = local_convolution(vectors[number], weight, review)
    left, right = (window - 1) // 2, window // 2
    for place, words in enumerate(number.split(lengths)):
        padded = torch.nn.functional.pad(vectors[words].T[None], (left, right))
        expected = conv1d(padded, weight)[0].T
        torch.testing.assert_close(made[review == place], expected, atol=1e-12, rtol=0)
        torch.testing.assert_close(again[review == place], expected, atol=1e-12, rtol=0)


def test_documents_are_first_reviews_up_to_a_number_of_words() -> None:
    code, length = torch.tensor([1, 0, 1, 1, 3]), torch.tensor([4, 9, 3, 3, 0])
    made = documents(code, 4, length, 8)
    rows, owner = made.of(torch.tensor([0, 1, 2, 3]))
    assert rows.tolist() == [1, 0, 2, 4]  # the only review of 0 is too long, and kept; the third of 1 is one too many
    assert owner.tolist() == [0, 1, 1, 3]


def test_words_of_reviews_are_cut() -> None:
    words = Words(torch.tensor([5, 6, 7, 8], dtype=torch.int32), torch.tensor([0, 3, 3, 4]))
    number, review = words_of(words, torch.tensor([2, 1, 0]), 2)
    assert (number.tolist(), review.tolist()) == ([8, 5, 6], [0, 2, 2])


@pytest.mark.parametrize("window", [3, 4])
def test_the_largest_of_a_convolution_and_its_gradients_are_those_of_conv1d(window: int) -> None:
    """Also of reviews that are shorter than the window; what stands behind the last word changes nothing."""
    vectors, weight = normal(0, 9, 4).requires_grad_(), normal(1, 6, 4, window).requires_grad_()
    number = torch.randint(9, (3, 6), generator=torch.Generator().manual_seed(0))
    lengths = [5, 1, 3]
    for row, length in enumerate(lengths):
        number[row, length:] = -1
    upstream = normal(2, 3, 6)
    made = largest_convolution(vectors, weight, number)
    gradients = torch.autograd.grad((made * upstream).sum(), [vectors, weight])
    reviews = [
        conv1d(torch.nn.functional.pad(vectors[row[:length]].T, ((window - 1) // 2, window // 2))[None], weight)[0]
        for row, length in zip(number, lengths, strict=True)
    ]
    expected = torch.stack([review.amax(dim=1) for review in reviews])
    torch.testing.assert_close(made, expected, atol=1e-12, rtol=0)
    assert torch.equal(largest_convolution(vectors, weight, number[:, :5]), made)
    for gradient, other in zip(
        gradients, torch.autograd.grad((expected * upstream).sum(), [vectors, weight]), strict=True
    ):
        torch.testing.assert_close(gradient, other, atol=1e-12, rtol=0)


def test_the_largest_of_documents_is_that_of_their_other_reviews() -> None:
    """The largest of a review, then of a document's, one left out, is the largest of all words that are left."""
    feature = normal(0, 5, 7).abs()
    place, document = torch.tensor([2, 0, 4, 1, 3]), torch.tensor([0, 0, 0, 2, 3])
    asked, own = torch.tensor([0, 0, 1, 2, 2, 3, 0]), torch.tensor([-1, 4, -1, 1, -1, 0, 2])
    made = largest_of_documents(feature, place, document, 4, asked, own)
    for row, (number, left_out) in enumerate(zip(asked.tolist(), own.tolist(), strict=True)):
        kept = [p for p, d in zip(place.tolist(), document.tolist(), strict=True) if d == number and p != left_out]
        expected = feature[kept].amax(dim=0) if kept else torch.zeros(7, dtype=torch.float64)
        assert torch.equal(made[row], expected)
    assert torch.equal(largest_of_documents(feature, place, document, 4, asked[:1], None)[0], made[0])


def test_words_are_padded_behind() -> None:
    words = Words(torch.tensor([5, 6, 7, 8], dtype=torch.int32), torch.tensor([0, 3, 3, 4]))
    assert padded_words(words, torch.tensor([2, 1, 0]), 2).tolist() == [[8, -1], [-1, -1], [5, 6]]


def test_a_tasks_words_are_those_of_its_reviews(tmp_path: Path) -> None:
    world = make_world(users=40, overlap=30, items=20, each=5)
    folders = build(world, tmp_path, "ratings", reviews=True)
    task, tokenise = load_task(folders.task_dir), word_table(world, tmp_path).tokenise
    rows = (tmp_path / "raw").exists()
    assert rows
    assert task.word_vectors is not None
    for ratings, frame, known in (
        (task.source_ratings, world.source, "source"), (task.train, world.target, "target"),
    ):  # fmt: skip
        assert ratings.words is not None
        assert len(ratings.words.starts) == len(ratings) + 1
        texts = frame.groupby(["item_id", "rating"])["text"].apply(list).to_dict()
        items = sorted(frame["item_id"].unique())
        for row in range(len(ratings)):
            words = ratings.words.number[ratings.words.starts[row] : ratings.words.starts[row + 1]].tolist()
            candidates = texts[items[int(ratings.item[row])], float(ratings.rating[row])]
            assert words in tokenise(candidates), known
    titles = world.items.set_index("item_id")["title"]
    assert task.item_words is not None
    pieces = task.item_words.number.split(task.item_words.starts.diff().tolist())
    assert [piece.tolist() for piece in pieces] == tokenise(
        [titles[item] for item in sorted(world.target["item_id"].unique())]
    )
    assert load_held_out(folders.test_dir).ratings.words is None
    assert task.validation.ratings.words is None


def test_no_word_of_a_held_out_target_review_is_in_any_array(tmp_path: Path) -> None:
    """Hidden reviews get a word of their own: it is in the vocabulary, and in no file of the task."""
    world = make_world(users=40, overlap=30, items=20, each=5)
    plain = build(world, tmp_path / "plain", "ratings", reviews=True)
    hidden = [
        str(u) for folder in (plain.task_dir / "validation", plain.test_dir) for u in np.load(folder / "user_id.npy")
    ]

    def marked(reviews: pd.DataFrame) -> pd.DataFrame:
        return reviews.assign(text="zzsecret " + reviews["text"])

    world = world.with_target(hidden, marked)
    folders = build(world, tmp_path / "marked", "ratings", reviews=True)
    table = word_table(world, tmp_path / "marked")
    (secret,) = table.tokenise(["zzsecret"])[0]
    found = {path.name: np.load(path) for path in folders.task_dir.parent.rglob("*.npy") if path.stem.endswith("word")}
    assert set(found) == {"word.npy", "source_word.npy", "item_word.npy"}
    assert not any((array == secret).any() for array in found.values())
    assert len(list(folders.task_dir.parent.rglob("*word*.npy"))) == 6


def test_a_world_without_words_has_none(world: World, tmp_path: Path) -> None:
    task = load_task(build(world, tmp_path, "ratings").task_dir)
    assert task.word_vectors is None
    assert task.train.words is None
