"""The slow reference of decoding: batches by transformers' own `generate`, each of which waits for its longest answer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from features.encoders.weights import quiet
from features.pseudo.generator import CausalGenerator
from features.pseudo.prompts import PseudoPrompt, parse_texts
from features.pseudo.sampling import draw_tokens, uniforms


def answer_in_batches(generator: CausalGenerator, prompts: Sequence[PseudoPrompt]) -> list[str]:
    """Return the answers in the order of `prompts`."""
    tokens = [generator._tokens(prompt) for prompt in prompts]
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: -len(tokens[i]))
    start = 0
    while start < len(order):
        row = len(tokens[order[start]]) + generator.spec.max_new_tokens
        batch = order[start : start + max(1, generator.spec.batch_tokens // row)]
        batch_answers = _answers(generator, [tokens[i] for i in batch], [prompts[i].user for i in batch])
        for i, answer in zip(batch, batch_answers, strict=True):
            answers[i] = answer
        start += len(batch)
    return answers


def _answers(generator: CausalGenerator, prompts: Sequence[Sequence[int]], users: Sequence[str]) -> list[str]:
    """Generate the answers of one batch of token ids."""
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    longest, most = max(map(len, prompts)), generator.spec.max_new_tokens
    ids_BL = torch.full((len(prompts), longest), generator.pad)
    mask_BL = torch.zeros_like(ids_BL)
    for row, prompt in enumerate(prompts):  # padding on the left: all answers begin in the same column
        ids_BL[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask_BL[row, longest - len(prompt) :] = 1
    uniform_BL = torch.from_numpy(np.stack([uniforms(generator.spec.seed, user, most) for user in users]))
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=most, do_sample=False, pad_token_id=generator.pad, eos_token_id=generator.ends or None
    )
    enough = _Enough(generator, len(prompts), longest)
    draw = _Draw(generator, uniform_BL.to(generator.device), longest, enough)
    with torch.inference_mode(), quiet():
        out_BL = generator.model.generate(
            input_ids=ids_BL.to(generator.device),
            attention_mask=mask_BL.to(generator.device),
            generation_config=config,
            logits_processor=LogitsProcessorList([draw]),
            stopping_criteria=StoppingCriteriaList([enough]),
        )
    written = zip(out_BL[:, longest:].tolist(), enough.length_B.tolist(), strict=True)
    return generator.decode([ids[:length] for ids, length in written])


class _Enough:
    """Stopping criterion: a row ends with the line that completes its number of texts."""

    def __init__(self, generator: CausalGenerator, rows: int, start: int) -> None:
        self.generator, self.start = generator, start
        self.length_B = torch.full((rows,), generator.spec.max_new_tokens, device=generator.device)
        self.done_B = torch.zeros_like(self.length_B, dtype=torch.bool)

    def __call__(self, ids_BL: Tensor, scores: object, **_: object) -> Tensor:
        written_BL, most = ids_BL[:, self.start :], self.generator.spec.texts
        breaks_BL = self.generator.breaks_V[written_BL]
        rows = (breaks_BL[:, -1] & (breaks_BL.sum(1) >= most) & ~self.done_B).nonzero().squeeze(1)
        answers = self.generator.decode(written_BL[rows].tolist())
        for row, answer in zip(rows.tolist(), answers, strict=True):
            if len(parse_texts(answer, most)) == most:
                self.done_B[row] = True
                self.length_B[row] = written_BL.shape[1]
        return self.done_B


class _Draw:
    """Logits processor that leaves one token of each row: the one drawn with the user's own random numbers.

    A token that was a whole line is not drawn again: a list of titles has no use for a line twice. Rows that have
    enough are filled with padding, which is cut off afterwards.
    """

    def __init__(self, generator: CausalGenerator, uniform_BL: Tensor, start: int, enough: _Enough) -> None:
        self.generator, self.uniform_BL, self.start, self.enough = generator, uniform_BL, start, enough
        never = {generator.pad} - set(generator.ends)
        self.never = torch.tensor(sorted(never), dtype=torch.long, device=generator.device)

    def __call__(self, ids_BL: Tensor, logits_BV: Tensor) -> Tensor:
        spec, written_BL = self.generator.spec, ids_BL[:, self.start :]
        logits_BV = logits_BV.float().index_fill(1, self.never, -torch.inf)
        begins_BL = self.generator.breaks_V[written_BL].roll(1, 1)
        begins_BL[:, :1] = True
        whole_BL = begins_BL & self.generator.lines_V[written_BL]
        kept_BL = logits_BV.gather(1, written_BL).masked_fill_(whole_BL, -torch.inf)
        logits_BV.scatter_(1, written_BL, kept_BL)
        token_B = draw_tokens(logits_BV, self.uniform_BL[:, written_BL.shape[1]], spec.temperature, spec.top_p)
        token_B[self.enough.done_B] = self.generator.pad
        return torch.full_like(logits_BV, -torch.inf).scatter_(1, token_B[:, None], 0.0)
