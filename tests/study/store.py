"""A small MLflow store with runs as the engine logs them: what the tests of figures, tables and report read."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from study.labels import Labels, RowLabels, labels_of
from study.specs import BASELINE

CELLS = (("books->movies", 0.2), ("books->movies", 0.5), ("movies->books", 0.2), ("movies->books", 0.5))
STEPS = (2, 5, 10, 20, 50)
ACTIVATIONS = ("tanh", "relu", "softmax")
MUSIC = labels_of("music")
RIVALS = {"emcdr": "EMCDR", "cmf": "CMF", "sasrec": "SASRec", "unicdr": "UniCDR"}  # row -> what papers call it
CONFIG: dict[str, Any] = {"steps": 10, "lr": 0.001, "dropout": 0.1, "beta": 0.4, "activation": "tanh"}


def with_rivals(labels: Labels, *rows: RowLabels) -> Labels:
    """Return the labels of a study that has these rows beside its subject."""
    return replace(labels, rows={labels.model: labels.subject, **{row.row: row for row in rows}})


def rival(row: str, reads: str = "ids", *, name: str = "", note: str = "", system: str = "") -> RowLabels:
    """Return what a study says of a rival, which papers call `system`."""
    system = system or RIVALS[row]
    return RowLabels(row=row, model=row, name=name or system, paper_name=system, reads=reads, note=note)


@dataclass(frozen=True)
class Store:
    """A sqlite store in a folder, and a way to add runs to its one experiment.

    A run is of the subject, unless `add` names another row: a rival of `RIVALS`, or a simple baseline.
    """

    uri: str
    experiment: str
    experiment_id: str
    client: MlflowClient
    model: str = "music"

    def add(
        self,
        part: str,
        task: str,
        ratio: float,
        name: str,
        metrics: Mapping[str, float],
        *,
        row: str = "",
        config: Mapping[str, Any] = CONFIG,
        variant: str = "",
        status: str = "FINISHED",
        tags: Mapping[str, str] = {},
        artifacts: Mapping[str, str] = {},
        epochs: Mapping[str, Sequence[float]] = {},
    ) -> str:
        """Log one trial run; returns its id."""
        cell, row = f"{task}@{ratio:g}", row or self.model
        source, target = task.split("->")
        ours = {
            "part": part,
            "cell": cell,
            "task": task,
            "ratio": f"{ratio:g}",
            "row": row,
            "model": row if row == self.model or row in RIVALS else BASELINE,
            "trial": f"{part}/{cell}/{row}/{name}",
            "variant": variant,
            "simulated": "true",
            "data_key": "d" * 12,
            "feature_key": "f" * 12,
            "commit": "0123abc",
            "versions": "torch 2.13",
            "device": "cpu",
        }
        params = {**config, "task": task, "source": source, "target": target, "ratio": ratio, "seeds": "0,1,2"}
        run = self.client.create_run(
            self.experiment_id,
            run_name=f"{part} {cell} {row} {name}",
            tags={f"study.{key}": value for key, value in ours.items()} | dict(tags),
        )
        series = [
            Metric(f"epoch/{key}", value, 0, step)
            for key, values in epochs.items()
            for step, value in enumerate(values)
        ]
        self.client.log_batch(
            run.info.run_id,
            metrics=[Metric(key, value, 0, 0) for key, value in metrics.items()] + series,
            params=[Param(key, str(value)) for key, value in params.items()],
            tags=[RunTag("study.command", f"study rerun {run.info.run_id}")],
        )
        files = {"config.yaml": yaml.safe_dump({"model": ours["model"], "config": dict(config), "cell": cell})}
        for path, text in {**files, **artifacts}.items():
            self.client.log_text(run.info.run_id, text, path)
        if status != "RUNNING":
            self.client.set_terminated(run.info.run_id, status)
        return str(run.info.run_id)

    def add_data(self, cells: Sequence[tuple[str, float]] = CELLS) -> str:
        """Log the part "data": manifests of both domains, counts of the cells."""
        names = sorted(cells[0][0].split("->"))
        domains = [
            {
                "name": name,
                "key": "k" * 12,
                "simulated": True,
                "rating_scale": [1.0, 5.0],
                "duplicates": {"rule": "mean", "rows": 3},
                "counts": [
                    {"step": "read", "interactions": 9000, "users": 500, "items": 120},
                    {"step": "filters", "interactions": ratings, "users": users, "items": 100},
                ],
            }
            for name, users, ratings in zip(names, (400, 300), (8000, 6000), strict=True)
        ]
        counts = [
            {
                "source": task.split("->")[0],
                "target": task.split("->")[1],
                "ratio": ratio,
                "overlapping": 150,
                "train_users": 150 - int(150 * ratio),
                "test_users": int(150 * ratio),
            }
            for task, ratio in cells
        ]
        way = {
            "study.store": "",
            "study.plan": "/my/tiny.yaml --home /runs",
            "study.data": "--data '/raw files'",
        }
        run = self.client.create_run(self.experiment_id, tags={"study.part": "data", "study.trial": "data", **way})
        self.client.log_text(run.info.run_id, json.dumps(domains), "domains.json")
        self.client.log_text(run.info.run_id, json.dumps(counts), "cells.json")
        self.client.set_terminated(run.info.run_id)
        return str(run.info.run_id)


@cache
def _blank_database() -> bytes:
    """MLflow's tables without a row; making them takes seconds, copying them nothing."""
    with tempfile.TemporaryDirectory() as folder:
        MlflowClient(f"sqlite:///{folder}/mlflow.db").search_experiments()
        return (Path(folder) / "mlflow.db").read_bytes()


def empty_store(folder: Path, experiment: str = "tiny", model: str = "music") -> Store:
    """A new store in `folder` with an experiment and no run."""
    (folder / "mlflow.db").write_bytes(_blank_database())
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    client = MlflowClient(uri)
    made = client.create_experiment(experiment, artifact_location=str(folder / "artifacts"))
    return Store(uri, experiment, made, client, model)


def with_seeds(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Mean, spread and one metric per seed, named as a trial logs them."""
    metrics: dict[str, float] = {}
    for name, per_seed in values.items():
        metrics[name] = float(np.mean(per_seed))
        metrics[f"{name}_std"] = float(np.std(per_seed))
        metrics |= {f"{name}/seed_{seed}": value for seed, value in enumerate(per_seed)}
    return metrics


def per_user(users: int, sigma: float, seeds: Sequence[int], draw: int) -> pd.DataFrame:
    """A `per_user.csv` whose errors have the standard deviation `sigma`; the same users and counts for every `draw`."""
    counts = np.random.default_rng(99).integers(5, 30, size=users)
    rng = np.random.default_rng(draw)
    rows = []
    for seed in seeds:
        for user, n in enumerate(counts):
            error = rng.normal(0, sigma, n)
            ndcg = float(np.clip(rng.normal(0.97 - 0.05 * sigma, 0.02), 0, 1))
            rows.append((seed, f"u{user:04d}", n, np.abs(error).sum(), np.square(error).sum(), ndcg))
    return pd.DataFrame(rows, columns=["seed", "user", "n", "sum_abs_error", "sum_squared_error", "ndcg20"])


def pooled(frame: pd.DataFrame) -> dict[str, float]:
    """Slow reference: test metrics of a `per_user.csv`, pooled over ratings per seed, averaged over seeds."""
    per_seed = []
    for _, rows in frame.groupby("seed"):
        n = rows["n"].sum()
        per_seed.append(
            (rows["sum_abs_error"].sum() / n, (rows["sum_squared_error"].sum() / n) ** 0.5, rows["ndcg20"].mean())
        )
    mae, rmse, ndcg = np.mean(per_seed, axis=0)
    return {"test_mae": float(mae), "test_rmse": float(rmse), "test_ndcg20": float(ndcg)}


def seeds_around(rng: np.random.Generator, rmse: float) -> dict[str, float]:
    """Validation metrics of three seeds around an RMSE."""
    draws = rmse + rng.normal(0, 0.004, 3)
    return with_seeds({"val_rmse": draws, "val_mae": draws * 0.77, "val_ndcg20": 1.04 - 0.1 * draws})


def validation_rows(rmse: float, draw: int) -> dict[str, str]:
    """Artifact with the rows of 30 validation users over three seeds."""
    return {"val_per_user.csv": per_user(30, rmse, [0, 1, 2], draw).to_csv(index=False)}


def fill_search(store: Store, trials: int = 12) -> None:
    """Search trials whose RMSE falls with lr towards 1e-3 and hardly moves with the rest; the best is tagged."""
    for c, (task, ratio) in enumerate(CELLS):
        rng = np.random.default_rng(c)
        made = []
        for t in range(trials):
            config = {
                "steps": int(rng.choice(STEPS)),
                "lr": float(10 ** rng.uniform(-5, -3)),
                "dropout": float(rng.uniform(0.1, 0.5)),
                "beta": 0.4,
                "activation": str(rng.choice(ACTIVATIONS)),
            }
            rmse = (
                0.92 + 0.05 * c * ratio - 0.06 * (np.log10(config["lr"]) + 3) + 0.02 * (config["activation"] != "tanh")
            )
            metrics = {**seeds_around(rng, float(rmse)), "seconds": 5.0 + config["steps"]}
            curve = [metrics["val_rmse"] + 0.5 * np.exp(-e / 3) for e in range(15)]
            made.append(
                (
                    metrics["val_rmse"],
                    store.add("search", task, ratio, f"{t:04d}", metrics, config=config, epochs={"val_rmse": curve}),
                )
            )
        store.client.set_tag(min(made)[1], "study.best", "true")


def fill_sweeps(store: Store) -> None:
    """RMSE over T with an optimum at 10, and tanh < relu < softmax."""
    for c, (task, ratio) in enumerate(CELLS):
        rng = np.random.default_rng(10 + c)
        level = 0.88 + 0.03 * c
        for steps in STEPS:
            rmse = level + 0.03 * abs(np.log(steps / 10))
            metrics = seeds_around(rng, rmse)
            store.add(
                "sweep:steps",
                task,
                ratio,
                f"steps={steps}",
                metrics,
                config={**CONFIG, "steps": steps},
                variant=str(steps),
                artifacts=validation_rows(rmse, c),
            )
        for worse, activation in enumerate(ACTIVATIONS):
            rmse = level + 0.02 * worse
            config, name, rows = (
                {**CONFIG, "activation": activation},
                f"activation={activation}",
                validation_rows(rmse, c),
            )
            metrics = seeds_around(rng, rmse)
            store.add("sweep:activation", task, ratio, name, metrics, config=config, variant=activation, artifacts=rows)


def fill_rest(store: Store, users: int = 80) -> None:
    """Ablations, baselines and scores; the model's errors are the smallest."""
    for c, (task, ratio) in enumerate(CELLS):
        rng = np.random.default_rng(20 + c)
        for worse, name in ((0.0, "full"), (0.02, "wo_side"), (0.05, "wo_diffusion")):
            metrics, rows = seeds_around(rng, 0.9 + worse), validation_rows(0.9 + worse, c)
            store.add("ablate", task, ratio, name, metrics, variant=name, artifacts=rows)
        for draw, (name, sigma) in enumerate((("global_mean", 1.2), ("item_mean", 1.05), ("source_offset", 0.95))):
            frame = per_user(users, sigma, [-1], 100 * c + draw)
            metrics = {**pooled(frame), "val_rmse": sigma, "val_mae": sigma * 0.8, "val_ndcg20": 0.93}
            metrics |= {"test_cold_item_rmse": sigma + 0.1, "test_cold_item_mae": sigma, "test_cold_item_n": 40.0}
            store.add(
                "score",
                task,
                ratio,
                "test",
                metrics,
                row=name,
                artifacts={"per_user.csv": frame.to_csv(index=False)},
            )
        frame = per_user(users, 0.9, [0, 1, 2], 100 * c + 50)
        metrics = {**seeds_around(rng, 0.9), **pooled(frame)}
        metrics |= {"test_cold_item_rmse": 1.0, "test_cold_item_mae": 0.8, "test_cold_item_n": 40.0}
        store.add("score", task, ratio, "test", metrics, artifacts={"per_user.csv": frame.to_csv(index=False)})


def full_store(folder: Path) -> Store:
    """A finished study of four cells with every part, one failed and one running trial."""
    store = empty_store(folder)
    store.add_data()
    fill_search(store)
    fill_sweeps(store)
    fill_rest(store)
    task, ratio = CELLS[0]
    store.add("search", task, ratio, "0012", {}, status="FAILED", tags={"study.error": "loss is NaN in epoch 3"})
    store.add("search", task, ratio, "0013", {}, status="RUNNING")
    return store
