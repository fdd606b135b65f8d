"""What `study check` says of a plan: everything that will be done and what it takes, without doing it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from features.encoders.encoder import resolve_encoder
from features.errors import InputError
from features.pseudo.generator import EMBEDDED, resolve_generator
from features.simulate.simulator import LABEL
from study import parts
from study.data.domains import data_folder
from study.data.preview import preview
from study.home import Home
from study.labels import labels_of
from study.plan.schema import AblationPlan, Plan, SweepPlan
from study.progress import no_progress
from study.specs import PREDICTOR
from study.study import store_uri
from study.tracking.results import load_results
from trainables.interface import load_model


def describe(plan: Plan, data: Path | None, home: Path) -> Iterator[Table | str]:
    """Sections to print; raises InputError for what is not there (files, encoder)."""
    yield f"[bold]{plan.name}[/bold]: model {plan.model}, {len(plan.cells)} cells"
    yield escape(_inputs(plan, data, home))
    labels = labels_of(plan.model, plan.published)
    cells = Table("cell", "source", "target", labels.ratio.lower(), title="cells")
    for cell in plan.cells:
        cells.add_row(cell.name, cell.source, cell.target, f"{cell.ratio:g}")
    yield cells
    yield from _data(plan, data, home)
    space = plan.load_space()
    searched = space.describe() if space and plan.search else {}
    config = Table("field", "value", title="configuration")
    for name, value in plan.config.items():
        config.add_row(name, searched.get(name) or str(value), style="bold" if name in searched else None)
    for place, own in plan.by_cell.items():
        for name, value in own.items():
            config.add_row(f"{name} [dim]{place}[/dim]", str(value))
    yield config
    yield _work(plan)
    yield from _favoured(plan)
    yield escape(_cost(plan, home))
    if space and plan.search and space.size() is not None:
        yield f"The space holds {space.size():,} configurations; the search tries {plan.search.trials} in each cell."


def _inputs(plan: Plan, data: Path | None, home: Path) -> str:
    if plan.features.text:
        users, items = (resolve_encoder(plan.features.text.spec(kind).encoder) for kind in ("users", "items"))
        vectors = f"text vectors by {users.spec.model}"
        if plan.features.text.items is not None:
            vectors += f", items by {items.spec.model}{' with their images' if items.spec.looks else ''}"
    else:
        vectors = f"rating-based vectors, {plan.features.ratings.factors} factors"
    pseudo = plan.features.pseudo
    if pseudo is not None:
        if pseudo.model != EMBEDDED:
            resolve_generator(pseudo)
        vectors += f"; pseudo-items by {pseudo.model}"
    if plan.simulate:
        return f"input: SIMULATED domains (seed {plan.simulate.seed}); {vectors}"
    folder = data_folder(plan, data, Home(home), no_progress)
    for spec in plan.domains.values():
        for name in filter(None, (spec.interactions, spec.items, plan.sequences.users)):
            if not (folder / name).is_file():
                raise InputError(f"{folder / name}: no such file; put it there, or name its folder with --data")
    label = " (SIMULATED)" if (folder / LABEL).is_file() else ""
    return f"input: {folder}{label}; {vectors}"


def _data(plan: Plan, data: Path | None, home: Path) -> Iterator[Table | str]:
    """What the domains hold and what language models have to do, for the kinds that say so before anything is made."""
    found = preview(plan, data, Home(home))
    if found is None:
        return
    table = Table("domain", "users", "items", "interactions", "titles to encode", title="data")
    for name, size in found.domains.items():
        table.add_row(
            name, *(f"{number:,}" for number in (size.users, size.items, size.interactions, size.titles_left))
        )
    table.caption = found.note
    yield table
    if found.users:
        texts = sum(found.users.values()) * found.texts
        users = ", ".join(f"{pair} {count:,}" for pair, count in found.users.items())
        yield escape(f"{texts:,} texts to generate, {found.texts} for each user of one domain: {users}")


def _work(plan: Plan) -> Table:
    table = Table("part", "trials", "seeds each", "trainings", title="work")
    total = 0
    for part, jobs in parts.planned(plan).items():
        trained = [job for job in jobs if not job.name.startswith(PREDICTOR)]
        trainings = sum(len(job.seeds) for job in trained)
        total += trainings
        table.add_row(part, str(len(trained)), str(len(trained[0].seeds)), str(trainings))
    table.add_row("all", "", "", str(total), style="bold")
    metric, direction = load_model(plan.model).SELECTION
    table.caption = f"configurations are selected by {metric} ({direction})"
    return table


def _favoured(plan: Plan) -> Iterator[str]:
    """A line where parts that start from the search's best train its seeds again."""
    if plan.search is None:
        return
    parts: dict[str, SweepPlan | AblationPlan] = {f"sweeps.{name}": sweep for name, sweep in plan.sweeps.items()}
    parts |= {"ablate": plan.ablate} if plan.ablate else {}
    searched = set(plan.search.seeds)
    names = [name for name, part in parts.items() if part.start == "best" and searched & set(part.seeds)]
    if names:
        yield (
            f"seeds: {', '.join(names)} train seeds of the search again, from the best that it found with them on the same"
            " validation users, so `full` and the value that it chose are favoured; give other seeds, or `start: base`"
        )


def _cost(plan: Plan, home: Path) -> str:
    """Expected time of what is left, from the trainings that this home folder has seen."""
    try:
        finished = load_results(store_uri(home, plan), plan.name, labels_of(plan.model)).finished()
    except InputError:
        return f"Nothing of this plan has run in {home} yet, so the time of a training is not known."
    trained = finished[~finished["name"].str.startswith(PREDICTOR)]
    names = set(trained["part"] + "/" + trained["cell"] + "/" + trained["name"])
    left = sum(
        len(job.seeds)
        for jobs in parts.planned(plan).values()
        for job in jobs
        if job.trial not in names and not job.name.startswith(PREDICTOR)
    )
    if not names:
        return f"No training of this plan is finished in {home}, so its time is not known."
    seeds = trained["params.seeds"].str.count(",") + 1
    mean = float(trained["metrics.seconds"].sum() / seeds.sum())
    side_by_side = max(1, int((os.cpu_count() or 1) / plan.resources.cpus))
    minutes = left * mean / side_by_side / 60
    return f"{left} trainings left; at {mean:.1f} s each, {side_by_side} side by side, about {minutes:.0f} min."
