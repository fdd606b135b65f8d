"""One training that serves both directions of a pair of domains: each gets to the last bit what it gets alone."""

from __future__ import annotations

import errno
import importlib
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from trainables.interface import check_model, load_model, make_config, model_names
from trainables.tasks.arrays import TaskFolders
from trainables.tasks.sequential import load_task, opposite
from trainables.trial import LEFT, Report, kept_at, run, validate

from .sequence_worlds import SPEC, build_world, make_sequence_world
from .training import quick, variants

DIRECTIONS = ("film-song", "song-film")
BOTH = [name for name in model_names() if load_model(name).BOTH_DIRECTIONS]
SEEDS = [0, 1]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, TaskFolders]]:
    """`alone`: each direction in a folder of its own; `together`: both in one."""
    world = make_sequence_world()
    folder = {name: tmp_path_factory.mktemp(name) for name in ("together", *DIRECTIONS)}
    return {
        "alone": {name: build_world(world, folder[name], direction=name) for name in DIRECTIONS},
        "together": {name: build_world(world, folder["together"], direction=name) for name in DIRECTIONS},
    }


@pytest.fixture(autouse=True)
def _nothing_left(worlds: dict[str, dict[str, TaskFolders]]) -> Iterator[None]:
    yield
    shutil.rmtree(left(worlds["together"]["film-song"]), ignore_errors=True)


def left(folders: TaskFolders) -> Path:
    return folders.task_dir.parent.parent / LEFT


def config_of(name: str, **changes: Any) -> dict[str, Any]:
    return quick(name, **{"epochs": 7, "patience": 2, **changes})


def trained(name: str, folders: TaskFolders, seeds: list[int] = SEEDS, **changes: Any) -> list[Any]:
    """All that a trial says but for its seconds, and the model that it keeps."""
    config = config_of(name, **changes)
    reports = list(run(name, config, str(folders.task_dir), seeds, test_dir=str(folders.test_dir), rows=True))
    said = [(one.epoch, {k: v for k, v in one.metrics.items() if "seconds" not in k}, one.artifacts) for one in reports]
    kept = torch.load(kept_at(name, config, str(folders.task_dir), seeds), weights_only=True)
    return [*said, kept["seed"], {k: v.tolist() for k, v in kept["state"]["network"].items()}]


def counted(name: str, monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows by one with each epoch that is trained."""
    module, epochs = importlib.import_module(f"trainables.models.{name}"), list[None]()
    epoch = module.Epoch
    monkeypatch.setattr(module, "Epoch", lambda **given: (epochs.append(None), epoch(**given))[1])
    return epochs


@pytest.mark.parametrize("first", DIRECTIONS)
@pytest.mark.parametrize("name", BOTH)
def test_each_direction_gets_what_it_gets_alone(
    worlds: dict[str, dict[str, TaskFolders]], name: str, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = DIRECTIONS[1 - DIRECTIONS.index(first)]
    alone, together = worlds["alone"], worlds["together"]
    epochs = counted(name, monkeypatch)
    expected = {direction: trained(name, alone[direction]) for direction in DIRECTIONS}
    assert trained(name, together[first]) == expected[first]
    assert len(list(left(together[first]).iterdir())) == len(SEEDS)
    epochs.clear()
    assert trained(name, together[second]) == expected[second]
    assert not list(left(together[first]).iterdir())
    lengths = [
        [one[1][f"selected_epoch/seed_{seed}"] + 2 for seed in SEEDS]
        for one in (expected[direction][-3] for direction in (first, second))
    ]
    needed = sum(max(1, min(7, mine) - min(7, theirs)) for theirs, mine in zip(*lengths, strict=True))
    assert len(epochs) == needed, "what the first has not trained, or one to predict with"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *(("llmcdsr", changes) for changes in variants("llmcdsr")[1:]),
        *(("plcr", changes) for changes in variants("plcr")[1:]),
        *(("unicdr", changes) for changes in [*variants("unicdr")[1:], {"aggregator": "attention"}]),
    ],
    ids=str,
)
def test_a_variant_that_knows_its_domains_is_the_same_for_both_too(
    worlds: dict[str, dict[str, TaskFolders]], name: str, changes: dict[str, Any]
) -> None:
    short = {**changes, "epochs": 2}
    for direction in DIRECTIONS:
        assert trained(name, worlds["together"][direction], [0], **short) == trained(
            name, worlds["alone"][direction], [0], **short
        )
    assert not list(left(worlds["together"]["film-song"]).iterdir())


def test_what_another_version_of_the_model_has_left_is_not_used(
    worlds: dict[str, dict[str, TaskFolders]], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (worlds["together"][name] for name in DIRECTIONS)
    trained("sasrec", first, [0])
    monkeypatch.setattr("trainables.models.sasrec.VERSION", 9, raising=False)
    check_model.cache_clear()
    try:
        epochs = counted("sasrec", monkeypatch)
        trained("sasrec", second, [0])
        assert len(epochs) > 1
    finally:
        check_model.cache_clear()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", BOTH)
def test_the_kept_model_ranks_for_its_own_direction(
    worlds: dict[str, dict[str, TaskFolders]], name: str, direction: str
) -> None:
    folders, config = worlds["alone"][direction], config_of(name)
    folder = str(folders.task_dir)
    *_, last = run(name, config, folder, [0], test_dir=str(folders.test_dir))
    kept = torch.load(kept_at(name, config, folder, [0]), weights_only=True)
    unpack = load_model(name).unpack
    assert unpack is not None
    score = unpack(make_config(name, kept["config"], "config"), kept["state"], kept["seed"])
    _, found = validate(lambda held_out, task, seed: score(held_out.history), load_task(Path(folder)), 0)
    assert found["val_ndcg10"] == pytest.approx(last.metrics["val_ndcg10"], abs=1e-6)


def test_all_systems_that_learn_both_domains_alike_are_served() -> None:
    assert BOTH == ["diffurec", "fearec", "gru4rec", "llmcdsr", "plcr", "sasrec", "unicdr", "unisrec"]


def test_a_training_of_the_target_domain_alone_serves_itself(worlds: dict[str, dict[str, TaskFolders]]) -> None:
    alone, together = (worlds[name]["film-song"] for name in ("alone", "together"))
    expected = trained("sasrec", alone, sequences="target")
    assert trained("sasrec", together, sequences="target") == expected
    assert not left(together).exists()


@pytest.mark.parametrize("name", BOTH)
def test_what_was_trained_before_a_stop_serves_the_opposite_direction_too(
    worlds: dict[str, dict[str, TaskFolders]], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first, second), expected = worlds["together"].values(), trained(name, worlds["alone"]["song-film"])
    epochs = counted(name, monkeypatch)
    stop(name, first, 2)
    assert len(list(left(first).iterdir())) == len(SEEDS)
    at_first = len(epochs)
    assert trained(name, second) == expected
    assert not list(left(first).iterdir())
    alone = sum(min(7, expected[-3][1][f"selected_epoch/seed_{seed}"] + 2) for seed in SEEDS)
    assert len(epochs) == alone, "each epoch is trained once"
    assert at_first == 2 * len(SEEDS)


@pytest.mark.parametrize("stopped", [True, False])
def test_one_who_catches_up_says_so_before_it_trains(
    worlds: dict[str, dict[str, TaskFolders]], stopped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (worlds["together"][name] for name in DIRECTIONS)
    if stopped:
        stop("sasrec", first, 2)
    else:
        trained("sasrec", first, patience=7)
    epochs, reports = counted("sasrec", monkeypatch), []
    for report in run("sasrec", config_of("sasrec", patience=7 - 5 * stopped), str(second.task_dir), SEEDS):
        reports.append((report.caught_up, len(epochs)))
    free = sum(not trained for _, trained in reports)
    assert free == (2 if stopped else 6)
    assert [caught_up for caught_up, _ in reports] == [number == free for number in range(1, len(reports) + 1)]


def test_a_training_that_was_stopped_before_its_first_epoch_leaves_nothing(
    worlds: dict[str, dict[str, TaskFolders]],
) -> None:
    """UniSRec's pretraining is reported as a stage, which is no epoch."""
    first = worlds["together"]["film-song"]
    reports = run("unisrec", config_of("unisrec", pretrain_epochs=1), str(first.task_dir), SEEDS)
    assert not next(reports).metrics
    reports.close()
    assert not left(first).exists()


@pytest.mark.parametrize("ends", ["stopped", "by itself"])
def test_what_cannot_be_left_costs_no_result(
    worlds: dict[str, dict[str, TaskFolders]], ends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where another study of the home has taken the folder away, or a network drive has an error."""

    def fails(*_: Any) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr("trainables.trial.save_torch", fails)
    first, second = (worlds["together"][name] for name in DIRECTIONS)
    if ends == "stopped":
        stop("sasrec", first, 1)
    else:
        list(run("sasrec", config_of("sasrec"), str(first.task_dir), SEEDS))
    assert not list(left(first).iterdir())
    monkeypatch.undo()
    assert trained("sasrec", second) == trained("sasrec", worlds["alone"]["song-film"])


def test_what_nobody_asks_for_makes_room_for_what_is_newer(
    worlds: dict[str, dict[str, TaskFolders]], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = worlds["together"]["film-song"]
    stop("sasrec", first, 1)
    before = set(left(first).iterdir())
    most = sum(path.stat().st_size for path in before)
    monkeypatch.setattr("trainables.trial.LEFT_BYTES", most + most // 4)
    stop("sasrec", first, 1, lr=2e-3)
    assert len(before) == len(SEEDS)
    assert len(set(left(first).iterdir()) - before) == len(SEEDS)
    assert sum(path.stat().st_size for path in left(first).iterdir()) <= most + most // 4


def stop(name: str, folders: TaskFolders, epoch: int, **changes: Any) -> None:
    """Stop a training after that epoch, as a pruner does."""
    reports = run(name, config_of(name, **changes), str(folders.task_dir), SEEDS)
    assert any(report.epoch == epoch and report.metrics for report in reports)
    reports.close()


def test_a_training_that_goes_on_after_a_kill_leaves_nothing(worlds: dict[str, dict[str, TaskFolders]]) -> None:
    first, config = worlds["together"]["film-song"], config_of("sasrec")
    reports = run("sasrec", config, str(first.task_dir), SEEDS)
    report = next(reports)
    assert report.state is not None
    state = report.state()
    *_, final = run("sasrec", config, str(first.task_dir), SEEDS, state=state)
    assert final.final
    assert not left(first).exists()


def test_a_training_behind_replayed_epochs_goes_on_after_a_kill(worlds: dict[str, dict[str, TaskFolders]]) -> None:
    """A kill while epochs are replayed costs their replay; one behind them goes on from its checkpoint."""
    first, second = (worlds["together"][name] for name in DIRECTIONS)
    short, whole = config_of("sasrec"), trained("sasrec", worlds["alone"]["song-film"], [0])
    trained("sasrec", first, [0])
    states = [one.state and one.state() for one in run("sasrec", short, str(second.task_dir), [0])]
    assert states[0] is None, "the state is in the file that is left"
    assert whole[0][1] == next(iter(said_by(run("sasrec", short, str(second.task_dir), [0]))))
    trained("sasrec", first, [0])
    for state in filter(None, states):
        *_, final = run("sasrec", short, str(second.task_dir), [0], state=state, rows=True)
        assert final.artifacts["val_per_user.csv"] == whole[-3][2]["val_per_user.csv"]


def said_by(reports: Iterator[Report]) -> Iterator[dict[str, float]]:
    return ({k: v for k, v in one.metrics.items() if "seconds" not in k} for one in reports)


def test_what_cannot_be_read_is_trained(worlds: dict[str, dict[str, TaskFolders]]) -> None:
    first, second = (worlds["together"][name] for name in DIRECTIONS)
    trained("sasrec", first)
    for path in left(first).iterdir():
        path.write_bytes(path.read_bytes()[:1000])
    assert trained("sasrec", second) == trained("sasrec", worlds["alone"]["song-film"])


def test_the_opposite_task_is_one_of_the_same_specification(tmp_path: Path) -> None:
    world = make_sequence_world()
    one = build_world(world, tmp_path, direction="film-song").task_dir
    assert opposite(one) is None
    build_world(world, tmp_path, replace(SPEC, negatives=9), direction="song-film")
    build_world(world, tmp_path, replace(SPEC, overlap_ratio=0.5), direction="song-film")
    build_world(world, tmp_path, pseudo=2, direction="song-film")
    assert opposite(one) is None
    other = build_world(world, tmp_path, direction="song-film").task_dir
    assert opposite(one) == other
    assert opposite(other) == one
    (other.parent / "manifest.json").unlink()
    assert opposite(one) is None, "as in a node's cache"
    assert opposite(other) is None
