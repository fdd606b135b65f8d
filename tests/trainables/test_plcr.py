"""PLCR's prompts, losses and shared pretraining against closed forms."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from features.errors import InputError
from trainables import pretraining
from trainables.devices import seeded
from trainables.models import plcr, sasrec
from trainables.models.plcr import PLCR, WIDTH, Config, Loss, PromptEncoder, frozen_states, separation_loss
from trainables.sequences.labels import halved_labels, training_labels
from trainables.tasks.sequential import Sequences, SequenceTask
from trainables.trial import run


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plcr, "READER_EPOCHS", 1)


@torch.no_grad()
def test_the_order_of_the_contexts_means_nothing() -> None:
    torch.manual_seed(0)
    encoder, shared = PromptEncoder(Config()).eval(), torch.randn(5, WIDTH)
    item = torch.randn(4, WIDTH)
    before = encoder(item, shared)
    torch.testing.assert_close(encoder(item, shared[torch.randperm(5)]), before, atol=1e-5, rtol=1e-5)
    encoder.contexts.data = encoder.contexts[torch.tensor([2, 0, 1])]
    torch.testing.assert_close(encoder(item, shared), before, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(encoder(item, 2 * shared), before)


@torch.no_grad()
def test_a_pooling_of_zeros_is_the_mean_of_the_tokens() -> None:
    torch.manual_seed(0)
    encoder, shared = PromptEncoder(Config(prompt_blocks=0)).eval(), torch.randn(5, WIDTH)
    encoder.outer.weight.zero_()
    item = torch.randn(3, WIDTH)
    tokens = [torch.cat([shared, encoder.contexts, one[None]]) for one in item]
    wanted = torch.stack([encoder.norm(math.sqrt(WIDTH) * token).mean(dim=0) for token in tokens])
    torch.testing.assert_close(encoder(item, shared), wanted, atol=1e-5, rtol=1e-5)


def test_the_separation_loss_by_hand() -> None:
    zero = torch.zeros(3, WIDTH)
    assert float(separation_loss(zero, torch.randn(3, WIDTH), zero)) == pytest.approx(2 * math.log(2))
    state, prompt, other = (torch.randn(2, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    by_row = [
        -float(logsigmoid(p @ h)) - math.log(1 - 1 / (1 + math.exp(-float(p @ q))))
        for h, p, q in zip(state, prompt, other, strict=True)
    ]
    assert float(separation_loss(state, prompt, other)) == pytest.approx(sum(by_row) / 2, rel=1e-5)


@torch.no_grad()
def test_states_of_labels_are_those_of_the_frozen_reader(task: SequenceTask) -> None:
    torch.manual_seed(0)
    reader, labels = sasrec.SASRec(plcr.READER, task.items).eval(), halved_labels(task)
    states = frozen_states(reader, labels)
    for number in range(0, len(labels), 23):
        start = int(labels.shown.starts[labels.row[number]])
        end = int(labels.shown.starts[labels.row[number] + 1])
        whole = labels.shown.item[start:end]
        last = int(labels.at[labels.row == labels.row[number]].max()) + 1
        read = reader.encode(reader.item(whole[:last][None]), torch.tensor([last]))
        torch.testing.assert_close(states[number], read[0, int(labels.at[number])], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_loss_is_a_softmax_over_each_domain(task: SequenceTask) -> None:
    config = Config(negatives=20_000, dropout=0.0, separation=0.0)
    torch.manual_seed(0)
    model = PLCR(config, task.items, task.source, task.target).eval()
    torch.nn.init.normal_(model.reader(0).item.weight, std=0.3)
    labels = halved_labels(task)
    states = torch.randn(len(labels), WIDTH)
    source = (labels.item < task.source[1]) & (labels.item >= task.source[0])
    numbers = (source.nonzero().squeeze(1)[:4], (~source).nonzero().squeeze(1)[:4])
    wanted = 0.0
    for domain, (chosen, (low, high)) in enumerate(zip(numbers, (task.source, task.target), strict=True)):
        scores = states[chosen] @ model.described(torch.arange(low, high), domain).T
        wanted -= float(scores.log_softmax(1)[torch.arange(4), labels.item[chosen] - low].mean())
    made = Loss(config, task, labels, states, np.random.default_rng(0))
    assert float(made(model, numbers)) == pytest.approx(wanted, rel=0.01)


def test_halves_know_no_link(task: SequenceTask) -> None:
    """The labels of both parts of a sequence are those of two users who are not known to be one."""
    labels, count = halved_labels(task), len(task.train)
    for which, domain, offset in (("source", task.source, 0), ("target", task.target, count)):
        part = training_labels(task, which)
        own = (labels.item >= domain[0]) & (labels.item < domain[1])
        assert labels.item[own].equal(part.item)
        assert (labels.row[own] - offset).equal(part.row)
        items, length = labels.histories(own.nonzero().squeeze(1), 50)
        shown = items[torch.arange(items.shape[1]) < length[:, None]]
        assert ((shown >= domain[0]) & (shown < domain[1])).all()


@torch.no_grad()
def test_what_is_read_of_a_history() -> None:
    torch.manual_seed(0)
    model = PLCR(Config(), 40, (0, 20), (20, 40)).eval()
    history = Sequences(torch.tensor([3, 25, 4, 26, 5, 6]), torch.tensor([0, 4, 6]))
    users = model.users(history, model.target)
    wanted = model.reader(1).users(Sequences(torch.tensor([25, 26, 5, 6]), torch.tensor([0, 2, 4])), model.target)
    assert users.equal(wanted)
    other = model.users(history, model.source)
    wanted = model.reader(0).users(Sequences(torch.tensor([3, 4, 5, 6]), torch.tensor([0, 2, 4])), model.source)
    torch.testing.assert_close(other, wanted)
    assert not model.items(model.source).equal(model.items(model.target))
    merged = PLCR(Config(read="merged"), 40, (0, 20), (20, 40)).eval()
    merged.readers.load_state_dict(model.readers.state_dict())
    assert merged.users(history, model.target).equal(model.reader(1).users(history, model.target))


@torch.no_grad()
def test_a_reader_of_each_domain_reads_that_alone() -> None:
    """`wo_joint`: a history with own-domain items is read by their SASRec, one without by the other domain's."""
    torch.manual_seed(0)
    model = PLCR(Config(joint=False, prompts=False), 40, (0, 20), (20, 40)).eval()
    history = Sequences(torch.tensor([3, 25, 4, 26, 5, 6]), torch.tensor([0, 4, 6]))
    users, source, target = model.users(history, model.target), model.reader(0), model.reader(1)
    assert users[0].equal(target.users(Sequences(torch.tensor([25, 26]), torch.tensor([0, 2])), model.target)[0])
    assert users[1].equal(source.users(Sequences(torch.tensor([5, 6]), torch.tensor([0, 2])), model.target)[0])
    assert model.items((20, 40)).equal(target.item.weight[20:])
    of_one = Sequences(torch.tensor([25, 26]), torch.tensor([0, 2]))
    assert model.users(of_one, model.target).equal(users[:1])


def test_the_reader_of_a_domain_learns_from_its_items_alone(task: SequenceTask, tmp_path: Path) -> None:
    """Its table of the other domain's items stays as it began, and both directions make the same weights."""
    task, back = (
        replace(task, folder=tmp_path / "a" / "b", source=a, target=b)
        for a, b in ((task.source, task.target), (task.target, task.source))
    )
    torch.manual_seed(0)
    weights = plcr.pretrained(task, 0, task.target)
    with seeded(0, task.device):
        began = sasrec.SASRec(plcr.READER, task.items).item.weight
    moved = (weights["item.weight"] != began).any(dim=1)
    low, high = task.target
    assert moved[low:high].all()
    assert not moved[:low].any()
    assert not moved[high:].any()
    made = sorted(path.name for path in (tmp_path / "plcr").iterdir())
    assert all(value.equal(weights[name]) for name, value in plcr.pretrained(back, 0, task.target).items())
    assert sorted(path.name for path in (tmp_path / "plcr").iterdir()) == made


def test_trials_share_one_pretraining(sequence_folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    search, made = str(sequence_folders[0]), []
    pretrain = pretraining.pretrain
    monkeypatch.setattr(pretraining, "pretrain", lambda *a, **k: made.append(k["seed"]) or pretrain(*a, **k))
    config: dict[str, Any] = {"epochs": 1, "batch": 64, "negatives": 20}
    for lr in (1e-3, 2e-3):
        *_, _ = run("plcr", {**config, "lr": lr}, search, [11])
    assert made == [11]


def test_both_directions_make_the_same_weights(
    task: SequenceTask, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    documents: list[Any] = []

    def kept_once(task: SequenceTask, kind: str, document: Any, make: Any) -> Any:
        documents.append(document)
        return make(tmp_path / f"{len(documents)}.pt")

    monkeypatch.setattr(pretraining, "kept_once", kept_once)
    back = replace(task, source=task.target, target=task.source)
    one, other = (plcr.pretrained(given, 0) for given in (task, back))
    assert documents[0] == documents[1]
    assert all(value.equal(other[name]) for name, value in one.items())


def test_faults_of_a_config_are_told_together() -> None:
    with pytest.raises(InputError, match="joint is False with read 'merged'; give read 'own'"):
        Config(read="merged", joint=False)
    with pytest.raises(InputError) as fault:
        Config(read="all", shared_contexts=-1, batch=1)
    for line in (
        "read is 'all'; choose from own, merged",
        "shared_contexts is -1; give a number of at least 0",
        "batch is 1; give a number of at least 2",
    ):
        assert line in str(fault.value)
