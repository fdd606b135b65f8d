"""Images of items, gathered by content: local files and URLs, fully decoded before anything is computed from them.

    <store>/images/<first 2>/<sha256>     the file, byte for byte
    <store>/images/index/*.jsonl          which references it has; a line a reference, a file a run

An image in the store is never read or fetched again (a local file: as long as its size and time of change stay). One that
cannot be fetched or decoded is a reason, not an error: the next run tries it again.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from features.checks import number
from features.cores import usable_cores
from features.errors import InputError, one_line
from features.images.download import DownloadError, DownloadSpec, download
from features.progress import Progress
from features.store.folders import atomic_file, store_errors

if TYPE_CHECKING:
    from PIL import Image

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # others are decoded by code that few have looked at
_MOST_PIXELS = 64_000_000  # an image of more is an attack on the memory
_DECODING = threading.Semaphore(usable_cores())  # more at a time would be no faster, and hold 400 MB each
NO_IMAGE = "no image"


@dataclass(frozen=True, kw_only=True)
class ImageSpec(DownloadSpec):
    """How items' images are gathered. Changes no vector: images are named by their content."""

    # share of the items' images that may be missing or corrupt (their items are read by their text alone)
    max_missing_fraction: float = 0.05

    def faults(self) -> list[str]:
        """Return what is wrong with the fields."""
        return [*super().faults(), number(self, "max_missing_fraction", least=0, most=1)]


@dataclass(frozen=True)
class GatheredImages:
    """Which references have an image. names: reference -> name in the store; missing: reference -> why there is none."""

    names: Mapping[str, str]
    missing: Mapping[str, str]

    def check(self, place: str, spec: ImageSpec) -> None:
        """Raise InputError where too many are missing."""
        count = len(self.names) + len(self.missing)
        if len(self.missing) > spec.max_missing_fraction * count:
            reference, reason = min(self.missing.items())
            raise InputError(
                f"{place}: {len(self.missing)} of {count} images are missing, and images.max_missing_fraction is "
                f"{spec.max_missing_fraction:g}; first {reference}: {reason}; mend them, or raise it"
            )


def images_folder(store: Path) -> Path:
    """Return the folder of all images of a store."""
    return store / "images"


def stored_images(references: Iterable[str], data: Path, store: Path) -> dict[str, str]:
    """Return reference -> name of its image, for those that the store has."""
    folder, names = images_folder(store), {}
    index = _read_index(folder / "index")
    for reference in references:
        entry = index.get(reference)
        if entry is not None and entry[1] == _stamp(reference, data) and image_path(folder, entry[0]).exists():
            names[reference] = entry[0]
    return names


def gather_images(
    references: Iterable[str],
    data: Path,
    store: Path,
    spec: ImageSpec,
    progress: Progress | None = None,
) -> GatheredImages:
    """Bring the images of all references into the store: paths of files (relative ones lie in `data`), and URLs.

    progress: told of images. Raises InputError where the store cannot be written.
    """
    wanted = list(dict.fromkeys(references))
    names = stored_images(wanted, data, store)
    left = [reference for reference in wanted if reference not in names]
    missing: dict[str, str] = {}
    if not left:
        return GatheredImages(names, missing)
    folder = images_folder(store)
    with store_errors(folder):
        (folder / "index").mkdir(parents=True, exist_ok=True)
        # A file for this run, so that two runs never write into each other's lines.
        index = (folder / "index" / f"{time.time_ns()}-{os.getpid()}.jsonl").open("a", encoding="utf-8")
    pool = ThreadPoolExecutor(spec.parallel)
    store_image = partial(_store_image, data=data, folder=folder, spec=spec)
    try:
        with index:
            todo = iter(left)
            running: dict[Future[str], str] = {}
            _submit(pool, store_image, todo, running, 2 * spec.parallel)
            while running:
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    reference = running.pop(future)
                    try:
                        names[reference] = name = future.result()
                    except (DownloadError, UnreadableImageError) as error:
                        missing[reference] = str(error)
                        continue
                    with store_errors(folder):
                        print(json.dumps([reference, name, _stamp(reference, data)]), file=index, flush=True)
                _submit(pool, store_image, todo, running, 2 * spec.parallel)
                if progress is not None:
                    progress(len(names) + len(missing) - (len(wanted) - len(left)), len(left))
    finally:
        pool.shutdown(cancel_futures=True)
    return GatheredImages(names, missing)


def image_path(folder: Path, name: str) -> Path:
    """Return where an image lies in the folder of all images."""
    return folder / name[:2] / name


def open_image(folder: Path, name: str, max_pixels: int) -> Image.Image:
    """Open a stored image in RGB, scaled down to at most `max_pixels`. Raises OSError where it is gone."""
    from PIL import Image

    image = decode(image_path(folder, name).read_bytes())
    scale = (max_pixels / (image.width * image.height)) ** 0.5
    if scale < 1:
        size = max(1, int(image.width * scale)), max(1, int(image.height * scale))
        image = image.resize(size, Image.Resampling.BICUBIC)
    return image


def decode(data: bytes) -> Image.Image:
    """Decode an image to the last pixel, in RGB: a check of its header alone passes half a file.

    Raises what Pillow raises, mostly OSError.
    """
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about odd but readable files; the size is checked in the next lines
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, more than {_MOST_PIXELS:,}")
            image.load()
            return image.convert("RGB")


class UnreadableImageError(Exception):
    """Says why a file that is there is of no use."""


def _submit(
    pool: ThreadPoolExecutor,
    store_image: Callable[[str], str],
    todo: Iterator[str],
    running: dict[Future[str], str],
    most: int,
) -> None:
    """Submit references until `most` are running: a task object for each of a million images would be too many."""
    while len(running) < most and (reference := next(todo, None)) is not None:
        running[pool.submit(store_image, reference)] = reference


def _store_image(reference: str, data: Path, folder: Path, spec: ImageSpec) -> str:
    """Fetch, decode and store one image; return its name."""
    content = download(reference, spec) if _is_url(reference) else _read_local(data / reference, spec.max_bytes)
    try:
        with _DECODING:
            decode(content)
    except Exception as error:  # Pillow's decoders raise what they like on hostile files
        raise UnreadableImageError(f"not a whole image ({type(error).__name__}: {one_line(error, 200)})") from error
    name = hashlib.sha256(content).hexdigest()
    path = image_path(folder, name)
    if not path.exists():
        with store_errors(folder):
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as beside:
                beside.write_bytes(content)
    return name


def _read_local(path: Path, most: int) -> bytes:
    """Read a plain file: a pipe may have no writer, and a device no end."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableImageError("not a file")
        if status.st_size > most:
            raise UnreadableImageError(f"larger than {most:,} bytes")
        return path.read_bytes()
    except OSError as error:
        raise UnreadableImageError(f"{error.strerror or error}") from error
    except ValueError as error:  # a name that no file can have
        raise UnreadableImageError(str(error)) from error


def _is_url(reference: str) -> bool:
    return "://" in reference


def _stamp(reference: str, data: Path) -> list[int] | None:
    """Return what tells a local file from a later one of its name: [size, time], [] where it is absent; None for a URL."""
    if _is_url(reference):
        return None
    with suppress(OSError, ValueError):
        status = (data / reference).stat()
        return [status.st_size, status.st_mtime_ns]
    return []


def _read_index(folder: Path) -> dict[str, tuple[str, list[int] | None]]:
    """Return reference -> (name of its image, stamp)."""
    index: dict[str, tuple[str, list[int] | None]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):  # the last line of a run that was killed
                reference, name, stamp = json.loads(line)
                index[reference] = name, stamp
    return index
