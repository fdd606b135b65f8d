"""A cache of tasks on nodes that do not see the home folder: they are sent through Ray's object store, once per node.

A server beside the driver packs a folder of a task, with the vectors elsewhere that it points at, when the first worker
asks for it. Ray brings the object to a node once; the first worker there writes it to a cache, under the path that it has
at home, and all of them memory-map it from there. Where every node sees the home folder, nothing of this happens.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.store.folders import atomic_file, locked, whole_folder

Packed = dict[str, NDArray[np.uint8]]
"""Absolute path of a file -> its bytes."""


class TaskServer:
    """Gives workers the files of the home folder, and takes theirs; a Ray actor on the driver's node."""

    def __init__(self) -> None:
        self._packed: dict[str, Any] = {}

    def pack(self, folder: str) -> list[Any]:
        """Return the one reference to a packed folder, in a list, so that Ray hands over the reference and not the files.

        The list is empty where there is no such folder, or not yet.
        """
        import ray

        if folder not in self._packed:
            if not Path(folder).is_dir():
                return []
            self._packed[folder] = ray.put(pack(Path(folder)))
        return [self._packed[folder]]

    def keep(self, path: str, content: bytes | Mapping[str, bytes]) -> None:
        """Write a file that a worker made for the home folder, or a folder of such files, whole or not at all."""
        target = Path(path)
        with _named(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                _write(target, content)
                return
            with whole_folder(target) as work:
                for name, file in content.items():
                    (work / name).write_bytes(file)


def task_server() -> Any:
    """Start a server on this node, which lives as long as its handle; workers get the handle beside their work."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(TaskServer)
    return actor.options(num_cpus=0, scheduling_strategy=this_node).remote()


def pack(folder: Path) -> Packed:
    """Map all files of a folder, and the vectors that it points at."""
    from trainables.tasks.arrays import find_vectors  # torch: of no use to a server that nobody asks

    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): _bytes(path) for path in [*files, *find_vectors(folder)]}


def _bytes(path: Path) -> NDArray[np.uint8]:
    if path.stat().st_size == 0:  # which cannot be mapped
        return np.empty(0, np.uint8)
    return np.asarray(np.memmap(path, np.uint8, "r"))  # a plain array over it: Ray copies that once


def cache_folder() -> Path:
    """Return the folder in which a node keeps what was sent to it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "study" / "sent"


def cached(path: Path) -> Path:
    """Return where a node keeps a file or folder that has this absolute path at home."""
    return cache_folder() / path.relative_to(path.anchor)


def locate(folder: Path, server: Any) -> Path:
    """Return a folder of a task as this process can open it: where it is, or a copy on this node.

    `server`: the driver's; None where all nodes see the home folder. A folder that is not at home either is not copied.
    Raises OSError, which names the path, where the copy cannot be written.
    """
    if folder.is_dir() or server is None:
        return folder
    import ray

    copy = cached(folder)
    with _named(copy), locked(cache_folder() / ".lock"):
        if not copy.is_dir():
            for reference in ray.get(server.pack.remote(str(folder))):
                _unpack(ray.get(reference), folder)
    return copy


def bring_home(path: Path, server: Any) -> None:
    """Send a file, or a folder of files, of this node's cache to where it belongs at home; nothing where there is none."""
    import ray

    copy = cached(path)
    if copy.is_dir():
        ray.get(server.keep.remote(str(path), {file.name: file.read_bytes() for file in copy.iterdir()}))
    elif copy.is_file():
        ray.get(server.keep.remote(str(path), copy.read_bytes()))


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Let an error of writing name its file, or at least this path: a write that finds no room names none."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _unpack(packed: Packed, folder: Path) -> None:
    """Write the files to the cache, vectors first: a folder that is there is whole."""
    inside = {Path(name): content for name, content in packed.items() if Path(name).is_relative_to(folder)}
    for name, content in packed.items():
        if Path(name) not in inside and not (copy := cached(Path(name))).is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            _write(copy, content.data)
    with whole_folder(cached(folder)) as work:
        for path, content in inside.items():
            (work / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (work / path.relative_to(folder)).write_bytes(content.data)


def _write(path: Path, content: bytes | memoryview) -> None:
    with atomic_file(path) as beside:
        beside.write_bytes(content)
