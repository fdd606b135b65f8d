"""What two domains share, and what is questioned."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from features.domains.domain import Domain, DomainSpec, prepare_domain
from features.domains.overlap import compare_domains, writing_hint

Row = tuple[str, str, float, int]


def domain(folder: Path, name: str, rows: Sequence[Row]) -> Domain:
    text = "user_id,item_id,rating,timestamp\n" + "".join(",".join(map(str, row)) + "\n" for row in rows)
    (folder / f"{name}.csv").write_text(text)
    return prepare_domain(DomainSpec(name=name, reader="table", interactions=f"{name}.csv"), folder, folder / "store")


def test_shared_users_items_and_interactions_are_counted(tmp_path: Path) -> None:
    source = domain(tmp_path, "s", [("u", "a", 1, 10), ("u", "b", 2, 20), ("v", "a", 3, 30), ("x", "c", 3, 30)])
    target = domain(tmp_path, "t", [("u", "a", 1, 10), ("u", "b", 5, 20), ("v", "d", 3, 30), ("y", "c", 3, 30)])
    found = compare_domains(source, target)
    assert (found.users, found.smaller, found.items, found.pairs, found.verbatim, found.target_rows) == (
        2,
        3,
        3,
        2,
        1,
        3,
    )
    assert found.verbatim_share == pytest.approx(1 / 3)
    assert found.notes == (
        "s and t have 3 item ids in common, and 2 pairs of user and item; they are taken for different items: make sure "
        "that no item is in both domains",
    )


def test_renumbered_users_and_units_are_questioned(tmp_path: Path) -> None:
    source = domain(tmp_path, "s", [(str(u), f"a{u}", 3, 1405588132 + u) for u in range(30)])
    target = domain(tmp_path, "t", [(str(u), f"b{u}", 3, 1405588132000 + u) for u in range(25)])
    numbered, units = compare_domains(source, target).notes
    assert numbered.startswith("user ids of s and t are whole numbers without a gap, as numbering each file anew makes")
    assert units == "timestamps of s and t were in seconds and milliseconds; both are read as milliseconds since 1970"
    assert source.interactions()["timestamp"].min() == target.interactions()["timestamp"].min() == 1405588132000


@pytest.mark.parametrize(
    ("source", "target", "hint"),
    [
        (["7", "8"], ["7.0", "8.0"], "2 would be shared without .0 at the end (such as '7' beside '7.0')"),
        (["0007", "8"], ["7", "8"], "2 would be shared without leading zeros (such as '0007' beside '7')"),
        (["Ann", "b"], ["ann", "B"], "2 would be shared without upper and lower case (such as 'Ann' beside 'ann')"),
        ([" a", "b"], ["a", "b "], "2 would be shared without blanks around them (such as ' a' beside 'a')"),
        (['"a"', "b"], ["a", "b"], "2 would be shared without quotes around them"),
        (["a"], ["b"], "ids are 'a' ... in s and 'b' ... in t"),
    ],
)
def test_users_that_differ_only_in_writing_are_told(source: list[str], target: list[str], hint: str) -> None:
    assert hint in writing_hint(source, target, "s", "t")
