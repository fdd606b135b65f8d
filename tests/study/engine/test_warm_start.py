"""A search that starts from the trials of another plan, row by row and cell by cell."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FrozenTrial

from features.errors import InputError
from search_spaces import Space, load_space
from study.engine.optuna_storage import close_storage, open_database, open_journal
from study.engine.optuna_study import CellStudy
from study.engine.warm_start import warm_trials
from study.specs import Recipe, RowRecipe, WarmStart

from .searches import SELECTION, SPACE, make_space, open_search, run, spec

OLD = WarmStart(plan="old")


@pytest.fixture
def space(tmp_path: Path) -> Space:
    return make_space(tmp_path)


def make_source(folder: Path, space: Space, trials: int = 8) -> None:
    """A finished search of row `music` of plan `old` in cell `a->b@0.2`, under an older identity too."""
    journal = open_journal(folder / "optuna" / "old.log")
    for identity, count in (("0", 2), ("1", trials)):
        study = open_search(folder, space, spec(seed=1), f"a->b@0.2/music/{identity}", storage=journal)
        run(study, range(count))
    study.ask(trials)  # interrupted; it is not taken


def recipe(folder: Path, space: Space, source: WarmStart, rows: tuple[str, ...] = ("music",), **fields: Any) -> Recipe:
    search = replace(spec(), warm_start=source)
    row = {"trainable": "t:r", "model": "m", "base": {}, "space": space, "search": search}
    return Recipe(**{
        "experiment": "new", "home": folder, "rows": {name: RowRecipe(**row) for name in rows},
        "selection": SELECTION, **fields,
    })  # fmt: skip


def warm(
    folder: Path, space: Space, source: WarmStart = OLD, row: str = "music",
    cells: tuple[str, ...] = ("a->b@0.2", "a->b@0.5"), **fields: Any,
) -> dict[str, list[FrozenTrial]]:  # fmt: skip
    return warm_trials(recipe(folder, space, source, **fields), row, cells)


def test_the_sampler_knows_the_trials_of_a_warm_start_and_they_are_no_trials_of_the_search(
    tmp_path: Path, space: Space
) -> None:
    make_source(tmp_path, space)
    journal = open_journal(tmp_path / "optuna" / "new.log")

    def open_warm(trials: Any) -> CellStudy:
        return open_search(tmp_path, space, spec(), "a->b@0.2/music/2", storage=journal, warm=trials)

    study = open_warm(lambda: warm(tmp_path, space)["a->b@0.2"])
    assert study.state(0) is None
    assert study.trials() == []
    drawn = run(study, range(12))
    trials = study._study.trials
    assert len(trials) == 8 + 12
    origins = [trial.user_attrs.get("warm_start") for trial in trials[6:9]]
    assert origins == ["a->b@0.2/music/1#6", "a->b@0.2/music/1#7", None]
    assert trials[8].params == drawn[0]
    assert [trial.params for trial in study.trials()] == drawn
    cold = run(open_search(tmp_path / "cold", space, spec()), range(12))
    assert drawn[:2] == cold[:2], "ten start-up trials, eight of which were known"
    assert drawn[2] != cold[2]
    (tmp_path / "optuna" / "old.log").unlink()
    again = open_warm(lambda: pytest.fail("the source is not needed a second time"))
    assert [again.ask(number) for number in range(12)] == drawn


def test_trials_outside_of_the_space_are_left_behind(tmp_path: Path, space: Space) -> None:
    make_source(tmp_path, space)
    half = make_space(tmp_path, SPACE.replace("high: 1.0}}\n  kind", "high: 0.5}}\n  kind"))
    trials = warm(tmp_path, half)
    assert trials["a->b@0.5"] == []
    assert 0 < len(trials["a->b@0.2"]) < 8
    assert all(trial.params["x"] <= 0.5 for trial in trials["a->b@0.2"])
    assert all(trial.distributions["x"].high == 0.5 for trial in trials["a->b@0.2"])
    (tmp_path / "space.yaml").write_text("v:\n  x: {FloatDistribution: {low: 0.0, high: 1.0}}\n")
    fault = r"search.warm_start: no trial of old lies in the space of row music \(e.g. a->b@0.2/music/1#0: "
    with pytest.raises(InputError, match=fault):
        warm(tmp_path, load_space(f"{tmp_path}/space.yaml/v", ["x"]))


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"source": WarmStart(plan="nowhere")}, r"search.warm_start: .*optuna/nowhere.log: no such journal; run that"),
        (
            {"source": WarmStart(plan="old", storage="space.yaml")},
            "search.warm_start: space.yaml: is not a journal of O",
        ),
        (
            {"selection": replace(SELECTION, direction="maximize")},
            "search.warm_start: old searched to minimize, this plan to maximize; start from",
        ),
        ({"cells": ("x->y@0.2",)}, r"lies in the space of row music \(it has no complete trial in x->y@0.2\)"),
        ({"row": "lgcd", "rows": ("lgcd",)}, r"old has no search of row lgcd \(it has music\); name another plan"),
    ],
)
def test_a_warm_start_from_elsewhere_is_refused(
    tmp_path: Path, space: Space, fields: dict[str, Any], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_source(tmp_path, space, trials=1)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=fault):
        warm(tmp_path, space, **fields)


def test_a_rival_that_the_other_plan_does_not_have_starts_cold(tmp_path: Path, space: Space) -> None:
    make_source(tmp_path, space)
    cold = {"a->b@0.2": [], "a->b@0.5": []}
    assert warm(tmp_path, space, row="cmf", rows=("music", "cmf")) == cold
    planned = {"search/a->b@0.2/music/0000", "search/a->b@0.2/cmf/0000"}
    assert warm(tmp_path, space, row="cmf", rows=("cmf",), planned=planned) == cold, "also when it is run alone"


def test_a_database_of_many_plans_gives_those_of_one(tmp_path: Path, space: Space) -> None:
    storage = f"sqlite:///{tmp_path}/optuna.db"
    database = open_database(storage, "search.storage")
    drawn = run(open_search(tmp_path, space, spec(), "plan/cell/music/0", storage=database), range(3))
    run(open_search(tmp_path, space, spec(seed=9), "other/cell/music/0", storage=database), range(3))
    trials = warm(tmp_path, space, WarmStart(plan="plan", storage=storage), cells=("cell",))
    assert [trial.params for trial in trials["cell"]] == drawn
    close_storage(database)
