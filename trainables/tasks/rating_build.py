"""Building rating tasks: two domains -> who is held out -> offsets and vectors -> arrays on disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from features.checks import flag, number, refuse
from features.domains.domain import Domain
from features.domains.overlap import writing_hint
from features.domains.ties import time_order
from features.errors import InputError
from features.extraction.prompts import find_prompt, item_text
from features.factorisation import FactorSpec, Interactions, biases, factorise
from features.reviews import WordTable
from features.store.folders import mapped_array, read_json, store_errors, whole_folder, write_json
from features.store.tables import FeatureTable, digest
from trainables.tasks.arrays import Floats, Ints, TaskFolders, centre_of, save_arrays, save_places, table_rows
from trainables.tasks.rating import SHRINKAGE, shrunken_means

VERSION = 6  # of what is written; part of the key
_WORDS_VERSION = 2  # of the words that are written; part of the key of tasks that have them
_COPY_ROWS = 4096  # rows copied at once


@dataclass(frozen=True, kw_only=True)
class SplitSpec:
    """Who is held out."""

    cold_ratio: float  # share of overlapping users that are test users, in (0, 1)
    validation_share: float = 0.2  # share of the other overlapping users that are held out for selection, in (0, 1)
    data_seed: int = 0  # of the shuffle
    clip: bool = True  # whether predictions are cut to the rating scale before their errors are taken, of every row

    def __post_init__(self) -> None:
        shares = (number(self, name, above=0, below=1) for name in ("cold_ratio", "validation_share"))
        refuse(*shares, flag(self, "clip"), place="split.")


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
        names = place.removeprefix("task ").split("->")
        hint = writing_hint(set(source), set(target), names[0], names[-1])
        raise InputError(
            f"{place}: the domains share no user (after filtering), {hint}; choose domains or filters that do"
        )
    shuffled = np.random.default_rng(spec.data_seed).permutation(len(overlapping))
    tests = round(len(overlapping) * spec.cold_ratio)
    validations = round((len(overlapping) - tests) * spec.validation_share)
    parts = np.split(shuffled, [tests, tests + validations])
    if min(len(part) for part in parts) == 0:
        raise InputError(
            f"{place}: {len(overlapping)} overlapping users at cold ratio {spec.cold_ratio:g} leave "
            f"{len(parts[2])} for training, {len(parts[1])} for validation, {len(parts[0])} for test; "
            "each needs one, take more users or another cold ratio"
        )
    test, validation, train = (sorted(overlapping[part]) for part in parts)
    return _Split(train, validation, test)


def build_task(
    spec: SplitSpec,
    source: Domain,
    target: Domain,
    vectors: TextVectors | FactorSpec,
    store: Path,
    words: WordTable | None = None,
) -> TaskFolders:
    """Build the task, or find it built; the folder appears whole or not at all."""
    document = {
        "version": VERSION, "split": asdict(spec), "source": source.key, "target": target.key,
        "shrinkage": SHRINKAGE, "vectors": _vectors_key(vectors),
    }  # fmt: skip
    if words is not None:
        document["words"] = [words.key, _WORDS_VERSION]
    key = digest(document)
    folder = store / f"{source.name}-{target.name}-{key[:12]}"
    if not (folder / "manifest.json").is_file():
        with store_errors(folder.parent), whole_folder(folder) as work:
            counts = _Builder(spec, source, target, vectors, words, work).build()
            write_json(work / "manifest.json", {"key": key, "counts": counts, **document})
    manifest = read_json(folder / "manifest.json")
    folder = folder.resolve()
    return TaskFolders(key=key, task_dir=folder / "search", test_dir=folder / "test", counts=manifest["counts"])


# --- building --------------------------------------------------------------------------------------------------------


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
    time: Ints  # as the source counts it, -1 where it has none


def _coded(domain: Domain) -> _Coded:
    frame = domain.interactions(["user_id", "item_id", "rating", "timestamp"])
    user, users = pd.factorize(frame["user_id"].to_numpy(dtype=object), sort=True)
    item, items = pd.factorize(frame["item_id"].to_numpy(dtype=object), sort=True)
    rating = frame["rating"].to_numpy(np.float32)
    if np.isnan(rating).any():
        raise InputError(
            f"{domain.path}: domain {domain.name} is implicit feedback, without the ratings a task needs; take a model "
            "of sequences, or feedback: explicit"
        )
    time = frame["timestamp"].fillna(-1).to_numpy(np.int64)
    return _Coded(users, items, user.astype(np.int64), item.astype(np.int64), rating, time)


@dataclass(frozen=True)
class _Offsets:
    """Levels of the training ratings; P users of the source domain, I items of the target domain."""

    mean: float
    source: NDArray[np.float64]  # [P] shrunken mean of what item offsets leave of a user's source ratings
    item: NDArray[np.float64]  # [I] shrunken mean of an item's ratings, less `mean`
    slope: float  # of the overlapping users' target ratings on `source`


class _Builder:
    """Writes one task into a folder."""

    def __init__(
        self,
        spec: SplitSpec,
        source: Domain,
        target: Domain,
        vectors: TextVectors | FactorSpec,
        words: WordTable | None,
        out: Path,
    ) -> None:
        self.spec, self.vectors, self.words, self.out = spec, vectors, words, out
        self.domains = (source, target)
        self.place = f"task {source.name}->{target.name}"
        self.rating_scale, self.source_name, self.tied = target.rating_scale, source.name, 0
        self.source, self.target = _coded(source), _coded(target)
        self.split = split_users(list(self.source.users), list(self.target.users), spec, self.place)

    def build(self) -> dict[str, int]:
        """Write everything; returns the counts."""
        hidden = np.isin(self.target.users, [*self.split.validation, *self.split.test])
        seen = ~hidden[self.target.user]
        known = np.array([*self.split.train, *self._side(hidden)], dtype=object)
        user, item, rating = self._ratings(known, seen)
        offsets = self._offsets(user, item, rating)

        folder = self.out / "search"
        folder.mkdir(parents=True)
        _save_ratings(folder, user, item, rating)
        source_rows = self._save_source_ratings(folder)
        if self.words is not None:
            self._save_texts(folder, source_rows, self._rows(known, seen)[0], self.words)
        self._save_vectors(folder, known, user, item, rating)
        self._save_offsets(folder, offsets.source, self.split.train)
        save_arrays(
            folder, item_offset=offsets.item.astype(np.float32), item_id=self.target.items.astype(np.str_),
            user_id=known.astype(np.str_),
        )  # fmt: skip
        write_json(
            folder / "task.json",
            {
                "mean": offsets.mean, "slope": offsets.slope, "rating_scale": self.rating_scale,
                "source_scale": self.domains[0].rating_scale, "source_items": self._size[1],
                "source_times": bool((self.source.time >= 0).any()), "clip": self.spec.clip,
            },
        )  # fmt: skip
        in_training = np.bincount(item, minlength=len(self.target.items)) > 0
        counts = {"overlapping": sum(map(len, (self.split.train, self.split.validation, self.split.test)))}
        for name, ids, place in (
            ("validation", self.split.validation, folder / "validation"),
            ("test", self.split.test, self.out / "test"),
        ):
            self._save_offsets(place, offsets.source, ids)
            ratings = self._save_held_out(place, ids, ~seen, ~in_training)
            counts |= {f"{name}_users": len(ids), f"{name}_ratings": ratings}
        return counts | {
            "train_users": len(self.split.train), "side_users": len(known) - len(self.split.train),
            "train_ratings": len(user), "items": len(self.target.items), "train_items": int(in_training.sum()),
        }  # fmt: skip

    def _offsets(self, user: Ints, item: Ints, rating: Floats) -> _Offsets:
        """Return what training knows of levels: user numbers in `known`, of whom the overlapping ones come first."""
        mean = float(rating.mean(dtype=np.float64))
        _, source_item = biases(SHRINKAGE, self.source.user, self.source.item, self._source_centred, *self._size)
        source = shrunken_means(self.source.user, self._source_centred - source_item[self.source.item], self._size[0])
        of_item = shrunken_means(item, rating.astype(np.float64) - mean, len(self.target.items))
        over = user < len(self.split.train)
        x = self._of_users(source, self.split.train)[user[over]]
        y = rating[over].astype(np.float64) - mean - of_item[item[over]]
        return _Offsets(mean, source, of_item, float((x * y).sum() / max((x * x).sum(), 1e-12)))

    def _save_texts(self, folder: Path, source_rows: Ints, target_rows: Ints, words: WordTable) -> None:
        """Write the words of the reviews and of the target domain's items, and where their vectors are."""
        _save_words(folder, "source_", _texts(self.domains[0], source_rows), words)
        _save_words(folder, "", _texts(self.domains[1], target_rows), words)
        _save_words(folder, "item_", _item_texts(self.domains[1], self.target.items), words)
        # Relative: a home folder may move. The folder that is being built lies beside its final place.
        path = os.path.relpath(words.vectors.resolve(), folder.resolve())
        write_json(folder / "words.json", {"vectors": path})

    def _save_held_out(
        self, place: Path, ids: Sequence[str], hidden: NDArray[np.bool_], cold: NDArray[np.bool_]
    ) -> int:
        """Write the hidden ratings of validation or test users; return how many there are."""
        user, item, rating = self._ratings(np.array(ids, dtype=object), hidden)
        _save_ratings(place, user, item, rating)
        save_arrays(
            place, cold_item=cold[item], source_row=self._of_users(self._source_row, ids),
            user_id=np.array(ids, dtype=np.str_),
        )  # fmt: skip
        return len(user)

    @property
    def _size(self) -> tuple[int, int]:
        return len(self.source.users), len(self.source.items)

    @cached_property
    def _source_centred(self) -> NDArray[np.float64]:
        rating: NDArray[np.float64] = self.source.rating.astype(np.float64)
        rating -= rating.mean()
        return rating

    @cached_property
    def _source_row(self) -> Ints:
        """Each source user's number in the task: training overlapping users first, then all others, each sorted by id."""
        train = np.isin(self.source.users, self.split.train)
        row = np.empty(len(train), np.int64)
        row[np.argsort(~train, kind="stable")] = np.arange(len(train))
        return row

    def _save_source_ratings(self, folder: Path) -> Ints:
        """Write the ratings of all source users by user, then time; at one time by a hash, without any times by item.

        Returns the domain's rows in that order.
        """
        source = self.source
        user = self._source_row[source.user]
        order = np.lexsort((source.item, user))
        if (source.time >= 0).any():
            domain = np.full(len(user), self.source_name, dtype=object)
            names = [source.users[source.user], source.items[source.item], domain]
            order, self.tied = time_order(user, source.time, names, self.spec.data_seed)
        _save_ratings(folder, user[order], source.item[order], source.rating[order], "source_")
        return order

    def _side(self, hidden: NDArray[np.bool_]) -> list[str]:
        return [str(user) for user in self.target.users[~hidden & ~np.isin(self.target.users, self.split.train)]]

    def _ratings(self, ids: NDArray[Any], keep: NDArray[np.bool_]) -> tuple[Ints, Ints, Floats]:
        """The kept ratings of these users, numbered by their place in `ids`, sorted by user then item."""
        rows, user = self._rows(ids, keep)
        return user, self.target.item[rows], self.target.rating[rows]

    def _rows(self, ids: NDArray[Any], keep: NDArray[np.bool_]) -> tuple[Ints, Ints]:
        """The target domain's rows of these ratings, and their users' numbers."""
        number = np.full(len(self.target.users), -1)
        number[np.searchsorted(self.target.users, ids)] = np.arange(len(ids))
        user = number[self.target.user]
        rows = np.flatnonzero(keep & (user >= 0))
        rows = rows[np.lexsort((self.target.item[rows], user[rows]))]
        return rows, user[rows]

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


def _texts(domain: Domain, rows: Ints) -> list[str]:
    """The texts of these rows of a domain's interactions, and of no others."""
    texts: list[str] = domain.interactions(["text"])["text"].iloc[rows].fillna("").tolist()
    return texts


def _item_texts(domain: Domain, ids: NDArray[Any]) -> list[str]:
    """Title, categories and description of these items; empty where an item has none of them."""
    columns = ["title", "categories", "description"]
    items = domain.items().set_index("item_id")[columns].reindex(ids).fillna("")
    prompt = find_prompt("plain-1")
    return [item_text(dict(zip(columns, row, strict=True)), prompt) for row in items.to_numpy().tolist()]


def _save_words(folder: Path, prefix: str, texts: Sequence[str], words: WordTable) -> None:
    """Write the words of these texts, end to end."""
    numbers: list[list[int]] = []
    for start in range(0, len(texts), _COPY_ROWS):
        numbers += words.tokenise(texts[start : start + _COPY_ROWS])
    starts = np.concatenate([[0], np.cumsum([len(row) for row in numbers])]).astype(np.int64)
    flat = np.fromiter(chain.from_iterable(numbers), np.int32, starts[-1])
    arrays: dict[str, NDArray[Any]] = {f"{prefix}word": flat, f"{prefix}word_starts": starts}
    save_arrays(folder, **arrays)


def _save_ratings(folder: Path, user: Ints, item: Ints, rating: Floats, prefix: str = "") -> None:
    arrays: dict[str, NDArray[Any]] = {"user": user, "item": item, "rating": rating}
    save_arrays(folder, **{prefix + name: array for name, array in arrays.items()})
