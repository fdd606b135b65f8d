"""MuSiC's networks and losses against slow references written from the paper, in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from features.errors import InputError
from trainables.interface import Epoch, Variant
from trainables.models import music
from trainables.models.music import (
    ABLATIONS,
    ACTIVATIONS,
    PRESETS,
    Config,
    FeatureMLP,
    MuSiC,
    VectorUNet,
    constants_of,
    unpack,
)
from trainables.tasks.rating import RatingQuery, Task

from .training import train_seed
from .worlds import random_task, rows_of

SMALL = {"dim": 8, "hidden": 6, "dropout": 0.0, "steps": 5, "epochs": 2, "feature_epochs": 1, "side_epochs": 2}

Array = np.ndarray


def small(**changes: Any) -> Config:
    return Config(**{**SMALL, **changes})


def paper(**changes: Any) -> Config:
    return small(**{**PRESETS["paper"], "epochs": 2, **changes})


def music_of(config: Config, task: Task) -> MuSiC:
    return MuSiC(config, constants_of(config, task))


def arrays(module: torch.nn.Module) -> dict[str, Array]:
    return {name: value.double().numpy() for name, value in module.state_dict().items()}


def activate(x: Array, kind: str) -> Array:
    if kind == "tanh":
        return np.array([math.tanh(value) for value in x])
    if kind == "relu":
        return np.array([max(0.0, value) for value in x])
    powers = [math.exp(value) for value in x]
    return np.array([power / sum(powers) for power in powers])


def reference_mlp(weights: Mapping[str, Array], raw: Array, kind: str) -> Array:
    """Section 3.2 for one vector."""
    hidden = activate(weights["inner.weight"] @ raw + weights["inner.bias"], kind)
    return activate(weights["outer.weight"] @ hidden + weights["outer.bias"], kind)


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def reference_unet(weights: Mapping[str, Array], xt: Array, t: int, condition: Array | None) -> Array:
    """Section 3.3.3 for one vector: the condition is added to the input, and every block adds time and condition."""
    half = len(xt) // 2
    angles = [t / 10_000 ** (i / half) for i in range(half)]
    time = np.array([math.sin(a) for a in angles] + [math.cos(a) for a in angles])

    def block(name: str, x: Array) -> Array:
        y = weights[f"{name}.map.weight"] @ x + weights[f"{name}.map.bias"]
        y = y + weights[f"{name}.time.weight"] @ time + weights[f"{name}.time.bias"]
        if condition is not None:
            y = y + weights[f"{name}.condition.weight"] @ condition
        return silu(y)

    down = block("down_full", xt if condition is None else xt + condition)
    down_2 = block("down_half", down)
    down_4 = block("down_quarter", down_2)
    up = block("up_half", np.concatenate([block("middle", down_4), down_4]))
    up = block("up_full", np.concatenate([up, down_2]))
    return np.asarray(weights["output.weight"] @ np.concatenate([up, down]) + weights["output.bias"])


# --- networks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_feature_mlp_is_two_layers_each_with_the_activation(activation: str) -> None:
    mlp = FeatureMLP(7, small(activation=activation)).eval()
    raw = torch.randn(4, 7)
    for row, vector in zip(raw, mlp(raw), strict=True):
        expected = reference_mlp(arrays(mlp), row.double().numpy(), activation)
        np.testing.assert_allclose(vector.detach(), expected, atol=1e-6)


def test_dropout_acts_in_training_and_not_in_prediction() -> None:
    mlp, unet = FeatureMLP(7, small(dropout=0.5)), VectorUNet(small(dropout=0.5))
    raw, xt, t = torch.randn(40, 7), torch.randn(40, 8), torch.ones(40, dtype=torch.int64)
    for network, call in ((mlp, lambda: mlp(raw)), (unet, lambda: unet(xt, t, None))):
        network.train()
        assert not torch.equal(call(), call())
        network.eval()
        assert torch.equal(call(), call())


@pytest.mark.parametrize("conditioned", [True, False])
def test_unet_is_the_papers(conditioned: bool) -> None:
    unet = VectorUNet(small()).eval()
    xt, t = torch.randn(4, 8), torch.tensor([1, 2, 3, 5])
    condition = torch.randn(4, 8) if conditioned else None
    predicted = unet(xt, t, condition).detach()
    for row in range(4):
        c = None if condition is None else condition[row].double().numpy()
        expected = reference_unet(arrays(unet), xt[row].double().numpy(), int(t[row]), c)
        np.testing.assert_allclose(predicted[row], expected, atol=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_rows_that_go_together_are_denoised_as_they_are_alone(dropout: float) -> None:
    """The same function and the same gradients, to float32's accuracy; dropout draws the same."""
    unet, xt, condition = VectorUNet(small(dropout=dropout)), torch.randn(4, 8), torch.randn(4, 8)
    for t in (1, 3, 5):
        t_B, found = torch.full((4,), t), []
        for denoise in (unet, unet.together(condition)):
            unet.zero_grad()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(t)
                predicted = denoise(xt, t_B, condition)
            predicted.square().sum().backward()
            found.append([predicted.detach(), *(value.grad.clone() for value in unet.parameters())])
        for usual, together in zip(*found, strict=True):
            torch.testing.assert_close(usual, together, rtol=1e-4, atol=1e-5)


def test_without_condition_no_condition_map_gets_a_gradient() -> None:
    unet = VectorUNet(small())
    xt, t = torch.randn(4, 8), torch.tensor([1, 2, 3, 5])
    unet(xt, t, None).square().sum().backward()
    maps = {name for name, _ in unet.named_parameters() if ".condition." in name}
    assert len(maps) == 6
    for name, parameter in unet.named_parameters():
        assert (parameter.grad is None) == (name in maps), name
    unet.zero_grad()
    unet(xt, t, torch.randn(4, 8)).square().sum().backward()
    assert all(float(parameter.grad.abs().sum()) > 0 for parameter in unet.parameters())


def side_stage(task: Task, config: Config) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """x_0 of the feature stage, and the U-Net as the side stage leaves it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        trainer = music._Trainer(config, task, 3)
        list(trainer._feature_stage())
        trainer._end_feature_stage()
        trainer.progress["done"] = 0
        list(trainer._side_stage())
        return trainer.progress["x0"], trainer.model.unet.state_dict()


def test_the_side_stage_ignores_the_source_domain_altogether() -> None:
    task, config = random_task(), small(dropout=0.2)
    other = replace(task, source=rows_of(torch.randn(len(task.source), task.source.width)))
    x0, unet = side_stage(task, config)
    x0_again, unet_again = side_stage(other, config)
    assert torch.equal(x0, x0_again)
    assert all(torch.equal(unet[name], unet_again[name]) for name in unet)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        untrained = music_of(config, task).unet.state_dict()
    for name in unet:
        assert torch.equal(unet[name], untrained[name]) == (".condition." in name), name


def test_the_side_stage_learns_to_reconstruct() -> None:
    task = random_task(side=60)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        trainer = music._Trainer(small(side_epochs=150, lr=1e-2), task, 0)
        x0 = 2 + 0.1 * torch.randn(len(task.target), 8, generator=torch.Generator().manual_seed(0))
        side = x0[task.side_users]
        before = float(trainer._reconstruction(side, None)[0].detach())
        trainer.progress["x0"] = x0
        list(trainer._side_stage())
        after = float(trainer._reconstruction(side, None)[0].detach())
    assert before > 2
    assert after < 0.1


# --- losses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("rating_offset", ["none", "global_mean", "item_mean", "source_offset"])
def test_the_joint_loss_equals_a_loop_over_users_and_ratings(beta: float, rating_offset: str) -> None:
    """Eq. 13 in one batch of all users: the loss that the first step reports, before any weight has moved."""
    task, config = random_task(), small(beta=beta, rating_offset=rating_offset)
    trainer = music._Trainer(config, task, 5)
    x0 = torch.randn(len(task.target), 8)
    trainer.model.fit_scale(0.3 + 0.5 * x0)
    centre, scale = trainer.model.centre.double().numpy(), float(trainer.model.scale)
    model, users = copy.deepcopy(trainer.model), len(task.source)
    replay = torch.Generator()
    replay.set_state(trainer.generator.get_state())
    order = torch.randperm(users, generator=replay)
    t = torch.randint(1, config.steps + 1, (users,), generator=replay)
    eps = torch.randn(users, 8, generator=replay)

    trainer.progress["x0"] = x0
    trainer.joint_optimiser = torch.optim.SGD(trainer.model.parameters(), lr=0.0)
    loss = trainer._joint_epoch()

    mlp, items, unet = arrays(model.user_mlp), arrays(model.item_mlp), arrays(model.unet)
    reconstruction, squared, generated = [], [], {}
    for place, user in enumerate(order.tolist()):
        target = x0[user].double().numpy()
        condition = reference_mlp(mlp, task.source[torch.tensor([user])][0].double().numpy(), "tanh")
        step = int(t[place]) - 1
        signal, noise = float(model.process.signal[step]), float(model.process.noise[step])
        xt = signal * target + noise * eps[place].double().numpy()
        generated[user] = reference_unet(unet, xt, int(t[place]), condition)
        reconstruction.append(np.mean((generated[user] - target) ** 2))
    for user, item, rating in zip(task.train.user.tolist(), task.train.item.tolist(), task.train.rating, strict=True):
        if user >= users:
            continue  # a side user
        vector = reference_mlp(items, task.items[torch.tensor([item])][0].double().numpy(), "tanh")
        predicted = (centre + scale * generated[user]) @ vector
        if rating_offset != "none":
            predicted += task.mean
        if rating_offset in ("item_mean", "source_offset"):
            predicted += float(task.item_offset[item])
        if rating_offset == "source_offset":
            predicted += task.slope * float(task.source_offset[user])
        squared.append((float(rating) - predicted) ** 2)
    assert len(squared) == len(task.overlapping)
    assert loss == pytest.approx(beta * np.mean(reconstruction) + (1 - beta) * np.mean(squared), rel=1e-5)


def reference_rating(vector: Array, items: Mapping[str, Array], task: Task, item: int) -> float:
    """Eq. 8 for one rating, [D] against the item's MLP output."""
    return float(vector @ reference_mlp(items, task.items[torch.tensor([item])][0].double().numpy(), "tanh"))


@pytest.mark.parametrize("user_mlps", ["one", "two"])
def test_the_joint_loss_of_the_paper_equals_a_loop_over_users_ratings_and_steps(user_mlps: str) -> None:
    """Eqs. 8, 10, 12 and 13 word for word: x_0 by the MLP of the moment, r_hat = u . v with u the end of eq. 5's chain."""
    task, config = random_task(), paper(user_mlps=user_mlps, steps=3, beta=0.3, dropout=0.0)
    trainer = music._Trainer(config, task, 5)
    trainer._end_feature_stage()
    model, users = copy.deepcopy(trainer.model), len(task.source)
    replay = torch.Generator()
    replay.set_state(trainer.generator.get_state())
    order = torch.randperm(users, generator=replay)
    t = torch.randint(1, 4, (users,), generator=replay)
    eps, start = (torch.randn(users, 8, generator=replay).double().numpy() for _ in range(2))
    noise = {step: torch.randn(users, 8, generator=replay).double().numpy() for step in (3, 2)}

    trainer.joint_optimiser = torch.optim.SGD(trainer.model.parameters(), lr=0.0)
    loss = trainer._joint_epoch()

    source_mlp, items, unet = arrays(model.user_mlp), arrays(model.item_mlp), arrays(model.unet)
    target_mlp = source_mlp if model.target_mlp is None else arrays(model.target_mlp)
    beta = [1e-4 + (0.02 - 1e-4) * step / 2 for step in range(3)]
    bar = [1.0, *np.cumprod([1 - value for value in beta])]
    reconstruction, squared = [], []
    for place, user in enumerate(order.tolist()):
        x0 = reference_mlp(target_mlp, task.target[torch.tensor([user])][0].double().numpy(), "tanh")
        c = reference_mlp(source_mlp, task.source[torch.tensor([user])][0].double().numpy(), "tanh")
        step = int(t[place])
        xt = math.sqrt(bar[step]) * x0 + math.sqrt(1 - bar[step]) * eps[place]
        reconstruction.append(np.mean((reference_unet(unet, xt, step, c) - x0) ** 2))
        x = start[place]
        for step in (3, 2, 1):
            b, now, before = beta[step - 1], bar[step], bar[step - 1]
            predicted = reference_unet(unet, x, step, c)
            x = math.sqrt(before) * b / (1 - now) * predicted + math.sqrt(1 - b) * (1 - before) / (1 - now) * x
            if step > 1:
                x = x + math.sqrt(b * (1 - before) / (1 - now)) * noise[step][place]
        own = task.overlapping.user == user
        for item, rating in zip(task.overlapping.item[own].tolist(), task.overlapping.rating[own], strict=True):
            squared.append((float(rating) - reference_rating(x, items, task, item)) ** 2)
    assert len(squared) == len(task.overlapping)
    assert loss == pytest.approx(0.3 * np.mean(reconstruction) + 0.7 * np.mean(squared), rel=1e-5)


def reconstruction_gradients(config: Config) -> set[str]:
    """Networks that the reconstruction of all training users moves."""
    task = random_task()
    trainer = music._Trainer(config, task, 5)
    trainer._end_feature_stage()
    users = torch.arange(len(task.source))
    condition = trainer.model.user_mlp(task.source[users]).detach()
    trainer._reconstruction(trainer._x0(users), condition)[0].backward()
    return {name.split(".")[0] for name, value in trainer.model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("user_mlps", ["one", "two"])
def test_x0_gets_a_gradient_where_it_is_joint_alone(user_mlps: str) -> None:
    moved = "user_mlp" if user_mlps == "one" else "target_mlp"
    assert reconstruction_gradients(small(x0="joint", user_mlps=user_mlps)) == {"unet", moved}
    for x0 in ("fixed", "detached"):
        assert reconstruction_gradients(small(x0=x0, user_mlps=user_mlps)) == {"unet"}


@pytest.mark.parametrize(("x0", "moves"), [("fixed", False), ("detached", False), ("joint", True)])
def test_the_side_stage_moves_the_feature_mlp_where_x0_is_joint(x0: str, moves: bool) -> None:
    trainer = music._Trainer(small(x0=x0, feature_epochs=0), random_task(), 3)
    trainer._end_feature_stage()
    before = copy.deepcopy(trainer.model.user_mlp.state_dict())
    list(trainer._side_stage())
    after = trainer.model.user_mlp.state_dict()
    assert [before[name].equal(after[name]) for name in before] == [not moves] * 4


def test_a_fixed_x0_stays_and_a_free_one_is_the_mlps_of_the_moment() -> None:
    task, users = random_task(), torch.arange(5)
    for x0, stays in (("fixed", True), ("detached", False), ("joint", False)):
        trainer = music._Trainer(small(x0=x0), task, 0)
        trainer._end_feature_stage()
        before = trainer._x0(users).detach().clone()
        with torch.no_grad():
            trainer.model.of_target.outer.bias.add_(0.5)
            vectors = trainer.model.of_target(task.target[users])
        assert trainer._x0(users).equal(before) == stays
        if not stays:
            torch.testing.assert_close(trainer.model.to_vectors(trainer._x0(users)), vectors)


def test_two_user_mlps_share_no_parameter_and_one_is_as_before() -> None:
    task = random_task()
    two, one = (music_of(small(user_mlps=user_mlps), task) for user_mlps in ("two", "one"))
    assert one.target_mlp is None
    assert one.of_target is one.user_mlp
    assert not {id(value) for value in two.of_target.parameters()} & {id(value) for value in two.user_mlp.parameters()}
    grown = len(list(two.parameters())) - len(list(one.parameters()))
    assert grown == 4


@pytest.mark.parametrize("standardise", [True, False])
def test_without_standardising_diffusion_works_on_the_mlps_own_scale(standardise: bool) -> None:
    task = random_task()
    trainer = music._Trainer(small(standardise=standardise), task, 0)
    trainer._end_feature_stage()
    vectors = trainer.model.eval().of_target(task.target.all()).detach()
    x0 = trainer.progress["x0"]
    assert torch.equal(x0, vectors) is not standardise
    assert float(trainer.model.scale == 1.0) == float(not standardise)
    assert float(x0.square().mean()) == pytest.approx(1.0 if standardise else float(vectors.square().mean()), rel=0.1)


def test_x0_variance_is_what_is_left_of_the_real_vectors_spread() -> None:
    task = random_task()
    config = small(x0="joint", user_mlps="two", standardise=False, feature_epochs=0, lr=0.02)

    def spread(trainer: music._Trainer) -> float:
        vectors = trainer.model.eval().of_target(task.target.all()).detach()
        return float(vectors[: len(task.source)].var(dim=0).mean())

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        trainer = music._Trainer(config, task, 0)
        start = spread(trainer)
        epochs = [place for place in islice(trainer.run(), 1 + 2 + 6) if isinstance(place, Epoch)]
        end = spread(trainer)
        generated = float(trainer.model.validate(task, 0)[1].var(dim=0, correction=0).mean())
    assert len(epochs) == 6
    assert epochs[-1].metrics["x0_variance"] == pytest.approx(end / start, rel=1e-4)
    assert epochs[-1].metrics["variance_ratio"] == pytest.approx(generated / end, rel=1e-4)
    assert abs(end / start - 1) > 0.01
    assert "x0_variance" not in last_metrics(small(), task)


def test_diffusion_works_on_vectors_of_mean_zero_and_unit_variance() -> None:
    model, x0 = music_of(small(), random_task()), 0.01 * torch.randn(500, 8) + torch.arange(8.0)
    model.fit_scale(x0)
    scaled = (x0 - model.centre) / model.scale
    np.testing.assert_allclose(scaled.mean(dim=0), np.zeros(8), atol=1e-3)
    assert float(scaled.square().mean()) == pytest.approx(1.0, abs=1e-3)
    torch.testing.assert_close(model.to_vectors(scaled), x0)


def test_batches_hold_every_rating_once_with_its_own_user() -> None:
    task = random_task(overlapping=11, each=4)
    trainer = music._Trainer(small(batch_users=3), task, 0)
    batches = list(trainer._batches(task.train))
    assert [len(users) for users, _, _ in batches] == [3, 3, 3, 3, 3, 3, 1]  # 11 overlapping and 8 side users
    for users, place, rows in batches:
        assert torch.equal(task.train.user[rows], users[place])
    assert torch.cat([rows for _, _, rows in batches]).sort().values.tolist() == list(range(len(task.train)))


def test_predictions_are_the_offset_plus_the_product_within_the_scale() -> None:
    task = random_task()
    model = music_of(small(), task).eval()
    predicted = model.predict(task.validation, task, 9)
    items, ratings = arrays(model.item_mlp), task.validation.ratings
    generator = torch.Generator().manual_seed(9)
    vectors = model.vectors(task.validation.source[torch.arange(6)], generator).detach()
    for row in range(len(ratings)):
        user, item = int(ratings.user[row]), int(ratings.item[row])
        vector = reference_mlp(items, task.items[torch.tensor([item])][0].double().numpy(), "tanh")
        offset = task.mean + float(task.item_offset[item]) + task.slope * float(task.validation.source_offset[user])
        rating = offset + float(model.gain) * (vectors[user].double().numpy() @ vector)
        assert float(predicted[row]) == pytest.approx(min(5.0, max(1.0, rating)), abs=1e-5)


def test_generation_is_the_reverse_process_step_by_step() -> None:
    """Section 3.3.4 for one user: from pure noise, the posterior mean of eq. 6 at every step, its noise but at the last."""
    task, config = random_task(), small(steps=3)
    model = music_of(config, task).eval()
    unet, process = arrays(model.unet), model.process
    raw = task.validation.source[torch.tensor([2])]
    ours = model.vectors(raw, torch.Generator().manual_seed(4)).detach()[0]
    condition = reference_mlp(arrays(model.user_mlp), raw[0].double().numpy(), "tanh")
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(1, 8, generator=generator)[0].double().numpy()
    beta = [min(0.999, 1000 / 3 * (1e-4 + (0.02 - 1e-4) * i / 2)) for i in range(3)]
    for t in (3, 2, 1):
        bar, before = math.prod(1 - b for b in beta[:t]), math.prod(1 - b for b in beta[: t - 1])
        x0 = reference_unet(unet, x, t, condition)
        x = math.sqrt(before) * beta[t - 1] / (1 - bar) * x0 + math.sqrt(1 - beta[t - 1]) * (1 - before) / (1 - bar) * x
        if t > 1:
            eps = torch.randn(1, 8, generator=generator)[0].double().numpy()
            x = x + math.sqrt(beta[t - 1] * (1 - before) / (1 - bar)) * eps
    assert process.steps == 3
    np.testing.assert_allclose(ours, x, atol=2e-5)


# --- training -----------------------------------------------------------------------------------------------------


def last_metrics(config: Config, task: Task, seed: int = 0) -> dict[str, float]:
    return dict(train_seed("music", config, task, seed)[-1].metrics)


@pytest.mark.parametrize("schedule", ["linear", "linear_scaled"])
@pytest.mark.parametrize("steps", [2, 5, 10, 20, 50])
def test_every_number_of_steps_trains_to_finite_numbers(steps: int, schedule: str) -> None:
    metrics = last_metrics(small(steps=steps, schedule=schedule), random_task())
    assert all(math.isfinite(value) for value in metrics.values()), metrics
    assert 0.5 < metrics["val_rmse"] < 4


@pytest.mark.parametrize("rate_from", music.RATE_FROM)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_trains_all_networks(activation: str, rate_from: str) -> None:
    task, config = random_task(), small(activation=activation, rate_from=rate_from)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        trainer = music._Trainer(config, task, 0)
        before = copy.deepcopy(trainer.model.state_dict())
        places = list(islice(trainer.run(), 1 + 1 + 2 + 2))
    assert [type(place).__name__ for place in places] == ["Setup", "Stage", "Stage", "Stage", "Epoch", "Epoch"]
    assert math.isfinite(places[-1].metrics["train_loss"])
    moved = {name.split(".")[0] for name, value in trainer.model.state_dict().items() if not value.equal(before[name])}
    assert {"user_mlp", "item_mlp", "unet"} <= moved


@pytest.mark.parametrize("preset", ["ours", "paper"])
def test_ablations_change_what_they_name_under_both_presets(preset: str) -> None:
    task, chosen = random_task(), {} if preset == "ours" else PRESETS[preset]
    full = last_metrics(small(**{**chosen, "epochs": 2}), task)
    for name in ("wo_diffusion", "wo_side"):
        config = small(**{**chosen, "epochs": 2, **ABLATIONS[name].config_of(preset)})
        assert getattr(config, name.removeprefix("wo_")) is False
        assert last_metrics(config, task)["train_loss"] != full["train_loss"], name
    assert ABLATIONS["wo_mllm"] == Variant(features="ratings", presets={"paper": {"user_mlps": "two"}})


def test_under_the_paper_preset_a_rating_is_the_plain_product() -> None:
    """Eq. 8: nothing that training knows of means, and no gain, is in it; the kept model gives the same."""
    task = random_task()
    for user_mlps, diffusion in (("one", True), ("two", True), ("two", False)):
        config = paper(user_mlps=user_mlps, diffusion=diffusion)
        model = music_of(config, task).eval()
        held_out, items = task.validation, arrays(model.item_mlp)
        vectors = model.vectors(held_out.source.all(), torch.Generator().manual_seed(9)).detach().double().numpy()
        predicted = model.predict(held_out, replace(task, mean=9.0, slope=9.0), 9)
        for row, (user, item) in enumerate(zip(held_out.ratings.user, held_out.ratings.item.tolist(), strict=True)):
            assert float(predicted[row]) == pytest.approx(reference_rating(vectors[user], items, task, item), abs=1e-5)
        assert model.offset(torch.arange(4), torch.ones(4)).tolist() == [0.0] * 4
        packed = music.pack(model, task)
        raw = held_out.source.all() * task.source.scale + task.source.centre
        query = RatingQuery(features=raw, source_offset=held_out.source_offset)
        alone = unpack(config, packed, 9)(query)
        assert alone.shape == (6, 20)
        if not diffusion:
            torch.testing.assert_close(alone[held_out.ratings.user, held_out.ratings.item], predicted)


def test_the_paper_preset_is_the_papers_text() -> None:
    """fidelity.md 2.2, but for `user_mlps`, which a plan with rating factors sets, and `clip`, which is the plan's."""
    assert PRESETS["paper"] == {
        "rating_offset": "none", "calibrate": False, "x0": "joint", "feature_epochs": 0, "standardise": False,
        "schedule": "linear", "rate_from": "chain", "epochs": 100, "patience": 100, "keep": "last",
    }  # fmt: skip
    defaults = Config()
    assert all(getattr(defaults, name) != value for name, value in PRESETS["paper"].items())
    assert (defaults.variance_start, defaults.variance_end, defaults.keep) == (1e-4, 0.02, "best")


@pytest.mark.parametrize(
    ("field", "choices"),
    [
        ("x0", "fixed, detached, joint"), ("user_mlps", "one, two"), ("keep", "best, last"),
        ("rating_offset", "none, global_mean, item_mean, source_offset"),
    ],
)  # fmt: skip
def test_an_unknown_choice_is_refused(field: str, choices: str) -> None:
    with pytest.raises(InputError, match=f"^{field} is 'other'; choose from {choices}$"):
        Config(**{field: "other"})


def test_without_diffusion_the_source_vector_is_used_as_it_is() -> None:
    task = random_task()
    model = music_of(small(diffusion=False), task).eval()
    raw = task.validation.source[torch.arange(6)]
    assert torch.equal(model.vectors(raw, torch.Generator()), model.user_mlp(raw))


@pytest.mark.parametrize("make", [small, paper])
def test_without_side_users_their_ratings_and_vectors_change_nothing(make: Callable[..., Config]) -> None:
    task, config = random_task(), make(side=False)
    end = len(task.overlapping)
    rating = task.train.rating.clone()
    rating[end:] = 6 - rating[end:]
    target = task.target[torch.arange(len(task.target))].clone()
    target[task.side_users] += 1.0
    other = replace(task, train=replace(task.train, rating=rating), target=rows_of(target))
    assert last_metrics(config, task) == last_metrics(config, other)
    assert last_metrics(make(), task) != last_metrics(make(), other)


def test_the_result_is_the_best_epoch_and_its_weights_predict_what_was_measured() -> None:
    task, config = random_task(seed=1), small(epochs=12, patience=4, lr=1e-2)
    *epochs, result = train_seed("music", config, task, 0)
    best = min(epochs, key=lambda epoch: epoch.metrics["val_rmse"])
    assert result.metrics["selected_epoch"] == 1 + epochs.index(best)
    assert result.metrics["val_rmse"] == best.metrics["val_rmse"]
    assert len(epochs) <= result.metrics["selected_epoch"] + 4
    again = result.predict(task.validation, task, 0)
    error = (again - task.validation.ratings.rating).double()
    assert float(error.square().mean().sqrt()) == pytest.approx(result.metrics["val_rmse"])


def test_more_samples_are_averaged() -> None:
    task = random_task()
    model = music_of(small(samples=4), task).eval()
    raw, generator = task.validation.source[torch.arange(6)], torch.Generator().manual_seed(0)
    model_of_one = music_of(small(samples=1), task).eval()
    model_of_one.load_state_dict(model.state_dict())
    draws = torch.stack([model_of_one.vectors(raw, generator) for _ in range(4)])
    torch.testing.assert_close(model.vectors(raw, torch.Generator().manual_seed(0)), draws.mean(0))


def test_a_loss_that_is_no_number_ends_the_training_and_says_so() -> None:
    with pytest.raises(FloatingPointError, match=r"^the loss is (nan|inf); lower lr$"):
        train_seed("music", small(lr=1e30, activation="relu", epochs=5), random_task(), 0)
