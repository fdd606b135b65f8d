"""How one token of an answer is drawn: from a user's own random numbers, so that no batch and no order changes a text."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def uniforms(seed: int, user: str, count: int) -> NDArray[np.float32]:
    """Draw the random numbers of one user, [count] in [0, 1): the same wherever and whenever they are drawn."""
    key = hashlib.sha256(f"{seed} {user}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16]))).random(count, np.float32)


def draw_tokens(logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float) -> Tensor:
    """Draw one token of each row [B]: where the cumulative distribution passes `uniform_B`; at temperature 0 the best one.

    top_p: only the fewest most probable tokens that reach this probability can be drawn.
    """
    if temperature == 0:
        return logits_BV.argmax(-1)
    weight_BV = ((logits_BV - logits_BV.amax(-1, keepdim=True)) / temperature).exp_()
    if top_p < 1:
        sorted_BV, order_BV = weight_BV.sort(descending=True)
        before_BV = sorted_BV.cumsum(-1) - sorted_BV
        sorted_BV.masked_fill_(before_BV >= top_p * sorted_BV.sum(-1, keepdim=True), 0)
        weight_BV = torch.zeros_like(weight_BV).scatter_(-1, order_BV, sorted_BV)
    mass_BV = weight_BV.cumsum_(-1)
    total_B1 = mass_BV[:, -1:]
    at_B1 = torch.minimum(uniform_B[:, None] * total_B1, total_B1.nextafter(torch.zeros_like(total_B1)))
    return torch.searchsorted(mass_BV, at_B1, right=True).squeeze(1)
