"""One Optuna study per cell: draws that survive the driver, and results that may be told twice.

Optuna's storage (a journal file, or a database) is the memory of a search. Trial n is drawn by a sampler that was made
for it alone, from the seed (seed, n): a resumed search never replays the start-up draws, and one trial at a time it
draws what an uninterrupted search draws. A trial that was drawn but not told belongs to a driver that died; it is read
back, never drawn again.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import FrozenTrial, TrialState

from features.errors import InputError
from search_spaces import Space, SpaceError
from study.engine.samplers import fixed_points, make_pruner, make_sampler
from study.specs import Direction, SearchSpec

# Seconds after which a journal lock without progress counts as left behind by a driver that was killed mid-write. No
# write takes longer than milliseconds, and one driver at a time works on a study.
_STALE_LOCK_S = 3
DATABASES = ("postgresql", "mysql", "mariadb", "sqlite")


def open_journal(path: Path) -> BaseStorage:
    """The journal file, created when absent; a half-written last line of a killed driver is cut off.

    Optuna itself skips a torn tail when it reads, but appends right behind it, which no later reader survives.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        _cut_torn_tail(path)
    return JournalStorage(JournalFileBackend(str(path), JournalFileSymlinkLock(str(path), grace_period=_STALE_LOCK_S)))


def _cut_torn_tail(path: Path) -> None:
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        whole = end
        while whole:
            start = max(0, whole - 4096)
            file.seek(start)
            newline = file.read(whole - start).rfind(b"\n")
            if newline >= 0:
                whole = start + newline + 1
                break
            whole = start
        if whole < end:
            file.truncate(whole)


def check_database(url: str, place: str) -> None:
    """Raise InputError unless `url` names a database that this installation can talk to; nothing is opened."""
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError

    rule = "give a URL such as postgresql+psycopg://user@host/name"
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() not in DATABASES or not parsed.database:
            raise InputError(f"{place}: must name a database of {', '.join(DATABASES)}; {rule}")
        parsed.get_dialect().import_dbapi()
    except (ArgumentError, NoSuchModuleError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{place}: is not the URL of a database; {rule}") from error
    except ImportError as error:
        raise InputError(f"{place}: needs the Python package {error.name}; install it") from error


def open_database(url: str, place: str) -> BaseStorage:
    """Optuna's tables in a database, made when absent. Passwords are better kept in ~/.pgpass than in a plan.

    A connection that the server dropped between two trials is replaced.
    """
    check_database(url, place)
    from sqlalchemy import make_url
    from sqlalchemy.exc import SQLAlchemyError

    options: dict[str, Any] = {"pool_pre_ping": True}
    if url.startswith("sqlite"):
        options["connect_args"] = {"timeout": 60}  # seconds that a writer waits for another
    try:
        return optuna.storages.RDBStorage(url, engine_kwargs=options)
    except (SQLAlchemyError, OSError, RuntimeError, KeyError) as error:
        shown = make_url(url).render_as_string(hide_password=True)
        reason = " ".join(str(getattr(error, "orig", None) or error).split())[:200]
        raise InputError(f"{place}: {shown} cannot be used ({reason}); start the server or correct the URL") from error


def close_storage(storage: BaseStorage) -> None:
    """Give the connections of a database back; a journal has none."""
    if isinstance(storage, optuna.storages.RDBStorage):
        storage.remove_session()
        storage.engine.dispose()


class CellSearch:
    """The search of one cell, over its Optuna study; this process is the only one that draws from it.

    `owner` tells studies of one name in a shared database apart, see `_claim`. `warm` gives the trials of another study
    that the sampler is to know; it is asked once, when the study is new. They come before trial 0 in Optuna's numbers.
    """

    def __init__(
        self, *, storage: BaseStorage, name: str, space: Space, spec: SearchSpec, directions: Sequence[Direction],
        owner: str | None = None, warm: Callable[[], Sequence[FrozenTrial]] | None = None,
    ) -> None:  # fmt: skip
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._points = fixed_points(spec, space)
        self._study = optuna.create_study(
            storage=storage, study_name=name, directions=list(directions), sampler=make_sampler(spec, 0),
            pruner=make_pruner(spec), load_if_exists=True,
        )  # fmt: skip
        self._storage = storage
        self._study_id = storage.get_study_id_from_name(name)
        if owner is not None:
            self._claim(owner)
        self._known = 0 if warm is None else self._warm_up(warm)
        self._drawn = storage.get_n_trials(self._study_id) - self._known
        self._space = space
        self._spec = spec

    def _claim(self, owner: str) -> None:
        """Two home folders may name their studies alike; in one database the second is refused."""
        found = self._study.user_attrs.get("owner")
        if found is None:
            self._study.set_user_attr("owner", owner)
        elif found != owner:
            raise InputError(
                f"search.storage: its study '{self._study.study_name}' belongs to another home folder or MLflow store; "
                "give the plan another name"
            )

    def _warm_up(self, warm: Callable[[], Sequence[FrozenTrial]]) -> int:
        """Copy the known trials in front of the own ones; a driver that was killed on the way is carried on."""
        known: int | None = self._study.user_attrs.get("warm_start")
        have = self._storage.get_n_trials(self._study_id)
        if known is None or have < known:
            trials = warm()
            known = len(trials)
            self._study.set_user_attr("warm_start", known)
            self._study.add_trials(trials[have:])
        return known

    def state(self, number: int) -> TrialState | None:
        """The trial's state in Optuna; None before it was drawn."""
        return self._frozen(number).state if number < self._drawn else None

    def draw(self, number: int) -> dict[str, Any]:
        """The parameters of trial `number`: read back if they were drawn before, drawn now otherwise.

        Numbers are drawn in order. A driver that was killed between two parameters left a trial with some of them; the
        missing ones are drawn now.
        """
        self._study.sampler = make_sampler(self._spec, number, self._points)
        if number >= self._drawn:
            trial = self._study.ask()
            assert trial.number - self._known == number == self._drawn, (trial.number, number, self._drawn)
            self._drawn += 1
            return self._space.suggest(trial)
        params = self._frozen(number).params
        try:
            return self._space.fit(params, whole=True)
        except SpaceError:
            return self._space.suggest(optuna.Trial(self._study, self._trial_id(number)))

    def report(self, number: int, step: int, value: float) -> bool:
        """Tell the value of an epoch; whether the trial is stopped there. Steps that were told before are not judged again.

        After an interruption epochs come a second time: a trial that was stopped is stopped at the same one.
        """
        frozen = self._frozen(number)
        if frozen.state.is_finished():
            return frozen.state == TrialState.PRUNED and step >= (frozen.last_step or 0)
        if not math.isfinite(value) or (frozen.last_step is not None and step < frozen.last_step):
            return False
        self._storage.set_trial_intermediate_value(frozen._trial_id, step, value)
        return self._study.pruner.prune(self._study, self._frozen(number))

    def tell(self, number: int, values: Sequence[float] | None, *, pruned: bool = False) -> None:
        """Record the result, None for a failure; a trial that was told before keeps its first result.

        `pruned`: it was stopped after the last epoch that was reported.
        """
        if not self._frozen(number).state.is_finished():
            state = TrialState.FAIL if values is None else TrialState.COMPLETE
            self._study.tell(
                self._known + number,
                None if values is None else list(values),
                state=TrialState.PRUNED if pruned else state,
            )

    def replicates(self, number: int, *, std: float, count: int) -> None:
        """Beside the value, which is a mean over seeds: their spread and how many there are."""
        if not self._frozen(number).state.is_finished():
            self._storage.set_trial_user_attr(self._trial_id(number), "replicates", {"std": std, "count": count})

    @property
    def spent(self) -> Mapping[str, float]:
        """Seconds by the clock (`wall`, of all cells; one cell's study has it) and of trials that ran (`trials`)."""
        return {"wall": 0.0, "trials": 0.0, **self._study.user_attrs.get("spent", {})}

    def spend(self, **seconds: float) -> None:
        """Add to what was spent."""
        spent = self.spent
        self._study.set_user_attr("spent", {key: spent[key] + seconds.get(key, 0.0) for key in spent})

    def _trial_id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, self._known + number)

    def _frozen(self, number: int) -> optuna.trial.FrozenTrial:
        return self._storage.get_trial(self._trial_id(number))
