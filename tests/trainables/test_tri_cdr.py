"""Tri-CDR's attention, losses and labels against loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from features.errors import InputError
from trainables import pretraining
from trainables.models import sasrec, tri_cdr
from trainables.models.tri_cdr import TAU, WIDTH, Attention, Config, Loss, TriCDR, cosine_loss, triplet_loss
from trainables.sequences.labels import Batch, training_labels
from trainables.sequences.losses import contrast, draw_shared
from trainables.sequences.views import Bag
from trainables.tasks.sequential import OVERLAPPING, Sequences, SequenceTask


def network(task: SequenceTask, **changes: Any) -> TriCDR:
    torch.manual_seed(0)
    made = TriCDR(Config(**changes), task.items, task.source, task.target).eval()
    for reader in made.readers:
        torch.nn.init.normal_(reader.item.weight, std=0.3)
    return made


@torch.no_grad()
def test_attention_against_the_concatenation_it_stands_for() -> None:
    """a_i = MLP([h, q, h * q, q - h, m]) by a map of 320, one state after the other; 0 for an empty sequence."""
    torch.manual_seed(0)
    made = Attention().double()
    h, q, m = (torch.randn(size, WIDTH, dtype=torch.float64) for size in (5, 1, 1))
    zero = torch.zeros(80, WIDTH, dtype=torch.float64)
    whole = torch.cat([made.state.weight, made.query.weight, made.product.weight, zero, made.mean.weight], dim=1)
    logits = []
    for state in h[:3]:
        x = torch.cat([state, q[0], state * q[0], q[0] - state, m[0]])
        logits.append(made.rest(whole @ x + made.product.bias))
    wanted = torch.cat(logits).softmax(0) @ h[:3]
    real = torch.arange(5)[None] < 3
    row = torch.zeros(1, dtype=torch.int64)
    torch.testing.assert_close(made(h[None], row, real, q, m)[0], wanted, atol=1e-12, rtol=0)
    assert made(h[None], row, ~torch.ones_like(real), q, m).abs().max() == 0
    two = [torch.cat([part, part]) for part in (row, real, q, m)]  # labels that are shown nothing change no others
    two[1][0] = False
    torch.testing.assert_close(made(h[None], *two)[1], wanted, atol=1e-12, rtol=0)


def test_nt_xent_of_two_users_and_the_triplet() -> None:
    two = torch.eye(2, WIDTH)
    assert float(contrast(two, two, TAU)) == pytest.approx(9.0796e-5, rel=1e-3)
    source = torch.zeros(1, WIDTH)
    mixed, target = source.clone(), source.clone()
    mixed[0, 0], target[0, 0] = 3.0, 1.0
    assert float(triplet_loss(mixed, source, target, 4.0)) == pytest.approx(6.0)


def test_batches_hold_all_labels_of_users_of_both_domains(task: SequenceTask) -> None:
    made = Loss(Config(batch=7), task, np.random.default_rng(0))
    seen: list[int] = []
    for number in made.batches():
        rows = made.labels.row[number]
        assert len(rows.unique()) <= 7
        assert (rows[1:] != rows[:-1]).sum() == len(rows.unique()) - 1  # a user's labels are together
        seen += number.tolist()
    assert sorted(seen) == list(range(len(made.labels)))
    assert (task.group[made.labels.row] == OVERLAPPING).all()
    assert ((made.labels.item >= task.target[0]) & (made.labels.item < task.target[1])).all()


def without_positions(model: TriCDR) -> None:
    """They are counted from the end of what is read: of a user's last label in training."""
    for reader in model.readers:
        assert reader.position is not None
        torch.nn.init.zeros_(reader.position.weight)


@torch.no_grad()
def test_nothing_at_or_after_a_label_is_read(task: SequenceTask) -> None:
    """The vector of a label is that of the history before it, read alone, as a held-out user's is."""
    model, made = network(task), Loss(Config(), task, np.random.default_rng(0))
    without_positions(model)
    numbers = torch.arange(0, len(made.labels), 3)
    windows, reals, which = made.windows(numbers)
    states = model.states(windows, [reader.item.weight for reader in model.readers])
    users = model.joined(model.read(states, which, reals))
    assert len(windows[0].item) < len(users)
    for row, number in enumerate(numbers.tolist()):
        start = int(task.train.starts[made.labels.row[number]])
        before = task.train.item[start : start + int(made.labels.place[number])]
        alone = model.users(Sequences(before, torch.tensor([0, len(before)])), task.target)[0]
        torch.testing.assert_close(users[row], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_under_strict_cold_start_a_learned_vector_asks(task: SequenceTask) -> None:
    model = network(task)
    items = torch.arange(task.source[0], task.source[0] + 4)
    bag, none = (
        Bag(items[None], torch.ones(1, 4, dtype=torch.bool)),
        Bag(items[None], torch.zeros(1, 4, dtype=torch.bool)),
    )
    bags = (bag, bag, none)
    states, row = model.states(bags, [reader.item.weight for reader in model.readers]), torch.tensor([0])
    parts = model.read(states, row, [each.real for each in bags])
    mixed, source = (reader.encode(reader.item(items[None]), torch.tensor([4])) for reader in model.readers[:2])
    mean = mixed.mean(dim=1)
    torch.testing.assert_close(
        parts[1], model.attention(source, row, bag.real, model.cold[None], mean), atol=1e-5, rtol=1e-5
    )
    assert parts[2].abs().max() == 0


@torch.no_grad()
def test_a_projection_is_linear_relu_linear(task: SequenceTask) -> None:
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))
    for projection in network(task).projections:
        first, last = [part for part in projection if isinstance(part, torch.nn.Linear)]  # type: ignore[attr-defined]
        wanted = (x @ first.weight.T + first.bias).clamp(min=0) @ last.weight.T + last.bias
        torch.testing.assert_close(projection(x), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", [True, False])
def test_without_the_mixed_sequence_nothing_depends_on_it(task: SequenceTask, attention: bool) -> None:
    config = Config(mixed=False, attention=attention, dropout=0.0)
    model = network(task, mixed=False, attention=attention, dropout=0.0)
    history = task.validation.history
    found = []
    for _ in range(2):
        made = Loss(config, task, np.random.default_rng(0))
        value = made(model, next(made.batches()))
        value.backward()  # type: ignore[no-untyped-call]
        found.append((model.users(history, task.target).detach(), float(value.detach())))
        with torch.no_grad():
            for parameter in (*model.readers[0].parameters(), *model.projections[0].parameters()):
                assert parameter.grad is None or parameter.grad.abs().max() == 0
                torch.nn.init.normal_(parameter)
    assert found[0][0].equal(found[1][0])
    assert found[0][1] == found[1][1]
    assert model.readers[1].item.weight.grad is not None
    assert model.readers[1].item.weight.grad.abs().max() > 0


@torch.no_grad()
def test_the_pretraining_has_the_head_of_the_training(task: SequenceTask) -> None:
    """The softmax of 5 cos, over all items of the label's domain: 20,000 drawn ones stand for them."""
    torch.manual_seed(0)
    reader, domains = sasrec.SASRec(sasrec.Config(), task.items).eval(), [task.source, task.target]
    torch.nn.init.normal_(reader.item.weight, std=0.3)
    batch = next(training_labels(task, "merged").batches(8, 50, np.random.default_rng(0)))
    drawn = draw_shared(domains, 20_000, np.random.default_rng(1))
    states = reader.encode(reader.item(batch.item), batch.length)[batch.row, batch.column]
    wanted = 0.0
    for state, label in zip(states, batch.label.tolist(), strict=True):
        low, high = task.target if task.target[0] <= label < task.target[1] else task.source
        scores = [5 * float(torch.cosine_similarity(state, row, dim=0)) for row in reader.item.weight[low:high]]
        wanted -= float(torch.tensor(scores).log_softmax(0)[label - low]) / len(states)
    assert float(cosine_loss(reader, batch, domains, drawn)) == pytest.approx(wanted, rel=0.01)
    assert Config().scale == 5


def test_each_encoder_is_pretrained_by_it(
    task: SequenceTask, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:  # fmt: skip
    labels: list[set[int]] = []

    def counted(network: sasrec.SASRec, batch: Batch, domains: Any, drawn: Any) -> torch.Tensor:
        labels.append(set(batch.label.tolist()))
        return cosine_loss(network, batch, domains, drawn)

    monkeypatch.setattr(tri_cdr, "ENCODER_EPOCHS", 1)
    monkeypatch.setattr(tri_cdr, "cosine_loss", counted)
    monkeypatch.setattr(pretraining, "kept_once", lambda task, kind, document, make: make(tmp_path / "kept.pt"))
    weights = tri_cdr.pretrained(task, 0)
    for place, part in enumerate(tri_cdr.PARTS):
        assert set(training_labels(task, part).item.tolist()) in labels
        assert weights[f"{place}.item.weight"].isfinite().all()


def test_the_pretraining_has_the_moments_of_sasrec(
    task: SequenceTask, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:  # fmt: skip
    betas: list[tuple[float, float]] = []
    monkeypatch.setattr(pretraining, "pretrain", lambda *a, **k: betas.append(k["betas"]) or {})
    monkeypatch.setattr(pretraining, "kept_once", lambda task, kind, document, make: make(tmp_path / "kept.pt"))
    tri_cdr.pretrained(task, 0)
    assert betas == [(0.9, 0.98)] * 3


@torch.no_grad()
@pytest.mark.parametrize("loss", ["bce", "softmax"])
def test_the_loss_by_hand(task: SequenceTask, loss: str) -> None:
    config = Config(
        loss=loss, dropout=0.0, contrast=0.3, triplet=0.2, margin=1.0, rate_mixed_source=2.0, negatives=20_000
    )
    model, made = network(task, dropout=0.0), Loss(config, task, np.random.default_rng(4))
    model.config = config  # type: ignore[assignment]
    without_positions(model)
    numbers = next(made.batches())[:9]
    made.rng = np.random.default_rng(5)
    found = float(made(model, numbers))
    rows, items = made.labels.row[numbers], made.labels.item[numbers]
    draw = np.random.default_rng(5)
    tables, unit = [reader.item.weight for reader in model.readers], normalize(model.readers[2].item.weight, dim=1)
    mixed = tri_cdr.newest(task.train, rows, made.labels.place[numbers], 50)
    bags = (mixed, *made.halves.before(made.labels, numbers, 50))
    parts = model.read(model.states(bags, tables), torch.arange(9), [bag.real for bag in bags])
    users, wanted = model.joined(parts), 0.0
    softplus = torch.nn.functional.softplus
    if loss == "bce":
        drawn = made.unseen.draw(rows, items, 1, draw)[:, 0]
        for user, item, other in zip(users, items, drawn, strict=True):
            wanted += float(softplus(-(user @ unit[item])) + softplus(user @ unit[other])) / 9
    else:
        low, high = task.target
        scores = users @ unit[low:high].T
        wanted = -float(scores.log_softmax(1)[torch.arange(9), items - low].mean())
    last = [k for k in range(9) if k == 8 or rows[k + 1] != rows[k]]
    x, s, t = (f(part[last]) for f, part in zip(model.projections, parts, strict=True))
    for one, other, rate in ((x, s, 2.0), (x, t, 1.0), (s, t, 1.0)):
        wanted += 0.3 * rate / 4 * float(contrast(normalize(one, dim=1), normalize(other, dim=1), 0.1))
    gaps = [(s[k] - x[k]).norm() - (s[k] - t[k]).norm() + 1.0 for k in range(len(last))]
    wanted += 0.2 * sum(max(0.0, float(gap)) for gap in gaps) / len(last)
    assert found == pytest.approx(wanted, rel=0.01 if loss == "softmax" else 1e-4)


def test_faults_of_a_config_are_told_together() -> None:
    with pytest.raises(InputError) as fault:
        Config(loss="hinge", scale=0.0, margin=-1.0)
    for line in (
        "loss is 'hinge'; choose from bce, softmax",
        "scale is 0.0; give a number above 0",
        "margin is -1.0; give a number of at least 0",
    ):
        assert line in str(fault.value)
