"""Hashes of what a result depends on: of a job, of a search, and of a checkpoint. Pure functions.

Whether a finished run still counts is decided by its fingerprint alone. What a plan may change without training anything
again is therefore not in it: names of rows and trials, resources, tags, the number of trials, other rows and cells. Nor
is the code, of which most changes change no result: a model whose trials must be trained again raises its `VERSION`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from study.specs import Job, Recipe, RowRecipe, SearchSpec
from study.tracking import tags


def fingerprints(recipe: Recipe, jobs: Iterable[Job]) -> dict[str, str]:
    """Trial -> the fingerprint of its job; the drawn jobs of a row and cell share one."""
    searches: dict[tuple[str, str], str] = {}
    hashes: dict[str, str] = {}
    for job in jobs:
        if job.config is not None:
            hashes[job.trial] = fingerprint(recipe, job)
            continue
        key = job.row, job.cell.name
        if key not in searches:
            searches[key] = fingerprint(recipe, job)
        hashes[job.trial] = searches[key]
    return hashes


def fingerprint(recipe: Recipe, job: Job) -> str:
    """Return the hash of all that the job's result depends on, as far as the plan and the model's version say it.

    The task's folder stands for its data, its split and its vectors: its name is a hash of them. A drawn job's hash is
    that of its search, whatever its number.
    """
    row = recipe.rows[job.row]
    identity: dict[str, Any] = {
        "model": row.model,
        "seeds": job.seeds,
        "feature_set": job.feature_set,
        "task": Path(job.task_dir).parts[-2:],
        "score": job.score,
    }
    if row.version > 1:
        identity["version"] = row.version
    if job.config is not None:
        identity["config"] = {**row.base, **job.config}
    elif row.space is not None and row.search is not None:
        identity |= _search_identity(recipe, row, row.search)
    return _hash(identity)


def _search_identity(recipe: Recipe, row: RowRecipe, search: SearchSpec) -> dict[str, Any]:
    """Return what decides which configurations are drawn, and which numbers their results are."""
    assert row.space is not None
    identity = {
        "base": dict(row.base),
        "space": row.space.definition(),
        "sampler": [search.sampler, dict(search.sampler_args), search.seed],
        "selection": [recipe.selection.metric, recipe.selection.direction],
    }
    # What a plan does not use is not in its hash: a search that was begun before the option existed goes on.
    used = {
        "points": search.points_to_evaluate,
        "warm_start": search.warm_start,
        "pruner": [search.pruner, dict(search.pruner_args)] if search.pruner else None,
        "objectives": search.objectives,
    }
    return identity | {name: value for name, value in used.items() if value}


def study_name(recipe: Recipe, job: Job, job_fingerprint: str) -> str:
    """Return the name of a drawn job's Optuna study: `<cell>/<row>/<identity>`, so that another space starts another study.

    In a database, which many plans share, the experiment's name and a slash come first.
    """
    search = recipe.rows[job.row].search
    prefix = f"{recipe.experiment}/" if search is not None and search.storage is not None else ""
    return f"{prefix}{job.cell.name}/{job.row}/{job_fingerprint[:12]}"


def parse_study_name(name: str) -> tuple[str | None, str, str] | None:
    """Return experiment (None: not in the name), row and cell of a study; None for a name that no plan gave."""
    parts = name.split("/")
    if len(parts) == 3:
        return None, parts[1], parts[0]
    return (parts[0], parts[2], parts[1]) if len(parts) == 4 else None


def checkpoint_identity(recipe: Recipe, job: Job, job_fingerprint: str, config: Mapping[str, Any]) -> str:
    """Return the hash of all that a checkpoint depends on.

    It holds the version of the code, because other code may keep another state, and the kind of device, because training
    on another one is another work.
    """
    code = [recipe.tags.get(tags.COMMIT), recipe.tags.get(tags.VERSIONS)]
    trainable = recipe.rows[job.row].trainable
    return _hash([job_fingerprint, config, trainable, code, recipe.resources.gpus > 0])


def _hash(document: Any) -> str:
    text = json.dumps(document, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
