"""What `study check` prints: all that will be done, what it takes, and nothing is done."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.table import Table

from features.errors import InputError
from study import show
from study.plan.load import load_plan
from study.show import describe

from .conftest import Finished
from .tiny import study, write_plan
from .tiny_sequences import NAMES, write_raw, write_sequences


def text(plan: Path, data: Path | None, home: Path) -> str:
    out = io.StringIO()
    console = Console(width=200, file=out)
    for part in describe(load_plan(str(plan)), data, home):
        console.print(part, soft_wrap=True)
    return out.getvalue()


def rows(shown: str) -> list[list[str]]:
    return [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in shown.splitlines() if "│" in line]


def test_everything_is_said_and_nothing_done(tmp_path: Path) -> None:
    home = tmp_path / "home"
    shown = text(write_plan(tmp_path), None, home)
    table = rows(shown)
    assert "tiny: model music, 2 cells" in shown
    assert "input: SIMULATED domains (seed 3); rating-based vectors, 4 factors" in shown
    assert ["books->movies@0.5", "books", "movies", "0.5"] in table
    assert ["search", "music", "4", "1", "4"] in table
    assert ["sweep:steps", "music", "4", "1", "4"] in table
    assert ["ablate", "music", "4", "1", "4"] in table
    assert ["score", "music", "2", "2", "4"] in table
    assert ["all", "", "", "", "16"] in table
    assert "configurations are selected by val_rmse (minimize)" in " ".join(shown.split())
    assert ["music", "16", "not known", "not known"] in table
    assert not home.exists()


def test_every_field_of_the_configuration_is_shown(tmp_path: Path) -> None:
    plan = write_plan(tmp_path)
    fields = {row[0]: row[1] for row in rows(text(plan, None, tmp_path / "home")) if len(row) == 2}
    expected = {name: str(value) for name, value in load_plan(str(plan)).subject.config.items()}
    expected |= {"steps": "2 and 5", "lr": "0.0001 to 0.01, log"}
    assert expected.items() <= fields.items()


def test_the_size_of_a_grid_is_told(tmp_path: Path) -> None:
    space = "v: {steps: {CategoricalDistribution: {choices: [2, 5]}}, epochs: {IntDistribution: {low: 1, high: 3}}}"
    shown = text(write_plan(tmp_path, space_file=space), None, tmp_path / "home")
    assert "The space of music holds 6 configurations; each cell tries 2 of them." in shown


def test_given_files_are_looked_for(tmp_path: Path, raw: Path) -> None:
    plan = write_plan(tmp_path, drop=("simulate",))
    assert f"input: {raw} (SIMULATED); rating-based" in text(plan, raw, tmp_path / "home")
    with pytest.raises(InputError, match=r"books\.jsonl\.gz: no such file; put it there, or name its folder"):
        text(plan, tmp_path, tmp_path / "home")


def test_brackets_in_a_folder_are_no_markup(tmp_path: Path, raw: Path) -> None:
    folder = tmp_path / "[bold]"
    folder.symlink_to(raw)
    shown = text(write_plan(tmp_path, drop=("simulate",)), folder, tmp_path / "[home]")
    assert f"input: {folder} (SIMULATED)" in shown
    assert "[home]" in "".join(shown.split())


def test_time_is_told_from_what_has_run(finished: Finished, tmp_path: Path) -> None:
    (cost,) = (row for row in rows(text(finished.plan, None, finished.home)) if row[0] == "music")
    assert (cost[1], cost[3]) == ("0", "0.0")
    assert float(cost[2]) > 0
    compare = {"emcdr": {"space": "emcdr/paper"}}
    larger = write_plan(tmp_path, search__trials=5, score__seeds=[0, 1, 2], compare=compare)
    table = {row[0]: row[1:] for row in rows(text(larger, None, finished.home)) if len(row) == 4}
    assert table["music"][:2] == ["6", cost[2]]
    assert table["emcdr"] == ["16", "not known", "not known"]


def test_time_on_a_gpu_is_told_from_trainings_on_one(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = write_plan(tmp_path, search__trials=5, resources={"cpus": 1, "gpus": 0.25})
    monkeypatch.setattr(show, "usable_cores", lambda: 8)
    shown = text(shared, None, finished.home)
    assert [row[2:] for row in rows(shown) if row[0] == "music" and len(row) == 4] == [["not known", "not known"]]
    assert "this machine has no GPU for them (see --cluster)" in " ".join(shown.split())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    line = " ".join(text(shared, None, finished.home).split())
    assert "4 side by side; seconds are means over the model's trainings on a GPU in" in line
    monkeypatch.setattr(show, "_training_seconds", lambda plan, home: {"music": 60.0})
    table = rows(text(shared, None, finished.home))
    (cost,) = (row for row in table if row[0] == "music" and len(row) == 4)
    assert (cost[1], cost[3]) == ("6", "1.5")  # six trainings of a minute, four at a time
    parts = describe(load_plan(str(shared)), None, finished.home, side_by_side=9)
    assert any("9 side by side" in str(part.caption) for part in parts if isinstance(part, Table))


def test_seeds_of_the_search_are_told_where_a_part_starts_from_its_best(tmp_path: Path) -> None:
    home, line = tmp_path / "home", "seeds: sweeps.steps, ablate train seeds of the search again, from the best that it"
    assert line in text(write_plan(tmp_path), None, home)
    one = write_plan(tmp_path, sweeps__steps__seeds=[1, 2], ablate__seeds=[0, 1])
    assert "seeds: ablate train seeds of the search again" in text(one, None, home)
    for changes in ({"ablate__seeds": [1]}, {"ablate__start": "base"}):
        none = write_plan(tmp_path, sweeps__steps__seeds=[1, 2], **changes)
        assert "seeds of the search" not in text(none, None, home)


def test_the_command_prints_it(tmp_path: Path) -> None:
    ran = study("check", write_plan(tmp_path), "--home", tmp_path / "home")
    assert (ran.code, ran.err) == (0, "")
    assert "books->movies@0.2" in ran.out


# --- sequences ----------------------------------------------------------------------------------------------------


def test_a_plan_of_sequences_says_what_there_is_and_what_language_models_have_to_do(tmp_path: Path) -> None:
    raw, home = write_raw(tmp_path / "raw"), tmp_path / "home"
    plan = write_sequences(tmp_path, features__pseudo={"texts": 5})
    shown = text(plan, raw, home)
    table = rows(shown)
    assert f"input: {raw}; text vectors by {tmp_path}/bert; pseudo-items by local" in shown
    assert ["film", "70", "48", "309", "48"] in table
    assert ["song->film@1", "song", "film", "1"] in table
    assert "overlap ratio" in shown
    # 20 users of one domain; at overlap ratio 0.5 the link of 22 of 44 training users is cut in two
    assert "420 texts to generate, 5 for each user of one domain: film-song@1 20, film-song@0.5 64" in shown
    assert ["sweep:overlap_ratio", "lgcd", "4", "2", "8"] in table
    assert "configurations are selected by val_ndcg10 (maximize)" in " ".join(shown.split())
    assert not home.exists()


def test_without_pseudo_items_no_texts_are_generated(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw")
    shown = text(write_sequences(tmp_path, features__pseudo=None, base__pseudo_items=0), raw, tmp_path / "home")
    assert "texts to generate" not in shown
    assert "pseudo-items by" not in shown


def test_the_numbers_of_a_simulation_are_known_before_it(tmp_path: Path) -> None:
    domains = {name: {"reader": "amazon2023", "interactions": f"{name}.jsonl.gz"} for name in NAMES}
    size = {"users": 70, "items": 80, "ratings": 1000}
    simulate = {"overlap": 60, "images": 0.0, "domains": dict.fromkeys(NAMES, size)}
    changes = {
        "domains": domains,
        "simulate": simulate,
        "sequences": {"negatives": 19},
        "features__pseudo": {"texts": 5},
    }
    shown = text(write_sequences(tmp_path, **changes), None, tmp_path / "home")
    assert ["film", "70", "80", "1,000", "80"] in rows(shown)
    assert "as simulated, before filters" in shown
    # 2 * 70 - 2 * 60 users of one domain; of 48 training users 24 are cut
    assert "film-song@1 20, film-song@0.5 68" in shown


def test_a_generator_that_is_not_there_is_told(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw")
    plan = write_sequences(tmp_path, features__pseudo={"model": str(tmp_path / "nowhere")})
    with pytest.raises(InputError, match="nowhere"):
        text(plan, raw, tmp_path / "home")
    (raw / "users.parquet").unlink()
    with pytest.raises(InputError, match=r"users\.parquet: no such file; put it there"):
        text(write_sequences(tmp_path), raw, tmp_path / "home")
