"""Extraction: tokens per second of ours beside the usual ways, in one run, and the memory that two layers save.

    python tests/benchmarks/bench_extract.py [speed] [extract] [memory]

All parts by default. Texts are review-like: a median of 60 tokens, log-normal, clipped at 512 (`--sigma` of the logarithm:
0.8 clips 0.4 % of them, 1.0 1.6 %). One pinned thread, tokenisation included, rates per second of CPU time, so that a busy
machine changes little. Ways:
  of 32     the usual loop: batches of 32 in random order, each padded to its longest text, all hidden states kept
  of 64     the same in batches of 64
  alone     the same loop, one text at a time
  ours      TextEncoder on one macro-batch
Models: MiniLM, and a random Llama so small that the cost of a call is most of a short text's. `extract` goes through the
whole of it, with one thread, two threads and two Ray actors, in seconds of wall time.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from measure import cpu_seconds

from features.domains.domain import Domain
from features.encoders.batches import pool
from features.encoders.encoder import load_encoder
from features.encoders.inputs import EncoderInput
from features.encoders.packing import NAME
from features.encoders.spec import EncoderSpec, resolve_encoder
from features.encoders.text import TextEncoder
from features.encoders.throughput import Operations, matrix_peak
from features.errors import InputError
from features.extraction.spec import FeatureSpec
from tests.features.one_table import extract

CPU = torch.device("cpu")
BATCHES = (32, 64)
PADDED_TEXTS = 384  # that the padded ways read, which take four times as long


def load(dtype: str) -> TextEncoder:
    encoder = load_encoder(resolve_encoder(EncoderSpec(model="minilm", dtype=dtype, max_tokens=512)))
    assert isinstance(encoder, TextEncoder)
    return encoder


def small_llama(like: TextEncoder, dtype: str) -> TextEncoder:
    """Random weights: 4 layers of width 128, with MiniLM's tokenizer."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(like.tokenizer), hidden_size=128, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    return TextEncoder(LlamaModel(config).to(getattr(torch, dtype)), like.tokenizer, like.spec)


def vocabulary(encoder: TextEncoder) -> list[str]:
    """Words that are one token each."""
    return sorted(word for word in encoder.tokenizer.get_vocab() if word.isalpha() and len(word) > 3)


def review_like(words: list[str], count: int, median: float, sigma: float = 0.7, longest: int = 512) -> list[str]:
    """Lengths in tokens, [CLS] and [SEP] included."""
    draw = random.Random(0)
    lengths = np.random.default_rng(0).lognormal(np.log(median), sigma, count).clip(4, longest).round().astype(int)
    return [" ".join(draw.choices(words, k=int(length) - 2)) for length in lengths]


def usual(encoder: TextEncoder, texts: Sequence[str]) -> Any:
    """A batch as the library's examples do it."""
    inputs = encoder.tokenizer(texts, padding=True, truncation=True, max_length=512, return_tensors="pt")
    mask = inputs["attention_mask"]
    with torch.inference_mode():
        states = encoder.model(input_ids=inputs["input_ids"], attention_mask=mask, output_hidden_states=True)
        return pool([states.hidden_states[1], states.hidden_states[-1]], mask).numpy()


def one_thread(name: str, encoder: TextEncoder, texts: list[str]) -> None:
    lengths = np.array([len(ids) for ids in encoder.tokenizer(texts)["input_ids"]])
    order = np.random.default_rng(1).permutation(len(texts))[:PADDED_TEXTS]
    real, few = int(lengths.sum()), int(lengths[order].sum())
    encoder.model.set_attn_implementation("sdpa")  # ours has one that packs
    usual(encoder, texts[:2])
    rates, waste = {}, {"alone": 1.0}
    for size in BATCHES:
        batches, way = [order[start : start + size] for start in range(0, len(order), size)], f"of {size}"
        seconds = cpu_seconds(lambda batches=batches: [usual(encoder, [texts[i] for i in batch]) for batch in batches])
        rates[way] = few / seconds
        waste[way] = sum(len(batch) * int(lengths[batch].max()) for batch in batches) / few
    rates["alone"] = real / cpu_seconds(lambda: [usual(encoder, [text]) for text in texts])
    encoder.model.set_attn_implementation(NAME)
    made, rows, operations = [], [EncoderInput(texts=(text,)) for text in texts], Operations(encoder.model)
    rates["ours"] = real / cpu_seconds(lambda: made.append(encoder.encode(rows)))
    waste["ours"] = made[0].padded / real
    per_token = operations.take() / len(made) / real
    dtype = encoder.model.dtype
    peak = matrix_peak(CPU, dtype)
    print(f"\n{name}, {dtype}: {len(texts)} texts, {real} tokens (median {np.median(lengths):.0f}, mean "
          f"{lengths.mean():.0f}, longest {lengths.max()}); matrix peak {peak / 1e9:.0f} GFLOP/s")  # fmt: skip
    for way, rate in rates.items():
        share = rate * per_token / peak
        times = "  ".join(f"{rate / rates[other]:5.2f} x {other}" for other in rates if other != "ours")
        print(
            f"  {way:6} {rate:7.0f} tokens/s  {times}  padded/real {waste[way]:.2f}  {share:.0%} of the peak",
            flush=True,
        )


def speed(count: int, sigma: float) -> None:
    torch.set_num_threads(1)
    for dtype in ("float32", "bfloat16"):
        encoder = load(dtype)
        texts = review_like(vocabulary(encoder), count, 60, sigma)
        one_thread("MiniLM", encoder, texts)
        one_thread("small Llama", small_llama(encoder, dtype), texts)


def through_extract(texts: list[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        users = [f"u{i // 10:05d}" for i in range(len(texts))]
        table = {
            "user_id": users,
            "item_id": [f"i{i % 10}" for i in range(len(texts))],
            "text": texts,
            "timestamp": pa.nulls(len(texts), pa.int64()),
        }
        pq.write_table(pa.table(table), folder / "interactions.parquet")
        domain = Domain(name="bench", path=folder, key="0" * 64, simulated=True, rating_scale=(1, 5), manifest={})
        spec = FeatureSpec(kind="users", encoder=EncoderSpec(model="minilm", dtype="float32"))
        print("\nthrough extract, model loading and Ray's start included")
        for way, arguments in (
            ("1 thread", {"workers": 1, "use_ray": False}),
            ("2 threads", {"workers": 2, "use_ray": False}),
            ("2 Ray actors", {"workers": 2, "use_ray": True}),
        ):
            start = time.monotonic()
            made = extract(spec, domain, folder / way, **arguments)
            seconds = time.monotonic() - start
            print(f"  {way:13} {made.manifest['tokens'] / seconds:7.0f} tokens/s  ({seconds:.1f} s)", flush=True)


MEMORY = """
import re, sys, torch
from pathlib import Path
from transformers import BertConfig, BertModel
def kib(line): return int(re.search(line + r":\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
torch.set_num_threads(1)
layers = {"no": False, "two": [1, 16], "all": True}[sys.argv[1]]
config = BertConfig(num_hidden_layers=16, hidden_size=512, num_attention_heads=8, intermediate_size=1024)
model = BertModel(config).eval()
ids = torch.full((64, 128), 5)
Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here; ru_maxrss would keep the parent's
idle = kib("VmRSS")
with torch.inference_mode():
    model(ids, attention_mask=torch.ones_like(ids), output_hidden_states=layers)
print((kib("VmHWM") - idle) // 1024)
"""


def memory() -> None:
    print("\nmemory above idle, 16 layers of width 512, 64 texts of 128 tokens (16 MiB a state)")
    for layers in ("no", "two", "all"):
        run = subprocess.run([sys.executable, "-c", MEMORY, layers], capture_output=True, text=True, check=True)
        print(f"  hidden states of {layers:3} layers kept {int(run.stdout):5} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="speed, extract, memory (default: all)")
    parser.add_argument("--texts", type=int, default=1500)
    parser.add_argument("--sigma", type=float, default=0.8)
    arguments = parser.parse_args()
    parts = {
        "speed": lambda: speed(arguments.texts, arguments.sigma),
        "extract": lambda: through_extract(review_like(vocabulary(load("float32")), arguments.texts, 20)),
        "memory": memory,
    }
    try:
        for part in arguments.parts or parts:
            parts[part]()
    except InputError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
