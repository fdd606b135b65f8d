"""DA-DAN's losses, reversal and routes against closed forms."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from features.errors import InputError
from trainables.models.da_dan import DADAN, WIDTH, Config, Discriminator, Loss, difference_loss
from trainables.sequences.views import Bag
from trainables.tasks.sequential import Sequences, SequenceTask

SOURCE, TARGET = (0, 20), (20, 50)


def network(**changes: Any) -> DADAN:
    torch.manual_seed(0)
    made = DADAN(Config(**changes), 50, SOURCE, TARGET).eval()
    torch.nn.init.normal_(made.item.weight, std=0.5)
    return made


def test_the_difference_of_codes() -> None:
    assert float(difference_loss(torch.tensor([[0.6, 0.8]]), torch.tensor([[1.0, 0.0]]))) == pytest.approx(
        0.25, rel=1e-5
    )
    assert float(difference_loss(torch.eye(2), torch.eye(2))) == pytest.approx(0.5, rel=1e-5)


@torch.no_grad()
def test_discriminators_that_know_nothing_cost_four_logs_of_two() -> None:
    blind = Discriminator(8)
    for parameter in blind.parameters():
        torch.nn.init.zeros_(parameter)
    codes = torch.randn(5, 8)
    assert sum(float(blind.loss(codes, label, 1.0)) for label in (1, 0, 1, 0)) == pytest.approx(
        4 * math.log(2), rel=1e-6
    )


def test_the_gradient_of_the_encoder_is_reversed(task: SequenceTask) -> None:
    """Of the encoder: that of the other losses less kappa gamma times that of the adversarial loss."""
    config = Config(dropout=0.0, adversarial=0.3, reversal=0.7, negatives=30)
    torch.manual_seed(0)
    model = DADAN(config, task.items, task.source, task.target).double()
    wanted = {}
    for name, weight, factor in (("all", 0.3, 0.7), ("without", 0.0, 0.7), ("upright", 0.3, -1.0)):
        made = Loss(config, task, np.random.default_rng(0))
        made.config = replace(config, adversarial=weight)
        object.__setattr__(
            made.config, "reversal", factor
        )  # a negative one is refused, and leaves the gradient upright
        model.zero_grad()
        made(model, *next(made.epoch())).backward()  # type: ignore[no-untyped-call]
        gradient = model.item.weight.grad
        assert gradient is not None
        wanted[name] = gradient.clone()
    adversarial = wanted["upright"] - wanted["without"]  # gamma times the gradient of L_adv, not reversed
    torch.testing.assert_close(wanted["all"], wanted["without"] - 0.7 * adversarial, atol=1e-9, rtol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("route", ["target", "mean", "source"])
def test_routes_and_what_an_empty_half_leaves_to_the_other(route: str) -> None:
    model = network(route=route, bridge=False)
    history = Sequences(torch.tensor([3, 25, 4, 26, 5, 6, 31]), torch.tensor([0, 4, 6, 7]))  # both, source, target
    users = model.users(history, model.target)[:, :-1]

    def code(items: list[int], domain: int) -> Any:
        bag = Bag(torch.tensor([items]), torch.ones(1, len(items), dtype=torch.bool))
        return model.common(model.state(bag, model.item.weight, domain))[1][0]

    both = {"target": code([25, 26], 1), "source": code([3, 4], 0)}
    both["mean"] = (both["target"] + both["source"]) / 2
    torch.testing.assert_close(users[0], both[route], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(users[1], code([5, 6], 0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(users[2], code([31], 1), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_bridge_adds_the_source_state_to_every_target_item() -> None:
    model = network()
    history = Sequences(torch.tensor([3, 25, 4, 26]), torch.tensor([0, 4]))
    source = model.state(Bag(torch.tensor([[3, 4]]), torch.ones(1, 2, dtype=torch.bool)), model.item.weight, 0)
    table = model.item.weight + source / WIDTH**0.5  # what is read is sqrt(D) times the table
    state = model.state(Bag(torch.tensor([[25, 26]]), torch.ones(1, 2, dtype=torch.bool)), table, 1)
    torch.testing.assert_close(model.users(history, model.target)[:, :-1], model.common(state)[1], atol=1e-5, rtol=1e-5)
    assert model.users(history, model.target).shape == (1, WIDTH + 1)


@torch.no_grad()
@pytest.mark.parametrize("bridge", [True, False])
def test_t1_no_state_depends_on_a_later_item(bridge: bool) -> None:
    model = network(bridge=bridge).double()
    items, beside = torch.randint(*TARGET, (4, 7)), torch.randn(4, WIDTH, dtype=torch.float64) if bridge else None
    before = model.states(items, model.item.weight, beside)
    for last in range(6):
        changed = items.clone()
        changed[:, last + 1 :] = torch.randint(*TARGET, (4, 6 - last))
        after = model.states(changed, model.item.weight, beside)
        assert after[:, : last + 1].equal(before[:, : last + 1])
        assert not after[:, last + 1].equal(before[:, last + 1])
        bag = Bag(changed[:, : last + 1], torch.ones(4, last + 1, dtype=torch.bool))
        scored = model.state(bag, model.item.weight, 1, beside)
        torch.testing.assert_close(after[:, last], scored, atol=1e-12, rtol=1e-12)  # as histories are read


def test_faults_of_a_config_are_told_together() -> None:
    with pytest.raises(InputError) as fault:
        Config(route="both", adversarial=-1.0, common=0)
    for line in (
        "route is 'both'; choose from target, mean, source",
        "adversarial is -1.0; give a number of at least 0",
        "common is 0; give a number of at least 1",
    ):
        assert line in str(fault.value)
