"""DiffCDR: diffusion cross-domain recommendation (Xuan, arXiv 2402.02182, 2024).

A denoising network conditioned on a user's source vector generates the target vector; an alignment layer (ALM), trained on
ratings and on true target vectors, repairs it. In the paper's order:

- The process: time t in [0, 1], log alpha(t) = -t^2 (20 - 0.1) / 4 - t 0.1 / 2, sigma^2 = 1 - alpha^2.
- The network: h = x + (S tau(t) + s_b) + m (z C + c_b), noise = ((h W_1 + b_1) W_2 + b_2) W_3 + b_3, D -> H -> H -> D,
  without activation as in the author's code (`network: affine`); `mlp` has a SiLU between layers, as the text suggests
  (ours). tau embeds 1000 max(t - 1/1000, 0); m is 0 where the condition is dropped.
- The sampler: DPM-Solver-fast (Lu et al. 2022, orders 3, ..., 3 and a rest) from t = 1 to 1e-4 in steps even in
  log(alpha / sigma), with guidance noise = noise_0 + s (noise_c - noise_0), from the source vector itself (4.1) or noise.
- The ALM: z = x_0 F, F [D, D].

Per batch: a step of the network on smooth_l1 of the noise, then, with the generated x_0 as a constant, a step of F on
smooth_l1(z, z_t) + task_weight * mean (r - o - z . x)^2. Vectors are divided by their root mean square (ours): an untrained
sampler multiplies by 152.17, so first epochs are wild. One row a user, where public code has one a rating (ours).

With `affine`, noise is an affine map of x and z for each t, hence so is the whole sampler: it is run on 2 D + 1 probes, and
every user is one matrix product away. Everything is float64.

Shapes: B users of a batch, N their ratings, D width of the base vectors, H hidden width, E network evaluations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.functional import silu, smooth_l1_loss
from torch.nn.utils import clip_grad_norm_

from features.checks import choice, flag, number, refuse, whole
from trainables.base_factors import OFFSETS, BaseVectors, base_vectors
from trainables.interface import Epoch, Selection, Setup, Variant
from trainables.mapped_users import (
    USER_WEIGHTS,
    MappedUsers,
    dots,
    glorot,
    root_mean_length,
    rows_of,
    user_batches,
    user_weights,
)
from trainables.tasks.rating import Task

NAME = "DiffCDR"
TASK_TYPE = "ratings"
SELECTION = Selection("val_rmse", "minimize")

NETWORKS = ("affine", "mlp")
STARTS = ("source", "noise")
BETA_START, BETA_END, LAST_TIME = 0.1, 20.0, 1e-4

ABLATIONS = {
    "plain": Variant(config={"rating_offset": "none", "calibrate": False}),  # as published: a rating is a dot product
    "wo_task": Variant(config={"task_weight": 0.0}),  # the paper's DA
    "wo_diffusion": Variant(config={"diffusion": False}),  # the paper's AT: x_0 is the source vector
    "mlp": Variant(config={"network": "mlp"}),
    "noise_start": Variant(config={"start": "noise"}),
}

Noise = Callable[[Tensor, int], Tensor]
"""(x [B, D], number of the evaluation) -> noise [B, D]."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Hyperparameters."""

    guidance: float = 0.1  # s, weight of the condition in sampling
    task_weight: float = 0.1  # lambda, weight of the rating loss
    evaluations: int = 30  # E, of the network while sampling
    mask: float = 0.1  # share of the training users whose condition is dropped
    hidden: int = 128  # H
    network: str = "affine"  # affine (the author's code) | mlp (SiLU between layers, ours)
    start: str = "source"  # of sampling: source (4.1) | noise (3.1)
    samples: int = 5  # draws that are averaged with `start: noise` (ours)
    diffusion: bool = True  # false: x_0 is the source vector
    user_weight: str = "user"  # what counts alike in losses over users: user | ratings (public code; ours: user)
    dim: int = 10  # factors of a base vector (ours)
    ridge: float = 15.0  # penalty on the factors' squares, in ratings, above 0 (ours)
    lr: float = 1e-3  # of both Adams
    batch: int = 128  # users of a step, with all their ratings
    epochs: int = 40
    patience: int = 15  # epochs without a better validation RMSE before training ends (ours)
    rating_offset: str = "source_offset"  # see trainables.base_factors: none (the paper's) | item_mean | source_offset
    calibrate: bool = True  # z . x is scaled by a gain in [0, 1] fitted on the validation users (ours)

    def __post_init__(self) -> None:
        refuse(
            choice(self, "network", NETWORKS),
            choice(self, "start", STARTS),
            choice(self, "rating_offset", OFFSETS),
            choice(self, "user_weight", USER_WEIGHTS),
            *(number(self, name, least=0) for name in ("guidance", "task_weight")),
            number(self, "mask", least=0, below=1),
            *(number(self, name, above=0) for name in ("ridge", "lr")),
            *(flag(self, name) for name in ("diffusion", "calibrate")),
            ""
            if self.hidden % 2 == 0
            else f"hidden is {self.hidden!r}; give an even number, half sines and half cosines",
            whole(self, "hidden", least=4),
            *(whole(self, name, least=1) for name in ("evaluations", "samples", "dim", "batch", "epochs", "patience")),
        )


def train(config: Config, task: Task, seed: int) -> Iterator[Setup | Epoch]:
    """Factorise both domains; per batch of users a step of the network, a sample, and a step of the alignment layer."""
    base = base_vectors(task, config.dim, config.ridge, config.rating_offset, seed)
    generator = torch.Generator().manual_seed(seed)
    model = DiffCDR(config, base, len(task.source), seed, generator)
    adams = [torch.optim.Adam(part.parameters(), lr=config.lr, fused=True) for part in (model.network, model.align)]
    yield Setup(model, network_adam=adams[0], align_adam=adams[1], generator=generator)
    users, starts, weight_O = len(task.source), task.overlapping.starts, user_weights(task, config.user_weight)
    while True:
        total = 0.0
        for batch in user_batches(users, config.batch, generator, task.device):
            if config.diffusion:
                clipped_step(adams[0], model.network, model.noise_loss(batch, weight_O[batch], generator))
            row_N, place_N = rows_of(starts, batch)
            loss = model.alignment_loss(
                batch, weight_O[batch], place_N, task.overlapping.item[row_N], base.residual[row_N], generator
            )
            total += len(batch) * clipped_step(adams[1], model.align, loss)
        yield model.epoch(task, total / users)


def clipped_step(adam: torch.optim.Optimizer, part: nn.Module, loss: Tensor) -> float:
    """Make a gradient step whose norm is at most 1; return the loss."""
    adam.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    clip_grad_norm_(part.parameters(), 1.0)
    adam.step()
    return loss.item()


# --- the process --------------------------------------------------------------------------------------------------


def log_alpha(time: Tensor) -> Tensor:
    """Return the logarithm of what is left of x_0 at a time."""
    return -0.25 * time.square() * (BETA_END - BETA_START) - 0.5 * time * BETA_START


def sigma_of(time: Tensor) -> Tensor:
    """Return the standard deviation of the noise at a time."""
    return (-torch.expm1(2 * log_alpha(time))).sqrt()


def time_embedding(time_B: Tensor, width: int) -> Tensor:
    """Return sines and cosines of 1000 max(t - 1/1000, 0), float64 [B, width]."""
    half = width // 2
    frequency = torch.exp(-math.log(10_000) / (half - 1) * torch.arange(half, dtype=torch.float64))
    angle = (1000 * (time_B - 1e-3)).clamp(min=0)[:, None] * frequency.to(time_B.device)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


# --- the sampler --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A time of the sampler."""

    time: float
    alpha: float
    sigma: float
    ratio: float  # log(alpha / sigma)


def point_at(ratio: float) -> Point:
    """Return the point where log(alpha / sigma) has this value."""
    log_alpha_here = -0.5 * math.log1p(math.exp(-2 * ratio))
    width, start = BETA_END - BETA_START, BETA_START
    time = (-0.5 * start + math.sqrt(0.25 * start**2 - width * log_alpha_here)) / (0.5 * width)
    return Point(time, math.exp(log_alpha_here), math.sqrt(-math.expm1(2 * log_alpha_here)), ratio)


@lru_cache(maxsize=16)
def solver_steps(evaluations: int) -> list[list[Point]]:
    """Return the points of each step of DPM-Solver-fast: where it starts, evaluates within, and ends."""
    time = torch.tensor([1.0, LAST_TIME], dtype=torch.float64)
    first, last = (log_alpha(time) - sigma_of(time).log()).tolist()
    count, rest = evaluations // 3 + 1, evaluations % 3
    orders = [3] * (count - 2) + [2, 1] if rest == 0 else [3] * (count - 1) + [rest]
    edges = [first + (last - first) * step / count for step in range(count + 1)]
    return [
        [point_at(start + (end - start) * place / order) for place in range(order + 1)]
        for order, start, end in zip(orders, edges[:-1], edges[1:], strict=True)
    ]


def evaluation_times(evaluations: int) -> list[float]:
    """Return the times at which the sampler asks the network, [E]."""
    return [point.time for points in solver_steps(evaluations) for point in points[:-1]]


def sample(noise: Noise, start_BD: Tensor, evaluations: int) -> Tensor:
    """Return x_0 by DPM-Solver-fast from x_1, [B, D] (Lu et al. 2022, Algorithms 1 and 2, r = 1/2 and r = 1/3, 2/3)."""
    x, number = start_BD, 0
    for begin, *inner, end in solver_steps(evaluations):
        first, step = noise(x, number), end.ratio - begin.ratio
        following = first_order(x, first, begin, end)
        if len(inner) == 1:
            change = noise(first_order(x, first, begin, inner[0]), number + 1) - first
            following = following - end.sigma * math.expm1(step) * change
        elif len(inner) == 2:
            near, far = inner
            change = noise(first_order(x, first, begin, near), number + 1) - first
            x_far = first_order(x, first, begin, far)
            x_far = x_far - 2 * far.sigma * curvature(far.ratio - begin.ratio) * change
            change = noise(x_far, number + 2) - first
            following = following - 1.5 * end.sigma * curvature(step) * change
        x, number = following, number + 1 + len(inner)
    return x


def first_order(x: Tensor, noise: Tensor, begin: Point, end: Point) -> Tensor:
    """Solve from one point to another as if the noise stayed as it is."""
    return (end.alpha / begin.alpha) * x - end.sigma * math.expm1(end.ratio - begin.ratio) * noise


def curvature(step: float) -> float:
    """Return (e^h - 1) / h - 1."""
    return math.expm1(step) / step - 1


# --- the network --------------------------------------------------------------------------------------------------


class NoiseNetwork(nn.Module):
    """Predicts the noise in x at a time, with or without a condition z."""

    def __init__(self, config: Config, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        self.of_time = glorot(config.hidden, width, generator)  # S, s_b
        self.of_condition = glorot(width, width, generator)  # C, c_b
        self.first = glorot(width, config.hidden, generator)  # W_1, b_1
        self.second = glorot(config.hidden, config.hidden, generator)
        self.third = glorot(config.hidden, width, generator)

    def forward(self, x_BD: Tensor, condition_BD: Tensor, mask_B1: Tensor | float, time_BD: Tensor) -> Tensor:
        """Return the noise, [B, D]; `time_BD`: S tau(t) + s_b."""
        h = x_BD + time_BD + mask_B1 * self.of_condition(condition_BD)
        if self.config.network == "affine":
            product_DD, constant_D = self.collapsed()
            collapsed_BD: Tensor = h @ product_DD + constant_D
            return collapsed_BD
        noise_BD: Tensor = self.third(silu(self.second(silu(self.first(h)))))
        return noise_BD

    def collapsed(self) -> tuple[Tensor, Tensor]:
        """Return P = W_1 W_2 W_3 and what the biases add, [D, D] and [D]: the three layers without activation."""
        product: Tensor = self.first.weight.T
        constant: Tensor = self.first.bias
        for layer in (self.second, self.third):
            product, constant = product @ layer.weight.T, constant @ layer.weight.T + layer.bias
        return product, constant

    def time_shifts(self, times: Tensor) -> Tensor:
        """Return S tau(t) + s_b, [B, D]."""
        shift_BD: Tensor = self.of_time(time_embedding(times, self.config.hidden))
        return shift_BD

    def guided(self, condition_BD: Tensor) -> Noise:
        """Return the guided noise of these conditions: noise_0 + s (noise_c - noise_0)."""
        strength = self.config.guidance
        times = torch.tensor(evaluation_times(self.config.evaluations), dtype=torch.float64)
        shift_ED = self.time_shifts(times.to(condition_BD.device))
        if self.config.network == "affine":  # guidance is then a factor on the condition
            product_DD, constant_D = self.collapsed()
            known_BD = (strength * self.of_condition(condition_BD)) @ product_DD + constant_D
            known_ED = shift_ED @ product_DD
            return lambda x_BD, number: torch.addmm(known_BD + known_ED[number], x_BD, product_DD)

        def noise(x_BD: Tensor, number: int) -> Tensor:
            free, bound = (self(x_BD, condition_BD, mask, shift_ED[number]) for mask in (0.0, 1.0))
            guided_BD: Tensor = free + strength * (bound - free)
            return guided_BD

        return noise

    @torch.no_grad()
    def generate(self, start_BD: Tensor, condition_BD: Tensor) -> Tensor:
        """Return x_0 of each user, [B, D]; with `affine` by a matrix that probes give."""
        evaluations, width = self.config.evaluations, start_BD.shape[1]
        if self.config.network == "mlp":
            return sample(self.guided(condition_BD), start_BD, evaluations)
        unit = torch.eye(width).to(start_BD)
        zero = torch.zeros_like(unit)
        starts, conditions = torch.cat([zero[:1], unit, zero]), torch.cat([zero[:1], zero, unit])
        probed = sample(self.guided(conditions), starts, evaluations)
        constant_D, of_start, of_condition = probed.split_with_sizes([1, width, width])
        return constant_D + start_BD @ (of_start - constant_D) + condition_BD @ (of_condition - constant_D)


# --- the model ----------------------------------------------------------------------------------------------------


class DiffCDR(MappedUsers):
    """The denoising network and the alignment layer."""

    def __init__(self, config: Config, base: BaseVectors, users: int, seed: int, generator: torch.Generator) -> None:
        super().__init__(config, base)
        width = base.source_users.shape[1]
        source_scale, self.scale = (
            root_mean_length(vectors[:users]) / width**0.5 for vectors in (base.source_users, base.target_users)
        )
        self.config, self.seed = config, seed
        self.source_PD, self.target_OD = base.source_users / source_scale, base.target_users[:users] / self.scale
        self.network = NoiseNetwork(config, width, generator)
        self.align = glorot(width, width, generator, bias=False)  # F
        nn.init.eye_(self.align.weight)  # training starts from what is generated (ours)

    def generated(self, row_B: Tensor, samples: int, generator: torch.Generator) -> Tensor:
        """Return x_0 of source users, the mean of as many draws where sampling starts from noise, [B, D]."""
        condition_BD: Tensor = self.source_PD[row_B]
        if not self.config.diffusion:
            return condition_BD
        if self.config.start == "source":
            return self.network.generate(condition_BD, condition_BD)
        drawn = [torch.randn(condition_BD.shape, generator=generator, dtype=torch.float64) for _ in range(samples)]
        draws = [self.network.generate(start_BD.to(condition_BD.device), condition_BD) for start_BD in drawn]
        return torch.stack(draws).mean(dim=0)

    def mapped(self, row_U: Tensor) -> Tensor:
        """Return x_0 F, [U, D]; the same for the same users and seed."""
        x_0: Tensor = self.generated(row_U, self.config.samples, torch.Generator().manual_seed(self.seed))
        mapped_UD: Tensor = self.scale * self.align(x_0)
        return mapped_UD

    def noise_loss(self, user_B: Tensor, weight_B: Tensor, generator: torch.Generator) -> Tensor:
        """Loss A: the noise in target vectors at times that are even and antithetic, t and 1 - t."""
        users, device = len(user_B), user_B.device
        half = torch.rand((users + 1) // 2, generator=generator, dtype=torch.float64)
        time_B = torch.cat([half, 1 - half])[:users].to(device)
        noise_BD = torch.randn((users, self.target_OD.shape[1]), generator=generator, dtype=torch.float64).to(device)
        kept_B1 = (torch.rand((users, 1), generator=generator, dtype=torch.float64) >= self.config.mask).to(device)
        x_BD = log_alpha(time_B).exp()[:, None] * self.target_OD[user_B] + sigma_of(time_B)[:, None] * noise_BD
        predicted_BD = self.network(x_BD, self.source_PD[user_B], kept_B1, self.network.time_shifts(time_B))
        return smooth_distance(predicted_BD, noise_BD, weight_B)

    def alignment_loss(
        self,
        user_B: Tensor,
        weight_B: Tensor,
        place_N: Tensor,
        item_N: Tensor,
        wanted_N: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """Loss B: distance to the true target vectors, and squares of what the users' ratings lack."""
        aligned_BD = self.align(self.generated(user_B, 1, generator))
        loss = smooth_distance(aligned_BD, self.target_OD[user_B], weight_B)
        if self.config.task_weight > 0:
            lacking_N = wanted_N - dots(self.scale * aligned_BD, place_N, self.base.target_items, item_N)
            loss = loss + self.config.task_weight * lacking_N.square().mean()
        return loss


def smooth_distance(made_BD: Tensor, wanted_BD: Tensor, weight_B: Tensor) -> Tensor:
    """Return the weighted mean over users of smooth_l1, itself a mean over the vector's numbers."""
    return (weight_B * smooth_l1_loss(made_BD, wanted_BD, reduction="none").mean(dim=1)).mean()
