"""SASRec against a slow reference; what every model of sequences is held to stands in `test_next_item_models`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from features.errors import InputError
from trainables.interface import Setup, load_model
from trainables.models import sasrec
from trainables.models.sasrec import ABLATIONS, WIDTH, Config, Loss, SASRec, train
from trainables.sequences.labels import training_labels
from trainables.tasks.sequential import SequenceTask
from trainables.tasks.sequential_build import build_sequences
from trainables.trial import run

from .sequence_worlds import SPEC, histories, make_sequence_world, sequence_domains

QUICK = {"negatives": 20, "batch": 16, "epochs": 1, "max_length": 8}


def network(config: Config | None = None, items: int = 40) -> SASRec:
    """With tables so large that positions and attention matter, in double precision."""
    torch.manual_seed(0)
    made = SASRec(config or Config(heads=2), items).double().eval()
    for table in filter(None, (made.item, made.position)):
        torch.nn.init.normal_(table.weight, std=0.3)
    return made


def by_hand(model: SASRec, config: Config, items: list[int]) -> Tensor:
    """State after the last item: one query after the other, one key after the other (section III)."""
    items = items[-config.max_length :]
    first = config.max_length - len(items)
    x = [math.sqrt(WIDTH) * model.item.weight[item] for item in items]
    if model.position is not None:
        x = [vector + model.position.weight[first + place] for place, vector in enumerate(x)]
    size = WIDTH // config.heads
    for block in model.blocks:
        normed = [block.attention_norm(vector) for vector in x]
        read = []
        for place, vector in enumerate(normed):
            heads = []
            for head in range(config.heads):
                part = slice(head * size, (head + 1) * size)
                query = block.query.weight[part] @ vector
                keys = [block.key_value.weight[:WIDTH][part] @ normed[other] for other in range(place + 1)]
                values = [block.key_value.weight[WIDTH:][part] @ normed[other] for other in range(place + 1)]
                weights = torch.stack([(query @ key / math.sqrt(size)).exp() for key in keys])
                heads.append(sum(w * v for w, v in zip(weights / weights.sum(), values, strict=True)))
            read.append(torch.cat(heads))
        x = [vector + attended for vector, attended in zip(x, read, strict=True)]
        inner, _, outer = block.map
        for place, vector in enumerate(x):
            hidden = (inner.weight @ block.map_norm(vector) + inner.bias).clamp(min=0)
            x[place] = vector + outer.weight @ hidden + outer.bias
    state: Tensor = model.norm(x[-1])
    return state


# --- the network --------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [Config(), Config(heads=4, blocks=3), Config(positions=False), Config(max_length=3)],
    ids=["paper", "deep", "no positions", "short"],
)
def test_t3_the_network_against_loops_over_queries_and_keys(config: Config) -> None:
    model = network(config)
    rows = [[5, 2, 9, 31, 0, 7], [3], [8, 1]]
    for state, items in zip(model.users(histories(*rows), (0, 40)), rows, strict=True):
        torch.testing.assert_close(state, by_hand(model, config, items), atol=1e-12, rtol=0)


@torch.no_grad()
def test_one_item_attends_to_itself_alone() -> None:
    """Its attention weight is 1, so a block adds the value of the normalised input: a closed form."""
    model = network(Config(blocks=1))
    assert model.position is not None
    block: Any = model.blocks[0]
    x = 8 * model.item.weight[6] + model.position.weight[-1]
    x = x + block.key_value.weight[WIDTH:] @ block.attention_norm(x)
    x = x + block.map(block.map_norm(x))
    torch.testing.assert_close(model.users(histories([6]), (0, 40))[0], model.norm(x), atol=1e-12, rtol=0)


@torch.no_grad()
def test_order_matters_by_positions_and_by_the_causal_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = [4, 8, 15, 16, 23], [15, 4, 16, 8, 23]

    def change(config: Config) -> float:
        model = network(config)
        states = model.users(histories(one, other), (0, 40))
        return float((states[0] - states[1]).abs().max())

    assert change(Config()) > 1e-3
    assert change(Config(positions=False)) > 1e-3  # a second block reads states that know what was before them
    monkeypatch.setattr(sasrec, "causal", lambda length, device: torch.ones(1, 1, length, length, dtype=torch.bool))
    assert change(Config(positions=False)) < 1e-12


@torch.no_grad()
def test_t1_no_state_depends_on_a_later_item() -> None:
    model = network(Config(blocks=3, heads=2))
    items, length = torch.randint(40, (4, 7)), torch.full((4,), 7)
    before = model.encode(model.item(items), length)
    for last in range(6):
        changed = items.clone()
        changed[:, last + 1 :] = torch.randint(40, (4, 6 - last))
        after = model.encode(model.item(changed), length)
        assert after[:, : last + 1].equal(before[:, : last + 1])
        assert not after[:, last + 1].equal(before[:, last + 1])


# --- training -----------------------------------------------------------------------------------------------------


def trained(config: Config, task: SequenceTask, epochs: int) -> tuple[SASRec, float]:
    """The network and the last mean loss, without a runner."""
    torch.manual_seed(0)
    places = train(config, task, 0)
    setup = next(places)
    assert isinstance(setup, Setup)
    loss = math.nan
    for _ in range(epochs):
        loss = next(places).metrics["train_loss"]  # type: ignore[union-attr]
    assert isinstance(setup.network, SASRec)
    return setup.network.eval(), loss


@torch.no_grad()
@pytest.mark.parametrize("reads", ["merged", "target"])
def test_the_loss_is_that_of_every_label_among_the_items_of_its_own_domain(task: SequenceTask, reads: str) -> None:
    """One label after the other, against all items of its domain; draws are as many that they stand for all."""
    config = Config(sequences=reads, negatives=20_000, dropout=0.0, max_length=4)
    torch.manual_seed(0)
    model = SASRec(config, task.items).eval()
    torch.nn.init.normal_(model.item.weight, std=0.2)
    labels, rng = training_labels(task, reads), np.random.default_rng(0)
    batch = next(labels.batches(8, config.max_length, rng))
    losses = []
    for number in batch.number.tolist():
        start = int(labels.shown.starts[labels.row[number]])
        shown = labels.shown.item[start : start + int(labels.at[number]) + 1].tolist()
        # Positions are counted from the end of the window, which holds what is after this label too.
        window = int(batch.length[batch.row[batch.number == number]])
        column = int(batch.column[batch.number == number])
        prefix = torch.tensor([shown[-(column + 1) :] + [0] * (window - column - 1)])
        state = model.encode(model.item(prefix), torch.tensor([window]))[0, column]
        item = int(labels.item[number])
        low, high = task.target if task.target[0] <= item < task.target[1] else task.source
        assert reads == "merged" or (low, high) == task.target
        losses.append(-float((model.item.weight[low:high] @ state).log_softmax(0)[item - low]))
    found = float(Loss(config, task, labels, rng)(model, batch))
    assert found == pytest.approx(float(np.mean(losses)), rel=0.01)


def test_target_only_reads_target_sequences_and_nothing_under_inter(task: SequenceTask) -> None:
    config = Config(**ABLATIONS["target_only"].config, batch=16, negatives=20)
    model, _ = trained(config, task, 2)
    begun, _ = trained(config, task, 0)
    low, high = task.source
    assert model.item.weight[low:high].equal(begun.item.weight[low:high])  # no source item is an input or a label
    assert not model.item.weight[slice(*task.target)].equal(begun.item.weight[slice(*task.target)])


# --- through the runner -------------------------------------------------------------------------------------------


def clean(metrics: dict[str, float]) -> dict[str, float]:
    """Without what a clock measured."""
    return {name: value for name, value in metrics.items() if "seconds" not in name}


# --- configuration ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def untitled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a task that was built without titles."""
    folder = tmp_path_factory.mktemp("untitled")
    domains = sequence_domains(make_sequence_world(), folder)
    return build_sequences(SPEC, domains["film"], domains["song"], None, None, None, folder / "tasks").task_dir


def test_a_task_without_titles_is_enough(untitled: Path, sequence_folders: tuple[Path, Path]) -> None:
    """Ids are all that is read, so that titles change nothing."""
    (*_, without), (*_, beside) = (
        list(run("sasrec", QUICK, str(folder), [0])) for folder in (untitled, sequence_folders[0])
    )
    assert clean(without.metrics) == clean(beside.metrics)


def test_the_start_from_titles_reads_them(untitled: Path, task: SequenceTask) -> None:
    start = ABLATIONS["text_start"].config
    model, _ = trained(Config(**start), task, 0)
    text = task.titles()
    near = (text[:8] - text[20]).norm(dim=1).argsort()
    assert (model.item.weight[:8] - model.item.weight[20]).norm(dim=1).argsort().equal(near)
    assert float(model.item.weight[:, :16].detach().std()) == pytest.approx(0.02, abs=1e-4)
    with pytest.raises(InputError, match=r"this task has no titles; set features\.text in the plan"):
        list(run("sasrec", {**QUICK, **start}, str(untitled), [0]))


def test_faults_of_a_config_are_told_together() -> None:
    with pytest.raises(InputError) as fault:
        Config(loss="bpr", heads=3, dropout=1.0, lr=0.0, negatives=0, sequences="both", item_start="text")
    for line in (
        "loss is 'bpr'; choose from softmax, bce",
        "heads is 3; give a divisor of 64",
        "dropout is 1.0; give a number of at least 0, below 1",
        "lr is 0.0; give a number above 0",
        "negatives is 0; give a number of at least 1",
        "sequences is 'both'; choose from merged, target",
        "item_start is 'text'; choose from random, titles",
    ):
        assert line in str(fault.value)


def test_it_needs_nothing_but_ids() -> None:
    model = load_model("sasrec")
    assert (model.NAME, model.TASK_TYPE, model.NEEDS) == ("SASRec", "sequences", ())
