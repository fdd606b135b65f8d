"""Published numbers: `study/papers/<model>.yaml`, as printed, laid beside the measured ones by the tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from features.errors import InputError
from search_spaces import parse_yaml

FOLDER = Path(__file__).parent / "papers"

Rows = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Row -> target domain -> metric -> value."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """What a paper prints of one data set."""

    name: str  # as plans call it, e.g. lgcd/food-kitchen
    method: str  # the row of `comparison` that is the study's model
    ratio: float  # of the cells that the numbers are of
    group: str  # of the rows that the numbers are of
    note: str
    comparison: Rows
    ablations: Rows

    def check(self, targets: Iterable[str]) -> None:
        """Raise InputError where the paper has no numbers of a target domain."""
        known = list(self.comparison[self.method])
        if unknown := [target for target in targets if target not in known]:
            raise InputError(
                f"{self.name} has no numbers of the target domain {unknown[0]!r}; it has {', '.join(known)}: "
                "name the domains so, or leave published out"
            )


def published_names() -> list[str]:
    """All names that `load_published` takes."""
    return sorted(f"{path.stem}/{name}" for path in FOLDER.glob("*.yaml") for name in _read(path)["datasets"])


def load_published(name: str) -> Published:
    """The numbers of `<model>/<data set>`; InputError for an unknown name."""
    if name not in published_names():
        raise InputError(f"unknown {name!r}; choose from {', '.join(published_names())}")
    model, _, dataset = name.partition("/")
    document = _read(FOLDER / f"{model}.yaml")
    own = document.pop("datasets")[dataset]
    return Published(
        name=name, **document, comparison=_rows(own["comparison"]), ablations=_rows(own["ablations"])
    )  # fmt: skip


def _read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = parse_yaml(path.read_text(encoding="utf-8"))
    return document


def _rows(table: Mapping[str, Any]) -> Rows:
    metrics = table["metrics"]
    return {
        row: {target: dict(zip(metrics, values, strict=True)) for target, values in targets.items()}
        for row, targets in table["rows"].items()
    }
