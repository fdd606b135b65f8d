"""Figures, by their numbers; the drawing once, by its bytes and by what stands on the axes."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.cbook import STEP_LOOKUP_MAP

from study.report.claims.margins import mean_improvement
from study.report.drawing import COLOURS, draw, save
from study.report.figures import Sensitivity, Tradeoff
from study.report.figures.common import Head, Palette, value_text
from study.report.figures.search import curves, history, importance, parallel
from study.report.figures.sensitivity import sensitivity
from study.report.figures.tradeoffs import Cloud, cost, pareto
from study.report.statistics import seed_interval
from study.tracking import tags
from study.tracking.results import MissingError, Results, load_results

from ..store import ACTIVATIONS, CELLS, CONFIG, MUSIC, STEPS, empty_store, fill_search, rival, with_rivals, with_seeds

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


def test_figure_3_holds_rmse_and_ndcg_over_steps_with_t_intervals_over_seeds(results: Results) -> None:
    figure = sensitivity(results, "steps")
    assert [panel.metric for panel in figure.panels] == ["val_rmse", "val_ndcg20"]
    assert figure.values == (2.0, 5.0, 10.0, 20.0, 50.0)
    assert (figure.numeric, figure.log) == (True, True)
    rows = results.finished("sweep:steps").set_index(["cell", "variant"])
    for panel in figure.panels:
        assert [(line.row, line.cell) for line in panel.lines] == [
            ("music", f"{task}@{ratio}") for task, ratio in CELLS
        ]
        for line in panel.lines:
            assert line.x == figure.values
            for x, y in zip(line.x, line.y, strict=True):
                row = rows.loc[(line.cell, f"{x:g}")]
                want = seed_interval([row[f"metrics.{panel.metric}/seed_{seed}"] for seed in range(3)])
                assert y == want
                assert y.value == pytest.approx(row[f"metrics.{panel.metric}"])
            if panel.metric == "val_rmse":
                assert min(zip(line.y, line.x, strict=True), key=lambda point: point[0].value)[1] == 10.0
    points = figure.points()
    assert len(points) == 2 * len(CELLS) * len(STEPS)
    assert set(points["seeds"]) == {3}
    assert "simulated data" in figure.head.title
    assert figure.head.notes == (
        "Published optimum: 5 to 20 (every task; 4.4.1, Figure 3).",
        "Each axis shows at least the margin of the claims, 0.7% to 1.4% of the value at the published optimum. "
        "Compared on validation users.",
    )
    assert [(mark.tasks, mark.low, mark.high) for mark in figure.marks] == [((), 5.0, 20.0)]


def test_a_sweep_that_was_compared_on_test_users_is_drawn_on_them_with_both_presets_in_one_panel(
    tmp_path: Path,
) -> None:
    store = empty_store(tmp_path)
    for row, level in (("music", 0.9), ("music_paper", 1.0)):
        for steps in (2, 10):
            shown = {"val_rmse": [0.5], "val_ndcg20": [0.5], "test_rmse": [level + steps / 100], "test_ndcg20": [level]}
            store.add(
                "sweep:steps",
                "a->b",
                0.2,
                f"steps={steps}",
                with_seeds(shown),
                row=row,
                config={**CONFIG, "steps": steps},
            )
    labels = with_rivals(MUSIC, rival("music_paper", name="MuSiC as printed", system="MuSiC"))
    figure = sensitivity(load_results(store.uri, store.experiment, labels), "steps")
    assert [panel.metric for panel in figure.panels] == ["test_rmse", "test_ndcg20"]
    assert {line.row: [y.value for y in line.y] for line in figure.panels[0].lines} == {
        "music": pytest.approx([0.92, 1.0]), "music_paper": pytest.approx([1.02, 1.1]),
    }  # fmt: skip


def test_figure_4_holds_rmse_per_activation_in_the_papers_order(results: Results) -> None:
    figure = sensitivity(results, "activation")
    assert figure.values == ACTIVATIONS
    assert not figure.numeric
    assert [panel.metric for panel in figure.panels] == ["val_rmse"]
    for line in figure.panels[0].lines:
        means = [y.value for y in line.y]
        assert means == sorted(means)  # the store says tanh < relu < softmax


@pytest.mark.parametrize(
    ("name", "higher", "y"), [("val_mae", False, (3.0, 2.0, 1.0)), ("val_ndcg20", True, (1.0, 2.0, 3.0))]
)
def test_the_line_of_a_front_promises_only_what_a_trial_attains(name: str, higher: bool, y: tuple[float, ...]) -> None:
    x, sign = (1.0, 2.0, 4.0), -1 if higher else 1
    cloud = Cloud("a->b@0.2", "a->b", 0.2, ("0", "1", "2"), x, y, (0, 1, 2), 1)
    figure = Tradeoff(
        Head(MUSIC, "pareto", "Front", "Front.", Palette(("a->b",), (0.2,))), name, "val_rmse", higher, (cloud,)
    )
    _, line, marked = draw(figure).axes[0].get_lines()
    corners = STEP_LOOKUP_MAP[line.get_drawstyle()](*line.get_data())
    for at, promised in zip(*corners, strict=True):
        assert any(sign * x[k] <= sign * at and y[k] <= promised for k in range(3)), (at, promised)
    assert (list(marked.get_xdata()), list(marked.get_ydata())) == ([x[1]], [y[1]])


def test_a_selected_trial_without_the_cost_is_not_marked(tmp_path: Path) -> None:
    store = empty_store(tmp_path)
    store.add("search", "a->b", 0.2, "0000", {"val_rmse": 0.8})
    for number in ("0001", "0002"):
        store.add("search", "a->b", 0.2, number, {"val_rmse": 0.9, "seconds": 5.0})
    figure = cost(load_results(store.uri, store.experiment, MUSIC), "music")
    assert figure.points()[["trial", "selected"]].values.tolist() == [["0001", False], ["0002", False]]
    assert len(draw(figure).axes[0].get_lines()) == 2


def test_a_partial_sweep_names_what_is_missing_and_wide_intervals_do_not_flatten_it(tmp_path: Path) -> None:
    store = empty_store(tmp_path)
    for dropout, centre in ((0.1, 0.90), (0.3, 0.92)):
        metrics = with_seeds({"val_rmse": [centre - 0.05, centre + 0.05], "val_ndcg20": [0.9]})
        config = {**CONFIG, "dropout": dropout}
        store.add("sweep:dropout", "a->b", 0.2, f"dropout={dropout}", metrics, config=config)
    store.add("sweep:dropout", "a->b", 0.8, "dropout=0.1", with_seeds({"val_rmse": [0.91]}), config=CONFIG)
    figure = sensitivity(load_results(store.uri, store.experiment, MUSIC), "dropout")
    assert figure.head.name == "sensitivity_dropout"
    assert (figure.numeric, figure.log) == (True, False)
    assert figure.head.notes[0] == "a->b@0.8: dropout = 0.3 missing."
    assert "cut at its edge" in figure.head.notes[1]
    rmse = figure.panels[0]
    assert rmse.lines[0].y[0].low < 0.3  # t(1) = 12.7 half-spreads
    assert 0.87 < rmse.low < 0.9
    assert 0.92 < rmse.high < 0.95
    assert math.isnan(rmse.lines[1].y[0].low)


def test_importance_is_optunas_on_the_logged_trials(results: Results) -> None:
    figure = importance(results, "music")
    assert figure.parameters[0] == "lr"  # the store's RMSE is a line in log lr
    assert set(figure.parameters) == {"lr", "steps", "dropout", "activation"}
    for cell in figure.cells:
        assert cell.trials == 12
        assert sum(cell.shares.values()) == pytest.approx(1)
    by_hand = [np.mean([cell.shares[name] for cell in figure.cells]) for name in figure.parameters]
    assert list(figure.means) == pytest.approx(by_hand)
    assert importance(results, "music") == figure


def test_importance_needs_trials(tmp_path: Path) -> None:
    store = empty_store(tmp_path)
    fill_search(store, trials=4)
    with pytest.raises(MissingError, match="no cell has 5 finished search trials that differ"):
        importance(load_results(store.uri, store.experiment, MUSIC), "music")


def test_history_is_the_running_best_and_counts_the_failed(results: Results) -> None:
    figure = history(results, "music")
    assert [trace.cell for trace in figure.traces] == [f"{task}@{ratio}" for task, ratio in CELLS]
    rows = results.finished("search").sort_values("name")
    for trace in figure.traces:
        values = rows.loc[rows["cell"] == trace.cell, "metrics.val_rmse"].tolist()
        assert trace.x == tuple(range(12))
        assert trace.y == tuple(values)
        assert trace.best == tuple(min(values[: k + 1]) for k in range(12))
    assert figure.head.notes == ("1 search trials that have no value are not shown.",)


def test_history_keeps_diverged_trials_from_stretching_the_axis(tmp_path: Path) -> None:
    store = empty_store(tmp_path)
    for k, value in enumerate((0.9, 0.95, 1.0, 40.0)):
        store.add("search", "a->b", 0.2, f"{k:04d}", with_seeds({"val_rmse": [value]}))
    figure = history(load_results(store.uri, store.experiment, MUSIC), "music")
    assert figure.edge["a->b"] == pytest.approx(1.0 + 4 * 0.1)
    assert figure.head.notes == ("1 trials lie beyond the axis and are drawn at its edge.",)
    assert figure.points()["val_rmse"].max() == 40.0


def test_history_shows_what_was_stopped_at_its_last_epoch_and_has_room_for_what_failed(tmp_path: Path) -> None:
    """A study whose pruner stops all trials but the first had a figure of one point."""
    store = empty_store(tmp_path)
    store.add("search", "a->b", 0.2, "0000", with_seeds({"val_rmse": [0.9]}))
    store.add(
        "search", "a->b", 0.2, "0001", {}, status="KILLED", tags={tags.PRUNED: "x"}, epochs={"val_rmse": [1.3, 1.1]}
    )
    store.add("search", "a->b", 0.2, "0002", {}, status="FAILED")
    figure = history(load_results(store.uri, store.experiment, MUSIC), "music")
    (trace,) = figure.traces
    assert (trace.x, trace.y, trace.best, trace.stopped) == ((0,), (0.9,), (0.9,), ((1, 1.1),))
    assert figure.head.notes == ("1 search trials that have no value are not shown.",)
    (axes,) = draw(figure).axes
    assert axes.get_xlim() == (-0.5, 2.5)
    crosses = [line for line in axes.lines if line.get_marker() == "x"]
    assert [line.get_xydata().tolist() for line in crosses] == [[[1.0, 1.1]]]
    points = figure.points()[["trial", "val_rmse", "best_so_far", "stopped"]].to_dict("records")
    assert points[0] == {"trial": 0, "val_rmse": 0.9, "best_so_far": 0.9, "stopped": False}
    assert {name: points[1][name] for name in ("trial", "val_rmse", "stopped")} == {
        "trial": 1, "val_rmse": 1.1, "stopped": True,
    }  # fmt: skip


def test_one_trial_is_no_figure(tmp_path: Path) -> None:
    store = empty_store(tmp_path)
    store.add("search", "a->b", 0.2, "0000", {"val_rmse": 0.9, "val_ndcg20": 0.7, "seconds": 3.0})
    results = load_results(store.uri, store.experiment, MUSIC)
    with pytest.raises(MissingError, match="optimisation history of MuSiC: no cell has two search trials with a value"):
        history(results, "music")
    for figure in (pareto, cost):
        with pytest.raises(MissingError, match="no cell has two finished search trials"):
            figure(results, "music")


def test_learning_curves_are_those_of_the_selected_trials(results: Results) -> None:
    figure = curves(results, "music")
    best = results.finished("search").query("best").set_index("cell")
    for trace in figure.traces:
        final = best.loc[trace.cell, "metrics.val_rmse"]
        assert trace.x == tuple(range(15))
        assert trace.y == pytest.approx([final + 0.5 * math.exp(-epoch / 3) for epoch in range(15)])


def test_parallel_coordinates_place_every_trial(results: Results) -> None:
    cell = "books->movies@0.5"
    figure = parallel(results, "music", cell)
    assert figure.head.name == "parallel_books-movies_0.5"
    assert [(axis.name, axis.log) for axis in figure.axes] == [
        ("activation", False),
        ("dropout", False),
        ("lr", True),
        ("steps", True),
    ]
    every = results.finished("search")
    rates = every["params.lr"].astype(float)
    row = every[(every["cell"] == cell) & (every["name"] == "0003")].iloc[0]
    at = figure.positions[figure.trials.index("0003")]
    want = math.log(float(row["params.lr"]) / rates.min()) / math.log(rates.max() / rates.min())
    assert at[2] == pytest.approx(want)
    assert at[0] == ACTIVATIONS.index(row["params.activation"]) / 2
    assert figure.values[figure.best] == min(figure.values)
    assert figure.axes[3].ticks[0] == (0.0, "2")
    with pytest.raises(MissingError, match=r"parallel coordinates of x->y@0\.1: no finished search"):
        parallel(results, "music", "x->y@0.1")


def test_a_store_without_the_part_is_missing_not_wrong(tmp_path: Path) -> None:
    empty = empty_store(tmp_path)
    results = load_results(empty.uri, empty.experiment, MUSIC)
    with pytest.raises(MissingError, match="no finished run of part sweep:steps; run `study sweep`"):
        sensitivity(results, "steps")
    for make in (importance, history):
        with pytest.raises(MissingError, match="search of MuSiC: no finished trial with val_rmse; run `study search`"):
            make(results, "music")
    with pytest.raises(MissingError, match="no selected trial logged epoch/val_rmse"):
        curves(results, "music")


def test_short_values() -> None:
    assert [value_text(v) for v in (50.0, 0.4, 1e-5, 0.00025, 0.0, "tanh")] == [
        "50",
        "0.4",
        "1e-5",
        "2.5e-4",
        "0",
        "tanh",
    ]


def test_files_are_the_same_each_time_and_their_points_are_the_figures(results: Results, tmp_path: Path) -> None:
    figure = sensitivity(results, "steps")
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        assert sorted(save(figure, folder)) == ["csv", "png", "svg"]
    for ending in ("png", "svg", "csv"):
        one, two = ((folder / f"figure_3_steps.{ending}").read_bytes() for folder in folders)
        assert one == two
    read = pd.read_csv(folders[0] / "figure_3_steps.csv")
    pd.testing.assert_frame_equal(read, figure.points(), check_dtype=False, rtol=1e-12)


def test_axes_have_units_tasks_keep_their_colour_and_legends_stand_outside(results: Results) -> None:
    canvas = draw(sensitivity(results, "steps"))
    left, right = canvas.axes
    assert left.get_xlabel() == "Diffusion steps T"
    assert left.get_ylabel() == "Validation RMSE\n(rating points, lower is better)"
    assert right.get_ylabel() == "Validation NDCG@20\n(0 to 1, higher is better)"
    drawn = {line.get_label(): line.get_color() for line in canvas.legends[0].get_lines()}
    assert drawn == {
        f"{task.replace('->', ' → ')}, cold {ratio:.0%}": COLOURS[["books->movies", "movies->books"].index(task)]
        for task, ratio in CELLS
    }
    assert not left.get_legend()
    curve = draw(curves(results, "music"))
    assert [line.get_color() for line in curve.axes[0].get_lines()] == [COLOURS[0]] * 2 + [COLOURS[1]] * 2
    assert curve.axes[0].get_xlabel() == "Epoch"


def test_every_figure_draws_without_overlapping_text(results: Results) -> None:
    figures = [
        sensitivity(results, "activation"),
        importance(results, "music"),
        history(results, "music"),
        parallel(results, "music", "movies->books@0.2"),
    ]
    for figure in figures:
        canvas = draw(figure)
        canvas.draw_without_rendering()
        boxes = [axes.xaxis.label.get_window_extent() for axes in canvas.axes if axes.get_xlabel()]
        boxes += [
            text.get_window_extent() for axes in canvas.axes for text in axes.get_xticklabels() if text.get_text()
        ]
        boxes += [legend.get_window_extent() for legend in canvas.legends]
        for one, two in itertools.combinations(boxes, 2):
            assert not one.overlaps(two), figure.head.name
        assert (
            not isinstance(figure, Sensitivity)
            or canvas.axes[0].get_xlabel() == "Cold ratio\n(share of overlapping users)"
        )


def test_the_smallest_study_draws(tmp_path: Path) -> None:
    """One cell, one seed, one value or trial: no interval, no span, no warning."""
    store = empty_store(tmp_path)
    only = with_seeds({"val_rmse": [0.9], "val_ndcg20": [0.9]})
    for parameter in ("steps", "activation"):
        store.add(f"sweep:{parameter}", "a->b", 0.2, f"{parameter}={CONFIG[parameter]}", only)
    store.add("search", "a->b", 0.2, "0000", only, epochs={"val_rmse": [0.9]})
    store.add("search", "a->b", 0.2, "0001", only, config={**CONFIG, "lr": 0.0001})
    results = load_results(store.uri, store.experiment, MUSIC)
    made = [
        sensitivity(results, "steps"),
        sensitivity(results, "activation"),
        history(results, "music"),
        curves(results, "music"),
    ]
    for figure in [*made, parallel(results, "music", "a->b@0.2")]:
        save(figure, tmp_path)
        assert (tmp_path / f"{figure.head.name}.png").stat().st_size > 5_000
    assert draw(made[0]).legends[0].get_title().get_text().startswith("one seed: no intervals · ")


def test_a_curve_that_is_flat_within_the_margin_looks_flat(tmp_path: Path) -> None:
    store = empty_store(tmp_path)
    for steps, worse in ((2, 0.0004), (10, 0.0), (50, 0.0001)):
        values = with_seeds({"test_rmse": [0.93 + worse] * 3, "val_rmse": [0.93] * 3})
        store.add("sweep:steps", "a->b", 0.5, f"steps={steps}", values, config={**CONFIG, "steps": steps})
    figure = sensitivity(load_results(store.uri, store.experiment, MUSIC), "steps")
    (panel,) = figure.panels
    (line,) = panel.lines
    assert line.margin > 0.004
    assert panel.low <= line.reference - line.margin
    assert panel.high >= line.reference + line.margin
    assert re.search(r"Each axis shows at least the margin of the claims, \d\.\d% of the value", figure.head.notes[-1])
    (axes,) = draw(figure).axes
    assert all("e-" not in text.get_text() for text in axes.get_yticklabels())
    assert axes.yaxis.get_offset_text().get_text() == ""


def test_curves_of_two_presets_stand_in_one_panel_in_percent_of_their_own_value(tmp_path: Path) -> None:
    store = empty_store(tmp_path)
    for row, level in (("music", 0.93), ("music_paper", 0.97)):
        for steps, worse in ((2, 0.02), (10, 0.0), (50, 0.01)):
            values = {"test_rmse": [level + worse, level + worse], "val_rmse": [2.0, 2.0]}
            config = {**CONFIG, "steps": steps}
            store.add("sweep:steps", "a->b", 0.5, f"steps={steps}", with_seeds(values), row=row, config=config)
    paper = replace(MUSIC.subject, row="music_paper", preset="paper", name="MuSiC as printed")
    labels = replace(MUSIC, rows={"music": MUSIC.subject, "music_paper": paper})
    figure = sensitivity(load_results(store.uri, store.experiment, labels), "steps")
    (panel,) = figure.panels
    assert (panel.metric, figure.presets) == ("test_rmse", ("music", "music_paper"))
    assert [line.reference for line in panel.lines] == pytest.approx([0.93, 0.97])
    share = mean_improvement(labels, "rmse", {"a->b"})
    assert share is not None
    assert [line.margin for line in panel.lines] == pytest.approx([0.93 * share / 2, 0.97 * share / 2])
    assert figure.head.notes[-1].endswith("of the value at the published optimum. Compared on test users.")
    canvas = draw(figure)
    (axes,) = canvas.axes
    curves = [line.get_ydata() for line in axes.get_lines() if len(line.get_xdata()) == 3]
    assert curves[1] == pytest.approx([100 * 0.02 / 0.97, 0.0, 100 * 0.01 / 0.97])
    (legend,) = canvas.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "ours: MuSiC (0.930)", "paper: MuSiC as printed (0.970)",
    ]  # fmt: skip
    assert legend._ncols == 2
    long = replace(paper, row="music_long", name="MuSiC as printed " * 6)
    store.add("sweep:steps", "a->b", 0.5, "steps=2", with_seeds({"test_rmse": [0.9] * 2, "val_rmse": [2.0] * 2}),
              row="music_long", config={**CONFIG, "steps": 2})  # fmt: skip
    labels = replace(labels, rows={**labels.rows, "music_long": long})
    canvas = draw(sensitivity(load_results(store.uri, store.experiment, labels), "steps"))
    (legend,) = canvas.legends
    assert legend._ncols == 1, "what is too wide stands in fewer columns"
