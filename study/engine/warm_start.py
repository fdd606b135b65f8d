"""Warm start: the finished trials of another search, as far as they lie in the space of this one.

Rows are matched by name: each starts from the other plan's study of the same row and cell. They are read from Optuna's
storage alone, as numbers and texts: nothing that a plan can name is unpickled.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from features.errors import InputError
from search_spaces import Space, SpaceError
from study.engine.fingerprint import parse_study_name
from study.engine.optuna_storage import close_storage, open_database
from study.home import Home
from study.specs import Recipe, WarmStart

_PLACE = "search.warm_start"


def warm_trials(recipe: Recipe, row: str, cells: Sequence[str]) -> dict[str, list[FrozenTrial]]:
    """Cell -> complete trials of the same row and cell in the other plan, in their order, ready to be added.

    A cell that the other plan does not have gets none, and so does a row. Raises InputError when there is no such plan,
    when it has no row of this one, when it optimises something else, and when no trial of the row lies in its space.
    """
    search, space = recipe.rows[row].search, recipe.rows[row].space
    assert search is not None
    assert search.warm_start is not None
    assert space is not None
    source = search.warm_start
    directions = [objective.direction for objective in search.objectives] or [recipe.selection.direction]
    storage = _open(source, recipe.home)
    try:
        names = _study_names(storage, source.plan)
        searched = sorted({other for other, _ in names})
        if row not in searched:
            plan_rows = {*recipe.rows, *(trial.split("/")[2] for trial in recipe.planned or ())}
            if not plan_rows.intersection(searched):
                rows = f"it has {', '.join(searched)}" if searched else "it has no search at all"
                raise InputError(f"{_PLACE}: {source.plan} has no search of row {row} ({rows}); name another plan")
            return {cell: [] for cell in cells}  # a rival that only this plan has
        trials, outside = _read(
            storage, source.plan, {cell: names.get((row, cell)) for cell in cells}, space, directions
        )
    finally:
        close_storage(storage)
    if not any(trials.values()):
        why = f"e.g. {outside[0]}" if outside else f"it has no complete trial in {', '.join(cells)}"
        raise InputError(
            f"{_PLACE}: no trial of {source.plan} lies in the space of row {row} ({why}); name another plan"
        )
    return trials


def _read(
    storage: BaseStorage, plan: str, studies: dict[str, str | None], space: Space, directions: Sequence[str]
) -> tuple[dict[str, list[FrozenTrial]], list[str]]:
    """Trials by cell, and why others are left behind."""
    trials: dict[str, list[FrozenTrial]] = {cell: [] for cell in studies}
    outside: list[str] = []
    for cell, name in studies.items():
        if name is None:
            continue
        study = optuna.load_study(study_name=name, storage=storage)
        theirs = [direction.name.lower() for direction in study.directions]
        if theirs != list(directions):
            raise InputError(
                f"{_PLACE}: {plan} searched to {' and '.join(theirs)}, this plan to {' and '.join(directions)}; "
                "start from a search of the same objective"
            )
        for trial in study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]):
            try:
                trials[cell].append(_copy(trial, space, f"{name}#{trial.number}"))
            except SpaceError as error:
                outside.append(f"{name}#{trial.number}: {error.faults[0]}")
    return trials, outside


def _copy(trial: FrozenTrial, space: Space, origin: str) -> FrozenTrial:
    """Return the trial with this space's distributions, so that the sampler takes both for one search."""
    params = space.fit(trial.params, whole=True)
    ranges = {parameter.name: parameter.distribution for parameter in space.parameters if parameter.name in params}
    return optuna.trial.create_trial(
        params=params, distributions=ranges, values=trial.values, user_attrs={"warm_start": origin}
    )


def _open(source: WarmStart, home: Path) -> BaseStorage:
    """Open for reading; a journal that another driver writes to is left as it is, torn tail included."""
    if source.storage is not None and "://" in source.storage:
        return open_database(source.storage, f"{_PLACE}.storage")
    path = Path(source.storage) if source.storage else Home(home).journal(source.plan)
    if not path.is_file():
        raise InputError(f"{_PLACE}: {path}: no such journal; run that plan first, or name its storage")
    try:
        return JournalStorage(JournalFileBackend(str(path)))
    except (ValueError, KeyError, TypeError, OSError, AttributeError) as error:
        raise InputError(
            f"{_PLACE}: {path}: is not a journal of Optuna's; name the file that a search wrote"
        ) from error


def _study_names(storage: BaseStorage, plan: str) -> dict[tuple[str, str], str]:
    """(row, cell) -> name of the newest study; in a database, which many plans share, of that plan alone."""
    names: dict[tuple[str, str], str] = {}
    for study in sorted(storage.get_all_studies(), key=lambda study: study._study_id):
        name = parse_study_name(study.study_name)
        if name is not None and name[0] in (None, plan):
            names[name[1:]] = study.study_name
    return names
