"""Generator of texts of items that a user might want in the other domain (LGCD eq. 4), by any causal language model.

All models of transformers take one path: the prompt (in the tokenizer's chat template, where it has one), decoding
(`features.pseudo.decoding`), the answer. The local model (`features.pseudo.local_model`) is like any other once it is
trained.

Each user has their own random numbers, keyed by (seed, user): an answer does not depend on who else is in the batch,
except for the last bits of the arithmetic. Legend: B users of a batch, L tokens, V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from features.checks import choice, number, refuse, whole
from features.encoders.spec import find_pretrained
from features.encoders.weights import (
    check_dtype,
    load_tokenizer_of,
    load_weights,
    resolve_dtype,
)
from features.errors import InputError
from features.pseudo.local_model import LocalModelSpec
from features.pseudo.prompts import WORDINGS, PseudoPrompt, find_wording, write_prompt
from features.store.tables import digest

GENERATION = 1  # part of every generator key: raise it when a change to this file changes answers
LOCAL = "local"  # the model that is trained on this machine
DTYPES = ("auto", "float32", "bfloat16")
_CPU_ROWS = 32  # more are no faster there, and a row of SmolLM2 takes 35 MB of keys and values
_MORE_FILES = ("chat_template*", "generation_config.json")


@dataclass(frozen=True, kw_only=True)
class GeneratorSpec:
    """Which language model writes the texts of pseudo-items, and how it is prompted. (ours, where the paper is silent)"""

    # "local": a small model that is trained here; or, as for encoders, a preset, a folder, a GGUF file or a hub id
    model: str = LOCAL
    # commit of a hub id; required for one, meaningless otherwise
    revision: str | None = None
    # texts generated for each user: the largest number of pseudo-items (the paper's n_K) that a configuration may use
    texts: int = 20
    # name in features.pseudo.prompts.WORDINGS
    prompt: str = "items-1"
    # newest items of a user that the prompt shows
    history: int = 10
    # words that are read of a title; MiniLM finds 95% of Food-Kitchen's items by 8 words, 77% by 5
    title_words: int = 8
    # 0: always the most probable token; 1: the model's own distribution; less: fewer, more probable texts
    temperature: float = 0.3
    # only the most probable tokens that together reach this probability (0 .. 1]
    top_p: float = 1.0
    # longest answer, in tokens
    max_new_tokens: int = 400
    # compute type: "float32", "bfloat16", or "auto": bfloat16 on a GPU and on CPUs with bfloat16 instructions, where all
    # machines that take part agree
    dtype: str = "auto"
    # weight names (shell patterns) that may be missing from, or unexpected in, the model's files; all others are an error
    allow_keys: tuple[str, ...] = ()
    # of the users' random numbers, of the local model's training, and of who is kept out of it
    seed: int = 0
    # most tokens that are held at once, prompts and answers (a longer prompt is held alone); a CPU holds 32 answers at most
    batch_tokens: int = 131_072
    # training overlapping users whom the local model is not trained on (at most a tenth), to measure its items' recall
    recall_users: int = 500
    # the model that is trained here; read where `model` is "local"
    local: LocalModelSpec = field(default_factory=LocalModelSpec)

    def __post_init__(self) -> None:
        refuse(
            choice(self, "prompt", tuple(WORDINGS)),
            whole(self, "texts", least=1, most=100),
            *(whole(self, name, least=1) for name in ("history", "title_words", "max_new_tokens", "batch_tokens")),
            *(whole(self, name, least=0) for name in ("seed", "recall_users")),
            number(self, "temperature", least=0, most=5),
            number(self, "top_p", above=0, most=1),
            choice(self, "dtype", DTYPES),
            place="generator.",
        )

    @property
    def sampling(self) -> dict[str, Any]:
        """All that an answer depends on besides the model and the user."""
        wording = find_wording(self.prompt)
        return {
            "generation": GENERATION,
            "words": {"chat": wording.chat, "plain": wording.plain},
            "texts": self.texts,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_new_tokens": self.max_new_tokens,
            "seed": self.seed,
        }


@dataclass(frozen=True, kw_only=True)
class ResolvedGenerator:
    """A generator on this machine. identity: its model by content."""

    spec: GeneratorSpec
    path: Path
    dtype: str  # "float32" or "bfloat16"
    identity: Mapping[str, Any]

    @property
    def key(self) -> str:
        """The SHA-256 of all that an answer depends on besides its prompt and its user."""
        return digest({"model": dict(self.identity), "dtype": self.dtype, **self.spec.sampling})


def resolve_generator(spec: GeneratorSpec, trained: Path | None = None) -> ResolvedGenerator:
    """Find the generator's folder or GGUF file and hash it; no weights are loaded.

    trained: the folder of the local model, which is identified by what it was trained on and not by its bits.
    Raises InputError like `features.encoders.spec.find_pretrained`.
    """
    dtype = resolve_dtype(spec.dtype)
    if trained is not None:
        return ResolvedGenerator(spec=spec, path=trained, dtype=dtype, identity={"local": trained.name})
    files = find_pretrained("generator", spec.model, spec.revision, _MORE_FILES, alternatives=(LOCAL,))
    identity = {"weights_sha256": files.weights_sha256, "files_sha256": files.files_sha256}
    return ResolvedGenerator(spec=spec, path=files.path, dtype=dtype, identity=identity)


class Generator(Protocol):
    """What pseudo-items need of a language model: an answer to each prompt, whose lines are texts."""

    def generate(self, prompts: Sequence[PseudoPrompt]) -> list[str]: ...


def load_generator(resolved: ResolvedGenerator) -> CausalGenerator:
    """Load weights and tokenizer from the local files, on the GPU if there is one.

    Raises InputError for weights that do not fit, like `features.encoders.encoder.load_encoder`, and for models of states.
    """
    from transformers import AutoModelForCausalLM

    spec = resolved.spec
    place = f"generator {spec.model}"
    check_dtype(place, spec.dtype, resolved.dtype)
    model = load_weights(AutoModelForCausalLM, place, resolved.path, resolved.dtype, spec.allow_keys)
    if model._is_stateful:  # a state cannot be moved to other columns, as keys and values are
        raise InputError(
            f"{place}: {type(model).__name__} keeps a state, not keys and values; give a model with attention"
        )
    return CausalGenerator(model, load_tokenizer_of(place, resolved.path), spec)


class CausalGenerator:
    """A causal language model and its tokenizer as a `Generator`; safe to use from several threads."""

    def __init__(self, model: Any, tokenizer: Any, spec: GeneratorSpec) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.to(self.device).eval()
        self.tokenizer = tokenizer
        self.spec = spec
        ends = (model.generation_config.eos_token_id, tokenizer.eos_token_id)
        self.ends = sorted({i for end in ends if end is not None for i in (end if isinstance(end, list) else [end])})
        pad = tokenizer.pad_token_id
        self.pad = pad if pad is not None else self.ends[0] if self.ends else 0
        texts = tokenizer.batch_decode([[i] for i in range(model.config.get_text_config().vocab_size)])
        self.breaks_V = torch.tensor(["\n" in text for text in texts], device=self.device)
        # Tokens that are a whole line by themselves, as frequent titles are in the local model's vocabulary.
        lines = [text.endswith("\n") and any(c.isalpha() for c in text) for text in texts]
        self.lines_V = torch.tensor(lines, device=self.device)
        self._lock = threading.Lock()  # a fast tokenizer that is called from two threads raises "Already borrowed"

    def generate(self, prompts: Sequence[PseudoPrompt]) -> list[str]:
        """Return the answers in the order of `prompts`."""
        from features.pseudo.decoding import Decoder  # loads parts of transformers

        tokens = [self._tokens(prompt) for prompt in prompts]
        if not tokens:
            return []
        rows = max(1, self.spec.batch_tokens // (max(map(len, tokens)) + self.spec.max_new_tokens))
        if self.device.type == "cpu":
            rows = min(rows, _CPU_ROWS)
        return Decoder(self, tokens, [prompt.user for prompt in prompts], rows).run()

    def _tokens(self, prompt: PseudoPrompt) -> list[int]:
        """Return the token ids of a prompt."""
        chat = self.tokenizer.chat_template is not None
        text = write_prompt(prompt, find_wording(self.spec.prompt), self.spec.texts, chat=chat)
        with self._lock:
            if chat:
                message = [{"role": "user", "content": text}]
                text = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
            ids: list[int] = self.tokenizer(text, add_special_tokens=not chat)["input_ids"]  # a template adds its own
        return ids

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Return the texts of answers, without special tokens."""
        if not ids:  # the library makes one empty text of none
            return []
        with self._lock:
            texts: list[str] = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return texts
