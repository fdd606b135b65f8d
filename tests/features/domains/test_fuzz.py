"""500 damaged files of all kinds (`tests/stress/fuzz_readers.py` tries 10,000), and what that has found."""

from __future__ import annotations

import pytest

from tests.stress.fuzz_readers import run_batch


@pytest.mark.parametrize("first", [0, 250])
def test_damaged_files_are_read_right_or_refused_in_one_line(first: int) -> None:
    result = run_batch(0, first, first + 250)
    assert result["findings"] == []
    counts = result["counts"]
    assert isinstance(counts, dict)
    assert counts["refused"] > 100
    assert counts["read"] > 40
