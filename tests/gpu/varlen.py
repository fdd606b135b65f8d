"""A candidate for the encoder on a GPU: texts of unequal length in one row without padding, attention by a varlen kernel.

`tests.gpu.check` holds it against the padded batches that the product has. On a CPU the kernel is a slow loop of the same
arguments, so that all around it is proven. Legend: T tokens of a batch, H heads, G heads of keys, D their width, B texts.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from features.encoders.spec import EncoderSpec
from features.encoders.text import TextEncoder

NAME = "varlen_row"
_starts: ContextVar[tuple[Tensor, int]] = ContextVar(
    "starts"
)  # int32 [B + 1] of the texts in the row; the longest's tokens


class VarlenEncoder(TextEncoder):
    """The product's encoder, but for its forward pass: a batch has as many tokens as its texts have, and no mask."""

    def __init__(self, model: Any, tokenizer: Any, spec: EncoderSpec) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface

        model.set_attn_implementation("sdpa")
        super().__init__(model, tokenizer, spec)
        AttentionInterface.register(NAME, _attend)
        AttentionMaskInterface.register(NAME, lambda *_, **__: None)
        self.model.set_attn_implementation(NAME)
        self.packs = True

    def _packed(self, tokens: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        lengths = torch.tensor([len(text) for text in tokens])
        ids = torch.tensor([token for text in tokens for token in text])
        if ids.max() >= self.vocabulary:
            raise IndexError(f"index out of range: token {int(ids.max())} has no embedding")
        ends = lengths.cumsum(0)
        place = torch.arange(len(ids)) - torch.repeat_interleave(ends - lengths, lengths)
        owner = torch.repeat_interleave(torch.arange(len(tokens)), lengths).to(self.device)
        starts = torch.cat([torch.zeros(1, dtype=torch.long), ends]).to(self.device, torch.int32)
        mark = _starts.set((starts, int(lengths.max())))
        try:
            with torch.inference_mode():
                states = self._states(
                    input_ids=ids[None].to(self.device), position_ids=place[None].to(self.device)
                )  # fmt: skip
                mean_TF = torch.stack([state[0].float() for state in states]).mean(0)
                sums_BF = mean_TF.new_zeros(len(tokens), self.width).index_add_(0, owner, mean_TF)
                return (sums_BF / lengths.to(self.device)[:, None]).cpu().numpy()
        finally:
            _starts.reset(mark)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Causal attention within each text: query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, D]."""
    starts, longest = _starts.get()
    q, k, v = (heads[0].transpose(0, 1).contiguous() for heads in (query, key, value))
    kernel = _kernel if query.is_cuda else slow_kernel
    return kernel(q, k, v, starts, longest, scaling)[None], None


def _kernel(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scale: float | None) -> Tensor:
    """Call torch's varlen kernel, whose arguments differ between 2.11 and 2.13."""
    from torch.nn.attention.varlen import varlen_attn

    takes = inspect.signature(varlen_attn).parameters
    more: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in takes else {"is_causal": True}
    if "enable_gqa" in takes:
        more["enable_gqa"] = q.shape[1] != k.shape[1]
    elif q.shape[1] != k.shape[1]:
        k, v = (heads.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for heads in (k, v))
    if "scale" in takes:
        more["scale"] = scale
    attended: Tensor = varlen_attn(q, k, v, starts, starts, longest, longest, **more)
    return attended


def slow_kernel(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scale: float | None) -> Tensor:
    """Attend text by text: q [T, H, D], k and v [T, G, D] -> [T, H, D]."""
    parts = []
    for first, last in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        one = (heads[first:last].transpose(0, 1)[None] for heads in (q, k, v))
        parts.append(
            scaled_dot_product_attention(*one, is_causal=True, scale=scale, enable_gqa=True)[0].transpose(0, 1)
        )
    return torch.cat(parts)
