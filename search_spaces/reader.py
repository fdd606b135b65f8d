"""The one reader of search-space files: YAML in, Optuna distributions out.

A file holds named variants; a variant maps config fields to ranges. The inner words are Optuna's own: the class of a
distribution and the arguments of its constructor. `when` makes a parameter conditional: it exists only while an earlier
parameter has one of the given values.

    paper:
      schedule: {CategoricalDistribution: {choices: [linear, linear_scaled]}}
      variance_end: {when: {schedule: linear_scaled}, FloatDistribution: {low: 0.01, high: 0.05}}
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)

from search_spaces.numbers import number_remedy

DISTRIBUTIONS: dict[str, type[BaseDistribution]] = {
    "CategoricalDistribution": CategoricalDistribution,
    "FloatDistribution": FloatDistribution,
    "IntDistribution": IntDistribution,
}
FOLDER = Path(__file__).parent

Scalar = None | bool | int | float | str


class SpaceError(ValueError):
    """A faulty search space; the message has one line per fault: place, rule, value, remedy."""

    def __init__(self, faults: Collection[str]) -> None:
        self.faults = tuple(" ".join(fault.splitlines()) for fault in faults)
        super().__init__("\n".join(self.faults))


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One searched config field."""

    name: str
    """The config field."""
    distribution: BaseDistribution
    """What Optuna draws it from."""
    when: Mapping[str, tuple[Scalar, ...]]
    """Earlier parameter -> values of it for which this one exists; empty: always."""

    def active(self, drawn: Mapping[str, Any]) -> bool:
        """Whether the parameter exists beside the values drawn so far."""
        return all(parent in drawn and drawn[parent] in values for parent, values in self.when.items())


@dataclass(frozen=True, kw_only=True)
class Space:
    """One variant of a space file; `parameters` are in file order, which puts every condition after what it reads."""

    name: str
    parameters: tuple[Parameter, ...]

    def suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        """Draw (or, for a trial drawn before, read back) every parameter that exists in this trial."""
        drawn: dict[str, Any] = {}
        for parameter in self.parameters:
            if parameter.active(drawn):
                drawn[parameter.name] = _suggest(trial, parameter.name, parameter.distribution)
        return drawn

    def size(self) -> int | None:
        """Number of distinct configurations; None when a range is continuous."""
        counts = {parameter.name: _count(parameter.distribution) for parameter in self.parameters}
        if None in counts.values():
            return None
        parents = {parent for parameter in self.parameters for parent in parameter.when}
        return _size(self.parameters, parents, {})

    def fit(self, values: Mapping[str, Any], *, whole: bool) -> dict[str, Any]:
        """`values` as one configuration of this space: choices, integers and floats as the space itself would draw them.

        `whole`: every parameter that exists has to be there; otherwise some may be missing, but none whose condition is
        not given with it. Raises SpaceError with every fault.
        """
        fitted: dict[str, Any] = {}
        known = {parameter.name: parameter for parameter in self.parameters}
        faults = [f"{name!r} is not in the space, which has {_join(known)}" for name in values if name not in known]
        for name, parameter in known.items():
            if not parameter.active(fitted):
                if name in values and not any(parent in values and parent not in fitted for parent in parameter.when):
                    faults.append(f"{name} exists only if {_conditions(parameter)}; give both or neither")
            elif name in values:
                found = _fit(parameter.distribution, values[name])
                if found:
                    fitted[name] = found[0]
                else:
                    faults.append(f"{name} {_outside(parameter.distribution, values[name])}")
            elif whole:
                faults.append(f"{name} is missing")
        if faults:
            raise SpaceError(faults)
        return fitted

    def within(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return those of `values` that this space can draw together; what it cannot is left out."""
        drawn: dict[str, Any] = {}
        for parameter in self.parameters:
            if parameter.active(drawn) and parameter.name in values:
                fitting = _fit(parameter.distribution, values[parameter.name])
                drawn |= {parameter.name: fitting[0]} if fitting else {}
        return drawn

    def grid(self, given: Mapping[str, Collection[Any]]) -> Iterator[dict[str, Any]]:
        """Every configuration once; `given` has the values of ranges that are continuous, or fewer than a range holds.

        Raises SpaceError for a value outside of its range, and for a continuous range without values.
        """
        values: dict[str, list[Any]] = {}
        faults = [f"{name!r} is not in the space" for name in given if name not in self.describe()]
        for parameter in self.parameters:
            name, distribution = parameter.name, parameter.distribution
            if name in given:
                found = [_fit(distribution, value) for value in given[name]]
                outside = [value for value, fits in zip(given[name], found, strict=True) if not fits]
                faults += [f"{name} {_outside(distribution, value)}" for value in outside]
                if not found:
                    faults.append(f"{name} has no values; give at least one")
                values[name] = list(dict.fromkeys(fits[0] for fits in found if fits))
            elif _count(distribution) is None:
                faults.append(f"{name} is continuous ({_range(distribution)}); give its values")
            else:
                values[name] = _values(distribution)
        if faults:
            raise SpaceError(faults)
        return self._grid(values, 0, {})

    def _grid(self, values: Mapping[str, list[Any]], position: int, drawn: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if position == len(self.parameters):
            yield drawn
            return
        parameter = self.parameters[position]
        branches = [{**drawn, parameter.name: value} for value in values[parameter.name]]
        for branch in branches if parameter.active(drawn) else [drawn]:
            yield from self._grid(values, position + 1, branch)

    def describe(self) -> dict[str, str]:
        """Each parameter's range in words, for `study check`."""
        return {parameter.name: _describe(parameter) for parameter in self.parameters}

    def definition(self) -> dict[str, Any]:
        """The space as plain JSON values, equal exactly for equal spaces; what a search's identity is made from."""
        return {
            p.name: {
                "when": {k: list(v) for k, v in p.when.items()},
                **json.loads(distribution_to_json(p.distribution)),
            }
            for p in self.parameters
        }


def load_space(name_or_path: str, fields: Collection[str]) -> Space:
    """Read one variant: `music/paper` of the spaces shipped here, or `path/to/file.yaml/paper`.

    `fields` are the names that the model's config has; a space may search nothing else.
    Raises SpaceError with every fault of the file, other variants included.
    """
    path, shown, variant = _locate(name_or_path)
    document = _read(path, shown)
    faults: list[str] = []
    variants: dict[str, Space] = {}
    for name, body in document.items():
        reader = _VariantReader(f"{shown}: {name}", fields)
        variants[str(name)] = Space(name=name_or_path, parameters=reader.read(body))
        faults += reader.faults
    if faults:
        raise SpaceError(faults)
    if variant not in variants:
        raise SpaceError([f"{shown}: has no variant '{variant}'; it has {_join(variants)}"])
    return variants[variant]


def _locate(name_or_path: str) -> tuple[Path, str, str]:
    """File, how errors call it, and variant."""
    if shipped := re.fullmatch(r"([\w-]+)/([\w-]+)", name_or_path):
        path = FOLDER / f"{shipped[1]}.yaml"
        if not path.is_file():
            known = _join(sorted(file.stem for file in FOLDER.glob("*.yaml")))
            raise SpaceError([f"space '{name_or_path}': there is no space file '{shipped[1]}'; shipped are {known}"])
        return path, f"search_spaces/{path.name}", shipped[2]
    if given := re.fullmatch(r"(.+\.ya?ml)/([^/]+)", name_or_path):
        return Path(given[1]), given[1], given[2]
    raise SpaceError([f"space {name_or_path!r}: not a space; write <file>/<variant>, such as music/paper"])


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice; PyYAML keeps the last one in silence."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        """Compose a mapping as it is written, before merge keys (`<<: *anchor`) bring in keys of others."""
        node = super().compose_mapping_node(anchor)
        seen: list[Any] = []
        for name, _ in node.value:
            if not isinstance(name, yaml.ScalarNode) or name.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(name, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", name.start_mark)
            seen.append(key)
        return node


def parse_yaml(text: str) -> Any:
    """The document of a YAML text; ValueError, one line, for everything that cannot be read, a key given twice included.

    PyYAML itself lets errors of many kinds out: `!!int ''` is an IndexError, `!!bool maybe` a KeyError.
    """
    try:
        return yaml.load(text, _UniqueKeyLoader)
    except (
        yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError
    ) as error:  # fmt: skip
        raise ValueError(_one_line(error)) from error


def _read(path: Path, shown: str) -> dict[Any, Any]:
    try:
        document = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpaceError([f"{shown}: cannot be read ({error.strerror}); give the path of a space file"]) from error
    except ValueError as error:
        raise SpaceError([f"{shown}: is not valid YAML: {_one_line(error)}"]) from error
    if not isinstance(document, dict) or not document:
        raise SpaceError([f"{shown}: must hold named variants, has {_kind(document)}; write `paper:`, ranges under it"])
    return document


class _VariantReader:
    """Reads one variant and collects its faults, so that a person sees all of them at once."""

    def __init__(self, place: str, fields: Collection[str]) -> None:
        self.place = place
        self.fields = fields
        self.faults: list[str] = []

    def fault(self, where: str, text: str) -> None:
        self.faults.append(f"{self.place}{where} {text}")

    def read(self, body: Any) -> tuple[Parameter, ...]:
        if not isinstance(body, dict) or not body:
            self.fault("", f"must map config fields to ranges, has {_kind(body)}")
            return ()
        distributions: dict[str, BaseDistribution] = {}
        parameters: list[Parameter] = []
        for name, spec in body.items():
            if name not in self.fields:
                self.fault(f".{name}", f"is not a config field; the fields are {_join(sorted(self.fields))}")
                continue
            if not isinstance(spec, dict):
                self.fault(f".{name}", f"must be {{<Distribution>: {{...}}}}, has {_kind(spec)}")
                continue
            when = self._conditions(name, spec.get("when", {}), body, distributions)
            distribution = self._distribution(name, {key: value for key, value in spec.items() if key != "when"})
            if distribution is not None:
                distributions[name] = distribution
                parameters.append(Parameter(name=name, distribution=distribution, when=when))
        return tuple(parameters)

    def _distribution(self, name: str, spec: Mapping[Any, Any]) -> BaseDistribution | None:
        if len(spec) != 1 or not set(spec) <= set(DISTRIBUTIONS):
            has = _join(map(str, spec)) if spec else "nothing"
            self.fault(f".{name}", f"needs exactly one of {_join(DISTRIBUTIONS)}, has {has}")
            return None
        ((kind, arguments),) = spec.items()
        if not isinstance(arguments, dict):
            self.fault(f".{name}", f"{kind} needs its arguments as a mapping, has {_kind(arguments)}")
            return None
        before = len(self.faults)
        for key, value in arguments.items():
            self._argument(f".{name}.{key}", kind, str(key), value)
        if len(self.faults) > before:
            return None
        try:
            with warnings.catch_warnings():
                # Optuna only warns when a step does not divide a range, then searches another range than the file says.
                warnings.simplefilter("error")
                return DISTRIBUTIONS[kind](**{str(key): value for key, value in arguments.items()})
        except (ValueError, TypeError, OverflowError, UserWarning) as error:
            self.fault(f".{name}", f"is not a valid {kind}: {_one_line(error)}")
            return None

    def _argument(self, where: str, kind: str, key: str, value: Any) -> None:
        """What Optuna's constructors let pass and a search would trip over later."""
        if key == "choices":
            if not isinstance(value, list):
                self.fault(where, f"must be a list, is {_kind(value)}")
                return
            for position, choice in enumerate(value):
                if not isinstance(choice, Scalar):
                    self.fault(where, f"must hold numbers, texts, booleans or null, has {_kind(choice)}")
                elif isinstance(choice, str) and number_remedy(choice):
                    self.fault(where, _text_for_number(choice))
                elif choice in value[:position]:
                    self.fault(where, f"holds {choice!r} twice")
        elif key in {"low", "high", "step"}:
            if key == "step" and value is None:
                return
            if isinstance(value, str) and number_remedy(value):
                self.fault(where, _text_for_number(value))
            elif isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
                self.fault(where, f"must be a finite number, is {value!r}")
            elif kind == "IntDistribution" and not isinstance(value, int):
                self.fault(where, f"must be a whole number, is {value!r}")
        elif key == "log" and not isinstance(value, bool):
            self.fault(where, f"must be true or false, is {value!r}")

    def _conditions(
        self, name: str, when: Any, body: Mapping[Any, Any], earlier: Mapping[str, BaseDistribution]
    ) -> dict[str, tuple[Scalar, ...]]:
        if not isinstance(when, dict):
            self.fault(f".{name}.when", f"must be {{<parameter>: <value or list of values>}}, has {_kind(when)}")
            return {}
        conditions: dict[str, tuple[Scalar, ...]] = {}
        for parent, wanted in when.items():
            where = f".{name}.when.{parent}"
            values = tuple(wanted) if isinstance(wanted, list) else (wanted,)
            if parent not in body:
                self.fault(where, f"is not a parameter of this variant; it has {_join(map(str, body))}")
            elif name in _ancestors(parent, body):
                self.fault(where, f"is circular: '{parent}' itself depends on '{name}'; drop one of the conditions")
            elif list(body).index(parent) > list(body).index(name):
                self.fault(where, f"is defined later; move '{parent}' above '{name}'")
            elif parent in earlier:  # otherwise its own range is faulty, which is reported where it stands
                self._wanted(where, values, earlier[parent])
                conditions[str(parent)] = values
        return conditions

    def _wanted(self, where: str, values: tuple[Any, ...], parent: BaseDistribution) -> None:
        if _count(parent) is None:
            self.fault(where, "is continuous, so it never equals a value; condition on a choice or an integer")
            return
        for value in values or (None,):
            if not _contains(parent, value):
                self.fault(where, f"never is {value!r}; its range is {_range(parent)}")


def _ancestors(name: Any, body: Mapping[Any, Any]) -> set[Any]:
    """Everything that the existence of `name` depends on, itself included."""
    seen: set[Any] = set()
    open_ = [name]
    while open_:
        current = open_.pop()
        if current in seen:
            continue
        seen.add(current)
        spec = body.get(current)
        when = spec.get("when") if isinstance(spec, dict) else None
        open_ += list(when) if isinstance(when, dict) else []
    return seen


def _suggest(trial: optuna.Trial, name: str, distribution: BaseDistribution) -> Any:
    match distribution:
        case CategoricalDistribution():
            return trial.suggest_categorical(name, distribution.choices)
        case IntDistribution():
            return trial.suggest_int(
                name, distribution.low, distribution.high, step=distribution.step, log=distribution.log
            )
        case FloatDistribution():
            return trial.suggest_float(
                name, distribution.low, distribution.high, step=distribution.step, log=distribution.log
            )
    raise AssertionError(f"no suggest method for {distribution}")


def _count(distribution: BaseDistribution) -> int | None:
    """Number of values; None for a continuous range."""
    match distribution:
        case CategoricalDistribution():
            return len(distribution.choices)
        case IntDistribution():
            return (distribution.high - distribution.low) // distribution.step + 1
        case FloatDistribution() if distribution.single():
            return 1
        case FloatDistribution() if distribution.step is not None:
            return round((distribution.high - distribution.low) / distribution.step) + 1
    return None


def _values(distribution: BaseDistribution) -> list[Scalar]:
    """All values of a discrete range that may be a condition (a choice or an integer)."""
    match distribution:
        case CategoricalDistribution():
            return list(distribution.choices)
        case IntDistribution():
            return list(range(distribution.low, distribution.high + 1, distribution.step))
        case FloatDistribution():
            low, step = Decimal(str(distribution.low)), Decimal(str(distribution.step or 0.0))
            return [float(low + step * position) for position in range(_count(distribution) or 0)]
    raise AssertionError(f"no values for {distribution}")


def _contains(distribution: BaseDistribution, value: Any) -> bool:
    # True == 1 in Python, but `when: {flag: 1}` for a boolean flag is a mistake worth naming.
    return any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in _values(distribution))


def _size(parameters: tuple[Parameter, ...], parents: set[str], drawn: dict[str, Any]) -> int:
    """Branch only on parameters that others depend on; all others just multiply."""
    total = 1
    for position, parameter in enumerate(parameters):
        if not parameter.active(drawn):
            continue
        if parameter.name in parents:
            rest = parameters[position + 1 :]
            return total * sum(
                _size(rest, parents, {**drawn, parameter.name: value}) for value in _values(parameter.distribution)
            )
        total *= _count(parameter.distribution) or 1
    return total


def _range(distribution: BaseDistribution) -> str:
    match distribution:
        case CategoricalDistribution():
            return _join(str(choice) for choice in distribution.choices)
        case IntDistribution() | FloatDistribution():
            step = "" if distribution.step in (None, 1) else f", step {distribution.step:g}"
            return f"{distribution.low:g} to {distribution.high:g}{step}{', log' if distribution.log else ''}"
    raise AssertionError(f"no words for {distribution}")


def _fit(distribution: BaseDistribution, value: Any) -> tuple[Scalar] | None:
    """The value as the distribution would draw it; None where it is not one of its values."""
    if isinstance(distribution, CategoricalDistribution):
        same = [c for c in distribution.choices if c == value and isinstance(c, bool) == isinstance(value, bool)]
        return (same[0],) if same else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
        return None
    whole = isinstance(distribution, IntDistribution)
    if not distribution._contains(float(value)) or (whole and value != int(value)):
        return None
    return (int(value) if whole else float(value),)


def _outside(distribution: BaseDistribution, value: Any) -> str:
    if isinstance(value, str) and number_remedy(value) and not isinstance(distribution, CategoricalDistribution):
        return _text_for_number(value)
    return f"is {value!r}; its range is {_range(distribution)}"


def _conditions(parameter: Parameter) -> str:
    return " and ".join(f"{name} is {_join(map(str, values), 'or')}" for name, values in parameter.when.items())


def _describe(parameter: Parameter) -> str:
    return _range(parameter.distribution) + (f" (only if {_conditions(parameter)})" if parameter.when else "")


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond float range
        return False


def _text_for_number(text: str) -> str:
    return f"is the text '{text}', not a number; {number_remedy(text)}"


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


def _join(words: Collection[str] | Any, last: str = "and") -> str:
    words = [str(word) for word in words]
    return " and ".join(words) if len(words) < 2 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
