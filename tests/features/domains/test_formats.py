"""Files as people have them: releases, formats, encodings, ids, times; what is read, what is noted, what is refused."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.domains.notes import Notes
from features.domains.readers import count_words, read_interactions, read_items
from features.errors import InputError

CSV = "user_id,item_id,rating,timestamp\nu1,i1,4,1405588132\nu2,i2,3.5,1405588140\n"
ROWS = [("u1", "i1", 4.0, 1405588132), ("u2", "i2", 3.5, 1405588140)]


def read(path: Path, reader: str = "table", **options: Any) -> tuple[list[tuple[Any, ...]], list[str]]:
    """(user, item, rating, time) of each row, and the notes."""
    notes = Notes()
    columns: Mapping[str, str] = options.pop("columns", {})
    scale = options.pop("scale", (1.0, 5.0))
    where = options.pop("where", {})
    batches = read_interactions(reader, path, columns, scale, where, notes=notes, **options)
    names = ("user_id", "item_id", "rating", "timestamp")
    return [tuple(row[name] for name in names) for batch in batches for row in batch.to_pylist()], notes.lines()


def items(path: Path, reader: str = "table", **options: Any) -> list[dict[str, Any]]:
    columns: Mapping[str, str] = options.pop("columns", {})
    return [row for batch in read_items(reader, path, columns, **options) for row in batch.to_pylist()]


def save(folder: Path, name: str, content: str | bytes) -> Path:
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder / name


def lines(*rows: Any) -> str:
    return "\n".join(json.dumps(row) for row in rows)


# --- releases -----------------------------------------------------------------------------------------------------

OLD_REVIEW = {
    "reviewerID": "u",
    "asin": "i",
    "overall": 4.0,
    "summary": "T",
    "reviewText": "a b",
    "unixReviewTime": 1405588132,
}


def test_amazon_2014_and_2018(tmp_path: Path) -> None:
    path = save(tmp_path, "a.json", lines(OLD_REVIEW))
    for reader in ("amazon2014", "amazon2018"):
        assert read(path, reader)[0] == [("u", "i", 4.0, 1405588132)]
    with pytest.raises(
        InputError, match=r"a.json:1: the field user_id is missing or null; these are columns of Amazon 2018 "
    ):
        read(path, "amazon2023")
    with pytest.raises(InputError, match=r"\(reviewerID, asin, overall\): set reader: amazon2014$"):
        read(save(tmp_path, "b.json", lines({**OLD_REVIEW, "helpful": [0, 1]})), "amazon2023")
    with pytest.raises(InputError, match=r"set reader: amazon2018"):
        read(path)


def test_python_literals_are_read_and_never_run(tmp_path: Path) -> None:
    rows = [
        {"asin": "a", "title": "It's", "categories": [["X", "Y"], ["Z"]], "imUrl": "http://e/x", "description": "one"},
        {"asin": "b", "price": 1.5},
    ]
    path = save(tmp_path, "meta.json.gz", gzip.compress("\n".join(map(repr, rows)).encode()))
    notes = Notes()
    batches = read_items("amazon2014", path, {}, notes=notes)
    assert [row for batch in batches for row in batch.to_pylist()] == [
        {"item_id": "a", "title": "It's", "description": "one", "categories": "X > Y > Z", "image": "http://e/x"},
        {"item_id": "b", "title": None, "description": None, "categories": None, "image": None},
    ]
    assert notes.lines() == ["meta.json.gz holds Python literals in the place of JSON; they are read, and not run"]
    bad = save(tmp_path, "bad.json", "{'asin': __import__('os').system('touch " + str(tmp_path / "ran") + "')}")
    with pytest.raises(InputError, match=r"bad.json:1: not JSON"):
        items(bad, "amazon2014")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("http://e/a", "http://e/a"),
        (["http://e/a", "b"], "http://e/a"),
        ([{"thumb": "t", "large": "l"}], "l"),
        ({"hi_res": [None, "h"], "large": [], "thumb": ["t"]}, "h"),
        ([], None),
        (None, None),
    ],
)
@pytest.mark.parametrize("field", ["images", "imUrl"])
def test_images_as_releases_write_them(tmp_path: Path, image: Any, expected: str | None, field: str) -> None:
    path = save(tmp_path, "m.jsonl", lines({"parent_asin": "a", field: image, "description": "one text", "title": "t"}))
    (row,) = items(path, "amazon2023")
    assert (row["image"], row["description"]) == (expected, "one text")


def test_rows_with_asin_alone_are_counted(tmp_path: Path) -> None:
    row = {"user_id": 7, "rating": "4", "timestamp": "1405588132000"}
    path = save(tmp_path, "a.jsonl", lines({**row, "asin": "x", "parent_asin": "p"}, {**row, "asin": "y"}))
    rows, notes = read(path, "amazon2023")
    assert rows == [("7", "p", 4.0, 1405588132000), ("7", "y", 4.0, 1405588132000)]
    assert notes == [f"1 rows of a.jsonl have asin and no parent_asin; they are read by asin (first: {path}:2)"]


def test_goodreads_and_yelp(tmp_path: Path) -> None:
    review = {
        "user_id": "u",
        "book_id": "9",
        "rating": 5,
        "review_text": "x",
        "date_updated": "Wed Mar 22 11:37:04 -0700 2017",
    }
    path = save(tmp_path, "g.json", lines(review, {**review, "rating": 0}))
    rows, notes = read(path, "goodreads", unrated=(0.0,))
    assert rows == [("u", "9", 5.0, 1490207824000)]
    assert notes == [
        f"1 rows of g.json are rated 0, which means not rated (unrated); they are left out (first: {path}:2)"
    ]
    book = {
        "book_id": "9",
        "title": "T",
        "popular_shelves": [{"count": "3", "name": "fantasy"}, {"count": "1", "name": "own"}],
    }
    assert items(save(tmp_path, "b.json", lines(book)), "goodreads")[0]["categories"] == "fantasy > own"
    review = {"user_id": "u", "business_id": "b", "stars": 4.0, "date": "2018-07-07 22:09:11", "text": "t"}
    assert read(save(tmp_path, "y.json", lines(review)), "yelp")[0] == [("u", "b", 4.0, 1531001351000)]
    assert items(save(tmp_path, "n.json", lines({"business_id": "b", "name": "N"})), "yelp")[0]["title"] == "N"


@pytest.mark.parametrize(
    ("reader", "line"), [("amazon2014", "u,i,4.0,1405588132\n"), ("amazon2018", "i,u,4.0,1405588132\n")]
)
def test_ratings_alone_of_old_releases(tmp_path: Path, reader: str, line: str) -> None:
    rows, notes = read(save(tmp_path, "ratings.csv", line), reader)
    assert rows == [("u", "i", 4.0, 1405588132)]
    assert "has no header; its columns are" in notes[0]


# --- JSON ---------------------------------------------------------------------------------------------------------


def test_json_arrays(tmp_path: Path) -> None:
    objects = [{"user_id": f"u{i}", "item_id": "ä", "rating": 3} for i in range(20_000)]
    rows, _ = read(save(tmp_path, "a.json", json.dumps(objects, indent=1, ensure_ascii=False)))
    assert [row[0] for row in rows] == [f"u{i}" for i in range(20_000)]
    for text, message in (
        ("[]", None),
        ('[{"user_id": "u"', r"element 1: the array is cut off or not JSON \(Expecting"),
        ('[{"user_id": "u", "item_id": "i", "rating": 3} {}]', r"element 1: no comma follows it"),
        ('[{"user_id": "u", "item_id": "i", "rating": 3}] x', r"goes on after its array"),
        ("[1]", r"element 1: a JSON object is expected, not 1"),
        ('[{"user_id": "u", "item_id": "i", "rating": "x"}]', r"b.json:element 1: rating must be a number, not \"x\""),
    ):
        path = save(tmp_path, "b.json", text)
        if message is None:
            assert read(path)[0] == []
        else:
            with pytest.raises(InputError, match=message):
                read(path)


def test_types_that_change_in_a_file(tmp_path: Path) -> None:
    rows = [{"user_id": i if i % 2 else f"u{i}", "item_id": float(i), "rating": i % 5 + 1} for i in range(600)]
    found, _ = read(save(tmp_path, "a.jsonl", lines(*rows)))
    assert found[:2] == [("u0", "0", 1.0, None), ("1", "1", 2.0, None)]
    assert len(found) == 600
    for bad in (2.5, True, [1], {"a": 1}, 1e300):
        with pytest.raises(InputError, match=r"a.jsonl:2: user_id must be text or a whole number"):
            read(save(tmp_path, "a.jsonl", lines(rows[0], {**rows[1], "user_id": bad})))
    with pytest.raises(InputError, match=r"a.jsonl:2: user_id is missing|a.jsonl:2: the field user_id is missing"):
        read(save(tmp_path, "a.jsonl", lines(rows[0], {**rows[1], "user_id": float("nan")})))


# --- text tables --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        ("a.CSV", CSV.encode(), None),
        ("a.txt", CSV.encode(), None),
        ("a", gzip.compress(CSV.encode(), mtime=0), None),
        ("a.csv.gz", CSV.encode(), "a.csv.gz is named .gz and not compressed; it is read as it is"),
        ("a.csv", CSV.replace("\n", "\r").encode(), "a.csv ends its lines with CR alone; it is read as that"),
        ("a.csv", CSV.replace("\n", "\r\n").encode(), None),
        ("a.csv", CSV.replace("\n", "\r", 1).encode(), None),  # found by the fuzzer: the first row went with the header
        ("a.csv", CSV.replace(",", ";").encode(), "a.csv: its columns are separated by semicolons"),
        (
            "a.csv",
            CSV.replace(",", ";").replace("3.5", "3,5").encode(),
            "a.csv: its columns are separated by semicolons",
        ),
        ("a.csv", ("sep=;\n" + CSV.replace(",", ";")).encode(), "a.csv: its columns are separated by semicolons"),
        ("a.csv", CSV.replace(",", "\t").encode(), None),
        ("a.csv", CSV.replace(",", "|").encode(), "a.csv: its columns are separated by bars"),
        ("a.dat", CSV.replace(",", "::").encode(), "a.dat: its columns are separated by double colons"),
        ("a.csv", CSV.replace(",", " , ", 3).encode(), None),
        ("a.csv", CSV.encode("utf-8-sig"), None),
        ("a.csv", CSV.encode("utf-16"), "a.csv is in UTF-16; it is read as that"),
        ("a.csv", CSV.encode("utf-16-be"), "a.csv is in UTF-16; it is read as that"),
        ("a.csv", CSV.encode("utf-32"), "a.csv is in UTF-32; it is read as that"),
        ("a.csv", ("\n\n" + CSV + "\n\n").encode(), None),
    ],
)
def test_text_as_people_save_it(tmp_path: Path, name: str, content: bytes, note: str | None) -> None:
    assert read(save(tmp_path, name, content)) == (ROWS, [note] if note else [])


def test_windows_1252(tmp_path: Path) -> None:
    text = CSV.replace("u1", "Zoë").replace("u2", "Núñez")
    rows, notes = read(save(tmp_path, "a.csv", text.encode("cp1252")))
    assert [row[0] for row in rows] == ["Zoë", "Núñez"]
    assert notes == ["a.csv is not UTF-8; it is read as Windows-1252"]
    assert read(save(tmp_path, "b.csv", text))[0] == rows
    with pytest.raises(InputError, match=r"a.csv:2: byte 0xd3 at column 1 is neither UTF-8 nor, .* Windows-1252; save"):
        read(save(tmp_path, "a.csv", CSV.replace("u1", "用户").encode("gbk")))
    with pytest.raises(InputError, match=r"a.csv:3: byte 0xeb at column 1 is neither UTF-8"):  # both in one file
        read(save(tmp_path, "a.csv", CSV.replace("u1", "Zoë").encode().replace(b"u2", b"\xebx")))
    marked = b"\xef\xbb\xbf" + text.encode("cp1252")
    with pytest.raises(InputError, match=r"b.csv:2: the text is not UTF-8; correct or remove the line"):
        read(save(tmp_path, "b.csv", marked))  # a byte-order mark of UTF-8 says what the file ought to be


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            CSV.replace("user_id,item_id,rating,timestamp\n", ""),
            r"a.csv:1: seems to have no header, its first line holds 'u1', ",
        ),
        ("user_id,item_id,rating,rating\nu,i,1,2\n", r"a.csv:1: the header names rating twice; correct the header"),
        (CSV + "u3,i3\n", r"row 3: 2 fields where the header has 4; correct or remove the line \(line 4\)"),
        (CSV + 'u3,"i\n3",3\n', r"row 3: 3 fields where the header has 4; correct or remove the line \(line 4\)"),
        (CSV + 'u3,"i3,3,1\nu4,i4,3,1\n', r"a.csv:4: a quote opens here or below and is not closed"),
        (CSV + 'u3,"i3"x,3,1\nu4,"i4\n",3,1\n', r"row 3: ',' expected after '\"' \(line 4\); write quotes inside"),
        (CSV + CSV, r"row 3: repeats the header, as joined files do; remove the row"),
        (
            CSV + 'u3,i3,"4,5",1\n',
            r"row 3: rating is '4,5', with a decimal comma; write 4.5, or separate the columns by semi",
        ),
        (
            CSV + "u3,i3,4,yesterday\n",
            r"row 3: timestamp is 'yesterday', neither a number in range nor a date such as 2014",
        ),
        (CSV + "u3,,4,1\n", r"row 3: item_id is missing; each row needs one"),
        (CSV + "u\x003,i,4,1\n", r"a.csv:4: holds a NUL byte, so it is no text file, or damaged"),
        ("userId,movieId,rating\nu,i,4\n", r"perhaps `columns: \{user_id: userId, item_id: movieId\}`"),
        ("user_id,item_id\nu,i\n", r"set columns.rating to one of them, or feedback: implicit where there are none"),
        ("user_id\nu\n", r"there is no column 'item_id'|there is no column 'user_id'"),
    ],
)
def test_one_row_is_blamed(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read(save(tmp_path, "a.csv", text))
    assert "\n" not in str(caught.value)


def test_a_header_of_data_is_not_read_as_names(tmp_path: Path) -> None:
    headerless = CSV.partition("\n")[2]
    path = save(tmp_path, "a.csv", headerless)
    mapped = {"user_id": "u1", "item_id": "i1", "rating": "4"}
    with pytest.raises(InputError, match=r"seems to have no header"):
        read(path, columns=mapped)
    assert read(path, header=("user_id", "item_id", "rating", "timestamp"))[0] == ROWS
    pairs = save(tmp_path, "b.csv", "u1,i1\nu2,i2\nu1,i3\n")
    with pytest.raises(InputError, match=r"row 2: 'u1' is both the name of a column and an id below it"):
        read(pairs, columns={"user_id": "u1", "item_id": "i1"}, scale=None)
    assert [row[:2] for row in read(pairs, header=("user_id", "item_id"), scale=None)[0]] == [
        ("u1", "i1"),
        ("u2", "i2"),
        ("u1", "i3"),
    ]
    numbered = save(tmp_path, "c.csv", "0,1,2\nu,i,3\n")  # as pandas writes columns without names
    assert read(numbered, columns={"user_id": "0", "item_id": "1", "rating": "2"})[0] == [("u", "i", 3.0, None)]


def test_ids_stay_what_they_are(tmp_path: Path) -> None:
    ids = [
        "007",
        "1e5",
        "NA",
        "null",
        "nan",
        " lead",
        "trail ",
        "[red]x[/red]",
        "[/]",
        ":smile:",
        "x/y",
        "O'Brien",
        "用户",
        "-5",
    ]
    text = "user_id,item_id,rating\n" + "".join(f"{name},{name},3\n" for name in ids) + '"a,b","say ""hi""",3\n'
    rows, _ = read(save(tmp_path, "a.csv", text))
    assert [row[0] for row in rows] == [*ids, "a,b"]
    assert rows[-1][1] == 'say "hi"'


def test_where_reads_any_format(tmp_path: Path) -> None:
    rows = [
        {"user_id": "u", "item_id": "a", "rating": 3, "kind": "x"},
        {"user_id": "u", "item_id": "b", "rating": 9, "kind": "y"},
    ]
    path = save(tmp_path, "a.jsonl", lines(*rows))
    assert [row[1] for row in read(path, where={"kind": "x"})[0]] == ["a"]
    with pytest.raises(
        InputError, match=r"no column 'sort' to choose rows by; its columns are user_id, item_id, rating, kind"
    ):
        read(path, where={"sort": "x"})
    shared = save(tmp_path, "items.csv", "item_id,title\na,A\nb,B\n")
    assert len(items(shared, where={"kind": "x"})) == 2  # an items file of both domains
    with pytest.raises(InputError, match=r"no column 'kind' to choose rows by"):
        items(shared, where={"kind": "x"}, every_where=True)


# --- RecBole ------------------------------------------------------------------------------------------------------

INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\nu1\ti1\t4\t1405588132\nu2\ti2\t3.5\t1405588140\n"


@pytest.mark.parametrize(
    "text",
    [
        INTER,
        "\ufeff" + INTER,
        INTER.replace(":token", "").replace(":float", ""),
        INTER.replace("\t", ","),
        INTER.replace("\t", " "),
        INTER.replace("u1", '"u1"').replace("i2", '"i2"'),
        INTER.replace("rating:float", "x:token_seq\trating:float")
        .replace("\t4", "\ta b\t4")
        .replace("\t3.5", "\t\t3.5"),
    ],
)
def test_recbole_as_people_have_it(tmp_path: Path, text: str) -> None:
    assert read(save(tmp_path, "a.inter", text), "recbole")[0] == ROWS


def test_recbole_without_ratings(tmp_path: Path) -> None:
    path = save(tmp_path, "a.inter", "user_id:token\titem_id:token\nu\ti\n")
    assert read(path, "recbole", scale=None)[0] == [("u", "i", None, None)]
    with pytest.raises(InputError, match=r"feedback: implicit where there are none"):
        read(path, "recbole")


# --- parquet ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array(["007", "9"], pa.string_view()), ["007", "9"]),
        (pa.array(["007", "9"], pa.large_string()), ["007", "9"]),
        (pa.array(["007", "9"]).dictionary_encode(), ["007", "9"]),
        (pa.array([b"007", b"9"], pa.binary()), ["007", "9"]),
        (pa.array([7, 2**62], pa.int64()), ["7", str(2**62)]),
        (pa.array([7, 2**64 - 1], pa.uint64()), ["7", str(2**64 - 1)]),
        (pa.array([7.0, 123456789012.0]), ["7", "123456789012"]),
        (pa.array(np.array([7, 2000], np.float16)), ["7", "2000"]),
        (pa.array([Decimal("7.00"), Decimal("12.00")]), ["7", "12"]),
    ],
)
def test_ids_of_any_type_are_text(tmp_path: Path, column: pa.Array, expected: Sequence[str]) -> None:
    pq.write_table(pa.table({"user_id": column, "item_id": ["i", "j"], "rating": [1.0, 2.0]}), tmp_path / "a.parquet")
    assert [row[0] for row in read(tmp_path / "a.parquet")[0]] == expected


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([7.0, float("nan")]), r"row 2: user_id is missing; each row needs one"),
        (pa.array(["u", None]), r"row 2: user_id is missing; each row needs one"),
        (pa.array([7.0, 1.5]), r"row 2: user_id is 1.5, of type double, which loses digits of ids; store them as text"),
        (pa.array([7.0, 2.0**53 + 2]), r"row 2: user_id is 9007199254740994.0, of type double, which loses digits"),
        (
            pa.array(np.array([7, 2**24 + 2], np.float32)),
            r"row 2: user_id is 16777218.0, of type float, which loses",
        ),
        (pa.array([True, False]), r"row 1: user_id is of type bool, which is no id"),
        (pa.array([b"u", b"\xff"]), r"row 2: user_id is of bytes that are not UTF-8; store it as text"),
        (pa.array(["u", "a\0"]), r"row 2: user_id holds a NUL character"),
        (pa.array([[1], [2]]), r"row 1: user_id is of type list<.*, which is no id"),
        (pa.array([1, 2], pa.duration("s")), r"row 1: user_id is of type duration\[s\], which is no id"),
    ],
)
def test_what_is_no_id_is_refused(tmp_path: Path, column: pa.Array, message: str) -> None:
    pq.write_table(pa.table({"user_id": column, "item_id": ["i", "j"], "rating": [1.0, 2.0]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=message):
        read(tmp_path / "a.parquet")


MOMENT = datetime(2014, 7, 17, 9, 8, 52, tzinfo=UTC)


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([MOMENT]), 1405588132000),
        (pa.array([MOMENT], pa.timestamp("ns")), 1405588132000),
        (pa.array([date(2014, 7, 17)]), 1405555200000),
        (pa.array(["2014-07-17 09:08:52"]), 1405588132000),
        (pa.array(["2014-07-17T09:08:52Z"]), 1405588132000),
        (pa.array(["2014-07-17T11:08:52.000+02:00"], pa.string_view()), 1405588132000),
        (pa.array(["2014-07-17"]), 1405555200000),
        (pa.array(["1405588132.0"]), 1405588132),
        (pa.array([1405588132.7]), 1405588132),
        (pa.array([Decimal("1405588132.7")]), 1405588132),
        (pa.array([None], pa.int64()), None),
    ],
)
def test_times_of_any_type(tmp_path: Path, column: pa.Array, expected: int | None) -> None:
    pq.write_table(
        pa.table({"user_id": ["u"], "item_id": ["i"], "rating": [1], "timestamp": column}), tmp_path / "a.parquet"
    )
    assert read(tmp_path / "a.parquet")[0] == [("u", "i", 1.0, expected)]


def test_a_parquet_file_by_any_name(tmp_path: Path) -> None:
    pq.write_table(pa.table({"user_id": ["u"], "item_id": ["i"], "rating": [1.0]}), tmp_path / "a.data")
    assert read(tmp_path / "a.data")[0] == [("u", "i", 1.0, None)]
    with pytest.raises(InputError, match=r"a.parquet: not a whole parquet file \(it does not begin as one does\)"):
        read(save(tmp_path, "a.parquet", CSV))


# --- what is no table ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\n", r"is a Git LFS pointer, not the data; fetch"),
        (b"<!DOCTYPE html><html>404</html>", r"is a web page, not data, as failed downloads are"),
        (b"PK\x03\x04rest", r"is a zip archive or a spreadsheet; unpack it, or save it as CSV"),
        (b"BZh9", r"is packed with bzip2; unpack it"),
        (b"\x80\x04\x95", r"is a Python pickle, which is not opened because that runs code"),
        (b"SQLite format 3\x00", r"is an SQLite database"),
        (gzip.compress(gzip.compress(b"x", mtime=0), mtime=0), r"is packed with gzip twice; unpack it once"),
        (b"", r"is empty; fetch it again"),
        (b" \n\n", r"is empty; fetch it again"),
        (b"a" * (17 << 20), r":1: is longer than 16 MiB without an end"),
    ],
)
def test_other_kinds_of_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    for name in ("a.csv", "a.jsonl.gz"):
        with pytest.raises(InputError, match=message):
            read(save(tmp_path, name, content), "amazon2023" if "json" in name else "table")


# --- ratings and words --------------------------------------------------------------------------------------------


def test_scales_are_told_by_their_range(tmp_path: Path) -> None:
    text = "user_id,item_id,rating\n" + "".join(f"u{i},i,{value}\n" for i, value in enumerate([1, 7, 10, 0, 3, 5]))
    with pytest.raises(
        InputError, match=r"not 7; .*rating_scale: those around it run from 0 to 10, perhaps of 0 to 10$"
    ):
        read(save(tmp_path, "a.csv", text))
    halves = text.replace(",7\n", ",0.5\n").replace(",10\n", ",4.5\n").replace(",0\n", ",2\n")
    with pytest.raises(InputError, match=r"run in half steps from 0.5 to 5, perhaps of 0.5 to 5$"):
        read(save(tmp_path, "a.csv", halves))
    zeros = text.replace(",7\n", ",2\n").replace(",10\n", ",4\n")
    with pytest.raises(InputError, match=r"run from 0 to 5; where 0 means not rated, set unrated: \[0\]$"):
        read(save(tmp_path, "a.csv", zeros))
    rows, notes = read(save(tmp_path, "a.csv", zeros), unrated=(0.0,))
    assert [row[2] for row in rows] == [1, 2, 4, 3, 5]
    assert notes[0].startswith(
        "1 rows of a.csv are rated 0, which means not rated (unrated); they are left out (first: "
    )


def test_words_of_scripts_without_spaces() -> None:
    texts = ["这本书非常好看", "とても良い本です", "great 好书 indeed", "ดีมากจริง", "plain words here", "", "　"]
    assert count_words(pa.array(texts)).to_pylist() == [7, 8, 4, 3, 3, 0, 1]


def test_blank_lines_of_json_are_counted_and_not_taken_apart(tmp_path: Path) -> None:
    row = json.dumps({"user_id": "u", "item_id": "i", "rating": 3})
    assert len(read(save(tmp_path, "a.jsonl", "\n" * 5 + row + "\n" * 100_000))[0]) == 1
    with pytest.raises(InputError, match=r"a.jsonl:7: a JSON object is expected, not 5"):
        read(save(tmp_path, "a.jsonl", "\n" * 5 + row + "\n5" + "\n" * 10))
