"""Two small domains with a taste that transfers, and tasks of both feature_sets built from them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from zlib import crc32

import numpy as np
import pandas as pd
import torch

from features.domains.domain import Domain, DomainSpec, prepare_domain
from features.encoders.batches import Encoded
from features.encoders.inputs import EncoderInput
from features.encoders.spec import EncoderSpec, ResolvedEncoder
from features.extraction.spec import FeatureSpec
from features.factorisation import FactorSpec
from features.store.tables import FeatureTable
from tests.features.one_table import extract
from trainables.tasks.arrays import FeatureRows, TaskFolders
from trainables.tasks.rating import HeldOut, Ratings, Task
from trainables.tasks.rating_build import SplitSpec, TextVectors, build_task

WIDTH = 24  # of the fake encoder's vectors
FACTORS = FactorSpec(factors=3)
SPLIT = SplitSpec(cold_ratio=0.3, validation_share=0.25)
LIKED, DISLIKED = "superb", "dreadful"


@dataclass(frozen=True)
class World:
    """Raw tables of two domains: reviews (user_id, item_id, rating, text) and items (item_id, title)."""

    source: pd.DataFrame
    target: pd.DataFrame
    items: pd.DataFrame

    def with_target(self, users: Collection[str], change: Callable[[pd.DataFrame], pd.DataFrame]) -> World:
        """The same world, but `change` was applied to the target reviews of these users."""
        target = self.target.copy()
        chosen = target["user_id"].isin(list(users))
        target.loc[chosen] = change(target[chosen])
        return replace(self, target=target)


def make_world(seed: int = 0, users: int = 170, overlap: int = 120, items: int = 70, each: int = 14) -> World:
    """Ratings from user leniency, item quality and taste, all shared by the domains; texts that speak of all three."""
    draw = np.random.default_rng(seed)
    taste, leniency = draw.normal(size=(2 * users - overlap, 2)), draw.normal(0, 0.6, 2 * users - overlap)
    names = [f"u{number:04d}" for number in draw.permutation(len(taste))]  # not in the order of the latent numbers
    source, _ = _reviews(draw, "s", range(users), names, taste, leniency, items, each)
    target, titles = _reviews(draw, "t", range(users - overlap, len(taste)), names, taste, leniency, items, each)
    return World(source, target, titles)


def _reviews(
    draw: np.random.Generator,
    prefix: str,
    users: Sequence[int],
    names: Sequence[str],
    taste: np.ndarray,
    leniency: np.ndarray,
    items: int,
    each: int,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    quality, kind = draw.normal(0, 0.4, items), draw.normal(size=(items, 2))
    rows = []
    for user in users:
        for item in draw.choice(items, each, replace=False):
            score = 3.4 + leniency[user] + quality[item] + 0.5 * taste[user] @ kind[item] + draw.normal(0, 0.4)
            rating = float(np.clip(np.round(score), 1, 5))
            genre, verdict = _genre(kind[item]), LIKED if rating > 3 else DISLIKED
            words = [verdict, f"{verdict}-{genre}", f"word{draw.integers(9)}"]
            rows.append((names[user], f"{prefix}{item:03d}", rating, " ".join(words)))
    reviews = pd.DataFrame(rows, columns=["user_id", "item_id", "rating", "text"])
    titles = [f"{_genre(kind[i])} grade{quality[i] > 0} word{i % 9}" for i in range(items)]
    return reviews, pd.DataFrame({"item_id": [f"{prefix}{i:03d}" for i in range(items)], "title": titles})


def _genre(kind: np.ndarray) -> str:
    """The corner of the taste plane that an item lies in."""
    return f"genre{int(kind[0] > 0)}{int(kind[1] > 0)}"


def domains_of(world: World, folder: Path) -> tuple[Domain, Domain]:
    """Source and target domain, prepared."""
    data = folder / "raw"
    data.mkdir(parents=True)
    world.source.to_parquet(data / "source.parquet")
    world.target.to_parquet(data / "target.parquet")
    world.items.to_parquet(data / "items.parquet")
    source = DomainSpec(name="source", reader="table", interactions="source.parquet")
    target = DomainSpec(name="target", reader="table", interactions="target.parquet", items="items.parquet")
    return prepare_domain(source, data, folder / "domains"), prepare_domain(target, data, folder / "domains")


class BagOfWords:
    """An encoder of words whose vector is a seeded draw; as quick as a test needs it."""

    def encode(self, rows: Sequence[EncoderInput]) -> Encoded:
        """Mean vector of each row's words."""
        words = [" ".join(row.texts).split() for row in rows]
        vectors = [np.mean([_word_vector(word) for word in row], axis=0) for row in words]
        tokens = np.array([len(row) for row in words], np.int32)
        return Encoded(vectors=np.array(vectors, np.float32), tokens=tokens, padded=0, failed={})


def _word_vector(word: str) -> np.ndarray:
    return np.random.default_rng(crc32(word.encode())).normal(size=WIDTH)


def _bag_of_words(resolved: ResolvedEncoder) -> BagOfWords:
    return BagOfWords()


def text_vectors(source: Domain, target: Domain, folder: Path) -> TextVectors:
    """Feature tables of both domains, through the real extraction."""
    model = folder / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"bag of words")
    encoder = EncoderSpec(model=str(model), dtype="float32", store_dtype="float16")

    def table(kind: str, domain: Domain) -> FeatureTable:
        return extract(
            FeatureSpec(kind=kind, encoder=encoder), domain, folder / "store", use_ray=False, loader=_bag_of_words
        )

    return TextVectors(
        source_users=table("users", source), target_users=table("users", target), items=table("items", target)
    )


def build(world: World, folder: Path, feature_set: str, split: SplitSpec = SPLIT) -> TaskFolders:
    """The task of a world, with vectors from `ratings` or from `text`."""
    source, target = domains_of(world, folder)
    vectors = FACTORS if feature_set == "ratings" else text_vectors(source, target, folder)
    return build_task(split, source, target, vectors, folder / "tasks")


def rows_of(vectors: torch.Tensor) -> FeatureRows:
    """Feature rows that read exactly as `vectors` [N, F]."""
    width = vectors.shape[1]
    return FeatureRows(vectors.numpy(), np.arange(len(vectors)), np.zeros(width, np.float32), 1.0)


def random_task(
    seed: int = 0,
    overlapping: int = 12,
    side: int = 8,
    held_out: int = 6,
    items: int = 20,
    width: int = 7,
    each: int = 5,
) -> Task:
    """A task of random numbers, for formulas that do not ask what can be learned."""
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=draw)  # noqa: E731

    def ratings(users: int, draw: torch.Generator = draw) -> Ratings:
        user = torch.arange(users).repeat_interleave(each)
        item = torch.cat([torch.randperm(items, generator=draw)[:each].sort().values for _ in range(users)])
        return Ratings(user, item, torch.randint(1, 6, (users * each,), generator=draw).float())

    train, validation = ratings(overlapping + side), ratings(held_out)
    end = overlapping * each
    return Task(
        source=rows_of(normal(overlapping, width)),
        source_ratings=ratings(overlapping + held_out + 3, torch.Generator().manual_seed(seed + 1)),
        source_items=items,
        source_offset=normal(overlapping),
        target=rows_of(normal(overlapping + side, width)),
        items=rows_of(normal(items, width)),
        train=train,
        overlapping=Ratings(train.user[:end], train.item[:end], train.rating[:end]),
        validation=HeldOut(
            source=rows_of(normal(held_out, width)),
            source_row=torch.arange(overlapping, overlapping + held_out),
            source_offset=normal(held_out),
            ratings=validation,
            cold_item=torch.zeros(len(validation), dtype=torch.bool),
        ),
        mean=float(train.rating.mean()),
        item_offset=0.2 * normal(items),
        slope=0.5,
        rating_scale=(1.0, 5.0),
    )
