"""What is left of a part, decided by holding MLflow, Optuna and the plan against each other.

A trial is closed in MLflow first and told to Optuna second. A driver that dies in between leaves MLflow ahead, and the
next one tells Optuna what MLflow says. A trial that neither store holds as ended is trained again with the parameters
that it had.

No run is ever deleted. One that the plan does not ask for, or not in this form, is superseded: it gets a tag and counts
no more. When the plan asks for the same trial with the same fingerprint again, the tag goes and the run counts.

`decide` is a function of what the plan and the two stores say; `carry_out` does what it decided. Both stores are brought
forward by writes that may be repeated, so a driver that dies on the way is followed by one that decides the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from study.engine.fingerprint import fingerprint
from study.engine.optuna_study import Key, OptunaTrial, Studies
from study.specs import Job, Recipe
from study.tracking.runs import FAILED, FINISHED, PartTracker, TrialRun, param_text

NOT_PLANNED = "the plan has no such trial any more"
OTHER_QUESTION = "the plan asks for another configuration, data or search under this name"
OTHER_DRAW = "Optuna's trial of this number has other parameters, or is gone"
NEW_SEEDS = "a run with the seeds that the plan now asks for has taken its place"
SECOND_RUN = "another run of the same trial counts"


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Everything to do about the trials of a part before any of them is trained."""

    todo: tuple[Job, ...] = ()
    """Jobs that have to be trained, in the order given."""
    resume: tuple[TrialRun, ...] = ()
    """Runs without a result that jobs of `todo` go on in."""
    supersede: tuple[tuple[TrialRun, str], ...] = ()
    """Runs that count no more, and why."""
    restore: tuple[TrialRun, ...] = ()
    """Superseded runs that count again."""
    tell: tuple[tuple[Job, TrialRun], ...] = ()
    """Drawn jobs that have ended in MLflow and not in Optuna."""
    replaced: Mapping[str, TrialRun] = field(default_factory=dict)
    """Trial of `todo` -> a finished run with other seeds, which counts until the trial is finished."""
    values: Mapping[str, float] = field(default_factory=dict)
    """Finished trial -> its selection metric."""
    failures: Mapping[str, str] = field(default_factory=dict)
    """Drawn trial that failed because of its parameters -> the reason; it is not trained again."""


def decide(
    recipe: Recipe, jobs: Sequence[Job], fingerprints: Mapping[str, str], *, runs: Mapping[str, Sequence[TrialRun]],
    drawn: Mapping[Key, Sequence[OptunaTrial]],
) -> Decision:  # fmt: skip
    """Hold the jobs against the runs in MLflow (newest first) and the trials in Optuna; nothing is written.

    Trials that `recipe.planned` has and `jobs` has not are left as they are.
    """
    todo: list[Job] = []
    resume: list[TrialRun] = []
    restore: list[TrialRun] = []
    tell: list[tuple[Job, TrialRun]] = []
    replaced: dict[str, TrialRun] = {}
    values: dict[str, float] = {}
    failures: dict[str, str] = {}
    planned = {*(recipe.planned or ()), *(job.trial for job in jobs)}
    supersede = [
        (run, NOT_PLANNED)
        for trial in sorted(runs.keys() - planned)
        for run in runs[trial]
        if run.superseded is None
    ]  # fmt: skip
    for job in jobs:
        match = _match(recipe, job, fingerprints[job.trial], runs.get(job.trial, ()), _optuna_trial(job, drawn))
        supersede += match.others
        restore += [run for run in (match.run, match.stand_in) if run is not None and run.superseded is not None]
        run = match.run
        if run is None or not _has_ended(job, run):
            todo.append(job)
            resume += [run] if run is not None else []
            if match.stand_in is not None:
                replaced[job.trial] = match.stand_in
            continue
        if match.optuna_trial is not None and not match.optuna_trial.ended:
            tell.append((job, run))
        if run.status == FINISHED:
            values[job.trial] = run.metrics[recipe.selection.metric]
        elif not run.pruned:
            failures[job.trial] = run.reason or "unknown"
    return Decision(
        todo=tuple(todo), resume=tuple(resume), supersede=tuple(supersede), restore=tuple(restore), tell=tuple(tell),
        replaced=replaced, values=values, failures=failures,
    )  # fmt: skip


def carry_out(decision: Decision, tracker: PartTracker, studies: Studies) -> None:
    """Bring both stores to what was decided: MLflow first, Optuna second."""
    for run, why in decision.supersede:
        tracker.supersede(run, why)
    for run in decision.restore:
        tracker.restore(run)
    for run in decision.resume:
        tracker.resume(run)
    for job, run in decision.tell:
        study = studies.of_job(job)
        assert study is not None
        if run.status == FINISHED:
            study.complete(int(job.name), run.metrics, len(job.seeds))
        elif run.pruned:
            study.prune(int(job.name))
        else:
            study.fail(int(job.name))


@dataclass(frozen=True, kw_only=True)
class _Match:
    """The runs of a job's trial, sorted."""

    run: TrialRun | None
    """The one that answers the job, finished or not."""
    stand_in: TrialRun | None
    """A finished one with other seeds that counts until `run` is finished."""
    others: list[tuple[TrialRun, str]]
    """Runs that are to be superseded, and why."""
    optuna_trial: OptunaTrial | None


def _match(
    recipe: Recipe, job: Job, job_fingerprint: str, runs: Sequence[TrialRun], optuna_trial: OptunaTrial | None
) -> _Match:
    """Pick the run that answers the job, and say of all others why they do not."""
    same_question = [run for run in runs if run.fingerprint == job_fingerprint]
    matching = [run for run in same_question if job.config is not None or _has_draw(run, optuna_trial)]
    other_seeds = [run for run in runs if run not in same_question and _has_other_seeds(recipe, job, run)]
    run, stand_in = _first(matching), None
    if run is None or run.status != FINISHED:
        stand_in = _first([other for other in other_seeds if other.status == FINISHED])
    reasons = dict.fromkeys((other.run_id for other in runs), OTHER_QUESTION)
    for group, reason in ((other_seeds, NEW_SEEDS), (same_question, OTHER_DRAW), (matching, SECOND_RUN)):
        reasons |= dict.fromkeys((other.run_id for other in group), reason)
    others = [
        (other, reasons[other.run_id])
        for other in runs
        if other.superseded is None and other is not run and other is not stand_in
    ]
    return _Match(run=run, stand_in=stand_in, others=others, optuna_trial=optuna_trial)


def _has_other_seeds(recipe: Recipe, job: Job, run: TrialRun) -> bool:
    """Whether the run answers the same question with other seeds; those of a search are a part of the search."""
    if job.config is None or not run.seeds:
        return False
    return run.fingerprint == fingerprint(recipe, replace(job, seeds=run.seeds))


def _first(runs: Sequence[TrialRun]) -> TrialRun | None:
    """Return the run that counts: a finished one before others, then one that counts already, then the newest."""
    return min(runs, key=lambda run: (run.status != FINISHED, run.superseded is not None), default=None)


def _optuna_trial(job: Job, drawn: Mapping[Key, Sequence[OptunaTrial]]) -> OptunaTrial | None:
    """Return the trial that a drawn job has in Optuna, None where it has none yet."""
    if job.config is not None:
        return None
    trials = drawn[job.row, job.cell.name]
    return trials[int(job.name)] if int(job.name) < len(trials) else None


def _has_draw(run: TrialRun, optuna_trial: OptunaTrial | None) -> bool:
    """Whether the run has the parameters of Optuna's trial: a search whose journal was lost draws others."""
    if optuna_trial is None or optuna_trial.params is None:
        return False
    if not run.params:  # a driver died before it logged them
        return run.status != FINISHED
    return all(run.params.get(name) == param_text(value) for name, value in optuna_trial.params.items())


def _has_ended(job: Job, run: TrialRun) -> bool:
    """Whether the run's end is the job's. A fixed job that failed is tried again; a drawn one is a result of its draw.

    A lost worker says nothing about the parameters.
    """
    if run.status == FINISHED:
        return True
    return job.config is None and (run.pruned or (run.status == FAILED and run.failure == "trial"))
