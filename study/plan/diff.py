"""What changed in a plan and the code since it last ran in a home folder, and what of the study can still be used."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from features.errors import InputError
from features.store.folders import write_json
from study.home import Home
from study.plan.schema import Plan
from study.provenance import commit, versions

_FILE = "file"  # no field of a plan
_DATA = ("domains.", "simulate.", "sequences.users")
_SEEDS = "these trials are trained with the new seeds; each that is finished counts until its successor is"

_EFFECTS = (  # the first that a field begins with
    (
        ("commit", "versions"),
        "results stay, except of models whose VERSION was raised; a trial that was in progress begins anew: checkpoints of "
        "other code are not used",
    ),
    (("tracking_uri",), "the study begins anew in that store"),
    (("resources", "faults", "published", "note", "most_shared"), "no trial is trained again"),
    (("search.trials", "search.budget"), "trials that are finished stay, the search goes on"),
    (("search", "space"), "where it changes what is drawn, the search starts anew; best configurations may change"),
    (("sweeps", "ablate", "score"), "of this part, trials of other configurations or seeds are trained; others stay"),
    (
        ("tasks", "cold_ratios", "overlap_ratios"),
        "cells that stay keep their trials; those of others are left out, and kept",
    ),
    (("compare",), "rows that stay as they are keep their trials; those of a dropped row are left out, and kept"),
    (("base", "model", "preset"), "trials whose configuration it changes are trained again"),
    (("",), "data or vectors that it changes are made again, and their trials trained again"),
)


def changes(plan: Plan, home: Path) -> list[str]:
    """A line for what is not as when the plan last trained here, and what that means; none for a plan that never has.

    A row, sweep or part that is new or dropped is named as a whole; what means the same is in one line.
    """
    kept = _remembered(plan, home)
    if not kept:
        return []
    kept.pop(_FILE, None)
    code = _code()
    now, before = _fields(plan) | code, code | kept
    lines: dict[tuple[str, str], list[str]] = {}
    names = sorted(before.keys() | now.keys())
    for name in names:
        # What was empty, or is now, has fields that say what changed.
        if before.get(name) == now.get(name) or any(other.startswith(f"{name}.") for other in names):
            continue
        part = _part(name, before if name in now else now)
        effect = next(text for starts, text in _EFFECTS if part.startswith(starts))
        if part != name:
            change = "new" if name in now else "dropped"
        else:
            change = f"{_shown(before, name)} -> {_shown(now, name)}"
            if name.endswith(".seeds") and not name.startswith("search"):
                effect = _SEEDS
        parts = lines.setdefault((change, effect), [])
        if part not in parts:
            parts.append(part)
    return [f"{', '.join(parts)}: {change}; {effect}" for (change, effect), parts in lines.items()]


def _part(name: str, others: Mapping[str, Any]) -> str:
    """Return the shortest beginning of a field's name of which the others have nothing, else its name."""
    words = name.split(".")
    for part in (".".join(words[:count]) for count in range(1, len(words))):
        if others.get(part) is None and not any(other.startswith(f"{part}.") for other in others):
            return part
    return name


def remember(plan: Plan, home: Path, file: str) -> None:
    """Keep the plan, the file that it came from and the code's version as they are now, for `changes`."""
    path = _path(plan, home)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, _fields(plan) | _code() | {_FILE: file})


def refuse_other_plan(plan: Plan, home: Path, file: str) -> None:
    """Raise InputError where another plan of this name last trained here: its trials would make room for this one's.

    That is one of another file, with another model, other data, or no task of this one's; a plan that was edited, moved or
    copied goes on.
    """
    kept, now = _remembered(plan, home), _fields(plan)
    if kept.get(_FILE) in (None, file):
        return
    tasks = [kept.get("tasks") or [], now["tasks"]]
    data = [{name: value for name, value in fields.items() if name.startswith(_DATA)} for fields in (kept, now)]
    if kept.get("model") != now["model"] or data[0] != data[1] or not any(task in tasks[0] for task in tasks[1]):
        raise InputError(
            f"plan {plan.name}: {Home(home)} holds another plan of this name ({kept[_FILE]}); give this one another name "
            "or --home, or put it in the other's place with --replace, which leaves the other's finished trials out"
        )


def _remembered(plan: Plan, home: Path) -> dict[str, Any]:
    """Return what `remember` kept; empty for a plan that never trained here."""
    try:
        kept = json.loads(_path(plan, home).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _path(plan: Plan, home: Path) -> Path:
    return Home(home).remembered_plan(plan.name)


def _fields(plan: Plan) -> dict[str, Any]:
    """`search.trials` -> 8, ... as JSON gives them back."""
    found: dict[str, Any] = json.loads(json.dumps(dict(_flat(asdict(plan), "")), default=str))
    return found


def _code() -> dict[str, str]:
    return {"commit": commit()} | dict(f"versions.{package}".split("=") for package in versions().split())


def _flat(value: Mapping[str, Any], place: str) -> Iterator[tuple[str, Any]]:
    for name, entry in value.items():
        if isinstance(entry, Mapping) and entry:
            yield from _flat(entry, f"{place}{name}.")
        else:
            yield f"{place}{name}", entry


def _shown(fields: Mapping[str, Any], name: str) -> str:
    text = json.dumps(fields[name]) if name in fields else "not there"
    return text if len(text) <= 60 else text[:57] + "..."
