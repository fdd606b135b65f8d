"""What a plan, a store or a home folder says is data: never code, a shell's words, a path or a query."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from features.errors import InputError
from search_spaces.reader import _UniqueKeyLoader
from study.engine.checkpoints import checkpoint_path
from study.plan.load import PlanError, load_plan
from study.specs import Cell, Job
from tests.study import tiny

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    path for name in ("features", "study", "search_spaces", "trainables") for path in (ROOT / name).rglob("*.py")
)
UNPICKLERS = ("pickle.load", "pickle.loads", "cloudpickle.load", "cloudpickle.loads", "joblib.load", "pd.read_pickle")
SHELLS = ("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput")


def calls(text: str) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def faults(text: str) -> list[str]:
    """Calls that load pickles or ask a shell, with their lines."""
    found = []
    for name, call in calls(text):
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if (
            name in (*UNPICKLERS, *SHELLS)
            or (name == "torch.load" and given.get("weights_only") != "True")
            or (name.startswith("np.load") and given.get("allow_pickle", "False") != "False")
            or given.get("shell", "False") != "False"
            or name in ("yaml.unsafe_load", "yaml.full_load")
            or (name == "yaml.load" and "_UniqueKeyLoader" not in ast.unparse(call))  # a SafeLoader
        ):
            found.append(f"{call.lineno}: {ast.unparse(call)[:80]}")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled_and_no_shell_is_asked(path: Path) -> None:
    assert faults(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    ["torch.load(p)", "torch.load(p, weights_only=False)", "pickle.loads(b)", "np.load(p, allow_pickle=True)",
     "subprocess.run(w, shell=True)", "os.system(w)", "yaml.load(t, Loader=yaml.Loader)"],
)  # fmt: skip
def test_the_rule_sees_each_of_them(text: str) -> None:
    assert len(faults(text)) == 1


def test_no_query_of_mlflow_is_built_from_a_name_that_was_not_checked() -> None:
    """Filters are built in few places alone, over parts, trials, rows and cells, whose alphabet `study.specs` checks."""
    users = {
        str(path.relative_to(ROOT / "study"))
        for path in MODULES
        if path.is_relative_to(ROOT / "study") and re.search(r"""tags\.[`"\\]""", path.read_text(encoding="utf-8"))
    }
    assert users == {"show.py", "tracking/runs.py", "tracking/spool.py", "tracking/views.py", "report/report.py"}, (
        "another module builds filters: check its names first"
    )


HOSTILE = ("../../etc", "a/b", "a;rm -rf ~", "$(id)", "a' OR '1'='1", "a`b", "a b", "a\nb", "", 'a"b', "\x00")


@pytest.mark.parametrize("name", HOSTILE, ids=repr)
def test_a_hostile_plan_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"name"):
        load_plan(str(tiny.write_plan(tmp_path, name=name)))


def job(**names: str) -> Job:
    given: dict[str, Any] = {
        "part": "search", "cell": Cell(source="a", target="b", ratio=0.5), "row": "m", "model": "m", "name": "n",
        "config": {}, "seeds": (0,), "feature_set": "m", "task_dir": "t",
    }  # fmt: skip
    return Job(**given | names)


@pytest.mark.parametrize("name", HOSTILE, ids=repr)
def test_a_hostile_domain_or_job_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cell source: use letters, digits"):
        Cell(source=name, target="movies", ratio=0.5)
    with pytest.raises(ValueError, match="job name: use letters, digits"):
        job(name=name)
    with pytest.raises(ValueError, match="job row: use letters, digits"):
        job(row=name)


@pytest.mark.parametrize("name", HOSTILE, ids=repr)
def test_no_trial_name_leaves_the_checkpoints_folder(name: str, tmp_path: Path) -> None:
    assert checkpoint_path(tmp_path, "study", name).parent == tmp_path / "checkpoints" / "study"


def test_the_one_loader_of_yaml_is_a_safe_one() -> None:
    assert issubclass(_UniqueKeyLoader, yaml.SafeLoader)


def test_yaml_tags_make_no_objects(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("name: !!python/object/apply:os.system ['touch was-run']\n")
    with pytest.raises(InputError, match="not readable as YAML"):
        load_plan(str(path))
    assert not (tmp_path / "was-run").exists()


def test_servers_listen_on_the_loopback_unless_told_otherwise() -> None:
    from study.cli import cli

    hosts = {option.name: option.default for option in cli.commands["ui"].params}
    assert hosts["host"] == "127.0.0.1"
    for path in MODULES:
        assert "0.0.0.0" not in path.read_text(encoding="utf-8"), path
