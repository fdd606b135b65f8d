"""A logged trial trained again, in this process, from its logged configuration alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from features.errors import InputError
from study.engine.worker import reset, resolve
from study.provenance import commit, device, versions
from study.specs import Resources
from study.study import RUN, RUN_BASELINE, named_uri, store_uri
from study.tracking import runs as tracking
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


def rerun(run_id: str, home: Path) -> Rerun:
    """Train the trial `run_id` of the store in `home`, with as many threads as it had.

    Raises InputError where the store, the run's result, its configuration or its task is not there.
    """
    if named_uri() is None and not (home / "mlflow.db").is_file():
        raise InputError(
            f"{home}: holds no MLflow store; name the study's home folder with --home, or its server in MLFLOW_TRACKING_URI"
        )
    client = tracking.connect(store_uri(home))
    document = read_config(client.tracking_uri, run_id)
    for folder in filter(None, (document["task_dir"], document["test_dir"])):
        if not Path(folder).is_dir():
            raise InputError(f"run {run_id}: its task folder {folder} is gone; run `study extract` on its plan")
    run = client.get_run(run_id)
    if run.info.status != tracking.FINISHED:
        raise InputError(f"run {run_id}: is {run.info.status} and has no result; name a trial that is FINISHED")
    # Which function to call is not taken from the store: whoever can write there could name any.
    door = resolve(RUN_BASELINE if document["model"] == "baseline" else RUN)
    before = torch.get_num_threads()
    reset(Resources(cpus=float(run.data.tags.get("study.cpus", 1))).threads)
    try:
        *_, last = door(
            document["model"], document["config"], document["task_dir"], document["seeds"],
            test_dir=document["test_dir"],
        )  # fmt: skip
    finally:
        torch.set_num_threads(before)
    logged = {name: value for name, value in run.data.metrics.items() if not name.startswith("epoch/")}
    names = [name for name in {**last.metrics, **logged} if "seconds" not in name]
    metrics = [(name, logged.get(name, math.nan), last.metrics.get(name, math.nan)) for name in names]
    found = Rerun(metrics=tuple(metrics), differences=())
    return found if found.same else Rerun(metrics=found.metrics, differences=tuple(_differences(run.data.tags)))


def _differences(tags: Mapping[str, str]) -> Iterator[str]:
    """What the run's tags say of the code, the packages and the machine, against what is so here."""
    for name, now in (("commit", commit()), ("device", device())):
        logged = tags.get(f"study.{name}", "not logged")
        if logged != now:
            yield f"{name}: {logged} then, {now} now"
    was, is_ = (
        dict(each.partition("=")[::2] for each in text.split()) for text in (tags.get("study.versions", ""), versions())
    )
    for name in sorted(was.keys() | is_.keys()):
        if was.get(name) != is_.get(name):
            yield f"{name}: {was.get(name, 'not logged')} then, {is_.get(name, 'not there')} now"
