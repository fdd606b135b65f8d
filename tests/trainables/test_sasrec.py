"""SASRec against a slow reference, and what every sequence model is held to: T1 to T8 of its specification.

T1 no position reads a later one; T2 a row's scores depend on no other row; T3 a slow reference; T4 thirty users are
learned by heart; T5 what a protocol hides changes nothing; T6 a kill costs nothing; T7 a kept model gives the same
scores; T8 better than popularity where taste can be learned.
"""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from features.errors import InputError
from trainables.interface import Setup, load_model, make_config
from trainables.models import sasrec
from trainables.models.sasrec import ABLATIONS, WIDTH, Config, Loss, SASRec, train, unpack
from trainables.sequence_tools import Scorer, training_labels
from trainables.task_types import SEQUENCES
from trainables.tasks.sequential import HeldOut, Sequences, SequenceTask, load_held_out, load_task
from trainables.tasks.sequential_build import build_sequences
from trainables.trial import kept_at, run

from .sequence_worlds import SPEC, SequenceWorld, build_world, make_sequence_world, sequence_domains

QUICK = {"negatives": 20, "batch": 16, "epochs": 3, "max_length": 8}


def histories(*rows: list[int]) -> Sequences:
    starts = torch.tensor([0, *np.cumsum([len(row) for row in rows])])
    return Sequences(torch.tensor([item for row in rows for item in row], dtype=torch.int64), starts)


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
    for state, items in zip(model.users(histories(*rows)), rows, strict=True):
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
    torch.testing.assert_close(model.users(histories([6]))[0], model.norm(x), atol=1e-12, rtol=0)


@torch.no_grad()
def test_order_matters_by_positions_and_by_the_causal_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = [4, 8, 15, 16, 23], [15, 4, 16, 8, 23]

    def change(config: Config) -> float:
        model = network(config)
        states = model.users(histories(one, other))
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


@torch.no_grad()
def test_t2_a_row_alone_in_a_batch_and_beside_longer_ones_gives_the_same(task: SequenceTask) -> None:
    torch.manual_seed(0)
    model = SASRec(Config(), task.items).eval()
    scorer = Scorer.of_task(model, task, "merged")
    whole = scorer(task.validation, task, 0)
    for row in range(len(task.validation)):
        alone = scorer(task.validation.rows(torch.tensor([row])), task, 0)
        torch.testing.assert_close(alone[0], whole[row], atol=1e-6, rtol=1e-6)


# --- training -----------------------------------------------------------------------------------------------------


def toy(task: SequenceTask, users: int = 30, length: int = 6) -> SequenceTask:
    """Users who each begin with an item of their own, so that everything after it can be known."""
    rng = np.random.default_rng(0)
    first = rng.permutation(task.items)[:users]
    others = [rng.permutation(np.setdiff1d(np.arange(task.items), [item]))[: length - 1] for item in first]
    item = np.column_stack([first, np.stack(others)]).ravel()
    train = Sequences(torch.from_numpy(item), torch.arange(users + 1) * length)
    return replace(task, train=train, group=torch.zeros(users, dtype=torch.int8))


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


@pytest.mark.parametrize("loss", ["softmax", "bce"])
def test_t4_thirty_users_are_learned_by_heart(task: SequenceTask, loss: str) -> None:
    small = toy(task)
    config = Config(loss=loss, bce_negatives=8, dropout=0.0, batch=30, negatives=200, lr=3e-3)
    model, last = trained(config, small, 250)
    assert last < 0.1
    labels, hits = training_labels(small, "merged"), 0
    for row, place, item in zip(labels.row.tolist(), labels.place.tolist(), labels.item.tolist(), strict=True):
        own = small.train.item[int(small.train.starts[row]) : int(small.train.starts[row + 1])]
        low, high = small.target if small.target[0] <= item < small.target[1] else small.source
        scores = model.items((low, high)) @ model.users(histories(own[:place].tolist()))[0]
        scores[own[(own >= low) & (own < high) & (own != item)] - low] = -torch.inf  # a user has an item once
        hits += int(scores.argmax()) == item - low
    assert hits == len(labels)


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


def test_t5_what_a_protocol_hides_changes_no_score(tmp_path: Path) -> None:
    """The held-out users' earlier target-domain items are others; nothing else is."""
    world = make_sequence_world(items=32)
    task = load_task(build_world(world, tmp_path / "one").task_dir)
    held_out = [str(user) for user in np.load(task.folder / "validation" / "user_id.npy")]
    table, draw = world.interactions.copy(), np.random.default_rng(0)
    for user in held_out:
        rows = table.index[(table["user_id"] == user) & (table["domain"] == "song")]
        rows = rows[table.loc[rows, "position"] < table.loc[rows, "position"].max()]
        others = sorted(set(world.interactions.query("domain == 'song'")["item_id"]) - set(world.of(user)))
        table.loc[rows, "item_id"] = draw.choice(others, len(rows), replace=False)
    other = load_task(build_world(SequenceWorld(table), tmp_path / "other").task_dir)
    scores = []
    for given in (task, other):
        model, _ = trained(Config(batch=16, negatives=20), given, 2)
        scores.append(Scorer.of_task(model, given, "merged")(given.validation, given, 0))
    inter = task.validation.protocol == task.protocols.index("inter")
    assert scores[0][inter].equal(scores[1][inter])
    changed = [not one.equal(two) for one, two in zip(scores[0][~inter], scores[1][~inter], strict=True)]
    assert sum(changed) > 0.5 * len(changed)


def test_target_only_reads_target_sequences_and_nothing_under_inter(task: SequenceTask) -> None:
    config = Config(**ABLATIONS["target_only"].config, batch=16, negatives=20)
    model, _ = trained(config, task, 2)
    begun, _ = trained(config, task, 0)
    low, high = task.source
    assert model.item.weight[low:high].equal(begun.item.weight[low:high])  # no source item is an input or a label
    assert not model.item.weight[slice(*task.target)].equal(begun.item.weight[slice(*task.target)])


# --- through the runner -------------------------------------------------------------------------------------------


def reloaded(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


@pytest.mark.parametrize("loss", ["softmax", "bce"])
def test_t6_a_kill_after_any_epoch_changes_no_metric(sequence_folders: tuple[Path, Path], loss: str) -> None:
    search, test = map(str, sequence_folders)
    config, states, whole = {**QUICK, "loss": loss}, [], []
    for report in run("sasrec", config, search, [0, 1], test):
        whole.append(clean(report.metrics))
        if report.state is not None:
            states.append(reloaded(report.state()))
    assert len(states) == 2
    for done, state in enumerate(states, start=1):
        rest = [clean(report.metrics) for report in run("sasrec", config, search, [0, 1], test, state=state)]
        assert rest == whole[done:]


def clean(metrics: dict[str, float]) -> dict[str, float]:
    """Without what a clock measured."""
    return {name: value for name, value in metrics.items() if "seconds" not in name}


def test_a_seed_is_the_same_alone_and_beside_others(sequence_folders: tuple[Path, Path]) -> None:
    search, _ = sequence_folders
    (*_, alone), (*_, beside) = (list(run("sasrec", QUICK, str(search), seeds)) for seeds in ([1], [0, 1]))
    assert alone.metrics["val_ndcg10/seed_1"] == beside.metrics["val_ndcg10/seed_1"]
    assert alone.metrics["train_loss/seed_1"] == beside.metrics["train_loss/seed_1"]


@pytest.mark.parametrize("reads", ["merged", "target"])
def test_t7_a_kept_model_gives_the_scores_of_the_trained_one(
    sequence_folders: tuple[Path, Path], task: SequenceTask, scored: HeldOut, reads: str
) -> None:
    search, test = map(str, sequence_folders)
    config = {**QUICK, "sequences": reads}
    *_, final = run("sasrec", config, search, [0], test)
    packed = torch.load(kept_at("sasrec", config, search, [0]), weights_only=True)
    score = unpack(make_config("sasrec", packed["config"], "config"), packed["state"], packed["seed"])
    measured = SEQUENCES.measure(scored, lambda held_out, task, seed: score(held_out.history), task, 0, full=True)
    assert measured.metrics["ndcg10"] == final.metrics["test_ndcg10"]
    assert measured.metrics["full_hr10"] == final.metrics["test_full_hr10"]
    shown = SEQUENCES.hide_seen(score(scored.history), scored.history, task.target)
    for row, (start, end) in enumerate(zip(scored.history.starts[:-1], scored.history.starts[1:], strict=True)):
        own = [item - task.target[0] for item in scored.history.item[start:end].tolist() if item >= task.target[0]]
        assert (shown[row] == -torch.inf).nonzero().flatten().tolist() == sorted(own)


def test_t8_above_popularity_where_users_have_a_taste(tmp_path: Path) -> None:
    folders = build_world(make_sequence_world(users=240, overlap=160), tmp_path)
    config = {"batch": 16, "negatives": 40, "epochs": 12, "dropout": 0.2}
    *_, final = run("sasrec", config, str(folders.task_dir), [0], str(folders.test_dir))
    test, task = load_held_out(folders.test_dir), load_task(folders.task_dir)
    popular = SEQUENCES.measure(test, SEQUENCES.as_predict("popularity"), task, 0, full=False).metrics
    for protocol in ("as-given", "inter"):
        assert final.metrics[f"test_ndcg10_{protocol}"] > popular[f"ndcg10_{protocol}"] + 0.1


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
