"""A trainable that waits for company and says how many trials ran with it, with the signature of `fake_trial.run`."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fake_trial import Report

LIMIT_S = 900.0


def run(model: str, config: Mapping[str, Any], task_dir: str, seeds: Sequence[int], **options: Any) -> Iterator[Report]:
    """`config`: wait_for (so many trials at once, which ends the waiting of all), stay (seconds, at least)."""
    here, met = Path(task_dir) / "here", Path(task_dir) / f"met-{config['wait_for']}"
    here.mkdir(exist_ok=True)
    mine = here / f"{os.getpid()}-{config['x']}"
    mine.touch()
    began, most = time.monotonic(), 1
    while (stayed := time.monotonic() - began) < config["stay"] or not (met.exists() or stayed > LIMIT_S):
        most = max(most, len(list(here.iterdir())))
        if most >= config["wait_for"]:
            met.touch()
        time.sleep(0.02)
    mine.unlink()
    yield Report(epoch=1, metrics={"val_rmse": config["x"], "side_by_side": most}, final=True)
