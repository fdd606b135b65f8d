"""Vectors of texts with images by a vision-language model of transformers (MuSiC section 3.2).

The prompt is the model's own chat template around one image and one text. first_last_avg is that of
`features.encoders.text`, with h_1 and h_L of the language model's blocks, over all tokens of the prompt or over those
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

from features.encoders.batches import Encoded, RunningMeans, TokenBudget, padded_size, pool, run_batch, token_batches
from features.encoders.inputs import EncoderInput
from features.encoders.spec import EncoderSpec
from features.encoders.weights import quiet
from features.errors import named_line
from features.images.gather import open_image

if TYPE_CHECKING:
    from PIL import Image

_WINDOW = 64  # prompts whose images are in memory at once


@dataclass(frozen=True)
class _Prompt:
    """One text in the chat template, with its image."""

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
        self.budget = TokenBudget(spec.batch_tokens)
        self._lock = threading.Lock()  # a fast tokenizer that is called from two threads raises "Already borrowed"
        self._image_tokens: dict[tuple[int, int], int] = {}  # width and height of an image -> its tokens
        self._first = threading.local()  # .state: h_1 of this thread's forward pass
        if spec.pooling == "first_last_avg":
            # A hook on one block keeps that block's output alone, whichever outputs the model offers to record.
            self.model.get_decoder().layers[0].register_forward_hook(self._keep)

    def encode(self, inputs: Sequence[EncoderInput]) -> Encoded:
        """Return a vector for each input: the mean over its texts, each read with the input's image."""
        means = RunningMeans(inputs, self.width, {})
        for start in range(0, len(means.units), _WINDOW):
            self._encode_window(means, range(start, min(start + _WINDOW, len(means.units))))
        return means.encoded()

    def _encode_window(self, means: RunningMeans, window: range) -> None:
        prompts: dict[int, _Prompt] = {}
        for i in window:
            text, image = means.units[i]
            try:
                prompts[i] = self._prompt(text, image)
            except (OSError, ValueError) as error:
                means.fail({i: named_line(error)})
        for with_image in (True, False):  # the library takes images for all texts of a batch, or for none
            candidates = [i for i, prompt in prompts.items() if (prompt.image is not None) == with_image]
            lengths = np.array([len(prompts[i]) for i in candidates], np.int64)
            for batch in token_batches(lengths, self.budget, exact=self.device.type == "cpu"):
                units = [candidates[i] for i in batch]
                batch_prompts = [prompts[i] for i in units]
                vectors, failed = run_batch(batch_prompts, self._vectors, padded_size, self.budget, self.width)
                means.add(units, vectors, lengths[batch], padded_size(batch_prompts), failed)

    def _prompt(self, text: str, image: str | None) -> _Prompt:
        opened = open_image(self.images, image, self.spec.max_pixels) if image is not None else None
        with self._lock:
            prompt = self._templated(self._cut(text), opened is not None)
            length = len(self.tokenizer(prompt, add_special_tokens=False)["input_ids"])
            if opened is not None:
                length += self._image_length(opened)
        return _Prompt(prompt, opened, length)

    def _cut(self, text: str) -> str:
        """Return the text's first `max_tokens` tokens; a prompt cut after the template would lose the image's place."""
        ends = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return text if len(ends) <= self.spec.max_tokens else text[: ends[self.spec.max_tokens - 1][1]]

    def _templated(self, text: str, with_image: bool) -> str:
        content = [{"type": "image"}] * with_image + [{"type": "text", "text": text}]
        prompt: str = self.processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        return prompt

    def _image_length(self, image: Image.Image) -> int:
        """Count the tokens that an image of this size becomes, less its placeholder; each size is tried once."""
        if image.size not in self._image_tokens:
            prompt = self._templated("", True)
            alone = len(self.tokenizer(prompt, add_special_tokens=False)["input_ids"])
            inputs = self.processor(text=[prompt], images=[image], return_tensors="pt")
            self._image_tokens[image.size] = inputs["input_ids"].shape[1] - alone
        return self._image_tokens[image.size]

    def _vectors(self, prompts: Sequence[_Prompt]) -> NDArray[np.float32]:
        """Return the vectors [B, F] of B prompts, all with an image or all without; padded on the right as texts are."""
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
