"""A kept model in use: what is known of users in their source domain -> the best items of the target domain.

    <folder>/weights.pt       what `trainables.trial` kept of a scored trial
             items.parquet    item_id, title, in_target: all items that the model numbers, in that order

Shapes: U users, J items of the target domain.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from features.errors import InputError
from trainables.interface import load_model, make_config
from trainables.task_types import TASK_TYPES, item_numbers

RECOMMENDED = {"items": "texts", "titles": "texts", "scores": "numbers"}  # columns of what is recommended


class Served:
    """A model and the items that it knows."""

    def __init__(self, folder: Path) -> None:
        """Raise InputError where other code of the model kept it, of another `VERSION`."""
        packed = torch.load(folder / "weights.pt", weights_only=True)
        model = load_model(packed["model"])
        if (version := packed.get("version", 1)) != model.VERSION:
            raise InputError(
                f"{folder}: this is version {version} of {packed['model']}, which is at {model.VERSION} here; score the "
                "plan again, or read it with the code that kept it"
            )
        config = make_config(packed["model"], packed["config"], f"config of {packed['model']}")
        assert model.unpack is not None
        self._task_type = TASK_TYPES[model.TASK_TYPE]
        self._score = model.unpack(config, packed["state"], packed["seed"])
        self._limits = packed["limits"]
        items = pd.read_parquet(folder / "items.parquet")
        target, source = items[items["in_target"]], items[~items["in_target"]]
        self._ids, self._titles = target["item_id"].to_numpy(object), target["title"].to_numpy(object)
        self._range = (int(target.index[0]), int(target.index[-1]) + 1)
        self._place = {item: place for place, item in enumerate(self._ids)}
        # An id of both domains means the source domain's item in a history.
        self._numbers = dict(zip(target["item_id"], target.index, strict=True))
        self._numbers |= dict(zip(source["item_id"], source.index, strict=True))

    def recommend(self, users: pd.DataFrame, n: int) -> pd.DataFrame:
        """The `n` best items of each row: columns items (ids), titles, scores, each a list, best first.

        `users`: the columns of the task type's query, and, where only some items are asked about, their ids as
        `candidates`. Scores of ratings are within the rating scale. Raises InputError for no row, unknown items, and what
        is no number or not of the model's width.
        """
        if n < 1:
            raise InputError(f"n is {n}; give at least 1")
        if users.empty:
            raise InputError("users: there is no row; give one for each user")
        query = self._task_type.query(users, self._numbers)
        scores_UJ = self._task_type.hide_seen(self._score(query), query, self._range)
        if "candidates" in users:
            scores_UJ = self._among(scores_UJ, users["candidates"])
        best = scores_UJ.topk(min(n, scores_UJ.shape[1]), dim=1)
        rows = []
        for score, place in zip(best.values.numpy(), best.indices.numpy(), strict=True):
            known = np.isfinite(score)  # what a user has already is never recommended
            shown = score[known].astype(float).clip(*self._limits)
            rows.append((list(self._ids[place[known]]), list(self._titles[place[known]]), list(shown)))
        return pd.DataFrame(rows, columns=list(RECOMMENDED))

    def _among(self, scores_UJ: torch.Tensor, candidates: pd.Series) -> torch.Tensor:
        """The scores with -inf for all other items; a row without candidates keeps all."""
        hidden = torch.zeros(scores_UJ.shape, dtype=torch.bool)
        for row, ids in enumerate(candidates):
            if ids is not None:
                hidden[row] = True
                hidden[row, item_numbers(self._place, list(ids), "candidates")] = False
        return scores_UJ.masked_fill(hidden, -torch.inf)
