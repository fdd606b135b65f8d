"""LLMCDSR's contrast, recall, insertion and meta gradient against closed forms and exact second derivatives."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from features.errors import InputError
from trainables import pretraining
from trainables.models import llmcdsr, sasrec
from trainables.models.llmcdsr import BETAS, Config, Loss, Meta, Recall, Texts, inserted, step_derivative, text_contrast
from trainables.sequences.labels import Batch, training_labels
from trainables.tasks.sequential import OVERLAPPING, SequenceTask


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmcdsr, "TEXT_EPOCHS", 1)


def recall(task: SequenceTask, **changes: Any) -> Recall:
    torch.manual_seed(0)
    return Recall(Config(**{"recalled": 3, **changes}), task, Texts(task.items, task.titles().shape[1]))


def lonely(task: SequenceTask) -> torch.Tensor:
    return ((task.group != OVERLAPPING) & (task.pseudo >= 0).any(dim=1)).nonzero().squeeze(1)


def test_the_contrast_pairs_an_item_with_its_own_text() -> None:
    items = 20 * torch.eye(6, 8)
    assert float(text_contrast(items, items)) < 1e-6
    assert float(text_contrast(items.roll(1, 0), items)) > 100  # the text of item j beside item j - 1
    mapped, other = (torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
    wanted = 0.0
    for k in range(3):
        texts = [float(mapped[k] @ other[j]) for j in range(3)] + [
            float(mapped[k] @ mapped[j]) for j in range(3) if j != k
        ]
        items_ = [float(other[k] @ mapped[j]) for j in range(3)] + [
            float(other[k] @ other[j]) for j in range(3) if j != k
        ]
        for logits in (texts, items_):
            wanted += (math.log(sum(map(math.exp, logits))) - float(mapped[k] @ other[k])) / 6
    assert float(text_contrast(mapped, other)) == pytest.approx(wanted, rel=1e-5)


@torch.no_grad()
def test_equal_texts_are_their_own_mean_and_a_pooling_of_zero_is_one(task: SequenceTask) -> None:
    made, users = recall(task), lonely(task)[:5]
    query, lacking = made.query(users)
    for row, user in enumerate(users.tolist()):
        rows = task.pseudo[user][task.pseudo[user] >= 0]
        wanted = (task.titles()[rows] @ made.maps[int(lacking[row])].T).mean(dim=0)
        torch.testing.assert_close(query[row], wanted, atol=1e-5, rtol=1e-5)
        low, high = (task.source, task.target)[int(lacking[row])]
        assert ((rows >= low) & (rows < high)).all()  # texts are of the domain that is lacking
    made.rows = made.rows.clone()
    made.rows[users[0]] = made.rows[users[0], 0]
    torch.nn.init.normal_(made.pooling)
    query, lacking = made.query(users[:1])
    only = task.titles()[made.rows[users[0], 0]] @ made.maps[int(lacking[0])].T
    torch.testing.assert_close(query[0], only, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_nearest_items_are_of_the_lacking_domain(task: SequenceTask) -> None:
    made, users = recall(task), lonely(task)[:6]
    query, lacking = made.query(users)
    found = made.nearest(query, lacking)
    for row in range(len(users)):
        low, high = (task.source, task.target)[int(lacking[row])]
        unit = made.unit[int(lacking[row])]
        best = (unit @ query[row] / query[row].norm()).argsort(descending=True)[:3] + low
        assert found[row].tolist() == best.tolist()
        assert all(low <= item < high for item in found[row].tolist())


def test_recalled_items_stand_before_own_ones_and_are_no_labels(task: SequenceTask) -> None:
    users = lonely(task)[:8]
    recalled, _ = recall(task).items(users)
    made = inserted(task, users, recalled, np.random.default_rng(0))
    for row, user in enumerate(users.tolist()):
        own = task.train.item[int(task.train.starts[user]) : int(task.train.starts[user + 1])].tolist()
        length = int(made.batch.length[row])
        shown = list(zip(made.batch.item[row, :length].tolist(), made.slot[row, :length].tolist(), strict=True))
        labels = made.batch.label[made.batch.row == row].tolist()
        assert [item for item, slot in shown if slot < 0] == own[:-1]
        assert labels == own if shown[0][1] >= 0 else labels == own[1:]
        assert labels[-1] == own[-1]
        assert sorted(slot for _, slot in shown if slot >= 0) == [0, 1, 2]
        assert all(item == int(recalled[row, slot]) for item, slot in shown if slot >= 0)


@pytest.mark.parametrize("before", [0, 5])
def test_the_derivative_of_a_step_of_adam(before: int) -> None:
    """Against torch's Adam, and its diagonal against a difference; at the first step it is lr eps / (|g| + eps)^2."""
    draw = torch.Generator().manual_seed(0)
    x = torch.nn.Parameter(torch.randn(6, dtype=torch.float64, generator=draw))
    optimiser = torch.optim.Adam([x], lr=0.01, betas=BETAS)
    for _ in range(before):
        x.grad = torch.randn(6, dtype=torch.float64, generator=draw)
        optimiser.step()
    zero = torch.zeros(6, dtype=torch.float64)
    state = optimiser.state[x] if before else {"step": 0.0, "exp_avg": zero, "exp_avg_sq": zero}
    state = {name: value.clone() if torch.is_tensor(value) else value for name, value in state.items()}
    gradient = torch.randn(6, dtype=torch.float64, generator=draw)
    away, slope = step_derivative(gradient, state, 0.01, 1e-8)
    start = x.detach().clone()
    x.grad = gradient.clone()
    optimiser.step()
    torch.testing.assert_close(start - x.detach(), away, atol=1e-12, rtol=1e-9)
    h = 1e-6
    sides = [step_derivative(gradient + sign * h, state, 0.01, 1e-8)[0] for sign in (1, -1)]
    torch.testing.assert_close(slope, (sides[0] - sides[1]) / (2 * h), atol=1e-9, rtol=1e-4)
    if not before:
        torch.testing.assert_close(slope, 0.01 * 1e-8 / (gradient.abs() + 1e-8) ** 2, atol=1e-12, rtol=1e-6)


@pytest.mark.parametrize("kind", ["softmax", "bce"])
@pytest.mark.parametrize("difference", [llmcdsr.DIFFERENCE, 1e-5])
@sdpa_kernel(SDPBackend.MATH)  # the fused one has no second derivative
def test_the_meta_gradient_is_that_of_a_step_that_is_differentiated(
    task: SequenceTask, monkeypatch: pytest.MonkeyPatch, difference: float, kind: str
) -> None:
    """In double precision, against back-propagation through the step of Adam."""
    monkeypatch.setattr(llmcdsr, "DIFFERENCE", difference)
    config = Config(loss=kind, recalled=3, dropout=0.0, meta_batch=16, aug_batch=6)
    torch.manual_seed(0)
    network = sasrec.SASRec(sasrec.Config(dropout=0.0), task.items).double().eval()
    torch.nn.init.normal_(network.item.weight, std=0.3)
    made = recall(task).double()
    made.maps, made.vectors = [m.double() for m in made.maps], made.vectors.double()
    made.unit = [u.double() for u in made.unit]
    labels, loss = training_labels(task, "merged"), Loss(config, task, np.random.default_rng(0))
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2, betas=BETAS)
    batches = list(labels.batches(32, 50, np.random.default_rng(1)))
    for batch in batches[:2]:
        loss_value = loss(network, batch, loss.drawn(labels.row[batch.number], batch.label))
        optimiser.zero_grad()
        loss_value.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    batch, users = batches[0], lonely(task)[:6]
    meta = Meta(config, task, made, loss, labels)
    loss.rng = np.random.default_rng(7)
    found = meta.gradient(network, optimiser, batch, labels.row[batch.number], users, np.random.default_rng(8))
    assert found is not None

    def twice_differentiable(state: Tensor, drawn: Tensor, shift: Tensor, label: Tensor, number: Tensor) -> Tensor:
        return (state @ drawn.T + shift).masked_fill(number == label[:, None], -torch.inf).logsumexp(dim=1)

    monkeypatch.setattr("trainables.sequences.losses.drawn_log_sum", twice_differentiable)
    loss.rng, rng = np.random.default_rng(7), np.random.default_rng(8)
    recalled, _ = made.items(users)
    twin = Meta(config, task, made, loss, labels)
    other = twin._overlapping(rng)
    augmented = inserted(task, users, recalled, rng)
    drawn = [
        loss.drawn(labels.row[batch.number], batch.label),
        loss.drawn(augmented.batch.number, augmented.batch.label),
    ]
    meta_drawn = loss.drawn(twin.labels.row[other.number], other.label)
    names = [name for name, parameter in network.named_parameters() if parameter in optimiser.state]
    values = dict(network.named_parameters())
    query, _ = made.query(users)
    vectors = network.item.weight.detach()[recalled] + ((query - query.detach()) / 3)[:, None]
    inner = torch.zeros((), dtype=torch.float64)  # the mean over the labels of X and X' together
    total = len(batch.label) + len(augmented.batch.label)
    for given, part in ((batch, (drawn[0],)), (augmented.batch, (drawn[1], augmented.slot, vectors))):
        inner = inner + loss(network, given, *part) * len(given.label) / total
    slopes = torch.autograd.grad(inner, [values[name] for name in names], create_graph=True)
    moved = {}
    for name, slope in zip(names, slopes, strict=True):
        state = optimiser.state[values[name]]
        (b1, b2), t = BETAS, float(state["step"]) + 1
        m = (b1 * state["exp_avg"] + (1 - b1) * slope) / (1 - b1**t)
        u = (b2 * state["exp_avg_sq"] + (1 - b2) * slope.square()) / (1 - b2**t)
        root = torch.where(u > 0, u.clamp(min=1e-300).sqrt(), 0.0)
        moved[name] = values[name].detach() - 1e-2 * m / (root + 1e-8)

    class Called(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, given: Batch, negatives: torch.Tensor) -> torch.Tensor:
            return loss(self.network, given, negatives)

    outer = torch.func.functional_call(Called(), {f"network.{n}": v for n, v in moved.items()}, (other, meta_drawn))
    exact = torch.autograd.grad(outer, made.pooling)[0]
    assert float(exact.abs().max()) > 0
    assert float((found - exact).norm() / exact.norm()) < 1e-6


def test_a_step_is_down_the_mean_over_all_labels_and_every_adam_has_the_same_betas(
    task: SequenceTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real sequences lose 2 a label and augmented ones 5; half of them stand for how many labels there are."""
    counts: list[int] = []
    stepped: list[float] = []
    betas: list[Any] = []
    pretrain = pretraining.pretrain

    def loss(self: Any, network: Any, batch: Batch, drawn: Any, *_: Any) -> torch.Tensor:
        counts.append(len(batch.label))
        return torch.tensor(2.0 if len(counts) % 2 else 5.0)

    monkeypatch.setattr(pretraining, "pretrain", lambda *a, **k: betas.append(k["betas"]) or pretrain(*a, **k))
    places = llmcdsr.train(Config(meta=False, batch=16, aug_batch=6, recalled=3), task, 77)
    setup: Any = next(places)
    monkeypatch.setattr(Loss, "__call__", loss)
    monkeypatch.setattr(llmcdsr, "step", lambda optimiser, value: stepped.append(float(value)) or stepped[-1])
    next(places)
    wanted = [(2 * n + 5 * m) / (n + m) for n, m in zip(counts[::2], counts[1::2], strict=True)]
    assert stepped == pytest.approx(wanted)
    assert len(set(counts)) > 2
    assert betas == [BETAS]
    assert [setup.parts[name].defaults["betas"] for name in ("optimiser", "pooling")] == [BETAS, BETAS]


def test_texts_are_asked_of_a_task_that_has_them(task: SequenceTask) -> None:
    from dataclasses import replace

    bare = replace(task, generated_texts=None)
    with pytest.raises(InputError, match="this task has no generated texts; set recall_from: titles"):
        Recall(Config(recall_from="texts"), bare, Texts(task.items, task.titles().shape[1]))


def test_faults_of_a_config_are_told_together() -> None:
    with pytest.raises(InputError) as fault:
        Config(recall_from="images", loss="hinge", recalled=0)
    for line in (
        "recall_from is 'images'; choose from titles, texts",
        "loss is 'hinge'; choose from bce, softmax",
        "recalled is 0; give a number of at least 1",
    ):
        assert line in str(fault.value)
