"""What is asked of a raw file, and which of its columns answer it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from features.domains.columns import Chunk
from features.domains.layouts import COLUMNS, LAYOUTS, REQUIRED, Kind, Layout, recognise
from features.domains.notes import Notes
from features.errors import InputError

WHERE = "where "  # before the name of a column that rows are chosen by, among the columns of a chunk


@dataclass(frozen=True, kw_only=True)
class Request:
    """Which columns and rows of a file are read, under which names."""

    path: Path
    kind: Kind
    reader: str = "table"  # a layout
    columns: Mapping[str, str] = field(
        default_factory=dict
    )  # our column -> the file's, where they differ from the layout's
    where: Mapping[str, str] = field(
        default_factory=dict
    )  # the file's column -> value: only rows whose column, as text, equals it
    ratings: bool = True  # False: the file needs no ratings, and none are read
    header: Sequence[str] = ()  # names of the columns of text that has no header
    optional: Collection[str] = ()  # keys of `columns` that fall back to the layout's names where the file lacks theirs
    every_where: bool = True  # False: columns of `where` that the file lacks choose nothing
    notes: Notes = field(default_factory=Notes)

    @property
    def layout(self) -> Layout:
        """The layout that the reader names."""
        return LAYOUTS[self.reader]

    @property
    def wanted(self) -> dict[str, tuple[str, ...]]:
        """Our columns -> the names that each may have in the file."""
        names = {name: self.layout.names(self.kind)[name] for name in COLUMNS[self.kind]}
        if self.kind == "interactions" and not self.ratings:
            del names["rating"]
        mapped = {
            name: (column, *(names[name] if name in self.optional else ()))
            for name, column in self.columns.items()
            if name in names
        }
        return names | mapped

    def required(self, name: str) -> bool:
        """Whether the file cannot do without one of our columns."""
        return (name in REQUIRED[self.kind] and (name != "rating" or self.ratings)) or name in self.columns

    def choose(self, present: Collection[str]) -> dict[str, list[str]]:
        """Return our column -> the file's that hold it, the preferred one first. Raises InputError where one lacks."""
        for column in self.where:
            if column not in present and self.every_where:
                raise InputError(
                    f"{self.path}: there is no column {column!r} to choose rows by; its columns are {_shown(present)}; "
                    "set where to one of them"
                )
        chosen = {}
        for name, aliases in self.wanted.items():
            found = [alias for alias in aliases if alias in present]
            if found:
                chosen[name] = found
            elif self.required(name):
                raise self.missing(name, aliases[0], present)
        return chosen

    def missing(self, name: str, column: str, present: Collection[str]) -> InputError:
        """Return the error of a file without one of our columns, with what its columns look like."""
        key = "item_columns" if self.kind == "items" else "columns"
        remedy = f"set {key}.{name} to one of them"
        if name == "rating" and name not in self.columns:
            remedy += ", or feedback: implicit where there are none"
        if hint := recognise(present, self.kind, self.reader):
            remedy = hint
        return InputError(
            f"{self.path}: there is no column {column!r} for {name}; its columns are {_shown(present)}; {remedy}"
        )

    def refuse_twice(self, header: Sequence[str], place: str) -> None:
        """Raise InputError where a column that is read is named twice."""
        read = [*(alias for aliases in self.wanted.values() for alias in aliases), *self.where]
        if twice := sorted({name for name in read if list(header).count(name) > 1}):
            raise InputError(f"{place}: the header names {', '.join(twice)} twice; correct the header")


def _shown(present: Collection[str]) -> str:
    names = [str(name) for name in present]
    shown = ", ".join(name if len(name) <= 40 else name[:37] + "..." for name in names[:30])
    return shown + (f" and {len(names) - 30} more" if len(names) > 30 else "")


def coalesced(
    request: Request, chosen: Mapping[str, Sequence[str]], columns: Mapping[str, pa.Array], place: Callable[[int], str]
) -> Chunk:
    """Return a chunk under our names. Where a row lacks the preferred column, the next one counts; of ids, with a note.

    columns: the file's columns by their own names; those of `where` under WHERE + name.
    """
    arrays = {}
    for name, aliases in chosen.items():
        arrays[name] = columns[aliases[0]]
        for alias in aliases[1:]:
            if not arrays[name].null_count:
                break
            lacking = pc.and_(pc.is_null(arrays[name]), pc.is_valid(columns[alias]))
            if name.endswith("_id") and (rows := pc.sum(lacking).as_py()):
                sentence = f"rows of {request.path.name} have {alias} and no {aliases[0]}; they are read by {alias}"
                request.notes.count(sentence, rows, place(pc.index(lacking, True).as_py()))
            if arrays[name].type == columns[alias].type:
                arrays[name] = pc.coalesce(arrays[name], columns[alias])
            else:
                arrays[name] = pc.coalesce(arrays[name].cast(pa.string()), columns[alias].cast(pa.string()))
    return Chunk(pa.RecordBatch.from_arrays(list(arrays.values()), names=list(arrays)), place)


def rows_where(request: Request, columns: Mapping[str, pa.Array], rows: int) -> pa.Int64Array | None:
    """Return the numbers of the rows to read; None: all."""
    keep = None
    for column, value in request.where.items():
        if WHERE + column not in columns:
            continue
        values = columns[WHERE + column]
        try:
            if pa.types.is_floating(values.type) and value.lstrip("+-").isdigit():
                equal = pc.equal(values.cast(pa.float64()), float(value))  # 3.0 is 3
            elif pa.types.is_boolean(values.type):
                equal = (
                    pc.equal(values, value.lower() == "true")
                    if value.lower() in ("true", "false")
                    else pc.is_null(values)
                )
            else:
                equal = pc.equal(values.cast(pa.string()), value)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise InputError(
                f"{request.path}: {column} is of type {values.type}, not text; drop where.{column}"
            ) from error
        equal = pc.fill_null(equal, False)
        keep = equal if keep is None else pc.and_(keep, equal)
    return None if keep is None else pc.indices_nonzero(keep).cast(pa.int64())


def chosen_rows(request: Request, chunk: Chunk, columns: Mapping[str, pa.Array]) -> Iterator[Chunk]:
    """Yield the chunk, or those of its rows that `where` chooses."""
    numbers = rows_where(request, columns, chunk.batch.num_rows)
    if numbers is None:
        yield chunk
        return
    rows = numbers.to_numpy()
    batch = pa.RecordBatch.from_arrays(
        [column.take(numbers) for column in chunk.batch.columns], names=chunk.batch.schema.names
    )
    yield Chunk(batch, lambda row: chunk.place(int(rows[row])), chunk.decimal_comma)
