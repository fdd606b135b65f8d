"""The small inputs of `../shared/cases`, each with its command, against what its `expected` says.

Data is read in this process, what needs processes of its own runs as its `cmd` stands. The plans are of an earlier form,
see `copied`. Slow but for what is refused, and what was a traceback once.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ..patience import PATIENCE_S
from .tiny import study

ROOT = Path(__file__).parents[2]
CASES = ROOT.parent / "shared" / "cases"
READ = "a, b +│ 30 "  # what `check` says of the pair: 30 users are in both domains
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="the cases are not here")

DATA = {  # case -> exit code, and what the command says, as patterns
    "am-2014-meta": (0, READ, "meta_a.jsonl.gz holds Python literals in the place of JSON; they are read, and not run"),
    "am-2018": (2, "a.jsonl.gz:1: .* are columns of Amazon 2014 .*: set reader: amazon2014"),
    "am-array": (0, READ),
    "am-desc-string": (0, READ),
    "am-gz-plain": (0, READ, "a.jsonl.gz is named .gz and not compressed; it is read as it is"),
    "am-images-str": (0, READ),
    "am-lfs": (2, "a.jsonl.gz: is a Git LFS pointer, not the data; fetch the file itself"),
    "am-no-parent": (0, READ, "320 rows of a.jsonl.gz have asin and no parent_asin; they are read by asin"),
    "am-ts-str": (0, READ, "2014-0"),
    "am-user-int": (2, "share no user .*, ids are '115', '137', '144' ... in a and 'b000'"),
    "csv-cp1252": (0, READ, "a.csv is not UTF-8; it is read as Windows-1252"),
    "csv-cr-only": (0, READ, "a.csv ends its lines with CR alone; it is read as that"),
    "csv-decimal-comma": (2, "a.csv: row 1: rating is '2,0', with a decimal comma; write 2.0, or separate"),
    "csv-dup-header": (2, "a.csv:1: the header names rating twice; correct the header"),
    "csv-float-ids": (2, "share no user .*; 40 would be shared without .0 at the end"),
    "csv-headerless": (2, "a.csv:1: seems to have no header, .*; name its columns in order: `header:"),
    "csv-headerless-mapped": (2, "a.csv:1: seems to have no header, .*; name its columns in order: `header:"),
    "csv-isodate": (0, READ, "2014-0"),
    "csv-semicolon": (0, READ, "a.csv: its columns are separated by semicolons"),
    "csv-txt-ext": (0, READ),
    "csv-upper-ext": (0, READ),
    "csv-utf16": (0, READ, "a.csv is in UTF-16; it is read as that"),
    "lg-missing-meta": (0, "a .*│ 12 +│"),
    "lg-same-time": (0, "2,400 of 2,400 interactions share user and time with another; a seeded hash"),
    "lg-sec-ms": (0, "timestamps of a and b were in seconds and milliseconds; both are read as milliseconds"),
    "lg-split-cap": (0, "a, b +│"),
    "lg-split-space": (0, "a, b +│"),
    "lg-split-validation": (0, "a, b +│"),
    "name-number": (2, "name is 7; give a value of type str, in quotes"),
    "pq-large-view": (0, READ),
    "pq-leading-zero": (0, "share 10 users; 40 would be shared without leading zeros .such as '0000' beside '0'"),
    "pq-strdate": (0, READ, "2014-0"),
    "rb-bom": (0, READ),
    "rb-norating-implicit": (2, "domains.b.feedback is implicit, and music predicts ratings; take a model of sequences"),
    "rb-notype": (0, READ),
    "rb-quoted": (0, READ, "320 values of user_id in a.inter are in quotes; they are read without them"),
    "yaml-merge": (0, READ),
}  # fmt: skip
RUNS = {  # case -> what its command says, as patterns
    "cpu-affinity": ("allowed: 1  Ray was given: 1.0",),
    "ctrl-c-words": ("study: interrupted; what is finished is kept, the same command goes on from here",),
    "dead-server": ("study: MLflow at http://127.0.0.1:9: does not answer; start the server, or name another store",),
    "home-moved": ("model  models:/small", r"report rc=0\n(find: .*\n)?0\n"),
    "home-percent": ("rc=0",),
    "home-space-words": ("MLflow  study ui .* --home '.*/my runs'\n", "Optuna  optuna-dashboard '.*/my runs/optuna/"),
    "ids-odd": (r"user <:smile:>\nuser <\[/\]>\n(?!rc=)",),
    "journal-hole": ("study: .*small.log:[0-9]+: is damaged .*; put a copy of the file back, or move it away", "rc=2"),
    "lg-same-time": ("lgcd",),
    "locale-ascii": ("rc=0",),
    "own-study-py": ("rc=0",),
    "plan-shrunk": ("2 runs that the plan no longer asks for are left out", "search: 3 planned, nothing left to do"),
    "report-of-deleted-experiment": (
        "30\nstudy: experiment 'small': is deleted in MLflow; restore it there or give the plan another name\nrc=2\n30",
    ),
    "space-relative": ("rc=0\nrc=0",),
    "store-locked-at-start": ("rc=0",),
    "tmpdir-long": ("study: TMPDIR is too long for Ray's sockets, .*; its files go to /tmp/", "rc=0"),
    "ui-port-busy": ("study: port 5199 is taken on 127.0.0.1; name another with --port\nrc=2",),
    "ui-port-range": ("study: .* 80000 is not in the range .*\nrc=2",),
    "user-folder-unwritable": ("study: HOME /proc/none cannot be written; caches go to .*/runs/user", "rc=0"),
    "user-id-slash-markup": ("rc=0",),
}  # fmt: skip
SLOW = {name for name, (code, *_) in DATA.items() if not code} - {"csv-cr-only", "pq-large-view"}
CHECKED = ("lg-", "name-number", "yaml-merge")  # extracting texts takes an encoder's time


def copied(name: str, folder: Path) -> Path:
    """Copy a case; keys of its plans that have another name now get it."""
    case = folder / name
    shutil.copytree(CASES / name, case, copy_function=shutil.copyfile)
    for path in (case, *case.rglob("*")):
        path.chmod(0o755)  # the cases are read-only
    old = {r"^ratios:": "overlap_ratios:" if name.startswith("lg-") else "cold_ratios:"}
    old |= {r"model: embedded, texts: 2,": "model: local, texts: 20,", r"\bembedded: \{": "local: {"}
    for plan in case.rglob("*.yaml"):
        text = plan.read_text()
        for was, now in old.items():
            text = re.sub(was, now, text, flags=re.MULTILINE)
        plan.write_text(text)
    for script in case.glob("*.py"):
        script.write_text(script.read_text().replace("from study.jobs import", "from study.specs import"))
    return case


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in DATA])
def test_data_as_people_have_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copied(name, tmp_path))
    data = ["--data", "data"] if Path("data").is_dir() else []
    verb = "check" if name.startswith(CHECKED) else "extract"
    ran = study(verb, "plan.yaml", *data, "--home", "runs")
    code, *patterns = DATA[name]
    assert ran.code == code, ran.err
    text = " ".join((ran.out + ran.err).split())
    for pattern in patterns:
        assert re.search(str(pattern), text), text
    if code:
        assert all(line.startswith("study: ") for line in ran.err.splitlines()), ran.err


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_what_needs_processes_of_its_own(name: str, tmp_path: Path) -> None:
    case = copied(name, tmp_path)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    ran = subprocess.run(
        ["bash", "-c", (case / "cmd").read_text()], cwd=case, env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=PATIENCE_S,
        check=False,
    )  # fmt: skip
    assert "Traceback" not in ran.stdout, ran.stdout
    for pattern in RUNS[name]:
        assert re.search(pattern, ran.stdout), ran.stdout


def test_every_case_is_tried() -> None:
    assert {path.name for path in CASES.iterdir() if path.is_dir()} == DATA.keys() | RUNS.keys()
