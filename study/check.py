"""What `study check` says of a plan: everything that will be done and what it takes, without doing it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.table import Table

from features.encoder import resolve_encoder
from features.simulate import LABEL
from study import parts
from study.plan import Plan
from study.prepare import data_folder
from trainables.door import load_model


def describe(plan: Plan, data: Path | None, home: Path) -> Iterator[Table | str]:
    """Sections to print; raises InputError for what is not there (files, encoder)."""
    yield f"[bold]{plan.name}[/bold]: model {plan.model}, {len(plan.cells)} cells"
    yield _inputs(plan, data, home)
    cells = Table("cell", "source", "target", "cold ratio", title="cells")
    for cell in plan.cells:
        cells.add_row(cell.name, cell.source, cell.target, f"{cell.ratio:g}")
    yield cells
    space = plan.load_space()
    searched = space.describe() if space and plan.search else {}
    config = Table("field", "value", title="configuration")
    for name, value in plan.config.items():
        config.add_row(name, searched.get(name) or str(value), style="bold" if name in searched else None)
    yield config
    yield _work(plan)
    if space and plan.search and space.size() is not None:
        yield f"The space holds {space.size():,} configurations; the search tries {plan.search.trials} in each cell."


def _inputs(plan: Plan, data: Path | None, home: Path) -> str:
    if plan.features.text:
        found = resolve_encoder(plan.features.text.encoder)
        vectors = f"text vectors by {found.spec.model}"
    else:
        vectors = f"rating-based vectors, {plan.features.ratings.factors} factors"
    if plan.simulate:
        return f"input: SIMULATED domains (seed {plan.simulate.seed}); {vectors}"
    folder = data_folder(plan, data, home, lambda what, size: lambda done: None)
    for spec in plan.domains.values():
        for name in filter(None, (spec.interactions, spec.items)):
            (folder / name).stat()
    label = " (SIMULATED)" if (folder / LABEL).is_file() else ""
    return f"input: {folder}{label}; {vectors}"


def _work(plan: Plan) -> Table:
    table = Table("part", "trials", "seeds each", "trainings", title="work")
    total = 0
    for part, jobs in parts.planned(plan).items():
        trained = [job for job in jobs if not job.name.startswith("predictor:")]
        trainings = sum(len(job.seeds) for job in trained)
        total += trainings
        table.add_row(part, str(len(trained)), str(len(trained[0].seeds)), str(trainings))
    table.add_row("all", "", "", str(total), style="bold")
    table.caption = f"selected by validation {' '.join(load_model(plan.model).SELECTION)}"
    return table
