"""Hyperparameter studies: `from study import Study` (see docs/python.md), or the command `study`.

Four packages with plain names belong together: study, trainables, search_spaces and features. A folder on the path, such
as the working directory, may have modules of these names. They are found beside this package all the same, in every
process that imports it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from study.study import Study as Study

__all__ = ["Study"]
ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("study", "search_spaces", "trainables", "features")


class _Beside(importlib.abc.MetaPathFinder):
    """Finds our packages in the folder that this one lies in, before any other place is looked at."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname in PACKAGES:
            return importlib.machinery.PathFinder.find_spec(fullname, [str(ROOT)], target)
        return None


sys.meta_path.insert(0, _Beside())


def __getattr__(name: str) -> Any:
    """Import what is heavy when it is asked for."""
    if name == "Study":
        from study.study import Study

        return Study
    raise AttributeError(f"module 'study' has no attribute {name!r}")
