"""SSCDR: semi-supervised cross-domain recommendation (Kang, Hwang, Lee and Yu, CIKM 2019, pp. 1563-1572).

A mapping between domains is learned from few shared users. They are the labelled examples; source-domain items are the
unlabelled ones: f must keep distances, so that the items that a user liked are mapped near the user's target vector, nearer
than items that the user has not rated, by a margin:

    L_S = mean over u of |f(z_u) - z_u^t|^2
    L_U = mean over (u, j, k) of max(0, margin + |f(q_j) - z_u^t|^2 - |f(q_k) - z_u^t|^2),        L = L_S + lambda_u L_U

A cold-start user's vector is inferred from several hops of neighbours in the source domain, not from the user's own vector
alone: z = mean over h <= hops of f(n_h), n_0 = z_s, n_1 = A q, n_2 = A A' z_s, n_3 = A A' A q. A averages over the items
that a user liked, A' over the users who liked an item. How the paper weighs hops could not be read: this form is (ours),
`hops: 0` is public code. The paper's base is a metric space; like MuSiC's comparison, ours are the common base vectors,
divided by the root mean |z_t|^2 so that the margin has a unit (ours). Everything is float64.

Shapes: B users of a batch, T triples, O training overlapping users, P source users, D width of the base vectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from features.checks import choice, flag, number, refuse, whole
from trainables.base_factors import OFFSETS, BaseVectors, base_vectors
from trainables.interface import Epoch, Selection, Setup, Variant
from trainables.mapped_users import (
    USER_WEIGHTS,
    MappedUsers,
    glorot,
    perceptron,
    root_mean_length,
    rows_of,
    squared_distance,
    take_step,
    user_batches,
    user_weights,
)
from trainables.source_graph import Positives, Unrated, averages, positives
from trainables.tasks.rating import Task

NAME = "SSCDR"
TASK_TYPE = "ratings"
SELECTION = Selection("val_rmse", "minimize")

MAPPINGS = ("linear", "mlp")
HIDDEN = 128  # units of the perceptron (public code's)

ABLATIONS = {
    "plain": Variant(config={"rating_offset": "none", "calibrate": False}),  # as published: a rating is a dot product
    "wo_unlabelled": Variant(config={"lambda_u": 0.0}),  # EMCDR
    "wo_hops": Variant(config={"hops": 0}),
    "mlp": Variant(config={"mapping": "mlp"}),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Hyperparameters."""

    lambda_u: float = 1.0  # lambda, weight of the unlabelled loss (public code)
    margin: float = 1.0  # of the hinge, in mean squared lengths of a target vector
    mapping: str = "linear"  # f: linear with a bias (public code) | mlp (D -> 128 -> D, tanh; public code)
    hops: int = 1  # neighbours that a cold-start user's vector is inferred from, 0 to 3 (ours)
    known_neighbours: bool = False  # in the second hop, users whose target vector is known stand with it (ours)
    user_weight: str = "user"  # what counts alike in L_S: user | ratings (public code; ours: user)
    dim: int = 10  # factors of a base vector (ours)
    ridge: float = 15.0  # penalty on the factors' squares, in ratings, above 0 (ours)
    lr: float = 1e-3  # Adam's
    batch: int = 128  # users of a step
    epochs: int = 60
    patience: int = 15  # epochs without a better validation RMSE before training ends (ours)
    rating_offset: str = "source_offset"  # see trainables.base_factors: none (the paper's) | item_mean | source_offset
    calibrate: bool = True  # z . x is scaled by a gain in [0, 1] fitted on the validation users (ours)

    def __post_init__(self) -> None:
        refuse(
            choice(self, "mapping", MAPPINGS),
            choice(self, "rating_offset", OFFSETS),
            choice(self, "user_weight", USER_WEIGHTS),
            *(number(self, name, least=0) for name in ("lambda_u", "margin")),
            *(number(self, name, above=0) for name in ("ridge", "lr")),
            *(flag(self, name) for name in ("known_neighbours", "calibrate")),
            whole(self, "hops", least=0, most=3),
            *(whole(self, name, least=1) for name in ("dim", "batch", "epochs", "patience")),
        )


def train(config: Config, task: Task, seed: int) -> Iterator[Setup | Epoch]:
    """Factorise both domains, and learn f on the overlapping users and on what they liked in the source domain."""
    base = base_vectors(task, config.dim, config.ridge, config.rating_offset, seed)
    liked, unrated = positives(task, seed), Unrated(task, len(task.source))
    generator = torch.Generator().manual_seed(seed)
    model = SSCDR(config, base, liked, len(task.source), generator)
    adam = torch.optim.Adam(model.mapping.parameters(), lr=config.lr, fused=True)
    yield Setup(model, adam=adam, generator=generator)
    users, weight_O = len(task.source), user_weights(task, config.user_weight)
    rows = int(liked.starts[users])  # positives of the overlapping users come first
    while True:
        total, negative_N, asked_N = 0.0, liked.item[:rows], torch.zeros(rows, dtype=torch.bool, device=task.device)
        if config.lambda_u > 0:
            negative_N, asked_N = drawn_negatives(liked, unrated, rows, generator)
        for batch in user_batches(users, config.batch, generator, task.device):
            loss = model.labelled_loss(batch, weight_O[batch])
            row_T, place_T = rows_of(liked.starts, batch)
            row_T, place_T = row_T[asked_N[row_T]], place_T[asked_N[row_T]]
            if len(row_T):
                user_T = batch[place_T]
                loss = loss + config.lambda_u * model.unlabelled_loss(user_T, liked.item[row_T], negative_N[row_T])
            total += len(batch) * take_step(adam, loss)
        yield model.epoch(task, total / users)


def drawn_negatives(liked: Positives, unrated: Unrated, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw an unrated item for each of the first positive rows; return them, and which rows have one, both [rows]."""
    user_N = liked.user[:rows].cpu()
    asked_N, negative_N = unrated.askable[user_N], torch.zeros(rows, dtype=torch.int64)
    negative_N[asked_N] = unrated.draw(user_N[asked_N], generator)
    return negative_N.to(liked.user.device), asked_N.to(liked.user.device)


class SSCDR(MappedUsers):
    """The mapping f, and the neighbours that a user's vector is inferred from."""

    def __init__(
        self, config: Config, base: BaseVectors, liked: Positives, users: int, generator: torch.Generator
    ) -> None:
        super().__init__(config, base)
        self.config, self.liked = config, liked
        self.scale = root_mean_length(base.target_users[:users])
        self.source_PD, self.target_OD = base.source_users / self.scale, base.target_users[:users] / self.scale
        self.items_JD = base.source_items / self.scale
        if config.rating_offset == "item_mean":
            self.items_JD[:, 0] = 0.0  # an item enters f as [0, q]: it has no user bias
        self.hops_PD = averages(liked, self.source_PD, self.items_JD, config.hops)
        if config.rating_offset == "item_mean":
            for hop_PD in self.hops_PD:
                hop_PD[:, 0] = self.source_PD[:, 0]  # neighbours speak of taste; the bias is the user's (ours)
        self.lonely_P = liked.starts.diff() == 0
        width = self.source_PD.shape[1]
        linear = config.mapping == "linear"
        self.mapping: nn.Module = glorot(width, width, generator) if linear else perceptron(width, HIDDEN, generator)

    def labelled_loss(self, user_B: Tensor, weight_B: Tensor) -> Tensor:
        """L_S of these overlapping users."""
        return squared_distance(self.mapping(self.source_PD[user_B]), self.target_OD[user_B], weight_B)

    def unlabelled_loss(self, user_T: Tensor, positive_T: Tensor, negative_T: Tensor) -> Tensor:
        """L_U of these triples."""
        mapped_TD = self.mapping(self.items_JD[torch.cat([positive_T, negative_T])])
        near_T, far_T = (mapped_TD - self.target_OD[user_T].repeat(2, 1)).square().sum(dim=1).chunk(2)
        hinge_T: Tensor = (self.config.margin + near_T - far_T).clamp(min=0)
        return hinge_T.mean()

    def mapped(self, row_U: Tensor) -> Tensor:
        """Return the mean over hops of f(n_h), [U, D]; f(n_0) for a user who liked nothing."""
        own_UD: Tensor = self.mapping(self.source_PD[row_U])
        hops = [self.mapping(hop_PD[row_U]) for hop_PD in self.hops_PD]
        if self.config.known_neighbours and self.config.hops >= 2:
            hops[1] = self.known_neighbours()[row_U]
        lonely_U1 = self.lonely_P[row_U][:, None]
        mean_UD: Tensor = torch.stack([own_UD, *(torch.where(lonely_U1, own_UD, hop_UD) for hop_UD in hops)]).mean(
            dim=0
        )
        mean_UD *= self.scale
        return mean_UD

    def known_neighbours(self) -> Tensor:
        """Return A A' of the target vectors: the known ones of overlapping users, f(z_s) of others, [P, D]."""
        known_PD = torch.cat([self.target_OD, self.mapping(self.source_PD[len(self.target_OD) :])])
        return averages(self.liked, known_PD, self.items_JD, 2)[1]
