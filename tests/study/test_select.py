"""Selection: the lowest validation value per cell, blind to test."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from features.errors import InputError
from study.selection import best_per_cell
from study.tracking.results import Results

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


def frame(values: list[tuple[str, str, float]]) -> pd.DataFrame:
    rows = [
        {"cell": cell, "task": "a->b", "ratio": 0.2, "run_id": f"r{name}", "name": name, "metrics.val_rmse": value}
        for cell, name, value in values
    ]
    return pd.DataFrame(rows)


def test_best_is_the_lowest_value_of_each_cell_and_ties_go_to_the_first_name() -> None:
    values = [("y", "1", 0.5), ("y", "0", 0.5), ("x", "2", 0.4), ("x", "3", 0.3), ("x", "4", 0.9)]
    chosen = best_per_cell(frame(values), "val_rmse", "minimize")
    assert [(cell, best.name, best.value, best.of) for cell, best in chosen.items()] == [
        ("x", "3", 0.3, 3),
        ("y", "0", 0.5, 2),
    ]
    highest = best_per_cell(frame([("x", "2", 0.4), ("x", "4", 0.9)]), "val_rmse", "maximize")
    assert highest["x"].name == "4"


def test_a_trial_without_a_finite_value_never_wins() -> None:
    values = [("x", "0", math.nan), ("x", "1", -math.inf), ("x", "2", 0.7), ("y", "0", math.nan)]
    chosen = best_per_cell(frame(values), "val_rmse", "minimize")
    assert {cell: (best.name, best.of) for cell, best in chosen.items()} == {"x": ("2", 1)}


def test_the_selected_trials_are_those_that_the_study_tagged(results: Results) -> None:
    chosen = best_per_cell(results.validation(), *results.labels.selection)
    tagged = results.finished("search")
    tagged = tagged[tagged["best"]]
    assert {best.run_id for best in chosen.values()} == set(tagged["run_id"])
    assert list(chosen) == sorted(tagged["cell"])


def test_selection_refuses_test_columns_and_unknown_words() -> None:
    good = frame([("x", "0", 0.5)])
    with pytest.raises(InputError, match=r"must not see test data, got metrics\.test_mae"):
        best_per_cell(good.assign(**{"metrics.test_mae": 0.1}), "val_rmse", "minimize")
    with pytest.raises(InputError, match="must not see test data, got test_rmse"):
        best_per_cell(good, "test_rmse", "minimize")
    with pytest.raises(InputError, match="no finished trial logged 'val_hr10'"):
        best_per_cell(good, "val_hr10", "maximize")
    with pytest.raises(InputError, match="minimize or maximize, is 'down'"):
        best_per_cell(good, "val_rmse", "down")
    assert best_per_cell(good.iloc[:0], "val_rmse", "minimize") == {}
