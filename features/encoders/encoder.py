"""From a resolved encoder to one that is loaded: of texts alone, or of texts with images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from features.encoders.batches import Encoded
from features.encoders.inputs import EncoderInput
from features.encoders.spec import ResolvedEncoder
from features.encoders.text import TextEncoder
from features.encoders.vision import ImageTextEncoder
from features.encoders.weights import check_dtype, load_config_of, load_processor_of, load_tokenizer_of, load_weights
from features.errors import InputError


class Encoder(Protocol):
    """What the extraction needs of a model: a vector for each input. A bad input costs that input only."""

    def encode(self, inputs: Sequence[EncoderInput]) -> Encoded: ...


def load_encoder(resolved: ResolvedEncoder) -> Encoder:
    """Load weights and tokenizer from the local files, on the GPU if there is one.

    Raises InputError if any weight is missing, unexpected or of another shape and not allowed: such a model would give
    random vectors without an error.
    """
    from transformers import AutoModel, AutoModelForImageTextToText

    spec, place = resolved.spec, f"encoder {resolved.spec.model}"
    check_dtype(place, spec.dtype, resolved.dtype)
    model = load_weights(
        AutoModelForImageTextToText if spec.reads_images else AutoModel,
        place, resolved.path, resolved.dtype, resolved.allow_keys, remote_code=spec.trust_remote_code,
    )  # fmt: skip
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", spec.max_tokens)
    if spec.max_tokens > positions:
        raise InputError(f"encoder.max_tokens: {spec.max_tokens} is more than the model's {positions} positions")
    if not spec.reads_images:
        return TextEncoder(model, load_tokenizer(resolved), spec)
    assert resolved.images is not None
    return ImageTextEncoder(model, load_processor_of(place, resolved.path), spec, resolved.images)


def load_tokenizer(resolved: ResolvedEncoder) -> Any:
    """Load the encoder's tokenizer from its local files."""
    place = f"encoder {resolved.spec.model}"
    return load_tokenizer_of(place, resolved.path, remote_code=resolved.spec.trust_remote_code)


def load_width(resolved: ResolvedEncoder) -> int:
    """Return the width F of the vectors, from the configuration alone."""
    place, trust = f"encoder {resolved.spec.model}", resolved.spec.trust_remote_code
    return int(load_config_of(place, resolved.path, remote_code=trust).get_text_config().hidden_size)
