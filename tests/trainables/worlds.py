"""Two small domains with a taste that transfers, and tasks of both feature_sets built from them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from zlib import crc32

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from features.domains.domain import Domain, DomainSpec, prepare_domain
from features.encoders.batches import Encoded
from features.encoders.inputs import EncoderInput
from features.encoders.spec import EncoderSpec, ResolvedEncoder
from features.extraction.spec import FeatureSpec
from features.factorisation import FactorSpec
from features.reviews import ReviewSpec, WordTable, open_words
from features.store.tables import FeatureTable
from tests.features.one_table import extract
from trainables.tasks.arrays import FeatureRows, TaskFolders
from trainables.tasks.rating import HeldOut, Ratings, Task, Words
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


def build(
    world: World, folder: Path, feature_set: str, split: SplitSpec = SPLIT, *, reviews: bool = False
) -> TaskFolders:
    """The task of a world, with vectors from `ratings` or from `text`, and the words of its reviews where asked for."""
    source, target = domains_of(world, folder)
    vectors = FACTORS if feature_set == "ratings" else text_vectors(source, target, folder)
    words = word_table(world, folder) if reviews else None
    return build_task(split, source, target, vectors, folder / "tasks", words)


def word_table(world: World, folder: Path, width: int = 12) -> WordTable:
    """A vocabulary of all words of a world, from a `.vec` file of random vectors."""
    texts = [*world.source["text"], *world.target["text"], *world.items["title"]]
    words = sorted({word for text in texts for word in re.findall(r"[^\W_]+", text.lower())})
    vectors = np.random.default_rng(0).normal(size=(len(words), width))
    lines = [" ".join([word, *map(repr, map(float, row))]) for word, row in zip(words, vectors, strict=True)]
    (folder / "words.vec").write_text("\n".join(lines))
    return open_words(ReviewSpec(vectors=str(folder / "words.vec")), folder / "words")


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
        source_scale=(1.0, 5.0),
        clip=True,
    )


def spoken(task: Task, seed: int = 0, vocabulary: int = 9) -> Task:
    """The same task with one to four words on each rating and of each item, and random word vectors of width 5."""

    def words(count: int, seed: int) -> Words:
        draw = torch.Generator().manual_seed(seed)
        length = torch.randint(1, 5, (count,), generator=draw)
        number = torch.randint(vocabulary, (int(length.sum()),), generator=draw, dtype=torch.int32)
        return Words(number, torch.cat([torch.zeros(1, dtype=torch.int64), length.cumsum(0)]))

    return replace(
        task,
        source_ratings=replace(task.source_ratings, words=words(len(task.source_ratings), seed)),
        train=replace(task.train, words=words(len(task.train), seed + 1)),
        item_words=words(len(task.items), seed + 2),
        word_vectors=normal(seed, vocabulary, 5).float(),
    )


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted_task(rank: int = 2, users: int = 30, held_out: int = 10, items: int = 25) -> Task:
    """Ratings without noise whose users' target-domain taste is a linear map of their source-domain taste."""
    taste, kind_s, kind_t, planted = (
        normal(0, users + held_out, rank),
        *(normal(n, items, rank) for n in (1, 2)),
        normal(3, rank, rank),
    )

    def ratings(rating_UI: Tensor) -> Ratings:
        user, item = (grid.flatten() for grid in torch.meshgrid(*map(torch.arange, rating_UI.shape), indexing="ij"))
        return Ratings(user, item, rating_UI.flatten().float())

    target = ratings(taste[:users] @ planted @ kind_t.T)
    task = random_task(overlapping=users, side=0, held_out=held_out, items=items)
    return replace(
        task,
        source_ratings=ratings(taste @ kind_s.T),
        source_items=items,
        mean=0.0,
        slope=0.0,
        item_offset=torch.zeros(items),
        train=target,
        overlapping=target,
        validation=replace(task.validation, ratings=ratings(taste[users:] @ planted @ kind_t.T)),
    )


def uneven(task: Task) -> Task:
    """The same task, but overlapping user u has only 2 + u % 4 of five ratings."""

    def kept(ratings: Ratings) -> Ratings:
        place = torch.arange(len(ratings)) - ratings.starts[ratings.user]
        chosen = place < 2 + ratings.user % 4
        return Ratings(ratings.user[chosen], ratings.item[chosen], ratings.rating[chosen])

    return replace(task, train=kept(task.train), overlapping=kept(task.overlapping))


def permuted(task: Task, seed: int) -> tuple[Task, Tensor]:
    """The same task with its users numbered anew, and the new place of each validation rating, [N]."""
    draw = torch.Generator().manual_seed(seed)
    overlapping, side, users = len(task.source), len(task.side_users), len(task.source_ratings.starts) - 1

    def order(*sizes: int) -> Tensor:
        """New number of each user; blocks stay where they are."""
        starts = [sum(sizes[:block]) for block in range(len(sizes))]
        return torch.cat(
            [start + torch.randperm(size, generator=draw) for start, size in zip(starts, sizes, strict=True)]
        )

    def renumbered(ratings: Ratings, number: Tensor) -> tuple[Ratings, Tensor]:
        place = number[ratings.user].argsort(stable=True)
        return Ratings(number[ratings.user][place], ratings.item[place], ratings.rating[place]), place.argsort()

    first = order(overlapping)
    train_number = torch.cat([first, overlapping + order(side)])
    source_number = torch.cat([first, overlapping + order(users - overlapping)])
    held_out = task.validation
    held_number = order(len(held_out.source_row))
    ratings, place = renumbered(held_out.ratings, held_number)
    train_ratings, _ = renumbered(task.train, train_number)
    end = len(task.overlapping)
    return replace(
        task,
        source_offset=torch.empty(overlapping).index_put_((first,), task.source_offset),
        source_ratings=renumbered(task.source_ratings, source_number)[0],
        train=train_ratings,
        overlapping=Ratings(train_ratings.user[:end], train_ratings.item[:end], train_ratings.rating[:end]),
        validation=HeldOut(
            source=rows_of(torch.zeros(len(held_number), 1)),
            source_row=torch.empty_like(held_number).index_put_((held_number,), source_number[held_out.source_row]),
            source_offset=torch.empty(len(held_number)).index_put_((held_number,), held_out.source_offset),
            ratings=ratings,
            cold_item=held_out.cold_item,
        ),
    ), place  # fmt: skip


def rewritten(task: Task, row: int) -> Task:
    """The same task, with other words in a target-domain review."""
    assert task.train.words is not None
    number = task.train.words.number.clone()
    first, last = task.train.words.starts[row : row + 2].tolist()
    number[first:last] = (number[first:last] + 4) % 9
    return replace(task, train=replace(task.train, words=Words(number, task.train.words.starts)))
