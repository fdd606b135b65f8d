"""The GPU check at its tiny size on a CPU, where the packages that a lent machine lacks cannot be imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BARE = """
import importlib.machinery, runpy, sys
ABSENT = {"ray", "optuna", "mlflow", "study", "search_spaces", "duckdb", "sentence_transformers", "accelerate", "gguf"}
class WithoutThem(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, *rest):
        return None if name.split(".")[0] in ABSENT else super().find_spec(name, *rest)
python = (importlib.machinery.BuiltinImporter, importlib.machinery.FrozenImporter)
sys.meta_path = [*python, WithoutThem]  # without the finders of editable installs
sys.argv = ["check", *sys.argv[1:]]
runpy.run_module("tests.gpu.check", run_name="__main__")
"""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of a run on this machine."""
    folder = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, "-c", BARE, "--out", str(folder), "--size", "tiny"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def read(out: Path, name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((out / f"{name}.json").read_text())
    assert "error" not in document
    assert "failed_parts" not in document
    assert len(document.get("profile", range(10))) == 10
    return document


def test_trials_are_held_against_the_cpu(out: Path) -> None:
    found = read(out, "trials")
    for model in ("music", "lgcd", "emcdr", "sasrec"):
        assert found[model]["difference"] == 0  # the device is the CPU here
        assert found[model]["within_tolerance"]
    assert found["music_task_1"]["epochs"] == 2
    assert not found["music_task_1"]["table_held_on_the_device"]
    assert len(found["music_task_1"]["profile"]) == 10


def test_many_trials_are_counted_in_every_way_that_a_cpu_has(out: Path) -> None:
    found = read(out, "many")
    assert all(rate > 0 for rate in found["trials_per_hour"].values())
    assert list(found["trials_per_hour"])[-1] == "2 processes, cpu"
    for ways in found["steps_per_second"].values():
        assert min(ways["loop"], ways["streams"], ways["batched"]) > 0
        assert ways["batched_graph"] == ways["streams_graph"] == "NotImplementedError: CUDA graphs need a GPU"


def test_extraction_and_generation_lose_nothing(out: Path) -> None:
    found = read(out, "extraction")
    runs = {way: run for way, run in found["runs"].items() if isinstance(run, dict)}
    assert list(runs) == ["sdpa, 256 tokens", "varlen, 256 tokens"]
    assert [run["failed"] for run in [*runs.values(), *found["seeing"]["runs"].values()]] == [0, 0, 0]
    assert set(found["hours"]) == {"movie-music", "book-movie", "book-music"}
    assert all(hours["reviews"] > 0 and hours["items"] > 0 for hours in found["hours"].values())
    found = read(out, "generation")
    assert found["batches"]["2"]["tokens_per_second"] > 0
    assert 0 < found["refilled"]["2"]["full_rows"] <= 1


def test_faults_cost_a_budget_and_no_row(out: Path) -> None:
    found = read(out, "faults")
    assert found["budget_after"] <= 1_024 < found["budget_before"]
    assert found["rows_lost"] == 0
    assert found["largest_difference"] < 0.05  # bfloat16, in other batches
    device = found["failing_device"]
    assert device["failing_worker"]["exit_code"] == 1
    assert 0 < device["failing_worker"]["rows_stored"] < device["rows"] == device["next_worker"]["rows_stored"]
    assert device["next_worker"]["exit_code"] == 0


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--sections", "trial"], "unknown section trial; choose from trials, many, extraction, generation, faults"),
        ([], "there is no GPU; give --size tiny to try the code on a CPU"),
    ],
)
def test_what_cannot_be_run_is_said(tmp_path: Path, arguments: list[str], line: str) -> None:
    command = [sys.executable, "-m", "tests.gpu.check", "--out", str(tmp_path / "out"), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert line in done.stderr
