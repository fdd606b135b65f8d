"""A logged trial trained again, in this process, from its logged configuration alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from features.errors import InputError
from study.engine.worker import reset, resolve
from study.home import Home
from study.provenance import commit, device, versions
from study.specs import BASELINE, Resources
from study.study import RUN, RUN_BASELINE, named_uri, store_uri
from study.tracking import runs as tracking
from study.tracking import tags
from study.tracking.results import read_config


@dataclass(frozen=True, kw_only=True)
class Rerun:
    """What training again gave."""

    metrics: tuple[tuple[str, float, float], ...]
    """(name, logged, now) of every final metric but times; not a number where only one side has it."""
    differences: tuple[str, ...]
    """Where the numbers are not the same to the last bit: what else is not as when they were logged, a line each."""

    @property
    def same(self) -> bool:
        """Whether every metric is the logged one to the last bit; what was not a number is the same if it is none now."""
        return all(logged == now or (math.isnan(logged) and math.isnan(now)) for _, logged, now in self.metrics)


def rerun(run_id: str, home: Home) -> Rerun:
    """Train the trial `run_id` of the store in `home` again, of whatever row, with the resources that it had.

    Raises InputError where the store, the run's result, its configuration, its task or the GPU that it needs is not there.
    """
    if named_uri() is None and not home.database.is_file():
        raise InputError(
            f"{home}: holds no MLflow store; name the study's home folder with --home, or its server in MLFLOW_TRACKING_URI"
        )
    client = tracking.connect(store_uri(home))
    document = read_config(client.tracking_uri, run_id)
    if lacking := [name for name in ("model", "config", "seeds", "task_dir", "test_dir") if name not in document]:
        raise InputError(f"run {run_id}: its config.yaml has no {', '.join(lacking)}; name a trial of a study")
    task_dir, test_dir = (home.task_folder(at) if (at := document[name]) else None for name in ("task_dir", "test_dir"))
    for folder in filter(None, (task_dir, test_dir)):
        if not Path(folder).is_dir():
            raise InputError(f"run {run_id}: its task folder {folder} is gone; run `study extract` on its plan")
    run = client.get_run(run_id)
    if run.info.status != tracking.FINISHED:
        raise InputError(f"run {run_id}: is {run.info.status} and has no result; name a trial that is FINISHED")
    gpus = float(run.data.tags.get(tags.GPUS, 0))
    if gpus > 0 and not torch.cuda.is_available():
        raise InputError(f"run {run_id}: was trained on a GPU, and this machine has none; rerun it where there is one")
    # Which function to call is not taken from the store: whoever can write there could name any.
    train = resolve(RUN_BASELINE if document["model"] == BASELINE else RUN)
    before = torch.get_num_threads()
    reset(Resources(cpus=float(run.data.tags.get(tags.CPUS, 1))).threads)
    try:
        *_, last = train(
            document["model"], document["config"], task_dir, document["seeds"],
            test_dir=test_dir, **({"device": "cuda"} if gpus > 0 else {}),
        )  # fmt: skip
    finally:
        torch.set_num_threads(before)
    logged = {name: value for name, value in run.data.metrics.items() if not name.startswith("epoch/")}
    names = [name for name in {**last.metrics, **logged} if "seconds" not in name]
    metrics = [(name, logged.get(name, math.nan), last.metrics.get(name, math.nan)) for name in names]
    result = Rerun(metrics=tuple(metrics), differences=())
    return result if result.same else Rerun(metrics=result.metrics, differences=tuple(_differences(run.data.tags)))


def _differences(logged: Mapping[str, str]) -> Iterator[str]:
    """Yield what the run's tags say of the code, the packages and the machine where it is other than here."""
    on_gpu = float(logged.get(tags.GPUS, 0)) > 0 and logged.get(tags.MODEL) != BASELINE
    machine = device("cuda" if on_gpu else "cpu")
    for name, tag, now in (("commit", tags.COMMIT, commit()), ("device", tags.DEVICE, machine)):
        then = logged.get(tag, "not logged")
        if then != now:
            yield f"{name}: {then} then, {now} now"
    before, after = _packages(logged.get(tags.VERSIONS, "")), _packages(versions())
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            yield f"{name}: {before.get(name, 'not logged')} then, {after.get(name, 'not there')} now"


def _packages(text: str) -> dict[str, str]:
    """Package -> version, of `torch=2.13 ray=2.55`."""
    return dict(package.partition("=")[::2] for package in text.split())
