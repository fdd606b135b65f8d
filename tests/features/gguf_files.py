"""Tiny GGUF files: a random Llama with a byte-level tokenizer, as llama.cpp would write it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LlamaForCausalLM

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem.startswith("model.layers."):
        _, _, layer, inner = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[inner]}.weight"
    return f"{NAMES[stem]}.weight"


def rotated(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """llama.cpp rotates neighbouring numbers of a head, transformers its two halves."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def save_gguf(
    folder: Path,
    file: Path,
    *,
    architecture: str = "llama",
    without: str = "",
    more: dict[str, NDArray[np.float32]] | None = None,
) -> Path:
    """Write the Llama of a folder (`save_generator`) as a GGUF file; matrices of its MLPs in 8 bits, all else in 32.

    The folder's own weights become those of the file, so that both are the same model. without: a tensor that is left out.
    more: tensors that have no place in the model.
    """
    import gguf

    model = LlamaForCausalLM.from_pretrained(folder)
    config, kind = model.config, gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(str(file), architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    for name, tensor in model.state_dict().items():
        weight = tensor.numpy()
        if "mlp" in name:
            packed = gguf.quants.quantize(weight, kind)
            tensor.copy_(torch.from_numpy(gguf.quants.dequantize(packed, kind)))
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            weight = rotated(weight, heads) if part in name else weight
        if gguf_name(name) == without:
            continue
        if "mlp" in name:
            writer.add_tensor(gguf_name(name), packed, raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), weight)
    for name, weight in (more or {}).items():
        writer.add_tensor(name, weight)
    add_tokenizer(writer, folder)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.save_pretrained(folder)
    return file


def add_tokenizer(writer: Any, folder: Path) -> None:
    document = json.loads((folder / "tokenizer.json").read_text())
    special = {token["content"]: token["id"] for token in document["added_tokens"]}
    vocabulary = document["model"]["vocab"] | special
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in document["model"]["merges"]])
    writer.add_pad_token_id(special["<pad>"])
    writer.add_eos_token_id(special["<end>"])
    writer.add_chat_template((folder / "chat_template.jinja").read_text())
