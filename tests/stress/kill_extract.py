"""Kill -9 at random moments: whatever was running, the next run finishes, and the table is that of an uninterrupted one.

    python tests/stress/kill_extract.py [--kills 20] [--ray 6] [--seed 0]

A child process extracts 3,000 users' reviews in macro-batches of 1,125 texts with a tiny random BERT, on two threads, or,
until `ray` kills have hit it there, through Ray Data with two actors. It is killed after a random time, and started again
until `kills` kills have hit it. Actors outlive their driver for a moment; what they write meanwhile counts. Every row that
is encoded is written down beforehand, so that what was computed twice can be counted. Exit code 1 where anything differs.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[2]))

from features.domains.domain import Domain
from features.encoders.batches import Encoded
from features.encoders.encoder import load_encoder
from features.encoders.inputs import EncoderInput, input_key
from features.encoders.spec import EncoderSpec, ResolvedEncoder, resolve_encoder
from features.extraction.spec import FeatureSpec
from features.store.shards import VectorStore
from tests.features.conftest import save_encoder
from tests.features.one_table import extract

USERS, EACH, WORKERS = 3000, 6, 2


class Logged:
    """The real encoder, slowed down, writing down what it begins."""

    def __init__(self, resolved: ResolvedEncoder) -> None:
        self.encoder = load_encoder(resolved)
        self.log = os.open(os.environ["KILL_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def encode(self, rows: Sequence[EncoderInput]) -> Encoded:
        os.write(self.log, b"".join(input_key(row).hex().encode() + b"\n" for row in rows))
        time.sleep(0.3)
        return self.encoder.encode(rows)


def make_domain(folder: Path) -> None:
    draw = random.Random(0)
    rows = [(f"u{u:05d}", f"i{i}", " ".join(f"w{draw.randrange(90)}" for _ in range(draw.randint(2, 14))))
            for u in range(USERS) for i in range(EACH)]  # fmt: skip
    columns = dict(zip(("user_id", "item_id", "text"), map(list, zip(*rows, strict=True)), strict=True))
    folder.mkdir(parents=True)
    pq.write_table(pa.table({**columns, "timestamp": pa.nulls(len(rows), pa.int64())}), folder / "interactions.parquet")


def run(root: Path, store: Path, *, by_ray: bool = False) -> Path:
    encoder = EncoderSpec(model=str(root / "model"), max_tokens=32, dtype="float32", store_dtype="float32")
    domain = Domain(name="d", path=root / "d", key="0" * 64, simulated=True, rating_scale=(1, 5), manifest={})
    spec = FeatureSpec(kind="users", encoder=encoder)
    return extract(spec, domain, store, loader=Logged, workers=WORKERS, use_ray=by_ray).path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ray", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        root, store, way = arguments.child
        run(Path(root), Path(store), by_ray=way == "ray")
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:  # an orphaned actor may still write
        sys.exit(stress(Path(name), arguments.kills, arguments.ray, random.Random(arguments.seed)))


def stress(root: Path, kills: int, by_ray: int, draw: random.Random) -> int:
    save_encoder(root / "model", "bert")
    make_domain(root / "d")
    os.environ["KILL_LOG"] = str(root / "whole.log")
    whole = run(root, root / "whole")
    hit, rounds = 0, 0
    while hit < kills:
        rounds += 1
        store, log = root / f"store{rounds}", root / f"{rounds}.log"
        way = "ray" if hit < by_ray else "threads"
        here = finished = 0
        while not finished:
            process = subprocess.Popen(
                [sys.executable, __file__, "--child", str(root), str(store), way],
                env={**os.environ, "KILL_LOG": str(log), "PYTHONPATH": str(Path(__file__).parents[2])},
            )
            if hit < (by_ray if way == "ray" else kills):
                begun = _lines(log)
                while _lines(log) == begun and process.poll() is None:  # until its model is loaded
                    time.sleep(0.02)
                time.sleep(draw.uniform(0, 1.5))
                process.send_signal(signal.SIGKILL)
            finished = process.wait() == 0
            hit, here = hit + (not finished), here + (not finished)
        table = next((store / "features").iterdir())
        same = all(
            (table / file).read_bytes() == (whole / file).read_bytes() for file in ("vectors.npy", "ids.parquet")
        )
        key = resolve_encoder(EncoderSpec(
            model=str(root / "model"), max_tokens=32, dtype="float32", store_dtype="float32")).key  # fmt: skip
        shards = [k for shard in VectorStore.open(store, key).shards() for k in shard["key"].to_pylist()]
        once = len(shards) == len(set(shards)) == len(set((root / "whole.log").read_text().split()))
        again = sum(count - 1 for count in Counter(log.read_text().split()).values())
        most = here * WORKERS * -(-USERS // 16)  # a macro-batch for each worker and kill
        left = [path.name for path in store.rglob(".*.tmp")]
        good = same and once and again <= most
        print(f"round {rounds} ({way}): {here} kills; table equal {same}, every row once {once}", end="; ")
        print(f"{again} rows encoded again, {most} allowed; {len(left)} temporary files left: {good}", flush=True)
        if not good:
            return 1
    print(f"{hit} kills in {rounds} extractions: nothing lost, nothing twice, bits equal")
    return 0


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


if __name__ == "__main__":
    main()
