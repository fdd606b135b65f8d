"""Seeds of one MuSiC configuration as one batched model, beside as many separate trainings, on one thread.

    python tests/benchmarks/bench_seeds.py TASKS        # the folder `tasks` in the home of `study extract books-movies`

Batched: weights with a leading dimension S, one forward and one backward pass for all seeds, each with users, steps and
noise of its own; ratings of all seeds lie one after the other, for their numbers differ. What is timed is what trials do
most: an epoch of the joint stage and its validation. Separate trainings and the batched one take turns, so that whatever
else the machine does falls on both; a row's figure is the median of CPU seconds per epoch.
Shapes: S seeds, B batch of users, N ratings of all seeds, I items, U validation users, D vector width, T steps.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as functional
from torch import Tensor

from trainables.diffusion import timestep_embedding
from trainables.models.music import Config, _Trainer
from trainables.tasks.rating import Task, load_task
from trainables.trial import validate


class Batched:
    """The joint stage of S seeds at once."""

    def __init__(self, config: Config, task: Task, seeds: int) -> None:
        self.config, self.task, self.seeds = config, task, seeds
        self.trainers = [_Trainer(config, task, seed) for seed in range(seeds)]
        models = [trainer.model for trainer in self.trainers]
        stacked, _ = torch.func.stack_module_state(models)  # type: ignore[arg-type]
        self.weights = {name: value.detach().requires_grad_() for name, value in stacked.items()}
        self.optimizer = torch.optim.Adam(self.weights.values(), lr=config.lr, fused=True)
        self.process, self.model = models[0].process, models[0]
        self.items = task.items[torch.arange(len(task.items))].expand(seeds, -1, -1)
        self.training = True

    def linear(self, name: str, x: Tensor, bias: bool = True) -> Tensor:
        """[S, B, in] -> [S, B, out]."""
        weight = self.weights[f"{name}.weight"].transpose(1, 2)
        return torch.baddbmm(self.weights[f"{name}.bias"][:, None], x, weight) if bias else torch.bmm(x, weight)

    def dropout(self, x: Tensor) -> Tensor:
        """As `nn.Dropout`."""
        return functional.dropout(x, self.config.dropout, self.training)

    def mlp(self, name: str, x: Tensor) -> Tensor:
        """`FeatureMLP`, [S, B, F] -> [S, B, D]."""
        return torch.tanh(self.linear(f"{name}.outer", self.dropout(torch.tanh(self.linear(f"{name}.inner", x)))))

    def unet(self, x: Tensor, t_SB: Tensor, c: Tensor) -> Tensor:
        """`VectorUNet`, [S, B, D] -> [S, B, D]."""
        time_SBD = timestep_embedding(t_SB.flatten(), self.config.dim).view(*t_SB.shape, -1)

        def block(name: str, x: Tensor) -> Tensor:
            place = f"unet.{name}"
            x = self.linear(f"{place}.map", x) + self.linear(f"{place}.time", time_SBD)
            return self.dropout(functional.silu(x + self.linear(f"{place}.condition", c, bias=False)))

        full = block("down_full", x + c)
        half = block("down_half", full)
        quarter = block("down_quarter", half)
        x = block("up_half", torch.cat([block("middle", quarter), quarter], dim=-1))
        x = block("up_full", torch.cat([x, half], dim=-1))
        return self.linear("unet.output", torch.cat([x, full], dim=-1))

    def rated(self, vectors_SBD: Tensor, row_N: Tensor, item_N: Tensor) -> Tensor:
        """Dot products u . v of ratings, [N]; `row_N` and `item_N` count users and items through all seeds."""
        items = self.mlp("item_mlp", self.items).flatten(0, 1)
        return (vectors_SBD.flatten(0, 1).index_select(0, row_N) * items.index_select(0, item_N)).sum(dim=-1)

    def epoch(self, x0_SUD: Tensor) -> None:
        """An epoch of the joint stage."""
        task, config, size = self.task, self.config, len(self.task.items)
        self.training = True
        streams = [trainer._batches(task.overlapping) for trainer in self.trainers]
        for parts in zip(*streams, strict=True):
            users = torch.stack([users_B for users_B, _, _ in parts])
            B = users.shape[1]
            row = torch.cat([place + seed * B for seed, (_, place, _) in enumerate(parts)])
            rating = torch.cat([rows for _, _, rows in parts])
            item = task.overlapping.item[rating]
            shift = torch.cat([torch.full((len(rows),), seed * size) for seed, (_, _, rows) in enumerate(parts)])
            share = torch.cat([torch.full((len(rows),), 1 / len(rows)) for _, _, rows in parts])
            condition = self.mlp("user_mlp", task.source[users.flatten()].view(self.seeds, B, -1))
            x0 = torch.stack([x0_SUD[seed, users[seed]] for seed in range(self.seeds)])
            drawn = [trainer.generator for trainer in self.trainers]
            t = torch.stack([torch.randint(1, config.steps + 1, (B,), generator=generator) for generator in drawn])
            eps = torch.stack([torch.randn(x0.shape[1:], generator=generator) for generator in drawn])
            noised = self.process.noised(x0.flatten(0, 1), t.flatten(), eps.flatten(0, 1)).view_as(x0)
            generated = self.unet(noised, t, condition)
            predicted = self.model.offset(item, task.source_offset[users.flatten()][row])
            predicted = predicted + self.rated(generated, row, item + shift)
            rating_loss = ((predicted - task.overlapping.rating[rating]).square() * share).sum()
            loss = config.beta * functional.mse_loss(generated, x0) * self.seeds + (1 - config.beta) * rating_loss
            self.optimizer.zero_grad()
            loss.item()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()

    @torch.no_grad()
    def validate(self) -> None:
        """Generated vectors, ratings and metrics of all seeds."""
        self.training, task = False, self.task
        held_out, users = task.validation, len(task.validation.source)
        condition = self.mlp("user_mlp", held_out.source[torch.arange(users)].expand(self.seeds, -1, -1))
        x = torch.randn(condition.shape)
        for t in range(self.config.steps, 0, -1):
            x0 = self.unet(x, torch.full(x.shape[:2], t), condition)
            x = self.process.posterior_mean(x0, x, t) + self.process.deviation[t - 1] * torch.randn(x.shape)
        vectors = x
        seed = torch.arange(self.seeds)[:, None]
        row = (held_out.ratings.user + seed * users).flatten()
        item = (held_out.ratings.item + seed * len(task.items)).flatten()
        u_dot_v = self.rated(vectors, row, item).view(self.seeds, -1)
        offset = self.model.offset(held_out.ratings.item, held_out.source_offset[held_out.ratings.user])
        for number in range(self.seeds):
            validate(self.model.predict, task, number, predicted=offset + u_dot_v[number])


def separate(config: Config, task: Task, seeds: int) -> Iterator[None]:
    """An epoch and its validation of each seed, for ever."""
    trainers = [_Trainer(config, task, seed) for seed in range(seeds)]
    for trainer in trainers:
        trainer.progress |= {"x0": torch.randn(len(task.target), config.dim), "spread": 1.0}
    while True:
        for trainer in trainers:
            trainer.model.train()
            epoch = trainer._measured(trainer._joint_epoch())
            validate(epoch.predict, task, trainer.seed, predicted=epoch.validation)
        yield


def batched(config: Config, task: Task, seeds: int) -> Iterator[None]:
    """The same of all seeds at once."""
    model = Batched(config, task, seeds)
    x0 = torch.randn(seeds, len(task.target), config.dim)
    while True:
        model.epoch(x0)
        model.validate()
        yield


def seconds(ways: list[Iterator[None]], least: float) -> list[float]:
    """CPU seconds of an epoch each way, the median of turns that together take `least` CPU seconds or more."""
    turns: list[list[float]] = [[] for _ in ways]
    for way in ways:
        next(way)
    while sum(map(sum, turns)) < least or len(turns[0]) < 5:
        for way, times in zip(ways, turns, strict=True):
            began = time.process_time()
            next(way)
            times.append(time.process_time() - began)
    return [statistics.median(times) for times in turns]


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", type=Path)
    parser.add_argument("--seconds", type=float, default=3.0, help="CPU seconds per row")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folders = sorted(arguments.tasks.glob("*-*/search"), key=lambda folder: (folder / "user.npy").stat().st_size)
    print("| ratings | users | T | S | separate, ms an epoch | batched | separate / batched |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    makers: list[Callable[..., Iterator[None]]] = [separate, batched]
    for folder in (folders[0], folders[-1]):
        task = load_task(folder)
        for steps in (10, 50):
            for seeds in (1, 3, 5, 16):
                ways = [make(Config(steps=steps), task, seeds) for make in makers]
                one, other = seconds(ways, arguments.seconds)
                print(
                    f"| {len(task.overlapping):,} | {len(task.source)} | {steps} | {seeds} | {one * 1000:.0f} | "
                    f"{other * 1000:.0f} | {one / other:.2f} |", flush=True,
                )  # fmt: skip


if __name__ == "__main__":
    main()
