"""A candidate for generation: a row that has its texts makes room for the next user at once, so that no row is idle.

All rows stand in the same column of the key-value cache. A new user's prompt is read apart, and its keys and values are
put into the row's columns just before the current one; columns that no row attends to any more are cut off. Answers are
those of `CausalGenerator.generate` but for their last bits. Legend: B rows, K new rows, W columns, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from features.pseudo.generator import CausalGenerator, draw_tokens, uniforms
from features.pseudo.prompts import PseudoPrompt, parse_texts

_TRIM = 32  # steps between looks for columns that can go


class Refilled:
    """One generation of many users in a fixed number of rows. `steps` and `tokens` say how full the rows were."""

    def __init__(self, generator: CausalGenerator, rows: int, least: int = 1) -> None:
        self.generator, self.rows, self.least = generator, rows, least
        self.steps = self.tokens = self.row_steps = 0
        takes = inspect.signature(generator.model.forward).parameters
        self.argument = "cache" if "cache" in takes else "past_key_values"  # before transformers 5.24

    @torch.inference_mode()
    def generate(self, prompts: Sequence[PseudoPrompt]) -> list[str]:
        """Return the answers in the order of `prompts`. New rows are read when `least` are free."""
        generator, device, most = self.generator, self.generator.device, self.generator.spec.max_new_tokens
        tokens = [generator._tokens(prompt) for prompt in prompts]
        waiting = sorted(range(len(prompts)), key=lambda i: -len(tokens[i]))[::-1]
        answers = [""] * len(prompts)
        first = [waiting.pop() for _ in range(min(self.rows, len(waiting)))]
        user = list(first)  # of each row; -1: free
        cache, mask_BW, logits_BV = self._read([tokens[i] for i in first])
        vocabulary = logits_BV.shape[1]
        never = torch.tensor(sorted({generator.pad} - set(generator.ends)), dtype=torch.long, device=device)
        written_BM = torch.zeros(len(user), most, dtype=torch.long, device=device)
        count_B = torch.zeros(len(user), dtype=torch.long, device=device)
        breaks_B, begins_B = torch.zeros_like(count_B), torch.ones_like(count_B, dtype=torch.bool)
        whole_BV = torch.zeros(len(user), vocabulary, dtype=torch.bool, device=device)
        uniform_BM = self._uniforms([prompts[i].user for i in user], most)
        length_B = mask_BW.sum(1)
        row_B = torch.arange(len(user), device=device)
        while any(i >= 0 for i in user):
            # A token for every row; that of a free one is not read.
            masked = logits_BV.float().index_fill(1, never, -torch.inf).masked_fill_(whole_BV, -torch.inf)
            at_B = count_B.clamp(max=most - 1)
            token_B = draw_tokens(masked, uniform_BM[row_B, at_B], generator.spec.temperature, generator.spec.top_p)
            written_BM[row_B, at_B] = token_B
            whole_BV[row_B, token_B] |= begins_B & generator.lines_V[token_B]
            begins_B = generator.breaks_V[token_B]
            breaks_B, count_B = breaks_B + begins_B, count_B + 1
            self.steps, self.row_steps = self.steps + 1, self.row_steps + len(user)
            busy_B = torch.tensor([i >= 0 for i in user], device=device)
            ended_B = torch.isin(token_B, torch.tensor(generator.ends, dtype=torch.long, device=device))
            maybe_B = busy_B & ((begins_B & (breaks_B >= generator.spec.texts)) | ended_B | (count_B >= most))
            for row in maybe_B.nonzero().flatten().tolist():
                (answer,) = generator.decode([written_BM[row, : int(count_B[row])].tolist()])
                enough = len(parse_texts(answer, generator.spec.texts)) == generator.spec.texts
                if enough or bool(ended_B[row]) or int(count_B[row]) >= most:
                    answers[user[row]] = answer
                    self.tokens += int(count_B[row])
                    user[row] = -1
            logits_BV, mask_BW = self._step(cache, mask_BW, token_B, length_B + count_B - 1)
            free = [row for row, i in enumerate(user) if i < 0]
            if waiting and (len(free) >= self.least or len(free) == len(user)):
                fresh = free[: len(waiting)]
                new = [waiting.pop() for _ in fresh]
                for row, i in zip(fresh, new, strict=True):
                    user[row] = i
                place = torch.tensor(fresh, device=device)
                mask_BW, logits_KV, length_K = self._put(cache, mask_BW, place, [tokens[i] for i in new])
                logits_BV = logits_BV.index_copy(0, place, logits_KV)
                length_B[place] = length_K
                count_B[place], breaks_B[place], begins_B[place], whole_BV[place] = 0, 0, True, False
                uniform_BM[place] = self._uniforms([prompts[i].user for i in new], most)
            elif not waiting and len(user) > len(free) > len(user) / 2:
                kept = torch.tensor([row for row, i in enumerate(user) if i >= 0], device=device)
                user = [i for i in user if i >= 0]
                for layer in cache.layers:
                    layer.keys, layer.values = layer.keys[kept], layer.values[kept]
                state = (mask_BW, logits_BV, written_BM, count_B, breaks_B, begins_B, whole_BV, uniform_BM, length_B)
                mask_BW, logits_BV, written_BM, count_B, breaks_B, begins_B, whole_BV, uniform_BM, length_B = (
                    part[kept] for part in state
                )
                row_B = torch.arange(len(user), device=device)
            if self.steps % _TRIM == 0 and len(user):
                mask_BW = self._trim(cache, mask_BW)
        return answers

    def _uniforms(self, users: Sequence[str], most: int) -> Tensor:
        drawn = [torch.from_numpy(uniforms(self.generator.spec.seed, user, most)) for user in users]
        return torch.stack(drawn).to(self.generator.device)

    def _read(self, prompts: Sequence[Sequence[int]]) -> tuple[Any, Tensor, Tensor]:
        """Read prompts, padded on the left: their cache, its mask [K, W] and the logits after them [K, V]."""
        from transformers import DynamicCache

        longest = max(map(len, prompts))
        ids_KW = torch.full((len(prompts), longest), self.generator.pad)
        mask_KW = torch.zeros_like(ids_KW)
        for row, prompt in enumerate(prompts):
            ids_KW[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask_KW[row, longest - len(prompt) :] = 1
        ids_KW, mask_KW = ids_KW.to(self.generator.device), mask_KW.to(self.generator.device)
        cache = DynamicCache()
        output = self.generator.model(
            input_ids=ids_KW, attention_mask=mask_KW, position_ids=(mask_KW.cumsum(1) - 1).clamp(min=0),
            use_cache=True, logits_to_keep=1, **{self.argument: cache},
        )  # fmt: skip
        return cache, mask_KW, output.logits[:, -1]

    def _step(self, cache: Any, mask_BW: Tensor, token_B: Tensor, position_B: Tensor) -> tuple[Tensor, Tensor]:
        mask_BW = torch.cat([mask_BW, mask_BW.new_ones(len(mask_BW), 1)], dim=1)
        output = self.generator.model(
            input_ids=token_B[:, None], attention_mask=mask_BW, position_ids=position_B[:, None], use_cache=True,
            **{self.argument: cache},
        )  # fmt: skip
        return output.logits[:, -1], mask_BW

    def _put(
        self, cache: Any, mask_BW: Tensor, place_K: Tensor, prompts: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Put new prompts into rows, up to the current column; the mask, their logits [K, V] and their lengths [K]."""
        fresh, mask_KP, logits_KV = self._read(prompts)
        width, columns = mask_KP.shape[1], mask_BW.shape[1]
        if width > columns:
            wider = width - columns
            mask_BW = torch.nn.functional.pad(mask_BW, (wider, 0))
            for layer in cache.layers:
                layer.keys, layer.values = (
                    torch.nn.functional.pad(held, (0, 0, wider, 0)) for held in (layer.keys, layer.values)
                )
            columns = width
        for layer, new in zip(cache.layers, fresh.layers, strict=True):
            layer.keys[place_K, :, columns - width :] = new.keys
            layer.values[place_K, :, columns - width :] = new.values
        mask_BW[place_K] = 0
        mask_BW[place_K, columns - width :] = mask_KP
        return mask_BW, logits_KV, mask_KP.sum(1)

    def _trim(self, cache: Any, mask_BW: Tensor) -> Tensor:
        """Cut off the columns before the first that any row attends to."""
        first = int(mask_BW.any(dim=0).int().argmax())
        if first:
            for layer in cache.layers:
                layer.keys, layer.values = (
                    layer.keys[:, :, first:].contiguous(),
                    layer.values[:, :, first:].contiguous(),
                )
        return mask_BW[:, first:]
