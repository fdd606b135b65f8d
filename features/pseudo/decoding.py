"""Decoding of many prompts in a fixed number of rows: a row whose answer is complete takes the next prompt at once.

All rows stand in the same columns of the keys and values, each ending in the current one. A new prompt is read apart, and
its keys and values are put into a free row's columns up to the current one; columns that no row attends to any more are
left behind. When no prompt waits, free rows are dropped. So no row is idle, and nothing waits for the longest answer.
The beginning that all prompts share, an instruction, is read once.

Legend: R rows, K new rows, W columns in use, P tokens that all prompts begin with, L tokens of a prompt that are read,
M tokens of the longest answer, V vocabulary, H heads of keys and values, D their width.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import takewhile
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from features.pseudo.prompts import parse_texts
from features.pseudo.sampling import draw_tokens, uniforms

_ROOM = 128  # columns that are added to the buffers at a time
_TRIM = 32  # steps between looks for columns that no row attends to
_READ_TOKENS = 4096  # most padded tokens of prompts that are read at once


class _Columns(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of one layer in buffers [R, H, columns, D], of which the columns from `first` to `end` are in use."""

    def __init__(self, rows: int, like: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.first = self.end = 0
        shape = (rows, like.keys.shape[1], 0, like.keys.shape[3])
        self.buffers = [like.keys.new_zeros(shape), like.values.new_zeros((*shape[:3], like.values.shape[3]))]
        self.device, self.dtype, self.is_initialized = like.keys.device, like.keys.dtype, True
        self._use(0, 0)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Add the keys and values of one more column, [R, H, 1, D]; return those of all columns in use."""
        if self.end == self.buffers[0].shape[2]:
            self._resize(0, _ROOM)
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.end : self.end + 1] = new
        self._use(self.first, self.end + 1)
        return self.buffers[0][:, :, self.first : self.end], self.buffers[1][:, :, self.first : self.end]

    def put(self, place_K: Tensor, like: Any, width: int) -> None:
        """Put the last `width` columns of other keys and values into rows, so that they end in the current column."""
        if self.end < width:
            self._resize(width - self.end, _ROOM)
        for buffer, new in zip(self.buffers, (like.keys, like.values), strict=True):
            buffer[place_K, :, self.end - width : self.end] = new[:, :, -width:]
        self._use(min(self.first, self.end - width), self.end)

    def keep(self, kept_K: Tensor) -> None:
        """Drop all other rows."""
        self.buffers = [buffer[kept_K] for buffer in self.buffers]
        self._use(self.first, self.end)

    def leave(self, columns: int) -> None:
        """Leave the first columns behind."""
        self._use(self.first + columns, self.end)

    def _resize(self, before: int, after: int) -> None:
        """Make buffers with room before and after the columns in use. Zeros: what is masked must still be a number."""
        used = self.end - self.first
        for number, buffer in enumerate(self.buffers):
            larger = buffer.new_zeros((*buffer.shape[:2], before + used + after, buffer.shape[3]))
            larger[:, :, before : before + used] = buffer[:, :, self.first : self.end]
            self.buffers[number] = larger
        self._use(before, before + used)

    def _use(self, first: int, end: int) -> None:
        self.first, self.end = first, end
        self.keys, self.values = (buffer[:, :, first:end] for buffer in self.buffers)


class LanguageModel(Protocol):
    """What decoding asks of a generator (`features.pseudo.generator.CausalGenerator`)."""

    model: Any
    device: torch.device
    pad: int
    ends: list[int]  # tokens that end an answer
    breaks_V: Tensor  # bool [V] tokens that end a line
    lines_V: Tensor  # bool [V] tokens that are a whole line

    @property
    def spec(self) -> Limits: ...

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]: ...


class Limits(Protocol):
    """When an answer is complete, and how its tokens are drawn: what decoding reads of a `GeneratorSpec`."""

    @property
    def texts(self) -> int: ...
    @property
    def max_new_tokens(self) -> int: ...
    @property
    def temperature(self) -> float: ...
    @property
    def top_p(self) -> float: ...
    @property
    def seed(self) -> int: ...


def _common(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all prompts begin with; each has at least one more."""
    tokens = [list(prompt) for prompt in prompts]
    pairs = zip(min(tokens), max(tokens), strict=False)  # whatever these two begin with, those between them do
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return min(same, min(map(len, prompts)) - 1)


class Decoder:
    """The decoding of some prompts (token ids) by a generator, in at most `rows` rows.

    steps, row_steps, tokens: forward passes, rows in all of them, and tokens of the answers: how full the rows were.
    read: tokens of prompts that were read, those of padding among them.
    """

    def __init__(
        self, generator: LanguageModel, prompts: Sequence[Sequence[int]], users: Sequence[str], rows: int
    ) -> None:
        self.generator, self.prompts, self.users, self.spec = generator, prompts, users, generator.spec
        self.steps = self.row_steps = self.tokens = self.read = 0
        self.answers = [""] * len(prompts)
        self.waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # the longest prompts come first
        takes = inspect.signature(generator.model.forward).parameters
        self._takes = [name for name in ("position_ids", "logits_to_keep") if name in takes]
        self._cache_name = "cache" if "cache" in takes else "past_key_values"  # before transformers 5.24
        self._columns: list[_Columns] = []  # of each layer
        self._begin = _common(prompts)  # P
        self._shared: list[tuple[Tensor, Tensor]] = []  # keys and values of it in each layer, [H, P, D]
        device, rows, most = generator.device, min(rows, len(prompts)), self.spec.max_new_tokens
        self._least = max(1, rows // 16)  # free rows that are worth reading prompts for
        never = {generator.pad} - set(generator.ends)
        self._never = torch.tensor(sorted(never), dtype=torch.long, device=device)
        self._ends = torch.tensor(generator.ends, dtype=torch.long, device=device)
        self.prompt_R = [-1] * rows  # number of each row's prompt; -1: free
        self._mask_RW = torch.zeros(rows, 0, dtype=torch.long, device=device)
        self._logits_RV = torch.zeros(rows, len(generator.breaks_V), device=device)
        self._length_R = torch.zeros(rows, dtype=torch.long, device=device)  # tokens of the prompt
        self._count_R = torch.zeros_like(self._length_R)  # tokens of the answer
        self._breaks_R = torch.zeros_like(self._length_R)  # of them, those that end a line
        self._begins_R = torch.ones(rows, dtype=torch.bool, device=device)  # whether the next token begins a line
        self._written_RM = torch.zeros(rows, most, dtype=torch.long, device=device)
        self._uniform_RM = torch.zeros(rows, most, device=device)
        self._whole_RV = torch.zeros_like(self._logits_RV, dtype=torch.bool)  # tokens that were a whole line

    @torch.inference_mode()
    def run(self) -> list[str]:
        """Return the answers in the order of the prompts."""
        if self._begin:
            ids_1P = torch.tensor([self.prompts[0][: self._begin]], device=self.generator.device)
            begin: Any = Cache(layer_class_to_replicate=DynamicLayer)
            self._read(ids_1P, torch.ones_like(ids_1P), begin)
            self._shared = [(layer.keys[0], layer.values[0]) for layer in begin.layers]
        self._refill()
        while any(number >= 0 for number in self.prompt_R):
            token_R = self._draw()
            self._finish(token_R)
            if self.waiting or any(number >= 0 for number in self.prompt_R):
                self._step(token_R)
                self._refill()
                self._drop()
        return self.answers

    def _draw(self) -> Tensor:
        """Draw a token for every row and note it; that of a free row is not read.

        A token that was a whole line is not drawn again: a list of titles has no use for a line twice.
        """
        generator, row_R = self.generator, torch.arange(len(self.prompt_R), device=self._count_R.device)
        logits_RV = self._logits_RV.float().index_fill(1, self._never, -torch.inf)
        logits_RV.masked_fill_(self._whole_RV, -torch.inf)
        at_R = self._count_R.clamp(max=self.spec.max_new_tokens - 1)
        uniform_R = self._uniform_RM[row_R, at_R]
        token_R = draw_tokens(logits_RV, uniform_R, self.spec.temperature, self.spec.top_p)
        self._written_RM[row_R, at_R] = token_R
        self._whole_RV[row_R, token_R] = self._begins_R & generator.lines_V[token_R]
        self._begins_R = generator.breaks_V[token_R]
        self._breaks_R += self._begins_R
        self._count_R += 1
        return token_R

    def _finish(self, token_R: Tensor) -> None:
        """Free the rows whose answer is complete: by the model's end, its length, or the line that makes it enough."""
        generator, texts = self.generator, self.spec.texts
        ended_R = torch.isin(token_R, self._ends) | (self._count_R >= self.spec.max_new_tokens)
        busy_R = torch.tensor([number >= 0 for number in self.prompt_R], device=token_R.device)
        maybe_R = busy_R & (ended_R | (self._begins_R & (self._breaks_R >= texts)))
        rows = maybe_R.nonzero().flatten().tolist()
        written = [self._written_RM[row, : int(self._count_R[row])].tolist() for row in rows]
        for row, ids, answer in zip(rows, written, generator.decode(written), strict=True):
            if bool(ended_R[row]) or len(parse_texts(answer, texts)) == texts:
                self.answers[self.prompt_R[row]] = answer
                self.tokens += len(ids)
                self.prompt_R[row] = -1
                self._mask_RW[row] = 0

    def _step(self, token_R: Tensor) -> None:
        """Compute the logits after the tokens."""
        self._mask_RW = torch.cat([self._mask_RW, self._mask_RW.new_ones(len(self._mask_RW), 1)], dim=1)
        position_R1 = (self._length_R + self._count_R.clamp(max=self.spec.max_new_tokens) - 1)[:, None]
        self._logits_RV = self._forward(token_R[:, None], self._mask_RW, position_R1, Cache(layers=[*self._columns]))
        self.steps, self.row_steps = self.steps + 1, self.row_steps + len(token_R)
        if self.steps % _TRIM == 0:
            unused = int(self._mask_RW.any(dim=0).int().argmax())
            self._mask_RW = self._mask_RW[:, unused:]
            for layer in self._columns:
                layer.leave(unused)

    def _refill(self) -> None:
        """Give free rows to prompts that wait, where there are enough of them."""
        free = [row for row, number in enumerate(self.prompt_R) if number < 0]
        if len(free) < self._least and len(free) < len(self.prompt_R):
            return
        while free and self.waiting:
            longest = len(self.prompts[self.waiting[-1]]) - self._begin
            rows = free[: min(len(self.waiting), max(1, _READ_TOKENS // longest))]
            free = free[len(rows) :]
            self._put(rows, [self.waiting.pop() for _ in rows])

    def _put(self, rows: Sequence[int], numbers: Sequence[int]) -> None:
        """Read prompts and put them into rows.

        As many last tokens of each are read, and what is before them is of the common beginning: no row has a gap.
        """
        prompts, device = [self.prompts[number] for number in numbers], self.generator.device
        longest = max(map(len, prompts))
        ids_KL = torch.full((len(prompts), longest - self._begin), self.generator.pad)
        mask_KW = torch.zeros(len(prompts), longest, dtype=torch.long)
        for row, prompt in enumerate(prompts):  # padding on the left: all prompts end in the same column
            end = prompt[-ids_KL.shape[1] :]
            ids_KL[row, ids_KL.shape[1] - len(end) :] = torch.tensor(end)
            mask_KW[row, longest - len(prompt) :] = 1
        ids_KL, mask_KW, place_K = ids_KL.to(device), mask_KW.to(device), torch.tensor(rows, device=device)
        read = Cache(layer_class_to_replicate=DynamicLayer)
        place_KP = (mask_KW.cumsum(1) - 1).clamp(min=0)[:, : self._begin]
        for number, (keys_HPD, values_HPD) in enumerate(self._shared):
            read.update(keys_HPD[:, place_KP].transpose(0, 1), values_HPD[:, place_KP].transpose(0, 1), number)
        logits_KV = self._read(ids_KL, mask_KW, read)
        self._columns = self._columns or [_Columns(len(self.prompt_R), layer) for layer in read.layers]
        for layer, new in zip(self._columns, read.layers, strict=True):
            layer.put(place_K, new, longest)
        if (wider := longest - self._mask_RW.shape[1]) > 0:
            self._mask_RW = torch.nn.functional.pad(self._mask_RW, (wider, 0))
        self._mask_RW[place_K] = 0
        self._mask_RW[place_K, self._mask_RW.shape[1] - longest :] = mask_KW
        self._logits_RV = self._logits_RV.to(logits_KV.dtype).index_copy(0, place_K, logits_KV)
        self._length_R[place_K] = mask_KW.sum(1)
        self._count_R[place_K], self._breaks_R[place_K], self._begins_R[place_K] = 0, 0, True
        self._whole_RV[place_K] = False
        drawn = [uniforms(self.spec.seed, self.users[number], self.spec.max_new_tokens) for number in numbers]
        self._uniform_RM[place_K] = torch.from_numpy(np.stack(drawn)).to(device)
        for row, number in zip(rows, numbers, strict=True):
            self.prompt_R[row] = number

    def _drop(self) -> None:
        """Drop free rows once no prompt waits and they are an eighth."""
        kept = [row for row, number in enumerate(self.prompt_R) if number >= 0]
        if self.waiting or len(kept) > len(self.prompt_R) * 7 / 8:
            return
        kept_K = torch.tensor(kept, dtype=torch.long, device=self.generator.device)
        self.prompt_R = [self.prompt_R[row] for row in kept]
        for layer in self._columns:
            layer.keep(kept_K)
        for name, state in vars(self).items():
            if isinstance(state, Tensor) and name.rpartition("_")[2].startswith("R"):
                setattr(self, name, state[kept_K])

    def _read(self, ids_KL: Tensor, mask_KW: Tensor, cache: Cache) -> Tensor:
        """Return the logits after prompts, of which the cache holds the first W - L columns."""
        self.read += ids_KL.numel()
        position_KL = (mask_KW.cumsum(1) - 1).clamp(min=0)[:, -ids_KL.shape[1] :]
        return self._forward(ids_KL, mask_KW, position_KL, cache)

    def _forward(self, ids_RL: Tensor, mask_RW: Tensor, position_RL: Tensor, cache: Cache) -> Tensor:
        """Return the logits after the last token of each row, [R, V]; keys and values are added to the cache."""
        arguments = {"position_ids": position_RL, "logits_to_keep": 1}
        output = self.generator.model(
            input_ids=ids_RL, attention_mask=mask_RW, use_cache=True,
            **{self._cache_name: cache}, **{name: arguments[name] for name in self._takes},
        )  # fmt: skip
        logits_RV: Tensor = output.logits[:, -1]
        return logits_RV
