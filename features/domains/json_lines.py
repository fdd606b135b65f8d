"""JSON as chunks: lines with an object each, one array of objects, or lines of Python literals (Amazon's older metadata).

Arrow parses whole blocks, with the types that the first lines show. A block that it cannot parse, because types change or
are mixed, is read line by line in Python, with the same result; only there a line is found to be wrong. Python literals are
parsed and never evaluated.
"""

from __future__ import annotations

import ast
import codecs
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pa_json

from features.domains.columns import Chunk, joined
from features.domains.layouts import recognise
from features.domains.raw_files import LONGEST, line_blocks
from features.domains.request import WHERE, Request, chosen_rows, coalesced
from features.errors import InputError, one_line

_SAMPLE = 200  # lines that the types are taken from
_ROWS = 1 << 13  # rows of an array in a chunk
_PICTURE = pa.list_(pa.struct([("large", pa.string()), ("hi_res", pa.string()), ("thumb", pa.string())]))
_SIZES = ("large", "hi_res", "thumb")
_DEEPEST = 200  # brackets within brackets of a Python literal
_BLANKS = re.compile(r"[ \t\r\n]*")

Rows = list[tuple[int, dict[str, Any]]]  # place (line or element) and fields


class _RowError(ValueError):
    """What is wrong with one row, in words."""


def read_json(request: Request, chunks: Iterator[bytes]) -> Iterator[Chunk]:
    """Yield the rows that are asked for. Raises InputError for the first line that is no object, or lacks a column."""
    first = next(chunks)
    chunks = chain([first], chunks)
    if first.lstrip()[:1] == b"[":
        yield from _read_array(request, chunks)
        return
    reader: _Fields | None = None
    for start, block in line_blocks(request.path, chunks):
        data = block.strip(b"\r\n")  # megabytes of blank lines are not taken apart
        if not data.strip():
            continue
        line = start + block.count(b"\n", 0, block.index(data))
        if reader is None:
            reader = _Fields(request, _sample(request, line, data))
        yield from reader.chunks(line, data)


def _sample(request: Request, line: int, data: bytes) -> Rows:
    """Parse the first lines. Raises InputError for the first that is wrong."""
    rows: Rows = []
    for number, text in enumerate(data.split(b"\n", _SAMPLE)[:_SAMPLE], line):
        if text.strip():
            rows.append((number, _parsed(request, number, text)))
    return rows


def _parsed(request: Request, number: int, line: bytes) -> dict[str, Any]:
    """Parse one line as JSON or as a Python literal. Raises InputError."""
    remedy = "correct or remove the line"
    try:
        try:
            row = json.loads(line, object_pairs_hook=_once)
        except UnicodeDecodeError:
            raise _RowError("the text is not UTF-8") from None
        except _RowError:
            raise
        except (ValueError, RecursionError) as error:
            row = _literal(line)
            if row is None:
                if isinstance(error, RecursionError):
                    raise _RowError("is nested too deeply") from None
                if len(line.strip()) <= 2 or (line.strip()[-1:] in b"{[," and line.strip()[:1] == b"{"):
                    remedy = "write each object on a line of its own"
                raise _RowError(f"not JSON ({one_line(error, 100)})") from None
            request.notes.add(
                f"{request.path.name} holds Python literals in the place of JSON; they are read, and not run"
            )
        if not isinstance(row, dict):
            raise _RowError(f"a JSON object is expected, not {_excerpt(row)}")
    except _RowError as fault:
        raise InputError(f"{request.path}:{number}: {fault}; {remedy}") from None
    return row


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise _RowError(f"{next(name for name in names if names.count(name) > 1)} is given twice")
    return row


def _literal(line: bytes) -> Any:
    """Return a line of Python literals, parsed without running anything; None where it is none."""
    text = line.strip()
    if (
        text[:1] != b"{"
        or text[-1:] != b"}"
        or b"'" not in text
        or max(map(text.count, (b"[", b"(", b"{"))) > _DEEPEST * 50
    ):
        return None
    depth = deepest = 0
    for bracket in re.findall(rb"[\[({\])}]", text):
        depth += 1 if bracket in b"[({" else -1
        deepest = max(deepest, depth)
    if deepest > _DEEPEST:
        return None
    try:
        return ast.literal_eval(text.decode())
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        return None


# --- arrays -------------------------------------------------------------------------------------------------------


def _read_array(request: Request, chunks: Iterator[bytes]) -> Iterator[Chunk]:
    """Yield the objects of one JSON array, decoded one after another, so that the file is never held whole."""
    reader: _Fields | None = None
    rows: Rows = []
    for number, row in enumerate(_elements(request, chunks), 1):
        if not isinstance(row, dict):
            raise InputError(
                f"{request.path}: element {number}: a JSON object is expected, not {_excerpt(row)}; correct it"
            )
        rows.append((number, row))
        if len(rows) == _ROWS:
            reader = reader or _Fields(request, rows, "element ")
            yield from reader.rows(rows)
            rows = []
    if rows:
        yield from (reader or _Fields(request, rows, "element ")).rows(rows)


def _elements(request: Request, chunks: Iterator[bytes]) -> Iterator[Any]:
    """Yield the elements of an array. Raises InputError where the text is no array, or does not end."""
    decoder, decode = json.JSONDecoder(object_pairs_hook=_once), codecs.getincrementaldecoder("utf-8")().decode
    path, text, place, count, reason = request.path, "", 0, 0, "it has no closing bracket"
    for data in chain(chunks, [b""]):
        begun = bool(text)
        text, place = text[place:] + decode(data, not data), 0
        if not begun and not count:
            text = text.lstrip()
            place = 1  # after the opening bracket
        while (place := _next_element(path, text, place, count)) < len(text):
            if text[place] == "]":
                if text[place + 1 :].strip() or any(part.strip() for part in chunks):
                    raise InputError(f"{path}: goes on after its array; give one array, or an object a line")
                return
            try:
                row, place = decoder.raw_decode(text, place)
            except (_RowError, RecursionError) as fault:
                words = fault if isinstance(fault, _RowError) else "is nested too deeply"
                raise InputError(f"{path}: element {count + 1}: {words}; correct it") from None
            except ValueError as error:  # cut by the end of the chunk, or wrong
                reason = one_line(error, 100)
                break
            count += 1
            yield row
        if len(text) - place > LONGEST:
            break
    raise InputError(f"{path}: element {count + 1}: the array is cut off or not JSON ({reason}); fetch it again")


def _next_element(path: object, text: str, place: int, count: int) -> int:
    """Return the place after blanks and, between elements, a comma."""
    blank = _BLANKS.match(text, place)
    place = blank.end() if blank else place
    if place < len(text) and count and text[place] != "]":
        if text[place] != ",":
            raise InputError(
                f"{path}: element {count}: no comma follows it; separate the elements of the array by commas"
            )
        blank = _BLANKS.match(text, place + 1)
        after = blank.end() if blank else place + 1
        return after if after < len(text) else place  # the comma stays where what follows it is in the next chunk
    return place


# --- fields -------------------------------------------------------------------------------------------------------


class _Fields:
    """The fields of one file that are read, with the types that its first rows show."""

    def __init__(self, request: Request, sample: Rows, unit: str = "") -> None:
        self.request, self.unit = request, unit
        present = list(dict.fromkeys(name for _, row in sample for name in row))
        self.chosen = self._choose(sample, present)
        self.where = [name for name in request.where if request.every_where or name in present]
        self.owners = {alias: name for name, aliases in self.chosen.items() for alias in aliases}
        types = {alias: _arrow_type([row.get(alias) for _, row in sample], name) for alias, name in self.owners.items()}
        types |= {
            name: _arrow_type([row.get(name) for _, row in sample], "text") for name in self.where if name not in types
        }
        self.schema = None if None in types.values() or unit else pa.schema(list(types.items()))

    def _choose(self, sample: Rows, present: Sequence[str]) -> dict[str, list[str]]:
        """Return our column -> fields that may hold it: those of the layout, also where the first rows lack them."""
        request = self.request
        for name, aliases in request.wanted.items():
            if request.required(name) and not set(aliases) & set(present):
                hint = recognise(present, request.kind, request.reader)
                if not hint and (name in request.columns or request.reader == "table"):
                    raise request.missing(name, aliases[0], present)
                if hint or all(row.get(alias) is None for _, row in sample for alias in aliases):
                    number, _ = sample[0]
                    raise InputError(
                        f"{request.path}:{self.unit}{number}: the field {aliases[0]} is missing or null; "
                        f"{hint or 'correct or remove the line'}"
                    )
        for column in request.where:
            if column not in present and request.every_where:
                request.choose(present)  # has the words
        chosen = {name: [alias for alias in aliases if alias in present] for name, aliases in request.wanted.items()}
        return {
            name: list(request.wanted[name]) if not found or name.endswith("_id") else found
            for name, found in chosen.items()
            if found or (request.reader != "table" and request.wanted[name])
        }

    def chunks(self, line: int, data: bytes) -> Iterator[Chunk]:
        """Yield the rows of a block of lines."""
        table = self._by_arrow(data)
        if table is None:
            rows = [
                (number, _parsed(self.request, number, text))
                for number, text in enumerate(data.split(b"\n"), line)
                if text.strip()
            ]
            yield from self.rows(rows)
            return

        def place(row: int) -> str:
            numbers = (number for number, text in enumerate(data.split(b"\n"), line) if text.strip())
            return f"{self.request.path}:{next(number for index, number in enumerate(numbers) if index == row)}"

        columns = {}
        for name, column in zip(table.column_names, table.columns, strict=True):
            array = pa.concat_arrays(column.chunks) if column.num_chunks else column.combine_chunks()
            columns[name] = _first_image(array) if array.type == _PICTURE else array
        yield from self._chunk(columns, place)

    def _by_arrow(self, data: bytes) -> pa.Table | None:
        """Return the fields of a block; None where Arrow cannot parse it, or not with these types."""
        if self.schema is None or b"\x00" in data:
            return None
        options = pa_json.ParseOptions(explicit_schema=self.schema, unexpected_field_behavior="ignore")
        whole = pa_json.ReadOptions(use_threads=False, block_size=len(data) + 1)
        try:
            table = pa_json.read_json(io.BytesIO(data), read_options=whole, parse_options=options)
            table.validate(full=True)  # Arrow's JSON parser lets bad UTF-8 through
        except (pa.ArrowException, UnicodeDecodeError):
            return None
        lines = data.count(b"\n") + (not data.endswith(b"\n"))
        if table.num_rows != lines and table.num_rows != sum(1 for text in data.split(b"\n") if text.strip()):
            return None  # Arrow takes two objects on a line, or one on two
        return table

    def rows(self, rows: Rows) -> Iterator[Chunk]:
        """Yield rows that Python has parsed."""

        def place(row: int) -> str:
            return f"{self.request.path}:{self.unit}{rows[row][0]}"

        columns = {}
        for alias, name in {**dict.fromkeys(self.where, "text"), **self.owners}.items():
            values = []
            for row, (_, fields) in enumerate(rows):
                try:
                    values.append(_VALUES[name](fields.get(alias)))
                except (ValueError, TypeError, OverflowError) as error:
                    raise InputError(f"{place(row)}: {alias} {error}; correct or remove the line") from None
            columns[alias] = _array(values, name)
        yield from self._chunk(columns, place)

    def _chunk(self, columns: Mapping[str, pa.Array], place: Callable[[int], str]) -> Iterator[Chunk]:
        request = self.request
        chunk = coalesced(request, self.chosen, columns, place)
        for name in self.chosen:
            column = chunk.column(name)
            if name not in request.wanted or not request.required(name) or column is None or not column.null_count:
                continue
            row = pc.index(pc.is_null(column), True).as_py()
            field = self.chosen[name][0]
            raise InputError(f"{place(row)}: the field {field} is missing or null; correct or remove the line")
        yield from chosen_rows(request, chunk, {**columns, **{WHERE + name: columns[name] for name in self.where}})


def _arrow_type(values: Sequence[Any], name: str) -> pa.DataType | None:
    """Return the type that all these values have; None where Arrow has to leave them to Python."""
    found = {type(value) for value in values if value is not None}
    if name == "rating":
        return pa.float64() if found <= {int, float} else None
    if not found:
        return pa.int64() if name == "timestamp" else pa.string()
    if found == {str}:
        return pa.string()
    if found == {int} and all(abs(value) < 2**63 for value in values if value is not None):
        return pa.int64()
    if found != {list} or name.endswith("_id"):
        return None
    inner = [part for value in values if value is not None for part in value]
    if all(isinstance(part, str) for part in inner) and name != "image":
        return pa.list_(pa.string())
    if name == "image" and all(
        isinstance(part, dict) and all(isinstance(part.get(size), str | None) for size in _SIZES) for part in inner
    ):
        return _PICTURE
    return None


def _first_image(images: pa.Array) -> pa.Array:
    """Return the first image of each item (MuSiC 4.1.1), the large one where there is one."""
    first = pc.list_element(
        pc.if_else(pc.greater(pc.list_value_length(images), 0), images, pa.scalar([{}], _PICTURE)), 0
    )
    return pc.coalesce(*(pc.struct_field(first, size) for size in _SIZES))


def _array(values: list[Any], name: str) -> pa.Array:
    if name == "rating":
        return pa.array(values, pa.float64())
    if name == "timestamp" and all(isinstance(value, int | None) for value in values):
        return pa.array(values, pa.int64())
    return pa.array([value if value is None or isinstance(value, str) else str(value) for value in values], pa.string())


# --- values that Python has parsed: each raises ValueError with what is wrong, in words ----------------------------


def _id(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        text: str | None = _unicode(value)
        return text
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"must be text or a whole number, not {_excerpt(value)}")
    if isinstance(value, float):
        if value != value:
            return None
        if not value.is_integer() or abs(value) > 2**53:
            raise ValueError(f"must be text or a whole number, not {_excerpt(value)}")
    return str(int(value))


def _rating(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"must be a number, not {_excerpt(value)}")
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"must be a number, not {_excerpt(value)}") from None


def _time(value: Any) -> int | str | None:
    if isinstance(value, float) and value == value and abs(value) < 2**63:
        return int(value)
    if value is None or (isinstance(value, int | str) and not isinstance(value, bool)):
        return str(value) if isinstance(value, int) and abs(value) >= 2**63 else _unicode(value)
    raise ValueError(f"must be a whole number or a date, not {_excerpt(value)}")


def _words(value: Any, separator: str = " ") -> str | None:
    try:
        text: str | None = _unicode(joined(value, separator))
    except (ValueError, RecursionError):
        raise ValueError(f"must be text or a list of texts, not {_excerpt(value)}") from None
    return text


def _categories(value: Any) -> str | None:
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        value = [part.get("name") for part in value]  # Goodreads: shelves with their counts
    elif isinstance(value, dict):
        value = list(value)  # Goodreads: genre -> count
    return _words(value, " > ")


def _image(value: Any) -> str | None:
    """Return the first image: a text, a list of texts or of objects by size, or an object of lists by size."""
    if isinstance(value, dict):
        value = next((value[size] for size in _SIZES if value.get(size)), None)
        value = next((part for part in value if part), None) if isinstance(value, list) else value
    if isinstance(value, list):
        if not all(isinstance(part, dict | str | None) for part in value):
            raise ValueError(f"must be a list of objects or addresses, not {_excerpt(value)}")
        return _image(value[0]) if value else None
    if value is not None and not isinstance(value, str):
        raise ValueError(f"must be an address, a list of objects or of addresses, not {_excerpt(value)}")
    return _unicode(value) or None


def _unicode(value: Any) -> Any:
    """Raise ValueError for half of a surrogate pair, which is no letter and cannot be stored."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("holds half of a surrogate pair, which is no letter") from None
    return value


_VALUES: Mapping[str, Callable[[Any], Any]] = {
    "user_id": _id, "item_id": _id, "split": _words, "rating": _rating, "timestamp": _time, "review_title": _words,
    "text": _words, "title": _words, "description": _words, "categories": _categories, "image": _image,
}  # fmt: skip


def _excerpt(value: object) -> str:
    try:
        text = json.dumps(value)
    except (ValueError, TypeError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= 60 else text[:57] + "..."
