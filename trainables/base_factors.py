"""Base vectors of users and items that the id-only baselines share: each domain is factorised by itself.

MuSiC gives its six rating baselines one common encoding (4.1.3). Here it is made from the task's ratings, with three
choices of what a factorisation is fitted to and a prediction is added to, `rating_offset` (ours but for the first):

    none            o = 0, the published form: a rating is z . x
    item_mean       o = mean + item bias; z = [user bias, p], x = [1, q]: the task's own rating-based vectors
    source_offset   o = mean + item offset + slope * source offset of the user, or what side users' own ratings say;
                    z = p, x = q. Without z . x this is the reference baseline of the same name.

A rating is predicted as o + z . x. Shapes: N ratings, U users, I items, P source users, J source-domain items, O training
overlapping users, S side users, D width of the vectors: `dim`, and one more for `item_mean`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from features.factorisation import FactorSpec, Interactions, alternating_ridge, biases
from trainables.tasks.rating import SHRINKAGE, HeldOut, Ratings, Task, shrunken_means

OFFSETS = ("none", "item_mean", "source_offset")
SWEEPS = 15  # of alternating ridge regressions

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Offsets:
    """What the ratings of one domain are fitted after: each rating's is that of its item plus that of its user."""

    item: Floats  # [I] the mean of all ratings included
    user: Floats  # [U]

    def left(self, ratings: Interactions) -> Floats:
        """Return the ratings less their offsets, [N]."""
        residual: Floats = ratings.rating - self.item[ratings.item] - self.user[ratings.user]
        return residual


@dataclass(frozen=True, kw_only=True)
class BaseVectors:
    """Vectors of both domains, float64, and the offsets that they go with. Constants: no model trains them."""

    source_users: Tensor  # [P, D] numbered as in the task's source_ratings
    source_items: Tensor  # [J, D]
    target_users: Tensor  # [O + S, D]
    target_items: Tensor  # [I, D]
    source_bias: Tensor  # [J] item biases of the source domain, the mean left out; zeros without offsets
    residual: Tensor  # [N] of `task.overlapping`: what z . x should be
    item_offset: Tensor  # float32 [I] the part of a prediction's offset that is the item's, mean included
    slope: float  # of the offset on a held-out user's source offset

    def offset(self, held_out: HeldOut) -> Tensor:
        """Return what z . x of each rating of held-out users is added to, float32 [N] rating points."""
        return held_out_offset(self.item_offset, self.slope)(held_out)


def held_out_offset(item_offset: Tensor, slope: float) -> Callable[[HeldOut], Tensor]:
    """Return the function that gives the offset of each rating of held-out users, float32 [N] rating points."""

    def offset(held_out: HeldOut) -> Tensor:
        ratings = held_out.ratings
        return item_offset[ratings.item] + slope * held_out.source_offset[ratings.user]

    return offset


@lru_cache(maxsize=8)  # trials of a worker differ in what comes after; all id-only baselines share these
def base_vectors(task: Task, dim: int, ridge: float, rating_offset: str, seed: int) -> BaseVectors:
    """Factorise both domains of a task from the ratings that training may see.

    Minimises sum (r - o - p . q)^2 + ridge * (sum |p|^2 + sum |q|^2) in each domain (EMCDR eq. 2), in float64, by sweeps
    of ridge regressions of users and items in turn; items start at random, users are solved last.
    """
    spec = FactorSpec(factors=dim, regularisation=ridge, sweeps=SWEEPS, seed=seed)
    source, target = source_interactions(task), target_interactions(task)
    of_source, of_target = fitted_offsets(source, rating_offset), target_offsets(task, rating_offset)
    vectors: list[Tensor] = []
    for ratings, offsets in ((source, of_source), (target, of_target)):
        users, items = alternating_ridge(spec, ratings, offsets.left(ratings))
        if rating_offset == "item_mean":
            users, items = np.column_stack([offsets.user, users]), np.column_stack([np.ones(len(items)), items])
        vectors += [torch.from_numpy(users).to(task.device), torch.from_numpy(items).to(task.device)]
    source_bias = of_source.item - (source.rating.mean(dtype=np.float64) if rating_offset != "none" else 0.0)
    return BaseVectors(
        source_bias=torch.from_numpy(source_bias).to(task.device),
        residual=torch.from_numpy(wanted_products(task, of_target, rating_offset)).to(task.device),
        source_users=vectors[0], source_items=vectors[1], target_users=vectors[2], target_items=vectors[3],
        item_offset=torch.from_numpy(of_target.item).float().to(task.device),
        slope=task.slope if rating_offset == "source_offset" else 0.0,
    )  # fmt: skip


# --- offsets ------------------------------------------------------------------------------------------------------


def source_interactions(task: Task) -> Interactions:
    """Return the ratings of all source users as arrays."""
    return _interactions(task.source_ratings, len(task.source_ratings.starts) - 1, task.source_items)


def target_interactions(task: Task) -> Interactions:
    """Return the training ratings of the target domain as arrays."""
    return _interactions(task.train, len(task.target), len(task.items))


def fitted_offsets(ratings: Interactions, rating_offset: str) -> Offsets:
    """Return the offsets of the source domain: none, or the mean and the biases of items and users, fitted together."""
    if rating_offset == "none":
        return Offsets(item=np.zeros(ratings.items), user=np.zeros(ratings.users))
    mean = ratings.rating.mean(dtype=np.float64)
    user, item = biases(SHRINKAGE, ratings.user, ratings.item, ratings.rating - mean, ratings.users, ratings.items)
    return Offsets(item=mean + item, user=user)


def target_offsets(task: Task, rating_offset: str) -> Offsets:
    """Return the offsets of the target domain's training ratings.

    With `source_offset`, overlapping users have the offset that held-out users get; a side user, who has no source
    domain, has the shrunken mean of what item offsets leave.
    """
    ratings = target_interactions(task)
    if rating_offset != "source_offset":
        return fitted_offsets(ratings, rating_offset)
    item = (task.mean + task.item_offset).double().cpu().numpy()
    user = shrunken_means(ratings.user, ratings.rating - item[ratings.item], ratings.users)
    user[: len(task.source)] = task.slope * task.source_offset.cpu().numpy()
    return Offsets(item=item, user=user)


def wanted_products(task: Task, offsets: Offsets, rating_offset: str) -> Floats:
    """Return what z . x of each overlapping user's rating should be, [N]; with `item_mean` z has the user's bias."""
    if rating_offset == "item_mean":
        offsets = Offsets(item=offsets.item, user=np.zeros_like(offsets.user))
    return offsets.left(_interactions(task.overlapping, len(task.target), len(task.items)))


def _interactions(ratings: Ratings, users: int, items: int) -> Interactions:
    user, item, rating = (array.cpu().numpy() for array in (ratings.user, ratings.item, ratings.rating))
    return Interactions(user=user, item=item, rating=rating, users=users, items=items)
