"""Every model trains and predicts on a GPU that is simulated, and what mixes devices is seen to fail there."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainables.devices import OnDevice, OwnRandomness, on_cpu, on_device, seeded
from trainables.interface import Model, load_model, make_config, model_names
from trainables.task_types import TASK_TYPES, task_type_of
from trainables.tasks.arrays import FeatureRows
from trainables.tasks.rating import load_task
from trainables.trial import SeedTraining, Trial

from .models_in_files import CONSTANT, NOISY, POPULAR, drop
from .sequence_worlds import make_sequence_task
from .simulated_gpu import CPU, GPU, SimulatedGpu
from .training import quick, variants
from .worlds import build, make_world

LGCD = {**load_model("lgcd").PRESETS["paper"], "negatives": 0, "epochs": 2}
CASES = [
    *((name, changes) for name in model_names() for changes in variants(name)),
    *(
        ("lgcd", {**LGCD, **changes})
        for changes in ({"train_reverse": "guess", "expert": "mlp", "align_on": "both"}, {"guesser": False})
    ),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Task type -> search and test folder."""
    folder = tmp_path_factory.mktemp("devices")
    ratings = build(make_world(), folder / "ratings", "text", reviews=True)
    return {"ratings": (ratings.task_dir, ratings.test_dir), "sequences": make_sequence_task(folder / "sequences")}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimulatedGpu:
    """A simulated GPU, on which dropout and initialisation draw from the CPU's generator."""
    monkeypatch.setattr("trainables.devices.global_generators", lambda device: [torch.default_generator])
    monkeypatch.setattr("trainables.tasks.arrays.free_bytes", lambda device: 0)
    return SimulatedGpu()


@dataclass(frozen=True)
class Outcome:
    """What a training gave, and what it left in a checkpoint on the way."""

    metrics: dict[str, float]
    columns: dict[str, Any]
    state: dict[str, Any]


def trained(name: str, changes: dict[str, Any], folders: tuple[Path, Path], device: torch.device) -> Outcome:
    """Train a seed on a device, epoch by epoch, and score the test users."""
    model = load_model(name)
    config = make_config(name, quick(name, **changes), "here")
    trial = quick_trial(name, model, config, folders, device)
    training, file = SeedTraining(trial, 3), io.BytesIO()
    while training.result is None:
        training.advance()
        if training.result is None and training.resumable:
            file = io.BytesIO()
            torch.save(training.state(), file)
    assert training.result.test is not None
    file.seek(0)
    state = torch.load(file, weights_only=True) if file.getbuffer().nbytes else {}
    metrics = {name: value for name, value in training.result.metrics.items() if "seconds" not in name}
    return Outcome(metrics, dict(training.result.test.columns), state)


def quick_trial(name: str, model: Model, config: Any, folders: tuple[Path, Path], device: torch.device) -> Trial:
    task_type = TASK_TYPES[model.TASK_TYPE]
    task, test = task_type.load_task(folders[0]).to(device), task_type.load_held_out(folders[1]).to(device)
    return Trial(
        name=name, model=model, config=config, task_dir="", task=task, task_type=task_type, test=test, device=device
    )  # fmt: skip


# --- every model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "changes"), CASES, ids=str)
def test_every_model_trains_and_predicts_on_a_gpu(
    name: str, changes: dict[str, Any], folders: dict[str, tuple[Path, Path]], gpu: SimulatedGpu
) -> None:
    """With the numbers of the CPU: they are computed there, and drawn in the same order."""
    task_folders = folders[load_model(name).TASK_TYPE]
    with gpu:
        there = trained(name, changes, task_folders, GPU)
    here = trained(name, changes, task_folders, CPU)
    assert there.metrics == here.metrics
    assert all(math.isfinite(value) for value in there.metrics.values())
    assert {name: list(values) for name, values in there.columns.items()} == {
        name: list(values) for name, values in here.columns.items()
    }
    assert_same(there.state, here.state)


def assert_same(one: Any, other: Any) -> None:
    """Equal in everything, with all tensors on the CPU."""
    if isinstance(one, torch.Tensor):
        assert one.device == other.device == CPU
        assert torch.equal(one, other) or bool((one.isnan() & other.isnan()).any())
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            if "seconds" not in str(key):
                assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    else:
        assert one == other or (one != one and other != other)


def test_encoders_are_pretrained_on_a_gpu_too(tmp_path: Path, gpu: SimulatedGpu) -> None:
    """Where no trial has made them before; a machine without a GPU reads the file."""
    with gpu:
        there = trained("lgcd", {}, make_sequence_task(tmp_path / "there"), GPU)
    here = trained("lgcd", {}, make_sequence_task(tmp_path / "here"), CPU)
    assert there.metrics == here.metrics
    weights = [
        torch.load(next(tmp_path.glob(f"{place}/**/weights.pt")), weights_only=True) for place in ("there", "here")
    ]
    assert_same(*weights)


def test_a_training_goes_on_elsewhere(folders: dict[str, tuple[Path, Path]], gpu: SimulatedGpu) -> None:
    """From the checkpoint of a GPU on the CPU, and the other way round."""
    model = load_model("music")
    config = make_config("music", quick("music", epochs=3), "here")
    states, results = {}, {}
    for device in (GPU, CPU):
        with gpu:
            training = SeedTraining(quick_trial("music", model, config, folders["ratings"], device), 3)
            for _ in range(4):
                training.advance()
            torch.save(training.state(), file := io.BytesIO())
        file.seek(0)
        states[device] = torch.load(file, weights_only=True)
    for start, end in ((GPU, CPU), (CPU, GPU), (CPU, CPU)):
        with gpu:
            training = SeedTraining(quick_trial("music", model, config, folders["ratings"], end), 3, states[start])
            while training.result is None:
                training.advance()
        results[start, end] = {k: v for k, v in training.result.metrics.items() if "seconds" not in k}
    assert results[GPU, CPU] == results[CPU, GPU] == results[CPU, CPU]


# --- the simulation sees what it is for ---------------------------------------------------------------------------

FIXED_NOISY = NOISY.replace("torch.ones(9)", "torch.ones(9, device=task.device)").replace(
    "torch.randn(len(held_out.ratings))", "torch.randn(len(held_out.ratings)).to(task.device)"
)


@pytest.mark.parametrize(
    ("text", "task_type"),
    [
        (CONSTANT.replace("config.value + 0.5 * seed)", "config.value + 0.5 * seed, device=task.device)"), "ratings"),
        (FIXED_NOISY, "ratings"),
        (POPULAR, "sequences"),
    ],
)
def test_clean_models_pass(
    text: str, task_type: str, folders: dict[str, tuple[Path, Path]], gpu: SimulatedGpu, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    name = drop("clean", text, tmp_path, monkeypatch)
    with gpu:
        assert trained(name, {}, folders[task_type], GPU), "it reports, and nothing was raised on the way"


@pytest.mark.parametrize(
    ("text", "good", "planted", "error"),
    [
        (FIXED_NOISY, "torch.ones(9, device=task.device)", "torch.ones(9)", "mul: expected all tensors .* cuda:0 and cpu"),
        (
            FIXED_NOISY, "torch.randn(len(held_out.ratings)).to(task.device)", "torch.randn(len(held_out.ratings))",
            "expected all tensors",
        ),
        (
            FIXED_NOISY, "torch.ones(9, device=task.device)",
            "torch.rand(9, generator=generator, device=task.device)",
            "rand: expected a generator on cuda:0, found one on cpu",
        ),
        (FIXED_NOISY, "(draw - 2.5)", "float(walk.place.detach().numpy())", "can't convert cuda:0 .* to numpy"),
        (FIXED_NOISY, "(draw - 2.5)", "task.mean * task.item_offset[torch.arange(3)].sum()", "__getitem__: expected all"),
        (POPULAR, ", device=task.device).index_add_", ").index_add_", "index_add_: expected all tensors"),
        (POPULAR, ").to(task.device)", ")", "expected all tensors"),
    ],
)  # fmt: skip
def test_a_planted_mix_of_devices_fails(
    text: str, good: str, planted: str, error: str, folders: dict[str, tuple[Path, Path]], gpu: SimulatedGpu,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert good in text
    name = drop("planted", text.replace(good, planted), tmp_path, monkeypatch)
    trained(name, {}, folders[load_model(name).TASK_TYPE], CPU)
    with gpu, pytest.raises((RuntimeError, TypeError), match=error):
        trained(name, {}, folders[load_model(name).TASK_TYPE], GPU)


def test_a_network_that_forgets_a_table_fails(
    folders: dict[str, tuple[Path, Path]], gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor that is no buffer stays behind when the network moves: here one of MuSiC's."""
    from trainables.models import music

    class Forgetful(music.MuSiC):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            table = self.unet.time
            del self.unet._buffers["time"]
            self.unet.time = table

    monkeypatch.setattr(music, "MuSiC", Forgetful)
    assert trained("music", {}, folders["ratings"], CPU), "it reports, and CUDA was left alone"
    with gpu, pytest.raises(RuntimeError, match="index_select: expected all tensors to be on the same device"):
        trained("music", {}, folders["ratings"], GPU)


# --- tasks and random numbers -------------------------------------------------------------------------------------


def parts_of(part: Any) -> Iterator[Any]:
    """Every tensor and table of a task."""
    for entry in fields(part):
        value = getattr(part, entry.name)
        if is_dataclass(value):
            yield from parts_of(value)
        elif isinstance(value, torch.Tensor | FeatureRows):
            yield value


@pytest.mark.parametrize("task_type", ["ratings", "sequences"])
def test_a_task_moves_whole_and_is_itself_where_it_is(
    task_type: str, folders: dict[str, tuple[Path, Path]], gpu: SimulatedGpu
) -> None:
    task: OnDevice = TASK_TYPES[task_type].load_task(folders[task_type][0])
    assert task.to(CPU) is task
    assert task.device == CPU
    with gpu:
        moved = task.to(GPU)
        assert moved.device == GPU
        assert {part.device for part in parts_of(moved)} == {GPU}
        assert {part.device for part in parts_of(task)} == {CPU}
        assert moved.to(GPU) is moved
        assert task_type_of(moved).name == task_type


@pytest.mark.parametrize("share", [0.0, 0.5, 2.0, 4.0])
def test_a_large_table_is_held_on_a_gpu_that_has_room_for_it(
    share: float, folders: dict[str, tuple[Path, Path]], gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the bits that the CPU reads, row by row. `share`: of the table that is free; it may take half of that."""
    monkeypatch.setattr("trainables.tasks.arrays.DENSE_BYTES", 0)
    table = load_task(folders["ratings"][0]).items
    rows = FeatureRows(table._vectors.astype(np.float16), np.arange(-1, 4), table.centre.numpy(), table.scale)
    monkeypatch.setattr(
        "trainables.tasks.arrays.free_bytes",
        lambda device: int(share * 5 * 2 * rows.width) if device == GPU else 0,
    )
    index = torch.tensor([3, 0, 3, 4])
    with gpu:
        moved = rows.to(GPU)
        given = moved[index.to(GPU)]
        assert (moved._held is not None) == (share >= 2)
        assert (given.device, moved.all().device, rows.all().device) == (GPU, GPU, CPU)
        assert torch.equal(given.cpu(), rows[index])
        assert torch.equal(moved.all().cpu(), rows.all())
        assert not moved.all()[0].any()
        assert moved.to(CPU)._held is None


def test_nested_states_move_whole(gpu: SimulatedGpu) -> None:
    with gpu:
        state = {"a": torch.ones(2, device=GPU), "b": [torch.ones(1, device=GPU), (3, "x")], "c": {"d": None}}
        there = on_cpu(state)
        assert {there["a"].device, there["b"][0].device} == {CPU}
        back = on_device(there, GPU)
        assert {back["a"].device, back["b"][0].device} == {GPU}
    assert there["b"][1] == (3, "x")
    assert there["c"] == {"d": None}


def test_own_randomness_goes_on_where_it_was_left() -> None:
    with seeded(7, CPU):
        expected = torch.rand(4).tolist()
    outside = torch.get_rng_state()
    own, drawn = OwnRandomness(7, CPU), []
    for _ in range(4):
        with own:
            drawn.append(float(torch.rand(())))
        torch.rand(3)
    assert drawn == expected
    torch.set_rng_state(outside)
    again = OwnRandomness(0, CPU)
    again.load(OwnRandomness(7, CPU).states)
    with again:
        assert torch.rand(4).tolist() == expected
    assert torch.equal(torch.get_rng_state(), outside)


def test_a_trial_without_a_gpu_never_asks_for_one(
    folders: dict[str, tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*args: object) -> None:
        raise AssertionError("CUDA was touched")

    for name in ("init", "_lazy_init", "_lazy_call", "manual_seed_all", "is_available", "current_device"):
        monkeypatch.setattr(torch.cuda, name, asked)
    assert trained("music", {}, folders["ratings"], CPU), "it reports, and CUDA was left alone"
