"""The runner: trains, tunes and scores every model, and keeps what it has learned. It owns what every model needs.

For each seed: torch's global random numbers (a seed gives the same alone and beside others), training and evaluation
mode, validation, the best epoch by the model's SELECTION, the end by the `epochs` and `patience` of its Config, and the
state from which training goes on after a kill. With `keep: last` in the Config nothing is selected: the training has
`epochs` epochs, and only the last one is measured and kept. What a model offers is described in `trainables.interface`.

Where one training serves both directions of a pair of domains (BOTH_DIRECTIONS), its epochs are measured on both ones'
validation users, and at its end, or where it is stopped, it leaves what the opposite training goes on from: those epochs,
the best of them, and the state. That one gives to the last bit what it gives alone. A training that goes on after a kill
leaves nothing, and one that finds nothing trains: what is left saves time, and nothing else depends on it.
"""

from __future__ import annotations

import math
import pickle
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from features.errors import InputError
from features.store.folders import atomic_file, save_torch
from features.store.tables import digest
from trainables.devices import OwnRandomness, on_cpu, on_device, seeded
from trainables.interface import Epoch, Model, Part, Place, Setup, Stage, load_model, make_config
from trainables.task_types import Measured, Predict, TaskType, task_type_at, task_type_of

LEFT = "left"  # folder beside the tasks: what a training leaves for the opposite direction
LEFT_BYTES = 4 * 2**30  # that it may hold: directions may try different configurations, and nobody asks for these


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a trial says after an epoch: means over its seeds; the last report holds the trial's result.

    One without metrics is no epoch: it is there for its state.
    """

    epoch: int
    metrics: dict[str, float]
    final: bool = False
    artifacts: dict[str, str | bytes] = field(default_factory=dict)
    state: Callable[[], dict[str, Any]] | None = None
    """Gives what `run` goes on from behind this report, as `torch.load(weights_only=True)` reads it. Its tensors may be the
    living ones: call it before the next report is asked for. None: the model cannot go on."""
    caught_up: bool = False
    """Behind epochs that were there already, which take no time: the next one has to be trained."""


def run(
    model: str,
    config: Mapping[str, Any],
    task_dir: str,
    seeds: Sequence[int],
    test_dir: str | None = None,
    rows: bool = False,
    state: Mapping[str, Any] | None = None,
    device: str = "cpu",
) -> Generator[Report]:
    """Train a configuration over its seeds in lockstep; the generator that a trial runs.

    `state` is that of a report of the same training, which then goes on behind that report. `device`: cpu | cuda. Close it
    where the trial is stopped.

    Metrics are means over seeds: `val_...` of the task type and the model's own. The final report adds `<metric>_std`,
    `<metric>/seed_<seed>`, `selected_epoch`, those of `Spent`, and, where `test_dir` is given, the same `test_...` and the
    artifact `per_user.csv`; then the seed that is best on validation is kept at `kept_at`. Its metrics are those of the
    selected epoch, `train_loss` is that of the last one. `rows`: also the artifact `val_per_user.csv`, for comparisons
    paired by user.
    """
    spent = Spent(state or {})
    trial = Trial.load(model, config, task_dir, test_dir, device)
    saved = state["seeds"] if state else [None] * len(seeds)
    trainings = [SeedTraining(trial, seed, before) for seed, before in zip(seeds, saved, strict=True)]
    number = state["epoch"] if state else 0
    while running := [training for training in trainings if training.result is None]:
        places = [training.advance() for training in running]
        if not any(places):
            continue  # all have ended without a further epoch
        staged = any(isinstance(place, Stage) for place in places)
        number += not staged
        if all(training.result for training in trainings):
            break
        metrics = {} if staged else _means([training.metrics for training in trainings])
        resumable = all(training.resumable for training in trainings)
        keep = partial(_state, number, spent, trainings) if resumable else None
        replayed = all(isinstance(place, Replayed) for place in places)
        caught_up = replayed and not all(training.replays for training in running)
        try:
            yield Report(epoch=number, metrics=metrics, state=keep, caught_up=caught_up)
        except GeneratorExit:
            for training in trainings:
                with suppress(Exception):  # an error here would take the place of what has stopped the trial
                    training.stop()
            raise
    yield _final_report(trial, number, spent, [training.result for training in trainings if training.result], rows)


def _state(number: int, spent: Spent, trainings: Sequence[SeedTraining]) -> dict[str, Any]:
    seeds = [training.state() for training in trainings]
    return {"epoch": number, **spent.metrics(), "seeds": seeds}


class Spent:
    """What a trial has taken: `seconds` by the clock, and `cpu_seconds` of all threads of its process."""

    def __init__(self, before: Mapping[str, Any]) -> None:
        """`before`: what `metrics` was when the trial was left, where it goes on."""
        self._clock = time.perf_counter() - before.get("seconds", 0.0)
        self._cpu = time.process_time() - before.get("cpu_seconds", 0.0)

    def metrics(self) -> dict[str, float]:
        return {"seconds": time.perf_counter() - self._clock, "cpu_seconds": time.process_time() - self._cpu}


# --- one seed -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What all seeds of a trial share."""

    name: str  # of the model's file
    model: Model
    config: Any
    task_dir: str
    task: Any
    task_type: TaskType
    test: Any | None  # held-out test users
    device: torch.device
    opposite: Path | None = None  # the task of the opposite direction, where this training serves it too

    @classmethod
    def load(
        cls, model: str, config: Mapping[str, Any], task_dir: str, test_dir: str | None, device: str
    ) -> Trial:  # fmt: skip
        """Open the task; InputError where the model does not take it, and for a faulty configuration."""
        opened, module = open_task(task_dir, device), load_model(model)
        task_type = task_type_of(opened)
        if task_type.name != module.TASK_TYPE:
            raise InputError(
                f"{task_dir}: its task is of type {task_type.name}, which model {model} does not take; change the model"
            )
        settings = make_config(model, config, f"config of {model}")
        test = task_type.load_held_out(Path(test_dir)).to(torch.device(device)) if test_dir is not None else None
        shared = module.BOTH_DIRECTIONS and getattr(settings, "keep", "best") != "last"
        return cls(
            name=model, model=module, config=settings, task_dir=task_dir, task=opened, task_type=task_type, test=test,
            device=torch.device(device), opposite=task_type.opposite(Path(task_dir)) if shared else None,
        )  # fmt: skip

    def left_at(self, task_dir: Path, seed: int) -> Path:
        """Return the file of what a training leaves for the opposite direction, whose task is named."""
        document = {
            "model": self.name, "version": self.model.VERSION, "config": asdict(self.config),
            "task": task_dir.parent.name, "seed": seed,
        }  # fmt: skip
        return task_dir.parent.parent / LEFT / f"{digest(document)[:16]}.pt"


@dataclass(frozen=True, kw_only=True)
class SeedResult:
    """What the training of one seed has given."""

    seed: int
    metrics: Mapping[str, float]  # of the selected epoch, `selected_epoch`, and those on test
    validation: Measured
    test: Measured | None
    packed: Mapping[str, Any] | None  # see `Epoch.pack`; None: not asked for, or the model cannot


@dataclass(frozen=True, kw_only=True)
class _Best:
    """The best epoch so far."""

    number: int
    metrics: Mapping[str, float]
    measured: Measured
    weights: Mapping[str, Tensor] | None  # copies of the network's; None: the model has no Setup
    epoch: Epoch | None = None  # None: it was measured before a kill


@dataclass
class _Opposite:
    """What is measured on the validation users of the opposite direction."""

    task_dir: Path
    task: Any
    epochs: list[dict[str, float]] = field(default_factory=list)
    best: _Best | None = None
    ended: bool = False  # whether its training would have ended after the last of the epochs


class Replayed:
    """An epoch that the training of the opposite direction has measured."""


class SeedTraining:
    """The training of one seed: one place of the model's `train` after the other, until its result is there."""

    def __init__(self, trial: Trial, seed: int, state: Mapping[str, Any] | None = None) -> None:
        self.seed = seed
        self.metrics: Mapping[str, float] = {}  # of the epoch that was measured last
        self.result: SeedResult | None = None
        self._trial = trial
        self._randomness = OwnRandomness(seed, trial.device)
        self._number = 0
        self._best: _Best | None = None
        self._epoch: Epoch | None = None
        self._setup: Setup | None = None
        left = trial.left_at(Path(trial.task_dir), seed) if state is None and trial.opposite is not None else None
        found = None if left is None else _read_left(left)
        self._left = left if found else None  # what the opposite training has left: nobody else has a use for it
        self._replay: deque[dict[str, float]] = deque(found["epochs"] if found else ())
        self._replay_ends = bool(found and found["ended"])
        self._opposite: _Opposite | None = None
        if trial.opposite is not None and state is None and not found:
            self._opposite = _Opposite(trial.opposite, open_task(str(trial.opposite), trial.device.type))
        self._state = found["state"] if found else state
        self._places = trial.model.train(trial.config, trial.task, seed)
        if state is not None and "result" in state:
            self.metrics, self.result = state["metrics"], _result_from(state["result"])

    @property
    def resumable(self) -> bool:
        """Whether `state` gives what training goes on from."""
        return self.result is not None or self._setup is not None

    @property
    def replays(self) -> bool:
        """Whether the next epoch is one that the opposite training has measured, and nothing has to be trained for it."""
        return len(self._replay) > (1 if self._replay_ends else 0)

    def advance(self) -> Stage | Epoch | Replayed | None:
        """Train to the next place; None where there is none. The last epoch gives the result."""
        if self._replay:
            self.metrics = self._replay.popleft()
            if not self._replay and self._replay_ends:
                self._conclude()
            return Replayed()
        place = self._next()
        if isinstance(place, Epoch):
            self._measure(place)
        elif place is None and self._epoch is None:
            self._train_again()
        elif place is None:
            self._finish()
        return place

    def stop(self) -> None:
        """Leave what the opposite training goes on from, behind the epochs that there are."""
        if self._opposite is not None and self._opposite.epochs:
            self._leave(self._opposite)

    def _next(self) -> Stage | Epoch | None:
        if self._setup is not None:
            self._setup.network.train()
        with self._randomness:
            place: Place | None = next(self._places, None)
        if isinstance(place, Setup):
            self._set_up(place)
            return self._next()
        return place

    def state(self) -> dict[str, Any]:
        """Return what `SeedTraining` goes on from: plain values and tensors on the CPU."""
        if self.result is not None:
            return {"metrics": dict(self.metrics), "result": _result_state(self.result)}
        return self._state_with(self.metrics, self._best)

    def _state_with(self, metrics: Mapping[str, float], best: _Best | None) -> dict[str, Any]:
        assert self._setup is not None
        kept = best and {
            "number": best.number, "metrics": dict(best.metrics), "weights": best.weights,
            "measured": _measured_state(best.measured),
        }  # fmt: skip
        parts = {name: _part_state(part) for name, part in self._setup.parts.items()}
        held = {"number": self._number, "metrics": dict(metrics), "best": kept, "parts": parts}
        return {**on_cpu(held), "rng": self._randomness.states}

    def _set_up(self, setup: Setup) -> None:
        """Move what training changes to the task's device, and go on from the state if there is one."""
        if self._setup is not None or self._number:
            raise RuntimeError(f"model {self._trial.name}: train yields a second Setup; yield one, before all else")
        self._setup = setup
        for part in setup.parts.values():
            if isinstance(part, torch.nn.Module):
                part.to(self._trial.device)
        state, self._state = self._state, None
        if state is None:
            return
        for name, part in setup.parts.items():
            _load_part(part, state["parts"][name], self._trial.device)
        self._randomness.load(state["rng"])
        self._number, self.metrics = state["number"], state["metrics"]
        if (best := state["best"]) is not None:
            self._best = _Best(
                number=best["number"], metrics=best["metrics"], measured=_measured_from(best["measured"]),
                weights=on_device(best["weights"], self._trial.device),
            )  # fmt: skip

    def _measure(self, epoch: Epoch) -> None:
        """Measure an epoch on the validation users; keep it if it is the best; end where it is the last.

        Where the last one is kept, no other is measured.
        """
        trial, self._number, self._epoch = self._trial, self._number + 1, epoch
        if getattr(trial.config, "keep", "best") == "last":
            self.metrics = {name: float(value) for name, value in epoch.metrics.items()}
            if self._number >= getattr(trial.config, "epochs", math.inf):
                self._finish()
            return
        self.metrics, self._best = self._measured(epoch, epoch.predict, trial.task, self._best)
        if epoch.turned is None:
            self._opposite = None
        elif (other := self._opposite) is not None and not other.ended:
            metrics, other.best = self._measured(epoch, epoch.turned, other.task, other.best)
            other.epochs.append(metrics)
            other.ended = self._over(other.best)
        if self._over(self._best):
            self._finish()

    def _over(self, best: _Best) -> bool:
        """Whether a training with this best epoch ends after the one that was measured last."""
        config = self._trial.config
        waited = self._number - best.number
        return self._number >= getattr(config, "epochs", math.inf) or waited >= getattr(config, "patience", math.inf)

    def _measured(
        self, epoch: Epoch, predict: Predict, task: Any, best: _Best | None
    ) -> tuple[dict[str, float], _Best]:  # fmt: skip
        """Return the metrics of an epoch on a task's validation users, and the best one after it."""
        trial, selection = self._trial, self._trial.model.SELECTION
        predicted = epoch.validation if task is trial.task else None
        with self._evaluating():
            measured, metrics = validate(predict, task, self.seed, predicted=predicted)
        metrics = {name: float(value) for name, value in {**metrics, **epoch.metrics}.items()}
        value = metrics.get(selection.metric)
        if value is None:
            raise InputError(
                f"{trial.task_dir}: its validation gives no {selection.metric}, which selects the epochs of "
                f"{trial.name}; choose from {', '.join(metrics)}"
            )
        if not math.isfinite(value):
            raise FloatingPointError(f"{selection.metric} is {value} in epoch {self._number}; lower lr")
        if best is None or selection.better(value, best.metrics[selection.metric]):
            weights = self._copied_weights()
            best = _Best(number=self._number, metrics=metrics, measured=measured, weights=weights, epoch=epoch)
        return metrics, best

    def _copied_weights(self) -> dict[str, Tensor] | None:
        if self._setup is None:
            return None
        return {name: value.clone() for name, value in self._setup.network.state_dict().items()}

    def _train_again(self) -> None:
        """Train from the start: the checkpoint was taken behind the last epoch, and only an Epoch can predict."""
        if self._number == 0:
            raise RuntimeError(f"model {self._trial.name}: train ends without an Epoch; yield one after each epoch")
        again = SeedTraining(self._trial, self.seed)
        while again.result is None:
            again.advance()
        self.result, self.metrics = again.result, again.metrics

    def _conclude(self) -> None:
        """Finish behind the replayed epochs. Another one is trained, but not measured: only an Epoch can predict."""
        place = self._next()
        while isinstance(place, Stage):
            place = self._next()
        self._epoch = place
        self._finish()

    def _leave(self, other: _Opposite) -> None:
        """Write what the opposite training goes on from. Where that fails, it costs the file, not the training.

        The disk may be full, or another study of the home may have begun or ended, and taken the folder away.
        """
        path = self._trial.left_at(other.task_dir, self.seed)
        left = {"epochs": other.epochs, "ended": other.ended, "state": self._state_with(other.epochs[-1], other.best)}
        with suppress(OSError, RuntimeError):  # torch's own, where the folder is gone
            path.parent.mkdir(exist_ok=True)
            with atomic_file(path) as beside:
                save_torch(left, beside)
            _keep_newest(path.parent, LEFT_BYTES)

    def _finish(self) -> None:
        """Put the best epoch's weights back, score the test users, and let go of all else."""
        trial = self._trial
        if self._best is None:
            assert self._epoch is not None
            self.metrics, self._best = self._measured(self._epoch, self._epoch.predict, trial.task, None)
        if self._opposite is not None:
            self._leave(self._opposite)
        best = self._best
        assert best is not None
        epoch = best.epoch or self._epoch
        assert epoch is not None
        if self._setup is not None:
            assert best.weights is not None
            self._setup.network.load_state_dict(best.weights)
        metrics = {**best.metrics, "selected_epoch": float(best.number)}
        metrics |= {name: value for name, value in self.metrics.items() if name == "train_loss"}
        self.metrics = {name: metrics[name] for name in best.metrics}
        test = packed = None
        if trial.test is not None:
            with self._evaluating():
                test, scores = score(epoch.predict, trial.test, trial.task, self.seed)
                packed = on_cpu(epoch.pack()) if epoch.pack is not None else None
            metrics |= scores
        self.result = SeedResult(seed=self.seed, metrics=metrics, validation=best.measured, test=test, packed=packed)
        self._places.close()
        self._setup = self._epoch = self._best = self._opposite = None
        if self._left is not None:
            self._left.unlink(missing_ok=True)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Evaluation mode without gradients; what is drawn within it changes nothing of the training."""
        if self._setup is not None:
            self._setup.network.eval()
        with torch.no_grad(), seeded(self.seed, self._trial.device):
            yield


def validate(
    predict: Predict, task: Any, seed: int, *, full: bool = False, predicted: Tensor | None = None
) -> tuple[Measured, dict[str, float]]:
    """Return what each validation user contributes, and the `val_...` metrics.

    `predicted`: predictions in the place of `predict`'s. `full` adds what is expensive to measure: the full ranking of
    sequences.
    """
    measured = task_type_of(task).measure(task.validation, predict, task, seed, full=full, predicted=predicted)
    return measured, {f"val_{name}": value for name, value in measured.metrics.items()}


def score(predict: Predict, test: Any, task: Any, seed: int) -> tuple[Measured, dict[str, float]]:
    """Return what each test user contributes, and the `test_...` metrics."""
    measured = task_type_of(task).measure(test, predict, task, seed, full=True)
    return measured, {f"test_{name}": value for name, value in measured.metrics.items()}


# --- states -------------------------------------------------------------------------------------------------------


def _keep_newest(folder: Path, most: int) -> None:
    """Delete the oldest files of what trainings leave where all together are larger than that."""
    files = sorted(folder.glob("*.pt"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path, size in zip(files, accumulate(path.stat().st_size for path in files), strict=True):
        if size > most:
            path.unlink(missing_ok=True)


def _read_left(path: Path) -> dict[str, Any] | None:
    """Return what `SeedTraining` has left for the opposite direction; None where it has not, or what cannot be read."""
    try:
        left: dict[str, Any] = torch.load(path, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
        return None
    return left


def _part_state(part: Part) -> Any:
    if isinstance(part, torch.Generator):
        return part.get_state()
    if isinstance(part, np.random.Generator):
        return part.bit_generator.state
    return part if isinstance(part, dict) else part.state_dict()


def _load_part(part: Part, state: Any, device: torch.device) -> None:
    if isinstance(part, torch.Generator):
        part.set_state(state)
    elif isinstance(part, np.random.Generator):
        part.bit_generator.state = state
    elif isinstance(part, dict):
        part.clear()
        part.update(on_device(state, device))
    else:
        part.load_state_dict(state)


def _measured_state(measured: Measured) -> dict[str, Any]:
    """Numbers as tensors, and text as a list: what `torch.load(weights_only=True)` reads."""
    columns = {
        name: values.tolist() if values.dtype.kind == "U" else torch.tensor(values)
        for name, values in measured.columns.items()
    }
    return {"columns": columns, "metrics": dict(measured.metrics)}


def _measured_from(state: Mapping[str, Any]) -> Measured:
    columns = {
        name: np.array(values) if isinstance(values, list) else values.numpy()
        for name, values in state["columns"].items()
    }
    return Measured(columns, state["metrics"])


def _result_state(result: SeedResult) -> dict[str, Any]:
    return {
        "seed": result.seed, "metrics": dict(result.metrics), "validation": _measured_state(result.validation),
        "test": result.test and _measured_state(result.test), "packed": result.packed,
    }  # fmt: skip


def _result_from(state: Mapping[str, Any]) -> SeedResult:
    return SeedResult(
        seed=state["seed"], metrics=state["metrics"], validation=_measured_from(state["validation"]),
        test=state["test"] and _measured_from(state["test"]), packed=state["packed"],
    )  # fmt: skip


# --- results ------------------------------------------------------------------------------------------------------


def _final_report(trial: Trial, number: int, spent: Spent, results: Sequence[SeedResult], rows: bool) -> Report:
    """Means over the seeds, each seed's numbers, what each user contributes; keeps the best seed's model."""
    metrics = _means([result.metrics for result in results])
    for name in results[0].metrics:
        values = [result.metrics[name] for result in results]
        metrics[f"{name}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        metrics |= {f"{name}/seed_{result.seed}": result.metrics[name] for result in results}
    metrics |= spent.metrics()
    artifacts: dict[str, str | bytes] = {}
    if trial.test is not None:
        artifacts["per_user.csv"] = per_user_csv({result.seed: result.test for result in results if result.test})
        _keep(trial, results)
    if rows:
        artifacts["val_per_user.csv"] = per_user_csv({result.seed: result.validation for result in results})
    return Report(epoch=number, metrics=metrics, final=True, artifacts=artifacts)


def per_user_csv(measured: Mapping[int, Measured]) -> str:
    """Return column seed, then those of the task type, see `trainables.task_types`."""
    frames = [pd.DataFrame({"seed": seed, **one.columns}) for seed, one in measured.items()]
    return pd.concat(frames).to_csv(index=False, float_format="%.9g", lineterminator="\n")


def _means(measured: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([entry[name] for entry in measured])) for name in measured[0]}


def kept_at(model: str, config: Mapping[str, Any], task_dir: str, seeds: Sequence[int]) -> Path:
    """Return the file of the model that scoring leaves: beside the tasks, named by all that it depends on."""
    settings = make_config(model, config, f"config of {model}")
    document = {"model": model, "config": asdict(settings), "task": Path(task_dir).parent.name, "seeds": list(seeds)}
    return Path(task_dir).parent.parent / "models" / f"{digest(document)[:16]}.pt"


def _keep(trial: Trial, results: Sequence[SeedResult]) -> None:
    """Write the seed with the best validation metric, the first of equals; a model that cannot be packed leaves nothing."""
    selection = trial.model.SELECTION
    best = min(results, key=lambda result: selection.sign * result.metrics[selection.metric])
    if best.packed is None:
        return
    config = asdict(trial.config)
    path = kept_at(trial.name, config, trial.task_dir, [result.seed for result in results])
    path.parent.mkdir(exist_ok=True)
    document = {
        "model": trial.name, "version": trial.model.VERSION, "config": config, "seed": best.seed, "state": best.packed,
        "limits": list(trial.task_type.limits(trial.task)),
    }  # fmt: skip
    with atomic_file(path) as beside:
        save_torch(document, beside)


# --- tasks, baselines, what trials share --------------------------------------------------------------------------


@lru_cache(maxsize=4)
def open_task(task_dir: str, device: str = "cpu") -> Any:
    """Open a task; tasks stay open in a worker process, and its trials share the arrays."""
    return task_type_at(Path(task_dir)).load_task(Path(task_dir)).to(torch.device(device))


def run_baseline(
    model: str,
    config: Mapping[str, Any],
    task_dir: str,
    seeds: Sequence[int],
    test_dir: str | None = None,
    rows: bool = False,
    device: str = "cpu",
) -> Generator[Report]:
    """Measure a simple baseline in the place of a model: `config` is `{"baseline": name}`; nothing is trained.

    `model` and `device` are not read: a baseline is computed on the CPU.
    """
    spent = Spent({})
    task = open_task(task_dir)
    task_type = task_type_of(task)
    predict = task_type.as_predict(config["baseline"])
    (seed,) = seeds
    validation, metrics = validate(predict, task, seed)
    artifacts: dict[str, str | bytes] = {"val_per_user.csv": per_user_csv({seed: validation})} if rows else {}
    if test_dir is not None:
        measured, scores = score(predict, task_type.load_held_out(Path(test_dir)), task, seed)
        metrics |= scores
        artifacts["per_user.csv"] = per_user_csv({seed: measured})
    yield Report(epoch=0, metrics={**metrics, **spent.metrics()}, final=True, artifacts=artifacts)


def has_shared(model: str) -> bool:
    """Whether the model's trials share something that can be made ahead of them."""
    return load_model(model).prepare is not None


def prepare(
    model: str, config: Mapping[str, Any], task_dir: str, seeds: Sequence[int], device: str = "cpu"
) -> None:  # fmt: skip
    """Make what trials of this configuration and these seeds share, see `has_shared`."""
    make = load_model(model).prepare
    assert make is not None
    make(make_config(model, config, f"config of {model}"), open_task(task_dir, device), seeds)


def shared(model: str, config: Mapping[str, Any], task_dir: str, seeds: Sequence[int]) -> list[Path]:
    """Return the folders that `prepare` makes, made or not, relative to the folder of all tasks."""
    name_folders = load_model(model).shared
    if name_folders is None:
        return []
    folders: list[Path] = name_folders(make_config(model, config, f"config of {model}"), open_task(task_dir), seeds)
    return folders
