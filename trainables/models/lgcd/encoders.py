"""Sequence encoders of LGCD (arXiv 2604.05365): an ID and a text Transformer, fused, pretrained by next-item prediction.

One table numbers the items of both domains, and one pair of encoders reads sequences of either, so a merged history
and the part of it that lies in one domain are encoded alike (ours; the paper trains a pair per domain). `sequences:
separate` comes near that: pretraining sees each domain's own sequences only, by one pair of encoders all the same.
Pretraining depends on nothing that a trial varies, so it is done once per task and seed and kept beside the task
(`pretrained`); every trial on every node loads the same file.
Shapes: B sequences, L positions, N items, F text width, D vector width.
"""

from __future__ import annotations

import copy
import math
import pickle
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR

from features.store.folders import FULL, atomic_file, locked, whole_folder, write_json
from features.store.tables import digest
from trainables.tasks.sequential import Sequences, SequenceTask

VERSION = 1  # of what pretraining makes; part of its key
SEQUENCES = ("merged", "separate")
_CHUNK = 64  # batches that are sorted by length together, so that a batch pads little
_ROWS = 512  # sequences encoded at once without gradients
_UNREADABLE = (  # what half a file raises, or one of another format
    *(OSError, RuntimeError, EOFError, pickle.UnpicklingError, zlib.error),
    *(ValueError, TypeError, KeyError, AttributeError),
)

Ints = NDArray[np.int64]


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
        place = torch.arange(x.shape[1])
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
        self.id = nn.Embedding(len(text_NF), spec.width, _weight=_principal(text_NF, spec.width))
        self.text_map: nn.Module = nn.Linear(text_NF.shape[1], spec.width)
        self.id_encoder, self.text_encoder = Transformer(spec), Transformer(spec)
        self.fusion = nn.Linear(2 * spec.width, spec.width)  # of sequences
        self.item_fusion = nn.Linear(2 * spec.width, spec.width)  # of items, E_fusion in eq. 3; a map of its own (ours)
        self.max_length = spec.max_length

    @classmethod
    def of_mapped(cls, spec: PretrainSpec, text_ND: Tensor) -> Encoders:
        """Encoders for use, whose text vectors have been through `text_map` already; without weights."""
        encoders = cls(spec, text_ND)
        encoders.text_map = nn.Identity()
        return encoders.eval()

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


def _principal(text_NF: Tensor, width: int) -> Tensor:
    """Start of the ID embeddings (ours): principal components of the text vectors, [N, width], deviation 0.1.

    An item that was seen a few times starts near those that read like it, instead of at random.
    """
    centred = text_NF - text_NF.mean(dim=0)
    _, _, directions = torch.linalg.svd(centred.T @ centred / len(centred))
    components = centred @ directions[:width].T
    out = torch.zeros(len(text_NF), width)
    out[:, : components.shape[1]] = components / components.std().clamp(min=1e-6) * 0.1
    return out


# --- batches ------------------------------------------------------------------------------------------------------


def windows(starts: Ints, most: int) -> tuple[Ints, Ints]:
    """First place and length of the newest `most` items of each sequence, [S] each."""
    length = np.minimum(np.diff(starts), most)
    return starts[1:] - length, length


def padded(item: Ints, first_B: Ints, length_B: Ints) -> tuple[Tensor, Tensor]:
    """Items [B, L], padded at the end with item 0, and which of them are real, bool [B, L]."""
    place = np.arange(int(length_B.max(initial=1)))
    real = place < length_B[:, None]
    index = np.minimum(first_B[:, None] + place, max(len(item) - 1, 0))
    return torch.from_numpy(np.where(real, item[index], 0)), torch.from_numpy(real)


def batches(length_S: Ints, size: int, rng: np.random.Generator) -> Iterator[Ints]:
    """Every sequence once, in random batches of sequences of about the same length."""
    order = rng.permutation(len(length_S))
    groups = []
    for start in range(0, len(order), size * _CHUNK):
        chunk = order[start : start + size * _CHUNK]
        chunk = chunk[np.argsort(length_S[chunk], kind="stable")]
        groups += [chunk[at : at + size] for at in range(0, len(chunk), size)]
    for number in rng.permutation(len(groups)):
        yield groups[number]


# --- pretraining --------------------------------------------------------------------------------------------------


def pretrain(task: SequenceTask, spec: PretrainSpec, seed: int, kept: Path) -> Encoders:
    """Encoders trained to predict the next item of the training sequences, among the items of its domain (eq. 3).

    `kept`: file of the state after the last epoch, which training goes on from where one that was stopped has left it.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    encoders = Encoders(spec, task.text[torch.arange(task.items)])
    optimiser = torch.optim.Adam(encoders.parameters(), lr=spec.lr, fused=True)
    item, starts = _pretraining_sequences(task, spec.sequences)
    first, length = windows(starts, spec.max_length + 1)
    steps = spec.epochs * math.ceil(len(length) / spec.batch)
    schedule = LinearLR(optimiser, 1.0, 0.02, total_iters=steps)
    done = _restore(kept, encoders, optimiser, schedule, rng)
    encoders.train()
    for number in range(done + 1, spec.epochs + 1):
        for batch in batches(length, spec.batch, rng):
            loss = pretraining_loss(encoders, task, *padded(item, first[batch], length[batch]), spec.negatives, rng)
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
        "schedule": schedule.state_dict(), "rng": rng.bit_generator.state, "torch": torch.get_rng_state(),
    }  # fmt: skip
    try:
        with atomic_file(path) as beside:
            torch.save(state, beside)
    except (OSError, RuntimeError) as error:  # torch says RuntimeError where a write comes up short
        if isinstance(error, OSError) and error.errno not in FULL:
            raise


def _restore(path: Path, encoders: Encoders, optimiser: Optimizer, schedule: LinearLR, rng: np.random.Generator) -> int:
    """Read it back; the number of epochs that are done: 0 where there is no file, or none that can be read."""
    if not path.is_file():
        return 0
    parts: tuple[Any, ...] = (encoders, optimiser, schedule)
    before = copy.deepcopy([part.state_dict() for part in parts])
    drawn = rng.bit_generator.state, torch.get_rng_state()
    try:
        state = torch.load(path, weights_only=True)
        for part, name in zip(parts, ("encoders", "optimiser", "schedule"), strict=True):
            part.load_state_dict(state[name])
        rng.bit_generator.state = state["rng"]
        torch.set_rng_state(state["torch"])
        return int(state["number"])
    except _UNREADABLE:
        for part, own in zip(parts, before, strict=True):
            part.load_state_dict(own)
        rng.bit_generator.state = drawn[0]
        torch.set_rng_state(drawn[1])
        return 0


def pretraining_loss(
    encoders: Encoders, task: SequenceTask, items_BL: Tensor, real_BL: Tensor, negatives: int, rng: np.random.Generator
) -> Tensor:
    """Mean loss of the next items of a batch (eq. 3), each among items of its own domain."""
    domains = (task.source, task.target)
    drawn = [torch.from_numpy(rng.integers(*domain, negatives)) for domain in domains]
    # Every item is looked up once: the gradient of a look-up is as large as the whole table.
    wanted, place = torch.unique(torch.cat([items_BL.flatten(), *drawn]), return_inverse=True)
    id_UD, text_UD = encoders.look_up(wanted)
    vectors_UD = encoders.fuse_items(id_UD, text_UD)
    place_BL = place[: items_BL.numel()].view_as(items_BL)
    inputs, known = place_BL[:, :-1], real_BL[:, 1:]
    states = encoders.fuse(*encoders(id_UD[inputs], text_UD[inputs]))[known]
    targets, target_vectors = items_BL[:, 1:][known], vectors_UD[place_BL[:, 1:][known]]
    loss = torch.zeros(())
    for (low, high), items, at in zip(domains, drawn, place[items_BL.numel() :].split(negatives), strict=True):
        inside = ((targets >= low) & (targets < high)).nonzero().squeeze(1)
        loss = loss + next_item_loss(
            states[inside], targets[inside], target_vectors[inside], items, vectors_UD[at], high - low
        )
    return loss / len(targets)


def next_item_loss(
    state_ND: Tensor, target_N: Tensor, target_ND: Tensor, drawn_K: Tensor, drawn_KD: Tensor, size: int
) -> Tensor:
    """Sum of -log p(target) over a softmax of the target and K items drawn evenly from the `size` of its domain (eq. 3).

    The drawn items stand for all of them: log(size / K) is added to their logits (Jean et al. 2015).
    """
    positive_N = (state_ND * target_ND).sum(dim=-1)
    negative_NK = state_ND @ drawn_KD.T + math.log(size / len(drawn_K))
    negative_N = negative_NK.masked_fill(drawn_K == target_N[:, None], -torch.inf).logsumexp(dim=1)
    return (torch.logaddexp(positive_N, negative_N) - positive_N).sum()


def _pretraining_sequences(task: SequenceTask, how: str) -> tuple[Ints, Ints]:
    """Items and starts of the sequences that pretraining reads, each of at least two items."""
    domains = (task.source, task.target)
    parts = [task.train] if how == "merged" else [within(task.train, domain) for domain in domains]
    lengths = np.concatenate([np.diff(part.starts.numpy()) for part in parts])
    items = np.concatenate([part.item.numpy() for part in parts])
    kept = lengths >= 2
    return items[np.repeat(kept, lengths)], np.concatenate([[0], lengths[kept].cumsum()])


def within(sequences: Sequences, domain: tuple[int, int]) -> Sequences:
    """The items of each sequence that are in `domain` [lo, hi), in their order; some sequences are left empty."""
    inside = (sequences.item >= domain[0]) & (sequences.item < domain[1])
    before = torch.cat([torch.zeros(1, dtype=torch.int64), inside.long().cumsum(0)])
    return Sequences(item=sequences.item[inside], starts=before[sequences.starts])


def encoders_folder(task: SequenceTask, spec: PretrainSpec, seed: int) -> Path:
    """Where `pretrained` keeps them, in the folder of all tasks: under a key of all that they depend on."""
    return Path("encoders") / digest(_document(task, spec, seed))[:16]


def _document(task: SequenceTask, spec: PretrainSpec, seed: int) -> dict[str, Any]:
    return {"version": VERSION, "train": task.train_key, "spec": asdict(spec), "seed": seed}


def _make(task: SequenceTask, spec: PretrainSpec, seed: int, folder: Path) -> None:
    kept = folder.with_suffix(".pt")
    with whole_folder(folder) as work:
        torch.save(pretrain(task, spec, seed, kept).state_dict(), work / "weights.pt")
        write_json(work / "manifest.json", _document(task, spec, seed))
    kept.unlink(missing_ok=True)


@lru_cache(maxsize=2)
def pretrained(task: SequenceTask, spec: PretrainSpec, seed: int) -> Encoders:
    """The encoders of this task, spec and seed: loaded where they were made before, else made and kept; for reading only.

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
    encoders = Encoders(spec, task.text[torch.arange(task.items)])
    encoders.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
    return encoders.eval()


# --- reading sequences with pretrained encoders -------------------------------------------------------------------


@torch.no_grad()
def represent(
    encoders: Encoders, sequences: Sequences, *, last: bool, parts: Sequence[str] = ("id", "text")
) -> list[Tensor]:
    """ID and text representation (or one of them) after every item, [items, D]; with `last`, of whole sequences, [S, D].

    Only the newest `max_length` items are read; earlier items, and empty sequences, have the zero vector.
    """
    item, starts = sequences.item.numpy(), sequences.starts.numpy()
    first, length = windows(starts, encoders.max_length)
    size = len(sequences) if last else len(item)
    states = [torch.zeros(size, encoders.fusion.out_features) for _ in parts]
    order = np.argsort(length, kind="stable")
    order = order[length[order] > 0]
    for start in range(0, len(order), _ROWS):
        batch = order[start : start + _ROWS]
        items_BL, real_BL = padded(item, first[batch], length[batch])
        place = torch.from_numpy(first[batch])[:, None] + torch.arange(items_BL.shape[1])
        for out, part in zip(states, parts, strict=True):
            state_BLD = encoders.encode(items_BL, part)
            if last:
                out[torch.from_numpy(batch)] = state_BLD[torch.arange(len(batch)), torch.from_numpy(length[batch]) - 1]
            else:
                out[place[real_BL]] = state_BLD[real_BL]
    return states
