"""Splits that come with the data: which users train, validate and test."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from features.errors import InputError, one_line

PARTS = ("train", "valid", "test")


def read_split(path: Path, columns: Mapping[str, str]) -> Mapping[str, str]:
    """Return user id -> train | valid | test, from a parquet or CSV file with one row a user.

    columns: our names user_id and split -> the file's, where they differ. Raises InputError for anything else in the file.
    """
    names = {name: columns.get(name, name) for name in ("user_id", "split")}
    if unknown := sorted(set(columns) - set(names)):
        raise InputError(f"{path}: columns of a split are user_id and split, not {', '.join(unknown)}; correct columns")
    frame = _read(path)
    for name, column in names.items():
        if column not in frame.columns:
            raise InputError(
                f"{path}: there is no column {column!r} for {name}; its columns are {', '.join(map(str, frame.columns))}; "
                f"set columns.{name} to one of them"
            )
    user, part = frame[names["user_id"]], frame[names["split"]]
    for bad, value, rule in (
        (user.isna(), user, "user_id is missing; each row needs one"),
        (user.duplicated(), user, "user {!r} is listed twice; list each user once"),
        (~part.isin(PARTS), part, f"{names['split']} must be one of {', '.join(PARTS)}, not {{!r}}; correct it"),
    ):
        if bad.any():
            row = int(bad.to_numpy().argmax())
            raise InputError(f"{path}: row {row + 1}: {rule.format(value.iloc[row])}")
    return dict(zip(user.astype(str), part.astype(str), strict=True))


def _read(path: Path) -> pd.DataFrame:
    try:
        if path.suffix == ".parquet":
            return pd.read_parquet(path)
        if path.suffix == ".csv":
            return pd.read_csv(path, dtype=str, keep_default_na=False, na_values=[""])
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; put it there or correct its name") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable table ({one_line(error, 200)}); fetch it again") from error
    raise InputError(f"{path}: a split is a .parquet or a .csv file; convert or rename it")
