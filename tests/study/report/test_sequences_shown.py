"""Tables, figures and report of a study of sequences, by their numbers: protocols, directions, published rows."""

from __future__ import annotations

import io
import itertools
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from study.labels import labels_of
from study.report.comparison import Comparison, compare
from study.report.comparison_table import comparison_table, difference_table, full_ranking_table, summary_table
from study.report.drawing import COLOURS, draw, save
from study.report.figures.search import curves, history, importance, parallel
from study.report.figures.sensitivity import sensitivity
from study.report.report import report
from study.report.tables import ablation_table, domains_table
from study.selection import best_trials
from study.tracking.results import MissingError, Results, load_results

from ..sequences_store import GUIDANCE, LGCD, PROTOCOLS, RATIOS, TASKS, per_row, sequences_store
from ..store import Store

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")
BASELINES = ["popularity", "item_knn", "item_knn_title"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return sequences_store(tmp_path_factory.mktemp("sequences"))


@pytest.fixture(scope="module")
def results(store: Store) -> Results:
    return load_results(store.uri, store.experiment, LGCD)


@pytest.fixture(scope="module")
def comparison(results: Results) -> Comparison:
    return compare(results)


# --- tables -------------------------------------------------------------------------------------------------------


def test_table_2_has_every_row_under_each_protocol_and_the_whole_printed_table_as_given(comparison: Comparison) -> None:
    assert LGCD.published is not None
    names = [(row.cell, row.group, row.name) for row in comparison.rows]
    assert names == [
        (f"{task}@1", protocol, name)
        for task in TASKS
        for protocol in PROTOCOLS
        for name in (*BASELINES, *(LGCD.published.comparison.rows if protocol == "as-given" else ["LGCD"]))
    ]
    assert comparison.notes == (LGCD.published.paper.note,)
    assert comparison.best == {(f"{task}@1", protocol, "lgcd") for task in TASKS for protocol in PROTOCOLS}
    frame, base = per_row(60, 0.7, [0, 1, 2], 5), per_row(60, 0.3, [-1], 1)
    rows = [row for row in comparison.rows if (row.cell, row.labels.row) == (f"{TASKS[0]}@1", "lgcd")]
    for row in rows:
        ours, theirs = (rows[rows["protocol"] == row.group]["ndcg10"].mean() for rows in (frame, base))
        assert row.test["ndcg10"].value == pytest.approx(ours)
        assert row.test["ndcg10"].low < ours < row.test["ndcg10"].high
        assert row.to_reference is not None
        assert row.to_reference["ndcg10"].value == pytest.approx(ours - theirs)
        assert row.to_reference["ndcg10"].low > 0
        assert (row.seeds, row.users, row.size, row.trials) == (3, 60, 60, 6)
    assert [row.group for row in rows] == list(PROTOCOLS)


def test_printed_numbers_stand_beside_the_row_of_that_name_and_alone_where_it_was_not_run(
    comparison: Comparison,
) -> None:
    by_name = {(row.task, row.group, row.name): row for row in comparison.rows}
    for task, values in (
        ("kitchen->food", [0.2800, 0.4000, 0.1805, 0.2190]),
        ("food->kitchen", [0.3093, 0.3893, 0.2214, 0.2397]),
    ):
        row = by_name[task, "as-given", "LGCD"]
        assert [row.printed[metric] for metric in ("hr5", "hr10", "ndcg5", "ndcg10")] == values
        assert by_name[task, "inter", "LGCD"].printed == {}
    sasrec = by_name["kitchen->food", "as-given", "SASRec"]
    assert sasrec.printed == {"hr5": 0.17, "hr10": 0.29, "ndcg5": 0.1187, "ndcg10": 0.1509}
    assert (sasrec.seeds, sasrec.test, sasrec.validation, sasrec.to_subject) == (0, {}, {}, None)


def test_table_2_is_written_with_protocols_directions_and_four_digits(comparison: Comparison, results: Results) -> None:
    table = comparison_table(comparison, results)
    assert table.caption.startswith("Table 2. Test users: HR@5, HR@10, NDCG@5, NDCG@10 (0 to 1, higher is better)")
    assert table.block == "Cell"
    line = table.cells.iloc[3]
    assert line["Cell"] == "food → kitchen, overlap 100%, protocol as-given"
    assert (line["Row"], line["Reads"], line["Test HR@5"]) == ("GRU4Rec", "\nnot run", "\nprinted 0.0691")
    lgcd = table.cells.iloc[18]
    want = next(row for row in comparison.rows if row.labels.row == "lgcd")
    half = want.test["hr5"].half_width
    assert (lgcd["Row"], lgcd["Reads"]) == ("**LGCD**", LGCD.subject.reads)
    assert lgcd["Test HR@5"] == f"{want.test['hr5'].value:.4f}±{half:.4f}\nprinted 0.3093"
    assert lgcd["NDCG@10 minus LGCD"] == "–"
    assert {"protocol", "interactions", "minus_item_knn_hr5_low", "minus_subject_p_holm"} <= set(table.frame.columns)
    frame = table.frame.set_index(["cell", "protocol", "name"])
    assert frame.loc[("food->kitchen@1", "as-given", "SASRec"), "printed_hr5"] == 0.2276
    assert len(frame) == 2 * (3 + 16 + 3 + 1)


def test_what_is_measured_less_what_is_printed(comparison: Comparison, results: Results) -> None:
    table = difference_table(results, comparison)
    assert (table.name, table.folded) == ("measured_less_printed", True)
    assert table.frame["cell"].tolist() == [f"{task}@1" for task in TASKS for _ in range(4)]
    assert set(table.frame["row"]) == {"lgcd"}
    ours = next(row for row in comparison.rows if (row.task, row.group, row.name) == (TASKS[0], "as-given", "LGCD"))
    line = table.frame.iloc[3]
    assert (line["metric"], line["printed"]) == ("NDCG@10", 0.2397)
    assert line["difference"] == pytest.approx(ours.test["ndcg10"].value - 0.2397)
    low = ours.test["ndcg10"].low - 0.2397
    assert table.cells.iloc[3]["Difference [95%]"].startswith(f"{line['difference']:+.4f} [{low:+.4f}, ")
    with pytest.raises(MissingError, match="the plan names no published numbers"):
        difference_table(load_results(results.tracking_uri, results.experiment, labels_of("lgcd")), comparison)


def test_table_3_lays_published_ablations_below_measured_ones(results: Results) -> None:
    table = ablation_table(results)
    shown = table.cells
    assert list(shown.columns) == [
        "Task",
        "Overlap ratio",
        "Protocol",
        "Validation",
        "w/o diffusion",
        "w/o moe",
        "full",
    ]
    assert shown["Validation"].tolist()[:6] == [
        "HR@5", "HR@5 (printed, test)", "NDCG@5", "NDCG@5 (printed, test)", "HR@5", "NDCG@5",
    ]  # fmt: skip
    assert shown.iloc[1].tolist()[3:] == ["HR@5 (printed, test)", "0.2747", "0.2575", "0.3093"]
    assert shown.iloc[3]["full"] == "0.2140"
    frame = table.frame.set_index(["cell", "protocol", "metric", "variant"])["mean"]
    assert frame["kitchen->food@1", "as-given", "printed_ndcg5", "wo_diffusion"] == 0.1368
    runs = results.finished("ablate").set_index(["cell", "name"])
    want = runs.loc[("food->kitchen@1", "wo_moe"), "metrics.val_ndcg5_inter"]
    assert frame["food->kitchen@1", "inter", "val_ndcg5", "wo_moe"] == pytest.approx(want)
    assert table.notes == ("Printed numbers are of test users, measured ones of validation users.",)


def test_table_4_is_the_full_ranking(results: Results) -> None:
    table = full_ranking_table(results)
    assert table.name == "table_4_full_ranking"
    assert table.cells["Row"].tolist()[:4] == [*BASELINES, "**LGCD**"]
    frame = per_row(60, 0.7, [0, 1, 2], 5)
    want = frame[frame["protocol"] == "as-given"]["full_hr10"].mean()
    assert table.frame.iloc[3]["test_full_hr10"] == pytest.approx(want)
    assert len(table.frame) == 4 * 4, "nothing is printed of it"
    assert "among all items" in table.caption


def test_table_1_speaks_of_interactions(results: Results) -> None:
    assert "Source interactions" in domains_table(results).cells.columns


def test_the_summary_fits_100_columns(results: Results, comparison: Comparison) -> None:
    out = io.StringIO()
    Console(file=out, width=100, color_system=None).print(summary_table(results, comparison))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 100
    assert "…" not in out.getvalue()
    assert [line.strip() for line in lines if line.startswith((" as-given", " inter"))] == [*PROTOCOLS] * 2
    assert "food → kitchen, 100%" in {line.strip() for line in lines}
    row = next(row for row in comparison.rows if row.labels.row == "lgcd")
    lgcd = next(line for line in lines if line.startswith("  LGCD")).split()
    assert lgcd[-8:] == [
        *(f"{row.test[name].value:.3f}" for name in ("hr5", "hr10", "ndcg5")),
        f"{row.test['ndcg10'].value:.3f}±{row.test['ndcg10'].half_width:.3f}", "0.240", "–", "–", "6",
    ]  # fmt: skip
    text = " ".join(out.getvalue().split())
    assert "15 printed systems were not run: GRU4Rec, DiffuRec, SASRec, FEARec," in text
    assert "The 999 negatives that the published rows were ranked among" in text


# --- selection and figures ----------------------------------------------------------------------------------------


def test_the_highest_ndcg_is_the_best_and_the_history_climbs(results: Results) -> None:
    best = best_trials(results.validation(), LGCD.selection)
    figure = history(results, "lgcd")
    for trace in figure.traces:
        assert trace.best == tuple(itertools.accumulate(trace.y, max))
        assert best["lgcd", trace.cell].value == max(trace.y)
        assert figure.edge[trace.task] > min(trace.y), "the diverged trial does not stretch the axis"
    assert figure.head.notes == ("2 trials lie beyond the axis and are drawn at its edge.",)
    for axes, task in zip(draw(figure).axes, TASKS, strict=True):
        points = np.asarray(axes.get_lines()[0].get_ydata(), dtype=float)
        assert points.min() == figure.edge[task]
        assert axes.get_ylabel() == "Validation NDCG@10\n(0 to 1, higher is better)"
    chosen = parallel(results, "lgcd", "food->kitchen@1")
    assert chosen.values[chosen.best] == max(chosen.values)
    drawn = draw(chosen).axes[0].collections[0]
    assert np.asarray(drawn.get_array())[-1] == max(chosen.values), "the best lies on top"
    assert {cell.trials for cell in importance(results, "lgcd").cells} == {6}
    low, _ = draw(curves(results, "lgcd")).axes[0].get_ylim()
    assert low >= 0.98 * curves(results, "lgcd").edge


def test_a_sweep_has_a_panel_for_each_protocol_and_the_papers_name(results: Results) -> None:
    figure = sensitivity(results, "steps")
    assert figure.head.name == "figure_3b_steps"
    assert [panel.metric for panel in figure.panels] == ["val_ndcg10_as-given", "val_ndcg10_inter"]
    assert draw(figure).axes[1].get_ylabel() == "Validation NDCG@10, inter\n(0 to 1, higher is better)"
    assert figure.head.notes == (
        "Published optimum: 100 (every task; Figure 3).",
        "Each axis shows at least the margin of the claims, 5.0% of the value at the published optimum. "
        "Compared on validation users.",
    ), "no cell of the ratio sweep is missed"
    assert figure.head.palette.ratios == (1.0,)
    (legend,) = draw(figure).legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "food → kitchen, overlap 100%", "kitchen → food, overlap 100%",
    ]  # fmt: skip
    guidance = sensitivity(results, "guidance")
    assert guidance.values == ("id", "text", "cross_attention"), "in the paper's order"
    assert set(guidance.values) == set(GUIDANCE)
    axes = draw(guidance).axes[-1]
    assert axes.get_xlabel() == "Guidance", "one ratio: the categories stand on the axis"
    assert [text.get_text() for text in axes.get_xticklabels()] == ["id", "text", "cross\nattention\n★"]


def test_figure_6_lays_the_reference_baseline_beside_the_subject_over_the_ratio(
    results: Results, tmp_path: Path
) -> None:
    figure = sensitivity(results, "overlap_ratio")
    assert figure.head.name == "figure_6_overlap_ratio"
    assert (figure.values, figure.rows) == (RATIOS, ("lgcd", "item_knn"))
    lines = figure.panels[0].lines
    assert [(line.row, line.task, line.cell) for line in lines] == [
        (row, task, "") for row in ("lgcd", "item_knn") for task in TASKS
    ]
    trials = results.finished("sweep:overlap_ratio").set_index(["cell", "row"])
    for line in lines:
        assert line.x == RATIOS
        for ratio, y in zip(line.x, line.y, strict=True):
            want = trials.loc[(f"{line.task}@{ratio:g}", line.row), "metrics.val_ndcg10_as-given"]
            assert y.value == pytest.approx(want)
            assert y.n == (1 if line.row == "item_knn" else 3)
    points = figure.points()
    assert list(points.columns) == ["metric", "row", "task", "overlap_ratio", "mean", "low", "high", "seeds"]
    assert len(points) == 2 * 2 * 2 * len(RATIOS)
    canvas = draw(figure)
    assert [axes.get_title() for axes in canvas.axes] == ["food → kitchen", "kitchen → food", "", ""]
    assert canvas.axes[2].get_xlabel() == "Overlap ratio\n(share of training overlapping users)"
    drawn = {line.get_label(): line for line in canvas.legends[0].get_lines()}
    assert list(drawn) == ["LGCD", "item_knn"]
    assert [line.get_linestyle() for line in drawn.values()] == ["-", "--"]
    assert drawn["LGCD"].get_linewidth() > 2 * drawn["item_knn"].get_linewidth()
    colours = [axes.get_lines()[0].get_color() for axes in canvas.axes]
    assert colours == [COLOURS[0], COLOURS[1]] * 2, "the subject keeps its task's colour"
    assert canvas.legends[0].get_title().get_text() == "bars: 95% t intervals over 3 seeds"
    assert sorted(save(figure, tmp_path)) == ["csv", "png", "svg"]


def test_labels() -> None:
    assert LGCD.label("val_seconds") == "Validation time\n(seconds, lower is better)"
    assert LGCD.label("test_full_hr5_inter") == "Test HR@5, inter\n(0 to 1, among all items, higher is better)"
    assert LGCD.label("start_ratio") == "Start ratio λ"
    assert LGCD.label("active_experts") == "Active experts"
    assert labels_of("music").label("beta") == "Reconstruction loss weight β"
    assert labels_of("music").label("cold_ratio") == "Cold ratio\n(share of overlapping users)"


# --- report -------------------------------------------------------------------------------------------------------


def test_the_report_holds_what_the_kind_has(store: Store, tmp_path: Path) -> None:
    made = report(store.uri, store.experiment, LGCD, tmp_path)
    asked = [name for name, look in LGCD.figures.items() if look.name]
    lacking = [name for name in asked if name not in ("steps", "guidance", "overlap_ratio")]
    assert [line.partition(":")[0] for line in made.missing] == [f"sweep of {name}" for name in lacking]
    planned = replace(LGCD, parts=("search", "sweep:steps", "sweep:guidance", "sweep:predicts", "score"))
    asked_less = report(store.uri, store.experiment, planned, tmp_path / "planned")
    assert [line.partition(":")[0] for line in asked_less.missing] == ["sweep of predicts"]
    assert {path.stem for path in made.figures} == {path.stem for path in asked_less.figures}
    assert {path.stem for path in made.tables} == {
        "table_1_domains", "splits", "table_2_comparison", "table_3_ablations", "table_4_full_ranking",
        "claims", "claims_comparisons", "claims_untested", "measured_less_printed",
    }  # fmt: skip
    assert {"figure_3b_steps", "figure_4_guidance", "figure_6_overlap_ratio", "history", "learning_curves"} <= {
        path.stem for path in made.figures
    }
    text = re.sub(r'src="[^"]+"', "", made.page.read_text(encoding="utf-8"))
    assert "RMSE" not in text
    assert "cold" not in text.lower()
    assert "printed 0.2397" in text
    assert "are not published; the measured rows have their own" in text
