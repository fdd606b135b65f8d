"""Vectors of texts by a transformer: the batched forward pass.

first_last_avg is MuSiC eq. 1 (after Li et al. 2020): the mean over real tokens of (h_1 + h_L) / 2, where h_1 is the
output of the first block (hidden_states[1]; [0] is the embedding layer) and h_L that of the last. Tokens that the
tokenizer adds itself ([CLS], [SEP], <s>) are real; padding is not.

Legend: B texts of a batch, L tokens of the longest of them, N inputs, F width of the model.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from features.encoders.batches import (
    Encoded,
    RunningMeans,
    TokenBudget,
    packed_size,
    packs,
    padded_size,
    pool,
    run_batch,
    token_batches,
)
from features.encoders.inputs import EncoderInput
from features.encoders.packing import can_pack, packed, runs
from features.encoders.spec import EncoderSpec

_LEAST_TOKENS = 16  # MKL multiplies fewer than 4 rows by another kernel, with other last bits: copies fill the batch up


def tokenize(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
    """Return the token ids of each text, cut at `max_tokens`, special tokens included, without padding."""
    if not texts:
        return []
    tokens: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=max_tokens, padding=False)["input_ids"]
    return tokens


class TextEncoder:
    """A transformer and its tokenizer as an `Encoder`; safe to use from several threads."""

    def __init__(self, model: Any, tokenizer: Any, spec: EncoderSpec) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.to(self.device).eval()
        self.model.config.use_cache = False  # a decoder's key-value cache is of no use to one forward pass
        self.tokenizer = tokenizer
        self.spec = spec
        # The tokenizer's padding needs a token; any will do for models that have none, since padding is masked.
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        config = model.config.get_text_config()
        self.vocabulary = model.get_input_embeddings().num_embeddings
        self.width = config.hidden_size
        self.budget = TokenBudget(spec.batch_tokens)
        # Without padding, whatever a text's neighbours are; a GPU's kernels want all rows equally long.
        self.packs = self.device.type == "cpu" and can_pack(self.model)
        self._lock = threading.Lock()  # a fast tokenizer that is called from two threads raises "Already borrowed"

    def encode(self, inputs: Sequence[EncoderInput]) -> Encoded:
        """Return a vector for each input: the mean over its texts, accumulated batch by batch in float64.

        Identical texts are encoded once. Never more than one batch of text vectors is held.
        """
        reason = "a text encoder cannot see the row's image"
        means = RunningMeans(inputs, self.width, {i: reason for i, one in enumerate(inputs) if one.image is not None})
        with self._lock:
            tokens = tokenize(self.tokenizer, [text for text, _ in means.units], self.spec.max_tokens)
        lengths = np.array([len(t) for t in tokens], np.int64)
        if self.packs:
            batches, size = packs(lengths, self.budget), packed_size
        else:
            batches, size = token_batches(lengths, self.budget, exact=self.device.type == "cpu"), padded_size
        for batch in batches:
            batch_tokens = [tokens[i] for i in batch]
            vectors, failed = run_batch(batch_tokens, self._vectors, size, self.budget, self.width)
            means.add(batch.tolist(), vectors, lengths[batch], size(batch_tokens), failed)
        means.fail({int(i): "no tokens" for i in np.flatnonzero(lengths == 0)})
        return means.encoded()

    def _vectors(self, tokens: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Return the vectors [B, F] of B token lists, longest first."""
        count, missing = len(tokens), _LEAST_TOKENS - packed_size(tokens)
        tokens = [*tokens, *[tokens[-1]] * -(-missing // len(tokens[-1]))]
        return (self._packed(tokens) if self.packs else self._padded(tokens))[:count]

    def _packed(self, tokens: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        with torch.inference_mode(), packed(tokens) as inputs:
            states = self._states(**inputs)
            means = [
                torch.stack([state[0, start : start + count * length].float() for state in states])
                .mean(0)
                .view(count, length, -1)
                .mean(1)
                for start, count, length in runs([len(token) for token in tokens])
            ]
            return torch.cat(means).numpy()

    def _padded(self, tokens: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Pad on the right, whatever the tokenizer's side.

        Causal models then count positions from the first real token, and the others mask the padding.
        """
        longest = max(map(len, tokens))
        ids_BL = torch.full((len(tokens), longest), self.pad)
        mask_BL = torch.zeros((len(tokens), longest), dtype=torch.long)
        for row, token in enumerate(tokens):
            ids_BL[row, : len(token)] = torch.as_tensor(token)
            mask_BL[row, : len(token)] = 1
        if ids_BL.max() >= self.vocabulary:  # on a GPU an assertion of the device, which is of no use afterwards
            raise IndexError(f"index out of range: token {int(ids_BL.max())} has no embedding")
        ids_BL, mask_BL = ids_BL.to(self.device), mask_BL.to(self.device)
        with torch.inference_mode():
            return pool(self._states(input_ids=ids_BL, attention_mask=mask_BL), mask_BL).cpu().numpy()

    def _states(self, **inputs: torch.Tensor) -> list[torch.Tensor]:
        """Return the hidden states that are averaged; naming the layer keeps two in memory, where True keeps all."""
        if self.spec.pooling == "mean":
            return [self.model(**inputs).last_hidden_state]
        output = self.model(**inputs, output_hidden_states=[1])
        return [output.hidden_states[1], output.last_hidden_state]
