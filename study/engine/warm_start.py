"""Warm start: the finished trials of another search, as far as they lie in the space of this one.

They are read from Optuna's storage alone, as numbers and texts: nothing that a plan can name is unpickled.
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
from study.engine.optuna_study import close_storage, open_database
from study.specs import Direction, WarmStart

_PLACE = "search.warm_start"


def warm_trials(
    source: WarmStart, *, home: Path, cells: Sequence[str], space: Space, directions: Sequence[Direction]
) -> dict[str, list[FrozenTrial]]:
    """Cell -> complete trials of the same cell in `source` that lie in `space`, in their order, ready to be added.

    A cell that the source does not know gets none. Raises InputError when there is no such study, when it optimises
    something else, and when no trial of any cell lies in the space.
    """
    storage = _open(source, home)
    try:
        found, outside = _read(storage, source, cells, space, directions)
    finally:
        close_storage(storage)
    if not any(found.values()):
        why = f"e.g. {outside[0]}" if outside else f"it has no complete trial in {', '.join(cells)}"
        raise InputError(f"{_PLACE}: no trial of {source.plan} lies in this space ({why}); name another plan")
    return found


def _read(
    storage: BaseStorage, source: WarmStart, cells: Sequence[str], space: Space, directions: Sequence[Direction]
) -> tuple[dict[str, list[FrozenTrial]], list[str]]:
    """Trials by cell, and what speaks against those that are left behind."""
    found: dict[str, list[FrozenTrial]] = {}
    outside: list[str] = []
    for cell in cells:
        name = _study_of(storage, source.plan, cell)
        found[cell] = []
        if name is None:
            continue
        study = optuna.load_study(study_name=name, storage=storage)
        theirs = [direction.name.lower() for direction in study.directions]
        if theirs != list(directions):
            raise InputError(
                f"{_PLACE}: {source.plan} searched to {' and '.join(theirs)}, this plan to {' and '.join(directions)}; "
                "start from a search of the same objective"
            )
        for trial in study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]):
            try:
                found[cell].append(_own(trial, space, f"{name}#{trial.number}"))
            except SpaceError as error:
                outside.append(f"{name}#{trial.number}: {error.faults[0]}")
    return found, outside


def _own(trial: FrozenTrial, space: Space, origin: str) -> FrozenTrial:
    """The trial with this space's distributions, so that the sampler takes both for one search."""
    params = space.fit(trial.params, whole=True)
    ranges = {parameter.name: parameter.distribution for parameter in space.parameters if parameter.name in params}
    return optuna.trial.create_trial(
        params=params, distributions=ranges, values=trial.values, user_attrs={"warm_start": origin}
    )


def _open(source: WarmStart, home: Path) -> BaseStorage:
    """For reading; a journal that another driver writes to is left as it is, torn tail included."""
    if source.storage is not None and "://" in source.storage:
        return open_database(source.storage, f"{_PLACE}.storage")
    path = Path(source.storage) if source.storage else home / "optuna" / f"{source.plan}.log"
    if not path.is_file():
        raise InputError(f"{_PLACE}: {path}: no such journal; run that plan first, or name its storage")
    try:
        return JournalStorage(JournalFileBackend(str(path)))
    except (ValueError, KeyError, TypeError, OSError, AttributeError) as error:
        raise InputError(
            f"{_PLACE}: {path}: is not a journal of Optuna's; name the file that a search wrote"
        ) from error


def _study_of(storage: BaseStorage, plan: str, cell: str) -> str | None:
    """The newest study of the cell: `cell/identity` in a plan's own journal, `plan/cell/identity` in a database."""
    names = [study.study_name for study in sorted(storage.get_all_studies())]
    parts = {name: name.split("/") for name in names}
    fitting = [name for name in names if parts[name][-2:-1] == [cell] and parts[name][:-2] in ([], [plan])]
    return fitting[-1] if fitting else None
