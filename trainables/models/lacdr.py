"""LACDR: low-dimensional alignment for cross-domain recommendation (Wang, Zhuang and others, CIKM 2021, pp. 3508-3512).

The map between domains is a target decoder behind a source encoder, z_t = D_t(E_s(z_s)): vectors are aligned in a low
dimension. Users of one domain alone train the autoencoders too. With h < D hidden numbers the loss is

    mean over all source users |D_s E_s z - z|^n + mean over all target users |D_t E_t z - z|^n
        + align_weight * mean over training overlapping users |E_s z_s - E_t z_t|^n,       n = 2 or 1 (`norm`)

Known from the abstract and from the code of others: the norm, the depth of the networks and whether they are tuned on
ratings are not printed there. Squares, linear networks and no tuning are the defaults (ours); means, where public code
adds up, and one row a user, where it visits ratings, are (ours) too. Everything is float64.

Shapes: U users, O training overlapping users, P source users, S side users, D width of the base vectors, h hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from features.checks import choice, flag, number, refuse, whole
from trainables.base_factors import OFFSETS, BaseVectors, base_vectors
from trainables.interface import Epoch, Selection, Setup, Variant
from trainables.mapped_users import USER_WEIGHTS, MappedUsers, glorot, take_step, user_batches, user_weights
from trainables.tasks.rating import Task

NAME = "LACDR"
TASK_TYPE = "ratings"
SELECTION = Selection("val_rmse", "minimize")

NORMS = ("l2", "l2_squared")
LAYERS = ("linear", "mlp")

ABLATIONS = {
    "plain": Variant(config={"rating_offset": "none", "calibrate": False}),  # as published: a rating is a dot product
    "wo_single": Variant(config={"single_users": False}),  # overlapping users only, as public code has it
    # Its target decoder has nothing to learn from: what predicts is a random map, and the gain takes it to about nothing.
    "wo_reconstruction": Variant(config={"reconstruction": False}),
    "full_rank": Variant(config={"hidden_share": 1.0}),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Hyperparameters."""

    hidden_share: float = 0.4  # h / D, in (0, 1]; public code: 4 of 10
    align_weight: float = 2.0  # alpha, weight of the alignment (public code)
    norm: str = "l2_squared"  # n: l2 (public code) | l2_squared (ours)
    layers: str = "linear"  # of encoders and decoders: linear (public code) | mlp (one tanh layer of D units; recalled)
    single_users: bool = True  # users of one domain alone are reconstructed too
    reconstruction: bool = True
    user_weight: str = "user"  # what counts alike in the alignment: user | ratings (public code; ours: user)
    dim: int = 10  # factors of a base vector (ours)
    ridge: float = 15.0  # penalty on the factors' squares, in ratings, above 0 (ours)
    lr: float = 1e-3  # Adam's
    batch: int = 64  # overlapping users of a step
    epochs: int = 60
    patience: int = 15  # epochs without a better validation RMSE before training ends (ours)
    rating_offset: str = "source_offset"  # see trainables.base_factors: none (the paper's) | item_mean | source_offset
    calibrate: bool = True  # z . x is scaled by a gain in [0, 1] fitted on the validation users (ours)

    def __post_init__(self) -> None:
        refuse(
            choice(self, "norm", NORMS),
            choice(self, "layers", LAYERS),
            choice(self, "rating_offset", OFFSETS),
            choice(self, "user_weight", USER_WEIGHTS),
            number(self, "hidden_share", above=0, most=1),
            number(self, "align_weight", least=0),
            *(number(self, name, above=0) for name in ("ridge", "lr")),
            *(flag(self, name) for name in ("single_users", "reconstruction", "calibrate")),
            *(whole(self, name, least=1) for name in ("dim", "batch", "epochs", "patience")),
        )


def train(config: Config, task: Task, seed: int) -> Iterator[Setup | Epoch]:
    """Factorise both domains, and align their vectors in a low dimension."""
    base = base_vectors(task, config.dim, config.ridge, config.rating_offset, seed)
    generator = torch.Generator().manual_seed(seed)
    model = LACDR(config, base, generator)
    adam = torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)
    yield Setup(model, adam=adam, generator=generator)
    pairs = len(task.source)
    source_UD, target_UD = base.source_users, base.target_users
    source_OD, target_OD, weight_O = source_UD[:pairs], target_UD[:pairs], user_weights(task, config.user_weight)
    if not config.single_users:
        source_UD, target_UD = source_OD, target_OD
    if config.norm == "l2_squared" and config.layers == "linear":
        source_UD, target_UD = equivalent_rows(source_UD), equivalent_rows(target_UD)
    while True:
        total = 0.0
        for batch in user_batches(pairs, config.batch, generator, task.device):
            loss = config.align_weight * model.misalignment(source_OD[batch], target_OD[batch], weight_O[batch])
            if config.reconstruction:
                loss = loss + model.source.loss(source_UD) + model.target.loss(target_UD)
            total += len(batch) * take_step(adam, loss)
        yield model.epoch(task, total / pairs)


@torch.no_grad()
def equivalent_rows(vectors_UD: Tensor) -> Tensor:
    """Return at most D rows whose mean |z M|^2 is that of the users for every matrix M: with Z = Q R, |Z M| = |R M|.

    A step then costs no pass over the users.
    """
    rows_DD: Tensor = torch.linalg.qr(vectors_UD, mode="r").R
    rows_DD *= (len(rows_DD) / len(vectors_UD)) ** 0.5
    return rows_DD


class Autoencoder(nn.Module):
    """Encoder E and decoder D of one domain."""

    def __init__(self, config: Config, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.norm, hidden = config.norm, max(1, round(config.hidden_share * width))
        self.encode, self.decode = (
            network(config.layers, inputs, outputs, width, generator)
            for inputs, outputs in ((width, hidden), (hidden, width))
        )

    def loss(self, vectors_UD: Tensor) -> Tensor:
        """Return the mean of |D E z - z|^n."""
        return lengths(self.decode(self.encode(vectors_UD)) - vectors_UD, self.norm).mean()


def network(layers: str, inputs: int, outputs: int, width: int, generator: torch.Generator) -> nn.Module:
    """Make an encoder or a decoder: a matrix, or a layer of `width` tanh units between two."""
    if layers == "linear":
        return glorot(inputs, outputs, generator, bias=False)
    return nn.Sequential(glorot(inputs, width, generator), nn.Tanh(), glorot(width, outputs, generator))


def lengths(vectors_UD: Tensor, norm: str) -> Tensor:
    """Return |z|^n of each row, [U]."""
    square_U = vectors_UD.square().sum(dim=1)
    return square_U if norm == "l2_squared" else (square_U + 1e-12).sqrt()  # the root has no slope at 0


class LACDR(MappedUsers):
    """The autoencoders of both domains."""

    def __init__(self, config: Config, base: BaseVectors, generator: torch.Generator) -> None:
        super().__init__(config, base)
        width = base.source_users.shape[1]
        self.source, self.target = (Autoencoder(config, width, generator) for _ in range(2))

    def mapped(self, row_U: Tensor) -> Tensor:
        """Return D_t(E_s(z_s)), [U, D]."""
        mapped_UD: Tensor = self.target.decode(self.source.encode(self.base.source_users[row_U]))
        return mapped_UD

    def misalignment(self, source_BD: Tensor, target_BD: Tensor, weight_B: Tensor) -> Tensor:
        """Return the mean of |E_s z_s - E_t z_t|^n."""
        between_Bh = self.source.encode(source_BD) - self.target.encode(target_BD)
        return (weight_B * lengths(between_Bh, self.source.norm)).mean()
