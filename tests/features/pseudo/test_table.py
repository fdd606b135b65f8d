"""The table of pseudo-interactions on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from features.errors import InputError
from features.pseudo.table import PseudoTable, open_pseudo, write_pseudo

ROWS = {
    "user_id": ["u", "v", "w"],
    "items": [["b", "a"], [], ["c"]],
    "similarity": [[0.75, 0.5], [], [0.25]],
    "texts": [["two", "one"], [], ["three"]],
    "text_rows": [[2, 0], [], [-1]],
}
VECTORS = np.arange(6, dtype=np.float16).reshape(3, 2)


def test_users_get_their_rows_back_and_unknown_ones_none(tmp_path: Path) -> None:
    table = write_pseudo(tmp_path / "pseudo", pa.table(ROWS), VECTORS, {"key": "k" * 64})
    assert table == open_pseudo(tmp_path / "pseudo", "k" * 64) == PseudoTable(tmp_path / "pseudo", "k" * 64)
    assert table.rows(["w", "?", "u", "v"]) == ([["c"], [], ["b", "a"], []], [[0.25], [], [0.75, 0.5], []])
    assert table.rows([]) == ([], [])
    assert table.text_rows(["w", "?", "u"]) == [[-1], [], [2, 0]]
    np.testing.assert_array_equal(np.load(table.vectors), VECTORS)


def test_a_table_that_is_missing_unfinished_or_of_another_key(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no finished pseudo-interactions here; run `study extract` on the plan"):
        open_pseudo(tmp_path)
    write_pseudo(tmp_path / "pseudo", pa.table(ROWS), VECTORS, {"key": "k" * 64})
    with pytest.raises(InputError, match=r"holds key k{12}, not j{12}; delete the folder and make it again"):
        open_pseudo(tmp_path / "pseudo", "j" * 64)
    (tmp_path / "pseudo" / "manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"manifest.json: not JSON .*; delete the folder and make it again"):
        open_pseudo(tmp_path / "pseudo")
