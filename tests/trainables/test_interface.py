"""The contract of a model file: found by its name, all its faults at once, configurations from plain values."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from features.errors import InputError
from trainables.interface import Selection, Variant, load_model, make_config, model_names
from trainables.tasks.arrays import TaskFolders
from trainables.tasks.rating import load_task
from trainables.trial import run

from .models_in_files import CONSTANT, POPULAR, drop


@pytest.fixture
def constant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model of ratings."""
    return drop("constant", CONSTANT, tmp_path, monkeypatch)


# --- selection ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("direction", "sign", "best"), [("minimize", 1.0, 1.5), ("maximize", -1.0, 3.0)])
def test_a_selection_knows_which_way_is_better(direction: str, sign: float, best: float) -> None:
    selection = Selection("val_rmse", direction)  # type: ignore[arg-type]
    assert selection.sign == sign
    assert selection.best([2.0, math.nan, 3.0, 1.5]) == best
    assert selection.better(1.0, 2.0) == (direction == "minimize")
    assert not selection.better(2.0, 2.0)


def test_a_value_that_is_no_number_is_the_worst() -> None:
    for selection in (Selection("val_rmse", "minimize"), Selection("val_ndcg10", "maximize")):
        assert selection.better(9.0, math.nan)
        assert not selection.better(math.nan, 9.0)
        assert not selection.better(math.nan, math.nan)
        assert math.isnan(selection.best([math.nan]))
        assert math.isnan(selection.best([]))


# --- finding models -----------------------------------------------------------------------------------------------


def test_a_file_in_the_folder_is_a_model(constant: str, folders: TaskFolders) -> None:
    assert {"constant", "music"} <= set(model_names())
    assert Selection("val_mae", "minimize") == load_model(constant).SELECTION
    *_, final = run(constant, {"value": 3.5}, str(folders.task_dir), [0])
    truth = load_task(folders.task_dir).validation.ratings.rating.double()
    assert final.metrics["val_mae"] == pytest.approx(float((truth - 3.5).abs().mean()))


def test_only_files_are_models() -> None:
    assert "music" in model_names()
    with pytest.raises(InputError, match=r"^model: unknown 'musik'; choose from .*music"):
        load_model("musik")


# --- configurations -----------------------------------------------------------------------------------------------


def test_every_fault_of_a_configuration_is_said_at_once() -> None:
    values = {
        "epochz": 3, "lr": "1e-5", "steps": 2.5, "side": "yes", "diffusion": 1, "beta": 1.2, "dropout": 1.0,
        "activation": "gelu", "dim": 30, "batch_users": True, "hidden": 0,
    }  # fmt: skip
    with pytest.raises(InputError) as caught:
        make_config("music", values, "plan x, base")
    message = str(caught.value)
    assert message.startswith("plan x, base: unknown field 'epochz'; did you mean 'epochs'?; ")
    assert "\n" not in message
    for fault in (
        "lr is '1e-5'; give a value of type float",
        "steps is 2.5; give a value of type int",
        "side is 'yes'; give a value of type bool",
        "diffusion is 1; give a value of type bool",
        "batch_users is True; give a value of type int",
        "beta is 1.2; give a number in [0, 1]",
        "dropout is 1.0; give a number of at least 0, below 1",
        "activation is 'gelu'; choose from tanh, relu, softmax",
        "dim is 30; give a multiple of 4",
        "hidden is 0; give a number of at least 1",
    ):
        assert fault in message


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"steps": 1}, r"steps is 1; give a number of at least 2"),
        ({"epochs": 0}, r"epochs is 0; give a number of at least 1"),
        ({"lr": 0}, r"lr is 0; give a number above 0"),
        ({"lr": math.nan}, r"lr is nan; give a finite number"),
        ({"schedule": "cosine"}, r"schedule is 'cosine'; choose from linear, linear_scaled"),
        ({"rate_from": "x0"}, r"rate_from is 'x0'; choose from one_step, chain"),
        ({"rating_offset": "no"}, r"rating_offset is 'no'; choose from none, global_mean, item_mean, source_offset"),
        ({"variance_start": 0.5, "variance_end": 0.1}, r"give 0 < variance_start <= variance_end < 1"),
        ({"dropout": None}, r"dropout is None; give a value of type float"),
    ],
)
def test_a_field_out_of_range_is_refused(values: dict[str, object], fault: str) -> None:
    with pytest.raises(InputError, match=f"^here: .*{fault}"):
        make_config("music", values, "here")


def test_whole_numbers_are_numbers() -> None:
    assert make_config("music", {"beta": 1, "steps": 4}, "here").beta == 1


def test_ablations_fit_the_configuration() -> None:
    for variant in load_model("music").ABLATIONS.values():
        made = make_config("music", variant.config, "ablation")
        assert {name: getattr(made, name) for name in variant.config} == variant.config


@pytest.mark.parametrize("name", model_names())
def test_presets_fit_the_configuration_and_so_do_ablations_under_them(name: str) -> None:
    model = load_model(name)
    for preset, values in model.PRESETS.items():
        made = make_config(name, values, preset)
        assert {field: getattr(made, field) for field in values} == values
        for variant in model.ABLATIONS.values():
            make_config(name, {**values, **variant.config_of(preset)}, preset)


def test_an_ablation_may_change_other_fields_under_a_preset() -> None:
    variant = Variant(config={"lr": 1.0}, presets={"paper": {"lr": 2.0}})
    assert (variant.config_of("ours"), variant.config_of("other")) == ({"lr": 1.0}, {"lr": 1.0})
    assert variant.config_of("paper") == {"lr": 2.0}


# --- the faults of a model file -----------------------------------------------------------------------------------

BROKEN = """
from dataclasses import dataclass
from trainables.interface import Figure, Selection, Variant

NAME = " "
TASK_TYPE = "sequences"
SELECTON = Selection("val_ndcg10", "maximize")
NEEDS = ("titles", "pseudo_item")
FIGURE = {}

@dataclass
class Config:
    sizes: tuple[int, ...] = (1, 2)
    rate: "float | None" = None
    steps: int
    lr: float = "1e-3"

ABLATIONS = {"a b": Variant(config={"lr": 1.0}), "other": 3}

def train(config, task):
    return []

def unpack(config, state, seed):
    return None

def shared(config, task, seeds):
    return []
"""


def faults(name: str, text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What `load_model` says of a model file, fault by fault."""
    drop(name, text, folder, monkeypatch)
    with pytest.raises(InputError) as caught:
        load_model(name)
    message = str(caught.value)
    assert message.startswith(f"model {name}: ")
    assert "\n" not in message
    return message.removeprefix(f"model {name}: ").split("; ")


def test_every_fault_of_presets_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = CONSTANT.replace(
        'ABLATIONS = {"three": Variant(config={"value": 3.0})}',
        'PRESETS = {"ours": {}, "as printed": {"value": 3.0}, "paper": {"valu": 3.0}, "plain": 4.0, "low": {"rounds": 1}}\n'
        'ABLATIONS = {"three": Variant(presets={"papers": {}, "low": {"value": "x"}})}',
    )
    message = "; ".join(faults("preset", text, tmp_path, monkeypatch))
    for fault in (
        "PRESETS: 'ours' is the defaults' own name; give another one",
        "PRESETS: 'as printed' is part of a tag; use small letters, digits and _ only",
        "PRESETS['paper']: unknown field 'valu'; did you mean 'value'?",
        "PRESETS['plain'] is of type float; give a mapping of fields",
        "ABLATIONS['three'].presets: unknown preset 'papers'; did you mean 'paper'?",
        "ABLATIONS['three'].presets['low']: value is 'x'; give a value of type float",
    ):
        assert fault in message


def test_every_fault_of_a_model_file_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = BROKEN.replace("    steps: int\n", "").replace("class Config:", "class Config:\n    steps: int")
    message = "; ".join(faults("broken", text, tmp_path, monkeypatch))
    for fault in (
        "SELECTION is missing; did you mean SELECTON by it?",
        "FIGURE is no name of the contract; did you mean 'FIGURES'?",
        "NAME is ' '; give the paper's name as text",
        "NEEDS holds 'pseudo_item'; did you mean 'pseudo_items'?",
        "ABLATIONS['other'] is of type int; give a Variant",
        "train(config, task) cannot be called as train(config, task, seed); change its arguments",
        "train is no generator function; yield its places (Setup, Stage, Epoch)",
        "prepare and shared belong together; offer both, or neither",
        "Config is a dataclass that can be changed; give @dataclass(frozen=True, kw_only=True)",
        "Config.steps has no default; give one",
        "Config.sizes is of type tuple[int, ...], which a plan cannot say; choose from bool, int, float, str",
        "Config.rate is of type float | None, which a plan cannot say; choose from bool, int, float, str",
        "Config.lr has the default '1e-3'; give a value of type float",
    ):
        assert fault in message, fault
    assert message.count(";") == 13 - 1 + 13, "nothing else"


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ('NAME = "Popular"', "", "NAME is missing; give the paper's name, by which its published rows are found"),
        ('TASK_TYPE = "sequences"', "", "TASK_TYPE is missing; choose from ratings, sequences"),
        ('"sequences"', '"sequence"', "TASK_TYPE is 'sequence'; choose from ratings, sequences"),
        ("SELECTION =", "VERSION = 0\nSELECTION =", "VERSION is 0; give a whole number of at least 1"),
        ("SELECTION =", "CHOICE =", 'SELECTION is missing; give e.g. Selection("val_rmse", "minimize")'),
        (
            'Selection("val_ndcg10", "maximize")',
            '("val_ndcg10", "maximize")',
            "SELECTION is ('val_ndcg10', 'maximize'); give e.g. Selection(\"val_rmse\", \"minimize\")",
        ),
        ('"maximize"', '"max"', "SELECTION.direction is 'max'; choose from minimize, maximize"),
        ('"maximize"', '"minimize"', "SELECTION.direction is minimize; val_ndcg10 is to maximize"),
        ("val_ndcg10", "val_ndcg20", "SELECTION.metric is 'val_ndcg20'; did you mean 'val_ndcg10'?"),
        ("val_ndcg10", "test_ndcg10", "SELECTION.metric is 'test_ndcg10'; did you mean 'val_ndcg10'?"),
        ('{"weight": 1.0}', '{"wieght": 1.0}', "ABLATIONS['wo_weight']: unknown field 'wieght'; did you mean 'weight'?"),
        ('{"weight": 1.0}', '{"weight": "1"}', "ABLATIONS['wo_weight']: weight is '1'; give a value of type float"),
        ("wo_weight", "w/o weight",
         "ABLATIONS: 'w/o weight' is the name of a job; use letters, digits and . : = , + - _ only"),
        ('FIGURES = {"weight"', 'FIGURES = {"zz"',
         "FIGURES: unknown field 'zz'; choose from weight, guidance, epochs, overlap_ratio"),
        ("Figure(name=", "dict(name=", "FIGURES['weight'] is of type dict; give a Figure"),
        ("class Config:", "class Confg:", "Config is missing; did you mean Confg by it?"),
        ("def train(", "def training(", "train is missing; give a generator function of (config, task, seed)"),
        ("def prepare(config, task, seeds)", "def prepare(config)",
         "prepare(config) cannot be called as prepare(config, task, seeds); change its arguments"),
        ("epochs: int = 2", "epochs: int = 2.5", "Config.epochs has the default 2.5; give a value of type int"),
        ("epochs: int = 2", "epochs: complex = 2",
         "Config.epochs is of type complex, which a plan cannot say; choose from bool, int, float, str"),
        ('NAME = "Popular"', 'NAME = "Popular"\nNEEDS = "titles"',
         "NEEDS is 'titles'; give a tuple of text, e.g. ('features',)"),
        ('NAME = "Popular"', 'NAME = "Popular"\nNOTE = 3', "NOTE is 3; give text"),
    ],
)  # fmt: skip
def test_each_fault_says_what_to_write(
    before: str, after: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert before in POPULAR
    assert "; ".join(faults("faulty", POPULAR.replace(before, after), tmp_path, monkeypatch)) == expected


def test_a_figure_over_the_ratio_of_the_cells_needs_no_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = POPULAR.replace('FIGURES = {"weight"', 'FIGURES = {"overlap_ratio"')
    assert set(load_model(drop("ratio", text, tmp_path, monkeypatch)).FIGURES) == {"overlap_ratio"}
    expected = "FIGURES: unknown field 'cold_ratio'; did you mean 'overlap_ratio'?"
    assert faults("cold", POPULAR.replace('FIGURES = {"weight"', 'FIGURES = {"cold_ratio"'), tmp_path, monkeypatch) == (
        expected.split("; ")
    )


def test_a_file_that_cannot_be_imported_is_a_fault_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ["its file cannot be imported (ModuleNotFoundError: No module named 'torhc')", "correct it"]
    assert faults("torhc_model", "import torhc", tmp_path, monkeypatch) == expected


def test_a_config_that_refuses_its_defaults_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = """
    def __post_init__(self):
        from features.errors import InputError
        raise InputError("weight is 2.0; give less")
"""
    text = POPULAR.replace("    epochs: int = 2\n", "    epochs: int = 2\n" + check)
    assert "; ".join(faults("strict", text, tmp_path, monkeypatch)) == (
        "Config refuses its own defaults (weight is 2.0; give less); change them"
    )


def test_what_a_file_leaves_out_has_its_default(constant: str) -> None:
    model = load_model(constant)
    assert (model.NEEDS, model.NOTE, model.FIGURES) == ((), "", {})
    assert (model.prepare, model.shared, model.unpack) == (None, None, None)


@pytest.mark.parametrize("name", model_names())
def test_every_model_keeps_the_contract(name: str) -> None:
    model = load_model(name)
    assert model.NAME
    assert model.Config() == make_config(name, {}, "here")


def test_a_preset_of_an_ablation_alone_is_told_where_to_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = CONSTANT.replace(
        'ABLATIONS = {"three": Variant(config={"value": 3.0})}', 'ABLATIONS = {"three": Variant(presets={"paper": {}})}'
    )
    told = "ABLATIONS['three'].presets: unknown preset 'paper'; declare it in PRESETS"
    assert told in "; ".join(faults("preset", text, tmp_path, monkeypatch))
