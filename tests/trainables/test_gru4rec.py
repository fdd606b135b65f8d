"""GRU4Rec against slow references; what every model of sequences is held to stands in `test_next_item_models`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from features.errors import InputError
from trainables.interface import Setup, load_model
from trainables.models.gru4rec import ABLATIONS, Config, GRU4Rec, Loss, bpr_max, train
from trainables.sequences.labels import training_labels
from trainables.sequences.losses import draw_weighted
from trainables.tasks.sequential import SequenceTask

from .sequence_worlds import histories

QUICK = {"negatives": 20, "batch": 16, "epochs": 3, "max_length": 8, "width": 16}


def network(config: Config, items: int = 40) -> GRU4Rec:
    """With a table so large that every item matters, in double precision."""
    torch.manual_seed(0)
    made = GRU4Rec(config, items).double().eval()
    for parameter in (made.item.weight, made.output.weight, made.bias):
        torch.nn.init.normal_(parameter, std=0.5)
    return made


def by_hand(model: GRU4Rec, items: list[int]) -> Tensor:
    """State after the last item, one item after the other: the equations as they are written."""
    x = [model.item.weight[item] for item in items[-model.max_length :]]
    for layer in model.layers:
        gates = [getattr(layer, f"{kind}_l0").chunk(3) for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        (w_r, w_z, w_n), (u_r, u_z, u_n), (b_r, b_z, b_n), (c_r, c_z, c_n) = gates
        h = torch.zeros_like(x[0])
        for place, vector in enumerate(x):
            r = torch.sigmoid(w_r @ vector + b_r + u_r @ h + c_r)
            z = torch.sigmoid(w_z @ vector + b_z + u_z @ h + c_z)
            n = torch.tanh(w_n @ vector + b_n + r * (u_n @ h + c_n))
            h = (1 - z) * n + z * h
            x[place] = h
    return x[-1]


# --- the network --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_step_of_width_one() -> None:
    layer: Any = GRU4Rec(Config(width=1), 3).layers[0]
    for name, parameter in layer.named_parameters():
        parameter.fill_(1.0 if "weight" in name else 0.0)
    _, h = layer(torch.ones(1, 1, 1), torch.full((1, 1, 1), 0.5))
    assert float(h) == pytest.approx(0.570642, abs=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [Config(), Config(layers=2, width=16), Config(max_length=3), Config(tied=False)],
    ids=["default", "two layers", "short", "untied"],
)
def test_t3_the_scores_against_a_loop_over_items(config: Config) -> None:
    model = network(config)
    rows = [[5, 2, 9, 31, 0, 7], [3], [8, 1]]
    scores = model.users(histories(*rows), (10, 40)) @ model.items((10, 40)).T
    for found, items in zip(scores, rows, strict=True):
        wanted = model.output.weight[10:] @ by_hand(model, items) + model.bias[10:]
        torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)


@torch.no_grad()
def test_t1_no_state_depends_on_a_later_item() -> None:
    model = network(Config(layers=2))
    items = torch.randint(40, (4, 7))
    before = model.encode(model.item(items))
    for last in range(6):
        changed = items.clone()
        changed[:, last + 1 :] = torch.randint(40, (4, 6 - last))
        after = model.encode(model.item(changed))
        assert after[:, : last + 1].equal(before[:, : last + 1])
        assert not after[:, last + 1].equal(before[:, last + 1])


# --- losses -------------------------------------------------------------------------------------------------------


def test_bpr_max_of_two_drawn_items() -> None:
    score, drawn = torch.tensor([2.0]), torch.tensor([[1.0, 0.0]])
    assert float(bpr_max(score, drawn, 1.0)) == pytest.approx(0.259640 + 0.731059, abs=1e-6)
    left_out = torch.tensor([[1.0, -torch.inf, 0.0]], requires_grad=True)
    loss = bpr_max(score, left_out, 1.0).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == pytest.approx(0.990698, abs=1e-6)
    assert left_out.grad is not None
    assert left_out.grad.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("reads", ["merged", "target"])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_softmax_is_that_of_every_label_among_the_items_of_its_own_domain(
    task: SequenceTask, reads: str, alpha: float
) -> None:
    """One label after the other, against all items of its domain; draws are as many that they stand for all."""
    config = Config(sequences=reads, negatives=40_000, sample_alpha=alpha, max_length=4, width=16)
    model = network(config, task.items)
    labels, rng = training_labels(task, reads), np.random.default_rng(0)
    batch = next(labels.batches(8, config.max_length, rng))
    losses = []
    for row, column, item in zip(batch.row.tolist(), batch.column.tolist(), batch.label.tolist(), strict=True):
        low, high = task.target if task.target[0] <= item < task.target[1] else task.source
        state = by_hand(model, batch.item[row, : column + 1].tolist())
        scores = model.output.weight[low:high] @ state + model.bias[low:high]
        losses.append(-float(scores.log_softmax(0)[item - low]))
    assert float(Loss(config, task, rng)(model, batch)) == pytest.approx(float(np.mean(losses)), rel=0.02)


@torch.no_grad()
def test_bpr_max_against_a_loop_over_drawn_items(task: SequenceTask) -> None:
    config = Config(loss="bpr_max", negatives=30, bpreg=0.7, max_length=4, width=16)
    model = network(config, task.items)
    batch = next(training_labels(task, "merged").batches(8, config.max_length, np.random.default_rng(0)))
    made, losses = Loss(config, task, np.random.default_rng(1)), []
    places, _ = draw_weighted(made.domains, 30, np.random.default_rng(1), made.weight_I)
    drawn = dict(zip(made.domains, places.tolist(), strict=True))
    for row, column, item in zip(batch.row.tolist(), batch.column.tolist(), batch.label.tolist(), strict=True):
        state = by_hand(model, batch.item[row, : column + 1].tolist())
        (others,) = (drawn[low, high] for low, high in made.domains if low <= item < high)
        score = {int(k): float(model.output.weight[k] @ state + model.bias[k]) for k in {item, *others}}
        others = [int(k) for k in others if k != item]
        total = sum(math.exp(score[k]) for k in others)
        w = [math.exp(score[k]) / total for k in others]
        won = sum(w_k / (1 + math.exp(score[k] - score[item])) for w_k, k in zip(w, others, strict=True))
        losses.append(-math.log(won) + 0.7 * sum(w_k * score[k] ** 2 for w_k, k in zip(w, others, strict=True)))
    assert float(made(model, batch)) == pytest.approx(float(np.mean(losses)), rel=1e-9)


# --- training -----------------------------------------------------------------------------------------------------


def trained(config: Config, task: SequenceTask, epochs: int) -> GRU4Rec:
    """The network, without a runner."""
    torch.manual_seed(0)
    places = train(config, task, 0)
    setup = next(places)
    assert isinstance(setup, Setup)
    for _ in range(epochs):
        next(places)
    assert isinstance(setup.network, GRU4Rec)
    return setup.network.eval()


def test_target_only_reads_target_sequences(task: SequenceTask) -> None:
    config = Config(**ABLATIONS["target_only"].config, batch=16, negatives=20)
    model, begun = trained(config, task, 2), trained(config, task, 0)
    low, high = task.source
    assert model.item.weight[low:high].equal(begun.item.weight[low:high])  # no source item is an input or a label
    assert not model.item.weight[slice(*task.target)].equal(begun.item.weight[slice(*task.target)])


# --- configuration ------------------------------------------------------------------------------------------------


def test_faults_of_a_config_are_told_together() -> None:
    with pytest.raises(InputError) as fault:
        Config(loss="bpr", layers=0, dropout_embed=1.0, lr=0.0, negatives=0, sequences="both", sample_alpha=-1.0)
    for line in (
        "loss is 'bpr'; choose from softmax, bpr_max",
        "layers is 0; give a number of at least 1",
        "dropout_embed is 1.0; give a number of at least 0, below 1",
        "lr is 0.0; give a number above 0",
        "negatives is 0; give a number of at least 1",
        "sequences is 'both'; choose from merged, target",
        "sample_alpha is -1.0; give a number of at least 0",
    ):
        assert line in str(fault.value)


def test_it_needs_nothing_but_ids() -> None:
    model = load_model("gru4rec")
    assert (model.NAME, model.TASK_TYPE, model.NEEDS) == ("GRU4Rec", "sequences", ())
