"""Cells and jobs check themselves."""

from __future__ import annotations

from typing import Any

import pytest

from study.specs import Cell, Job


@pytest.mark.parametrize(
    ("field", "fault"),
    [
        ({"part": "it's"}, "job part: use letters, digits and"),
        ({"row": "my row"}, "job row: use letters, digits and"),
        ({"name": "a/b"}, "job name: use letters, digits and"),
        ({"seeds": ()}, "job search/a->b@0.2/music/x: needs at least one seed"),
        ({"score": True}, "test_dir belongs to score jobs and to them only, got None"),
        ({"test_dir": "x"}, "test_dir belongs to score jobs and to them only, got x"),
    ],
)
def test_jobs_check_themselves(field: dict[str, Any], fault: str) -> None:
    good: dict[str, Any] = {
        "part": "search", "cell": Cell(source="a", target="b", ratio=0.2), "row": "music", "model": "music", "name": "x",
        "config": {}, "seeds": (0,), "feature_set": "main", "task_dir": "task",
    }  # fmt: skip
    assert Job(**good).trial == "search/a->b@0.2/music/x"
    with pytest.raises(ValueError, match=fault):
        Job(**{**good, **field})


def test_cells_check_themselves() -> None:
    with pytest.raises(ValueError, match="cell source: use letters"):
        Cell(source="a b", target="c", ratio=0.2)
