"""UniSRec's adaptor, contrasts and pretraining against NumPy and loops."""

from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from features.errors import InputError
from trainables.interface import Setup, Stage
from trainables.models.unisrec import WIDTH, Adaptor, Config, Loss, Pretraining, UniSRec, train
from trainables.sequences.labels import training_labels
from trainables.sequences.losses import contrast_with
from trainables.tasks.sequential import SequenceTask
from trainables.trial import run


def network(config: Config, items: int = 40) -> UniSRec:
    torch.manual_seed(0)
    made = UniSRec(config, items, torch.randn(items, 12)).double().eval()
    made.titles = made.titles.double()
    return made


@torch.no_grad()
def test_one_expert_is_a_shift_and_a_map() -> None:
    torch.manual_seed(0)
    adaptor = Adaptor(6, 1, 0.5).double().eval()
    torch.nn.init.normal_(adaptor.shift)
    x = np.random.default_rng(0).normal(size=(9, 6))
    wanted = (x - adaptor.shift[0].numpy()) @ adaptor.map[0].numpy()
    np.testing.assert_allclose(adaptor(torch.from_numpy(x)).numpy(), wanted, atol=1e-13)


@torch.no_grad()
def test_an_expert_can_whiten() -> None:
    """With the mean as shift and the inverse root of the covariance as map, the covariance is the identity."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(500, WIDTH)) @ rng.normal(size=(WIDTH, WIDTH)) + 3)
    adaptor = Adaptor(WIDTH, 1, 0.0).double().eval()
    values, vectors = torch.linalg.eigh(torch.cov(x.T))
    adaptor.shift[0] = x.mean(dim=0)
    adaptor.map[0] = vectors @ torch.diag(values**-0.5) @ vectors.T
    torch.testing.assert_close(torch.cov(adaptor(x).T), torch.eye(WIDTH, dtype=torch.float64), atol=1e-8, rtol=0)


@torch.no_grad()
def test_the_gate_weighs_experts_and_is_noisy_in_training_alone() -> None:
    torch.manual_seed(0)
    adaptor, x = Adaptor(6, 4, 0.0).double(), torch.randn(5, 6, dtype=torch.float64)
    torch.nn.init.normal_(adaptor.gate)
    wanted = torch.zeros(5, WIDTH, dtype=torch.float64)
    gate = (x @ adaptor.gate).softmax(dim=1)
    for row in range(5):
        for expert in range(4):
            wanted[row] += gate[row, expert] * ((x[row] - adaptor.shift[expert]) @ adaptor.map[expert])
    adaptor.eval()
    torch.testing.assert_close(adaptor(x), wanted, atol=1e-13, rtol=0)
    assert adaptor(x).equal(adaptor(x))
    adaptor.train()
    assert not adaptor(x).equal(adaptor(x))


@torch.no_grad()
@pytest.mark.parametrize(
    "config", [Config(), Config(ids=False), Config(text=False)], ids=["both", "text alone", "ids alone"]
)
def test_scores_are_cosines_over_the_temperature(config: Config) -> None:
    from trainables.tasks.sequential import Sequences

    model, items = network(config), [5, 2, 9]
    users = model.users(Sequences(torch.tensor(items), torch.tensor([0, 3])), (10, 40))
    vectors = model.vectors(torch.arange(40))
    state = model.encode(vectors[torch.tensor([items])])[0, -1]
    wanted = [float(state @ v / state.norm() / v.norm()) / 0.07 for v in vectors[10:]]
    torch.testing.assert_close((users @ model.items((10, 40)).T)[0].tolist(), wanted, atol=1e-10, rtol=0)


@torch.no_grad()
def test_t1_no_state_depends_on_a_later_item() -> None:
    model = network(Config())
    items = torch.randint(40, (4, 7))
    vectors = model.vectors(torch.arange(40))
    before = model.encode(vectors[items])
    for last in range(6):
        changed = items.clone()
        changed[:, last + 1 :] = torch.randint(40, (4, 6 - last))
        after = model.encode(vectors[changed])
        torch.testing.assert_close(after[:, : last + 1], before[:, : last + 1], atol=1e-12, rtol=0)
        assert not after[:, last + 1].equal(before[:, last + 1])


@pytest.mark.parametrize("labels", [[1, 2, 3, 4], [1, 2, 1, 1]], ids=["all differ", "some are equal"])
def test_a_pair_of_the_same_label_has_no_weight(labels: list[int]) -> None:
    draw = torch.Generator().manual_seed(0)
    one, other = (normalize(torch.randn(4, 5, dtype=torch.float64, generator=draw), dim=1) for _ in range(2))
    wanted = 0.0
    for row in range(4):
        kept = [k for k in range(4) if k == row or labels[k] != labels[row]]
        terms = {k: math.exp(float(one[row] @ other[k]) / 0.2) for k in kept}
        wanted -= math.log(terms[row] / sum(terms.values())) / 4
    assert float(contrast_with(one, other, 0.2, torch.tensor(labels))) == pytest.approx(wanted, rel=1e-12)


@torch.no_grad()
def test_the_loss_is_that_of_every_label_among_the_items_of_its_own_domain(task: SequenceTask) -> None:
    config = Config(negatives=20_000, dropout=0.0, adaptor_dropout=0.0, temperature=0.5)
    torch.manual_seed(0)
    model = UniSRec(config, task.items, task.titles()).eval()
    batch = next(training_labels(task, "merged").batches(8, 50, np.random.default_rng(0)))
    vectors = model.vectors(torch.arange(task.items))
    unit, losses = normalize(vectors, dim=1), list[float]()
    for row, column, label in zip(batch.row.tolist(), batch.column.tolist(), batch.label.tolist(), strict=True):
        state = model.encode(vectors[batch.item[row : row + 1, : column + 1]])[0, -1]
        low, high = task.target if task.target[0] <= label < task.target[1] else task.source
        scores = unit[low:high] @ normalize(state, dim=0) / 0.5
        losses.append(-float(scores.log_softmax(0)[label - low]))
    found = float(Loss(config, task, np.random.default_rng(0))(model, batch))
    assert found == pytest.approx(float(np.mean(losses)), rel=0.01)


def test_pretraining_reads_both_domains_apart_and_then_rests(task: SequenceTask) -> None:
    config = Config(pretrain_epochs=1, batch=32, negatives=20)
    torch.manual_seed(0)
    places = train(config, task, 0)
    setup = next(places)
    assert isinstance(setup, Setup)
    begun = {name: value.clone() for name, value in setup.network.state_dict().items()}
    assert isinstance(next(places), Stage)
    pretrained = {name: value.clone() for name, value in setup.network.state_dict().items()}
    assert not pretrained["position.weight"].equal(begun["position.weight"])
    next(places)
    trained = setup.network.state_dict()
    assert trained["position.weight"].equal(pretrained["position.weight"])
    assert trained["blocks.0.query.weight"].equal(pretrained["blocks.0.query.weight"])
    assert not trained["adaptor.map"].equal(pretrained["adaptor.map"])


def test_a_batch_of_pretraining_is_half_of_each_domain_and_a_view_keeps_the_first_item(task: SequenceTask) -> None:
    torch.manual_seed(0)
    model = UniSRec(Config(), task.items, task.titles())
    labels = [training_labels(task, which) for which in ("source", "target")]
    made = Pretraining(model, labels, np.random.default_rng(0))
    lengths = []
    for item, length, label in made.batches(16):
        source = (label >= task.source[0]) & (label < task.source[1])
        own = (item >= task.source[0]) & (item < task.source[1])
        real = torch.arange(item.shape[1]) < length[:, None]
        assert (own == source[:, None])[real].all()  # a sequence of one domain and a label of it
        fewer, left = made._without_some(item, length)
        assert fewer[:, 0].equal(item[:, 0])
        assert (left <= length).all()
        for row in range(len(item)):
            whole = item[row, : length[row]].tolist()
            rest = iter(whole)
            assert all(kept in rest for kept in fewer[row, : left[row]].tolist())  # in their order
        lengths.append((int(left.sum()), int(length.sum())))
    kept, all_ = map(sum, zip(*lengths, strict=True))
    assert 0.75 < kept / all_ < 0.95


def test_a_pretrained_model_that_is_killed_goes_on_to_the_last_bit(sequence_folders: tuple[object, object]) -> None:
    config = {"pretrain_epochs": 2, "epochs": 1, "batch": 32, "negatives": 20}
    search = str(sequence_folders[0])
    reports = list(run("unisrec", config, search, [0]))
    states = [report.state() for report in reports if report.state is not None]
    for state in states[:2]:
        *_, last = run("unisrec", config, search, [0], state=state)
        assert last.metrics["val_ndcg10"] == reports[-1].metrics["val_ndcg10"]


def test_faults_of_a_config_are_told_together() -> None:
    with pytest.raises(InputError) as fault:
        Config(ids=False, text=False, temperature=0.0, experts=0)
    for line in (
        "ids and text are both false; an item needs one of them",
        "temperature is 0.0; give a number above 0",
        "experts is 0; give a number of at least 1",
    ):
        assert line in str(fault.value)
    assert asdict(Config())["pretrain_epochs"] == 0
