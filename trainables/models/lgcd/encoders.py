"""Sequence encoders of LGCD (arXiv 2604.05365): an ID and a text Transformer, fused, pretrained by next-item prediction.

One table numbers the items of both domains, and one pair of encoders reads sequences of either, so a merged history
and the part of it that lies in one domain are encoded alike (ours; the paper trains a pair per domain). `sequences:
separate` comes near that: pretraining sees each domain's own sequences only, by one pair of encoders all the same.
Pretraining depends on nothing that a trial varies, so it is done once per task and seed and kept beside the task
(`pretrained`); every trial on every node loads the same file.
Shapes: S sequences, B of a batch, L positions, N items or labels, U distinct items of a batch, P domains, K drawn items,
F text width, D vector width.
"""

from __future__ import annotations

import copy
import math
import pickle
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR

from features.store.folders import FULL, atomic_file, locked, whole_folder, write_json
from features.store.tables import digest
from trainables.devices import on_cpu, random_states, seeded, set_random_states
from trainables.sequence_tools import (
    batches,
    distinct,
    draw_shared,
    padded,
    principal_components,
    softmax_loss,
    windows,
    within,
)
from trainables.tasks.sequential import Sequences, SequenceTask

VERSION = 1  # of what pretraining makes; part of its key
SEQUENCES = ("merged", "separate")
_ROWS = 512  # sequences encoded at once without gradients
_UNREADABLE = (  # what half a file raises, or one of another format
    *(OSError, RuntimeError, EOFError, pickle.UnpicklingError, zlib.error),
    *(ValueError, TypeError, KeyError, AttributeError),
)


@dataclass(frozen=True, kw_only=True)
class PretrainSpec:
    """How the encoders are made. Part of the key of what is kept."""

    width: int = 64  # D (LGCD "hidden dim d")
    blocks: int = 2  # Transformer blocks of each encoder (ours)
    heads: int = 2  # of each block (ours)
    max_length: int = 50  # newest items of a history that are read (ours)
    dropout: float = 0.3  # (ours)
    lr: float = 2e-3  # Adam's, falling linearly to 0 (ours; the paper's 1e-3 is for the whole model)
    epochs: int = 10  # (ours)
    batch: int = 128  # sequences (LGCD settings)
    negatives: int = 1024  # items of the softmax beside the target, drawn per batch and domain (ours)
    sequences: str = "merged"  # merged | separate


class Block(nn.Module):
    """A pre-norm Transformer block with a learned bias per head and distance."""

    def __init__(self, spec: PretrainSpec) -> None:
        super().__init__()
        width = spec.width
        self.heads, self.dropout = spec.heads, nn.Dropout(spec.dropout)
        self.attention_norm, self.map_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.map = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, bias_1HLL: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        B, L, D = x.shape
        q, k, v = self.qkv(self.attention_norm(x)).view(B, L, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        read = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias_1HLL)
        x = x + self.dropout(self.out(read.transpose(1, 2).reshape(B, L, D)))
        mapped: Tensor = x + self.dropout(self.map(self.map_norm(x)))
        return mapped


class Transformer(nn.Module):
    """Causal encoder: the output at a position represents the sequence up to it (eq. 1)."""

    def __init__(self, spec: PretrainSpec) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.blocks))
        self.norm, self.dropout = nn.LayerNorm(spec.width), nn.Dropout(spec.dropout)
        self.position = nn.Parameter(torch.randn(spec.max_length, spec.width) * 0.02)
        # Heads start with a preference for recent items of different strength (Press et al. 2022), and learn from there.
        slope_H1 = torch.linspace(0, 0.3, spec.heads)[:, None]
        self.distance = nn.Parameter(-slope_H1 * torch.arange(spec.max_length))

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        place = torch.arange(x.shape[1], device=x.device)
        apart_LL = place[:, None] - place
        bias_HLL = self.distance[:, apart_LL.clamp(min=0)].masked_fill(apart_LL < 0, -math.inf)
        x = self.dropout(x + self.position[place])
        for block in self.blocks:
            x = block(x, bias_HLL[None])
        normed: Tensor = self.norm(x)
        return normed


class Encoders(nn.Module):
    """Item vectors, the two encoders and their fusion (eqs. 1-2)."""

    def __init__(self, spec: PretrainSpec, text_NF: Tensor) -> None:
        super().__init__()
        self.register_buffer("text", text_NF, persistent=False)
        self.text: Tensor
        self.id = nn.Embedding(len(text_NF), spec.width, _weight=principal_components(text_NF, spec.width, 0.1))
        self.text_map: nn.Module = nn.Linear(text_NF.shape[1], spec.width)
        self.id_encoder, self.text_encoder = Transformer(spec), Transformer(spec)
        self.fusion = nn.Linear(2 * spec.width, spec.width)  # of sequences
        self.item_fusion = nn.Linear(2 * spec.width, spec.width)  # of items, E_fusion in eq. 3; a map of its own (ours)
        self.max_length = spec.max_length

    def look_up(self, item: Tensor) -> tuple[Tensor, Tensor]:
        """ID and text embedding of items, [..., D] each."""
        return self.id(item), self.text_map(self.text[item])

    def forward(self, id_BLD: Tensor, text_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """ID and text representation at every position, [B, L, D] each (eq. 1)."""
        return self.id_encoder(id_BLD), self.text_encoder(text_BLD)

    def encode(self, items_BL: Tensor, part: str) -> Tensor:
        """One of the two, [B, L, D]; `part`: id | text."""
        encoded: Tensor = (
            self.id_encoder(self.id(items_BL))
            if part == "id"
            else self.text_encoder(self.text_map(self.text[items_BL]))
        )
        return encoded

    def fuse(self, id_BD: Tensor, text_BD: Tensor) -> Tensor:
        """h_fusion (eq. 2)."""
        fused: Tensor = self.fusion(torch.cat([id_BD, text_BD], dim=-1))
        return fused

    def fuse_items(self, id_ND: Tensor, text_ND: Tensor) -> Tensor:
        """E_fusion of looked up items (eq. 3)."""
        fused: Tensor = self.item_fusion(torch.cat([id_ND, text_ND], dim=-1))
        return fused


# --- pretraining --------------------------------------------------------------------------------------------------


def pretrain(task: SequenceTask, spec: PretrainSpec, seed: int, kept: Path) -> Encoders:
    """Train encoders to predict the next item of the training sequences, among the items of its domain (eq. 3).

    `kept`: file of the state after the last epoch, which training goes on from where one that was stopped has left it.
    """
    with seeded(seed, task.device):
        return _pretrain(task, spec, np.random.default_rng(seed), kept)


def _pretrain(task: SequenceTask, spec: PretrainSpec, rng: np.random.Generator, kept: Path) -> Encoders:
    encoders = Encoders(spec, task.titles()).to(task.device)
    optimiser = torch.optim.Adam(encoders.parameters(), lr=spec.lr, fused=True)
    sequences = _pretraining_sequences(task, spec.sequences)
    first, length = windows(sequences.starts, spec.max_length + 1)
    steps = spec.epochs * math.ceil(len(length) / spec.batch)
    schedule = LinearLR(optimiser, 1.0, 0.02, total_iters=steps)
    done = _restore(kept, encoders, optimiser, schedule, rng)
    encoders.train()
    for number in range(done + 1, spec.epochs + 1):
        for batch in batches(length, spec.batch, rng):
            items_BL, real_BL = padded(sequences.item, first[batch], length[batch])
            loss = pretraining_loss(encoders, task, items_BL, real_BL, spec.negatives, rng)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
        _keep(kept, number, encoders, optimiser, schedule, rng)
    return encoders.eval()


def _keep(
    path: Path, number: int, encoders: Encoders, optimiser: Optimizer, schedule: LinearLR, rng: np.random.Generator
) -> None:
    """Write all that the epochs after this one depend on; a disk without room for it costs the file, not the training."""
    state = {
        "number": number, "encoders": encoders.state_dict(), "optimiser": optimiser.state_dict(),
        "schedule": schedule.state_dict(), "rng": rng.bit_generator.state,
        "torch": random_states(encoders.text.device),
    }  # fmt: skip
    try:
        with atomic_file(path) as beside:
            torch.save(on_cpu(state), beside)
    except (OSError, RuntimeError) as error:  # torch says RuntimeError where a write comes up short
        if isinstance(error, OSError) and error.errno not in FULL:
            raise


def _restore(path: Path, encoders: Encoders, optimiser: Optimizer, schedule: LinearLR, rng: np.random.Generator) -> int:
    """Read it back; return the number of finished epochs: 0 where there is no file, or none that can be read."""
    if not path.is_file():
        return 0
    parts: tuple[Any, ...] = (encoders, optimiser, schedule)
    before = copy.deepcopy([part.state_dict() for part in parts])
    drawn = rng.bit_generator.state, random_states(encoders.text.device)
    try:
        state = torch.load(path, weights_only=True)
        for part, name in zip(parts, ("encoders", "optimiser", "schedule"), strict=True):
            part.load_state_dict(state[name])
        rng.bit_generator.state = state["rng"]
        set_random_states(state["torch"], encoders.text.device)
        return int(state["number"])
    except _UNREADABLE:
        for part, initial in zip(parts, before, strict=True):
            part.load_state_dict(initial)
        rng.bit_generator.state = drawn[0]
        set_random_states(drawn[1], encoders.text.device)
        return 0


def pretraining_loss(
    encoders: Encoders, task: SequenceTask, items_BL: Tensor, real_BL: Tensor, negatives: int, rng: np.random.Generator
) -> Tensor:
    """Mean loss of the next items of a batch (eq. 3), each among drawn items of its own domain."""
    domains = (task.source, task.target)
    drawn_PK = draw_shared(domains, negatives, rng).to(items_BL.device)
    wanted, (place_BL, place_PK) = distinct(task.items, items_BL, drawn_PK)
    id_UD, text_UD = encoders.look_up(wanted)
    vectors_UD = encoders.fuse_items(id_UD, text_UD)
    inputs_BL, is_label_BL = place_BL[:, :-1], real_BL[:, 1:]
    state_ND = encoders.fuse(*encoders(id_UD[inputs_BL], text_UD[inputs_BL]))[is_label_BL]
    label_N, label_ND = items_BL[:, 1:][is_label_BL], vectors_UD[place_BL[:, 1:][is_label_BL]]
    return softmax_loss(state_ND, label_N, label_ND, domains, drawn_PK, vectors_UD[place_PK])


def _pretraining_sequences(task: SequenceTask, how: str) -> Sequences:
    """The sequences that pretraining reads, each of at least two items."""
    domains = (task.source, task.target)
    parts = [task.train] if how == "merged" else [within(task.train, domain) for domain in domains]
    lengths = torch.cat([part.lengths for part in parts])
    items = torch.cat([part.item for part in parts])
    kept = lengths >= 2
    starts = torch.cat([lengths.new_zeros(1), lengths[kept].cumsum(0)])
    return Sequences(items[kept.repeat_interleave(lengths)], starts)


def encoders_folder(task: SequenceTask, spec: PretrainSpec, seed: int) -> Path:
    """Where `pretrained` keeps them, in the folder of all tasks: under a key of all that they depend on."""
    return Path("encoders") / digest(_document(task, spec, seed))[:16]


def _document(task: SequenceTask, spec: PretrainSpec, seed: int) -> dict[str, Any]:
    return {"version": VERSION, "train": task.train_key, "spec": asdict(spec), "seed": seed}


def _make(task: SequenceTask, spec: PretrainSpec, seed: int, folder: Path) -> None:
    kept = folder.with_suffix(".pt")
    with whole_folder(folder) as work:
        torch.save(on_cpu(pretrain(task, spec, seed, kept).state_dict()), work / "weights.pt")
        write_json(work / "manifest.json", _document(task, spec, seed))
    kept.unlink(missing_ok=True)


@lru_cache(maxsize=2)
def pretrained(task: SequenceTask, spec: PretrainSpec, seed: int) -> Encoders:
    """Return the encoders of this task, spec and seed, for reading only: loaded where they are there, else made and kept.

    They lie beside the tasks, see `encoders_folder`; both directions of a pair share them. Trials of one process share
    them in memory too; of several that ask at once, one makes them.
    """
    folder = task.folder.parent.parent / encoders_folder(task, spec, seed)
    if not (folder / "manifest.json").is_file():
        lock = folder.with_suffix(".lock")
        with locked(lock):
            if not (folder / "manifest.json").is_file():  # else another process has made them meanwhile
                _make(task, spec, seed, folder)
            lock.unlink(missing_ok=True)  # who locks another file after this one finds the folder
    with seeded(seed, task.device):  # what is drawn here is overwritten, and must not be missed elsewhere
        encoders = Encoders(spec, task.titles()).to(task.device)
    encoders.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
    return encoders.eval()


def serving_encoders(spec: PretrainSpec, mapped_text_ND: Tensor, state: Mapping[str, Tensor]) -> Encoders:
    """Return encoders for use, whose text vectors have been through `text_map` already."""
    encoders = Encoders(spec, mapped_text_ND)
    encoders.text_map = nn.Identity()
    encoders.load_state_dict(state)
    return encoders.eval()


# --- reading sequences with pretrained encoders -------------------------------------------------------------------


@torch.no_grad()
def represent(
    encoders: Encoders, sequences: Sequences, *, last: bool, parts: Sequence[str] = ("id", "text")
) -> list[Tensor]:
    """Return ID and text representation (or one of them) after every item, [N, D]; with `last`, of sequences, [S, D].

    Only the newest `max_length` items are read; earlier items, and empty sequences, have the zero vector.
    """
    item, device = sequences.item, sequences.device
    first, length = windows(sequences.starts, encoders.max_length)
    size = len(sequences) if last else len(item)
    states = [torch.zeros(size, encoders.fusion.out_features, device=device) for _ in parts]
    order = length.argsort(stable=True)
    order = order[length[order] > 0]
    for start in range(0, len(order), _ROWS):
        batch = order[start : start + _ROWS]
        items_BL, real_BL = padded(item, first[batch], length[batch])
        place_BL = first[batch][:, None] + torch.arange(items_BL.shape[1], device=device)
        for out, part in zip(states, parts, strict=True):
            state_BLD = encoders.encode(items_BL, part)
            if last:
                out[batch] = state_BLD[torch.arange(len(batch), device=device), length[batch] - 1]
            else:
                out[place_BL[real_BL]] = state_BLD[real_BL]
    return states
