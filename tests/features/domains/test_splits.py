"""Splits that come with the data."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from features.domains.splits import read_split
from features.errors import InputError

USERS = pd.DataFrame({"user_id": ["u1", "007", "NA"], "split": ["train", "test", "valid"], "group": [1, 2, 3]})
FOOD_KITCHEN = Path(__file__).parents[3].parent / "shared" / "data" / "food-kitchen" / "users.parquet"


def save(frame: pd.DataFrame, path: Path) -> Path:
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path)
    return path


@pytest.mark.parametrize("name", ["users.csv", "users.parquet"])
def test_each_user_has_a_part_and_ids_stay_what_they_are(tmp_path: Path, name: str) -> None:
    expected = {"u1": "train", "007": "test", "NA": "valid"}
    assert read_split(save(USERS, tmp_path / name), {}) == expected
    renamed = USERS.rename(columns={"user_id": "who", "split": "part"})
    assert read_split(save(renamed, tmp_path / name), {"user_id": "who", "split": "part"}) == expected


@pytest.mark.parametrize("name", ["users.csv", "users.parquet"])
@pytest.mark.parametrize(
    ("change", "columns", "message"),
    [
        (
            {"split": ["train", "dev", "test"]},
            {},
            r"row 2: split must be one of train, valid, test, not 'dev'; correct it",
        ),
        ({"user_id": ["u", "v", "u"]}, {}, r"row 3: user 'u' is listed twice; list each user once"),
        ({"user_id": ["u", None, "v"]}, {}, r"row 2: user_id is missing; each row needs one"),
        (
            {},
            {"split": "part"},
            r"no column 'part' for split; its columns are user_id, split, group; set columns.split",
        ),
        ({}, {"item_id": "x"}, r"columns of a split are user_id and split, not item_id; correct columns"),
    ],
)
def test_faults(tmp_path: Path, name: str, change: dict, columns: dict, message: str) -> None:
    path = save(USERS.assign(**change), tmp_path / name)
    with pytest.raises(InputError, match=message) as caught:
        read_split(path, columns)
    assert str(caught.value).startswith(f"{path}: ")


def test_files_that_are_no_table(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"users.parquet: no such file; put it there or correct its name"):
        read_split(tmp_path / "users.parquet", {})
    for name in ("users.parquet", "users.csv"):
        (tmp_path / name).write_bytes(b"\x00PAR1 \xff")
        with pytest.raises(InputError, match=r"not a whole parquet file .*; fetch it again|:1: holds a NUL byte"):
            read_split(tmp_path / name, {})
    (tmp_path / "users.xlsx").write_bytes(b"PK\x03\x04")
    with pytest.raises(
        InputError, match=r"users.xlsx: is a zip archive or a spreadsheet; unpack it, or save it as CSV"
    ):
        read_split(tmp_path / "users.xlsx", {})


@pytest.mark.parametrize(
    "text",
    [
        "user_id,split\nu1,Train\n007,TEST\nNA,validation\n",
        "user_id, split\nu1, train\n007, test\nNA,val \n",
        "user_id\tsplit\nu1\ttraining\n007\ttesting\nNA\tValid\n",
        "\ufeffsplit;user_id\ntrain;u1\ntest;007\nvalid;NA\n",
        '{"user_id": "u1", "split": "train"}\n{"user_id": "007", "split": "Test"}\n{"user_id": "NA", "split": "valid"}\n',
    ],
)
def test_parts_as_people_write_them(tmp_path: Path, text: str) -> None:
    (tmp_path / "users.csv").write_text(text)
    assert read_split(tmp_path / "users.csv", {}) == {"u1": "train", "007": "test", "NA": "valid"}


@pytest.mark.skipif(not FOOD_KITCHEN.is_file(), reason=f"Food-Kitchen is not at {FOOD_KITCHEN}")
def test_food_kitchen() -> None:
    counts = pd.Series(read_split(FOOD_KITCHEN, {})).value_counts()
    assert counts.to_dict() == {"train": 51_164, "valid": 960, "test": 937}
