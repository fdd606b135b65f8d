"""Types of the progress callbacks that long work in `features` takes; what is shown is the caller's business."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

AdvanceBy = Callable[[int], None]
"""Takes how many more rows are done."""


class Progress(Protocol):
    """Takes how much is done, of how much in all.

    Workers of language models also count the tokens so far, and the seconds since the first of them began to work:
    nodes and models take minutes to start, which says nothing of the time left.
    """

    def __call__(self, done: int, total: int, tokens: int = 0, seconds: float = 0.0, /) -> None: ...


class PhaseProgress(Protocol):
    """Takes the name of a phase, and what `Progress` takes."""

    def __call__(self, phase: str, done: int, total: int, tokens: int = 0, seconds: float = 0.0, /) -> None: ...
