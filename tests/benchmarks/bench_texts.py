"""Training steps of CATN and OmniMatch beside the usual loop of public code, on one thread.

    python tests/benchmarks/bench_texts.py

The usual loop: batches of single ratings (256 for CATN, 64 for OmniMatch), each with its own documents, padded and looked
up in the table of word vectors, conv1d over them, dense Adam over all that trains (for OmniMatch the words too). Ours:
steps of 16 users with all their ratings in both domains, at the default sizes, which are those of public code. Reviews have
16 words each, so that both read the same. The usual loop is spared OmniMatch's documents of unlabelled users; ours reads
them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
import torch
from measure import rate
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from trainables.mapped_users import take_step, user_batches
from trainables.models import catn, omnimatch
from trainables.tasks.arrays import FeatureRows
from trainables.tasks.rating import HeldOut, Ratings, Task, Words

USERS, HELD_OUT, SIDE, EACH, ITEMS = 200, 20, 40, 30, 300
LENGTH, VOCABULARY, WIDTH = 16, 3_000, 384  # of a review; words, and their vectors


def make_task() -> Task:
    """A task of random ratings and words."""
    draw = np.random.default_rng(0)
    popularity = 1 / np.arange(10, VOCABULARY + 10)

    def ratings(users: int) -> Ratings:
        user = torch.arange(users).repeat_interleave(EACH)
        item = np.concatenate([np.sort(draw.choice(ITEMS, EACH, replace=False)) for _ in range(users)])
        rating = torch.from_numpy(draw.integers(1, 6, len(user)).astype(np.float32))
        return Ratings(user, torch.from_numpy(item), rating, words(len(user)))

    def words(texts: int) -> Words:
        number = draw.choice(VOCABULARY, LENGTH * texts, p=popularity / popularity.sum()).astype(np.int32)
        return Words(torch.from_numpy(number), LENGTH * torch.arange(texts + 1))

    def rows(count: int) -> FeatureRows:
        return FeatureRows(np.zeros((count, 1), np.float32), np.arange(count), np.zeros(1, np.float32), 1.0)

    train, held_out, end = ratings(USERS + SIDE), ratings(HELD_OUT), USERS * EACH
    return Task(
        source=rows(USERS), source_offset=torch.zeros(USERS), source_ratings=ratings(USERS + HELD_OUT), source_items=ITEMS,
        target=rows(USERS + SIDE), items=rows(ITEMS), train=train,
        overlapping=Ratings(train.user[:end], train.item[:end], train.rating[:end]),
        validation=HeldOut(
            source=rows(HELD_OUT), source_row=torch.arange(USERS, USERS + HELD_OUT), source_offset=torch.zeros(HELD_OUT),
            ratings=held_out, cold_item=torch.zeros(len(held_out), dtype=torch.bool),
        ),
        mean=3.0, item_offset=torch.zeros(ITEMS), slope=0.5,
        rating_scale=(1.0, 5.0), source_scale=(1.0, 5.0), clip=True, item_words=words(ITEMS),
        word_vectors=torch.from_numpy(draw.normal(size=(VOCABULARY, WIDTH)).astype(np.float32)),
    )  # fmt: skip


def our_steps(name: str, task: Task) -> Iterator[int]:
    """Trains for ever; yields the number of ratings of each step."""
    generator = torch.Generator().manual_seed(0)
    model = catn.CATN(catn.Config(), task, generator) if name == "catn" else None
    other = omnimatch.OmniMatch(omnimatch.Config(), task, generator) if name == "omnimatch" else None
    chosen = model or other
    assert chosen is not None
    adam = torch.optim.Adam(chosen.parameters(), fused=True)
    while True:
        for users in user_batches(USERS if model else USERS + HELD_OUT, 16, generator, task.device):
            if model:
                take_step(adam, model.loss(users))
            if other:
                take_step(adam, other.loss(users, generator))
            yield EACH * (len(users) + int((users < USERS).sum()))


# --- the usual loop -----------------------------------------------------------------------------------------------


def padded_documents(ratings: Ratings, code_N: Tensor, size: int, words: int) -> Tensor:
    """The first words of each user or item, padded behind with the word after the last, [size, words]."""
    assert ratings.words is not None
    number = ratings.words.number.view(-1, LENGTH).long()
    documents = [number[code_N == code].flatten()[:words] for code in range(size)]
    return nn.utils.rnn.pad_sequence(documents, batch_first=True, padding_value=VOCABULARY)


class UsualCATN(nn.Module):
    """One direction: the source documents of users, those of like-minded others, the target documents of items."""

    batch = 256

    def __init__(self, task: Task) -> None:
        super().__init__()
        source, target = task.source_ratings, task.train
        assert task.word_vectors is not None
        self.words = nn.Embedding.from_pretrained(torch.cat([task.word_vectors, torch.zeros(1, WIDTH)]))
        self.user = padded_documents(source, source.user, USERS, 500)
        self.item = padded_documents(target, target.item, ITEMS, 500)
        self.conv, self.second = nn.Conv1d(WIDTH, 50, 3, padding=1), nn.Conv1d(50, 50, 3, padding=1)
        self.project, self.gate = nn.Linear(50, 160), nn.Linear(50, 160)
        self.query = nn.Parameter(torch.randn(2, 5, 32))
        self.fuse_gate, self.fuse = nn.Linear(64, 32), nn.Linear(64, 32)
        self.correlate = nn.Parameter(torch.randn(32, 32) / 6)

    def aspects(self, document: Tensor, query: Tensor, *, beside: bool = False) -> Tensor:
        feature = self.conv(self.words(document).transpose(1, 2)).relu()
        if beside:
            feature = self.second(feature).relu()
        feature = feature.transpose(1, 2)
        g = (self.project(feature) * self.gate(feature).sigmoid()).unflatten(2, (5, 32))
        return ((g * query).sum(dim=-1).softmax(dim=1)[..., None] * g).sum(dim=1)

    def loss(self, user: Tensor, item: Tensor, rating: Tensor) -> Tensor:
        own = self.aspects(self.user[user], self.query[0])
        other = self.aspects(self.user[user.roll(1)], self.query[0], beside=True)
        gate = self.fuse_gate(torch.cat([other - own, other * own], dim=-1)).sigmoid()
        user_aspects = self.fuse(torch.cat([gate * other, own], dim=-1)).tanh()
        match = user_aspects @ self.correlate @ self.aspects(self.item[item], self.query[1]).transpose(1, 2)
        return (rating - 3 - match.mean(dim=(1, 2))).square().mean()


class UsualOmniMatch(nn.Module):
    """Three encoders of padded documents, contrast and domain losses of the batch."""

    batch = 64

    def __init__(self, task: Task) -> None:
        super().__init__()
        source, target = task.source_ratings, task.train
        assert task.word_vectors is not None
        table = torch.cat([task.word_vectors, torch.zeros(1, WIDTH)])
        self.words = nn.Embedding.from_pretrained(table, freeze=False)
        self.documents = [
            padded_documents(source, source.user, USERS, 200), padded_documents(target, target.user, USERS, 200),
            padded_documents(target, target.item, ITEMS, 200),
        ]  # fmt: skip
        self.convs = nn.ModuleList(nn.ModuleList(nn.Conv1d(WIDTH, 200, w) for w in (3, 4, 5)) for _ in range(3))
        self.common, self.specific = nn.Linear(600, 64), nn.ModuleList(nn.Linear(600, 64) for _ in range(2))
        self.of_item, self.head, self.view = nn.Linear(600, 128), nn.Linear(256, 1), nn.Linear(256, 128)
        self.domains = nn.ModuleList(nn.Linear(64, 2) for _ in range(2))

    def h(self, side: int, code: Tensor) -> Tensor:
        seen = self.words(self.documents[side][code]).transpose(1, 2)
        return torch.cat([conv(seen).relu().amax(dim=2) for conv in self.convs[side]], dim=1)  # type: ignore[union-attr]

    def loss(self, user: Tensor, item: Tensor, rating: Tensor) -> Tensor:
        v, views, domain = self.of_item(self.h(2, item)), [], torch.zeros(())
        for side in (0, 1):
            h = self.h(side, user)
            c, p = self.common(h), self.specific[side](h)
            label = torch.full((len(user),), side)
            domain = domain + cross_entropy(self.domains[0](omnimatch.Reversal.apply(c, 0.5)), label)  # type: ignore[no-untyped-call]
            domain = domain + cross_entropy(self.domains[1](p), label)
            views.append(torch.cat([c, p, v], dim=1).relu())
        y_s, y_t = (normalize(self.view(view), dim=1) for view in views)
        error = rating - 3 - self.head(views[1]).squeeze(1)
        return error.square().mean() + 0.1 * omnimatch.contrast(y_s, y_t, rating, 0.07) + 0.25 * domain


def usual_steps(name: str, task: Task) -> Iterator[int]:
    """Trains for ever; yields the number of ratings of each step."""
    usual = UsualCATN(task) if name == "catn" else UsualOmniMatch(task)
    adam = torch.optim.Adam([weight for weight in usual.parameters() if weight.requires_grad], lr=1e-3)
    ratings = task.overlapping
    while True:
        for row in torch.randperm(len(ratings)).split(usual.batch):
            take_step(adam, usual.loss(ratings.user[row], ratings.item[row], ratings.rating[row]))
            yield len(row)


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=15.0, help="CPU seconds per number")
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    task = make_task()
    print("| model | usual loop, ratings/s | ours, ratings/s | times |\n|---|---:|---:|---:|")
    for name in ("catn", "omnimatch"):
        usual, ours = (rate(steps(name, task), seconds) for steps in (usual_steps, our_steps))
        print(f"| {name} | {usual:,.0f} | {ours:,.0f} | {ours / usual:.1f} |", flush=True)


if __name__ == "__main__":
    main()
