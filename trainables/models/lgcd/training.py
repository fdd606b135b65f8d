"""Training and serving of LGCD over frozen encoders (arXiv 2604.05365): rows, cyclic batches, and the contract's functions.

Shapes: R rows, U users, J items of the target domain, D vector width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from features.errors import InputError
from trainables.diffusion import SameForAll
from trainables.interface import Epoch, Place, Setup
from trainables.models.lgcd import retrieval
from trainables.models.lgcd.conditions import RowRules, Rows, pseudo_rows, real_rows
from trainables.models.lgcd.config import Config
from trainables.models.lgcd.encoders import DomainEncoders, Encoders, represent
from trainables.models.lgcd.losses import FullSoftmax, SampledSoftmax, losses
from trainables.models.lgcd.network import Network
from trainables.models.lgcd.pretraining import encoders_folders, pretrained, serving_encoders
from trainables.models.lgcd.retrieval import Suggested
from trainables.sequences.losses import step
from trainables.sequences.views import within
from trainables.tasks.sequential import HeldOut, Sequences, SequenceTask

ROWS_BYTES = 512 * 2**20  # of rows that a process keeps for its next trial


def prepare(config: Config, task: SequenceTask, seeds: Sequence[int]) -> None:
    """Pretrain what the trials share, where it is missing; a kill costs the epochs in progress, one a seed."""
    for seed in seeds:
        pretrained(task, config.pretraining, seed)


def shared(config: Config, task: SequenceTask, seeds: Sequence[int]) -> list[Path]:
    """Folders of the pretrained encoders, in that of all tasks."""
    return [folder for seed in seeds for folder in encoders_folders(task, config.pretraining, seed)]


def train(config: Config, task: SequenceTask, seed: int) -> Generator[Place]:
    """Train the network over frozen encoders."""
    trainer = _Trainer(config, task, seed, pretrained(task, config.pretraining, seed))
    streams = {f"stream_{number}": stream.progress for number, stream in enumerate(trainer.streams)}
    yield Setup(
        trainer.network, optimiser=trainer.optimiser, generator=trainer.generator, rng=trainer.rng, **streams
    )  # fmt: skip
    while True:
        loss = trainer.epoch()
        yield Epoch(predict=trainer.predict, metrics={"train_loss": loss}, pack=trainer.pack)


@dataclass(frozen=True)
class _Way:
    """What one direction trains on."""

    pools: list[tuple[Rows, _Stream]]  # a batch takes from each
    recommend: SampledSoftmax | FullSoftmax  # L_rec

    def batch(self) -> Rows:
        """Return the next rows of each pool."""
        return Rows.joined([rows[next(stream).to(rows.item.device)] for rows, stream in self.pools])


class _Trainer:
    """One training of one seed."""

    def __init__(self, config: Config, task: SequenceTask, seed: int, encoders: DomainEncoders) -> None:
        self.config, self.task, self.encoders = config, task, encoders
        self.generator, self.rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
        tasks = [task] if config.directions == "one" else [task, opposite(task)]
        self.network = Network(config, [encoders.of_domain(one.source).fusion for one in tasks])
        self.optimiser = torch.optim.Adam(self.network.parameters(), lr=config.lr, fused=True)
        suggest = cache(lambda: suggested_items(config, task, encoders))
        rows = [training_rows(config, one, encoders, suggest, seed) for one in tasks]
        self.batches = math.ceil(len(rows[0][0]) / len(row_rules(config).views(task)) / config.batch)
        self.ways = [self._way(one, *kinds) for one, kinds in zip(tasks, rows, strict=True)]

    @property
    def streams(self) -> list[_Stream]:
        """What a checkpoint holds of the batches to come."""
        return [stream for way in self.ways for _, stream in way.pools]

    def epoch(self) -> float:
        """As many real rows as there are under one protocol, of both directions in turn where there are two; mean loss."""
        losses = [self._step(number) for _ in range(self.batches) for number in range(len(self.ways))]
        return sum(losses) / len(losses)

    def predict(self, held_out: HeldOut, task: SequenceTask, seed: int) -> Tensor:
        """Scores of all target-domain items, [R, J] (eq. 25)."""
        by_id, by_text = _read(self.config, self.encoders.of_domain(task.source), held_out.history, task.source)
        final_RD = self.network.recommend(by_id, by_text, torch.Generator().manual_seed(seed))
        return final_RD @ self.ways[0].recommend.items.T

    def pack(self) -> dict[str, Any]:
        """What `unpack` needs; the vectors of titles only as the encoders read them, [I, D]."""
        encoders = self.encoders.of_domain(self.task.source)
        weights = {name: value for name, value in encoders.state_dict().items() if not name.startswith("text_map.")}
        return {
            "network": self.network.state_dict(), "encoders": weights, "titles": encoders.text_map(encoders.text),
            "first": encoders.first, "source": list(self.task.source), "items": self.ways[0].recommend.items,
        }  # fmt: skip

    def _way(self, task: SequenceTask, real: Rows, pseudo: Rows) -> _Way:
        """One direction's rows in cyclic batches: `batch` real ones and as many pseudo-overlapping ones, for ever.

        Without `cyclic` a batch has as many rows, drawn from all alike.
        """
        config = self.config
        kinds = [rows for rows in ((real, pseudo) if config.overlap_rows else (pseudo,)) if len(rows)]
        if not kinds:
            raise InputError(f"{task.folder}: no row to train on is left; take overlap_rows: true or more pseudo_items")
        size = config.batch
        pools = [(rows, size) for rows in kinds] if config.cyclic else [(Rows.joined(kinds), size * len(kinds))]
        items = self.encoders.item_vectors(task.target)
        return _Way(
            pools=[(rows, _Stream(len(rows), size, self.generator)) for rows, size in pools],
            recommend=SampledSoftmax(items=items, domain=task.target, count=config.negatives, rng=self.rng)
            if config.negatives
            else FullSoftmax(items=items, domain=task.target),
        )

    def _step(self, number: int) -> float:
        way = self.ways[number]
        rows = way.batch()
        final, loss = losses(self.network, rows, self.generator, number)
        return step(self.optimiser, loss + way.recommend(final, rows.item) / len(rows))  # eqs. 26 and 27


class _Stream:
    """Batches of row numbers for ever, pass after pass in a new order."""

    def __init__(self, rows: int, size: int, generator: torch.Generator) -> None:
        self.rows, self.size, self.generator = rows, size, generator
        self.progress: dict[str, list[Tensor]] = {"waiting": []}
        """Batches of this pass that are still to come."""

    def __next__(self) -> Tensor:
        if not self.progress["waiting"]:
            order = torch.randperm(self.rows, generator=self.generator)
            self.progress["waiting"] = list(torch.split(order, self.size))
        return self.progress["waiting"].pop(0)


# --- rows ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def opposite(task: SequenceTask) -> SequenceTask:
    """Return the same turned task for the same task, so that the next trial finds the rows that are kept by it."""
    return task.turned()


def row_rules(config: Config) -> RowRules:
    """Return what the config says of rows."""
    return RowRules(condition_from=config.condition_from, rows=config.rows)


def training_rows(
    config: Config, task: SequenceTask, encoders: DomainEncoders, suggest: Callable[[], Suggested], seed: int
) -> tuple[Rows, Rows]:
    """Real and pseudo-overlapping rows (the latter empty where the config or the task has no pseudo-items).

    They are kept for the next trial of this process, because reading all sequences takes as long as several epochs; where
    they are, nothing is suggested.
    """
    rules, by_text = row_rules(config), config.guidance == "text"  # by text the condition has no other part
    made_from = (task, config.pretraining, seed, rules)
    real = _kept_rows.get(made_from, lambda: real_rows(task, encoders, rules))
    if not min(config.pseudo_items, task.pseudo.shape[1]):
        return real, real[torch.zeros(0, dtype=torch.int64, device=task.device)]
    pseudo = _kept_rows.get(
        (*made_from, config.retrieval, config.pseudo_items, config.min_similarity, by_text),
        lambda: pseudo_rows(
            task, encoders, suggest(), rules, config.min_similarity, np.random.default_rng(seed), by_text=by_text
        ),
    )
    return real, pseudo


def suggested_items(config: Config, task: SequenceTask, encoders: DomainEncoders) -> Suggested:
    """Return the items that single-domain users get, whichever direction is trained."""
    count = min(config.pseudo_items, task.pseudo.shape[1])
    if config.retrieval == "per_text":
        return retrieval.by_text(task, count)
    return retrieval.by_user(task, encoders, count)


class _KeptRows:
    """The rows that were asked for last, as many as ROWS_BYTES hold, and always the last ones."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, Rows] = {}

    def get(self, key: Hashable, make: Callable[[], Rows]) -> Rows:
        """Return the rows of a key; made where they are not kept."""
        rows = self._kept.pop(key, None)
        self._kept[key] = rows = make() if rows is None else rows
        while len(self._kept) > 1 and sum(kept.bytes for kept in self._kept.values()) > ROWS_BYTES:
            del self._kept[next(iter(self._kept))]
        return rows


_kept_rows = _KeptRows()


# --- recommending -------------------------------------------------------------------------------------------------


def _read(config: Config, encoders: Encoders, history: Sequences, source: tuple[int, int]) -> list[Tensor]:
    """ID and text representation of what the condition reads of users' histories, [U, D] each."""
    visible = within(history, source) if config.condition_from == "source" else history
    return represent(encoders, visible, last=True)


def unpack(config: Config, state: Mapping[str, Any], seed: int) -> Callable[[Sequences], Tensor]:
    """Scores of all target-domain items, [U, J], by users' histories; a user's depend on no other user's row."""
    encoders = serving_encoders(config.pretraining, state["titles"], state["encoders"], state["first"])
    network = Network(config, [encoders.fusion] * (1 if config.directions == "one" else 2)).eval()
    network.load_state_dict(state["network"])
    low, high = state["source"]

    @torch.no_grad()
    def score(histories: Sequences) -> Tensor:
        by_id, by_text = _read(config, encoders, histories, (low, high))
        final = network.recommend(by_id, by_text, SameForAll(torch.Generator().manual_seed(seed)))
        scores: Tensor = final @ state["items"].T
        return scores

    return score
