"""What a generator is asked, and what is read out of its answer (LGCD eq. 4).

The words are data, have a name, and are part of every generator key, so edited words generate again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from features.errors import InputError

LONGEST = 200  # characters of a text; what is beyond is prose, not a title


@dataclass(frozen=True, kw_only=True)
class Wish:
    """One user, whose items of `source` are known and whose items of `target` are asked for."""

    user: str
    source: str  # name of the domain
    target: str
    titles: tuple[str, ...]  # of the user's source items, newest first, cut to what is shown


@dataclass(frozen=True, kw_only=True)
class WishWords:
    """The words around the titles. {source}, {target}: names of the domains; {titles}: one a line; {texts}: how many."""

    chat: str  # for models with a chat template
    plain: str  # for models that continue a text; ends where the first title is to be written


WISH_WORDS: Mapping[str, WishWords] = {
    "items-1": WishWords(
        chat=(
            "A customer has bought these {source} products, newest first:\n{titles}\n\n"
            "Name {texts} different {target} products that this customer would probably buy. Answer with {texts} lines, "
            "a product title each, the most probable first. No numbers, no explanations."
        ),
        plain="{source}:\n{titles}\n{target}:\n",
    )
}


def find_words(name: str) -> WishWords:
    """The words of that name. Raises InputError, naming those there are."""
    if name not in WISH_WORDS:
        raise InputError(f"prompt: must be one of {', '.join(sorted(WISH_WORDS))}, not {name!r}; add it to WISH_WORDS")
    return WISH_WORDS[name]


def ask(wish: Wish, words: WishWords, texts: int, *, chat: bool) -> str:
    """The prompt of one user."""
    form = words.chat if chat else words.plain
    return form.format(source=wish.source, target=wish.target, titles="\n".join(wish.titles), texts=texts)


def short_title(title: str, words: int) -> str:
    """The first words of a title on one line, without what dangles at the cut."""
    return " ".join(title.split()[:words]).rstrip(" ,;:-–(")


_BULLET = re.compile(r"^(?:[-*+•–—>]+\s+|#+\s+|[(\[]?\d{1,3}[.):\]]\s+|[(\[]\d{1,3}[)\]]\s*)+")
_TITLE_KEY = re.compile(r'^"(?:title|name|product|item|text)"\s*:\s*', re.IGNORECASE)
_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
_FENCE = re.compile(r"\A```\w*\n|\n```\Z")
_QUOTED = re.compile(r'"((?:[^"\\\n]|\\.)*)"')
_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "«": "»", "`": "`", "*": "*", "_": "_"}


def parse_texts(answer: str, most: int) -> list[str]:
    """At most `most` different texts of an answer, in its order; any answer at all is read, none raises.

    Understood: a text a line, numbered, bulleted, quoted or in bold; a JSON list of strings or of objects with a title,
    also a broken one; fences, thoughts, empty lines and lines of introduction ("Here are ...:") around them. Texts are
    cut at LONGEST characters, and repeated ones dropped, whatever their case.
    """
    texts: dict[str, str] = {}
    for line in _lines(_THOUGHT.sub("", answer)):
        text = _clean(line)
        if any(c.isalpha() for c in text):
            texts.setdefault(text.casefold(), text)
        if len(texts) == most:
            break
    return list(texts.values())


def _lines(answer: str) -> Iterator[str]:
    body = _FENCE.sub("", answer.strip()).strip()
    start = body.find("[")
    if body.startswith("{") or (start >= 0 and not body[:start].strip()):
        try:
            yield from _strings(json.loads(body))
            return
        except ValueError:
            if "\n" not in body:  # a broken list on one line
                yield from _QUOTED.findall(body)
                return
    for line in body.split("\n"):
        if not line.rstrip().endswith(":"):
            yield line


def _strings(value: Any) -> Iterator[str]:
    """Strings of a JSON document: those of lists, and the first of each object (its title)."""
    if isinstance(value, str):
        yield value.replace("\n", " ")
    elif isinstance(value, Mapping):
        inner = [v for v in value.values() if isinstance(v, str | list)]
        yield from _strings(inner[0]) if inner else ()
    elif isinstance(value, Sequence):
        for one in value:
            yield from _strings(one)


def _clean(line: str) -> str:
    text = " ".join(line.split())
    text = _TITLE_KEY.sub("", _BULLET.sub("", text)).rstrip(",;")
    while len(text) > 1 and _QUOTES.get(text[0]) == text[-1]:
        text = text[1:-1].strip()
    return text if len(text) <= LONGEST else text[:LONGEST].rsplit(" ", 1)[0]
