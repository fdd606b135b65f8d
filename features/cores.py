"""How many cores this process may use, which is fewer than the machine has in a container or a job of a cluster."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def usable_cores(environment: Mapping[str, str] = os.environ, cgroups: Path = _CGROUPS) -> int:
    """Return the least of what affinity, cgroup and Slurm allow, at least 1."""
    allowed = [float(len(os.sched_getaffinity(0))), *_quotas(cgroups)]
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"):
        if environment.get(name, "").isdigit():
            allowed.append(float(environment[name]))
            break  # a task may use fewer than its job has on the node
    return max(1, int(min(allowed)))


def _quotas(cgroups: Path) -> Iterator[float]:
    """Yield the cores that each limited group from ours to the root may keep busy, in both layouts of cgroups."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers not in ("", "cpu", "cpu,cpuacct", "cpuacct,cpu"):
            continue
        top = cgroups if controllers == "" else cgroups / "cpu"
        # In a container the path may be the host's, and the container's own limit lies at the top.
        for folder in dict.fromkeys((top / group.strip("/"), *(top / group.strip("/")).parents, top)):
            if folder.is_relative_to(top) and (quota := _quota(folder)) is not None:
                yield quota


def _quota(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return None if quota.strip() in ("max", "-1") else float(quota) / float(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None
