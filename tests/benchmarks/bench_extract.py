"""Extraction: tokens per second of ours beside the usual ways, in one run, and the memory that two layers save.

    python tests/benchmarks/bench_extract.py [--texts 400]

Same MiniLM, same review-like texts (median 60 and 18 words, tail
to 128 tokens), same pinned threads. Ways:
  padded    batches of 32 in random order, each padded to its longest text
  alone     one text at a time
  ours      TextEncoder: texts of equal length together, at most 2,048 tokens a batch
and through the whole of `extract` with one worker, two threads and two Ray actors. Rates are per second of CPU time
where one thread works (so a busy machine changes little), and per second of wall time for `extract`.
"""

from __future__ import annotations

import argparse
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from features.domain import Domain
from features.encoder import EncoderSpec, TextEncoder, load_encoder, resolve_encoder
from features.errors import InputError
from features.extract import FeatureSpec, extract
from features.prompts import Row


def load() -> tuple[TextEncoder, list[str]]:
    """MiniLM and words that are one token each in its vocabulary."""
    encoder = load_encoder(resolve_encoder(EncoderSpec(model="minilm", dtype="float32")))
    words = sorted(word for word in encoder.tokenizer.get_vocab() if word.isalpha() and len(word) > 3)
    return encoder, words


def review_like(words: list[str], count: int, median: float) -> list[str]:
    draw = random.Random(0)
    lengths = np.random.default_rng(0).lognormal(np.log(median), 0.7, count).clip(4, 126).astype(int)
    return [" ".join(draw.choices(words, k=int(length))) for length in lengths]


def cpu_seconds(work: Callable[[], object]) -> float:
    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return usage.ru_utime + usage.ru_stime

    start = used()
    work()
    return used() - start


def one_thread(encoder: TextEncoder, texts: list[str]) -> None:
    torch.set_num_threads(1)
    tokens = [encoder.tokenizer(text, truncation=True, max_length=128)["input_ids"] for text in texts]
    real = sum(map(len, tokens))
    order = np.random.default_rng(1).permutation(len(texts))
    batches = [[tokens[i] for i in order[start : start + 32]] for start in range(0, len(order), 32)]
    rows = [Row(texts=(text,)) for text in texts]
    ways = {
        "padded": lambda: [encoder._vectors(batch) for batch in batches],
        "alone": lambda: [encoder._vectors([token]) for token in tokens],
        "ours": lambda: encoder.encode(rows),
    }
    padded = {
        "padded": sum(len(batch) * max(map(len, batch)) for batch in batches),
        "alone": real,
        "ours": encoder.encode(rows).padded,
    }
    rates = {way: real / cpu_seconds(work) for way, work in ways.items()}
    print(f"\n{len(texts)} texts, {real} tokens (median {np.median([len(t) for t in tokens]):.0f}), one thread")
    for way, rate in rates.items():
        times, waste = rate / rates["padded"], padded[way] / real
        print(f"  {way:8} {rate:7.0f} tokens/s  {times:5.2f} x padded  padded/real {waste:.3f}")


def matrix_peak() -> float:
    """Multiply-adds of MiniLM's widest layer, in GFLOP/s of one thread."""
    a, b = torch.randn(2048, 384), torch.randn(1536, 384)
    torch.nn.functional.linear(a, b)
    return (
        100 * 2 * 2048 * 384 * 1536 / cpu_seconds(lambda: [torch.nn.functional.linear(a, b) for _ in range(100)]) / 1e9
    )


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
    parser.add_argument("--texts", type=int, default=600)
    texts = parser.parse_args().texts
    try:
        encoder, words = load()
    except InputError as error:
        sys.exit(str(error))
    print(f"matrix peak {matrix_peak():.0f} GFLOP/s a thread")
    one_thread(encoder, review_like(words, texts, 60))
    one_thread(encoder, review_like(words, 3 * texts, 18))
    through_extract(review_like(words, 3 * texts, 18))
    memory()


if __name__ == "__main__":
    main()
