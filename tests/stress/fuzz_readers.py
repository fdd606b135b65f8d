"""Damaged files of all kinds: each is read right, or refused in one line; never a traceback, a crash, silence or 1 GiB.

    python tests/stress/fuzz_readers.py [--inputs 10000] [--seed 0] [--one NUMBER]

Input n is made from (seed, n) alone: a small table as CSV, TSV, RecBole, JSON lines, a JSON array, Python literals,
parquet, a split of users or a plan, with up to three damages: cut, flipped, swapped or repeated bytes, NULs, other
encodings, ends of lines, quotes, ragged rows, wrong names, odd numbers, huge fields, deep nesting, packing, bombs. What is
read has to have as many rows as a slow count of the bytes finds. Workers of 250 inputs each show crashes and their peak
memory. Exit code 1 where anything is found; `--one` shows an input and what becomes of it.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[2]))

from features.domains.notes import Notes
from features.domains.readers import read_interactions, read_items
from features.domains.splits import read_split
from features.errors import InputError
from study.plan.load import load_plan

BATCH = 250  # inputs of a worker process
MOST_MIB = 1024
KINDS = ("csv", "semicolon", "tsv", "recbole", "jsonl", "array", "literals", "items", "parquet", "split", "plan")
TEXTS = (
    "good",
    "",
    'say "hi"',
    "a, b; c\td",
    "naïve ☃",
    "两个 词",
    "x" * 300,
    "[/]",
    "line one",
    "'quoted'",
    "1e5",
    "NA",
)
NAMES = (b"userId", b"reviewerID", b" user_id ", b"item_id", b"")
NUMBERS = (b"1e999", b"NaN", b"-", b"9" * 400, b"3,5", b"\xd9\xa3")
BRACKETS = (b"[", b'{"a":', b"(", b"{")
PLAN = """name: fuzz
model: music
space: music/paper
domains:
  a: &shared {reader: table, interactions: a.csv, filters: {k_core: 2}}
  b: {<<: *shared, interactions: [b1.csv, b2.csv], columns: {user_id: who}, where: {kind: x}}
tasks: [[a, b]]
cold_ratios: [0.3]
base: {epochs: 2}
search: {trials: 1, seeds: [0]}
score: {seeds: [0]}
"""


@dataclass
class Damaged:
    """One input."""

    kind: str
    name: str  # of its file
    data: bytes
    damages: list[str]


# --- making -------------------------------------------------------------------------------------------------------


def make(seed: int, number: int) -> Damaged:
    """Return input `number`."""
    draw = random.Random(seed * 1_000_003 + number)
    kind = draw.choice(KINDS)
    rows = [
        {
            "user_id": draw.choice((f"u{draw.randrange(9)}", f"{draw.randrange(20):03d}", draw.choice(TEXTS) or "u")),
            "item_id": f"i{draw.randrange(30)}", "rating": draw.choice((1, 2.5, 3, 4, 5)),
            "timestamp": draw.choice((1405588132, 1405588132000, "2014-07-17 09:08:52", 7)), "text": draw.choice(TEXTS),
        }
        for _ in range(draw.choice((0, 1, 3, 12, 40)))
    ]  # fmt: skip
    values = draw.random() < 0.4
    if values and rows:
        column = draw.choice(("user_id", "rating", "timestamp", "text"))
        draw.choice(rows)[column] = draw.choice(
            (
                None,
                "",
                float("nan"),
                float("inf"),
                2**70,
                -1,
                "1e400",
                True,
                [],
                {"a": [1]},
                "2,5",
                "\ud83d",
                "\0",
                12.0,
                "0x1A",
            )
        )
    data, damages = _written(kind, rows, draw), ["values"] if values else []
    for _ in range(draw.choice((0, 1, 1, 1, 2, 3))):
        name = draw.choice(list(DAMAGES))
        data = DAMAGES[name](data, draw)
        damages.append(name)
    suffix = {"recbole": ".inter", "parquet": ".parquet", "plan": ".yaml", "tsv": ".tsv"}.get(kind, ".csv")
    suffix = ".jsonl" if kind in ("jsonl", "array", "literals", "items") and draw.random() < 0.7 else suffix
    suffix = draw.choice((".txt", ".CSV", ".csv.gz", ".dat", "")) if draw.random() < 0.1 and kind != "plan" else suffix
    return Damaged(kind, f"f{suffix}", data, damages)


def _written(kind: str, rows: list[dict], draw: random.Random) -> bytes:  # type: ignore[type-arg]
    if kind == "plan":
        return PLAN.encode()
    if kind == "split":
        users = dict.fromkeys(str(row["user_id"]) for row in rows)
        rows = [{"user_id": user, "split": draw.choice(("train", "Valid", "test "))} for user in users]
    names = list(rows[0]) if rows else ["user_id", "item_id", "rating"]
    if kind == "parquet":
        types = {name: draw.choice((pa.string(), pa.large_string(), pa.string_view())) for name in names}
        columns = [
            pa.array([None if row[name] is None else _plain(row[name]) for row in rows], types[name]) for name in names
        ]
        out = io.BytesIO()
        pq.write_table(pa.table(columns, names=names), out, compression=draw.choice(("snappy", "gzip", "none", "zstd")))
        return out.getvalue()
    if kind in ("jsonl", "array", "literals", "items"):
        if kind == "items":
            rows = [
                {"item_id": row["item_id"], "title": row["text"], "image": draw.choice((None, [], ["x"]))}
                for row in rows
            ]
        if kind == "literals":
            return "\n".join(repr(row) for row in rows).encode(errors="replace")
        if kind == "array":
            return json.dumps(rows).encode()
        return "\n".join(json.dumps(row) for row in rows).encode()
    separator = {"semicolon": ";", "tsv": "\t", "recbole": "\t"}.get(kind, ",")
    out_text = io.StringIO()
    if kind == "recbole":
        types = {"rating": "float", "timestamp": "float"}
        out_text.write("\t".join(f"{name}:{types.get(name, 'token')}" for name in names) + "\n")
        for row in rows:
            out_text.write("\t".join(_plain(row[name]).replace("\t", " ") for name in names) + "\n")
    else:
        writer = csv.writer(out_text, delimiter=separator, lineterminator="\n")
        writer.writerow(names)
        writer.writerows([[_plain(row[name]) for name in names] for row in rows])
    return out_text.getvalue().encode(errors="replace")


def _plain(value: object) -> str:
    return "" if value is None else str(value).encode(errors="replace").decode()


def _place(data: bytes, draw: random.Random) -> int:
    return draw.randrange(len(data) + 1)


def _insert(data: bytes, more: bytes, draw: random.Random) -> bytes:
    place = _place(data, draw)
    return data[:place] + more + data[place:]


def _swap(data: bytes, draw: random.Random) -> bytes:
    a, b, c = sorted(_place(data, draw) for _ in range(3))
    return data[:a] + data[b:c] + data[a:b] + data[c:]


def _lines(data: bytes, draw: random.Random, change: Callable[[list[bytes]], None]) -> bytes:
    lines = data.split(b"\n")
    change(lines)
    return b"\n".join(lines)


def _recoded(data: bytes, encoding: str) -> bytes:
    return data.decode("utf-8", "replace").encode(encoding, "replace")


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "cut": lambda data, draw: data[: _place(data, draw)],
    "beheaded": lambda data, draw: data[_place(data, draw) :],
    "flip": lambda data, draw: bytes(b ^ (1 << draw.randrange(8)) if draw.random() < 0.01 else b for b in data),
    "swap": _swap,
    "repeat": lambda data, draw: data + data[_place(data, draw) :],
    "nul": lambda data, draw: _insert(data, b"\0" * draw.choice((1, 9, 500)), draw),
    "high byte": lambda data, draw: _insert(data, bytes([draw.randrange(128, 256)]), draw),
    "mark inside": lambda data, draw: _insert(data, b"\xef\xbb\xbf", draw),
    "mark": lambda data, draw: b"\xef\xbb\xbf" + data,
    "utf-16": lambda data, draw: _recoded(data, draw.choice(("utf-16", "utf-16-le", "utf-16-be", "utf-32"))),
    "cp1252": lambda data, draw: _recoded(data, draw.choice(("cp1252", "latin-1", "gbk", "shift-jis", "koi8-r"))),
    "half utf-16": lambda data, draw: data[: len(data) // 2] + _recoded(data[len(data) // 2 :], "utf-16-le"),
    "cr": lambda data, draw: data.replace(b"\n", draw.choice((b"\r", b"\r\n", b"\n\r", b"\n\n"))),
    "some cr": lambda data, draw: b"".join(draw.choice((b"\n", b"\r\n", b"\r")) if c == 10 else bytes([c]) for c in data),
    "quote": lambda data, draw: _insert(data, draw.choice((b'"', b'"', b"'", b'""', b'\\"')), draw),
    "separator": lambda data, draw: _insert(data, draw.choice((b",", b";", b"\t", b"|", b"::", b" ")), draw),
    "no header": lambda data, draw: data.partition(b"\n")[2],
    "header twice": lambda data, draw: _insert(data, b"\n" + data.partition(b"\n")[0] + b"\n", draw),
    "names": lambda data, draw: data.replace(b"user_id", draw.choice(NAMES)),
    "number": lambda data, draw: data.replace(b"3", draw.choice(NUMBERS), 1),
    "huge field": lambda data, draw: _insert(data, b"x" * draw.choice((10_000, 1 << 21)), draw),
    "deep": lambda data, draw: _insert(data, draw.choice(BRACKETS) * draw.choice((50, 5000, 100_000)), draw),
    "blank lines": lambda data, draw: _insert(data, b"\n" * draw.choice((1, 3, 1000)), draw),
    "gzip": lambda data, draw: gzip.compress(data),
    "half gzip": lambda data, draw: (packed := gzip.compress(data))[: len(packed) - draw.randrange(1, 12)],
    "bad gzip": lambda data, draw: (packed := gzip.compress(data))[:12] + bytes([draw.randrange(256)]) + packed[13:],
    "members": lambda data, draw: gzip.compress(data[: len(data) // 2]) + gzip.compress(data[len(data) // 2 :]),
    "bomb": lambda data, draw: data if draw.random() < 0.9 else gzip.compress(
        data + draw.choice((b"\0", b"x", b"\n", b'"', b"[", b"a,b\n")) * draw.choice((1 << 22, 1 << 26)), 1
    ),
    "shuffled": lambda data, draw: _lines(data, draw, draw.shuffle),
    "ragged": lambda data, draw: _lines(data, draw, lambda lines: lines.insert(draw.randrange(len(lines)), b"u1,i1")),
    "empty": lambda data, draw: b"",
    "page": lambda data, draw: b"<!DOCTYPE html><html>" + data,
    "spaces": lambda data, draw: b" \n\t " + data,
}  # fmt: skip


# --- trying -------------------------------------------------------------------------------------------------------


def attempt(one: Damaged, folder: Path) -> tuple[str, str]:
    """Return (refused | read | FOUND, words) for an input; everything but an InputError of one line is found."""
    path = folder / one.name
    path.write_bytes(one.data)
    try:
        if one.kind == "plan":
            load_plan(str(path))
            return "read", ""
        if one.kind == "split":
            return "read", f"{len(read_split(path, {}))} users"
        notes = Notes()
        if one.kind == "items":
            rows = sum(batch.num_rows for batch in read_items("table", path, {}, notes=notes))
        else:
            reader = "recbole" if one.kind == "recbole" else "table"
            rows = sum(batch.num_rows for batch in read_interactions(reader, path, {}, (1.0, 5.0), notes=notes))
    except InputError as error:
        words = str(error)
        if one.kind != "plan" and ("\n" in words or not words.startswith(str(path))):
            return "FOUND", f"message of several lines or without its place: {words[:300]!r}"
        if len(words) > 20_000 or any(len(line) > 3000 for line in words.split("\n")):
            return "FOUND", f"message of {len(words)} characters: {words[:200]!r}"
        return "refused", words
    except Exception:
        return "FOUND", traceback.format_exc()[-1500:]
    if (expected := _counted(one)) is not None and expected != rows:
        return "FOUND", f"{rows} rows were read, of {expected} in the file; notes: {notes.lines()}"
    return "read", f"{rows} rows"


def _counted(one: Damaged) -> int | None:
    """Count the rows of an input slowly, by Python's own readers; None where these cannot."""
    data = one.data
    try:
        while data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        if data[:4] == b"PAR1":
            return pq.read_metadata(io.BytesIO(data)).num_rows
        marks = (
            (b"\xff\xfe\0\0", "utf-32"),
            (b"\xff\xfe", "utf-16"),
            (b"\xfe\xff", "utf-16"),
            (b"\xef\xbb\xbf", "utf-8-sig"),
        )
        encoding = next((name for mark, name in marks if data.startswith(mark)), "utf-8")
        if b"\0" in data[:40] and encoding == "utf-8":
            encoding = "utf-16-le" if data[1] == 0 else "utf-16-be"
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            text = data.decode("cp1252")
        if "\r" in text and "\n" not in text:
            text = text.replace("\r", "\n")
        if text.lstrip()[:1] == "[":
            return len(json.loads(text))
        text = re.sub(r"\n{3,}", "\n\n", text)  # a bomb of blank lines would be a list of gigabytes here
        lines = [line for line in re.split(r"\r\n|\n|\r", text) if line]
        if text.lstrip()[:1] == "{" or one.name.endswith(".jsonl"):
            return sum(bool(line.strip()) for line in lines)
        if one.kind == "recbole" or '"' not in text:
            return max(0, len([line for line in lines if line.strip()]) - 1)
        while lines and not lines[0].strip():  # before the header
            text, lines = re.split(r"\r\n|\n|\r", text, maxsplit=1)[1], lines[1:]
        separator = max((",", ";", "\t"), key=lines[0].count)
        return sum(bool(row) for row in csv.reader(io.StringIO(text, newline=""), delimiter=separator)) - 1
    except (ValueError, OSError, EOFError, csv.Error, IndexError, RecursionError, pa.ArrowException):
        return None


def run_batch(seed: int, first: int, last: int) -> dict[str, object]:
    """Try some inputs in this process; return counts, findings and peak memory in MiB."""
    counts: Counter[str] = Counter()
    findings: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(first, last):
            one = make(seed, number)
            print(number, file=sys.stderr, flush=True)  # a crash leaves its number behind
            verdict, words = attempt(one, Path(folder))
            counts[verdict] += 1
            if verdict == "FOUND":
                findings.append(f"{number} ({one.kind}, {', '.join(one.damages)}): {words}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return {"counts": dict(counts), "findings": findings, "peak": peak}


def main() -> None:
    """Try all inputs and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("--inputs", 10_000), ("--seed", 0), ("--one", -1), ("--first", -1), ("--last", -1)):
        parser.add_argument(name, type=int, default=default)
    options = parser.parse_args()
    if options.one >= 0:
        one = make(options.seed, options.one)
        with tempfile.TemporaryDirectory() as folder:
            print(one.kind, one.name, one.damages, one.data[:3000], *attempt(one, Path(folder)), sep="\n")
        return
    if options.first >= 0:
        print(json.dumps(run_batch(options.seed, options.first, options.last)))
        return
    start, total, found, peak = time.perf_counter(), Counter[str](), [], 0
    for first in range(0, options.inputs, BATCH):
        last = min(first + BATCH, options.inputs)
        command = [sys.executable, __file__, "--seed", str(options.seed), "--first", str(first), "--last", str(last)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
        if done.returncode:
            found.append(
                f"worker died with {done.returncode} at input {done.stderr.split()[-1:]}: {done.stderr[-600:]}"
            )
            continue
        result = json.loads(done.stdout.splitlines()[-1])
        total.update(result["counts"])
        found += result["findings"]
        peak = max(peak, result["peak"])
        if result["peak"] > MOST_MIB:
            found.append(f"inputs {first} to {last}: peak {result['peak']} MiB")
    seconds = time.perf_counter() - start
    print("\n".join(found))
    print(f"{options.inputs:,} inputs in {seconds:.0f} s: {dict(total)}, peak {peak} MiB, {len(found)} found")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
