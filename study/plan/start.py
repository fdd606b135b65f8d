"""Start configurations of sweeps, ablations and scores: the search's best, the row's base, or a run that a plan names.

A plan's `base` holds fields of the model's config, for every trial, and under a cell's name fields for that cell alone.
`study best --export` writes such a `base`, and a plan may name that file in the place of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Any

import yaml

from features.errors import InputError, one_line
from search_spaces import parse_yaml
from study.plan.schema import Row
from study.specs import ARROW
from trainables.interface import make_config

if TYPE_CHECKING:
    from study.selection import Best

WORDS = ("best", "base")
RUN_ID = re.compile(r"[0-9a-f]{32}")  # MLflow's


def fault_of(start: str) -> str | None:
    """What is wrong with the `start` of a part, if anything is."""
    if start in WORDS or RUN_ID.fullmatch(start):
        return None
    return f"{start!r}; choose from {', '.join(WORDS)}, or give the id of an MLflow run (32 hex digits)"


def read_base(document: Any, path: Path) -> Any:
    """The plan's document with the file that its `base` names in the place of the name.

    The file is looked for beside the plan. Raises InputError where there is none, or none with a `base` and no more.
    """
    if not isinstance(document, Mapping) or not isinstance(document.get("base"), str):
        return document
    file = path.parent / document["base"]
    place = f"{path.name}: base is {document['base']!r}"
    try:
        found = parse_yaml(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or one_line(error)
        raise InputError(f"{place}, which cannot be read ({reason}); name a file of `study best --export`") from error
    if not isinstance(found, Mapping) or list(found) != ["base"] or not isinstance(found["base"], Mapping):
        raise InputError(
            f"{place}, which does not hold a mapping `base` and no more; write it by `study best --export`"
        )
    return {**document, "base": found["base"]}


def base_faults(row: Row, cells: Sequence[str], place: str) -> list[str]:
    """What is wrong with the shared fields of a row's `base`, or with those of a cell over them."""
    by_cell = {name: values for name, values in row.base.items() if ARROW in name}
    key = f"{place}: {row.place}base"
    faults = [
        f"{key}.{name} is {values!r}; give a mapping of fields"
        for name, values in by_cell.items()
        if not isinstance(values, Mapping)
    ]
    for name, values in {"": {}, **by_cell}.items() if not faults else ():
        try:
            make_config(row.model, {**row.shared, **values}, f"{key}{f'.{name}' if name else ''}")
        except InputError as error:
            faults.append(str(error))
    missing = [name for name in cells if by_cell and name not in by_cell]
    if missing:
        faults.append(f"{key} names cells, but not {', '.join(missing)}; give every cell of the plan or none")
    if by_cell and row.search is not None:
        faults.append(f"{key} names cells, and a search draws over one base; leave out `search`, or the cells")
    return faults


def fragment(plan: str, metric: str, best: Mapping[str, tuple[Best, Mapping[str, Any]]]) -> str:
    """The `base` of a plan that starts each cell from its best configuration, as YAML with comments."""
    blocks = [
        f"  {cell}:  # best of {found.trials} by {metric}: {found.value:.6g}, run {found.run_id}\n"
        + indent(yaml.safe_dump(dict(logged["config"]), sort_keys=False), "    ")
        for cell, (found, logged) in best.items()
    ]
    return f"# study best {plan} --export FILE; a plan beside it says `base: FILE`\nbase:\n" + "".join(blocks)


def config_of_run(run_id: str, document: Mapping[str, Any], row: Row, place: str) -> Mapping[str, Any]:
    """The configuration in a run's `config.yaml`; InputError where it is another model's, or not one that it takes."""
    model, config = document.get("model"), document.get("config")
    if model != row.model or not isinstance(config, Mapping):
        raise InputError(f"{place}: run {run_id} is of the model {model!r}, and the row's is {row.model}; name another")
    make_config(row.model, config, f"{place}: run {run_id}")
    return config
