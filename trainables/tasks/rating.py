"""Rating tasks: a directed pair of domains at one cold ratio, split, and written as arrays that trials open uncopied.

    <store>/<source>-<target>-<key[:12]>/search/    what training and selection may see: no test user is in it
                                          search/validation/    held-out users of the training side
                                          test/      the cold-start test users, opened by scoring alone

Overlapping users are shuffled by the data seed; `cold_ratio` of them are test users, `validation_share` of the rest
validation users. The target-domain ratings of both are hidden from training and from rating-based vectors, and their
target-domain vectors are in no file of a task. The source-domain ratings of all users are open to training, and nothing
on the search side says which of those users are test users. Built by `trainables.tasks.rating_build`.

Shapes: N ratings, U users, I target-domain items, F feature width; O training overlapping users, S side users (of the
target domain alone), P source users, J source-domain items.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainables.devices import OnDevice
from trainables.tasks.arrays import FeatureRows, Ints, load_array, load_linked, load_rows, not_built, read_meta

SHRINKAGE = 5.0  # ratings of the mean that each item mean and each user offset is taken to have (ours)


@dataclass(frozen=True)
class Words(OnDevice):
    """Words of reviews, end to end: numbers of a fixed vocabulary."""

    number: Tensor  # int32 [total]
    starts: Tensor  # int64 [N + 1] first word of each review, and the total


@dataclass(frozen=True)
class Ratings(OnDevice):
    """Ratings sorted by user."""

    user: Tensor  # int64 [N]
    item: Tensor  # int64 [N]
    rating: Tensor  # float32 [N], rating points
    words: Words | None = (
        None  # of the reviews, where the plan has `features.reviews`; never of held-out target reviews
    )

    def __len__(self) -> int:
        return len(self.user)

    @cached_property
    def starts(self) -> Tensor:
        """First rating of each of the users 0..U-1, and N at the end: int64 [U + 1]."""
        users = int(self.user[-1]) + 1
        counts = torch.bincount(self.user, minlength=users)
        return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


@dataclass(frozen=True, kw_only=True)
class HeldOut(OnDevice):
    """Cold-start users: what is known of them is their source domain; their target ratings are to be predicted."""

    source: FeatureRows  # [U, F] source-domain vectors
    source_row: Tensor  # int64 [U] the user's number in the task's `source_ratings`
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
    source_ratings: Ratings  # of all P source users, oldest first where there are times; user < O: that of `source`
    source_items: int  # J
    source_times: bool = False  # whether the source domain has times; without them its ratings are sorted by item
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
    source_scale: tuple[float, float]
    word_vectors: Tensor | None = None  # float32 [W, E] of the vocabulary, where the ratings have words
    item_words: Words | None = None  # of each target-domain item's title, categories and description, beside these
    clip: bool  # whether predictions are cut to the rating scale before their errors are taken

    @property
    def side_users(self) -> Tensor:
        """Numbers of the side users in `target`, int64 [S]."""
        return torch.arange(len(self.source), len(self.target), device=self.device)


def load_task(task_dir: Path) -> Task:
    """Open the search side of a task; large vectors stay memory-mapped."""
    meta = read_meta(task_dir)
    worded = (task_dir / "words.json").is_file()
    train = _load_ratings(task_dir, worded=worded)
    source = load_rows(task_dir, "source")
    first_side = int(np.searchsorted(train.user.numpy(), len(source)))
    return Task(
        source=source,
        source_ratings=_load_ratings(task_dir, "source_", worded=worded),
        source_items=meta["source_items"],
        source_times=meta["source_times"],
        source_offset=load_array(task_dir, "source_offset"),
        target=load_rows(task_dir, "target"),
        items=load_rows(task_dir, "items"),
        train=train,
        overlapping=Ratings(train.user[:first_side], train.item[:first_side], train.rating[:first_side]),
        validation=load_held_out(task_dir / "validation"),
        mean=meta["mean"],
        item_offset=load_array(task_dir, "item_offset"),
        slope=meta["slope"],
        rating_scale=tuple(meta["rating_scale"]),
        source_scale=tuple(meta["source_scale"]),
        clip=meta["clip"],
        word_vectors=load_linked(task_dir, "words") if worded else None,
        item_words=_load_words(task_dir, "item_") if worded else None,
    )


def load_held_out(folder: Path) -> HeldOut:
    """Open validation or test users."""
    if not (folder / "cold_item.npy").is_file():
        raise not_built(folder)
    return HeldOut(
        source=load_rows(folder, "source"),
        source_row=load_array(folder, "source_row"),
        source_offset=load_array(folder, "source_offset"),
        ratings=_load_ratings(folder),
        cold_item=load_array(folder, "cold_item"),
    )


def _load_ratings(folder: Path, prefix: str = "", *, worded: bool = False) -> Ratings:
    user, item, rating = (load_array(folder, prefix + name) for name in ("user", "item", "rating"))
    return Ratings(user, item, rating, _load_words(folder, prefix) if worded else None)


def _load_words(folder: Path, prefix: str) -> Words:
    return Words(load_array(folder, f"{prefix}word"), load_array(folder, f"{prefix}word_starts"))


def overlapping_offsets(task: Task) -> tuple[float, Tensor]:
    """Return the mean, and the items' offsets float32 [I], that the overlapping users' ratings alone give."""
    known, mean = task.overlapping, float(task.overlapping.rating.double().mean())
    left_N = (known.rating - mean).double().cpu().numpy()
    means = shrunken_means(known.item.cpu().numpy(), left_N, len(task.items))
    return mean, torch.from_numpy(means).float().to(task.device)


def shrunken_means(code_N: Ints, value_N: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Mean per code, pulled towards 0 by SHRINKAGE ratings, [size]."""
    total = np.bincount(code_N, value_N, minlength=size)
    shrunken: NDArray[np.float64] = total / (np.bincount(code_N, minlength=size) + SHRINKAGE)
    return shrunken
