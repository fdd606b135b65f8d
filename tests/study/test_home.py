"""The names of a home folder's files, which older home folders have too."""

from __future__ import annotations

from pathlib import Path

import pytest

from study.home import Home


def test_every_path_is_in_the_home_folder() -> None:
    home = Home(Path("/somewhere/home"))
    paths = {name: getattr(home, name) for name, kind in vars(Home).items() if isinstance(kind, property)}
    assert {name: str(path.relative_to(home.path)) for name, path in paths.items()} == {
        "simulated": "simulated", "domains": "domains", "store": "store", "tasks": "tasks", "models": "tasks/models",
        "database": "mlflow.db", "artifacts": "artifacts", "ray": "ray",
    }  # fmt: skip
    of_plan = {
        "journal": "optuna/p.log", "checkpoints": "checkpoints/p", "spool": "spool/p", "lock": "p.lock",
        "report": "reports/p", "logs": "logs/p", "ray_log": "logs/p-ray.log", "remembered_plan": "plans/p.json",
    }  # fmt: skip
    for name, path in of_plan.items():
        assert getattr(home, name)("p") == home.path / path
    assert str(home) == "/somewhere/home"


def test_a_relative_home_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Home(Path("h")).tasks == tmp_path / "h" / "tasks"


def test_a_task_tells_its_home() -> None:
    assert Home.of_task("/h/tasks/books-movies-0123/search") == Home(Path("/h"))
    assert Home.of_task(Path("/h/tasks/books-movies-0123/test")).tasks == Path("/h/tasks")
