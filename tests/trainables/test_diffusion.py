"""The diffusion mathematics against slow float64 references written from the papers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from features.errors import InputError
from trainables.diffusion import MAX_VARIANCE, SCHEDULES, Diffusion, timestep_embedding, variances

START, END = 1e-4, 0.02
STEPS = (2, 5, 10, 20, 50)  # MuSiC Figure 3

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)
every_length = pytest.mark.parametrize("steps", STEPS)


def reference_variances(steps: int, schedule: str) -> list[float]:
    """beta_1..beta_T, number by number."""
    if schedule in ("linear_sqrt", "linear_root"):
        power = 2 if schedule == "linear_sqrt" else 1
        return [(START**0.5 + (END**0.5 - START**0.5) * t / (steps - 1)) ** power for t in range(steps)]
    scale = 1000 / steps if schedule == "linear_scaled" else 1.0
    return [min(MAX_VARIANCE, scale * (START + (END - START) * t / (steps - 1))) for t in range(steps)]


def process(steps: int, schedule: str) -> Diffusion:
    return Diffusion(variances(steps, START, END, schedule))


@every_schedule
@every_length
def test_variances_rise_as_their_schedule_says_and_stay_below_one(steps: int, schedule: str) -> None:
    beta = variances(steps, START, END, schedule)
    assert beta.dtype == torch.float64
    np.testing.assert_allclose(beta.numpy(), reference_variances(steps, schedule), rtol=1e-12)


@every_length
def test_only_the_scaled_schedule_ends_in_the_noise_that_inference_starts_from(steps: int) -> None:
    assert process(steps, "linear_scaled").signal[-1] < 0.05
    assert process(steps, "linear").signal[-1] > 0.75


@every_schedule
@every_length
def test_closed_form_equals_the_chain_in_mean_and_variance(steps: int, schedule: str) -> None:
    """x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) eps (MuSiC eq. 2) has the moments of eq. 4."""
    diffusion = process(steps, schedule)
    mean, variance = 1.0, 0.0
    for t, beta in enumerate(reference_variances(steps, schedule)):
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        assert float(diffusion.signal[t]) == pytest.approx(mean, rel=1e-6)
        assert float(diffusion.noise[t]) ** 2 == pytest.approx(variance, rel=1e-6)


@every_schedule
def test_closed_form_equals_the_simulated_chain(schedule: str) -> None:
    """400,000 chains: moments agree within five standard errors of the simulation."""
    draws, x0 = 400_000, 1.7
    diffusion, draw = process(5, schedule), np.random.default_rng(0)
    chain = np.full(draws, x0)
    for beta in reference_variances(5, schedule):
        chain = math.sqrt(1 - beta) * chain + math.sqrt(beta) * draw.normal(size=draws)
    generator = torch.Generator().manual_seed(0)
    eps = torch.randn(draws, 1, generator=generator)
    closed = diffusion.noised(torch.full((draws, 1), x0), torch.full((draws,), 5), eps).numpy()
    error = chain.std() / math.sqrt(draws)
    assert abs(chain.mean() - closed.mean()) < 5 * math.sqrt(2) * error
    assert chain.var() == pytest.approx(closed.var(), rel=5 * math.sqrt(2) * math.sqrt(2 / draws))


def test_noised_takes_each_rows_own_step() -> None:
    diffusion = process(10, "linear_scaled")
    x0, eps = torch.randn(3, 4), torch.randn(3, 4)
    together = diffusion.noised(x0, torch.tensor([1, 7, 10]), eps)
    for row, t in enumerate((1, 7, 10)):
        np.testing.assert_allclose(together[row], diffusion.signal[t - 1] * x0[row] + diffusion.noise[t - 1] * eps[row])


def normal_pdf(x: np.ndarray, mean: np.ndarray | float, variance: float) -> np.ndarray:
    return np.exp(-0.5 * (x - mean) ** 2 / variance)


def bayes(beta: list[float], t: int, x0: float, xt: float) -> tuple[float, float]:
    """Mean and standard deviation of q(x_{t-1} | x_t, x_0) by Bayes' rule on a grid of x_{t-1}."""
    bar = math.prod(1 - b for b in beta[: t - 1])
    prior_mean, prior_variance = math.sqrt(bar) * x0, 1 - bar
    step_deviation = math.sqrt(beta[t - 1] / (1 - beta[t - 1]))  # of x_{t-1} where only x_t is known
    # The posterior lies between the two means and is narrower than both.
    centre = xt / math.sqrt(1 - beta[t - 1])
    narrow = min(math.sqrt(prior_variance), step_deviation)
    grid = np.linspace(
        min(prior_mean, centre) - 12 * narrow, max(prior_mean, centre) + 12 * narrow, 2_000_001, dtype=np.float64
    )
    weight = normal_pdf(grid, prior_mean, prior_variance) * normal_pdf(
        xt, math.sqrt(1 - beta[t - 1]) * grid, beta[t - 1]
    )
    weight /= weight.sum()
    mean = float((grid * weight).sum())
    return mean, math.sqrt(float(((grid - mean) ** 2 * weight).sum()))


@every_schedule
@pytest.mark.parametrize("steps", [2, 5, 10])
def test_posterior_equals_bayes_rule_on_a_grid(steps: int, schedule: str) -> None:
    diffusion, beta = process(steps, schedule), reference_variances(steps, schedule)
    for t in range(2, steps + 1):
        x0 = 0.8
        spread = math.sqrt(1 - math.prod(1 - b for b in beta[:t]))
        xt = math.sqrt(1 - spread**2) * x0 - 0.6 * spread  # a likely x_t
        mean, deviation = bayes(beta, t, x0, xt)
        ours = float(diffusion.posterior_mean(torch.tensor([[x0]]), torch.tensor([[xt]]), t))
        assert ours == pytest.approx(mean, abs=2e-6)
        assert float(diffusion.deviation[t - 1]) == pytest.approx(deviation, rel=1e-4)


@every_schedule
@every_length
def test_the_first_step_leads_to_x0_without_noise(steps: int, schedule: str) -> None:
    diffusion = process(steps, schedule)
    assert float(diffusion.mean_x0[0]) == pytest.approx(1.0)
    assert float(diffusion.mean_xt[0]) == 0.0
    assert float(diffusion.deviation[0]) == 0.0


@every_schedule
@every_length
def test_a_denoiser_that_knows_x0_generates_it(steps: int, schedule: str) -> None:
    x0, start = torch.randn(5, 4), torch.randn(5, 4)
    generated = process(steps, schedule).generate(lambda x, t, c: x0, None, start, torch.Generator().manual_seed(0))
    np.testing.assert_allclose(generated, x0, rtol=1e-6)


def test_generation_walks_from_t_to_one_with_the_condition_at_every_step() -> None:
    condition, seen = torch.randn(3, 4), []

    def denoise(x: torch.Tensor, t: torch.Tensor, c: torch.Tensor | None) -> torch.Tensor:
        assert c is condition
        assert len(x) == len(t) == 3
        seen.append(t.tolist())
        return x

    process(5, "linear").generate(denoise, condition, torch.randn(3, 4), torch.Generator().manual_seed(0))
    assert seen == [[t] * 3 for t in (5, 4, 3, 2, 1)]


def generate_gaussian(steps: int, schedule: str, mean: float, deviation: float) -> torch.Tensor:
    """x_0 ~ N(mean, deviation^2) as the best denoiser E[x_0 | x_t], known in closed form, generates it."""
    diffusion, generator = process(steps, schedule), torch.Generator().manual_seed(1)

    def denoise(x: torch.Tensor, t: torch.Tensor, c: torch.Tensor | None) -> torch.Tensor:
        signal, noise = diffusion.signal[t - 1, None], diffusion.noise[t - 1, None]
        gain = deviation**2 * signal / (deviation**2 * signal**2 + noise**2)
        return mean + gain * (x - signal * mean)

    return diffusion.generate(denoise, None, torch.randn(40_000, 1, generator=generator), generator)


# Few steps lose variance even so: the posterior's deviation is that of a known x_0 (Ho et al. 2020, section 3.2).
@pytest.mark.parametrize(("steps", "share"), [(2, 0.14), (5, 0.07), (10, 0.37), (20, 0.60), (50, 0.78)])
def test_the_best_denoiser_of_a_gaussian_generates_its_mean_and_this_share_of_its_variance(
    steps: int, share: float
) -> None:
    generated = generate_gaussian(steps, "linear_scaled", 0.7, 0.5)
    assert float(generated.mean()) == pytest.approx(0.7, abs=0.01)
    assert float(generated.var()) / 0.25 == pytest.approx(share, abs=0.02)


@every_length
def test_without_scaling_even_the_best_denoiser_misses_the_mean(steps: int) -> None:
    assert float(generate_gaussian(steps, "linear", 0.7, 0.5).mean()) < 0.55


def test_a_schedule_that_does_not_exist_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"^schedule: unknown 'cosine'; choose from linear, linear_scaled, linear_sqrt, linear_root$"
    ):
        variances(10, START, END, "cosine")


@pytest.mark.parametrize("dim", [4, 32])
def test_timestep_embedding_is_vaswanis(dim: int) -> None:
    embedding = timestep_embedding(torch.arange(1, 51), dim)
    assert embedding.shape == (50, dim)
    for t in (1, 2, 17, 50):
        angles = [t / 10_000 ** (i / (dim // 2)) for i in range(dim // 2)]
        expected = [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        np.testing.assert_allclose(embedding[t - 1], expected, atol=1e-5)
    assert torch.cdist(embedding, embedding).fill_diagonal_(1.0).min() > 0.04  # no two steps look alike


# --- LGCD's schedule and samplers ---------------------------------------------------------------------------------


def lgcd_process(steps: int = 100) -> Diffusion:
    """Variances 1e-4 to 0.1, as LGCD sets them."""
    return Diffusion(variances(steps, 1e-4, 0.1, "linear"))


@pytest.mark.parametrize("t", [1, 2, 37, 100])
def test_forward_and_posterior_are_lgcds_equations_9_to_11_and_20(t: int) -> None:
    """In float64, with products written out."""
    beta = [1e-4 + (0.1 - 1e-4) * k / 99 for k in range(100)]
    bar, before = math.prod(1 - b for b in beta[:t]), math.prod(1 - b for b in beta[: t - 1])
    diffusion, (x0, eps, xt) = lgcd_process(), torch.randn(3, 4, 8).double()
    noised = math.sqrt(bar) * x0 + math.sqrt(1 - bar) * eps  # (11)
    found = diffusion.noised(x0.float(), torch.full((4,), t), eps.float())
    np.testing.assert_allclose(found, noised, atol=1e-5)
    mean = math.sqrt(before) * beta[t - 1] / (1 - bar) * x0
    mean = mean + math.sqrt(1 - beta[t - 1]) * (1 - before) / (1 - bar) * xt  # (20)
    np.testing.assert_allclose(diffusion.posterior_mean(x0.float(), xt.float(), t), mean, atol=1e-5)
    np.testing.assert_allclose(diffusion.clean(found, torch.full((4,), t), eps.float()), x0, atol=2e-3)


def test_generation_can_start_below_t() -> None:
    seen = []

    def denoise(x: torch.Tensor, t: torch.Tensor, c: torch.Tensor | None) -> torch.Tensor:
        seen.append(int(t[0]))
        return x

    lgcd_process().generate(denoise, None, torch.randn(2, 3), torch.Generator().manual_seed(0), first=3)
    assert seen == [3, 2, 1]


@pytest.mark.parametrize(("first", "steps", "visited"), [(50, 5, [50, 38, 26, 13, 1]), (3, 9, [3, 2, 1]), (7, 1, [7])])
def test_strided_generation_visits_evenly_spaced_steps(first: int, steps: int, visited: list[int]) -> None:
    seen = []

    def denoise(x: torch.Tensor, t: torch.Tensor, c: torch.Tensor | None) -> torch.Tensor:
        seen.append(int(t[0]))
        return x

    lgcd_process().strided(denoise, None, torch.randn(2, 3), first, steps)
    assert seen == visited


def test_strided_generation_follows_the_path_of_a_known_x0_and_noise() -> None:
    """With E[x_0 | x_t] = x_0 every x_t on the way is signal x_0 + noise eps (Song et al. 2021, eq. 12)."""
    diffusion, x0, eps = lgcd_process(), torch.randn(4, 3), torch.randn(4, 3)

    def denoise(x: torch.Tensor, t: torch.Tensor, c: torch.Tensor | None) -> torch.Tensor:
        torch.testing.assert_close(x, diffusion.noised(x0, t, eps), atol=1e-4, rtol=1e-4)
        return x0

    start = diffusion.noised(x0, torch.full((4,), 80), eps)
    torch.testing.assert_close(diffusion.strided(denoise, None, start, 80, 6), x0)


def test_strided_generation_of_a_gaussian_keeps_its_mean_and_variance() -> None:
    """The deterministic sampler with the best denoiser: 20 of 100 steps keep 0.82 of the variance."""
    diffusion, mean, deviation = lgcd_process(), 0.7, 0.5

    def denoise(x: torch.Tensor, t: torch.Tensor, c: torch.Tensor | None) -> torch.Tensor:
        signal, noise = diffusion.signal[t - 1, None], diffusion.noise[t - 1, None]
        return mean + deviation**2 * signal / (deviation**2 * signal**2 + noise**2) * (x - signal * mean)

    start = torch.randn(40_000, 1, generator=torch.Generator().manual_seed(1))
    generated = diffusion.strided(denoise, None, start, 100, 20)
    assert float(generated.mean()) == pytest.approx(mean, abs=0.03)  # x_100 still holds 0.07 x_0, pure noise does not
    assert float(generated.var()) / deviation**2 == pytest.approx(0.82, abs=0.02)
