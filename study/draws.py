"""One Optuna study per cell: draws that survive the driver, and results that may be told twice.

Optuna's journal is the memory of a search. Trial n is drawn by a sampler that was made for it alone, from the seed
(seed, n): a resumed search never replays the start-up draws, and one trial at a time it draws what an uninterrupted
search draws. A trial that was drawn but not told belongs to a driver that died; it is read back, never drawn again.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import TrialState

from features.errors import InputError
from search_spaces import Space
from study.jobs import Direction, SearchSpec

# Samplers whose draws depend on the seed and the told trials alone. True: the seed names one sequence that all trials
# share (scrambled Sobol points are only spread out within one scrambling), so it must not change from trial to trial.
SAMPLERS: Mapping[str, bool] = {
    "TPESampler": False,
    "RandomSampler": False,
    "GPSampler": False,
    "QMCSampler": True,
}
# Seconds after which a journal lock without progress counts as left behind by a driver that was killed mid-write. No
# write takes longer than milliseconds, and one driver at a time works on a study.
_STALE_LOCK_S = 3


def check_sampler(spec: SearchSpec) -> None:
    """Raise InputError for an unknown sampler or an argument that its constructor refuses."""
    make_sampler(spec, 0)


def make_sampler(spec: SearchSpec, number: int) -> optuna.samplers.BaseSampler:
    """The sampler of trial `number`, a function of the specification and that number."""
    if spec.sampler not in SAMPLERS:
        raise InputError(f"search.sampler: must be one of {', '.join(SAMPLERS)}, got {spec.sampler!r}")
    if "seed" in spec.sampler_args:
        raise InputError("search.sampler_args.seed: is set from search.seed; remove it here")
    words = [spec.seed] if SAMPLERS[spec.sampler] else [spec.seed, number]
    seed = int(np.random.SeedSequence(words).generate_state(1)[0])
    make: Callable[..., optuna.samplers.BaseSampler] = getattr(optuna.samplers, spec.sampler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return make(seed=seed, **spec.sampler_args)
    except (TypeError, ValueError) as error:
        raise InputError(f"search.sampler_args: {spec.sampler} refuses them: {error}") from error


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


class CellSearch:
    """The search of one cell, over its Optuna study; this process is the only one that draws from it."""

    def __init__(
        self, *, storage: BaseStorage, name: str, space: Space, spec: SearchSpec, direction: Direction
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(
            storage=storage, study_name=name, direction=direction, sampler=make_sampler(spec, 0), load_if_exists=True
        )
        self._storage = storage
        self._study_id = storage.get_study_id_from_name(name)
        self._drawn = storage.get_n_trials(self._study_id)
        self._space = space
        self._spec = spec

    def state(self, number: int) -> TrialState | None:
        """The trial's state in Optuna; None before it was drawn."""
        return self._frozen(number).state if number < self._drawn else None

    def draw(self, number: int) -> dict[str, Any]:
        """The parameters of trial `number`: read back if they were drawn before, drawn now otherwise.

        Numbers are drawn in order. A driver that was killed between two parameters left a trial with some of them; the
        missing ones are drawn now.
        """
        self._study.sampler = make_sampler(self._spec, number)
        if number >= self._drawn:
            trial = self._study.ask()
            assert trial.number == number == self._drawn, (trial.number, number, self._drawn)
            self._drawn += 1
            return self._space.suggest(trial)
        frozen = self._frozen(number)
        if frozen.state.is_finished():
            return dict(frozen.params)
        return self._space.suggest(optuna.Trial(self._study, self._trial_id(number)))

    def tell(self, number: int, value: float | None) -> None:
        """Record the result, None for a failure; a trial that was told before keeps its first result."""
        if not self._frozen(number).state.is_finished():
            state = TrialState.FAIL if value is None else TrialState.COMPLETE
            self._study.tell(number, value, state=state)

    def _trial_id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)

    def _frozen(self, number: int) -> optuna.trial.FrozenTrial:
        return self._storage.get_trial(self._trial_id(number))
