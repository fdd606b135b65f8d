"""Print every metric of every finished trial of a store to the last bit, so that two versions of the code can be compared.

    python tests/stress/dump_metrics.py before/mlflow.db quickstart > before.txt
    python tests/stress/dump_metrics.py after/mlflow.db quickstart > after.txt
    diff before.txt after.txt

A line is `part cell row name metric value`, the value as `float.hex`. Times are left out. `row` is the model of the trial,
or the simple baseline, so that stores of before there were rows give the same lines.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import yaml
from mlflow import MlflowClient
from mlflow.entities import Run

OLD_BASELINE = "predictor:"


def lines(store: Path, experiment: str) -> Iterator[str]:
    """Lines of all finished trials, sorted."""
    client = MlflowClient(f"sqlite:///{store.absolute()}")
    found = client.get_experiment_by_name(experiment)
    assert found is not None, f"{store} holds no experiment {experiment}"
    runs = client.search_runs([found.experiment_id], "attributes.status = 'FINISHED'", max_results=5000)
    trials = [run for run in runs if "study.cell" in run.data.tags and "study.superseded" not in run.data.tags]
    for run in sorted(trials, key=place):
        for name, value in sorted(run.data.metrics.items()):
            if "seconds" not in name and not name.startswith("epoch/"):
                yield " ".join([*place(run), name, float(value).hex()])


def place(run: Run) -> tuple[str, str, str, str]:
    """Part, cell, row and name of a trial, as they are called today."""
    tags = run.data.tags
    part, cell, name = tags["study.part"], tags["study.cell"], tags["study.trial"].split("/")[-1]
    if "study.row" in tags:
        return part, cell, tags["study.row"], name
    if part == "sweep:ratio":
        part, name = f"sweep:{ratio(run)}", name.replace("ratio=", f"{ratio(run)}=")
    if name.startswith(OLD_BASELINE):
        baseline = name.removeprefix(OLD_BASELINE)
        return part, cell, baseline, "test" if part == "score" else f"{ratio(run)}={float(tags['study.ratio'])}"
    return part, cell, model(run), "test" if part == "score" else name


def ratio(run: Run) -> str:
    """What the cells' ratio is called today."""
    return "overlap_ratio" if model(run) == "lgcd" or "item_knn" in run.data.tags["study.trial"] else "cold_ratio"


def model(run: Run) -> str:
    """The model, as the trial's configuration says it."""
    path = Path(run.info.artifact_uri.removeprefix("file://")) / "config.yaml"
    return str(yaml.safe_load(path.read_text())["model"])


if __name__ == "__main__":
    for line in lines(Path(sys.argv[1]), sys.argv[2]):
        print(line)
