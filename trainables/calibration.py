"""The gain on what a model adds to its offset: how much of it to believe, fitted on validation users (ours).

What is learned from a few hundred users is too large for new ones; one number corrects that. No validation rating is
predicted with a gain that has seen it, so that validation metrics stay comparable. Shapes: N ratings.
"""

from __future__ import annotations

import torch
from torch import Tensor


def shrunken_slope(x_N: Tensor, y_N: Tensor, user_N: Tensor) -> float:
    """Least-squares slope of y on x within [0, 1], pulled to 0 by how uncertain it is: b * max(0, 1 - var(b) / b^2).

    var(b) is clustered by user, whose ratings err together (Liang & Zeger 1986); the factor is a positive-part
    shrinkage of one coefficient.
    """
    xy = torch.bincount(user_N, (x_N * y_N).double())
    xx = torch.bincount(user_N, x_N.square().double())
    total = float(xx.sum())
    if total == 0 or float(xy.sum()) <= 0:
        return 0.0
    slope = float(xy.sum()) / total
    variance = float((xy - slope * xx).square().sum()) / total**2
    return min(1.0, slope * max(0.0, 1.0 - variance / slope**2))


def cross_fitted(x_N: Tensor, left_N: Tensor, user_N: Tensor) -> tuple[Tensor, float]:
    """Gain of each rating [N], fitted on the half of the users that does not hold its user, and the gain fitted on all.

    `x_N` is what the model adds to the offset, `left_N` what the offset leaves of the rating.
    """
    gain_N, odd_N = torch.ones_like(x_N), user_N % 2 == 1
    for half_N in (odd_N, ~odd_N):
        gain_N[~half_N] = shrunken_slope(x_N[half_N], left_N[half_N], user_N[half_N])
    return gain_N, shrunken_slope(x_N, left_N, user_N)
