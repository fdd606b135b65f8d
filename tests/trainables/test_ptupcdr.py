"""PTUPCDR: known answers, the shared map in closed form, planted groups of users, a slow reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trainables.base_factors import BaseVectors, base_vectors
from trainables.interface import Setup
from trainables.mapped_users import rows_of
from trainables.models import ptupcdr
from trainables.models.emcdr import linear_map
from trainables.models.ptupcdr import PTUPCDR, Config, train
from trainables.source_graph import Positives, positives
from trainables.tasks.rating import Ratings, Task

from .worlds import normal, random_task


def model_of(task: Task, base: BaseVectors | None = None, liked: Positives | None = None, **config: Any) -> PTUPCDR:
    settings = Config(**config)
    base = base or base_vectors(task, settings.dim, settings.ridge, settings.rating_offset, 0)
    model = PTUPCDR(settings, base, liked or positives(task, 0), torch.Generator().manual_seed(0))
    torch.nn.init.normal_(model.write.weight, std=0.3, generator=torch.Generator().manual_seed(1))
    return model


def liked_by(*histories: list[int]) -> Positives:
    counts = torch.tensor([len(history) for history in histories])
    return Positives(
        user=torch.arange(len(histories)).repeat_interleave(counts),
        item=torch.tensor([item for history in histories for item in history]),
        starts=torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]),
        items=20,
    )


def test_attention_and_bridge_of_known_numbers() -> None:
    """Logits 0 and ln 3 over (4, 0) and (0, 4): c = (1, 3); with M = diag(1, 2), z = (1, 1) and x = (3, 1) it is 5."""
    model = model_of(random_task(), dim=2, liked=liked_by([0, 1]))
    model.items_JD = torch.tensor([[4.0, 0.0], [0.0, 4.0]]).double()
    model.base = replace(model.base, source_users=torch.ones(1, 2).double())
    with torch.no_grad():
        model.inner.weight.copy_(torch.eye(2))
        model.outer.weight.copy_(torch.tensor([[0.0, np.log(3) / 4]]))
        model.write.weight.zero_()
        model.write.bias.copy_(torch.tensor([1.0, 0.0, 0.0, 2.0]))
        user = torch.zeros(1, dtype=torch.int64)
        assert model.character(user)[0].tolist() == pytest.approx([1.0, 3.0])
        assert float(model.mapped(user)[0] @ torch.tensor([3.0, 1.0]).double()) == pytest.approx(5.0)


def test_it_starts_from_the_source_vector() -> None:
    task = random_task()
    base = base_vectors(task, 3, 1.0, "none", 0)
    model = PTUPCDR(Config(), base, positives(task, 0), torch.Generator().manual_seed(0))
    rows = torch.arange(21)
    torch.testing.assert_close(model.mapped(rows), base.source_users, atol=1e-12, rtol=0)


def test_the_order_of_a_history_and_other_users_in_the_batch_change_nothing() -> None:
    task = random_task()
    one = model_of(task, liked=liked_by([3, 1, 2], [5], []))
    other = model_of(task, liked=liked_by([2, 3, 1], [5], []))
    alone, batch = one.character(torch.tensor([1])), one.character(torch.tensor([0, 1, 2]))
    torch.testing.assert_close(batch[1], alone[0], atol=1e-14, rtol=0)  # padded, and not
    torch.testing.assert_close(batch, other.character(torch.tensor([0, 1, 2])), atol=1e-14, rtol=0)
    assert batch[2].tolist() == [0.0] * 10  # the generic map
    generic = model_of(task, liked=liked_by([3, 1, 2], [5], [])).maps(torch.tensor([2]))[0]
    hidden = one.meta.bias.relu()
    torch.testing.assert_close(generic, one.write(hidden).view(10, 10))


def fitted(task: Task, base: BaseVectors, monkeypatch: pytest.MonkeyPatch, epochs: int, **config: Any) -> PTUPCDR:
    """The model after as many full-batch epochs, with a step size that falls to nothing."""
    monkeypatch.setattr(ptupcdr, "base_vectors", lambda *_: base)
    places = train(Config(batch=1000, calibrate=False, rating_offset="none", **config), task, 0)
    setup = next(places)
    assert isinstance(setup, Setup)
    for epoch in range(epochs):
        setup.parts["adam"].param_groups[0]["lr"] = 0.03 * (1 - epoch / epochs)  # type: ignore[union-attr]
        next(places)
    assert isinstance(setup.network, PTUPCDR)
    return setup.network


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_shared_map_is_the_least_squares_solution(decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over features z_u x x_i; Adam's weight decay adds decay / 2 |M|^2 to the mean of squares."""
    task = random_task(overlapping=20, each=8)
    base = base_vectors(task, 2, 1.0, "none", 0)
    base = replace(base, source_users=normal(0, 29, 2), target_items=normal(1, 20, 2))
    model = fitted(task, base, monkeypatch, 500, personal=False, weight_decay=decay)
    ratings = task.overlapping
    feature = torch.einsum("nd,ne->nde", base.source_users[ratings.user], base.target_items[ratings.item]).flatten(1)
    gram = feature.T @ feature / len(feature) + decay / 2 * torch.eye(4).double()
    solved = torch.linalg.solve(gram, feature.T @ base.residual / len(feature))
    torch.testing.assert_close(model.write.bias.detach(), solved, atol=1e-4, rtol=0)


def planted(task: Task) -> tuple[BaseVectors, Tensor]:
    """Two groups of users with opposite maps, told by the half of the items that they like."""
    z, q, x, one = normal(0, 75, 3), normal(1, 20, 3), normal(2, 20, 3), normal(3, 3, 3)
    group = torch.arange(75) % 2
    q[:, 0] = torch.where(torch.arange(20) < 10, 2.0, -2.0)
    target = torch.where(group[:, None] == 0, z @ one, -z @ one)
    base = base_vectors(random_task(), 3, 1.0, "none", 0)
    ratings = task.overlapping
    wanted = (target[ratings.user] * x[ratings.item]).sum(dim=1)
    base = replace(base, source_users=z, source_items=q, target_items=x, target_users=target[:60], residual=wanted)
    return base, target


def test_users_with_maps_of_their_own_are_told_by_what_they_like(monkeypatch: pytest.MonkeyPatch) -> None:
    task = random_task(overlapping=60, held_out=12, each=10)
    items = torch.tensor([torch.randperm(10).tolist()[:4] for _ in range(75)]) + 10 * (torch.arange(75) % 2)[:, None]
    source = Ratings(torch.arange(75).repeat_interleave(4), items.sort(dim=1).values.flatten(), torch.full((300,), 5.0))
    task = replace(task, source_ratings=source)
    base, target = planted(task)
    model, held_out = fitted(task, base, monkeypatch, 200), torch.arange(60, 75)
    mapping = linear_map(base.source_users[:60], target[:60], 0.01)
    with torch.no_grad():
        personal = (model.mapped(held_out) - target[held_out]).square().mean()
        emcdr = (mapping(base.source_users[held_out]) - target[held_out]).square().mean()
    assert float(personal) < 0.3 * float(emcdr)


@pytest.mark.parametrize("changes", [{}, {"attention": False}, {"history": 2}, {"rating_offset": "item_mean"}], ids=str)
def test_a_batch_has_the_loss_and_gradient_of_its_ratings_one_by_one(changes: dict[str, Any]) -> None:
    """From the text, one rating at a time; a user's map is computed once in ours."""
    task = random_task(seed=2, each=7)
    model = model_of(task, dim=3, ridge=1.0, **changes)
    base, starts, batch = model.base, task.overlapping.starts, torch.tensor([4, 9, 1])
    row, place = rows_of(starts, batch)
    loss = model.loss(batch, place, task.overlapping.item[row], base.residual[row])
    loss.backward()
    gradients = [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]
    assert len(gradients) == (7 if changes != {"attention": False} else 4)
    model.zero_grad()
    bias = base.source_bias if "rating_offset" in changes else None
    items = base.source_items if bias is None else torch.cat([bias[:, None], base.source_items[:, 1:]], dim=1)
    items = items / items.square().sum(dim=1).mean().sqrt()
    total = torch.zeros((), dtype=torch.float64)
    for user in batch.tolist():
        for rating in range(int(starts[user]), int(starts[user + 1])):
            history = model.liked.item[int(model.liked.starts[user]) : int(model.liked.starts[user + 1])].tolist()
            history = history[-changes["history"] :] if "history" in changes else history[-20:]
            if "attention" in changes:
                weight = [1 / max(1, len(history))] * len(history)
            else:
                logit = [
                    model.outer.weight[0] @ (model.inner.weight @ items[j] + model.inner.bias).relu() for j in history
                ]
                whole = sum(x.exp() for x in logit)
                weight = [x.exp() / whole for x in logit]
            nothing = torch.zeros(items.shape[1], dtype=torch.float64)
            character = sum((w * items[j] for w, j in zip(weight, history, strict=True)), nothing)
            hidden = (model.meta.weight @ character + model.meta.bias).relu()
            own = (model.write.weight @ hidden + model.write.bias).view(items.shape[1], -1)
            known = base.source_users[user] @ own @ base.target_items[task.overlapping.item[rating]]
            total = total + (base.residual[rating] - known) ** 2
    slow = total / len(row)
    slow.backward()
    assert loss.item() == pytest.approx(slow.item(), rel=1e-10)
    again = [weight.grad for weight in model.parameters() if weight.grad is not None]
    for fast, expected in zip(gradients, again, strict=True):
        torch.testing.assert_close(fast, expected, atol=1e-10, rtol=1e-10)


def test_with_the_mapping_loss_target_vectors_are_the_aim(monkeypatch: pytest.MonkeyPatch) -> None:
    task = random_task()
    base = replace(base_vectors(task, 3, 1.0, "none", 0), source_users=normal(0, 21, 3), target_users=normal(1, 20, 3))
    model = fitted(task, base, monkeypatch, 300, personal=False, loss="mapping")
    solved = torch.linalg.lstsq(base.source_users[:12], base.target_users[:12]).solution
    torch.testing.assert_close(model.write.bias.detach().view(3, 3), solved, atol=1e-4, rtol=0)


def test_dropout_is_for_training_alone() -> None:
    model = model_of(random_task(), dropout=0.5)
    rows = torch.arange(12)
    assert not torch.equal(model.mapped(rows), model.mapped(rows))
    model.eval()
    assert torch.equal(model.mapped(rows), model.mapped(rows))
