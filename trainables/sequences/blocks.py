"""Attention, its block, dropout and starts of tables and maps.

Shapes: B sequences of a batch, L positions that ask, M that are read, H heads, K width of a head, D vector width, I items,
F width of titles' vectors.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from trainables.sequences.losses import picked


def biases_at_zero(network: nn.Module) -> None:
    """Let the biases of all maps start at 0 (ours): torch's are larger than vectors of 0.02, and items would look alike."""
    for part in network.modules():
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)


@torch.no_grad()
def start_as_mean(*maps: nn.Linear) -> None:
    """Let maps of P vectors side by side, [..., P D] -> [..., D], start as their mean (ours): users begin near items."""
    for linear in maps:
        width, parts = linear.out_features, linear.in_features // linear.out_features
        linear.weight.copy_(torch.eye(width).repeat(1, parts) / parts)


class Dropout(nn.Dropout):
    """nn.Dropout at a tenth of its time on a CPU, where torch draws a number of 32 bits for each coordinate, one by one.

    Here 16 bits decide, so that the share left out is a multiple of 1 / 65,536, below 1; the rest is scaled by that share.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return x where coordinates that are drawn anew each time are 0, of the same shape."""
        if not self.training or self.p == 0:
            return x
        values = 2**16
        left_out = min(round(self.p * values), values - 1)
        drawn = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
        kept = drawn.view(torch.int16)[: x.numel()].view(x.shape) >= left_out - values // 2
        return x * kept.to(x.dtype).mul_(values / (values - left_out))


def attend(query_BHLK: Tensor, key_BHMK: Tensor, value_BHMK: Tensor, mask: Tensor) -> Tensor:
    """Return softmax(Q K' / sqrt(width of a head)) V over what the mask allows, and 0 for a query that it allows nothing.

    mask: bool, broadcast to [B, H, L, M]; True: this query may read this key.
    """
    allowed = mask.any(dim=-1, keepdim=True)
    read = functional.scaled_dot_product_attention(query_BHLK, key_BHMK, value_BHMK, attn_mask=mask | ~allowed)
    return read * allowed


def causal(length: int, device: torch.device) -> Tensor:
    """Return the mask with which a position reads itself and those before it, bool [1, 1, L, L]."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]


class AttentionBlock(nn.Module):
    """Attention, then two maps of each position, both around a residual: x + Dropout(g(LayerNorm(x))).

    `norm`: `pre`, as written, or `post`: LayerNorm(x + Dropout(g(x))). `joined`: whether a linear map joins the heads.
    """

    def __init__(
        self, width: int, heads: int, inner: int, dropout: float, *, norm: str = "pre", activation: str = "relu",
        joined: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads, self.post = heads, norm == "post"
        self.dropout = Dropout(dropout)
        self.attention_norm, self.map_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=joined)
        self.key_value = nn.Linear(width, 2 * width, bias=joined)
        self.out = nn.Linear(width, width) if joined else nn.Identity()
        nonlinear = {"relu": nn.ReLU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU(approximate="tanh")}[activation]
        self.map = nn.Sequential(nn.Linear(width, inner), nonlinear, nn.Linear(inner, width))

    def forward(self, x_BLD: Tensor, mask: Tensor, memory_BMD: Tensor | None = None) -> Tensor:
        """[B, L, D] -> [B, L, D]. `memory`: what is read instead of x itself (cross-attention); it is not normalised."""
        return self._around(x_BLD, self._read(self._normed(x_BLD), mask, memory_BMD))

    def newest(self, x_BLD: Tensor, length_B: Tensor) -> Tensor:
        """[B, L, D] -> [B, D]: what `forward` gives at the last of each row's `length` places, which reads all of them.

        No other place is mapped. (W_Q y)'(W_K x) = (W_K' W_Q y)'x maps the query in the place of all keys, W_V goes behind
        the sum, whose weights add up to 1, and the keys' bias adds the same to all logits of a row.
        """
        B, L, D = x_BLD.shape
        x_ND, normed_BLD, place_L = x_BLD.flatten(0, 1), self._normed(x_BLD), torch.arange(L, device=x_BLD.device)
        column_B = (length_B - 1).clamp(min=0)  # an empty row reads its first place
        last_B = torch.arange(B, device=x_BLD.device) * L + column_B
        key_HKD, value_HKD = self.key_value.weight.view(2, self.heads, -1, D)
        query_BHK = self.query(picked(normed_BLD.flatten(0, 1), last_B)).view(B, self.heads, -1)
        asked_BHD = torch.einsum("bhk,hkd->bhd", query_BHK, key_HKD) / math.sqrt(query_BHK.shape[2])
        beyond = place_L > column_B[:, None, None]
        read_BHD = (asked_BHD @ normed_BLD.mT).masked_fill(beyond, -torch.inf).softmax(dim=2) @ normed_BLD
        read_BD = torch.einsum("bhd,hkd->bhk", read_BHD, value_HKD).reshape(B, D)
        if self.key_value.bias is not None:
            read_BD = read_BD + self.key_value.bias[D:]
        return self._around(picked(x_ND, last_B), self.out(read_BD))

    def _normed(self, x: Tensor) -> Tensor:
        normed: Tensor = x if self.post else self.attention_norm(x)
        return normed

    def _around(self, x: Tensor, read: Tensor) -> Tensor:
        """Both residuals around what was read, [..., D]."""
        x = x + self.dropout(read)
        if self.post:
            x = self.attention_norm(x)
            out: Tensor = self.map_norm(x + self.dropout(self.map(x)))
            return out
        return x + self.dropout(self.map(self.map_norm(x)))  # type: ignore[no-any-return]

    def _read(self, x_BLD: Tensor, mask: Tensor, memory_BMD: Tensor | None) -> Tensor:
        B, L, D = x_BLD.shape
        memory = x_BLD if memory_BMD is None else memory_BMD
        query = self.query(x_BLD).view(B, L, self.heads, -1).transpose(1, 2)
        key, value = self.key_value(memory).view(B, memory.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        read: Tensor = self.out(attend(query, key, value, mask).transpose(1, 2).reshape(B, L, D))
        return read


def principal_components(text_IF: Tensor, width: int, deviation: float) -> Tensor:
    """Return the first principal components of the items' text vectors as start of an ID table (ours): [I, width].

    An item that was seen a few times starts near those that read like it, instead of at random.
    """
    centred = text_IF - text_IF.mean(dim=0)
    _, _, directions = torch.linalg.svd(centred.T @ centred / len(centred))
    components = centred @ directions[:width].T
    out = torch.zeros(len(text_IF), width, device=text_IF.device)
    out[:, : components.shape[1]] = components / components.std().clamp(min=1e-6) * deviation
    return out
