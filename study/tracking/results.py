"""A study read back from MLflow alone: one line per trial, with tags, parameters and metrics as columns.

Columns of `Results.trials`: those of `COLUMNS`, then `params.<field>` (text, as MLflow keeps it) and `metrics.<name>`
(float; NaN where not logged). Runs that the plan no longer asks for (tag study.superseded) are left out everywhere. Epoch
series stay in MLflow until `Results.epochs` asks for one.
"""

from __future__ import annotations

import gc
import io
import json
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pandas as pd
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from features.errors import InputError, one_line
from study.labels import Labels
from study.specs import BASELINE
from study.tracking import tags
from study.tracking.addresses import without_password
from study.tracking.local_store import database_file, place_of_artifacts
from study.tracking.runs import connect, refuse_deleted

COLUMNS = (
    "run_id", "status", "part", "cell", "task", "source", "target", "ratio", "row", "model", "name", "variant", "best",
    "error", "ended", "spent", "gpus",
)  # fmt: skip
"""`ended`: milliseconds since 1970; `spent`: seconds, see `_spent`; `gpus`: of one trial, as text."""
_PAGE = 1_000
_SHOWN_TAGS = (tags.DATA_KEY, tags.FEATURE_KEY, tags.COMMIT, tags.VERSIONS, tags.DEVICE)
_REMAKE = "put the file back, or delete the run in MLflow (study ui): `study run` then makes it again"


class MissingError(InputError):
    """The store does not hold what a figure or table needs (yet); the report lists the message and goes on."""


class TooFewError(MissingError):
    """A figure needs more search trials with a result than there are; a plan may have asked for no more."""


class UnreadError(InputError):
    """What was logged cannot be read any more: a part of the store is gone or damaged."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything of one study; `trials` holds one line per trial, the finished run where a trial has several."""

    labels: Labels
    tracking_uri: str
    experiment: str
    trials: pd.DataFrame
    domains: tuple[Mapping[str, Any], ...]  # manifests, as logged by the part "data"
    cells: tuple[Mapping[str, Any], ...]  # counts per cell, as logged by the part "data"
    pseudo: tuple[Mapping[str, Any], ...]  # what pseudo-items are worth, as logged by the part "data"
    simulated: bool
    tags: Mapping[
        str, tuple[str, ...]
    ]  # data_key, feature_key, commit, versions, device -> values over finished trials
    lost: Sequence[str]  # why artifacts of the part "data" cannot be read
    duplicates: tuple[str, ...]  # trials with more than one finished run; the newest one counts
    foreign: int  # runs of the experiment that no study wrote
    objectives: tuple[str, ...] = ()  # metrics that the search optimised together; empty: the selection metric alone
    way: Mapping[str, str] = field(default_factory=dict)  # store, plan, data -> their words in a command, as last run

    def finished(self, part: str | None = None, row: str | None = None) -> pd.DataFrame:
        """Return the finished trials (of one part, of one row)."""
        trials = self.trials[self.trials["status"] == "FINISHED"]
        trials = trials if part is None else trials[trials["part"] == part]
        return trials if row is None else trials[trials["row"] == row]

    def ended(self) -> pd.DataFrame:
        """Return the finished trials, and those that the search gave up (PRUNED), which are to have no result."""
        return self.trials[self.trials["status"].isin(["FINISHED", "PRUNED"])]

    def without_result(self) -> pd.DataFrame:
        """Return the trials that are to have a result, and have none."""
        return self.trials.drop(self.ended().index)

    def validation(self, row: str | None = None) -> pd.DataFrame:
        """Return the finished search trials without any test column: the only thing that selection is given."""
        trials = self.finished("search", row)
        return trials[[name for name in trials.columns if not str(name).startswith("metrics.test_")]]

    def rows_in(self, part: str) -> list[str]:
        """Return the rows that have finished trials in a part: those of the plan in its order, then simple baselines."""
        trials = {str(row) for row in self.finished(part)["row"].unique()}
        order = {row: k for k, row in enumerate((*self.labels.rows, *self.labels.task_type.baselines))}
        return sorted(trials, key=lambda row: (order.get(row, len(order)), row))

    def sweeps(self) -> list[str]:
        """Return the names of the parameters that were swept (finished trials only), sorted."""
        parts = self.finished()["part"].unique()
        return sorted(str(part).removeprefix("sweep:") for part in parts if str(part).startswith("sweep:"))

    def tasks(self) -> list[str]:
        """Return all tasks of the study, sorted, so that a task keeps its colour in every figure."""
        return sorted(str(task) for task in self.trials["task"].unique())

    def ratios(self) -> list[float]:
        """Return all ratios of the study, sorted; not those of a sweep of the ratio."""
        return sorted(float(ratio) for ratio in self._of_cells["ratio"].unique())

    def cells_of_plan(self) -> list[str]:
        """Return all cells but those that only a sweep of the ratio has, sorted."""
        return sorted(str(cell) for cell in self._of_cells["cell"].unique())

    @property
    def _of_cells(self) -> pd.DataFrame:
        return self.trials[self.trials["part"] != f"sweep:{self.labels.ratio_field}"]

    def searched(self, row: str) -> list[str]:
        """Return the config fields that took more than one value over a row's finished search trials, sorted."""
        trials = self.finished("search", row)
        names = [str(name) for name in trials.columns if str(name).startswith("params.")]
        varied = [name.removeprefix("params.") for name in names if trials[name].nunique(dropna=False) > 1]
        return sorted(set(varied) - tags.NOT_CONFIG)

    def command(self, verb: str, *options: str) -> str:
        """Return what `study VERB` on this study is in a terminal, on the machine that it last ran on."""
        words = [f"{self.way.get('store', '')}study {verb} {self.way.get('plan', self.experiment)}"]
        if verb != "report":  # it reads the store alone
            words += filter(None, [self.way.get("data")])
        return " ".join([*words, *options])

    def epochs(self, run_id: str, metric: str) -> pd.DataFrame:
        """Return the series `epoch/<metric>` of one run, columns epoch and value; of a repeated epoch the newest value."""
        history = MlflowClient(self.tracking_uri).get_metric_history(run_id, f"epoch/{metric}")
        newest = {point.step: point.value for point in sorted(history, key=lambda point: point.timestamp)}
        return pd.DataFrame({"epoch": sorted(newest), "value": [newest[step] for step in sorted(newest)]})

    def config(self, run_id: str) -> Mapping[str, Any]:
        """Return the run's `config.yaml`, see `read_config`."""
        return read_config(self.tracking_uri, run_id)

    def per_user(self, run_id: str, name: str = "per_user.csv") -> pd.DataFrame:
        """Return the run's rows of test users (or `val_per_user.csv`): seed, user, and the columns of the task type."""
        text = read_artifact(self.tracking_uri, run_id, name)
        texts = ["user", self.labels.task_type.group_column]
        try:
            frame = pd.read_csv(io.StringIO(text), dtype=dict.fromkeys(texts, str))
            frame.drop(columns=texts, errors="ignore").astype(float)
        except ValueError as error:  # pandas' own errors are its kin
            raise UnreadError(
                f"run {run_id}: {name} is no table of numbers ({one_line(error, 200)}); {_REMAKE}"
            ) from error
        return frame


def load_results(tracking_uri: str, experiment: str, labels: Labels) -> Results:
    """Read the study `experiment`; failed and running trials are kept with their status.

    Raises InputError where the store does not hold the experiment.
    """
    database, shown = database_file(tracking_uri), without_password(tracking_uri)
    if database is not None and not database.exists():  # MLflow's client would create the file
        raise InputError(f"{shown}: there is no such store; run `study run` on the plan first")
    client = connect(tracking_uri)
    stored = client.get_experiment_by_name(experiment)
    if stored is None:
        raise InputError(f"{shown}: holds no experiment {experiment!r}; run `study run` on the plan first")
    refuse_deleted(stored)
    runs = [run for run in _all_runs(client, stored.experiment_id) if tags.SUPERSEDED not in run.data.tags]
    ours = [run for run in runs if tags.PART in run.data.tags]
    trial_runs = [run for run in ours if {tags.TRIAL, tags.CELL, tags.ROW} <= run.data.tags.keys()]
    trials, duplicates = _one_per_trial(trial_runs)
    data = [run for run in ours if run.data.tags[tags.PART] == "data" and run.info.status == "FINISHED"]
    newest = max(data, key=_age) if data else None
    finished = [run for run in trials if run.info.status == "FINISHED"]
    lost: list[str] = []
    return Results(
        labels=labels,
        tracking_uri=tracking_uri,
        experiment=experiment,
        trials=_frame(trials),
        domains=_records(tracking_uri, newest, "domains.json", lost),
        cells=_records(tracking_uri, newest, "cells.json", lost),
        pseudo=_records(tracking_uri, newest, "pseudo.json", lost),
        lost=lost,
        simulated=any(_is_true(run, tags.SIMULATED) for run in ours if run.data.tags[tags.PART] != "report"),
        tags={tag.removeprefix(tags.PREFIX): _values(finished, tag) for tag in _SHOWN_TAGS},
        duplicates=duplicates,
        foreign=len(runs) - len(ours),
        objectives=_objectives(ours),
        way=_way(newest),
    )


def per_seed(trial: pd.Series, metric: str) -> list[float]:
    """Return the metric of each seed that a line of `Results.trials` logged, else its one value, else nothing."""
    prefix = f"metrics.{metric}/seed_"
    seeds = [float(trial[name]) for name in trial.index if str(name).startswith(prefix)]
    seeds = [value for value in seeds if math.isfinite(value)]
    value = float(trial.get(f"metrics.{metric}", math.nan))
    return seeds or ([value] if math.isfinite(value) else [])


def is_baseline(trial: pd.Series) -> bool:
    """Return whether a line of `Results.trials` is of a simple baseline, which is not trained."""
    return str(trial["model"]) == BASELINE


def compared_on(trials: Iterable[pd.Series]) -> str:
    """Return the users that trials (lines of `Results.trials`) are compared on: `test` if all were measured there, else
    `validation`.
    """
    return "test" if all(map(_is_tested, trials)) else "validation"


def _is_tested(trial: pd.Series) -> bool:
    return any(math.isfinite(float(trial[name])) for name in trial.index if str(name).startswith("metrics.test_"))


def read_config(tracking_uri: str, run_id: str) -> Mapping[str, Any]:
    """Return a trial's `config.yaml`: model, config, cell, seeds and folders, all that training it again needs."""
    try:
        loaded = yaml.safe_load(read_artifact(tracking_uri, run_id, "config.yaml"))
    except yaml.YAMLError as error:
        raise InputError(f"run {run_id}: its config.yaml is not YAML ({one_line(error, 200)}); {_REMAKE}") from error
    if not isinstance(loaded, dict):
        raise InputError(f"run {run_id}: its config.yaml must be a mapping, is {type(loaded).__name__}")
    return loaded


def read_artifact(tracking_uri: str, run_id: str, path: str) -> str:
    """Return the text of one artifact; InputError where the run has none of that name (any more)."""
    try:
        run = connect(tracking_uri).get_run(run_id)
    except MlflowException as error:
        raise InputError(f"run {run_id}: is not in {without_password(tracking_uri)}; give the id of a trial") from error
    in_place = urlparse(run.info.artifact_uri).scheme in ("", "file")  # then nothing is copied
    try:
        with tempfile.TemporaryDirectory() as folder:
            local = _artifacts(run, tracking_uri).download_artifacts(path, None if in_place else folder)
            return Path(local).read_text(encoding="utf-8")
    except (MlflowException, OSError, UnicodeDecodeError) as error:
        is_ours = tags.TRIAL in run.data.tags or run.data.tags.get(tags.PART) == "data"
        remedy = _REMAKE if is_ours else "give the id of a trial"
        raise UnreadError(
            f"run {run_id}: has no readable artifact {path} ({one_line(error, 200)}); {remedy}"
        ) from error


def _artifacts(run: Run, tracking_uri: str) -> Any:
    """Return MLflow's repository of a run's artifacts."""
    return get_artifact_repository(place_of_artifacts(run.info.artifact_uri, tracking_uri), tracking_uri)


def _all_runs(client: MlflowClient, experiment_id: str) -> list[Run]:
    runs: list[Run] = []
    token: str | None = None
    with _no_collection():
        while True:
            page = client.search_runs([experiment_id], max_results=_PAGE, page_token=token)
            runs.extend(page)
            token = page.token
            if not token:
                return runs


@contextmanager
def _no_collection() -> Iterator[None]:
    """Switch the garbage collector off, which goes through all there is again and again while a million objects are made.

    Of reading 5,000 runs it takes more than half the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _age(run: Run) -> tuple[int, str]:
    return (run.info.start_time or 0, run.info.run_id)


def _is_true(run: Run, tag: str) -> bool:
    return str(run.data.tags.get(tag, "")).lower() == "true"


def _objectives(runs: Sequence[Run]) -> tuple[str, ...]:
    """Return those of the newest run that names them."""
    named = [run for run in sorted(runs, key=_age) if tags.OBJECTIVES in run.data.tags]
    return tuple(named[-1].data.tags[tags.OBJECTIVES].split(",")) if named else ()


def _values(runs: Sequence[Run], tag: str) -> tuple[str, ...]:
    return tuple(sorted({run.data.tags[tag] for run in runs if tag in run.data.tags}))


def _one_per_trial(runs: Sequence[Run]) -> tuple[list[Run], tuple[str, ...]]:
    """Return the newest finished run of each trial, else its newest run; and the trials that finished more than once."""
    groups: dict[str, list[Run]] = {}
    for run in sorted(runs, key=_age):
        groups.setdefault(run.data.tags[tags.TRIAL], []).append(run)
    kept, repeated = [], []
    for trial in sorted(groups):
        done = [run for run in groups[trial] if run.info.status == "FINISHED"]
        kept.append((done or groups[trial])[-1])
        if len(done) > 1:
            repeated.append(trial)
    return kept, tuple(repeated)


def _frame(runs: Sequence[Run]) -> pd.DataFrame:
    return pd.DataFrame([_line_of(run) for run in runs]) if runs else pd.DataFrame(columns=list(COLUMNS))


def _line_of(run: Run) -> dict[str, Any]:
    run_tags, params = run.data.tags, run.data.params
    part, cell, study_row = (run_tags[tag] for tag in (tags.PART, tags.CELL, tags.ROW))
    task, ratio = run_tags[tags.TASK], float(run_tags[tags.RATIO])
    source, _, target = task.partition("->")
    line: dict[str, Any] = {
        "run_id": run.info.run_id,
        "status": "PRUNED" if tags.PRUNED in run_tags else run.info.status,
        "part": part,
        "cell": cell,
        "task": task,
        "source": source,
        "target": target,
        "ratio": ratio,
        "row": study_row,
        "model": run_tags.get(tags.MODEL, ""),
        "name": run_tags[tags.TRIAL].removeprefix(f"{part}/{cell}/{study_row}/"),
        "variant": run_tags.get(tags.VARIANT, ""),
        "best": _is_true(run, tags.BEST),
        "error": run_tags.get(tags.ERROR, ""),
        "ended": run.info.end_time,
        "spent": _spent(run),
        "gpus": run_tags.get(tags.GPUS, ""),
    }
    line |= {f"params.{name}": value for name, value in params.items()}
    # Of its epochs, a trial that was given up has the last one in the place of a result.
    return line | {
        f"metrics.{name}": value
        for name, value in run.data.metrics.items()
        if line["status"] == "PRUNED" or not name.startswith("epoch/")
    }


def _way(data: Run | None) -> dict[str, str]:
    run_tags = data.data.tags if data else {}
    words = {"store": tags.STORE, "plan": tags.PLAN, "data": tags.DATA}
    return {name: run_tags[tag] for name, tag in words.items() if tag in run_tags}


def _spent(run: Run) -> float:
    """Return the seconds that the trial ran, without the time between its attempts; if finished, by its own clock."""
    if run.info.status == "FINISHED":
        return float(run.data.metrics.get("seconds", math.nan))
    return float(run.data.tags.get(tags.SPENT, math.nan))


def _records(tracking_uri: str, run: Run | None, path: str, lost: list[str]) -> tuple[Mapping[str, Any], ...]:
    """Return the records of a JSON file; none where there is none, or, which goes into `lost`, where it cannot be read."""
    if run is None or not any(entry.path == path for entry in _artifacts(run, tracking_uri).list_artifacts()):
        return ()
    try:
        loaded = json.loads(read_artifact(tracking_uri, run.info.run_id, path))
        if not isinstance(loaded, list) or not all(isinstance(record, dict) for record in loaded):
            raise ValueError("it is no list of objects")
    except InputError as error:
        lost.append(str(error))
    except ValueError as error:
        lost.append(f"run {run.info.run_id}: {path} cannot be used ({one_line(error, 200)}); {_REMAKE}")
    else:
        return tuple(loaded)
    return ()
