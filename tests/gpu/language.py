"""Language models of a shape with random weights, and a tokenizer without a vocabulary file: texts are token numbers."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from features.encoders.spec import EncoderSpec
from features.encoders.vision import ImageTextEncoder
from features.encoders.weights import load_processor_of
from features.images.gather import image_path

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
QWEN_3_VL_8B = {
    "text_config": {
        "vocab_size": 151_936, "hidden_size": 4_096, "intermediate_size": 12_288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 262_144,
        "rope_parameters": {"rope_type": "default", "mrope_section": [24, 20, 20], "rope_theta": 5_000_000.0},
    },
    "vision_config": {
        "depth": 27, "hidden_size": 1_152, "num_heads": 16, "intermediate_size": 4_304, "out_hidden_size": 4_096,
        "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 2_304,
        "deepstack_visual_indexes": [8, 16, 24],
    },
}  # fmt: skip
QWEN_3_VL_TINY = {
    "text_config": {
        "vocab_size": 512, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10_000.0},
    },
    "vision_config": {
        "depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 48, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    },
}  # fmt: skip
_IMAGE_WORDS = {
    "image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
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


def seeing_encoder(shape: dict[str, Any], device: torch.device, folder: Path, spec: EncoderSpec) -> ImageTextEncoder:
    """The product's encoder of images and texts: a Qwen3-VL of that shape with random bfloat16 weights, its own processor.

    Images lie in `folder`/images, see `save_images`.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration

    inner = Tokenizer(WordLevel({"<pad>": 0, "<unk>": 1, **{str(i): i for i in range(2, 400)}}, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>", extra_special_tokens=_IMAGE_WORDS
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}"
        "<|vision_start|><|image_pad|><|vision_end|> {% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
    )
    tokenizer.save_pretrained(folder)
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(word) for name, word in _IMAGE_WORDS.items()}
    config = Qwen3VLConfig(**shape, **ids)
    config.save_pretrained(folder)
    vision = shape["vision_config"]
    preparation = {
        "image_processor_type": "Qwen2VLImageProcessor", "patch_size": vision["patch_size"], "merge_size": 2,
        "temporal_patch_size": 2, "size": {"shortest_edge": 64, "longest_edge": 10**7},
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(preparation))
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = Qwen3VLForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(default)
    return ImageTextEncoder(model, load_processor_of("encoder random", folder), spec, folder / "images")


def save_images(folder: Path, count: int, side: int) -> list[str]:
    """Pictures of noise, side x side, as the store keeps images; their names."""
    from PIL import Image

    draw, names = np.random.default_rng(2), []
    for _ in range(count):
        data = io.BytesIO()
        Image.fromarray(draw.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(data, "JPEG", quality=90)
        name = hashlib.sha256(data.getvalue()).hexdigest()
        path = image_path(folder / "images", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.getvalue())
        names.append(name)
    return names


def review_lengths(count: int, seed: int = 0) -> np.ndarray:
    """Tokens of reviews: lognormal with a median of 50, cut at 128 as the encoder does."""
    return np.clip(np.random.default_rng(seed).lognormal(np.log(50), 0.9, count), 4, 128).astype(int)


def texts_of(lengths: np.ndarray, vocabulary: int) -> list[str]:
    """Texts of random token numbers."""
    draw = np.random.default_rng(1)
    return [" ".join(map(str, draw.integers(1, vocabulary, length))) for length in lengths]
