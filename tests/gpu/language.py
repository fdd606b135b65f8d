"""Language models of a shape with random weights, and a tokenizer without a vocabulary file: texts are token numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

LLAMA_3_8B = {
    "vocab_size": 128_256, "hidden_size": 4_096, "intermediate_size": 14_336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8_192,
}  # fmt: skip
LLAMA_2_7B = {
    "vocab_size": 32_000, "hidden_size": 4_096, "intermediate_size": 11_008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4_096,
}  # fmt: skip
TINY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
CLIP_LARGE = {
    "hidden_size": 1_024, "intermediate_size": 4_096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14,
}  # fmt: skip
CLIP_TINY = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56,
    "patch_size": 14,
}  # fmt: skip
BREAK_SHARE = 16  # one token in so many ends a line


class Numbers:
    """A tokenizer whose texts are token numbers with blanks between them; every sixteenth token ends a line."""

    pad_token_id, eos_token_id, chat_template = 0, None, None

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def __call__(self, texts: str | Sequence[str], *, max_length: int = 10**9, **_: Any) -> dict[str, Any]:
        """Return token ids, cut at `max_length`; a word that is no number is the token of its hash."""
        if isinstance(texts, str):
            return {"input_ids": [self._token(word) for word in texts.split()][:max_length]}
        return {"input_ids": [[self._token(word) for word in text.split()][:max_length] for text in texts]}

    def batch_decode(self, ids: Iterable[Iterable[int]], **_: Any) -> list[str]:
        """Return texts of words."""
        return ["".join(f"w{i}\n" if i % BREAK_SHARE == 0 and i else f"w{i} " for i in row) for row in ids]

    def _token(self, word: str) -> int:
        number = int(word) if word.isdigit() else sum(word.encode())
        return 1 + number % (self.vocabulary - 1)


def causal_model(shape: dict[str, int], device: torch.device, attention: str = "sdpa") -> Any:
    """A Llama of that shape with random bfloat16 weights on the device."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**shape, attn_implementation=attention)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def seeing_model(language: dict[str, int], vision: dict[str, int], device: torch.device) -> tuple[Any, int]:
    """A Llava of these shapes with random bfloat16 weights, and its tokens of an image."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision), text_config=LlamaConfig(**language), image_token_index=1,
        vision_feature_layer=-1,
    )  # fmt: skip
    with torch.device(device):
        model = LlavaForConditionalGeneration(config).to(torch.bfloat16).eval()
    return model, (vision["image_size"] // vision["patch_size"]) ** 2


def review_lengths(count: int, seed: int = 0) -> np.ndarray:
    """Tokens of reviews: lognormal with a median of 50, cut at 128 as the encoder does."""
    return np.clip(np.random.default_rng(seed).lognormal(np.log(50), 0.9, count), 4, 128).astype(int)


def texts_of(lengths: np.ndarray, vocabulary: int) -> list[str]:
    """Texts of random token numbers."""
    draw = np.random.default_rng(1)
    return [" ".join(map(str, draw.integers(1, vocabulary, length))) for length in lengths]


def image_inputs(
    rows: int, image_tokens: int, text_tokens: int, vision: dict[str, int], device: torch.device
) -> dict[str, Tensor]:
    """What `seeing_model` reads of so many rows of an image and a text each."""
    ids = torch.full((rows, image_tokens + text_tokens), 7, device=device)
    ids[:, :image_tokens] = 1
    size = vision["image_size"]
    pixels = torch.randn(rows, 3, size, size, device=device, dtype=torch.bfloat16)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
