"""Raw files as bytes of UTF-8 text: packing, other kinds of files, encodings, line ends.

`raw_kind` tells a file by its first bytes, never by its name alone. `open_text` unpacks gzip and yields chunks of UTF-8;
`line_blocks` cuts these into blocks of whole lines. Everything wrong is an InputError of one line; what is read in spite
of an oddity is a note.
"""

from __future__ import annotations

import codecs
import gzip
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from features.domains.notes import Notes
from features.errors import InputError

BLOCK = 1 << 23  # bytes of text read at a time
LONGEST = 1 << 24  # bytes of a line, or of one JSON object: more is no row of a table
_GZIP = b"\x1f\x8b"
_PARQUET = b"PAR1"
_OTHER_KINDS = {  # first bytes -> what such a file is, and what to do
    b"version https://git-lfs": "is a Git LFS pointer, not the data; fetch the file itself (git lfs pull)",
    b"../.git/annex": "is a git-annex pointer, not the data; fetch the file itself (git annex get)",
    b"/annex/objects": "is a git-annex pointer, not the data; fetch the file itself (git annex get)",
    b"PK\x03\x04": "is a zip archive or a spreadsheet; unpack it, or save it as CSV",
    b"BZh": "is packed with bzip2; unpack it, or pack it with gzip",
    b"\xfd7zXZ": "is packed with xz; unpack it, or pack it with gzip",
    b"\x28\xb5\x2f\xfd": "is packed with zstd; unpack it, or pack it with gzip",
    b"7z\xbc\xaf": "is a 7z archive; unpack it",
    b"Rar!": "is a rar archive; unpack it",
    b"ARROW1": "is an Arrow (feather) file; save it as parquet",
    b"FEA1": "is an old feather file; save it as parquet",
    b"ORC": "is an ORC file; save it as parquet",
    b"Obj\x01": "is an Avro file; save it as parquet",
    b"\x89HDF": "is an HDF5 file; save its table as parquet",
    b"\x93NUMPY": "is a NumPy array; save it as parquet, with names of columns",
    b"SQLite format 3": "is an SQLite database; save its table as parquet or CSV",
    b"\xd0\xcf\x11\xe0": "is an old spreadsheet; save it as CSV",
    b"%PDF": "is a PDF; give the data itself",
    b"\x80\x02": "is a Python pickle, which is not opened because that runs code; save it as parquet",
    b"\x80\x03": "is a Python pickle, which is not opened because that runs code; save it as parquet",
    b"\x80\x04": "is a Python pickle, which is not opened because that runs code; save it as parquet",
    b"\x80\x05": "is a Python pickle, which is not opened because that runs code; save it as parquet",
}
_PAGE = re.compile(rb"\s*(<!doctype\s+html|<html|<\?xml|<head|<body)", re.IGNORECASE)
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_HIGH = re.compile(rb"[\x80-\xff]+")


def is_parquet(path: Path) -> bool:
    """Return whether a file begins as parquet does. Raises InputError for a file that is not there."""
    with _opened(path) as stream:
        return stream.read(4) == _PARQUET


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as stream:
            yield stream
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; put it there or correct its name") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder; give a file, a list of files or a pattern") from None


@contextmanager
def open_text(path: Path, notes: Notes, *, strict: bool = False) -> Iterator[Iterator[bytes]]:
    r"""Open a text file as chunks of UTF-8 with \n at the ends of lines, unpacked where it is gzip.

    strict: what is not UTF-8 is refused, see `_utf8`. Faults of packing and encoding become InputError.
    """
    try:
        with _opened(path) as raw:
            packed = raw.read(2) == _GZIP
            raw.seek(0)
            if not packed:
                if path.suffix.lower() == ".gz":
                    notes.add(f"{path.name} is named .gz and not compressed; it is read as it is")
                yield _text(path, raw, notes, strict)
                return
            with gzip.open(raw, "rb") as stream:
                yield _text(path, stream, notes, strict)  # type: ignore[arg-type]
    except EOFError:
        raise InputError(f"{path}: the gzip file is truncated; fetch it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: the gzip file is damaged ({error}); fetch it again") from None


def _text(path: Path, stream: BinaryIO, notes: Notes, strict: bool) -> Iterator[bytes]:
    """Yield the chunks of an unpacked stream."""
    head = stream.read(BLOCK)
    _refuse_other_kinds(path, head)
    encoding = _encoding(head)
    if encoding == "utf-8":
        strict |= head.startswith(codecs.BOM_UTF8)  # what says so and is not UTF-8 is damaged
        head = head.removeprefix(codecs.BOM_UTF8)
        chunks = _utf8(path, stream, head, notes, strict)
    else:
        notes.add(f"{path.name} is in {encoding.upper()[:6]}; it is read as that")
        chunks = _transcoded(path, stream, head, encoding)
    first = next(chunks, b"")
    if b"\r" in first and b"\n" not in first:  # ends of lines of old Macs
        notes.add(f"{path.name} ends its lines with CR alone; it is read as that")
        first, chunks = first.replace(b"\r", b"\n"), (chunk.replace(b"\r", b"\n") for chunk in chunks)
    line = 1
    for chunk in _chain(first, chunks):
        if (place := chunk.find(b"\0")) >= 0:
            line += chunk.count(b"\n", 0, place)
            raise InputError(f"{path}:{line}: holds a NUL byte, so it is no text file, or damaged; fetch it again")
        line += chunk.count(b"\n")
        yield chunk


def _chain(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    if first:
        yield first
    yield from rest


def _refuse_other_kinds(path: Path, head: bytes) -> None:
    """Raise InputError for files that are no text, in the words of what they are."""
    if not head.strip():
        raise InputError(f"{path}: is empty; fetch it again")
    if head[:2] == _GZIP:
        raise InputError(f"{path}: is packed with gzip twice; unpack it once")
    if head[:4] == _PARQUET:
        raise InputError(f"{path}: is a parquet file packed with gzip; unpack it")
    for first, words in _OTHER_KINDS.items():
        if head.startswith(first):
            raise InputError(f"{path}: {words}")
    if _PAGE.match(head):
        raise InputError(f"{path}: is a web page, not data, as failed downloads are; fetch the file itself")


def _encoding(head: bytes) -> str:
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding
    sample = head[:400]
    for odd, encoding in ((1, "utf-16-le"), (0, "utf-16-be")):  # without a mark: every other byte of Latin text is 0
        if len(sample) >= 4 and sample[odd::2].count(0) > 0.9 * len(sample[odd::2]) and 0 not in sample[1 - odd :: 2]:
            return encoding
    return "utf-8"


def _transcoded(path: Path, stream: BinaryIO, head: bytes, encoding: str) -> Iterator[bytes]:
    """Yield UTF-8 of another Unicode encoding."""
    decoder, data = codecs.getincrementaldecoder(encoding)(), head
    try:
        while data:
            text = decoder.decode(data)
            yield text.removeprefix("\ufeff").encode()
            data = stream.read(BLOCK)
        decoder.decode(b"", final=True)
    except UnicodeError:
        raise InputError(f"{path}: begins as {encoding.upper()[:6]} and does not go on so; save it as UTF-8") from None


def _utf8(path: Path, stream: BinaryIO, head: bytes, notes: Notes, strict: bool) -> Iterator[bytes]:
    """Yield UTF-8. A file whose first bytes beyond ASCII are no UTF-8, each alone, is Windows-1252, with a note."""
    line, only_ascii, data = 1, True, head
    while data:
        rest = stream.read(BLOCK)
        if not data.isascii():
            try:
                data.decode()
            except UnicodeDecodeError as error:
                if rest and error.reason == "unexpected end of data":  # a letter that the chunk's end cuts
                    data, rest = data[: error.start], data[error.start :] + rest
                elif only_ascii and data[: error.start].isascii() and not strict and _is_single_bytes(data):
                    notes.add(f"{path.name} is not UTF-8; it is read as Windows-1252")
                    yield from _windows(path, stream, data + rest, line)
                    return
                else:
                    raise _not_utf8(path, data, error.start, line, strict) from None
            only_ascii = False
        yield data
        line += data.count(b"\n")
        data = rest


def _is_single_bytes(data: bytes) -> bool:
    """Whether letters beyond ASCII stand alone, as in Latin script; in GBK or Shift-JIS they come in pairs and more."""
    runs = [len(run) for run in _HIGH.findall(data[: 1 << 20])] or [1]
    return sum(length == 1 for length in runs) >= 0.4 * len(runs)


def _windows(path: Path, stream: BinaryIO, data: bytes, line: int) -> Iterator[bytes]:
    while data:
        try:
            yield data.decode("cp1252").encode()
        except UnicodeDecodeError as error:
            raise _not_utf8(path, data, error.start, line, False) from None
        line += data.count(b"\n")
        data = stream.read(BLOCK)


def _not_utf8(path: Path, data: bytes, place: int, line: int, strict: bool) -> InputError:
    line += data.count(b"\n", 0, place)
    if strict:
        return InputError(f"{path}:{line}: the text is not UTF-8; correct or remove the line")
    column = place - data.rfind(b"\n", 0, place)
    return InputError(
        f"{path}:{line}: byte 0x{data[place]:02x} at column {column} is neither UTF-8 nor, with what stands around it, "
        "Windows-1252; save the file as UTF-8"
    )


def line_blocks(path: Path, chunks: Iterator[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield blocks of whole lines, each with the number of its first line, counted from 1."""
    line, rest = 1, b""
    for data in chunks:
        cut = data.rfind(b"\n") + 1
        if not cut:
            rest += data
            check_length(path, rest, line)
            continue
        block, rest = rest + data[:cut], data[cut:]
        yield line, block
        line += block.count(b"\n")
    if rest:
        yield line, rest


def check_length(path: Path, data: bytes, line: int) -> None:
    """Raise InputError where what has no end of line is too long for a row."""
    if len(data) > LONGEST:
        raise InputError(
            f"{path}:{line}: is longer than {LONGEST >> 20} MiB without an end, so it is no row of a table; correct it"
        )
