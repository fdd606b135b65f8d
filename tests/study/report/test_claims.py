"""Verdicts on stores that say what is true, and on stores that cannot say."""

from __future__ import annotations

import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from study.labels import Labels, labels_of
from study.papers.reader import Claim, Grid, load_paper
from study.report.claims.in_print import in_print
from study.report.claims.judge import FAILS, HOLDS, NOT_MEASURED, UNDECIDED, Judged, counts, judge, unread
from study.report.claims.tables import claims_table, contrasts_table
from study.report.statistics import pooled_spread
from study.tracking.results import MissingError, load_results

from ..sequences_store import LGCD, per_row, sequences_store
from ..store import CONFIG, Store, empty_store, pooled, with_seeds

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")
TASK, RATIOS = "books->movies", (0.2, 0.8)
AMAZON = labels_of("music", "music/amazon")


def rows(users: int, sigma: float, seeds: range, draw: int = 3) -> pd.DataFrame:
    """Users' rows whose RMSE is about `sigma`; two sigmas give the same draws, scaled."""
    rng = np.random.default_rng(draw)
    frames = []
    for seed in seeds:
        error = rng.normal(0, sigma, (users, 10)) * rng.normal(1, 0.02)
        squared = np.square(error).sum(axis=1)
        frames.append(
            pd.DataFrame(
                {
                    "seed": seed, "user": range(users), "n": 10, "sum_abs_error": np.abs(error).sum(axis=1),
                    "sum_squared_error": squared, "ndcg20": 0.9,
                }
            )
        )  # fmt: skip
    return pd.concat(frames, ignore_index=True)


def add(store: Store, part: str, ratio: float, name: str, sigma: float, *, seeds: int = 3, draw: int = 3) -> str:
    """A trial of a part whose validation rows are those of `sigma`."""
    frame = rows(200, sigma, range(seeds), draw)
    per_seed = [pooled(of_seed)["test_rmse"] for _, of_seed in frame.groupby("seed")]
    metrics = with_seeds({"val_rmse": per_seed, "val_mae": [0.8 * value for value in per_seed]})
    field, _, value = name.partition("=")
    config = {**CONFIG, field: value} if value else CONFIG
    artifacts = {"val_per_user.csv": frame.to_csv(index=False)}
    return store.add(part, TASK, ratio, name, metrics, config=config, variant=value or name, artifacts=artifacts)


def verdicts(store: Store, labels: Labels) -> dict[str, Judged]:
    return {each.claim.name: each for each in judge(load_results(store.uri, store.experiment, labels))}


@pytest.fixture(scope="module")
def decided(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Tanh < relu < softmax in RMSE, T best at 10, and an ablation that helps instead of hurting."""
    store = empty_store(tmp_path_factory.mktemp("claims"))
    for ratio in RATIOS:
        for sigma, activation in ((0.90, "tanh"), (0.93 + 0.05 * ratio, "relu"), (1.05, "softmax")):
            add(store, "sweep:activation", ratio, f"activation={activation}", sigma)
        for sigma, steps in ((0.99, 2), (0.94, 5), (0.90, 10), (0.95, 20), (0.99, 50)):
            add(store, "sweep:steps", ratio, f"steps={steps}", sigma)
        for sigma, name in ((0.90, "full"), (0.85, "wo_diffusion"), (0.90, "wo_side")):
            add(store, "ablate", ratio, name, sigma, draw=4 if name == "wo_side" else 3)
    return store


def test_what_is_so_holds_and_what_is_the_other_way_round_does_not(decided: Store) -> None:
    found = verdicts(decided, AMAZON)
    assert {name for name, each in found.items() if each.verdict == HOLDS} == {
        "tanh-is-best", "relu-is-worse-than-tanh", "relu-suffers-most-with-few-overlapping", "softmax-is-worst",
        "rmse-falls-then-rises-with-steps", "few-or-many-steps-are-not-best",
    }  # fmt: skip
    assert {name for name, each in found.items() if each.verdict == FAILS} == {"wo-diffusion"}
    best = found["tanh-is-best"]
    assert (best.measured, best.agreeing, len(best.contrasts)) == (4, 4, 4)
    at = best.decisive
    assert (at.better, at.worse, at.cell, at.metric) == ("tanh", "relu", f"{TASK}@0.8", "rmse")
    assert at.effect is not None
    ours, theirs = (pooled(rows(200, sigma, range(3)))["test_rmse"] for sigma in (0.90, 0.97))
    assert at.effect.value == pytest.approx(theirs - ours)
    assert (at.effect.seeds, at.effect.users, at.effect.paired) == (3, 200, True)
    worse = found["wo-diffusion"]
    assert worse.decisive.effect is not None
    assert worse.decisive.effect.interval().high < 0
    assert worse.p < 0.05


def test_an_undecided_claim_says_what_it_needs(decided: Store) -> None:
    found = verdicts(decided, AMAZON)
    side = found["wo-side"]
    assert side.verdict == UNDECIDED
    need = re.match(
        r"no number of seeds shows the published difference \((0\.\d+)\) on 200 users; needs about ", side.why
    )
    assert need is not None, side.why
    assert side.decisive.printed == pytest.approx(float(need[1]), abs=1e-4)
    assert found["moderate-steps-balance"].why.startswith("no difference at all was measured; 0 of 12 comparisons")
    assert found["wo-mllm"].why == "no finished run of wo_mllm in ablate"
    assert (found["wo-mllm"].verdict, math.isnan(found["wo-mllm"].p)) == (NOT_MEASURED, True)
    baselines = found["beats-all-baselines"]
    assert (baselines.verdict, baselines.measured) == (NOT_MEASURED, 0)
    assert "no finished run of MuSiC in score" in baselines.why


def test_the_published_difference_is_that_of_the_cell_or_the_mean_of_all(decided: Store) -> None:
    found = {(c.cell, c.metric): c for c in verdicts(decided, AMAZON)["wo-diffusion"].contrasts}
    assert found[f"{TASK}@0.2", "rmse"].printed == pytest.approx(1.0275 - 1.0136)
    assert found[f"{TASK}@0.8", "mae"].printed == pytest.approx(0.8034 - 0.7954)
    assert all(c.printed is None for c in verdicts(decided, labels_of("music"))["wo-diffusion"].contrasts)


def test_of_a_task_that_is_not_published_the_difference_is_the_mean_of_those_that_are(tmp_path: Path) -> None:
    store = empty_store(tmp_path)
    for ratio in RATIOS:
        store.add("search", "movies->books", ratio, "0000", {})
    found = verdicts(store, AMAZON)
    assert AMAZON.published is not None
    tables, tasks = AMAZON.published, ("movies->music", "books->movies", "books->music")

    def at(grid: Grid, row: str, ratio: float) -> list[float]:
        return [grid.rows[row][f"{task}@{ratio}"][0] for task in tasks]  # MAE

    at_80, at_20 = (
        np.subtract(at(tables.ablations, "wo_side", r), at(tables.ablations, "full", r)) for r in (0.8, 0.2)
    )
    side = found["side-users-help-most-with-few-overlapping"].contrasts[0]
    assert (side.cell, side.metric) == ("movies->books@0.8 less @0.2", "mae")
    assert side.printed == pytest.approx(np.mean(at_80 - at_20))
    overlap = found["more-overlap-helps"].contrasts[0]
    assert (overlap.cell, overlap.metric, overlap.better, overlap.worse) == ("movies->books", "mae", "0.2", "0.5")
    rows = tables.comparison
    assert overlap.printed == pytest.approx(np.mean(np.subtract(at(rows, "MuSiC", 0.5), at(rows, "MuSiC", 0.2))))


def test_a_lost_file_of_users_rows_decides_nothing_and_is_named(tmp_path: Path) -> None:
    store = empty_store(tmp_path)
    runs = {name: add(store, "ablate", 0.2, name, sigma) for sigma, name in ((0.9, "full"), (0.85, "wo_diffusion"))}
    judged = verdicts(store, AMAZON)
    assert judged["wo-diffusion"].verdict == FAILS
    assert unread(list(judged.values())) == []
    (tmp_path / "artifacts" / runs["wo_diffusion"] / "artifacts" / "val_per_user.csv").unlink()
    judged = verdicts(store, AMAZON)
    lost, name = judged["wo-diffusion"], f"ablate/{TASK}@0.2/music/wo_diffusion"
    assert (lost.verdict, lost.measured) == (NOT_MEASURED, 0)
    assert math.isnan(lost.p)
    assert lost.why == f"{name}: val_per_user.csv cannot be read"
    (line,) = unread(list(judged.values()))
    assert f"nothing is measured with them: {name}: val_per_user.csv; put the files back" in line
    shutil.rmtree(tmp_path / "artifacts")
    (line,) = unread(list(verdicts(store, AMAZON).values()))
    assert f"{TASK}@0.2/music/full: val_per_user.csv, {name}: val_per_user.csv; put" in line


def test_what_the_paper_prints_is_counted() -> None:
    paper = load_paper("music")
    assert paper is not None
    counted = {claim.name: in_print(claim, AMAZON) for claim in paper.claims}
    assert counted["wo-mllm"] == (17, 18), "Task 1 at 80%: RMSE 0.9432 without, 0.9570 with"
    assert counted["beats-all-baselines"] == (215, 216), "CATN's NDCG in Task 3 at 80%"
    assert counted["ndcg-falls-at-80"] == (1, 1)
    assert counted["robust-on-cold-items"] == (48, 48)
    assert counted["tanh-is-best"] is None, "a figure without numbers"


def test_failed_trials_and_missing_values_decide_nothing(tmp_path: Path) -> None:
    store = empty_store(tmp_path)
    add(store, "sweep:steps", 0.2, "steps=2", 0.99)
    add(store, "sweep:steps", 0.2, "steps=10", 0.90)
    store.add("sweep:steps", TASK, 0.2, "steps=50", {}, status="FAILED", config={**CONFIG, "steps": 50})
    found = verdicts(store, AMAZON)
    assert found["rmse-falls-then-rises-with-steps"].why == f"{TASK}@0.2: no sweep of steps with three values"
    assert found["few-or-many-steps-are-not-best"].verdict == HOLDS
    assert found["ndcg-improves-to-ten-steps"].verdict == NOT_MEASURED
    assert "no finished run of 5 in sweep:steps" in found["ndcg-improves-to-ten-steps"].why


def test_one_seed_takes_the_spread_of_other_trials_of_its_cell(tmp_path: Path) -> None:
    store = empty_store(tmp_path)
    add(store, "sweep:activation", 0.2, "activation=tanh", 0.90, seeds=1)
    add(store, "sweep:activation", 0.2, "activation=relu", 0.95, seeds=1)
    alone = verdicts(store, AMAZON)["relu-is-worse-than-tanh"]
    assert (alone.verdict, alone.p) == (UNDECIDED, 1.0)
    assert alone.why == "needs at least 2 seeds: nothing in this cell tells how seeds vary"
    add(store, "score", 0.2, "test", 0.9, seeds=5)
    found = verdicts(store, AMAZON)["relu-is-worse-than-tanh"].decisive.effect
    assert found is not None
    run = load_results(store.uri, store.experiment, AMAZON).finished("score").iloc[0]
    spread = pooled_spread([[run[f"metrics.val_rmse/seed_{seed}"] for seed in range(5)]])
    assert spread is not None
    assert found.seed_variance == pytest.approx(2 * spread.variance)
    assert (found.seeds, found.seed_freedom) == (1, 4)


def test_more_than_half_is_most(decided: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    paper = load_paper("music")
    assert paper is not None
    order = (("softmax", "tanh", "relu"), ("softmax", "relu"))  # true in 2 of 6 (the pair with itself: never)
    for least, verdict in (("some", HOLDS), ("most", UNDECIDED), ("all", FAILS)):
        claim = Claim(
            name=least, place="4", sentence="s", part="sweep:activation", metrics=("rmse",), order=order,
            at_least=least,  # type: ignore[arg-type]
        )  # fmt: skip
        labels = replace(AMAZON, published=None, paper=replace(paper, claims=(claim,)))
        assert verdicts(decided, labels)[least].verdict == verdict, least


def test_claims_of_other_data_sets_are_left_out_and_groups_are_those_of_the_numbers(tmp_path: Path) -> None:
    store = sequences_store(tmp_path)
    found = verdicts(store, LGCD)
    assert {each.claim.dataset for each in found.values()} == {"", "food-kitchen"}
    drop = {c.cell: c for c in found["wo-diffusion"].contrasts if c.metric == "hr5"}["kitchen->food@1"]
    assert drop.printed == pytest.approx(0.2800 - 0.2200)
    assert drop.effect is not None
    full, wo_diffusion = (per_row(20, chance, [0, 1, 2], draw=1) for chance in (0.4, 0.34))
    hits = [rows[rows["protocol"] == "as-given"]["hr5"].mean() for rows in (full, wo_diffusion)]
    assert drop.effect.value == pytest.approx(hits[0] - hits[1])
    assert drop.effect.users == 20
    assert counts([]) == "0 hold, 0 do not hold, 0 undecided, 0 not measured"
    assert {name for name in verdicts(store, labels_of("lgcd")) if "food-kitchen" in name} == set()


def test_the_tables_hold_every_claim_and_every_comparison(decided: Store) -> None:
    results = load_results(decided.uri, decided.experiment, AMAZON)
    judged = judge(results)
    table, behind = claims_table(results, judged), contrasts_table(results, judged)
    assert table.caption == f"Claims of MuSiC (arXiv 2507.04000): {counts(judged)} — simulated data"
    assert any("full model and the value that the search chose are favoured" in note for note in table.notes)
    assert counts(judged) == "6 hold, 1 does not hold, 4 undecided, 12 not measured"
    frame = table.frame.set_index("claim")
    line = frame.loc["tanh-is-best"]
    assert (line["verdict"], line["seeds"], line["users"], line["measured"]) == (HOLDS, 3, 200, 4)
    assert line["low"] < line["effect"] < line["high"]
    assert len(behind.frame) == sum(len(each.contrasts) for each in judged)
    shown = table.cells.set_index(table.cells["Claim"].str.partition("\n")[0])
    text = shown.loc["tanh is best"]
    assert text["Claim"].split("\n")[1].startswith("The tanh activation function consistently outperforms")
    assert text["Verdict"] == "**holds**"
    assert re.fullmatch(r"\+0\.0\d+\n\[.*\]\ntanh over relu\nbooks → movies@0.8, rmse", text["Effect [95%]"])
    assert shown.loc["w/o mllm"]["Published"].endswith("\n17 of 18 agree")
    with pytest.raises(MissingError, match="claims: no paper of MuSiC has any about these domains"):
        claims_table(results, [])
