"""A study that trains in a second, and the command line run inside this process."""

from __future__ import annotations

import contextlib
import copy
import gzip
import io
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

from study.cli import main

NAMES = ("books", "movies")
SIMULATE = {
    "seed": 3, "overlap": 60, "images": 0.0,
    "domains": {name: {"users": 70, "items": 80, "ratings": 1000} for name in NAMES},
}  # fmt: skip
PLAN: dict[str, Any] = {
    "name": "tiny",
    "model": "music",
    "space": "v",
    "simulate": SIMULATE,
    "domains": {
        name: {"reader": "amazon2023", "interactions": f"{name}.jsonl.gz", "items": f"meta_{name}.jsonl.gz"}
        for name in NAMES
    },
    "tasks": [["books", "movies"]],
    "cold_ratios": [0.2, 0.5],
    "base": {"epochs": 2, "feature_epochs": 1, "side_epochs": 1},
    "features": {"ratings": {"factors": 4, "sweeps": 3}},
    "search": {"trials": 2, "seeds": [0]},
    "sweeps": {"steps": {"values": [2, 5], "seeds": [0]}},
    "ablate": {"variants": ["wo_side"], "seeds": [0]},
    "score": {"seeds": [0, 1]},
}
SPACE = """
v:
  steps: {CategoricalDistribution: {choices: [2, 5]}}
  lr: {FloatDistribution: {low: 1.0e-4, high: 1.0e-2, log: true}}
"""
WORK = {"search": 4, "sweep:steps": 4, "ablate": 4, "score": 8}  # trials of each part, baselines included


def write_plan(
    folder: Path, *, of: Mapping[str, Any] = PLAN, drop: tuple[str, ...] = (), space_file: str = SPACE, **changes: Any
) -> Path:
    """A plan without the keys of `drop`; `changes` are dotted paths with `__` for the dot, their values replace."""
    plan = copy.deepcopy(dict(of))
    (folder / "space.yaml").write_text(space_file)
    plan["space"] = f"{folder}/space.yaml/v"
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = plan
        for name in parents:
            place = place.setdefault(name, {})
        place[last] = value
    for name in drop:
        del plan[name]
    file = folder / "plan.yaml"
    file.write_text(yaml.safe_dump(plan, sort_keys=False))
    return file


@dataclass(frozen=True)
class Ran:
    """What a command left: exit code, and both outputs."""

    code: int
    out: str
    err: str

    @property
    def faults(self) -> list[str]:
        """Lines on stderr, after checking that each is a plain message of ours and the exit code says so."""
        lines = self.err.splitlines()
        assert self.code == 2, self
        assert lines
        assert all(line.startswith("study: ") for line in lines), self.err
        return [line.removeprefix("study: ") for line in lines]

    @property
    def fault(self) -> str:
        """The only fault."""
        (line,) = self.faults
        return line


def study(*words: object) -> Ran:
    """Run `study WORDS` in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv = mock.patch.object(sys, "argv", ["study", *map(str, words)])
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), argv, mock.patch.dict(os.environ):
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return Ran(code, out.getvalue(), err.getvalue())


def change_reviews(path: Path, change: Callable[[dict[str, Any]], Mapping[str, Any] | str | None]) -> None:
    """Rewrite a reviews file line by line; `change` gives a review, a raw line, or None to drop it."""
    lines = []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            changed = change(json.loads(line))
            if changed is not None:
                lines.append(changed if isinstance(changed, str) else json.dumps(changed))
    path.write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode(), mtime=0))


def made(home: Path) -> dict[str, list[str]]:
    """Finished folders of domains, feature tables and tasks; asserts that nothing else is there."""
    found = {}
    for kind in ("domains", "store/features", "tasks"):
        folders = [path for path in (home / kind).glob("*") if path.is_dir() and path.name != ".hashes"]
        half = [path for path in folders if not (path / "manifest.json").is_file()]
        assert half == [], "half-written folders"
        found[kind] = sorted(path.name.rpartition("-")[0] for path in folders)
    return found
