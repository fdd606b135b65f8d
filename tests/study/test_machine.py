"""What a machine has that gets in the way: proxies, a HOME that cannot be written, long temporary folders, few cores."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest

from features import local_ray
from features.cores import usable_cores
from features.errors import InputError
from features.local_ray import ray_folder
from study.engine import head
from study.engine.machine import direct_to_this_machine, user_folders


@pytest.mark.parametrize(
    ("environment", "cores"), [({}, 6), ({"SLURM_CPUS_PER_TASK": "2", "SLURM_CPUS_ON_NODE": "4"}, 2),
    ({"SLURM_CPUS_ON_NODE": "4"}, 4), ({"SLURM_CPUS_ON_NODE": "64"}, 6), ({"SLURM_CPUS_PER_TASK": "two"}, 6)],
)  # fmt: skip
def test_cores_are_those_that_are_allowed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, environment: dict[str, str], cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)))
    assert usable_cores(environment, tmp_path) == cores


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000"}, 1),
        ({"cpu.max": "max 100000"}, 6),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 6),
    ],
)
def test_cores_are_those_that_a_container_pays_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, str], cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)))
    real = Path.read_text
    groups = "0::/job\n2:cpu,cpuacct:/job\n"
    monkeypatch.setattr(Path, "read_text", lambda path: groups if str(path) == "/proc/self/cgroup" else real(path))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert usable_cores({}, tmp_path) == cores


def test_servers_on_this_machine_are_not_asked_for_through_a_proxy() -> None:
    environment = {"HTTP_PROXY": "http://proxy:3128", "NO_PROXY": "intranet,localhost"}
    direct_to_this_machine(environment)
    names = f"localhost,127.0.0.1,::1,{socket.gethostname()}"
    assert environment["NO_PROXY"] == "intranet," + names
    assert environment["no_proxy"] == names
    untouched: dict[str, str] = {}
    direct_to_this_machine(untouched)
    assert untouched == {}


def test_a_home_that_cannot_be_written_is_not_needed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    environment = {"HOME": "/proc/none", "MPLCONFIGDIR": "/mine"}
    user_folders(tmp_path, environment)
    assert environment["XDG_CACHE_HOME"] == f"{tmp_path}/user/cache"
    assert environment["MPLCONFIGDIR"] == "/mine"
    assert len(environment["RAY_AUTH_TOKEN"]) == 64
    assert caplog.messages == [f"HOME /proc/none cannot be written; caches go to {tmp_path}/user"]
    fine = {"HOME": str(tmp_path)}
    user_folders(tmp_path, fine)
    assert fine == {"HOME": str(tmp_path)}
    assert list(tmp_path.iterdir()) == []


def test_ray_gets_a_short_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ray_folder({"TMPDIR": "/tmp"}) is None
    long = tmp_path / ("a-job-with-a-long-name" * 4)
    long.mkdir()
    assert ray_folder({"TMPDIR": str(long)}) == f"/tmp/ray-{os.getuid()}"
    assert ray_folder({"RAY_TMPDIR": "/tmp", "TMPDIR": str(long)}) is None
    monkeypatch.setattr(local_ray, "can_write", lambda folder: False)
    with pytest.raises(InputError, match=rf"^TMPDIR {long}: is too long .*; set RAY_TMPDIR to a short one$"):
        ray_folder({"TMPDIR": str(long)})


def test_a_lost_head_ends_the_process_in_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(head.os, "_exit", ended.append)
    monkeypatch.setattr(head, "LOST_S", 0.0)
    monkeypatch.setattr(head, "_PAUSE_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        left = iter([True, True])
        head._watch(address, "study resume tiny", lambda: next(left, False))
        assert (ended, caplog.messages) == ([], [])
    head.watch_head(address, "study resume tiny", going=lambda: not ended)
    for thread in threading.enumerate():
        if thread.name == "head":
            thread.join()
    assert ended == [2]
    assert caplog.messages == [
        f"Ray's head at {address} has not answered for 0 s; what is finished is kept; when it is back, go on with "
        "`study resume tiny`"
    ]
