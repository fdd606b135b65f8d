"""Arrays of tasks on disk: written once, opened by trials without a copy. Shapes: F feature width, B batch."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from features.errors import InputError
from features.store.folders import read_json, write_json
from features.store.tables import FeatureTable
from trainables.devices import free_bytes

DENSE_BYTES = 64 * 2**20  # a table up to this size is standardised once and held in memory, by every process
_HELD_SHARE = 0.5  # of a device's free memory that a larger table may take, as it lies on disk
_CENTRE_ROWS = 20_000  # rows that centre and scale are measured on
_READ_ROWS = 256  # rows widened and standardised at once
_COPY_ROWS = 4_096  # rows copied to a device at once

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class TaskFolders:
    """Where a built task lies."""

    key: str
    task_dir: Path
    test_dir: Path
    counts: Mapping[str, int]  # users and ratings on each side of the split


class FeatureRows:
    """Raw feature vectors of some users or items, centred and scaled: row i belongs to user or item i.

    Rows come from a memory-mapped table; centre [F] and scale (one number, the root mean square over training rows, so
    that the proportions between features stay) were measured on training rows. One without a vector reads as the mean.

    On a GPU that has room for them the raw rows are copied once, and standardised there as they are read: gathered on the
    CPU, 6,000 rows of 4,096 numbers take 40 ms a step, and their way to the device comes on top.
    """

    def __init__(self, vectors: NDArray[Any], rows: Ints, centre: Floats, scale: float) -> None:
        self._vectors, self._rows = np.asarray(vectors), rows
        self.centre, self.scale = torch.from_numpy(centre), scale
        self._centre = self.centre  # where vectors are read: on the CPU
        size = len(rows) * vectors.shape[1] * 4
        self._dense = self._read(np.arange(len(rows))) if size <= DENSE_BYTES else None
        self._held: Tensor | None = None  # raw rows [N, F] on the device, in the type that they have on disk
        self._missing = torch.empty(0, dtype=torch.bool)  # [N] those without a vector, beside the held ones

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def width(self) -> int:
        """F."""
        return int(self._vectors.shape[1])

    @property
    def device(self) -> torch.device:
        """Where its vectors are given out."""
        return self.centre.device

    def to(self, device: torch.device) -> FeatureRows:
        """Return the same rows on another device; what no memory has room for is moved as it is read."""
        if device == self.device:
            return self
        moved = copy.copy(self)
        moved.centre = self.centre.to(device)
        moved._dense = self._dense.to(device) if self._dense is not None else None
        fits = len(self) * self.width * self._vectors.itemsize <= _HELD_SHARE * free_bytes(device)
        if self._dense is None and fits:
            moved._held, moved._missing = self._raw(device), torch.from_numpy(self._rows < 0).to(device)
        else:
            moved._held = None
        return moved

    def __getitem__(self, index_B: Tensor) -> Tensor:
        """Return standardised vectors, float32 [B, F]."""
        if self._dense is not None:
            return self._dense.index_select(0, index_B)
        if self._held is not None:
            read = self._held.index_select(0, index_B).float().sub_(self.centre).div_(self.scale)
            return read.masked_fill_(self._missing.index_select(0, index_B)[:, None], 0.0)
        return self._read(index_B.cpu().numpy()).to(self.device)

    def all(self) -> Tensor:
        """Return the standardised vectors of all rows, float32 [N, F]."""
        return self[torch.arange(len(self), device=self.device)]

    def _raw(self, device: torch.device) -> Tensor:
        """Copy all rows to a device, a few at a time, in the type that they have on disk; [N, F]."""
        places = np.maximum(self._rows, 0)
        kind = torch.from_numpy(self._vectors[:0]).dtype
        raw = torch.empty((len(self), self.width), dtype=kind, device=device)
        for start in range(0, len(places), _COPY_ROWS):
            part = slice(start, start + _COPY_ROWS)
            raw[part].copy_(torch.from_numpy(self._vectors[places[part]]))
        return raw

    def _read(self, index_B: Ints) -> Tensor:
        rows = self._rows[index_B]
        # Memory from NumPy comes in huge pages, torch widens float16 in hardware, and a few rows at a time stay in the
        # cache: 40 ms against 80 for 6,000 rows of 4,096 numbers, where the matrix product after it takes 80.
        vectors = torch.from_numpy(np.empty((len(rows), self.width), np.float32))
        places = np.maximum(rows, 0)
        for start in range(0, len(rows), _READ_ROWS):
            part = slice(start, start + _READ_ROWS)
            read = vectors[part].copy_(torch.from_numpy(self._vectors[places[part]]))
            read.sub_(self._centre).div_(self.scale)
        vectors[torch.from_numpy(rows < 0)] = 0.0
        return vectors


# --- files -----------------------------------------------------------------------------------------------------------


def centre_of(vectors: NDArray[Any], rows: Ints | None = None) -> tuple[Floats, float]:
    """Mean [F] and root mean square of what is left, over at most _CENTRE_ROWS evenly spaced rows."""
    rows = np.arange(len(vectors)) if rows is None else rows[rows >= 0]
    rows = rows[:: max(1, len(rows) // _CENTRE_ROWS)]
    sample = vectors[rows].astype(np.float32)
    centre = sample.mean(axis=0) if len(sample) else np.zeros(vectors.shape[1], np.float32)
    scale = float(np.sqrt(np.mean((sample - centre) ** 2, dtype=np.float64))) if len(sample) else 1.0
    return centre, scale or 1.0


def table_rows(table: FeatureTable, ids: Sequence[str]) -> Ints:
    """Row of each id, -1 for one without a vector."""
    return pd.Index(table.ids, dtype=object).get_indexer(pd.Index(list(ids), dtype=object)).astype(np.int64)


def save_places(folder: Path, name: str, rows: Ints, centre: tuple[Floats, float], vectors: str | None) -> None:
    """Which row of the vectors belongs to whom; `vectors`: path of a table elsewhere, None for one in this folder."""
    np.save(folder / f"{name}_rows.npy", rows)
    np.save(folder / f"{name}_centre.npy", centre[0])
    write_json(folder / f"{name}.json", {"vectors": vectors, "scale": centre[1], "missing": int((rows < 0).sum())})


def load_linked(folder: Path, name: str) -> Tensor:
    """Open an array that lies elsewhere, at the path in `<name>.json`."""
    path = folder / read_json(folder / f"{name}.json")["vectors"]
    try:
        return torch.from_numpy(np.load(path, mmap_mode="c"))
    except FileNotFoundError as error:
        raise InputError(f"{folder}: its vectors {path} are gone; run `study extract` on the plan") from error


def load_rows(folder: Path, name: str) -> FeatureRows:
    meta = read_json(folder / f"{name}.json")
    path = folder / (meta["vectors"] or f"{name}_vectors.npy")
    try:
        vectors = np.load(path, mmap_mode="r")
    except FileNotFoundError as error:
        raise InputError(f"{folder}: its vectors {path} are gone; run `study extract` on the plan") from error
    rows, centre = np.load(folder / f"{name}_rows.npy"), np.load(folder / f"{name}_centre.npy")
    return FeatureRows(vectors, rows, centre, meta["scale"])


def find_vectors(folder: Path) -> list[Path]:
    """Files outside of `folder`, at any depth of which `save_places` has put their path; as that path says it.

    A link on the way is not followed: where the folder is copied to, the task looks where its path points.
    """
    metas = {path: read_json(path) for path in folder.rglob("*.json")}
    found = {os.path.normpath(path.parent / meta["vectors"]) for path, meta in metas.items() if meta.get("vectors")}
    return sorted(map(Path, found))


def read_meta(task_dir: Path) -> dict[str, Any]:
    """What `task.json` says; InputError where no task is built."""
    try:
        meta: dict[str, Any] = read_json(task_dir / "task.json")
    except FileNotFoundError as error:
        raise not_built(task_dir) from error
    return meta


def not_built(folder: Path) -> InputError:
    return InputError(f"{folder}: no task is built here; run `study extract` on the plan")


def save_arrays(folder: Path, **arrays: NDArray[Any]) -> None:
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)


def load_array(folder: Path, name: str) -> Tensor:
    """Mapped, so that the processes of a node share it; a write would stay in its process."""
    return torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="c"))
