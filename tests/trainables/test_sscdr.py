"""SSCDR: known answers of its losses, its limits, a planted map, the hops, a slow reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trainables.base_factors import BaseVectors, base_vectors
from trainables.interface import Setup
from trainables.models import sscdr
from trainables.models.sscdr import SSCDR, Config, drawn_negatives, train
from trainables.source_graph import Positives, Unrated, positives
from trainables.tasks.rating import Ratings, Task

from .worlds import normal, random_task


def model_of(task: Task, base: BaseVectors | None = None, **config: Any) -> SSCDR:
    settings = Config(**config)
    base = base or base_vectors(task, settings.dim, settings.ridge, settings.rating_offset, 0)
    return SSCDR(settings, base, positives(task, 0), len(task.source), torch.Generator().manual_seed(0))


def one_number(model: SSCDR, source: list[float], target: list[float], items: list[float]) -> None:
    """Give the model vectors of width 1, and f(z) = z."""
    model.source_PD, model.target_OD, model.items_JD = (
        torch.tensor(values, dtype=torch.float64)[:, None] for values in (source, target, items)
    )
    model.mapping = nn.Identity()


def test_the_losses_of_one_number() -> None:
    model = model_of(random_task(), lambda_u=2.0)
    one_number(model, [1.0], [0.0], [0.5, 1.0])
    user = torch.zeros(1, dtype=torch.int64)
    labelled = model.labelled_loss(user, torch.ones(1, dtype=torch.float64)).item()
    unlabelled = model.unlabelled_loss(user, user, user + 1).item()
    assert labelled == 1.0
    assert unlabelled == 0.25  # 1 + 0.25 - 1
    assert labelled + model.config.lambda_u * unlabelled == 1.5
    assert model.unlabelled_loss(user, user + 1, user).item() == 1.75
    far = model.unlabelled_loss(user, user, user).item()
    assert far == 1.0  # the margin alone


def fitted(task: Task, base: BaseVectors, monkeypatch: pytest.MonkeyPatch, epochs: int, **config: Any) -> SSCDR:
    """The model after as many full-batch epochs, with a step size that falls to nothing."""
    monkeypatch.setattr(sscdr, "base_vectors", lambda *_: base)
    places = train(Config(batch=1000, calibrate=False, rating_offset="none", **config), task, 0)
    setup = next(places)
    assert isinstance(setup, Setup)
    for epoch in range(epochs):
        setup.parts["adam"].param_groups[0]["lr"] = 0.03 * (1 - epoch / epochs)  # type: ignore[union-attr]
        next(places)
    assert isinstance(setup.network, SSCDR)
    return setup.network


def test_without_the_unlabelled_loss_it_is_a_linear_map_with_a_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    task = random_task()
    base = replace(base_vectors(task, 3, 1.0, "none", 0), source_users=normal(0, 21, 3), target_users=normal(1, 20, 3))
    model = fitted(task, base, monkeypatch, 500, lambda_u=0.0, hops=0)
    source, target = base.source_users[:12], base.target_users[:12]
    wide = torch.cat([base.source_users, torch.ones(21, 1).double()], dim=1)
    solved = torch.linalg.lstsq(wide[:12], target).solution
    with torch.no_grad():
        torch.testing.assert_close(model.mapped(torch.arange(21)), wide @ solved, atol=1e-4, rtol=0)
    assert not torch.allclose(source, target)


def planted(users: int, labelled: int, items: int, width: int) -> tuple[Task, BaseVectors, Tensor]:
    """Users who like the 8 items nearest to them, with a target vector that is a linear map of the source vector."""
    z, q, planted_map = normal(0, users, width), normal(1, items, width), normal(2, width, width)
    near = torch.cdist(z @ planted_map, q @ planted_map).argsort(dim=1)[:, :8].sort(dim=1).values
    source = Ratings(torch.arange(users).repeat_interleave(8), near.flatten(), torch.full((users * 8,), 5.0))
    task = random_task(overlapping=labelled, held_out=6, items=20)
    task = replace(task, source_ratings=source, source_items=items)
    base = base_vectors(random_task(), width, 5.0, "none", 0)
    base = replace(base, source_users=z, source_items=q, target_users=(z @ planted_map)[:labelled])
    return task, base, z @ planted_map


def test_items_teach_the_map_what_few_users_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    task, base, target = planted(users=40, labelled=5, items=400, width=8)
    errors = []
    for lambda_u in (0.0, 1.0):
        model = fitted(task, base, monkeypatch, 200, lambda_u=lambda_u, margin=0.1, hops=0)
        with torch.no_grad():
            errors.append(float((model.mapped(torch.arange(5, 40)) - target[5:]).square().mean()))
    assert errors[1] < 0.75 * errors[0]


def test_a_users_vector_is_the_mean_over_hops() -> None:
    task = random_task()
    liked = Positives(
        user=torch.tensor([0, 0, 1]), item=torch.tensor([0, 1, 1]), starts=torch.tensor([0, 2, 3, 3]), items=3
    )
    base = base_vectors(task, 1, 1.0, "none", 0)
    z, q = torch.tensor([[1.0], [3.0], [100.0]]).double(), torch.tensor([[10.0], [20.0], [1000.0]]).double()
    base = replace(base, source_users=z, source_items=q, target_users=torch.tensor([[7.0]]).double())
    rows, expected = torch.arange(3), {0: [1.0, 3.0], 1: [8.0, 11.5], 2: [17.5 / 3, 25 / 3], 3: [33.75 / 4, 42.5 / 4]}
    for hops, (first, second) in expected.items():
        model = SSCDR(Config(dim=1, hops=hops), base, liked, 1, torch.Generator().manual_seed(0))
        model.mapping = nn.Identity()
        assert model.mapped(rows).flatten().tolist() == pytest.approx([first, second, 100.0])  # who liked nothing: z_s
    model = SSCDR(Config(dim=1, hops=2, known_neighbours=True), base, liked, 1, torch.Generator().manual_seed(0))
    model.mapping = nn.Identity()
    # A' of (7, 3): i0 7, i1 5; A: u0 6, u1 5
    assert model.mapped(rows).flatten().tolist() == pytest.approx([22 / 3, 28 / 3, 100.0])


def test_items_have_no_user_bias() -> None:
    model = model_of(random_task(), rating_offset="item_mean", dim=3)
    assert model.items_JD.shape == (20, 4)
    assert not model.items_JD[:, 0].any()
    assert float(model.target_OD.square().sum(dim=1).mean()) == pytest.approx(1.0)


@pytest.mark.parametrize("mapping", ["linear", "mlp"])
def test_the_loss_of_a_batch_against_the_slow_reference(mapping: str) -> None:
    """From the text, one user and one triple at a time."""
    task = random_task(seed=2, each=9)
    model = model_of(task, dim=3, ridge=1.0, margin=0.7, mapping=mapping)
    liked = positives(task, 0)
    negative, asked = drawn_negatives(liked, Unrated(task, 12), int(liked.starts[12]), torch.Generator().manual_seed(1))
    assert asked.all()
    weights = [weight.detach().numpy() for weight in model.mapping.parameters()]

    def apply(z: np.ndarray) -> np.ndarray:
        if mapping == "linear":
            return weights[0] @ z + weights[1]
        return weights[2] @ np.tanh(weights[0] @ z + weights[1]) + weights[3]

    base = base_vectors(task, 3, 1.0, "source_offset", 0)
    scale = np.sqrt(np.mean([z @ z for z in base.target_users[:12].numpy()]))
    source, target, items = (x.numpy() / scale for x in (base.source_users, base.target_users, base.source_items))
    users = [7, 2, 5]
    labelled = np.mean([np.sum((apply(source[user]) - target[user]) ** 2) for user in users])
    hinges = []
    for user in users:
        for row in range(int(liked.starts[user]), int(liked.starts[user + 1])):
            near, far = (np.sum((apply(items[int(i)]) - target[user]) ** 2) for i in (liked.item[row], negative[row]))
            hinges.append(max(0.0, 0.7 + near - far))
    batch = torch.tensor(users)
    assert model.labelled_loss(batch, torch.ones(3).double()).item() == pytest.approx(labelled, rel=1e-10)
    row, place = sscdr.rows_of(liked.starts, batch)
    made = model.unlabelled_loss(batch[place], liked.item[row], negative[row]).item()
    assert len(row) == len(hinges)
    assert made == pytest.approx(np.mean(hinges), rel=1e-10)
