"""Readers of raw files: known releases and any table, as parquet, CSV, TSV, JSON lines or RecBole's atomic files.

Each yields Arrow batches of one schema, INTERACTIONS or ITEMS, so that no more than a few megabytes are held at a time. A
reader is a layout (`features.domains.layouts`): it says what our columns are called. How a file is written, it tells
itself. Everything wrong with a file is an InputError: `file:line: rule, value; remedy`. Oddities that are read are notes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from types import MappingProxyType

import pyarrow as pa
import pyarrow.compute as pc

from features.domains.columns import Chunk, ids, numbers, text, times
from features.domains.delimited import read_delimited
from features.domains.json_lines import read_json
from features.domains.layouts import COLUMNS, LAYOUTS
from features.domains.notes import Notes
from features.domains.parquet import read_parquet
from features.domains.raw_files import is_parquet, open_text
from features.domains.request import Request
from features.errors import InputError

INTERACTIONS = pa.schema(
    [
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("rating", pa.float64()),
        ("text", pa.string()),  # title and text of the review, null where there is neither
        ("words", pa.int32()),  # words of the review without its title
        ("timestamp", pa.int64()),  # as the source counts it, dates in milliseconds since 1970, null where absent
    ]
)
ITEMS = pa.schema([(name, pa.string()) for name in COLUMNS["items"]])
READERS = tuple(LAYOUTS)
# A letter of scripts that put no blanks between words: each Han or kana character counts as a word, as word processors
# count them; of Thai, Lao, Khmer and Burmese, whose words have about four letters, each run of four.
_UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}]|[\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]{1,4}"


# --- the two ways in ----------------------------------------------------------------------------------------------


def read_interactions(
    reader: str, path: Path, columns: Mapping[str, str], scale: tuple[float, float] | None,
    where: Mapping[str, str] = MappingProxyType({}), *, unrated: Sequence[float] = (), header: Sequence[str] = (),
    notes: Notes | None = None,
) -> Iterator[pa.RecordBatch]:  # fmt: skip
    """Yield the interactions of one file, in file order, every rating within `scale`; None: implicit, all ratings null.

    where: only rows whose column, as text, has that value. unrated: ratings that mean none; their rows are left out, with
    a note. header: names of the columns of a text file without header. notes: what is read in spite of an oddity.
    """
    notes = notes or Notes()
    request = Request(
        path=path, kind="interactions", reader=reader, columns=columns, where=where, ratings=scale is not None,
        header=header, notes=notes,
    )  # fmt: skip
    for chunk in read_chunks(request):
        rating = numbers(chunk, "rating")
        user, item = ids(chunk, "user_id"), ids(chunk, "item_id")
        chosen = _rated(request, chunk, rating, unrated)
        _check(chunk, {"user_id": user, "item_id": item}, rating, scale, unrated)
        title, review = text(chunk, "review_title"), pc.fill_null(text(chunk, "text"), "")
        whole = pc.utf8_trim_whitespace(pc.binary_join_element_wise(pc.fill_null(title, ""), review, " "))
        arrays = [user, item, rating, _null_where_empty(whole), count_words(review), times(chunk, "timestamp")]
        batch = pa.record_batch(arrays, schema=INTERACTIONS)
        yield batch if chosen is None else batch.filter(chosen)


def read_items(
    reader: str, path: Path, columns: Mapping[str, str], where: Mapping[str, str] = MappingProxyType({}), *,
    header: Sequence[str] = (), optional: Collection[str] = (), every_where: bool = False, notes: Notes | None = None,
) -> Iterator[pa.RecordBatch]:  # fmt: skip
    """Yield the items of one file, in file order; an item may come more than once.

    where: as for interactions; unless `every_where`, columns that the file lacks choose nothing, so that it may serve
    several domains. optional: keys of `columns` that fall back to the layout's own names.
    """
    request = Request(
        path=path, kind="items", reader=reader, columns=columns, where=where, header=header, optional=optional,
        every_where=every_where, notes=notes or Notes(),
    )  # fmt: skip
    for chunk in read_chunks(request):
        item = ids(chunk, "item_id")
        _check(chunk, {"item_id": item}, None, None, ())
        others = [
            _null_where_empty(text(chunk, name, " > " if name == "categories" else " ")) for name in ITEMS.names[1:]
        ]
        yield pa.record_batch([item, *others], schema=ITEMS)


def count_words(texts: pa.StringArray) -> pa.Int32Array:
    """Count the words between white space, and those of scripts that write none; `texts` holds no nulls."""
    trimmed = pc.ascii_trim_whitespace(texts)
    if pc.all(pc.string_is_ascii(trimmed)).as_py() is False:
        trimmed = pc.ascii_trim_whitespace(pc.replace_substring_regex(trimmed, _UNSPACED, " x "))
    words = pc.list_value_length(pc.ascii_split_whitespace(trimmed))
    return pc.if_else(pc.equal(trimmed, ""), pa.scalar(0, pa.int32()), words)


def read_chunks(request: Request) -> Iterator[Chunk]:
    """Yield the chunks of a file, whatever its format."""
    if is_parquet(request.path):
        yield from read_parquet(request)
        return
    suffixes = {suffix.lower() for suffix in request.path.suffixes}
    if suffixes & {".parquet", ".pq"} and ".gz" not in suffixes:
        raise InputError(f"{request.path}: not a whole parquet file (it does not begin as one does); fetch it again")
    strict = bool(suffixes & {".json", ".jsonl", ".ndjson"})
    with open_text(request.path, request.notes, strict=strict) as chunks:
        first = next(chunks, b"")
        whole = chain([first], chunks)
        start = first.lstrip()[:1]
        if start in (b"{", b"[") and not request.header:
            yield from read_json(request, whole)
        elif strict:
            yield from read_json(request, whole)  # has the words
        else:
            yield from read_delimited(request, whole)


# --- rules that every file has to meet ----------------------------------------------------------------------------


def _rated(request: Request, chunk: Chunk, rating: pa.Array, unrated: Sequence[float]) -> pa.Array | None:
    """Return which rows have a rating, and count those that have none; None: all."""
    if not unrated or not request.ratings:
        return None
    none = pc.fill_null(pc.is_in(rating, pa.array(unrated, pa.float64())), False)
    rows = pc.sum(none).as_py() or 0
    if not rows:
        return None
    values = ", ".join(f"{value:g}" for value in unrated)
    sentence = f"rows of {request.path.name} are rated {values}, which means not rated (unrated); they are left out"
    request.notes.count(sentence, rows, chunk.place(pc.index(none, True).as_py()))
    return pc.invert(none)


def _check(
    chunk: Chunk, columns: Mapping[str, pa.Array], rating: pa.Array | None, scale: tuple[float, float] | None,
    unrated: Sequence[float],
) -> None:  # fmt: skip
    """Raise InputError for the first row without an id, or with a rating that is absent, NaN or off the scale."""
    rules = [
        (pc.equal(pc.fill_null(column, ""), ""), f"{name} is missing; each row needs one")
        for name, column in columns.items()
    ]
    rules += [
        (
            pc.fill_null(pc.match_substring(column, "\0"), False),
            f"{name} holds a NUL character; correct or remove the row",
        )
        for name, column in columns.items()
    ]
    if scale is not None:
        low, high = scale
        outside = pc.fill_null(pc.or_(pc.less(rating, low), pc.greater(rating, high)), False)
        if unrated:
            outside = pc.and_(outside, pc.invert(pc.is_in(rating, pa.array(unrated, pa.float64()))))
        rules += [
            (pc.is_null(rating), "rating is missing; each interaction needs one"),
            (pc.fill_null(pc.is_nan(rating), False), "rating is NaN; correct or remove the row"),
            (outside, f"rating must lie from {low:g} to {high:g}, not {{rating:g}}; {_scale_remedy(rating, scale)}"),
        ]
    faults = [(pc.index(bad, True).as_py(), rule) for bad, rule in rules if pc.any(bad).as_py()]
    if faults:
        row, rule = min(faults)
        value = rating[row].as_py() if rating is not None else None
        raise InputError(f"{chunk.place(row)}: {rule.format(rating=0 if value is None else value)}")


def _scale_remedy(rating: pa.Array, scale: tuple[float, float]) -> str:
    """Say which scale the ratings at hand are of."""
    seen = pc.drop_null(pc.if_else(pc.is_finite(rating), rating, None))
    if len(seen) < 5:
        return "correct it or set rating_scale"
    extent = pc.min_max(seen).as_py()
    low, high = extent["min"], extent["max"]
    step = "in half steps " if pc.any(pc.not_equal(pc.floor(seen), seen)).as_py() else ""
    words = f"correct it or set rating_scale: those around it run {step}from {low:g} to {high:g}"
    if low == 0 < scale[0] and high <= scale[1]:
        return f"{words}; where 0 means not rated, set unrated: [0]"
    for candidate in ((0.5, 5.0), (1.0, 5.0), (0.0, 5.0), (1.0, 10.0), (0.0, 10.0), (0.0, 100.0), (-10.0, 10.0)):
        if candidate[0] <= low and high <= candidate[1]:
            return f"{words}, perhaps of {candidate[0]:g} to {candidate[1]:g}"
    return words


def _null_where_empty(column: pa.Array) -> pa.Array:
    return pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column)
