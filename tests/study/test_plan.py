"""Plans: YAML bound to dataclasses; whatever is in the file, `study check` answers with lines, never a traceback."""

from __future__ import annotations

import copy
import random
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from study.plan import schema
from study.plan.load import FOLDER, PlanError, load_plan, shipped_plans
from study.plan.schema import Plan
from trainables.interface import Selection

from .tiny import PLAN, study, write_plan

SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def faults(tmp_path: Path, **changes: Any) -> tuple[str, ...]:
    with pytest.raises(PlanError, match=r"\S") as caught:
        load_plan(str(write_plan(tmp_path, **changes)))
    return caught.value.faults


def test_a_plan_is_bound_to_its_dataclasses(tmp_path: Path) -> None:
    plan = load_plan(str(write_plan(tmp_path)))
    assert (plan.name, plan.tasks, plan.ratios) == ("tiny", (("books", "movies"),), (0.2, 0.5))
    assert [cell.name for cell in plan.cells] == ["books->movies@0.2", "books->movies@0.5"]
    assert plan.domains["books"].name == "books"
    assert plan.sweeps["steps"].values == (2, 5)
    assert (plan.sweeps["steps"].start, plan.sweeps["steps"].seeds) == ("best", (0,))
    assert plan.search is not None
    assert (plan.search.trials, plan.search.seeds, plan.search.sampler) == (2, (0,), "TPESampler")
    assert plan.score is not None
    assert plan.score.seeds == (0, 1)
    assert (plan.feature_set, plan.features.ratings.factors) == ("ratings", 4)
    assert plan.selection == Selection("val_rmse", "minimize")
    assert plan.subject.config["epochs"] == 2
    assert plan.subject.config["dim"] == 32, "the rest is the model's default"


def test_what_is_left_out_has_the_default(tmp_path: Path) -> None:
    plan = load_plan(str(write_plan(tmp_path, drop=("search", "sweeps", "ablate", "score", "base", "features"))))
    assert (plan.search, plan.ablate, plan.score, dict(plan.sweeps)) == (None, None, None, {})
    assert plan.split == schema.SplitPlan(validation_share=0.2, data_seed=0)
    assert plan.feature_set == "ratings"


def test_a_reverse_task_is_a_cell_of_its_own(tmp_path: Path) -> None:
    plan = load_plan(str(write_plan(tmp_path, tasks=[["books", "movies"], ["movies", "books"]], cold_ratios=[0.5])))
    assert [cell.name for cell in plan.cells] == ["books->movies@0.5", "movies->books@0.5"]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"name": "a b"}, "plan.yaml: name is 'a b'; use letters, digits, - and _, at most 100"),
        ({"name": "x" * 101}, f"plan.yaml: name is '{'x' * 56}...; use letters, digits, - and _, at most 100"),
        ({"name": 3}, "plan.yaml: name is 3; give a value of type str, in quotes"),
        ({"cold_ratios": []}, "plan.yaml: cold_ratios is empty; give at least one"),
        ({"cold_ratios": [0.2, 0.2]}, "plan.yaml: cold_ratios holds a value twice; give each once"),
        (
            {"cold_ratios": [0.2, 0.20000001]},
            "plan.yaml: cold_ratios are [0.2, 0.20000001]; names keep 6 digits, so two of these are one cell",
        ),
        (
            {"cold_ratios": [".5"]},
            "plan.yaml: cold_ratios[0] is '.5'; give a value of type float (YAML reads this as text; write .5 without "
            "quotes)",
        ),
        ({"cold_ratios": [True]}, "plan.yaml: cold_ratios[0] is True; give a value of type float"),
        ({"cold_ratios": 0.5}, "plan.yaml: cold_ratios is 0.5; give a list"),
        ({"tasks": [["books"]]}, "plan.yaml: tasks[0] is ['books']; give a list of 2"),
        ({"domains": ["books"]}, "plan.yaml: domains is ['books']; give a mapping"),
        ({"domains__books": None}, "plan.yaml: domains.books is None; give a mapping"),
        (
            {"split": {"validation_share": 1.0}},
            "plan.yaml: split.validation_share is 1.0; give a number above 0, below 1",
        ),
        ({"split": {"clip": 1}}, "plan.yaml: split.clip is 1; give a value of type bool"),
        ({"preset": "papers"}, "plan.yaml: preset is 'papers'; music has ours, paper"),
        (
            {"compare": {"other": {"model": "emcdr", "preset": "paper", "space": "emcdr/wide"}}},
            "plan.yaml: compare.other.preset is 'paper'; emcdr has ours",
        ),
        (
            {"sweeps__steps__compare": "tests"},
            "plan.yaml: sweeps.steps.compare is 'tests'; choose from validation, test",
        ),
        ({"ablate__compare": "all"}, "plan.yaml: ablate.compare is 'all'; choose from validation, test"),
        (
            {"compare": {"emcdr": {"space": "emcdr/wide"}}, "ablate__models": ["emcdr"]},
            "plan.yaml: ablate.models names emcdr; rows of music are music",
        ),
        ({"split": {"data_seed": 0.5}}, "plan.yaml: split.data_seed is 0.5; give a value of type int"),
        (
            {"split": {"data_seed": -1}},
            "plan.yaml: split.data_seed is -1; give whole numbers from 0 to 9223372036854775807",
        ),
        ({"search": {"seeds": [0]}}, "plan.yaml: search.trials is missing; set it"),
        ({"search__trials": 0}, "plan.yaml: search.trials is 0; give 1 to 100,000"),
        ({"search__trials": 10**9}, "plan.yaml: search.trials is 1000000000; give 1 to 100,000"),
        ({"search__seeds": []}, "plan.yaml: search.seeds is []; give at least one, each once"),
        ({"score__seeds": [1, 1]}, "plan.yaml: score.seeds is [1, 1]; give at least one, each once"),
        (
            {"score__seeds": [2**64]},
            "plan.yaml: score.seeds is [18446744073709551616]; give whole numbers from 0 to 9223372036854775807",
        ),
        ({"base__lr": float("inf")}, "plan.yaml: base: lr is inf; give a finite number"),
        ({"base__lr": float("nan")}, "plan.yaml: base: lr is nan; give a finite number"),
        (
            {"sweeps__lr": {"values": [0.1, float("-inf")]}},
            "plan.yaml: sweeps.lr: lr is -inf; give a finite number",
        ),
        (
            {"search__sampler_args": {"n_startup_trials": "ten"}},
            "plan.yaml: search.sampler_args.n_startup_trials is 'ten'; give a value of type int",
        ),
        (
            {"search__points_to_evaluate": [{"lr": 3.0}]},
            "plan.yaml: search.points_to_evaluate[0]: lr is 3.0; its range is 0.0001 to 0.01, log",
        ),
        (
            {
                "search__objectives": [
                    {"metric": "val_rmse", "direction": "maximize"},
                    {"metric": "val_ndcg20", "direction": "maximize"},
                ]
            },
            "plan.yaml: search.objectives[0].direction is 'maximize'; val_rmse is to minimize",
        ),
        (
            {
                "search__objectives": [
                    {"metric": "val_mae", "direction": "minimize"},
                    {"metric": "val_ndcg20", "direction": "maximize"},
                ]
            },
            "plan.yaml: search.objectives are ['val_mae', 'val_ndcg20']; give two or more, each once, val_rmse among them",
        ),
        (
            {
                "search__objectives": [
                    {"metric": "val_rmse", "direction": "minimize"},
                    {"metric": "test_mae", "direction": "minimize"},
                ]
            },
            "plan.yaml: search.objectives[1].metric is 'test_mae'; choose from val_mae, val_rmse, val_ndcg20, seconds",
        ),
        (
            {"search__warm_start": {"plan": "../other"}},
            "plan.yaml: search.warm_start.plan is '../other'; give the name of a plan",
        ),
        (
            {"search__sampler": "Grid"},
            "plan.yaml: search.sampler: must be one of TPESampler, RandomSampler, GPSampler, QMCSampler, CmaEsSampler, "
            "NSGAIISampler, NSGAIIISampler, GridSampler, got 'Grid'",
        ),
        *(
            (
                {f"{part}__start": "last"},
                f"plan.yaml: {part.replace('__', '.')}.start is 'last'; choose from best, base, or give the id of an "
                "MLflow run (32 hex digits)",
            )
            for part in ("sweeps__steps", "ablate")
        ),
        (
            {"base": "best.yaml"},
            "plan.yaml: base is 'best.yaml', which cannot be read (No such file or directory); name a file of `study best "
            "--export`",
        ),
        (
            {"base": "space.yaml"},
            "plan.yaml: base is 'space.yaml', which does not hold a mapping `base` and no more; write it by `study best "
            "--export`",
        ),
        (
            {"sweeps__steps__values": [1]},
            "plan.yaml: sweeps.steps: steps is 1; give a number of at least 2",
        ),
        ({"ablate__variants": []}, "plan.yaml: ablate.variants is []; give at least one, each once"),
        (
            {"resources": {"cpus": 0}},
            "plan.yaml: resources are Resources(cpus=0, gpus=0); give cpus above 0, gpus of at least 0",
        ),
        (
            {"features__ratings__sweeps": 0},
            "plan.yaml: features.ratings.sweeps is 0; give a whole number of at least 1",
        ),
        (
            {"domains__books__filters": {"k_core": -1}},
            "plan.yaml: domains.books.filters.k_core is -1; give a whole number of at least 0",
        ),
        ({"simulate__seed": -1}, "plan.yaml: simulate: seed is -1; give a whole number from 0 to 9223372036854775807"),
        ({"base__lr": 10**400}, f"plan.yaml: base: lr is 1{'0' * 400}; give a finite number above 0"),
        ({"resources": {"cpus": 10**400}}, f"plan.yaml: resources.cpus is 1{'0' * 56}...; give a finite number"),
        (
            {"features": {"text": {"encoder": {"model": "minilm"}, "users": "sum"}}},
            "plan.yaml: features.text: features.users is 'sum'; choose from review_mean, concat",
        ),
        (
            {"domains__books__rating_scale": [1, float("nan")]},
            "plan.yaml: domains.books.rating_scale[1] is nan; give a finite number",
        ),
    ],
)
def test_one_fault(tmp_path: Path, changes: dict[str, Any], fault: str) -> None:
    assert faults(tmp_path, **changes) == (fault,)


def test_a_base_by_cell_names_all_cells_and_has_no_search(tmp_path: Path) -> None:
    base = {"epochs": 2, "books->movies@0.2": {"lr": 0.1, "side_epoch": 1}}
    assert faults(tmp_path, base=base) == (
        "plan.yaml: base.books->movies@0.2: unknown field 'side_epoch'; did you mean 'side_epochs'?",
        "plan.yaml: base names cells, but not books->movies@0.5; give every cell of the plan or none",
        "plan.yaml: base names cells, and a search draws over one base; leave out `search`, or the cells",
    )
    assert faults(tmp_path, drop=("search",), cold_ratios=[0.2], base={"books->movies@0.2": 3}) == (
        "plan.yaml: base.books->movies@0.2 is 3; give a mapping of fields",
    )


def test_a_search_needs_a_space(tmp_path: Path) -> None:
    assert faults(tmp_path, drop=("space",)) == ("plan.yaml: search needs a space; set `space`, e.g. music/paper",)


def test_missing_fields_are_all_named(tmp_path: Path) -> None:
    found = faults(tmp_path, drop=("name", "model", "domains", "tasks"))
    assert found == tuple(f"plan.yaml: {name} is missing; set it" for name in ("name", "model", "domains", "tasks"))


def test_a_number_is_written_as_yaml_reads_it(tmp_path: Path) -> None:
    """The remedy of `1e-5` is itself a number when it is copied into the plan."""
    (fault,) = faults(tmp_path, base={"lr": "1e-5"})
    written = re.search(r"write (\S+)\)", fault)
    assert written is not None
    assert yaml.safe_load(written[1]) == 1e-5
    assert load_plan(str(write_plan(tmp_path, base={"lr": yaml.safe_load(written[1])}))).subject.config["lr"] == 1e-5


def test_a_space_is_held_against_the_base(tmp_path: Path) -> None:
    space = "v: {variance_end: {FloatDistribution: {low: 0.01, high: 0.05}}}"
    assert load_plan(str(write_plan(tmp_path, space_file=space))).name == "tiny"
    (fault,) = faults(tmp_path, space_file=space, base={"variance_start": 0.02, "variance_end": 0.02})
    assert fault.endswith("v: variance_start is 0.02, variance_end 0.01; give 0 < variance_start <= variance_end < 1")


# --- anything at all ----------------------------------------------------------------------------------------------


def answered(text: str | bytes, tmp_path: Path) -> bool:
    """`study check` of a file with this content: fine, or distinct plain lines and exit code 2; and nothing was made."""
    file = tmp_path / "plan.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    for name in ("books.inter", "movies.inter"):
        (tmp_path / name).touch()
    ran = study("check", file, "--data", tmp_path, "--home", tmp_path / "home")
    plain = ran.err == "" if ran.code == 0 else ran.code == 2 and len(ran.faults) == len(set(ran.faults))
    return plain and not (tmp_path / "home").exists()


@SETTINGS
@given(text=st.one_of(st.text(), st.text(alphabet="{}[]:,-&*!|>#%@`'\"? \n\tabn01.~<", max_size=60)))
def test_any_text(tmp_path: Path, text: str) -> None:
    assert answered(text, tmp_path)


@SETTINGS
@given(content=st.binary(max_size=60))
def test_any_bytes(tmp_path: Path, content: bytes) -> None:
    assert answered(content, tmp_path)


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.dates(), st.binary(max_size=4),
    st.sampled_from(["1e-5", "best", "music/nope", "books", "", 0, -1, 10**30, 1.5, "[/b]", [], {}, [[]], {"a": 1}]),
)  # fmt: skip
KEYS = st.text(max_size=5) | st.integers()
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3))
DOCUMENTS = [
    {**PLAN, "space": "music/continuous"},
    *(yaml.safe_load((FOLDER / f"{name}.yaml").read_text()) for name in shipped_plans()),
]


def places(node: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a document."""
    keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []
    return [place for key in keys for place in [(node, key), *places(node[key])]]


@SETTINGS
@given(data=st.data(), number=st.integers(0, len(DOCUMENTS) - 1), changes=st.integers(1, 3))
def test_any_mutation_of_a_plan(tmp_path: Path, data: st.DataObject, number: int, changes: int) -> None:
    """Values replaced, keys dropped, renamed and added anywhere in a good plan."""
    document = copy.deepcopy(DOCUMENTS[number])
    for _ in range(changes):
        found = places(document)
        if not found:
            break
        container, key = data.draw(st.sampled_from(found))
        action = data.draw(st.sampled_from(["replace", "replace", "drop", "rename"]))
        if action == "replace":
            container[key] = data.draw(VALUES)
        elif action == "drop" or isinstance(container, list):
            del container[key]
        else:
            container[data.draw(st.text(max_size=6) | st.integers())] = container.pop(key)
    assert answered(yaml.safe_dump(document, allow_unicode=data.draw(st.booleans())), tmp_path)


@SETTINGS
@given(seed=st.integers(0, 2**32), number=st.integers(0, len(DOCUMENTS) - 1))
def test_any_slip_of_the_pen(tmp_path: Path, seed: int, number: int) -> None:
    """Characters of a good plan deleted, doubled or replaced."""
    draw = random.Random(seed)
    text = list(yaml.safe_dump(DOCUMENTS[number]))
    for _ in range(draw.randint(1, 4)):
        position = draw.randrange(len(text))
        text[position] = draw.choice(["", text[position] * 2, draw.choice(" :[]{}\n\t-#&*'\"0aé\x00")])
    assert answered("".join(text), tmp_path)


def test_a_plan_is_never_changed(tmp_path: Path) -> None:
    plan = load_plan(str(write_plan(tmp_path)))
    assert isinstance(plan, Plan)
    with pytest.raises(AttributeError, match="cannot assign to field 'name'"):
        plan.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize("name", ["b'ok", "two words"])
def test_a_task_of_a_domain_that_no_cell_may_have_is_a_fault_of_the_plan(tmp_path: Path, name: str) -> None:
    with pytest.raises(PlanError, match="unknown domain"):
        load_plan(str(write_plan(tmp_path, tasks=[[name, "b"]])))
