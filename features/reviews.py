"""Words of reviews as numbers: a fixed vocabulary with a vector for each word, never fitted on any text of a study.

`vectors` is an encoder, whose wordpieces and input embeddings are taken, or a `.vec` file: a line a word, then its numbers
(fastText's and word2vec's text form, with or without a first line of counts); its words are lower-case runs of letters
and digits, and words that it lacks are left out.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.checks import refuse, whole
from features.encoders.spec import EncoderSpec, resolve_encoder
from features.encoders.weights import load_tokenizer_of, load_weights, quiet
from features.errors import InputError
from features.store.folders import whole_folder, write_json
from features.store.tables import digest

_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True, kw_only=True)
class ReviewSpec:
    """Where words come from, and how many of a review are kept."""

    vectors: str = "minilm"  # an encoder: a preset or a folder; or a `.vec` file
    max_words: int = 64  # first words of a review that are kept, in words of the vocabulary

    def __post_init__(self) -> None:
        refuse(whole(self, "max_words", least=1), place="reviews.")


@dataclass(frozen=True, kw_only=True)
class WordTable:
    """A vocabulary of W words in a folder of its own."""

    key: str
    vectors: Path  # float32 [W, E]
    tokenise: Callable[[Sequence[str]], list[list[int]]]  # texts -> numbers of their first words


def open_words(spec: ReviewSpec, store: Path) -> WordTable:
    """Return the vocabulary; its vectors are written to `store` where they are missing. InputError where there is none."""
    made = _of_file(Path(spec.vectors)) if spec.vectors.endswith(".vec") else _of_encoder(spec.vectors)
    identity, read_vectors, words_of = made
    folder = store / f"words-{digest(identity)[:12]}"
    if not (folder / "manifest.json").is_file():
        with whole_folder(folder) as work:
            np.save(work / "vectors.npy", read_vectors())
            write_json(work / "manifest.json", identity)

    def tokenise(texts: Sequence[str]) -> list[list[int]]:
        return [numbers[: spec.max_words] for numbers in words_of(texts)]

    return WordTable(key=digest({**identity, **asdict(spec)}), vectors=folder / "vectors.npy", tokenise=tokenise)


Vocabulary = tuple[dict[str, Any], Callable[[], NDArray[np.float32]], Callable[[Sequence[str]], list[list[int]]]]
"""What it is, its vectors, and texts -> numbers of their words."""


def _of_encoder(name: str) -> Vocabulary:
    from transformers import AutoModel

    if name.count("/") == 1 and not Path(name).exists():
        raise InputError(f"reviews.vectors {name}: no such folder; give a preset, a folder, or a .vec file")
    resolved = resolve_encoder(EncoderSpec(model=name, dtype="float32"))
    place = f"reviews.vectors {name}"
    tokenizer = load_tokenizer_of(place, resolved.path)

    def vectors() -> NDArray[np.float32]:
        model = load_weights(AutoModel, f"encoder {name}", resolved.path, "float32", resolved.allow_keys)
        table: NDArray[np.float32] = model.get_input_embeddings().weight.detach().numpy()
        return table

    def words_of(texts: Sequence[str]) -> list[list[int]]:
        with quiet():
            numbers: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
        return numbers

    return {"weights": resolved.weights_sha256, "tokenizer": resolved.files_sha256}, vectors, words_of


def _of_file(path: Path) -> Vocabulary:
    if not path.is_file():
        raise InputError(f"reviews.vectors {path}: no such file; give a .vec file, or the name of an encoder")
    number: dict[str, int] = {}
    rows: list[list[float]] = []
    with path.open(
        encoding="utf-8", errors="replace", newline="\n"
    ) as lines:  # some words are no text: none reads them
        for place, line in enumerate(lines, start=1):
            # A word may hold blanks; how many numbers stand behind it, the lines before have shown.
            word, *values = line.rstrip(" \r\n").rsplit(" ", len(rows[0]) if rows else -1)
            if place == 1 and len(values) == 1:
                continue  # counts of words and numbers
            try:
                row = [float(value) for value in values]
            except ValueError as error:
                raise InputError(
                    f"{path}: line {place} holds {str(error).split(': ')[-1]}, not a number; mend it"
                ) from error
            if not row or (rows and len(row) != len(rows[0])):
                raise InputError(
                    f"{path}: line {place} has {len(row)} numbers, not {len(rows[0]) if rows else 'any'}; mend it"
                )
            number.setdefault(word, len(rows))
            rows.append(row)
    if not rows:
        raise InputError(f"{path}: it holds no word; give a .vec file of words with their numbers")

    def words_of(texts: Sequence[str]) -> list[list[int]]:
        found = (_WORD.findall(text.lower()) for text in texts)
        return [[number[word] for word in words if word in number] for words in found]

    identity = {"file": hashlib.sha256(path.read_bytes()).hexdigest()}
    return identity, lambda: np.array(rows, np.float32), words_of
