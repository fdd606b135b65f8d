"""Sequence encoders of LGCD (arXiv 2604.05365): an ID and a text Transformer, and their fusion (eqs. 1-2).

One table numbers the items of both domains. Three ways to read them (`PretrainSpec.sequences`):

merged      one pair of encoders for both domains, pretrained on merged histories, so a history and the part of it that
            lies in one domain are encoded alike (ours)
separate    one pair for both, pretrained on each domain's own sequences (ours)
per_domain  a pair for each domain, with nothing in common, pretrained on that domain's sequences (the paper)

`trainables.models.lgcd.pretraining` trains them.
Shapes: S sequences, B of a batch, L positions, N items or labels, J items of a domain, F text width, D vector width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from trainables.sequences.blocks import Dropout, principal_components
from trainables.sequences.views import Range, padded, windows
from trainables.tasks.sequential import Sequences

SEQUENCES = ("merged", "separate", "per_domain")
ID_STARTS = ("titles", "random")
ITEM_FUSIONS = ("own", "shared")
_ID_DEVIATION = 0.1  # of the ID table before training (ours)
_ROWS = 512  # sequences encoded at once without gradients


@dataclass(frozen=True, kw_only=True)
class PretrainSpec:
    """How the encoders are made. Part of the key of what is kept."""

    width: int = 64  # D (LGCD "hidden dim d")
    blocks: int = 2  # Transformer blocks of each encoder (ours)
    heads: int = 2  # of each block (ours)
    max_length: int = 50  # newest items of a history that are read (ours)
    dropout: float = 0.3  # (ours)
    lr: float = 2e-3  # Adam's, falling linearly to 0 (ours; the paper's 1e-3 is for the whole model)
    beta2: float = 0.98  # Adam's: with 0.999 an item that is seen once moves four times as far (ours)
    epochs: int = 10  # (ours)
    batch: int = 128  # sequences (LGCD settings)
    negatives: int = 1024  # items of the softmax beside the target, drawn per batch and domain (ours)
    sequences: str = "merged"  # merged | separate | per_domain
    id_start: str = "titles"  # ID embeddings before training: principal components of the titles (ours) | random
    item_fusion: str = "own"  # map of an item's embeddings to E_fusion: own (ours) | shared with sequences (eq. 3)


class Block(nn.Module):
    """A pre-norm Transformer block with a learned bias per head and distance."""

    def __init__(self, spec: PretrainSpec) -> None:
        super().__init__()
        width = spec.width
        self.heads, self.dropout = spec.heads, Dropout(spec.dropout)
        self.attention_norm, self.map_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.map = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, bias_1HLL: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        B, L, D = x.shape
        q, k, v = self.qkv(self.attention_norm(x)).view(B, L, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        read = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias_1HLL)
        x = x + self.dropout(self.out(read.transpose(1, 2).reshape(B, L, D)))
        mapped: Tensor = x + self.dropout(self.map(self.map_norm(x)))
        return mapped


class Transformer(nn.Module):
    """Causal encoder: the output at a position represents the sequence up to it (eq. 1)."""

    def __init__(self, spec: PretrainSpec) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.blocks))
        self.norm, self.dropout = nn.LayerNorm(spec.width), Dropout(spec.dropout)
        self.position = nn.Parameter(torch.randn(spec.max_length, spec.width) * 0.02)
        # Heads start with a preference for recent items of different strength (Press et al. 2022), and learn from there.
        slope_H1 = torch.linspace(0, 0.3, spec.heads)[:, None]
        self.distance = nn.Parameter(-slope_H1 * torch.arange(spec.max_length))

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        place = torch.arange(x.shape[1], device=x.device)
        apart_LL = place[:, None] - place
        bias_HLL = self.distance[:, apart_LL.clamp(min=0)].masked_fill(apart_LL < 0, -math.inf)
        x = self.dropout(x + self.position[place])
        for block in self.blocks:
            x = block(x, bias_HLL[None])
        normed: Tensor = self.norm(x)
        return normed


class Encoders(nn.Module):
    """Item vectors, the two encoders and their fusion (eqs. 1-2), over the items of both domains or of one."""

    def __init__(self, spec: PretrainSpec, text_NF: Tensor, first: int = 0) -> None:
        """`text_NF`: vectors of the titles of its items, which are numbered from `first`."""
        super().__init__()
        self.register_buffer("text", text_NF, persistent=False)
        self.text: Tensor
        self.id = nn.Embedding(len(text_NF), spec.width, _weight=_ID_STARTS[spec.id_start](text_NF, spec.width))
        self.text_map: nn.Module = nn.Linear(text_NF.shape[1], spec.width)
        self.id_encoder, self.text_encoder = Transformer(spec), Transformer(spec)
        self.fusion = nn.Linear(2 * spec.width, spec.width)  # of sequences
        # Of items, E_fusion in eq. 3: a map of its own (ours), or that of sequences, W_fusion.
        self.item_fusion = self.fusion if spec.item_fusion == "shared" else nn.Linear(2 * spec.width, spec.width)
        self.max_length, self.first = spec.max_length, first

    def look_up(self, item: Tensor) -> tuple[Tensor, Tensor]:
        """ID and text embedding of items, [..., D] each."""
        return self._embedded(item, "id"), self._embedded(item, "text")

    def forward(self, id_BLD: Tensor, text_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """ID and text representation at every position, [B, L, D] each (eq. 1)."""
        return self.id_encoder(id_BLD), self.text_encoder(text_BLD)

    def encode(self, items_BL: Tensor, part: str) -> Tensor:
        """One of the two, [B, L, D]; `part`: id | text."""
        encoder = self.id_encoder if part == "id" else self.text_encoder
        encoded: Tensor = encoder(self._embedded(items_BL, part))
        return encoded

    def fuse(self, id_BD: Tensor, text_BD: Tensor) -> Tensor:
        """h_fusion (eq. 2)."""
        fused: Tensor = self.fusion(torch.cat([id_BD, text_BD], dim=-1))
        return fused

    def fuse_items(self, id_ND: Tensor, text_ND: Tensor) -> Tensor:
        """E_fusion of looked up items (eq. 3)."""
        fused: Tensor = self.item_fusion(torch.cat([id_ND, text_ND], dim=-1))
        return fused

    @torch.no_grad()
    def item_vectors(self) -> Tensor:
        """E_fusion of all its items, [N, D]."""
        return self.fuse_items(*self.look_up(self.first + torch.arange(len(self.text), device=self.text.device)))

    @torch.no_grad()
    def text_embeddings(self, domain: Range) -> Tensor:
        """E_text of a domain's items, [J, D]."""
        return self._embedded(torch.arange(*domain, device=self.text.device), "text")

    def _embedded(self, item: Tensor, part: str) -> Tensor:
        place = (item - self.first).clamp(min=0)  # below 0: the item 0 of padding, which nobody reads
        embedded: Tensor = self.id(place) if part == "id" else self.text_map(self.text[place])
        return embedded


def _random_ids(text_NF: Tensor, width: int) -> Tensor:
    return (_ID_DEVIATION * torch.randn(len(text_NF), width)).to(text_NF.device)


def _ids_by_title(text_NF: Tensor, width: int) -> Tensor:
    return principal_components(text_NF, width, _ID_DEVIATION)


_ID_STARTS = {"titles": _ids_by_title, "random": _random_ids}


class DomainEncoders:
    """The encoders that read sequences of a domain: for each its own pair, as in the paper, or one pair for both."""

    def __init__(self, by_domain: Mapping[Range, Encoders]) -> None:
        self.by_domain = dict(by_domain)

    @property
    def max_length(self) -> int:
        """Newest items of a history that are read."""
        return next(iter(self.by_domain.values())).max_length

    def of_domain(self, domain: Range) -> Encoders:
        """Return the pair that reads items of this domain."""
        return self.by_domain[domain]

    def item_vectors(self, domain: Range) -> Tensor:
        """E_fusion of all items of a domain, [J, D]."""
        pair = self.of_domain(domain)
        return pair.item_vectors()[domain[0] - pair.first : domain[1] - pair.first]


# --- reading sequences with pretrained encoders -------------------------------------------------------------------


@torch.no_grad()
def represent(
    encoders: Encoders, sequences: Sequences, *, last: bool, parts: Sequence[str] = ("id", "text")
) -> list[Tensor]:
    """Return ID and text representation (or one of them) after every item, [N, D]; with `last`, of sequences, [S, D].

    Only the newest `max_length` items are read; earlier items, and empty sequences, have the zero vector.
    """
    item, device = sequences.item, sequences.device
    first, length = windows(sequences.starts, encoders.max_length)
    size = len(sequences) if last else len(item)
    states = [torch.zeros(size, encoders.fusion.out_features, device=device) for _ in parts]
    order = length.argsort(stable=True)
    order = order[length[order] > 0]
    for start in range(0, len(order), _ROWS):
        batch = order[start : start + _ROWS]
        items_BL, real_BL = padded(item, first[batch], length[batch])
        place_BL = first[batch][:, None] + torch.arange(items_BL.shape[1], device=device)
        for out, part in zip(states, parts, strict=True):
            state_BLD = encoders.encode(items_BL, part)
            if last:
                out[batch] = state_BLD[torch.arange(len(batch), device=device), length[batch] - 1]
            else:
                out[place_BL[real_BL]] = state_BLD[real_BL]
    return states
