"""What `study check` says of a plan: everything that will be done and what it takes, without doing it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from features.cores import usable_cores
from features.domains.domain import find_domain, is_pattern, matching_files
from features.encoders.spec import resolve_encoder
from features.errors import InputError
from features.pseudo.generator import LOCAL, resolve_generator
from features.store.folders import SIMULATED
from study import parts
from study.data.domains import data_folder, given_split
from study.data.preview import Preview, domains_for_check, preview, preview_simulated
from study.data.summary import check_leaks, data_tables, is_large, sample_tables
from study.data.tasks import task_rules
from study.home import Home
from study.plan.schema import AblationPlan, Plan, Row, SweepPlan
from study.progress import no_progress
from study.specs import BASELINE, Job, Resources
from study.study import plan_labels, store_uri
from study.tracking import runs as tracking
from study.tracking import tags
from study.tracking.results import load_results
from trainables.interface import OURS, make_config

_RUNS = 200  # newest trainings of a model that its time is measured on


def describe(
    plan: Plan, data: Path | None, home: Path, side_by_side: int | None = None
) -> Iterator[Table | Text | str]:  # fmt: skip
    """Yield the sections to print; raises InputError for what is not there (files, encoder).

    side_by_side: trials that a cluster holds at a time; None: as many as this machine.
    """
    counts = [(len(plan.compare), "rival"), (len(plan.cells), "cell")]
    words = [f"{count} {noun}{'s' * (count > 1)}" for count, noun in counts if count]
    yield f"[bold]{plan.name}[/bold]: model {plan.model}, {', '.join(words)}"
    yield escape(_inputs(plan, data, home))
    if note := plan_labels(plan).note:
        yield escape(f"note: {note}")
    cells = Table("cell", "source", "target", plan_labels(plan).ratio.lower(), title="cells")
    for cell in plan.cells:
        cells.add_row(cell.name, cell.source, cell.target, f"{cell.ratio:g}")
    yield cells
    yield from _data(plan, data, home)
    for row in plan.rows:
        yield _configuration(plan, row)
    yield _work(plan)
    yield from _favoured(plan)
    yield _cost(plan, Home(home), _held_here(plan.resources) if side_by_side is None else side_by_side)
    for row in plan.rows:
        space = row.load_space() if row.search else None
        if space is not None and row.search is not None and (size := space.size()) is not None:
            yield f"The space of {row.name} holds {size:,} configurations; each cell tries {row.search.trials} of them."


def _configuration(plan: Plan, row: Row) -> Table:
    """A row's fields: what is searched, and the values of the others."""
    space = row.load_space() if row.search else None
    searched = space.describe() if space else {}
    of_model = "" if row.name == row.model else f" (model {row.model})"
    layers = [asdict(make_config(row.model, values, "")) for values in ({}, replace(row, base={}).shared)]
    shown = [] if row.preset == OURS else layers  # beside the value: what it is by default, and under the preset
    heads = ["default", row.preset][: len(shown)]
    table = Table("field", *heads, "value", title=f"configuration of {row.name}{of_model}")
    for name, value in row.config.items():
        below = [Text(str(layer[name])) for layer in shown]
        value = Text(searched.get(name) or str(value))
        table.add_row(name, *below, value, style="bold" if name in searched else None)
    for cell in plan.cells:
        for name, value in row.of_cell(cell).items():
            table.add_row(f"{name} [dim]{cell.name}[/dim]", *["" for _ in shown], Text(str(value)))
    return table


def _inputs(plan: Plan, data: Path | None, home: Path) -> str:
    if plan.features.text:
        users, items = (resolve_encoder(plan.features.text.spec(kind).encoder) for kind in ("users", "items"))
        vectors = f"text vectors by {users.spec.model}"
        if plan.features.text.items is not None:
            vectors += f", items by {items.spec.model}{' with their images' if items.spec.reads_images else ''}"
    elif plan.feature_set == "ids":
        vectors = "ids alone"
    else:
        vectors = f"rating-based vectors, {plan.features.ratings.factors} factors"
    pseudo = plan.features.pseudo
    if pseudo is not None:
        if pseudo.model != LOCAL:
            resolve_generator(pseudo)
        vectors += f"; pseudo-items by {pseudo.model}"
    if plan.simulate:
        return f"input: SIMULATED domains (seed {plan.simulate.seed}); {vectors}"
    folder = data_folder(plan, data, Home(home), no_progress)
    for spec in plan.domains.values():
        for name in filter(None, (*spec.files("interactions"), *spec.files("items"), plan.sequences.users)):
            if not matching_files(folder, name):
                what = "no file matches" if is_pattern(name) else "no such file"
                raise InputError(f"{folder / name}: {what}; put it there, or name its folder with --data")
    label = " (SIMULATED)" if (folder / SIMULATED).is_file() else ""
    return f"input: {folder}{label}; {vectors}"


def _data(plan: Plan, data: Path | None, home: Path) -> Iterator[Table | Text | str]:
    """What the domains hold, what is odd about them, and what language models have to do."""
    if plan.simulate is not None:
        if (simulated := preview_simulated(plan)) is not None:
            yield from _language_work(simulated)
        return
    folder = data_folder(plan, data, Home(home), no_progress)
    split = given_split(plan, folder)
    if is_large(plan, folder) and not all(
        find_domain(spec, folder, Home(home).domains) for spec in plan.domains.values()
    ):
        yield from sample_tables(plan, folder)
        return
    with domains_for_check(plan, folder, Home(home)) as domains:
        yield from data_tables(plan, domains, split)
        check_leaks(plan, domains)
        if task_rules(plan).previewed:
            yield from _language_work(preview(plan, domains, split, Home(home)))


def _language_work(found: Preview) -> Iterator[Table | str]:
    """What language models have to do."""
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
    """What each part trains, a line for each of its rows."""
    table = Table("part", "row", "trials", "seeds each", "trainings", title="work")
    total = 0
    for part, jobs in parts.planned(plan).items():
        rows: dict[str, list[Job]] = {}
        for job in jobs:
            if job.model != BASELINE:
                rows.setdefault(job.row, []).append(job)
        for row, trained in rows.items():
            trainings = sum(len(job.seeds) for job in trained)
            total += trainings
            table.add_row(part, row, str(len(trained)), str(len(trained[0].seeds)), str(trainings))
    table.add_row("all", "", "", "", str(total), style="bold")
    table.caption = f"configurations are selected by {plan.selection.metric} ({plan.selection.direction})"
    return table


def _favoured(plan: Plan) -> Iterator[str]:
    """A line where parts that start from the search's best train its seeds again."""
    if plan.search is None:
        return
    starting: dict[str, SweepPlan | AblationPlan] = {f"sweeps.{name}": sweep for name, sweep in plan.sweeps.items()}
    starting |= {"ablate": plan.ablate} if plan.ablate else {}
    searched = set(plan.search.seeds)
    names = [name for name, part in starting.items() if part.start == "best" and searched & set(part.seeds)]
    if names:
        yield (
            f"seeds: {', '.join(names)} train seeds of the search again, from the best that it found with them on the same"
            " validation users, so `full` and the value that it chose are favoured; give other seeds, or `start: base`"
        )


def _held_here(resources: Resources) -> int:
    """Return how many trials this machine holds at a time; 0 where they need a GPU and it has none."""
    cores = max(1, int(usable_cores() / resources.cpus))
    if not resources.gpus:
        return cores
    import torch

    return min(cores, int(torch.cuda.device_count() / resources.gpus))


def _cost(plan: Plan, home: Home, side_by_side: int) -> Table:
    """Expected time of what is left, by row, from the trainings of its model that this home folder has seen.

    Trials that ask for a GPU are judged by trainings on a GPU, the others by those on a CPU.
    """
    ended = _ended(plan, home)
    done = set(ended["part"] + "/" + ended["cell"] + "/" + ended["row"] + "/" + ended["name"])
    seconds = _training_seconds(plan, home)
    table = Table("row", "trainings left", "seconds each", "expected minutes", title="cost")
    jobs = [job for jobs in parts.planned(plan).values() for job in jobs if job.trial not in done]
    total, unknown = 0.0, False
    for row in plan.rows:
        left = sum(len(job.seeds) for job in jobs if job.row == row.name)
        mean = seconds.get(row.model)
        minutes = None if mean is None or not side_by_side else left * mean / side_by_side / 60
        total += minutes or 0.0
        unknown |= minutes is None and left > 0
        table.add_row(
            row.name, f"{left:,}", "not known" if mean is None else f"{mean:.1f}",
            "not known" if minutes is None else f"{minutes:.1f}",
        )  # fmt: skip
    trainings = sum(len(job.seeds) for job in jobs if job.model != BASELINE)
    table.add_row("all", f"{trainings:,}", "", "not known" if unknown else f"{total:.1f}", style="bold")
    kind = "a GPU" if plan.resources.gpus else "a CPU"
    held = f"{side_by_side} side by side" if side_by_side else "this machine has no GPU for them (see --cluster)"
    table.caption = f"{held}; seconds are means over the model's trainings on {kind} in {escape(str(home))}" + (
        "; a model that has not been trained so has no known time" if unknown and side_by_side else ""
    )
    return table


def _ended(plan: Plan, home: Home) -> pd.DataFrame:
    """The plan's finished and pruned trials in this home folder; none where nothing of it has run."""
    try:
        return load_results(store_uri(home, plan), plan.name, plan_labels(plan)).ended()
    except InputError:
        return pd.DataFrame(columns=["part", "cell", "row", "name"], dtype=str)


def _training_seconds(plan: Plan, home: Home) -> dict[str, float]:
    """Model -> mean seconds of one training with one seed, on a GPU or not as in the plan, over all plans of the store."""
    uri = store_uri(home, plan)
    if uri == tracking.default_uri(home.path) and not home.database.is_file():
        return {}
    client = tracking.connect(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    means = {}
    for model in dict.fromkeys(row.model for row in plan.rows):
        condition = f"tags.`{tags.MODEL}` = '{model}' AND attributes.status = 'FINISHED'"
        runs = client.search_runs(experiments, condition, max_results=_RUNS)
        alike = [run for run in runs if (float(run.data.tags.get(tags.GPUS, 0)) > 0) == (plan.resources.gpus > 0)]
        spent = [(run.data.metrics["seconds"], run.data.params["seeds"].count(",") + 1) for run in alike]
        if spent:
            means[model] = sum(seconds for seconds, _ in spent) / sum(seeds for _, seeds in spent)
    return means
