"""Refilled rows against batches of transformers' own generation: the same texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from features.pseudo import decoding
from features.pseudo.decoding import Decoder
from features.pseudo.generator import CausalGenerator, GeneratorSpec, load_generator, resolve_generator
from features.pseudo.prompts import PseudoPrompt
from tests.features.conftest import TITLES
from tests.features.pseudo.batches import answer_in_batches
from tests.gpu import language

VOCABULARY = language.TINY["vocab_size"]


def prompts(count: int) -> list[PseudoPrompt]:
    """Of unequal length."""
    return [
        PseudoPrompt(user=f"u{k}", source="books", target="movies", titles=tuple(TITLES[: 1 + k % 7]))
        for k in range(count)
    ]


def decoder(generator: CausalGenerator, asked: list[PseudoPrompt], rows: int) -> Decoder:
    return Decoder(generator, [generator._tokens(one) for one in asked], [one.user for one in asked], rows)


@pytest.fixture(scope="module")
def numbers() -> CausalGenerator:
    """A random Llama whose answers of at most 30 tokens end at different steps."""
    torch.manual_seed(0)
    model = language.causal_model(language.TINY, torch.device("cpu")).float()
    spec = GeneratorSpec(model="random", texts=2, max_new_tokens=30, dtype="float32", temperature=1.0, seed=1)
    return CausalGenerator(model, language.Numbers(VOCABULARY), spec)


@pytest.mark.parametrize(("rows", "trim", "read"), [(5, 3, 4096), (1, 32, 4096), (16, 7, 1), (40, 1, 100)])
def test_refilled_rows_give_every_prompt_the_answer_of_a_batch(
    numbers: CausalGenerator, rows: int, trim: int, read: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "_TRIM", trim)
    monkeypatch.setattr(decoding, "_READ_TOKENS", read)
    monkeypatch.setattr(decoding, "_ROOM", 2)
    asked = prompts(33)
    expected = answer_in_batches(numbers, asked)
    lengths = [len(answer.split()) for answer in expected]
    assert len(set(lengths)) > 5
    one = decoder(numbers, asked, rows)
    assert one.run() == expected
    assert one.tokens == sum(lengths)
    assert one.row_steps < 33 * 30
    if rows <= 5:
        assert one.tokens / (one.row_steps + 33) > 0.9, "rows are full: a prompt's reading gives its first token"


@pytest.mark.parametrize("fields", [{}, {"temperature": 0.0}, {"top_p": 0.8, "texts": 9}, {"max_new_tokens": 3}])
def test_every_kind_of_model_gives_the_texts_of_batches(tiny_generator: Path, fields: dict[str, Any]) -> None:
    spec = GeneratorSpec(
        model=str(tiny_generator), dtype="float32", **{"texts": 3, "temperature": 1.0, "max_new_tokens": 40, **fields}
    )
    generator, asked = load_generator(resolve_generator(spec)), prompts(12)
    assert decoder(generator, asked, 3).run() == answer_in_batches(generator, asked)
    assert generator.generate([]) == []


@pytest.mark.parametrize("shared", [0, 1, 9, 40])
def test_what_all_prompts_begin_with_is_read_once(numbers: CausalGenerator, shared: int) -> None:
    """The answers are those of prompts that are read whole, each in a batch of its own."""
    draw = torch.Generator().manual_seed(shared)
    begin = torch.randint(3, VOCABULARY, (shared,), generator=draw).tolist()
    ends = [
        torch.randint(3, VOCABULARY, (1 + 5 * (k % 4),), generator=draw).tolist() for k in range(12)
    ]  # fmt: skip
    asked, users = [begin + [k + 3] + end for k, end in enumerate(ends)], [f"u{k}" for k in range(12)]
    alone = [Decoder(numbers, [prompt], [user], 1) for prompt, user in zip(asked, users, strict=True)]
    expected = [answer for one in alone for answer in one.run()]
    together = Decoder(numbers, asked, users, 12)
    assert together.run() == expected
    assert together.read == shared + 12 * (2 + 15), (
        "the beginning once, then as many tokens of each as the longest end has"
    )


def test_prompts_that_are_all_the_same_are_read_but_for_their_last_token(numbers: CausalGenerator) -> None:
    one = Decoder(numbers, [[5, 6, 7]] * 4, ["u", "u", "v", "u"], 4)
    answers = one.run()
    assert one.read == 2 + 4
    assert answers[0] == answers[1] == answers[3] == Decoder(numbers, [[5, 6, 7]], ["u"], 1).run()[0]
    assert answers[2] != answers[0]


def test_what_is_left_behind_is_not_held(numbers: CausalGenerator) -> None:
    """Columns in use are those of the rows that are busy, however many prompts have gone through."""
    one = decoder(numbers, prompts(200), 4)
    one.run()
    longest = max(map(len, one.prompts))
    assert one.steps > 500
    assert one._columns[0].buffers[0].shape[2] <= 2 * (longest + 30) + decoding._ROOM + decoding._TRIM
