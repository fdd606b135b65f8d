"""Tables, figures and report of a study of sequences, by their numbers: protocols, directions, published rows."""

from __future__ import annotations

import io
import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from study.report.figures.figures import curves, history, importance, parallel, sensitivity

from study.labels import labels_of
from study.report.comparison import Comparison, compare
from study.report.drawing import draw, save
from study.report.report import report
from study.report.tables import (
    ablation_table,
    comparison_table,
    difference_table,
    domains_table,
    full_ranking_table,
    published_table,
    summary_table,
)
from study.selection import best_per_cell
from study.tracking.results import MissingError, Results, load_results

from ..sequences_store import GUIDANCE, LGCD, PROTOCOLS, RATIOS, TASKS, per_row, sequences_store
from ..store import Store

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")
ROWS = ["popularity", "item_knn", "item_knn_title", "lgcd"]


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


def test_table_2_has_every_row_under_each_protocol_and_the_published_one_as_given(comparison: Comparison) -> None:
    names = [(row.cell, row.group, row.name) for row in comparison.rows]
    assert names == [
        (f"{task}@1", protocol, name)
        for task in TASKS
        for protocol in PROTOCOLS
        for name in (*ROWS, *(["LGCD, published"] if protocol == "as-given" else []))
    ]
    assert comparison.notes == (LGCD.published.paper.note,) if LGCD.published else False
    assert comparison.best == {(f"{task}@1", protocol, "lgcd") for task in TASKS for protocol in PROTOCOLS}
    frame, base = per_row(60, 0.7, [0, 1, 2], 5), per_row(60, 0.3, [-1], 1)
    for row in comparison.rows[:9]:
        if row.name != "lgcd":
            continue
        ours, theirs = (rows[rows["protocol"] == row.group]["ndcg10"].mean() for rows in (frame, base))
        assert row.test["ndcg10"].value == pytest.approx(ours)
        assert row.test["ndcg10"].low < ours < row.test["ndcg10"].high
        assert row.difference is not None
        assert row.difference["ndcg10"].value == pytest.approx(ours - theirs)
        assert row.difference["ndcg10"].low > 0
        assert (row.seeds, row.users, row.size) == (3, 60, 60)


def test_the_published_row_is_the_target_domains_as_printed(comparison: Comparison) -> None:
    printed = {row.task: row for row in comparison.rows if row.seeds == 0}
    for task, values in (
        ("kitchen->food", [0.2800, 0.4000, 0.1805, 0.2190]),
        ("food->kitchen", [0.3093, 0.3893, 0.2214, 0.2397]),
    ):
        row = printed[task]
        assert [row.test[metric].value for metric in ("hr5", "hr10", "ndcg5", "ndcg10")] == values
        assert all(math.isnan(interval.low) for interval in row.test.values())
        assert (row.validation, row.difference) == ({}, None)


def test_table_2_is_written_with_protocols_directions_and_four_digits(comparison: Comparison, results: Results) -> None:
    table = comparison_table(comparison, results)
    assert table.caption.startswith("Table 2. Test users: HR@5, HR@10, NDCG@5, NDCG@10 (0 to 1, higher is better)")
    line = table.shown.iloc[4]
    assert (line["Overlap ratio"], line["Protocol"], line["Row"]) == ("100%", "as-given", "LGCD, published")
    assert (line["Test HR@5"], line["Test NDCG@10"]) == ("0.3093", "0.2397")
    assert (line["Val. NDCG@10"], line["Test NDCG@10 minus item_knn"]) == ("–", "–")
    assert table.shown.iloc[3]["Row"] == "**lgcd**"
    assert {"protocol", "interactions", "minus_item_knn_hr5_low"} <= set(table.frame.columns)
    assert len(table.frame) == 18


def test_the_published_table_has_all_its_rows_and_ours_as_given(comparison: Comparison, results: Results) -> None:
    table = published_table(results, comparison)
    assert table.frame["source"].tolist() == ["published"] * 16 + ["measured"] * 4
    assert table.frame["row"].tolist()[-5:] == ["LGCD", *ROWS]
    sasrec = table.frame.set_index("row").loc["SASRec"]
    names = [f"kitchen->food@1_{metric}" for metric in ("hr5", "hr10", "ndcg5", "ndcg10")]
    assert [sasrec[name] for name in names] == [0.17, 0.29, 0.1187, 0.1509]
    ours = next(row for row in comparison.rows if (row.task, row.name) == ("kitchen->food", "lgcd"))
    assert table.frame.iloc[-1]["kitchen->food@1_hr5"] == ours.test["hr5"].value
    assert table.shown.iloc[-5]["food → kitchen@1 HR@5"] == "0.3093"
    with pytest.raises(MissingError, match="the plan names none"):
        published_table(load_results(results.tracking_uri, results.experiment, labels_of("lgcd")), comparison)


def test_what_is_measured_less_what_is_published(comparison: Comparison, results: Results) -> None:
    table = difference_table(results, comparison)
    assert table.frame["cell"].tolist() == [f"{task}@1" for task in TASKS for _ in range(4)]
    ours = next(row for row in comparison.rows if (row.task, row.group, row.name) == (TASKS[0], "as-given", "lgcd"))
    line = table.frame.iloc[3]
    assert (line["metric"], line["published"]) == ("NDCG@10", 0.2397)
    assert line["difference"] == pytest.approx(ours.test["ndcg10"].value - 0.2397)
    low = ours.test["ndcg10"].low - 0.2397
    assert table.shown.iloc[3]["Difference [95%]"].startswith(f"{line['difference']:+.4f} [{low:+.4f}, ")


def test_table_3_lays_published_ablations_below_measured_ones(results: Results) -> None:
    table = ablation_table(results)
    shown = table.shown
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
        "HR@5", "HR@5 (published, test)", "NDCG@5", "NDCG@5 (published, test)", "HR@5", "NDCG@5",
    ]  # fmt: skip
    assert shown.iloc[1].tolist()[3:] == ["HR@5 (published, test)", "0.2747", "0.2575", "0.3093"]
    assert shown.iloc[3]["full"] == "0.2140"
    frame = table.frame.set_index(["cell", "protocol", "metric", "variant"])["mean"]
    assert frame["kitchen->food@1", "as-given", "published_ndcg5", "wo_diffusion"] == 0.1368
    runs = results.finished("ablate").set_index(["cell", "name"])
    want = runs.loc[("food->kitchen@1", "wo_moe"), "metrics.val_ndcg5_inter"]
    assert frame["food->kitchen@1", "inter", "val_ndcg5", "wo_moe"] == pytest.approx(want)
    assert table.notes == ("Published numbers are of test users, measured ones of validation users.",)


def test_table_4_is_the_full_ranking(results: Results) -> None:
    table = full_ranking_table(results)
    assert table.name == "table_4_full_ranking"
    assert table.shown["Row"].tolist()[:4] == [*ROWS[:3], "**lgcd**"]
    frame = per_row(60, 0.7, [0, 1, 2], 5)
    want = frame[frame["protocol"] == "as-given"]["full_hr10"].mean()
    assert table.frame.iloc[3]["test_full_hr10"] == pytest.approx(want)
    assert "among all items" in table.caption


def test_table_1_speaks_of_interactions(results: Results) -> None:
    assert "Source interactions" in domains_table(results).shown.columns


def test_the_summary_fits_80_columns(results: Results, comparison: Comparison) -> None:
    out = io.StringIO()
    Console(file=out, width=80, color_system=None).print(summary_table(results, comparison))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in out.getvalue()
    assert [line.strip() for line in lines if line.startswith((" as-given", " inter"))] == [*PROTOCOLS] * 2
    assert "food → kitchen, 100%" in {line.strip() for line in lines}
    published = next(line for line in lines if "published" in line).split()
    assert published == ["LGCD,", "published", "–", "0.309", "0.389", "0.221", "0.240"]
    assert "The 999 negatives that the published rows were ranked among" in " ".join(out.getvalue().split())


# --- selection and figures ----------------------------------------------------------------------------------------


def test_the_highest_ndcg_is_the_best_and_the_history_climbs(results: Results) -> None:
    best = best_per_cell(results.validation(), *LGCD.selection)
    figure = history(results)
    for trace in figure.traces:
        assert trace.best == tuple(itertools.accumulate(trace.y, max))
        assert best[trace.cell].value == max(trace.y)
        assert figure.edge[trace.task] > min(trace.y), "the diverged trial does not stretch the axis"
    assert figure.head.notes == ("2 trials lie beyond the axis and are drawn at its edge.",)
    for axes, task in zip(draw(figure).axes, TASKS, strict=True):
        points = np.asarray(axes.get_lines()[0].get_ydata(), dtype=float)
        assert points.min() == figure.edge[task]
        assert axes.get_ylabel() == "Validation NDCG@10\n(0 to 1, higher is better)"
    chosen = parallel(results, "food->kitchen@1")
    assert chosen.values[chosen.best] == max(chosen.values)
    drawn = draw(chosen).axes[0].collections[0]
    assert np.asarray(drawn.get_array())[-1] == max(chosen.values), "the best lies on top"
    assert {cell.trials for cell in importance(results).cells} == {6}
    low, _ = draw(curves(results)).axes[0].get_ylim()
    assert low >= 0.98 * curves(results).edge


def test_a_sweep_has_a_panel_for_each_protocol_and_the_papers_name(results: Results) -> None:
    figure = sensitivity(results, "steps")
    assert figure.head.name == "figure_3b_steps"
    assert [panel.metric for panel in figure.panels] == ["val_ndcg10_as-given", "val_ndcg10_inter"]
    assert draw(figure).axes[1].get_ylabel() == "Validation NDCG@10, inter\n(0 to 1, higher is better)"
    assert figure.head.notes == ("Published optimum: 100 (every task; Figure 3).",), (
        "no cell of the ratio sweep is missed"
    )
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


def test_figure_6_lays_the_bar_beside_the_model_over_the_ratio(results: Results, tmp_path: Path) -> None:
    figure = sensitivity(results, "ratio")
    assert figure.head.name == "figure_6_overlap_ratio"
    assert figure.values == RATIOS
    lines = figure.panels[0].lines
    assert [(line.name, line.task) for line in lines] == [(name, t) for name in ("item_knn", "lgcd") for t in TASKS]
    rows = results.finished("sweep:ratio").set_index(["cell", "name"])
    for line in lines:
        assert line.x == RATIOS
        for ratio, y in zip(line.x, line.y, strict=True):
            name = "predictor:item_knn" if line.name == "item_knn" else f"ratio={ratio}"
            want = rows.loc[(f"{line.task}@{ratio:g}", name), "metrics.val_ndcg10_as-given"]
            assert y.value == pytest.approx(want)
            assert y.n == (1 if line.name == "item_knn" else 3)
    points = figure.points()
    assert list(points.columns) == ["metric", "row", "task", "ratio", "mean", "low", "high", "seeds"]
    assert len(points) == 2 * 2 * 2 * len(RATIOS)
    canvas = draw(figure)
    assert canvas.axes[0].get_xlabel() == "Overlap ratio\n(share of training overlapping users)"
    drawn = {line.get_label(): line.get_linestyle() for line in canvas.legends[0].get_lines()}
    assert list(drawn) == [
        f"{a} → {b}, {row}" for a, b in (t.split("->") for t in TASKS) for row in ("lgcd", "item_knn")
    ]
    assert {drawn[name] for name in drawn if name.endswith("lgcd")} == {"-"}
    assert {drawn[name] for name in drawn if name.endswith("knn")} == {"--"}
    assert canvas.legends[0].get_title().get_text() == "bars: 95% t intervals over 3 seeds"
    assert sorted(save(figure, tmp_path)) == ["csv", "png", "svg"]


def test_labels() -> None:
    assert LGCD.label("val_seconds") == "Validation time\n(seconds, lower is better)"
    assert LGCD.label("test_full_hr5_inter") == "Test HR@5, inter\n(0 to 1, among all items, higher is better)"
    assert LGCD.label("start_ratio") == "Start ratio λ"
    assert LGCD.label("active_experts") == "Active experts"
    assert labels_of("music").label("beta") == "Reconstruction loss weight β"
    assert labels_of("music").label("ratio") == "Cold ratio\n(share of overlapping users)"


# --- report -------------------------------------------------------------------------------------------------------


def test_the_report_holds_what_the_kind_has(store: Store, tmp_path: Path) -> None:
    made = report(store.uri, store.experiment, LGCD, tmp_path)
    asked = [name for name, look in LGCD.figures.items() if look.name]
    lacking = [name for name in asked if name not in ("steps", "guidance", "ratio")]
    assert [line.partition(":")[0] for line in made.missing] == [f"sweep of {name}" for name in lacking]
    assert {path.stem for path in made.tables} == {
        "table_1_domains", "splits", "table_2_comparison", "published", "table_3_ablations", "table_4_full_ranking",
        "claims", "claims_comparisons", "measured_less_published",
    }  # fmt: skip
    assert {"figure_3b_steps", "figure_4_guidance", "figure_6_overlap_ratio", "history", "learning_curves"} <= {
        path.stem for path in made.figures
    }
    text = re.sub(r'src="[^"]+"', "", made.page.read_text(encoding="utf-8"))
    assert "RMSE" not in text
    assert "cold" not in text.lower()
    assert "LGCD, published" in text
    assert "are not published; the measured rows have their own" in text
