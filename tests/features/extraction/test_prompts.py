"""What is read of an item and of a user."""

from __future__ import annotations

import pytest

from features.domains.ties import tie_hash
from features.encoders.inputs import EncoderInput
from features.errors import InputError
from features.extraction.prompts import NO_REVIEW, NO_TEXT, clean, find_prompt, item_inputs, item_text, user_inputs

ITEM = {"title": "A title", "categories": "Books > Crime", "description": " Long. "}


def test_item_text_has_a_line_per_field_and_none_for_absent_ones() -> None:
    assert item_text(ITEM, find_prompt("plain-1")) == "A title\nBooks > Crime\nLong."
    assert item_text(ITEM | {"categories": None, "title": "  "}, find_prompt("named-1")) == "Description: Long."
    assert item_text(dict.fromkeys(ITEM), find_prompt("named-1")) == ""


def test_html_entities_are_read_as_what_they_stand_for() -> None:
    assert clean(" Caf&#233; &amp; Cr&egrave;me&nbsp;") == "Café & Crème"
    assert clean(None) == clean("&nbsp;") == ""
    raw = {"title": "Salt &amp; Pepper", "categories": "A &gt; B", "description": "&quot;Hot&quot;"}
    assert item_text(raw, find_prompt("plain-1")) == 'Salt & Pepper\nA > B\n"Hot"'


def test_unknown_prompt_names_those_there_are() -> None:
    with pytest.raises(
        InputError, match=r"prompt is 'x'; choose from key-features-1, named-1, plain-1, or add it to PROMPTS"
    ):
        find_prompt("x")


def test_braces_in_a_text_are_only_text(make_domain) -> None:
    domain = make_domain([("u", "i", "{0} {review}")], [("i", "{title}", None, None)])
    assert dict(user_inputs(domain, find_prompt("plain-1"), "review_mean", 0)) == {
        "u": EncoderInput(texts=("{0} {review}",))
    }
    assert dict(item_inputs(domain, find_prompt("plain-1"))) == {"i": EncoderInput(texts=("{title}",))}


def test_items_and_users_without_text_have_a_reason_instead_of_a_row(make_domain) -> None:
    domain = make_domain([("u", "a", None), ("u", "b", "  "), ("v", "a", "good")], [("a", "A", None, None)])
    rows = dict(user_inputs(domain, find_prompt("plain-1"), "review_mean", 0))
    assert rows == {"u": NO_REVIEW, "v": EncoderInput(texts=("good",))}
    assert dict(item_inputs(domain, find_prompt("plain-1"))) == {"a": EncoderInput(texts=("A",)), "b": NO_TEXT}


def test_newest_reviews_are_taken_and_ties_are_drawn_by_a_hash(make_domain) -> None:
    domain = make_domain([("u", "a", "old", 1), ("u", "b", "tie b", 5), ("u", "c", "tie c", 5), ("u", "d", "new", 9)])
    prompt = find_prompt("plain-1")
    assert tie_hash("u", "c", domain.name, 0) < tie_hash("u", "b", domain.name, 0)
    assert dict(user_inputs(domain, prompt, "review_mean", 3))["u"] == EncoderInput(texts=("new", "tie c", "tie b"))
    assert dict(user_inputs(domain, prompt, "review_mean", 0))["u"] == EncoderInput(
        texts=("new", "tie b", "tie c", "old")
    )
    assert dict(user_inputs(domain, prompt, "concat", 2))["u"] == EncoderInput(texts=("new\ntie c",))


def test_users_are_sorted_and_never_split_between_batches_of_the_file(make_domain) -> None:
    reviews = [(f"u{u % 7}", f"i{i:05d}", f"text {u}") for u in range(7) for i in range(12_000)]
    rows = list(user_inputs(make_domain(reversed(reviews)), find_prompt("plain-1"), "review_mean", 0))
    assert [name for name, _ in rows] == [f"u{u}" for u in range(7)]  # 84,000 reviews: more than one Arrow batch
    assert all(row == EncoderInput(texts=(f"text {u}",) * 12_000) for u, (_, row) in enumerate(rows))
