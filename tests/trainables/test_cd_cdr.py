"""CD-CDR's schedule, condition, guidance and chain against closed forms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from features.errors import InputError
from trainables.diffusion import SameForAll, normal_like
from trainables.interface import make_config
from trainables.models.cd_cdr import CDCDR, DEVIATION, WIDTH, Config, exponential
from trainables.sequences.views import newest_of_each
from trainables.tasks.sequential import Sequences, SequenceTask

from .training import train_seed

SOURCE, TARGET = (0, 20), (20, 50)


def network(**changes: Any) -> CDCDR:
    torch.manual_seed(0)
    return CDCDR(Config(**changes), 50, SOURCE, TARGET, 0).eval()


def bags(model: CDCDR, items: list[int]) -> Any:
    history = Sequences(torch.tensor(items, dtype=torch.int64), torch.tensor([0, len(items)]))
    return [newest_of_each(history, domain, 10) for domain in (SOURCE, TARGET)]


@pytest.mark.parametrize("steps", [1, 2, 10, 100, 1000])
def test_what_is_left_of_the_signal_does_not_depend_on_the_steps(steps: int) -> None:
    assert float((1 - exponential(steps)).prod()) == pytest.approx(0.00640933, rel=1e-5)


@torch.no_grad()
def test_the_pool_is_self_attention_and_a_mean() -> None:
    model, items = network(), [3, 7, 11]
    e = model.item.weight[torch.tensor(items)]
    query, key, value = (e @ linear.weight.T for linear in (model.query, model.key, model.value))
    read = [((query[i] @ key.T) / math.sqrt(WIDTH)).softmax(0) @ value for i in range(3)]
    found = model.pooled(bags(model, items)[:1], model.item.weight)[0, 0]
    torch.testing.assert_close(found, torch.stack(read).mean(dim=0), atol=1e-5, rtol=1e-5)
    several = Sequences(torch.tensor([9, 3, 7, 11]), torch.tensor([0, 1, 1, 4]))
    pools = model.pooled([newest_of_each(several, SOURCE, 10)], model.item.weight)[:, 0]
    wanted = torch.stack([model.value(model.item.weight[9]), torch.zeros(WIDTH), found])
    torch.testing.assert_close(pools, wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_condition_of_one_domain_is_its_pool_and_of_both_is_weighed_by_the_indicator() -> None:
    model = network()
    (source, target), weights = bags(model, [3, 7, 22, 31]), model.item.weight
    (alone, none) = bags(model, [3, 7])
    torch.testing.assert_close(model.condition(alone, none, 1, weights), model.pooled([alone], weights)[:, 0])
    pools = model.pooled([source, target], weights)[0]
    share = (pools @ model.wanted[1] / math.sqrt(WIDTH)).softmax(0)
    torch.testing.assert_close(model.condition(source, target, 1, weights)[0], share @ pools)
    plain = network(attention=False)
    torch.testing.assert_close(plain.condition(source, target, 1, plain.item.weight)[0], pools.mean(dim=0))


@torch.no_grad()
def test_without_a_history_the_guidance_changes_nothing() -> None:
    one, other = network(guidance=0.0), network(guidance=3.0)
    empty = bags(one, [])
    x, t = torch.randn(1, WIDTH), torch.tensor([5])
    condition = one.condition(*empty, 1, one.item.weight)
    torch.testing.assert_close(condition[0], one.nothing)
    torch.testing.assert_close(one.guided(x, t, condition), other.guided(x, t, condition), atol=1e-5, rtol=1e-5)
    some = one.condition(*bags(one, [3, 22]), 1, one.item.weight)
    assert one.guided(x, t, some).equal(one.predicted(x, t, some))
    wanted = 4 * other.predicted(x, t, some) - 3 * other.predicted(x, t, other.nothing)
    torch.testing.assert_close(other.guided(x, t, some), wanted)


@torch.no_grad()
def test_one_linear_map_makes_the_whole_chain_affine_in_the_condition() -> None:
    """With the same noise for all rows, D + 1 probes tell what every condition generates."""
    model = network(steps=10)

    def chain(condition: Tensor) -> Tensor:
        noise = SameForAll(torch.Generator().manual_seed(0))
        start = normal_like(condition, noise)
        return model.diffusion.generate(lambda x, t, _: model.guided(x, t, condition), None, start, noise)

    base = chain(torch.zeros(1, WIDTH))
    probes = chain(torch.eye(WIDTH)) - base
    some = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(chain(some), base + some @ probes, atol=1e-5, rtol=1e-4)
    assert float(probes.abs().max()) > 1e-3


@torch.no_grad()
def test_a_denoiser_that_knows_the_item_generates_it() -> None:
    model, item = network(steps=10), torch.randn(4, WIDTH)
    noise = torch.Generator().manual_seed(0)
    made = model.diffusion.generate(lambda x, t, c: item, None, torch.randn(4, WIDTH), noise)
    torch.testing.assert_close(made, item, atol=1e-5, rtol=1e-5)


def test_the_table_keeps_its_variance(task: SequenceTask) -> None:
    config = make_config("cd_cdr", {"epochs": 6, "batch": 64, "negatives": 30, "steps": 10, "lr": 3e-3}, "config")
    variances = [epoch.metrics["item_variance"] for epoch in train_seed("cd_cdr", config, task, 0)]
    assert min(variances) > 0.8 * DEVIATION**2
    assert np.isfinite(variances).all()


def test_faults_of_a_config_are_told_together() -> None:
    with pytest.raises(InputError) as fault:
        Config(denoiser="mlp3", drop=1.0, steps=0, guidance=-1.0)
    for line in (
        "denoiser is 'mlp3'; choose from mlp1, mlp2",
        "drop is 1.0; give a number of at least 0, below 1",
        "steps is 0; give a number of at least 1",
        "guidance is -1.0; give a number of at least 0",
    ):
        assert line in str(fault.value)
