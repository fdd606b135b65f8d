"""Read a plan from YAML: a shipped one by name, or a file. All faults of a file are reported at once."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from features.errors import InputError
from search_spaces import parse_yaml
from search_spaces.numbers import number_remedy
from study.plan.binding import bind
from study.plan.checks import check_plan
from study.plan.schema import Plan
from study.plan.start import read_base

_SHIPPED_SPACE = re.compile(r"[\w-]+/[\w-]+")
_LONGEST = 2000  # characters of a fault
FOLDER = Path(__file__).parents[1] / "plans"
_TEXT_FOR_NUMBER = re.compile(
    r"is '(?P<value>[^']*)'; give a (?:value of type (?:int|float)\b|(?:finite |whole )?number\b)[^;]*"
)


class PlanError(InputError):
    """Everything that is wrong with a plan, one line each."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(
            _TEXT_FOR_NUMBER.sub(_with_remedy, _short(" ".join(fault.splitlines()))) for fault in faults
        )
        super().__init__("\n".join(self.faults))


def _short(fault: str) -> str:
    """Cut the middle of a fault that names something huge."""
    return fault if len(fault) <= _LONGEST else f"{fault[: _LONGEST // 2]} ... {fault[-_LONGEST // 2 :]}"


def _with_remedy(fault: re.Match[str]) -> str:
    """Say what to write where a fault's value is a number that YAML has read as text."""
    remedy = number_remedy(fault["value"])
    return f"{fault[0]} (YAML reads this as text; {remedy})" if remedy else fault[0]


def shipped_plans() -> list[str]:
    """Names of the plans that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def full_name(name_or_path: str) -> str:
    """What `load_plan` takes in any folder: a shipped plan's name, or the file's whole path."""
    return name_or_path if name_or_path in shipped_plans() else str(Path(name_or_path).absolute())


def copy_plan(name: str, folder: Path) -> Path:
    """Write a shipped plan to `folder`, to be edited. Raises InputError for an unknown name, or a file that is there."""
    if name not in shipped_plans():
        raise InputError(f"plan {name!r}: is not shipped; choose from {', '.join(shipped_plans())}")
    target = folder / f"{name}.yaml"
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text.replace(f"study run {name}", f"study run {target.name}"))
    except FileExistsError:
        raise InputError(f"{target}: is there already; rename it, or copy to another folder") from None
    return target


def load_plan(name_or_path: str) -> Plan:
    """Read a shipped plan by name, or a YAML file. Raises PlanError with every fault, those of its space included."""
    path = FOLDER / f"{name_or_path}.yaml"
    if name_or_path not in shipped_plans():
        path = Path(name_or_path)
        if not path.is_file():
            raise PlanError(
                [f"plan {name_or_path!r}: no such file or shipped plan; shipped: {', '.join(shipped_plans())}"]
            )
    place = path.name
    try:
        document = parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PlanError([f"{place}: not readable as YAML ({' '.join(str(error).split())}); mend the file"]) from error
    return plan_of(document, path)


def plan_of(document: Any, path: Path) -> Plan:
    """Return the plan that a document holds, as YAML gives it, with `path` as its file. Raises PlanError."""
    place, faults = path.name, list[str]()
    try:
        document = read_base(document, path)
    except InputError as error:
        raise PlanError([str(error)]) from error
    if isinstance(document, Mapping) and isinstance(document.get("domains"), Mapping):
        named = {
            key: {"name": key, **body} if isinstance(body, Mapping) else body
            for key, body in document["domains"].items()
        }
        document = {**document, "domains": named}
    plan = bind(Plan, _with_all_rows(_with_spaces(document, path.parent)), place, faults)
    if isinstance(plan, Plan) and not faults:
        faults = check_plan(plan, document, place)
    if faults:
        raise PlanError(list(dict.fromkeys(faults)))
    assert isinstance(plan, Plan)
    return plan


def _with_spaces(document: Any, folder: Path) -> Any:
    """The document with space files of the user's looked for beside the plan."""
    if not isinstance(document, Mapping):
        return document
    space, rows = document.get("space"), document.get("compare")
    found = dict(document)
    if isinstance(space, str) and not _SHIPPED_SPACE.fullmatch(space):
        found["space"] = str(folder / space)
    if isinstance(rows, Mapping):
        found["compare"] = {
            name: _with_spaces(row, folder) if isinstance(row, Mapping) and "compare" not in row else row
            for name, row in rows.items()
        }
    return found


def _with_all_rows(document: Any) -> Any:
    """The document with the names of all rows in the place of the word `all` in a sweep's `models`."""
    if not isinstance(document, Mapping) or not isinstance(document.get("sweeps"), Mapping):
        return document
    rivals = document.get("compare")
    rows = [document.get("model"), *(rivals if isinstance(rivals, Mapping) else ())]
    sweeps = {
        name: {**sweep, "models": rows} if isinstance(sweep, Mapping) and sweep.get("models") == "all" else sweep
        for name, sweep in document["sweeps"].items()
    }
    return {**document, "sweeps": sweeps}
