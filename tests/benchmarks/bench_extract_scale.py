"""Extraction at scale: bfloat16, half precision on disk, Ray's share, a million-row plan, and what 64 workers would reach.

    python tests/benchmarks/bench_extract_scale.py [precision] [ray] [plan] [workers]

All parts by default. One thread a worker; texts are review-like (median 60 words) in MiniLM's own vocabulary.
"""

from __future__ import annotations

import heapq
import random
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from features.domains.domain import Domain
from features.encoders.encoder import load_encoder
from features.encoders.inputs import EncoderInput
from features.encoders.spec import EncoderSpec, resolve_encoder
from features.encoders.throughput import Operations, matrix_peak
from features.extraction.planning import plan_table
from features.extraction.spec import FeatureSpec
from features.extraction.workers import block_result, run_blocks
from features.images.gather import GatheredImages
from tests.features.one_table import extract

CPU = torch.device("cpu")


def review_like(count: int, median: float = 60, seed: int = 0) -> list[str]:
    vocabulary = load_encoder(resolve_encoder(EncoderSpec(model="minilm", dtype="float32"))).tokenizer.get_vocab()
    words = sorted(word for word in vocabulary if word.isalpha() and len(word) > 3)
    lengths = np.random.default_rng(seed).lognormal(np.log(median), 0.7, count).clip(4, 126).astype(int)
    draw = random.Random(seed)
    return [" ".join(draw.choices(words, k=int(length))) for length in lengths]


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def precision() -> None:
    torch.set_num_threads(1)
    rows, made = [EncoderInput(texts=(text,)) for text in review_like(200)], {}
    for name in ("float32", "bfloat16"):
        encoder = load_encoder(resolve_encoder(EncoderSpec(model="minilm", dtype=name)))
        encoder.encode(rows[:4])
        operations = Operations(encoder.model)
        start = time.process_time()
        encoded = encoder.encode(rows)
        seconds, tokens = time.process_time() - start, int(encoded.tokens.sum())
        peak = matrix_peak(CPU, getattr(torch, name))
        share = operations.take() / seconds / peak
        print(f"{name}: {tokens / seconds:,.0f} tokens/s, {share:.0%} of {peak / 1e9:.0f} GFLOP/s measured", flush=True)
        made[name] = encoded.vectors
    found = cosines(made["float32"], made["bfloat16"])
    print(f"bfloat16 against float32: cosine mean {found.mean():.6f}, least {found.min():.6f}")
    half = made["float32"].astype(np.float16).astype(np.float32)
    worst = np.abs(half - made["float32"]).max() / np.abs(made["float32"]).max()
    print(f"float16 on disk: largest error {worst:.1e} of the largest component, least cosine "
          f"{cosines(made['float32'], half).min():.8f}, half the bytes")  # fmt: skip


def domain_of(folder: Path, texts: list[str], each: int) -> Domain:
    folder.mkdir(parents=True, exist_ok=True)
    users = [f"u{i // each:07d}" for i in range(len(texts))]
    columns = {"user_id": users, "item_id": [f"i{i % each}" for i in range(len(texts))], "text": texts}
    pq.write_table(
        pa.table({**columns, "timestamp": pa.nulls(len(texts), pa.int64())}), folder / "interactions.parquet"
    )
    return Domain(name="bench", path=folder, key="0" * 64, simulated=True, rating_scale=(1, 5), manifest={})


def multiply(seconds: float) -> float:
    """Matrix products of a second, by one thread."""
    torch.set_num_threads(1)
    matrix, count, start = torch.randn(512, 512), 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        torch.matmul(matrix, matrix)
        count += 1
    return count / (time.perf_counter() - start)


def by_ray() -> None:
    """Steady state: texts per second of wall time while all workers work, the same texts and cores, start-up apart."""
    import ray

    with get_context("spawn").Pool(2) as pool:
        pool.map(multiply, [0.5, 0.5])
        alone = pool.apply(multiply, (4.0,))
        limit = sum(pool.map(multiply, [4.0, 4.0], chunksize=1)) / alone
    print(
        f"matrix products in two processes: {limit:.2f} times those of one, the limit of two workers here", flush=True
    )
    rates = {}
    with tempfile.TemporaryDirectory() as name:
        domain = domain_of(Path(name) / "d", review_like(4096, 18), 10)
        spec = FeatureSpec(kind="users", encoder=EncoderSpec(model="minilm", dtype="float32"))
        for way, through_ray in (("in process", False), ("Ray Data", True)):
            if through_ray:
                ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
            for workers in (1, 2):
                marks: list[tuple[float, int]] = []

                def mark(
                    done: int, todo: int, tokens: int, seconds: float, marks: list[tuple[float, int]] = marks
                ) -> None:
                    if done:
                        marks.append((time.monotonic(), done))

                start = time.monotonic()
                store = Path(name) / f"{way} {workers}"
                extract(spec, domain, store, workers=workers, use_ray=through_ray, progress=mark)
                # From the moment when each worker has done one macro-batch: two finish theirs at about the same time.
                (first, begun), (last, ended) = marks[workers - 1], marks[-1]
                rates[way, workers] = (ended - begun) / (last - first)
                print(f"{way}, {workers} workers: {rates[way, workers]:.1f} texts/s in {len(marks) - workers} "
                      f"macro-batches after {first - start:.1f} s", flush=True)  # fmt: skip
        ray.shutdown()
    for workers in (1, 2):
        print(
            f"{workers} workers: Ray Data at {rates['Ray Data', workers] / rates['in process', workers]:.0%} of in process"
        )
    for way in ("in process", "Ray Data"):
        times = rates[way, 2] / rates[way, 1]
        print(f"{way}: two workers {times:.2f} times one, {times / limit:.0%} of the limit")


def plan() -> None:
    """A million rows in a process of its own: keys, deduplication, anti-join."""
    with tempfile.TemporaryDirectory() as name:
        words = [f"word{i}" for i in range(1000)]
        draw = random.Random(0)
        texts = [f"{i} {' '.join(draw.choices(words, k=20))}" for i in range(1_000_000)]
        domain_of(Path(name), texts, 1)
        del texts
        done = subprocess.run([sys.executable, __file__, "--plan", name], capture_output=True, text=True, check=True)
        print(done.stdout.strip())


def plan_child(folder: Path) -> None:
    domain = Domain(name="bench", path=folder, key="0" * 64, simulated=True, rating_scale=(1, 5), manifest={})
    spec = FeatureSpec(kind="users", encoder=EncoderSpec(model="minilm"))
    before = peak_memory()
    start, cpu = time.monotonic(), time.process_time()
    known = plan_table(spec, domain, {}, GatheredImages({}, {}))
    half = {key: 1 for key in known.keys[::2] if key is not None}
    del known
    first = time.monotonic() - start
    left = plan_table(spec, domain, half, GatheredImages({}, {}))
    rows = sum(block.num_rows for block in left.blocks)
    again = time.monotonic() - start - first
    print(f"a million rows: {first:.0f} s for the first plan, {again:.0f} s with half of it done "
          f"({rows:,} left), {time.process_time() - cpu:.0f} s of CPU for both, peak {peak_memory():.2f} GiB "
          f"({before:.2f} before)")  # fmt: skip


def peak_memory() -> float:
    """GiB that this program had at most; `ru_maxrss` would count the process that started it."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return float(line.split()[1]) / 2**20


def nothing(block: pa.Table) -> pa.Table:
    return block_result(figures={"texts": block.num_rows})


def costs() -> tuple[float, float, float, float]:
    """Texts per second of one worker, spread of a macro-batch's time, start-up, Ray Data's time for a macro-batch."""
    import ray

    marks: list[float] = []
    spec = FeatureSpec(kind="users", encoder=EncoderSpec(model="minilm", dtype="float32"))
    with tempfile.TemporaryDirectory() as name:
        domain = domain_of(Path(name) / "d", review_like(2560), 10)
        extract(
            spec, domain, Path(name) / "s", workers=1, use_ray=False, progress=lambda *_: marks.append(time.monotonic())
        )
    taken = np.diff(marks)[1:]
    block = pa.table({"text": review_like(4096)})
    seconds = {}
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    for count in (64, 320):
        begun = time.monotonic()
        run_blocks([block] * count, lambda: nothing, count, name="Nothing", workers=2, use_ray=True, progress=None)
        seconds[count] = time.monotonic() - begun
    ray.shutdown()
    dispatch = (seconds[320] - seconds[64]) / 256
    loading, starting = marks[1] - marks[0] - taken.mean(), seconds[64] - 64 * dispatch
    return 256 / taken.mean(), taken.std(ddof=1) / taken.mean(), loading + starting, dispatch


def workers() -> None:
    """List scheduling of macro-batches by costs measured here: a driver that gives out one at a time, then the work."""
    texts_per_second, spread, model, dispatch = costs()
    print(f"one worker: {texts_per_second:.1f} texts/s, a macro-batch's time varies by {spread:.1%}, start {model:.1f} s; "
          f"Ray Data: {dispatch * 1000:.1f} ms a macro-batch of 4,096 texts", flush=True)  # fmt: skip
    draw = np.random.default_rng(0)
    for total in (100_000, 1_000_000, 10_000_000):
        size = int(np.clip(total // 16, 256, 4096))
        mean = size / texts_per_second
        times = draw.normal(mean, spread * mean, -(-total // size))
        one = times.sum() + model
        for count in (2, 64, 1024):
            free, driver = [model] * count, model
            for cost in times:
                driver = max(driver + dispatch, heapq.heappop(free))
                heapq.heappush(free, driver + cost)
            print(f"{total:>10,} texts, {len(times):>4} macro-batches: {count:>4} workers {one / max(free):.1f}x, "
                  f"{one / max(free) / count:.0%} of ideal; driver {dispatch * len(times) / max(free):.0%}")  # fmt: skip


def main() -> None:
    if sys.argv[1:2] == ["--plan"]:
        plan_child(Path(sys.argv[2]))
        return
    parts = {"precision": precision, "ray": by_ray, "plan": plan, "workers": workers}
    for name in sys.argv[1:] or parts:
        parts[name]()


if __name__ == "__main__":
    main()
