"""Prepared domains: duplicates, filters, counts, keys, and nothing half-written."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.domains import domain as domain_module
from features.domains.domain import Domain, DomainSpec, domain_key, find_sources, open_domain, prepare_domain
from features.domains.filters import FilterSpec
from features.errors import InputError
from features.simulate.simulator import SimulateSpec, simulate
from features.store.external_sort import external_sort

FOOD_KITCHEN = Path(__file__).parents[3].parent / "shared" / "data" / "food-kitchen"
REAL = Path(__file__).parents[3].parent / "shared" / "data" / "books-movies-ratings"
CSV = """user_id,item_id,rating,text,timestamp
u2,b,4,one two three,20
u1,b,2,one two,30
u1,a,5,one,10
u1,b,4,one two three four,20
u2,a,1,,40
u1,b,3.5,one two three,
é,a,3,one,50
"""
SPEC = DomainSpec(name="toy", reader="table", interactions="toy.csv")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "toy.csv").write_text(CSV)
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def visible(store: Path) -> list[str]:
    return sorted(path.name for path in store.iterdir() if path.name != ".hashes") if store.exists() else []


# --- what is prepared ---------------------------------------------------------------------------------------------


def test_tables_are_sorted_unique_and_typed(data: Path, store: Path) -> None:
    toy = prepare_domain(SPEC, data, store)
    frame = toy.interactions()
    pairs = list(zip(frame["user_id"], frame["item_id"], strict=True))
    assert pairs == [("u1", "a"), ("u1", "b"), ("u2", "a"), ("u2", "b"), ("é", "a")]
    assert frame["rating"].tolist() == [5.0, np.float32(9.5 / 3), 1.0, 4.0, 3.0]
    assert frame["rating"].dtype == np.float32
    assert frame["text"].tolist()[:2] == ["one", "one two"]
    assert frame["text"].isna().tolist() == [False, False, True, False, False]
    assert list(frame.columns) == ["user_id", "item_id", "rating", "text", "timestamp"]
    assert toy.users().to_dict("list") == {"user_id": ["u1", "u2", "é"], "interactions": [2, 2, 1]}
    assert toy.items()["item_id"].tolist() == ["a", "b"]
    assert list(toy.items().columns) == ["item_id", "title", "description", "categories", "image"]
    assert list(toy.interactions(["rating", "user_id"]).columns) == ["rating", "user_id"]
    assert toy.path == store / f"toy-{toy.key[:12]}"
    assert visible(store) == [toy.path.name]


@pytest.mark.parametrize(
    ("rule", "rating", "text"),
    [("mean", 9.5 / 3, "one two"), ("last", 2.0, "one two"), ("first", 4.0, "one two three four")],
)
def test_duplicates_are_settled_by_rule_and_counted(
    data: Path, store: Path, rule: str, rating: float, text: str
) -> None:
    toy = prepare_domain(replace(SPEC, duplicates=rule), data, store)
    row = toy.interactions().set_index(["user_id", "item_id"]).loc[("u1", "b")]
    assert row["rating"] == np.float32(rating)
    assert row["text"] == text
    assert toy.manifest["duplicates"] == {"rule": rule, "rows": 2}


@pytest.mark.parametrize(("rule", "rating"), [("last", 3.0), ("first", 1.0)])
def test_without_times_file_order_decides(data: Path, store: Path, rule: str, rating: float) -> None:
    (data / "toy.csv").write_text("user_id,item_id,rating\nu,a,1\nv,a,5\nu,a,2\nu,a,3\n")
    toy = prepare_domain(replace(SPEC, duplicates=rule), data, store)
    assert toy.interactions()["rating"].tolist() == [rating, 5.0]


def test_repeats_are_kept_at_their_times_where_the_spec_says_so(tmp_path: Path, store: Path) -> None:
    """One line for each time; a line that stands twice, at one time, counts once."""
    (folder := tmp_path / "log").mkdir()
    rows = "u,a,5\nu,a,9\nu,b,7\nu,a,9\nv,a,1\n"
    (folder / "all.csv").write_text(f"user_id,item_id,position\n{rows}")
    spec = DomainSpec(
        name="log", reader="table", interactions="all.csv", feedback="implicit", columns={"timestamp": "position"},
        duplicates="keep",
    )  # fmt: skip
    log = prepare_domain(spec, folder, store)
    table = log.interactions()
    lines = sorted(zip(table["user_id"], table["item_id"], table["timestamp"], strict=True))
    assert lines == [("u", "a", 5), ("u", "a", 9), ("u", "b", 7), ("v", "a", 1)]
    assert log.manifest["duplicates"] == {"rule": "keep", "rows": 2}
    assert [count["interactions"] for count in log.manifest["counts"]] == [5, 4]


def test_counts_before_and_after_each_filter(data: Path, store: Path) -> None:
    toy = prepare_domain(replace(SPEC, filters=FilterSpec(min_words=1, min_user_reviews=2)), data, store)
    assert toy.manifest["counts"] == [
        {"step": "read", "interactions": 7, "users": 3, "items": 2},
        {"step": "duplicates=mean", "interactions": 5, "users": 3, "items": 2},
        {"step": "min_words=1", "interactions": 4, "users": 3, "items": 2},
        {"step": "min_user_reviews=2", "interactions": 2, "users": 1, "items": 2},
    ]
    assert (toy.manifest["users_dropped"], toy.manifest["items_dropped"]) == (2, 0)
    assert toy.users().to_dict("list") == {"user_id": ["u1"], "interactions": [2]}


def test_metadata_first_entry_counts_and_absent_is_null(data: Path, store: Path) -> None:
    (data / "items.csv").write_text("item_id,title,description,image\nb,B,first,x.jpg\nz,Z,,\nb,B2,second,\n")
    spec = replace(SPEC, items="items.csv")
    assert prepare_domain(spec, data, store).items().fillna("-").to_numpy().tolist() == [
        ["a", "-", "-", "-", "-"],
        ["b", "B", "first", "-", "x.jpg"],
    ]
    described = prepare_domain(replace(spec, filters=FilterSpec(require_description=True)), data, store)
    assert described.items()["item_id"].tolist() == ["b"]


def test_manifest_names_sources_and_spec(data: Path, store: Path) -> None:
    manifest = json.loads((prepare_domain(SPEC, data, store).path / "manifest.json").read_text())
    assert manifest["sources"][0]["file"] == "toy.csv"
    assert manifest["sources"][0]["bytes"] == len(CSV.encode())
    assert manifest["spec"]["reader"] == "table"
    assert manifest["simulated"] is False
    assert manifest["data"] == str(data)


def test_progress_counts_rows(data: Path, store: Path) -> None:
    rows: list[int] = []
    prepare_domain(SPEC, data, store, rows.append)
    assert sum(rows) == 7


def test_simulated_domains_are_labelled(tmp_path: Path, store: Path) -> None:
    sizes = {"books": {"users": 60, "items": 40, "ratings": 600}}
    folder = simulate(SimulateSpec(domains=sizes, overlap=0, images=0.5), tmp_path / "data")
    spec = DomainSpec(name="books", reader="amazon2023", interactions="books.jsonl.gz", items="meta_books.jsonl.gz")
    music = FilterSpec(min_words=10, require_description=True, require_image=True)
    books = prepare_domain(replace(spec, filters=music), folder, store)
    assert books.simulated
    assert all((books.data_folder / image).is_file() for image in books.items()["image"])
    assert 0 < len(books.items()) <= 20
    nested = replace(spec, interactions="data/books.jsonl.gz", items="data/meta_books.jsonl.gz")
    assert prepare_domain(nested, tmp_path, store).simulated
    shutil.copy(folder / "books.jsonl.gz", tmp_path)
    assert not prepare_domain(replace(spec, items=None), tmp_path, store).simulated


# --- keys ---------------------------------------------------------------------------------------------------------


def key_of(spec: DomainSpec, data: Path, store: Path) -> str:
    return domain_key(spec, find_sources(spec, data, store), simulated=False)


def test_key_follows_contents_and_spec_alone(data: Path, store: Path, tmp_path: Path) -> None:
    key = key_of(SPEC, data, store)
    (data / "copy.csv").write_text(CSV)
    assert key_of(replace(SPEC, interactions="copy.csv"), data, store) == key
    others = [
        replace(SPEC, duplicates="last"),
        replace(SPEC, filters=FilterSpec(min_words=1)),
        replace(SPEC, rating_scale=(0, 5)),
        replace(SPEC, columns={"text": "text"}),
    ]
    assert len({key, *(key_of(other, data, store) for other in others)}) == 5
    (data / "toy.csv").write_text(CSV.replace("u2,b,4", "u2,b,5"))
    assert key_of(SPEC, data, store) != key


def test_prepared_once(data: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare_domain(SPEC, data, store)

    def never(*_: Any) -> Any:
        raise AssertionError("prepared or hashed again")

    monkeypatch.setattr(domain_module, "_write_tables", never)
    monkeypatch.setattr("features.domains.domain.hashlib.file_digest", never)
    second = prepare_domain(SPEC, data, store)
    assert second == first
    assert open_domain(first.path) == first


def test_moved_raw_files_are_found_again(data: Path, store: Path, tmp_path: Path) -> None:
    first = prepare_domain(SPEC, data, store)
    moved = data.rename(tmp_path / "elsewhere")
    again = prepare_domain(SPEC, moved, store)
    assert (again.key, again.data_folder) == (first.key, moved)


def test_a_folder_without_manifest_is_made_anew(data: Path, store: Path) -> None:
    first = prepare_domain(SPEC, data, store)
    (first.path / "manifest.json").unlink()
    assert len(prepare_domain(SPEC, data, store).interactions()) == 5


# --- what is refused ----------------------------------------------------------------------------------------------


def refusal(spec: DomainSpec, data: Path, store: Path) -> str:
    with pytest.raises(InputError, match=r"\S: .+; .+") as caught:
        prepare_domain(spec, data, store)
    assert "\n" not in str(caught.value)
    assert visible(store) == []
    return str(caught.value)


def test_missing_file(data: Path, store: Path, tmp_path: Path) -> None:
    spec = replace(SPEC, interactions="books.csv")
    where = f"domain toy looks for books.csv in the data folder {data}"
    assert refusal(spec, data, store) == f"{data}/books.csv: no such file; {where}; name another folder"
    assert f"in the data folder {tmp_path}/nowhere, which does not exist" in refusal(spec, tmp_path / "nowhere", store)
    assert "looks for items.csv in" in refusal(replace(SPEC, items="items.csv"), data, store)


def test_faults_inside_a_file_leave_nothing(data: Path, store: Path) -> None:
    (data / "toy.csv").write_text(CSV + "u,c,9,,\n")
    message = f"{data}/toy.csv: row 8: rating must lie from 1 to 5, not 9; correct it or set rating_scale"
    message += ": those around it run in half steps from 1 to 9, perhaps of 1 to 10"
    assert refusal(SPEC, data, store) == message
    (data / "toy.csv").write_text("user_id,item_id,rating\n")
    assert refusal(SPEC, data, store) == f"{data}/toy.csv: holds no interactions; give a file that does"


@pytest.mark.parametrize(
    ("filters", "step", "before"),
    [
        (FilterSpec(min_words=2, require_description=True), "require_description=true", 2),
        (FilterSpec(min_words=90), "min_words=90", 5),
        (FilterSpec(min_words=1, min_user_reviews=3), "min_user_reviews=3", 4),
        (FilterSpec(k_core=4), "k_core=4", 5),
    ],
)
def test_nothing_left_names_the_filter(data: Path, store: Path, filters: FilterSpec, step: str, before: int) -> None:
    message = refusal(replace(SPEC, filters=filters), data, store)
    place = f"{data}/toy.csv: nothing is left of domain toy after the filter {step}"
    assert message.startswith(
        f"{place}: read 7 interactions of 3 users and 2 items, duplicates=mean 5 interactions of "
    )
    assert f" {before} interactions of " in message
    assert message.endswith(f", {step} 0 interactions of 0 users and 0 items; loosen the filter")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "a/b"}, r"domain name 'a/b': use letters, digits, - and _ only"),
        ({"reader": "amazon"}, r"domains.toy.reader is 'amazon'; choose from table, recbole, amazon2023, amazon2018, "),
        ({"duplicates": "max"}, r"domains.toy.duplicates is 'max'; choose from mean, last, first, keep"),
        ({"columns": {"stars": "x"}}, r"domains.toy.columns: unknown 'stars'; choose from user_id, item_id, rating, "),
        ({"columns": {"title": "x"}}, r"domains.toy.columns: title is a column of items, but no items file is given"),
        ({"item_columns": {"rating": "x"}}, r"item_columns: unknown 'rating'; choose from item_id, title, description"),
        ({"item_columns": {"title": "x"}}, r"item_columns: title is a column of items, but no items file is given"),
        ({"interactions": ()}, r"domains.toy.interactions is \[\]; name at least one file, each once"),
        ({"interactions": ("a", "a")}, r"domains.toy.interactions is \['a', 'a'\]; name at least one file, each once"),
        ({"catalogue": "listed"}, r"domains.toy.catalogue is 'listed', but no items file is given; set items"),
        ({"header": ("a", "a")}, r"domains.toy.header names a twice"),
        ({"where": {"domain": 3}}, r"domains.toy.where.domain is 3; give the value as text, in quotes"),
        ({"catalogue": "all"}, r"domains.toy.catalogue is 'all'; choose from used, listed"),
        ({"catalogue": "listed", "items": None}, r"catalogue is 'listed', but no items file is given; set items"),
        ({"feedback": "none"}, r"domains.toy.feedback is 'none'; choose from explicit, implicit"),
        (
            {"feedback": "implicit", "columns": {"rating": "x"}},
            r"columns: rating is not read where feedback is implicit",
        ),
        ({"rating_scale": (5, 1)}, r"domains.toy.rating_scale is \[5, 1\]; give the lowest and the highest rating"),
        ({"rating_scale": ("1", "5")}, r"domains.toy.rating_scale is \['1', '5'\]; give the lowest and the highest"),
        ({"rating_scale": (1, 2, 3)}, r"domains.toy.rating_scale is \[1, 2, 3\]; give the lowest and the highest"),
    ],
)
def test_bad_specs_are_refused(change: Mapping[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(SPEC, **change)


IMPLICIT = DomainSpec(
    name="film", reader="table", interactions="all.csv", items="items.csv", where={"domain": "film"},
    feedback="implicit", columns={"timestamp": "position"},
)  # fmt: skip


def implicit(folder: Path) -> Path:
    """Users of films and songs, without ratings: one listed twice, one item id in both domains."""
    folder.mkdir(exist_ok=True)
    rows = "u,film,a,3\nu,song,a,1\nu,film,b,2\nu,film,a,0\nv,film,b,0\n"
    (folder / "all.csv").write_text(f"user_id,domain,item_id,position\n{rows}")
    (folder / "items.csv").write_text("domain,item_id,title\nsong,a,A song\nfilm,a,A &amp; film\n")
    return folder


@pytest.mark.parametrize(("rule", "position"), [("mean", 3), ("last", 3), ("first", 0)])
def test_implicit_domains_in_one_file(tmp_path: Path, store: Path, rule: str, position: int) -> None:
    film = prepare_domain(replace(IMPLICIT, duplicates=rule), implicit(tmp_path / "data"), store)
    table = film.interactions()
    assert table[["user_id", "item_id"]].to_numpy().tolist() == [["u", "a"], ["u", "b"], ["v", "b"]]
    assert table["timestamp"].tolist() == [position, 2, 0]
    assert table["rating"].isna().all()
    assert table["rating"].dtype == np.float32
    titles = film.items()["title"]
    assert titles[0] == "A &amp; film"  # raw tables keep what was given
    assert titles.isna().tolist() == [False, True]
    assert film.manifest["counts"][0] == {"step": "read", "interactions": 4, "users": 2, "items": 2}
    song = replace(IMPLICIT, name="song", where={"domain": "song"})
    assert prepare_domain(song, tmp_path / "data", store).items()["title"].tolist() == ["A song"]


def test_a_catalogue_holds_items_that_nobody_has_where_the_spec_says_so(tmp_path: Path, store: Path) -> None:
    data = implicit(tmp_path / "data")
    with (data / "items.csv").open("a") as file:
        file.write("film,c,Never seen\nsong,d,A song of the other domain\n")
    used = prepare_domain(IMPLICIT, data, store)
    listed = prepare_domain(replace(IMPLICIT, catalogue="listed"), data, store)
    assert used.items()["item_id"].tolist() == ["a", "b"]
    assert listed.items()["item_id"].tolist() == ["a", "b", "c"]
    assert listed.items()["title"].tolist()[::2] == ["A &amp; film", "Never seen"]
    pd.testing.assert_frame_equal(used.interactions(), listed.interactions())
    assert used.key != listed.key


def test_a_value_that_no_row_has_is_refused(tmp_path: Path, store: Path) -> None:
    wrong = replace(IMPLICIT, where={"domain": "movie"})
    with pytest.raises(
        InputError, match=r"all.csv: holds no interactions where domain is 'movie'; give a file that does"
    ):
        prepare_domain(wrong, implicit(tmp_path / "data"), store)


def test_opening_what_is_no_domain(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no prepared domain here \(no manifest.json\); prepare it first"):
        open_domain(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"manifest.json: not JSON .*; delete the folder and prepare it again"):
        open_domain(tmp_path)


def test_a_source_that_changes_meanwhile_is_refused(data: Path, store: Path) -> None:
    def change(rows: int) -> None:
        (data / "toy.csv").write_text(CSV + "u9,a,5,,\n")

    with pytest.raises(InputError, match="changed while it was read; try again"):
        prepare_domain(SPEC, data, store, change)
    assert visible(store) == []


# --- crashes ------------------------------------------------------------------------------------------------------


def test_a_kill_leaves_no_folder_that_looks_finished(data: Path, store: Path) -> None:
    """SIGKILL in the middle; the next call clears what is left and finishes."""
    code = (
        "import sys, time; from pathlib import Path; from features.domains.domain import *\n"
        "def wait(rows): print('reading', flush=True); time.sleep(60)\n"
        "prepare_domain(DomainSpec(name='toy', reader='table', interactions='toy.csv'), Path(sys.argv[1]), "
        "Path(sys.argv[2]), wait)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(data), str(store)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"reading\n"
        assert [name[:5] for name in visible(store)] == [".toy-"]
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert [name[:5] for name in visible(store)] == [".toy-"]
    toy = prepare_domain(SPEC, data, store)
    assert len(toy.interactions()) == 5
    assert visible(store) == [toy.path.name]


def test_another_process_may_be_first(data: Path, store: Path, tmp_path: Path) -> None:
    """Both prepare the same; the one that comes second finds the folder there and drops its own."""
    first: list[Domain] = []

    def overtake(rows: int) -> None:
        if not first:
            first.append(prepare_domain(SPEC, data, tmp_path / "other"))
            first[0].path.rename(store / first[0].path.name)

    second = prepare_domain(SPEC, data, store, overtake)
    assert second.key == first[0].key
    assert visible(store) == [second.path.name]


# --- size and real data -------------------------------------------------------------------------------------------


def test_against_pandas(data: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20,000 rows in a random order, sorted in many small buckets, give the table that pandas gives."""
    rng = np.random.default_rng(0)
    count = 20_000
    frame = pd.DataFrame(
        {
            "user_id": [f"u{n}" for n in rng.integers(0, 500, count)],
            "item_id": [f"i{n}" for n in rng.integers(0, 900, count)],
            "rating": rng.integers(2, 11, count) / 2,
            "text": [f"{n} some words {n % 7}" for n in range(count)],
            "timestamp": rng.permutation(count),
        }
    )
    frame.to_parquet(data / "toy.parquet")
    monkeypatch.setattr("features.store.external_sort.BUCKET", 1 << 16)
    monkeypatch.setattr("features.domains.parquet.ROWS", 1000)
    toy = prepare_domain(replace(SPEC, interactions="toy.parquet"), data, store)
    groups = frame.sort_values("timestamp").groupby(["user_id", "item_id"])
    expected = groups.agg({"rating": "mean", "text": "last", "timestamp": "last"}).reset_index()
    result = toy.interactions()
    for name in ("user_id", "item_id", "text", "timestamp"):
        assert result[name].tolist() == expected[name].tolist()
    np.testing.assert_array_equal(result["rating"], expected["rating"].astype(np.float32))
    assert toy.manifest["duplicates"]["rows"] == count - len(expected) > 300


@pytest.mark.parametrize(("rows", "bucket"), [(1, 1), (7, 1), (1000, 300), (1000, 10**9)])
def test_external_sort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, bucket: int) -> None:
    monkeypatch.setattr("features.store.external_sort.BUCKET", bucket)
    position = np.random.default_rng(0).permutation(rows)
    whole = pa.table({"value": [f"v{n}" for n in position], "position": position})
    parts = (whole.slice(start, 13) for start in range(0, rows, 13))
    (tmp_path / "work").mkdir()
    schema = pa.schema([("value", pa.string())])
    external_sort(parts, schema, rows, 40 * rows, tmp_path / "t.parquet", tmp_path / "work")
    assert pq.read_table(tmp_path / "t.parquet")["value"].to_pylist() == [f"v{n}" for n in range(rows)]
    assert list((tmp_path / "work").iterdir()) == []


def test_the_cached_answer_is_quick(data: Path, store: Path) -> None:
    prepare_domain(SPEC, data, store)
    start = time.perf_counter()
    for _ in range(20):
        prepare_domain(SPEC, data, store)
    assert (time.perf_counter() - start) / 20 < 0.05


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the real ratings are not at {REAL}")
@pytest.mark.parametrize(
    ("name", "rows", "duplicates", "users", "items"),
    [("books", 38_149, 6_645, 1_426, 723), ("movies", 68_023, 5_939, 1_381, 1_338)],
)
def test_real_ratings(store: Path, name: str, rows: int, duplicates: int, users: int, items: int) -> None:
    spec = DomainSpec(name=name, reader="recbole", interactions=f"{name}.inter", duplicates="mean")
    real = prepare_domain(spec, REAL, store)
    raw = pd.read_csv(REAL / f"{name}.inter", sep="\t")
    raw.columns = pd.Index(["user_id", "item_id", "rating"])
    expected = raw.groupby(["user_id", "item_id"])["rating"].mean()
    result = real.interactions().set_index(["user_id", "item_id"])["rating"]
    assert result.index.tolist() == expected.index.tolist()
    np.testing.assert_array_equal(result, expected.astype(np.float32))
    assert real.manifest["duplicates"] == {"rule": "mean", "rows": duplicates}
    assert real.manifest["counts"][0] == {"step": "read", "interactions": rows, "users": users, "items": items}
    assert not real.simulated


@pytest.mark.skipif(not FOOD_KITCHEN.is_dir(), reason=f"Food-Kitchen is not at {FOOD_KITCHEN}")
@pytest.mark.parametrize(("name", "users", "items"), [("food", 14_870, 8_661), ("kitchen", 47_589, 27_637)])
def test_food_kitchen(store: Path, name: str, users: int, items: int) -> None:
    spec = replace(
        IMPLICIT, name=name, where={"domain": name}, interactions="interactions.parquet", items="items.parquet"
    )
    real = prepare_domain(spec, FOOD_KITCHEN, store)
    raw = pd.read_parquet(FOOD_KITCHEN / "interactions.parquet").query("domain == @name")
    raw = raw.sort_values(["user_id", "item_id"])
    table = real.interactions()
    assert table["item_id"].tolist() == raw["item_id"].tolist()
    assert table["timestamp"].tolist() == raw["position"].tolist()
    assert (len(real.users()), len(real.items())) == (users, items)
    assert not real.items()["title"].isna().any()


# --- several files, times, catalogue, notes -----------------------------------------------------------------------


def test_files_of_a_list_keep_their_order_and_those_of_a_pattern_have_none(tmp_path: Path, store: Path) -> None:
    head = "user_id,item_id,rating\n"
    for name, rating in (("p1.csv", 1), ("p2.csv", 2), ("p3.csv", 3)):
        (tmp_path / name).write_text(f"{head}u,a,{rating}\nu,{name},4\n")
    spec = replace(SPEC, duplicates="last")
    for files, last in ((("p1.csv", "p2.csv", "p3.csv"), 3.0), (("p3.csv", "p2.csv", "p1.csv"), 1.0)):
        listed = prepare_domain(replace(spec, interactions=files), tmp_path, store)
        assert listed.interactions().set_index("item_id")["rating"]["a"] == last
        assert (
            "1 repeated pairs of user and item have no times that differ; the later line of the files counts"
            in (listed.manifest["notes"])
        )
    by_hash = prepare_domain(replace(spec, interactions="p?.csv"), tmp_path, store)
    for name in ("p1.csv", "p2.csv", "p3.csv"):
        (tmp_path / name).rename(tmp_path / f"q{9 - int(name[1])}.csv")
    renamed = prepare_domain(replace(spec, interactions="q*.csv"), tmp_path, store)
    assert renamed.interactions().equals(by_hash.interactions())
    with pytest.raises(InputError, match=r"x\*.csv: no file matches; domain toy looks for x\*.csv in the data folder"):
        prepare_domain(replace(spec, interactions="x*.csv"), tmp_path, store)


@pytest.mark.parametrize(
    ("times", "expected", "kind"),
    [
        ((1405588132, 1405588133, 1405588134), (1405588132000, 1405588133000, 1405588134000), "clock"),
        ((1405588132, 1405588133000, 1405588134000000), (1405588132000, 1405588133000, 1405588134000), "clock"),
        ((1405588132000000000, 5, 1405588134000), (1405588132000, 5, 1405588134000), "clock"),
        ((0, 1, 2), (0, 1, 2), "order"),
    ],
)
def test_units_of_time_are_not_mixed(
    tmp_path: Path, store: Path, times: tuple[int, ...], expected: tuple[int, ...], kind: str
) -> None:
    rows = "".join(f"u,i{number},3,{moment}\n" for number, moment in enumerate(times))
    (tmp_path / "toy.csv").write_text(f"user_id,item_id,rating,timestamp\n{rows}")
    domain = prepare_domain(SPEC, tmp_path, store)
    assert tuple(domain.interactions()["timestamp"]) == expected
    assert domain.manifest["profile"]["times"]["kind"] == kind
    mixed = [note for note in domain.manifest["notes"] if "several units" in note]
    assert len(mixed) == (len(domain.manifest["profile"]["times"]["units"]) > 1)


def test_a_catalogue_keeps_items_without_interactions(tmp_path: Path, store: Path) -> None:
    (tmp_path / "toy.csv").write_text("user_id,item_id,rating\nu,b,3\nv,b,4\nv,e,4\n")
    (tmp_path / "items.csv").write_text("item_id,title,categories\na,A,\nb,B,\nc,,x\nd,,\n")
    spec = replace(SPEC, items="items.csv", catalogue="listed")
    domain = prepare_domain(spec, tmp_path, store)
    assert domain.items()["item_id"].tolist() == ["a", "b", "c", "d", "e"]
    assert (domain.manifest["profile"]["items"], domain.manifest["profile"]["items_alone"]) == (5, 3)
    assert domain.manifest["profile"]["items_without_text"] == 2  # d and e
    filtered = prepare_domain(replace(spec, filters=FilterSpec(require_text=True)), tmp_path, store)
    assert filtered.items()["item_id"].tolist() == ["a", "b", "c"]
    titled = prepare_domain(replace(spec, filters=FilterSpec(require_title=True)), tmp_path, store)
    assert titled.items()["item_id"].tolist() == ["a", "b"]
    assert prepare_domain(replace(spec, catalogue="used"), tmp_path, store).items()["item_id"].tolist() == [
        "b",
        "e",
    ]


def test_ties_and_unrated_are_counted(tmp_path: Path, store: Path) -> None:
    (tmp_path / "toy.csv").write_text(
        "user_id,item_id,rating,timestamp\nu,a,0,5\nu,b,3,5\nu,c,4,5\nu,d,4,6\nv,a,2,7\nv,b,2,7\n"
    )
    domain = prepare_domain(replace(SPEC, unrated=(0,)), tmp_path, store)
    profile = domain.manifest["profile"]
    assert (profile["tied"], profile["users_of_several"], profile["users_unordered"]) == (4, 2, 1)
    assert domain.manifest["notes"] == [
        "1 rows of toy.csv are rated 0, which means not rated (unrated); they are left out "
        f"(first: {tmp_path}/toy.csv: row 1)"
    ]
