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
from trainables.interface import Epoch, Selection, Setup, Variant
from trainables.mapped_users import (
    USER_WEIGHTS,
    MappedUsers,
    perceptron,
    squared_distance,
    take_step,
    user_batches,
    user_weights,
)
from trainables.tasks.rating import Task

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
    user_weight: str = "user"  # what counts alike in the mapping's loss: user | ratings (public code; ours: user)
    rating_offset: str = "source_offset"  # see trainables.base_factors: none (the paper's) | item_mean | source_offset
    calibrate: bool = True  # z . x is scaled by a gain in [0, 1] fitted on the validation users (ours)

    def __post_init__(self) -> None:
        refuse(
            choice(self, "mapping", MAPPINGS),
            choice(self, "rating_offset", OFFSETS),
            choice(self, "user_weight", USER_WEIGHTS),
            *(number(self, name, above=0) for name in ("map_ridge", "ridge", "lr")),
            number(self, "active_share", above=0, most=1),
            *(whole(self, name, least=1) for name in ("dim", "hidden_ratio", "epochs", "patience")),
        )


def train(config: Config, task: Task, seed: int) -> Iterator[Setup | Epoch]:
    """Factorise both domains, learn f on the active overlapping users, and predict from what it makes of the others."""
    base = base_vectors(task, config.dim, config.ridge, config.rating_offset, seed)
    users = most_active(task, config.active_share)
    source_UD, target_UD = base.source_users[users], base.target_users[users]
    weight_U = user_weights(task, config.user_weight)[users]
    if config.mapping != "mlp":
        root_U1 = weight_U.sqrt()[:, None]
        solved = linear_map(root_U1 * source_UD, root_U1 * target_UD, config.map_ridge)
        mapping = nn.Identity() if config.mapping == "copy" else solved
        yield EMCDR(config, base, mapping).epoch(task, squared_distance(mapping(source_UD), target_UD, weight_U).item())
        return
    generator = torch.Generator().manual_seed(seed)
    width = source_UD.shape[1]
    model = EMCDR(config, base, perceptron(width, config.hidden_ratio * width, generator))
    adam = torch.optim.Adam(model.mapping.parameters(), lr=config.lr, fused=True)
    yield Setup(model, adam=adam, generator=generator)
    while True:
        yield model.epoch(task, train_epoch(model.mapping, adam, source_UD, target_UD, weight_U, generator))


# --- the mapping --------------------------------------------------------------------------------------------------


def most_active(task: Task, share: float) -> Tensor:
    """Return the overlapping users with the most target ratings, that share of them, int64 [U]; of equals the first."""
    counts_O = torch.bincount(task.overlapping.user, minlength=len(task.source))
    count = max(1, round(share * len(counts_O)))
    return counts_O.argsort(descending=True, stable=True)[:count].sort().values


@torch.no_grad()
def linear_map(source_UD: Tensor, target_UD: Tensor, ridge: float) -> nn.Module:
    """Solve f(z) = z M: M = (Z_s^T Z_s + lambda_M I)^-1 Z_s^T Z_t, [D, D]."""
    gram = source_UD.T @ source_UD + ridge * torch.eye(source_UD.shape[1]).to(source_UD)
    linear = nn.Linear(len(gram), len(gram), bias=False).to(source_UD)
    linear.weight.copy_(torch.linalg.solve(gram, source_UD.T @ target_UD).T)
    return linear


def train_epoch(
    mapping: nn.Module,
    adam: torch.optim.Optimizer,
    source_UD: Tensor,
    target_UD: Tensor,
    weight_U: Tensor,
    generator: torch.Generator,
) -> float:
    """Visit all users once in random order, a gradient step for each batch; return the mean loss of a user."""
    total = 0.0
    for batch in user_batches(len(source_UD), BATCH_USERS, generator, source_UD.device):
        loss = squared_distance(mapping(source_UD[batch]), target_UD[batch], weight_U[batch])
        total += len(batch) * take_step(adam, loss)
    return total / len(source_UD)


# --- the prediction -----------------------------------------------------------------------------------------------


class EMCDR(MappedUsers):
    """The mapping f and the base vectors that it reads."""

    def __init__(self, config: Config, base: BaseVectors, mapping: nn.Module) -> None:
        super().__init__(config, base)
        self.mapping = mapping

    def mapped(self, row_U: Tensor) -> Tensor:
        """Return f(z_s), [U, D]."""
        mapped_UD: Tensor = self.mapping(self.base.source_users[row_U])
        return mapped_UD
