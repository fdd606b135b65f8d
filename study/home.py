"""Where everything of a study lies in its home folder: the one place that knows the names of its files.

Paths are absolute, because workers have another working folder. Nothing is made here, and locks alone are read.
"""

from __future__ import annotations

import fcntl
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Home:
    """A home folder; several plans may share one, and with it domains, vectors and tasks."""

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", self.path.absolute())

    def __str__(self) -> str:
        return str(self.path)

    @classmethod
    def of_task(cls, task_dir: Path | str) -> Home:
        """Return the home folder that a task's `search` or `test` folder lies in: `<home>/tasks/<task>/search`."""
        return cls(Path(task_dir).absolute().parents[2])

    def task_folder(self, logged: str) -> str:
        """Return a task's `search` or `test` folder in this home, which was logged where the home lay then."""
        return str(self.tasks.joinpath(*Path(logged).parts[-2:]))

    # --- what is made ahead of trials ---------------------------------------------------------------------------------

    @property
    def simulated(self) -> Path:
        """Raw files by the simulator, a folder for each of its specifications."""
        return self.path / "simulated"

    @property
    def domains(self) -> Path:
        """Domains after their filters."""
        return self.path / "domains"

    @property
    def store(self) -> Path:
        """Feature tables, generated texts and pseudo-items."""
        return self.path / "store"

    @property
    def tasks(self) -> Path:
        """Task folders, and what the trials of a model share ahead of them."""
        return self.path / "tasks"

    @property
    def models(self) -> Path:
        """Models that scoring keeps, see `trainables.trial.kept_at`."""
        return self.tasks / "models"

    # --- what trials write --------------------------------------------------------------------------------------------

    @property
    def database(self) -> Path:
        """MLflow's SQLite file."""
        return self.path / "mlflow.db"

    @property
    def artifacts(self) -> Path:
        """MLflow's artifacts, where the store is that file."""
        return self.path / "artifacts"

    @property
    def ray(self) -> Path:
        """Ray Tune's own notes."""
        return self.path / "ray"

    def journal(self, plan: str) -> Path:
        """Optuna's journal file of a plan's searches."""
        return self.path / "optuna" / f"{plan}.log"

    def checkpoints(self, plan: str) -> Path:
        """Checkpoints of a plan's running trials."""
        return self.path / "checkpoints" / plan

    def spool(self, plan: str) -> Path:
        """What an MLflow server has not taken yet."""
        return self.path / "spool" / plan

    def lock(self, plan: str) -> Path:
        """File that the process at work on a plan holds."""
        return self.path / f"{plan}.lock"

    # --- what a person reads ------------------------------------------------------------------------------------------

    def report(self, plan: str) -> Path:
        """The report of a plan."""
        return self.path / "reports" / plan

    def logs(self, plan: str) -> Path:
        """Descriptions of a plan's data."""
        return self.path / "logs" / plan

    def ray_log(self, plan: str) -> Path:
        """What Ray said during a plan's trials."""
        return self.path / "logs" / f"{plan}-ray.log"

    def remembered_plan(self, plan: str) -> Path:
        """A plan as it last trained here, see `study.plan.diff`."""
        return self.path / "plans" / f"{plan}.json"


def process_at(lock: Path) -> str | None:
    """Return the number of the process that holds a lock file (`unknown`: it has not said); None: nobody holds it."""
    try:
        with lock.open(encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read().strip() or "unknown"
    except FileNotFoundError:
        return None
    return None
