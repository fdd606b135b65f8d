"""The local model: a small causal language model, trained on this machine on overlapping users' items of both domains.

A training text is a prompt (`features.pseudo.prompts`, the plain wording) and the user's titles of the other domain after
it, in both directions. Tokens are pieces of words and, where the vocabulary has room, frequent titles as a whole: the
model then spends one step on a title where it would spend a dozen, and learns which titles go together from a few
thousand users, which it does not from the same text in pieces (measured: docs/log/2026-11-21.md).

Legend: B texts of a batch, L tokens, V vocabulary, C tokens that a batch is contrasted with, D width.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from features.checks import multiple, refuse, whole
from features.encoders.weights import quiet
from features.errors import InputError
from features.progress import Progress
from features.pseudo.prompts import PseudoPrompt, Wording, write_prompt
from features.store.folders import whole_folder, write_json
from features.store.tables import digest

TRAINING = 1  # part of every key of a local model: raise it when a change to this file changes the model
PAD = "<pad>"
_SUBWORDS = 4096  # tokens learned as pieces; the rest of the vocabulary is titles
_POSITIONS = 1024  # longest text that the model can continue
_CUT = 160  # tokens of a training text; the rest is left to another epoch, whose order is another
_BATCH = (128, 1024)  # padded tokens of a training batch; as many as leave an epoch of few users enough steps
_STEPS = 250
_CONTRAST = 1024  # tokens drawn for the estimate of the softmax's denominator
_LEARNING_RATE, _WARM_UP, _DECAY = 3e-3, 0.03, 0.01  # warm-up: share of the steps; then linearly to a fiftieth
_DROP_INPUT, _DROP_OUTPUT = 0.2, 0.1


@dataclass(frozen=True, kw_only=True)
class LocalModelSpec:
    """Shape and training of the local model (ours)."""

    # width of the model; a multiple of 32, which is the width of a head
    width: int = 64
    layers: int = 2
    # passes over the training overlapping users, each of whom gives a text in either direction
    epochs: int = 5
    # most tokens: 4,096 pieces of words, the rest frequent titles as a whole
    vocabulary: int = 32_768

    def __post_init__(self) -> None:
        refuse(
            multiple(self, "width", 32),
            *(whole(self, name, least=1) for name in ("layers", "epochs")),
            whole(self, "vocabulary", least=512),
            place="generator.local.",
        )


@dataclass(frozen=True, kw_only=True)
class Example:
    """One user in one direction: their prompt, and the titles that the model is to write after it."""

    prompt: PseudoPrompt
    titles: tuple[str, ...]


def train_local_model(
    spec: LocalModelSpec,
    examples: Sequence[Example],
    wording: Wording,
    seed: int,
    store: Path,
    progress: Progress | None = None,
) -> Path:
    """Return the folder of the model trained on `examples`, as `save_pretrained` writes it; trained if the store has none.

    progress: told of texts read. It trains with one torch thread, so all machines of this kind train the same model.
    Raises InputError where there is nothing to learn from.
    """
    document = {"training": TRAINING, "spec": asdict(spec), "words": wording.plain, "seed": seed}
    key = digest(document | {"examples": [[asdict(example.prompt), example.titles] for example in examples]})
    folder = store / "generators" / f"local-{key[:12]}"
    if (folder / "manifest.json").is_file():
        return folder
    if not examples:
        raise InputError("generator local: no training user has items in both domains; give generator.model a folder")
    start, threads = time.monotonic(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        titles = (title for example in examples for title in (*example.prompt.titles, *example.titles))
        tokenizer = train_tokenizer(titles, spec.vocabulary)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = _new_model(spec, tokenizer)
            losses = _train(model, tokenizer, spec, examples, wording, seed, progress)
    finally:
        torch.set_num_threads(threads)
    figures = {"texts": len(examples), "tokens": len(tokenizer), "losses": losses}
    with whole_folder(folder) as partial, quiet():
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        seconds = round(time.monotonic() - start, 1)
        write_json(partial / "manifest.json", {"key": key, **document, **figures, "seconds": seconds})
    return folder


def train_tokenizer(titles: Iterator[str], vocabulary: int) -> Any:
    """Train byte-level BPE over lines, with the most frequent lines as tokens: a fast tokenizer of transformers.

    titles: each as often as it occurs. Pieces may span spaces: titles of one maker share their first words.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    count = Counter(f"{title}\n" for title in titles)
    lines = sorted(count, key=lambda line: (-count[line], line))
    bpe = Tokenizer(models.BPE())
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("\n", "merged_with_previous"), in_bytes])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(_SUBWORDS, vocabulary),
        special_tokens=[PAD],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator((line for line in lines for _ in range(count[line])), trainer)
    document = json.loads(bpe.to_str())
    tokens: dict[str, int] = document["model"]["vocab"]
    for line in lines:
        if len(tokens) >= vocabulary:
            break
        tokens.setdefault(in_bytes.pre_tokenize_str(line)[0][0], len(tokens))
    document["model"]["ignore_merges"] = True  # a line that is a token is that token
    whole = Tokenizer.from_str(json.dumps(document))
    return PreTrainedTokenizerFast(tokenizer_object=whole, pad_token=PAD)  # type: ignore[no-untyped-call]


def _new_model(spec: LocalModelSpec, tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=spec.width,
        intermediate_size=2 * spec.width,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.width // 32,
        num_key_value_heads=1,
        max_position_embeddings=_POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=None,  # a list of titles has no end of its own
    )
    return LlamaForCausalLM(config)


def _train(
    model: Any,
    tokenizer: Any,
    spec: LocalModelSpec,
    examples: Sequence[Example],
    wording: Wording,
    seed: int,
    progress: Progress | None,
) -> list[float]:
    """Train the model; return the mean loss per token of each epoch, in nats (an upper estimate: `contrastive_loss`)."""
    prompts = tokenizer([write_prompt(example.prompt, wording, 0, chat=False) for example in examples])["input_ids"]
    titles = sorted({title for example in examples for title in example.titles})
    line = dict(zip(titles, tokenizer([f"{title}\n" for title in titles])["input_ids"], strict=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=_DECAY, betas=(0.9, 0.98))
    rng, contrast = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    losses, steps, step = [], 0, 0
    model.train()
    for epoch in range(spec.epochs):
        texts = []
        for prompt, example in zip(prompts, examples, strict=True):
            wanted = [i for n in rng.permutation(len(example.titles)) for i in line[example.titles[n]]]
            head = prompt[-_CUT // 2 :]  # the end of a prompt names the domain that is asked for
            texts.append((len(head), [*head, *wanted][:_CUT]))
        batches = _batches([len(ids) for _, ids in texts], rng)
        steps = steps or len(batches) * spec.epochs
        total = count = 0.0
        for batch in batches:
            rate = _LEARNING_RATE * min(1, (step + 1) / (_WARM_UP * steps)) * max(0.02, 1 - step / steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss, tokens = _loss(model, [texts[i] for i in batch], tokenizer.pad_token_id, contrast)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            total, count = total + float(loss.detach()) * tokens, count + tokens
        losses.append(round(total / count, 4))
        if progress is not None:
            progress((epoch + 1) * len(examples), spec.epochs * len(examples))
    model.eval()
    return losses


def _batches(lengths: Sequence[int], rng: np.random.Generator) -> list[list[int]]:
    """Group texts of about the same length; batches come in random order."""
    order = np.argsort(-(np.array(lengths) + rng.random(len(lengths)))).tolist()
    budget = min(max(sum(lengths) // _STEPS, _BATCH[0]), _BATCH[1])
    batches, start = [], 0
    while start < len(order):
        size = max(1, budget // lengths[order[start]])
        batches.append(order[start : start + size])
        start += size
    return [batches[i] for i in rng.permutation(len(batches))]


def _loss(
    model: Any, texts: Sequence[tuple[int, list[int]]], pad: int, contrast: torch.Generator
) -> tuple[Tensor, int]:
    """Return the mean loss of the tokens after each text's prompt, and their number."""
    longest = max(len(ids) for _, ids in texts)
    ids_BL = torch.full((len(texts), longest), pad)
    target_BL = torch.zeros_like(ids_BL, dtype=torch.bool)
    for row, (prompt, ids) in enumerate(texts):
        ids_BL[row, : len(ids)] = torch.tensor(ids)
        target_BL[row, prompt : len(ids)] = True
    embedding_VD = model.get_input_embeddings().weight
    states_BLD = model.model(
        inputs_embeds=functional.dropout(functional.embedding(ids_BL, embedding_VD), _DROP_INPUT)
    ).last_hidden_state
    target_BL = target_BL[:, 1:]
    states = functional.dropout(states_BLD[:, :-1][target_BL], _DROP_OUTPUT)
    wanted = ids_BL[:, 1:][target_BL]
    return contrastive_loss(states, wanted, embedding_VD, contrast), len(wanted)


def contrastive_loss(states_ND: Tensor, wanted_N: Tensor, embedding_VD: Tensor, contrast: torch.Generator) -> Tensor:
    """Return the cross-entropy with an estimated denominator: the batch's tokens exactly, the others by a uniform sample.

    With V of tens of thousands and a model this small, the full softmax would be nine tenths of the cost.
    """
    present = torch.unique(wanted_N)
    sampled = torch.randint(len(embedding_VD), (_CONTRAST,), generator=contrast)
    sampled = sampled[~torch.isin(sampled, present)]
    weight_C = torch.zeros(len(present) + len(sampled))
    if len(sampled):
        weight_C[len(present) :] = math.log((len(embedding_VD) - len(present)) / len(sampled))
    logits_NC = states_ND @ embedding_VD[torch.cat([present, sampled])].T + weight_C
    return functional.cross_entropy(logits_NC, torch.searchsorted(present, wanted_N))
