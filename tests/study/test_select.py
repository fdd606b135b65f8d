"""Selection: the best validation value of each row and cell, blind to test; and the front of several numbers."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from features.errors import InputError
from study.selection import best_trials, pareto_front
from study.tracking.results import Results
from trainables.interface import Selection

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


LOWEST, HIGHEST = (Selection("val_rmse", direction) for direction in ("minimize", "maximize"))


def frame(values: list[tuple[str, str, float]], row: str = "music") -> pd.DataFrame:
    trials = [
        {"row": row, "cell": cell, "task": "a->b", "ratio": 0.2, "run_id": f"r{name}", "name": name,
         "metrics.val_rmse": value}
        for cell, name, value in values
    ]  # fmt: skip
    return pd.DataFrame(trials)


def test_best_is_the_lowest_value_of_each_cell_and_ties_go_to_the_first_name() -> None:
    values = [("y", "1", 0.5), ("y", "0", 0.5), ("x", "2", 0.4), ("x", "3", 0.3), ("x", "4", 0.9)]
    chosen = best_trials(frame(values), LOWEST)
    assert [(*place, best.name, best.value, best.trials) for place, best in chosen.items()] == [
        ("music", "x", "3", 0.3, 3),
        ("music", "y", "0", 0.5, 2),
    ]
    highest = best_trials(frame([("x", "2", 0.4), ("x", "4", 0.9)]), HIGHEST)
    assert highest["music", "x"].name == "4"


def test_a_trial_without_a_finite_value_never_wins() -> None:
    values = [("x", "0", math.nan), ("x", "1", -math.inf), ("x", "2", 0.7), ("y", "0", math.nan)]
    chosen = best_trials(frame(values), LOWEST)
    assert {place: (best.name, best.trials) for place, best in chosen.items()} == {("music", "x"): ("2", 1)}


def test_the_selected_trials_are_those_that_the_study_tagged(results: Results) -> None:
    chosen = best_trials(results.validation(), results.labels.selection)
    tagged = results.finished("search")
    tagged = tagged[tagged["best"]]
    assert {best.run_id for best in chosen.values()} == set(tagged["run_id"])
    assert list(chosen) == [("music", cell) for cell in sorted(tagged["cell"])]


def test_each_row_of_a_cell_has_its_best() -> None:
    trials = pd.concat([frame([("x", "0", 0.5), ("x", "1", 0.4)]), frame([("x", "0", 0.6)], "emcdr")])
    chosen = best_trials(trials, LOWEST)
    assert [(*place, best.row, best.name) for place, best in chosen.items()] == [
        ("emcdr", "x", "emcdr", "0"), ("music", "x", "music", "1"),
    ]  # fmt: skip


def test_selection_refuses_test_columns_and_metrics_that_nobody_logged() -> None:
    good = frame([("x", "0", 0.5)])
    with pytest.raises(InputError, match=r"sees the test columns metrics\.test_mae; give validation metrics alone"):
        best_trials(good.assign(**{"metrics.test_mae": 0.1}), LOWEST)
    with pytest.raises(InputError, match="sees the test columns test_rmse"):
        best_trials(good, Selection("test_rmse", "minimize"))
    with pytest.raises(InputError, match="no finished trial logged 'val_hr10'"):
        best_trials(good, Selection("val_hr10", "maximize"))
    assert best_trials(good.iloc[:0], LOWEST) == {}


@pytest.mark.parametrize(
    ("values", "higher", "front"),
    [
        ([[1, 3], [2, 2], [3, 1], [2, 1], [0, 3]], [True, True], [0, 1, 2]),
        ([[1, 1], [1, 2]], [True, True], [1]),
        ([[1, 1], [1, 1]], [True, False], [0, 1]),
        ([[1, 5, 0], [2, 4, 0], [2, 5, 1]], [False, True, False], [0]),
    ],
)
def test_a_front_is_what_nothing_beats_in_all(values: list[list[float]], higher: list[bool], front: list[int]) -> None:
    assert [k for k, on in enumerate(pareto_front(values, higher)) if on] == front
