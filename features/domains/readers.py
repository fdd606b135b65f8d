"""Readers of raw files: Amazon Reviews 2023 JSON lines, RecBole atomic files, parquet and CSV tables.

Each yields Arrow batches of one schema, INTERACTIONS or ITEMS, so that no more than a few megabytes are held at a time.
Arrow parses whole blocks; Python looks at single lines only where a block is bad, to say which line it is. Everything
wrong with a file is an InputError: `file:line: rule, value; remedy`.
"""

import csv
import gzip
import io
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, Literal, NoReturn

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq

from features.errors import InputError, one_line

Kind = Literal["interactions", "items"]
BLOCK = 1 << 23  # bytes of text parsed at a time
TABLE_ROWS = 1 << 14  # rows of a parquet file read at a time

INTERACTIONS = pa.schema(
    [
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("rating", pa.float64()),
        ("text", pa.string()),  # title and text of the review, null where there is neither
        ("words", pa.int32()),  # words of the review without its title
        ("timestamp", pa.int64()),  # as the source counts it (Amazon 2023: milliseconds), null where absent
    ]
)
ITEMS = pa.schema([(name, pa.string()) for name in ("item_id", "title", "description", "categories", "image")])

# Our names of raw columns, which `DomainSpec.columns` may map to a file's own.
COLUMNS: Mapping[Kind, tuple[str, ...]] = {
    "interactions": ("user_id", "item_id", "rating", "review_title", "text", "timestamp"),
    "items": tuple(ITEMS.names),
}
REQUIRED: Mapping[Kind, tuple[str, ...]] = {"interactions": ("user_id", "item_id", "rating"), "items": ("item_id",)}


@dataclass(frozen=True)
class Subset:
    """Which columns and rows of a file are read."""

    columns: Mapping[str, str]  # our column name -> the file's, where they differ
    where: Mapping[str, str]  # the file's column -> value: only rows whose column, as text, equals it
    ratings: bool = True  # False: the file needs no ratings, and none are read


@dataclass(frozen=True)
class Chunk:
    """Some rows of one file under our raw names, and the place of each in it (`file:line`), for error messages."""

    batch: pa.RecordBatch
    place: Callable[[int], str]


# --- the two ways in ----------------------------------------------------------------------------------------------


def read_interactions(
    reader: str, path: Path, columns: Mapping[str, str], scale: tuple[float, float] | None,
    where: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[pa.RecordBatch]:  # fmt: skip
    """Yield the interactions of one file, in file order, every rating within `scale`; None: implicit, all ratings null.

    where (reader table): only rows whose column, as text, has that value.
    """
    for chunk in READERS[reader](path, "interactions", Subset(columns, where, scale is not None)):
        rating = _number(chunk, "rating", pa.float64())
        _check(chunk, ("user_id", "item_id"), rating, scale)
        title, text = _text(chunk, "review_title"), pc.fill_null(_text(chunk, "text"), "")
        whole = pc.utf8_trim_whitespace(pc.binary_join_element_wise(pc.fill_null(title, ""), text, " "))
        arrays = [
            _text(chunk, "user_id"),
            _text(chunk, "item_id"),
            rating,
            _null_where_empty(whole),
            count_words(text),
            _number(chunk, "timestamp", pa.int64()),
        ]
        yield pa.record_batch(arrays, schema=INTERACTIONS)


def read_items(
    reader: str, path: Path, columns: Mapping[str, str], where: Mapping[str, str] = MappingProxyType({})
) -> Iterator[pa.RecordBatch]:
    """Yield the items of one file, in file order; an item may come more than once. where: as for interactions."""
    for chunk in READERS[reader](path, "items", Subset(columns, where)):
        _check(chunk, ("item_id",), None, None)
        arrays = [_null_where_empty(_text(chunk, name, " > " if name == "categories" else " ")) for name in ITEMS.names]
        yield pa.record_batch(arrays, schema=ITEMS)


def count_words(text: pa.StringArray) -> pa.Int32Array:
    """Count the words between white space; `text` holds no nulls."""
    trimmed = pc.ascii_trim_whitespace(text)
    words = pc.list_value_length(pc.ascii_split_whitespace(trimmed))
    return pc.if_else(pc.equal(trimmed, ""), pa.scalar(0, pa.int32()), words)


# --- rules that every file has to meet ----------------------------------------------------------------------------


def _check(chunk: Chunk, ids: tuple[str, ...], rating: pa.Array | None, scale: tuple[float, float] | None) -> None:
    """Raise InputError for the first row without an id, or with a rating that is absent, NaN or off the scale."""
    rules = [
        (pc.equal(pc.fill_null(_text(chunk, name), ""), ""), f"{name} is missing; each row needs one") for name in ids
    ]
    if scale is not None:
        low, high = scale
        outside = pc.fill_null(pc.or_(pc.less(rating, low), pc.greater(rating, high)), False)
        remedy = "correct it or set rating_scale"
        rules += [
            (pc.is_null(rating), "rating is missing; each interaction needs one"),
            (pc.fill_null(pc.is_nan(rating), False), "rating is NaN; correct or remove the row"),
            (outside, f"rating must lie from {low:g} to {high:g}, not {{rating:g}}; {remedy}"),
        ]
    faults = [(pc.index(bad, True).as_py(), rule) for bad, rule in rules if pc.any(bad).as_py()]
    if faults:
        row, rule = min(faults)
        raise InputError(f"{chunk.place(row)}: {rule.format(rating=rating[row].as_py() if rating is not None else 0)}")


def _text(chunk: Chunk, name: str, separator: str = " ") -> pa.Array:
    """Return a column as text; lists are joined; all null where the file has no such column."""
    if name not in chunk.batch.schema.names:
        return pa.nulls(chunk.batch.num_rows, pa.string())
    column = chunk.batch[name]
    if pa.types.is_string(column.type):
        return column
    try:
        if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
            return pc.binary_join(column.cast(pa.list_(pa.string())), separator)
        return column.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(f"{chunk.place(0)}: {name} is of type {column.type}, which is no text; map another") from error


def _number(chunk: Chunk, name: str, kind: pa.DataType) -> pa.Array:
    """Return a column as numbers of `kind`. Raises InputError for the first value that is no number."""
    if name not in chunk.batch.schema.names:
        return pa.nulls(chunk.batch.num_rows, kind)
    column = chunk.batch[name]
    try:
        if pa.types.is_timestamp(column.type):
            column = column.cast(pa.timestamp("ms"), safe=False)
        elif pa.types.is_string(column.type):
            column = column.cast(kind if _all_whole(column) else pa.float64())
        if pa.types.is_integer(kind) and pa.types.is_floating(column.type):
            column = pc.trunc(pc.if_else(pc.is_finite(column), column, pa.scalar(None, column.type)))
        return column.cast(kind)
    except pa.ArrowInvalid:
        values = column.to_pylist()
        row = next(row for row, value in enumerate(values) if not _is_number(value))
        raise InputError(f"{chunk.place(row)}: {name} is {values[row]!r}, not a number in range; correct it") from None
    except pa.ArrowNotImplementedError as error:
        raise InputError(f"{chunk.place(0)}: {name} is of type {column.type}, not a number; map another") from error


def _all_whole(column: pa.Array) -> bool:
    whole: bool = pc.all(pc.match_substring_regex(column, r"^-?\d{1,18}$")).as_py() is not False
    return whole


def _is_number(value: str | float | None) -> bool:
    try:
        return value is None or not 2**63 <= abs(float(value)) < math.inf
    except ValueError:
        return False


def _null_where_empty(text: pa.Array) -> pa.Array:
    return pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)


# --- bytes --------------------------------------------------------------------------------------------------------


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """Open a file's bytes, unpacked if its name ends in .gz; faults of the packing become InputError."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
            yield stream  # type: ignore[misc]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; put it there or correct its name") from None
    except EOFError:
        raise InputError(f"{path}: the gzip file is truncated; fetch it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: the gzip file is damaged ({error}); fetch it again") from None


def _blocks(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield blocks of whole lines, each with the number of its first line, counted from 1 at the stream's start."""
    line, rest = 1, b""
    while data := stream.read(BLOCK):
        cut = data.rfind(b"\n") + 1
        if not cut:
            rest += data
            continue
        block, rest = rest + data[:cut], data[cut:]
        yield line, block
        line += block.count(b"\n")
    if rest:
        yield line, rest


@dataclass(frozen=True)
class _Block:
    """Whole lines of a text file; blank ones are not rows."""

    path: Path
    first: int  # line number of the first line
    data: bytes

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield number and bytes of each line that is a row."""
        for number, line in enumerate(self.data.split(b"\n"), self.first):
            if line.strip():
                yield number, line

    def place(self, row: int) -> str:
        number = next(number for index, (number, _) in enumerate(self.lines()) if index == row)
        return f"{self.path}:{number}"

    def parse(self, parser: Callable[[bytes], pa.Table], explain: Callable[[bytes], str | None]) -> Chunk:
        """Parse all rows at once. Raises InputError for the first line that fails by itself, in the words of `explain`."""
        try:
            table = _valid(parser(self.data))
        except (pa.ArrowInvalid, UnicodeDecodeError) as error:
            self._blame(parser, explain, error)
        if table.num_rows != sum(1 for _ in self.lines()):  # Arrow takes two objects on a line, or one on two
            self._blame(parser, explain, None)
        return Chunk(_one_batch(table), self.place)

    def _blame(
        self, parser: Callable[[bytes], pa.Table], explain: Callable[[bytes], str | None], error: Exception | None
    ) -> NoReturn:
        for number, line in self.lines():
            try:
                ok = _valid(parser(line)).num_rows == 1
                reason = "one row a line is expected"
            except (pa.ArrowInvalid, UnicodeDecodeError) as fault:
                ok, reason = False, one_line(fault)
            if not ok:
                raise InputError(f"{self.path}:{number}: {explain(line) or reason}; correct or remove the line")
        raise InputError(f"{self.path}:{self.first}: unreadable from here on ({error}); one row a line is expected")


def _one_batch(table: pa.Table) -> pa.RecordBatch:
    columns = [pa.concat_arrays(column.chunks) if column.num_chunks else column.combine_chunks() for column in table]
    return pa.RecordBatch.from_arrays(columns, names=table.column_names)


def _valid(table: pa.Table) -> pa.Table:
    table.validate(full=True)  # Arrow's JSON parser lets bad UTF-8 through
    return table


# --- Amazon Reviews 2023 ------------------------------------------------------------------------------------------

_PICTURE = pa.list_(pa.struct([("large", pa.string()), ("hi_res", pa.string()), ("thumb", pa.string())]))
_AMAZON: Mapping[Kind, pa.Schema] = {
    "interactions": pa.schema(
        [
            ("user_id", pa.string()),
            ("parent_asin", pa.string()),
            ("rating", pa.float64()),
            ("title", pa.string()),
            ("text", pa.string()),
            ("timestamp", pa.int64()),
        ]
    ),
    "items": pa.schema(
        [
            ("parent_asin", pa.string()),
            ("title", pa.string()),
            ("description", pa.list_(pa.string())),
            ("categories", pa.list_(pa.string())),
            ("images", _PICTURE),
        ]
    ),
}


def _amazon2023(path: Path, kind: Kind, subset: Subset) -> Iterator[Chunk]:
    """Read Amazon Reviews 2023 (Hou et al. 2024): JSON lines of reviews `<name>.jsonl.gz` or metadata `meta_<name>...`."""
    schema = _AMAZON[kind]
    options = pa_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")

    def parse(data: bytes) -> pa.Table:
        whole = pa_json.ReadOptions(use_threads=False, block_size=len(data) + 1)
        return pa_json.read_json(io.BytesIO(data), read_options=whole, parse_options=options)

    our_names = {
        "parent_asin": "item_id",
        **({"title": "review_title"} if kind == "interactions" else {"images": "image"}),
    }
    required = ("user_id", "parent_asin", "rating") if kind == "interactions" else ("parent_asin",)
    with _open(path) as stream:
        for first, data in _blocks(stream):
            chunk = _Block(path, first, data).parse(parse, lambda line: _explain_json(line, schema))
            for name in required:
                if chunk.batch[name].null_count:
                    row = pc.index(pc.is_null(chunk.batch[name]), True).as_py()
                    raise InputError(
                        f"{chunk.place(row)}: the field {name} is missing or null; correct or remove the line"
                    )
            arrays = [
                _first_image(column) if name == "images" else column
                for name, column in zip(schema.names, chunk.batch.columns, strict=True)
            ]
            yield Chunk(
                pa.RecordBatch.from_arrays(arrays, names=[our_names.get(name, name) for name in schema.names]),
                chunk.place,
            )


def _first_image(images: pa.Array) -> pa.Array:
    """Return the first image of each item (MuSiC 4.1.1), the large one where there is one."""
    first = pc.list_element(
        pc.if_else(pc.greater(pc.list_value_length(images), 0), images, pa.scalar([{}], _PICTURE)), 0
    )
    return pc.coalesce(*(pc.struct_field(first, size) for size in ("large", "hi_res", "thumb")))


def _explain_json(line: bytes, schema: pa.Schema) -> str | None:
    """Return what is wrong with one JSON line, in words; None where Python finds nothing."""
    try:
        row = json.loads(line)
    except UnicodeDecodeError:
        return "the text is not UTF-8"
    except ValueError as error:
        return f"not JSON ({error})"
    if not isinstance(row, dict):
        return f"a JSON object is expected, not {_excerpt(row)}"
    for field in schema:
        value = row.get(field.name)
        if value is None:
            continue
        if pa.types.is_string(field.type) and not isinstance(value, str):
            return f"{field.name} must be text, not {_excerpt(value)}"
        if pa.types.is_floating(field.type) and (isinstance(value, bool) or not isinstance(value, int | float)):
            return f"{field.name} must be a number, not {_excerpt(value)}"
        if pa.types.is_integer(field.type) and (isinstance(value, bool) or not isinstance(value, int)):
            return f"{field.name} must be a whole number, not {_excerpt(value)}"
        if pa.types.is_list(field.type):
            inner, word = (dict, "objects") if pa.types.is_struct(field.type.value_type) else (str, "texts")
            if not isinstance(value, list) or not all(isinstance(part, inner | None) for part in value):
                return f"{field.name} must be a list of {word}, not {_excerpt(value)}"
    return None


def _excerpt(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


# --- RecBole atomic files -----------------------------------------------------------------------------------------

_RECBOLE_TYPES = ("token", "token_seq", "float", "float_seq")


def _recbole(path: Path, kind: Kind, subset: Subset) -> Iterator[Chunk]:
    """Read RecBole's atomic files `.inter` and `.item`: tab-separated, a header of `name:type`, no quoting."""
    with _open(path) as stream:
        header = _recbole_header(path, stream.readline())
        names = _choose(path, kind, subset, header)

        def parse(data: bytes) -> pa.Table:
            table = pa_csv.read_csv(
                io.BytesIO(data),
                read_options=pa_csv.ReadOptions(use_threads=False, column_names=header, block_size=len(data) + 1),
                parse_options=pa_csv.ParseOptions(delimiter="\t", quote_char=False, escape_char=False),
                convert_options=_as_text(list(names.values())),
            )
            return table.rename_columns(list(names))

        def explain(line: bytes) -> str | None:
            fields = line.count(b"\t") + 1
            return None if fields == len(header) else f"{fields} fields where the header has {len(header)}"

        for first, data in _blocks(stream):
            yield _Block(path, first + 1, data).parse(parse, explain)


def _recbole_header(path: Path, line: bytes) -> list[str]:
    names = []
    for field in line.decode("utf-8", "replace").strip("\r\n").split("\t"):
        name, colon, kind = field.rpartition(":")
        if not colon or not name or kind not in _RECBOLE_TYPES:
            raise InputError(
                f"{path}:1: a RecBole header holds name:type fields with type {', '.join(_RECBOLE_TYPES)}, "
                f"not {field[:60]!r}; correct the header"
            )
        names.append(name)
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{path}:1: the header names {', '.join(repeated)} twice; correct the header")
    return names


# --- tables -------------------------------------------------------------------------------------------------------


def _table(path: Path, kind: Kind, subset: Subset) -> Iterator[Chunk]:
    """Read parquet (.parquet, .pq), or text with a header: comma-separated .csv, tab-separated .tsv, also with .gz."""
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if suffix in (".parquet", ".pq") and path.suffix != ".gz":
        batches = _parquet_batches(path, kind, subset)
    elif suffix in (".csv", ".tsv"):
        batches = _csv_batches(path, kind, subset, "," if suffix == ".csv" else "\t")
    else:
        raise InputError(
            f"{path}: a table is .parquet, .pq, .csv, .tsv, .csv.gz or .tsv.gz; convert or rename the file"
        )
    rows = 0
    for names, batch in batches:
        chosen = _where(path, batch, subset)
        numbers = rows + 1 + chosen.to_numpy()
        columns = [batch[column].take(chosen) for column in names.values()]
        place = lambda row, numbers=numbers: f"{path}: row {numbers[row]}"  # noqa: E731
        yield Chunk(pa.RecordBatch.from_arrays(columns, names=list(names)), place)
        rows += batch.num_rows


def _where(path: Path, batch: pa.RecordBatch, subset: Subset) -> pa.Int64Array:
    """Return the numbers of the rows to read."""
    keep = pa.repeat(True, batch.num_rows)
    for column, value in subset.where.items():
        try:
            keep = pc.and_(keep, pc.fill_null(pc.equal(batch[column].cast(pa.string()), value), False))
        except pa.ArrowNotImplementedError as error:
            raise InputError(
                f"{path}: {column} is of type {batch[column].type}, not text; drop where.{column}"
            ) from error
    return pc.indices_nonzero(keep).cast(pa.int64())


def _parquet_batches(path: Path, kind: Kind, subset: Subset) -> Iterator[tuple[dict[str, str], pa.RecordBatch]]:
    """Yield which columns are chosen (our name -> the file's), and batches with these and those of `where`."""
    try:
        # Arrow opens the file itself and buffers it: through a Python file it holds row groups whole.
        with pq.ParquetFile(path, buffer_size=BLOCK, pre_buffer=False) as file:
            names = _choose(path, kind, subset, file.schema_arrow.names)
            for batch in file.iter_batches(TABLE_ROWS, columns=list({*names.values(), *subset.where})):
                yield names, batch
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; put it there or correct its name") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: not a whole parquet file ({one_line(error, 200)}); fetch it again") from error


def _csv_batches(
    path: Path, kind: Kind, subset: Subset, delimiter: str
) -> Iterator[tuple[dict[str, str], pa.RecordBatch]]:
    """Yield what `_parquet_batches` yields, all columns as text."""
    with _open(path) as stream:
        line = stream.readline().decode("utf-8-sig", "replace")
        header = next(csv.reader([line], delimiter=delimiter), [])
        names = _choose(path, kind, subset, header)
        try:
            reader = pa_csv.open_csv(
                stream,
                read_options=pa_csv.ReadOptions(use_threads=False, column_names=header, block_size=BLOCK),
                parse_options=pa_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
                convert_options=_as_text([*names.values(), *subset.where]),
            )
            for batch in reader:
                yield names, batch
        except (pa.ArrowInvalid, UnicodeDecodeError) as error:
            if str(error) == "Empty CSV file":
                return
            raise InputError(f"{path}: not a CSV table ({one_line(error, 200)}); correct the file") from error


def _as_text(columns: Sequence[str]) -> pa_csv.ConvertOptions:
    """Convert only these columns, each to text, so that ids such as 007 or NA stay what they are."""
    return pa_csv.ConvertOptions(
        include_columns=list(dict.fromkeys(columns)),
        column_types=dict.fromkeys(columns, pa.string()),
        strings_can_be_null=True,
        null_values=[""],
    )


def _choose(path: Path, kind: Kind, subset: Subset, present: list[str]) -> dict[str, str]:
    """Return which of a file's columns to read: our name -> the file's."""
    for column in subset.where:
        if column not in present:
            raise InputError(
                f"{path}: there is no column {column!r} to choose rows by; its columns are {', '.join(present)}; "
                "set where to one of them"
            )
    chosen = {}
    for name in COLUMNS[kind]:
        if name == "rating" and not subset.ratings:
            continue
        column = subset.columns.get(name, name)
        if column in present:
            chosen[name] = column
        elif name in REQUIRED[kind] or name in subset.columns:
            raise InputError(
                f"{path}: there is no column {column!r} for {name}; its columns are {', '.join(present)}; "
                f"set columns.{name} to one of them"
            )
    return chosen


READERS: Mapping[str, Callable[[Path, Kind, Subset], Iterator[Chunk]]] = {
    "amazon2023": _amazon2023,
    "recbole": _recbole,
    "table": _table,
}
