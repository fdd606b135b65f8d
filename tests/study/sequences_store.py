"""A small MLflow store of a study of sequences, as the engine logs one: food and kitchen, both directions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from study.labels import labels_of
from trainables.task_types import SEQUENCES

from .store import Store, empty_store, rival, with_rivals, with_seeds

LGCD = labels_of("lgcd", "lgcd/food-kitchen")
TASKS = ("food->kitchen", "kitchen->food")
PROTOCOLS = ("as-given", "inter")
RATIOS = (0.2, 0.6, 1.0)
CONFIG = {"pseudo_items": 10, "steps": 100, "start_ratio": 0.5, "guidance": "cross_attention"}
GUIDANCE = ("cross_attention", "id", "text")
METRICS = tuple(metric.name for metric in (*SEQUENCES.metrics, *SEQUENCES.full))


def per_row(users: int, chance: float, seeds: Sequence[int], draw: int) -> pd.DataFrame:
    """A `per_user.csv`: each target is among the first 10 with `chance` (half of it under inter), at a random rank."""
    rng = np.random.default_rng(draw)
    rows = []
    for seed in seeds:
        for protocol in PROTOCOLS:
            hit = rng.random(users) < (chance if protocol == "as-given" else chance / 2)
            rank = rng.integers(0, 10, users)
            gain = hit / np.log2(rank + 2)
            first = rank < 5
            values = {"hr5": hit * first, "hr10": hit, "ndcg5": gain * first, "ndcg10": gain}
            values |= {f"full_{name}": value * 0.5 for name, value in values.items()}
            frame = pd.DataFrame({"seed": seed, "user": range(users), "protocol": protocol, **values})
            rows.append(frame.astype(dict.fromkeys(METRICS, float)))
    return pd.concat(rows, ignore_index=True)


def around(rng: np.random.Generator, ndcg: float, seeds: int = 3) -> dict[str, float]:
    """Validation metrics of some seeds around an NDCG@10 of all protocols."""
    draws = ndcg + rng.normal(0, 0.003, seeds)
    values = {"val_seconds": np.full(seeds, 0.5)}
    for name, factor in (("hr5", 1.2), ("hr10", 1.6), ("ndcg5", 0.85), ("ndcg10", 1.0)):
        values |= {f"val_{name}": factor * draws}
        values |= {f"val_{name}_as-given": 1.3 * factor * draws, f"val_{name}_inter": 0.7 * factor * draws}
    return with_seeds(values)


def validation_rows(chance: float, draw: int) -> dict[str, str]:
    """Artifact with the rows of 20 validation users over three seeds; one draw, whatever the chance."""
    return {"val_per_user.csv": per_row(20, chance, [0, 1, 2], draw).to_csv(index=False)}


def sequences_store(folder: Path, users: int = 60) -> Store:
    """Search, sweeps of steps, guidance and ratio, ablations and scores; the model is ahead of the baselines."""
    store = empty_store(folder, model="lgcd")
    store.add_data([(task, 1.0) for task in TASKS])
    for c, task in enumerate(TASKS):
        rng = np.random.default_rng(c)
        for trial in range(6):
            ratio = float(rng.choice([0.1, 0.3, 0.5, 0.7, 0.9]))
            config = {**CONFIG, "start_ratio": ratio, "dropout": float(rng.uniform(0, 0.5))}
            metrics = {**around(rng, 0.2 - 0.04 * abs(ratio - 0.5) - 0.15 * (trial == 5)), "seconds": 9.0 - trial}
            curve = [metrics["val_ndcg10"] - 0.1 * np.exp(-epoch) for epoch in range(8)]
            store.add("search", task, 1.0, f"{trial:04d}", metrics, config=config, epochs={"val_ndcg10": curve})
        for steps in (10, 50, 100):
            metrics = around(rng, 0.2 - 0.02 * abs(np.log(steps / 100)))
            config = {**CONFIG, "steps": steps}
            rows = validation_rows(0.4, c)
            store.add("sweep:steps", task, 1.0, f"steps={steps}", metrics, config=config, artifacts=rows)
        for worse, guidance in enumerate(GUIDANCE):
            config = {**CONFIG, "guidance": guidance}
            metrics, rows = around(rng, 0.2 - 0.02 * worse), validation_rows(0.4 - 0.04 * worse, c)
            store.add("sweep:guidance", task, 1.0, f"guidance={guidance}", metrics, config=config, artifacts=rows)
        for ratio in RATIOS:
            metrics, rows = around(rng, 0.15 + 0.05 * ratio), validation_rows(0.3 + 0.1 * ratio, c)
            part, name = "sweep:overlap_ratio", f"overlap_ratio={ratio}"
            store.add(part, task, ratio, name, metrics, config=CONFIG, artifacts=rows)
            store.add(part, task, ratio, name, around(rng, 0.1 + 0.08 * ratio, 1), row="item_knn", config={})
        for worse, name in ((0.0, "full"), (0.01, "wo_moe"), (0.03, "wo_diffusion")):
            metrics, rows = around(rng, 0.2 - worse), validation_rows(0.4 - 2 * worse, c)
            store.add("ablate", task, 1.0, name, metrics, config=CONFIG, variant=name, artifacts=rows)
        for draw, (name, chance) in enumerate((("popularity", 0.05), ("item_knn", 0.3), ("item_knn_title", 0.35))):
            artifacts = {"per_user.csv": per_row(users, chance, [-1], 10 * c + draw).to_csv(index=False)}
            metrics = around(rng, chance / 2, 1)
            store.add("score", task, 1.0, "test", metrics, row=name, config={}, artifacts=artifacts)
        frame = per_row(users, 0.7, [0, 1, 2], 10 * c + 5)
        metrics, files = around(rng, 0.2), {"per_user.csv": frame.to_csv(index=False)}
        store.add("score", task, 1.0, "test", metrics, config=CONFIG, artifacts=files)
    return store


WITH_RIVALS = with_rivals(
    LGCD, rival("cmf"), rival("unicdr", "ids, titles", note="reconstruction"), rival("sasrec", "ids, pseudo-items")
)


def add_rivals(store: Store, users: int = 60) -> None:
    """Three rivals, of which the paper prints two: scores, shorter searches, and for two of them the sweep of the ratio."""
    for c, task in enumerate(TASKS):
        rng = np.random.default_rng(40 + c)
        for draw, (row, chance) in enumerate((("cmf", 0.4), ("unicdr", 0.69), ("sasrec", 0.55))):
            for trial in range(4 if row == "sasrec" else 6):
                config = {"lr": float(10 ** rng.uniform(-4, -2)), "heads": 2}
                metrics = {**around(rng, chance / 3), "seconds": 60.0 + trial}
                store.add("search", task, 1.0, f"{trial:04d}", metrics, row=row, config=config)
            frame = per_row(users, chance, [0, 1, 2], 10 * c + 6 + draw)
            files = {"per_user.csv": frame.to_csv(index=False), **validation_rows(chance / 2, c)}
            store.add("score", task, 1.0, "test", around(rng, chance / 3), row=row, config=config, artifacts=files)
            for ratio in RATIOS if row != "cmf" else ():
                rows = validation_rows(0.2 + 0.15 * ratio, c)
                metrics, name = around(rng, 0.12 + 0.02 * draw + 0.06 * ratio), f"overlap_ratio={ratio}"
                store.add("sweep:overlap_ratio", task, ratio, name, metrics, row=row, config=config, artifacts=rows)
