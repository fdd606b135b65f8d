"""The kinds of task: all that the door and the study have to know of `ratings` (MuSiC) and `sequences` (LGCD).

A kind says how its tasks are opened and measured, what its numbers are called and which way is better, and which simple
predictors stand beside a model. Whoever else asks which kind a task is should ask the kind instead.
Shapes: N ratings, R rows (held-out users x protocols), C candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from trainables import predictors, task
from trainables.metrics import user_errors

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
class Kind:
    """A kind of task."""

    name: str
    task: type  # of its tasks
    load_task: Callable[[Path], Any]
    load_held_out: Callable[[Path], Any]
    measure: Callable[..., Measured]  # (held_out, predict, task, seed, *, full)
    as_predict: Callable[[str], Predict]  # a simple predictor in the form of a model's prediction
    predictors: tuple[str, ...]  # the simple predictors, each a row of every table
    bar: str  # the one among them that a useful model has to pass
    metrics: tuple[Metric, ...]  # in the order of tables
    headline: str  # the metric that marks a cell's best row, and whose difference to the bar is shown
    sensitivity: tuple[str, ...]  # metrics of sensitivity figures
    ablation: tuple[str, ...]  # metrics of the ablation table
    rows: str  # what a domain's interactions are called
    ratio: str  # what the ratio of a cell is called, e.g. cold
    ratio_of: str  # what it is the share of


def kind_at(task_dir: Path) -> Kind:
    """The kind of the task in a folder; InputError where there is none."""
    return KINDS[task.read_meta(task_dir).get("kind", "ratings")]


def kind_of(found: Any) -> Kind:
    """The kind of an open task."""
    (kind,) = (kind for kind in KINDS.values() if isinstance(found, kind.task))
    return kind


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


RATINGS = Kind(
    name="ratings",
    task=task.Task,
    load_task=task.load_task,
    load_held_out=task.load_held_out,
    measure=_measure_ratings,
    as_predict=predictors.as_predict,
    predictors=tuple(predictors.PREDICTORS),
    bar="source_offset",
    metrics=(
        Metric(name="mae", label="MAE", unit="rating points", better="lower", total="sum_abs_error", count="n"),
        Metric(
            name="rmse", label="RMSE", unit="rating points", better="lower", total="sum_squared_error", count="n",
            root=True,
        ),
        Metric(name="ndcg20", label="NDCG@20", unit="0 to 1", better="higher", total="ndcg20"),
    ),
    headline="rmse",
    sensitivity=("rmse", "ndcg20"),
    ablation=("mae", "rmse"),
    rows="ratings",
    ratio="cold",
    ratio_of="share of overlapping users",
)  # fmt: skip

KINDS = {kind.name: kind for kind in (RATINGS,)}
