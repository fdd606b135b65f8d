"""Tasks: a directed pair of domains at one cold ratio, split, and written as arrays that trials open without a copy.

    <store>/<source>-<target>-<key[:12]>/search/    what training and selection may see: no test user is in it
                                          search/validation/    held-out users of the training side
                                          test/      the cold-start test users, opened by scoring alone

Overlapping users are shuffled by the data seed; `ratio` of them are test users, `validation_share` of the rest
validation users. The target-domain ratings of both are hidden from training and from rating-based vectors, and their
target-domain vectors are in no file of a task. Shapes: N ratings, U users, I items, F feature width.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from features.domains.domain import Domain
from features.errors import InputError
from features.factorisation import FactorSpec, Interactions, biases, factorise
from features.store.folders import mapped_array, store_errors, whole_folder, write_json
from features.store.tables import FeatureTable
from trainables.devices import OnDevice

VERSION = 2  # of what is written; part of the key
SHRINKAGE = 5.0  # ratings of the mean that each item mean and each user offset is taken to have (ours)
DENSE_BYTES = 64 * 2**20  # a table up to this size is standardised once and held in memory, by every process
_CENTRE_ROWS = 20_000  # rows that centre and scale are measured on
_COPY_ROWS = 4096  # rows copied at once
_READ_ROWS = 256  # rows widened and standardised at once

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class SplitSpec:
    """Who is held out."""

    ratio: float  # cold ratio: share of overlapping users that are test users, in (0, 1)
    validation_share: float = 0.2  # share of the other overlapping users that are held out for selection, in (0, 1)
    data_seed: int = 0  # of the shuffle

    def __post_init__(self) -> None:
        for name in ("ratio", "validation_share"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and 0 < value < 1):
                raise InputError(f"split.{name} is {value!r}; give a share between 0 and 1, both excluded")


@dataclass(frozen=True)
class Ratings(OnDevice):
    """Ratings sorted by user."""

    user: Tensor  # int64 [N]
    item: Tensor  # int64 [N]
    rating: Tensor  # float32 [N], rating points

    def __len__(self) -> int:
        return len(self.user)

    @cached_property
    def starts(self) -> Tensor:
        """First rating of each of the users 0..U-1, and N at the end: int64 [U + 1]."""
        users = int(self.user[-1]) + 1
        counts = torch.bincount(self.user, minlength=users)
        return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


class FeatureRows:
    """Raw feature vectors of some users or items, centred and scaled: row i belongs to user or item i.

    Rows come from a memory-mapped table; centre [F] and scale (one number, the root mean square over training rows, so
    that the proportions between features stay) were measured on training rows. One without a vector reads as the mean.
    """

    def __init__(self, vectors: NDArray[Any], rows: Ints, centre: Floats, scale: float) -> None:
        self._vectors, self._rows = np.asarray(vectors), rows
        self.centre, self.scale = torch.from_numpy(centre), scale
        self._centre = self.centre  # where vectors are read: on the CPU
        size = len(rows) * vectors.shape[1] * 4
        self._dense = self._read(np.arange(len(rows))) if size <= DENSE_BYTES else None

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def width(self) -> int:
        """F."""
        return int(self._vectors.shape[1])

    @property
    def device(self) -> torch.device:
        """Where its vectors are given out."""
        return self.centre.device

    def to(self, device: torch.device) -> FeatureRows:
        """Return the same rows on another device; what is not held in memory is moved as it is read."""
        if device == self.device:
            return self
        moved = copy.copy(self)
        moved.centre = self.centre.to(device)
        moved._dense = self._dense.to(device) if self._dense is not None else None
        return moved

    def __getitem__(self, index_B: Tensor) -> Tensor:
        """Standardised vectors, float32 [B, F]."""
        if self._dense is not None:
            return self._dense.index_select(0, index_B)
        return self._read(index_B.cpu().numpy()).to(self.device)

    def all(self) -> Tensor:
        """Return the standardised vectors of all rows, float32 [N, F]."""
        return self[torch.arange(len(self), device=self.device)]

    def _read(self, index_B: Ints) -> Tensor:
        rows = self._rows[index_B]
        # Memory from NumPy comes in huge pages, torch widens float16 in hardware, and a few rows at a time stay in the
        # cache: 40 ms against 80 for 6,000 rows of 4,096 numbers, where the matrix product after it takes 80.
        vectors = torch.from_numpy(np.empty((len(rows), self.width), np.float32))
        places = np.maximum(rows, 0)
        for start in range(0, len(rows), _READ_ROWS):
            part = slice(start, start + _READ_ROWS)
            read = vectors[part].copy_(torch.from_numpy(self._vectors[places[part]]))
            read.sub_(self._centre).div_(self.scale)
        vectors[torch.from_numpy(rows < 0)] = 0.0
        return vectors


@dataclass(frozen=True, kw_only=True)
class HeldOut(OnDevice):
    """Cold-start users: what is known of them is their source domain; their target ratings are to be predicted."""

    source: FeatureRows  # [U, F] source-domain vectors
    source_offset: Tensor  # float32 [U] how much higher than others they rate in the source domain, shrunken
    ratings: Ratings  # user 0..U-1
    cold_item: Tensor  # bool [N] the item occurs in no training rating (dual cold start)


@dataclass(frozen=True, kw_only=True)
class RatingQuery(OnDevice):
    """What is known of users whose ratings are asked for."""

    features: Tensor  # float32 [U, F] raw source-domain vectors
    source_offset: Tensor  # float32 [U]


@dataclass(frozen=True, kw_only=True)
class Task(OnDevice):
    """All that a search may see of a cell."""

    source: FeatureRows  # [O, F] source-domain vectors of the training overlapping users
    source_offset: Tensor  # float32 [O]
    target: FeatureRows  # [O + S, F] target-domain vectors: training overlapping users, then side users
    items: FeatureRows  # [I, F] target-domain items
    train: Ratings  # target-domain ratings; user < O: overlapping, else side
    overlapping: Ratings  # those of the overlapping users
    validation: HeldOut
    mean: float  # of the training ratings
    item_offset: Tensor  # float32 [I] shrunken mean of the item's training ratings, less `mean`
    slope: float  # of the target rating on `source_offset`, fitted on the training overlapping users
    rating_scale: tuple[float, float]

    @property
    def side_users(self) -> Tensor:
        """Numbers of the side users in `target`, int64 [S]."""
        return torch.arange(len(self.source), len(self.target), device=self.device)


@dataclass(frozen=True, kw_only=True)
class TaskFolders:
    """Where a built task lies."""

    key: str
    task_dir: Path
    test_dir: Path
    counts: Mapping[str, int]  # users and ratings on each side of the split


@dataclass(frozen=True, kw_only=True)
class TextVectors:
    """Vectors by a language model."""

    source_users: FeatureTable
    target_users: FeatureTable
    items: FeatureTable


@dataclass(frozen=True)
class _Split:
    train: Sequence[str]
    validation: Sequence[str]
    test: Sequence[str]


def split_users(source: Sequence[str], target: Sequence[str], spec: SplitSpec, place: str) -> _Split:
    """Sorted ids of the training, validation and test users among those of both domains."""
    overlapping = np.array(sorted(set(source) & set(target)), dtype=object)
    if len(overlapping) == 0:
        raise InputError(f"{place}: the domains share no user (after filtering); choose domains or filters that do")
    shuffled = np.random.default_rng(spec.data_seed).permutation(len(overlapping))
    tests = round(len(overlapping) * spec.ratio)
    validations = round((len(overlapping) - tests) * spec.validation_share)
    parts = np.split(shuffled, [tests, tests + validations])
    if min(len(part) for part in parts) == 0:
        raise InputError(
            f"{place}: {len(overlapping)} overlapping users at cold ratio {spec.ratio:g} leave "
            f"{len(parts[2])} for training, {len(parts[1])} for validation, {len(parts[0])} for test; "
            "each needs one, take more users or another ratio"
        )
    test, validation, train = (sorted(overlapping[part]) for part in parts)
    return _Split(train, validation, test)


def build_task(
    spec: SplitSpec, source: Domain, target: Domain, vectors: TextVectors | FactorSpec, store: Path
) -> TaskFolders:
    """Build the task, or find it built; the folder appears whole or not at all."""
    document = {
        "version": VERSION, "split": asdict(spec), "source": source.key, "target": target.key,
        "shrinkage": SHRINKAGE, "vectors": _vectors_key(vectors),
    }  # fmt: skip
    key = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    folder = store / f"{source.name}-{target.name}-{key[:12]}"
    if not (folder / "manifest.json").is_file():
        with store_errors(folder.parent), whole_folder(folder) as work:
            counts = _Builder(spec, source, target, vectors, work).build()
            write_json(work / "manifest.json", {"key": key, "counts": counts, **document})
    manifest = json.loads((folder / "manifest.json").read_text())
    folder = folder.resolve()
    return TaskFolders(key=key, task_dir=folder / "search", test_dir=folder / "test", counts=manifest["counts"])


def load_task(task_dir: Path) -> Task:
    """Open the search side of a task; large vectors stay memory-mapped."""
    meta = read_meta(task_dir)
    train = _load_ratings(task_dir)
    source = load_rows(task_dir, "source")
    first_side = int(np.searchsorted(train.user.numpy(), len(source)))
    return Task(
        source=source,
        source_offset=load_array(task_dir, "source_offset"),
        target=load_rows(task_dir, "target"),
        items=load_rows(task_dir, "items"),
        train=train,
        overlapping=Ratings(train.user[:first_side], train.item[:first_side], train.rating[:first_side]),
        validation=load_held_out(task_dir / "validation"),
        mean=meta["mean"],
        item_offset=load_array(task_dir, "item_offset"),
        slope=meta["slope"],
        rating_scale=(meta["rating_scale"][0], meta["rating_scale"][1]),
    )


def load_held_out(folder: Path) -> HeldOut:
    """Open validation or test users."""
    if not (folder / "cold_item.npy").is_file():
        raise not_built(folder)
    return HeldOut(
        source=load_rows(folder, "source"),
        source_offset=load_array(folder, "source_offset"),
        ratings=_load_ratings(folder),
        cold_item=load_array(folder, "cold_item"),
    )


# --- building -----------------------------------------------------------------------------------------------------


def _vectors_key(vectors: TextVectors | FactorSpec) -> Any:
    if isinstance(vectors, FactorSpec):
        return asdict(vectors)
    return [vectors.source_users.key, vectors.target_users.key, vectors.items.key]


@dataclass(frozen=True)
class _Coded:
    """Ratings of a domain with users and items numbered in sorted order."""

    users: NDArray[Any]  # [U] ids
    items: NDArray[Any]  # [I] ids
    user: Ints
    item: Ints
    rating: Floats


def _coded(domain: Domain) -> _Coded:
    frame = domain.interactions(["user_id", "item_id", "rating"])
    user, users = pd.factorize(frame["user_id"].to_numpy(dtype=object), sort=True)
    item, items = pd.factorize(frame["item_id"].to_numpy(dtype=object), sort=True)
    rating = frame["rating"].to_numpy(np.float32)
    if np.isnan(rating).any():
        raise InputError(
            f"{domain.path}: domain {domain.name} is implicit feedback, without the ratings a task needs; take a model "
            "of sequences, or feedback: explicit"
        )
    return _Coded(users, items, user.astype(np.int64), item.astype(np.int64), rating)


class _Builder:
    """Writes one task into a folder."""

    def __init__(
        self, spec: SplitSpec, source: Domain, target: Domain, vectors: TextVectors | FactorSpec, out: Path
    ) -> None:
        self.spec, self.vectors, self.out = spec, vectors, out
        self.place = f"task {source.name}->{target.name}"
        self.rating_scale = target.rating_scale
        self.source, self.target = _coded(source), _coded(target)
        self.split = split_users(list(self.source.users), list(self.target.users), spec, self.place)

    def build(self) -> dict[str, int]:
        """Write everything; returns the counts."""
        hidden = np.isin(self.target.users, [*self.split.validation, *self.split.test])
        seen = ~hidden[self.target.user]
        known = np.array([*self.split.train, *self._side(hidden)], dtype=object)
        user, item, rating = self._ratings(known, seen)
        mean = float(rating.mean(dtype=np.float64))
        _, source_item_offset = biases(SHRINKAGE, self.source.user, self.source.item, self._source_centred, *self._size)
        source_offset = shrunken_means(
            self.source.user, self._source_centred - source_item_offset[self.source.item], self._size[0]
        )
        item_offset = shrunken_means(item, rating.astype(np.float64) - mean, len(self.target.items))
        over = user < len(self.split.train)
        x = self._of_users(source_offset, self.split.train)[user[over]]
        y = rating[over].astype(np.float64) - mean - item_offset[item[over]]
        slope = float((x * y).sum() / max((x * x).sum(), 1e-12))

        folder = self.out / "search"
        folder.mkdir(parents=True)
        _save_ratings(folder, user, item, rating)
        save_arrays(folder, item_offset=item_offset.astype(np.float32))
        self._save_vectors(folder, known, user, item, rating)
        in_training = np.bincount(item, minlength=len(self.target.items)) > 0
        self._save_offsets(folder, source_offset, self.split.train)
        counts = {"overlapping": sum(map(len, (self.split.train, self.split.validation, self.split.test)))}
        for name, ids, place in (
            ("validation", self.split.validation, folder / "validation"),
            ("test", self.split.test, self.out / "test"),
        ):
            self._save_offsets(place, source_offset, ids)
            held_user, held_item, held_rating = self._ratings(np.array(ids, dtype=object), ~seen)
            _save_ratings(place, held_user, held_item, held_rating)
            save_arrays(place, cold_item=~in_training[held_item], user_id=np.array(ids, dtype=np.str_))
            counts |= {f"{name}_users": len(ids), f"{name}_ratings": len(held_user)}
        save_arrays(folder, item_id=self.target.items.astype(np.str_), user_id=known.astype(np.str_))
        write_json(
            folder / "task.json",
            {"mean": mean, "slope": slope, "rating_scale": self.rating_scale},
        )
        return counts | {
            "train_users": len(self.split.train), "side_users": len(known) - len(self.split.train),
            "train_ratings": len(user), "items": len(self.target.items), "train_items": int(in_training.sum()),
        }  # fmt: skip

    @property
    def _size(self) -> tuple[int, int]:
        return len(self.source.users), len(self.source.items)

    @cached_property
    def _source_centred(self) -> NDArray[np.float64]:
        rating: NDArray[np.float64] = self.source.rating.astype(np.float64)
        rating -= rating.mean()
        return rating

    def _side(self, hidden: NDArray[np.bool_]) -> list[str]:
        return [str(user) for user in self.target.users[~hidden & ~np.isin(self.target.users, self.split.train)]]

    def _ratings(self, ids: NDArray[Any], keep: NDArray[np.bool_]) -> tuple[Ints, Ints, Floats]:
        """The kept ratings of these users, numbered by their place in `ids`, sorted by user then item."""
        number = np.full(len(self.target.users), -1)
        number[np.searchsorted(self.target.users, ids)] = np.arange(len(ids))
        user = number[self.target.user]
        rows = np.flatnonzero(keep & (user >= 0))
        rows = rows[np.lexsort((self.target.item[rows], user[rows]))]
        return user[rows], self.target.item[rows], self.target.rating[rows]

    def _of_users(self, values: NDArray[Any], ids: Sequence[str]) -> NDArray[Any]:
        return values[np.searchsorted(self.source.users, np.array(ids, dtype=object))]

    def _save_offsets(self, folder: Path, source_offset: NDArray[np.float64], ids: Sequence[str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_arrays(folder, source_offset=self._of_users(source_offset, ids).astype(np.float32))

    def _save_vectors(self, folder: Path, known: NDArray[Any], user: Ints, item: Ints, rating: Floats) -> None:
        parts = {
            folder: self.split.train, folder / "validation": self.split.validation, self.out / "test": self.split.test
        }  # fmt: skip
        if isinstance(self.vectors, FactorSpec):
            source = factorise(
                self.vectors, _interactions(self.source.user, self.source.item, self.source.rating, self._size)
            )
            size = len(known), len(self.target.items)
            target = factorise(self.vectors, _interactions(user, item, rating, size))
            _save_rows(folder, "target", target.users, None)
            _save_rows(folder, "items", target.items, None)
            centre = centre_of(self._of_users(source.users, self.split.train))
            for place, ids in parts.items():
                _save_rows(place, "source", self._of_users(source.users, ids), None, centre)
            return
        # A copy of these users' rows: the whole table also holds what test users wrote in the target domain.
        _save_known_rows(folder, "target", self.vectors.target_users, list(known))
        _save_rows(folder, "items", self.vectors.items, list(self.target.items))
        rows = table_rows(self.vectors.source_users, self.split.train)
        centre = centre_of(self.vectors.source_users.vectors, rows)
        for place, ids in parts.items():
            _save_rows(place, "source", self.vectors.source_users, ids, centre)


def _interactions(user: Ints, item: Ints, rating: Floats, size: tuple[int, int]) -> Interactions:
    return Interactions(user=user, item=item, rating=rating, users=size[0], items=size[1])


def shrunken_means(code_N: Ints, value_N: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Mean per code, pulled towards 0 by SHRINKAGE ratings, [size]."""
    total = np.bincount(code_N, value_N, minlength=size)
    shrunken: NDArray[np.float64] = total / (np.bincount(code_N, minlength=size) + SHRINKAGE)
    return shrunken


def centre_of(vectors: NDArray[Any], rows: Ints | None = None) -> tuple[Floats, float]:
    """Mean [F] and root mean square of what is left, over at most _CENTRE_ROWS evenly spaced rows."""
    rows = np.arange(len(vectors)) if rows is None else rows[rows >= 0]
    rows = rows[:: max(1, len(rows) // _CENTRE_ROWS)]
    sample = vectors[rows].astype(np.float32)
    centre = sample.mean(axis=0) if len(sample) else np.zeros(vectors.shape[1], np.float32)
    scale = float(np.sqrt(np.mean((sample - centre) ** 2, dtype=np.float64))) if len(sample) else 1.0
    return centre, scale or 1.0


def table_rows(table: FeatureTable, ids: Sequence[str]) -> Ints:
    """Row of each id, -1 for one without a vector."""
    return pd.Index(table.ids, dtype=object).get_indexer(pd.Index(list(ids), dtype=object)).astype(np.int64)


def _save_rows(
    folder: Path,
    name: str,
    vectors: NDArray[Any] | FeatureTable,
    ids: Sequence[str] | None,
    centre: tuple[Floats, float] | None = None,
) -> None:
    """Write vectors, or where in a feature table they are, with their centre and scale."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(vectors, FeatureTable):
        assert ids is not None
        rows = table_rows(vectors, ids)
        centre = centre or centre_of(vectors.vectors, rows)
        # Relative: a home folder may move. The folder that is being built lies beside its final place.
        path: str | None = os.path.relpath((vectors.path / "vectors.npy").resolve(), folder.resolve())
    else:
        rows, path = np.arange(len(vectors)), None
        centre = centre or centre_of(vectors)
        np.save(folder / f"{name}_vectors.npy", vectors)
    save_places(folder, name, rows, centre, path)


def _save_known_rows(folder: Path, name: str, table: FeatureTable, ids: Sequence[str]) -> None:
    """Write the vectors that these ids have, and nothing else of the table."""
    rows = table_rows(table, ids)
    present = np.flatnonzero(rows >= 0)
    shape = (len(present), table.vectors.shape[1])
    copy = mapped_array(folder / f"{name}_vectors.npy", table.vectors.dtype, shape)
    for start in range(0, len(present), _COPY_ROWS):
        part = slice(start, start + _COPY_ROWS)
        copy[part] = table.vectors[rows[present[part]]]
    copy.flush()
    places = np.full(len(rows), -1)
    places[present] = np.arange(len(present))
    save_places(folder, name, places, centre_of(copy), None)


def save_places(folder: Path, name: str, rows: Ints, centre: tuple[Floats, float], vectors: str | None) -> None:
    """Which row of the vectors belongs to whom; `vectors`: path of a table elsewhere, None for one in this folder."""
    np.save(folder / f"{name}_rows.npy", rows)
    np.save(folder / f"{name}_centre.npy", centre[0])
    write_json(folder / f"{name}.json", {"vectors": vectors, "scale": centre[1], "missing": int((rows < 0).sum())})


def load_rows(folder: Path, name: str) -> FeatureRows:
    meta = json.loads((folder / f"{name}.json").read_text())
    path = folder / (meta["vectors"] or f"{name}_vectors.npy")
    try:
        vectors = np.load(path, mmap_mode="r")
    except FileNotFoundError as error:
        raise InputError(f"{folder}: its vectors {path} are gone; run `study extract` on the plan") from error
    rows, centre = np.load(folder / f"{name}_rows.npy"), np.load(folder / f"{name}_centre.npy")
    return FeatureRows(vectors, rows, centre, meta["scale"])


def find_vectors(folder: Path) -> list[Path]:
    """Files outside of `folder`, at any depth of which `save_places` has put their path; as that path says it.

    A link on the way is not followed: where the folder is copied to, the task looks where its path points.
    """
    metas = {path: json.loads(path.read_text()) for path in folder.rglob("*.json")}
    found = {os.path.normpath(path.parent / meta["vectors"]) for path, meta in metas.items() if meta.get("vectors")}
    return sorted(map(Path, found))


def read_meta(task_dir: Path) -> dict[str, Any]:
    """What `task.json` says; InputError where no task is built."""
    try:
        meta: dict[str, Any] = json.loads((task_dir / "task.json").read_text())
    except FileNotFoundError as error:
        raise not_built(task_dir) from error
    return meta


def not_built(folder: Path) -> InputError:
    return InputError(f"{folder}: no task is built here; run `study extract` on the plan")


def save_arrays(folder: Path, **arrays: NDArray[Any]) -> None:
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)


def load_array(folder: Path, name: str) -> Tensor:
    """Mapped, so that the processes of a node share it; a write would stay in its process."""
    return torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="c"))


def _save_ratings(folder: Path, user: Ints, item: Ints, rating: Floats) -> None:
    save_arrays(folder, user=user.astype(np.int64), item=item.astype(np.int64), rating=rating)


def _load_ratings(folder: Path) -> Ratings:
    return Ratings(
        user=load_array(folder, "user"), item=load_array(folder, "item"), rating=load_array(folder, "rating")
    )
