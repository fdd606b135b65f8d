"""The winner of each cell in MLflow's Model Registry, and back from there to a user's list of items.

`score` keeps what it trains; here that becomes a registered model, one a cell, whose alias `best` is the version of the
newest scores. It holds tensors, item ids and titles, and the source of the packages that read them: no pickled code.
"""

from __future__ import annotations

import importlib.metadata
import io
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from features.domains.domain import Domain, open_domain
from features.errors import InputError
from features.pseudo.generate import item_titles
from study.specs import Cell
from study.tracking.results import Results, read_config
from study.tracking.runs import shown
from trainables.interface import load_model
from trainables.task_types import TASK_TYPES, task_type_at
from trainables.tasks.arrays import load_array, load_rows, read_meta
from trainables.trial import kept_at

ALIAS = "best"
PACKAGES = (
    "duckdb",
    "numpy",
    "pandas",
    "pillow",
    "pyarrow",
    "scipy",
    "torch",
)  # that `trainables` and `features` import
SCRIPT = '''"""What mlflow.pyfunc loads; the packages beside this file do the work."""

from pathlib import Path

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel
from trainables.serving import Served


class Recommender(PythonModel):
    def load_context(self, context):
        self.served = Served(Path(context.artifacts["model"]))

    def predict(self, context, model_input: pd.DataFrame, params=None):
        return self.served.recommend(model_input, int((params or {}).get("n", 10)))


set_model(Recommender())
'''


def model_name(plan: str, cell: Cell) -> str:
    """`books-movies.books-to-movies.0.2`."""
    return f"{plan}.{cell.source}-to-{cell.target}.{cell.ratio:g}"


def register(results: Results, domains: Mapping[str, Domain], home: Path) -> list[str]:
    """Register what the finished scores have kept, where that is not done; a line for each cell that has changed."""
    client, said = MlflowClient(results.tracking_uri), []
    scores = results.finished("score")
    for _, row in scores[scores["name"] == "best"].iterrows():
        document = results.config(row["run_id"])
        if load_model(document["model"]).unpack is None:
            continue
        name = model_name(results.experiment, Cell(**document["cell"]))
        if versions := client.search_model_versions(f"name = '{name}' and run_id = '{row['run_id']}'"):
            newest = str(max(int(version.version) for version in versions))
            # It may have died before it set the alias, or somebody deleted or moved it.
            if str(client.get_registered_model(name).aliases.get(ALIAS)) != newest:
                client.set_registered_model_alias(name, ALIAS, newest)
                said.append(f"{row['cell']}: {name}, version {newest} has the alias {ALIAS} again")
            continue
        kept = kept_at(document["model"], document["config"], document["task_dir"], document["seeds"])
        if not kept.is_file():
            again = f"`study rerun {row['run_id']} --home {home}`"
            said.append(f"{row['cell']}: its scored model was not kept; {again} makes it, then `study score`")
            continue
        version = _register(client, name, row, document, kept, domains)
        said.append(f"{row['cell']}: registered as {name}, version {version}, alias {ALIAS}")
    return said


def load(client: MlflowClient, name: str) -> tuple[Any, Any]:
    """The pyfunc model with the alias `best`, and its version in the registry; InputError where there is none."""
    try:
        version = client.get_model_version_by_alias(name, ALIAS)
    except MlflowException as error:
        raise InputError(
            f"registered model {name}: has no version with the alias {ALIAS}; run `study score` on the plan"
        ) from error
    with _quiet():
        import mlflow

        folder = mlflow.artifacts.download_artifacts(version.source, tracking_uri=client.tracking_uri)
        return mlflow.pyfunc.load_model(folder), version


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """What one user gets."""

    cell: str
    model: str
    version: str
    history: pd.DataFrame  # item, title: of the source domain, oldest first
    items: pd.DataFrame  # item, title, score: of the target domain, best first


def recommend(
    client: MlflowClient, plan: str, cells: list[Cell], home: Path, user: str, n: int
) -> Recommendation:  # fmt: skip
    """The best target-domain items for a user of the first of these cells whose model knows what is asked of him.

    Only the user's source domain is read. Raises InputError: no registered model, unknown user.
    """
    faults = []
    for cell in cells:
        name = model_name(plan, cell)
        try:
            model, version = load(client, name)
            document = read_config(client.tracking_uri, version.run_id)
            asked, history = known_of(document, home, user)
        except InputError as fault:
            faults.append(str(fault))
            continue
        (found,) = model.predict(asked, params={"n": n}).to_dict("records")
        items = pd.DataFrame({"item": found["items"], "title": found["titles"], "score": found["scores"]})
        return Recommendation(cell=cell.name, model=name, version=version.version, history=history, items=items)
    raise InputError(faults[0])


def known_of(document: Mapping[str, Any], home: Path, user: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What the model is asked about a user, and his source-domain history (item, title)."""
    folder = home / "tasks" / Path(document["task_dir"]).parent.name / "search"
    source = _source(folder, document["cell"]["source"], home)
    rows = pd.read_parquet(source.path / "interactions.parquet", filters=[("user_id", "==", user)])
    titles = item_titles(source)
    rows = rows.sort_values(["timestamp", "item_id"])
    history = pd.DataFrame({"item": rows["item_id"], "title": [titles.get(item, "") for item in rows["item_id"]]})
    if history.empty:
        raise InputError(f"user {user}: has nothing in the domain {source.name}; give the id of one who has")
    if task_type_at(folder).name == "sequences":
        return pd.DataFrame({"history": [list(history["item"])]}), history
    for part in (folder.parent / "test", folder / "validation", folder):
        vectors = load_rows(part, "source")
        (place,) = np.flatnonzero(np.load(part / "user_id.npy")[: len(vectors)] == user)[:1].tolist() or (None,)
        if place is not None:
            return _rating_query(part, place), history
    raise InputError(f"user {user}: is not among the users of both domains, whose vectors the task holds; take another")


def _rating_query(part: Path, place: int) -> pd.DataFrame:
    vectors = load_rows(part, "source")
    raw = vectors[torch.tensor([place])][0] * vectors.scale + vectors.centre
    offset = float(load_array(part, "source_offset")[place])
    return pd.DataFrame({"features": [raw.double().tolist()], "source_offset": [offset]})


def _source(folder: Path, name: str, home: Path) -> Domain:
    manifest = yaml.safe_load((folder.parent / "manifest.json").read_text())
    for path in (home / "domains").glob(f"{name}-*"):
        domain = open_domain(path)
        if domain.key == manifest["source"]:
            return domain
    raise InputError(f"{home}: holds the domain {name} no more; run `study extract` on the plan")


# --- registering --------------------------------------------------------------------------------------------------


def _register(
    client: MlflowClient, name: str, row: pd.Series, document: Mapping[str, Any], kept: Path,
    domains: Mapping[str, Domain],
) -> str:  # fmt: skip
    from mlflow.entities import LoggedModelOutput

    run = client.get_run(row["run_id"])
    tags = {"study.cell": row["cell"], "study.run": row["run_id"], "study.command": run.data.tags["study.command"]}
    numbers = {key: value for key, value in run.data.metrics.items() if key.startswith(("val_", "test_"))}
    text = _described(client, name, document, tags, numbers)
    logged = client.create_logged_model(
        run.info.experiment_id, name=ALIAS, source_run_id=run.info.run_id, tags=tags, params=run.data.params,
        model_type=document["model"],
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, _quiet():
        _save(Path(folder), document, kept, domains, run.info.run_id, logged.model_id)
        client.log_model_artifacts(logged.model_id, str(Path(folder) / "pyfunc"))
    client.finalize_logged_model(logged.model_id, "READY")
    client.log_outputs(run.info.run_id, [LoggedModelOutput(logged.model_id, step=0)])
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    version = client.create_model_version(
        name, source=logged.artifact_location, run_id=run.info.run_id, tags=tags, description=text,
        model_id=logged.model_id,
    )  # fmt: skip
    client.update_registered_model(name, description=text)
    client.set_registered_model_alias(name, ALIAS, version.version)
    return str(version.version)


def _described(
    client: MlflowClient, name: str, document: Mapping[str, Any], tags: Mapping[str, str], numbers: Mapping[str, float]
) -> str:
    """Markdown: what the model is, its main numbers, how it is used and made again."""
    metric = load_model(document["model"]).SELECTION.metric
    config = yaml.safe_dump(dict(document["config"]), sort_keys=False)
    main = {
        key: value for key, value in sorted(numbers.items())
        if "/" not in key and not key.endswith(("_std", "seconds")) and (key.startswith("test_") or key == metric)
    }  # fmt: skip
    table = "".join(f"| {key} | {value:.4f} |\n" for key, value in main.items())
    return (
        f"Best configuration of **{tags['study.cell']}** by `{metric}`; trained again: `{tags['study.command']}`.\n\n"
        f"```python\nmlflow.set_tracking_uri({shown(client.tracking_uri)!r})\n"
        f'mlflow.pyfunc.load_model("models:/{name}@{ALIAS}")\n```\n\n'
        f"| metric (mean over seeds) | value |\n|---|---|\n{table}\n```yaml\n{config}```\n"
    )


def _save(
    folder: Path, document: Mapping[str, Any], kept: Path, domains: Mapping[str, Domain], run_id: str, model_id: str
) -> None:
    """The MLflow model in `folder`/pyfunc."""
    import mlflow
    from mlflow.models import Model, ModelSignature
    from mlflow.types.schema import Array, ColSpec, DataType, ParamSchema, ParamSpec, Schema

    data, script = folder / "data", folder / "recommender.py"
    data.mkdir()
    shutil.copyfile(kept, data / "weights.pt")
    _items(document, domains).to_parquet(data / "items.parquet")
    (data / "config.yaml").write_text(yaml.safe_dump(dict(document), sort_keys=False))
    script.write_text(SCRIPT)
    many, texts = Array(DataType.double), Array(DataType.string)
    asked = {
        "ratings": [ColSpec(many, "features"), ColSpec(DataType.double, "source_offset")],
        "sequences": [ColSpec(texts, "history")],
    }[task_type_at(Path(document["task_dir"])).name]
    signature = ModelSignature(
        inputs=Schema([*asked, ColSpec(texts, "candidates", required=False)]),
        outputs=Schema([ColSpec(texts, "items"), ColSpec(texts, "titles"), ColSpec(many, "scores")]),
        params=ParamSchema([ParamSpec("n", DataType.long, 10)]),
    )
    root = Path(__file__).parents[2]
    with _quiet():
        mlflow.pyfunc.save_model(
            str(folder / "pyfunc"), python_model=str(script), artifacts={"model": str(data)}, signature=signature,
            code_paths=[str(root / "trainables"), str(root / "features")], input_example=_example(document),
            pip_requirements=[f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in PACKAGES],
            mlflow_model=Model(run_id=run_id, model_id=model_id),
        )  # fmt: skip
    for cache in (folder / "pyfunc").rglob("__pycache__"):
        shutil.rmtree(cache)


def _items(document: Mapping[str, Any], domains: Mapping[str, Domain]) -> pd.DataFrame:
    """All items that the model numbers, with titles."""
    folder = Path(document["task_dir"])
    ids = np.load(folder / "item_id.npy")
    low, high = read_meta(folder).get("target", (0, len(ids)))
    place = np.arange(len(ids))
    in_target = (place >= low) & (place < high)
    of = {
        True: item_titles(domains[document["cell"]["target"]]),
        False: item_titles(domains[document["cell"]["source"]]),
    }
    titles = [of[bool(inside)].get(str(item), "") for item, inside in zip(ids, in_target, strict=True)]
    return pd.DataFrame({"item_id": ids.astype(object), "title": titles, "in_target": in_target})


def _example(document: Mapping[str, Any]) -> pd.DataFrame:
    """The first validation user."""
    folder = Path(document["task_dir"])
    if task_type_at(folder).name == "ratings":
        return _rating_query(folder / "validation", 0)
    history = TASK_TYPES["sequences"].load_held_out(folder / "validation").history.rows(torch.tensor([0]))
    return pd.DataFrame({"history": [[str(item) for item in np.load(folder / "item_id.npy")[history.item.numpy()]]]})


@contextmanager
def _quiet() -> Iterator[None]:
    """MLflow's progress bars and its advice on type hints and versions are kept from the terminal."""
    logger = logging.getLogger("mlflow")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
