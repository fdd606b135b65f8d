"""A study with rivals: one table in the paper's order, differences to the subject, figures and claims by name."""

from __future__ import annotations

import html
import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from study.labels import Labels, labels_of
from study.papers.reader import Claim, load_paper
from study.report.claims.judge import HOLDS, NOT_TESTED, REVERSED, VERDICTS, Judged, judge
from study.report.comparison import ONE_SEED, Comparison, compare
from study.report.comparison_table import TABLE_WIDTH, comparison_table, difference_table, summary_table
from study.report.drawing import RIVALS as GREYS
from study.report.drawing import draw
from study.report.figures.search import history
from study.report.figures.sensitivity import sensitivity
from study.report.report import redraw, report
from study.report.statistics import UserTotals, effect, holm, samples
from study.tracking.results import Results, load_results

from ..sequences_store import (
    CONFIG as LGCD_CONFIG,
)
from ..sequences_store import (
    LGCD,
    PROTOCOLS,
    RATIOS,
    TASKS,
    WITH_RIVALS,
    add_rivals,
    around,
    per_row,
    sequences_store,
)
from ..store import CONFIG, MUSIC, Store, empty_store, per_user, pooled, rival, with_rivals, with_seeds

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")
FOOD, KITCHEN = "kitchen->food@1", "food->kitchen@1"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = sequences_store(tmp_path_factory.mktemp("rivals"))
    add_rivals(store)
    return store


@pytest.fixture(scope="module")
def results(store: Store) -> Results:
    return load_results(store.uri, store.experiment, WITH_RIVALS)


@pytest.fixture(scope="module")
def comparison(results: Results) -> Comparison:
    return compare(results)


# --- the table ----------------------------------------------------------------------------------------------------


def test_rows_stand_in_the_papers_order_and_others_below(comparison: Comparison) -> None:
    assert LGCD.published is not None
    names = [row.name for row in comparison.rows if (row.cell, row.group) == (FOOD, "as-given")]
    printed = list(LGCD.published.comparison.rows)
    assert names == ["popularity", "item_knn", "item_knn_title", *printed, "CMF"]
    inter = [row.name for row in comparison.rows if (row.cell, row.group) == (FOOD, "inter")]
    assert inter == ["popularity", "item_knn", "item_knn_title", "SASRec", "UniCDR", "LGCD", "CMF"]
    by_name = {row.name: row for row in comparison.rows if (row.cell, row.group) == (FOOD, "as-given")}
    assert by_name["SASRec"].printed["ndcg10"] == 0.1509, "by its own name, not the subject's"
    assert by_name["UniCDR"].printed["hr5"] == LGCD.published.comparison.value("UniCDR", FOOD, "hr5")
    assert by_name["CMF"].printed == {}
    assert (by_name["SASRec"].labels.reads, by_name["UniCDR"].labels.note) == ("ids, pseudo-items", "reconstruction")


def test_each_row_is_held_against_the_subject_and_corrected_for_their_number(comparison: Comparison) -> None:
    for task, protocol in ((TASKS[0], "as-given"), (TASKS[1], "inter")):
        c = TASKS.index(task)
        place = [row for row in comparison.rows if (row.task, row.group) == (task, protocol) and row.seeds]
        by_row = {row.labels.row: row for row in place}
        frames = {"lgcd": per_row(60, 0.7, [0, 1, 2], 10 * c + 5), "sasrec": per_row(60, 0.55, [0, 1, 2], 10 * c + 8)}
        drawn = {
            row: samples(UserTotals.from_frame(frame[frame["protocol"] == protocol], LGCD.task_type.metrics))["ndcg10"]
            for row, frame in frames.items()
        }
        want = effect(drawn["sasrec"], drawn["lgcd"], higher=True)
        found = by_row["sasrec"].to_subject
        assert found is not None
        assert found.interval.value == pytest.approx(want.value)
        assert (found.interval.low, found.interval.high) == pytest.approx((want.interval().low, want.interval().high))
        assert found.p == pytest.approx(2 * min(want.tail(1), want.tail(-1)))
        others = [row.to_subject for row in place if row.labels.row != "lgcd"]
        assert len(others) == 6
        assert [other.p_holm for other in others if other] == holm([other.p for other in others if other])
        assert by_row["lgcd"].to_subject is None


def test_the_table_tells_trials_hours_and_who_was_searched_less(comparison: Comparison, results: Results) -> None:
    by_row = {row.labels.row: row for row in comparison.rows if (row.cell, row.group) == (FOOD, "inter")}
    assert {row: line.trials for row, line in by_row.items()} == {
        "popularity": 0, "item_knn": 0, "item_knn_title": 0, "sasrec": 4, "unicdr": 6, "lgcd": 6, "cmf": 6,
    }  # fmt: skip
    assert by_row["sasrec"].hours == pytest.approx((60 + 61 + 62 + 63) / 3600)
    assert f"SASRec was searched with fewer trials than LGCD: {KITCHEN} 4 of 6, {FOOD} 4 of 6." in comparison.notes
    table = comparison_table(comparison, results)
    frame = table.frame.set_index(["cell", "protocol", "name"])
    line = frame.loc[(FOOD, "as-given", "SASRec")]
    assert (line["row"], line["model"], line["reads"], line["trials"]) == ("sasrec", "sasrec", "ids, pseudo-items", 4)
    assert line["minus_item_knn_ndcg10"] == pytest.approx(
        line["test_ndcg10"] - frame.loc[(FOOD, "as-given", "item_knn"), "test_ndcg10"]
    )
    shown = table.cells[table.cells["Cell"] == "kitchen → food, overlap 100%, protocol as-given"].set_index("Row")
    assert shown.loc["SASRec", "Trials, hours"] == "4\n0.07 h"
    assert shown.loc["FEARec", "Reads"] == "\nnot run"
    assert any(name.endswith("UniCDR\nreconstruction") or name == "**UniCDR**\nreconstruction" for name in shown.index)
    less = difference_table(results, comparison).frame
    assert set(less["row"]) == {"lgcd", "sasrec", "unicdr"}


def test_a_reconstruction_says_so_in_the_terminal_too(store: Store) -> None:
    note = "its neighbourhood is reconstructed"
    rivals = [replace(rival("unicdr"), note=note), rival("sasrec"), rival("cmf")]
    out = io.StringIO()
    results = load_results(store.uri, store.experiment, with_rivals(LGCD, *rivals))
    Console(file=out, width=TABLE_WIDTH, color_system=None).print(summary_table(results))
    lines = out.getvalue().splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("  UniCDR "))
    assert [line[:24].rstrip() for line in lines[at + 1 : at + 3]] == ["    its neighbourhood is", "    reconstructed"]
    assert "…" not in out.getvalue()


def test_a_row_without_a_score_is_named_and_its_printed_numbers_stay(tmp_path: Path) -> None:
    store = empty_store(tmp_path, model="lgcd")
    frame = per_row(20, 0.5, [0, 1, 2], 1)
    files = {"per_user.csv": frame.to_csv(index=False)}
    store.add(
        "score", TASKS[1], 1.0, "test", around(np.random.default_rng(0), 0.2), config=LGCD_CONFIG, artifacts=files
    )
    comparison = compare(load_results(store.uri, store.experiment, WITH_RIVALS))
    assert f"{FOOD}: no score of SASRec." in comparison.notes
    assert f"{FOOD}: no score of popularity." in comparison.notes
    lines = [row for row in comparison.rows if row.name == "SASRec"]
    assert [(line.group, line.seeds, line.printed["hr5"]) for line in lines] == [("as-given", 0, 0.17)]


def test_without_the_subject_there_is_no_difference(tmp_path: Path) -> None:
    store = empty_store(tmp_path)
    frame = per_user(6, 1.0, [0], 1)
    files = {"per_user.csv": frame.to_csv(index=False)}
    store.add("score", "a->b", 0.2, "test", {"val_rmse": 1.0}, row="emcdr", artifacts=files)
    comparison = compare(load_results(store.uri, store.experiment, with_rivals(MUSIC, rival("emcdr"))))
    assert [(row.name, row.to_subject) for row in comparison.rows] == [("EMCDR", None)]
    assert "a->b@0.2: no score of MuSiC." in comparison.notes


def test_one_seed_gives_an_interval_over_users_and_no_p_value(tmp_path: Path) -> None:
    store = empty_store(tmp_path)
    for row, sigma in (("music", 0.9), ("emcdr", 1.0)):
        files = {"per_user.csv": per_user(40, sigma, [0], 3).to_csv(index=False)}
        store.add("score", "a->b", 0.2, "test", {"val_rmse": sigma}, row=row, artifacts=files)
    results = load_results(store.uri, store.experiment, with_rivals(MUSIC, rival("emcdr")))
    comparison = compare(results)
    found = comparison.rows[1].to_subject
    assert found is not None
    assert np.isnan([found.p, found.p_holm]).all()
    assert found.interval.n == 40
    assert found.interval.low > 0
    assert f"a->b@0.2: {ONE_SEED}." in comparison.notes
    shown = comparison_table(comparison, results).cells["RMSE minus MuSiC"].iloc[1]
    assert re.fullmatch(r"\+0\.\d{3}\n\[\+0\.\d{3}, \+0\.\d{3}\]", shown)


def test_printed_numbers_stand_beside_every_row_of_the_name(tmp_path: Path) -> None:
    store = empty_store(tmp_path)
    labels = labels_of("music", "music/amazon")
    plain = replace(rival("emcdr", name="EMCDR, uncalibrated"), row="cmf")
    for row in ("music", "emcdr", "cmf"):
        files = {"per_user.csv": per_user(10, 1.0, [0, 1], 3).to_csv(index=False)}
        store.add("score", "books->movies", 0.2, "test", {"val_rmse": 1.0}, row=row, artifacts=files)
    results = load_results(store.uri, store.experiment, with_rivals(labels, plain, rival("emcdr")))
    lines = [(row.name, row.printed["rmse"]) for row in compare(results).rows if row.seeds]
    assert lines == [("EMCDR, uncalibrated", 1.0874), ("EMCDR", 1.0874), ("MuSiC", 1.0136)]
    part = with_rivals(labels, replace(plain, paper_name=""), rival("emcdr"))
    lines = [
        (row.name, row.printed) for row in compare(load_results(store.uri, store.experiment, part)).rows if row.seeds
    ]
    assert [name for name, _ in lines] == ["EMCDR", "MuSiC", "EMCDR, uncalibrated"], "it is no system of the paper"
    assert lines[0][1]["rmse"] == 1.0874
    assert not lines[2][1]


# --- figures ------------------------------------------------------------------------------------------------------


def test_a_sweep_of_the_ratio_has_a_curve_for_each_row(results: Results) -> None:
    figure = sensitivity(results, "overlap_ratio")
    assert figure.rows == ("lgcd", "unicdr", "sasrec", "item_knn")
    assert figure.values == RATIOS
    points = figure.points()
    trials = results.finished("sweep:overlap_ratio", "sasrec").set_index("cell")["metrics.val_ndcg10_inter"]
    chosen = points[(points["row"] == "sasrec") & (points["metric"] == "val_ndcg10_inter")]
    assert {
        f"{line['task']}@{line['overlap_ratio']:g}": line["mean"] for _, line in chosen.iterrows()
    } == pytest.approx(trials.to_dict())
    canvas = draw(figure)
    handles = canvas.legends[0].get_lines()
    assert [line.get_label() for line in handles] == ["LGCD", "UniCDR", "SASRec", "item_knn"]
    assert handles[0].get_linestyle() == "-"
    assert all(line.get_linestyle() != "-" and line.get_linewidth() < 1.5 for line in handles[1:])
    assert {line.get_color() for line in handles[1:]} <= set(GREYS)
    assert len({line.get_marker() for line in handles}) == 4
    assert len(canvas.axes) == 2 * len(PROTOCOLS)


def test_a_parameter_that_several_rows_sweep_has_a_line_for_each_and_names_what_is_missing(tmp_path: Path) -> None:
    store = empty_store(tmp_path)
    for row, level in (("music", 0.9), ("emcdr", 1.0)):
        for ratio in (0.2, 0.5):
            for dropout in (0.1, 0.3) if (row, ratio) != ("emcdr", 0.5) else (0.1,):
                metrics = with_seeds({"val_rmse": [level + dropout, level + dropout + 0.01], "val_ndcg20": [0.9, 0.91]})
                config = {**CONFIG, "dropout": dropout}
                store.add("sweep:dropout", "a->b", ratio, f"dropout={dropout}", metrics, row=row, config=config)
            store.add("sweep:activation", "a->b", ratio, "activation=tanh", metrics, row=row, config=CONFIG)
            relu = {**CONFIG, "activation": "relu"}
            store.add("sweep:activation", "a->b", ratio, "activation=relu", metrics, row=row, config=relu)
    results = load_results(store.uri, store.experiment, with_rivals(MUSIC, rival("emcdr")))
    figure = sensitivity(results, "dropout")
    assert [(line.row, line.cell, len(line.x)) for line in figure.panels[0].lines] == [
        ("music", "a->b@0.2", 2), ("music", "a->b@0.5", 2), ("emcdr", "a->b@0.2", 2), ("emcdr", "a->b@0.5", 1),
    ]  # fmt: skip
    assert figure.head.notes[0] == "a->b@0.5, EMCDR: dropout = 0.3 missing."
    assert list(figure.points().columns)[:6] == ["metric", "cell", "row", "task", "ratio", "dropout"]
    labels = [text.get_text() for text in draw(figure).legends[0].get_texts()]
    assert labels == ["MuSiC, cold 20%", "MuSiC, cold 50%", "EMCDR, cold 20%", "EMCDR, cold 50%"]
    groups = [text.get_text() for text in draw(sensitivity(results, "activation")).axes[0].get_xticklabels()]
    assert groups == ["MuSiC\n20%", "EMCDR\n20%", "MuSiC\n50%", "EMCDR\n50%"]


def test_a_rivals_search_has_its_history_by_its_own_name(results: Results, store: Store, tmp_path: Path) -> None:
    figure = history(results, "sasrec")
    assert (figure.head.name, figure.head.title) == ("history_sasrec", "Optimisation history: SASRec — simulated data")
    assert [len(trace.y) for trace in figure.traces] == [4, 4]
    assert len(history(results, "lgcd").traces[0].y) == 6
    assert results.searched("sasrec") == ["lr"]
    path = redraw(store.uri, store.experiment, WITH_RIVALS, tmp_path, "history_sasrec")
    assert path.name == "history_sasrec.png"


# --- claims -------------------------------------------------------------------------------------------------------


def judged_by(store: Store, labels: Labels) -> dict[str, Judged]:
    return {one.claim.name: one for one in judge(load_results(store.uri, store.experiment, labels))}


def test_claims_about_systems_are_of_the_rows_of_that_name(store: Store) -> None:
    alone, found = judged_by(store, LGCD), judged_by(store, WITH_RIVALS)
    for name in ("beats-all-baselines", "single-domain-beats-some-cross-domain", "baselines-catch-up"):
        assert alone[name].verdict == NOT_TESTED, name
        assert found[name].measured, name
    assert found["beats-non-overlapping-methods"].verdict == NOT_TESTED
    assert np.isnan(found["beats-non-overlapping-methods"].p)
    best = found["beats-all-baselines"]
    measured = {contrast.worse for contrast in best.contrasts if contrast.effect is not None}
    assert measured == {"SASRec", "UniCDR"}, "CMF is a row, but no system of this paper's"
    at = next(contrast for contrast in best.contrasts if (contrast.cell, contrast.metric) == (FOOD, "hr5")
              and contrast.worse == "SASRec")  # fmt: skip
    ours, theirs = (per_row(60, chance, [0, 1, 2], 10 + draw) for chance, draw in ((0.7, 5), (0.55, 8)))
    hits = [frame[frame["protocol"] == "as-given"]["hr5"].mean() for frame in (ours, theirs)]
    assert at.effect is not None
    assert at.effect.value == pytest.approx(hits[0] - hits[1])
    assert at.printed == pytest.approx(0.2800 - 0.1700)
    ahead = found["ahead-at-little-overlap"]
    assert {(contrast.cell, contrast.worse) for contrast in ahead.contrasts if contrast.effect} == {
        (f"{task}@0.2", name) for task in TASKS for name in ("SASRec", "UniCDR")
    }


def test_what_was_not_run_does_not_cost_the_others_their_level(tmp_path: Path) -> None:
    """The one claim that has runs is corrected for itself alone."""
    store = empty_store(tmp_path)
    for name, sigma in (("full", 0.9), ("wo_diffusion", 0.95)):
        files = {"val_per_user.csv": per_user(60, sigma, [0, 1, 2], 3).to_csv(index=False)}
        store.add("ablate", "books->movies", 0.2, name, {"val_rmse": sigma}, variant=name, artifacts=files)
    paper = load_paper("music")
    assert paper is not None
    claims = tuple(claim for claim in paper.claims if claim.name in ("wo-diffusion", "wo-side", "beats-all-baselines"))
    labels = replace(labels_of("music", "music/amazon"), paper=replace(paper, claims=claims))
    found = judged_by(store, labels)
    one = found["wo-diffusion"]
    assert one.verdict == HOLDS
    assert one.component.effect is not None
    assert one.p == pytest.approx(one.component.effect.tail()), "no factor for the two claims without runs"
    assert {found[name].verdict for name in ("wo-side", "beats-all-baselines")} == {NOT_TESTED}


@pytest.mark.parametrize(("at_least", "rows", "decided"), [("all", 1, True), ("some", 1, False), ("most", 1, False),
                                                            ("most", 2, True)])  # fmt: skip
def test_a_claim_is_measured_where_its_runs_could_decide_it(
    tmp_path: Path, at_least: str, rows: int, decided: bool
) -> None:
    """Of three rivals as many were run: one refutes all, none can refute some, and most need more than half."""
    store = empty_store(tmp_path)
    for row, sigma in [("music", 1.2), ("emcdr", 0.9), ("cmf", 0.9)][: 1 + rows]:
        files = {"per_user.csv": per_user(60, sigma, [0, 1, 2], 3).to_csv(index=False)}
        store.add("score", "books->movies", 0.2, "test", {"val_rmse": sigma}, row=row, artifacts=files)
    claim = Claim(
        name="c", place="1", sentence="s", part="score", metrics=("rmse",), order=(("MuSiC",), ("EMCDR", "CMF", "CATN")),
        at_least=at_least,  # type: ignore[arg-type]
    )  # fmt: skip
    assert MUSIC.paper is not None
    labels = with_rivals(replace(MUSIC, paper=replace(MUSIC.paper, claims=(claim,))), rival("emcdr"), rival("cmf"))
    (one,) = judge(load_results(store.uri, store.experiment, labels))
    assert one.verdict == (REVERSED if decided else NOT_TESTED)
    assert "no finished run of CATN in score" in one.why


def test_an_ablation_is_held_against_a_system_on_validation_users(tmp_path: Path) -> None:
    store = empty_store(tmp_path)
    for part, row, name, sigma in (("ablate", "music", "wo_mllm", 0.9), ("score", "emcdr", "test", 1.0)):
        frame = per_user(60, sigma, [0, 1, 2], 3)
        files = {
            "val_per_user.csv": frame.to_csv(index=False),
            "per_user.csv": per_user(9, 9, [0], 1).to_csv(index=False),
        }
        store.add(part, "books->movies", 0.2, name, {"val_rmse": sigma}, row=row, artifacts=files)
    labels = with_rivals(labels_of("music", "music/amazon"), rival("emcdr"))
    found = judged_by(store, labels)["wo-mllm-beats-ratings-baselines"]
    effects = {(c.metric, c.worse): c.effect for c in found.contrasts if c.effect is not None}
    assert set(effects) == {("mae", "EMCDR"), ("rmse", "EMCDR")}
    ours, theirs = (pooled(per_user(60, sigma, [0, 1, 2], 3))["test_rmse"] for sigma in (0.9, 1.0))
    assert effects["rmse", "EMCDR"].value == pytest.approx(theirs - ours)
    assert effects["rmse", "EMCDR"].users == 60


# --- the page -----------------------------------------------------------------------------------------------------


def test_the_report_has_all_rows_on_one_page(store: Store, tmp_path: Path) -> None:
    made = report(store.uri, store.experiment, WITH_RIVALS, tmp_path)
    assert {path.stem for path in made.figures} >= {"history", "history_cmf", "history_unicdr", "history_sasrec"}
    text = html.unescape(re.sub(r'src="[^"]+"', "", made.page.read_text(encoding="utf-8")))
    assert text.index("<h2>Found</h2>") < text.index("<h2>Figures</h2>") < text.index("<h2>Tables</h2>")
    assert text.index("<h2>State</h2>") < text.index("<h2>Behind the claims</h2>") < text.index("Claims without a test")
    blocks = re.findall(r'<th scope="rowgroup" colspan="\d+">([^<]+)</th>', text)
    assert blocks[:4] == [
        f"{a} → {b}, overlap 100%, protocol {protocol}"
        for a, b in (task.split("->") for task in TASKS)
        for protocol in PROTOCOLS
    ]
    assert re.search(r'UniCDR(</strong>)?<span class="below">reconstruction</span>', text)
    assert '<td class="text">all</td><td class="text">SASRec</td>' in text, "what each row cost"
    again = report(store.uri, store.experiment, WITH_RIVALS, tmp_path / "again")
    assert again.page.read_bytes() == made.page.read_bytes()
    frame = pd.read_csv(tmp_path / "tables" / "claims.csv")
    assert frame["verdict"].isin(VERDICTS).all()
