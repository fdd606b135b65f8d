"""Extraction: plan -> Ray Data actor pool (or threads) -> shards -> one aligned table.

plan        the inputs of the domain, deduplicated by content, cut into macro-batches, less those in shards on disk
run         each macro-batch is encoded by one worker, which writes its shard itself
finish      every planned row is in a shard or failed with a reason; failures are bounded; the table, manifest last

Kill it anywhere and start it again: finished macro-batches are found on disk, and nothing else is trusted.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from features.encoders.encoder import Encoder, load_encoder, load_tokenizer, load_width
from features.encoders.inputs import EncoderInput
from features.encoders.spec import ResolvedEncoder, resolve_encoder
from features.encoders.text import tokenize
from features.errors import InputError
from features.extraction.encoding import ShardWorker
from features.extraction.planning import TablePlan, block_inputs, block_texts, plan_table
from features.extraction.prompts import NO_REVIEW, NO_TEXT, find_prompt, item_images
from features.extraction.spec import FeatureSpec, find_table, table_place
from features.extraction.workers import Actors, WorkTotals, run_blocks
from features.images.gather import GatheredImages, gather_images, images_folder, stored_images
from features.progress import PhaseProgress, Progress
from features.store.shards import KEY_TYPE, VectorStore, mark_store
from features.store.tables import FeatureTable, open_table, write_table

if TYPE_CHECKING:
    from features.domains.domain import Domain

_SAMPLE_TEXTS = 512  # texts that the number of tokens is projected from
_SAMPLE_INPUTS = 64  # inputs that a throughput is measured on


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What an extraction has left to do. Tokens are projected from a sample of the texts that are left."""

    rows: int
    rows_left: int
    texts_left: int
    tokens_left: int  # of texts; those of images are known when they are read
    bytes_left: int = 0  # of vectors, in shards
    images_left: int = 0  # to be found or fetched
    sample: tuple[EncoderInput, ...] = ()  # inputs that are left, for `features.encoders.throughput`


def estimate(spec: FeatureSpec, domain: Domain, store: Path) -> Estimate:
    """Estimate what `extract_tables` has left to do. Reads texts and keys; loads a tokenizer but no model."""
    if (table := find_table(spec, domain, store)) is not None:
        return Estimate(rows=table.manifest["rows"]["planned"], rows_left=0, texts_left=0, tokens_left=0)
    resolved = resolve_encoder(spec.encoder)
    references = set(_references(domain)) if spec.encoder.reads_images else set()
    images = stored_images(references, domain.data_folder, store)
    plan = plan_table(spec, domain, VectorStore.open(store, resolved.key).index(), GatheredImages(images, {}))
    rows_left, texts, blocks = sum(block.num_rows for block in plan.blocks), plan.texts_left, len(plan.blocks)
    sample = [text for block in plan.blocks for text in islice(block_texts(block), max(1, _SAMPLE_TEXTS // blocks))]
    tokens = tokenize(load_tokenizer(resolved), sample, spec.encoder.max_tokens)
    inputs = [one for block in plan.blocks for one in block_inputs(block.slice(0, max(1, _SAMPLE_INPUTS // blocks)))]
    return Estimate(
        rows=len(plan.ids),
        rows_left=rows_left,
        texts_left=texts,
        tokens_left=round(sum(map(len, tokens)) / max(1, len(tokens)) * texts),
        bytes_left=rows_left * load_width(resolved) * np.dtype(spec.encoder.store_dtype).itemsize,
        images_left=len(references) - len(images),
        sample=tuple(inputs[:_SAMPLE_INPUTS]),
    )


def extract_tables(
    wanted: Sequence[tuple[FeatureSpec, Domain]],
    store: Path,
    *,
    progress: Progress | None = None,
    image_progress: PhaseProgress | None = None,
    workers: int | Actors | None = None,
    use_ray: bool | None = None,
    loader: Callable[[ResolvedEncoder], Encoder] = load_encoder,
) -> list[FeatureTable]:
    """Return the feature tables of one encoder; those that the store lacks are extracted, and only new inputs encoded.

    All are planned before any is encoded, then they are one job: its workers start and load the model once.
    progress: told of texts; image_progress: told of images before that, its phase the domain. workers: threads, or Ray
    actors (default: one per GPU if there are any, else one per core; `Actors`: of a cluster that may still grow). use_ray:
    None lets the number of texts decide.
    Raises InputError for an encoder that is missing or not what it should be, an empty domain, too many failed rows, or
    a store of another encoder.
    """
    start = time.monotonic()
    (encoder,) = {spec.encoder for spec, _ in wanted}
    resolved = replace(resolve_encoder(encoder), images=images_folder(store))
    places = [table_place(spec, domain, resolved, store) for spec, domain in wanted]
    left = [table for table, (path, _) in zip(wanted, places, strict=True) if not path.exists()]
    if left:
        vectors = VectorStore.open(store, resolved.key)
        plans = _plan_tables(left, vectors, store, image_progress)
        texts, blocks = sum(plan.texts_left for plan in plans), []
        for plan in plans:
            blocks += plan.blocks
            plan.blocks.clear()
        make_worker = partial(ShardWorker, partial(loader, resolved), vectors, encoder.store_dtype, mark_store(store))
        most = sum(encoder.max_failed_fraction * len(plan.ids) - len(_real_failures(plan.failed)) for plan in plans)
        totals = run_blocks(
            blocks, make_worker, texts, name="Encode" + "And".join(sorted({spec.kind.title() for spec, _ in left})),
            workers=workers, use_ray=use_ray, progress=progress, most_failed=most,
        )  # fmt: skip
        _finish_tables(plans, totals, resolved, vectors, store, start)
    return [open_table(path, key) for path, key in places]


# --- plan ---------------------------------------------------------------------------------------------------------


def _plan_tables(
    wanted: Sequence[tuple[FeatureSpec, Domain]],
    vectors: VectorStore,
    store: Path,
    image_progress: PhaseProgress | None,
) -> list[TablePlan]:
    """Plan each table: what it needs that neither a shard holds nor a table before it needs."""
    vectors.check_writable()
    vectors.clean()
    images = [_gather_images(spec, domain, store, image_progress) for spec, domain in wanted]
    stored, plans = vectors.index(), []
    for (spec, domain), domain_images in zip(wanted, images, strict=True):
        plans.append(plan := plan_table(spec, domain, stored, domain_images))
        _check_failed(plan, plan.failed)  # before hours of encoding, not after
        stored |= {key: 0 for key in plan.keys if key is not None}
    return plans


def _gather_images(spec: FeatureSpec, domain: Domain, store: Path, progress: PhaseProgress | None) -> GatheredImages:
    """Bring the items' images into the store, for a vision-language model."""
    if not spec.encoder.reads_images:
        return GatheredImages({}, {})
    domain_progress = partial(progress, domain.name) if progress is not None else None
    images = gather_images(_references(domain), domain.data_folder, store, spec.images, domain_progress)
    images.check(f"features of {domain.name} {spec.kind}", spec.images)
    return images


def _references(domain: Domain) -> Iterator[str]:
    return (reference for reference in item_images(domain) if reference is not None)


def _check_failed(plan: TablePlan, failed: Mapping[str, str]) -> None:
    """Raise InputError where more rows have failed than the spec allows; those that have no text have not failed."""
    allowed = plan.spec.encoder.max_failed_fraction
    if failed and len(failed) == len(plan.ids) and not _real_failures(failed):
        name, reason = min(failed.items())
        raise InputError(
            f"features of {plan.domain.name} {plan.spec.kind}: none of {len(failed):,} rows has text; first {name!r}: "
            f"{reason}; map its columns, or take features from ratings"
        )
    whole, failed = failed, _real_failures(failed)
    if (
        len(failed) > allowed * len(plan.ids)
        or len(failed) == len(plan.ids)
        or (failed and len(whole) == len(plan.ids))
    ):
        name, reason = min(failed.items())
        raise InputError(
            f"features of {plan.domain.name} {plan.spec.kind}: {len(failed)} of {len(plan.ids)} rows failed, and "
            f"encoder.max_failed_fraction is {allowed:g}; first {name!r}: {reason}; mend or filter them, or raise it"
        )


def _real_failures(failed: Mapping[str, str]) -> dict[str, str]:
    """Return id -> reason of the rows that have text and no vector."""
    return {name: reason for name, reason in failed.items() if reason not in (NO_TEXT, NO_REVIEW)}


# --- finish -------------------------------------------------------------------------------------------------------


def _finish_tables(
    plans: Sequence[TablePlan],
    totals: WorkTotals,
    resolved: ResolvedEncoder,
    vectors: VectorStore,
    store: Path,
    start: float,
) -> None:
    """Check that every planned row is on disk or failed, and publish the tables."""
    vectors.check_writable()  # a new file, so that a network's file system lists the folder anew
    stored = vectors.index()
    failed = [_failed_rows(plan, totals, stored) for plan in plans]
    for plan, reasons in zip(plans, failed, strict=True):  # all first: a run that was stopped lacks rows of any table
        _check_failed(plan, reasons)
    for plan, reasons in zip(plans, failed, strict=True):
        _finish_table(plan, reasons, stored, totals, resolved, vectors, store, time.monotonic() - start)


def _failed_rows(plan: TablePlan, totals: WorkTotals, stored: Mapping[bytes, int]) -> dict[str, str]:
    """Return id -> reason of the rows that failed; another extraction may have stored what failed here."""
    keys = zip(plan.ids, plan.keys, strict=True)
    return plan.failed | {name: totals.failed[k] for name, k in keys if k in totals.failed and k not in stored}


def _finish_table(
    plan: TablePlan,
    failed: Mapping[str, str],
    stored: Mapping[bytes, int],
    totals: WorkTotals,
    resolved: ResolvedEncoder,
    vectors: VectorStore,
    store: Path,
    seconds: float,
) -> None:
    """Write one table with its manifest."""
    spec, domain = plan.spec, plan.domain
    path, key = table_place(spec, domain, resolved, store)
    kept = [(name, k) for name, k in zip(plan.ids, plan.keys, strict=True) if k is not None and k in stored]
    if len(kept) + len(failed) != len(plan.ids):
        raise RuntimeError(
            f"features of {domain.name} {spec.kind}: {len(plan.ids)} rows planned, {len(kept)} in {vectors.folder}, "
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
        | ({"without_image": dict(sorted(plan.without_image.items()))} if spec.encoder.reads_images else {}),
        "tokens": sum(stored[k] for k in unique),
        "seconds": round(seconds, 3),  # of the call that finished this table, and others of its encoder
        "throughput": _throughput(totals),  # of that call as well
        "versions": {
            name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy", "pyarrow", "ray")
        },
    }
    write_table(path, [name for name, _ in kept], pa.array([k for _, k in kept], KEY_TYPE), vectors, manifest)


def _throughput(totals: WorkTotals) -> dict[str, float | None]:
    """Return the figures of a run for the manifest; the time before workers started is not counted."""
    share = totals.share_of_peak
    return {
        "texts": totals.texts,
        "tokens": totals.tokens,
        "texts_per_second": round(totals.texts / totals.elapsed, 3) if totals.elapsed else None,
        "tokens_per_second": round(totals.tokens / totals.elapsed, 3) if totals.elapsed else None,
        "working_seconds": round(totals.elapsed, 3),
        "busy_seconds": round(totals.seconds, 3),  # of all workers
        "share_of_peak": None if share is None else round(share, 4),
    }
