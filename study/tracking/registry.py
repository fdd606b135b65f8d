"""The winner of each cell in MLflow's Model Registry, and back from there to a user's list of items.

`score` keeps what it trains; here that becomes a registered model, one for each cell of the subject and, on request, of a
rival. Its alias `best` is the version of the newest scores. It holds tensors, item ids and titles, and the source of the
packages that read them: no pickled code.
"""

from __future__ import annotations

import importlib.metadata
import io
import logging
import shlex
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from features.domains.domain import Domain, open_domain
from features.domains.ties import tie_hash
from features.errors import InputError
from features.pseudo.generate import item_titles
from features.store.folders import plain_name, read_json
from study.home import Home
from study.specs import Cell
from study.tracking import tags
from study.tracking.addresses import without_password
from study.tracking.local_store import database_file, local_path, place_of_artifacts
from study.tracking.results import Results, read_config
from trainables.interface import load_model
from trainables.queries import item_table
from trainables.serving import RECOMMENDED
from trainables.task_types import task_type_at
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


def model_name(plan: str, cell: Cell, row: str | None = None) -> str:
    """Return `PLAN.books-to-movies.0.2` for the subject (row None), `PLAN.emcdr.books-to-movies.0.2` for a rival."""
    return ".".join(filter(None, (plan, row, f"{cell.source}-to-{cell.target}", f"{cell.ratio:g}")))


def register(results: Results, domains: Mapping[str, Domain], home: Home, rows: Sequence[str]) -> list[str]:
    """Register what the finished scores of these rows have kept, where that is not done.

    rows: the subject's first, then those of rivals that somebody asked for. Returns a line for each cell that has changed,
    and for each rival that cannot be registered.
    """
    client, notes = MlflowClient(results.tracking_uri), []
    subject, *rivals = rows
    for row in rows:
        scores = results.finished("score")
        for _, trial in scores[scores["row"] == row].iterrows():
            if load_model(trial["model"]).unpack is None:
                if row in rivals:
                    notes.append(f"{row}: not registered, because the model {trial['model']} offers no `unpack`")
                break
            name = model_name(results.experiment, _cell(trial), None if row == subject else row)
            if note := _register_trial(client, name, trial, results, domains, home):
                notes.append(f"{trial['cell']}: {note}")
    return notes


def _register_trial(
    client: MlflowClient, name: str, trial: pd.Series, results: Results, domains: Mapping[str, Domain], home: Home
) -> str:
    """Register what one trial has kept; returns what has changed, empty for nothing."""
    run_id = trial["run_id"]
    if versions := client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'"):
        newest = str(max(int(version.version) for version in versions))
        # An earlier call may have died before it set the alias, or somebody deleted or moved it.
        if str(client.get_registered_model(name).aliases.get(ALIAS)) == newest:
            return ""
        client.set_registered_model_alias(name, ALIAS, newest)
        return f"{name}, version {newest} has the alias {ALIAS} again"
    logged = results.config(run_id)
    document = {**logged, "task_dir": home.task_folder(logged["task_dir"])}
    weights = kept_at(document["model"], document["config"], document["task_dir"], document["seeds"])
    if not weights.is_file():
        again = f"`study rerun {run_id} --home {shlex.quote(str(home))}`"
        return f"its scored model was not kept; {again} makes it, then `study score`"
    version = _register(client, name, trial, document, weights, domains)
    return f"registered as {name}, version {version}, alias {ALIAS}"


def _cell(trial: pd.Series) -> Cell:
    return Cell(source=trial["source"], target=trial["target"], ratio=float(trial["ratio"]))


def load(client: MlflowClient, name: str, row: str | None = None) -> tuple[Any, Any]:
    """The pyfunc model with the alias `best`, and its version in the registry; InputError where there is none."""
    try:
        version = client.get_model_version_by_alias(name, ALIAS)
    except MlflowException as error:
        remedy = f"run `study score` on the plan{f' with --register {row}' if row else ''}"
        raise InputError(f"registered model {name}: has no version with the alias {ALIAS}; {remedy}") from error
    with _quiet():
        import mlflow

        source = place_of_artifacts(str(version.source), client.tracking_uri)
        folder = local_path(source) or mlflow.artifacts.download_artifacts(source, tracking_uri=client.tracking_uri)
        with plain_name(Path(folder)) as place:
            return mlflow.pyfunc.load_model(str(place)), version


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """What one user gets."""

    cell: str
    model: str
    version: str
    history: pd.DataFrame  # item, title: of the source domain, oldest first
    items: pd.DataFrame  # item, title, score: of the target domain, best first


def recommend(
    client: MlflowClient, plan: str, cells: Sequence[Cell], home: Home, user: str, n: int, row: str | None = None
) -> Recommendation:
    """Return the best target-domain items for a user of the first of these cells whose model knows what is asked of them.

    row: a rival; None: the subject. Only the user's source domain is read. Raises InputError: no registered model, unknown
    user.
    """
    faults = []
    for cell in cells:
        name = model_name(plan, cell, row)
        try:
            model, version = load(client, name, row)
            query, history = describe_user(read_config(client.tracking_uri, version.run_id), home, user)
        except InputError as fault:
            faults.append(str(fault))
            continue
        (best,) = model.predict(query, params={"n": n}).to_dict("records")
        items = pd.DataFrame({"item": best["items"], "title": best["titles"], "score": best["scores"]})
        return Recommendation(cell=cell.name, model=name, version=version.version, history=history, items=items)
    raise InputError(faults[0])


def describe_user(document: Mapping[str, Any], home: Home, user: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return what the model of a run is asked about a user, and their source-domain history (item, title).

    document: the run's `config.yaml`. Raises InputError for a user without a history, or one that the task does not know.
    """
    task_dir = home.tasks / Path(document["task_dir"]).parent.name / "search"
    source = _source(task_dir, document["cell"]["source"], home)
    rows = pd.read_parquet(source.path / "interactions.parquet", filters=[("user_id", "==", user)])
    rows = rows.assign(tie=[tie_hash(user, item, source.name, _data_seed(task_dir)) for item in rows["item_id"]])
    rows = rows.sort_values(["timestamp", "tie"])  # as the task's own order, see features.domains.ties
    titles = item_titles(source)
    history = pd.DataFrame({"item": rows["item_id"], "title": [titles.get(item, "") for item in rows["item_id"]]})
    if history.empty:
        raise InputError(f"user {user}: has nothing in the domain {source.name}; give the id of one who has")
    return task_type_at(task_dir).describe_user(task_dir, user, list(history["item"])), history


def _data_seed(task_dir: Path) -> int:
    """Return the seed that the task was split, and its ties drawn, with."""
    manifest = read_json(task_dir.parent / "manifest.json")
    rules = manifest.get("sequences") or manifest["split"]
    return int(rules["data_seed"])


def _source(task_dir: Path, name: str, home: Home) -> Domain:
    """Open the source domain that the task was built from."""
    manifest = read_json(task_dir.parent / "manifest.json")
    for path in home.domains.glob(f"{name}-*"):
        domain = open_domain(path)
        if domain.key == manifest["source"]:
            return domain
    raise InputError(f"{home}: holds the domain {name} no more; run `study extract` on the plan")


# --- registering --------------------------------------------------------------------------------------------------


def _register(
    client: MlflowClient, name: str, trial: pd.Series, document: Mapping[str, Any], weights: Path,
    domains: Mapping[str, Domain],
) -> str:  # fmt: skip
    """Log the model under its run, and make it the newest version; returns its number."""
    from mlflow.entities import LoggedModelOutput

    run = client.get_run(trial["run_id"])
    version_tags = {tag: run.data.tags[tag] for tag in (tags.CELL, tags.ROW, tags.COMMAND)}
    version_tags |= {tags.RUN: run.info.run_id}
    numbers = {key: value for key, value in run.data.metrics.items() if key.startswith(("val_", "test_"))}
    text = _described(client, name, document, version_tags, numbers)
    logged = client.create_logged_model(
        run.info.experiment_id, name=ALIAS, source_run_id=run.info.run_id, tags=version_tags, params=run.data.params,
        model_type=document["model"],
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, _quiet():
        _save(Path(folder), document, weights, domains, run.info.run_id, logged.model_id)
        client.log_model_artifacts(logged.model_id, str(Path(folder) / "pyfunc"))
    client.finalize_logged_model(logged.model_id, "READY")
    client.log_outputs(run.info.run_id, [LoggedModelOutput(logged.model_id, step=0)])
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    version = client.create_model_version(
        name, source=logged.artifact_location, run_id=run.info.run_id, tags=version_tags, description=text,
        model_id=logged.model_id,
    )  # fmt: skip
    client.update_registered_model(name, description=text)
    client.set_registered_model_alias(name, ALIAS, version.version)
    return str(version.version)


def _described(
    client: MlflowClient, name: str, document: Mapping[str, Any], version_tags: Mapping[str, str],
    numbers: Mapping[str, float],
) -> str:  # fmt: skip
    """Return Markdown: what the model is, its main numbers, how it is used and made again."""
    module = load_model(document["model"])
    metric = module.SELECTION.metric
    config = yaml.safe_dump(dict(document["config"]), sort_keys=False)
    main = {
        key: value for key, value in sorted(numbers.items())
        if "/" not in key and not key.endswith(("_std", "seconds")) and (key.startswith("test_") or key == metric)
    }  # fmt: skip
    table = "".join(f"| {key} | {value:.4f} |\n" for key, value in main.items())
    uri = without_password(client.tracking_uri)
    # MLflow unquotes plain paths once too often when it reads a model where it lies
    copy = ", dst_path=tempfile.mkdtemp()" if database_file(uri) is not None and "%" in uri else ""
    return (
        f"Best configuration of **{module.NAME}** in **{version_tags[tags.CELL]}** by `{metric}`; trained again: "
        f"`{version_tags[tags.COMMAND]}`.\n\n"
        f"```python\nmlflow.set_tracking_uri({uri!r})\n"
        f'mlflow.pyfunc.load_model("models:/{name}@{ALIAS}"{copy})\n```\n\n'
        f"| metric (mean over seeds) | value |\n|---|---|\n{table}\n```yaml\n{config}```\n"
    )


def _save(
    folder: Path, document: Mapping[str, Any], weights: Path, domains: Mapping[str, Domain], run_id: str, model_id: str
) -> None:
    """Write the MLflow model in `folder`/pyfunc."""
    import mlflow
    from mlflow.models import Model, ModelSignature
    from mlflow.types.schema import Array, ColSpec, DataType, ParamSchema, ParamSpec, Schema

    task_dir = Path(document["task_dir"])
    task_type = task_type_at(task_dir)
    data, script = folder / "data", folder / "recommender.py"
    data.mkdir()
    shutil.copyfile(weights, data / "weights.pt")
    _items(task_dir, document["cell"], domains).to_parquet(data / "items.parquet")
    (data / "config.yaml").write_text(yaml.safe_dump(dict(document), sort_keys=False))
    script.write_text(SCRIPT)
    types: dict[str, Any] = {
        "number": DataType.double,
        "numbers": Array(DataType.double),
        "texts": Array(DataType.string),
    }
    columns = [ColSpec(types[kind], name) for name, kind in task_type.query_columns.items()]
    signature = ModelSignature(
        inputs=Schema([*columns, ColSpec(types["texts"], "candidates", required=False)]),
        outputs=Schema([ColSpec(types[kind], name) for name, kind in RECOMMENDED.items()]),
        params=ParamSchema([ParamSpec("n", DataType.long, 10)]),
    )
    root = Path(__file__).parents[2]
    with _quiet():
        mlflow.pyfunc.save_model(
            str(folder / "pyfunc"), python_model=str(script), artifacts={"model": str(data)}, signature=signature,
            code_paths=[str(root / "trainables"), str(root / "features")], input_example=task_type.example_user(task_dir),
            pip_requirements=[f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in PACKAGES],
            mlflow_model=Model(run_id=run_id, model_id=model_id),
        )  # fmt: skip
    for cache in (folder / "pyfunc").rglob("__pycache__"):
        shutil.rmtree(cache)


def _items(task_dir: Path, cell: Mapping[str, Any], domains: Mapping[str, Domain]) -> pd.DataFrame:
    """Return all items that the model numbers, with titles."""
    items = item_table(task_dir)
    titles = {inside: item_titles(domains[cell[side]]) for inside, side in ((True, "target"), (False, "source"))}
    places = zip(items["item_id"], items["in_target"], strict=True)
    return items.assign(title=[titles[bool(inside)].get(str(item), "") for item, inside in places])


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
