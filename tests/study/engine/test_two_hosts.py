"""A study on hosts of their own: a link that is cut, a worker that is replaced, a head that is lost, and Slurm.

They are network namespaces with a link each to the first. Skipped where these cannot be made. All hosts see one file
system, as a cluster with a shared folder does.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from study.plan.load import load_plan
from study.study import Study
from study.tracking import tags
from study.tracking.runs import connect, default_uri, find_runs

from ...patience import PATIENCE_S
from .. import tiny

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
ROOT = Path(__file__).parents[3]
RAY = [sys.executable, "-c", "from ray.scripts.scripts import main; main()"]
TRIALS = 5


class Hosts:
    """Three hosts at 10.77.0.1 to 10.77.0.3; the first passes on what the others say to each other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = [f"study{os.getpid()}-{number}" for number in (1, 2, 3)]
        self.started: list[subprocess.Popen[str]] = []
        self.keepers: dict[int, subprocess.Popen[bytes]] = {}
        self.temp = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))

    def make(self) -> None:
        """Make the namespaces; raises CalledProcessError or OSError where that is not allowed."""
        for number, name in enumerate(self.names, start=1):
            self._ip("netns", "add", name)
            self._ip("-n", name, "link", "set", "lo", "up")
            self._ip("-n", name, "addr", "add", f"10.77.0.{number}/32", "dev", "lo")
            # Ray takes for a host's address what it would reach the world from.
            self._ip("-n", name, "route", "add", "default", "dev", "lo", "src", f"10.77.0.{number}")
        first = self.names[0]
        self._ip("netns", "exec", first, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
        for number, name in list(enumerate(self.names, start=1))[1:]:
            self._ip("-n", first, "link", "add", f"p{number}", "type", "veth", "peer", "name", "eth", "netns", name)
            for host, link in ((first, f"p{number}"), (name, "eth")):
                self._ip("-n", host, "link", "set", link, "up")
            self._ip("-n", first, "route", "add", f"10.77.0.{number}", "dev", f"p{number}", "src", "10.77.0.1")
            self._ip("-n", name, "route", "add", "10.77.0.1", "dev", "eth", "src", f"10.77.0.{number}")
            self._ip("-n", name, "route", "add", "10.77.0.0/24", "via", "10.77.0.1", "src", f"10.77.0.{number}")
        for number in (1, 2, 3):
            self.boot(number)

    def cut(self, number: int) -> None:
        """Cut the host off from the others."""
        self._ip("-n", self.names[0], "link", "set", f"p{number}", "down")

    def boot(self, number: int) -> None:
        """Give the host processes of its own: Ray looks through all that it sees."""
        apart = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "--", "sleep", "infinity"]
        self.keepers[number] = subprocess.Popen(["ip", "netns", "exec", self.names[number - 1], *apart])
        end = time.monotonic() + PATIENCE_S
        while not self._first_process(number):
            assert time.monotonic() < end
            time.sleep(0.1)

    def crash(self, number: int) -> None:
        """Kill all processes of the host at once."""
        self.keepers[number].kill()
        self.keepers.pop(number).wait()

    def _first_process(self, number: int) -> str:
        keeper = self.keepers[number].pid
        return Path(f"/proc/{keeper}/task/{keeper}/children").read_text().strip()

    def command(self, number: int, words: list[str]) -> list[str]:
        """The words that run a command on a host."""
        return ["nsenter", "--target", self._first_process(number), "--net", "--pid", "--mount", "--", *words]

    def start(self, number: int, words: list[str], log: str) -> subprocess.Popen[str]:
        with (self.folder / log).open("w") as out:
            process = subprocess.Popen(
                self.command(number, words), stdout=out, stderr=subprocess.STDOUT, env=self.environment, text=True,
                cwd=self.folder, start_new_session=True,
            )  # fmt: skip
        self.started.append(process)
        return process

    def head(self, port: int) -> subprocess.Popen[str]:
        words = ["start", "--head", "--block", f"--port={port}", "--node-ip-address=10.77.0.1", "--num-cpus=0"]
        process = self.start(
            1, [*RAY, *words, f"--temp-dir={self.temp}", "--include-dashboard=false"], f"head{port}.txt"
        )
        until(lambda: "Ray runtime started" in self.read(f"head{port}.txt"), process, self.folder / f"head{port}.txt")
        return process

    def worker(self, number: int, port: int) -> subprocess.Popen[str]:
        words = [
            "start",
            "--block",
            f"--address=10.77.0.1:{port}",
            f"--node-ip-address=10.77.0.{number}",
            "--num-cpus=1",
        ]
        process = self.start(number, [*RAY, *words], f"worker{number}.txt")
        until(
            lambda: "Ray runtime started" in self.read(f"worker{number}.txt"),
            process,
            self.folder / f"worker{number}.txt",
        )
        return process

    def read(self, log: str) -> str:
        return (self.folder / log).read_text()

    @property
    def environment(self) -> dict[str, str]:
        quiet = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_memory_monitor_refresh_ms": "0"}
        left = {name: text for name, text in os.environ.items() if name not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
        return {**left, **quiet, "PYTHONPATH": str(ROOT)}

    def close(self) -> None:
        for number in list(self.keepers):
            self.crash(number)
        for process in self.started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        shutil.rmtree(self.temp, ignore_errors=True)

    @staticmethod
    def _ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    made = Hosts(tmp_path)
    try:
        made.make()
    except (OSError, subprocess.CalledProcessError) as error:
        made.close()
        pytest.skip(f"no network namespaces here: {error}")
    yield made
    made.close()


def until(happened: Callable[[], bool], process: subprocess.Popen[str], log: Path) -> None:
    end = time.monotonic() + PATIENCE_S
    while not happened():
        assert process.poll() is None, f"it ended too early: {log.read_text()[-2000:]}"
        assert time.monotonic() < end
        time.sleep(0.5)


def write_plan(folder: Path) -> Path:
    """Five trials of some seconds each."""
    base: dict[str, Any] = {**tiny.PLAN["base"], "epochs": 400, "patience": 400}
    return tiny.write_plan(
        folder,
        drop=("sweeps", "ablate", "score"),
        cold_ratios=[0.5],
        base=base,
        search={"trials": TRIALS, "seeds": [0]},
    )


def study_words(verb: str, plan: Path, home: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "study", verb, str(plan), "--home", str(home), *more]


def finished(plan: Path, home: Path) -> int:
    return sum(row.finished for row in Study(load_plan(str(plan)), home=home).status())


def assert_each_trial_once(home: Path) -> None:
    client = connect(default_uri(home))
    experiment = client.get_experiment_by_name("tiny")
    runs = [run for run in find_runs(client, experiment.experiment_id, "search") if tags.TRIAL in run.data.tags]
    assert sorted(run.data.tags[tags.TRIAL].rpartition("/")[2] for run in runs) == [f"{n:04d}" for n in range(TRIALS)]
    assert {run.info.status for run in runs} == {"FINISHED"}


def test_a_host_whose_link_is_cut_is_replaced_by_another(hosts: Hosts, tmp_path: Path) -> None:
    plan, home = write_plan(tmp_path), tmp_path / "home"
    hosts.head(6379)
    hosts.worker(2, 6379)
    driver = hosts.start(1, study_words("run", plan, home, "--address", "10.77.0.1:6379"), "driver.txt")
    until(lambda: finished(plan, home) >= 1, driver, tmp_path / "driver.txt")
    hosts.cut(2)
    hosts.worker(3, 6379)
    assert driver.wait(PATIENCE_S) == 0, hosts.read("driver.txt")
    assert f"search: {TRIALS} planned, {TRIALS} trials run" in hosts.read("driver.txt")
    assert "Traceback" not in hosts.read("driver.txt")
    assert_each_trial_once(home)


def test_a_lost_head_is_one_line_and_the_study_resumes(hosts: Hosts, tmp_path: Path) -> None:
    plan, home = write_plan(tmp_path), tmp_path / "home"
    hosts.head(6379)
    hosts.worker(2, 6379)
    driver = hosts.start(2, study_words("run", plan, home, "--address", "10.77.0.1:6379"), "driver.txt")
    until(lambda: finished(plan, home) >= 1, driver, tmp_path / "driver.txt")
    hosts.crash(1)
    assert driver.wait(PATIENCE_S) == 2, hosts.read("driver.txt")
    lines = [line for line in hosts.read("driver.txt").splitlines() if not line[:2].isdigit()]
    way = f"study resume {plan} --home {home}"
    assert lines == [
        "study: Ray's head at 10.77.0.1:6379 has not answered for 40 s; what is finished is kept; when it is back, go on "
        f"with `{way}`"
    ]  # fmt: skip
    done = finished(plan, home)
    assert 1 <= done < TRIALS
    hosts.boot(1)
    hosts.head(6380)
    hosts.worker(3, 6380)
    again = hosts.start(1, study_words("resume", plan, home, "--address", "10.77.0.1:6380"), "again.txt")
    assert again.wait(PATIENCE_S) == 0, hosts.read("again.txt")
    assert f"search: {TRIALS} planned, {TRIALS - done} trials run" in hosts.read("again.txt")
    assert_each_trial_once(home)


def test_the_batch_script_for_slurm_runs_a_study_on_two_nodes(hosts: Hosts, tmp_path: Path) -> None:
    """With a stand-in `srun` that starts the command on both hosts at once, and ends when they have."""
    plan, home, place = write_plan(tmp_path), tmp_path / "home", tmp_path / "bin"
    place.mkdir()
    one, two = (" ".join(hosts.command(number, [])) for number in (1, 2))
    bodies = {
        "scontrol": "echo 10.77.0.1; echo 10.77.0.2",
        "srun": f'shift\n{one} "$@" & first=$!\n{two} "$@" &\nwait $first; code=$?\nwait || true\nexit $code',
        "ray": f"exec {sys.executable} -c 'from ray.scripts.scripts import main; main()' \"$@\"",
        "study": f'exec {sys.executable} -m study "$@"',
        "python": f'exec {sys.executable} "$@"',
    }
    for name, body in bodies.items():
        (place / name).write_text(f"#!/bin/sh\n{body}\n")
        (place / name).chmod(0o755)
    job = str(os.getpid())
    environment = {
        **hosts.environment, "PATH": f"{place}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "two", "SLURM_JOB_ID": job,
        "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "1", "SLURM_SUBMIT_DIR": str(tmp_path), "STUDY_HOME": str(home),
    }  # fmt: skip
    try:
        ran = subprocess.run(
            ["bash", str(ROOT / "docs/cluster/slurm.sh"), str(plan)], env=environment, cwd=tmp_path, capture_output=True,
            text=True, check=False, timeout=PATIENCE_S,
        )  # fmt: skip
    finally:
        shutil.rmtree(f"/tmp/ray-{job}", ignore_errors=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"search: {TRIALS} planned, {TRIALS} trials run" in ran.stdout
    assert_each_trial_once(home)
