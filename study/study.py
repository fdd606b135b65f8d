"""The verbs of a study: each finishes one part of a plan and can be called again at any time."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from features.errors import InputError
from features.store.tables import digest
from study import parts
from study.data.prepare import Inputs, describe_data, prepare
from study.data.tables import table_metrics
from study.engine.run import Failure, Progress, at_work, refuse_second, run_jobs
from study.home import Home
from study.labels import Labels, labels_of
from study.plan.diff import refuse_other_plan, remember
from study.plan.load import full_name, load_plan, plan_of
from study.plan.schema import Plan, Row, ablated_rows, swept_rows
from study.plan.start import config_of_run
from study.progress import ProgressLines, StartProgress, no_progress
from study.provenance import commit, device, versions
from study.report.claims.judge import Judged, judge
from study.report.report import ReportResult, figure_names, redraw, report
from study.selection import Best, best_trials
from study.specs import BASELINE, Cell, Cluster, Job, Recipe, RowRecipe
from study.terminal import redirect_native_output
from study.tracking import runs as tracking
from study.tracking import tags
from study.tracking.addresses import naming
from study.tracking.marks import mark_best, mark_front, mark_places
from study.tracking.registry import Recommendation, recommend, register
from study.tracking.results import Results, load_results, read_config
from trainables.interface import load_model
from trainables.tasks.arrays import TaskFolders

RUN = "trainables.trial:run"
RUN_BASELINE = "trainables.trial:run_baseline"

ShowJobs = Callable[[str, Progress], None]
"""(part, how far it is)."""
Configs = dict[tuple[str, str], Mapping[str, Any]]
"""(row, cell) -> fields of the model's config."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a verb did."""

    part: str
    planned: int
    ran: int
    failures: tuple[Failure, ...] = ()
    stopped: str | None = None  # why trials were left: the budget that is spent
    notes: tuple[str, ...] = ()  # what else a person should know, a line each
    superseded: int = 0  # runs that the plan no longer asks for: kept in MLflow, and left out of everything


@dataclass(frozen=True, kw_only=True)
class StatusRow:
    """Where a row of a part stands, in trials."""

    part: str
    row: str
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


@dataclass(frozen=True)
class Picture:
    """A figure of the report; a notebook shows it where it is the last value of a cell."""

    path: Path
    """Its PNG; SVG and CSV lie beside it."""

    def _repr_png_(self) -> bytes:
        return self.path.read_bytes()


class Study:
    """One plan in one home folder."""

    def __init__(
        self, plan: Plan | str | Path | Mapping[str, Any], *, home: Path | str = "runs", data: Path | str | None = None,
        cluster: Cluster | None = None, only: Collection[str] = (), replace: bool = False,
        say: Callable[[str], None] | None = None, start_progress: StartProgress | None = None,
        show_jobs: ShowJobs | None = None,
    ) -> None:  # fmt: skip
        """Open a study; nothing is made before a verb is called.

        `plan`: the name of a shipped plan, a YAML file, or what such a file holds. `home`: folder of everything the study
        makes; `data`: of the raw files. `only`: rows that the verbs train; the others keep what they have. `replace`: put
        this plan in the place of another one of its name. `say`: takes a line of progress each minute, e.g. `print`;
        `start_progress` and `show_jobs` show it in another way. Raises InputError, with every fault of the plan.
        """
        if isinstance(plan, Plan):
            self.plan, self.named = plan, plan.name
        elif isinstance(plan, Mapping):
            self.plan = plan_of(plan, Path("plan"))
            self.named = self.plan.name
        else:
            self.plan, self.named = load_plan(str(plan)), full_name(str(plan))
        self.home, self.data = Home(Path(home)), None if data is None else Path(data)
        self.only = tuple(self.plan.row(name).name for name in only)
        self.replace = replace
        self.cluster = cluster or Cluster()
        lines = ProgressLines(say, self.plan.selection) if say is not None else None
        self.start_progress: StartProgress = start_progress or (lines.start if lines else no_progress)
        self._show_jobs: ShowJobs = show_jobs or (lines.show_jobs if lines else (lambda part, progress: None))

    @property
    def tracking_uri(self) -> str:
        """MLflow store of the study."""
        return store_uri(self.home, self.plan)

    @cached_property
    def labels(self) -> Labels:
        """What the plan's rows, metrics and fields are called."""
        return plan_labels(self.plan)

    @property
    def report_folder(self) -> Path:
        """Where `report` writes."""
        return self.home.report(self.plan.name)

    # --- verbs ----------------------------------------------------------------------------------------------------

    def extract(self) -> Inputs:
        """Make everything that trials read, where it is missing, and describe it in MLflow."""
        return self._inputs

    def quiet(self) -> None:
        """Send to the cluster's log what Ray writes to file number 2: that of extraction does, before any trial's."""
        if self.cluster.log is not None:
            redirect_native_output(self.cluster.log)

    @cached_property
    def _inputs(self) -> Inputs:
        refuse_second(self.home, self.plan.name)  # it would describe its data in the other's experiment
        if not self.replace:
            refuse_other_plan(self.plan, self.home.path, self.named)
        self.quiet()
        on_ray, actors = self.cluster.address is not None, None
        if on_ray:
            from study.engine.launch import connect, most_actors

            connect(self.cluster)
            actors = most_actors(self.cluster)
        inputs = prepare(
            self.plan, self.data, self.home, self.start_progress, only=self.only, on_ray=on_ray, actors=actors
        )
        self._log_data(inputs)
        return inputs

    def search(self) -> Summary:
        """Trials by Optuna in every cell, for every row; tags the best of each."""
        summary = self._run("search", {})
        client, experiment = self._store()
        mark_best(client, experiment, self.plan.selection)
        mark_front(client, experiment, self.plan.search.objectives if self.plan.search else ())
        return summary

    def sweep(self, parameter: str) -> Summary:
        """One field varied, everything else as where the sweep starts: at the best configuration, or at the row's base."""
        if parameter not in self.plan.sweeps:
            known = ", ".join(self.plan.sweeps) or "none"
            raise InputError(f"plan {self.plan.name}: has no sweep of {parameter!r}; it has {known}")
        part, rows = f"sweep:{parameter}", swept_rows(self.plan, parameter)
        return self._run(part, self._start_configs(part, self.plan.sweeps[parameter].start, rows))

    def ablate(self) -> Summary:
        """Variants of the configuration that the ablations start from: the best one, or the row's base."""
        if self.plan.ablate is None:
            raise InputError(f"plan {self.plan.name}: has no ablate part; add it to the plan")
        return self._run("ablate", self._start_configs("ablate", self.plan.ablate.start, ablated_rows(self.plan)))

    def score(self, registered: Collection[str] = ()) -> Summary:
        """Each row's best configuration and the simple baselines on test users.

        The subject's winner becomes a registered model, and those of the rows in `registered`.
        """
        names = [self.plan.subject.name, *(self.plan.row(name).name for name in registered)]
        summary = self._run("score", self._best_configs("score", self.plan.rows))
        task_type = self.plan.task_type
        direction = task_type.validation_directions[f"val_{task_type.headline}"]
        mark_places(*self._store(), metric=f"test_{task_type.headline}", maximize=direction == "maximize")
        return replace(summary, notes=tuple(register(self.results(), self._inputs.domains, self.home, names)))

    def recommend(self, user: str, cell: str | None = None, n: int = 10, row: str | None = None) -> Recommendation:
        """Target-domain items for a user, by the registered model of a cell; None: of the first that knows them."""
        cells = [each for each in self.plan.cells if cell in (None, each.name)]
        if not cells:
            names = ", ".join(each.name for each in self.plan.cells)
            raise InputError(f"--cell {cell}: plan {self.plan.name} has no such cell; choose from {names}")
        client, _ = self._store()
        rival = None if row in (None, self.plan.subject.name) else self.plan.row(str(row)).name
        return recommend(client, self.plan.name, cells, self.home, user, n, rival)

    def run_part(self, part: str) -> Summary:
        """The verb of a part by the part's name."""
        if part.startswith("sweep:"):
            return self.sweep(part.removeprefix("sweep:"))
        verbs = {"search": self.search, "ablate": self.ablate, "score": self.score}
        return verbs[part]()

    def run(self, ended: Callable[[Summary], object] = lambda summary: None) -> list[Summary]:
        """All parts in order; what is done is skipped. `ended` takes the summary of each when it has ended."""
        self.extract()
        summaries = []
        for part in parts.part_names(self.plan):
            summaries.append(self.run_part(part))
            ended(summaries[-1])
        return summaries

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

    def trials(self, part: str | None = None, row: str | None = None) -> pd.DataFrame:
        """Finished trials (of a part, of a row), a line each; columns as in `study.tracking.results`."""
        return self.results().finished(part, row)

    def best_trials(self) -> pd.DataFrame:
        """The best search trial of each row and cell: what it reached on validation, and its configuration."""
        metric = self.plan.selection.metric
        lines = [
            {"row": row, "cell": cell, metric: trial.value, "run_id": trial.run_id, **document["config"]}
            for (row, cell), (trial, document) in self.best().items()
        ]
        return pd.DataFrame(lines)

    def figures(self) -> list[str]:
        """Names of the figures that the report has."""
        return figure_names(self.results())

    def figure(self, name: str) -> Picture:
        """One figure of the report, drawn anew."""
        return Picture(self.redraw(name))

    def claims(self) -> list[Judged]:
        """The verdict on each claim of the paper."""
        return judge(self.results())

    def best(self) -> dict[tuple[str, str], tuple[Best, Mapping[str, Any]]]:
        """(row, cell) -> best trial of the search and its whole `config.yaml`, for all rows that are searched."""
        results = self.results()
        best = best_trials(results.validation(), self.plan.selection)
        rows = {row.name for row in self.plan.rows}
        return {key: (trial, results.config(trial.run_id)) for key, trial in best.items() if key[0] in rows}

    def status(self) -> list[StatusRow]:
        """How far each row of each part is; names alone are compared, so a changed plan shows only when it runs."""
        begun = self._server is not None or self.home.database.is_file()
        store = self._store() if begun else None  # reading makes no store
        working = at_work(self.home, self.plan.name) is not None  # a killed driver leaves runs open
        lines = []
        for part, jobs in parts.planned(self.plan).items():
            states = self._states(store, part, {job.trial for job in jobs})
            rows: dict[str, list[str]] = {}
            for job in jobs:
                name = "baselines" if job.model == BASELINE else job.row
                rows.setdefault(name, []).append(states.get(job.trial, ""))
            for row, trials in rows.items():
                count = trials.count
                lines.append(
                    StatusRow(
                        part=part, row=row, planned=len(trials), finished=count(tracking.FINISHED),
                        failed=count(tracking.FAILED), running=count(tracking.RUNNING) if working else 0,
                        open=count(tracking.RUNNING) + count(tracking.KILLED),
                    )
                )  # fmt: skip
        return lines

    def _states(self, store: tuple[Any, str] | None, part: str, trials: Collection[str]) -> dict[str, str]:
        """Trial -> status of its run; a trial that the search stopped early has ended."""
        states: dict[str, str] = {}
        for run in tracking.find_runs(*store, part) if store else ():
            trial = str(run.data.tags.get(tags.TRIAL))
            if trial in trials and tags.SUPERSEDED not in run.data.tags:  # of several, the newest is what counts
                states.setdefault(trial, tracking.FINISHED if tags.PRUNED in run.data.tags else run.info.status)
        return states

    # --- inside ---------------------------------------------------------------------------------------------------

    @property
    def _server(self) -> str | None:
        """A store that was named, by the plan or by MLFLOW_TRACKING_URI; None: the file in the home folder."""
        return named_uri(self.plan)

    def _folders(self, cell: Cell, feature_set: str) -> TaskFolders:
        return self._inputs.tasks[cell.name, feature_set]

    def _start_configs(self, part: str, start: str, rows: Sequence[Row]) -> Configs:
        """What a sweep or the ablations start from."""
        if start == "best":
            return self._best_configs(part, rows)
        if start == "base":
            return {(row.name, cell.name): row.of_cell(cell) for row in rows for cell in self.plan.cells}
        document = read_config(self.tracking_uri, start)
        (row,) = rows
        config = config_of_run(start, document, row, f"{part}: start")
        return {(row.name, cell.name): config for cell in self.plan.cells}

    def _best_configs(self, part: str, rows: Sequence[Row]) -> Configs:
        """The best configuration of each row and cell; a row's base where it has no search."""
        chosen = [row for row in rows if not self.only or row.name in self.only]
        configs = self._start_configs(part, "base", rows)
        searched = [row for row in chosen if row.search is not None]
        if not searched:
            return configs
        best = self.best()
        wanted = [(row.name, cell.name) for row in searched for cell in self.plan.cells]
        if missing := [f"{row} in {cell}" for row, cell in wanted if (row, cell) not in best]:
            raise InputError(
                f"{part}: no finished search trial of {', '.join(missing)}; run `study search` on the plan first"
            )
        return configs | {key: best[key][1]["config"] for key in wanted}

    def _run(self, part: str, start: Configs) -> Summary:
        """Finish a part's jobs, with the simple baselines beside them; where `only` names rows, theirs alone."""
        jobs = parts.part_jobs(self.plan, part, self._folders, start)
        if not jobs:
            raise InputError(f"plan {self.plan.name}: has no {part.split(':')[0]} part; add it to the plan")
        chosen = parts.of_rows(jobs, self.only)
        if not chosen:
            return Summary(part=part, planned=0, ran=0)
        remember(self.plan, self.home.path, self.named)
        done = run_jobs(
            Recipe(
                experiment=self.plan.name, home=self.home.path, rows=self._row_recipes(part, chosen),
                selection=self.plan.selection, tags=self._tags, resources=self.plan.resources, faults=self.plan.faults,
                cluster=self.cluster, tracking_uri=self._server, planned={job.trial for job in jobs},
            ),
            chosen,
            on_progress=lambda progress: self._show_jobs(part, progress),
        )  # fmt: skip
        return Summary(
            part=part, planned=done.planned, ran=done.ran, failures=done.failures, superseded=done.superseded,
            stopped=done.stopped,
        )  # fmt: skip

    def _row_recipes(self, part: str, jobs: Sequence[Job]) -> dict[str, RowRecipe]:
        """How the jobs of each row are trained."""
        named = {job.row for job in jobs}
        recipes = {
            row.name: RowRecipe(
                trainable=RUN, model=row.model, base=row.config, version=load_model(row.model).VERSION,
                space=row.load_space() if part == "search" else None,
                search=row.search_with_first_point() if part == "search" else None,
            )
            for row in self.plan.rows
            if row.name in named
        }  # fmt: skip
        baselines = {job.row for job in jobs if job.model == BASELINE}
        return recipes | {name: RowRecipe(trainable=RUN_BASELINE, model=BASELINE, base={}) for name in baselines}

    @cached_property
    def _tags(self) -> dict[str, str]:
        """Tags of every run: where its numbers come from."""
        return {
            tags.SIMULATED: str(self._inputs.simulated).lower(),
            tags.DATA_KEY: self._inputs.data_key,
            tags.FEATURE_KEY: self._inputs.feature_key,
            tags.COMMIT: commit(),
            tags.VERSIONS: versions(),
            tags.DEVICE: device(),
            tags.CPUS: f"{self.plan.resources.cpus:g}",
            tags.GPUS: f"{self.plan.resources.gpus:g}",
        }

    @property
    def _way(self) -> dict[str, str]:
        """Tags with the words by which a command finds the study: see `Results.command`."""
        return {
            tags.STORE: naming(self._server),
            tags.PLAN: shlex.join([self.named, "--home", str(self.home)]),
            tags.DATA: shlex.join(["--data", str(self.data.absolute())]) if self.data else "",
        }

    def _store(self) -> tuple[Any, str]:
        client = tracking.connect(self.tracking_uri)
        artifacts = self.home.artifacts if self._server is None else None
        return client, tracking.open_experiment(client, self.plan.name, artifacts)

    def _log_data(self, inputs: Inputs) -> None:
        """One run of part `data` with the domains' manifests and the cells' counts, replaced when they change."""
        client, experiment = self._store()
        run_tags = {
            tags.PART: "data", tags.DATA_KEY: inputs.data_key, tags.FEATURE_KEY: inputs.feature_key,
            tags.SIMULATED: str(inputs.simulated).lower(), tags.CELLS: digest({"tasks": sorted(inputs.tasks)}),
        }  # fmt: skip
        for run in tracking.find_runs(client, experiment, "data"):
            if run.info.status == tracking.FINISHED and run_tags.items() <= run.data.tags.items():
                for tag, words in self._way.items() - run.data.tags.items():
                    client.set_tag(run.info.run_id, tag, words)
                return
            client.delete_run(run.info.run_id)
        run = client.create_run(experiment, run_name="data", tags=run_tags | self._way)
        for path in describe_data(self.plan, inputs, self.home.logs(self.plan.name)).values():
            client.log_artifact(run.info.run_id, str(path))
        for name, value in table_metrics(inputs.tables).items():
            client.log_metric(run.info.run_id, name, value)
        client.set_terminated(run.info.run_id, tracking.FINISHED)


def named_uri(plan: Plan | None = None) -> str | None:
    """The MLflow store that the plan names, else MLFLOW_TRACKING_URI, else None."""
    return (plan.tracking_uri if plan else None) or os.environ.get("MLFLOW_TRACKING_URI") or None


def store_uri(home: Home, plan: Plan | None = None) -> str:
    """The MLflow store in use: a named one, or the SQLite file in the home folder."""
    return named_uri(plan) or tracking.default_uri(home.path)


def plan_labels(plan: Plan) -> Labels:
    """What a plan's rows, metrics and fields are called."""
    rivals = {row.name: (row.model, row.title) for row in plan.rows[1:]}
    labels = labels_of(plan.model, plan.published, rivals)
    rows = {row.name: replace(labels.rows[row.name], preset=row.preset_tag) for row in plan.rows}
    rows |= {row.name: replace(rows[row.name], paper_name="") for row in plan.rows if not row.published}
    return replace(labels, rows=rows, note=" ".join(plan.note.split()), parts=tuple(parts.part_names(plan)))
