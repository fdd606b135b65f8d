"""What the GPU check holds against the product gives the product's numbers, on a CPU."""

from __future__ import annotations

import numpy as np
import torch

from features.encoders.inputs import EncoderInput
from features.encoders.spec import EncoderSpec
from features.encoders.text import TextEncoder
from tests.gpu import language
from tests.gpu.varlen import VarlenEncoder

VOCABULARY = language.TINY["vocab_size"]


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
