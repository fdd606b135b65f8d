"""Tables, by their numbers."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from study.labels import labels_of
from study.report.comparison import compare
from study.report.comparison_table import comparison_table, summary_table
from study.report.statistics import UserTotals, difference_over_users, effect, holm, samples
from study.report.tables import ablation_table, cold_item_table, domains_table, splits_table
from study.tracking.results import MissingError, Results, load_results
from trainables.task_types import RATINGS

from ..store import CELLS, MUSIC, Store, empty_store, per_user, pooled, rival, seeds_around, with_rivals

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


def test_table_1_counts_each_task_after_the_filters(results: Results) -> None:
    table = domains_table(results)
    row = table.frame.set_index("task").loc["movies->books"]
    assert (row["source_users"], row["source_items"], row["source_interactions"]) == (300, 100, 6000)
    assert (row["target_users"], row["target_items"], row["target_interactions"]) == (400, 100, 8000)
    assert row["overlapping_users"] == 150
    assert len(table.frame) == 2
    assert table.caption.endswith("simulated data")
    assert table.notes[0].startswith("books: 9,000 interactions read, 8,000 kept; 3 repeated user-item rows")
    cells = splits_table(results).frame
    assert cells.loc[cells["ratio"] == 0.2, "train_users"].tolist() == [120, 120]


def test_table_2_pools_test_ratings_and_pairs_the_difference(results: Results) -> None:
    comparison = compare(results)
    assert [row.name for row in comparison.rows[:4]] == ["global_mean", "item_mean", "source_offset", "MuSiC"]
    assert comparison.notes == ()
    model, base = comparison.rows[3], comparison.rows[2]
    ours, theirs = per_user(80, 0.9, [0, 1, 2], 50), per_user(80, 0.95, [-1], 2)
    assert {f"test_{k}": v.value for k, v in model.test.items()} == pytest.approx(pooled(ours), rel=1e-9)
    assert (model.users, model.seeds, model.size) == (80, 3, ours.loc[ours["seed"] == 0, "n"].sum())
    assert model.test["rmse"].low < model.test["rmse"].value < model.test["rmse"].high
    one, two = (samples(UserTotals.from_frame(rows, RATINGS.metrics))["rmse"] for rows in (ours, theirs))
    assert model.to_reference is not None
    got = model.to_reference["rmse"]
    want = difference_over_users(one, two)
    assert (got.value, got.low, got.high) == pytest.approx((want.value, want.low, want.high), rel=1e-6)
    assert got.value == pytest.approx(model.test["rmse"].value - base.test["rmse"].value)
    assert base.to_reference is None
    assert model.validation["rmse"].n == 3
    assert (model.trials, model.to_subject) == (12, None)
    assert base.to_subject is not None
    better = effect(replace(two, fixed=True), one, higher=False)  # a baseline has no seeds of its own
    ends = better.interval()
    interval = base.to_subject.interval
    assert (interval.value, interval.low, interval.high) == pytest.approx(
        (-ends.value, -ends.high, -ends.low), rel=1e-6
    )
    assert interval.low > 0, "its RMSE is higher"
    assert base.to_subject.p == pytest.approx(2 * better.tail(-1), rel=1e-6)
    others = [row.to_subject for row in comparison.rows[:3] if row.to_subject]
    assert [other.p_holm for other in others] == holm([other.p for other in others])

    table = comparison_table(comparison, results)
    assert len(table.frame) == 4 * len(CELLS)
    line = table.frame.iloc[3]
    assert line["minus_source_offset_rmse_high"] == got.high
    assert table.frame.iloc[2][["minus_subject_rmse", "minus_subject_p"]].tolist() == [
        interval.value,
        base.to_subject.p,
    ]
    shown = table.cells.iloc[3]
    assert (shown["Cell"], shown["Row"], shown["Reads"]) == (
        "books → movies, cold 20%",
        "**MuSiC**",
        "ratings, features",
    )
    half = model.test["rmse"].half_width
    assert shown["Test RMSE"] == f"{line.test_rmse:.3f}±{half:.3f}"
    assert shown["RMSE minus MuSiC"] == "–"
    value, ends_text = table.cells["RMSE minus MuSiC"].iloc[2].split("\n")
    assert value.startswith(f"{interval.value:+.3f}, p")
    assert ends_text == f"[{interval.low:+.3f}, {interval.high:+.3f}]"
    hours = (
        results.finished(row="music").query("cell == 'books->movies@0.2' and part == 'search'")["spent"].sum() / 3600
    )
    assert shown["Trials, hours"] == f"12\n{hours:.2f} h"


def test_table_2_of_a_partial_study_names_what_is_missing(tmp_path: Path) -> None:
    store = empty_store(tmp_path)
    for task, users in (("a->b", 5), ("b->a", 6)):
        frame = per_user(users, 1.0, [-1], 1)
        artifacts = {"per_user.csv": frame.to_csv(index=False)}
        store.add("score", task, 0.2, "test", {"val_rmse": 1.0}, row="source_offset", artifacts=artifacts)
    ours = {"per_user.csv": per_user(6, 1.0, [0], 1).to_csv(index=False)}
    best = store.add("score", "a->b", 0.2, "test", seeds_around(np.random.default_rng(0), 0.9), artifacts=ours)
    (tmp_path / "artifacts" / best / "artifacts" / "config.yaml").unlink()
    for cell, text in (("a->b", ""), ("b->a", ours["per_user.csv"][:-5] + "e-")):
        spoilt = {"per_user.csv": text}
        store.add("score", cell, 0.2, "test", {"val_rmse": 1.0}, row="global_mean", artifacts=spoilt)
    store.add("score", "a->b", 0.2, "test", {"val_rmse": 1.0}, row="item_mean")
    comparison = compare(load_results(store.uri, store.experiment, MUSIC))
    assert [(row.cell, row.name) for row in comparison.rows] == [
        ("a->b@0.2", "source_offset"),
        ("a->b@0.2", "MuSiC"),
        ("b->a@0.2", "source_offset"),
    ]
    assert comparison.rows[1].to_reference is None
    assert comparison.rows[0].to_subject is None
    notes = "\n".join(comparison.notes)
    assert re.search(
        r"a->b@0\.2, global_mean: run \w+: per_user.csv is no table of numbers \(No columns to parse", notes
    )
    assert re.search(r"b->a@0\.2, global_mean: run \w+: per_user.csv is no table of numbers \(could not convert", notes)
    assert "b->a@0.2: no score of item_mean." in notes
    assert "a->b@0.2, item_mean: run" in notes
    assert "a->b@0.2, MuSiC: paired difference: both rows need the same test users" in notes
    assert "b->a@0.2: no score of MuSiC." in notes


def test_table_3_compares_variants_on_validation_alone(results: Results) -> None:
    table = ablation_table(results)
    assert list(table.cells.columns) == ["Task", "Cold ratio", "Validation", "w/o diffusion", "w/o side", "full"]
    means = table.frame.query("metric == 'val_rmse'").pivot(index="cell", columns="variant", values="mean")
    assert (means["full"] < means["wo_side"]).all()
    assert (means["wo_side"] < means["wo_diffusion"]).all()
    assert set(table.frame["metric"]) == {"val_mae", "val_rmse"}
    assert set(table.frame["seeds"]) == {3}


def test_table_3_stands_on_test_users_and_shows_both_presets_where_the_part_was_compared_so(tmp_path: Path) -> None:
    store = empty_store(tmp_path)
    rng = np.random.default_rng(0)
    for row, level in (("music", 0.9), ("music_paper", 1.0)):
        for name, worse in (("full", 0.0), ("wo_side", 0.03)):
            metrics = seeds_around(rng, 0.7)
            tested = {key.replace("val_", "test_"): value + level - 0.7 + worse for key, value in metrics.items()}
            store.add("ablate", "a->b", 0.2, name, {**metrics, **tested}, row=row, variant=name)
    labels = with_rivals(MUSIC, rival("music_paper", name="MuSiC as printed", system="MuSiC"))
    table = ablation_table(load_results(store.uri, store.experiment, labels))
    assert list(table.cells.columns) == ["Task", "Cold ratio", "Row", "Test", "w/o side", "full"]
    assert table.cells["Row"].tolist() == ["MuSiC", "MuSiC", "MuSiC as printed", "MuSiC as printed"]
    assert "Ablations on test users" in table.caption
    assert set(table.frame["metric"]) == {"test_mae", "test_rmse"}
    means = table.frame.query("metric == 'test_rmse'").pivot(index="row", columns="variant", values="mean")
    assert means.loc["music"].tolist() == pytest.approx([0.9, 0.93], abs=0.02)
    assert means.loc["music_paper"].tolist() == pytest.approx([1.0, 1.03], abs=0.02)


def test_table_3_takes_the_selected_configuration_where_the_part_has_no_full_run(tmp_path: Path) -> None:
    store = empty_store(tmp_path)
    rng = np.random.default_rng(0)
    store.add("ablate", "a->b", 0.2, "wo_side", seeds_around(rng, 0.95), variant="wo_side")
    scored = seeds_around(rng, 0.9)
    store.add("score", "a->b", 0.2, "test", scored)
    frame = ablation_table(load_results(store.uri, store.experiment, MUSIC)).frame.set_index(["metric", "variant"])
    assert frame.loc[("val_rmse", "full"), "mean"] == pytest.approx(scored["val_rmse"])


def test_table_4_keeps_cells_with_cold_items(results: Results) -> None:
    table = cold_item_table(results)
    assert table.frame["row"].tolist()[:4] == ["global_mean", "item_mean", "source_offset", "music"]
    assert table.cells["Row"].iloc[3] == "MuSiC"
    assert table.frame["rmse"].tolist()[:4] == pytest.approx([1.3, 1.15, 1.05, 1.0])
    assert set(table.frame["ratings"]) == {40}


def test_files_hold_the_table(results: Results, tmp_path: Path) -> None:
    table = cold_item_table(results)
    paths = table.save(tmp_path)
    pd.testing.assert_frame_equal(pd.read_csv(paths["csv"]), table.frame, check_dtype=False)
    lines = paths["md"].read_text(encoding="utf-8").splitlines()
    assert lines[0] == "**Table 4. Dual cold start: cold users and cold items (rating points) — simulated data**"
    assert lines[2] == "| Task | Cold ratio | Row | Test ratings | MAE | RMSE |"
    assert lines[4] == "| books → movies | 20% | global_mean | 40 | 1.200 | 1.300 |"


def test_table_4_has_what_the_paper_prints(store: Store) -> None:
    results = load_results(store.uri, store.experiment, labels_of("music", "music/amazon"))
    table = cold_item_table(results)
    printed = table.frame.set_index(["cell", "row"])["printed_rmse"]
    assert printed["books->movies@0.5", "music"] == 1.1752
    assert printed.notna().sum() == 1
    assert table.cells["Printed RMSE"].tolist().count("–") == 15


def test_summary_fits_100_columns(results: Results) -> None:
    out = io.StringIO()
    Console(file=out, width=100, color_system=None).print(summary_table(results))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 100
    comparison = compare(results)
    music = next(line for line in lines if line.startswith("  MuSiC")).split()
    want = comparison.rows[3]
    assert music == [
        "MuSiC", "ratings,", f"{want.validation['rmse'].value:.3f}", f"{want.test['mae'].value:.3f}",
        f"{want.test['rmse'].value:.3f}±{want.test['rmse'].half_width:.3f}", f"{want.test['ndcg20'].value:.3f}",
        "–", "–", "12",
    ]  # fmt: skip
    base = comparison.rows[2].to_subject
    assert base is not None
    offset = next(line for line in lines if "source_offset" in line).split()
    assert offset[-3] == f"{base.interval.value:+.3f}"
    assert "…" not in out.getvalue()


def test_nothing_scored_is_missing(tmp_path: Path) -> None:
    store = empty_store(tmp_path)
    empty = load_results(store.uri, store.experiment, MUSIC)
    for make, message in (
        (domains_table, "no finished run of part data"),
        (splits_table, "no finished run of part data"),
        (compare, "no finished run of part score"),
        (ablation_table, "no finished run of part ablate"),
        (cold_item_table, "no scored run has test ratings of cold items"),
    ):
        with pytest.raises(MissingError, match=message):
            make(empty)
