"""What the GPU check holds against the product gives the product's numbers, on a CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from features.encoders.inputs import EncoderInput
from features.encoders.spec import EncoderSpec
from features.encoders.text import TextEncoder
from features.pseudo.generator import CausalGenerator, GeneratorSpec
from features.pseudo.prompts import PseudoPrompt
from tests.gpu import language
from tests.gpu.refill import Refilled
from tests.gpu.varlen import VarlenEncoder

VOCABULARY = language.TINY["vocab_size"]


def prompts(count: int) -> list[PseudoPrompt]:
    """Of unequal length."""
    titles = [f"title {number}" for number in range(7)]
    return [
        PseudoPrompt(user=f"u{k}", source="books", target="movies", titles=tuple(titles[: 1 + k % 7]))
        for k in range(count)
    ]


@pytest.mark.parametrize(("rows", "least"), [(5, 1), (5, 3), (30, 1)])
def test_refilled_rows_give_every_user_the_answer_of_a_batch(rows: int, least: int) -> None:
    torch.manual_seed(0)
    model = language.causal_model(language.TINY, torch.device("cpu")).float()
    spec = GeneratorSpec(model="random", texts=2, max_new_tokens=30, dtype="float32", temperature=1.0, seed=1)
    generator = CausalGenerator(model, language.Numbers(VOCABULARY), spec)
    expected = generator.generate(prompts(23))
    assert len({len(answer.split()) for answer in expected}) > 5, "rows end at different steps"
    one = Refilled(generator, rows, least)
    assert one.generate(prompts(23)) == expected
    assert one.tokens == sum(len(answer.split()) for answer in expected) + sum(
        len(answer.split()) < 30 and answer.count("\n") < 2 for answer in expected
    ), "and the token that ended it early"
    assert one.row_steps < 23 * 30


def test_texts_in_one_row_get_the_vectors_of_padded_ones() -> None:
    torch.manual_seed(0)
    texts = language.texts_of(np.array([9, 2, 30, 30, 1, 17]), VOCABULARY)
    inputs = [EncoderInput(texts=(text,)) for text in [*texts, texts[0]]]
    spec = EncoderSpec(model="random", dtype="float32", batch_tokens=40, max_tokens=25)
    tokenizer = language.Numbers(VOCABULARY)
    model = language.causal_model(language.TINY, torch.device("cpu")).model.float()
    plain = TextEncoder(model, tokenizer, spec)
    plain.packs = False
    model.set_attn_implementation("sdpa")
    expected = plain.encode(inputs)
    found = VarlenEncoder(model, tokenizer, spec).encode(inputs)
    np.testing.assert_allclose(found.vectors, expected.vectors, rtol=1e-4, atol=1e-5)
    assert found.tokens.tolist() == expected.tokens.tolist() == [9, 2, 25, 25, 1, 17, 9]
    assert not found.failed
