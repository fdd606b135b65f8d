"""What an encoder reads to compute one vector, and the content key by which the vector is stored."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from features.store.shards import KEY_BYTES


@dataclass(frozen=True, kw_only=True)
class EncoderInput:
    """What one vector is computed from: the mean over `texts` of their vectors, and an image for encoders that see.

    A text encoder refuses an input with an image, so an image never gets lost in silence.
    """

    texts: tuple[str, ...]
    image: str | None = None  # its name in the store, see `features.images.gather`


def input_key(encoder_input: EncoderInput) -> bytes:
    """Return the content key of an input, KEY_BYTES long. Lengths go in too, so ("ab",) and ("a", "b") differ."""
    sha = hashlib.sha256(f"{len(encoder_input.texts)} {encoder_input.image!r}\n".encode())
    for text in encoder_input.texts:
        data = text.encode()
        sha.update(b"%d\n" % len(data))
        sha.update(data)
    return sha.digest()[:KEY_BYTES]
