"""LACDR: what its autoencoders converge to, exact transfer, a slow reference, and who trains it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trainables.base_factors import BaseVectors, base_vectors
from trainables.interface import Epoch, Setup
from trainables.mapped_users import glorot
from trainables.models import lacdr
from trainables.models.lacdr import LACDR, Autoencoder, Config, equivalent_rows, lengths, train
from trainables.tasks.rating import Task

from .worlds import normal, random_task


def given(task: Task, source: Tensor, target: Tensor) -> BaseVectors:
    """Base vectors with these rows for the source and target users."""
    return replace(base_vectors(task, 4, 5.0, "none", 0), source_users=source, target_users=target)


def fitted(task: Task, base: BaseVectors, monkeypatch: pytest.MonkeyPatch, epochs: int, **config: Any) -> LACDR:
    """The model after as many full-batch epochs, with a step size that falls to nothing."""
    monkeypatch.setattr(lacdr, "base_vectors", lambda *_: base)
    places = train(Config(batch=1000, calibrate=False, rating_offset="none", **config), task, 0)
    setup = next(places)
    assert isinstance(setup, Setup)
    for epoch in range(epochs):
        setup.parts["adam"].param_groups[0]["lr"] = 0.03 * (1 - epoch / epochs)  # type: ignore[union-attr]
        next(places)
    assert isinstance(setup.network, LACDR)
    return setup.network


def test_each_reconstruction_is_that_of_principal_components(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncentred: the squares that are left are the eigenvalues of the second moments behind the first h."""
    task, scale = random_task(), torch.tensor([3.0, 2.0, 1.0, 0.5]).double()
    vectors = [normal(seed, 21, 4) * scale + 0.5 for seed in (0, 1)]
    model = fitted(task, given(task, *vectors), monkeypatch, 500, align_weight=0.0, hidden_share=0.5)
    for autoencoder, z in zip((model.source, model.target), vectors, strict=True):
        trailing = float(torch.linalg.eigvalsh(z.T @ z / len(z))[:2].sum())
        assert autoencoder.loss(z).item() == pytest.approx(trailing, rel=1e-4)


def test_a_rotation_is_learned_exactly_at_full_width(monkeypatch: pytest.MonkeyPatch) -> None:
    task, source = random_task(), normal(0, 21, 4)
    turn = torch.linalg.qr(normal(1, 4, 4)).Q
    model = fitted(task, given(task, source, (source @ turn)[:12]), monkeypatch, 600, hidden_share=1.0)
    assert model.source.loss(source).item() < 1e-6
    with torch.no_grad():
        torch.testing.assert_close(model.mapped(torch.arange(21)), source @ turn, atol=1e-2, rtol=0)


def test_vectors_of_a_low_rank_are_transferred_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    task, hidden = random_task(), normal(0, 21, 2)
    source, target = hidden @ normal(1, 2, 4), hidden @ normal(2, 2, 4)
    model = fitted(task, given(task, source, target[:12]), monkeypatch, 800, hidden_share=0.5)
    held_out = torch.arange(12, 21)  # no pair of theirs is known
    with torch.no_grad():
        error = (model.mapped(held_out) - target[held_out]).square().mean() / target.square().mean()
    assert float(error) < 1e-4


@pytest.mark.parametrize(("single_users", "same"), [(True, False), (False, True)])
def test_side_users_change_the_target_decoder_unless_they_are_left_out(single_users: bool, same: bool) -> None:
    def decoder(task: Task, base: BaseVectors) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            model = fitted(task, base, patch, 3, single_users=single_users)
        return model.target.decode.weight

    task, source, target = random_task(), normal(0, 21, 4), normal(1, 20, 4)
    with_side, without = (decoder(task, given(task, source, target[:users])) for users in (20, 12))
    assert torch.equal(with_side, without) == same


def test_few_rows_stand_for_many_users() -> None:
    vectors, matrix = normal(0, 50, 4), normal(1, 4, 3)
    rows = equivalent_rows(vectors)
    assert rows.shape == (4, 4)
    squares = [(z @ matrix).square().sum(dim=1).mean().item() for z in (rows, vectors)]
    assert squares[0] == pytest.approx(squares[1], rel=1e-12)
    assert equivalent_rows(vectors[:2]).shape == (2, 4)


@pytest.mark.parametrize("norm", ["l2", "l2_squared"])
@pytest.mark.parametrize("layers", ["linear", "mlp"])
def test_the_first_loss_against_the_slow_reference(layers: str, norm: str) -> None:
    """From the text, one user at a time; the reported loss is the one before the step."""
    task = random_task(seed=2)
    config = Config(dim=3, ridge=1.0, batch=100, align_weight=0.7, norm=norm, layers=layers, user_weight="ratings")
    places = train(config, task, 1)
    setup, base = next(places), base_vectors(task, 3, 1.0, "source_offset", 1)
    assert isinstance(setup, Setup)
    before = {name: weight.detach().clone().numpy() for name, weight in setup.network.named_parameters()}
    epoch = next(places)
    assert isinstance(epoch, Epoch)

    def apply(name: str, z: np.ndarray) -> np.ndarray:
        if layers == "linear":
            return before[f"{name}.weight"] @ z
        hidden = np.tanh(before[f"{name}.0.weight"] @ z + before[f"{name}.0.bias"])
        return before[f"{name}.2.weight"] @ hidden + before[f"{name}.2.bias"]

    power = 1.0 if norm == "l2" else 2.0
    source, target = base.source_users.numpy(), base.target_users.numpy()
    total = 0.0
    for side, users in (("source", source), ("target", target)):
        total += np.mean(
            [np.linalg.norm(apply(f"{side}.decode", apply(f"{side}.encode", z)) - z) ** power for z in users]
        )
    count = [int((task.overlapping.user == user).sum()) for user in range(12)]
    apart = [
        np.linalg.norm(apply("source.encode", source[u]) - apply("target.encode", target[u])) ** power
        for u in range(12)
    ]
    total += 0.7 * np.average(apart, weights=count)
    assert epoch.metrics["train_loss"] == pytest.approx(total, rel=1e-6)


def test_the_reconstruction_can_be_left_out() -> None:
    task = random_task()
    with_it, without = (next(iter_epochs(task, reconstruction=flag)).metrics["train_loss"] for flag in (True, False))
    assert without < with_it


def iter_epochs(task: Task, **config: Any) -> Any:
    return (place for place in train(Config(**config), task, 0) if isinstance(place, Epoch))


def test_lengths_and_hidden_widths() -> None:
    vectors = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    assert lengths(vectors, "l2_squared").tolist() == [25.0, 0.0]
    assert lengths(vectors, "l2").tolist() == pytest.approx([5.0, 1e-6])
    generator = torch.Generator().manual_seed(0)
    widths = [Autoencoder(Config(hidden_share=s), 10, generator).encode.out_features for s in (0.01, 0.4, 1.0)]
    assert widths == [1, 4, 10]
    assert float(glorot(4, 6, generator).weight.detach().abs().max()) <= np.sqrt(6 / 10)
