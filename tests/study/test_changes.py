"""A plan that changed since it last ran: which fields, and what stays of use."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from features.errors import InputError
from study.plan.diff import changes, refuse_other_plan, remember
from study.plan.load import load_plan
from study.provenance import commit

from . import tiny


def test_an_unchanged_or_new_plan_says_nothing(tmp_path: Path) -> None:
    plan = load_plan(str(tiny.write_plan(tmp_path)))
    assert changes(plan, tmp_path / "home") == []
    remember(plan, tmp_path / "home", "plan.yaml")
    assert changes(plan, tmp_path / "home") == []
    (tmp_path / "home" / "plans" / "tiny.json").write_text("{half")
    assert changes(plan, tmp_path / "home") == []


def test_each_changed_field_is_named_with_what_it_costs(tmp_path: Path) -> None:
    remember(load_plan(str(tiny.write_plan(tmp_path))), tmp_path, "plan.yaml")
    changed = tiny.write_plan(
        tmp_path, search__trials=3, base__epochs=3, resources={"cpus": 2}, sweeps__steps__values=[2, 5, 10],
        simulate__seed=4, score__seeds=[0, 1, 2, 3], preset="paper", note="n", most_shared=0.1, drop=("ablate",),
    )  # fmt: skip
    lines = {line.partition(":")[0]: line for line in changes(load_plan(str(changed)), tmp_path)}
    assert set(lines) == {
        "search.trials", "base.epochs", "resources.cpus", "sweeps.steps.values", "simulate.seed", "ablate", "score.seeds",
        "preset", "note", "most_shared",
    }  # fmt: skip
    assert lines["search.trials"] == "search.trials: 2 -> 3; trials that are finished stay, the search goes on"
    assert lines["score.seeds"].endswith(
        "[0, 1, 2, 3]; these trials are trained with the new seeds; each that is finished counts until its successor is"
    )
    assert lines["resources.cpus"] == "resources.cpus: 1 -> 2; no trial is trained again"
    assert {lines[name].partition("; ")[2] for name in ("note", "most_shared")} == {"no trial is trained again"}
    assert lines["base.epochs"].endswith("2 -> 3; trials whose configuration it changes are trained again")
    assert lines["preset"].endswith('"ours" -> "paper"; trials whose configuration it changes are trained again')
    assert lines["simulate.seed"].endswith(
        "3 -> 4; data or vectors that it changes are made again, and their trials trained again"
    )
    assert lines["ablate"].startswith("ablate: dropped; of this part, ")


def test_what_is_new_or_dropped_is_named_as_a_whole(tmp_path: Path) -> None:
    """Thirteen rows that were added to a table were 57 lines, one for each of their fields."""
    means = "rows that stay as they are keep their trials; those of a dropped row are left out, and kept"
    rows = {name: {"space": f"{name}/paper"} for name in ("emcdr", "ptupcdr")}
    alone, one, all_rows = (
        load_plan(str(tiny.write_plan(tmp_path, compare=compare))) for compare in ({}, {"emcdr": rows["emcdr"]}, rows)
    )
    for before, after, said in (
        (alone, all_rows, "compare.emcdr, compare.ptupcdr: new"), (one, all_rows, "compare.ptupcdr: new"),
        (all_rows, alone, "compare.emcdr, compare.ptupcdr: dropped"), (all_rows, one, "compare.ptupcdr: dropped"),
    ):  # fmt: skip
        remember(before, tmp_path, "plan.yaml")
        assert changes(after, tmp_path) == [f"{said}; {means}"]
    swept = replace(alone, sweeps={})
    remember(swept, tmp_path, "plan.yaml")
    (line,) = changes(alone, tmp_path)
    assert line.startswith("sweeps.steps: new; of this part, ")
    remember(replace(alone, search=None), tmp_path, "plan.yaml")
    (line,) = changes(alone, tmp_path)
    assert line.startswith("search: new; where it changes what is drawn, ")


def test_other_code_and_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = load_plan(str(tiny.write_plan(tmp_path)))
    monkeypatch.setattr("study.plan.diff.commit", lambda: "abc1234")
    monkeypatch.setattr("study.plan.diff.versions", lambda: "torch=2.13.0 ray=2.60.0")
    remember(plan, tmp_path, "plan.yaml")
    monkeypatch.setattr("study.plan.diff.commit", lambda: "def5678+0123456789ab")
    monkeypatch.setattr("study.plan.diff.versions", lambda: "torch=2.14.0 ray=2.60.0")
    means = (
        "results stay, except of models whose VERSION was raised; a trial that was in progress begins anew: checkpoints of "
        "other code are not used"
    )
    assert changes(plan, tmp_path) == [
        f'commit: "abc1234" -> "def5678+0123456789ab"; {means}', f'versions.torch: "2.13.0" -> "2.14.0"; {means}',
    ]  # fmt: skip


def test_code_without_a_history_is_known_by_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "a.py").write_text("x = 1\n")
    monkeypatch.setattr("study.provenance.ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    before = commit()
    assert re.fullmatch(r"files:[0-9a-f]{40}", before)
    (tmp_path / "study" / "a.py").write_text("x = 2\n")
    assert commit() != before


def test_changed_code_has_a_name_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "trainables" / "models" / "a.py"
    model.parent.mkdir(parents=True)
    model.write_text("x = 1\n")
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    monkeypatch.setattr("study.provenance.ROOT", tmp_path)
    head = commit()
    assert re.fullmatch(r"[0-9a-f]{40}", head)
    (tmp_path / "README.md").write_text("no code")
    assert commit() == head
    names = {head}
    for path, code in ((model, "x = 2\n"), (model, "x = 3\n"), (model.parents[1] / "new" / "b.py", "y = 1\n")):
        path.parent.mkdir(exist_ok=True)
        path.write_text(code)
        assert re.fullmatch(rf"{head}\+[0-9a-f]{{12}}", commit())
        names.add(commit())
    assert len(names) == 4
    model.write_text("x = 1\n")
    assert commit() not in names, "a new file alone is a change too"
    path.unlink()
    assert commit() == head


def test_another_plan_of_the_same_name_is_refused(tmp_path: Path) -> None:
    mine, home = load_plan(str(tiny.write_plan(tmp_path))), tmp_path / "home"
    refuse_other_plan(mine, home, "/a/plan.yaml")
    remember(mine, home, "/a/plan.yaml")
    edited = {"search__trials": 9}, {"tasks": [["movies", "books"]]}, {"cold_ratios": [0.9], "base__epochs": 5}
    for changes_of_it in edited:
        refuse_other_plan(load_plan(str(tiny.write_plan(tmp_path, **changes_of_it))), home, "/a/plan.yaml")
    for same in ({}, edited[0], edited[2]):
        refuse_other_plan(load_plan(str(tiny.write_plan(tmp_path, **same))), home, "/b/moved.yaml")
    others = [edited[1], {"simulate__seed": 4}]
    plans = [replace(mine, model="emcdr"), *(load_plan(str(tiny.write_plan(tmp_path, **other))) for other in others)]
    for plan in plans:
        with pytest.raises(
            InputError, match=r"home holds another plan of this name \(/a/plan.yaml\); .* with --replace,"
        ):
            refuse_other_plan(plan, home, "/b/plan.yaml")
