"""Tiny random vision-language models on disk, in the layout of `save_pretrained`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    MiniCPMV4_6Config,
    MiniCPMV4_6ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

LANGUAGE = {
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
}


def save_tokenizer(folder: Path, named: dict[str, str], image: str) -> PreTrainedTokenizerFast:
    """A word-level tokenizer with a chat template that writes `image` for an image."""
    words = ["<pad>", "<unk>", *(f"w{i}" for i in range(90))]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={"start_token": "<start>", "end_token": "<end>", **named},
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<start> {% for c in m['content'] %}{% if c['type'] == 'image' %}"
        + image
        + " {% else %}{{ c['text'] }} {% endif %}{% endfor %}<end>{% endfor %}"
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_qwen3_vl(folder: Path, width: int = 48) -> None:
    """`width`: of the vectors."""
    named = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>",
    }
    tokenizer = save_tokenizer(folder, named, "<|vision_start|><|image_pad|><|vision_end|>")
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in named.items()}
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10_000.0}
    config = Qwen3VLConfig(
        text_config={
            **LANGUAGE,
            "hidden_size": width,
            "vocab_size": len(tokenizer),
            "head_dim": 8,
            "rope_parameters": rope,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 64,
            "out_hidden_size": width,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        **ids,
    )
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    size = {"shortest_edge": 64, "longest_edge": 1024}
    Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, size=size).save_pretrained(folder)


def save_internvl(folder: Path) -> None:
    named = {
        "context_image_token": "<IMG_CONTEXT>",
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "video_token": "<video>",
    }
    tokenizer = save_tokenizer(folder, named, "<IMG_CONTEXT>")
    config = InternVLConfig(
        text_config={**LANGUAGE, "model_type": "qwen2", "vocab_size": len(tokenizer)},
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "image_size": [16, 16],
            "patch_size": [4, 4],
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    InternVLForConditionalGeneration(config).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    GotOcr2ImageProcessorPil(size=size, crop_to_patches=True, min_patches=1, max_patches=4).save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps({"image_seq_length": 4}))


def save_minicpm(folder: Path) -> None:
    named = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "image_start_token": "<image>",
        "image_end_token": "</image>",
        "slice_start_token": "<slice>",
        "slice_end_token": "</slice>",
        "image_id_start_token": "<image_id>",
        "image_id_end_token": "</image_id>",
    }
    tokenizer = save_tokenizer(folder, named, "<|image_pad|>")
    hybrid = {
        "model_type": "qwen3_5_text",
        "head_dim": 8,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    }
    config = MiniCPMV4_6Config(
        text_config={**LANGUAGE, **hybrid, "vocab_size": len(tokenizer)},
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "image_size": 64,
            "patch_size": 4,
        },
        insert_layer_id=1,
        image_size=64,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
    )
    MiniCPMV4_6ForConditionalGeneration(config).save_pretrained(folder)
    MiniCPMV4_6ImageProcessorPil(patch_size=4, scale_resolution=64, max_slice_nums=1, slice_mode=False).save_pretrained(
        folder
    )


SEEING: dict[str, Callable[[Path], None]] = {
    "qwen3_vl": save_qwen3_vl,
    "internvl": save_internvl,
    "minicpmv4_6": save_minicpm,
}


def save_seeing(folder: Path, kind: str = "qwen3_vl") -> Path:
    """4 blocks, width 48."""
    torch.manual_seed(0)
    SEEING[kind](folder)
    return folder


def picture(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    """A picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
