"""Calls beside each other, and processes that end with the one that started them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from study.engine.pool import run_calls
from study.specs import Resources

SLEEPING = """
import time
from study.specs import Resources
from study.engine.pool import run_calls
if __name__ == "__main__":
    list(run_calls(time.sleep, [(0.0,), (600.0,)], Resources(), on_ray=False))
"""


def test_processes_end_with_a_killed_driver(tmp_path: Path) -> None:
    (tmp_path / "driver.py").write_text(SLEEPING)
    root = str(Path(__file__).parents[3])
    driver = subprocess.Popen([sys.executable, tmp_path / "driver.py"], env={**os.environ, "PYTHONPATH": root})
    children = Path(f"/proc/{driver.pid}/task/{driver.pid}/children")

    def workers() -> list[Path]:
        pids = [Path("/proc") / pid for pid in children.read_text().split()]
        return [pid for pid in pids if b"spawn_main" in (pid / "cmdline").read_bytes()]

    try:
        assert comes_true(lambda: bool(workers()))
        found = workers()
        # An initializer that has begun its thread: torch is imported, and a second thread is there.
        assert comes_true(lambda: all(len(list((pid / "task").iterdir())) > 1 for pid in found))
    finally:
        driver.kill()
        driver.wait()
    assert comes_true(lambda: not any(pid.exists() for pid in found))


def test_calls_that_are_left_are_not_made_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be hours of pretraining; the one that is running, and the one behind it, end."""
    monkeypatch.setattr("study.engine.pool.usable_cores", lambda: 1)
    commands = ["false", *(f"sleep 1; touch {tmp_path}/{number}" for number in range(6))]
    with pytest.raises(subprocess.CalledProcessError, match="returned non-zero exit status 1"):
        list(
            run_calls(
                subprocess.check_call, [(["sh", "-c", command],) for command in commands], Resources(), on_ray=False
            )
        )
    assert not (tmp_path / "5").exists()


def comes_true(condition: Callable[[], bool], seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not (true := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    return true
