"""SSCDR on sequences: semi-supervised learning for cold-start users (Kang, Hwang, Lee & Yu, CIKM 2019, 1563-1572).

Users and items of each domain lie in a metric space, where distance is dislike. A map from the source's space to the
target's is learned from overlapping users, and from all source items, which are to keep their distances to these users. A
cold user is placed by what is near: what they chose, and whom they share it with. The order of items is not read.
The abstract and two public re-implementations are the sources; the weights of the neighbourhood are a reconstruction
(`hop2`, `own`), and hop 0, the user's own source vector, is left out, for held-out users have none. Metric spaces depend
on no field that a trial varies; they are learned once (`prepare`). The SSCDR of ratings is `sscdr`.
Shapes: S sequences, I items of both domains, B users of a batch, J target-domain items, D vector width, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from features.checks import at_least, number, refuse, step_size
from trainables import pretraining
from trainables.interface import Epoch, Selection, Setup, Variant
from trainables.sequences.losses import Unseen, step
from trainables.sequences.ranking import Scorer, unpacked
from trainables.sequences.views import Range, inside, within
from trainables.tasks.sequential import OVERLAPPING, Sequences, SequenceTask

WIDTH = 64  # D
DEVIATION = 0.1  # of the tables' start (ours)
PRETRAINING_VERSION = 3  # of what the metric spaces are learned by; part of their key
# Of the metric spaces (ours: Adam's step; in 30 epochs 1e-3 moves a vector too little, 1e-2 is behind 3e-3).
SPACE_MARGIN, SPACE_NEGATIVES, SPACE_LR, SPACE_BATCH, SPACE_EPOCHS = 1.0, 10, 3e-3, 2048, 30

NAME = "SSCDR"
TASK_TYPE = "sequences"
SELECTION = Selection("val_ndcg10", "maximize")
NOTE = "neighbourhood reconstructed"
VERSION = 2  # 1: metric spaces of a smaller step
ABLATIONS = {
    "wo_unsupervised": Variant(config={"weight": 0.0}),
    "wo_supervised": Variant(config={"supervised": False}),
    "with_hops": Variant(config={"hop2": 1.0}),
    "wo_own": Variant(config={"own": 0.0}),
    "identity_map": Variant(config={"identity": True}),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Hyperparameters. Defaults are those of public code where it gives a value; (ours) marks where it is silent."""

    margin: float = 1.0  # m of the unsupervised loss
    weight: float = 0.25  # lambda, of the unsupervised loss
    supervised: bool = True
    hidden: int = 128  # of the map
    identity: bool = False  # True: the source's space is taken for the target's, nothing is learned (ours)
    hop2: float = 0.0  # omega_2, weight of training users with items in common (reconstruction)
    own: float = 1.0  # omega_own, weight of the history's own target-domain items (reconstruction)
    lr: float = 1e-3  # Adam's
    batch: int = 128  # overlapping users
    epochs: int = 30
    patience: int = 5  # epochs without a better validation NDCG@10 before training ends (ours)

    def __post_init__(self) -> None:
        refuse(
            number(self, "margin", above=0),
            *(at_least(self, name, 0) for name in ("weight", "hop2", "own")),
            *(at_least(self, name, 1) for name in ("hidden", "batch", "epochs", "patience")),
            "" if self.supervised or self.weight > 0 else "supervised is false and weight is 0; nothing is learned",
            step_size(self),
        )


def onto_ball(x: Tensor) -> Tensor:
    """Return vectors longer than 1 at length 1, others as they are."""
    inside_ball: Tensor = x / x.norm(dim=-1, keepdim=True).clamp(min=1)
    return inside_ball


def squared_distance(one: Tensor, other: Tensor) -> Tensor:
    """Return |a - b|^2 over the last dimension."""
    distance: Tensor = (one - other).square().sum(dim=-1)
    return distance


# --- metric spaces ------------------------------------------------------------------------------------------------


class Spaces(nn.Module):
    """Vectors of the training users in each domain that they are in (`_users`), and of all items."""

    def __init__(self, users: int, items: int) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(users, WIDTH), nn.Embedding(items, WIDTH)
        for table in (self.user, self.item):
            nn.init.normal_(table.weight, std=DEVIATION)


def _users(task: SequenceTask) -> tuple[Tensor, Tensor]:
    """Who is in which space, and of whom of them each interaction is: user u is u in the source, S + u in the target."""
    number_N = task.train.row + len(task.train) * inside(task.train.item, task.target)
    wanted_P, place_N = number_N.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    return wanted_P, place_N


def _spaces_epoch(task: SequenceTask, spaces: nn.Module, optimiser: Optimizer, rng: np.random.Generator) -> None:
    """All interactions once, each against the hardest of some items of its domain that the user has not."""
    assert isinstance(spaces, Spaces)
    unseen, row, (_, user) = Unseen(task.train, [task.source, task.target]), task.train.row, _users(task)
    order = torch.from_numpy(rng.permutation(len(row))).to(row.device)
    for part in torch.split(order, SPACE_BATCH):
        item, drawn = task.train.item[part], unseen.draw(row[part], task.train.item[part], SPACE_NEGATIVES, rng)
        user_BD = spaces.user(user[part])
        near_B = squared_distance(user_BD, spaces.item(item))
        far_B = squared_distance(user_BD[:, None], spaces.item(drawn)).amin(dim=1)
        step(optimiser, (SPACE_MARGIN + near_B - far_B).clamp(min=0).mean())
        with torch.no_grad():
            for table, rows in ((spaces.user, user[part]), (spaces.item, torch.cat([item, drawn.ravel()]))):
                table.weight[rows] = onto_ball(table.weight[rows])
    with torch.no_grad():
        for table in (spaces.user, spaces.item):  # Adam's momentum moves rows that no batch has touched
            table.weight.copy_(onto_ball(table.weight))


def _document(task: SequenceTask, seed: int) -> dict[str, Any]:
    return {"version": PRETRAINING_VERSION, "train": task.train_key, "epochs": SPACE_EPOCHS, "seed": seed}


def spaces_of(task: SequenceTask, seed: int) -> Mapping[str, Tensor]:
    """Return the metric spaces, learned where they are missing; both directions share what is learned.

    `source`, `target`: users in either space, [S, D]; zeros where a user has nothing there. `item`: items of both, [I, D].
    """
    way = task.one_way()

    def make(kept: Path) -> dict[str, Any]:
        build, epoch = partial(Spaces, len(_users(way)[0]), task.items), partial(_spaces_epoch, way)
        return pretraining.pretrain(build, epoch, epochs=SPACE_EPOCHS, lr=SPACE_LR, seed=seed, task=task, kept=kept)

    learned = pretraining.kept_once(task, "sscdr", _document(task, seed), make)
    user_SD = torch.zeros(2 * len(task.train), WIDTH, device=task.device)
    user_SD[_users(way)[0]] = learned["user.weight"]
    sides = ("source", "target") if way is task else ("target", "source")
    return {**dict(zip(sides, user_SD.chunk(2), strict=True)), "item": learned["item.weight"]}


def prepare(config: Config, task: SequenceTask, seeds: Sequence[int]) -> None:
    """Learn what the trials share, where it is missing."""
    for seed in seeds:
        spaces_of(task, seed)


def shared(config: Config, task: SequenceTask, seeds: Sequence[int]) -> list[Path]:
    """Folders of the metric spaces, in that of all tasks."""
    return [pretraining.folder_of("sscdr", _document(task, seed)) for seed in seeds]


# --- the map ------------------------------------------------------------------------------------------------------


class SSCDR(nn.Module):
    """The map between the spaces, and what a user is placed by."""

    item: Tensor  # [I, D] items in their own spaces
    neighbour: Tensor  # [S, D] users' vectors in the target, of who has one
    source_user: Tensor  # [S, D] users' vectors in the source
    has_target: Tensor  # bool [S]
    link_item: Tensor  # int64 [N] source items of training users
    link_row: Tensor  # int64 [N] whose they are

    def __init__(self, config: Config, source: Range, target: Range, **vectors: Tensor) -> None:
        super().__init__()
        self.config, self.source, self.target = config, source, target
        for name in self.__annotations__:
            self.register_buffer(name, vectors[name])
        self.map = nn.Sequential(nn.Linear(WIDTH, config.hidden), nn.Tanh(), nn.Linear(config.hidden, WIDTH))

    @staticmethod
    def of_task(config: Config, task: SequenceTask, spaces: Mapping[str, Tensor]) -> SSCDR:
        """Return the map over a task's metric spaces."""
        in_source = inside(task.train.item, task.source)
        return SSCDR(
            config, task.source, task.target, item=spaces["item"], neighbour=spaces["target"],
            source_user=spaces["source"], has_target=within(task.train, task.target).lengths > 0,
            link_item=task.train.item[in_source], link_row=task.train.row[in_source],
        )  # fmt: skip

    def mapped(self, x: Tensor) -> Tensor:
        """f(x) in the target's space, [..., D]."""
        return x if self.config.identity else onto_ball(self.map(x))

    def users(self, history: Sequences, domain: Range) -> Tensor:
        """2 u beside -1: u . v less |v|^2 ranks as the distance does, [R, D + 1]."""
        config, rows = self.config, len(history)
        total = torch.zeros(rows, WIDTH, device=self.item.device)
        weight = torch.zeros(rows, device=self.item.device)
        source, target = within(history, self.source), within(history, self.target)
        terms = [(1.0, source, self.mapped(self.item[source.item]), torch.ones_like(source.item).float())]
        terms.append((config.own, target, self.item[target.item], torch.ones_like(target.item).float()))
        if config.hop2:
            known_SD = torch.where(self.has_target[:, None], self.neighbour, self.mapped(self.source_user))
            around_ID = torch.zeros_like(self.item).index_add(0, self.link_item, known_SD[self.link_row])
            count_I = torch.bincount(self.link_item, minlength=len(self.item)).float()
            terms.append((config.hop2, source, around_ID[source.item], count_I[source.item]))
        for share, part, vector_ND, count_N in terms:
            sum_RD = torch.zeros_like(total).index_add(0, part.row, vector_ND)
            count_R = torch.zeros_like(weight).index_add(0, part.row, count_N)
            total = total + share * sum_RD / count_R.clamp(min=1)[:, None]
            weight = weight + share * (count_R > 0)
        user_RD = onto_ball(total / weight.clamp(min=1e-9)[:, None])
        return torch.cat([2 * user_RD, -torch.ones_like(weight)[:, None]], dim=1)

    def items(self, domain: Range) -> Tensor:
        """Vectors of a domain's items beside their squared lengths, [J, D + 1]."""
        vector_JD = self.item[domain[0] : domain[1]]
        return torch.cat([vector_JD, vector_JD.square().sum(dim=1, keepdim=True)], dim=1)


class Loss:
    """Supervised and unsupervised loss of overlapping users."""

    def __init__(self, config: Config, task: SequenceTask, rng: np.random.Generator) -> None:
        self.config, self.rng = config, rng
        self.source = within(task.train, task.source)
        self.unseen = Unseen(task.train, [task.source])
        has_both = (self.source.lengths > 0) & (task.group == OVERLAPPING)
        self.users = has_both.nonzero().squeeze(1)

    def __call__(self, network: SSCDR, user_B: Tensor) -> Tensor:
        place_BD, device = network.neighbour[user_B], user_B.device
        loss = place_BD.new_zeros(())
        if self.config.supervised:
            loss = squared_distance(network.mapped(network.source_user[user_B]), place_BD).mean()
        if self.config.weight:
            which_B = torch.from_numpy(self.rng.integers(self.source.lengths[user_B].cpu().numpy())).to(device)
            item_B = self.source.item[self.source.starts[user_B] + which_B]
            other_B = self.unseen.draw(user_B, item_B, 1, self.rng).squeeze(1)
            near_B, far_B = (
                squared_distance(network.mapped(network.item[item]), place_BD) for item in (item_B, other_B)
            )  # fmt: skip
            loss = loss + self.config.weight * (self.config.margin + near_B - far_B).clamp(min=0).mean()
        return loss


def train(config: Config, task: SequenceTask, seed: int) -> Iterator[Setup | Epoch]:
    """Train the map over the frozen spaces."""
    network, rng = SSCDR.of_task(config, task, spaces_of(task, seed)), np.random.default_rng(seed)
    optimiser = torch.optim.Adam(network.parameters(), lr=config.lr, fused=True)
    yield Setup(network, optimiser=optimiser, rng=rng)
    loss, scorer = Loss(config, task, rng), Scorer.of_task(network, task, "merged")

    def pack() -> dict[str, Any]:
        return {**scorer.pack(), "source": list(task.source)}

    while True:
        losses = [0.0]
        if not config.identity:
            order = loss.users[torch.from_numpy(rng.permutation(len(loss.users))).to(loss.users.device)]
            losses = [step(optimiser, loss(network, part)) for part in torch.split(order, config.batch)]
        yield Epoch(predict=scorer, metrics={"train_loss": sum(losses) / len(losses)}, pack=pack)


def unpack(config: Config, state: Mapping[str, Any], seed: int) -> Callable[[Sequences], Tensor]:
    """Return a trained model: users' histories -> scores of all target-domain items, [U, J]."""
    vectors = {name: state["network"][name] for name in SSCDR.__annotations__}
    network = SSCDR(config, tuple(state["source"]), tuple(state["target"]), **vectors)
    return unpacked(network, state).scores
