"""Two small domains whose sequences follow a taste that transfers, and sequence tasks built from them on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from features.domains.domain import Domain, DomainSpec, prepare_domain
from features.pseudo.table import SCHEMA, PseudoTable, write_pseudo
from features.store.tables import FeatureTable, digest
from trainables.tasks.arrays import TaskFolders
from trainables.tasks.sequential import OVERLAPPING, SOURCE_ONLY, TARGET_ONLY, Sequences, SequenceSpec
from trainables.tasks.sequential_build import build_sequences, training_users

GENRES = 4  # of items; a user stays with one of them most of the time
WIDTH = 16  # of text vectors
TEXTS = 11  # that are generated
SPEC = SequenceSpec(negatives=19, validation_share=0.2, test_share=0.2)


@dataclass(frozen=True)
class SequenceWorld:
    """What users did in both domains, and the split if the data gives one."""

    interactions: pd.DataFrame  # user_id, domain (film | song), item_id, position
    split: Mapping[str, str] | None = None

    def of(self, user: str) -> list[str]:
        """Item ids of a user, oldest first."""
        rows = self.interactions[self.interactions["user_id"] == user]
        return list(rows.sort_values("position")["item_id"])


def make_sequence_world(seed: int = 0, users: int = 60, overlap: int = 40, items: int = 48) -> SequenceWorld:
    """`users` users, `overlap` of them in both domains, the others by turns in one; 5 to 10 items each.

    A user draws 4 of 5 items from one genre, the same in both domains. Item k is of genre k % GENRES.
    """
    draw = np.random.default_rng(seed)
    rows = []
    for user, genre in enumerate(draw.integers(GENRES, size=users)):
        both = ["film", "song"] if user < overlap else [("film", "song")[user % 2]]
        wanted = max(len(both), int(draw.integers(5, 11)))
        domains = [*both, *draw.choice(both, wanted - len(both))]
        draw.shuffle(domains)
        seen: set[str] = set()
        for position, domain in enumerate(domains):
            item = _draw_item(draw, str(domain), int(genre), items, seen)
            seen.add(item)
            rows.append((f"u{user:03d}", str(domain), item, position))
    return SequenceWorld(pd.DataFrame(rows, columns=["user_id", "domain", "item_id", "position"]))


def _draw_item(draw: np.random.Generator, domain: str, genre: int, items: int, seen: set[str]) -> str:
    while True:
        kind = genre if draw.random() < 0.8 else draw.integers(GENRES)
        item = f"{domain[0]}{GENRES * draw.integers(items // GENRES) + kind:03d}"
        if item not in seen:
            return item


def sequence_domains(
    world: SequenceWorld, folder: Path, listed: Sequence[tuple[str, str]] | None = None
) -> dict[str, Domain]:
    """The domains film and song, prepared from one implicit table; `listed`: domain and id of items of the catalogue."""
    data = folder / "raw"
    data.mkdir(parents=True, exist_ok=True)
    more: dict[str, Any] = {} if listed is None else {"items": "items.parquet", "catalogue": "listed"}
    pd.DataFrame(listed or [], columns=["domain", "item_id"]).to_parquet(data / "items.parquet")
    world.interactions.to_parquet(data / "interactions.parquet")

    def spec(name: str) -> DomainSpec:
        return DomainSpec(
            name=name, reader="table", interactions="interactions.parquet", columns={"timestamp": "position"},
            where={"domain": name}, feedback="implicit", **more,
        )  # fmt: skip

    return {name: prepare_domain(spec(name), data, folder / "domains") for name in ("film", "song")}


def text_of(domain: Domain) -> FeatureTable:
    """Random vectors that lean towards the item's genre."""
    ids = list(domain.items()["item_id"])
    draw = np.random.default_rng(7 + len(domain.name))
    lean = np.random.default_rng(5).normal(size=(GENRES, WIDTH))
    genre = [int(name[1:]) % GENRES for name in ids]
    vectors = (lean[genre] + draw.normal(size=(len(ids), WIDTH))).astype(np.float16)
    key = digest({"test vectors of": ids})  # of what they are made from: the items, not what users did
    return FeatureTable(domain.path, key, ids, vectors, {"rows": {"failed": []}})  # type: ignore[arg-type]


def pseudo_of(
    spec: SequenceSpec, source: Domain, target: Domain, split: Mapping[str, str] | None, count: int, folder: Path
) -> PseudoTable:
    """`count` random pseudo-items for every second single-domain training user, one fewer for every fourth."""
    people = training_users(spec, source, target, split)
    draw = np.random.default_rng(3)
    items = {SOURCE_ONLY: list(target.items()["item_id"]), TARGET_ONLY: list(source.items()["item_id"])}
    rows = []
    for place, user in enumerate(people.user):
        if people.group[place] != OVERLAPPING and place % 2:
            lacking = items[int(people.group[place])]
            chosen = [str(item) for item in draw.choice(lacking, count - (place % 4 == 1), replace=False)]
            cosine = sorted(draw.uniform(0.2, 0.9, len(chosen)), reverse=True)
            texts = [f"text {int(name[1:]) % TEXTS}" for name in chosen]
            numbers = [int(name[1:]) % TEXTS for name in chosen]
            rows.append({"user_id": user, "items": chosen, "similarity": cosine, "texts": texts, "text_rows": numbers})
    key = digest({"users": list(people.user), "count": count})
    vectors = np.random.default_rng(4).normal(size=(TEXTS, WIDTH)).astype(np.float16)
    return write_pseudo(folder / f"pseudo-{key[:12]}", pa.Table.from_pylist(rows, SCHEMA), vectors, {"key": key})


def build_world(
    world: SequenceWorld, folder: Path, spec: SequenceSpec = SPEC, pseudo: int = 3, direction: str = "film-song"
) -> TaskFolders:
    """The task of a world in one direction; `pseudo`: most pseudo-items of a user, 0: none."""
    domains = sequence_domains(world, folder)
    source, target = (domains[name] for name in direction.split("-"))
    text = {name: text_of(domain) for name, domain in domains.items()}
    table = pseudo_of(spec, source, target, world.split, pseudo, folder) if pseudo else None
    return build_sequences(spec, source, target, world.split, text, table, folder / "tasks")


def make_sequence_task(
    folder: Path, pseudo: int = 3, spec: SequenceSpec = SPEC, direction: str = "film-song", seed: int = 0
) -> tuple[Path, Path]:
    """Folders of a small task: what a search may see, and its test rows."""
    folders = build_world(make_sequence_world(seed), folder, spec, pseudo, direction)
    return folders.task_dir, folders.test_dir


def histories(*rows: list[int]) -> Sequences:
    """Sequences of these items."""
    starts = torch.tensor([0, *np.cumsum([len(row) for row in rows])])
    return Sequences(torch.tensor([item for row in rows for item in row], dtype=torch.int64), starts)


def lists(sequences: Sequences) -> list[list[int]]:
    """The items of each sequence."""
    return [sequences.item[a:b].tolist() for a, b in zip(sequences.starts[:-1], sequences.starts[1:], strict=True)]


def check_users_of_one_target_item(model: Any, loss: Any) -> None:
    """A batch of them alone, of which nothing is shown but source items, has the vectors that it has beside others."""
    captured: list[Any] = []
    loss.rated = lambda user, row, label, vectors: captured.append((user, row)) or user.sum()
    rows = loss.labels.rows
    alone = rows[loss.labels.halves.target.lengths[rows] == 1]
    assert len(alone)
    for chosen in (alone, rows):
        assert loss(model, chosen).isfinite()
    (few, which), (all_of, row) = captured
    assert which.equal(alone)
    found = torch.stack([all_of[row == user][0] for user in alone])
    torch.testing.assert_close(few, found, atol=1e-5, rtol=1e-5)
