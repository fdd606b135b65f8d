"""EMCDR: embedding and mapping for cross-domain recommendation (Man, Shen, Jin and Cheng, IJCAI 2017, pp. 2464-2470).

Each domain is factorised by itself; a mapping f from a user's source-domain vector to the target-domain vector is learned
on users of both domains; a cold-start user is given f of the source-domain vector. In the paper's order: the latent
factors are `trainables.base_factors` (eq. 2), then the mapping, linear or a multi-layer perceptron, then the prediction.
What the paper leaves open, or what is done in another way, is marked (ours). The default predicts what the offset leaves
of a rating, and believes as much of it as validation users bear out; the ablation `plain` is the published form.

Shapes: U users, O training overlapping users, N ratings, D width of the base vectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from features.checks import choice, number, refuse, whole
from trainables.base_factors import OFFSETS, BaseVectors, base_vectors
from trainables.calibration import cross_fitted_gain
from trainables.interface import Epoch, Selection, Setup, Variant
from trainables.tasks.rating import HeldOut, Task

NAME = "EMCDR"
TASK_TYPE = "ratings"
SELECTION = Selection("val_rmse", "minimize")

MAPPINGS = ("linear", "mlp", "copy")
BATCH_USERS = 16  # of a gradient step of the perceptron (the paper's)

ABLATIONS = {
    "plain": Variant(config={"rating_offset": "none", "calibrate": False}),  # as published: a rating is a dot product
    "mlp": Variant(config={"mapping": "mlp"}),
    "active_half": Variant(config={"active_share": 0.5}),
    "copy": Variant(config={"mapping": "copy"}),  # what the mapping is worth
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Hyperparameters; the paper chooses learning rate and penalties by cross-validation."""

    mapping: str = "linear"  # f: linear | mlp (both the paper's) | copy (f(z) = z, ours)
    map_ridge: float = 0.01  # lambda_M, penalty on the linear map's squared entries, above 0
    dim: int = 10  # K, factors of a base vector (ours; the paper: 20, 50, 100)
    ridge: float = 15.0  # lambda, penalty on the factors' squares, in ratings, above 0 (ours)
    active_share: float = 1.0  # share of the overlapping users that teach f: those with most target ratings (Figure 2)
    hidden_ratio: int = 2  # hidden units of the perceptron, in multiples of D
    lr: float = 1e-3  # step size of the perceptron's Adam (ours; the paper: gradient descent)
    epochs: int = 100  # of the perceptron (ours); the other mappings are solved in one
    patience: int = 15  # epochs without a better validation RMSE before training ends (ours)
    rating_offset: str = "source_offset"  # see trainables.base_factors: none (the paper's) | item_mean | source_offset
    calibrate: bool = True  # z . x is scaled by a gain in [0, 1] fitted on the validation users (ours)

    def __post_init__(self) -> None:
        refuse(
            choice(self, "mapping", MAPPINGS),
            choice(self, "rating_offset", OFFSETS),
            *(number(self, name, above=0) for name in ("map_ridge", "ridge", "lr")),
            number(self, "active_share", above=0, most=1),
            *(whole(self, name, least=1) for name in ("dim", "hidden_ratio", "epochs", "patience")),
        )


def train(config: Config, task: Task, seed: int) -> Iterator[Setup | Epoch]:
    """Factorise both domains, learn f on the active overlapping users, and predict from what it makes of the others."""
    base = base_vectors(task, config.dim, config.ridge, config.rating_offset, seed)
    users = most_active(task, config.active_share)
    source_UD, target_UD = base.source_users[users], base.target_users[users]
    if config.mapping != "mlp":
        mapping = nn.Identity() if config.mapping == "copy" else linear_map(source_UD, target_UD, config.map_ridge)
        yield EMCDR(config, base, mapping).epoch(task, squared_distance(mapping(source_UD), target_UD).item())
        return
    generator = torch.Generator().manual_seed(seed)
    model = EMCDR(config, base, perceptron(source_UD.shape[1], config.hidden_ratio, generator))
    adam = torch.optim.Adam(model.mapping.parameters(), lr=config.lr, fused=True)
    yield Setup(model, adam=adam, generator=generator)
    while True:
        yield model.epoch(task, train_epoch(model.mapping, adam, source_UD, target_UD, generator))


# --- the mapping --------------------------------------------------------------------------------------------------


def most_active(task: Task, share: float) -> Tensor:
    """Return the overlapping users with the most target ratings, that share of them, int64 [U]; of equals the first."""
    counts_O = torch.bincount(task.overlapping.user, minlength=len(task.source))
    count = max(1, round(share * len(counts_O)))
    return counts_O.argsort(descending=True, stable=True)[:count].sort().values


def squared_distance(mapped_UD: Tensor, target_UD: Tensor) -> Tensor:
    """Return the mean over users of |f(z_s) - z_t|^2, the loss of either mapping."""
    return (mapped_UD - target_UD).square().sum(dim=1).mean()


@torch.no_grad()
def linear_map(source_UD: Tensor, target_UD: Tensor, ridge: float) -> nn.Module:
    """Solve f(z) = z M: M = (Z_s^T Z_s + lambda_M I)^-1 Z_s^T Z_t, [D, D]."""
    gram = source_UD.T @ source_UD + ridge * torch.eye(source_UD.shape[1]).to(source_UD)
    linear = nn.Linear(len(gram), len(gram), bias=False).to(source_UD)
    linear.weight.copy_(torch.linalg.solve(gram, source_UD.T @ target_UD).T)
    return linear


def perceptron(width: int, hidden_ratio: int, generator: torch.Generator) -> nn.Module:
    """Make f(z) = tanh(z W_1 + b_1) W_2 + b_2 of float64, started after Glorot; the output is not squashed (ours)."""
    inner, outer = nn.Linear(width, hidden_ratio * width), nn.Linear(hidden_ratio * width, width)
    for layer in (inner, outer):
        nn.init.xavier_uniform_(layer.weight, generator=generator)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(inner, nn.Tanh(), outer).double()


def train_epoch(
    mapping: nn.Module, adam: torch.optim.Optimizer, source_UD: Tensor, target_UD: Tensor, generator: torch.Generator
) -> float:
    """Visit all users once in random order, a gradient step for each batch; return the mean loss of a user."""
    total = 0.0
    order = torch.randperm(len(source_UD), generator=generator).to(source_UD.device)
    for batch in torch.split(order, BATCH_USERS):
        adam.zero_grad()
        loss = squared_distance(mapping(source_UD[batch]), target_UD[batch])
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
        total += len(batch) * loss.item()
    return total / len(source_UD)


# --- the prediction -----------------------------------------------------------------------------------------------


class EMCDR(nn.Module):
    """The mapping f, the base vectors that it reads, and the gain on what it predicts."""

    gain: Tensor

    def __init__(self, config: Config, base: BaseVectors, mapping: nn.Module) -> None:
        super().__init__()
        self.config, self.base, self.mapping = config, base, mapping
        self.register_buffer("gain", torch.ones((), device=base.item_offset.device))

    def predict(self, held_out: HeldOut, task: Task, seed: int) -> Tensor:
        """Return ratings [N] of cold-start users, not cut to the scale: offset + gain * f(z_s) . x."""
        offset_N, dot_N = self.terms(held_out)
        return offset_N + self.gain * dot_N

    def terms(self, held_out: HeldOut) -> tuple[Tensor, Tensor]:
        """Return the offset and f(z_s) . x of each rating, both float32 [N]."""
        ratings = held_out.ratings
        mapped_UD = self.mapping(self.base.source_users[held_out.source_row])
        dot_N = (mapped_UD[ratings.user] * self.base.target_items[ratings.item]).sum(dim=1)
        return self.base.offset(held_out), dot_N.float()

    @torch.no_grad()
    def epoch(self, task: Task, loss: float) -> Epoch:
        """Fit the gain on the validation users, and predict each half of them with the gain of the other half."""
        ratings = task.validation.ratings
        offset_N, dot_N = self.terms(task.validation)
        gain_N = self.gain
        if self.config.calibrate:
            gain_N, gain = cross_fitted_gain(dot_N, ratings.rating - offset_N, ratings.user)
            self.gain.fill_(gain)
        mapped_UD = self.mapping(self.base.source_users[task.validation.source_row])
        real_UD = self.base.target_users[: len(task.source)]
        variance, real = (float(z.var(dim=0, correction=0).mean()) for z in (mapped_UD, real_UD))
        metrics = {
            "train_loss": loss,
            "variance_ratio": variance / real if real else float("nan"),
            "gain": float(self.gain),
        }
        return Epoch(predict=self.predict, metrics=metrics, validation=offset_N + gain_N * dot_N)
