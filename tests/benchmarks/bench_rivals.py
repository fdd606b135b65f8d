"""Training of MuSiC's rivals beside the usual loop of public code, on one thread; the memory of a large factorisation.

    python tests/benchmarks/bench_rivals.py

The usual loop: single ratings in a TensorDataset, a DataLoader that collates them sample by sample, nn.Embedding tables,
every network run once per rating, in float32; for CMF dense Adam over the tables. Batches as in public code (128 ratings,
64 for the mappings), dim 10. A sample is a target rating (CMF: a rating, SSCDR: a triple) that an epoch covers. Ours runs
networks once per user, and where the loss is one over users it weighs them by their ratings (`user_weight: ratings`), so
that an epoch covers the same. Ours includes the measuring of 20 validation users after each epoch.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from measure import cpu_seconds, rate
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from trainables.interface import Epoch, load_model
from trainables.models.diffcdr import Config, NoiseNetwork, evaluation_times, sample
from trainables.models.omnimatch import Encoder
from trainables.tasks.arrays import FeatureRows
from trainables.tasks.rating import HeldOut, Ratings, Task
from trainables.words import largest_of_documents, word_convolution

USERS, HELD_OUT, EACH, ITEMS, DIM, HISTORY = 1_200, 20, 30, 12_000, 10, 20


def make_task(spread: int = 1) -> Task:
    """A task of random numbers; `spread` times more items, on the same ratings."""
    draw = np.random.default_rng(0)

    def ratings(users: int) -> Ratings:
        user = torch.arange(users).repeat_interleave(EACH)
        popularity = 1 / np.arange(10, ITEMS + 10)
        item = torch.from_numpy(draw.choice(ITEMS, len(user), p=popularity / popularity.sum()) * spread)
        pair = torch.unique(user * ITEMS * spread + item)
        user, item = pair // (ITEMS * spread), pair % (ITEMS * spread)
        return Ratings(user, item, torch.from_numpy(draw.integers(1, 6, len(user)).astype(np.float32)))

    def rows(count: int) -> FeatureRows:
        return FeatureRows(np.zeros((count, 1), np.float32), np.arange(count), np.zeros(1, np.float32), 1.0)

    train, held_out = ratings(USERS), ratings(HELD_OUT)
    return Task(
        source=rows(USERS), source_offset=torch.zeros(USERS), source_ratings=ratings(USERS + HELD_OUT),
        source_items=ITEMS * spread, target=rows(USERS), items=rows(ITEMS * spread), train=train, overlapping=train,
        validation=HeldOut(
            source=rows(HELD_OUT), source_row=torch.arange(USERS, USERS + HELD_OUT),
            source_offset=torch.zeros(HELD_OUT), ratings=held_out,
            cold_item=torch.zeros(len(held_out), dtype=torch.bool),
        ),
        mean=3.0, item_offset=torch.zeros(ITEMS * spread), slope=0.5,
        rating_scale=(1.0, 5.0), source_scale=(1.0, 5.0), clip=True,
    )  # fmt: skip


# --- ours ---------------------------------------------------------------------------------------------------------


def our_epochs(name: str, task: Task) -> Iterator[int]:
    """Trains for ever; yields the number of samples after each epoch."""
    model = load_model(name)
    fields = {"dim": DIM, "user_weight": "ratings", "ridge": 1.0}
    config = model.Config(**{field: value for field, value in fields.items() if hasattr(model.Config(), field)})
    samples = {"cmf": len(task.train) + len(task.source_ratings)}
    samples["sscdr"] = int(((task.source_ratings.rating > 3) & (task.source_ratings.user < USERS)).sum())
    while True:
        for place in model.train(config, task, 0):  # EMCDR's closed form is one epoch: it is solved anew
            if isinstance(place, Epoch):
                yield samples.get(name, len(task.overlapping))


# --- the usual loop -----------------------------------------------------------------------------------------------


class Usual(nn.Module):
    """Embedding tables of both domains, and what a model puts on them; the loss of single samples."""

    def __init__(self, task: Task, *, tables_train: bool) -> None:
        super().__init__()
        users = USERS + HELD_OUT

        def table(count: int) -> nn.Embedding:
            return nn.Embedding.from_pretrained(torch.randn(count, DIM), freeze=not tables_train)

        self.source, self.target = table(users), table(users)
        self.source_items, self.items = table(task.source_items), table(len(task.items))

    def loss(self, *columns: Tensor) -> Tensor:
        raise NotImplementedError


class UsualCMF(Usual):
    def loss(self, user: Tensor, item: Tensor, rating: Tensor) -> Tensor:  # type: ignore[override]
        return functional.mse_loss((self.source(user) * self.items(item)).sum(dim=1), rating)


class UsualEMCDR(Usual):
    def __init__(self, task: Task, *, tables_train: bool) -> None:
        super().__init__(task, tables_train=tables_train)
        self.mapping = nn.Linear(DIM, DIM, bias=False)

    def loss(self, user: Tensor, item: Tensor, rating: Tensor) -> Tensor:  # type: ignore[override]
        return functional.mse_loss(self.mapping(self.source(user)), self.target(user))


class UsualLACDR(Usual):
    def __init__(self, task: Task, *, tables_train: bool) -> None:
        super().__init__(task, tables_train=tables_train)
        self.encode_s, self.encode_t = (nn.Linear(DIM, 4, bias=False) for _ in range(2))
        self.decode_s, self.decode_t = (nn.Linear(4, DIM, bias=False) for _ in range(2))

    def loss(self, user: Tensor, item: Tensor, rating: Tensor) -> Tensor:  # type: ignore[override]
        source, target = self.source(user), self.target(user)
        hidden_s, hidden_t = self.encode_s(source), self.encode_t(target)
        apart = (self.decode_s(hidden_s) - source).norm(dim=1) + (self.decode_t(hidden_t) - target).norm(dim=1)
        return (apart + 2 * (hidden_s - hidden_t).norm(dim=1)).sum()


class UsualSSCDR(UsualEMCDR):
    def loss(self, user: Tensor, positive: Tensor, negative: Tensor) -> Tensor:  # type: ignore[override]
        target = self.target(user)
        labelled = functional.mse_loss(self.mapping(self.source(user)), target)
        near, far = (
            (self.mapping(self.source_items(item)) - target).square().sum(dim=1) for item in (positive, negative)
        )
        return labelled + (1 + near - far).clamp(min=0).mean()


class UsualPTUPCDR(Usual):
    def __init__(self, task: Task, *, tables_train: bool) -> None:
        super().__init__(task, tables_train=tables_train)
        self.event = nn.Sequential(nn.Linear(DIM, DIM), nn.ReLU(), nn.Linear(DIM, 1, bias=False))
        self.meta = nn.Sequential(nn.Linear(DIM, 50), nn.ReLU(), nn.Linear(50, DIM * DIM))

    def loss(self, user: Tensor, item: Tensor, rating: Tensor, history: Tensor) -> Tensor:  # type: ignore[override]
        liked = self.source_items(history)
        weight = (self.event(liked).squeeze(-1) - 1e8 * (history == 0)).softmax(dim=1)
        own = self.meta((weight[..., None] * liked).sum(dim=1)).view(-1, DIM, DIM)
        mapped = torch.bmm(self.source(user)[:, None], own)[:, 0]
        return functional.mse_loss((mapped * self.items(item)).sum(dim=1), rating)


class UsualDiffCDR(Usual):
    """Three layers twice for each evaluation, and the sampler once per rating."""

    def __init__(self, task: Task, *, tables_train: bool) -> None:
        super().__init__(task, tables_train=tables_train)
        self.network = NoiseNetwork(Config(), DIM, torch.Generator().manual_seed(0)).float()
        self.align = nn.Linear(DIM, DIM, bias=False)

    def loss(self, user: Tensor, item: Tensor, rating: Tensor) -> Tensor:  # type: ignore[override]
        source, target = self.source(user), self.target(user)
        t = torch.rand(len(user), dtype=torch.float64)
        noise, alpha = torch.randn_like(target), torch.exp(-4.975 * t**2 - 0.05 * t).float()[:, None]
        x = alpha * target + (1 - alpha**2).sqrt() * noise
        kept = (torch.rand(len(user), 1) > 0.1).float()
        predicted = layer_by_layer(self.network, x, source, kept, t)
        with torch.no_grad():
            x_0 = sample(chain(self.network, source), source, 30)
        aligned = self.align(x_0)
        task_loss = functional.mse_loss((aligned * self.items(item)).sum(dim=1), rating)
        return (
            functional.smooth_l1_loss(predicted, noise) + functional.smooth_l1_loss(aligned, target) + 0.1 * task_loss
        )


def layer_by_layer(net: NoiseNetwork, x: Tensor, z: Tensor, mask: Tensor | float, t: Tensor) -> Tensor:
    """The network as public code runs it: an embedding of the time and three layers for each row."""
    half = net.config.hidden // 2
    frequency = torch.exp(-math.log(10_000) / (half - 1) * torch.arange(half))
    angle = (1000 * (t.float() - 1e-3)).clamp(min=0)[:, None] * frequency
    h = x + net.of_time(torch.cat([angle.sin(), angle.cos()], dim=1).to(x.dtype)) + mask * net.of_condition(z)
    noise: Tensor = net.third(net.second(net.first(h)))
    return noise


def chain(net: NoiseNetwork, z: Tensor) -> Callable[[Tensor, int], Tensor]:
    """Guided noise by two calls of the network for all rows."""
    times = evaluation_times(30)

    def noise(x: Tensor, number: int) -> Tensor:
        t = torch.full((len(x),), times[number])
        free, bound = (layer_by_layer(net, x, z, mask, t) for mask in (0.0, 1.0))
        return free + 0.1 * (bound - free)

    return noise


def usual_epochs(name: str, task: Task) -> Iterator[int]:
    """Trains for ever; yields the number of samples after each batch."""
    usual: Usual = USUAL[name](task, tables_train=name == "cmf")
    adam = torch.optim.Adam([p for p in usual.parameters() if p.requires_grad], lr=1e-2)
    ratings, draw = task.overlapping, torch.Generator().manual_seed(0)
    columns = [ratings.user, ratings.item, ratings.rating]
    if name == "sscdr":
        columns[2] = torch.randint(task.source_items, ratings.item.shape, generator=draw)
    if name == "ptupcdr":
        history = torch.randint(task.source_items, (USERS, HISTORY), generator=draw)
        columns.append(history[ratings.user])
    size = 64 if name in ("emcdr", "lacdr", "sscdr") else 128
    loader: Any = DataLoader(TensorDataset(*columns), batch_size=size, shuffle=True)
    while True:
        for batch in loader:
            adam.zero_grad()
            usual.loss(*batch).backward()  # type: ignore[no-untyped-call]
            adam.step()
            yield len(batch[0])


USUAL: dict[str, type[Usual]] = {
    "cmf": UsualCMF, "emcdr": UsualEMCDR, "sscdr": UsualSSCDR, "lacdr": UsualLACDR, "ptupcdr": UsualPTUPCDR,
    "diffcdr": UsualDiffCDR,
}  # fmt: skip


# --- measuring ----------------------------------------------------------------------------------------------------


def sampler() -> tuple[float, float]:
    """Seconds for x_0 of 10,240 users by the chain of network calls, and by the affine identity."""
    network, z = NoiseNetwork(Config(), DIM, torch.Generator().manual_seed(0)), torch.randn(10_240, DIM)
    single = NoiseNetwork(Config(), DIM, torch.Generator().manual_seed(0)).float()

    with torch.no_grad():
        wide = z.double()
        slow = cpu_seconds(lambda: sample(chain(single, z), z, 30), best_of=4)
        return slow, cpu_seconds(lambda: network.generate(wide, wide), best_of=4)


def texts(most: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Word vectors; lengths and words of 166 documents, of 16 users and 150 items; both documents of each of 256 pairs."""
    draw = torch.Generator().manual_seed(0)
    vectors = torch.randn(30_522, 384, generator=draw)
    length = torch.randint(60, most + 1, (166,), generator=draw)
    popularity = 1 / torch.arange(10, 8_010).double()  # of words
    words = torch.multinomial(popularity, int(length.sum()), replacement=True, generator=draw)
    pairs = torch.cat([torch.arange(16).repeat_interleave(16), torch.randint(16, 166, (256,), generator=draw)])
    return vectors, length, words, pairs


def convolutions() -> tuple[float, float]:
    """Seconds for CATN's convolution and its gradient over a batch of 256 pairs of documents of up to 500 words.

    Padded documents of each pair by conv1d over looked-up vectors; and by tables, once per distinct document (16 users and
    the 150 items that they rated).
    """
    vectors, length, words, pairs = texts(500)
    weight = torch.randn(50, 384, 3).requires_grad_()
    padded = nn.utils.rnn.pad_sequence(list(words.split(length.tolist())), batch_first=True)
    document = torch.arange(166).repeat_interleave(length)

    def usual() -> None:
        seen = functional.embedding(padded[pairs], vectors)
        functional.conv1d(seen.transpose(1, 2), weight, padding=1).sum().backward()  # type: ignore[no-untyped-call]

    def tables() -> None:
        word_convolution(vectors, weight, words, document).sum().backward()  # type: ignore[no-untyped-call]

    return cpu_seconds(usual, best_of=4), cpu_seconds(tables, best_of=4)


def encoders() -> tuple[float, float]:
    """Seconds for one of OmniMatch's encoders and its gradient, words too, over 256 pairs of documents of up to 200 words.

    conv1d with windows of 3, 4 and 5 and the maximum over each pair's padded documents; and by tables, once per distinct
    review of 16 words, then the maximum over the reviews of each pair's document.
    """
    vectors, length, words, pairs = texts(200)
    length = length // 16 * 16  # documents of whole reviews
    words = words[: int(length.sum())]
    distinct, number = words.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    table = vectors[distinct].requires_grad_()
    padded_numbers = nn.utils.rnn.pad_sequence(list(number.split(length.tolist())), batch_first=True)
    encoder = Encoder(200, 384, torch.Generator().manual_seed(0))
    document = torch.arange(166).repeat_interleave(length // 16)
    review = torch.arange(len(document))

    def usual() -> None:
        seen = functional.embedding(padded_numbers[pairs], table).transpose(1, 2)
        pooled = [functional.conv1d(seen, weight).amax(dim=2) for weight in encoder.weights]
        torch.cat(pooled, dim=1).relu().sum().backward()  # type: ignore[no-untyped-call]

    def tables() -> None:
        feature = encoder(table, number.view(-1, 16))
        largest_of_documents(feature, review, document, 166, pairs, None).sum().backward()  # type: ignore[no-untyped-call]

    return cpu_seconds(usual, best_of=2), cpu_seconds(tables, best_of=4)


FACTORISE = """
import resource, time
import numpy as np
from features.factorisation import FactorSpec, Interactions, factorise
draw = np.random.default_rng(0)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
code = np.unique(draw.integers(0, 30_000, 1_000_000) * 160_000 + draw.integers(0, 160_000, 1_000_000))
rating = draw.integers(1, 6, len(code)).astype(np.float32)
ratings = Interactions(user=code // 160_000, item=code % 160_000, rating=rating, users=30_000, items=160_000)
before, began = peak(), time.process_time()
factorise(FactorSpec(factors=32, sweeps=2), ratings)
print(f"{peak():.2f} GiB in all, {peak() - before:.2f} above the data; {(time.process_time() - began) / 2:.0f} s a sweep")
"""


def main() -> None:
    """Measure and print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="CPU seconds per number")
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    task, large = make_task(), make_task(spread=20)
    print(f"{len(task.train):,} target ratings, {ITEMS:,} items a domain, dim {DIM}, one thread; samples/s\n")
    print("| model | usual loop | ours | times | usual, 20 times the items | ours, 20 times the items |")
    print("|---|---:|---:|---:|---:|---:|")
    for name in USUAL:
        usual, ours, usual_large, ours_large = (
            rate(epochs(name, chosen), seconds) for chosen in (task, large) for epochs in (usual_epochs, our_epochs)
        )
        row = f"| {name} | {usual:,.0f} | {ours:,.0f} | {ours / usual:.1f} | {usual_large:,.0f} | {ours_large:,.0f} |"
        print(row, flush=True)
    slow, fast = sampler()
    print(f"\nDiffCDR's sampler, 10,240 users: chain {1000 * slow:.0f} ms, affine identity {1000 * fast:.1f} ms, "
          f"{slow / fast:.0f} times")  # fmt: skip
    slow, fast = convolutions()
    print(f"CATN's convolution of 256 pairs: conv1d over padded documents {1000 * slow:.0f} ms, by tables "
          f"{1000 * fast:.0f} ms, {slow / fast:.0f} times")  # fmt: skip
    slow, fast = encoders()
    print(f"OmniMatch's encoder of 256 pairs: conv1d over padded documents {1000 * slow:.0f} ms, by tables "
          f"{1000 * fast:.0f} ms, {slow / fast:.0f} times")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", FACTORISE], capture_output=True, text=True, check=True)
    print(f"Factorisation of 1 million ratings of 160,000 items at width 32, peak memory: {done.stdout.strip()}")


if __name__ == "__main__":
    main()
