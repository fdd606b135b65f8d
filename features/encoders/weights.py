"""Pretrained models of transformers on this machine: found, hashed, and loaded whole or not at all.

A model is a folder in the layout of `save_pretrained`, or one GGUF file, which holds configuration, tokenizer and
quantised weights; transformers makes weights of any type out of these. A `place` is what the model is to the user, and
how its errors begin: "encoder minilm".
"""

from __future__ import annotations

import importlib.util
import json
import re
import socket
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import torch

from features.errors import InputError, one_line
from features.store.tables import digest

_WEIGHTS = ("*.safetensors", "*.bin")
_OTHER_FILES = ("config.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "*.model")
PROCESSOR_FILES = ("*processor_config.json", "chat_template*")  # of vision-language models
CODE_FILES = ("*.py",)  # of models that bring their own code
GGUF = ".gguf"
_GGUF_PACKAGES = ("gguf", "accelerate")  # what transformers reads such files with


@dataclass(frozen=True, kw_only=True)
class PretrainedFiles:
    """A folder in the layout of `save_pretrained`, or a GGUF file, with the hashes of its files."""

    path: Path
    weights: tuple[Path, ...]
    weights_sha256: str
    files_sha256: str  # configuration and tokenizer; those of a GGUF file are in its weights


def find_model(role: str, model: str, revision: str | None, alternatives: str) -> Path:
    """Return the folder or GGUF file of a pretrained model: `model` itself, or the folder of a hub id in the local cache.

    role: "encoder" or "generator". alternatives: what else `model` could have been, for the error.
    Raises InputError where there is none, or for a hub id without a revision or outside the cache.
    """
    if Path(model).is_dir() or (Path(model).suffix == GGUF and Path(model).is_file()):
        return Path(model)
    if model.count("/") != 1 or model.startswith(("/", ".", "~")) or model.endswith(GGUF):
        raise InputError(f"{role} {model}: neither {alternatives} nor a folder nor a GGUF file; give one of them")
    if revision is None:
        raise InputError(f"{role} {model}: a hub id needs a pinned revision; set {role}.revision to a commit")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError as error:
        raise InputError(
            f"{role} {model}: no such folder, and revision {revision} is not in the hub's cache; run "
            f"hf download {model} --revision {revision}"
        ) from error


def hash_pretrained(place: str, path: Path, more_files: Sequence[str] = ()) -> PretrainedFiles:
    """Hash the files of a model; no weights are loaded. more_files: patterns of further files that outputs depend on.

    Raises InputError for a folder without configuration or weights, and for a GGUF file that is not whole or that
    nothing is installed to read.
    """
    if path.suffix == GGUF:
        _gguf_tensors(place, path)
        return PretrainedFiles(
            path=path, weights=(path,), weights_sha256=_files_sha256([path]), files_sha256=_files_sha256([])
        )
    weights = sorted(file for pattern in _WEIGHTS for file in path.glob(pattern))
    if not weights or not (path / "config.json").exists():
        raise InputError(f"{place}: {path} holds no config.json with *.safetensors or *.bin; save a model there")
    others = sorted({file for pattern in (*_OTHER_FILES, *more_files) for file in path.glob(pattern)})
    return PretrainedFiles(
        path=path,
        weights=tuple(weights),
        weights_sha256=_files_sha256(weights),
        files_sha256=_files_sha256(others),
    )


def _gguf_tensors(place: str, path: Path) -> dict[str, int]:
    """Return the number of weights of each tensor of a GGUF file, by its name there, from the head of the file.

    Raises InputError for a file that is cut short or no GGUF file, and where the packages that read it are not installed.
    """
    if missing := [package for package in _GGUF_PACKAGES if importlib.util.find_spec(package) is None]:
        raise InputError(f'{place}: {path} needs {" and ".join(missing)}; pip install ".[llm]"')
    with _loading(place, path):
        from transformers.integrations.gguf.reader import GgufHeader

        header = GgufHeader.from_file(str(path))
        end = header.data_start + max(tensor.offset + tensor.nbytes for tensor in header.tensors)
        if (size := path.stat().st_size) < end:
            raise ValueError(f"it has {size:,} bytes of {end:,}")
    return {tensor.name: prod(tensor.shape) for tensor in header.tensors}


def check_own_code(place: str, folder: Path) -> None:
    """Raise InputError where the pretrained model names code of another repository, which no revision of its own pins."""
    auto_maps: list[Any] = []

    def keep(mapping: dict[str, Any]) -> dict[str, Any]:
        auto_maps.append(mapping.get("auto_map"))
        return mapping

    with _loading(place, folder):
        for path in sorted(folder.glob("*config*.json")):
            json.loads(path.read_bytes(), object_hook=keep)
    if repositories := sorted(set(re.findall(r'"([^"]*?)--', json.dumps(auto_maps)))):
        raise InputError(
            f"{place}: runs code of {', '.join(repositories)}, which its revision does not pin; publish a repository of "
            "your own with these files beside the weights, and without the names before -- in auto_map"
        )


def _files_sha256(paths: Sequence[Path]) -> str:
    """Return the SHA-256 of one file, or of the names and hashes of several."""
    hashes = []
    for path in paths:
        stat = path.stat()
        hashes.append((path.name, _file_sha256(path, stat.st_size, stat.st_mtime_ns)))
    if len(hashes) == 1:
        return hashes[0][1]
    return digest(dict(hashes))


@lru_cache(maxsize=1024)
def _file_sha256(path: Path, size: int, mtime_ns: int) -> str:
    import hashlib

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def resolve_dtype(dtype: str) -> str:
    """Return the compute type that "auto" means on this machine.

    That is bfloat16 only where the hardware multiplies in it: with AMX it is 4 times faster than float32 here, without any
    such instruction 80 times slower.
    """
    if dtype != "auto":
        return dtype
    if torch.cuda.is_available():
        return "bfloat16"
    cpu = torch.cpu.get_capabilities()
    return "bfloat16" if cpu.get("amx_bf16") or cpu.get("avx512_bf16") else "float32"


def check_dtype(place: str, setting: str, dtype: str) -> None:
    """Raise InputError where the setting "auto" is another type on this machine than `dtype`, its type on the driver.

    Vectors of both types under one key would be a mixture, and float32 may need twice the memory of a GPU.
    """
    if setting == "auto" and (here := resolve_dtype(setting)) != dtype:
        raise InputError(
            f"{place}: dtype auto is {here} on node {socket.gethostname()} and {dtype} where the work began; "
            f"set {place.split()[0]}.dtype to one of them"
        )


def load_weights(
    auto_class: Any, place: str, path: Path, dtype: str, allow_keys: Sequence[str], *, remote_code: bool = False
) -> Any:
    """Load the model of a folder or GGUF file, in `dtype`, by one of transformers' Auto classes.

    remote_code: run the Python files that the folder brings, where the library has no class of its own for it.
    Raises InputError where this node does not see the files, and if any weight is missing, unexpected or of another shape
    and not allowed: such a model would give random numbers without an error.
    """
    role = place.split()[0]
    if not path.exists():
        raise InputError(
            f"{place}: node {socket.gethostname()} does not see {path}; put it on a folder that all nodes see (the hub's "
            "cache with HF_HOME=/shared/hf), or install it on all nodes alike"
        )
    with quiet(), _loading(place, path) as source:
        if path.suffix == GGUF:
            from transformers import modeling_gguf_pytorch_utils
            from transformers.utils.quantization_config import GgufConfig

            source["quantization_config"] = GgufConfig(dequantize=True)  # on all machines, whatever kernels one has
            modeling_gguf_pytorch_utils.tqdm = _no_bar  # type: ignore[attr-defined]  # the one bar that `quiet` does not reach
        model, info = auto_class.from_pretrained(
            **source,
            dtype=getattr(torch, dtype),
            local_files_only=True,
            trust_remote_code=remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
    wrong = {
        kind: sorted(name for name in map(_weight_name, names) if not any(fnmatch(name, p) for p in allow_keys))
        for kind, names in info.items()
        if kind != "error_msgs"
    }
    faults = [
        f"{len(names)} {kind.replace('_', ' ')} ({', '.join(names[:3])})" for kind, names in wrong.items() if names
    ]
    faults += [one_line(message) for message in info["error_msgs"]]
    if path.suffix == GGUF:
        faults += _gguf_surplus(model, _gguf_tensors(place, path), allow_keys)
    if faults:
        raise InputError(
            f"{place}: {path} does not fit {type(model).__name__}: "
            f"{'; '.join(faults)}; use a model of this class, or name harmless weights in {role}.allow_keys"
        )
    return model


def _no_bar(steps: Iterable[Any], **_: Any) -> Iterable[Any]:
    return steps


def _gguf_surplus(model: Any, tensors: Mapping[str, int], allow_keys: Sequence[str]) -> list[str]:
    """Return what is wrong where a GGUF file has tensors that the model did not take: the library drops them in silence.

    Counted in weights, because their names are others than the model's; `allow_keys` are names of the file here.
    """
    needed = {name: count for name, count in tensors.items() if not any(fnmatch(name, key) for key in allow_keys)}
    surplus = sum(needed.values()) - sum(weight.numel() for weight in model.parameters())
    if surplus <= 0:  # below 0: tensors of `allow_keys` that the model has a place for
        return []
    names = sorted({re.sub(r"\d+", "*", name) for name in needed})
    return [f"{surplus:,} weights too many in the tensors {', '.join(names)}"]


def load_config_of(place: str, path: Path, *, remote_code: bool = False) -> Any:
    """Load the configuration of a folder or GGUF file."""
    from transformers import AutoConfig

    with quiet(), _loading(place, path) as source:
        return AutoConfig.from_pretrained(**source, local_files_only=True, trust_remote_code=remote_code)


def load_tokenizer_of(place: str, path: Path, *, remote_code: bool = False) -> Any:
    """Load the tokenizer of a folder or GGUF file."""
    from transformers import AutoTokenizer

    with quiet(), _loading(place, path) as source:
        return AutoTokenizer.from_pretrained(**source, local_files_only=True, trust_remote_code=remote_code)


def load_processor_of(place: str, folder: Path) -> Any:
    """Load the processor of a folder, for texts and still images: what AutoProcessor loads, less its part for videos.

    That part needs torchvision. Images are prepared by Pillow everywhere, so that a vector does not depend on what else is
    installed. Raises InputError for a model that transformers has no processor for.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    with quiet(), _loading(place, folder):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        processor: Any = PROCESSOR_MAPPING.get(type(config), None)
        if processor is None:
            raise ValueError(f"transformers has no processor for {config.model_type}")

        class StillImages(processor):  # type: ignore[misc]
            @classmethod
            def _get_arguments_from_pretrained(cls, *_: Any, **__: Any) -> list[Any]:
                images = AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)  # type: ignore[no-untyped-call]
                tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
                return [tokenizer if "tokenizer" in name else images for name in processor.get_attributes()]

            def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
                return type(argument)

        return StillImages.from_pretrained(folder, local_files_only=True)


def _weight_name(name: Any) -> str:
    """Return the name of a weight; the library gives a mismatched one as (name, shape here, shape there)."""
    return str(name[0] if isinstance(name, tuple) else name)


@contextmanager
def _loading(place: str, path: Path) -> Iterator[dict[str, Any]]:
    """Yield the arguments by which `from_pretrained` reads a folder, or a GGUF file and nothing beside it.

    Turns what the library says about files that it cannot read into an InputError with place and remedy.
    """
    from safetensors import SafetensorError

    wrong = (OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError, IndexError, struct.error)
    try:
        if path.suffix != GGUF:
            yield {"pretrained_model_name_or_path": path}
            return
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / path.name).symlink_to(path.resolve())
            yield {"pretrained_model_name_or_path": folder, "gguf_file": path.name}
    except (*wrong, SafetensorError) as error:
        reason = one_line(error)
        if "contains custom code" in reason:
            role = place.split()[0]
            raise InputError(
                f"{place}: {path} brings its own code; set {role}.trust_remote_code with a pinned revision if you trust "
                "it, or take a model that transformers has a class for"
            ) from error
        remedy = (
            "give a whole GGUF file of an architecture that transformers dequantises"
            if path.suffix == GGUF
            else "save model and tokenizer there again with save_pretrained"
        )
        raise InputError(
            f"{place}: {path} cannot be loaded ({type(error).__name__}: {reason[:200]}); {remedy}"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Switch off the progress bars and reports of transformers in the block: our modules raise or are silent."""
    from transformers.utils import logging

    bar, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
