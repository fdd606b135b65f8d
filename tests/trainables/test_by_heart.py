"""T4 of the specification for every model of sequences: what thirty users did is learned by heart.

Nobody shares an item, so that the items before a label say which it is, in order or as a set. Nearly every label must be
the best of its domain's items that the user has not had yet; a model that cannot do that here has a fault.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from trainables.interface import Epoch, Setup, field_types, load_model, make_config, model_names
from trainables.sequences.ranking import Scorer
from trainables.tasks.arrays import FeatureRows
from trainables.tasks.sequential import OVERLAPPING, Sequences, SequenceTask

USERS, EACH = 30, 3  # items of each domain that a user has, by turns: source, target, source, ...
EPOCHS = 40  # of one or two steps each
QUICK: dict[str, Any] = {
    "dropout": 0.0, "dropout_embed": 0.0, "adaptor_dropout": 0.0, "mask_rate": 0.0, "drop": 0.0, "contrast": 0.0,
    "negatives": 90, "batch": 60, "lr": 1e-2, "stage_epochs": 40,
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {  # what a model needs beside it; `loss`: one drawn item a label takes more steps
    "cd_cdr": {
        "diffusion": False,
        "hide_own": 0.0,
        "batch": 20,
    },  # of a quarter of the rows: the chain takes more epochs
    "diffurec": {"batch": 20},
    "gru4rec": {"lr": 2e-2},
    "mgcl": {"loss": "softmax"},
    "tri_cdr": {"loss": "softmax"},
    "unicdr": {"mix": 1.0},
}
NAMES = [name for name in model_names() if load_model(name).TASK_TYPE == "sequences" and name != "lgcd"]


@pytest.fixture(scope="module")
def small(task: SequenceTask, tmp_path_factory: pytest.TempPathFactory) -> SequenceTask:
    """A task of these users alone."""
    items, rng = USERS * EACH, np.random.default_rng(0)
    target, source = rng.permutation(items), items + rng.permutation(items)
    item = np.stack([source, target], axis=1).ravel()
    train = Sequences(torch.from_numpy(item), torch.arange(USERS + 1) * 2 * EACH)
    nothing = torch.full((USERS, 1), -1)
    vectors = rng.standard_normal((2 * items, 16)).astype(np.float32)
    return replace(
        task, folder=tmp_path_factory.mktemp("heart") / "task" / "search", items=2 * items, target=(0, items),
        source=(items, 2 * items), train=train, group=torch.full((USERS,), OVERLAPPING, dtype=torch.int8),
        pseudo=nothing, generated=nothing, similarity=torch.zeros(USERS, 1), train_key="by heart",
        text=FeatureRows(vectors, np.arange(len(vectors)), np.zeros(16, np.float32), 1.0),
    )  # fmt: skip


def share_known(scorer: Scorer, task: SequenceTask) -> float:
    """Share of users whose last item comes first among the target-domain items that they have not had before."""
    last = task.train.starts[1:] - 1
    items = task.train.item.reshape(USERS, -1)[:, :-1]
    shown = Sequences(items.flatten(), torch.arange(USERS + 1) * items.shape[1])
    scores = scorer.scores(shown).masked_fill(task.ranked_last(shown), -torch.inf)
    return float((scores.argmax(dim=1) + task.target[0] == task.train.item[last]).float().mean())


@pytest.mark.parametrize("name", NAMES)
def test_t4_thirty_users_are_learned_by_heart(
    small: SequenceTask, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    model = load_model(name)
    for constant, value in (("SPACE_LR", 2e-2), ("READER_EPOCHS", 40), ("ENCODER_EPOCHS", 5), ("TEXT_EPOCHS", 1)):
        monkeypatch.setattr(f"trainables.models.{name}.{constant}", value, raising=False)
    known = field_types(model.Config)
    fields = {field: value for field, value in {**QUICK, **MORE.get(name, {})}.items() if field in known}
    torch.manual_seed(0)
    places = model.train(make_config(name, fields, "config"), small, 0)
    setup = next(places)
    assert isinstance(setup, Setup)
    setup.network.train()
    epochs = (place for place in places if isinstance(place, Epoch))
    epoch = next(islice(epochs, EPOCHS - 1, None))
    setup.network.eval()
    scorer: Any = epoch.predict
    assert share_known(scorer, small) > 0.9
