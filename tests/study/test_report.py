"""The report: from MLflow alone, the same bytes each time, one run, and honest about what is missing."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest
from mlflow import MlflowClient

from study import report as module
from study.report import report

from .store import MUSIC, Store, empty_store, fill_search

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


class Page(HTMLParser):
    """Collects what a browser would load and checks that tags close in order."""

    VOID = frozenset({"meta", "img"})

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
    assert steps == [(k, 16) for k in range(1, 17)]
    assert {path.stem for path in first.figures} >= {"figure_3_steps", "figure_4_activation", "importance", "history"}
    assert all(path.is_file() for path in (*first.figures, *first.tables, first.page))
    assert first.comparison is not None
    assert len(first.comparison.rows) == 16

    run = store.client.get_run(first.run_id)
    assert run.info.status == "FINISHED"
    assert (run.data.tags["study.part"], run.data.tags["study.simulated"]) == ("report", "true")
    assert logged(store.client, first.run_id) == {*made, "figures", "tables"}

    text = first.page.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert page.headings == ["Study tiny", "State", "Tables", "Figures"]
    assert len(page.images) == len(first.figures) == 9
    assert all(image["alt"] and (image["src"] or "").startswith("data:image/png;base64,") for image in page.images)
    assert "http" not in text
    assert text.count("simulated data") >= 14
    assert "Simulated data: nothing on this page" in text
    assert "search books-&gt;movies@0.2 0012 is FAILED: loss is NaN in epoch 3" in text
    assert "search books-&gt;movies@0.2 0013 is RUNNING" in text
    assert "<strong>music</strong>" in text


def test_a_partial_study_says_what_is_missing_and_drops_what_is_stale(tmp_path: Path) -> None:
    store = empty_store(tmp_path)
    fill_search(store, trials=3)
    store.client.create_run(store.experiment_id)
    out = tmp_path / "out"
    (out / "figures").mkdir(parents=True)
    (out / "figures" / "old.png").write_bytes(b"stale")
    (out / "mine.txt").write_text("kept", encoding="utf-8")
    stale = store.client.create_run(store.experiment_id, tags={"study.part": "report", "study.trial": "report"})
    store.client.log_text(stale.info.run_id, "stale", "figures/old.png")

    made = report(store.uri, store.experiment, MUSIC, out)
    assert made.run_id == stale.info.run_id
    assert [line.partition(":")[0] for line in made.missing] == [
        "Table 1",
        "splits",
        "Table 2",
        "Table 3",
        "Table 4",
        "sweep of steps",
        "sweep of activation",
        "importance",
    ]
    assert made.comparison is None
    assert "figures/old.png" not in logged(store.client, made.run_id)
    assert not (out / "figures" / "old.png").exists()
    assert (out / "mine.txt").read_text(encoding="utf-8") == "kept"
    text = made.page.read_text(encoding="utf-8")
    assert "Table 2: no finished run of part score; run `study score`" in text
    assert "1 runs of this experiment were not logged by a study" in text


def test_an_empty_study_has_a_report(tmp_path: Path) -> None:
    store = empty_store(tmp_path)
    made = report(store.uri, store.experiment, MUSIC, tmp_path / "out")
    assert (made.figures, made.tables) == ((), ())
    text = made.page.read_text(encoding="utf-8")
    assert "No trial has been logged." in text
    assert "Simulated" not in text


def test_a_report_that_breaks_closes_its_run_as_failed_and_leaves_the_old_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store: Store = empty_store(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.html").write_text("old", encoding="utf-8")

    def broken(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(module, "_log", broken)
    with pytest.raises(OSError, match="disk full"):
        report(store.uri, store.experiment, MUSIC, out)
    (run,) = store.client.search_runs([store.experiment_id])
    assert run.info.status == "FAILED"
    assert [path.name for path in out.iterdir()] == ["report.html"]
    assert (out / "report.html").read_text(encoding="utf-8") == "old"
