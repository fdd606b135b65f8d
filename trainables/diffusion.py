"""Gaussian diffusion on vectors: the mathematics that MuSiC (arXiv 2507.04000) and LGCD (arXiv 2604.05365) share.

Steps are numbered as in the papers, t = 1..T; index 0 of a table belongs to t = 1. Everything is computed in float64
and kept in float32. Shapes: B batch, D feature, T steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from features.errors import InputError

SCHEDULES = ("linear", "linear_scaled", "linear_sqrt", "linear_root")
MAX_VARIANCE = 0.999  # a step that adds more would divide by almost nothing in the posterior (Nichol & Dhariwal 2021)
REFERENCE_STEPS = 1000  # the T that Ho et al. (2020) chose their variances for

Denoiser = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x_t [B, D], t [B], condition [B, D] or None) -> prediction of x_0 [B, D]."""


@dataclass(frozen=True)
class SameForAll:
    """Noise that is drawn once and taken for every row: what is generated for a user depends on no other user's row."""

    generator: torch.Generator


Noise = torch.Generator | SameForAll


def normal_like(x_BD: Tensor, noise: Noise) -> Tensor:
    """Standard normal noise of the shape of x, [B, D], on its device; drawn on the CPU: the same on every device."""
    if isinstance(noise, SameForAll):
        return torch.randn(1, *x_BD.shape[1:], generator=noise.generator).to(x_BD.device).expand(*x_BD.shape)
    return torch.randn(x_BD.shape, generator=noise).to(x_BD.device)


def random_steps(rows: int, steps: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Steps that training noises its rows to, drawn evenly from 1..T: int64 [B]."""
    return torch.randint(1, steps + 1, (rows,), generator=generator).to(device)


def variances(steps: int, start: float, end: float, schedule: str) -> Tensor:
    """Variances beta_1..beta_T of the forward process, float64 [T] (MuSiC eq. 3, LGCD eq. 9).

    `linear`: from `start` to `end`, as MuSiC says. `linear_scaled` (ours): the same, times 1000/T and capped below
    1, so that abar_T comes near 0 for few steps as well; otherwise inference starts from noise that training never showed.
    `linear_root`: from sqrt(start) to sqrt(end), LGCD's eq. 9 word for word; with its settings hardly anything of x_0 is
    left after half of 100 steps (abar_50 = 0.011). `linear_sqrt` (ours): the square of that, as the `linear` of latent
    diffusion's code has it (Rombach et al. 2022).
    """
    if schedule not in SCHEDULES:
        raise InputError(f"schedule: unknown {schedule!r}; choose from {', '.join(SCHEDULES)}")
    if schedule in ("linear_sqrt", "linear_root"):
        root = torch.linspace(math.sqrt(start), math.sqrt(end), steps, dtype=torch.float64)
        return root if schedule == "linear_root" else root.square()
    scale = REFERENCE_STEPS / steps if schedule == "linear_scaled" else 1.0
    return torch.linspace(start * scale, end * scale, steps, dtype=torch.float64).clamp(max=MAX_VARIANCE)


class Diffusion(nn.Module):
    """Tables of one schedule, each float32 [T]; they follow the network that they are part of to its device."""

    signal: Tensor  # sqrt(abar_t), the share of x_0 in x_t
    noise: Tensor  # sqrt(1 - abar_t), the share of eps in x_t
    mean_x0: Tensor  # factor of x_0 in the posterior mean
    mean_xt: Tensor  # factor of x_t in the posterior mean
    deviation: Tensor  # standard deviation of the posterior, sqrt(beta~_t); 0 at t = 1

    def __init__(self, beta_T: Tensor) -> None:
        """Tables from the variances beta_1..beta_T, float64 [T]."""
        super().__init__()
        alpha = 1 - beta_T
        bar = alpha.cumprod(0)
        bar_before = torch.cat([bar.new_ones(1), bar[:-1]])
        tables = {
            "signal": bar.sqrt(),
            "noise": (1 - bar).sqrt(),
            "mean_x0": bar_before.sqrt() * beta_T / (1 - bar),
            "mean_xt": alpha.sqrt() * (1 - bar_before) / (1 - bar),
            "deviation": (beta_T * (1 - bar_before) / (1 - bar)).sqrt(),
        }
        for name, table in tables.items():
            self.register_buffer(name, table.float(), persistent=False)

    @property
    def steps(self) -> int:
        """T."""
        return len(self.signal)

    def noised(self, x0_BD: Tensor, t_B: Tensor, eps_BD: Tensor) -> Tensor:
        """x_t from q(x_t | x_0) (MuSiC eq. 4, LGCD eq. 11)."""
        return self.signal[t_B - 1, None] * x0_BD + self.noise[t_B - 1, None] * eps_BD

    def posterior_mean(self, x0_BD: Tensor, xt_BD: Tensor, t: int) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x_0) (Ho et al. 2020 eq. 7; MuSiC eq. 6, LGCD eq. 20)."""
        return self.mean_x0[t - 1] * x0_BD + self.mean_xt[t - 1] * xt_BD

    def clean(self, xt_BD: Tensor, t_B: Tensor, eps_BD: Tensor) -> Tensor:
        """x_0 from x_t and its noise (LGCD eq. 11, solved for x_0)."""
        return (xt_BD - self.noise[t_B - 1, None] * eps_BD) / self.signal[t_B - 1, None]

    def generate(
        self, denoise: Denoiser, condition_BD: Tensor | None, start_BD: Tensor, generator: Noise,
        first: int | None = None,
    ) -> Tensor:  # fmt: skip
        """Reverse process (MuSiC eq. 5, LGCD eq. 19): from `start_BD` at step `first` (T) down to x_0, the condition at
        every step.
        """
        x = start_BD
        for t in range(first or self.steps, 0, -1):
            x0 = denoise(x, torch.full((len(x),), t, dtype=torch.int64, device=x.device), condition_BD)
            x = self.posterior_mean(x0, x, t)
            if t > 1:
                x = x + self.deviation[t - 1] * normal_like(x, generator)
        return x

    def strided(
        self, denoise: Denoiser, condition_BD: Tensor | None, start_BD: Tensor, first: int, steps: int
    ) -> Tensor:
        """Deterministic reverse process over `steps` of the steps first..1, evenly spaced (Song et al. 2021, eq. 12).

        Each step predicts x_0 and noises it again, to the next step's level and with the noise that x_t shows.
        """
        chosen = torch.linspace(first, 1, min(steps, first)).round().long().tolist()
        x = start_BD
        for t, following in zip(chosen, [*chosen[1:], 0], strict=True):
            t_B = torch.full((len(x),), t, dtype=torch.int64, device=x.device)
            x0 = denoise(x, t_B, condition_BD)
            if following == 0:
                return x0
            eps = (x - self.signal[t - 1] * x0) / self.noise[t - 1]
            x = self.signal[following - 1] * x0 + self.noise[following - 1] * eps
        return x


def timestep_embedding(t_B: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding of the step number, [B, dim] (MuSiC eq. 7; Vaswani et al. 2017)."""
    half = dim // 2
    place = torch.arange(half, dtype=torch.float32, device=t_B.device)
    frequency = torch.exp(place * (-math.log(10_000.0) / half))
    angle = t_B[:, None].float() * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)
