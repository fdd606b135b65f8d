"""FEARec's filters, lags and views against naive Fourier transforms in double precision."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from optuna.distributions import CategoricalDistribution
from torch import Tensor

from features.errors import InputError
from search_spaces import load_space
from trainables.interface import field_types
from trainables.models.fearec import (
    HEADS,
    LENGTHS,
    WIDTH,
    Config,
    FEARec,
    FrequencyLayer,
    Loss,
    band_filter,
    correlation,
    kept_bins,
    lag_weights,
)
from trainables.sequences.labels import training_labels
from trainables.tasks.sequential import Sequences, SequenceTask


def spectrum(signal: Tensor) -> Tensor:
    """The whole discrete Fourier transform of a real signal [n], by its sum."""
    n = len(signal)
    return torch.stack(
        [sum(signal[t] * np.exp(-2j * math.pi * f * t / n) for t in range(n)) for f in range(n)]  # type: ignore[misc]
    )


def by_hand(signal: Tensor, kept: range) -> Tensor:
    """The signal that has the kept bins (and their mirror images) of the spectrum alone."""
    n, whole = len(signal), spectrum(signal)
    bins = {f for k in kept for f in (k, (n - k) % n)}
    return torch.tensor(
        [sum(complex(whole[f]) * np.exp(2j * math.pi * f * t / n) for f in bins).real / n for t in range(n)]
    )


def read_whole(model: FEARec, item: Tensor) -> Tensor:
    """States of all positions of one history at its length n, [n, D]: filtered signals, head by head and lag by lag."""
    newest, first = item[-50:], model.layers[0]
    assert isinstance(first, FrequencyLayer)
    config = first.config
    n = next(size for size in LENGTHS if size >= len(newest))
    x, real = torch.zeros(n, WIDTH, dtype=torch.float64), torch.arange(n) >= n - len(newest)
    x[real] = model.norm(model.item(newest) + model.position.weight[50 - len(newest) :])
    past = torch.ones(n, n, dtype=torch.bool).tril() & real
    for number, layer in enumerate(model.layers):
        band = band_filter(n, number, config.global_ratio)
        query, key, value = (layer.query_key_value(x) * real[:, None]).chunk(3, dim=1)  # type: ignore[operator]
        heads = []
        for q, k, v in zip(*((band @ part).chunk(HEADS, dim=1) for part in (query, key, value)), strict=True):
            logits = (q @ k.T / math.sqrt(WIDTH / HEADS)).masked_fill(~past, -1e300)
            heads.append(logits.softmax(1) @ v)
        correlated = torch.stack([((band @ query).roll(-lag, 0) * key).sum() / WIDTH for lag in range(n)])
        best, lags = correlated.topk(min(n, int(config.topk_factor * math.log(n))))
        delayed = sum(w * value.roll(-int(lag), 0) for w, lag in zip(best.softmax(0), lags, strict=True))
        both = config.time_share * torch.cat(heads, dim=1) + (1 - config.time_share) * delayed
        x = layer.norm(x + layer.out(both))  # type: ignore[operator]
        x = layer.map_norm(x + layer.map(x))  # type: ignore[operator]
    return x


@pytest.mark.parametrize(
    ("n", "layers", "ratio", "bins"),
    [
        (50, 2, 0.6, [(10, 26), (0, 16)]),
        (50, 4, 0.6, [(10, 26), (7, 23), (4, 20), (1, 17)]),
        (50, 2, 0.4, [(13, 26), (0, 13)]),
        (8, 2, 0.8, [(1, 5), (0, 4)]),  # 5 * (1 - 0.8) is 0.9999999999999998
    ],
)
def test_the_ramp_of_kept_frequencies(n: int, layers: int, ratio: float, bins: list[tuple[int, int]]) -> None:
    assert [kept_bins(n, layer, layers, ratio) for layer in range(layers)] == bins


@pytest.mark.parametrize("n", [7, 8])
@pytest.mark.parametrize("layer", [0, 1])
def test_t3_a_filter_keeps_its_bins_and_nothing_else(n: int, layer: int) -> None:
    signal = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = by_hand(signal, range(*kept_bins(n, layer, 2, 0.6)))
    torch.testing.assert_close(band_filter(n, layer, 0.6) @ signal, wanted, atol=1e-14, rtol=0)


@pytest.mark.parametrize("n", [7, 8])
def test_t3_lags_are_read_by_their_correlation(n: int) -> None:
    """R(tau) from the product of the spectra of query and key; position t reads what stands tau later."""
    draw = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, n, 3, dtype=torch.float64, generator=draw) for _ in range(3))
    band = band_filter(n, 0, 0.6)
    correlated = torch.zeros(n, dtype=torch.float64)
    for d in range(3):
        product = spectrum(band @ query[0, :, d]) * spectrum(key[0, :, d]).conj()
        correlated += torch.tensor(
            [sum(complex(product[f]) * np.exp(2j * math.pi * f * t / n) for f in range(n)).real / n for t in range(n)]
        )
    correlated /= 3
    lags = correlated.argsort(descending=True)[: int(3 * math.log(n))]
    weight = correlated[lags].softmax(0)
    wanted = sum(w * value[0].roll(-int(lag), 0) for w, lag in zip(weight, lags, strict=True))
    found = correlation(query @ key.transpose(1, 2), band) / 3
    torch.testing.assert_close(found[0], correlated, atol=1e-13, rtol=0)
    read = lag_weights(found, 3.0).transpose(1, 2) @ value
    torch.testing.assert_close(read[0], wanted, atol=1e-13, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["paper", "wide"])
def test_a_history_of_any_length_is_read_by_all_choices_of_the_spaces(variant: str) -> None:
    space = load_space(f"fearec/{variant}", field_types(Config))
    choices = {
        parameter.name: parameter.distribution.choices
        for parameter in space.parameters
        if isinstance(parameter.distribution, CategoricalDistribution)
    }
    for ratio, factor in itertools.product(choices["global_ratio"], choices["topk_factor"]):
        model = FEARec(Config(global_ratio=ratio, topk_factor=factor), 60).eval()  # type: ignore[arg-type]
        for n in LENGTHS:
            assert model.users(Sequences(torch.arange(n), torch.tensor([0, n])), (0, n)).isfinite().all()


@torch.no_grad()
def test_training_at_all_positions_would_leak() -> None:
    """A later item changes the states before it, so that only the last state of a pass may predict anything."""
    torch.manual_seed(0)
    model = FEARec(Config(), 40).double().eval()
    item = torch.randint(40, (8,))
    other = item.clone()
    other[7] = (item[7] + 1) % 40
    assert float((read_whole(model, item)[3] - read_whole(model, other)[3]).abs().max()) > 1e-6


@torch.no_grad()
def test_padding_is_in_no_filter() -> None:
    """Eleven items are read at length 16; what the batch pads them with changes nothing."""
    torch.manual_seed(0)
    model = FEARec(Config(), 40).double().eval()
    item, length = torch.randint(40, (1, 11)), torch.tensor([11])
    longer, table = torch.cat([item, torch.randint(40, (1, 20))], dim=1), model.item.weight
    assert model.encode(table, longer, length).equal(model.encode(table, item, length))


@torch.no_grad()
@pytest.mark.parametrize(
    "fields", [{}, {"time_share": 1.0}, {"time_share": 0.0, "topk_factor": 3.0}, {"global_ratio": 0.8}]
)
def test_a_history_is_read_at_the_shortest_length_that_holds_it(fields: dict[str, float]) -> None:
    torch.manual_seed(0)
    model = FEARec(Config(**fields), 40).double().eval()
    rows = [torch.randint(40, (size,)) for size in (1, 8, 9, 16, 31, 50, 60)]
    starts = torch.tensor([0, *np.cumsum([len(row) for row in rows])])
    states = model.users(Sequences(torch.cat(rows), starts), (0, 40))
    for state, row in zip(states, rows, strict=True):
        torch.testing.assert_close(state, read_whole(model, row)[-1], atol=1e-12, rtol=0)


@torch.no_grad()
def test_the_loss_is_a_softmax_a_contrast_of_views_and_a_distance_of_spectra(task: SequenceTask) -> None:
    config = Config(dropout=0.0, negatives=20_000, contrast=0.3, frequency_weight=0.7)
    torch.manual_seed(0)
    model = FEARec(config, task.items).eval()
    labels = training_labels(task, "merged")
    chosen = labels.one_each(np.random.default_rng(0))[:6]
    made = Loss(config, task, labels, np.random.default_rng(1))
    found = float(made(model, chosen))

    draw = np.random.default_rng(1)
    for low, high in (task.source, task.target):
        draw.integers(low, high, 20_000)
    assert made.twins is not None
    one, two = (
        model.encode(model.item.weight, *labels.histories(read, 50)) for read in (chosen, made.twins.draw(chosen, draw))
    )
    main = 0.0
    for state, label in zip(one, labels.item[chosen].tolist(), strict=True):
        low, high = task.target if task.target[0] <= label < task.target[1] else task.source
        main -= float((model.item.weight[low:high] @ state).log_softmax(0)[label - low]) / 6
    both, names = torch.cat([one, two]), labels.item[chosen].repeat(2)
    tied = 0.0
    for row in range(12):
        partner = (row + 6) % 12
        others = [k for k in range(12) if k == partner or names[k] != names[row]]
        logits = torch.stack([both[row] @ both[k] for k in others])
        tied -= float(logits.log_softmax(0)[others.index(partner)]) / 12
    apart = torch.stack([spectrum(row)[: WIDTH // 2 + 1] for row in (one - two)]).abs().mean() / math.sqrt(WIDTH)
    assert found == pytest.approx(main + 0.3 * tied + 0.7 * float(apart), rel=0.01)


def test_faults_of_a_config_are_told_together() -> None:
    with pytest.raises(InputError) as fault:
        Config(global_ratio=0.0, time_share=1.5, tau=0.0, contrast=-1.0, sequences="both")
    for line in (
        "global_ratio is 0.0; give a number above 0, up to 1",
        "time_share is 1.5; give a number from 0 to 1",
        "tau is 0.0; give a number above 0",
        "contrast is -1.0; give a number of at least 0",
        "sequences is 'both'; choose from merged, target",
    ):
        assert line in str(fault.value)
