"""Vectors of texts with images by a vision-language model of transformers (MuSiC section 3.2).

The prompt is the model's own chat template around one image and one text. first_last_avg is that of
`features.encoders.encoder`, with h_1 and h_L of the language model's blocks, over all tokens of the prompt or over those
that are not the image's. A text without an image is a prompt without one.

Legend: B prompts of a batch, L tokens of the longest of them, F width of the language model.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from features.encoders.batches import Budget, Encoded, Means, padded_size, pool, run_batch, token_batches
from features.encoders.weights import quiet
from features.errors import one_line
from features.extraction.prompts import Row
from features.images.gather import open_image

if TYPE_CHECKING:
    from PIL import Image

    from features.encoders.encoder import EncoderSpec

_WINDOW = 64  # prompts whose images are in memory at once


@dataclass(frozen=True)
class _Prompt:
    """One text in the chat template, and its image."""

    text: str
    image: Image.Image | None
    length: int  # in tokens, those of the image included

    def __len__(self) -> int:
        return self.length


class ImageTextEncoder:
    """A vision-language model and its processor as an `Encoder`; safe to use from several threads."""

    def __init__(self, model: Any, processor: Any, spec: EncoderSpec, images: Path) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.to(self.device).eval()
        self.processor, self.tokenizer, self.spec, self.images = processor, processor.tokenizer, spec, images
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token  # any will do, since padding is masked
        self.width = model.config.get_text_config().hidden_size
        self.budget = Budget(spec.batch_tokens)
        self._lock = threading.Lock()  # a fast tokenizer that is called from two threads raises "Already borrowed"
        self._image_tokens: dict[tuple[int, int], int] = {}  # width and height of an image -> its tokens
        self._first = threading.local()  # .state: h_1 of this thread's forward pass
        if spec.pooling == "first_last_avg":
            # A hook on one block keeps that block's output alone, whichever outputs the model offers to record.
            self.model.get_decoder().layers[0].register_forward_hook(self._keep)

    def encode(self, rows: Sequence[Row]) -> Encoded:
        """Vectors of `rows`: the mean over a row's texts, each seen with the row's image."""
        means = Means(rows, self.width, {})
        for start in range(0, len(means.units), _WINDOW):
            self._encode_window(means, range(start, min(start + _WINDOW, len(means.units))))
        return means.encoded()

    def _encode_window(self, means: Means, window: range) -> None:
        prompts: dict[int, _Prompt] = {}
        for i in window:
            text, image = means.units[i]
            try:
                prompts[i] = self._prompt(text, image)
            except (OSError, ValueError) as error:
                means.fail({i: f"{type(error).__name__}: {one_line(error)}"})
        for seen in (True, False):  # the library takes images for all texts of a batch, or for none
            mine = [i for i, prompt in prompts.items() if (prompt.image is not None) == seen]
            lengths = np.array([len(prompts[i]) for i in mine], np.int64)
            for batch in token_batches(lengths, self.budget, exact=self.device.type == "cpu"):
                units = [mine[i] for i in batch]
                these = [prompts[i] for i in units]
                vectors, failed = run_batch(these, self._vectors, padded_size, self.budget, self.width)
                means.add(units, vectors, lengths[batch], padded_size(these), failed)

    def _prompt(self, text: str, image: str | None) -> _Prompt:
        seen = open_image(self.images, image, self.spec.max_pixels) if image is not None else None
        with self._lock:
            prompt = self._templated(self._cut(text), seen is not None)
            length = len(self.tokenizer(prompt, add_special_tokens=False)["input_ids"])
            if seen is not None:
                length += self._tokens_of(seen)
        return _Prompt(prompt, seen, length)

    def _cut(self, text: str) -> str:
        """The text's first `max_tokens` tokens: a prompt that is cut after the template would lose what holds the image."""
        ends = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return text if len(ends) <= self.spec.max_tokens else text[: ends[self.spec.max_tokens - 1][1]]

    def _templated(self, text: str, seen: bool) -> str:
        content = [{"type": "image"}] * seen + [{"type": "text", "text": text}]
        prompt: str = self.processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        return prompt

    def _tokens_of(self, image: Image.Image) -> int:
        """How many tokens an image of this size becomes, less its placeholder; asked of the processor once per size."""
        if image.size not in self._image_tokens:
            prompt = self._templated("", True)
            alone = len(self.tokenizer(prompt, add_special_tokens=False)["input_ids"])
            inputs = self.processor(text=[prompt], images=[image], return_tensors="pt")
            self._image_tokens[image.size] = inputs["input_ids"].shape[1] - alone
        return self._image_tokens[image.size]

    def _vectors(self, prompts: Sequence[_Prompt]) -> NDArray[np.float32]:
        """[B, F] of B prompts, all with an image or all without. Padding is on the right, as in `TextEncoder`."""
        images = [prompt.image for prompt in prompts if prompt.image is not None] or None
        with self._lock, quiet():
            inputs = self.processor(
                text=[prompt.text for prompt in prompts],
                images=images,
                padding=True,
                padding_side="right",
                add_special_tokens=False,  # the template has written its own
                return_tensors="pt",
            )
        inputs = {
            name: value.to(self.device, self.model.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }
        mask_BL = inputs["attention_mask"]
        if self.spec.states == "text":
            mask_BL = mask_BL * (inputs["input_ids"] != self.model.config.image_token_id)
        with torch.inference_mode():
            # The base model: the head would make a number for each word of the vocabulary, at each token.
            last_BLF = self.model.base_model(**inputs, use_cache=False).last_hidden_state
            states = [last_BLF] if self.spec.pooling == "mean" else [self._first.__dict__.pop("state"), last_BLF]
            return pool(states, mask_BL).cpu().numpy()

    def _keep(self, block: Any, inputs: Any, output: Any) -> None:
        self._first.state = output[0] if isinstance(output, tuple) else output
