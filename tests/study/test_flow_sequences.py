"""A whole study of sequences through the command line: what is trained, selected, scored, reported and trained again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from study.labels import labels_of
from study.tracking.results import Results, load_results
from study.tracking.runs import connect, default_uri
from trainables.task_types import SEQUENCES

from . import tiny
from .tiny_sequences import write_raw, write_sequences

WORK = {"search": 2, "sweep:overlap_ratio": 2, "ablate": 4, "score": 5}  # trials of each part, predictors included
CELL = "film->song@1"


@dataclass(frozen=True)
class Finished:
    """The study, and the words that name it."""

    plan: Path
    home: Path
    words: tuple[object, ...]
    ran: tiny.Ran


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    import ray

    folder = tmp_path_factory.mktemp("finished")
    raw = write_raw(folder / "raw")
    changes = {
        "tasks": [["film", "song"]],
        "sweeps": {"overlap_ratio": {"values": [0.5], "seeds": [0]}},
        "compare": {
            "lgcd_paper": {
                "model": "lgcd", "preset": "paper", "title": "LGCD as printed", "search": {"trials": 0},
                "base": {"epochs": 1, "encoder_epochs": 1, "steps": 5, "negatives": 16},
            }
        },
        "ablate": {
            "variants": ["wo_moe"], "seeds": [0], "start": "base", "compare": "test", "models": ["lgcd", "lgcd_paper"]
        },
        "score": {"seeds": [0]},
    }  # fmt: skip
    plan = write_sequences(folder, **changes)
    words = (plan, "--data", raw, "--home", folder / "home")
    ray.shutdown()  # other tests start it with another working directory
    ran = tiny.study("run", *words)
    ray.shutdown()
    return Finished(plan, folder / "home", words, ran)


@pytest.fixture(scope="module")
def results(finished: Finished) -> Results:
    return load_results(default_uri(finished.home), "tiny", labels_of("lgcd"))


def test_everything_is_finished_once(finished: Finished, results: Results) -> None:
    assert (finished.ran.code, finished.ran.err) == (0, "")
    assert dict(results.trials.groupby("part").size()) == WORK
    assert set(results.trials["status"]) == {"FINISHED"}
    assert "film → song, 100%" in finished.ran.out
    assert " inter" in finished.ran.out
    status = tiny.study("status", finished.plan, "--home", finished.home)
    assert [line.split("│")[-2].strip() for line in status.out.splitlines() if "│" in line] == ["0"] * (
        len(WORK) + 4
    ), "baselines stand beside the sweep of the ratio and the scores, the preset beside ablations and scores"


def test_the_best_trial_has_the_highest_validation_ndcg(finished: Finished, results: Results) -> None:
    search = results.finished("search")
    best = search[search["best"]].iloc[0]
    assert best["metrics.val_ndcg10"] == search["metrics.val_ndcg10"].max()
    told = tiny.study("best", finished.plan, "--home", finished.home).out
    assert f"by val_ndcg10: {best['metrics.val_ndcg10']:.6g}, run {best['run_id']}" in told
    assert list(yaml.safe_load(told)["base"]) == [CELL]


def test_other_ratios_are_trained_with_it(results: Results) -> None:
    rows = results.finished("sweep:overlap_ratio").set_index("row")
    assert set(rows["name"]) == {"overlap_ratio=0.5"}
    best = results.finished("search").query("best").iloc[0]
    assert rows.loc["lgcd", "cell"] == "film->song@0.5"
    assert rows.loc["lgcd", "params.dropout"] == best["params.dropout"]
    folders = {results.config(row["run_id"])["task_dir"] for _, row in rows.iterrows()}
    assert len(folders) == 1
    assert results.config(best["run_id"])["task_dir"] not in folders
    assert rows.loc["item_knn", "metrics.val_ndcg10"] > 0


def test_only_scores_and_a_part_that_is_compared_on_them_know_the_test_users(results: Results) -> None:
    tests = [name for name in results.trials.columns if str(name).startswith("metrics.test_")]
    assert {f"metrics.test_{metric.name}_inter" for metric in (*SEQUENCES.metrics, *SEQUENCES.full)} <= set(tests)
    others = results.trials[~results.trials["part"].isin(["score", "ablate"])]
    assert others[tests].isna().all(axis=None)
    assert results.finished("score")["metrics.test_full_ndcg10"].notna().all()
    assert results.finished("ablate")["metrics.test_ndcg10_inter"].notna().all()


def test_both_presets_are_trained_and_each_is_compared_with_itself(finished: Finished, results: Results) -> None:
    runs = results.finished("ablate")
    client = connect(default_uri(finished.home))
    presets = {
        row: client.get_run(run).data.tags["study.preset"] for row, run in zip(runs["row"], runs["run_id"], strict=True)
    }
    assert presets == {"lgcd": "ours", "lgcd_paper": "paper+encoder_epochs+epochs+negatives+steps"}
    assert sorted(zip(runs["row"], runs["name"], strict=True)) == [
        (row, variant) for row in ("lgcd", "lgcd_paper") for variant in ("full", "wo_moe")
    ]
    searched = results.trials[results.trials["part"] == "search"]
    assert set(searched["row"]) == {"lgcd"}, "a row of no trials is scored with its own setting"
    table = (finished.home / "reports" / "tiny" / "tables" / "table_3_ablations.md").read_text()
    assert "Ablations on test users" in table
    assert "LGCD as printed" in table


def test_the_report_is_drawn(finished: Finished, results: Results) -> None:
    made = finished.home / "reports" / "tiny"
    tables = {path.stem for path in (made / "tables").glob("*.md")}
    assert tables == {
        "table_1_domains", "splits", "table_2_comparison", "table_3_ablations", "table_4_full_ranking", "pseudo_items",
        "claims", "claims_comparisons", "claims_untested", "cost",
    }  # fmt: skip
    assert (made / "figures" / "figure_6_overlap_ratio.png").is_file()
    assert {row["items"] for row in results.pseudo} == {"pseudo", "popular", "random", "nearest"}


def test_a_second_run_trains_nothing(finished: Finished) -> None:
    again = tiny.study("run", *finished.words)
    assert (again.code, again.err) == (0, "")
    assert "Nothing was left to train." in again.out


def test_a_logged_trial_trains_to_the_same_numbers(finished: Finished, results: Results) -> None:
    scores = results.finished("score").set_index("row")
    for name in ("lgcd", "item_knn_title"):
        ran = tiny.study("rerun", scores.loc[name, "run_id"], "--home", finished.home)
        assert (ran.code, ran.err) == (0, "")
        lines = [line.split("│") for line in ran.out.splitlines() if "│" in line]
        compared = {cells[1].strip(): cells[4].strip() for cells in lines}
        assert "test_ndcg10_as-given" in compared
        assert not [metric for metric in compared if "seconds" in metric]
        assert set(compared.values()) == {"none"}


def test_a_dry_run_says_what_language_models_have_to_do(finished: Finished) -> None:
    ran = tiny.study("extract", *finished.words, "--dry-run")
    assert (ran.code, ran.err) == (0, "")
    assert "items of film: 0 of 48 rows to encode" in ran.out
    assert "pseudo-items of film-song@0.5: 64 users to generate for" in ran.out
