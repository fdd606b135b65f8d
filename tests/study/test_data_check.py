"""What `study check` says of a user's data, and what it refuses, before anything is made."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from features.errors import InputError
from study import study as study_module
from study.data import summary
from study.plan.load import load_plan
from study.show import describe

from .tiny import study, write_plan
from .tiny_sequences import PLAN as SEQUENCE_PLAN
from .tiny_sequences import write_sequences

Row = tuple[str, str, float, int]
TABLES = {"a": {"reader": "table", "interactions": "a.csv"}, "b": {"reader": "table", "interactions": "b.csv"}}


def rows(name: str, users: int = 40, each: int = 8, seed: int = 0) -> list[Row]:
    draw = np.random.default_rng(seed)
    start = 1405588132
    return [
        (f"u{user:03d}", f"{name}{item:02d}", float(draw.integers(1, 6)), start + 100 * user + place)
        for user in range(users)
        for place, item in enumerate(draw.choice(25, each, replace=False))
    ]


def write(folder: Path, name: str, table: Sequence[Row], header: str = "user_id,item_id,rating,timestamp") -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.csv").write_text("\n".join([header, *(",".join(map(str, row)) for row in table)]) + "\n")


def plan(folder: Path, **changes: Any) -> Path:
    shared = {"tasks": [["a", "b"]], "cold_ratios": [0.3], "domains": TABLES}
    return write_plan(folder, drop=("simulate",), **(shared | changes))


def shown(path: Path, data: Path, home: Path) -> str:
    out = io.StringIO()
    console = Console(width=200, file=out)
    for part in describe(load_plan(str(path)), data, home):
        console.print(part, soft_wrap=True)
    return out.getvalue()


def test_domains_overlap_and_splits_of_rating_plans_are_counted(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write(data, "a", rows("a"))
    write(data, "b", rows("b", seed=1)[: 30 * 8])
    text = shown(plan(tmp_path), data, tmp_path / "home")
    words = [" ".join(line.replace("│", " ").split()) for line in text.splitlines()]
    assert "a 40 25 320 1 to 5 2014-07-17 to 2014-07-17 0 25" in words
    assert "a, b 30 0 0 0" in words
    assert "a->b@0.3 train 17 136" in words
    assert "a->b@0.3 validation 4 32" in words
    assert "a->b@0.3 test 9 72" in words
    assert (
        "note: a->b@0.3: 4 validation users with 32 ratings cannot carry a study: differences are mostly chance"
        in words
    )
    assert not (tmp_path / "home").exists()


def test_brackets_in_data_are_no_markup(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write(data, "[red]a", rows("a"))
    write(data, "b", [(f"[/]{row[0]}", *row[1:]) for row in rows("b")])
    domains = {"a": {"reader": "table", "interactions": "[red]a.csv"}, "b": TABLES["b"]}
    ran = study("check", plan(tmp_path, domains=domains), "--data", data, "--home", tmp_path / "home")
    assert ran.code == 2
    assert (
        "the domains share no user (after filtering), ids are 'u000', 'u001', 'u002' ... in a and '[/]u000'" in ran.err
    )
    write(data, "b", [(f"[/]{row[0]}", *row[1:]) for row in rows("b")] + rows("b")[:24])
    ran = study("check", plan(tmp_path, domains=domains), "--data", data, "--home", tmp_path / "home")
    assert ran.code == 2  # three users cannot be split; what is odd is said before that
    assert "note: a.csv" not in ran.out
    assert "ratio 0.3 leave 2 for training, 0 for validation, 1 for test" in ran.err
    assert "shared users" in ran.out


def test_interactions_that_stand_in_both_domains_are_refused_unless_allowed(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write(data, "a", rows("x"))
    write(data, "b", rows("x")[:160] + rows("b", seed=1)[160:])
    with pytest.raises(InputError, match=r"task a->b: 160 of 320 interactions \(50%\) that the shared users have in b"):
        shown(plan(tmp_path), data, tmp_path / "home")
    assert "configurations are selected" in shown(plan(tmp_path, most_shared=0.5), data, tmp_path / "home")
    with pytest.raises(InputError, match=r"most_shared is 2; give a share from 0 to 1"):
        load_plan(str(plan(tmp_path, most_shared=2.0)))


def test_implicit_domains_of_rating_models_are_told_once(tmp_path: Path) -> None:
    domains = {**TABLES, "b": {**TABLES["b"], "reader": "recbole", "feedback": "implicit"}}
    with pytest.raises(InputError) as caught:
        load_plan(str(plan(tmp_path, domains=domains)))
    assert str(caught.value) == (
        "plan.yaml: domains.b.feedback is implicit, and music predicts ratings; take a model of sequences, or a file with "
        "ratings and feedback: explicit"
    )


def test_items_that_come_again_are_for_sequences_that_rank_them_plainly(tmp_path: Path) -> None:
    ratings = {**TABLES, "b": {**TABLES["b"], "duplicates": "keep"}}
    with pytest.raises(
        InputError, match=r"domains.b.duplicates is 'keep', for models of sequences, and music predicts one"
    ):
        load_plan(str(plan(tmp_path, domains=ratings)))
    with pytest.raises(InputError, match=r"domains.song.duplicates is 'keep', .*; set sequences.rank_seen: plain"):
        load_plan(str(write_sequences(tmp_path, domains=repeated())))
    kept = write_sequences(tmp_path, domains=repeated(), sequences={"negatives": 19, "rank_seen": "plain"})
    assert load_plan(str(kept)).domains["song"].duplicates == "keep"


def repeated() -> dict[str, Any]:
    """The domains of a plan of sequences, of which one keeps what comes again."""
    domains = SEQUENCE_PLAN["domains"]
    return {**domains, "song": {**domains["song"], "duplicates": "keep"}}


def test_filters_show_the_ladder_of_counts(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write(data, "a", rows("a"))
    write(data, "b", rows("b"))
    domains = {**TABLES, "a": {**TABLES["a"], "filters": {"k_core": 3, "min_user_reviews": 9}}}
    message = r"after the filter k_core=3: read 320 interactions of 40 users and 25 items, dup.*, k_core=3 0 "
    with pytest.raises(InputError, match=message):
        shown(plan(tmp_path, domains=domains), data, tmp_path / "home")


def test_large_files_are_sampled_and_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    write(data, "a", rows("a"))
    write(data, "b", rows("b"))
    monkeypatch.setattr(summary, "SMALL", 1000)
    text = shown(plan(tmp_path), data, tmp_path / "home")
    assert "sample of the data" in text
    assert (
        "at most 200,000 rows of each file; counts after filters, overlap and splits are told by `study extract`"
        in text
    )
    (data / "b.csv").write_text("user_id,item_id\nu,i\n")
    with pytest.raises(InputError, match=r"b.csv: there is no column 'rating' for rating"):
        shown(plan(tmp_path), data, tmp_path / "home")


def test_recommend_prints_ids_and_titles_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = ["[/]", "[red]x[/red]", ":smile:", "[bold]", "a,b", "用户"]
    history = pd.DataFrame({"item": odd, "title": odd})
    found = SimpleNamespace(
        cell="a->b@0.3", model="m", version="1", history=history, items=history.assign(score=np.linspace(1, 0, 6))
    )
    monkeypatch.setattr(study_module.Study, "recommend", lambda *_: found)
    (tmp_path / "home" / "tasks").mkdir(parents=True)
    ran = study("recommend", write_plan(tmp_path), "--home", tmp_path / "home", "--user", "[/]")
    assert (ran.code, ran.err) == (0, "")
    for name in odd:
        assert ran.out.count(name) >= 4
    assert "[/] has, in the source domain" in ran.out


def test_merge_keys_and_spaces_beside_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "sub"
    folder.mkdir()
    path = plan(folder, space="space.yaml/v")
    text = path.read_text()
    assert "space: space.yaml/v" in text
    monkeypatch.chdir(tmp_path)
    assert load_plan("sub/plan.yaml").subject.load_space() is not None
    domains = (
        "domains:\n  a: &one {reader: table, interactions: a.csv, duplicates: last}\n"
        "  b: &two {<<: *one, interactions: b.csv}\n  c: {<<: [*two, *one], interactions: c.csv}\n"
    )
    start = text.index("domains:")
    end = text.index("\n", text.index("interactions: b.csv")) + 1
    path.write_text(text[:start] + domains + text[end:])
    found = load_plan(str(path)).domains
    assert {name: (spec.interactions, spec.duplicates) for name, spec in found.items()} == {
        "a": ("a.csv", "last"), "b": ("b.csv", "last"), "c": ("c.csv", "last"),
    }  # fmt: skip
    path.write_text(text.replace("name: tiny", "name: 007"))
    with pytest.raises(InputError, match=r"plan.yaml: name is 7; give a value of type str, in quotes"):
        load_plan(str(path))
