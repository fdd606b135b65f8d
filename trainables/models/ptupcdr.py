"""PTUPCDR: personalised transfer of user preferences (Zhu, Tang, Liu and others, WSDM 2022, arXiv 2110.11154).

A meta network reads what a user liked in the source domain and writes that user's own map to the target domain. In the
paper's order: the characteristic encoder, attention over the vectors of liked items,

    a_j = w_2 . ReLU(q_j W_1 + b_1),     c_u = sum over j of softmax(a)_j q_j

the meta network M_u = reshape(ReLU(c_u W_3 + b_3) W_4 + b_4) of D x D, the bridge z = z_s M_u, and the task: squares of
ratings of the target domain, not of distances to a target vector that may be poor. Only these networks learn. Training
starts from the identity, W_4 = 0 and b_4 = vec(I) (ours), that is, from the source vector; item vectors enter divided by
their root mean length, so that the meta network sees the same scale in every cell (ours). Everything is float64.

Shapes: B users of a batch, L longest history of a batch, N ratings, D width of the base vectors, H hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from features.checks import choice, dropout_share, flag, number, refuse, whole
from trainables.base_factors import OFFSETS, BaseVectors, base_vectors
from trainables.interface import Epoch, Selection, Setup, Variant
from trainables.mapped_users import (
    MappedUsers,
    dots,
    glorot,
    root_mean_length,
    rows_of,
    squared_distance,
    take_step,
    user_batches,
)
from trainables.source_graph import Positives, positives
from trainables.tasks.rating import Task

NAME = "PTUPCDR"
TASK_TYPE = "ratings"
SELECTION = Selection("val_rmse", "minimize")

LOSSES = ("ratings", "mapping")

ABLATIONS = {
    "plain": Variant(config={"rating_offset": "none", "calibrate": False}),  # as published: a rating is a dot product
    "shared": Variant(config={"personal": False}),  # one map for all, trained on ratings
    "mean_history": Variant(config={"attention": False}),
    "mapping_loss": Variant(config={"loss": "mapping"}),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Hyperparameters."""

    meta_hidden: int = 50  # H, hidden units of the meta network (public code: 5 D)
    history: int = 20  # items that a user liked last; 0: all
    personal: bool = True  # a map for each user; false: one for all, b_4 alone
    attention: bool = True  # over the history; false: its mean
    loss: str = "ratings"  # ratings | mapping (|z - z_t|^2, as EMCDR)
    weight_decay: float = 0.0  # Adam's, on all weights
    dropout: float = 0.0  # of the meta network's hidden layer (ours)
    dim: int = 10  # factors of a base vector (public code's)
    ridge: float = 15.0  # penalty on the factors' squares, in ratings, above 0 (ours)
    lr: float = 1e-3  # Adam's (public code: 1e-2)
    batch: int = 64  # users of a step, with all their ratings
    epochs: int = 40
    patience: int = 15  # epochs without a better validation RMSE before training ends (ours)
    rating_offset: str = "source_offset"  # see trainables.base_factors: none (the paper's) | item_mean | source_offset
    calibrate: bool = True  # z . x is scaled by a gain in [0, 1] fitted on the validation users (ours)

    def __post_init__(self) -> None:
        refuse(
            choice(self, "loss", LOSSES),
            choice(self, "rating_offset", OFFSETS),
            *(number(self, name, above=0) for name in ("ridge", "lr")),
            number(self, "weight_decay", least=0),
            dropout_share(self),
            *(flag(self, name) for name in ("personal", "attention", "calibrate")),
            whole(self, "history", least=0),
            *(whole(self, name, least=1) for name in ("meta_hidden", "dim", "batch", "epochs", "patience")),
        )


def train(config: Config, task: Task, seed: int) -> Iterator[Setup | Epoch]:
    """Factorise both domains, and learn to write maps that predict the overlapping users' target ratings."""
    base = base_vectors(task, config.dim, config.ridge, config.rating_offset, seed)
    generator = torch.Generator().manual_seed(seed)
    model = PTUPCDR(config, base, positives(task, seed), generator)
    adam = torch.optim.Adam(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    yield Setup(model, adam=adam, generator=generator)
    users, starts = len(task.source), task.overlapping.starts
    while True:
        total = 0.0
        for batch in user_batches(users, config.batch, generator, task.device):
            row_N, place_N = rows_of(starts, batch)
            loss = model.loss(batch, place_N, task.overlapping.item[row_N], base.residual[row_N])
            total += len(batch) * take_step(adam, loss)
        yield model.epoch(task, total / users)


class PTUPCDR(MappedUsers):
    """The characteristic encoder and the meta network."""

    def __init__(self, config: Config, base: BaseVectors, liked: Positives, generator: torch.Generator) -> None:
        super().__init__(config, base)
        self.config, self.liked = config, liked
        self.items_JD = base.source_items.clone()
        if config.rating_offset == "item_mean":
            self.items_JD[:, 0] = base.source_bias  # an item enters as [b_j, q_j]
        self.items_JD /= root_mean_length(self.items_JD)
        width = base.source_users.shape[1]
        self.inner = glorot(width, width, generator)  # W_1, b_1
        self.outer = glorot(width, 1, generator, bias=False)  # w_2
        self.meta = glorot(width, config.meta_hidden, generator)  # W_3, b_3
        self.write = glorot(config.meta_hidden, width * width, generator)  # W_4, b_4
        nn.init.zeros_(self.write.weight)
        with torch.no_grad():
            self.write.bias.copy_(torch.eye(width).flatten())

    def character(self, row_B: Tensor) -> Tensor:
        """Return c_u, [B, D]; zeros for a user who liked nothing."""
        item_BL, real_BL = self.liked.histories(row_B, self.config.history)
        item_BLD = self.items_JD[item_BL]
        if self.config.attention:
            logit_BL = self.outer(self.inner(item_BLD).relu()).squeeze(-1)
        else:
            logit_BL = torch.zeros_like(real_BL, dtype=item_BLD.dtype)
        # Where all places are padding the softmax is not a number, hence the large finite number.
        weight_BL = logit_BL.masked_fill(~real_BL, -1e30).softmax(dim=1) * real_BL
        return torch.bmm(weight_BL[:, None], item_BLD)[:, 0]

    def maps(self, row_B: Tensor) -> Tensor:
        """Return M_u, [B, D, D]."""
        width = self.items_JD.shape[1]
        if not self.config.personal:
            return self.write.bias.view(1, width, width).expand(len(row_B), -1, -1)
        hidden_BH = dropout(self.meta(self.character(row_B)).relu(), self.config.dropout, self.training)
        map_BDD: Tensor = self.write(hidden_BH).view(-1, width, width)
        return map_BDD

    def mapped(self, row_U: Tensor) -> Tensor:
        """Return z_s M_u, [U, D]."""
        return torch.bmm(self.base.source_users[row_U][:, None], self.maps(row_U))[:, 0]

    def loss(self, user_B: Tensor, place_N: Tensor, item_N: Tensor, wanted_N: Tensor) -> Tensor:
        """Return the mean square of what the batch's ratings lack; `place_N`: which of its users a rating belongs to."""
        mapped_BD = self.mapped(user_B)
        if self.config.loss == "mapping":
            return squared_distance(mapped_BD, self.base.target_users[user_B])
        return (wanted_N - dots(mapped_BD, place_N, self.base.target_items, item_N)).square().mean()
