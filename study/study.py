"""The verbs of a study: each finishes one part of a plan and can be called again at any time."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from features.errors import InputError
from features.store.tables import digest
from study import parts
from study.data.prepare import Inputs, describe_data, prepare
from study.data.tables import table_metrics
from study.engine.run import Failure, Progress, RunSummary, at_work, refuse_second, run_jobs
from study.home import Home
from study.labels import Labels, labels_of
from study.plan.diff import remember
from study.plan.schema import Plan
from study.plan.start import config_of_run
from study.progress import StartProgress, no_progress
from study.provenance import commit, device, versions
from study.report.claims.judge import Judged, judge
from study.report.report import ReportResult, redraw, report
from study.selection import Best, best_per_cell
from study.specs import Cell, Cluster, Job
from study.tracking import runs as tracking
from study.tracking.pareto import mark_front
from study.tracking.registry import Recommendation, recommend, register
from study.tracking.results import Results, load_results, read_config
from trainables.tasks.rating import TaskFolders

DOOR = "trainables.trial:run"
PREDICTOR_DOOR = "trainables.trial:run_predictor"

ShowJobs = Callable[[str, Progress], None]
"""(part, how far it is)."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a verb did."""

    part: str
    planned: int
    ran: int
    failures: tuple[Failure, ...]
    stopped: str | None = None  # why trials were left: the budget that is spent
    notes: tuple[str, ...] = ()  # what else a person should know, a line each
    superseded: int = 0  # runs of an earlier form of the plan, deleted in MLflow (its UI restores them)


@dataclass(frozen=True, kw_only=True)
class StatusRow:
    """Where a part of a study stands, in trials."""

    part: str
    planned: int
    finished: int
    failed: int
    running: int
    open: int
    """Begun and not ended: running, or left by a driver that was stopped."""

    @property
    def left(self) -> int:
        """Trials without a result."""
        return self.planned - self.finished


class Study:
    """One plan in one home folder."""

    def __init__(
        self, plan: Plan, *, home: Path, data: Path | None = None, cluster: Cluster | None = None,
        start_progress: StartProgress | None = None, show_jobs: ShowJobs | None = None, named: str | None = None,
    ) -> None:  # fmt: skip
        """`named`: what `load_plan` finds the plan by in any folder; default: its name, as of a shipped plan."""
        self.named = named or plan.name
        self.plan, self.home, self.data = plan, home.absolute(), data  # workers have another working folder
        self.cluster = cluster or Cluster()
        self.start_progress: StartProgress = start_progress or no_progress
        self._show_jobs: ShowJobs = show_jobs or (lambda part, progress: None)

    @property
    def tracking_uri(self) -> str:
        """MLflow store of the study."""
        return store_uri(self.home, self.plan)

    @cached_property
    def labels(self) -> Labels:
        """What the plan is about."""
        return labels_of(self.plan.model, self.plan.published)

    @property
    def report_folder(self) -> Path:
        """Where `report` writes."""
        return self.home / "reports" / self.plan.name

    # --- verbs ----------------------------------------------------------------------------------------------------

    @cached_property
    def inputs(self) -> Inputs:
        """Verb `extract`: everything that trials read, made where it is missing, and described in MLflow."""
        refuse_second(self.home, self.plan.name)  # it would describe its data in the other's experiment
        on_ray, actors = self.cluster.address is not None, None
        if on_ray:
            from study.engine.launch import connect, most_actors

            connect(self.cluster)
            actors = most_actors(self.cluster)
        inputs = prepare(self.plan, self.data, Home(self.home), self.start_progress, on_ray=on_ray, actors=actors)
        self._log_data(inputs)
        return inputs

    def search(self) -> Summary:
        """Trials by Optuna in every cell; tags the best of each."""
        summary = self._run("search", parts.search_jobs(self.plan, self._folders))
        client, experiment = self._store()
        metric, direction = self.plan.selection
        tracking.mark_best(client, experiment, metric=metric, direction=direction)
        mark_front(client, experiment, self.plan.search.objectives if self.plan.search else ())
        return summary

    def sweep(self, parameter: str) -> Summary:
        """One field varied, everything else at the best configuration."""
        part = f"sweep:{parameter}"
        start = self._start_configs(part, self.plan.sweeps[parameter].start)
        return self._run(part, parts.sweep_jobs(self.plan, parameter, self._folders, start))

    def ablate(self) -> Summary:
        """Variants of the best configuration."""
        start = self._start_configs("ablate", self.plan.ablate.start) if self.plan.ablate else {}
        return self._run("ablate", parts.ablation_jobs(self.plan, self._folders, start))

    def score(self) -> Summary:
        """The best configuration and the simple predictors on test; the only verb that opens test data."""
        summary = self._run("score", parts.score_jobs(self.plan, self._folders, self._best_configs("score")))
        return replace(summary, notes=tuple(register(self.results(), self.inputs.domains, self.home)))

    def recommend(self, user: str, cell: str | None, n: int) -> Recommendation:
        """Target-domain items for a user, by the registered model of a cell; None: of the first that knows him."""
        cells = [each for each in self.plan.cells if cell in (None, each.name)]
        if not cells:
            names = ", ".join(each.name for each in self.plan.cells)
            raise InputError(f"--cell {cell}: plan {self.plan.name} has no such cell; choose from {names}")
        client, _ = self._store()
        return recommend(client, self.plan.name, cells, self.home, user, n)

    def run_part(self, part: str) -> Summary:
        """The verb of a part by the part's name."""
        if part.startswith("sweep:"):
            return self.sweep(part.removeprefix("sweep:"))
        verbs = {"search": self.search, "ablate": self.ablate, "score": self.score}
        return verbs[part]()

    def report(self, progress: Callable[[int, int], None] | None = None) -> ReportResult:
        """Figures and tables from MLflow alone."""
        return report(self.tracking_uri, self.plan.name, self.labels, self.report_folder, progress=progress)

    def redraw(self, figure: str) -> Path:
        """One figure of the report, drawn anew from MLflow alone."""
        return redraw(self.tracking_uri, self.plan.name, self.labels, self.report_folder, figure)

    # --- reading back ---------------------------------------------------------------------------------------------

    def results(self) -> Results:
        """The study as MLflow knows it."""
        return load_results(self.tracking_uri, self.plan.name, self.labels)

    def claims(self) -> list[Judged]:
        """The verdict on each claim of the paper."""
        return judge(self.results())

    def best(self) -> dict[str, tuple[Best, Mapping[str, Any]]]:
        """Best trial of each searched cell and its whole `config.yaml`."""
        results = self.results()
        found = best_per_cell(results.validation(), *self.plan.selection)
        return {cell: (best, results.config(best.run_id)) for cell, best in found.items()}

    def status(self) -> list[StatusRow]:
        """How far each part is; names alone are compared, so a changed plan shows only when it runs."""
        begun = self._server is not None or (self.home / "mlflow.db").is_file()
        store = self._store() if begun else None  # reading makes no store
        working = at_work(self.home, self.plan.name) is not None  # a killed driver leaves runs open
        rows = []
        for part, jobs in parts.planned(self.plan).items():
            names = {job.trial for job in jobs}
            states: dict[str, str] = {}
            for run in tracking.find_runs(*store, part) if store else ():
                trial = run.data.tags.get("study.trial")
                if trial in names:  # of several, the newest is what the plan asks for
                    ended = "study.pruned" in run.data.tags
                    states.setdefault(trial, tracking.FINISHED if ended else run.info.status)
            count = list(states.values()).count
            begun_only = count(tracking.RUNNING) + count(tracking.KILLED)
            rows.append(
                StatusRow(
                    part=part, planned=len(names), finished=count(tracking.FINISHED), failed=count(tracking.FAILED),
                    running=count(tracking.RUNNING) if working else 0, open=begun_only,
                )
            )  # fmt: skip
        return rows

    # --- inside ---------------------------------------------------------------------------------------------------

    @property
    def _server(self) -> str | None:
        """A store that was named, by the plan or by MLFLOW_TRACKING_URI; None: the file in the home folder."""
        return named_uri(self.plan)

    def _folders(self, cell: Cell, feature_set: str) -> TaskFolders:
        return self.inputs.tasks[cell.name, feature_set]

    def _start_configs(self, part: str, start: str) -> dict[str, Mapping[str, Any]]:
        """What a sweep or the ablations start from, by cell."""
        if start == "best":
            return self._best_configs(part)
        if start == "base":
            return self.plan.by_cell
        config = config_of_run(start, read_config(self.tracking_uri, start), self.plan, f"{part}: start")
        return {cell.name: config for cell in self.plan.cells}

    def _best_configs(self, part: str) -> dict[str, Mapping[str, Any]]:
        """The best configuration by cell; the plan's base where it has no search."""
        if self.plan.search is None:
            return self.plan.by_cell
        configs = {cell: document["config"] for cell, (_, document) in self.best().items()}
        missing = [cell.name for cell in self.plan.cells if cell.name not in configs]
        if missing:
            raise InputError(
                f"{part}: no finished search trial in {', '.join(missing)}; run `study search` on the plan first"
            )
        return configs

    def _run(self, part: str, jobs: Sequence[Job]) -> Summary:
        """Finish a part's jobs, and the simple predictors that stand beside them."""
        if not jobs:
            raise InputError(f"plan {self.plan.name}: has no {part.split(':')[0]} part; add it to the plan")
        remember(self.plan, self.home)
        beside = parts.predictor_jobs(self.plan, part, self._folders)
        done = [self._run_jobs(part, beside, PREDICTOR_DOOR, "predictor", {})] if beside else []
        done.append(self._run_jobs(part, jobs, DOOR, self.plan.model, self.plan.config))
        return Summary(
            part=part, planned=sum(each.planned for each in done), ran=sum(each.ran for each in done),
            failures=tuple(failure for each in done for failure in each.failures),
            superseded=sum(each.superseded for each in done), stopped=done[-1].stopped,
        )  # fmt: skip

    def _run_jobs(
        self, part: str, jobs: Sequence[Job], trainable: str, model: str, base: Mapping[str, Any]
    ) -> RunSummary:
        return run_jobs(
            experiment=self.plan.name,
            home=self.home,
            jobs=jobs,
            trainable=trainable,
            model=model,
            base=base,
            space=self.plan.load_space() if part == "search" else None,
            search=self.plan.search if part == "search" else None,
            selection=self.plan.selection,
            resources=self.plan.resources,
            faults=self.plan.faults,
            cluster=self.cluster,
            tags=self._tags,
            tracking_uri=self._server,
            keep={job.trial for job in parts.planned(self.plan)[part]},
            on_progress=lambda progress: self._show_jobs(part, progress),
        )

    @cached_property
    def _tags(self) -> dict[str, str]:
        """Tags of every run: where its numbers come from."""
        return {
            "study.simulated": str(self.inputs.simulated).lower(),
            "study.data_key": self.inputs.data_key,
            "study.feature_key": self.inputs.feature_key,
            "study.commit": commit(),
            "study.versions": versions(),
            "study.device": device(),
            "study.cpus": f"{self.plan.resources.cpus:g}",
            "study.gpus": f"{self.plan.resources.gpus:g}",
        }

    @property
    def _way(self) -> dict[str, str]:
        """Tags with the words by which a command finds the study: see `Results.command`."""
        return {
            "study.store": tracking.naming(self._server),
            "study.plan": shlex.join([self.named, "--home", str(self.home)]),
            "study.data": shlex.join(["--data", str(self.data.absolute())]) if self.data else "",
        }

    def _store(self) -> tuple[Any, str]:
        client = tracking.connect(self.tracking_uri)
        artifacts = self.home / "artifacts" if self._server is None else None
        return client, tracking.open_experiment(client, self.plan.name, artifacts)

    def _log_data(self, inputs: Inputs) -> None:
        """One run of part `data` with the domains' manifests and the cells' counts, replaced when they change."""
        client, experiment = self._store()
        tags = {
            "study.part": "data", "study.data_key": inputs.data_key, "study.feature_key": inputs.feature_key,
            "study.simulated": str(inputs.simulated).lower(), "study.cells": digest({"tasks": sorted(inputs.tasks)}),
        }  # fmt: skip
        for run in tracking.find_runs(client, experiment, "data"):
            if run.info.status == tracking.FINISHED and tags.items() <= run.data.tags.items():
                for tag, words in self._way.items() - run.data.tags.items():
                    client.set_tag(run.info.run_id, tag, words)
                return
            client.delete_run(run.info.run_id)
        run = client.create_run(experiment, run_name="data", tags=tags | self._way)
        for path in describe_data(self.plan, inputs, self.home / "logs" / self.plan.name).values():
            client.log_artifact(run.info.run_id, str(path))
        for name, value in table_metrics(inputs.tables).items():
            client.log_metric(run.info.run_id, name, value)
        client.set_terminated(run.info.run_id, tracking.FINISHED)


def named_uri(plan: Plan | None = None) -> str | None:
    """The MLflow store that the plan names, else MLFLOW_TRACKING_URI, else None."""
    return (plan.tracking_uri if plan else None) or os.environ.get("MLFLOW_TRACKING_URI") or None


def store_uri(home: Path, plan: Plan | None = None) -> str:
    """The MLflow store in use: a named one, or the SQLite file in the home folder."""
    return named_uri(plan) or tracking.default_uri(home)
