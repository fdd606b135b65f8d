"""Texts of unequal length in one forward pass without padding, on a CPU.

All tokens of a batch stand in one row [1, T]: every matrix of the model multiplies T rows, however short the texts are,
and only attention takes the texts one by one (those of equal length together). Nothing is padded, so nothing is masked.
Legend: T tokens of a batch, H heads, G heads of keys and values, D width of a head, B texts of one length, L that length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

NAME = "text_by_text"
_UNSUPPORTED = ("sliding_window", "softcap", "s_aux")  # arguments of attention functions that ours does not heed
_lengths: ContextVar[Sequence[int]] = ContextVar("lengths")  # of the texts in the row


def can_pack(model: Any) -> bool:
    """Return whether two texts in one row get what each gets alone; if so, the model computes that way from now on.

    It is tried out, because nothing declares it: some models count positions themselves, or attend in ways of their own.
    """
    if not getattr(model, "_supports_attention_backend", False):
        return False
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _no_mask)
    before = model.config._attn_implementation
    vocabulary = model.get_input_embeddings().weight.shape[0]
    texts = [[(7 * i + 5) % vocabulary for i in range(length)] for length in (9, 5)]
    with torch.inference_mode():
        apart = [model(input_ids=torch.tensor([text])).last_hidden_state[0] for text in texts]
        model.set_attn_implementation(NAME)
        try:
            with packed(texts) as inputs:
                together = model(**inputs).last_hidden_state[0].split([9, 5])
            close = 1e-4 if model.dtype == torch.float32 else 0.05
            good = all(torch.allclose(a, b, rtol=close, atol=close) for a, b in zip(apart, together, strict=True))
        except (ValueError, TypeError, RuntimeError, IndexError):
            good = False
    if not good:
        model.set_attn_implementation(before)
    return good


@contextmanager
def packed(texts: Sequence[Sequence[int]]) -> Iterator[dict[str, Tensor]]:
    """Yield the model's inputs for token lists in falling order of length; run the forward pass inside the block."""
    lengths = [len(text) for text in texts]
    mark = _lengths.set(lengths)
    try:
        yield {
            "input_ids": torch.tensor([[token for text in texts for token in text]]),
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        }
    finally:
        _lengths.reset(mark)


def runs(lengths: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yield (first token, number of texts, tokens of each) for every run of texts of equal length in a row."""
    start = 0
    for length, texts in groupby(lengths):
        count = len(list(texts))
        yield start, count, length
        start += count * length


def _no_mask(*_: Any, **__: Any) -> None:
    return None


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None = None,
    is_causal: bool | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attend within each text: query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, D]."""
    if unsupported := [name for name in _UNSUPPORTED if kwargs.get(name) is not None]:
        raise ValueError(f"attention with {', '.join(unsupported)} cannot be packed")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
    for start, count, length in runs(_lengths.get()):
        part = slice(start, start + count * length)
        q, k, v = (
            heads[0, :, part].view(len(heads[0]), count, length, -1).transpose(0, 1)  # [B, H, L, D]
            for heads in (query, key, value)
        )
        attended = scaled_dot_product_attention(
            q, k, v, scale=scaling, is_causal=causal and length > 1, enable_gqa=query.shape[1] != key.shape[1]
        )
        out[0, part].view(count, length, *out.shape[2:]).copy_(attended.transpose(1, 2))
    return out, None
