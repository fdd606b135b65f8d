"""Text tables as chunks: columns separated by commas, tabs, semicolons and the like, and RecBole's atomic files.

The separator is the one under which the first line names the columns that are wanted. Blocks of whole rows are parsed by
Arrow, all columns as text, so that ids such as 007, 1e5 or NA stay what they are; Python looks at single rows only to say
which one is wrong.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from features.domains.columns import Chunk
from features.domains.layouts import seems_data
from features.domains.raw_files import LONGEST, line_blocks
from features.domains.request import WHERE, Request, chosen_rows, coalesced
from features.errors import InputError, one_line

_SEPARATORS = (",", "\t", ";", "|", "::", " ")
_WORDS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars", "::": "double colons", " ": "blanks"}
RECBOLE_TYPES = ("token", "token_seq", "float", "float_seq")
_SEP = re.compile(rb'"?sep=(.)"?\r?\n', re.IGNORECASE)  # what spreadsheets write before the header
_QUOTED = r'^".*"$'


@dataclass(frozen=True, kw_only=True)
class _Dialect:
    """How the text of one file is cut into fields."""

    separator: str
    header: list[str]
    quoted: bool  # a field in double quotes may hold separators and ends of lines
    skipped: int  # lines before the first row

    @property
    def delimiter(self) -> str:
        """What Arrow is told: a separator of two characters is written as a tab."""
        return "\t" if len(self.separator) > 1 else self.separator


def read_delimited(request: Request, chunks: Iterator[bytes]) -> Iterator[Chunk]:
    """Yield the rows that are asked for. Raises InputError for a missing column, and the first row that is wrong."""
    blocks = line_blocks(request.path, chunks)
    first, data = next(blocks, (1, b""))
    head, end, rest = data.partition(b"\n")
    if b"\r" in head.rstrip(b"\r"):  # a header that ends with CR alone, where other lines do not
        data = head.rstrip(b"\r").replace(b"\r", b"\n") + end + rest
    dialect = _dialect(request, data)
    data = data.split(b"\n", dialect.skipped)[-1] if dialect.skipped else data
    if len(dialect.header) == 1 and request.kind != "items":
        raise request.missing("user_id", request.wanted["user_id"][0], dialect.header)
    request.refuse_twice(dialect.header, f"{request.path}:1")
    chosen = request.choose(dialect.header)
    parser = _Parser(request, dialect, chosen)
    yield from parser.chunks(first + dialect.skipped, data)
    for line, block in blocks:
        yield from parser.chunks(line, block)
    yield from parser.end()


# --- the header ---------------------------------------------------------------------------------------------------


def _dialect(request: Request, data: bytes) -> _Dialect:
    """Tell separator and header from the first lines."""
    skipped, order = 0, list(_SEPARATORS)
    suffixes = [suffix.lower() for suffix in request.path.suffixes]
    if request.reader == "recbole" or ".tsv" in suffixes or ".tab" in suffixes:
        order.sort(key=lambda separator: separator != "\t")
    if named := _SEP.match(data):
        order, skipped = [named[1].decode("latin-1")], 1
        data = data[named.end() :]
    while data[: data.find(b"\n") + 1].strip() == b"" and b"\n" in data:  # blank lines
        data, skipped = data.split(b"\n", 1)[1], skipped + 1
    line = data.split(b"\n", 1)[0].decode().rstrip("\r")
    if request.header:
        separator = max(order, key=lambda each: (len(_fields(line, each)) == len(request.header), -order.index(each)))
        return _finished(request, separator, list(request.header), skipped)
    wanted = [alias for aliases in request.wanted.values() for alias in aliases] + list(request.where)
    names = {separator: _names(request, line, separator) for separator in order}
    found = {each: len(set(wanted) & set(names[each])) for each in order}
    score = {each: (found[each], 0 if any(found.values()) else len(names[each])) for each in order}
    separator = max(order, key=lambda each: (score[each], -order.index(each)))
    header = names[separator]
    usual = [name for key in ("user_id", "item_id") for name in request.layout.names(request.kind).get(key, ())]
    if seems_data(header) and not set(usual) & set(header):
        own = request.layout.header if request.kind == "interactions" else ()
        if own and len(header) == len(own):
            request.notes.add(
                f"{request.path.name} has no header; its columns are {', '.join(own)}, as of this release"
            )
            return _finished(request, separator, list(own), skipped)
        shown = ", ".join(repr(name[:30]) for name in header[:6])
        raise InputError(
            f"{request.path}:{skipped + 1}: seems to have no header, its first line holds {shown}; name its columns in "
            "order: `header: [user_id, item_id, rating, timestamp]`"
        )
    return _finished(request, separator, header, skipped + 1)


def _finished(request: Request, separator: str, header: list[str], skipped: int) -> _Dialect:
    usual = "\t" if request.reader == "recbole" else ","
    if separator != usual and not (separator == "\t" and request.reader != "recbole"):
        request.notes.add(f"{request.path.name}: its columns are separated by {_WORDS.get(separator, repr(separator))}")
    quoted = request.reader != "recbole" or separator in (",", ";")
    return _Dialect(separator=separator, header=header, quoted=quoted and separator != "::", skipped=skipped)


def _fields(line: str, separator: str) -> list[str]:
    if len(separator) > 1:
        return line.split(separator)
    try:
        return next(csv.reader([line], delimiter=separator), [])
    except csv.Error:
        return line.split(separator)


def _names(request: Request, line: str, separator: str) -> list[str]:
    """Return the names of a header, without blanks around them and without RecBole's types."""
    names = [name.strip().strip('"') for name in _fields(line, separator)]
    if request.reader != "recbole" or not any(":" in name for name in names):
        return names
    bare = []
    for name in names:
        stem, colon, kind = name.rpartition(":")
        bare.append(stem if colon and kind.strip() in RECBOLE_TYPES else name)
    odd = [name for name, stem in zip(names, bare, strict=True) if name == stem and re.fullmatch(r"\w+:\w*", name)]
    if odd:
        raise InputError(
            f"{request.path}:1: a RecBole header holds name:type fields with type {', '.join(RECBOLE_TYPES)}, "
            f"not {odd[0][:60]!r}; correct the header"
        )
    return bare


# --- rows ---------------------------------------------------------------------------------------------------------


class _Parser:
    """Parses blocks of whole lines; keeps the start of a row that the end of a block cuts inside quotes."""

    def __init__(self, request: Request, dialect: _Dialect, chosen: dict[str, list[str]]) -> None:
        self.request, self.dialect, self.chosen = request, dialect, chosen
        where = [column for column in request.where if column in dialect.header]
        self.columns = list(dict.fromkeys([*(name for names in chosen.values() for name in names), *where]))
        self.where = where
        self.rows = 0  # before the block at hand
        self.rest: tuple[int, bytes] = (0, b"")  # line and bytes of a row that is not closed
        numbers = [str(dialect.header.index(name)) for name in self.columns]
        self.read = pa_csv.ReadOptions(
            use_threads=False, column_names=[str(number) for number in range(len(dialect.header))]
        )
        self.parse = pa_csv.ParseOptions(
            delimiter=dialect.delimiter, quote_char='"' if dialect.quoted else False, escape_char=False,
            newlines_in_values=dialect.quoted,
        )  # fmt: skip
        self.convert = pa_csv.ConvertOptions(
            include_columns=numbers, column_types=dict.fromkeys(numbers, pa.string()), strings_can_be_null=True,
            null_values=[""], quoted_strings_can_be_null=True,
        )  # fmt: skip

    def chunks(self, line: int, data: bytes) -> Iterator[Chunk]:
        """Yield the rows of a block of whole lines that starts at this line."""
        if self.dialect.separator == "::":
            data = data.replace(b"::", b"\t")
        start, before = self.rest
        line, data = (start, before + data) if before else (line, data)
        self.rest = (0, b"")
        if self.dialect.quoted and data.count(b'"') % 2:
            table = self._table(data)
            if table is None or table.num_rows != _lines(data):  # a row goes on in the next block
                cut = data.rfind(b"\n", 0, data.rfind(b'"')) + 1
                self.rest = (line + data.count(b"\n", 0, cut), data[cut:])
                data = data[:cut]
                if len(self.rest[1]) > LONGEST:
                    raise self._open_quote()
        if data.strip():
            yield from self._rows(line, data)

    def end(self) -> Iterator[Chunk]:
        """Raise InputError where the file ends inside quotes."""
        if self.rest[1]:
            raise self._open_quote()
        yield from ()

    def _open_quote(self) -> InputError:
        return InputError(
            f"{self.request.path}:{self.rest[0]}: a quote opens here or below and is not closed; close it, or write quotes "
            "inside of text twice"
        )

    def _table(self, data: bytes) -> pa.Table | None:
        """Return the rows of a block; None where Arrow cannot parse it."""
        self.read.block_size = len(data) + 1
        try:
            table = pa_csv.read_csv(io.BytesIO(data), self.read, self.parse, self.convert)
            table.validate(full=True)
        except (pa.ArrowException, UnicodeDecodeError):
            return None
        return table

    def _rows(self, line: int, data: bytes) -> Iterator[Chunk]:
        request = self.request
        table = self._table(data)
        lines: list[int] | None = None
        if table is None:
            lines = self._blame(line, data)
            raise InputError(f"{request.path}:{line}: unreadable from here on; one row a line is expected")
        if table.num_rows != _lines(data):  # rows of several lines, or lines that Arrow takes for none
            lines = self._blame(line, data)
            if len(lines) != table.num_rows:
                raise InputError(
                    f"{request.path}:{line}: {table.num_rows:,} rows are found on {len(lines):,} lines from here on; a "
                    "quote is not closed, or not written twice inside of text"
                )
        before = self.rows
        self.rows += table.num_rows

        def place(row: int) -> str:
            if request.reader != "recbole":
                return f"{request.path}: row {before + row + 1}"
            number = lines[row] if lines is not None else _line_of(line, data, row)
            return f"{request.path}:{number}"

        columns = {
            name: pa.concat_arrays(column.chunks) if column.num_chunks else column.combine_chunks()
            for name, column in zip(self.columns, table.columns, strict=True)
        }
        if not self.dialect.quoted:
            columns = {name: self._unquoted(name, column, place) for name, column in columns.items()}
        self._refuse_header(columns, place)
        columns |= {WHERE + name: columns[name] for name in self.where}
        chunk = coalesced(request, self.chosen, columns, place)
        chunk = Chunk(chunk.batch, place, decimal_comma=self.dialect.separator in (";", "\t", "|"))
        yield from chosen_rows(request, chunk, columns)

    def _blame(self, line: int, data: bytes) -> list[int]:
        """Return the first line of each row. Raises InputError for the first row as wide as the header is not."""
        width, numbers = len(self.dialect.header), []
        if not self.dialect.quoted:
            for number, text in enumerate(data.split(b"\n"), line):
                if text.strip(b"\r"):
                    numbers.append(number)
                    self._check_width(text.count(self.dialect.delimiter.encode()) + 1, width, len(numbers), number)
            return numbers
        rows = csv.reader(io.StringIO(data.decode(), newline=""), delimiter=self.dialect.delimiter, strict=True)
        csv.field_size_limit(LONGEST)
        start = line
        while True:
            try:
                fields = next(rows, None)
            except csv.Error as error:
                raise InputError(
                    f"{self.request.path}: row {self.rows + len(numbers) + 1}: {one_line(error, 100)} (line "
                    f"{line + rows.line_num - 1}); write quotes inside of text twice"
                ) from None
            if fields is None:
                return numbers
            if fields:
                numbers.append(start)
                self._check_width(len(fields), width, len(numbers), start)
            start = line + rows.line_num

    def _check_width(self, fields: int, width: int, row: int, line: int) -> None:
        if fields == width:
            return
        rule = f"{fields} fields where the header has {width}; correct or remove the line"
        if self.request.reader == "recbole":
            raise InputError(f"{self.request.path}:{line}: {rule}")
        raise InputError(f"{self.request.path}: row {self.rows + row}: {rule} (line {line})")

    def _unquoted(self, name: str, column: pa.Array, place: object) -> pa.Array:
        """Return values without the quotes that stand around them; RecBole's own files have none."""
        quoted = pc.match_substring_regex(column, _QUOTED)
        rows = pc.sum(quoted).as_py() or 0
        if not rows:
            return column
        row = pc.index(quoted, True).as_py()
        assert callable(place)
        self.request.notes.count(
            f"values of {name} in {self.request.path.name} are in quotes; they are read without them", rows, place(row)
        )
        bare = pc.replace_substring(pc.utf8_slice_codeunits(column, 1, -1), '""', '"')
        return pc.if_else(pc.equal(quoted, True), bare, column)

    def _refuse_header(self, columns: dict[str, pa.Array], place: object) -> None:
        """Raise InputError where a header is a row, or a row a header: an id equals the name of its column."""
        assert callable(place)
        names = [self.chosen[name][0] for name in ("user_id", "item_id") if name in self.chosen]
        same = [pc.fill_null(pc.equal(columns[name], name), False) for name in names if name in columns]
        if not same or not any(pc.any(column).as_py() for column in same):
            return
        every = same[0] if len(same) == 1 else pc.and_(*same)
        if len(same) > 1 and (row := pc.index(every, True).as_py()) >= 0:
            raise InputError(f"{place(row)}: repeats the header, as joined files do; remove the row")
        mapped = [name for name in names if name in self.request.columns.values()]
        for name, column in zip(names, same, strict=True):
            if name in mapped and self.rows and (row := pc.index(column, True).as_py()) >= 0:
                raise InputError(
                    f"{place(row)}: {name!r} is both the name of a column and an id below it, so the first line seems "
                    "to be a row; name the columns in order: `header: [user_id, item_id, rating, timestamp]`"
                )


def _lines(data: bytes) -> int:
    """Count the lines that are not empty."""
    lines = data.count(b"\n") + (not data.endswith(b"\n"))
    if b"\n\n" in data or b"\n\r\n" in data or data.startswith((b"\n", b"\r\n")):
        lines = sum(1 for line in data.split(b"\n") if line.strip(b"\r"))
    return lines


def _line_of(first: int, data: bytes, row: int) -> int:
    rows = (number for number, line in enumerate(data.split(b"\n"), first) if line.strip(b"\r"))
    return next(number for index, number in enumerate(rows) if index == row)
