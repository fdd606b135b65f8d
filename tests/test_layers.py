"""The rules of the packages, read from the syntax trees: who may import whom, and no work at import."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("features", "search_spaces", "study", "trainables")
FORBIDDEN = {
    "features": {"trainables", "search_spaces", "study", "optuna", "mlflow"},
    "trainables": {"ray", "optuna", "mlflow", "study", "search_spaces"},
    "search_spaces": {"features", "trainables", "study", "ray", "mlflow"},
    "study": set(),
}
WITHIN_STUDY = {  # what each folder of `study` may use of the rest of it; its own modules go without saying
    "engine": {"home", "provenance", "specs", "tracking"},
    "tracking": {"home", "labels", "selection", "specs"},
    "report": {"labels", "papers", "provenance", "selection", "specs", "tracking"},
}
FEATURES_LAYERS = (  # the rooms of `features`, the lowest first
    {"__init__", "cores", "errors", "progress"},
    {"checks", "local_ray"},
    {"store"},
    {"domains", "simulate", "images", "factorisation"},
    {"encoders"},
    {"extraction", "reviews"},
    {"pseudo"},
)
CYCLES: list[list[str]] = []  # groups of modules that still know each other; to be shortened only
MODULES = sorted(path.relative_to(ROOT) for package in OURS for path in (ROOT / package).rglob("*.py"))
HEAVY = ("duckdb", "matplotlib", "mlflow", "optuna", "pandas", "pyarrow", "ray", "scipy", "torch", "transformers")
CALLS_AT_IMPORT = ast.Expr | ast.For | ast.While | ast.With | ast.Try | ast.Delete | ast.Raise | ast.AugAssign


def tree(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def imported(module: ast.Module) -> Iterator[str]:
    """Top-level names of all imports, also those inside functions and for type checkers alone."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module
            yield node.module.partition(".")[0]


def test_there_are_four_packages() -> None:
    found = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert found == set(OURS)
    assert {path.parts[0] for path in MODULES} == set(OURS)


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_go_one_way(path: Path) -> None:
    assert set(imported(tree(path))) & FORBIDDEN[path.parts[0]] == set()


@pytest.mark.parametrize("folder", WITHIN_STUDY)
def test_the_folders_of_the_study_stand_on_few_others(folder: str) -> None:
    modules = [path for path in MODULES if path.parts[:2] == ("study", folder)]
    used = {
        alias.name if node.module == "study" else node.module.split(".")[1]
        for path in modules
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "study"
        for alias in node.names
    }
    assert used - {folder} == WITHIN_STUDY[folder]


@pytest.mark.parametrize("path", [path for path in MODULES if path.parts[0] == "features"], ids=str)
def test_rooms_of_features_know_no_higher_ones(path: Path) -> None:
    """Also for type checkers and inside functions; rooms of one layer do not know each other."""
    room = path.with_suffix("").parts[1]
    layer = next(number for number, rooms in enumerate(FEATURES_LAYERS) if room in rooms)
    known = {room for rooms in FEATURES_LAYERS[:layer] for room in rooms} | {room}
    assert {name.split(".")[1] for name in modules_used(path) if name.startswith("features.")} <= known


def test_every_room_of_features_has_a_layer() -> None:
    rooms = {path.with_suffix("").parts[1] for path in MODULES if path.parts[0] == "features"}
    assert sorted(room for rooms in FEATURES_LAYERS for room in rooms) == sorted(rooms)


def dotted(path: Path) -> str:
    """`study.plan.load`; of a package's `__init__.py` the package."""
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def modules_used(path: Path) -> set[str]:
    """Modules of ours that a module imports, wherever in its text."""
    names = {dotted(module) for module in MODULES}
    used = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            used |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            used |= (members & names) | ({str(node.module)} if members - names else set())
    return used & names


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other."""
    reached = {}
    for start in graph:
        seen: set[str] = set()
        left = [start]
        while left:
            for name in graph[left.pop()] - seen:
                seen.add(name)
                left.append(name)
        reached[start] = seen
    groups = {frozenset({other for other in reached[name] if name in reached[other]}) for name in graph}
    return sorted(sorted(group) for group in groups if group)


def test_no_module_imports_itself_by_way_of_others() -> None:
    """All imports count: those for type checkers and those inside functions too."""
    assert cycles({dotted(path): modules_used(path) - {dotted(path)} for path in MODULES}) == CYCLES


def test_the_rule_sees_cycles() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"e", "a"}}
    assert cycles(graph) == [["b", "c"], ["e"]]


def test_the_rule_sees_every_form_of_import() -> None:
    text = "import ray.tune\nif x:\n    from optuna import a\ndef f():\n    import mlflow as m\n"
    assert list(imported(ast.parse(text))) == ["ray", "optuna", "mlflow"]


def test_the_libraries_meet_in_the_study_alone() -> None:
    """Ray Tune, Optuna and MLflow; `features` knows Ray for Ray Data, `search_spaces` Optuna's distributions."""
    users = {name: {path.parts[0] for path in MODULES if name in set(imported(tree(path)))} for name in HEAVY}
    assert users["mlflow"] == {"study"}
    assert users["optuna"] == {"study", "search_spaces"}
    assert users["ray"] == {"study", "features"}


def is_switch(node: ast.stmt) -> bool:
    """`if TYPE_CHECKING:` and `if __name__ == "__main__":`."""
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'")


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_modules_define_and_do_nothing(path: Path) -> None:
    for node in tree(path).body:
        if isinstance(node, ast.Expr):
            assert isinstance(node.value, ast.Constant), f"{path}:{node.lineno} is evaluated at import"
            assert isinstance(node.value.value, str)
        else:
            assert not isinstance(node, CALLS_AT_IMPORT), f"{path}:{node.lineno} works at import"
            assert not isinstance(node, ast.If) or is_switch(node), f"{path}:{node.lineno} decides at import"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_nothing_is_evaluated_from_text(path: Path) -> None:
    called = {
        node.func.id for node in ast.walk(tree(path)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert called & {"eval", "exec", "compile", "__import__"} == set()


def test_the_tree_of_errors_is_drawn_whole() -> None:
    """Every exception class of ours stands in `features/errors.py`, with its module."""
    drawn = ast.get_docstring(tree(Path("features/errors.py"))) or ""
    defined = {
        (node.name, ".".join(path.with_suffix("").parts))
        for path in MODULES
        for node in tree(path).body
        if isinstance(node, ast.ClassDef)
        and any(ast.unparse(base).endswith(("Error", "Exception")) for base in node.bases)
    }
    assert {(name, place) for name, place in re.findall(r"^ +(\w+) +([\w.]+):", drawn, re.MULTILINE)} == defined


IMPORTING = f"""
import sys
def deny(event, arguments):
    if event in ("subprocess.Popen", "socket.connect", "os.mkdir", "os.rename", "os.remove") or (
        event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    ):
        raise RuntimeError(f"at import: {{event}} {{arguments}}")
sys.dont_write_bytecode = True
sys.addaudithook(deny)
import study.cli
print([name for name in {HEAVY!r} if name in sys.modules])
"""


def test_the_command_line_starts_light() -> None:
    """No library that takes a second to import, no file written, no process started, before a verb is chosen."""
    ran = subprocess.run([sys.executable, "-c", IMPORTING], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "[]\n", "")


def test_the_module_is_the_console_script() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"study": "study.cli:main"}
    main = tree(Path("study/__main__.py"))
    assert [ast.unparse(node) for node in main.body[1:]] == [
        "from study.cli import main", "if __name__ == '__main__':\n    main()",
    ]  # fmt: skip
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="study")
    script = f"import sys; from {entry.module} import {entry.attr}; sys.argv[0] = 'study'; {entry.attr}()"
    for words in (["--help"], ["check", "nowhere"]):
        one, two = (
            subprocess.run([sys.executable, *start, *words], capture_output=True, text=True, cwd=ROOT, check=False)
            for start in (["-m", "study"], ["-c", script])
        )
        assert (one.returncode, one.stdout, one.stderr) == (two.returncode, two.stdout, two.stderr)
        assert one.stdout + one.stderr
