"""Top 10 for all test users at once, by the registered models: `python tests/benchmarks/bench_recommend.py [PLAN] [HOME]`.

After `study run PLAN` of sequences. Users are told by the history that the test rows show under `as-given`; no target is
read. Prints seconds of loading, and of `predict` for the users of each cell and of all.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import torch

from study.plan.load import load_plan
from study.tracking.registry import model_name
from study.tracking.results import read_config
from study.tracking.runs import default_uri


def histories(task: Path) -> pd.DataFrame:
    """Item ids of each test user's history, oldest first."""
    rows, ids = task / "test", np.load(task / "search" / "item_id.npy", allow_pickle=False)
    starts, item = np.load(rows / "starts.npy"), np.load(rows / "item.npy")
    protocols = json.loads((task / "search" / "task.json").read_text())["protocols"]
    shown = np.flatnonzero(np.load(rows / "protocol.npy") == protocols.index("as-given"))
    return pd.DataFrame({"history": [[str(ids[i]) for i in item[starts[row] : starts[row + 1]]] for row in shown]})


def main() -> None:
    torch.set_num_threads(1)
    plan = load_plan(sys.argv[1] if len(sys.argv) > 1 else "food-kitchen")
    home = Path(sys.argv[2] if len(sys.argv) > 2 else "runs").absolute()
    mlflow.set_tracking_uri(default_uri(home))
    users, seconds = 0, 0.0
    for cell in plan.cells:
        start = time.perf_counter()
        model = mlflow.pyfunc.load_model(f"models:/{model_name(plan.name, cell)}@best")
        loaded = time.perf_counter() - start
        config = read_config(default_uri(home), model.metadata.run_id)
        asked = histories(Path(config["task_dir"]).parent)
        start = time.perf_counter()
        found = model.predict(asked, params={"n": 10})
        took = time.perf_counter() - start
        assert all(len(items) == 10 for items in found["items"])
        print(f"{cell.name}: {len(asked)} users in {took:.2f} s, after {loaded:.2f} s of loading", flush=True)
        users, seconds = users + len(asked), seconds + took
    print(f"all {users} test users: {seconds:.2f} s")


if __name__ == "__main__":
    main()
