"""A study of sequences that trains in seconds: plan, space and raw files, laid out as Food-Kitchen is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from ..features.conftest import save_encoder
from ..trainables.sequence_worlds import make_sequence_world
from .tiny import write_plan

NAMES = ("film", "song")
PLAN: dict[str, Any] = {
    "name": "tiny",
    "model": "lgcd",
    "space": "v",
    "domains": {
        name: {
            "reader": "table", "interactions": "interactions.parquet", "items": "items.parquet",
            "columns": {"timestamp": "position"}, "where": {"domain": name}, "feedback": "implicit",
        }
        for name in NAMES
    },
    "tasks": [["film", "song"], ["song", "film"]],
    "overlap_ratios": [1.0],
    "sequences": {"users": "users.parquet", "negatives": 19},
    "base": {"epochs": 1, "encoder_epochs": 1, "steps": 5, "negatives": 16},
    "search": {"trials": 2, "seeds": [0]},
    "sweeps": {"overlap_ratio": {"values": [0.5, 1.0], "seeds": [0, 1]}, "steps": {"values": [2, 5], "seeds": [0]}},
    "ablate": {"variants": ["wo_moe"], "seeds": [0]},
    "score": {"seeds": [0, 1]},
}  # fmt: skip
SPACE = """
v:
  dropout: {FloatDistribution: {low: 0.0, high: 0.3}}
  start_ratio: {CategoricalDistribution: {choices: [0.2, 0.6]}}
"""
PSEUDO = {"texts": 4, "max_new_tokens": 40, "local": {"width": 32, "layers": 1, "epochs": 2, "vocabulary": 512}}
WORK = {"search": 4, "sweep:overlap_ratio": 8, "sweep:steps": 4, "ablate": 4, "score": 8}  # trials, baselines included


def write_raw(folder: Path) -> Path:
    """80 users, 60 of them in both domains, 48 items a domain; every fourth user validates or tests."""
    world = make_sequence_world(users=80, overlap=60)
    folder.mkdir(parents=True)
    world.interactions.to_parquet(folder / "interactions.parquet")
    ids = [(f"{name[0]}{number:03d}", name, number) for name in NAMES for number in range(48)]
    titles = [(item, name, f"w{number % 4} w{10 + number}") for item, name, number in ids]
    pd.DataFrame(titles, columns=["item_id", "domain", "title"]).to_parquet(folder / "items.parquet")
    users = sorted(set(world.interactions["user_id"]))
    held = {0: "valid", 1: "test"}
    split = [held.get(number % 8, "train") if number < 60 else "train" for number in range(len(users))]
    pd.DataFrame({"user_id": users, "split": split}).to_parquet(folder / "users.parquet")
    return folder


def write_sequences(folder: Path, **changes: Any) -> Path:
    """The plan, with an encoder of its own unless `changes` name another."""
    encoder = {"model": str(save_encoder(folder / "bert", "bert")), "max_tokens": 8}
    features = {"text": {"encoder": encoder}, "pseudo": PSEUDO}
    changes = {"features": features, "space_file": SPACE, **changes}
    return write_plan(folder, of=PLAN, **changes)
