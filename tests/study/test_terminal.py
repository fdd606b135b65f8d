"""Terminals and logs: what they cannot show is replaced, libraries do not write to them, and an interruption has words."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from study.cli import console
from study.terminal import only_ours, prepare_streams

from .tiny import study


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", "books -> movies - 0.7+/-0.1 ... ?"),
        ("latin-1", "books -> movies - 0.7\xb10.1 ... ?"),
        ("utf-8", "books → movies — 0.7±0.1 … 語"),
    ],
)
def test_a_terminal_gets_what_it_can_show(monkeypatch: pytest.MonkeyPatch, encoding: str, shown: str) -> None:
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    prepare_streams()
    console.print("books → movies — 0.7±0.1 … 語", highlight=False)
    stream.flush()
    assert written.getvalue().decode(encoding) == f"{shown}\n"


def test_libraries_write_to_the_log_and_not_to_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "logs" / "tiny-ray.log"
    with only_ours(log) as (out, err):
        assert not log.parent.exists()
        print("(raylet) a worker died")
        print("state dump", file=sys.stderr)
        out.write("ours\n")
        err.write("study: ours\n")
    assert log.read_text() == "(raylet) a worker died\nstate dump\n"
    assert tuple(capsys.readouterr()) == ("ours\n", "study: ours\n")


def test_native_libraries_write_to_the_log_while_python_keeps_the_terminal(tmp_path: Path) -> None:
    program = f"""
import os, sys
from pathlib import Path
from study.terminal import prepare_streams, redirect_native_output
prepare_streams()
log, before = Path({str(tmp_path)!r}) / "logs" / "ray.log", os.dup(2)
redirect_native_output(log)
os.dup2(before, 2)  # as pytest does after each test
redirect_native_output(log)
os.write(2, b"core_worker.cc: state dump\\n")
sys.stderr.write("study: ours\\n")
os._exit(2)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (2, "study: ours\n")
    assert (tmp_path / "logs" / "ray.log").read_text() == "core_worker.cc: state dump\n"


def test_an_interruption_says_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("study.plan.load.load_plan", stop)
    ran = study("check", "quickstart")
    assert ran.code == 130
    assert ran.err.strip() == "study: interrupted; what is finished is kept, the same command goes on from here"


def test_what_a_person_should_know_is_a_line_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def warn(name: str) -> None:
        logging.getLogger("study.engine.machine").warning("a [bold] word")
        raise KeyboardInterrupt

    monkeypatch.setattr("study.plan.load.load_plan", warn)
    assert study("check", "quickstart").err.splitlines()[0] == "study: a [bold] word"


def test_a_users_own_modules_are_not_taken_for_ours(tmp_path: Path) -> None:
    for name in ("features", "trainables", "search_spaces"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('mine')\n")
    program = (
        "import study, sys; sys.path.insert(0, ''); study.Study; "
        "import trainables.interface, features.cores, search_spaces; print(features.__file__)"
    )
    root = str(Path(__file__).parents[2])
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env={**os.environ, "PYTHONPATH": root}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout.strip(), ran.stderr) == (0, f"{root}/features/__init__.py", "")
