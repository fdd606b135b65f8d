"""Hyperparameter studies: `from study import Study` (see docs/python.md), or the command `study`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from study.study import Study as Study

__all__ = ["Study"]


def __getattr__(name: str) -> Any:
    """Import what is heavy when it is asked for."""
    if name == "Study":
        from study.provenance import packages_first

        packages_first()
        from study.study import Study

        return Study
    raise AttributeError(f"module 'study' has no attribute {name!r}")
