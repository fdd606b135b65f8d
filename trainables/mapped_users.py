"""Predictions from mapped user vectors: what all rating models over base vectors share once those are there.

A model gives a cold-start user a vector z in the space of the target domain's items; a rating is the offset plus
gain * z . x (`trainables.base_factors`, `trainables.calibration`). Also what they train a mapping with: batches of users
with all their ratings, weights of users, layers that start after Glorot. Everything is float64, like the base vectors.

Shapes: N ratings, U users, B users of a batch, O training overlapping users, D width of the base vectors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from trainables.base_factors import BaseVectors
from trainables.calibration import cross_fitted_gain
from trainables.interface import Epoch
from trainables.tasks.rating import HeldOut, Task

USER_WEIGHTS = ("user", "ratings")


class Calibrated(Protocol):
    """A configuration that says whether the prediction has a gain."""

    @property
    def calibrate(self) -> bool:
        """Whether z . x is scaled by a gain fitted on the validation users."""


class OffsetAndGain(nn.Module, ABC):
    """Predicts ratings by offset + gain * term; a model says what the term is in `term`."""

    gain: Tensor

    def __init__(self, config: Calibrated, offset: Callable[[HeldOut], Tensor], device: torch.device) -> None:
        super().__init__()
        self.calibrate, self.offset = config.calibrate, offset
        self.register_buffer("gain", torch.ones((), device=device))

    @abstractmethod
    def term(self, held_out: HeldOut) -> Tensor:
        """Return what is added to the offset of each rating, [N]."""

    def predict(self, held_out: HeldOut, task: Task, seed: int) -> Tensor:
        """Return ratings [N] of cold-start users, not cut to the scale."""
        return self.offset(held_out) + self.gain * self.term(held_out).float()

    @torch.no_grad()
    def epoch(self, task: Task, loss: float) -> Epoch:
        """Fit the gain on the validation users, and predict each half of them with the gain of the other half."""
        training = self.training
        self.eval()
        ratings, offset_N = task.validation.ratings, self.offset(task.validation)
        term_N, metrics = self.term(task.validation).float(), self.more_metrics(task)
        self.train(training)
        gain_N = torch.ones_like(self.gain)
        if self.calibrate:
            gain_N, gain = cross_fitted_gain(term_N, ratings.rating - offset_N, ratings.user)
            self.gain.fill_(gain)
        metrics = {"train_loss": loss, **metrics, "gain": float(self.gain)}
        return Epoch(predict=self.predict, metrics=metrics, validation=offset_N + gain_N * term_N)

    def more_metrics(self, task: Task) -> dict[str, float]:
        """Return what else is logged of an epoch."""
        return {}


class MappedUsers(OffsetAndGain):
    """The term is z . x; a model says what z is in `mapped`."""

    def __init__(self, config: Calibrated, base: BaseVectors) -> None:
        super().__init__(config, base.offset, base.item_offset.device)
        self.base = base

    @abstractmethod
    def mapped(self, row_U: Tensor) -> Tensor:
        """Return the target-domain vectors of users by their number in the task's source_ratings, float64 [U, D]."""

    def term(self, held_out: HeldOut) -> Tensor:
        """Return z . x of each rating, [N]."""
        ratings = held_out.ratings
        return dots(self.mapped(held_out.source_row), ratings.user, self.base.target_items, ratings.item)

    def more_metrics(self, task: Task) -> dict[str, float]:
        """Return the variance of validation users' vectors, as a share of the real target vectors'."""
        mapped_UD, real_UD = self.mapped(task.validation.source_row), self.base.target_users[: len(task.source)]
        variance, real = (float(z.var(dim=0, correction=0).mean()) for z in (mapped_UD, real_UD))
        return {"variance_ratio": variance / real if real else float("nan")}


def dots(user_UD: Tensor, user_N: Tensor, item_ID: Tensor, item_N: Tensor) -> Tensor:
    """Return z . x of each pair, [N]."""
    return (user_UD.index_select(0, user_N) * item_ID.index_select(0, item_N)).sum(dim=1)


# --- training a mapping -------------------------------------------------------------------------------------------


def squared_distance(mapped_UD: Tensor, target_UD: Tensor, weight_U: Tensor | None = None) -> Tensor:
    """Return the (weighted) mean over users of |f(z_s) - z_t|^2."""
    square_U = (mapped_UD - target_UD).square().sum(dim=1)
    return (square_U if weight_U is None else weight_U * square_U).mean()


def user_weights(task: Task, user_weight: str) -> Tensor:
    """Return what each overlapping user counts in a loss over users, mean 1, float64 [O].

    `ratings`: as often as the user has target ratings, which is what public code does by visiting ratings.
    """
    counts_O = torch.bincount(task.overlapping.user, minlength=len(task.source)).double()
    return torch.ones_like(counts_O) if user_weight == "user" else counts_O / counts_O.mean()


def root_mean_length(vectors_UD: Tensor) -> float:
    """Return the root of the mean of |z|^2 over users; 1 where all are zero."""
    return float(vectors_UD.square().sum(dim=1).mean().sqrt()) or 1.0


def user_batches(users: int, size: int, generator: torch.Generator, device: torch.device) -> list[Tensor]:
    """Return the numbers of all users in random order, in batches of `size`, int64 [B] each."""
    return list(torch.split(torch.randperm(users, generator=generator).to(device), size))


def rows_of(starts: Tensor, user_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of these users in an array sorted by user, and the place in `user_B` that each belongs to, both [N].

    `starts` [U + 1]: first row of each user, and the number of rows at the end.
    """
    return ragged(starts[user_B], starts[user_B + 1] - starts[user_B])


def ragged(first_B: Tensor, count_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return first, first + 1, ... of each entry, `count` of them, end to end, and the entry that each belongs to."""
    place_N = torch.repeat_interleave(torch.arange(len(count_B), device=count_B.device), count_B)
    before_B = count_B.cumsum(0) - count_B
    return (first_B - before_B)[place_N] + torch.arange(len(place_N), device=count_B.device), place_N


def glorot(inputs: int, outputs: int, generator: torch.Generator, *, bias: bool = True) -> nn.Linear:
    """Make a layer of float64 that starts after Glorot, its bias at 0."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.xavier_uniform_(layer.weight, generator=generator)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer.double()


def perceptron(width: int, hidden: int, generator: torch.Generator) -> nn.Module:
    """Make f(z) = tanh(z W_1 + b_1) W_2 + b_2 from D to D; the output is not squashed (ours)."""
    return nn.Sequential(glorot(width, hidden, generator), nn.Tanh(), glorot(hidden, width, generator))


def take_step(optimiser: torch.optim.Optimizer, loss: Tensor) -> float:
    """Make a gradient step; return the loss."""
    optimiser.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimiser.step()
    return loss.item()
