"""MLflow: one experiment per plan, one parent run per part, one run per trial, found by tag and never duplicated.

A run is closed truthfully whatever happens: FINISHED, FAILED with its reason, or KILLED when the driver went before the
trial ended. What a dead driver left RUNNING is settled when the next one opens the part. Metrics are sent in batches: a
call per metric costs ten times more than the training of a small epoch.
"""

from __future__ import annotations

import logging
import re
import shlex
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from features.errors import InputError
from study.specs import Direction, Job
from study.tracking.spool import Spool
from study.tracking.views import describe

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

FINISHED, FAILED, KILLED, RUNNING = "FINISHED", "FAILED", "KILLED", "RUNNING"
CONFIG_FILE = "config.yaml"
ERROR_FILE = "error.txt"
# A run in progress shows its epochs at most this late, in seconds.
_FLUSH_S = 5.0
# How long the end of a part waits for a server that is away; a driver that was told to stop waits less.
PATIENCE_S, LAST_WORDS_S = 600.0, 10.0
# MLflow's limits: entries of one batch, characters of a tag and of a parameter.
_BATCH, _TAG_LENGTH, _PARAM_LENGTH = 1000, 5000, 6000


@dataclass(frozen=True, kw_only=True)
class EpochReport:
    """What a trial says after an epoch, as it travels from the worker to the driver."""

    epoch: int
    """Counted from 1 by convention of the trainables; the step of the `epoch/...` series."""
    metrics: Mapping[str, float]
    final: bool
    """The last report, whose metrics are the trial's result."""
    artifacts: Mapping[str, str | bytes]
    """File name -> content, logged with the final report."""
    time_ms: int
    """Wall clock of the worker, milliseconds since 1970."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Of the process that trained, which may have another machine than the driver; set with the final report."""


@dataclass(frozen=True, kw_only=True)
class TrialRun:
    """A trial's run as it stands in MLflow."""

    run_id: str
    trial: str
    status: str
    fingerprint: str
    """Hash of everything that the result depends on; another one means that the run answers another question."""
    failure: str | None
    """`trial`: the training raised or gave NaN; `worker`: its process went; None: it did not fail."""
    reason: str | None
    """One line, when it failed."""
    pruned: bool
    """Stopped early by the search's pruner; such a run is KILLED and has no result."""
    spent: float
    """Seconds that earlier attempts without a result took."""
    seeds: tuple[int, ...]
    """Training seeds."""
    metrics: Mapping[str, float]


@dataclass(kw_only=True)
class _Open:
    """A run that this process writes to."""

    run_id: str
    logged_epoch: int
    """Last epoch that was taken, also from an earlier attempt that was interrupted; none is logged a second time."""
    pending: list[EpochReport] = field(default_factory=list)
    flushed: float = field(default_factory=time.monotonic)
    began: float = field(default_factory=time.monotonic)
    spent: float = 0.0
    """Seconds of earlier attempts."""


def default_uri(home: Path) -> str:
    """The store without a server: SQLite in the study's home."""
    return f"sqlite:///{home.absolute() / 'mlflow.db'}"


def shown(uri: str) -> str:
    """A store's address for all readers of a tag or a page: without its password."""
    return re.sub(r"(//[^/:@]*):[^/]*@", r"\1@", uri)


def naming(uri: str | None) -> str:
    """What a command on a named store begins with; nothing for the file in the home folder."""
    return f"MLFLOW_TRACKING_URI={shlex.quote(shown(uri))} " if uri else ""


def connect(uri: str) -> MlflowClient:
    """A client; a new SQLite store gets its tables here, which takes seconds."""
    with warnings.catch_warnings():
        # mlflow 3.17 with SQLAlchemy 2.1: a deprecation inside MLflow's own models, at import.
        warnings.filterwarnings("ignore", message="The ``noload`` loader strategy", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="The ``noload`` loader strategy")
        from mlflow.tracking import MlflowClient

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        if uri.startswith("sqlite:///"):
            Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        return MlflowClient(tracking_uri=uri)


def open_experiment(client: MlflowClient, name: str, artifacts: Path | None) -> str:
    """Id of the experiment, created when absent; `artifacts` is the folder for a new one (None: the server's own)."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        location = None if artifacts is None else artifacts.absolute().as_uri()
        # The kind opens the UI on runs and not on traces.
        kind = {"mlflow.experimentKind": "custom_model_development"}
        return str(client.create_experiment(name, artifact_location=location, tags=kind))
    if experiment.lifecycle_stage != "active":
        raise InputError(f"experiment '{name}': is deleted in MLflow; restore it there or give the plan another name")
    return str(experiment.experiment_id)


def find_runs(client: MlflowClient, experiment_id: str, part: str | None = None) -> Iterator[Run]:
    """All active runs of the experiment or of one part, newest first."""
    # Part names hold no quotes (study.specs checks them), so the filter cannot be broken out of.
    filter_string = f"tags.`study.part` = '{part}'" if part else ""
    token = None
    while True:
        page = client.search_runs([experiment_id], filter_string, max_results=_BATCH, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def open_part(
    *, home: Path, uri: str | None, experiment: str, part: str, tags: Mapping[str, str], metric: str
) -> PartTracker:
    """The runs of a part in the store at `uri`, by default a SQLite file in `home` with the artifacts beside it."""
    client = connect(uri or default_uri(home))
    # A run is found by what is at the store, so what an earlier driver could not send goes first.
    spool = Spool(client, uri, home / "spool" / experiment) if uri and uri.startswith(("http://", "https://")) else None
    if spool is not None and not spool.drain(PATIENCE_S):
        raise InputError(f"MLflow at {uri}: went away again; {spool.waiting} writes are kept; the same command goes on")
    experiment_id = open_experiment(client, experiment, home / "artifacts" if uri is None else None)
    return PartTracker(
        client=client, experiment_id=experiment_id, part=part, tags=tags, metric=metric, home=home, uri=uri,
        spool=spool,
    )  # fmt: skip


class PartTracker:
    """The runs of one part: its parent run and its trials."""

    def __init__(
        self, *, client: MlflowClient, experiment_id: str, part: str, tags: Mapping[str, str], metric: str,
        home: Path | None = None, uri: str | None = None, spool: Spool | None = None,
    ) -> None:  # fmt: skip
        self._client = client
        self._spool = spool
        self._write: Any = spool or client
        self._experiment_id = experiment_id
        self._part = part
        self._tags = dict(tags)
        self._metric = metric
        self._store = naming(uri)
        self._home = f" --home {shlex.quote(str(home))}" if home else ""
        self._open: dict[str, _Open] = {}
        self._parent: str | None = None
        self._parent_status = KILLED
        self.runs: dict[str, TrialRun] = {}
        """Trial -> its run as it stood when the part was opened, orphans settled; the newest, where it has several."""
        self._earlier: dict[str, list[TrialRun]] = {}  # newest first: those that count until the newest is finished
        self.dropped = 0
        """Runs that were deleted."""
        self._logged: dict[str, int] = {}  # trial -> its last epoch; read here, for the server may be away later
        for run in find_runs(client, experiment_id, part):
            if "study.trial" in run.data.tags:
                trial_run = self._settle(run)
                if self.runs.setdefault(trial_run.trial, trial_run) is not trial_run:
                    self._earlier.setdefault(trial_run.trial, []).append(trial_run)
                elif trial_run.status != FINISHED:
                    self._logged[trial_run.trial] = self._last_epoch(trial_run)
            else:
                self._parent, self._parent_status = run.info.run_id, run.info.status
        for trial, trial_run in self.runs.items():
            if trial_run.status == FINISHED:  # the last driver died before it said so to the earlier ones
                self._drop_earlier(trial)

    def _settle(self, run: Run) -> TrialRun:
        """Close what a dead driver left open. With the final metrics in place, only the closing itself was missing."""
        status = run.info.status
        if status == RUNNING:
            status = FINISHED if self._metric in run.data.metrics else KILLED
            self._write.set_terminated(run.info.run_id, status)
        return _trial_run(run, status)

    def start_part(self) -> None:
        """Open (or continue) the parent run."""
        if self._parent is None:
            tags = {**self._tags, "study.part": self._part}
            run = self._write.create_run(self._experiment_id, run_name=self._part, tags=_tags(tags))
            self._parent = run.info.run_id
        else:
            self._write.update_run(self._parent, status=RUNNING)
        self._parent_status = RUNNING

    def end_part(self, status: str) -> None:
        """Close the parent run, and as KILLED every trial that is still open."""
        for trial in list(self._open):
            self._close(trial, KILLED)
        if self._parent is not None and self._parent_status != status:
            self._write.set_terminated(self._parent, status)
        if self._spool is not None and not self._spool.close(PATIENCE_S if status == FINISHED else LAST_WORDS_S):
            raise InputError(
                f"MLflow: the server is away; {self._spool.waiting} writes are kept in the home folder and nothing is "
                "lost; the same command sends them once it is back"
            )

    def drop(self, trial: str, why: str) -> None:
        """Delete the trial's run, which answers another question than the plan now asks; the UI can restore it.

        An earlier run that it was to replace is then the trial's run.
        """
        self._delete(self.runs.pop(trial), why)
        if earlier := self._earlier.get(trial):
            self.runs[trial] = earlier.pop(0)

    def replace(self, trial: str) -> None:
        """Give the trial another run, and drop the present one when that is finished; until then it counts."""
        self._earlier.setdefault(trial, []).insert(0, self.runs.pop(trial))

    def _drop_earlier(self, trial: str) -> None:
        for earlier in self._earlier.pop(trial, []):
            self._delete(earlier, "a run with the seeds that the plan now asks for has taken its place")

    def _delete(self, run: TrialRun, why: str) -> None:
        self._write.set_tag(run.run_id, "study.superseded", why)
        self._write.delete_run(run.run_id)
        self.dropped += 1

    def start(self, job: Job, *, config: Mapping[str, Any], logged: Mapping[str, Any], fingerprint: str) -> None:
        """Open the trial's run, or continue the one that an earlier driver began.

        `config` becomes parameters; `logged` is the whole of `config.yaml`, all that training again needs.
        """
        if job.trial in self._open:
            return  # its process went, and another one goes on
        earlier = self.runs.get(job.trial)
        if earlier is not None:
            self._write.update_run(earlier.run_id, status=RUNNING)
            for tag in ("study.error", "study.failure"):
                if earlier.failure is not None:
                    self._write.delete_tag(earlier.run_id, tag)
            self._open[job.trial] = _Open(
                run_id=earlier.run_id, logged_epoch=self._logged[job.trial], spent=earlier.spent
            )  # fmt: skip
            return
        assert self._parent is not None, "start_part comes first"
        tags = {**self._tags, **_job_tags(job), "study.fingerprint": fingerprint, "mlflow.parentRunId": self._parent}
        run_name = f"{job.cell.name} {job.part} {job.name}"  # the UI cuts long names at the end
        run_id = self._write.create_run(self._experiment_id, run_name=run_name, tags=_tags(tags)).info.run_id
        self._open[job.trial] = _Open(run_id=run_id, logged_epoch=-1)
        command = f"{self._store}study rerun {run_id}{self._home}"
        self._log(run_id, params=_params(job, config), tags={"study.command": command})
        self._write.log_text(run_id, yaml.safe_dump(dict(logged), sort_keys=False), CONFIG_FILE)

    def _last_epoch(self, run: TrialRun) -> int:
        series = [key for key in run.metrics if key.startswith("epoch/")]
        steps = (entry.step for key in series[:1] for entry in self._client.get_metric_history(run.run_id, key))
        return max(steps, default=-1)

    def report(self, trial: str, reports: Sequence[EpochReport]) -> None:
        """Take the epochs of a running trial; they are sent every few seconds."""
        open_ = self._open[trial]
        for report in reports:
            if report.epoch > open_.logged_epoch and not report.final:
                open_.pending.append(report)
                open_.logged_epoch = report.epoch
        if time.monotonic() - open_.flushed >= _FLUSH_S:
            self._flush(open_)

    def finish(self, trial: str, final: EpochReport) -> None:
        """Log the result and close the run as FINISHED.

        The metrics go last, in one batch: where they are, everything else is too, and a driver that is killed right
        after them leaves a run that only needs closing.
        """
        open_ = self._open[trial]
        self._flush(open_)
        for name, content in final.artifacts.items():
            self._artifact(open_.run_id, name, content)
        self._log(open_.run_id, tags=final.tags)
        self._log(open_.run_id, metrics=list(_metrics(final, prefix="", step=0)))
        self._close(trial, FINISHED)
        self._drop_earlier(trial)

    def lost(self, trial: str, *, number: int, reason: str) -> None:
        """Note that the trial's process went for the `number`th time; the run stays open, for another process goes on."""
        self._log(self._open[trial].run_id, tags={"study.restarts": f"{number}, {reason}"})

    def fail(self, trial: str, *, failure: str, reason: str, detail: str) -> None:
        """Close the run as FAILED, with a one-line reason as a tag and the traceback as an artifact."""
        open_ = self._open[trial]
        self._log(open_.run_id, tags={"study.error": reason, "study.failure": failure})
        self._write.log_text(open_.run_id, detail, ERROR_FILE)
        self._close(trial, FAILED)

    def prune(self, trial: str, *, reason: str) -> None:
        """Close the run as KILLED, with the tag `study.pruned`: the search gave it up, and it never counts as a result."""
        self._log(self._open[trial].run_id, tags={"study.pruned": reason})
        self._close(trial, KILLED)

    def _close(self, trial: str, status: str) -> None:
        open_ = self._open[trial]
        self._flush(open_)
        if status != FINISHED:  # then its metric `seconds` says what it took
            self._log(open_.run_id, tags={"study.spent": f"{open_.spent + time.monotonic() - open_.began:.3f}"})
        self._write.set_terminated(open_.run_id, status)
        del self._open[trial]

    def _flush(self, open_: _Open) -> None:
        reports, open_.pending = open_.pending, []
        open_.flushed = time.monotonic()
        self._log(
            open_.run_id,
            metrics=[metric for report in reports for metric in _metrics(report, prefix="epoch/", step=report.epoch)],
        )

    def _log(
        self,
        run_id: str,
        *,
        metrics: Sequence[tuple[str, float, int, int]] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        from mlflow.entities import Metric, Param, RunTag

        if params or tags:
            self._write.log_batch(
                run_id,
                params=[Param(key, value) for key, value in (params or {}).items()],
                tags=[RunTag(key, value) for key, value in _tags(tags or {}).items()],
            )
        for start in range(0, len(metrics), _BATCH):
            self._write.log_batch(run_id, metrics=[Metric(*metric) for metric in metrics[start : start + _BATCH]])

    def _artifact(self, run_id: str, name: str, content: str | bytes) -> None:
        if isinstance(content, str):
            self._write.log_text(run_id, content, name)
            return
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.write_bytes(content)
            self._write.log_artifact(run_id, str(path))


def mark_best(
    client: MlflowClient, experiment_id: str, *, metric: str, direction: Direction, part: str = "search"
) -> dict[str, str]:
    """Tag each cell's best finished trial `study.best` = true and no other; returns cell -> run id.

    Equal values: the trial with the smallest name, so that the choice does not hang on the order of finishing. The
    experiment's description becomes a table of them.
    """
    sign = 1.0 if direction == "minimize" else -1.0
    runs = list(find_runs(client, experiment_id, part))
    finished = [run for run in runs if "study.trial" in run.data.tags and run.info.status == FINISHED]
    best: dict[str, Run] = {}
    for run in sorted(finished, key=lambda run: (sign * run.data.metrics[metric], run.data.tags["study.trial"])):
        best.setdefault(run.data.tags["study.cell"], run)
    chosen = {cell: str(run.info.run_id) for cell, run in best.items()}
    marked = {str(run.info.run_id) for run in runs if run.data.tags.get("study.best") == "true"}
    for run_id in set(chosen.values()) - marked:
        client.set_tag(run_id, "study.best", "true")
    for run_id in marked - set(chosen.values()):
        client.delete_tag(run_id, "study.best")
    describe(client, experiment_id, finished=finished, best=best, metric=metric, direction=direction)
    return chosen


def _trial_run(run: Run, status: str) -> TrialRun:
    tags = run.data.tags
    return TrialRun(
        run_id=run.info.run_id,
        trial=tags["study.trial"],
        status=status,
        fingerprint=tags.get("study.fingerprint", ""),
        failure=tags.get("study.failure"),
        reason=tags.get("study.error"),
        pruned="study.pruned" in tags,
        spent=float(tags.get("study.spent", 0.0)),
        seeds=tuple(map(int, run.data.params["seeds"].split(","))) if "seeds" in run.data.params else (),
        metrics=run.data.metrics,
    )


def _job_tags(job: Job) -> dict[str, str]:
    tags = {
        "study.part": job.part,
        "study.trial": job.trial,
        "study.cell": job.cell.name,
        "study.task": job.cell.task,
        "study.ratio": f"{job.cell.ratio:g}",
    }
    if job.part.startswith("sweep:"):
        tags["study.variant"] = job.name.partition("=")[2] or job.name
    elif job.part == "ablate":
        tags["study.variant"] = job.name
    return tags


def _params(job: Job, config: Mapping[str, Any]) -> dict[str, str]:
    own = {
        "task": job.cell.task,
        "source": job.cell.source,
        "target": job.cell.target,
        "ratio": f"{job.cell.ratio:g}",
        "seeds": ",".join(map(str, job.seeds)),
        "features": job.features,
    }
    return {key: str(value)[:_PARAM_LENGTH] for key, value in {**config, **own}.items()}


def _tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {key: str(value)[:_TAG_LENGTH] for key, value in tags.items()}


def _metrics(report: EpochReport, *, prefix: str, step: int) -> Iterable[tuple[str, float, int, int]]:
    return ((prefix + key, value, report.time_ms, step) for key, value in report.metrics.items())
