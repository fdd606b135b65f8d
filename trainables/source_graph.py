"""What source-domain users liked: positive ratings as rows of items, drawn negatives, and averages along the graph.

A rating is positive above the middle of the rating scale. Shapes: N positive ratings, P source users, J source-domain
items, B users of a batch, L longest history of a batch, D width of the base vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from scipy.sparse import csr_matrix, diags_array
from torch import Tensor

from trainables.tasks.rating import Task


@dataclass(frozen=True, kw_only=True)
class Positives:
    """Positive source-domain ratings, sorted by user and then as in the task; on the task's device."""

    user: Tensor  # int64 [N]
    item: Tensor  # int64 [N]
    starts: Tensor  # int64 [P + 1] first row of each user, and N
    items: int  # J

    @cached_property
    def matrix(self) -> csr_matrix:
        """Incidence of users and items, [P, J]."""
        user, item = self.user.cpu().numpy(), self.item.cpu().numpy()
        return csr_matrix((np.ones(len(user)), (user, item)), (len(self.starts) - 1, self.items))

    def histories(self, user_B: Tensor, latest: int) -> tuple[Tensor, Tensor]:
        """Return each user's latest items, padded at the end with item 0, and which places are real, both [B, L].

        `latest` 0: all of them. L is at least 1.
        """
        end_B = self.starts[user_B + 1]
        count_B = end_B - self.starts[user_B]
        if latest:
            count_B = count_B.clamp(max=latest)
        place_L = torch.arange(max(1, int(count_B.max())), device=user_B.device)
        real_BL = place_L < count_B[:, None]
        row_BL = ((end_B - count_B)[:, None] + place_L) * real_BL
        return self.item[row_BL] * real_BL if len(self.item) else row_BL, real_BL


@lru_cache(maxsize=4)
def positives(task: Task, seed: int) -> Positives:
    """Return the positive ratings of all source users, oldest first where there are times, else in an order drawn once."""
    ratings, (low, high) = task.source_ratings, task.source_scale
    kept = (ratings.rating > (low + high) / 2).nonzero().flatten()
    user, users = ratings.user[kept], len(ratings.starts) - 1
    if not task.source_times:
        shuffled = torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed)).to(task.device)
        order = shuffled[user[shuffled].argsort(stable=True)]
        kept, user = kept[order], user[order]
    counts = torch.bincount(user, minlength=users)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Positives(user=user, item=ratings.item[kept], starts=starts, items=task.source_items)


class Unrated:
    """Draws source-domain items that a user has not rated, evenly; users who have rated all items are not asked for."""

    def __init__(self, task: Task, users: int) -> None:
        ratings, self._items = task.source_ratings, task.source_items
        self._codes = (ratings.user * self._items + ratings.item)[ratings.user < users].cpu().sort().values
        rated = torch.bincount(self._codes // self._items, minlength=users)
        self.askable = rated < self._items  # bool [users], on the CPU

    def draw(self, user_N: Tensor, generator: torch.Generator) -> Tensor:
        """Return an item for each entry, int64 [N]; what a user has rated is drawn again. On the CPU."""
        item_N = torch.randint(self._items, user_N.shape, generator=generator)
        again = self._rated(user_N, item_N).nonzero().flatten()
        while len(again):
            item_N[again] = torch.randint(self._items, again.shape, generator=generator)
            again = again[self._rated(user_N[again], item_N[again])]
        return item_N

    def _rated(self, user_N: Tensor, item_N: Tensor) -> Tensor:
        code_N = user_N * self._items + item_N
        place_N = torch.searchsorted(self._codes, code_N).clamp(max=len(self._codes) - 1)
        rated_N: Tensor = self._codes[place_N] == code_N
        return rated_N


def averages(liked: Positives, users_PD: Tensor, items_JD: Tensor, hops: int) -> list[Tensor]:
    """Return n_1 .. n_hops of all source users, float64 [P, D] each.

    n_1 = A q, n_2 = A A' z, n_3 = A A' A q, with A the positive incidence, its rows divided by their sums, and A' its
    transpose treated likewise. A user without positives has zeros.
    """
    by_user, by_item = row_normalised(liked.matrix), row_normalised(liked.matrix.T.tocsr())
    users, items = users_PD.detach().cpu().numpy(), items_JD.detach().cpu().numpy()
    averaged = []
    for hop in range(1, hops + 1):
        vectors = items if hop % 2 else by_item @ users
        for _ in range((hop - 1) // 2):
            vectors = by_item @ (by_user @ vectors)
        averaged.append(torch.from_numpy(by_user @ vectors).to(users_PD.device))
    return averaged


def row_normalised(matrix: csr_matrix) -> csr_matrix:
    """Divide each row by its sum; a row of zeros stays."""
    sums = np.asarray(matrix.sum(axis=1)).ravel()
    return csr_matrix(diags_array(1 / np.where(sums == 0, 1, sums)) @ matrix)
