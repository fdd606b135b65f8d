"""Prompts of pseudo-interactions, and the texts that are read out of a generator's answer (LGCD eq. 4).

The wording is data, has a name, and is part of every generator key, so an edited wording generates again.
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
class PseudoPrompt:
    """The content of one user's prompt: titles of the source domain; texts of items of the target domain are asked for.

    Its fields are part of content keys.
    """

    user: str
    source: str  # name of the domain
    target: str
    titles: tuple[str, ...]  # of the user's source items, newest first, cut to what the prompt shows


@dataclass(frozen=True, kw_only=True)
class Wording:
    """The words around the titles. {source}, {target}: names of the domains; {titles}: one a line; {texts}: how many."""

    chat: str  # for models with a chat template
    plain: str  # for models that continue a text; ends where the first title is to be written


WORDINGS: Mapping[str, Wording] = {
    "items-1": Wording(
        chat=(
            "A customer has bought these {source} products, newest first:\n{titles}\n\n"
            "Name {texts} different {target} products that this customer would probably buy. Answer with {texts} lines, "
            "a product title each, the most probable first. No numbers, no explanations."
        ),
        plain="{source}:\n{titles}\n{target}:\n",
    )
}


def find_wording(name: str) -> Wording:
    """Return the wording of that name. Raises InputError for an unknown one."""
    if name not in WORDINGS:
        raise InputError(f"prompt is {name!r}; choose from {', '.join(sorted(WORDINGS))}, or add it to WORDINGS")
    return WORDINGS[name]


def write_prompt(prompt: PseudoPrompt, wording: Wording, texts: int, *, chat: bool) -> str:
    """Return the text of one user's prompt, which asks for `texts` texts."""
    template = wording.chat if chat else wording.plain
    titles = "\n".join(prompt.titles)
    return template.format(source=prompt.source, target=prompt.target, titles=titles, texts=texts)


def short_title(title: str, words: int) -> str:
    """Return the first words of a title on one line, without punctuation that dangles at the cut."""
    return " ".join(title.split()[:words]).rstrip(" ,;:-–(")


_BULLET = re.compile(r"^(?:[-*+•–—>]+\s+|#+\s+|[(\[]?\d{1,3}[.):\]]\s+|[(\[]\d{1,3}[)\]]\s*)+")
_TITLE_KEY = re.compile(r'^"(?:title|name|product|item|text)"\s*:\s*', re.IGNORECASE)
_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
_FENCE = re.compile(r"\A```\w*\n|\n```\Z")
_QUOTED = re.compile(r'"((?:[^"\\\n]|\\.)*)"')
_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "«": "»", "`": "`", "*": "*", "_": "_"}


def parse_texts(answer: str, most: int) -> list[str]:
    """Return at most `most` different texts of an answer, in its order; any answer at all is read, none raises.

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
    """Yield the strings of a JSON document: those of lists, and the first of each object (its title)."""
    if isinstance(value, str):
        yield value.replace("\n", " ")
    elif isinstance(value, Mapping):
        inner = [v for v in value.values() if isinstance(v, str | list)]
        yield from _strings(inner[0]) if inner else ()
    elif isinstance(value, Sequence):
        for element in value:
            yield from _strings(element)


def _clean(line: str) -> str:
    text = " ".join(line.split())
    text = _TITLE_KEY.sub("", _BULLET.sub("", text)).rstrip(",;")
    while len(text) > 1 and _QUOTES.get(text[0]) == text[-1]:
        text = text[1:-1].strip()
    return text if len(text) <= LONGEST else text[:LONGEST].rsplit(" ", 1)[0]
