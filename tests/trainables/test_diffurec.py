"""DiffuRec's schedule, posterior and approximator against closed forms."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from features.errors import InputError
from trainables.diffusion import Diffusion, SameForAll
from trainables.models.diffurec import ABLATIONS, MAX_LENGTH, WIDTH, Config, DiffuRec, truncated_linear

from .sequence_worlds import histories


def network(config: Config, seed: int = 0) -> DiffuRec:
    torch.manual_seed(0)
    return DiffuRec(config, 40, seed).eval()


def test_the_variances_of_the_code() -> None:
    beta = truncated_linear(32)
    bar = (1 - beta).cumprod(0)
    assert float(beta[0]) == pytest.approx(0.013125)
    assert float(beta[31]) == pytest.approx(0.635)
    assert [float(bar[t - 1]) for t in (1, 16, 32)] == pytest.approx([0.986875, 0.05198, 9.90e-7], rel=1e-3)
    assert float(truncated_linear(16).max()) == pytest.approx(0.999)  # where the code leaves half of the signal


def test_the_posterior_of_two_steps() -> None:
    tables = Diffusion(torch.tensor([0.1, 0.5], dtype=torch.float64))
    found = [float(tables.mean_x0[1]), float(tables.mean_xt[1]), float(tables.deviation[1]) ** 2]
    assert found == pytest.approx([0.862439, 0.128565, 0.0909091], rel=1e-5)
    assert [float(tables.mean_x0[0]), float(tables.mean_xt[0]), float(tables.deviation[0])] == pytest.approx([1, 0, 0])


def test_the_posterior_is_bayes_rule_on_a_grid() -> None:
    """q(x_1 | x_2, x_0) is q(x_2 | x_1) q(x_1 | x_0), normalised."""
    beta, x0, x2 = torch.tensor([0.1, 0.5], dtype=torch.float64), 0.7, -0.4
    grid = torch.linspace(-8, 8, 200_001, dtype=torch.float64)
    log = -((x2 - (1 - beta[1]).sqrt() * grid) ** 2) / (2 * beta[1]) - (grid - (1 - beta[0]).sqrt() * x0) ** 2 / (
        2 * beta[0]
    )
    weight = log.softmax(0)
    mean = float((weight * grid).sum())
    tables = Diffusion(beta)
    wanted = float(tables.posterior_mean(torch.tensor(x0), torch.tensor(x2), 2))
    assert wanted == pytest.approx(mean, abs=1e-6)
    assert float(tables.deviation[1]) ** 2 == pytest.approx(float((weight * (grid - mean) ** 2).sum()), abs=1e-6)


@torch.no_grad()
def test_without_weight_the_noise_changes_nothing() -> None:
    rows = histories([5, 2, 9], [3], [8, 1, 30, 4])
    config = Config(**ABLATIONS["wo_diffusion"].config, steps=4, sampler_steps=1)
    one, two = (network(config, seed).users(rows, (0, 40)) for seed in (0, 1))
    assert one.equal(two)
    noisy = replace(config, delta=0.5)
    first, again, other = (network(noisy, seed).users(rows, (0, 40)) for seed in (0, 0, 1))
    assert first.equal(again)
    assert not first.equal(other)


@torch.no_grad()
@pytest.mark.parametrize("positions", [False, True])
def test_the_order_of_the_items_before_the_last_is_seen_by_positions_alone(positions: bool) -> None:
    config = Config(steps=4, delta=0.0, positions=positions)
    states = network(config).users(histories([4, 8, 15, 16, 23], [15, 4, 16, 8, 23]), (0, 40))
    assert (float((states[0] - states[1]).abs().max()) < 1e-5) is not positions


@torch.no_grad()
def test_lambda_has_its_mean_and_deviation_at_every_position_and_coordinate() -> None:
    model = network(Config(delta=0.2))
    weights = model.weights(torch.zeros(400, 7, WIDTH), torch.Generator().manual_seed(0))
    assert weights.shape == (400, 7, WIDTH)
    assert float(weights.mean()) == pytest.approx(0.2, abs=0.002)
    assert float(weights.std()) == pytest.approx(0.2, abs=0.002)
    fixed = network(Config(**ABLATIONS["fixed_lambda"].config, delta=0.2))
    assert fixed.weights(torch.zeros(2, 3, WIDTH), torch.Generator()).unique().tolist() == pytest.approx([0.2])


@torch.no_grad()
def test_padded_items_are_read_by_nobody() -> None:
    model = network(Config(steps=4, positions=True))
    item, length = torch.randint(40, (1, 6)), torch.tensor([6])
    longer = torch.cat([item, torch.randint(40, (1, 9))], dim=1)
    noised, t = torch.randn(1, WIDTH), torch.tensor([3])
    states = [
        model.denoise(model.item(given), length, noised, t, SameForAll(torch.Generator().manual_seed(0)))
        for given in (item, longer)
    ]
    torch.testing.assert_close(states[0], states[1], atol=1e-5, rtol=0)
    assert longer.shape[1] <= MAX_LENGTH


def test_faults_of_a_config_are_told_together() -> None:
    with pytest.raises(InputError) as fault:
        Config(steps=0, delta=-1.0, dropout_embed=1.0, blocks=0)
    for line in (
        "steps is 0; give a number of at least 1",
        "delta is -1.0; give a number of at least 0",
        "dropout_embed is 1.0; give a number of at least 0, below 1",
        "blocks is 0; give a number of at least 1",
    ):
        assert line in str(fault.value)
