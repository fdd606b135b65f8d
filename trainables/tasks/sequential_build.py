"""Building sequence tasks: two domains -> merged sequences -> who is held out -> arrays on disk.

Users of both domains are split as the data says, or by the rule of C2DSR: they are shuffled by the data seed, a share
each is held out for validation and test, and the last item of such a user's merged sequence is what is predicted. It
is a row of the direction whose target domain it belongs to; the other direction reads nothing of that user, nor does
training in either. Shapes: U users, N interactions, I items of both domains, S training sequences.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from features.domains.domain import Domain
from features.domains.ties import time_order
from features.errors import InputError
from features.pseudo.table import PseudoTable
from features.store.folders import read_json, store_errors, whole_folder, write_json
from features.store.tables import FeatureTable, digest
from trainables.tasks.arrays import Ints, TaskFolders, centre_of, save_arrays, save_places, table_rows
from trainables.tasks.sequential import OVERLAPPING, SOURCE_ONLY, TARGET_ONLY, TASK_TYPE, SequenceSpec

VERSION = 2  # of what is written; part of the key

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class TrainingUsers:
    """Who trains, after the overlap ratio's cut: what pseudo-items are made for and from."""

    user: NDArray[Any]  # [S] ids, sorted; of a cut user: `<id>@<domain>`
    group: NDArray[np.int8]  # [S] OVERLAPPING | SOURCE_ONLY | TARGET_ONLY
    item: NDArray[Any]  # [N] item ids, oldest first
    in_target: Bools  # [N] the item is of the target domain
    starts: Ints  # [S + 1] where each user's items start, and N


def training_users(
    spec: SequenceSpec, source: Domain, target: Domain, split: Mapping[str, str] | None
) -> TrainingUsers:
    """The training users and their items. They read nothing of validation or test users."""
    merged = _merge(spec, source, target)
    train = _cut(spec, merged.of(_parts(spec, merged, split) == "train"))
    return TrainingUsers(train.users, train.group, train.items[train.item], train.in_target, train.starts)


def sequence_sizes(
    spec: SequenceSpec, source: Domain, target: Domain, split: Mapping[str, str] | None
) -> dict[str, int]:
    """Return the training users of each group, and the held-out users whose last item is of the target domain."""
    merged = _merge(spec, source, target)
    parts = _parts(spec, merged, split)
    group = _cut(spec, merged.of(parts == "train")).group
    last = merged.in_target[merged.starts[1:] - 1]
    return {
        "train": int((group == OVERLAPPING).sum()), "train, source alone": int((group == SOURCE_ONLY).sum()),
        "train, target alone": int((group == TARGET_ONLY).sum()), "validation": int((last & (parts == "valid")).sum()),
        "test": int((last & (parts == "test")).sum()),
    }  # fmt: skip


def sequence_document(spec: Any) -> dict[str, Any]:
    """Return what tasks are keyed by.

    How seen items rank is in it only where it is not the default: tasks from before there was a choice keep their key.
    """
    return {name: value for name, value in asdict(spec).items() if (name, value) != ("rank_seen", "last")}


def build_sequences(
    spec: SequenceSpec,
    source: Domain,
    target: Domain,
    split: Mapping[str, str] | None,
    text: Mapping[str, FeatureTable] | None,
    pseudo: PseudoTable | None,
    store: Path,
) -> TaskFolders:
    """Build the task, or find it built; the folder appears whole or not at all.

    `split`: user id -> train | valid | test, None for C2DSR's rule. `text`: domain name -> vectors of its items,
    None where no model of the plan reads titles.
    """
    document = {
        "version": VERSION, "kind": TASK_TYPE, "sequences": sequence_document(spec),
        "source": source.key, "target": target.key,
        "split": digest(split) if split is not None else None,
        "text": [text[source.name].key, text[target.name].key] if text else None, "pseudo": pseudo.key if pseudo else None,
    }  # fmt: skip
    key = digest(document)
    folder = store / f"{source.name}-{target.name}-{key[:12]}"
    if not (folder / "manifest.json").is_file():
        merged = _merge(spec, source, target)
        vectors = _text_folder(merged, text, store) if text else None
        with store_errors(folder.parent), whole_folder(folder) as work:
            counts = _build(spec, merged, split, vectors, pseudo, work)
            write_json(work / "manifest.json", {"key": key, "counts": counts, **document})
    manifest = read_json(folder / "manifest.json")
    folder = folder.resolve()
    return TaskFolders(key=key, task_dir=folder / "search", test_dir=folder / "test", counts=manifest["counts"])


# --- sequences ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Merged:
    """Sequences of users over both domains. Items: those of the domain whose name sorts first, then the other's."""

    names: tuple[str, str]  # source and target domain
    source: tuple[int, int]  # item numbers of the source domain: first, and after the last
    target: tuple[int, int]
    items: NDArray[Any]  # [I] ids
    users: NDArray[Any]  # [U] ids, sorted
    item: Ints  # [N] each user's items, oldest first
    starts: Ints  # [U + 1]
    tied: int  # interactions that share user and time with another: a hash has put them in order

    @property
    def place(self) -> str:
        return f"task {'->'.join(self.names)}"

    @property
    def user(self) -> Ints:
        """User of each interaction, [N]."""
        return np.repeat(np.arange(len(self.users)), np.diff(self.starts))

    @property
    def in_target(self) -> Bools:
        inside: Bools = (self.item >= self.target[0]) & (self.item < self.target[1])
        return inside

    @property
    def group(self) -> NDArray[np.int8]:
        """In which domains each user has items, [U]."""
        in_target = np.bincount(self.user, self.in_target, minlength=len(self.users))
        alone = np.where(in_target > 0, TARGET_ONLY, SOURCE_ONLY)
        both = (in_target > 0) & (in_target < np.diff(self.starts))
        return np.where(both, OVERLAPPING, alone).astype(np.int8)

    def of(self, chosen_U: Bools) -> _Merged:
        """Some of the users."""
        lengths = np.diff(self.starts)[chosen_U]
        return self._with(self.users[chosen_U], self.item[chosen_U[self.user]], lengths)

    def renamed(self, user_N: NDArray[Any]) -> _Merged:
        """The same interactions, of users by these ids; each user's items stay in their order."""
        code, users = pd.factorize(user_N, sort=True)
        order = np.argsort(code, kind="stable")
        return self._with(np.asarray(users), self.item[order], np.bincount(code, minlength=len(users)))

    def _with(self, users: NDArray[Any], item: Ints, lengths: Ints) -> _Merged:
        starts = np.concatenate([[0], np.cumsum(lengths)])
        return _Merged(self.names, self.source, self.target, self.items, users, item, starts, self.tied)


def _merge(spec: SequenceSpec, source: Domain, target: Domain) -> _Merged:
    """All users' sequences in order of time; at the same time by a hash that the data seed draws."""
    if source.name == target.name:
        raise InputError(f"task {source.name}->{target.name}: source and target are one domain; name two")
    ranges, items, frames, start = {}, [], [], 0
    for domain in sorted((source, target), key=lambda domain: domain.name):
        frame = domain.interactions(["user_id", "item_id", "timestamp"])
        if frame["timestamp"].isna().any():
            raise InputError(
                f"{domain.path}: {int(frame['timestamp'].isna().sum())} interactions of domain {domain.name} have no "
                "timestamp, and sequences need an order; map domains columns.timestamp to a column that gives it"
            )
        ids = np.sort(domain.items()["item_id"].to_numpy(dtype=object))
        code = np.searchsorted(ids, frame["item_id"].to_numpy(dtype=object))
        frames.append(frame.assign(item=code + start, domain=domain.name))
        items.append(ids)
        ranges[domain.name] = (start, start := start + len(ids))
    check_order(source, target)
    frame = pd.concat(frames)
    code, users = pd.factorize(frame["user_id"].to_numpy(dtype=object), sort=True)
    names = [frame[column].to_numpy(dtype=object) for column in ("user_id", "item_id", "domain")]
    order, tied = time_order(code, frame["timestamp"].to_numpy(np.int64), names, spec.data_seed)
    starts = np.concatenate([[0], np.cumsum(np.bincount(code, minlength=len(users)))])
    return _Merged(
        names=(source.name, target.name), source=ranges[source.name], target=ranges[target.name],
        items=np.concatenate(items), users=np.asarray(users), item=frame["item"].to_numpy(np.int64)[order],
        starts=starts, tied=tied,
    )  # fmt: skip


def check_order(source: Domain, target: Domain) -> None:
    """Raise InputError where the times of two domains cannot be merged into one order."""
    place = f"task {source.name}->{target.name}"
    kinds = {domain.name: domain.manifest["profile"]["times"]["kind"] for domain in (source, target)}
    if set(kinds.values()) == {"clock", "order"}:
        clock, order = sorted(kinds, key=lambda name: kinds[name])
        raise InputError(
            f"{place}: timestamps of {clock} are times and those of {order} are small numbers such as positions, so one "
            f"domain would come before the other in every sequence; map domains.{order}.columns.timestamp to a time"
        )
    without = {domain.name: order_share(domain) == 0.0 for domain in (source, target)}
    if len(set(without.values())) == 2:
        (name,) = [name for name, lacks in without.items() if lacks]
        raise InputError(
            f"{place}: domain {name} has no order to speak of, no user there has two interactions at two times, while the "
            f"other domain has one; map domains.{name}.columns.timestamp to a column that orders them"
        )


def order_share(domain: Domain) -> float | None:
    """Return which share of the users with several interactions have them at several times; None: no such user."""
    profile = domain.manifest["profile"]
    several = profile["users_of_several"]
    return 1 - profile["users_unordered"] / several if several else None


def _parts(spec: SequenceSpec, merged: _Merged, split: Mapping[str, str] | None) -> NDArray[Any]:
    """Part of each user: train | valid | test, [U]."""
    if split is not None:
        missing = [user for user in merged.users if user not in split]
        if missing and spec.unlisted != "train":
            raise InputError(
                f"{merged.place}: {len(missing):,} of {len(merged.users):,} users are not in the split, the first is "
                f"{missing[0]!r}; add them, or set sequences.unlisted: train"
            )
        return np.array([split.get(user, "train") for user in merged.users], dtype=object)
    part = np.full(len(merged.users), "train", dtype=object)
    overlapping = np.random.default_rng(spec.data_seed).permutation(np.flatnonzero(merged.group == OVERLAPPING))
    tests, validations = (round(len(overlapping) * share) for share in (spec.test_share, spec.validation_share))
    part[overlapping[:tests]] = "test"
    part[overlapping[tests : tests + validations]] = "valid"
    return part


def _cut(spec: SequenceSpec, train: _Merged) -> _Merged:
    """Cut the link of all but `overlap_ratio` of the overlapping users; a smaller ratio's users are among a larger's."""
    overlapping = np.random.default_rng([spec.data_seed, 1]).permutation(np.flatnonzero(train.group == OVERLAPPING))
    kept = round(len(overlapping) * spec.overlap_ratio)
    if not kept:
        raise InputError(
            f"{train.place}: overlap ratio {spec.overlap_ratio:g} leaves none of {len(overlapping)} overlapping users to "
            "train on; take a higher ratio, or domains and filters that share more users"
        )
    cut = np.isin(train.user, overlapping[kept:])
    user = train.users[train.user].astype(object)
    user[cut] += np.where(train.in_target[cut], f"@{train.names[1]}", f"@{train.names[0]}").astype(object)
    if clash := set(user[cut]) & set(train.users):
        raise InputError(f"{train.place}: the user id {min(clash)!r} is needed for half of a user; rename that user")
    return train.renamed(user)


# --- what is written ----------------------------------------------------------------------------------------------


def _build(
    spec: SequenceSpec, merged: _Merged, split: Mapping[str, str] | None, vectors: Path | None, pseudo: PseudoTable | None,
    out: Path,
) -> dict[str, int]:  # fmt: skip
    """Write everything; returns the counts."""
    parts = _parts(spec, merged, split)
    train = _cut(spec, merged.of(parts == "train"))
    folder = out / "search"
    folder.mkdir(parents=True)
    group = train.group
    number, similarity = _pseudo_items(train, group, pseudo)
    generated = _generated_texts(train, group, pseudo)
    save_arrays(
        folder, item=train.item, starts=train.starts, group=group, pseudo=number, similarity=similarity,
        generated=generated, user_id=train.users.astype(np.str_), item_id=merged.items.astype(np.str_),
    )  # fmt: skip
    text = []  # arrays that pretraining reads beside the sequences
    if vectors is not None:
        rows = np.load(vectors / "rows.npy")
        table = np.load(vectors / "vectors.npy", mmap_mode="r")
        centre = centre_of(table, rows)
        save_places(folder, "text", rows, centre, os.path.relpath(vectors / "vectors.npy", folder.resolve()))
        text = [rows, table]
        if pseudo is not None:
            texts = np.arange(len(np.load(pseudo.vectors, mmap_mode="r")))
            place = os.path.relpath(pseudo.vectors.resolve(), folder.resolve())
            save_places(folder, "generated_texts", texts, centre, place)
    held_out = {
        name: _save_held_out(spec, merged.of(parts == part), place, f"{name} ({part})")
        for name, part, place in (
            ("validation", "valid", folder / "validation"), ("test", "test", out / "test"),
        )
    }  # fmt: skip
    sha = hashlib.sha256(repr((len(merged.items), min(merged.source, merged.target))).encode())
    for array in (train.item, train.starts, *text):
        sha.update(f"{array.dtype} {array.shape}".encode())
        sha.update(np.ascontiguousarray(array).data)
    meta = {
        "kind": TASK_TYPE, "items": len(merged.items), "source": merged.source, "target": merged.target,
        "protocols": spec.protocols, "rank_seen": spec.rank_seen, "train_key": sha.hexdigest(),
    }  # fmt: skip
    write_json(folder / "task.json", meta)
    return {
        "train_overlapping": int((group == OVERLAPPING).sum()), "train_source_only": int((group == SOURCE_ONLY).sum()),
        "train_target_only": int((group == TARGET_ONLY).sum()), "train_interactions": len(train.item),
        "validation_users": held_out["validation"], "test_users": held_out["test"],
        "source_items": merged.source[1] - merged.source[0], "target_items": merged.target[1] - merged.target[0],
        "pseudo_items": int((number >= 0).sum()), "tied_interactions": merged.tied,
        "target_items_without_interactions": int(
            (np.bincount(merged.item, minlength=len(merged.items))[slice(*merged.target)] == 0).sum()
        ),
    }  # fmt: skip


def _save_held_out(spec: SequenceSpec, users: _Merged, folder: Path, name: str) -> int:
    """Write the rows of those of these users whose last item is of the target domain; returns their number."""
    users = users.of(users.in_target[users.starts[1:] - 1])
    count = len(users.users)
    if not count:
        raise InputError(
            f"{users.place}: no {name} user's last item is of the target domain {users.names[1]}; "
            "take more users, larger shares or another split"
        )
    target = users.item[users.starts[1:] - 1]
    before = np.ones(len(users.item), dtype=bool)
    before[users.starts[1:] - 1] = False
    shown = [before & ~users.in_target if protocol == "inter" else before for protocol in spec.protocols]
    lengths = np.concatenate([np.bincount(users.user[kept], minlength=count) for kept in shown])
    folder.mkdir(parents=True)
    save_arrays(
        folder,
        item=np.concatenate([users.item[kept] for kept in shown]),
        starts=np.concatenate([[0], np.cumsum(lengths)]),
        protocol=np.repeat(np.arange(len(shown)), count),
        user=np.tile(np.arange(count), len(shown)),
        target=np.tile(target, len(shown)),
        candidates=_candidates(spec, users, target),
        user_id=users.users.astype(np.str_),
    )
    return count


def _candidates(spec: SequenceSpec, users: _Merged, target: Ints) -> NDArray[np.int32]:
    """Each user's target, then `negatives` other target-domain items, each once: [U, 1 + negatives].

    A user's draw depends on the data seed and the user's id alone, so no other user changes it.
    """
    low, high = users.target
    others = high - low - 1
    if others < spec.negatives:
        raise InputError(
            f"{users.place}: sequences.negatives is {spec.negatives}, but the target domain has {others} other items; "
            f"give at most {others}"
        )
    candidates = np.empty((len(target), 1 + spec.negatives), np.int32)
    candidates[:, 0] = target
    for row, (user, positive) in enumerate(zip(users.users, target, strict=True)):
        sha = hashlib.sha256(user.encode()).digest()
        draw = np.random.default_rng([spec.data_seed, int.from_bytes(sha[:8], "big")])
        drawn = low + draw.choice(others, spec.negatives, replace=False)
        candidates[row, 1:] = drawn + (drawn >= positive)
    return candidates


def _pseudo_items(
    train: _Merged, group: NDArray[np.int8], pseudo: PseudoTable | None
) -> tuple[Ints, NDArray[np.float32]]:
    """Numbers and similarities of each training user's pseudo-items, [S, n_max]; -1 and 0 where there is none."""
    single = np.flatnonzero(group != OVERLAPPING)
    items, similarity = pseudo.rows(list(train.users[single])) if pseudo else ([], [])
    width = max(map(len, items), default=0)
    number, cosine = np.full((len(group), width), -1), np.zeros((len(group), width), np.float32)
    if not width:
        return number, cosine
    lengths = np.array([len(row) for row in items])
    row = np.repeat(single, lengths)
    column = np.concatenate([np.arange(length) for length in lengths])
    ids = np.concatenate([np.array(row, dtype=object) for row in items])
    cosine[row, column] = np.concatenate([np.array(row, np.float32) for row in similarity])
    for lacking, (low, high) in ((SOURCE_ONLY, train.target), (TARGET_ONLY, train.source)):
        chosen = group[row] == lacking
        found = pd.Index(train.items[low:high]).get_indexer(pd.Index(ids[chosen]))
        if (found < 0).any():
            unknown = ids[chosen][found < 0][0]
            raise InputError(
                f"{train.place}: the pseudo-item {unknown!r} is no item of the domain that its user lacks; make the "
                "pseudo-items of these domains anew"
            )
        number[row[chosen], column[chosen]] = found + low
    return number, cosine


def _generated_texts(train: _Merged, group: NDArray[np.int8], pseudo: PseudoTable | None) -> Ints:
    """Rows of each single-domain user's texts among the vectors of all texts, [S, n_texts]; -1 where there is none."""
    single = np.flatnonzero(group != OVERLAPPING)
    rows = pseudo.text_rows(list(train.users[single])) if pseudo else []
    number = np.full((len(group), max(map(len, rows), default=0)), -1)
    for user, texts in zip(single, rows, strict=False):
        number[user, : len(texts)] = texts
    return number


def _text_folder(merged: _Merged, text: Mapping[str, FeatureTable], store: Path) -> Path:
    """Folder with vectors.npy [I, F] and rows.npy [I] (-1: no vector), one for all tasks of the pair."""
    tables = [text[name] for name in sorted(merged.names)]
    folder = store / f"text-{digest({'tables': [table.key for table in tables]})[:12]}"
    if folder.is_dir():
        return folder.resolve()
    widths = {table.vectors.shape[1] for table in tables}
    if len(widths) != 1:
        raise InputError(
            f"{merged.place}: item vectors of {sorted(merged.names)} have {sorted(widths)} numbers; "
            "take one text encoder for both domains"
        )
    kind = np.result_type(*(table.vectors.dtype for table in tables))
    vectors = np.zeros((len(merged.items), widths.pop()), kind)
    rows = np.arange(len(merged.items))
    for table, (low, high) in zip(tables, sorted((merged.source, merged.target)), strict=True):
        found = table_rows(table, list(merged.items[low:high]))
        vectors[low:high][found >= 0] = table.vectors[found[found >= 0]]
        rows[low:high][found < 0] = -1
    with store_errors(folder.parent), whole_folder(folder) as work:
        save_arrays(work, vectors=vectors, rows=rows)
    return folder.resolve()
