"""DiffCDR: the sampler's known answers, the affine identity, a slow network, a planted map."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trainables.base_factors import base_vectors
from trainables.interface import Setup
from trainables.mapped_users import rows_of
from trainables.models import diffcdr
from trainables.models.diffcdr import (
    Config,
    DiffCDR,
    NoiseNetwork,
    evaluation_times,
    log_alpha,
    sample,
    sigma_of,
    solver_steps,
    time_embedding,
    train,
)
from trainables.tasks.rating import Task

from .worlds import normal, random_task

GROWTH = 152.169488  # alpha at the end / alpha at the start
ONE = torch.ones(1, 1, dtype=torch.float64)


def network(seed: int = 0, width: int = 4, **config: Any) -> NoiseNetwork:
    """A network with biases that are not zero."""
    made = NoiseNetwork(Config(**config), width, torch.Generator().manual_seed(seed))
    for layer in (made.of_time, made.of_condition, made.first, made.second, made.third):
        torch.nn.init.normal_(layer.bias, std=0.3, generator=torch.Generator().manual_seed(seed + 1))
    return made


# --- the sampler --------------------------------------------------------------------------------------------------


def test_without_noise_the_start_grows_as_the_signal_does() -> None:
    assert sample(lambda x, _: torch.zeros_like(x), ONE, 30).item() == pytest.approx(GROWTH, abs=1e-6)


@pytest.mark.parametrize("evaluations", [1, 2, 3, 5, 10, 30])
def test_constant_noise_is_solved_exactly(evaluations: int) -> None:
    """Dx / d(sigma / alpha) is then constant in units of alpha."""
    edges = torch.tensor([1.0, 1e-4], dtype=torch.float64)
    (alpha_1, alpha_0), (sigma_1, sigma_0) = log_alpha(edges).exp().tolist(), sigma_of(edges).tolist()
    exact = alpha_0 / alpha_1 - 0.7 * alpha_0 * (sigma_1 / alpha_1 - sigma_0 / alpha_0)
    assert sample(lambda x, _: torch.full_like(x, 0.7), ONE, evaluations).item() == pytest.approx(exact, rel=1e-10)
    assert len(evaluation_times(evaluations)) == evaluations


@pytest.mark.parametrize(("slope", "solved"), [(1.0, 0.501346), (0.5, 8.7613)])
def test_noise_in_proportion_to_x(slope: float, solved: float) -> None:
    """The exact answers are 152.169488 exp(-5.714958 slope), 0.501594 and 8.7366."""
    exact = GROWTH * math.exp(-5.714958 * slope)
    x_0 = sample(lambda x, _: slope * x, ONE, 30).item()
    assert x_0 == pytest.approx(solved, rel=1e-5)
    errors = [abs(sample(lambda x, _: slope * x, ONE, count).item() - exact) for count in (15, 30, 60, 120)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4 * exact


def test_the_best_noise_for_a_normal_distribution_brings_its_quantiles_back() -> None:
    times = torch.tensor(evaluation_times(30), dtype=torch.float64)
    alpha, sigma = log_alpha(times).exp(), sigma_of(times)

    def noise(x: Tensor, number: int) -> Tensor:
        a, s = alpha[number], sigma[number]
        return s * (x - 0.3 * a) / (a**2 * 0.25 + s**2)

    x_0 = sample(noise, torch.tensor([[-1.0], [0.0], [1.5]]).double(), 30)
    assert x_0.flatten().tolist() == pytest.approx([-0.2021, 0.2990, 1.0506], abs=1e-4)


def test_steps_are_even_in_the_signal_to_noise_ratio() -> None:
    orders = {count: [len(points) - 1 for points in solver_steps(count)] for count in (3, 4, 5, 30)}
    assert orders == {3: [2, 1], 4: [3, 1], 5: [3, 2], 30: [3] * 9 + [2, 1]}
    points = solver_steps(30)
    assert points[0][0].time == pytest.approx(1.0)
    assert points[-1][-1].time == pytest.approx(1e-4, rel=1e-6)
    np.testing.assert_allclose(np.diff([step[0].ratio for step in points]), points[-1][-1].ratio - points[-1][0].ratio)


# --- the network --------------------------------------------------------------------------------------------------


def slow_noise(net: NoiseNetwork, x: np.ndarray, z: np.ndarray, mask: float, time: float) -> np.ndarray:
    """From the text, one user."""
    weight = {name: parameter.detach().numpy() for name, parameter in net.named_parameters()}
    half, angle = net.config.hidden // 2, 1000 * max(time - 1e-3, 0)
    angles = [angle * math.exp(-math.log(10_000) * k / (half - 1)) for k in range(half)]
    tau = np.array([*map(math.sin, angles), *map(math.cos, angles)])
    h = x + weight["of_time.weight"] @ tau + weight["of_time.bias"]
    h = h + mask * (weight["of_condition.weight"] @ z + weight["of_condition.bias"])
    for layer in ("first", "second", "third"):
        h = weight[f"{layer}.weight"] @ h + weight[f"{layer}.bias"]
        if net.config.network == "mlp" and layer != "third":
            h = h / (1 + np.exp(-h))
    return h


@pytest.mark.parametrize("kind", ["affine", "mlp"])
def test_the_noise_against_three_layers_and_two_guided_calls(kind: str) -> None:
    net, x, z = network(network=kind, hidden=6, guidance=0.7), normal(0, 5, 4), normal(1, 5, 4)
    times = torch.tensor([0.0, 5e-4, 0.2, 0.7, 1.0], dtype=torch.float64)
    mask = torch.tensor([[1.0], [0.0], [1.0], [0.0], [1.0]]).double()
    made = net(x, z, mask, net.time_shifts(times)).detach().numpy()
    guided = net.guided(z)(x, 3).detach().numpy()
    at = evaluation_times(30)[3]
    for user in range(5):
        row = x[user].numpy(), z[user].numpy()
        np.testing.assert_allclose(made[user], slow_noise(net, *row, float(mask[user]), float(times[user])), atol=1e-12)
        free, bound = (slow_noise(net, *row, on, at) for on in (0.0, 1.0))
        np.testing.assert_allclose(guided[user], free + 0.7 * (bound - free), atol=1e-12)
    assert time_embedding(times, 6).shape == (5, 6)


def test_the_affine_identity_is_the_chain() -> None:
    net, x, z = network(hidden=6, guidance=0.7), normal(0, 50, 4), normal(1, 50, 4)
    with torch.no_grad():
        chain = sample(net.guided(z), x, 30)
        torch.testing.assert_close(net.generate(x, z), chain, rtol=1e-11, atol=1e-11 * float(chain.abs().max()))


def test_without_guidance_the_condition_counts_only_as_the_start() -> None:
    net, x, z = network(guidance=0.0), normal(0, 5, 4), normal(1, 5, 4)
    torch.testing.assert_close(net.generate(x, z), net.generate(x, -z))
    guided = network(guidance=0.5)
    assert not torch.allclose(guided.generate(x, z), guided.generate(x, -z))


# --- training -----------------------------------------------------------------------------------------------------


def model_of(task: Task, **config: Any) -> DiffCDR:
    settings = Config(dim=3, ridge=1.0, hidden=6, **config)
    base = base_vectors(task, 3, 1.0, settings.rating_offset, 0)
    return DiffCDR(settings, base, len(task.source), 0, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["affine", "mlp"])
def test_both_losses_against_the_slow_reference_and_who_they_teach(kind: str) -> None:
    task = random_task(seed=2)
    model, users = model_of(task, network=kind, task_weight=0.7, mask=0.5), torch.tensor([4, 9, 1])
    weight = torch.tensor([0.5, 1.0, 1.5]).double()
    loss = model.noise_loss(users, weight, torch.Generator().manual_seed(5))
    draw = torch.Generator().manual_seed(5)
    half = torch.rand(2, generator=draw, dtype=torch.float64)
    noise = torch.randn((3, 3), generator=draw, dtype=torch.float64)
    kept = torch.rand((3, 1), generator=draw, dtype=torch.float64) >= 0.5
    slow = 0.0
    for place, time in enumerate([float(half[0]), float(half[1]), 1 - float(half[0])]):
        log = -(time**2) * 19.9 / 4 - time * 0.05
        x = math.exp(log) * model.target_OD[users[place]] + math.sqrt(1 - math.exp(2 * log)) * noise[place]
        z = model.source_PD[users[place]].numpy()
        error = np.abs(slow_noise(model.network, x.numpy(), z, float(kept[place]), time) - noise[place].numpy())
        slow += float(weight[place]) * np.where(error < 1, error**2 / 2, error - 0.5).mean() / 3
    assert loss.item() == pytest.approx(slow, rel=1e-10)
    row, place_N = rows_of(task.overlapping.starts, users)
    item, wanted = task.overlapping.item[row], model.base.residual[row]
    aligned = model.alignment_loss(users, weight, place_N, item, wanted, torch.Generator())
    x_0 = model.generated(users, 1, torch.Generator())
    made = (x_0 @ model.align.weight.T).detach().numpy()
    error = np.abs(made - model.target_OD[users].numpy())
    slow = float((weight.numpy() * np.where(error < 1, error**2 / 2, error - 0.5).mean(axis=1)).mean())
    rated = [
        model.scale * made[place] @ model.base.target_items[i].numpy() for place, i in zip(place_N, item, strict=True)
    ]
    slow += 0.7 * float(np.mean((wanted.numpy() - np.array(rated)) ** 2))
    assert aligned.item() == pytest.approx(slow, rel=1e-8)
    aligned.backward()
    assert all(parameter.grad is None for parameter in model.network.parameters())
    assert model.align.weight.grad is not None


def test_vectors_enter_with_a_root_mean_square_of_one() -> None:
    model = model_of(random_task())
    for vectors in (model.source_PD[:12], model.target_OD):
        assert float(vectors.square().mean()) == pytest.approx(1.0)


def fitted(task: Task, base: Any, monkeypatch: pytest.MonkeyPatch, epochs: int, **config: Any) -> DiffCDR:
    """The model after as many full-batch epochs, with a step size that falls to nothing."""
    monkeypatch.setattr(diffcdr, "base_vectors", lambda *_: base)
    places = train(Config(batch=1000, calibrate=False, rating_offset="none", **config), task, 0)
    setup = next(places)
    assert isinstance(setup, Setup)
    for epoch in range(epochs):
        for adam in ("network_adam", "align_adam"):
            setup.parts[adam].param_groups[0]["lr"] = 0.03 * (1 - epoch / epochs)  # type: ignore[union-attr]
        next(places)
    assert isinstance(setup.network, DiffCDR)
    return setup.network


def planted(users: int = 60) -> tuple[Task, Any, Tensor]:
    source, turn = normal(0, users + 9, 3), normal(1, 3, 3)
    task = random_task(overlapping=users)
    base = base_vectors(random_task(), 3, 1.0, "none", 0)
    base = replace(
        base, source_users=source, target_users=(source @ turn)[:users], residual=torch.zeros(users * 5).double()
    )
    return task, base, source @ turn


def test_a_planted_map_is_recovered_by_the_alignment_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    task, base, target = planted()
    model = fitted(task, base, monkeypatch, 500, diffusion=False, task_weight=0.0)
    with torch.no_grad():
        torch.testing.assert_close(model.mapped(torch.arange(69)), target, atol=1e-3, rtol=0)


def test_what_it_generates_from_held_out_users_carries_a_planted_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """x_0 is affine in the source vector, so nothing is lost on the way: least squares behind it recover the map.

    The alignment layer's own Adam does so slowly, because x_0 has directions of very different lengths.
    """
    task, base, target = planted()
    model = fitted(task, base, monkeypatch, 60, task_weight=0.0, hidden=16, evaluations=10)
    with torch.no_grad():
        x_0, rows = model.generated(torch.arange(69), 1, torch.Generator()), slice(60, 69)
    wide = torch.cat([x_0, torch.ones(69, 1).double()], dim=1)
    solved = torch.linalg.lstsq(wide[:60], target[:60]).solution
    torch.testing.assert_close(wide[rows] @ solved, target[rows], atol=1e-6, rtol=0)


def test_from_noise_it_is_the_mean_of_draws_that_the_seed_decides() -> None:
    task, rows = random_task(), torch.arange(5)
    model = model_of(task, start="noise", samples=3)
    once = model.mapped(rows)
    assert torch.equal(once, model.mapped(rows))
    draw = torch.Generator().manual_seed(0)
    z = model.source_PD[rows]
    drawn = [torch.randn((5, 3), generator=draw, dtype=torch.float64) for _ in range(3)]
    chains = torch.stack([sample(model.network.guided(z), start, 30) for start in drawn])
    torch.testing.assert_close(once, model.scale * model.align(chains.mean(dim=0)), rtol=1e-8, atol=1e-8)
    other = DiffCDR(model.config, model.base, 12, 1, torch.Generator().manual_seed(0))
    assert not torch.allclose(other.mapped(rows), once)
