"""What `study check` refuses of a search: one line each, and nothing that a first trial would have told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from search_spaces import Space, load_space
from study.engine.samplers import PRUNERS, SAMPLERS, fixed_points
from study.engine.search_checks import check_search
from study.specs import Budget, Objective, SearchSpec, WarmStart

SPACE = """
v:
  x: {FloatDistribution: {low: 0.0, high: 1.0}}
  kind: {CategoricalDistribution: {choices: [a, b]}}
  y: {when: {kind: b}, FloatDistribution: {low: 0.001, high: 1.0, log: true}}
discrete:
  x: {FloatDistribution: {low: 0.1, high: 0.4, step: 0.1}}
  kind: {CategoricalDistribution: {choices: [a, b]}}
  y: {when: {kind: b}, IntDistribution: {low: 1, high: 3}}
"""


def space(folder: Path, variant: str = "v") -> Space:
    (folder / "space.yaml").write_text(SPACE)
    return load_space(f"{folder}/space.yaml/{variant}", ["x", "kind", "y"])


def faults(folder: Path, sampler: str = "TPESampler", args: Any = None, **fields: Any) -> list[str]:
    spec = SearchSpec(trials=3, seeds=(0,), sampler=sampler, sampler_args=args or {}, **fields)
    return check_search(spec, space(folder, "discrete" if sampler == "GridSampler" else "v"))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_is_fine_as_it_is(tmp_path: Path, sampler: str) -> None:
    assert faults(tmp_path, sampler) == []


@pytest.mark.parametrize(
    ("sampler", "args", "fault"),
    [
        ("TpeSampler", {}, "search.sampler: must be one of TPESampler, RandomSampler, GPSampler, QMCSampler, CmaEsSamp"),
        ("TPESampler", {"n_startup_trails": 3}, "search.sampler_args: TPESampler has no argument 'n_startup_trails'; did "
         "you mean 'n_startup_trials'?"),
        ("TPESampler", {"n_startup_trials": "ten"}, "search.sampler_args.n_startup_trials is 'ten'; give a value of type"),
        ("TPESampler", {"n_startup_trials": 2.5}, "search.sampler_args.n_startup_trials is 2.5; give a value of type int"),
        ("TPESampler", {"n_startup_trials": True}, "search.sampler_args.n_startup_trials is True; give a value of type"),
        ("TPESampler", {"prior_weight": float("inf")}, "search.sampler_args.prior_weight is inf; give a finite number"),
        ("TPESampler", {"n_ei_candidates": 0}, "search.sampler: TPESampler cannot draw as it is set up here ("),
        ("TPESampler", {"gamma": "auto"}, "search.sampler_args.gamma: takes an object that no plan can name; leave it"),
        ("TPESampler", {"seed": 3}, "search.sampler_args.seed: is set from search.seed; remove it here"),
        ("QMCSampler", {"qmc_type": "sobl"}, "search: QMCSampler refuses its arguments: "),
        ("NSGAIISampler", {"population_size": 1}, "search: NSGAIISampler refuses its arguments: "),
        ("GridSampler", {"search_space": {"z": [1]}}, "search.sampler_args.search_space: 'z' is not in the space"),
        ("GridSampler", {"search_space": {"x": [0.5]}}, "search.sampler_args.search_space: x is 0.5; its range is 0.1 to"),
        ("GridSampler", {"search_space": {"x": [0.1], "y": [1]}, "seed": 1}, "search.sampler_args: GridSampler takes sear"),
    ],
)  # fmt: skip
def test_bad_samplers_are_refused(tmp_path: Path, sampler: str, args: dict[str, Any], fault: str) -> None:
    (line,) = faults(tmp_path, sampler, args)
    assert line.startswith(fault)
    assert "\n" not in line


def test_all_faults_of_the_arguments_come_together(tmp_path: Path) -> None:
    assert len(faults(tmp_path, args={"n_startup_trials": None, "multivariate": 1, "gama": 2})) == 3


@pytest.mark.parametrize(
    ("point", "fault"),
    [
        ({"x": 2}, "x is 2; its range is 0 to 1"),
        ({"x": "1e-1"}, "x is the text '1e-1', not a number; write 1.0e-1"),
        ({"x": float("nan")}, "x is nan; its range is 0 to 1"),
        ({"kind": "c"}, "kind is 'c'; its range is a and b"),
        ({"y": 0.1}, "y exists only if kind is b; give both or neither"),
        ({"kind": "a", "y": 0.1}, "y exists only if kind is b; give both or neither"),
        ({"lr": 0.1}, "'lr' is not in the space, which has x, kind and y"),
    ],
)
def test_points_are_held_against_the_space(tmp_path: Path, point: dict[str, Any], fault: str) -> None:
    assert faults(tmp_path, points_to_evaluate=({"x": 0.1}, point)) == [f"search.points_to_evaluate[1]: {fault}"]


def test_more_points_than_trials_are_refused(tmp_path: Path) -> None:
    (fault,) = faults(tmp_path, points_to_evaluate=({"x": 0.1},) * 4)
    assert fault == "search.points_to_evaluate are 4, and search.trials is 3; give more trials"


def test_the_grid_is_every_configuration_once(tmp_path: Path) -> None:
    spec = SearchSpec(trials=3, seeds=(0,), sampler="GridSampler")
    grid = fixed_points(spec, space(tmp_path, "discrete"))
    assert len(grid) == 4 * (1 + 3) == len({tuple(point.items()) for point in grid})
    assert {point["x"] for point in grid} == {0.1, 0.2, 0.3, 0.4}
    assert grid != fixed_points(
        SearchSpec(trials=3, seeds=(0,), sampler="GridSampler", seed=1), space(tmp_path, "discrete")
    )
    (fault,) = check_search(SearchSpec(trials=17, seeds=(0,), sampler="GridSampler"), space(tmp_path, "discrete"))
    assert fault == "search.trials is 17, and the grid has 16 configurations; give at most as many"
    assert check_search(spec, space(tmp_path)) == [
        "search.sampler_args.search_space: x is continuous (0 to 1); give its values",
        "search.sampler_args.search_space: y is continuous (0.001 to 1, log); give its values",
    ]


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        (
            {"storage": "runs/optuna.db"},
            "search.storage: is not the URL of a database; give a URL such as postgresql+psyc",
        ),
        (
            {"storage": "oracle://h/d"},
            "search.storage: must name a database of postgresql, mysql, mariadb, sqlite; give a",
        ),
        (
            {"storage": "sqlite://"},
            "search.storage: must name a database of postgresql, mysql, mariadb, sqlite; give a",
        ),
        ({"storage": "postgresql+nodriver://h/d"}, "search.storage: is not the URL of a database; give a URL such as"),
        ({"storage": "mysql+pymysql://h/d"}, "search.storage: needs the Python package pymysql; install it"),
        (
            {"warm_start": WarmStart(plan="p", storage="redis://h")},
            "search.warm_start.storage: must name a database of",
        ),
        (
            {"storage": "sqlite:///x.db", "sampler": "CmaEsSampler"},
            "search.sampler: CmaEsSampler keeps pickles in its sto",
        ),
    ],
)
def test_storages_are_named_well(tmp_path: Path, fields: dict[str, Any], fault: str) -> None:
    (line,) = faults(tmp_path, **fields)
    assert line.startswith(fault)


TWO = (Objective(metric="val_rmse", direction="minimize"), Objective(metric="val_ndcg20", direction="maximize"))


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"pruner": "Median"}, "search.pruner: must be one of SuccessiveHalvingPruner, MedianPruner, got 'Median'"),
        ({"pruner_args": {"n_warmup_steps": 1}}, "search.pruner_args: there is no pruner; set search.pruner"),
        (
            {"pruner": "MedianPruner", "pruner_args": {"n_warmup_steps": "5"}},
            "search.pruner_args.n_warmup_steps is '5'; give a value of type int",
        ),
        (
            {"pruner": "SuccessiveHalvingPruner", "pruner_args": {"reduction_factor": 1}},
            "search: SuccessiveHalvingPruner refuses its arguments: The value of `reduction_factor` is 1, but must be",
        ),
        (
            {"pruner": "MedianPruner", "objectives": TWO},
            "search.pruner: one number decides who stops, and there are sev",
        ),
        (
            {"objectives": TWO, "sampler": "CmaEsSampler"},
            "search.sampler: CmaEsSampler cannot draw as it is set up here",
        ),
        ({"budget": Budget(hours=0)}, "search.budget.hours is 0; give a number above 0"),
        ({"budget": Budget(trial_hours=-1.5)}, "search.budget.trial_hours is -1.5; give a number above 0"),
    ],
)
def test_stopping_and_objectives_are_set_up_well(tmp_path: Path, fields: dict[str, Any], fault: str) -> None:
    (line,) = faults(tmp_path, **fields)
    assert line.startswith(fault)


def test_several_objectives_suit_most_samplers(tmp_path: Path) -> None:
    for sampler in set(SAMPLERS) - {"CmaEsSampler"}:
        assert faults(tmp_path, sampler, objectives=TWO) == []
    for pruner in PRUNERS:
        assert faults(tmp_path, pruner=pruner) == []
