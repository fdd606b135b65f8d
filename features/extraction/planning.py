"""Planning of an extraction: inputs of a domain -> content keys -> deduplicated -> macro-batches that are still to encode.

A macro-batch is a block of work: an Arrow table of inputs with their keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from features.encoders.inputs import EncoderInput, input_key
from features.errors import InputError
from features.extraction.prompts import find_prompt, item_image_inputs, item_images, item_inputs, user_inputs
from features.extraction.spec import FeatureSpec
from features.images.gather import NO_IMAGE, GatheredImages
from features.store.shards import KEY_TYPE

if TYPE_CHECKING:
    from features.domains.domain import Domain

MACRO_TEXTS = (256, 4096)  # a macro-batch: long enough to sort by length, short enough to lose to a kill
MACRO_IMAGES = (32, 512)  # the same where each text comes with an image, which costs as much as hundreds of words
_MACRO_BATCHES = 16  # and small jobs are cut into this many, so that no worker is alone with the last one
_PENDING = 4096  # inputs that are held as Python objects while a domain is read
_BLOCK_SCHEMA = pa.schema([("key", KEY_TYPE), ("texts", pa.list_(pa.large_string())), ("image", pa.string())])


@dataclass(frozen=True, kw_only=True)
class TablePlan:
    """All rows of a table, and the macro-batches that are still to be encoded."""

    spec: FeatureSpec
    domain: Domain
    ids: list[str]  # sorted
    keys: list[bytes | None]  # input key of each id; None where the row failed before any encoder read it
    failed: dict[str, str]  # id -> reason
    without_image: dict[str, str]  # id -> reason; items that a vision-language model reads by their text alone
    blocks: list[pa.Table]  # one per macro-batch, _BLOCK_SCHEMA; unique inputs that no shard holds

    @property
    def texts_left(self) -> int:
        """Number of texts in the blocks."""
        return sum(map(count_texts, self.blocks))


def plan_table(spec: FeatureSpec, domain: Domain, stored: Mapping[bytes, int], images: GatheredImages) -> TablePlan:
    """Cut the inputs of a domain, deduplicated by content, into macro-batches, less those in `stored` (input keys).

    images: of the items, for a vision-language model.
    Inputs are ordered by key, which is a shuffle that never changes, and cut before stored ones are left out: a resumed
    run has the same macro-batches as an uninterrupted one. Raises InputError for a domain without rows.
    """
    ids: list[str] = []
    keys: list[bytes | None] = []
    failed: dict[str, str] = {}
    texts: dict[bytes, int] = {}
    blocks: list[pa.Table] = []
    pending: list[tuple[bytes, EncoderInput]] = []
    for name, encoder_input in _inputs(spec, domain, images):
        ids.append(name)
        if isinstance(encoder_input, str):
            keys.append(None)
            failed[name] = encoder_input
            continue
        keys.append(key := input_key(encoder_input))
        if key not in texts:
            texts[key] = len(encoder_input.texts)
            if key not in stored:
                pending.append((key, encoder_input))
        if len(pending) >= _PENDING:  # texts wait as Arrow, not as Python objects
            blocks.append(input_block(pending))
            pending = []
    if not ids:
        raise InputError(f"domain {domain.name}: no {spec.kind}, so no features; loosen its filters or check its files")
    blocks.append(input_block(pending))
    assert all(a < b for a, b in pairwise(ids))
    return TablePlan(
        spec=spec,
        domain=domain,
        ids=ids,
        keys=keys,
        failed=failed,
        without_image=_without_image(domain, ids, images) if spec.encoder.reads_images else {},
        blocks=macro_batches(
            pa.concat_tables(blocks), texts, MACRO_IMAGES if spec.encoder.reads_images else MACRO_TEXTS
        ),
    )


def _inputs(spec: FeatureSpec, domain: Domain, images: GatheredImages) -> Iterator[tuple[str, EncoderInput | str]]:
    prompt = find_prompt(spec.prompt)
    if spec.kind == "users":
        return user_inputs(domain, prompt, spec.users, spec.max_reviews)
    if spec.encoder.reads_images:
        return item_image_inputs(domain, prompt, images.names)
    return item_inputs(domain, prompt)


def _without_image(domain: Domain, ids: Sequence[str], images: GatheredImages) -> dict[str, str]:
    """Return the items that are read by their text alone, with the reason."""
    return {
        name: images.missing.get(reference, NO_IMAGE) if reference else NO_IMAGE
        for name, reference in zip(ids, item_images(domain), strict=True)
        if reference is None or reference not in images.names
    }


def macro_batches(left: pa.Table, texts: Mapping[bytes, int], sizes: tuple[int, int]) -> list[pa.Table]:
    """Cut all planned inputs (`texts`: key -> number of texts) by key order, then keep what `left` has of each piece."""
    size = int(np.clip(sum(texts.values()) // _MACRO_BATCHES, *sizes))
    planned = sorted(texts)
    ends = np.cumsum([texts[key] for key in planned])
    batch_of = dict(zip(planned, ((ends - 1) // size).tolist(), strict=True))
    keys = left["key"].to_pylist()
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)
    batch = np.array([batch_of[keys[i]] for i in order], np.int64)
    cuts = np.flatnonzero(np.diff(batch)) + 1
    return [left.take(part) for part in np.split(order, cuts) if len(part)]


def input_block(inputs: Sequence[tuple[bytes, EncoderInput]]) -> pa.Table:
    """Return inputs with their keys as a block."""
    return pa.table(
        [
            pa.array([key for key, _ in inputs], KEY_TYPE),
            pa.array([list(one.texts) for _, one in inputs], pa.list_(pa.large_string())),
            pa.array([one.image for _, one in inputs], pa.string()),
        ],
        schema=_BLOCK_SCHEMA,
    )


def block_inputs(block: pa.Table) -> list[EncoderInput]:
    """Return the inputs of a block."""
    columns = zip(block["texts"].to_pylist(), block["image"].to_pylist(), strict=True)
    return [EncoderInput(texts=tuple(texts), image=image) for texts, image in columns]


def block_texts(block: pa.Table) -> Iterator[str]:
    """Yield all texts of a block."""
    return (text for chunk in block["texts"].chunks for text in chunk.flatten().to_pylist())


def count_texts(block: pa.Table) -> int:
    """Count the texts of a block."""
    return sum(len(chunk.flatten()) for chunk in block["texts"].chunks)
