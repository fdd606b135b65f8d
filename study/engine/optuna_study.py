"""The Optuna study of one row in one cell: draws that survive the driver, and results that may be told twice.

Optuna's storage (a journal file, or a database) is the memory of a search. Trial n is drawn by a sampler that is made
for it alone, from the seed (seed, n): a resumed search never replays the start-up draws, and one trial at a time it
draws what an uninterrupted search draws. A trial that was drawn but has no result belongs to a driver that died; it is
read back, never drawn again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from features.errors import InputError
from search_spaces import Space, SpaceError
from study.engine.budget import Spent
from study.engine.fingerprint import parse_study_name, study_name
from study.engine.optuna_storage import close_storage, open_database, open_journal
from study.engine.samplers import fixed_points, make_pruner, make_sampler, study_seed
from study.engine.warm_start import warm_trials
from study.home import Home
from study.specs import Job, Objective, Recipe, SearchSpec, trial_name
from trainables import interface

if TYPE_CHECKING:
    from trainables.interface import Selection

Key = tuple[str, str]
"""(row, name of the cell)."""


@dataclass(frozen=True, kw_only=True)
class OptunaTrial:
    """A trial of a search as it stands in Optuna."""

    ended: bool
    """Whether it has a result, failed or was pruned."""
    params: Mapping[str, Any] | None
    """Drawn parameters; None where a driver that was killed has drawn a part of them."""


def objectives(search: SearchSpec, selection: Selection) -> tuple[Objective, ...]:
    """Return what the search optimises: its objectives, else the selection metric."""
    return search.objectives or (Objective(metric=selection.metric, direction=selection.direction),)


class CellStudy:
    """The search of one row in one cell; this process is the only one that draws from it."""

    def __init__(
        self, study: optuna.Study, storage: BaseStorage, *, space: Space, search: SearchSpec, selection: Selection,
        warm_count: int,
    ) -> None:  # fmt: skip
        """`study`: from `open_study`. `warm_count`: how many trials of another search come before trial 0."""
        self._study = study
        self._storage = storage
        self._study_id = study._study_id
        self._space = space
        self._search = search
        self._points = fixed_points(search, space)
        self._objectives = objectives(search, selection)
        self._metric = selection.metric
        self._warm_count = warm_count
        self._drawn = storage.get_n_trials(self._study_id) - warm_count

    def trials(self) -> list[OptunaTrial]:
        """All trials that were drawn, by number."""
        frozen = self._storage.get_all_trials(self._study_id, deepcopy=False)[self._warm_count :]
        return [OptunaTrial(ended=trial.state.is_finished(), params=self._whole(trial)) for trial in frozen]

    def _whole(self, trial: FrozenTrial) -> dict[str, Any] | None:
        try:
            return self._space.fit(trial.params, whole=True)
        except SpaceError:
            return None

    def state(self, number: int) -> TrialState | None:
        """Return the trial's state in Optuna; None before it was drawn."""
        return self._frozen(number).state if number < self._drawn else None

    def ask(self, number: int) -> dict[str, Any]:
        """Return the parameters of trial `number`: read back if they were drawn before, drawn now otherwise.

        Numbers are drawn in order. A driver that was killed between two parameters left a trial with some of them; the
        missing ones are drawn now.
        """
        self._study.sampler = make_sampler(self._search, number, self._points)
        if number >= self._drawn:
            trial = self._study.ask()
            assert trial.number - self._warm_count == number == self._drawn, (trial.number, number, self._drawn)
            self._drawn += 1
            return self._space.suggest(trial)
        params = self._whole(self._frozen(number))
        return self._space.suggest(optuna.Trial(self._study, self._trial_id(number))) if params is None else params

    def report(self, number: int, epoch: int, value: float) -> bool:
        """Tell Optuna the value of an epoch; returns whether the trial is stopped there.

        After an interruption epochs come a second time. They are not judged again: a trial that was stopped is stopped at
        the same one.
        """
        frozen = self._frozen(number)
        if frozen.state.is_finished():
            return frozen.state == TrialState.PRUNED and epoch >= (frozen.last_step or 0)
        if not math.isfinite(value) or (frozen.last_step is not None and epoch < frozen.last_step):
            return False
        self._storage.set_trial_intermediate_value(frozen._trial_id, epoch, value)
        return self._study.pruner.prune(self._study, self._frozen(number))

    def complete(self, number: int, metrics: Mapping[str, float], seeds: int) -> None:
        """Tell Optuna a trial's result, a mean over `seeds` seeds, with their spread beside it."""
        if not self._frozen(number).state.is_finished():
            spread = {"std": metrics.get(f"{self._metric}_std", 0.0), "count": seeds}
            self._storage.set_trial_user_attr(self._trial_id(number), "replicates", spread)
        self._tell(number, TrialState.COMPLETE, [metrics[objective.metric] for objective in self._objectives])

    def fail(self, number: int) -> None:
        """Tell Optuna that a trial has no result because of its parameters."""
        self._tell(number, TrialState.FAIL)

    def prune(self, number: int) -> None:
        """Tell Optuna that a trial was stopped after the last epoch that was reported."""
        self._tell(number, TrialState.PRUNED)

    def _tell(self, number: int, state: TrialState, values: Sequence[float] | None = None) -> None:
        """A trial that has ended in Optuna keeps its first result."""
        if not self._frozen(number).state.is_finished():
            self._study.tell(self._warm_count + number, values, state=state)

    @property
    def spent(self) -> Spent:
        """Seconds that this search has taken so far; those by the clock as far as its own trials ended the wait."""
        return _spent(self._study.user_attrs)

    def spend(self, spent: Spent) -> None:
        """Add to what was spent."""
        total = self.spent + spent
        self._study.set_user_attr("spent", {"clock": total.clock, "trials": total.trials})

    def _trial_id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, self._warm_count + number)

    def _frozen(self, number: int) -> FrozenTrial:
        return self._storage.get_trial(self._trial_id(number))


def open_study(
    storage: BaseStorage, name: str, *, space: Space, search: SearchSpec, selection: Selection, owner: str | None = None,
    warm: Callable[[], Sequence[FrozenTrial]] | None = None,
) -> CellStudy:  # fmt: skip
    """Open an Optuna study, created when absent.

    `owner` tells studies of one name in a shared database apart: two home folders may name their plans alike, and the
    second is refused by an InputError. `warm` gives the trials of another search that the sampler is to know; it is asked
    once, when the study is new, and they come before trial 0 in Optuna's numbers.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=storage, study_name=name, sampler=make_sampler(search, 0), pruner=make_pruner(search), load_if_exists=True,
        directions=[objective.direction for objective in objectives(search, selection)],
    )  # fmt: skip
    if owner is not None:
        _claim(study, owner)
    warm_count = 0 if warm is None else _copy_warm_trials(study, storage, warm)
    return CellStudy(study, storage, space=space, search=search, selection=selection, warm_count=warm_count)


def _claim(study: optuna.Study, owner: str) -> None:
    claimed = study.user_attrs.get("owner")
    if claimed is None:
        study.set_user_attr("owner", owner)
    elif claimed != owner:
        raise InputError(
            f"search.storage: its study '{study.study_name}' belongs to another home folder or MLflow store; "
            "give the plan another name"
        )


def _copy_warm_trials(study: optuna.Study, storage: BaseStorage, warm: Callable[[], Sequence[FrozenTrial]]) -> int:
    """Copy another search's trials in front of this search's, and go on where a driver was killed on the way."""
    count: int | None = study.user_attrs.get("warm_start")
    copied = storage.get_n_trials(study._study_id)
    if count is None or copied < count:
        trials = warm()
        count = len(trials)
        study.set_user_attr("warm_start", count)
        study.add_trials(trials[copied:])
    return count


def _spent(user_attrs: Mapping[str, Any]) -> Spent:
    return Spent(**user_attrs.get("spent", {}))


# --- all studies of a part --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Studies:
    """The Optuna studies of a part's drawn jobs."""

    cells: Mapping[Key, CellStudy]
    clock_elsewhere: float = 0.0
    """Seconds by the clock of the experiment's searches in rows and cells that this call leaves alone."""

    def of_job(self, job: Job) -> CellStudy | None:
        """Return the study that a job is drawn from; None: it has its configuration."""
        return self.cells[job.row, job.cell.name] if job.config is None else None


def open_studies(
    recipe: Recipe, jobs: Iterable[Job], fingerprints: Mapping[str, str], *, owner: str, resources: ExitStack
) -> Studies:
    """Open one study for each row and cell that has drawn jobs; `resources` closes their storages.

    `owner`: see `open_study`. Raises InputError for a storage or a warm start that cannot be used.
    """
    drawn: dict[Key, list[Job]] = {}
    for job in jobs:
        if job.config is None:
            drawn.setdefault((job.row, job.cell.name), []).append(job)
    home = Home(recipe.home)

    @cache
    def storage_at(url: str | None) -> BaseStorage:
        if url is None:
            return open_journal(home.journal(recipe.experiment))
        storage = open_database(url, "search.storage")
        resources.callback(close_storage, storage)
        return storage

    @cache  # read for the first new study of a row, if any is new
    def warm_of(row: str) -> Mapping[str, Sequence[FrozenTrial]]:
        return warm_trials(recipe, row, [cell for name, cell in drawn if name == row])

    cells = {}
    for (row, cell), cell_jobs in drawn.items():
        space, search = recipe.rows[row].space, recipe.rows[row].search
        assert space is not None, "drawn jobs need a space"
        assert search is not None, "drawn jobs need a search"
        search = replace(search, seed=study_seed(search.seed, row, drawn_for(cell_jobs[0])))
        names = sorted(job.name for job in cell_jobs)
        assert names == [trial_name(number) for number in range(len(names))], f"{row}, {cell}: gaps in {names}"
        cells[row, cell] = open_study(
            storage_at(search.storage),
            study_name(recipe, cell_jobs[0], fingerprints[cell_jobs[0].trial]),
            space=space,
            search=search,
            selection=recipe.selection,
            owner=owner if search.storage is not None else None,
            warm=(lambda row=row, cell=cell: warm_of(row)[cell]) if search.warm_start is not None else None,  # type: ignore[misc]
        )
    searches = [recipe.rows[row].search for row, _ in cells]
    urls = {search.storage for search in searches if search is not None}
    return Studies(cells, sum(_clock_elsewhere(storage_at(url), recipe.experiment, url, cells) for url in urls))


def drawn_for(job: Job) -> str:
    """Return what a job's configurations are drawn for: its cell, or both directions where one training serves them."""
    both = job.model in interface.model_names() and interface.load_model(job.model).BOTH_DIRECTIONS
    return job.cell.pair if both else job.cell.name


def _clock_elsewhere(storage: BaseStorage, experiment: str, url: str | None, cells: Iterable[Key]) -> float:
    """Sum over rows and cells that are not opened; of each the newest study counts: older ones are of another plan."""
    newest: dict[Key, float] = {}
    for study in sorted(storage.get_all_studies(), key=lambda study: study._study_id):
        name = parse_study_name(study.study_name)
        if name is not None and name[0] == (None if url is None else experiment) and name[1:] not in cells:
            newest[name[1:]] = _spent(study.user_attrs).clock
    return sum(newest.values())
