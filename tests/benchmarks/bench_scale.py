"""A study of 10,000 trials on 100 nodes, simulated from the driver's measured costs: what limits it.

    python tests/benchmarks/bench_scale.py [--trial-ms 140] [--message-ms 6]

The driver is one server: it starts and ends trials (`--trial-ms` together, bench_many_trials.py) and takes the messages
of running ones (`--message-ms` each, bench_overhead.py), one at a time; a worker waits for the answer, and pauses between
messages as `study.engine.worker.pause` says. Durations of trials are lognormal. Prints the makespan beside that of a driver
that costs nothing, and the driver's utilisation.
"""

from __future__ import annotations

import argparse
import heapq

import numpy as np

from study.engine.worker import pause


def simulate(durations: list[float], slots: int, trial_s: float, message_s: float) -> tuple[float, float, int]:
    """Seconds until all trials have ended, the driver's share of them at work, and the number of messages."""
    queue = list(durations)
    # (when the driver is asked, slot, age of the trial's training, what is left of it); age < 0: asks for a trial
    events = [(0.0, slot, -1.0, 0.0) for slot in range(slots)]
    free = busy = end = 0.0
    messages = 0
    while events:
        now, slot, age, left = heapq.heappop(events)
        cost = message_s if age >= 0 and left > 0 else trial_s / 2
        free = max(free, now) + cost
        waited = free - now
        busy += cost
        messages += age >= 0
        end = free
        if age >= 0 and left <= 0:  # it has ended; the slot asks for another
            heapq.heappush(events, (free, slot, -1.0, 0.0))
            continue
        if age < 0:
            if not queue:
                busy -= cost
                continue
            age, left, waited = 0.0, queue.pop(), 0.0
        step = min(left, pause(age, waited))
        heapq.heappush(events, (free + step, slot, age + step, left - step))
    return end, busy / end, messages


def main() -> None:
    """Print a row for each mean duration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--nodes", type=int, default=100)
    parser.add_argument("--trials-per-node", type=int, default=8)
    parser.add_argument("--trial-ms", type=float, default=140.0)
    parser.add_argument("--message-ms", type=float, default=6.0)
    args = parser.parse_args()
    slots = args.nodes * args.trials_per_node
    print(f"{args.trials} trials, {slots} side by side, {args.trial_ms:g} ms a trial, {args.message_ms:g} ms a message")
    for minutes in (0.5, 1, 2, 5, 10, 30):
        drawn = np.random.default_rng(0).lognormal(0.0, 0.5, args.trials)
        durations = [float(value) for value in drawn / drawn.mean() * 60 * minutes]
        ideal, _, _ = simulate(durations, slots, 0.0, 0.0)
        end, busy, messages = simulate(durations, slots, args.trial_ms / 1000, args.message_ms / 1000)
        print(
            f"trials of {minutes:4g} min: {end / 3600:5.2f} h, {end / ideal:4.2f} times a driver that costs nothing; "
            f"driver busy {100 * busy:3.0f} %, {messages / end:3.0f} messages/s"
        )


if __name__ == "__main__":
    main()
