"""One MuSiC trial at the size of MuSiC's Task 1: wall time and peak memory.

    python tests/benchmarks/bench_trial.py                # one thread, about 1.6 GB of disk for a while
    python tests/benchmarks/bench_trial.py --profile      # also says where the time went

Movie -> Music (MuSiC Table 1): 18,045 and 10,292 users, 2,165 of them in both, 159,997 target items, 513,247 target
ratings; raw vectors of width 4,096 in float16. The arrays are simulated and written in the layout of a task folder;
tables are memory-mapped as in any trial. The trial runs in a process of its own, so its peak memory is that process's.
It has one thread, as a trial has, and 100 epochs without early stopping, the most that the search space asks for. CPU
seconds are what it takes on a core of its own, whatever else this machine does.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

RATIO, VALIDATION = 0.2, 0.2


@dataclass(frozen=True, kw_only=True)
class Size:
    """Counts of a pair of domains, and the width of its raw vectors."""

    source_users: int
    target_users: int
    overlap: int
    items: int
    ratings: int
    source_items: int
    source_ratings: int
    width: int


TASK_1 = Size(
    source_users=18_045, target_users=10_292, overlap=2_165, items=159_997, ratings=513_247, source_items=156_884,
    source_ratings=881_003, width=4_096,
)  # fmt: skip
CONFIG: dict[str, Any] = {"steps": 10, "epochs": 100, "patience": 100}


def write_vectors(path: Path, rows: int, width: int, draw: np.random.Generator) -> None:
    """A float16 table [rows, width] of rank 64, written in pieces."""
    table = np.lib.format.open_memmap(path, "w+", np.float16, (rows, width))
    basis = draw.standard_normal((64, width)).astype(np.float32) / 8
    for start in range(0, rows, 4_096):
        part = table[start : start + 4_096]
        part[:] = draw.standard_normal((len(part), 64)).astype(np.float32) @ basis
    table.flush()


def point(folder: Path, name: str, vectors: Path, rows: np.ndarray, width: int) -> None:
    """Say which rows of a table belong to whom."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / f"{name}_rows.npy", rows.astype(np.int64))
    np.save(folder / f"{name}_centre.npy", np.zeros(width, np.float32))
    (folder / f"{name}.json").write_text(json.dumps({"vectors": str(vectors), "scale": 1.0, "missing": 0}))


def write_ratings(
    folder: Path, counts: np.ndarray, items: int, draw: np.random.Generator, prefix: str = ""
) -> None:  # fmt: skip
    """Long-tailed items, uniform ratings."""
    user = np.repeat(np.arange(len(counts)), counts)
    popularity = (np.arange(items) + 50.0) ** -0.8
    item = draw.permutation(items)[draw.choice(items, len(user), p=popularity / popularity.sum())]
    for name, array in (("user", user), ("item", item), ("rating", draw.integers(1, 6, len(user)).astype(np.float32))):
        np.save(folder / f"{prefix}{name}.npy", array)


def write_task(folder: Path, size: Size = TASK_1) -> Path:
    """A task of that size as `trainables.tasks.rating` lays it out; returns the search side."""
    draw = np.random.default_rng(0)
    test = round(size.overlap * RATIO)
    validation = round((size.overlap - test) * VALIDATION)
    train = size.overlap - test - validation
    known = size.target_users - test - validation
    tables = {name: folder / f"{name}.npy" for name in ("source", "target", "items")}
    for name, rows in (("source", size.source_users), ("target", known), ("items", size.items)):
        write_vectors(tables[name], rows, size.width, draw)
    search, held_out = folder / "search", folder / "search" / "validation"
    users = draw.permutation(size.source_users)
    point(search, "source", tables["source"], users[:train], size.width)
    point(held_out, "source", tables["source"], users[train : train + validation], size.width)
    point(search, "target", tables["target"], np.arange(known), size.width)
    point(search, "items", tables["items"], np.arange(size.items), size.width)
    least = min(20, size.ratings // size.target_users)
    counts = least + draw.multinomial(
        size.ratings - least * size.target_users, draw.dirichlet(np.full(size.target_users, 0.5))
    )
    write_ratings(search, counts[:known], size.items, draw)
    write_ratings(held_out, counts[known : known + validation], size.items, draw)
    np.save(held_out / "cold_item.npy", np.zeros(counts[known : known + validation].sum(), bool))
    np.save(search / "source_offset.npy", np.zeros(train, np.float32))
    np.save(held_out / "source_offset.npy", np.zeros(validation, np.float32))
    np.save(held_out / "source_row.npy", np.arange(train, train + validation))
    write_ratings(
        search, np.full(size.source_users, size.source_ratings // size.source_users), size.source_items, draw, "source_"
    )
    np.save(search / "item_offset.npy", np.zeros(size.items, np.float32))
    meta: dict[str, Any] = {
        "mean": 3.0, "slope": 0.5, "rating_scale": [1.0, 5.0], "source_scale": [1.0, 5.0], "clip": True,
        "source_items": size.source_items, "source_times": False,
    }  # fmt: skip
    (search / "task.json").write_text(json.dumps(meta))
    return search


def trial(task_dir: str, threads: int) -> dict[str, float]:
    """The trial in this process."""
    import torch

    from trainables.trial import run

    torch.set_num_threads(threads)
    began, epochs = time.perf_counter(), 0
    for report in run("music", CONFIG, task_dir, [0]):
        epochs = report.epoch
        if epochs == 1:
            print(f"first epoch after {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    with open("/proc/self/status") as status:
        sizes = {line.split(":")[0]: int(line.split()[1]) for line in status if line.startswith(("VmHWM", "RssAnon"))}
    return {
        "epochs": epochs,
        "wall": time.perf_counter() - began,
        "cpu": time.process_time(),
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "own_gib": sizes["RssAnon"] / 2**20,
    }


def main() -> None:
    """Write the task, run the trial in a fresh process, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--task-dir", help="run the trial on this folder, in this process")
    arguments = parser.parse_args()
    if arguments.task_dir:
        profile = cProfile.Profile()
        if arguments.profile:
            profile.enable()
        print(json.dumps(trial(arguments.task_dir, arguments.threads)))
        if arguments.profile:
            profile.disable()
            pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(18)
        return
    with tempfile.TemporaryDirectory() as folder:
        task_dir = write_task(Path(folder))
        command = [sys.executable, __file__, "--task-dir", str(task_dir), "--threads", str(arguments.threads)]
        command += ["--profile"] * arguments.profile
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result = json.loads(done.stdout)
    print("| threads | epochs | wall s (<= 600) | CPU s | peak GiB (<= 6) | of it not shared GiB |")
    print("|---:|---:|---:|---:|---:|---:|")
    print(
        f"| {arguments.threads} | {result['epochs']} | {result['wall']:.0f} | {result['cpu']:.0f} | "
        f"{result['peak_gib']:.2f} | {result['own_gib']:.2f} |"
    )


if __name__ == "__main__":
    main()
