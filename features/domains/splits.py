"""Splits that come with the data: which users train, validate and test."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pyarrow.compute as pc

from features.domains.columns import ids, text
from features.domains.notes import Notes
from features.domains.readers import read_chunks
from features.domains.request import Request
from features.errors import InputError

PARTS = ("train", "valid", "test")
_OTHER_WORDS = {"training": "train", "validation": "valid", "val": "valid", "testing": "test"}


def read_split(path: Path, columns: Mapping[str, str]) -> Mapping[str, str]:
    """Return user id -> train | valid | test, from a table with one row a user, as `features.domains.readers` reads it.

    columns: our names user_id and split -> the file's, where they differ. Case and blanks around a part do not count, and
    `validation` is valid. Raises InputError for anything else in the file.
    """
    names = ("user_id", "split")
    if unknown := sorted(set(columns) - set(names)):
        raise InputError(f"{path}: columns of a split are user_id and split, not {', '.join(unknown)}; correct columns")
    request = Request(path=path, kind="users", columns=columns, notes=Notes())
    split: dict[str, str] = {}
    for chunk in read_chunks(request):
        parts = pc.utf8_lower(pc.utf8_trim_whitespace(pc.fill_null(text(chunk, "split"), ""))).to_pylist()
        for row, (user, part) in enumerate(zip(ids(chunk, "user_id").to_pylist(), parts, strict=True)):
            part = _OTHER_WORDS.get(part, part)
            if not user:
                raise InputError(f"{chunk.place(row)}: user_id is missing; each row needs one")
            if user in split:
                raise InputError(f"{chunk.place(row)}: user {user!r} is listed twice; list each user once")
            if part not in PARTS:
                name = columns.get("split", "split")
                raise InputError(
                    f"{chunk.place(row)}: {name} must be one of {', '.join(PARTS)}, not {part[:60]!r}; correct it"
                )
            split[user] = part
    if not split:
        raise InputError(f"{path}: holds no users; give a file that does")
    return split
