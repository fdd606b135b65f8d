"""Extraction: plan -> Ray Data actor pool (or threads) -> shards -> one aligned table.

plan        rows of the domain -> content keys -> deduplicate -> macro-batches -> anti-join against the shards on disk
run         each macro-batch is encoded by one worker, which writes its shard itself: no vector crosses a process
finish      every planned row is in a shard or failed with a reason; failures are bounded; the table, manifest last

Kill it anywhere and start it again: finished macro-batches are found on disk, and nothing else is trusted.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from features.checks import choice, refuse, whole
from features.encoders.encoder import (
    Encoder,
    EncoderSpec,
    ResolvedEncoder,
    TextEncoder,
    load_encoder,
    load_tokenizer,
    load_width,
    resolve_encoder,
    tokenize,
)
from features.encoders.throughput import Operations, matrix_peak
from features.encoders.vision import ImageTextEncoder
from features.errors import InputError
from features.extraction.prompts import (
    CLEANING,
    NO_REVIEW,
    NO_TEXT,
    PROMPTS,
    Row,
    find_prompt,
    item_images,
    item_rows,
    seen_rows,
    user_rows,
)
from features.extraction.workers import Actors, Done, Progress, result, run_blocks
from features.images.gather import NO_IMAGE, Gathered, ImageSpec, gather_images, images_folder, known_images
from features.store.tables import (
    KEY_TYPE,
    FeatureTable,
    RowStore,
    check_mark,
    digest,
    mark_store,
    open_table,
    row_key,
    table_path,
    write_table,
)

if TYPE_CHECKING:
    from features.domains.domain import Domain

KINDS = ("items", "users")
USER_FEATURES = ("review_mean", "concat")
_MACRO_TEXTS = (256, 4096)  # a macro-batch: long enough to sort by length, short enough to lose to a kill
_MACRO_IMAGES = (32, 512)  # the same where each text comes with an image, which costs as much as hundreds of words
_MACRO_BATCHES = 16  # and small jobs are cut into this many, so that no worker is alone with the last one
_SAMPLE = 64  # rows that a speed is measured on
_PEAK_AFTER = 2.0  # seconds of work after which a worker measures what its device could do
_BLOCK_SCHEMA = pa.schema([("key", KEY_TYPE), ("texts", pa.list_(pa.large_string())), ("image", pa.string())])


@dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """One feature table: whose vectors, from which words, by which encoder."""

    # "items": title, categories, description; "users": the user's reviews of this one domain
    kind: str
    encoder: EncoderSpec
    # "review_mean": mean of the reviews' vectors; "concat": one text of all reviews, cut at max_tokens. Not a detail:
    # the top-10 neighbours of the two overlap by 0.10. Only read for users.
    users: str = "review_mean"
    # newest reviews of a user that are read (0: all). Only read for users.
    max_reviews: int = 0
    # name in features.extraction.prompts.PROMPTS
    prompt: str = "plain-1"
    # where items' images come from, for an encoder that sees
    images: ImageSpec = field(default_factory=ImageSpec)

    def __post_init__(self) -> None:
        refuse(
            *(choice(self, "kind", KINDS), choice(self, "users", USER_FEATURES)),
            choice(self, "prompt", tuple(sorted(PROMPTS))),
            whole(self, "max_reviews", least=0),
            f"encoder is {self.encoder.model}, which reads images, and users have none; give a text encoder"
            if self.kind == "users" and self.encoder.looks
            else "",
            place="features.",
        )


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What an extraction has left to do. Tokens are projected from a sample of the texts that are left."""

    rows: int
    rows_left: int
    texts_left: int
    tokens_left: int  # of texts; those of images are known when they are read
    bytes_left: int = 0  # of vectors, in shards
    images_left: int = 0  # to be found or fetched
    sample: tuple[Row, ...] = ()  # rows that are left, for `features.encoders.throughput.measure_rate`


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All rows of a table, and the macro-batches that are still to be encoded."""

    spec: FeatureSpec
    domain: Domain
    ids: list[str]  # sorted
    keys: list[bytes | None]  # row key of each id; None where the row failed before any encoder saw it
    failed: dict[str, str]  # id -> reason
    without_image: dict[str, str]  # id -> reason; of an encoder that sees, and read by their text alone
    blocks: list[pa.Table]  # one per macro-batch, _BLOCK_SCHEMA; unique rows that no shard holds

    @property
    def texts_left(self) -> int:
        return sum(_texts(block) for block in self.blocks)


def feature_key(spec: FeatureSpec, domain: Domain) -> str:
    """Key of a table: the encoder by content, the prompt by its words, and the domain by its own content key.

    Raises InputError if the encoder cannot be found.
    """
    return _feature_key(spec, domain, resolve_encoder(spec.encoder))


def _feature_key(spec: FeatureSpec, domain: Domain, resolved: ResolvedEncoder) -> str:
    rows = {"users": spec.users, "max_reviews": spec.max_reviews} if spec.kind == "users" else {}
    prompt = {"name": spec.prompt, "cleaning": CLEANING} | find_prompt(spec.prompt).document
    return digest({"encoder": resolved.key, "prompt": prompt, "kind": spec.kind, "domain": domain.key} | rows)


def find_table(spec: FeatureSpec, domain: Domain, store: Path) -> FeatureTable | None:
    """The finished table, or None if it is still to be extracted. Raises InputError for a broken one."""
    path, key = _place(spec, domain, resolve_encoder(spec.encoder), store)
    return open_table(path, key) if path.exists() else None


def _place(spec: FeatureSpec, domain: Domain, resolved: ResolvedEncoder, store: Path) -> tuple[Path, str]:
    """The folder of a table, and its key."""
    key = _feature_key(spec, domain, resolved)
    return table_path(store, domain.name, spec.kind, key), key


def shortfall(table: FeatureTable) -> str | None:
    """What another try might mend in a finished table, and how to have it; None where there is nothing."""
    rows = table.manifest["rows"]
    failed = sum(row["reason"] not in (NO_TEXT, NO_REVIEW) for row in rows["failed"])
    blind = sum(reason != NO_IMAGE for reason in rows.get("without_image", {}).values())
    counts = [f"{failed:,} rows failed"] if failed else []
    counts += [f"{blind:,} read without their image"] if blind else []
    return f"{', '.join(counts)}; delete {table.path} to try them again" if counts else None


def estimate(spec: FeatureSpec, domain: Domain, store: Path) -> Estimate:
    """What `extract` would do now. Reads the domain's texts and the keys on disk; loads a tokenizer but no model."""
    if (table := find_table(spec, domain, store)) is not None:
        return Estimate(rows=table.manifest["rows"]["planned"], rows_left=0, texts_left=0, tokens_left=0)
    resolved = resolve_encoder(spec.encoder)
    wanted = set(_references(domain)) if spec.encoder.looks else set()
    images = known_images(wanted, domain.data_folder, store)
    plan = make_plan(spec, domain, RowStore.of(store, resolved.key).index(), Gathered(images, {}))
    rows_left, texts = sum(block.num_rows for block in plan.blocks), plan.texts_left
    sample = [text for block in plan.blocks for text in islice(_block_texts(block), max(1, 512 // len(plan.blocks)))]
    tokens = tokenize(load_tokenizer(resolved), sample, spec.encoder.max_tokens)
    few = [row for block in plan.blocks for row in _rows(block.slice(0, max(1, _SAMPLE // len(plan.blocks))))]
    return Estimate(
        rows=len(plan.ids),
        rows_left=rows_left,
        texts_left=texts,
        tokens_left=round(sum(map(len, tokens)) / max(1, len(tokens)) * texts),
        bytes_left=rows_left * load_width(resolved) * np.dtype(spec.encoder.store_dtype).itemsize,
        images_left=len(wanted) - len(images),
        sample=tuple(few[:_SAMPLE]),
    )


def extract(spec: FeatureSpec, domain: Domain, store: Path, **means: Any) -> FeatureTable:
    """The feature table of one domain; how, and what is raised: see `extract_tables`."""
    (table,) = extract_tables([(spec, domain)], store, **means)
    return table


def extract_tables(
    wanted: Sequence[tuple[FeatureSpec, Domain]],
    store: Path,
    *,
    progress: Progress | None = None,
    image_progress: Callable[[str, int, int], None] | None = None,
    workers: int | Actors | None = None,
    use_ray: bool | None = None,
    loader: Callable[[ResolvedEncoder], Encoder] = load_encoder,
) -> list[FeatureTable]:
    """Feature tables of one encoder, those that the store lacks extracted; only rows that no shard holds are encoded.

    All are planned before any is encoded, then they are one job: its workers start and load the model once.
    progress: called with (texts done, texts to do, tokens read, seconds of work); image_progress: with (domain, images
    done, images to do), before that. workers: threads, or Ray actors (default: one per GPU if there are any, else one per
    core; `Actors`: of a cluster that may still grow). use_ray: None lets the number of texts decide.
    Raises InputError: encoder missing or not what it should be, empty domain, too many failed rows, another's store.
    """
    start = time.monotonic()
    (encoder,) = {spec.encoder for spec, _ in wanted}
    resolved = replace(resolve_encoder(encoder), images=images_folder(store))
    places = [_place(spec, domain, resolved, store) for spec, domain in wanted]
    left = [each for each, (path, _) in zip(wanted, places, strict=True) if not path.exists()]
    if left:
        shards = RowStore.of(store, resolved.key)
        plans = _plan_tables(left, shards, store, image_progress)
        texts, blocks = sum(plan.texts_left for plan in plans), []
        for plan in plans:
            blocks += plan.blocks
            plan.blocks.clear()
        make_worker = partial(ShardWorker, partial(loader, resolved), shards, encoder.store_dtype, mark_store(store))
        most = sum(encoder.max_failed_fraction * len(plan.ids) - len(plan.failed) for plan in plans)
        run = run_blocks(
            blocks, make_worker, texts, name="Encode" + "And".join(sorted({spec.kind.title() for spec, _ in left})),
            workers=workers, use_ray=use_ray, progress=progress, most_failed=most,
        )  # fmt: skip
        _finish_tables(plans, run, resolved, shards, store, start)
    return [open_table(path, key) for path, key in places]


def _plan_tables(
    wanted: Sequence[tuple[FeatureSpec, Domain]],
    shards: RowStore,
    store: Path,
    image_progress: Callable[[str, int, int], None] | None,
) -> list[Plan]:
    """What each table needs that neither a shard holds nor a table before it needs."""
    shards.check_writable()
    shards.clean()
    images = [_gather(spec, domain, store, image_progress) for spec, domain in wanted]
    done, plans = shards.index(), []
    for (spec, domain), of_domain in zip(wanted, images, strict=True):
        plans.append(plan := make_plan(spec, domain, done, of_domain))
        _check_failed(plan, plan.failed)  # before hours of encoding, not after
        done |= {key: 0 for key in plan.keys if key is not None}
    return plans


def _gather(
    spec: FeatureSpec, domain: Domain, store: Path, progress: Callable[[str, int, int], None] | None
) -> Gathered:
    """The items' images, where the encoder sees them."""
    if not spec.encoder.looks:
        return Gathered({}, {})
    told = partial(progress, domain.name) if progress is not None else None
    gathered = gather_images(_references(domain), domain.data_folder, store, spec.images, told)
    gathered.check(f"features of {domain.name} {spec.kind}", spec.images)
    return gathered


def _references(domain: Domain) -> Iterator[str]:
    return (reference for reference in item_images(domain) if reference is not None)


def encode_rows(
    rows: Iterable[Row],
    resolved: ResolvedEncoder,
    store: Path,
    *,
    progress: Progress | None = None,
    workers: int | Actors | None = None,
    use_ray: bool | None = None,
    loader: Callable[[ResolvedEncoder], Encoder] = load_encoder,
) -> tuple[RowStore, dict[bytes, str]]:
    """Encode what the store does not hold of `rows`; the store of their vectors, and the keys of failed rows with reasons.

    The other arguments are those of `extract`.
    """
    resolved = replace(resolved, images=images_folder(store))
    shards = RowStore.of(store, resolved.key)
    shards.check_writable()
    shards.clean()
    planned = {row_key(row): row for row in rows}
    done = shards.index()
    left = _block([(key, row) for key, row in planned.items() if key not in done])
    blocks = (
        _macro_batches(left, {key: len(row.texts) for key, row in planned.items()}, _MACRO_TEXTS) if planned else []
    )
    make_worker = partial(ShardWorker, partial(loader, resolved), shards, resolved.spec.store_dtype, mark_store(store))
    todo = sum(map(_texts, blocks))
    run = run_blocks(blocks, make_worker, todo, name="EncodeTexts", workers=workers, use_ray=use_ray, progress=progress)
    return shards, run.failed


def make_plan(spec: FeatureSpec, domain: Domain, done: Mapping[bytes, int], images: Gathered) -> Plan:
    """Rows of the domain, deduplicated by content, cut into macro-batches, less those in `done` (row keys).

    images: of the items, for an encoder that sees.
    Rows are ordered by key, which is a shuffle that never changes, and cut before the anti-join: a resumed run has the
    same macro-batches as an uninterrupted one. Raises InputError for a domain without rows.
    """
    prompt = find_prompt(spec.prompt)
    if spec.kind == "users":
        rows = user_rows(domain, prompt, spec.users, spec.max_reviews)
    elif spec.encoder.looks:
        rows = seen_rows(domain, prompt, images.names)
    else:
        rows = item_rows(domain, prompt)
    ids: list[str] = []
    keys: list[bytes | None] = []
    failed: dict[str, str] = {}
    texts: dict[bytes, int] = {}
    left: list[pa.Table] = []
    pending: list[tuple[bytes, Row]] = []
    for name, row in rows:
        ids.append(name)
        if isinstance(row, str):
            keys.append(None)
            failed[name] = row
            continue
        keys.append(key := row_key(row))
        if key not in texts:
            texts[key] = len(row.texts)
            if key not in done:
                pending.append((key, row))
        if len(pending) >= 4096:  # texts wait as Arrow, not as Python objects
            left.append(_block(pending))
            pending = []
    if not ids:
        raise InputError(f"domain {domain.name}: no {spec.kind}, so no features; loosen its filters or check its files")
    left.append(_block(pending))
    assert all(a < b for a, b in pairwise(ids))
    without = _without_image(domain, ids, images) if spec.encoder.looks else {}
    blocks = _macro_batches(pa.concat_tables(left), texts, _MACRO_IMAGES if spec.encoder.looks else _MACRO_TEXTS)
    return Plan(spec=spec, domain=domain, ids=ids, keys=keys, failed=failed, without_image=without, blocks=blocks)


def _without_image(domain: Domain, ids: Sequence[str], images: Gathered) -> dict[str, str]:
    """Items that are read by their text alone, with the reason."""
    named = zip(ids, item_images(domain), strict=True)
    return {
        name: images.missing.get(image, NO_IMAGE) if image else NO_IMAGE
        for name, image in named
        if image is None or image not in images.names
    }


def _block(rows: Sequence[tuple[bytes, Row]]) -> pa.Table:
    return pa.table(
        [
            pa.array([key for key, _ in rows], KEY_TYPE),
            pa.array([list(row.texts) for _, row in rows], pa.list_(pa.large_string())),
            pa.array([row.image for _, row in rows], pa.string()),
        ],
        schema=_BLOCK_SCHEMA,
    )


def _macro_batches(left: pa.Table, texts: Mapping[bytes, int], sizes: tuple[int, int]) -> list[pa.Table]:
    """Cut all planned rows (`texts`: key -> number of texts) by key order, then keep what is left of each piece."""
    size = int(np.clip(sum(texts.values()) // _MACRO_BATCHES, *sizes))
    planned = sorted(texts)
    ends = np.cumsum([texts[key] for key in planned])
    macro = dict(zip(planned, ((ends - 1) // size).tolist(), strict=True))
    keys = left["key"].to_pylist()
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)
    number = np.array([macro[keys[i]] for i in order], np.int64)
    cuts = np.flatnonzero(np.diff(number)) + 1
    return [left.take(part) for part in np.split(order, cuts) if len(part)]


def _texts(block: pa.Table) -> int:
    return sum(len(chunk.flatten()) for chunk in block["texts"].chunks)


def _rows(block: pa.Table) -> list[Row]:
    columns = zip(block["texts"].to_pylist(), block["image"].to_pylist(), strict=True)
    return [Row(texts=tuple(texts), image=image) for texts, image in columns]


def _block_texts(block: pa.Table) -> Iterator[str]:
    return (text for chunk in block["texts"].chunks for text in chunk.flatten().to_pylist())


class ShardWorker:
    """Encodes one macro-batch and writes its shard; called from threads, or by Ray Data as an actor.

    It answers with one line of what happened, never with vectors.
    """

    def __init__(self, load: Callable[[], Encoder], shards: RowStore, store_dtype: str, mark: Path) -> None:
        check_mark(mark)
        self.encoder = encoder = load()
        self.shards = shards
        self.dtype = np.dtype(store_dtype)
        self.seconds = 0.0  # of work
        self.operations = Operations(encoder.model) if isinstance(encoder, TextEncoder | ImageTextEncoder) else None

    def __call__(self, block: pa.Table) -> pa.Table:
        # One thread per worker, said out loud: Ray's OMP_NUM_THREADS=1 holds in actors only, two threads on a busy
        # machine are ten times slower than one, and with one a row's bits do not depend on its batch.
        torch.set_num_threads(1)
        keys: list[bytes] = block["key"].to_pylist()
        if self.shards.holds(keys):  # Ray asks again for what a lost node had answered
            return result(figures={"texts": _texts(block)})
        start = time.perf_counter()
        encoded = self.encoder.encode(_rows(block))
        seconds = time.perf_counter() - start
        with np.errstate(over="ignore"):  # what overflows is found in the next line
            vectors = encoded.vectors.astype(self.dtype)
        finite = np.isfinite(vectors).all(1)
        failed = {int(i): f"vector not finite in {self.dtype}" for i in np.flatnonzero(~finite)} | dict(encoded.failed)
        good = [i for i in range(len(keys)) if i not in failed]
        if good:
            self.shards.write([keys[i] for i in good], vectors[good], encoded.tokens[good])
        tokens = int(encoded.tokens.sum())
        return result(
            {keys[i]: reason for i, reason in failed.items()},
            figures={"texts": _texts(block), "tokens": tokens, "seconds": seconds, **self._share(seconds)},
        )

    def _share(self, seconds: float) -> dict[str, float]:
        """Operations done, and those that the measured peak would have done; nothing for short work."""
        if self.operations is None:
            return {}
        done, model = float(self.operations.taken()), self.operations.model
        self.seconds += seconds
        if self.seconds < _PEAK_AFTER:
            return {}
        return {"operations": done, "peak": matrix_peak(model.device, model.dtype) * seconds}


def _check_failed(plan: Plan, failed: Mapping[str, str]) -> None:
    allowed = plan.spec.encoder.max_failed_fraction
    if len(failed) > allowed * len(plan.ids) or len(failed) == len(plan.ids):
        name, reason = min(failed.items())
        raise InputError(
            f"features of {plan.domain.name} {plan.spec.kind}: {len(failed)} of {len(plan.ids)} rows failed, and "
            f"encoder.max_failed_fraction is {allowed:g}; first {name!r}: {reason}; mend or filter them, or raise it"
        )


def _speed(run: Done) -> dict[str, float | None]:
    """Images are found and workers start before the seconds that are counted here."""
    share = run.share_of_peak
    return {
        "texts": run.texts,
        "tokens": run.tokens,
        "texts_per_second": round(run.texts / run.elapsed, 3) if run.elapsed else None,
        "tokens_per_second": round(run.tokens / run.elapsed, 3) if run.elapsed else None,
        "working_seconds": round(run.elapsed, 3),
        "busy_seconds": round(run.seconds, 3),  # of all workers
        "share_of_peak": None if share is None else round(share, 4),
    }


def _finish_tables(
    plans: Sequence[Plan], run: Done, resolved: ResolvedEncoder, shards: RowStore, store: Path, start: float
) -> None:
    """Check that every planned row is on disk or failed, and publish the tables."""
    shards.check_writable()  # a new file, so that a network's file system lists the folder anew
    done = shards.index()
    failed = [_failed(plan, run, done) for plan in plans]
    for plan, of_plan in zip(plans, failed, strict=True):  # all of them first: a run that was stopped lacks rows of any
        _check_failed(plan, of_plan)
    for plan, of_plan in zip(plans, failed, strict=True):
        _finish(plan, of_plan, done, run, resolved, shards, store, time.monotonic() - start)


def _failed(plan: Plan, run: Done, done: Mapping[bytes, int]) -> dict[str, str]:
    """Id -> reason; another extraction may have stored what failed here."""
    keys = zip(plan.ids, plan.keys, strict=True)
    return plan.failed | {name: run.failed[k] for name, k in keys if k in run.failed and k not in done}


def _finish(
    plan: Plan,
    failed: Mapping[str, str],
    done: Mapping[bytes, int],
    run: Done,
    resolved: ResolvedEncoder,
    shards: RowStore,
    store: Path,
    seconds: float,
) -> None:
    spec, domain = plan.spec, plan.domain
    path, key = _place(spec, domain, resolved, store)
    kept = [(name, k) for name, k in zip(plan.ids, plan.keys, strict=True) if k is not None and k in done]
    if len(kept) + len(failed) != len(plan.ids):
        raise RuntimeError(
            f"features of {domain.name} {spec.kind}: {len(plan.ids)} rows planned, {len(kept)} in {shards.folder}, "
            f"{len(failed)} failed: some were lost; run it again, finished rows are kept"
        )
    unique = {k for _, k in kept}
    manifest = {
        "key": key,
        "kind": spec.kind,
        "users": spec.users if spec.kind == "users" else None,
        "max_reviews": spec.max_reviews if spec.kind == "users" else None,
        "prompt": {"name": spec.prompt} | find_prompt(spec.prompt).document,
        "encoder": {"model": spec.encoder.model, "revision": spec.encoder.revision, "key": resolved.key}
        | resolved.identity,
        "domain": {"name": domain.name, "key": domain.key},
        "simulated": domain.simulated,
        "rows": {
            "planned": len(plan.ids),
            "done": len(kept),
            "unique": len(unique),
            "failed": [{"id": name, "reason": reason} for name, reason in sorted(failed.items())],
        }
        | ({"without_image": dict(sorted(plan.without_image.items()))} if spec.encoder.looks else {}),
        "tokens": sum(done[k] for k in unique),
        "seconds": round(seconds, 3),  # of the call that finished the table, and others of its encoder
        "speed": _speed(run),  # of that call as well
        "versions": {
            name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy", "pyarrow", "ray")
        },
    }
    write_table(path, [name for name, _ in kept], pa.array([k for _, k in kept], KEY_TYPE), shards, manifest)
