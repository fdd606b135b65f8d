"""Bind plain values to dataclasses; what does not fit is collected, not raised."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from features.checks import is_finite
from features.errors import InputError

# --- binding ------------------------------------------------------------------------------------------------------


def bind(kind: Any, value: Any, place: str, faults: list[str]) -> Any:
    """`value` as an object of type `kind`; what does not fit goes into `faults`."""
    if is_dataclass(kind):
        return _bind_dataclass(kind, value, place, faults)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        fitting = [kind for kind in arguments if isinstance(value, list) == (typing.get_origin(kind) is tuple)]
        return bind(fitting[0] if fitting else arguments[0], value, place, faults)
    if origin is typing.Literal:
        if value not in arguments:
            faults.append(f"{place} is {shown_value(value)}; choose from {', '.join(arguments)}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            faults.append(f"{place} is {shown_value(value)}; give a list")
            return ()
        if arguments[-1] is not Ellipsis:
            if len(value) != len(arguments):
                faults.append(f"{place} is {shown_value(value)}; give a list of {len(arguments)}")
                return ()
            kinds = arguments
        else:
            kinds = (arguments[0],) * len(value)
        return tuple(bind(k, v, f"{place}[{i}]", faults) for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            faults.append(f"{place} is {shown_value(value)}; give a mapping")
            return {}
        return {_name(key, place, faults): bind(arguments[1], v, f"{place}.{key}", faults) for key, v in value.items()}
    return _bind_scalar(kind, value, place, faults)


def _bind_dataclass(kind: Any, value: Any, place: str, faults: list[str]) -> Any:
    if not isinstance(value, Mapping):
        faults.append(f"{place} is {shown_value(value)}; give a mapping")
        return None
    hints = typing.get_type_hints(kind)
    dot = "." if " " in place or ": " in place else ": "
    before = len(faults)
    bound: dict[str, Any] = {}
    for key, entry in value.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), list(hints), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(hints)}"
            faults.append(f"{place}{dot}unknown key {shown_value(key)}; {hint}")
        else:
            bound[key] = bind(hints[key], entry, f"{place}{dot}{key}", faults)
    for entry in fields(kind):
        if entry.name not in value and entry.default is MISSING and entry.default_factory is MISSING:
            faults.append(f"{place}{dot}{entry.name} is missing; set it")
    if len(faults) > before:
        return None
    try:
        return kind(**bound)
    except (InputError, ValueError) as error:
        path = place.rpartition(": ")[2]  # which the error may name again, or its end
        ends = (name for name in (path, path.rpartition(".")[2]) if re.match(rf"{re.escape(name)}[.:]", str(error)))
        named = next(ends, "")
        faults.append(f"{place}{str(error).removeprefix(named)}" if named else f"{place}: {error}")
        return None


def _bind_scalar(kind: Any, value: Any, place: str, faults: list[str]) -> Any:
    if kind is Any:
        return value
    accepted = {int: int, float: (int, float), str: str, bool: bool}[kind]
    if (isinstance(value, bool) and kind is not bool) or not isinstance(value, accepted):  # type: ignore[arg-type]
        quoted = ", in quotes" if kind is str and not isinstance(value, list | dict) else ""
        faults.append(f"{place} is {shown_value(value)}; give a value of type {kind.__name__}{quoted}")
        return None
    if kind is float and not is_finite(value):
        faults.append(f"{place} is {shown_value(value)}; give a finite number")
        return None
    return value


def _name(key: Any, place: str, faults: list[str]) -> str:
    if not isinstance(key, str):
        faults.append(f"{place}: key {shown_value(key)} is not text; quote it")
    return str(key)


def shown_value(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
