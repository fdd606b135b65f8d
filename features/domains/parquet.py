"""Parquet files as chunks."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from features.domains.columns import Chunk, plain
from features.domains.raw_files import BLOCK
from features.domains.request import WHERE, Request, chosen_rows, coalesced
from features.errors import InputError, one_line

ROWS = 1 << 14  # rows read at a time
_PROBE = 64  # rows that tell how large rows are
_BATCH_BYTES = 1 << 26  # of a batch in memory
_MOST_FOLD = 20_000  # a column may hold this many times the bytes of the file: more is a bomb
_LARGE = 1 << 31


def read_parquet(request: Request) -> Iterator[Chunk]:
    """Yield the rows that are asked for. Raises InputError for a file that is not whole, or not what it should be."""
    rows = 0
    for columns, chosen in _batches(request):
        first = rows
        length = len(next(iter(columns.values())))
        place = lambda row, first=first: f"{request.path}: row {first + row + 1}"  # noqa: E731
        yield from chosen_rows(request, coalesced(request, chosen, columns, place), columns)
        rows += length


def _batches(request: Request) -> Iterator[tuple[dict[str, pa.Array], dict[str, list[str]]]]:
    """Yield columns by the file's names (of `where`: WHERE + name), and which of them hold ours."""
    path = request.path
    try:
        # Arrow opens the file itself and buffers it: through a Python file it holds row groups whole.
        with pq.ParquetFile(path, buffer_size=BLOCK, pre_buffer=False) as file:
            present = file.schema_arrow.names
            request.refuse_twice(present, str(path))
            chosen = request.choose(present)
            where = [column for column in request.where if column in present]
            names = list(dict.fromkeys([*(name for names in chosen.values() for name in names), *where]))
            for batch in file.iter_batches(_rows_at_a_time(request, file, names), columns=names):
                columns = {name: plain(batch[name]) for name in names}
                yield columns | {WHERE + column: columns[column] for column in where}, chosen
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; put it there or correct its name") from None
    except InputError:
        raise
    except (pa.ArrowException, OSError, MemoryError, UnicodeDecodeError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: not a whole parquet file ({one_line(error, 200)}); fetch it again") from error


def _rows_at_a_time(request: Request, file: pq.ParquetFile, names: list[str]) -> int:
    """Return how many rows fit a batch, from the first few. Raises InputError for columns that unpack to absurd sizes."""
    size = request.path.stat().st_size
    for group in range(file.num_row_groups):
        meta = file.metadata.row_group(group)
        for number in range(meta.num_columns):
            column = meta.column(number)
            claimed = column.total_uncompressed_size
            if claimed > max(_LARGE, _MOST_FOLD * size) or claimed < 0:
                raise InputError(
                    f"{request.path}: column {column.path_in_schema} claims {claimed:,} bytes in a file of {size:,}; it is "
                    "damaged; fetch it again"
                )
    probe = next(file.iter_batches(_PROBE, columns=names), None)
    if probe is None or not probe.num_rows:
        return ROWS
    fitting: int = _BATCH_BYTES * probe.num_rows // max(1, int(probe.get_total_buffer_size()))
    return max(1, min(ROWS, fitting))
