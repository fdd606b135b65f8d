"""Devices and random numbers: what trains on a GPU trains on a CPU by the same code, and each seed draws for itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, Self

import torch
from torch import Tensor


class OnDevice:
    """Gives a dataclass of tensors, and of such dataclasses, a place: all its tensors are on one device."""

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        places = (getattr(getattr(self, entry.name), "device", None) for entry in fields(self))  # type: ignore[arg-type]
        return next(place for place in places if isinstance(place, torch.device))

    def to(self, device: torch.device) -> Self:
        """Return the same on another device; itself where it is there already."""
        before = {entry.name: getattr(self, entry.name) for entry in fields(self)}  # type: ignore[arg-type]
        moved = {name: value.to(device) if hasattr(value, "to") else value for name, value in before.items()}
        return self if all(moved[name] is before[name] for name in before) else type(self)(**moved)


def on_cpu(state: Any) -> Any:
    """Return nested dicts and lists with all tensors on the CPU, so that a machine without a GPU reads them."""
    if isinstance(state, Tensor):
        return state.cpu()
    if isinstance(state, dict):
        return {key: on_cpu(value) for key, value in state.items()}
    return type(state)(map(on_cpu, state)) if isinstance(state, list | tuple) else state


def on_device(state: Any, device: torch.device) -> Any:
    """Return nested dicts and lists with all tensors on a device."""
    if isinstance(state, Tensor):
        return state.to(device)
    if isinstance(state, dict):
        return {key: on_device(value, device) for key, value in state.items()}
    return type(state)(on_device(value, device) for value in state) if isinstance(state, list | tuple) else state


def free_bytes(device: torch.device) -> int:
    """Return the memory of a GPU that this process may still take; 0 for a CPU, whose tables stay mapped from disk."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    share = torch.cuda.get_per_process_memory_fraction(device)
    return min(free, int(share * total) - torch.cuda.memory_reserved(device))


def share_gpu(gpus: float) -> None:
    """Keep this process to its share of the GPU's memory, where trials share one: the next one's is not touched.

    A trial that asks for more ends with an error of its own. The share is of torch's memory; CUDA itself takes a few
    hundred MiB of each process besides. Where there is no GPU, the training says so itself.
    """
    if not torch.cuda.is_available():
        return
    torch.cuda.set_per_process_memory_fraction(min(gpus, 1.0))


def global_generators(device: torch.device) -> list[torch.Generator]:
    """Return the generators that dropout and initialisation on a device draw from. Without a GPU, CUDA is not touched."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call]
        generators.append(torch.cuda.default_generators[device.index or 0])
    return generators


def random_states(device: torch.device) -> list[Tensor]:
    """Return the states of torch's global random numbers on a device."""
    return [generator.get_state() for generator in global_generators(device)]


def set_random_states(states: Sequence[Tensor], device: torch.device) -> None:
    """Go on from the states of `random_states`; of another machine's, as many as there are here."""
    for generator, state in zip(global_generators(device), states, strict=False):
        generator.set_state(state)


class OwnRandomness:
    """torch's global random numbers as one seed finds them, whoever draws from them in between.

    Within `with randomness:` the global generators go on where this seed left them; after it they are as before.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._device = device
        generators = global_generators(device)
        self.states = [torch.Generator(generator.device).manual_seed(seed).get_state() for generator in generators]
        self._outside: list[Tensor] = []

    def __enter__(self) -> None:
        self._outside = random_states(self._device)
        set_random_states(self.states, self._device)

    def __exit__(self, *_: object) -> None:
        self.states = random_states(self._device)
        set_random_states(self._outside, self._device)

    def load(self, states: Sequence[Tensor]) -> None:
        """Go on from the states of another process, which may have had no GPU, or had one."""
        self.states = [*states[: len(self.states)], *self.states[len(states) :]]


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global random numbers for a block; after it they are as before."""
    with OwnRandomness(seed, device):
        yield
