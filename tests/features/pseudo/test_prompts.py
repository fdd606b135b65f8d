"""Prompts, and what is read out of any answer."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.errors import InputError
from features.pseudo.prompts import LONGEST, PseudoPrompt, find_wording, parse_texts, short_title, write_prompt

PROMPT = PseudoPrompt(user="u", source="food", target="kitchen", titles=("Green Tea", "Rice"))
THREE = ["Tea Kettle", "3-Tier Stand, White", "9-Inch Pan"]


def test_the_plain_prompt_ends_where_the_first_title_is_to_be_written() -> None:
    assert write_prompt(PROMPT, find_wording("items-1"), 20, chat=False) == "food:\nGreen Tea\nRice\nkitchen:\n"


def test_the_chat_prompt_names_both_domains_the_titles_and_how_many_are_wanted() -> None:
    text = write_prompt(PROMPT, find_wording("items-1"), 17, chat=True)
    for part in ("bought these food products, newest first:\nGreen Tea\nRice\n", "17 different kitchen products"):
        assert part in text


def test_unknown_words_are_refused() -> None:
    with pytest.raises(InputError, match=r"prompt is 'items-9'; choose from items-1, or add it to WORDINGS"):
        find_wording("items-9")


@pytest.mark.parametrize(
    ("title", "short"),
    [
        ("Bodum  Chambord\n8-Cup, French Press", "Bodum Chambord 8-Cup"),
        ("One", "One"),
        ("", ""),
        ("Kit Kat - Dark", "Kit Kat"),
    ],
)
def test_short_titles_are_the_first_words(title: str, short: str) -> None:
    assert short_title(title, 3) == short


@pytest.mark.parametrize(
    "answer",
    [
        "Tea Kettle\n3-Tier Stand, White\n9-Inch Pan\n",
        "1. Tea Kettle\n2. 3-Tier Stand, White\n3. 9-Inch Pan",
        "1) Tea Kettle\n2) 3-Tier Stand, White\n3) 9-Inch Pan",
        "(1) Tea Kettle\n(2) 3-Tier Stand, White\n(3) 9-Inch Pan",
        "- Tea Kettle\n* 3-Tier Stand, White\n• 9-Inch Pan",
        '- "Tea Kettle"\n- “3-Tier Stand, White”\n- **9-Inch Pan**',
        "1. **Tea Kettle**\r\n\r\n2. '3-Tier Stand, White'\r\n\r\n3. `9-Inch Pan`",
        '["Tea Kettle", "3-Tier Stand, White", "9-Inch Pan"]',
        '```json\n["Tea Kettle", "3-Tier Stand, White", "9-Inch Pan"]\n```',
        '[\n  "Tea Kettle",\n  "3-Tier Stand, White",\n  "9-Inch Pan",\n',  # broken off
        '["Tea Kettle", "3-Tier Stand, White", "9-Inch Pan", "Kni',
        '[{"title": "Tea Kettle", "price": 3}, {"title": "3-Tier Stand, White"}, {"title": "9-Inch Pan"}]',
        '{"products": ["Tea Kettle", "3-Tier Stand, White", "9-Inch Pan"]}',
        '{\n"title": "Tea Kettle",\n"title": "3-Tier Stand, White",\n"title": "9-Inch Pan"',
        "Here are 3 kitchen products:\n\nTea Kettle\n3-Tier Stand, White\n9-Inch Pan",
        "<think>A kettle?\nMaybe a pan.</think>\nTea Kettle\n3-Tier Stand, White\n9-Inch Pan",
        "Tea Kettle\nTEA KETTLE\n3-Tier Stand, White\n---\n...\n3-tier stand, white\n9-Inch Pan",
    ],
)
def test_forms_of_answers(answer: str) -> None:
    assert parse_texts(answer, 20) == THREE


def test_answers_without_any_text() -> None:
    for answer in ("", "\n\n", "[]", "{}", "- \n* \n1.", "<think>never ends", "Sure, here they are:", "[1, null]", '"'):
        assert parse_texts(answer, 20) == []


def test_no_more_than_asked_for_and_none_too_long() -> None:
    assert parse_texts("a1\nb2\nc3\nd4", 2) == ["a1", "b2"]
    (text,) = parse_texts("word " * 100, 5)
    assert len(text) <= LONGEST
    assert set(text.split()) == {"word"}


@given(st.text(max_size=400), st.integers(1, 20))
def test_any_answer_gives_different_clean_lines(answer: str, most: int) -> None:
    texts = parse_texts(answer, most)
    assert len(texts) <= most
    assert len({text.casefold() for text in texts}) == len(texts)
    for text in texts:
        assert text == " ".join(text.split())
        assert 0 < len(text) <= LONGEST


JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=4), inner),
)
WORDS = st.lists(st.sampled_from(["Tea", "8-Cup", "Kettle,", "(White)", "12", "No.3"]), max_size=5)


@given(JSON)
def test_any_json_is_read_without_an_error(document: object) -> None:
    assert len(parse_texts(json.dumps(document), 5)) <= 5


@given(st.lists(WORDS.map(lambda words: " ".join(["Bodum", *words, "Set"])), unique=True))
def test_plain_lines_come_back_as_they_are(titles: list[str]) -> None:
    assert parse_texts("".join(f"{title}\n" for title in titles), 20) == titles[:20]
