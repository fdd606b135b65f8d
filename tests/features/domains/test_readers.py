"""Readers: the same rows from every format, and the exact line of every fault."""

import gzip
import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.domains import raw_files
from features.domains.readers import INTERACTIONS, ITEMS, count_words, read_interactions, read_items
from features.errors import InputError

SCALE = (1.0, 5.0)


def interactions(reader: str, path: Path, columns: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    batches = list(read_interactions(reader, path, columns or {}, SCALE))
    assert all(batch.schema == INTERACTIONS for batch in batches)
    return [row for batch in batches for row in batch.to_pylist()]


def items(reader: str, path: Path, columns: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    batches = list(read_items(reader, path, columns or {}))
    assert all(batch.schema == ITEMS for batch in batches)
    return [row for batch in batches for row in batch.to_pylist()]


def review(**changes: Any) -> dict[str, Any]:
    row = {"rating": 4.0, "title": "Nice", "text": "I liked it", "parent_asin": "B1", "user_id": "U1", "timestamp": 7}
    return {**row, "asin": "X", "images": [], "helpful_vote": 0, "verified_purchase": True, **changes}


def write(path: Path, *rows: Any) -> Path:
    """JSON lines; text and bytes go in as they are."""
    data = b"\n".join(
        row if isinstance(row, bytes) else row.encode() if isinstance(row, str) else json.dumps(row).encode()
        for row in rows
    )
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


# --- what is read -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_amazon_reviews(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, review(), "", review(user_id="U2", title=None, text=" Fine ä\n"), "  ", "")
    assert interactions("amazon2023", path) == [
        {"user_id": "U1", "item_id": "B1", "rating": 4.0, "text": "Nice I liked it", "words": 3, "timestamp": 7},
        {"user_id": "U2", "item_id": "B1", "rating": 4.0, "text": "Fine ä", "words": 2, "timestamp": 7},
    ]


def test_amazon_reviews_without_text_or_time(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"rating": 5, "user_id": "U1", "parent_asin": "B1"}, review(title="", text=""))
    assert [
        (row["rating"], row["text"], row["words"], row["timestamp"]) for row in interactions("amazon2023", path)
    ] == [
        (5.0, None, 0, None),
        (4.0, None, 0, 7),
    ]


def test_amazon_metadata(tmp_path: Path) -> None:
    full = {
        "parent_asin": "B1",
        "title": "T",
        "description": ["One.", "Two."],
        "categories": ["Books", "Crime"],
        "images": [{"thumb": "t", "large": "l", "hi_res": "h"}, {"large": "second"}],
        "details": {"deep": [1, "a"]},
    }
    thumb = {"parent_asin": "B2", "title": None, "description": [], "images": [{"thumb": "t", "large": None}]}
    path = write(tmp_path / "m.jsonl", full, thumb, {"parent_asin": "B3", "images": [], "description": [""]})
    empty = {"title": None, "description": None, "categories": None, "image": None}
    assert items("amazon2023", path) == [
        {"item_id": "B1", "title": "T", "description": "One. Two.", "categories": "Books > Crime", "image": "l"},
        {**empty, "item_id": "B2", "image": "t"},
        {**empty, "item_id": "B3"},
    ]


def test_recbole(tmp_path: Path) -> None:
    path = tmp_path / "a.inter"
    path.write_text('user_id:token\titem_id:token\trating:float\ttimestamp:float\nNA\t007\t3.5\t12.0\n"q\t8\t5\t\n')
    assert interactions("recbole", path) == [
        {"user_id": "NA", "item_id": "007", "rating": 3.5, "text": None, "words": 0, "timestamp": 12},
        {"user_id": '"q', "item_id": "8", "rating": 5.0, "text": None, "words": 0, "timestamp": None},
    ]
    path = tmp_path / "a.item"
    path.write_text("item_id:token\tname:token_seq\tclass:token_seq\n007\tA b\tDrama Crime\n")
    assert items("recbole", path, {"title": "name", "categories": "class"}) == [
        {"item_id": "007", "title": "A b", "description": None, "categories": "Drama Crime", "image": None}
    ]


TABLE = {
    "user_id": [1, 2],
    "movie": ["007", "NA"],
    "rating": [3, 5],
    "text": ["well, done", None],
    "timestamp": [datetime(2020, 1, 1), None],
}


def test_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table(TABLE), tmp_path / "a.parquet")
    assert interactions("table", tmp_path / "a.parquet", {"item_id": "movie"}) == [
        {"user_id": "1", "item_id": "007", "rating": 3, "text": "well, done", "words": 2, "timestamp": 1577836800000},
        {"user_id": "2", "item_id": "NA", "rating": 5, "text": None, "words": 0, "timestamp": None},
    ]
    table = pa.table({"item_id": ["a"], "categories": [["x", "y"]], "description": pa.array(["d"]).dictionary_encode()})
    pq.write_table(table, tmp_path / "i.pq")
    assert items("table", tmp_path / "i.pq") == [
        {"item_id": "a", "title": None, "description": "d", "categories": "x > y", "image": None}
    ]


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.tsv"])
def test_csv(tmp_path: Path, name: str) -> None:
    text = '\ufeffuser_id,item_id,rating,text,extra\n01,NA,3.5,"two\nlines, quoted",x\n02,null,5,,y\n'
    text = text.replace(",", "\t") if name == "a.tsv" else text
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    rows = interactions("table", tmp_path / name)
    assert [(row["user_id"], row["item_id"], row["rating"], row["words"]) for row in rows] == [
        ("01", "NA", 3.5, 3),
        ("02", "null", 5.0, 0),
    ]
    assert rows[0]["text"] in ("two\nlines, quoted", "two\nlines\t quoted")
    assert rows[1]["text"] is None


def test_words_against_python() -> None:
    texts = ["", " ", "a", " a  b\tc\n", "don't stop", "x" * 50, "\n\n", "a\n b"]
    assert count_words(pa.array(texts)).to_pylist() == [len(text.split()) for text in texts]


def test_blocks_do_not_change_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl.gz", *[review(user_id=f"U{i}", text="word " * (i % 40)) for i in range(300)])
    whole = interactions("amazon2023", path)
    monkeypatch.setattr(raw_files, "BLOCK", 700)  # some lines are longer than that
    assert interactions("amazon2023", path) == whole
    assert len(whole) == 300


# --- what is refused ----------------------------------------------------------------------------------------------


def refusal(reader: str, path: Path, columns: Mapping[str, str] | None = None, kind: str = "interactions") -> str:
    with pytest.raises(InputError, match=path.name) as caught:
        interactions(reader, path, columns) if kind == "interactions" else items(reader, path, columns)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    return message.removeprefix(str(path))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("[1, 2]", ":4: a JSON object is expected, not [1, 2]; correct or remove the line"),
        ("7", ":4: a JSON object is expected, not 7; correct or remove the line"),
        (
            '{"user_id": "U"',
            ":4: not JSON (Expecting ',' delimiter: line 1 column 16 (char 15)); correct or remove the line",
        ),
        (json.dumps(review()) + json.dumps(review()), ":4: not JSON (Extra data: line 1 column 182 (char 181)); "),
        (b'{"user_id": "\xff"}', ":4: the text is not UTF-8; correct or remove the line"),
        ('{"user_id": "a", "user_id": "b"}', ":4: user_id is given twice; correct or remove the line"),
        ({"parent_asin": "B", "rating": 3}, ":4: the field user_id is missing or null; correct or remove the line"),
        (
            review(parent_asin=None, asin=None),
            ":4: the field parent_asin is missing or null; correct or remove the line",
        ),
        (review(rating=None), ":4: the field rating is missing or null; correct or remove the line"),
        (review(user_id=""), ":4: user_id is missing; each row needs one"),
        (review(user_id=5.5), ":4: user_id must be text or a whole number, not 5.5; correct or remove the line"),
        (review(user_id=True), ":4: user_id must be text or a whole number, not true; correct or remove the line"),
        (review(rating="4*"), ':4: rating must be a number, not "4*"; correct or remove the line'),
        (review(rating=True), ":4: rating must be a number, not true; correct or remove the line"),
        (review(rating=float("nan")), ":4: rating is NaN; correct or remove the row"),
        (review(rating=6), ":4: rating must lie from 1 to 5, not 6; correct it or set rating_scale"),
        (review(rating=0.5), ":4: rating must lie from 1 to 5, not 0.5; correct it or set rating_scale"),
        (review(rating=float("inf")), ":4: rating must lie from 1 to 5, not inf; correct it or set rating_scale"),
        (
            review(timestamp=True),
            ":4: timestamp must be a whole number or a date, not true; correct or remove the line",
        ),
        (review(text={"a": 1}), ':4: text must be text or a list of texts, not {"a": 1}; correct or remove the line'),
    ],
)
@pytest.mark.parametrize("block", [1 << 23, 300])
def test_faults_of_json_lines(
    tmp_path: Path, bad: Any, message: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raw_files, "BLOCK", block)
    path = write(tmp_path / "a.jsonl", review(), "", review(), bad, review(), review(rating=9))
    assert refusal("amazon2023", path).startswith(message)


def test_faults_of_metadata(tmp_path: Path) -> None:
    good = {"parent_asin": "B"}
    path = write(tmp_path / "m.jsonl", good, {"parent_asin": "C", "images": [5]})
    message = ":2: images must be a list of objects or addresses, not [5]; correct or remove the line"
    assert refusal("amazon2023", path, kind="items") == message
    path = write(tmp_path / "n.jsonl", good, {"title": "no id"})
    message = ":2: the field parent_asin is missing or null; correct or remove the line"
    assert refusal("amazon2023", path, kind="items") == message


@pytest.mark.parametrize("reader", ["amazon2023", "recbole", "table"])
def test_broken_gzip(tmp_path: Path, reader: str) -> None:
    head, row = ("user_id,item_id,rating", "U{},B,4") if reader == "table" else ("", "")
    if reader == "recbole":
        head, row = "user_id:token\titem_id:token\trating:float", "U{}\tB\t4"
    lines = [row.format(i * 7919) if row else json.dumps(review(user_id=f"U{i * 7919}")) for i in range(3000)]
    data = gzip.compress("\n".join([head, *lines] if head else lines).encode())
    path = tmp_path / "a.csv.gz"
    path.write_bytes(data[: len(data) // 2])
    assert refusal(reader, path) == ": the gzip file is truncated; fetch it again"
    path.write_bytes(data[:200] + bytes(200) + data[400:])
    assert refusal(reader, path).startswith(": the gzip file is damaged (")
    path.write_bytes(gzip.compress(data))
    assert refusal(reader, path) == ": is packed with gzip twice; unpack it once"


def test_missing_file(tmp_path: Path) -> None:
    assert refusal("table", tmp_path / "a.csv") == ": no such file; put it there or correct its name"


TYPES = "name:type fields with type token, token_seq, float, float_seq"
HEAD = "user_id:token\titem_id:token\trating:float"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ": is empty; fetch it again"),
        ("user_id:text\n", f":1: a RecBole header holds {TYPES}, not 'user_id:text'; correct the header"),
        ("user_id:token\tuser_id:token\n", ":1: the header names user_id twice; correct the header"),
        (
            "user_id:token\titem_id:token\nu\ti\n",
            ": there is no column 'rating' for rating; its columns are user_id, item_id; set columns.rating to one of",
        ),
        (f"{HEAD}\nu\ti\t3\nu\ti\n", ":3: 2 fields where the header has 3; correct or remove the line"),
        (f"{HEAD}\nu\ti\t3\nu\ti\tx\n", ":3: rating is 'x', not a number in range; correct it"),
        (f"{HEAD}\nu\ti\t3\n\nu\ti\tnan\n", ":4: rating is NaN; correct or remove the row"),
        (f"{HEAD}\nu\ti\t\n", ":2: rating is missing; each interaction needs one"),
        (f"{HEAD}\nu\ti\t3\nu\t\t3\n", ":3: item_id is missing; each row needs one"),
        (f"{HEAD}\nu\ti\t50\n", ":2: rating must lie from 1 to 5, not 50; correct it or set rating_scale"),
        (
            f"{HEAD}\ttimestamp:float\nu\ti\t5\t1e30\n",
            ":2: timestamp is '1e30', neither a number in range nor a date such as 2014-07-17 09:08:52; correct it",
        ),
    ],
)
def test_faults_of_recbole(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.inter"
    path.write_text(text)
    assert refusal("recbole", path).startswith(message)


TWO_DOMAINS = pa.table(
    {
        "user_id": ["u", "u", "v", "v"],
        "kind": ["film", "song", None, "film"],
        "year": [1, 1, 1, 2],
        "item_id": ["a", "b", "c", ""],
        "rating": [3.0, 9.0, 4.0, 2.0],
    }
)


def table_file(folder: Path, suffix: str, table: pa.Table) -> Path:
    path = folder / f"two{suffix}"
    if suffix == ".csv":
        table.to_pandas().to_csv(path, index=False)
    else:
        pq.write_table(table, path)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_only_the_rows_that_are_wanted_are_read(tmp_path: Path, suffix: str) -> None:
    path = table_file(tmp_path, suffix, TWO_DOMAINS)
    where = {"kind": "film", "year": "1"}
    (batch,) = read_interactions("table", path, {}, SCALE, where)  # the rating of 9 and the empty id are not
    assert batch.schema == INTERACTIONS
    assert batch.to_pydict()["item_id"] == ["a"]
    (batch,) = read_items("table", path, {"title": "kind"}, {"kind": "film", "year": "1"})
    assert batch.to_pydict()["title"] == ["film"]
    with pytest.raises(InputError, match=r"row 2: rating must lie from 1 to 5, not 9; correct it or set rating_scale"):
        list(read_interactions("table", path, {}, SCALE, {"kind": "song"}))
    with pytest.raises(InputError, match=r"row 4: item_id is missing; each row needs one"):
        list(read_interactions("table", path, {}, SCALE, {"year": "2"}))
    with pytest.raises(
        InputError, match=r"no column 'sort' to choose rows by; its columns are user_id, kind, year, .*set"
    ):
        list(read_interactions("table", path, {}, SCALE, {"sort": "film"}))


def test_rows_are_not_chosen_by_what_is_no_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"item_id": ["i"], "tags": [{"a": 1}]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"tags is of type struct<a: int64>, not text; drop where.tags"):
        list(read_items("table", tmp_path / "a.parquet", {}, {"tags": "x"}))


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_implicit_feedback_reads_no_rating(tmp_path: Path, suffix: str) -> None:
    for table in (TWO_DOMAINS[:3], TWO_DOMAINS[:3].drop_columns(["rating"])):
        (batch,) = read_interactions("table", table_file(tmp_path, suffix, table), {}, None)
        assert batch.schema == INTERACTIONS
        assert batch.to_pydict()["rating"] == [None, None, None]


def test_faults_of_tables(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("user_id,item_id,rating\nu,i,3\nu,j,9\n")
    assert refusal("table", path) == ": row 2: rating must lie from 1 to 5, not 9; correct it or set rating_scale"
    path.write_text("user_id,item_id,rating\nu,i,3\nu,j\n")
    assert refusal("table", path) == ": row 2: 2 fields where the header has 3; correct or remove the line (line 3)"
    message = (
        ": there is no column 'stars' for rating; its columns are user_id, item_id, rating; set columns.rating to one"
    )
    assert refusal("table", path, {"rating": "stars"}).startswith(message)
    path.write_text("")
    assert refusal("table", path) == ": is empty; fetch it again"
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 not parquet")
    assert refusal("table", path).startswith(": not a whole parquet file (Parquet magic bytes not found")
    pq.write_table(pa.table({"user_id": ["u"], "item_id": [{"a": 1}], "rating": [1.0]}), path)
    assert (
        refusal("table", path)
        == ": row 1: item_id is of type struct<a: int64>, which is no id; map a column of text or numbers"
    )
    pq.write_table(pa.table({"user_id": ["u"], "item_id": ["i"], "rating": [[1.0]]}), path)
    assert refusal("table", path) == ": row 1: rating is of type list<element: double>, not a number; map another"
    path = tmp_path / "a.xlsx"
    path.write_bytes(b"PK\x03\x04")
    assert refusal("table", path) == ": is a zip archive or a spreadsheet; unpack it, or save it as CSV"


def test_a_header_alone_has_no_rows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("user_id,item_id,rating\n")
    assert interactions("table", tmp_path / "a.csv") == []
    (tmp_path / "a.inter").write_text("user_id:token\titem_id:token\trating:float\n")
    assert interactions("recbole", tmp_path / "a.inter") == []
