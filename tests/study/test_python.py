"""`from study import Study`: the same code as the commands, with data frames and pictures."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import study as package
from features.errors import InputError
from study import Study
from study.plan.load import load_plan

from .conftest import Finished
from .tiny import PLAN, WORK, study, write_plan


def test_a_plan_is_a_name_a_file_or_a_dictionary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_plan(tmp_path)
    by_file = Study(file, home=tmp_path / "home")
    assert by_file.plan == load_plan(str(file)) == Study(yaml.safe_load(file.read_text())).plan
    assert (by_file.named, by_file.home.path) == (str(file), tmp_path / "home")
    monkeypatch.chdir(tmp_path)
    shipped = Study("quickstart")
    assert (shipped.named, shipped.plan.model, shipped.home.path) == ("quickstart", "music", tmp_path / "runs")
    with pytest.raises(
        InputError, match=r"^plan: cold_ratios: split.cold_ratio is 1.5; give a number above 0, below 1$"
    ):
        Study({**yaml.safe_load(file.read_text()), "cold_ratios": [1.5]})
    assert not (tmp_path / "home").exists()


def test_what_a_command_has_run_is_read_in_python(finished: Finished) -> None:
    lines: list[str] = []
    ours = Study(finished.plan, home=finished.home, say=lines.append)
    assert [(summary.part, summary.ran) for summary in ours.run()] == [(part, 0) for part in WORK]
    assert lines == []
    assert ours.trials().groupby("part").size().to_dict() == WORK
    scores = ours.trials("score", "music")
    assert scores["metrics.test_rmse"].notna().tolist() == [True, True]
    best = ours.best_trials().set_index(["row", "cell"])
    printed = study("best", finished.plan, "--home", finished.home).out
    pairs = re.findall(r"(\S+):  # best of 2 by val_rmse: ([\d.]+), run ([0-9a-f]{32})", printed)
    assert len(pairs) == 2
    for cell, value, run_id in pairs:
        trial = best.loc[("music", cell)]
        assert (f"{trial['val_rmse']:.4f}"[:6], trial["run_id"]) == (f"{float(value):.4f}"[:6], run_id)
        assert trial["epochs"] == PLAN["base"]["epochs"]


def test_a_sweep_that_the_plan_does_not_have_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^plan tiny: has no sweep of 'lr'; it has steps$"):
        Study(write_plan(tmp_path), home=tmp_path / "home").sweep("lr")


def test_a_figure_is_shown_in_a_notebook(finished: Finished) -> None:
    ours = Study(finished.plan, home=finished.home)
    assert "figure_3_steps" in ours.figures()
    picture = ours.figure("figure_3_steps")
    assert picture.path.is_relative_to(finished.home / "reports" / "tiny")
    assert picture._repr_png_()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_package_offers_study_and_no_more() -> None:
    assert package.__all__ == ["Study"]
    with pytest.raises(AttributeError, match="module 'study' has no attribute 'Sudy'"):
        package.Sudy  # noqa: B018


def test_a_shipped_plan_is_copied_to_be_edited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = study("plans", "--copy", "quickstart")
    assert (ran.code, ran.out) == (0, f"{tmp_path}/quickstart.yaml\n")
    assert load_plan("./quickstart.yaml") == load_plan("quickstart")
    assert study("plans", "--copy", "quickstart").fault == (
        f"{tmp_path}/quickstart.yaml: is there already; rename it, or copy to another folder"
    )
    assert re.match("plan 'quick': is not shipped; choose from books-movies, ", study("plans", "--copy", "quick").fault)


def test_a_shell_completes_the_command() -> None:
    environment = {**os.environ, "_STUDY_COMPLETE": "bash_complete", "COMP_WORDS": "study pla", "COMP_CWORD": "1"}
    ran = subprocess.run([sys.executable, "-m", "study"], env=environment, capture_output=True, text=True, check=False)
    assert ran.stdout == "plain,plans\n"
