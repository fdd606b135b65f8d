"""Calibration of what is learned from few users: a gain in [0, 1], fitted on validation users.

What is learned from a few hundred users is too large for new ones; one number corrects that (ours). No user's rating is
predicted with a gain that has seen it, so that validation metrics stay comparable. Shapes: N ratings.
"""

from __future__ import annotations

import torch
from torch import Tensor


def shrunken_slope(x_N: Tensor, y_N: Tensor, user_N: Tensor) -> float:
    """Return the least-squares slope of y on x within [0, 1], pulled to 0: b * max(0, 1 - var(b) / b^2).

    var(b) is clustered by user, whose ratings err together (Liang & Zeger 1986); the factor is a positive-part
    shrinkage of one coefficient. Computed on the CPU, because a GPU adds up in another order each time.
    """
    x_N, y_N, user_N = x_N.cpu(), y_N.cpu(), user_N.cpu()
    xy = torch.bincount(user_N, (x_N * y_N).double())
    xx = torch.bincount(user_N, x_N.square().double())
    total = float(xx.sum())
    if total == 0 or float(xy.sum()) <= 0:
        return 0.0
    slope = float(xy.sum()) / total
    variance = float((xy - slope * xx).square().sum()) / total**2
    return min(1.0, slope * max(0.0, 1.0 - variance / slope**2))


def cross_fitted_gain(x_N: Tensor, y_N: Tensor, user_N: Tensor) -> tuple[Tensor, float]:
    """Return the gain for each rating, fitted on the other half of the users, [N]; and the gain fitted on all users.

    Users with even and with odd numbers are the halves. `x_N` is what is scaled, `y_N` what it should be.
    """
    odd_N, gain_N = user_N % 2 == 1, torch.ones_like(x_N)
    for half_N in (odd_N, ~odd_N):
        gain_N[~half_N] = shrunken_slope(x_N[half_N], y_N[half_N], user_N[half_N])
    return gain_N, shrunken_slope(x_N, y_N, user_N)
