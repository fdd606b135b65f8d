"""Scores of all target-domain items for the task, by the inner product of a user's vector and an item's.

Shapes: R rows, J items of the target domain, D vector width, B histories that are encoded at once, L positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trainables.sequences.views import Range, padded, windows, within
from trainables.tasks.sequential import HeldOut, Sequences, SequenceTask

_ROWS = 512  # sequences encoded at once without gradients


def by_length(history: Sequences, most: int, encode: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return `encode` of the newest `most` items of each history, none of them empty: [R, D].

    `encode` takes items [B, L] and lengths [B], of a few hundred histories of about the same length.
    """
    first, length = windows(history.starts, most)
    order = length.argsort(stable=True)
    parts = [
        encode(padded(history.item, first[part], length[part])[0], length[part]) for part in torch.split(order, _ROWS)
    ]
    return torch.cat(parts)[order.argsort()]


class Ranker(Protocol):
    """A network that ranks by the inner product of a user's and an item's vector."""

    def users(self, history: Sequences, domain: Range) -> Tensor:
        """Return the vectors of users for a domain's items, by their histories, none of them empty: [R, D]."""

    def items(self, domain: Range) -> Tensor:
        """Return the vectors of a domain's items, [J, D]."""


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """The `predict` of an epoch, and what is kept of it for serving.

    Where nothing of a history is read, since it is empty or holds no item of the domain that the model reads, items are
    ranked by popularity.
    """

    network: Ranker
    target: Range
    sequences: str  # merged: the whole history is read | target: its target-domain items
    popularity: Tensor  # float32 [J] training sequences with the item
    turned: Scorer | None = None  # for the opposite direction, where one training serves both

    @staticmethod
    def of_task(network: Ranker, task: SequenceTask, sequences: str) -> Scorer:
        """Return a scorer with the popularity of a task's training sequences."""
        counts = torch.bincount(task.train.item, minlength=task.items).float()

        def of_domain(domain: Range, turned: Scorer | None = None) -> Scorer:
            popularity = counts[slice(*domain)]
            return Scorer(network=network, target=domain, sequences=sequences, popularity=popularity, turned=turned)

        return of_domain(task.target, of_domain(task.source) if sequences == "merged" else None)

    def __call__(self, held_out: HeldOut, task: SequenceTask, seed: int) -> Tensor:
        """Return the scores of all target-domain items, [R, J]."""
        return self.scores(held_out.history)

    @torch.no_grad()
    def scores(self, history: Sequences) -> Tensor:
        """Return the scores of all target-domain items by what is known of users, [R, J]."""
        if self.sequences == "target":
            history = within(history, self.target)
        known = history.lengths > 0
        scores_RJ = self.popularity.repeat(len(history), 1)
        if known.any():
            rows = known.nonzero().squeeze(1)
            scores_RJ[rows] = self.network.users(history.rows(rows), self.target) @ self.network.items(self.target).T
        return scores_RJ

    def pack(self) -> dict[str, Any]:
        """Return the trained network and what else `unpacked` needs, as tensors and plain values."""
        assert isinstance(self.network, nn.Module)
        return {
            "network": self.network.state_dict(), "target": list(self.target), "sequences": self.sequences,
            "popularity": self.popularity,
        }  # fmt: skip


def unpacked(network: Ranker, state: Mapping[str, Any]) -> Scorer:
    """Return the scorer that `Scorer.pack` has packed, in a new network of the same shape."""
    assert isinstance(network, nn.Module)
    network.load_state_dict(state["network"])
    low, high = state["target"]
    return Scorer(
        network=network.eval(), target=(low, high), sequences=state["sequences"], popularity=state["popularity"]
    )  # fmt: skip
