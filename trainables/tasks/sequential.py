"""Sequence tasks: users' merged sequences over two domains, and held-out users whose next target item is asked for.

    <store>/<source>-<target>-<key[:12]>/search/    what training and selection may see: no test user is in it
                                          search/validation/    held-out users of the training side
                                          test/      the test users, opened by scoring alone

Built by `trainables.tasks.sequential_build`. Shapes: S sequences, N interactions, R rows (held-out users x protocols),
C candidates, I items of both domains, F feature width.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from features.checks import choice, number, refuse, whole
from features.errors import InputError
from features.store.folders import read_json
from trainables.devices import OnDevice
from trainables.tasks.arrays import FeatureRows, load_array, load_rows, not_built, read_meta

TASK_TYPE = "sequences"
LAST = -1e9  # score of an item of the shown history; finite, for scores are mixed
PROTOCOLS = (
    "as-given",
    "inter",
)  # all of the history is shown | its target-domain items are hidden (strict cold start)
RANK_SEEN = ("last", "plain")
OVERLAPPING, SOURCE_ONLY, TARGET_ONLY = 0, 1, 2  # groups of training users


@dataclass(frozen=True, kw_only=True)
class SequenceSpec:
    """Who trains, who is held out, and what is asked of them."""

    # share of the training overlapping users used as such, in (0, 1]; the link of the others is cut: each becomes a
    # source-only and a target-only user
    overlap_ratio: float = 1.0
    protocols: tuple[str, ...] = PROTOCOLS  # what of a history is shown
    # items of the shown history: last, because a user has an item once (ours), or plain, as their scores rank them; of
    # every row of a table alike. Under `inter` no target-domain item is shown, and it is all one
    rank_seen: str = "last"
    negatives: int = 999  # target-domain items drawn beside each held-out target, once per data seed
    validation_share: float = 0.1  # of the overlapping users; read where the data gives no split
    test_share: float = 0.1  # the same
    data_seed: int = 0
    unlisted: str = "refuse"  # users whom the data's split does not name: refuse | train

    def __post_init__(self) -> None:
        protocols = set(self.protocols)
        refuse(
            number(self, "overlap_ratio", above=0, most=1),
            ""
            if 0 < len(self.protocols) == len(protocols) and protocols <= set(PROTOCOLS)
            else f"protocols is {self.protocols!r}; give one or more of {', '.join(PROTOCOLS)}, each once",
            choice(self, "rank_seen", RANK_SEEN),
            whole(self, "negatives", least=1),
            *(number(self, name, above=0, below=1) for name in ("validation_share", "test_share")),
            whole(self, "data_seed", least=0),
            choice(self, "unlisted", ("refuse", "train")),
            place="sequences.",
        )
        if self.validation_share + self.test_share >= 1:
            raise InputError("sequences: validation_share and test_share leave nobody to train on; lower one of them")
        object.__setattr__(self, "protocols", tuple(self.protocols))


@dataclass(frozen=True)
class Sequences(OnDevice):
    """Item numbers of many sequences, one after the other, each oldest first."""

    item: Tensor  # int64 [N]
    starts: Tensor  # int64 [S + 1] where each sequence starts, and N

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> Tensor:
        """int64 [S]."""
        return self.starts.diff()

    @property
    def row(self) -> Tensor:
        """Sequence of each item, int64 [N]."""
        return torch.arange(len(self), device=self.device).repeat_interleave(self.lengths)

    def rows(self, index_B: Tensor) -> Sequences:
        """These sequences, in this order."""
        lengths = self.lengths[index_B]
        starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        shift = (self.starts[index_B] - starts[:-1]).repeat_interleave(lengths)
        return Sequences(self.item[torch.arange(int(starts[-1]), device=self.device) + shift], starts)


@dataclass(frozen=True, kw_only=True)
class HeldOut(OnDevice):
    """Users of whom the last item, one of the target domain, is to be predicted: every user under each protocol."""

    history: Sequences  # R rows: what the protocol shows of the items before the target; may be empty
    protocol: Tensor  # int64 [R] place in the task's protocols
    user: Tensor  # int64 [R] held-out user 0..
    target: Tensor  # int64 [R] item number
    candidates: Tensor  # int32 [R, 1 + negatives] the target, then other target-domain items, each once

    def __len__(self) -> int:
        return len(self.target)

    def rows(self, index_B: Tensor) -> HeldOut:
        """These rows, in this order."""
        rest = {field.name: getattr(self, field.name)[index_B] for field in fields(self)[1:]}
        return HeldOut(history=self.history.rows(index_B), **rest)


@dataclass(frozen=True, kw_only=True)
class SequenceTask(OnDevice):
    """All that a search may see of a cell. Items are numbered alike in both directions of a pair of domains."""

    folder: Path
    items: int  # of both domains
    source: tuple[int, int]  # first item number of the source domain, and the number after its last
    target: tuple[int, int]
    text: FeatureRows | None  # [I, F] vectors of titles; None: built without them, for models that read ids alone
    train: Sequences  # all of each training user's items
    group: Tensor  # int8 [S] OVERLAPPING | SOURCE_ONLY | TARGET_ONLY
    pseudo: Tensor  # int64 [S, n_max] pseudo-items of the domain that a single-domain user lacks, best first, -1: none
    similarity: Tensor  # float32 [S, n_max] cosine of the generated text and the pseudo-item, 0 where there is none
    generated: Tensor  # int64 [S, n_texts] the texts that were generated for a single-domain user, in order, -1: none
    generated_texts: (
        FeatureRows | None
    )  # [G, F] their vectors, standardised as those of titles are; None: no pseudo-items
    protocols: tuple[str, ...]
    rank_seen: str  # last | plain, see `SequenceSpec`
    validation: HeldOut
    train_key: str  # sha256 of what pretraining reads: sequences and texts; both directions of a pair share it

    def turned(self) -> SequenceTask:
        """Return the training side of the opposite direction; the validation users stay this task's own."""
        alone = (self.group == SOURCE_ONLY) | (self.group == TARGET_ONLY)
        group = torch.where(alone, SOURCE_ONLY + TARGET_ONLY - self.group, self.group)
        return replace(self, source=self.target, target=self.source, group=group)

    def one_way(self) -> SequenceTask:
        """Return of this task and its opposite the one whose source has the lower item numbers.

        What is learned of its training side, both directions find.
        """
        return self if self.source < self.target else self.turned()

    def ranked_last(self, history: Sequences) -> Tensor:
        """Return which target-domain items come last for these histories, bool [R, J]."""
        hidden_RJ = seen(history, self.target)
        return hidden_RJ if self.rank_seen == "last" else torch.zeros_like(hidden_RJ)

    def titles(self) -> Tensor:
        """Return the vectors of all items' titles, float32 [I, F]; InputError in a task that has none."""
        if self.text is None:
            raise InputError(f"{self.folder}: this task has no titles; set features.text in the plan")
        return self.text.all()


def seen(history: Sequences, target: tuple[int, int]) -> Tensor:
    """Which target-domain items each history holds, bool [R, J]."""
    low, high = target
    known = (history.item >= low) & (history.item < high)
    seen_RJ = torch.zeros(len(history), high - low, dtype=torch.bool, device=history.device)
    seen_RJ[history.row[known], history.item[known] - low] = True
    return seen_RJ


def load_task(task_dir: Path) -> SequenceTask:
    """Open the search side of a task; the vectors stay memory-mapped."""
    meta = read_meta(task_dir)
    return SequenceTask(
        folder=task_dir,
        items=meta["items"],
        source=(meta["source"][0], meta["source"][1]),
        target=(meta["target"][0], meta["target"][1]),
        text=load_rows(task_dir, "text") if (task_dir / "text.json").is_file() else None,
        train=_load_sequences(task_dir),
        group=load_array(task_dir, "group"),
        pseudo=load_array(task_dir, "pseudo"),
        similarity=load_array(task_dir, "similarity"),
        generated=load_array(task_dir, "generated"),
        generated_texts=load_rows(task_dir, "generated_texts")
        if (task_dir / "generated_texts.json").is_file()
        else None,
        protocols=tuple(meta["protocols"]),
        rank_seen=meta.get("rank_seen", "last"),  # tasks from before there was a choice do not say it
        validation=load_held_out(task_dir / "validation"),
        train_key=meta["train_key"],
    )


def opposite(task_dir: Path) -> Path | None:
    """Return the task of the opposite direction with the same training users, specification and pseudo-items, or None.

    A node's cache holds no specifications, so none is found there.
    """
    meta, specification = read_meta(task_dir), _specification(task_dir)
    if specification is None:
        return None
    for other_dir in sorted(task_dir.parent.parent.glob(f"*/{task_dir.name}")):
        if (other_dir / "task.json").is_file() and (other := read_meta(other_dir)).get("kind") == TASK_TYPE:
            turned = {**other, "source": other["target"], "target": other["source"]}
            if turned == meta and _specification(other_dir) == specification:
                return other_dir
    return None


def _specification(task_dir: Path) -> Any:
    """What of a task its `task.json` does not say, and both directions share."""
    path = task_dir.parent / "manifest.json"
    if not path.is_file():
        return None
    manifest = read_json(path)
    return manifest.get("sequences"), manifest.get("pseudo")


def load_held_out(folder: Path) -> HeldOut:
    """Open validation or test rows."""
    if not (folder / "candidates.npy").is_file():
        raise not_built(folder)
    user = load_array(folder, "user")
    candidates = np.load(folder / "candidates.npy")
    return HeldOut(
        history=_load_sequences(folder),
        protocol=load_array(folder, "protocol"),
        user=user,
        target=load_array(folder, "target"),
        candidates=torch.from_numpy(candidates)[user],  # stored once for all protocols of a user
    )


def _load_sequences(folder: Path) -> Sequences:
    return Sequences(item=load_array(folder, "item"), starts=load_array(folder, "starts"))
