"""The report: from MLflow alone, the same bytes each time, one run, and honest about what is missing."""

from __future__ import annotations

import html
import logging
import math
import re
import shutil
import sqlite3
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from mlflow import MlflowClient

from features.errors import InputError
from study.labels import labels_of
from study.report import page as page_module
from study.report import report as module
from study.report.claims.judge import counts
from study.report.cost import cost_table
from study.report.report import current, redraw, report
from study.tracking.results import Results, load_results

from ..store import CELLS, MUSIC, Store, empty_store, fill_search, rival, with_rivals

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


class Page(HTMLParser):
    """Collects what a browser would load and checks that tags close in order."""

    VOID = frozenset({"meta", "img", "link", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.headings: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def logged(client: MlflowClient, run_id: str) -> set[str]:
    return {entry.path for folder in ("", "figures", "tables") for entry in client.list_artifacts(run_id, folder)}


def test_a_full_study_twice_gives_the_same_bytes_in_one_finished_run(store: Store, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    first = report(store.uri, store.experiment, MUSIC, tmp_path / "one", progress=lambda *at: steps.append(at))
    again = report(store.uri, store.experiment, MUSIC, tmp_path / "two")
    made = files(tmp_path / "one")
    assert made == files(tmp_path / "two")
    assert first.run_id == again.run_id
    assert first.missing == ()
    assert steps == [(k, 19) for k in range(1, 20)]
    assert {path.stem for path in first.figures} >= {"figure_3_steps", "figure_4_activation", "importance", "history"}
    assert all(path.is_file() for path in (*first.figures, *first.tables, first.page))
    assert first.comparison is not None
    assert len(first.comparison.rows) == 16

    run = store.client.get_run(first.run_id)
    assert run.info.status == "FINISHED"
    assert (run.data.tags["study.part"], run.data.tags["study.simulated"]) == ("report", "true")
    assert run.data.tags["study.claims"] == counts(first.claims)
    assert logged(store.client, first.run_id) == {*made, "figures", "tables"}

    text = first.page.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert page.headings == ["Study tiny", "Found", "Figures", "Tables", "State", "Behind the claims"]
    assert len(page.images) == len(first.figures) == 11
    assert all(image["alt"] and (image["src"] or "").startswith("data:image/png;base64,") for image in page.images)
    assert "http" not in text
    assert text.count("simulated data") >= 14
    assert "Simulated data: nothing on this page" in text
    assert "search books-&gt;movies@0.2 music 0012 is FAILED: loss is NaN in epoch 3" in text
    assert "search books-&gt;movies@0.2 music 0013 is RUNNING" in text
    assert "<strong>MuSiC</strong>" in text
    assert "Partial study: 2 trials without a result." in text
    again = "study report /my/tiny.yaml --home /runs"
    assert f"<dt>Remade by</dt><dd>{again}</dd>" in text
    sweep = "study sweep /my/tiny.yaml --home /runs --data '/raw files'"
    assert f"<code>{sweep} && {again} --only figure_3_steps</code>" in html.unescape(text)
    assert "Published optimum: tanh (every task; 4.4.2, Figure 4)." in text


def test_a_partial_study_says_what_is_missing_and_drops_what_is_stale(tmp_path: Path) -> None:
    store = empty_store(tmp_path)
    fill_search(store, trials=3)
    store.add("sweep:activation", *CELLS[0], "activation=tanh", {"val_rmse": 0.9})  # without users' rows
    store.client.create_run(store.experiment_id)
    data = store.add_data()
    for name in ("cells.json", "domains.json"):
        store.client.log_text(data, '[{"sou', name)
    out = tmp_path / "out"
    (out / "figures").mkdir(parents=True)
    (out / "figures" / "old.png").write_bytes(b"stale")
    (out / "mine.txt").write_text("kept", encoding="utf-8")
    stale = store.client.create_run(store.experiment_id, tags={"study.part": "report", "study.trial": "report"})
    store.client.log_text(stale.info.run_id, "stale", "figures/old.png")

    made = report(store.uri, store.experiment, MUSIC, out)
    assert made.run_id == stale.info.run_id
    assert [line.partition(":")[0] for line in made.missing] == [
        f"run {data}",
        f"run {data}",
        "claims",
        "Table 2",
        "Table 1",
        "splits",
        "Table 3",
        "Table 4",
        "sweep of steps",
    ]
    text = made.page.read_text()
    assert "Partial study: 9 figures, tables or parts missing." in text
    assert "importance: no cell has 5 finished search trials" in text.partition("<h2>Too few trials</h2>")[2]
    assert re.search(
        r"domains.json cannot be used \(.*\); put the file back, or delete the run in MLflow", made.missing[0]
    )
    assert made.comparison is None
    assert "figures/old.png" not in logged(store.client, made.run_id)
    assert not (out / "figures" / "old.png").exists()
    assert (out / "mine.txt").read_text(encoding="utf-8") == "kept"
    text = made.page.read_text(encoding="utf-8")
    assert "Table 2: no finished run of part score; run `study score`" in text
    assert "1 runs of this experiment were not logged by a study" in text


def test_what_cannot_be_read_any_more_takes_nothing_from_the_last_report(tmp_path: Path) -> None:
    store = empty_store(tmp_path)
    fill_search(store, trials=3)
    data, out = store.add_data(), tmp_path / "out"
    report(store.uri, store.experiment, MUSIC, out)
    before = files(out)
    assert any(name.startswith("tables/splits") for name in before)
    store.client.log_text(data, '[{"sou', "cells.json")
    made = report(store.uri, store.experiment, MUSIC, out)
    assert any("cells.json cannot be used" in line for line in made.missing)
    after = files(out)
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == {"report.html"}
    for run in store.client.search_runs([store.experiment_id], max_results=1000):
        if run.data.tags["study.part"] != "report":
            store.client.delete_run(run.info.run_id)
    with pytest.raises(
        InputError, match=rf"holds no trial of .*; the last report stays in {out}; name the home folder"
    ):
        report(store.uri, store.experiment, MUSIC, out)
    assert files(out) == after


def test_an_empty_study_has_a_report(tmp_path: Path) -> None:
    store = empty_store(tmp_path)
    made = report(store.uri, store.experiment, MUSIC, tmp_path / "out")
    assert (made.figures, made.tables) == ((), ())
    text = made.page.read_text(encoding="utf-8")
    assert "No trial has been logged." in text
    assert "Simulated" not in text


def test_a_store_that_takes_no_report_costs_the_page_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = empty_store(tmp_path)
    fill_search(store, trials=3)
    report(store.uri, store.experiment, MUSIC, tmp_path / "out")
    with sqlite3.connect(tmp_path / "mlflow.db") as base:
        base.execute("create trigger no before update on runs begin select raise(abort, 'read only'); end")
    (tmp_path / "out" / "report.html").write_text("old", encoding="utf-8")
    made = report(store.uri, store.experiment, MUSIC, tmp_path / "out")
    assert made.run_id == ""
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == [], "one line of ours says it"
    assert re.fullmatch(
        rf"MLflow at {store.uri} does not take the report \(.*read only.*\); only .*/out has it", made.unlogged
    )
    assert "Study tiny" in made.page.read_text(encoding="utf-8"), "the page is new all the same"


def test_a_report_that_is_logged_in_part_has_a_failed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store: Store = empty_store(tmp_path)

    def broken(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(module, "_log", broken)
    made = report(store.uri, store.experiment, MUSIC, tmp_path / "out")
    assert (made.run_id, made.page.is_file()) == ("", True)
    assert "does not take the report (disk full)" in made.unlogged
    (run,) = store.client.search_runs([store.experiment_id])
    assert run.info.status == "FAILED"
    assert current(made.results, tmp_path / "out") is None, "the next study run tries again"


def test_a_page_is_current_until_anything_that_it_shows_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, out = empty_store(tmp_path), tmp_path / "out"
    results = report(store.uri, store.experiment, MUSIC, out).results
    tags = current(load_results(store.uri, store.experiment, MUSIC), out)
    assert tags is not None
    assert tags["study.claims"] == ""
    amazon = labels_of("music", "music/amazon")
    assert MUSIC.paper is not None
    sentence = replace(MUSIC.paper.claims[0], sentence="otherwise")
    for changed in (
        replace(results, labels=amazon),
        replace(results, labels=replace(MUSIC, paper=replace(MUSIC.paper, claims=(sentence, *MUSIC.paper.claims[1:])))),
        replace(results, cells=({"source": "books", "train_users": 3},)),
        replace(results, way={"plan": "/other.yaml"}),
    ):
        assert current(changed, out) is None
    monkeypatch.setattr(module, "commit", lambda: "another")
    assert current(results, out) is None


def test_local_files_do_not_matter_and_every_run_counts_once(tmp_path: Path) -> None:
    """The same store, its folder of reports gone: the same bytes. Foreign, repeated, failed and open runs are named."""
    store = empty_store(tmp_path)
    fill_search(store, trials=6)
    task, ratio = CELLS[0]
    store.add("search", task, ratio, "0003", {"val_rmse": 0.1, "val_ndcg20": 0.9, "seconds": 3.0})
    store.add("search", task, ratio, "0004", {}, status="FAILED", tags={"study.error": "late failure"})
    store.add("search", task, ratio, "0006", {}, status="KILLED")
    store.add("search", task, ratio, "0007", {}, status="KILLED", tags={"study.pruned": "after epoch 3 by ASHA"})
    store.client.create_run(store.experiment_id)
    first = report(store.uri, store.experiment, MUSIC, tmp_path / "one")
    before = files(tmp_path / "one")
    shutil.rmtree(tmp_path / "one")
    second = report(store.uri, store.experiment, MUSIC, tmp_path / "two")
    assert files(tmp_path / "two") == before
    assert second.run_id == first.run_id
    text = html.unescape(second.page.read_text(encoding="utf-8"))
    assert f"search/{task}@{ratio}/music/0003 finished more than once; its newest run counts" in text
    assert "late failure" not in text, "its finished run counts"
    assert f"search {task}@{ratio} music 0006 is KILLED" in text
    assert "Partial study: 1 trials without a result" in text, "a pruned trial is not to have one"
    assert "0007 is" not in text
    state = text.partition("<h2>State")[2]
    assert re.findall(r'<th scope="col">(\w+)</th>', state)[:4] == [
        "Part",
        "Finished",
        "Killed",
        "Pruned",
    ]
    assert '<td class="text">search</td><td>24</td><td>1</td><td>1</td>' in text
    assert "1 runs of this experiment were not logged by a study" in text
    points = pd.read_csv(second.out / "figures" / "pareto.csv", dtype={"trial": str}).set_index(["cell", "trial"])
    assert points.loc[(f"{task}@{ratio}", "0003"), "val_rmse"] == 0.1
    assert points.loc[(f"{task}@{ratio}", "0003"), "selected"]


def test_one_figure_is_redrawn_by_its_name(store: Store, tmp_path: Path) -> None:
    path = redraw(store.uri, store.experiment, MUSIC, tmp_path, "figure_3_steps")
    assert path.name == "figure_3_steps.png"
    assert sorted(file.name for file in path.parent.iterdir()) == [
        f"figure_3_steps.{end}" for end in ("csv", "png", "svg")
    ]
    with pytest.raises(
        InputError, match="no figure 'figure_9'; choose from figure_3_steps, figure_4_activation, import"
    ):
        redraw(store.uri, store.experiment, MUSIC, tmp_path, "figure_9")


def test_cost_is_the_ended_trials_and_the_time_in_which_any_ran(results: Results) -> None:
    hour = 3_600_000
    rows = [("search", hour, 3600, "2"), ("search", 2 * hour, 5400, "2"), ("score", 6 * hour, 3600, "0")]
    trials = pd.DataFrame([*rows, ("score", 9 * hour, math.nan, "0")], columns=["part", "ended", "spent", "gpus"])
    trials = trials.assign(row="music", model="music")
    table = cost_table(replace(results, trials=trials))
    assert table is not None
    frame = table.frame.set_index(["part", "row"])
    assert frame.loc[("search", "all")].tolist() == [2, 2.5, 5.0, 2.0]
    assert frame.loc[("all", "all")].tolist() == [3, 3.5, 5.0, 3.0]
    assert len(frame) == 3, "one row alone needs no line of its own"
    assert table.notes[1] == "1 trials that do not say how long they ran are not in it."
    unknown = cost_table(replace(results, trials=trials.assign(gpus="")))
    assert unknown is not None
    assert set(unknown.cells["GPU-hours"]) == {"not logged"}


def test_cost_is_told_by_row_where_there_are_several(results: Results) -> None:
    hour = 3_600_000
    rows = [("search", "music"), ("search", "emcdr"), ("score", "emcdr"), ("score", "item_mean")]
    trials = pd.DataFrame(rows, columns=["part", "row"]).assign(ended=hour, spent=1800, gpus="0")
    trials = trials.assign(model=["music", "emcdr", "emcdr", "baseline"])
    labels = with_rivals(MUSIC, rival("emcdr"))
    table = cost_table(replace(results, labels=labels, trials=trials))
    assert table is not None
    assert table.cells[["Part", "Row", "Trials"]].values.tolist() == [
        ["score", "all", 2], ["search", "all", 2], ["all", "MuSiC", 1], ["all", "EMCDR", 2],
        ["all", "simple baselines", 1], ["all", "all", 4],
    ]  # fmt: skip
    assert table.frame["trial_hours"].tolist() == [1.0, 1.0, 0.5, 1.0, 0.5, 2.0]


def test_text_can_be_read_on_its_ground() -> None:
    """WCAG 2.1, 1.4.3: 4.5 to 1 for text, in both schemes."""

    def luminance(colour: str) -> float:
        digits = colour if len(colour) == 7 else "#" + "".join(2 * digit for digit in colour[1:])
        parts = [int(digits[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    blocks = page_module._CSS.split("@media", 1)
    light, dark = (dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{3,6})", block)) for block in blocks)
    pairs = [(ink, "page") for ink in ("ink", "soft", "link", "good", "bad")] + [("ink", "code"), ("warn-ink", "warn")]
    for scheme in (light, {**light, **dark}):
        for ink, ground in pairs:
            low, high = sorted(luminance(scheme[name]) for name in (ink, ground))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, ground)
