"""The task types: all that the runner and the study have to know of `ratings` (MuSiC) and `sequences` (LGCD).

A task type says how its tasks are opened and measured, what its numbers are called and which way is better, and which
simple baselines stand beside a model. Whoever else asks which type a task is should ask the task type instead.
Shapes: N ratings, R rows (held-out users x protocols), C candidates, J items of the target domain.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from features.errors import InputError
from trainables import queries
from trainables.baselines import rating as rating_baselines
from trainables.baselines import sequential as sequence_baselines
from trainables.metrics.rating import user_errors
from trainables.metrics.sequential import SequenceErrors, sequence_errors
from trainables.tasks import rating
from trainables.tasks import sequential as sequences
from trainables.tasks.arrays import read_meta

Predict = Callable[[Any, Any, int], Tensor]
"""What a model has learned: (held_out, task, seed) -> ratings [N] of `held_out.ratings`, not cut to the rating scale; or
scores [R, J] of all items of the target domain, for each row of `held_out`. The same for the same seed."""

_CPU = torch.device("cpu")
SCORE_BYTES = 256 * 2**20  # of the scores that a sequence model is asked for at once


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number that is pooled over the rows of `per_user.csv`: the sum of `total` over the sum of `count`."""

    name: str  # as logged, after val_ or test_
    label: str
    unit: str
    better: str  # lower | higher
    total: str  # column
    count: str | None = None  # column; None: a mean over the rows
    root: bool = False  # of the quotient


@dataclass(frozen=True)
class Measured:
    """A prediction held against the truth."""

    columns: Mapping[str, NDArray[Any]]  # of `per_user.csv`, equally long: what each user contributes
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class TaskType:
    """A type of task."""

    name: str
    task: type  # of its tasks
    load_task: Callable[[Path], Any]
    load_held_out: Callable[[Path], Any]
    measure: Callable[..., Measured]  # (held_out, predict, task, seed, *, full, predicted=None)
    opposite: Callable[[Path], Path | None] = lambda _: (
        None
    )  # task_dir -> that of the opposite direction, if there is one
    query: Callable[[pd.DataFrame, Mapping[str, int]], Any]  # what is known of users, from columns and items' numbers
    query_columns: Mapping[str, str]  # those columns -> number | numbers | texts
    describe_user: Callable[
        [Path, str, Sequence[str]], pd.DataFrame
    ]  # (task_dir, user, source-domain items) -> columns
    example_user: Callable[[Path], pd.DataFrame]  # task_dir -> those columns of a validation user
    hide_seen: Callable[
        [Tensor, Any, tuple[int, int]], Tensor
    ]  # scores [U, J], query, target items -> -inf for what they have
    limits: Callable[[Any], tuple[float, float]]  # task -> least and largest score that is shown to a user
    as_predict: Callable[[str], Predict]  # a simple baseline in the form of a model's prediction
    baselines: tuple[str, ...]  # the simple baselines, each a row of every table
    baseline_needs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # baseline -> as NEEDS of a model
    reference: str  # the one among them that a useful model has to pass
    metrics: tuple[Metric, ...]  # in the order of tables
    full: tuple[Metric, ...] = ()  # those of the full ranking, named full_<metric>; test alone has them
    cold_items: tuple[Metric, ...] = ()  # of scores, over test items that never occur in training; not of every user
    groups: tuple[str, ...] = ("",)  # of rows that are averaged apart; their metrics are named <metric>_<group>
    group_column: str = ""  # column of `per_user.csv` that holds the group
    headline: str  # the metric that marks a cell's best row, and whose difference to the reference is shown
    sensitivity: tuple[str, ...]  # metrics of sensitivity figures, a panel for each group
    ablation: tuple[str, ...]  # metrics of the ablation table
    rows: str  # what a domain's interactions are called
    ratio: str  # what the ratio of a cell is called, e.g. cold
    ratio_of: str  # what it is the share of
    digits: int = 3  # of a metric in tables

    @property
    def validation_directions(self) -> dict[str, str]:
        """Metrics that may select, as they are reported -> minimize | maximize."""
        groups = ["", *(f"_{group}" for group in self.groups if group)]
        directions = {"lower": "minimize", "higher": "maximize"}
        return {f"val_{metric.name}{group}": directions[metric.better] for metric in self.metrics for group in groups}


def task_type_at(task_dir: Path) -> TaskType:
    """Return the type of the task in a folder; InputError where there is none."""
    # `task.json` of ratings says no kind. To write one is another VERSION: other keys, and all trials trained again.
    return TASK_TYPES[read_meta(task_dir).get("kind", "ratings")]


def task_type_of(opened: Any) -> TaskType:
    """The type of an open task."""
    (task_type,) = (task_type for task_type in TASK_TYPES.values() if isinstance(opened, task_type.task))
    return task_type


def _measure_ratings(
    held_out: rating.HeldOut,
    predict: Predict,
    task: rating.Task,
    seed: int,
    *,
    full: bool,
    predicted: Tensor | None = None,
) -> Measured:
    """Errors pooled over ratings, NDCG@20 over users; `full` adds `cold_item_...`, of items without training ratings."""
    predicted = predict(held_out, task, seed) if predicted is None else predicted
    ratings, predicted_N = held_out.ratings.to(_CPU), predicted.cpu()
    bounds = task.rating_scale if task.clip else (-np.inf, np.inf)
    errors = user_errors(ratings.user.numpy(), predicted_N.numpy(), ratings.rating.numpy(), bounds)
    metrics = errors.metrics()
    cold_N = held_out.cold_item.cpu()
    if full:
        metrics["cold_item_n"] = float(cold_N.sum())
    columns = {
        "user": errors.user, "n": errors.n, "sum_abs_error": errors.sum_abs_error,
        "sum_squared_error": errors.sum_squared_error, "ndcg20": errors.ndcg,
    }  # fmt: skip
    if full and cold_N.any():
        error_C = (predicted_N.clamp(*bounds) - ratings.rating)[cold_N].double().numpy()
        metrics["cold_item_mae"] = float(np.abs(error_C).mean())
        metrics["cold_item_rmse"] = float(np.sqrt(np.square(error_C).mean()))
        place_C = np.searchsorted(errors.user, ratings.user[cold_N].numpy())
        sums = {"cold_n": None, "cold_sum_abs_error": np.abs(error_C), "cold_sum_squared_error": np.square(error_C)}
        columns |= {name: np.bincount(place_C, each, len(errors.user)) for name, each in sums.items()}
    return Measured(columns, metrics)


def _rating_query(users: pd.DataFrame, numbers: Mapping[str, int]) -> rating.RatingQuery:
    """Columns features (raw source-domain vector) and source_offset."""
    rows = [np.asarray(row, np.float32) for row in users["features"]]
    if len(widths := {len(row) for row in rows}) > 1:
        raise InputError(
            f"features: have {min(widths)} to {max(widths)} numbers; give each user as many as the model reads"
        )
    query = rating.RatingQuery(
        features=torch.from_numpy(np.stack(rows)),
        source_offset=torch.from_numpy(users["source_offset"].to_numpy(np.float32, copy=True)),
    )
    for name, known in (("features", query.features), ("source_offset", query.source_offset[:, None])):
        if not (finite := known.isfinite().all(dim=1)).all():
            raise InputError(f"{name}: row {int(finite.int().argmin())} has a number that is not finite; leave it out")
    return query


RATINGS = TaskType(
    name="ratings",
    task=rating.Task,
    load_task=rating.load_task,
    load_held_out=rating.load_held_out,
    measure=_measure_ratings,
    query=_rating_query,
    query_columns=queries.RATING_COLUMNS,
    describe_user=queries.describe_rating_user,
    example_user=queries.example_rating_user,
    hide_seen=lambda scores_UJ, query, target: scores_UJ,  # a query names no items of the target domain
    limits=lambda task: task.rating_scale,
    as_predict=rating_baselines.as_predict,
    baselines=tuple(rating_baselines.PREDICTORS),
    reference="source_offset",
    metrics=(
        Metric(name="mae", label="MAE", unit="rating points", better="lower", total="sum_abs_error", count="n"),
        Metric(
            name="rmse", label="RMSE", unit="rating points", better="lower", total="sum_squared_error", count="n",
            root=True,
        ),
        Metric(name="ndcg20", label="NDCG@20", unit="0 to 1", better="higher", total="ndcg20"),
    ),
    cold_items=(
        Metric(
            name="cold_item_mae", label="MAE", unit="rating points", better="lower", total="cold_sum_abs_error",
            count="cold_n",
        ),
        Metric(
            name="cold_item_rmse", label="RMSE", unit="rating points", better="lower", total="cold_sum_squared_error",
            count="cold_n", root=True,
        ),
    ),
    headline="rmse",
    sensitivity=("rmse", "ndcg20"),
    ablation=("mae", "rmse"),
    rows="ratings",
    ratio="cold",
    ratio_of="share of overlapping users",
)  # fmt: skip


def _measure_sequences(
    held_out: sequences.HeldOut, predict: Predict, task: sequences.SequenceTask, seed: int, *, full: bool,
    predicted: Tensor | None = None,
) -> Measured:  # fmt: skip
    """HR@k and NDCG@k over users, per protocol and over protocols; `full` adds those among all target-domain items.

    Items that a row's history holds come last, because a user has an item once, but for `rank_seen: plain`. Rows are scored
    a chunk at a time, so that SCORE_BYTES hold the scores; each chunk but the first has a seed of its own. `seconds`: of
    predicting the scores.
    """
    chunks, seconds = [], 0.0
    rows = max(1, SCORE_BYTES // (4 * (task.target[1] - task.target[0])))
    for number, start in enumerate(range(0, len(held_out), rows)):
        index = torch.arange(start, min(start + rows, len(held_out)), device=held_out.device)
        chunk = held_out if len(index) == len(held_out) else held_out.rows(index)
        began = time.perf_counter()
        scores_RJ = predict(chunk, task, _chunk_seed(seed, number)) if predicted is None else predicted[index]
        scores_RJ[-1:, -1:].cpu()  # a GPU has not finished before it gives a number away
        seconds += time.perf_counter() - began
        chunks.append(_ranked(chunk, scores_RJ, task, full=full))
    errors = SequenceErrors.joined(chunks)
    protocol = np.array(task.protocols)[errors.protocol]
    columns = {"user": errors.user, "protocol": protocol, **errors.columns()}
    return Measured(columns, {**errors.metrics(task.protocols), "seconds": seconds})


def _chunk_seed(seed: int, chunk: int) -> int:
    """Seed of a chunk of rows: the first has the given one."""
    return seed if chunk == 0 else int(np.random.SeedSequence([seed % 2**32, chunk]).generate_state(1)[0])


def _ranked(
    held_out: sequences.HeldOut, scores_RJ: Tensor, task: sequences.SequenceTask, *, full: bool
) -> SequenceErrors:  # fmt: skip
    """Metrics of each row from the scores of all items; the candidates are columns of them."""
    first = task.target[0]
    hidden_RJ = task.ranked_last(held_out.history)
    column_RC = held_out.candidates.long() - first
    candidates_RC = scores_RJ.gather(1, column_RC).masked_fill(hidden_RJ.gather(1, column_RC), sequences.LAST)
    full_RJ = scores_RJ.masked_fill(hidden_RJ, sequences.LAST) if full else None
    return sequence_errors(held_out, candidates_RC, full_RJ, first)


def _hide_seen(scores_UJ: Tensor, histories: sequences.Sequences, target: tuple[int, int]) -> Tensor:
    return scores_UJ.masked_fill(sequences.seen(histories, target), -torch.inf)


def _sequence_query(users: pd.DataFrame, numbers: Mapping[str, int]) -> sequences.Sequences:
    """Column history: item ids, oldest first."""
    lengths = [len(row) for row in users["history"]]
    return sequences.Sequences(
        item=torch.from_numpy(item_numbers(numbers, [item for row in users["history"] for item in row], "history")),
        starts=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)),
    )


def item_numbers(numbers: Mapping[str, int], ids: Sequence[str], place: str) -> NDArray[np.int64]:
    """The number of each item; InputError for one that has none."""
    unknown = next((item for item in ids if item not in numbers), None)
    if unknown is not None:
        raise InputError(f"{place}: the model does not know the item {unknown!r}; leave it out")
    return np.array([numbers[item] for item in ids], np.int64)


def _ranking(prefix: str, among: str) -> tuple[Metric, ...]:
    names = (("hr5", "HR@5"), ("hr10", "HR@10"), ("ndcg5", "NDCG@5"), ("ndcg10", "NDCG@10"))
    return tuple(
        Metric(name=prefix + name, label=label, unit=f"0 to 1{among}", better="higher", total=prefix + name)
        for name, label in names
    )


SEQUENCES = TaskType(
    name="sequences",
    task=sequences.SequenceTask,
    load_task=sequences.load_task,
    load_held_out=sequences.load_held_out,
    measure=_measure_sequences,
    opposite=sequences.opposite,
    query=_sequence_query,
    query_columns=queries.SEQUENCE_COLUMNS,
    describe_user=queries.describe_sequence_user,
    example_user=queries.example_sequence_user,
    hide_seen=_hide_seen,
    limits=lambda task: (-np.inf, np.inf),
    as_predict=sequence_baselines.as_predict,
    baselines=tuple(sequence_baselines.PREDICTORS),
    baseline_needs=sequence_baselines.NEEDS,
    reference="item_knn",
    metrics=_ranking("", ""),
    full=_ranking("full_", ", among all items"),
    groups=sequences.PROTOCOLS,
    group_column="protocol",
    headline="ndcg10",
    sensitivity=("ndcg10",),
    ablation=("hr5", "ndcg5"),
    rows="interactions",
    ratio="overlap",
    ratio_of="share of training overlapping users",
    digits=4,
)

TASK_TYPES = {task_type.name: task_type for task_type in (RATINGS, SEQUENCES)}
