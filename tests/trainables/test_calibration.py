"""The gain on u . v: what it is, and that no validation rating is predicted with a gain that has seen it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from trainables.calibration import cross_fitted_gain, shrunken_slope
from trainables.models.music import Config, MuSiC, constants_of
from trainables.tasks.rating import Task

from .worlds import random_task

USERS, EACH = 200, 10


def draws(slope: float, noise: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    user = torch.arange(USERS).repeat_interleave(EACH)
    x = torch.randn(USERS * EACH, generator=generator)
    return x, slope * x + noise * torch.randn(USERS * EACH, generator=generator), user


def test_an_exact_slope_is_found_and_kept_within_0_and_1() -> None:
    assert shrunken_slope(*draws(0.5, 0.0)) == pytest.approx(0.5)
    assert shrunken_slope(*draws(3.0, 0.0)) == 1.0
    assert shrunken_slope(*draws(-0.5, 0.0)) == 0.0


def test_noise_is_pulled_to_zero_and_signal_is_not() -> None:
    nothing = [shrunken_slope(*draws(0.0, 1.0, seed)) for seed in range(200)]
    plain = [float((x * y).sum() / (x * x).sum()) for x, y, _ in (draws(0.0, 1.0, seed) for seed in range(200))]
    assert sum(gain == 0 for gain in nothing) > 120
    assert sum(nothing) < 0.6 * sum(max(0.0, gain) for gain in plain)
    assert shrunken_slope(*draws(0.5, 1.0)) == pytest.approx(0.5, abs=0.06)


def test_the_variance_is_clustered_by_user() -> None:
    """Errors that a user's ratings share count once per user, not once per rating."""
    user = draws(0.3, 1.0)[2]
    generator = torch.Generator().manual_seed(1)
    shared_x = torch.randn(USERS, generator=generator)[user]
    shared_y = 0.2 * shared_x + torch.randn(USERS, generator=generator)[user]
    rows = torch.arange(USERS * EACH)
    assert shrunken_slope(shared_x, shared_y, user) < shrunken_slope(shared_x, shared_y, rows)


def test_each_half_of_the_users_has_the_gain_of_the_other_half() -> None:
    x, y, user = draws(0.5, 0.3)
    odd = user % 2 == 1
    gain, pooled = cross_fitted_gain(x, y, user)
    assert gain[odd].unique().tolist() == [pytest.approx(shrunken_slope(x[~odd], y[~odd], user[~odd]))]
    assert gain[~odd].unique().tolist() == [pytest.approx(shrunken_slope(x[odd], y[odd], user[odd]))]
    assert len(gain.unique()) == 2
    assert pooled == shrunken_slope(x, y, user)


def test_no_rating_is_predicted_with_a_gain_that_has_seen_it() -> None:
    task = random_task()
    torch.manual_seed(0)
    config = Config(dim=8, hidden=8, steps=3, dropout=0.0)
    model = MuSiC(config, constants_of(config, task)).eval()
    before, _ = model.validate(task, seed=0)
    ratings = task.validation.ratings
    odd = ratings.user % 2 == 1
    changed = replace(ratings, rating=torch.where(odd, 6 - ratings.rating, ratings.rating))
    other: Task = replace(task, validation=replace(task.validation, ratings=changed))
    after, _ = model.validate(other, seed=0)
    assert torch.equal(before[odd], after[odd])
    pooled = float(model.gain)
    offset, u_dot_v, _ = model._terms(other.validation, other, 0)
    assert pooled == pytest.approx(shrunken_slope(u_dot_v.detach(), changed.rating - offset, ratings.user))
