"""Checks of a cluster-launcher file by Ray's own validator, offline, with errors of one line."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from features.errors import InputError
from search_spaces import parse_yaml
from study.specs import Resources

_LENGTH = 200  # characters of jsonschema's message; its own text repeats the whole file and schema


@dataclass(frozen=True)
class CheckedCluster:
    """A cluster-launcher file that Ray takes and whose nodes hold a trial."""

    line: str
    side_by_side: int | None
    """Trials that all its nodes hold at a time; None where the file leaves out what a node has."""


def check_cluster(path: Path, resources: Resources) -> CheckedCluster:
    """Check the file by Ray's own rules. Raises InputError where Ray refuses it or no node type holds a trial."""
    from jsonschema import ValidationError

    try:
        config = parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not readable as YAML ({' '.join(str(error).split())}); mend the file") from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: is no mapping; write a Ray cluster-launcher file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # announcements of Ray's next versions
        from ray.autoscaler._private.util import prepare_config, validate_config

        try:
            prepared = prepare_config(config)
            validate_config(prepared)
        except ValidationError as error:
            place = ".".join(str(word) for word in error.absolute_path) or "the file"
            raise InputError(f"{path}: {place}: {_short(error.message)}; see Ray's cluster YAML reference") from error
        except Exception as error:  # Ray's preparation raises all kinds, its messages are meant for the file's author
            raise InputError(f"{path}: Ray refuses it: {_short(f'{type(error).__name__}: {error}')}") from error
    types = prepared["available_node_types"]
    names = [name for name, node in types.items() if _holds(node.get("resources") or {}, wanted_by(resources))]
    if not names:
        available = ", ".join(f"{name} {node['resources']}" for name, node in types.items())
        raise InputError(
            f"{path}: no node type holds a trial of {resources.cpus:g} CPU and {resources.gpus:g} GPU; "
            f"it has {available}; add a larger one"
        )
    workers = prepared["max_workers"]
    line = (
        f"{path}: valid; provider {prepared['provider']['type']}, up to {workers} workers; trials on {', '.join(names)}"
    )
    head = types[prepared["head_node_type"]].get("resources")
    if not all(types[name].get("resources") for name in names) or head is None:
        return CheckedCluster(line, None)
    growing = [
        NodeType(node["resources"], min(workers, int(node.get("max_workers", 0))))
        for name, node in types.items()
        if name in names and name != prepared["head_node_type"]
    ]
    count = fits(head, resources) + at_most(growing, workers, resources)
    share = f", each with {resources.gpus:.0%} of a GPU and of its memory" if 0 < resources.gpus < 1 else ""
    return CheckedCluster(f"{line}, up to {count} side by side{share}", count)


@dataclass(frozen=True)
class NodeType:
    """A kind of nodes that a cluster may come to have."""

    resources: Mapping[str, float]
    count: int
    """At most so many workers at a time."""


def wanted_by(resources: Resources) -> dict[str, float]:
    """What a trial holds, by Ray's names."""
    return {"CPU": resources.cpus, "GPU": resources.gpus}


def fits(node: Mapping[str, float], resources: Resources) -> int:
    """Return how many trials a node holds at a time."""
    return min(
        (int(node.get(kind, 0.0) / wanted) for kind, wanted in wanted_by(resources).items() if wanted), default=1
    )


def at_most(growing: Sequence[NodeType], workers: int, resources: Resources) -> int:
    """Return how many trials `workers` nodes hold at a time, when they are of the types that hold most."""
    trials = 0
    for held, count in sorted(((fits(node.resources, resources), node.count) for node in growing), reverse=True):
        trials += held * min(count, workers)
        workers -= min(count, workers)
    return trials


def autoscaled() -> tuple[list[NodeType], int]:
    """Return the workers that a cluster whose head this machine is may have, and how many in all.

    They are read from the file that `ray up` leaves on the head; without it there are none. Ray itself shows a driver only
    the nodes that are there, and a cluster that has been idle has none but its head.
    """
    path = Path.home() / "ray_bootstrap_config.yaml"
    if not path.is_file():
        return [], 0
    config = parse_yaml(path.read_text(encoding="utf-8"))
    limit, types = int(config["max_workers"]), config["available_node_types"].values()
    nodes = [NodeType(node.get("resources") or {}, min(limit, int(node.get("max_workers", 0)))) for node in types]
    return [node for node in nodes if node.count], limit


def _holds(has: dict[str, Any], wanted: dict[str, float]) -> bool:
    """Whether a node has what a trial asks for; Ray finds out on the machine what the file leaves out."""
    return all(kind not in has or has[kind] >= number for kind, number in wanted.items() if number)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LENGTH else line[: _LENGTH - 3] + "..."
