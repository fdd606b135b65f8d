"""A logged trial trained again, in this process, from its logged configuration alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from features.errors import InputError
from study import tracking
from study.flow import named_uri, store_uri
from study.results import read_config
from study.worker import resolve


def rerun(run_id: str, home: Path) -> Iterator[tuple[str, float, float]]:
    """Train the trial `run_id` of the store in `home`; yields (metric, logged, now) of every final metric."""
    if named_uri() is None and not (home / "mlflow.db").is_file():
        raise InputError(f"{home}: holds no MLflow store; name the home folder of the study with --home")
    client = tracking.connect(store_uri(home))
    document = read_config(client.tracking_uri, run_id)
    for folder in filter(None, (document["task_dir"], document["test_dir"])):
        if not Path(folder).is_dir():
            raise InputError(f"run {run_id}: its task folder {folder} is gone; run `study extract` on its plan")
    torch.set_num_threads(1)
    logged = client.get_run(run_id).data.metrics
    door = resolve("trainables.door:run_predictor" if document["model"] == "predictor" else "trainables.door:run")
    *_, last = door(
        document["model"], document["config"], document["task_dir"], document["seeds"], test_dir=document["test_dir"]
    )
    for name, value in last.metrics.items():
        if name in logged and "seconds" not in name:  # times differ
            yield name, logged[name], value
