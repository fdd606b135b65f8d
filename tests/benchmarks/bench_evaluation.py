"""Evaluation of next items: 937 users, 1,000 candidates each, one thread, as LGCD's test set has them.

    python tests/benchmarks/bench_evaluation.py

Ours: candidates stored with the task, all rows ranked at once, ties shared. The usual loop of public code draws each
user's negatives anew and sorts each user's scores. Neither counts what making the scores costs. The quickest of several
runs is printed, and both must find the same metrics.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainables.metrics.sequential import SequenceErrors, sequence_errors
from trainables.tasks.sequential import HeldOut, Sequences

USERS, NEGATIVES, ITEMS, HISTORY = 937, 999, 27_637, 16
REPEATS = 7


def rows() -> tuple[HeldOut, Tensor]:
    """Held-out rows of one protocol with stored candidates, and random scores of all items."""
    draw = np.random.default_rng(0)
    candidates = np.stack([draw.choice(ITEMS, 1 + NEGATIVES, replace=False) for _ in range(USERS)]).astype(np.int32)
    user = torch.arange(USERS)
    held_out = HeldOut(
        history=Sequences(torch.zeros(0, dtype=torch.int64), torch.zeros(USERS + 1, dtype=torch.int64)),
        protocol=torch.zeros(USERS, dtype=torch.int64),
        user=user,
        target=torch.from_numpy(candidates[:, 0].astype(np.int64)),
        candidates=torch.from_numpy(candidates),
    )
    return held_out, torch.from_numpy(draw.normal(size=(USERS, ITEMS)).astype(np.float32))


def draw_negatives(targets: list[int], histories: list[set[int]]) -> list[list[int]]:
    """Item by item, drawn again where the user has it or it was drawn before."""
    draw = np.random.default_rng(1)
    found = []
    for target, history in zip(targets, histories, strict=True):
        negatives: list[int] = []
        taken = {target, *history}
        while len(negatives) < NEGATIVES:
            item = int(draw.integers(ITEMS))
            if item not in taken:
                taken.add(item)
                negatives.append(item)
        found.append(negatives)
    return found


def usual_metrics(scores_RC: Tensor) -> dict[str, float]:
    """User by user: sort, look the target up, add."""
    found = {"hr5": 0.0, "hr10": 0.0, "ndcg5": 0.0, "ndcg10": 0.0}
    for scores in scores_RC:
        rank = int((torch.argsort(scores, descending=True) == 0).nonzero()[0, 0])
        for at in (5, 10):
            if rank < at:
                found[f"hr{at}"] += 1
                found[f"ndcg{at}"] += float(1 / np.log2(rank + 2))
    return {name: value / len(scores_RC) for name, value in found.items()}


def quickest(work: Callable[[], Any]) -> tuple[float, Any]:
    """Wall seconds of the quickest run, and what it gave."""
    seconds, result = float("inf"), None
    for _ in range(REPEATS):
        start = time.perf_counter()
        result = work()
        seconds = min(seconds, time.perf_counter() - start)
    return seconds, result


def main() -> None:
    torch.set_num_threads(1)
    held_out, full = rows()
    scores = full.gather(1, held_out.candidates.long())
    histories = [set(np.random.default_rng(user).integers(ITEMS, size=HISTORY).tolist()) for user in range(USERS)]
    ours, errors = quickest(lambda: sequence_errors(held_out, scores))
    ranked, _ = quickest(lambda: sequence_errors(held_out, scores, full))
    usual, expected = quickest(lambda: usual_metrics(scores))
    drawing, _ = quickest(lambda: draw_negatives(held_out.target.tolist(), histories))
    assert isinstance(errors, SequenceErrors)
    measured = errors.metrics(["as-given"])
    assert all(abs(measured[name] - value) < 1e-9 for name, value in expected.items())
    print(f"{USERS} users x {1 + NEGATIVES} candidates, one thread")
    print(f"{'ours: ranks and metrics, candidates stored':<60}{1000 * ours:>9.1f} ms")
    print(f"{'usual: a sort per user':<60}{1000 * usual:>9.1f} ms")
    print(f"{'usual: drawing the negatives of each user':<60}{1000 * drawing:>9.1f} ms")
    print(f"{'usual, both / ours':<60}{(usual + drawing) / ours:>9.1f} times")
    print(f"{f'ours, full ranking of {ITEMS} items added':<60}{1000 * ranked:>9.1f} ms")


if __name__ == "__main__":
    main()
