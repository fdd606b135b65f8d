"""Columns of raw files, whatever their type, as text, numbers and times; a fault is blamed on its row.

Ids are text. Numbers become text where no digit is lost: whole floats without ".0", nothing beyond what the type can
count. Times become whole numbers: dates and ISO texts as milliseconds since 1970, numbers as they are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from features.errors import InputError, one_line

_WHOLE = {pa.float16(): 2**11, pa.float32(): 2**24, pa.float64(): 2**53}  # whole numbers below are told apart
_DATES = ("%a %b %d %H:%M:%S %z %Y", "%a, %d %b %Y %H:%M:%S %z", "%m %d, %Y", "%b %d, %Y", "%B %d, %Y", "%Y/%m/%d %H:%M:%S",
          "%Y/%m/%d %H:%M", "%Y/%m/%d")  # fmt: skip
_FAULTS = (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError, pa.ArrowKeyError, UnicodeDecodeError)


@dataclass(frozen=True)
class Chunk:
    """Some rows of one file under our raw names, and the place of each in it (`file:line`), for error messages."""

    batch: pa.RecordBatch
    place: Callable[[int], str]
    decimal_comma: bool = False  # 3,5 is a number, as in files whose columns semicolons separate

    def column(self, name: str) -> pa.Array | None:
        """Return a column without dictionary or extension; None where the file has none of that name."""
        index = self.batch.schema.get_field_index(name)
        return plain(self.batch.column(index)) if index >= 0 else None


def plain(column: pa.Array) -> pa.Array:
    """Return a column as values of a basic type: no dictionaries, runs, views or extensions."""
    kind = column.type
    try:
        if isinstance(kind, pa.BaseExtensionType):
            return plain(column.storage)
        if pa.types.is_dictionary(kind):
            return plain(column.cast(kind.value_type))
        if pa.types.is_run_end_encoded(kind):
            return plain(pc.run_end_decode(column))
        if pa.types.is_string_view(kind) or pa.types.is_large_string(kind):
            return column.cast(pa.string())
        if pa.types.is_binary_view(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
            return column.cast(pa.binary())
    except _FAULTS:
        values = column.to_pylist()
        return pa.array(values, pa.string() if all(isinstance(value, str | None) for value in values) else None)
    return column


def ids(chunk: Chunk, name: str) -> pa.Array:
    """Return a column of ids as text; null where it is empty or NaN. Raises InputError for what cannot be an id."""
    column = chunk.column(name)
    if column is None:
        return pa.nulls(chunk.batch.num_rows, pa.string())
    kind = column.type
    if pa.types.is_string(kind):
        return column
    if pa.types.is_floating(kind):
        column = pc.if_else(pc.is_nan(column), pa.scalar(None, kind), column)
        column = column.cast(pa.float64())
        whole = pc.and_(pc.equal(pc.trunc(column), column), pc.less_equal(pc.abs(column), float(_WHOLE[kind])))
        _blame(
            chunk, pc.invert(whole), column,
            f"{name} is {{}}, of type {kind}, which loses digits of ids; store them as text or whole numbers",
        )  # fmt: skip
        return column.cast(pa.int64()).cast(pa.string())
    if pa.types.is_decimal(kind):
        text = column.cast(pa.string())
        return pc.replace_substring_regex(text, r"\.0*$", "")
    if pa.types.is_integer(kind):
        return column.cast(pa.string())
    if pa.types.is_binary(kind):
        return _utf8(chunk, name, column)
    if pa.types.is_null(kind):
        return column.cast(pa.string())
    raise InputError(f"{chunk.place(0)}: {name} is of type {kind}, which is no id; map a column of text or numbers")


def text(chunk: Chunk, name: str, separator: str = " ") -> pa.Array:
    """Return a column as text; lists are joined; all null where the file has no such column."""
    column = chunk.column(name)
    if column is None:
        return pa.nulls(chunk.batch.num_rows, pa.string())
    kind = column.type
    if pa.types.is_string(kind):
        return column
    if pa.types.is_binary(kind):
        return _utf8(chunk, name, column)
    with suppress(*_FAULTS):  # else value by value
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            return pc.binary_join(column.cast(pa.list_(pa.string())), separator)
        if not pa.types.is_nested(kind):
            return column.cast(pa.string())
    try:
        values = [joined(value, separator) for value in column.to_pylist()]
        return pa.array(values, pa.string())
    except (ValueError, OverflowError, *_FAULTS):
        raise InputError(f"{chunk.place(0)}: {name} is of type {kind}, which is no text; map another") from None


def joined(value: Any, separator: str = " ") -> str | None:
    """Return a value as text: lists, also nested ones, joined. Raises ValueError for a mapping or bytes."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        return separator.join(part for inner in value if (part := joined(inner, separator)))
    if isinstance(value, dict | bytes | set):
        raise ValueError(f"{type(value).__name__} is no text")
    return str(value)


def numbers(chunk: Chunk, name: str) -> pa.Array:
    """Return a column as floats; null where there is none. Raises InputError for the first value that is no number."""
    column = chunk.column(name)
    if column is None:
        return pa.nulls(chunk.batch.num_rows, pa.float64())
    if pa.types.is_boolean(column.type) or pa.types.is_temporal(column.type):
        raise InputError(f"{chunk.place(0)}: {name} is of type {column.type}, not a number; map another")
    try:
        if pa.types.is_string(column.type):
            column = _empty_is_null(pc.utf8_trim_whitespace(column))
            if chunk.decimal_comma:
                column = pc.replace_substring_regex(column, r"^([+-]?\d+),(\d+)$", r"\1.\2")
        elif pa.types.is_binary(column.type):
            raise pa.ArrowNotImplementedError
        return column.cast(pa.float64())
    except (pa.ArrowInvalid, OverflowError):
        _blame_number(chunk, name, column)
    except (pa.ArrowNotImplementedError, pa.ArrowTypeError, pa.ArrowKeyError):
        raise InputError(f"{chunk.place(0)}: {name} is of type {column.type}, not a number; map another") from None
    raise InputError(f"{chunk.place(0)}: {name} cannot be read as numbers; map another column")


def times(chunk: Chunk, name: str) -> pa.Array:
    """Return a column as whole numbers: dates in milliseconds since 1970, numbers as they are, null where there is none."""
    column = chunk.column(name)
    if column is None or pa.types.is_null(column.type):
        return pa.nulls(chunk.batch.num_rows, pa.int64())
    kind = column.type
    try:
        if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
            return column.cast(pa.timestamp("ms"), safe=False).cast(pa.int64())
        if pa.types.is_string(kind):
            return _times_of_text(chunk, name, _empty_is_null(pc.utf8_trim_whitespace(column)))
        if pa.types.is_boolean(kind) or pa.types.is_temporal(kind):
            raise pa.ArrowNotImplementedError
        if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
            column = column.cast(pa.float64())
            column = pc.trunc(pc.if_else(pc.is_finite(column), column, pa.scalar(None, pa.float64())))
        return column.cast(pa.int64())
    except (pa.ArrowInvalid, OverflowError):
        _blame_number(chunk, name, column)
    except (pa.ArrowNotImplementedError, pa.ArrowTypeError, pa.ArrowKeyError):
        raise InputError(f"{chunk.place(0)}: {name} is of type {kind}, no time; map another") from None
    raise InputError(f"{chunk.place(0)}: {name} cannot be read as times; map another column")


def _times_of_text(chunk: Chunk, name: str, column: pa.Array) -> pa.Array:
    if pc.all(pc.match_substring_regex(column, r"^-?\d{1,18}$")).as_py() is not False:
        return column.cast(pa.int64())
    with suppress(pa.ArrowInvalid):  # else there are zones, other ways of writing, or numbers between
        return column.cast(pa.timestamp("ms")).cast(pa.int64())
    seen: dict[str | None, int | None] = {None: None}
    values: list[int | None] = []
    for row, value in enumerate(column.to_pylist()):
        if value not in seen:
            try:
                seen[value] = _time(value)
            except (ValueError, OverflowError):
                raise InputError(
                    f"{chunk.place(row)}: {name} is {_excerpt(value)}, neither a number in range nor a date such as "
                    "2014-07-17 09:08:52; correct it"
                ) from None
        values.append(seen[value])
    return pa.array(values, pa.int64())


def _time(value: str) -> int:
    """Return one written time: a number as it is, a date in milliseconds. Raises ValueError, OverflowError."""
    try:
        number = float(value)
    except ValueError:
        moment = _moment(value)
        return math.floor((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)
    if not abs(number) < 2**63:
        raise OverflowError
    return int(value) if re.fullmatch(r"-?\d+", value) else int(number)


def _moment(value: str) -> datetime:
    try:
        return datetime.fromisoformat(value.removesuffix(" UTC"))
    except ValueError:
        for form in _DATES:
            try:
                return datetime.strptime(value, form)  # no zone is UTC
            except ValueError:
                continue
        raise


def _utf8(chunk: Chunk, name: str, column: pa.Array) -> pa.Array:
    try:
        return column.cast(pa.string())
    except _FAULTS:
        for row, value in enumerate(column.to_pylist()):
            try:
                (value or b"").decode()
            except UnicodeDecodeError:
                raise InputError(
                    f"{chunk.place(row)}: {name} is of bytes that are not UTF-8; store it as text"
                ) from None
        raise


def _empty_is_null(column: pa.Array) -> pa.Array:
    return pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column)


def _blame(chunk: Chunk, bad: pa.Array, values: pa.Array, rule: str) -> None:
    """Raise InputError for the first row that `bad` marks; nulls are not bad."""
    row = pc.index(pc.fill_null(bad, False), True).as_py()
    if row >= 0:
        raise InputError(f"{chunk.place(row)}: {rule.format(values[row].as_py())}")


def _blame_number(chunk: Chunk, name: str, column: pa.Array) -> None:
    """Raise InputError for the first value that is no number in range."""
    for row, value in enumerate(column.to_pylist()):
        try:
            fine = value is None or abs(float(value)) < 2**63 or (name == "rating" and not isinstance(value, str))
        except (TypeError, ValueError, OverflowError):
            fine = False
        if fine:
            continue
        place = f"{chunk.place(row)}: {name} is {_excerpt(value)}"
        if isinstance(value, str) and re.fullmatch(r"[+-]?\d+,\d+", value):
            raise InputError(
                f"{place}, with a decimal comma; write {value.replace(',', '.')}, or separate the columns by semicolons"
            )
        raise InputError(f"{place}, not a number in range; correct it")


def _excerpt(value: object) -> str:
    return one_line(repr(value) if isinstance(value, str | date) else value, 60)
