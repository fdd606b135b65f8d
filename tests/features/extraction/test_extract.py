"""Extraction end to end: against the reference, resumed, in parallel, through Ray, and with bad rows."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from features.domains.domain import Domain
from features.domains.ties import tie_hash
from features.encoders.batches import Encoded
from features.encoders.encoder import Encoder, load_encoder
from features.encoders.inputs import EncoderInput, input_key
from features.encoders.spec import EncoderSpec, ResolvedEncoder, resolve_encoder
from features.encoders.throughput import Operations, measure_throughput
from features.encoders.weights import resolve_dtype
from features.errors import InputError
from features.extraction import encoding
from features.extraction import extract as module
from features.extraction.encoding import ShardWorker
from features.extraction.extract import estimate, extract_tables
from features.extraction.planning import input_block
from features.extraction.spec import FeatureSpec, feature_key, find_table, shortfall
from features.store.shards import VectorStore, mark_store
from tests.features.one_table import extract

from ...patience import PATIENCE_S

MakeDomain = Callable[..., Domain]


def spec_of(
    folder: Path, kind: str = "users", users: str = "review_mean", max_reviews: int = 0, **encoder: Any
) -> FeatureSpec:
    fields = {"max_tokens": 32, "dtype": "float32", "store_dtype": "float32", **encoder}
    return FeatureSpec(
        kind=kind, users=users, max_reviews=max_reviews, encoder=EncoderSpec(model=str(folder), **fields)
    )


def words(seed: object, most: int = 20) -> str:
    draw = random.Random(f"{seed}")
    return " ".join(f"w{draw.randrange(90)}" for _ in range(draw.randint(1, most)))


def reviews(users: int = 120, each: int = 12) -> list[tuple[str, str, str]]:
    return [(f"u{u:04d}", f"i{i:03d}", words((u, i))) for u in range(users) for i in range(each)]


def key_of(spec: FeatureSpec, domain: Domain) -> str:
    return feature_key(spec, domain, resolve_encoder(spec.encoder))


class Counting:
    """The real encoder, writing down the rows that it is given."""

    def __init__(self, resolved: ResolvedEncoder, seen: list[EncoderInput]) -> None:
        self.encoder = load_encoder(resolved)
        self.seen = seen

    def encode(self, rows: Sequence[EncoderInput]) -> Encoded:
        self.seen += rows
        return self.encoder.encode(rows)


def counting(seen: list[EncoderInput]) -> Callable[[ResolvedEncoder], Encoder]:
    return lambda resolved: Counting(resolved, seen)


def one_by_one(spec: FeatureSpec, texts: Sequence[str]) -> np.ndarray:
    """Mean over `texts` of vectors made one at a time (the encoder itself is tested in test_encoder)."""
    encoder = load_encoder(resolve_encoder(spec.encoder))
    return np.mean(
        [encoder.encode([EncoderInput(texts=(text,))]).vectors[0].astype(np.float64) for text in texts], axis=0
    )


def test_user_vectors_are_the_mean_of_the_users_reviews_of_this_domain(tiny_bert, make_domain, tmp_path) -> None:
    domain, spec = make_domain(reviews(6, 5)), spec_of(tiny_bert)
    table = extract(spec, domain, tmp_path)
    assert table.ids == [f"u{u:04d}" for u in range(6)]
    for user, name in enumerate(table.ids):
        expected = one_by_one(spec, [words((user, i)) for i in range(5)])
        np.testing.assert_allclose(table.vectors[table.rows([name])[0]], expected, atol=2e-6)


def test_concatenation_is_one_text_cut_at_max_tokens_and_not_the_mean(tiny_bert, make_domain, tmp_path) -> None:
    domain = make_domain(reviews(6, 5))
    mean = extract(spec_of(tiny_bert), domain, tmp_path)
    spec = spec_of(tiny_bert, users="concat")
    table = extract(spec, domain, tmp_path)
    for user in range(6):
        order = sorted(range(5), key=lambda i, name=f"u{user:04d}": tie_hash(name, f"i{i:03d}", domain.name, 0))
        expected = one_by_one(spec, ["\n".join(words((user, i)) for i in order)])
        np.testing.assert_allclose(table.vectors[user], expected, atol=2e-6)
    assert table.manifest["tokens"] == 6 * 32
    assert np.abs(table.vectors - mean.vectors).max() > 0.05


def test_item_vectors_read_title_categories_and_description(tiny_bert, make_domain, tmp_path) -> None:
    items = [("a", "w1 w2", "w3", "w4 w5"), ("b", None, None, "w6"), ("c", "w7", None, None)]
    domain = make_domain([("u", item[0], "w1") for item in items], items)
    spec = spec_of(tiny_bert, "items")
    table = extract(spec, domain, tmp_path)
    assert table.ids == ["a", "b", "c"]
    for row, text in enumerate(["w1 w2\nw3\nw4 w5", "w6", "w7"]):
        np.testing.assert_allclose(table.vectors[row], one_by_one(spec, [text]), atol=2e-6)


def test_half_precision_on_disk_costs_at_most_its_rounding(tiny_bert, make_domain, tmp_path) -> None:
    domain = make_domain(reviews(5, 3))
    full = extract(spec_of(tiny_bert), domain, tmp_path).vectors
    half = extract(spec_of(tiny_bert, store_dtype="float16"), domain, tmp_path).vectors
    assert half.dtype == np.float16
    np.testing.assert_allclose(half, full, rtol=2**-11, atol=2**-24)


def test_the_manifest_says_what_was_done(tiny_bert, make_domain, tmp_path) -> None:
    domain, spec = make_domain(reviews(6, 5)), spec_of(tiny_bert, max_failed_fraction=0.2)
    manifest = extract(spec, domain, tmp_path).manifest
    resolved = resolve_encoder(spec.encoder)
    assert manifest["key"] == key_of(spec, domain)
    assert manifest["encoder"]["model"] == str(tiny_bert)
    assert manifest["encoder"]["weights_sha256"] == resolved.weights_sha256
    assert manifest["encoder"]["dtype"] == "float32"
    assert manifest["encoder"]["pooling"] == "first_last_avg"
    assert manifest["encoder"]["max_tokens"] == 32
    assert manifest["prompt"]["name"] == "plain-1"
    assert manifest["domain"] == {"name": "books", "key": domain.key}
    assert manifest["simulated"] is False
    assert manifest["rows"] == {"planned": 6, "done": 6, "unique": 6, "failed": []}
    assert manifest["tokens"] == sum(len(words((u, i)).split()) + 2 for u in range(6) for i in range(5))
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["seconds"] > 0
    speed = manifest["throughput"]
    assert (speed["texts"], speed["tokens"], speed["share_of_peak"]) == (30, manifest["tokens"], None)
    assert speed["tokens_per_second"] == pytest.approx(manifest["tokens"] / speed["working_seconds"], rel=0.1)


def test_what_is_done_is_opened_and_never_extracted_again(tiny_bert, make_domain, tmp_path) -> None:
    domain, spec = make_domain(reviews(6, 5)), spec_of(tiny_bert)
    assert find_table(spec, domain, tmp_path) is None
    first = extract(spec, domain, tmp_path)
    seen: list[EncoderInput] = []
    again = extract(
        replace(spec, encoder=replace(spec.encoder, batch_tokens=99)), domain, tmp_path, loader=counting(seen)
    )
    assert seen == []
    assert again.path == first.path
    found = find_table(spec, domain, tmp_path)
    assert found is not None
    assert found.ids == first.ids


def test_keys_change_with_whatever_changes_vectors(tiny_bert, make_domain, monkeypatch) -> None:
    domain, spec = make_domain(reviews(4, 3)), spec_of(tiny_bert)
    others = [
        replace(spec, users="concat"),
        replace(spec, max_reviews=2),
        replace(spec, prompt="named-1"),
        replace(spec, kind="items"),
        replace(spec, encoder=replace(spec.encoder, pooling="mean")),
    ]
    keys = [key_of(s, domain) for s in [spec, *others]]
    keys.append(key_of(spec, make_domain(reviews(4, 2), name="movies")))
    assert len(set(keys)) == len(keys)
    items = replace(spec, kind="items")
    before = key_of(items, domain)
    assert before == key_of(replace(items, users="concat", max_reviews=3), domain)
    monkeypatch.setattr("features.extraction.spec.CLEANING", "another way to clean texts")
    assert key_of(items, domain) != before


def test_identical_rows_are_encoded_once_and_every_id_gets_its_vector(tiny_bert, make_domain, tmp_path) -> None:
    items = [(f"i{i}", f"w{i % 3}", None, None) for i in range(9)]
    domain = make_domain([("u", item[0], "w1") for item in items], items)
    seen: list[EncoderInput] = []
    table = extract(spec_of(tiny_bert, "items"), domain, tmp_path, loader=counting(seen))
    assert sorted(row.texts[0] for row in seen) == ["w0", "w1", "w2"]
    assert table.manifest["rows"]["unique"] == 3
    assert table.vectors.shape == (9, 32)
    np.testing.assert_array_equal(table.vectors[:3], table.vectors[3:6])
    np.testing.assert_array_equal(table.vectors[:3], table.vectors[6:])
    assert len(np.unique(table.vectors[:3], axis=0)) == 3


def test_a_changed_review_encodes_that_user_only_and_changes_no_other_bit(tiny_bert, make_domain, tmp_path) -> None:
    before = reviews(60, 8)
    after = [(u, i, "w1 w2 w3" if (u, i) == ("u0007", "i003") else text) for u, i, text in before]
    spec, seen = spec_of(tiny_bert), []
    old = extract(spec, make_domain(before), tmp_path / "one")
    new = extract(spec, make_domain(after), tmp_path / "one", loader=counting(seen))
    fresh = extract(spec, make_domain(after), tmp_path / "two")
    assert len(seen) == 1
    np.testing.assert_array_equal(new.vectors, fresh.vectors)
    changed = np.flatnonzero((old.vectors != new.vectors).any(1)).tolist()
    assert [old.ids[i] for i in changed] == ["u0007"]


@pytest.mark.parametrize("kind", ["users", "items"])
def test_the_number_of_threads_changes_no_bit_and_stays_as_it_was(tiny_bert, make_domain, tmp_path, kind) -> None:
    domain = make_domain(reviews(), [(f"i{i:03d}", words(i), None, words(-i)) for i in range(12)])
    torch.set_num_threads(2)
    one = extract(spec_of(tiny_bert, kind), domain, tmp_path / "one", workers=1)
    many = extract(spec_of(tiny_bert, kind), domain, tmp_path / "many", workers=3)
    assert torch.get_num_threads() == 2
    np.testing.assert_array_equal(one.vectors, many.vectors)
    assert one.ids == many.ids


def test_one_bad_row_among_ten_thousand_costs_that_row_only(tiny_bert, make_domain, tmp_path) -> None:
    texts = [f"w{n % 90} w{n // 90 % 90} w{n // 8100}" for n in range(10_000)]
    texts[4321] = "w1 broken"  # a token without an embedding
    domain = make_domain([(f"u{n:05d}", "i", text) for n, text in enumerate(texts)])
    table = extract(spec_of(tiny_bert), domain, tmp_path, workers=1)
    assert [row["id"] for row in table.manifest["rows"]["failed"]] == ["u04321"]
    assert len(table.ids) == 9_999
    assert "u04321" not in table.ids
    assert np.isfinite(table.vectors).all()


def test_progress_counts_texts_up_to_the_total(tiny_bert, make_domain, tmp_path) -> None:
    calls: list[tuple[int, int, int, float]] = []
    table = extract(spec_of(tiny_bert), make_domain(reviews()), tmp_path, progress=lambda *call: calls.append(call))
    assert [todo for _, todo, *_ in calls] == [1440] * len(calls)
    assert calls == sorted(calls)
    assert calls[0] == (0, 1440, 0, 0.0)
    assert calls[-1][:3] == (1440, 1440, table.manifest["tokens"])
    assert len(calls) == 1 + 6  # macro-batches of 256 texts


def test_estimate_counts_what_is_left_without_a_model(tiny_bert, make_domain, tmp_path, monkeypatch) -> None:
    domain, spec = make_domain(reviews()), spec_of(tiny_bert)
    total = sum(len(words((u, i)).split()) + 2 for u in range(120) for i in range(12))
    with monkeypatch.context() as patch:
        patch.setattr(module, "load_encoder", None)
        left = estimate(spec, domain, tmp_path)
    assert (left.rows, left.rows_left, left.texts_left) == (120, 120, 1440)
    assert left.tokens_left == pytest.approx(total, rel=0.1)
    assert (left.bytes_left, left.images_left, len(left.sample)) == (120 * 32 * 4, 0, 60)
    resolved = resolve_encoder(spec.encoder)
    rate = measure_throughput(resolved, left.sample, tmp_path)
    other = "float32" if resolve_dtype("auto") == "bfloat16" else "bfloat16"
    of_the_driver = replace(resolved, spec=replace(spec.encoder, dtype="auto"), dtype=other)
    with pytest.raises(InputError, match=f"and {other} where the work began"):
        measure_throughput(of_the_driver, left.sample, tmp_path)
    texts = [EncoderInput(texts=(text,)) for row in left.sample for text in row.texts]
    read = load_encoder(resolved).encode(texts[255:511]).tokens.mean()
    assert rate.tokens_per_second / rate.texts_per_second == pytest.approx(read), "the most texts at a time"
    extract(spec, domain, tmp_path)
    done = estimate(spec, domain, tmp_path)
    assert (done.rows, done.rows_left, done.texts_left, done.tokens_left) == (120, 0, 0, 0)


def test_a_rate_is_measured_for_ten_seconds_or_so_however_slow_the_model(tiny_bert, tmp_path, monkeypatch) -> None:
    now, asked = [0.0], []

    class Slow:
        """3 seconds a text."""

        def encode(self, rows: Sequence[EncoderInput]) -> Encoded:
            asked.append(len(rows))
            now[0] += 3.0 * len(rows)
            return Encoded(np.zeros((len(rows), 4), np.float32), np.full(len(rows), 60, np.int32), 60 * len(rows), {})

    monkeypatch.setattr("features.encoders.throughput.time", SimpleNamespace(perf_counter=lambda: now[0]))
    sample = [EncoderInput(texts=tuple(f"{user} {n}" for n in range(500))) for user in range(64)]
    resolved = resolve_encoder(spec_of(tiny_bert).encoder)
    rate = measure_throughput(resolved, sample, tmp_path, loader=lambda _: Slow())
    assert asked == [1, 1, 2, 4]
    assert (rate.texts_per_second, rate.tokens_per_second) == pytest.approx((1 / 3, 20))


def test_operations_are_those_of_the_matrices_of_the_blocks(tiny_bert) -> None:
    model = load_encoder(resolve_encoder(spec_of(tiny_bert).encoder)).model
    blocks = 3 * (4 * 32 * 32 + 2 * 32 * 64)  # query, key, value, output; in and out
    operations = Operations(model)
    model.set_attn_implementation("eager")  # ours is for texts in one row
    model(input_ids=torch.ones((2, 7), dtype=torch.long))
    assert operations.take() == 2 * (2 * 7 * blocks + 2 * 32 * 32), "the pooler reads a token of each text"
    assert operations.take() == 0


def test_a_text_of_two_rows_is_computed_and_counted_once(tiny_bert, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(encoding, "_PEAK_AFTER", 0.0)
    monkeypatch.setattr(encoding, "matrix_peak", lambda device, dtype: 1e9)
    resolved, shards = resolve_encoder(spec_of(tiny_bert).encoder), VectorStore(tmp_path, "e" * 64)
    worker = ShardWorker(lambda: load_encoder(resolved), shards, "float32", mark_store(tmp_path))
    one, two, three = (words(n, 20) for n in range(3))
    shared = [EncoderInput(texts=(one, two, three)), EncoderInput(texts=(one, two))]

    def figures(rows: list[EncoderInput]) -> dict[str, Any]:
        (answer,) = worker(input_block([(input_key(row), row) for row in rows])).to_pylist()
        return answer

    twice, once = figures(shared), figures([EncoderInput(texts=(text,)) for text in (one, two, three)])
    assert twice["operations"] == once["operations"] > 0
    assert twice["peak"] == 1e9 * twice["seconds"]
    assert (twice["texts"], once["texts"]) == (5, 3)


# --- several tables of one encoder --------------------------------------------------------------------------------


def test_tables_of_one_encoder_are_one_job_and_as_if_made_one_by_one(tiny_bert, make_domain, tmp_path) -> None:
    """Books and films share 30 users with the same words, one of which no model here can read."""
    shared = [*reviews(30, 4), ("x1", "i000", "w1 broken")]
    books = make_domain([*shared, *[(f"b{n}", "i000", words(("b", n))) for n in range(300)]])
    films = make_domain([*shared, *[(f"f{n}", "i000", words(("f", n))) for n in range(9)]], name="films")
    spec = spec_of(tiny_bert, max_failed_fraction=0.1)
    wanted = [(spec, books), (replace(spec, kind="items"), books), (spec, films)]
    with pytest.raises(InputError, match="no title, categories or desc"):  # told before the first of them is encoded
        extract_tables(wanted, tmp_path / "none", loader=lambda resolved: pytest.fail("loaded"))
    loaded: list[ResolvedEncoder] = []
    seen: list[EncoderInput] = []

    def load(resolved: ResolvedEncoder) -> Encoder:
        loaded.append(resolved)
        return Counting(resolved, seen)

    calls: list[tuple[int, ...]] = []
    both = extract_tables(wanted[::2], tmp_path / "one", loader=load, progress=lambda *call: calls.append(call))
    assert len(loaded) == 1
    assert len(seen) == len({row.texts for row in seen}) == 31 + 300 + 9
    assert (calls[0][:2], calls[-1][:2]) == ((0, 430), (430, 430))
    for (of, domain), table in zip(wanted[::2], both, strict=True):
        alone = extract(of, domain, tmp_path / "alone")
        np.testing.assert_array_equal(table.vectors, alone.vectors)
        assert (table.ids, table.key) == (alone.ids, alone.key)
        assert table.manifest["rows"] == alone.manifest["rows"]
        assert [row["id"] for row in table.manifest["rows"]["failed"]] == ["x1"]
    shards = [
        VectorStore.open(tmp_path / store, resolve_encoder(spec.encoder).key).folder for store in ("one", "alone")
    ]
    assert {p.name: p.read_bytes() for p in shards[0].iterdir()} == {
        p.name: p.read_bytes() for p in shards[1].iterdir()
    }


def test_a_job_that_is_stopped_for_one_table_s_failures_says_so(tiny_bert, make_domain, tmp_path) -> None:
    """All rows of films fail, and the job is over before the last of the books."""
    books = make_domain(reviews(900, 1))
    films = make_domain([(f"f{n}", "i000", f"w1 broken w{n % 90} w{n // 90}") for n in range(600)], name="films")
    spec = spec_of(tiny_bert)
    with pytest.raises(
        InputError, match=r"^features of films users: \d+ of 600 rows failed, and encoder.max_failed_fr"
    ):
        extract_tables([(spec, books), (spec, films)], tmp_path, workers=1)
    assert 0 < len(VectorStore.open(tmp_path, resolve_encoder(spec.encoder).key).index()) < 900


# --- killed, and run again ----------------------------------------------------------------------------------------

KILLED = """
    import sys, time
    from pathlib import Path
    from features.domains.domain import open_domain
    from features.encoders.encoder import load_encoder
    from features.encoders.spec import EncoderSpec
    from features.extraction.extract import extract_tables
    from features.extraction.spec import FeatureSpec

    class Slow:
        def __init__(self, resolved): self.encoder = load_encoder(resolved)
        def encode(self, rows):
            time.sleep(0.3)
            return self.encoder.encode(rows)

    folder, domain, store = sys.argv[1:]
    encoder = EncoderSpec(model=folder, max_tokens=32, dtype="float32", store_dtype="float32")
    wanted = [(FeatureSpec(kind="users", encoder=encoder), open_domain(Path(domain)))]
    extract_tables(wanted, Path(store), loader=Slow, workers=1)
"""


def test_a_killed_extraction_goes_on_where_it_was(tiny_bert, make_domain, tmp_path) -> None:
    domain, spec, store = make_domain(reviews(600, 6)), spec_of(tiny_bert), tmp_path / "killed"
    shards = VectorStore.open(store, resolve_encoder(spec.encoder).key)
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(tiny_bert), str(domain.path), str(store)],
        cwd=Path(__file__).parents[3],
    )
    deadline = time.monotonic() + PATIENCE_S
    while len(list(shards.folder.glob("*.arrow"))) < 3 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = len(shards.index())
    assert 0 < kept < 600
    assert find_table(spec, domain, store) is None

    seen: list[EncoderInput] = []
    resumed = extract(spec, domain, store, loader=counting(seen))
    assert len(seen) == 600 - kept
    whole = extract(spec, domain, tmp_path / "whole")
    for name in ("vectors.npy", "ids.parquet"):
        assert (resumed.path / name).read_bytes() == (whole.path / name).read_bytes()
    said = [
        {k: v for k, v in table.manifest.items() if k not in ("seconds", "throughput")} for table in (resumed, whole)
    ]
    assert said[0] == said[1]
    whole_shards = VectorStore.open(tmp_path / "whole", shards.encoder_key).folder
    assert {p.name: p.read_bytes() for p in shards.folder.iterdir()} == {
        p.name: p.read_bytes() for p in whole_shards.iterdir()
    }


# --- bad input ----------------------------------------------------------------------------------------------------


def test_failed_rows_are_recorded_left_out_and_tried_again(tiny_bert, make_domain, tmp_path) -> None:
    data = [*reviews(97, 2), ("x1", "i000", "w1 broken"), ("x2", "i000", None), ("x3", "i000", "w1")]
    spec, domain = spec_of(tiny_bert, max_failed_fraction=0.02), make_domain(data)
    table = extract(spec, domain, tmp_path)
    failed = table.manifest["rows"]["failed"]
    assert [f["id"] for f in failed] == ["x1", "x2"]
    assert failed[0]["reason"].startswith("IndexError: index out of range")
    assert failed[1]["reason"] == "no review text"
    assert (table.manifest["rows"]["planned"], table.manifest["rows"]["done"]) == (100, 98)
    assert "x1" not in table.ids
    assert np.isfinite(table.vectors).all()
    # Whose row has no text at all is not helped by another try.
    assert shortfall(table) == f"1 rows failed; delete {table.path} to try them again"
    with pytest.raises(InputError, match=r"no vector for 1 of 2 ids, the first is 'x1' \(IndexError"):
        table.rows(["x3", "x1"])
    seen: list[EncoderInput] = []
    wider = make_domain([*data, ("x4", "i000", "w2")])
    extract(spec, wider, tmp_path, loader=counting(seen))
    assert sorted(row.texts[0] for row in seen) == ["w1 broken", "w2"]


def test_too_many_failed_rows_publish_nothing_and_keep_the_good_ones(tiny_bert, make_domain, tmp_path) -> None:
    data = [*reviews(18, 2), ("x1", "i000", "w1 broken"), ("x2", "i000", "broken")]
    spec, domain = spec_of(tiny_bert, max_failed_fraction=0.05), make_domain(data)
    message = (
        r"features of books users: 2 of 20 rows failed, and encoder\.max_failed_fraction is 0\.05; first 'x1': IndexErr"
    )
    with pytest.raises(InputError, match=message) as caught:
        extract(spec, domain, tmp_path)
    assert "\n" not in str(caught.value)
    assert find_table(spec, domain, tmp_path) is None
    seen: list[EncoderInput] = []
    lenient = replace(spec, encoder=replace(spec.encoder, max_failed_fraction=0.2))
    assert len(extract(lenient, domain, tmp_path, loader=counting(seen)).ids) == 18
    assert len(seen) == 2


def test_a_run_ends_where_more_rows_have_failed_than_may(tiny_bert, make_domain, tmp_path) -> None:
    calls: list[int] = []

    class Broken:
        def encode(self, rows: Sequence[EncoderInput]) -> Encoded:
            calls.append(len(rows))
            time.sleep(0.05)
            failed = dict.fromkeys(range(len(rows)), "broken")
            return Encoded(np.zeros((len(rows), 4), np.float32), np.ones(len(rows), np.int32), len(rows), failed)

    spec = spec_of(tiny_bert, max_failed_fraction=0.1)
    with pytest.raises(InputError, match=r"\d+ of 120 rows failed, and encoder\.max_failed_fraction is 0\.1; first 'u"):
        extract(spec, make_domain(reviews()), tmp_path, workers=1, loader=lambda resolved: Broken())
    assert len(calls) < 6  # macro-batches


def test_a_row_that_failed_here_and_was_stored_by_another_extraction_is_done(tiny_bert, make_domain, tmp_path) -> None:
    class Meeting(Counting):
        def encode(self, rows: Sequence[EncoderInput]) -> Encoded:
            encoded = self.encoder.encode(rows)
            VectorStore.open(tmp_path, self.key).write([input_key(rows[0])], encoded.vectors[:1], encoded.tokens[:1])
            return replace(encoded, failed={0: "out of luck"})

    def load(resolved: ResolvedEncoder) -> Encoder:
        meeting = Meeting(resolved, [])
        meeting.key = resolved.key
        return meeting

    domain, spec = make_domain(reviews(6, 2)), spec_of(tiny_bert)
    table = extract(spec, domain, tmp_path, loader=load)
    assert table.manifest["rows"]["failed"] == []
    np.testing.assert_array_equal(table.vectors, extract(spec, domain, tmp_path / "whole").vectors)


def test_rows_without_text_are_refused_before_any_model_is_loaded(tiny_bert, make_domain, tmp_path) -> None:
    domain = make_domain([("u", "a", None), ("v", "a", None)])
    with pytest.raises(
        InputError, match=r"none of 2 rows has text; first 'u': no review text; map its columns, or take"
    ):
        extract(spec_of(tiny_bert), domain, tmp_path, loader=lambda resolved: pytest.fail("loaded"))


def test_rows_without_text_do_not_count_as_failed(tiny_bert, make_domain, tmp_path) -> None:
    domain = make_domain([("u", "a", None), ("v", "a", "w1"), ("w", "a", None)])
    table = extract(spec_of(tiny_bert), domain, tmp_path)  # max_failed_fraction is 0.01
    assert table.ids == ["v"]
    assert [row["id"] for row in table.manifest["rows"]["failed"]] == ["u", "w"]
    assert shortfall(table) is None


def test_vectors_that_overflow_half_precision_fail_their_row_only(tiny_bert, make_domain, tmp_path) -> None:
    class Huge:
        def encode(self, rows: Sequence[EncoderInput]) -> Encoded:
            vectors = np.array([[1e6 if "huge" in row.texts[0] else 1.0] * 4 for row in rows], np.float32)
            return Encoded(vectors, np.ones(len(rows), np.int32), len(rows), {})

    domain = make_domain([("u", "a", "huge"), ("v", "a", "w1")])
    spec = spec_of(tiny_bert, store_dtype="float16", max_failed_fraction=0.5)
    table = extract(spec, domain, tmp_path, loader=lambda resolved: Huge())
    assert table.ids == ["v"]
    assert table.manifest["rows"]["failed"] == [{"id": "u", "reason": "vector not finite in float16"}]


def test_rows_that_got_lost_are_noticed(tiny_bert, make_domain, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(VectorStore, "write", lambda *_: None)
    with pytest.raises(RuntimeError, match=r"6 rows planned, 0 in .*, 0 failed: some were lost; run it again"):
        extract(spec_of(tiny_bert), make_domain(reviews(6, 2)), tmp_path)


def test_an_empty_domain(tiny_bert, make_domain, tmp_path) -> None:
    domain = make_domain([("u", "a", "w1")])
    for name in ("items", "interactions"):
        path = domain.path / f"{name}.parquet"
        pq.write_table(pq.read_table(path).slice(0, 0), path)
    for kind in ("items", "users"):
        with pytest.raises(InputError, match=f"domain books: no {kind}, so no features; loosen its filters"):
            extract(spec_of(tiny_bert, kind), domain, tmp_path)


def test_a_table_of_another_encoder_under_our_name(tiny_bert, make_domain, tmp_path) -> None:
    domain, spec = make_domain(reviews(6, 2)), spec_of(tiny_bert)
    path = extract(spec, domain, tmp_path).path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"key": "0" * 64}))
    for call in (extract, find_table, estimate):
        with pytest.raises(InputError, match="written by another encoder or from other rows"):
            call(spec, domain, tmp_path)


def test_shards_of_another_encoder_under_our_name(tiny_bert, make_domain, tmp_path) -> None:
    domain, spec = make_domain(reviews(6, 2)), spec_of(tiny_bert)
    folder = VectorStore.open(tmp_path, resolve_encoder(spec.encoder).key).folder
    VectorStore(folder, "0" * 64).write([b"k" * 16], np.zeros((1, 4), np.float32), np.ones(1, np.int32))
    with pytest.raises(InputError, match=r"written by another encoder \(key 000000000000"):
        extract(spec, domain, tmp_path)


def test_all_faults_of_a_feature_spec_at_once(tiny_bert) -> None:
    with pytest.raises(InputError, match=r"features\.kind is 'pairs'; choose from items, users") as caught:
        FeatureSpec(kind="pairs", users="median", prompt="x", max_reviews=-1, encoder=EncoderSpec(model=str(tiny_bert)))
    for part in (
        "features.users is 'median'; choose from review_mean, concat",
        "features.prompt is 'x'; choose from key-features-1, named-1, plain-1",
        "features.max_reviews is -1; give a whole number of at least 0",
    ):
        assert part in str(caught.value)


# --- through Ray --------------------------------------------------------------------------------------------------


RAY_ITSELF = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")


@RAY_ITSELF
def test_ray_actors_give_the_same_table(tiny_bert, make_domain, tmp_path) -> None:
    import ray

    domain = make_domain([*reviews(199, 5), ("x", "i000", "w1 broken")])
    spec = spec_of(tiny_bert)
    calls: list[tuple[int, int, int, float]] = []
    by_ray = extract(spec, domain, tmp_path / "ray", use_ray=True, workers=2, progress=lambda *c: calls.append(c))
    assert not ray.is_initialized()  # it was ours to stop
    alone = extract(spec, domain, tmp_path / "alone", use_ray=False)
    np.testing.assert_array_equal(by_ray.vectors, alone.vectors)
    assert by_ray.manifest["rows"] == alone.manifest["rows"]
    assert [f["id"] for f in by_ray.manifest["rows"]["failed"]] == ["x"]
    assert len(calls) == 1 + 4
    assert calls[-1][:3] == (996, 996, by_ray.manifest["throughput"]["tokens"])
    speed = by_ray.manifest["throughput"]
    assert speed["texts_per_second"] == pytest.approx(996 / speed["working_seconds"], rel=0.01)
    assert speed["working_seconds"] < by_ray.manifest["seconds"] - 1, "Ray's start is not counted"


@RAY_ITSELF
def test_a_workers_input_error_comes_through_ray_as_one_line(tiny_bert, make_domain, tmp_path) -> None:
    import ray

    def refuse(resolved: ResolvedEncoder) -> Encoder:
        raise InputError("weights: not here; bring them")

    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        with pytest.raises(InputError, match=r"^weights: not here; bring them$"):
            extract(spec_of(tiny_bert), make_domain(reviews(6, 2)), tmp_path, use_ray=True, loader=refuse)
        assert ray.is_initialized()  # it was not ours to stop
    finally:
        ray.shutdown()
