"""The terminal of the command line: what it cannot show is replaced, and what libraries write goes to a log."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

_PLAIN = {
    "–": "-", "—": "-", "−": "-", "→": "->", "←": "<-", "±": "+/-", "×": "x", "·": "-", "…": "...", "≤": "<=", "≥": ">=",
    "“": '"', "”": '"', "‘": "'", "’": "'", "━": "-", "╸": "-", "╺": "-", "─": "-", "│": "|", "Δ": "d", "•": "*",
}  # fmt: skip


def _replaced(error: UnicodeError) -> tuple[str, int]:
    """Give what stands in the place of characters that an encoding lacks; `?` where nothing is like them."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_PLAIN.get(sign, "?") for sign in lacking), error.end


def prepare_streams() -> None:
    """Let both streams of this process replace what they cannot show, and stderr be ours alone.

    Libraries that are not Python write to file number 2, which may then be turned to a log.
    """
    codecs.register_error("study", _replaced)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="study")
    if isinstance(sys.stderr, io.TextIOWrapper) and sys.stderr is sys.__stderr__:
        sys.stderr.flush()
        # Binary and unbuffered below, so that a line is out when it is written, even if the process ends at once.
        raw = os.fdopen(os.dup(sys.stderr.fileno()), "wb", buffering=0)
        sys.stderr = io.TextIOWrapper(raw, encoding=sys.stderr.encoding, errors="study", write_through=True)


def redirect_native_output(log: Path) -> None:
    """Send to a file what libraries write to file number 2 of this process, from now on: Ray writes there until it ends.

    Python's own `sys.stderr` is not meant: `prepare_streams` has put it elsewhere.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 2)


class _Log(io.TextIOBase):
    """Appends to a file, which is made with the first word."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, text: str) -> int:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8", errors="replace") as file:
            return file.write(text)


@contextlib.contextmanager
def only_ours(log: Path) -> Iterator[tuple[TextIO, TextIO]]:
    """Send what Python libraries print to a file for the time of the block; yields the streams that are ours."""
    ours = sys.stdout, sys.stderr
    rest = _Log(log)
    with contextlib.redirect_stdout(rest), contextlib.redirect_stderr(rest):
        yield ours
