"""Pretraining of LGCD's encoders by next-item prediction (arXiv 2604.05365, eq. 3), done once and kept.

It depends on nothing that a trial varies, so it is done once per task and seed and kept beside the task (`pretrained`);
every trial on every node loads the same files. A pair of encoders reads both domains, or there is a pair for each.
Shapes: S sequences, B of a batch, L positions, N labels, U distinct items of a batch, P domains, K drawn items, D vector
width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR

from features.store.folders import locked, save_torch, whole_folder, write_json
from features.store.tables import digest
from trainables.devices import on_cpu, seeded
from trainables.models.lgcd.encoders import DomainEncoders, Encoders, PretrainSpec
from trainables.pretraining import Stateful, keep, restored
from trainables.sequences.losses import distinct, draw_shared, softmax_loss
from trainables.sequences.views import Range, batches, padded, windows, within
from trainables.tasks.sequential import Sequences, SequenceTask

PRETRAINING_VERSION = 3  # of what pretraining makes; part of its key

Domains = tuple[Range, ...]
"""The domains that a pair of encoders reads."""


def domains_read(task: SequenceTask, spec: PretrainSpec) -> list[Domains]:
    """Return for each pair of encoders the domains that it reads, alike for both directions."""
    domains = tuple(sorted((task.source, task.target)))
    return [(domain,) for domain in domains] if spec.sequences == "per_domain" else [domains]


def pretrain(task: SequenceTask, spec: PretrainSpec, seed: int, kept: Path, domains: Domains) -> Encoders:
    """Train encoders to predict the next item of the training sequences, among the items of its domain (eq. 3).

    `domains`: whose items and sequences they read. `kept`: file of the state after the last epoch, which training goes on
    from where one that was stopped has left it.
    """
    with seeded(seed, task.device):
        return _pretrain(task, spec, np.random.default_rng(seed), kept, domains)


def _new_encoders(task: SequenceTask, spec: PretrainSpec, domains: Domains) -> Encoders:
    first, end = min(domains)[0], max(domains)[1]
    return Encoders(spec, task.titles()[first:end], first).to(task.device)


def _pretrain(
    task: SequenceTask, spec: PretrainSpec, rng: np.random.Generator, kept: Path, domains: Domains
) -> Encoders:
    encoders = _new_encoders(task, spec, domains)
    optimiser = torch.optim.Adam(encoders.parameters(), lr=spec.lr, betas=(0.9, spec.beta2), fused=True)
    sequences = _pretraining_sequences(task, domains, merged=spec.sequences == "merged")
    first, length = windows(sequences.starts, spec.max_length + 1)
    steps = spec.epochs * math.ceil(len(length) / spec.batch)
    schedule = LinearLR(optimiser, 1.0, 0.02, total_iters=steps)
    parts: dict[str, Stateful] = {"encoders": encoders, "optimiser": optimiser, "schedule": schedule}
    done = restored(kept, parts, rng, task.device)
    encoders.train()
    for number in range(done + 1, spec.epochs + 1):
        for batch in batches(length, spec.batch, rng):
            items_BL, real_BL = padded(sequences.item, first[batch], length[batch])
            loss = pretraining_loss(encoders, domains, items_BL, real_BL, spec.negatives, rng)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
        keep(kept, number, parts, rng, task.device)
    return encoders.eval()


def pretraining_loss(
    encoders: Encoders, domains: Domains, items_BL: Tensor, real_BL: Tensor, negatives: int, rng: np.random.Generator
) -> Tensor:
    """Mean loss of the next items of a batch (eq. 3), each among drawn items of its own domain."""
    drawn_PK = draw_shared(domains, negatives, rng).to(items_BL.device)
    wanted, (place_BL, place_PK) = distinct(max(domains)[1], items_BL, drawn_PK)
    id_UD, text_UD = encoders.look_up(wanted)
    vectors_UD = encoders.fuse_items(id_UD, text_UD)
    inputs_BL, is_label_BL = place_BL[:, :-1], real_BL[:, 1:]
    state_ND = encoders.fuse(*encoders(id_UD[inputs_BL], text_UD[inputs_BL]))[is_label_BL]
    label_N, label_ND = items_BL[:, 1:][is_label_BL], vectors_UD[place_BL[:, 1:][is_label_BL]]
    return softmax_loss(state_ND, label_N, label_ND, domains, drawn_PK, vectors_UD[place_PK])


def _pretraining_sequences(task: SequenceTask, domains: Domains, *, merged: bool) -> Sequences:
    """The sequences that pretraining reads, each of at least two items: of both domains, or each domain's apart."""
    parts = [task.train] if merged else [within(task.train, domain) for domain in domains]
    lengths = torch.cat([part.lengths for part in parts])
    items = torch.cat([part.item for part in parts])
    kept = lengths >= 2
    starts = torch.cat([lengths.new_zeros(1), lengths[kept].cumsum(0)])
    return Sequences(items[kept.repeat_interleave(lengths)], starts)


# --- what is kept -------------------------------------------------------------------------------------------------


def encoders_folders(task: SequenceTask, spec: PretrainSpec, seed: int) -> list[Path]:
    """Where `pretrained` keeps each pair, in the folder of all tasks: under a key of all that it depends on."""
    return [_folder(_document(task, spec, seed, domains)) for domains in domains_read(task, spec)]


def _folder(document: Mapping[str, Any]) -> Path:
    return Path("encoders") / digest(document)[:16]


def _document(task: SequenceTask, spec: PretrainSpec, seed: int, domains: Domains) -> dict[str, Any]:
    return {
        "version": PRETRAINING_VERSION,
        "train": task.train_key,
        "spec": asdict(spec),
        "seed": seed,
        "domains": sorted(domains),
    }


def _make(task: SequenceTask, spec: PretrainSpec, seed: int, domains: Domains, folder: Path) -> None:
    kept = folder.with_suffix(".pt")
    with whole_folder(folder) as work:
        save_torch(on_cpu(pretrain(task, spec, seed, kept, domains).state_dict()), work / "weights.pt")
        write_json(work / "manifest.json", _document(task, spec, seed, domains))
    kept.unlink(missing_ok=True)


@lru_cache(maxsize=2)
def pretrained(task: SequenceTask, spec: PretrainSpec, seed: int) -> DomainEncoders:
    """Return the encoders of this task, spec and seed, for reading only: loaded where they are there, else made and kept.

    They lie beside the tasks, see `encoders_folders`; both directions of a pair share them. Trials of one process share
    them in memory too; of several that ask at once, one makes them.
    """
    pairs = {domains: _pretrained_pair(task, spec, seed, domains) for domains in domains_read(task, spec)}
    return DomainEncoders({domain: encoders for domains, encoders in pairs.items() for domain in domains})


def _pretrained_pair(task: SequenceTask, spec: PretrainSpec, seed: int, domains: Domains) -> Encoders:
    folder = task.folder.parent.parent / _folder(_document(task, spec, seed, domains))
    if not (folder / "manifest.json").is_file():
        lock = folder.with_suffix(".lock")
        with locked(lock):
            if not (folder / "manifest.json").is_file():  # else another process has made them meanwhile
                _make(task, spec, seed, domains, folder)
            lock.unlink(missing_ok=True)  # who locks another file after this one finds the folder
    with seeded(seed, task.device):  # what is drawn here is overwritten, and must not be missed elsewhere
        encoders = _new_encoders(task, spec, domains)
    encoders.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
    return encoders.eval()


def serving_encoders(spec: PretrainSpec, mapped_text_ND: Tensor, state: Mapping[str, Tensor], first: int) -> Encoders:
    """Return encoders for use, whose text vectors have been through `text_map` already."""
    encoders = Encoders(spec, mapped_text_ND, first)
    encoders.text_map = nn.Identity()
    encoders.load_state_dict(state)
    return encoders.eval()
