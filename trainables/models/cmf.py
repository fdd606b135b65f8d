"""CMF: collective matrix factorisation (Singh and Gordon, KDD 2008, pp. 650-658), with users shared by two domains.

Several matrices of ratings are factorised together; who takes part in two of them has one factor. Here a user has one
vector p in both domains and each domain's items have their own q, so that a cold-start user's vector is already there,
fitted to source-domain ratings. With identity link and squares the objective is

    w_s sum_source (r - o - p . q)^2 + w_t sum_target (r - o - p . q)^2 + ridge (|P|^2 + |Q|^2),   w_s = 2a, w_t = 2 (1 - a)

and the paper's Newton projection of one factor is a ridge regression: a sweep over items and users is an epoch. There
are no negatives. The paper's text could not be read in full; offsets, gain and weights in this form are (ours).

Shapes: N ratings, P source users, S side users, J source-domain items, I target-domain items, D width of the vectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from torch import Tensor

from features.checks import choice, flag, number, refuse, whole
from features.factorisation import biases, ridge_regressions
from trainables.base_factors import (
    OFFSETS,
    BaseVectors,
    Offsets,
    fitted_offsets,
    source_interactions,
    target_interactions,
    target_offsets,
)
from trainables.interface import Epoch, Selection, Setup, Variant
from trainables.mapped_users import MappedUsers
from trainables.tasks.rating import SHRINKAGE, Task, overlapping_offsets

NAME = "CMF"
TASK_TYPE = "ratings"
SELECTION = Selection("val_rmse", "minimize")

ABLATIONS = {
    "plain": Variant(config={"rating_offset": "none", "calibrate": False}),  # as published: a rating is a dot product
    "wo_source": Variant(config={"source_weight": 0.0}),  # cold-start users have no vector: the offset alone
    "wo_target_users": Variant(config={"side_users": False}),
}

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Hyperparameters."""

    dim: int = 10  # factors of a vector (ours: the paper's are not printed for ratings of two domains)
    ridge: float = 15.0  # penalty on the factors' squares, in ratings, above 0 (ours)
    ridge_by_count: bool = False  # the penalty of a user or item is multiplied by the number of its ratings (ours)
    source_weight: float = 0.5  # a, weight of the source domain; 0.5: every rating of both domains counts alike
    side_users: bool = True  # users of the target domain alone take part; without them the slope still knows them
    epochs: int = 15  # sweeps
    patience: int = 15  # epochs without a better validation RMSE before training ends (ours)
    rating_offset: str = "source_offset"  # see trainables.base_factors: none (the paper's) | item_mean | source_offset
    calibrate: bool = True  # p . q is scaled by a gain in [0, 1] fitted on the validation users (ours)

    def __post_init__(self) -> None:
        refuse(
            choice(self, "rating_offset", OFFSETS),
            number(self, "ridge", above=0),
            number(self, "source_weight", least=0, most=1),
            *(flag(self, name) for name in ("ridge_by_count", "side_users", "calibrate")),
            *(whole(self, name, least=1) for name in ("dim", "epochs", "patience")),
        )


def train(config: Config, task: Task, seed: int) -> Iterator[Setup | Epoch]:
    """Put the ratings of both domains into one matrix and sweep over it."""
    ratings = both_domains(config, task)
    model = CMF(config, task, ratings, seed)
    yield Setup(model)
    while True:
        yield model.epoch(task, model.sweep())


# --- the ratings of both domains ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BothDomains:
    """One matrix: source users in their order, then side users; source-domain items, then target-domain items."""

    by_user: csr_matrix  # [P + S, J + I] what the offsets leave of the ratings
    by_item: csr_matrix
    item_weight: Floats  # [J + I] w of the domain that an item belongs to
    source_items: int  # J
    source_users: int  # P
    user_bias: Floats  # [P + S] part of the vectors with `item_mean`, else zeros
    item_offset: Floats  # [I] of a prediction


def both_domains(config: Config, task: Task) -> BothDomains:
    """Lay the ratings of both domains into one matrix, less their offsets."""
    if not config.side_users:
        mean, items_of_overlapping = overlapping_offsets(task)
        task = replace(task, mean=mean, item_offset=items_of_overlapping)
    source, target = source_interactions(task), target_interactions(task)
    row_N = np.where(target.user < len(task.source), target.user, target.user + source.users - len(task.source))
    users = source.users + len(task.side_users)
    user_N = np.concatenate([source.user, row_N])
    item_N = np.concatenate([source.item, source.items + target.item])
    rating_N = np.concatenate([source.rating, target.rating]).astype(np.float64)
    kept_N = np.ones(len(user_N), bool) if config.side_users else user_N < source.users
    items, user_bias = source.items + target.items, np.zeros(users)
    if config.rating_offset == "item_mean":
        offsets = shared_offsets(user_N[kept_N], item_N[kept_N], rating_N[kept_N], users, items, source.items)
        left_N, item_offset, user_bias = rating_N - offsets.item[item_N], offsets.item[source.items :], offsets.user
        left_N -= user_bias[user_N]
    else:
        of_target = target_offsets(task, config.rating_offset)
        left_N = np.concatenate([fitted_offsets(source, config.rating_offset).left(source), of_target.left(target)])
        item_offset = of_target.item
    by_user = csr_matrix((left_N[kept_N], (user_N[kept_N], item_N[kept_N])), (users, items))
    weights = np.array([2 * config.source_weight, 2 * (1 - config.source_weight)])
    return BothDomains(
        by_user=by_user, by_item=by_user.T.tocsr(), item_weight=weights.repeat([source.items, target.items]),
        source_items=source.items, source_users=source.users, user_bias=user_bias, item_offset=item_offset,
    )  # fmt: skip


def shared_offsets(user_N: Ints, item_N: Ints, rating_N: Floats, users: int, items: int, source_items: int) -> Offsets:
    """Fit item biases and one bias of each user to both domains, each domain about its own mean."""
    target_N = item_N >= source_items
    means = np.array([rating_N[~target_N].mean(), rating_N[target_N].mean()])
    user, item = biases(SHRINKAGE, user_N, item_N, rating_N - means[target_N.astype(int)], users, items)
    return Offsets(item=item + means.repeat([source_items, items - source_items]), user=user)


# --- the factorisation --------------------------------------------------------------------------------------------


def solved_users(config: Config, ratings: BothDomains, items: Floats) -> Floats:
    """Solve p = (sum w q q^T + ridge I)^-1 sum w e q over a user's ratings of both domains, [P + S, D]."""
    by_user = ratings.by_user
    return ridge_regressions(by_user, items, penalties(config, by_user), ratings.item_weight[by_user.indices])


def solved_items(config: Config, ratings: BothDomains, users: Floats) -> Floats:
    """Solve for q likewise, [J + I, D]."""
    by_item = ratings.by_item
    weight_N = ratings.item_weight.repeat(np.diff(by_item.indptr))
    return ridge_regressions(by_item, users, penalties(config, by_item), weight_N)


def penalties(config: Config, ratings: csr_matrix) -> Floats:
    """Return the penalty on the squares of each row's factors, [rows]."""
    count = np.diff(ratings.indptr) if config.ridge_by_count else np.ones(ratings.shape[0])
    penalty_R: Floats = config.ridge * np.maximum(count, 1.0)
    return penalty_R


def objective(config: Config, ratings: BothDomains, users: Floats, items: Floats) -> float:
    """Return what the sweeps lower: weighted squares and the penalty."""
    by_user = ratings.by_user
    user_N, item_N = np.arange(len(users)).repeat(np.diff(by_user.indptr)), by_user.indices
    left_N = by_user.data - np.einsum("nd,nd->n", users[user_N], items[item_N])
    penalty = sum(
        float(penalties(config, rows) @ np.square(table).sum(axis=1))
        for rows, table in ((by_user, users), (ratings.by_item, items))
    )
    return float(ratings.item_weight[item_N] @ np.square(left_N)) + penalty


# --- its prediction -------------------------------------------------------------------------


class CMF(MappedUsers):
    """Factors of all users and items; a cold-start user's vector is the one fitted to source-domain ratings."""

    users: Tensor
    items: Tensor

    def __init__(self, config: Config, task: Task, ratings: BothDomains, seed: int) -> None:
        sizes = (ratings.source_items, len(task.items))
        # Each domain's items start as where it is factorised by itself.
        drawn = [np.random.default_rng(seed).normal(0.0, 0.1, (size, config.dim)) for size in sizes]
        items = np.concatenate(drawn)
        users = solved_users(config, ratings, items)
        wide = config.rating_offset == "item_mean"
        user_bias, item_one = ratings.user_bias[:, None], np.ones((len(items), 1))
        vectors = [np.hstack([user_bias, users]), np.hstack([item_one, items])] if wide else [users, items]
        users_UD, items_ID = (torch.from_numpy(rows).to(task.device) for rows in vectors)
        # Views of the tables that sweeps write to.
        base = BaseVectors(
            source_users=users_UD[: ratings.source_users], target_users=users_UD[: len(task.source)],
            source_items=items_ID[: sizes[0]], target_items=items_ID[sizes[0] :],
            source_bias=users_UD.new_zeros(sizes[0]), residual=users_UD.new_zeros(0),
            item_offset=torch.from_numpy(ratings.item_offset).float().to(task.device),
            slope=task.slope if config.rating_offset == "source_offset" else 0.0,
        )  # fmt: skip
        super().__init__(config, base)
        self.config, self.ratings = config, ratings
        self.register_buffer("users", users_UD)
        self.register_buffer("items", items_ID)

    def mapped(self, row_U: Tensor) -> Tensor:
        """Return p, [U, D]; zeros for who has no source-domain rating."""
        return self.base.source_users[row_U]

    def sweep(self) -> float:
        """Solve for all items, then for all users; return the objective, per rating."""
        config, ratings = self.config, self.ratings
        items = solved_items(config, ratings, self.users[:, -config.dim :].cpu().numpy())
        users = solved_users(config, ratings, items)
        self.items[:, -config.dim :] = torch.from_numpy(items).to(self.items.device)
        self.users[:, -config.dim :] = torch.from_numpy(users).to(self.users.device)
        return objective(config, ratings, users, items) / ratings.by_user.nnz
