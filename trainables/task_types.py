"""The kinds of task: all that the door and the study have to know of `ratings` (MuSiC) and `sequences` (LGCD).

A kind says how its tasks are opened and measured, what its numbers are called and which way is better, and which simple
predictors stand beside a model. Whoever else asks which kind a task is should ask the kind instead.
Shapes: N ratings, R rows (held-out users x protocols), C candidates.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from features.errors import InputError
from trainables import queries
from trainables.baselines import rating as predictors
from trainables.baselines import sequential as sequence_predictors
from trainables.metrics.rating import user_errors
from trainables.metrics.sequential import sequence_errors
from trainables.tasks import rating as task
from trainables.tasks import sequential as sequences
from trainables.tasks.arrays import read_meta

Predict = Callable[..., Any]
"""What a model has learned. ratings: (held_out, task, seed) -> ratings [N], not cut to the rating scale, and the users'
vectors [U, D]. sequences: (held_out, task, seed, candidates) -> scores [R, C] of the candidates [R, C], or of all items of
the target domain where candidates are None."""


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
    measure: Callable[..., Measured]  # (held_out, predict, task, seed, *, full)
    query: Callable[[pd.DataFrame, Mapping[str, int]], Any]  # what is known of users, from columns and items' numbers
    query_columns: Mapping[str, str]  # those columns -> number | numbers | texts
    describe_user: Callable[[Path, str, Sequence[str]], pd.DataFrame]  # (task_dir, user, source-domain items) -> those columns
    example_user: Callable[[Path], pd.DataFrame]  # task_dir -> those columns of a validation user
    as_predict: Callable[[str], Predict]  # a simple predictor in the form of a model's prediction
    predictors: tuple[str, ...]  # the simple predictors, each a row of every table
    reference: str  # the one among them that a useful model has to pass
    metrics: tuple[Metric, ...]  # in the order of tables
    full: tuple[Metric, ...] = ()  # those of the full ranking, named full_<metric>; test alone has them
    cold_items: bool = False  # whether scores know test items that never occur in training
    groups: tuple[str, ...] = ("",)  # of rows that are averaged apart; their metrics are named <metric>_<group>
    group_column: str = ""  # column of `per_user.csv` that holds the group
    headline: str  # the metric that marks a cell's best row, and whose difference to the bar is shown
    sensitivity: tuple[str, ...]  # metrics of sensitivity figures, a panel for each group
    ablation: tuple[str, ...]  # metrics of the ablation table
    rows: str  # what a domain's interactions are called
    ratio: str  # what the ratio of a cell is called, e.g. cold
    ratio_of: str  # what it is the share of
    digits: int = 3  # of a metric in tables


def task_type_at(task_dir: Path) -> TaskType:
    """The type of the task in a folder; InputError where there is none."""
    return TASK_TYPES[read_meta(task_dir).get("kind", "ratings")]


def task_type_of(found: Any) -> TaskType:
    """The type of an open task."""
    (task_type,) = (task_type for task_type in TASK_TYPES.values() if isinstance(found, task_type.task))
    return task_type


def _measure_ratings(held_out: task.HeldOut, predict: Predict, of: task.Task, seed: int, *, full: bool) -> Measured:
    """Errors pooled over ratings, NDCG@20 over users; `full` adds `cold_item_...`, of items without training ratings."""
    predicted, _ = predict(held_out, of, seed)
    ratings = held_out.ratings
    found = user_errors(ratings.user.numpy(), predicted.numpy(), ratings.rating.numpy(), of.rating_scale)
    metrics = found.metrics()
    cold = held_out.cold_item
    if full:
        metrics["cold_item_n"] = float(cold.sum())
    if full and cold.any():
        error = (predicted.clamp(*of.rating_scale) - ratings.rating)[cold].double()
        metrics["cold_item_mae"] = float(error.abs().mean())
        metrics["cold_item_rmse"] = float(error.square().mean().sqrt())
    columns = {
        "user": found.user, "n": found.n, "sum_abs_error": found.sum_abs_error,
        "sum_squared_error": found.sum_squared_error, "ndcg20": found.ndcg,
    }  # fmt: skip
    return Measured(columns, metrics)


def _rating_query(users: pd.DataFrame, numbers: Mapping[str, int]) -> task.RatingQuery:
    """Columns features (raw source-domain vector) and source_offset."""
    rows = [np.asarray(row, np.float32) for row in users["features"]]
    if len(widths := {len(row) for row in rows}) > 1:
        raise InputError(
            f"features: have {min(widths)} to {max(widths)} numbers; give each user as many as the model reads"
        )
    query = task.RatingQuery(
        features=torch.from_numpy(np.stack(rows)),
        source_offset=torch.from_numpy(users["source_offset"].to_numpy(np.float32, copy=True)),
    )
    for name, known in (("features", query.features), ("source_offset", query.source_offset[:, None])):
        if not (finite := known.isfinite().all(dim=1)).all():
            raise InputError(f"{name}: row {int(finite.int().argmin())} has a number that is not finite; leave it out")
    return query


RATINGS = TaskType(
    name="ratings",
    task=task.Task,
    load_task=task.load_task,
    load_held_out=task.load_held_out,
    measure=_measure_ratings,
    query=_rating_query,
    query_columns=queries.RATING_COLUMNS,
    describe_user=queries.describe_rating_user,
    example_user=queries.example_rating_user,
    as_predict=predictors.as_predict,
    predictors=tuple(predictors.PREDICTORS),
    reference="source_offset",
    metrics=(
        Metric(name="mae", label="MAE", unit="rating points", better="lower", total="sum_abs_error", count="n"),
        Metric(
            name="rmse", label="RMSE", unit="rating points", better="lower", total="sum_squared_error", count="n",
            root=True,
        ),
        Metric(name="ndcg20", label="NDCG@20", unit="0 to 1", better="higher", total="ndcg20"),
    ),
    cold_items=True,
    headline="rmse",
    sensitivity=("rmse", "ndcg20"),
    ablation=("mae", "rmse"),
    rows="ratings",
    ratio="cold",
    ratio_of="share of overlapping users",
)  # fmt: skip


def _measure_sequences(
    held_out: sequences.HeldOut, predict: Predict, of: sequences.SequenceTask, seed: int, *, full: bool
) -> Measured:
    """HR@k and NDCG@k over users, per protocol and over protocols; `full` adds those among all target-domain items.

    `seconds`: of predicting the candidates' scores.
    """
    began = time.perf_counter()
    scores = predict(held_out, of, seed, held_out.candidates)
    seconds = time.perf_counter() - began
    found = sequence_errors(held_out, scores, predict(held_out, of, seed, None) if full else None, of.target[0])
    protocol = np.array(of.protocols)[found.protocol]
    columns = {"user": found.user, "protocol": protocol, **found.columns()}
    return Measured(columns, {**found.metrics(of.protocols), "seconds": seconds})


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
    query=_sequence_query,
    query_columns=queries.SEQUENCE_COLUMNS,
    describe_user=queries.describe_sequence_user,
    example_user=queries.example_sequence_user,
    as_predict=sequence_predictors.as_predict,
    predictors=tuple(sequence_predictors.PREDICTORS),
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
