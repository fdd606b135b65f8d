"""Folders and files that appear whole or not at all."""

import errno
import fcntl
import json
import os
import re
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from features.errors import InputError

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Numbers of the errors of a disk without room."""

SIMULATED = "SIMULATED.json"
"""Name of the file that marks a folder of raw data as simulated (`features.simulate.simulator`)."""

UNFINISHED = ".tmp"
"""End of the names of files that are being written, see `atomic_file`."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Run the block while no other process holds the lock on this file; the lock of a killed process is free."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def plain_name(folder: Path) -> Iterator[Path]:
    """Yield the folder for libraries that read patterns in paths: itself, or a copy that goes with the block."""
    if _is_plain(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as place:
        yield shutil.copytree(folder, Path(place) / "copy")


@contextmanager
def work_folder(beside: Path) -> Iterator[Path]:
    """Make a folder for the block, in `beside`, or in the temporary folder where that path would be read as a pattern."""
    with tempfile.TemporaryDirectory(dir=beside if _is_plain(beside) else None, prefix="work-") as place:
        yield Path(place)


def _is_plain(path: Path) -> bool:
    return re.fullmatch(r"[^?*\[\]%#]*", str(path)) is not None


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a hidden folder beside `path`; it becomes `path` when the block ends well, and is removed otherwise.

    Where another process has filled `path` meanwhile, its folder stays and ours is dropped: the caller names folders by
    content, or looks at what is there. Hidden folders left by processes of this host that were killed are removed.
    """
    prefix = f".{path.name}.{socket.gethostname()}."
    for folder in path.parent.glob(f"{prefix}*"):
        if not _alive(folder.name.removeprefix(prefix)):
            shutil.rmtree(folder, ignore_errors=True)
    partial = path.with_name(f"{prefix}{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        try:
            partial.rename(path)
        except OSError:
            if not path.is_dir() or not any(path.iterdir()):
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, ValueError):  # another user's process, or a folder that is not ours
        return True
    return True


@contextmanager
def atomic_file(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield a hidden path beside `path` to write to; it replaces `path` when the block ends well, and is gone otherwise.

    Readers see the old file or the new one, whole. durable: the content is on the disk before the name is.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}{UNFINISHED}")
    try:
        yield beside
        if durable:
            with beside.open("rb") as file:
                os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def save_torch(content: Any, path: Path) -> None:
    """Write what `torch.save` takes; a write that comes up short is the OSError of a full disk, not a RuntimeError."""
    import torch

    try:
        torch.save(content, path)
    except RuntimeError as error:
        if not path.parent.is_dir():
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error


def read_json(path: Path) -> Any:
    """Read a file that `write_json` wrote. Raises InputError where it is damaged, and FileNotFoundError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: is damaged ({error}); delete its folder {path.parent}, it is made again") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace `path` by `content` in one step."""
    with atomic_file(path) as beside:
        beside.write_text(json.dumps(content, indent=1) + "\n")


def mapped_array(path: Path, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> np.memmap[Any, np.dtype[Any]]:
    """Create a .npy that is written through memory; its room on the disk is taken first.

    Raises OSError where there is no room: a write into a mapping without room would be SIGBUS, the end of the process.
    """
    array: np.memmap[Any, np.dtype[Any]] = np.lib.format.open_memmap(path, "w+", dtype, shape)
    with path.open("r+b") as file:
        if size := path.stat().st_size:
            os.posix_fallocate(file.fileno(), 0, size)
    return array


@contextmanager
def store_errors(folder: Path) -> Iterator[None]:
    """Turn what the system says about a folder that cannot be written into an InputError with a remedy."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"store {folder}: cannot be written ({error.strerror or error}); free space, allow writing, or name another "
            "folder; what is finished is kept"
        ) from error
