"""From raw files to domains: where the files are, and whom the data itself holds out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from features.domains.domain import Domain, matching_files, prepare_domain
from features.domains.splits import read_split
from features.errors import InputError
from features.simulate.simulator import simulate
from features.store.tables import digest
from study.home import Home
from study.plan.schema import Plan
from study.progress import StartProgress, advance_by


def data_folder(plan: Plan, data: Path | None, home: Home, start_progress: StartProgress) -> Path:
    """Return the folder of the raw files: the given one, one folder below it that holds them, or a simulated one."""
    if plan.simulate is not None:
        if data is not None:
            raise InputError(f"--data {data}: plan {plan.name} simulates its domains; leave the option out")
        spec = plan.simulate
        folder = home.simulated / digest(asdict(spec))[:12]
        simulate(spec, folder, advance_by(start_progress("simulating domains", spec.rows)))
        return folder
    needed = list(dict.fromkeys(name for spec in plan.domains.values() for name in spec.files("interactions")))
    if plan.sequences.users is not None:
        needed.append(plan.sequences.users)
    if data is None:
        raise InputError(f"plan {plan.name}: reads {', '.join(needed)}; say where they are with --data DIR")
    for folder in [data, *sorted(path for path in data.glob("*") if path.is_dir())]:
        if all(matching_files(folder, name) for name in needed):
            return folder
    return data  # reading it gives the error that names the missing file


def prepare_domains(plan: Plan, data: Path | None, home: Home, start_progress: StartProgress) -> dict[str, Domain]:
    """Read and filter all domains of the plan, or find them stored."""
    folder = data_folder(plan, data, home, start_progress)
    return {
        name: prepare_domain(spec, folder, home.domains, advance_by(start_progress(f"reading {name}", 0)))
        for name, spec in plan.domains.items()
    }


def given_split(plan: Plan, folder: Path) -> Mapping[str, str] | None:
    """Return who trains, validates and tests (user id -> train | valid | test), where a file of the data says it."""
    rules = plan.sequences
    return read_split(folder / rules.users, rules.columns) if rules.users is not None else None
