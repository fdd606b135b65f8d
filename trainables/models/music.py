"""MuSiC: leveraging multimodal data and side users for diffusion cross-domain recommendation (arXiv 2507.04000).

In the paper's order: feature MLPs (3.2), diffusion with the vectorised U-Net (3.3), rating (3.4), training in two
stages (3.5).
Shapes: B batch of users, N ratings, F raw feature width, D vector width, T steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from features.checks import at_least, choice, dropout_share, refuse, step_size, variance_range
from features.errors import InputError
from trainables.calibration import cross_fitted_gain
from trainables.diffusion import (
    SCHEDULES,
    Denoiser,
    Diffusion,
    Noise,
    SameForAll,
    normal_like,
    random_steps,
    timestep_embedding,
    variances,
)
from trainables.interface import KEEP, Epoch, Figure, Place, Selection, Setup, Stage, Variant
from trainables.tasks.rating import HeldOut, RatingQuery, Ratings, Task, overlapping_offsets, shrunken_means

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "softmax": lambda x: torch.softmax(x, dim=-1),
}
RATE_FROM = ("one_step", "chain")
OFFSETS = ("none", "global_mean", "item_mean", "source_offset")
X0 = ("fixed", "detached", "joint")
USER_MLPS = ("one", "two")

NAME = "MuSiC"
TASK_TYPE = "ratings"
NEEDS = ("features",)  # vectors of users and items by a language model, or made from ratings
SELECTION = Selection("val_rmse", "minimize")
PRESETS = {
    "paper": {  # as literally as the text allows, see docs/models.md
        "rating_offset": "none", "calibrate": False, "x0": "joint", "feature_epochs": 0, "standardise": False,
        "schedule": "linear", "rate_from": "chain", "epochs": 100, "patience": 100, "keep": "last",
    },
}  # fmt: skip
ABLATIONS = {  # Table 3
    "wo_mllm": Variant(features="ratings", presets={"paper": {"user_mlps": "two"}}),
    "wo_diffusion": Variant(config={"diffusion": False}),
    "wo_side": Variant(config={"side": False}),
}
FIGURES = {
    "steps": Figure(
        name="figure_3_steps", title="RMSE and NDCG@20 over diffusion steps T (MuSiC Figure 3)", label="Diffusion steps T"
    ),
    "activation": Figure(
        name="figure_4_activation", title="RMSE per activation function (MuSiC Figure 4)", metrics=("val_rmse",),
        label="Activation function", order=("tanh", "relu", "softmax"),
    ),
    "beta": Figure(label="Reconstruction loss weight β"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config:
    """Hyperparameters. The defaults are the paper's where it gives a value; (ours) marks where it is silent."""

    dim: int = 32  # D, width of user and item vectors (4.1.4); divisible by 4
    hidden: int = 128  # H, hidden width of the feature MLPs (4.1.4)
    activation: str = "tanh"  # of the feature MLPs: tanh | relu | softmax (Figure 4)
    dropout: float = 0.1  # of feature MLPs and U-Net, searched in 0.1..0.5 (4.1.4)
    steps: int = 10  # T, diffusion steps, searched in 2..50 (Figure 3)
    schedule: str = "linear_scaled"  # linear | linear_scaled (ours, see trainables.diffusion)
    variance_start: float = 1e-4  # beta_1 before scaling (Ho et al. 2020)
    variance_end: float = 0.02  # beta_T before scaling (Ho et al. 2020)
    beta: float = 0.4  # weight of the reconstruction loss in the joint loss, searched in 0.2..0.6 (eq. 13)
    lr: float = 1e-3  # Adam's learning rate, searched in 1e-5..1e-3 (4.1.4)
    weight_decay: float = 0.0  # L2 penalty in Adam (ours)
    epochs: int = 60  # of the joint stage, searched in 50..100 (4.1.4)
    patience: int = 15  # epochs without a better validation RMSE before the joint stage ends (ours)
    keep: str = (
        "best"  # best | last: whose weights are kept, the epoch's with the best validation RMSE or the last one's
    )
    feature_epochs: int = 10  # of the feature stage, where u . v is fitted to the target domain's own ratings (ours)
    x0: str = (
        "fixed"  # what diffusion regresses on: fixed (as the feature stage leaves it; ours) | detached (the feature
    )
    # MLP's vector of the moment, without gradient; ours) | joint (the same, with gradient)
    standardise: bool = True  # diffusion sees x_0 with mean 0 and variance 1 (ours)
    user_mlps: str = "one"  # one MLP for source and target vectors of users, or two (the paper leaves it open)
    side_epochs: int = 30  # of the side stage (ours)
    batch_users: int = 128  # users of a batch, with all their ratings (ours)
    rate_from: str = "one_step"  # what r_hat is generated from in training: one_step (f at a random t) | chain (ours)
    rating_offset: str = (
        "source_offset"  # what u . v is added to: none (eq. 8) | global_mean | item_mean | source_offset (ours)
    )
    calibrate: bool = True  # u . v is scaled by a gain in [0, 1] fitted on the validation users (ours)
    samples: int = 1  # generated vectors that are averaged for a cold-start user (ours)
    diffusion: bool = True  # False: w/o diffusion, the source vector is used as it is (Table 3)
    side: bool = True  # False: w/o side, side users are left out (Table 3)

    def __post_init__(self) -> None:
        refuse(
            *(choice(self, "activation", tuple(ACTIVATIONS)), choice(self, "schedule", SCHEDULES)),
            *(choice(self, "rate_from", RATE_FROM), choice(self, "rating_offset", OFFSETS), choice(self, "x0", X0)),
            *(choice(self, "user_mlps", USER_MLPS), choice(self, "keep", KEEP)),
            *(at_least(self, name, 1) for name in ("hidden", "epochs", "patience", "batch_users", "samples")),
            *(at_least(self, name, 0) for name in ("feature_epochs", "side_epochs", "weight_decay")),
            at_least(self, "steps", 2),
            "" if self.dim >= 4 and self.dim % 4 == 0 else f"dim is {self.dim}; give a multiple of 4",
            dropout_share(self),
            "" if 0 <= self.beta <= 1 else f"beta is {self.beta}; give a number in [0, 1]",
            step_size(self),
            variance_range(self),
        )


# --- 3.2 feature extraction ---------------------------------------------------------------------------------------


class FeatureMLP(nn.Module):
    """Raw features -> vectors: Linear(F, H), activation, dropout, Linear(H, D), activation."""

    def __init__(self, width: int, config: Config) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, config.hidden), nn.Linear(config.hidden, config.dim)
        self.activation, self.dropout = ACTIVATIONS[config.activation], nn.Dropout(config.dropout)

    def forward(self, raw_BF: Tensor) -> Tensor:
        """[B, F] -> [B, D]."""
        hidden = self.dropout(self.activation(self.inner(raw_BF)))
        vectors: Tensor = self.activation(self.outer(hidden))
        return vectors


# --- 3.3 cross-domain diffusion -----------------------------------------------------------------------------------


class Block(nn.Module):
    """A U-Net block on vectors: a linear map plus time and, where there is one, condition."""

    def __init__(self, width_in: int, width_out: int, config: Config) -> None:
        super().__init__()
        self.map = nn.Linear(width_in, width_out)
        self.time = nn.Linear(config.dim, width_out)
        self.condition = nn.Linear(config.dim, width_out, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, time_BD: Tensor, condition: Tensor | None) -> Tensor:
        """[B, width_in] -> [B, width_out]; `condition`: as `self.condition` maps it, [B, width_out]."""
        x = self.map(x) + self.time(time_BD)
        if condition is not None:
            x = x + condition
        out: Tensor = self.dropout(functional.silu(x))
        return out


class VectorUNet(nn.Module):
    """Vectorised U-Net f(x_t, t, c) of section 3.3.3: predicts x_0. Without condition no map of it takes part."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        full, half, quarter = config.dim, config.dim // 2, config.dim // 4
        self.down_full, self.down_half = Block(full, full, config), Block(full, half, config)
        self.down_quarter, self.middle = Block(half, quarter, config), Block(quarter, quarter, config)
        self.up_half, self.up_full = Block(quarter + quarter, half, config), Block(half + half, full, config)
        self.output = nn.Linear(full + full, full)
        self.register_buffer("time", timestep_embedding(torch.arange(1, config.steps + 1), full), persistent=False)
        self.time: Tensor  # [T, D]

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks in the order of the way through them."""
        return self.down_full, self.down_half, self.down_quarter, self.middle, self.up_half, self.up_full

    def mapped(self, condition_BD: Tensor) -> list[Tensor]:
        """The condition as each block reads it; the same at every step."""
        return [block.condition(condition_BD) for block in self.blocks]

    def together(self, condition_BD: Tensor) -> Denoiser:
        """The same function for rows that go through the reverse process together, in half the time.

        What each block adds for a step is computed once for all steps. Last bits differ.
        """
        mapped, shapes = self.mapped(condition_BD), [block.map.out_features for block in self.blocks]
        added_T = torch.cat(
            [block.map.bias + block.time(self.time) for block in self.blocks], dim=-1
        )  # [T, sum of widths]

        def block(number: int, x: Tensor, added: Sequence[Tensor]) -> Tensor:
            of = self.blocks[number]
            x = torch.addmm(added[number], x, of.map.weight.t()) + mapped[number]
            return functional.dropout(functional.silu(x), of.dropout.p, self.training)

        def denoise(xt_BD: Tensor, t_B: Tensor, condition: Tensor | None) -> Tensor:
            added = torch.split(added_T.index_select(0, t_B[:1] - 1), shapes, dim=-1)
            full = block(0, xt_BD + condition_BD, added)
            half = block(1, full, added)
            quarter = block(2, half, added)
            x = block(3, quarter, added)
            x = block(4, torch.cat([x, quarter], dim=-1), added)
            x = block(5, torch.cat([x, half], dim=-1), added)
            predicted: Tensor = self.output(torch.cat([x, full], dim=-1))
            return predicted

        return denoise

    def forward(
        self, xt_BD: Tensor, t_B: Tensor, condition_BD: Tensor | None, mapped: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Prediction of x_0, [B, D]. `mapped`: that of the condition, where it has been computed already."""
        time = self.time.index_select(0, t_B - 1)
        c: Sequence[Tensor | None] = [None] * 6
        if condition_BD is not None:
            xt_BD, c = xt_BD + condition_BD, mapped or self.mapped(condition_BD)
        full = self.down_full(xt_BD, time, c[0])
        half = self.down_half(full, time, c[1])
        quarter = self.down_quarter(half, time, c[2])
        x = self.middle(quarter, time, c[3])
        x = self.up_half(torch.cat([x, quarter], dim=-1), time, c[4])
        x = self.up_full(torch.cat([x, half], dim=-1), time, c[5])
        predicted: Tensor = self.output(torch.cat([x, full], dim=-1))
        return predicted


@dataclass(frozen=True, kw_only=True)
class Constants:
    """What a rating needs of the task."""

    user_width: int  # F of users
    item_width: int  # F of items
    mean: float  # of the training ratings
    item_offset: Tensor  # float32 [I]
    slope: float  # of the target rating on the source offset


def constants_of(config: Config, task: Task) -> Constants:
    """The constants of a task, as far as the config lets training see it; but the slope, which side users helped to fit."""
    mean, item_offset = task.mean, task.item_offset
    if not config.side:  # rating-based vectors alone still know side users: they are made once for all trials
        mean, item_offset = overlapping_offsets(task)
    widths = {"user_width": task.target.width, "item_width": task.items.width}
    return Constants(mean=mean, item_offset=item_offset, slope=task.slope, **widths)


class MuSiC(nn.Module):
    """The three networks, the schedule, and the constants of the task."""

    item_offset: Tensor  # [I]
    gain: Tensor
    centre: Tensor  # [D] of the real target vectors
    scale: Tensor  # their standard deviation, one for all dimensions

    def __init__(self, config: Config, constants: Constants) -> None:
        super().__init__()
        self.config, self.constants = config, constants
        self.user_mlp = FeatureMLP(constants.user_width, config)
        self.item_mlp = FeatureMLP(constants.item_width, config)
        self.unet = VectorUNet(config)
        self.target_mlp = FeatureMLP(constants.user_width, config) if config.user_mlps == "two" else None
        beta = variances(config.steps, config.variance_start, config.variance_end, config.schedule)
        self.process = Diffusion(beta)
        self.mean, self.slope = constants.mean, constants.slope
        self.register_buffer("item_offset", constants.item_offset, persistent=False)
        self.register_buffer("gain", torch.ones(()))
        self.register_buffer("centre", torch.zeros(config.dim))
        self.register_buffer("scale", torch.ones(()))

    # --- 3.4 rating -----------------------------------------------------------------------------------------------

    def offset(self, item_N: Tensor, source_offset_N: Tensor | None) -> Tensor:
        """What u . v is added to, [N] rating points (ours; the paper's eq. 8 leaves the scale to the vectors).

        None leaves the users' part out.
        """
        plain = self.config.rating_offset == "none"
        offset = torch.full(item_N.shape, 0.0 if plain else self.mean, device=item_N.device)
        if self.config.rating_offset in ("item_mean", "source_offset"):
            offset = offset + self.item_offset[item_N]
        if self.config.rating_offset == "source_offset" and source_offset_N is not None:
            offset = offset + self.slope * source_offset_N
        return offset

    @property
    def of_target(self) -> FeatureMLP:
        """The MLP that makes x_0 of users' target-domain features."""
        return self.target_mlp or self.user_mlp

    def vectors(self, raw_BF: Tensor, generator: Noise) -> Tensor:
        """Target-domain vectors of cold-start users from their source-domain features, [B, D] (3.3.4)."""
        condition = self.user_mlp(raw_BF)
        if not self.config.diffusion:
            return torch.as_tensor(condition)
        denoise = partial(self.unet, mapped=self.unet.mapped(condition))
        draws = [
            self.process.generate(denoise, condition, normal_like(condition, generator), generator)
            for _ in range(self.config.samples)
        ]
        return self.to_vectors(torch.stack(draws).mean(dim=0))

    def fit_scale(self, x0_UD: Tensor) -> None:
        """Diffusion sees the real target vectors with mean 0 and variance 1, what its unit noise is made for (ours).

        The outputs of tanh or softmax layers vary far less than that (Rombach et al. 2022 scale latents for the reason).
        """
        self.centre.copy_(x0_UD.mean(dim=0))
        self.scale.copy_((x0_UD - self.centre).square().mean().sqrt().clamp(min=1e-8))

    def to_vectors(self, x_BD: Tensor) -> Tensor:
        """From the scale of diffusion to that of the feature MLPs, [B, D]."""
        return self.centre + self.scale * x_BD

    def from_vectors(self, vectors_BD: Tensor) -> Tensor:
        """From the scale of the feature MLPs to that of diffusion, [B, D]."""
        return (vectors_BD - self.centre) / self.scale

    @torch.no_grad()
    def predict(self, held_out: HeldOut, task: Task, seed: int) -> Tensor:
        """Ratings [N], not cut to the scale; the same for the same seed."""
        offset, u_dot_v, _ = self._terms(held_out, task, seed)
        return offset + self.gain * u_dot_v

    @torch.no_grad()
    def validate(self, task: Task, seed: int) -> tuple[Tensor, Tensor]:
        """Fit the gain on the validation users, and predict each half of them with the gain of the other half.

        Returns the ratings [N] and the users' generated vectors [U, D].
        """
        user, rating = task.validation.ratings.user, task.validation.ratings.rating
        offset, u_dot_v, vectors = self._terms(task.validation, task, seed)
        gain = torch.ones_like(u_dot_v)
        if self.config.calibrate:
            gain, for_new_users = cross_fitted_gain(u_dot_v, rating - offset, user)
            self.gain.fill_(for_new_users)
        return offset + gain * u_dot_v, vectors

    def _terms(self, held_out: HeldOut, task: Task, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Offset [N], u . v [N] and generated vectors [U, D]."""
        self.eval()
        ratings = held_out.ratings
        vectors = self.vectors(held_out.source.all(), torch.Generator().manual_seed(seed))
        offset = self.offset(ratings.item, held_out.source_offset[ratings.user])
        return offset, self.dot(vectors, ratings.user, task, ratings.item), vectors

    def dot(self, vectors_BD: Tensor, user_N: Tensor, task: Task, item_N: Tensor) -> Tensor:
        """Eq. 8, u . v for each rating, [N]; each item goes through its MLP once."""
        rated = torch.zeros(len(task.items), dtype=torch.bool, device=item_N.device)
        rated[item_N] = True
        place_I = rated.cumsum(0) - 1
        item_ND: Tensor = self.item_mlp(task.items[rated.nonzero().flatten()]).index_select(0, place_I[item_N])
        return (vectors_BD.index_select(0, user_N) * item_ND).sum(dim=-1)


# --- recommending -------------------------------------------------------------------------------------------------


@torch.no_grad()
def pack(model: MuSiC, task: Task) -> dict[str, Any]:
    """What `unpack` needs of a trained model; items only as their vectors."""
    model.eval()
    return {
        "constants": asdict(model.constants),
        "weights": model.state_dict(),
        "items": model.item_mlp(task.items.all()),  # [I, D]
        "user_centre": task.source.centre,  # [F] of raw source-domain vectors
        "user_scale": task.source.scale,
    }


def unpack(config: Config, state: Mapping[str, Any], seed: int) -> Callable[[RatingQuery], Tensor]:
    """Ratings of all target-domain items, [U, I], for cold-start users; a user's depend on no other user's row."""
    model = MuSiC(config, Constants(**state["constants"])).eval()
    model.load_state_dict(state["weights"])

    @torch.no_grad()
    def rate(users: RatingQuery) -> Tensor:
        given, read = users.features.shape[1], len(state["user_centre"])
        if given != read:
            raise InputError(
                f"features: have {given} numbers, and the model reads {read}; take the vectors it was trained on"
            )
        raw_UF = (users.features - state["user_centre"]) / state["user_scale"]
        vectors = model.vectors(raw_UF, SameForAll(torch.Generator().manual_seed(seed)))
        offset = model.offset(torch.arange(len(state["items"])), None)
        if config.rating_offset == "source_offset":
            offset = offset + model.slope * users.source_offset[:, None]
        rated: Tensor = offset + model.gain * (vectors @ state["items"].T)
        return rated

    return rate


# --- 3.5 training -------------------------------------------------------------------------------------------------


def train(config: Config, task: Task, seed: int) -> Generator[Place]:
    """Feature stage, side stage, then the joint stage, whose epochs are measured.

    The x_0 that diffusion regresses on is fixed by the feature stage (ours): were it free (`x0: joint`), it could collapse
    to a constant that is easy to generate. The metric `x0_variance` tells.
    """
    yield from _Trainer(config, task, seed).run()


class _Trainer:
    """One training of one seed."""

    def __init__(self, config: Config, task: Task, seed: int) -> None:
        self.config, self.task, self.seed, self.device = config, task, seed, task.device
        self.model = model = MuSiC(config, constants_of(config, task))
        self.generator = torch.Generator().manual_seed(seed)
        self.feature_optimiser = self._adam([*model.of_target.parameters(), *model.item_mlp.parameters()])
        moved = model.of_target.parameters() if config.x0 == "joint" else ()
        self.side_optimiser = self._adam([*model.unet.parameters(), *moved])
        self.joint_optimiser = self._adam(model.parameters())
        self.progress: dict[str, Any] = {"stage": "feature", "done": 0}
        """The stage, how many of its epochs are done, and after the feature stage what `_end_feature_stage` puts there."""

    def run(self) -> Iterator[Place]:
        """All stages; yields after each of their epochs."""
        progress, config = self.progress, self.config
        yield Setup(
            self.model, feature_optimiser=self.feature_optimiser, side_optimiser=self.side_optimiser,
            joint_optimiser=self.joint_optimiser, generator=self.generator, progress=progress,
        )  # fmt: skip
        if progress["stage"] == "feature":
            yield from self._feature_stage()
            self._end_feature_stage()
            progress |= {"stage": "side", "done": 0}
        if progress["stage"] == "side" and config.diffusion and config.side and len(self.task.side_users):
            yield from self._side_stage()
        if progress["stage"] != "joint":
            progress |= {"stage": "joint", "done": 0}
        while True:
            loss = self._joint_epoch()
            progress["done"] += 1
            yield self._measured(loss)

    def _end_feature_stage(self) -> None:
        """Standardise, and keep the spread of the real target vectors and, where it is fixed, x_0 of all users [U, D]."""
        model = self.model
        x0 = self._real_vectors()
        if self.config.standardise:
            model.fit_scale(x0 if self.config.side else x0[: len(self.task.source)])
        self.progress["spread"] = self._spread(x0)
        if self.config.x0 == "fixed":
            self.progress["x0"] = model.from_vectors(x0)

    @torch.no_grad()
    def _real_vectors(self) -> Tensor:
        """Vectors of all target users by the feature MLP as it is now, without dropout, [U, D]."""
        vectors: Tensor = self.model.eval().of_target(self.task.target.all())
        self.model.train()
        return vectors

    def _spread(self, vectors_UD: Tensor) -> float:
        """Mean variance per dimension of the overlapping users' real target vectors."""
        return float(vectors_UD[: len(self.task.source)].var(dim=0).mean())

    def _x0(self, users_B: Tensor) -> Tensor:
        """What diffusion regresses on, [B, D], on its scale."""
        if self.config.x0 == "fixed":
            return torch.as_tensor(self.progress["x0"][users_B])
        x0_BD = self.model.from_vectors(self.model.of_target(self.task.target[users_B]))
        return x0_BD.detach() if self.config.x0 == "detached" else x0_BD

    def _adam(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        # Fused: a fifth of the time of the other kinds, which also stall on gradients too small for float32.
        return torch.optim.Adam(parameters, lr=self.config.lr, weight_decay=self.config.weight_decay, fused=True)

    def _measured(self, loss: float) -> Epoch:
        model, task, start = self.model, self.task, self.progress["spread"]
        if self.config.keep == "last" and self.progress["done"] < self.config.epochs:
            return Epoch(predict=model.predict, metrics={"train_loss": loss})  # nobody asks how good it is
        spread = start if self.config.x0 == "fixed" else self._spread(self._real_vectors())
        rated, vectors = model.validate(task, self.seed)
        variance = float(vectors.var(dim=0, correction=0).mean())
        metrics = {"variance_ratio": variance / spread if spread else float("nan"), "train_loss": loss}
        if self.config.x0 != "fixed":  # a ratio of two variances that both vanish tells nothing
            metrics["x0_variance"] = spread / start if start else float("nan")
        return Epoch(predict=model.predict, metrics=metrics, validation=rated, pack=partial(pack, model, task))

    def _feature_stage(self) -> Iterator[Stage]:
        """Eq. 8 on the target domain's own ratings.

        Residual vectors start small, so that training starts at the offset.
        """
        model, config = self.model, self.config
        ratings = self.task.train if config.side else self.task.overlapping
        offset = self._target_offset(ratings)
        while self.progress["done"] < config.feature_epochs:
            for users_B, user_N, rows_N in self._batches(ratings):
                item, rating = ratings.item[rows_N], ratings.rating[rows_N]
                u_dot_v = model.dot(model.of_target(self.task.target[users_B]), user_N, self.task, item)
                _step(self.feature_optimiser, functional.mse_loss(offset[rows_N] + u_dot_v, rating))
            self.progress["done"] += 1
            yield Stage()

    def _target_offset(self, ratings: Ratings) -> Tensor:
        """Offsets of the users whose target ratings are known, [N]: theirs is what the source offset stands for."""
        model, task = self.model, self.task
        offset = model.offset(ratings.item, None)
        if self.config.rating_offset != "source_offset":
            return offset
        user_offset = _means(ratings.user, ratings.rating - offset, len(task.target))
        user_offset[: len(task.source)] = task.slope * task.source_offset
        return offset + user_offset[ratings.user]

    def _side_stage(self) -> Iterator[Stage]:
        """Eq. 11: reconstruction without condition over side users."""
        users = self.task.side_users
        while self.progress["done"] < self.config.side_epochs:
            order = users[self._shuffled(len(users))]
            for batch in torch.split(order, self.config.batch_users):
                _step(self.side_optimiser, self._reconstruction(self._x0(batch), None)[0])
            self.progress["done"] += 1
            yield Stage()

    def _joint_epoch(self) -> float:
        """Eq. 13: beta * reconstruction + (1 - beta) * rating loss over training overlapping users; mean loss."""
        model, task, config = self.model, self.task, self.config
        ratings, losses = task.overlapping, []
        for users_B, user_N, rows_N in self._batches(ratings):
            condition = model.user_mlp(task.source[users_B])
            reconstruction, generated = condition.new_zeros(()), condition
            if config.diffusion:
                reconstruction, generated = self._reconstruction(self._x0(users_B), condition)
                if config.rate_from == "chain":
                    start, denoise = normal_like(condition, self.generator), model.unet.together(condition)
                    generated = model.process.generate(denoise, condition, start, self.generator)
                generated = model.to_vectors(generated)
            item = ratings.item[rows_N]
            predicted = model.offset(item, task.source_offset[users_B][user_N])
            predicted = predicted + model.dot(generated, user_N, task, item)
            rating_loss = functional.mse_loss(predicted, ratings.rating[rows_N])
            beta = config.beta if config.diffusion else 0.0
            losses.append(_step(self.joint_optimiser, beta * reconstruction + (1 - beta) * rating_loss))
        return sum(losses) / len(losses)

    def _reconstruction(self, x0_BD: Tensor, condition_BD: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean squared error of f(x_t, t, c) (eq. 10) at a random t, and f itself [B, D]."""
        t_B = random_steps(len(x0_BD), self.config.steps, self.generator, x0_BD.device)
        eps = normal_like(x0_BD, self.generator)
        predicted = self.model.unet(self.model.process.noised(x0_BD, t_B, eps), t_B, condition_BD)
        return functional.mse_loss(predicted, x0_BD), predicted

    def _batches(self, ratings: Ratings) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Users in random order with all their ratings: users [B], each rating's place in them [N] and row [N]."""
        starts = ratings.starts
        rated = torch.nonzero(starts.diff()).flatten()
        order = rated[self._shuffled(len(rated))]
        for users in torch.split(order, self.config.batch_users):
            counts = starts[users + 1] - starts[users]
            place = torch.repeat_interleave(torch.arange(len(users), device=users.device), counts)
            first = starts[users] - (counts.cumsum(0) - counts)
            yield users, place, torch.arange(len(place), device=users.device) + first[place]

    def _shuffled(self, size: int) -> Tensor:
        """The numbers 0..size-1 in random order, drawn on the CPU."""
        return torch.randperm(size, generator=self.generator).to(self.device)


def _means(code_N: Tensor, value_N: Tensor, size: int) -> Tensor:
    """Shrunken mean of the values of each code, float32 [size]."""
    means = shrunken_means(code_N.cpu().numpy(), value_N.double().cpu().numpy(), size)
    return torch.from_numpy(means).float().to(code_N.device)


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> float:
    optimizer.zero_grad()
    value = float(loss.detach())
    if not math.isfinite(value):
        raise FloatingPointError(f"the loss is {value}; lower lr")
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return value
