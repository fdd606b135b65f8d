"""The report of a study, made from its MLflow store alone: figures, tables, one HTML page; logged back to the store.

What the store lacks is listed as missing; failed and unfinished trials are counted and named. The same store gives the
same bytes: no date, no random number, a fixed order.
"""

from __future__ import annotations

import base64
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow import MlflowClient
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from features.errors import InputError
from study import drawing, figures, tables
from study.claims import Judged, judge
from study.claims_tables import claims_table, contrasts_table
from study.comparison import Comparison, compare
from study.figures import Figure
from study.results import TAG, Results, load_results
from study.subject import Subject
from study.tables import Table

PAGE = "report.html"
DRAWN_FROM = f"{TAG}drawn_from"  # tag of the report run: the trials it shows
_FOLDERS = ("figures", "tables")
_CSS = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #1f2937; background: #fff; max-width: 68rem; margin: 0 auto;
  padding: 1.5rem; }
h1, h2 { line-height: 1.25; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #d1d5db; padding-bottom: .25rem; }
.banner { background: #fef3c7; border-left: 4px solid #b45309; padding: .6rem 1rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; }
dt { font-weight: 600; } dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 2rem 0; } img { max-width: 100%; height: auto; }
figcaption, .note { color: #4b5563; font-size: .9rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; margin: 1.5rem 0 .5rem; }
caption { text-align: left; font-weight: 600; padding-bottom: .4rem; }
th, td { padding: .3rem .7rem; text-align: left; border-bottom: 1px solid #e5e7eb; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
code { background: #f3f4f6; padding: .1rem .3rem; }
"""


@dataclass(frozen=True)
class ReportResult:
    """What `report` wrote and logged."""

    out: Path
    page: Path
    figures: tuple[Path, ...]  # the PNGs
    tables: tuple[Path, ...]  # the Markdown files
    missing: tuple[str, ...]
    run_id: str
    comparison: Comparison | None  # for the table that a study ends with; None where nothing is scored
    claims: tuple[Judged, ...]


@dataclass
class _Content:
    """What has been made so far."""

    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    comparison: Comparison | None = None
    claims: tuple[Judged, ...] = ()


def report(
    tracking_uri: str,
    experiment: str,
    subject: Subject,
    out: Path,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> ReportResult:
    """Write figures/, tables/ and report.html to `out` and log them as the study's report run.

    `progress(done, total)` is called after each figure and table. Raises InputError where the store does not hold the
    experiment; anything else that is lacking is listed in `missing`.
    """
    results = load_results(tracking_uri, experiment, subject)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".report-") as name:
        staged = Path(name)
        for folder in _FOLDERS:
            (staged / folder).mkdir()
        content = _make(results, progress or (lambda done, total: None), staged)
        (staged / PAGE).write_text(_page(results, content, staged / "figures"), encoding="utf-8")
        with _report_run(tracking_uri, experiment, results) as (client, run_id):
            _log(client, tracking_uri, run_id, staged)
        _move(staged, out)
    return ReportResult(
        out=out,
        page=out / PAGE,
        figures=tuple(out / "figures" / f"{figure.head.name}.png" for figure in content.figures),
        tables=tuple(out / "tables" / f"{table.name}.md" for table in content.tables),
        missing=tuple(content.missing),
        run_id=run_id,
        comparison=content.comparison,
        claims=content.claims,
    )


def is_current(results: Results, out: Path) -> bool:
    """Whether the report in `out` shows the trials as they stand now."""
    client = MlflowClient(results.tracking_uri)
    found = client.get_experiment_by_name(results.experiment)
    if found is None or not (out / PAGE).is_file():
        return False
    runs = client.search_runs([found.experiment_id], f"tags.`{TAG}trial` = 'report'")
    return any(run.info.status == "FINISHED" and run.data.tags.get(DRAWN_FROM) == results.digest for run in runs)


def _make(results: Results, progress: Callable[[int, int], None], staged: Path) -> _Content:
    content, subject = _Content(), results.subject

    def compared() -> Table:
        content.comparison = compare(results)
        return tables.comparison_table(content.comparison, results)

    def claims() -> Table:
        content.claims = tuple(judge(results))
        return claims_table(results, content.claims)

    def beside_published() -> Table:
        return tables.published_table(results, content.comparison or compare(results))

    asked = [name for name, look in subject.figures.items() if look.name]
    swept = [*asked, *(name for name in results.sweeps() if name not in asked)]
    searched = sorted(str(cell) for cell in results.finished("search")["cell"].unique())
    judged: list[Callable[[], Figure | Table]] = [claims, lambda: contrasts_table(results, content.claims)]
    makers: list[Callable[[], Figure | Table]] = [
        *(judged if subject.paper else []),
        partial(tables.domains_table, results),
        partial(tables.splits_table, results),
        compared,
        *([beside_published] if subject.published else []),
        partial(tables.ablation_table, results),
        *([partial(tables.cold_item_table, results)] if subject.kind.cold_items else []),
        *([partial(tables.full_ranking_table, results)] if subject.kind.full else []),
        *([partial(tables.pseudo_table, results)] if results.pseudo else []),
        *(partial(figures.sensitivity, results, name) for name in swept),
        *(partial(make, results) for make in (figures.importance, figures.history, figures.curves)),
        *(partial(figures.parallel, results, cell) for cell in searched),
    ]
    for done, make in enumerate(makers, start=1):
        try:
            made = make()
        except InputError as error:  # the page lists it
            content.missing.append(str(error))
        else:
            if isinstance(made, Table):
                made.save(staged / "tables")
                content.tables.append(made)
            else:
                drawing.save(made, staged / "figures")
                content.figures.append(made)
        progress(done, len(makers))
    return content


@contextmanager
def _report_run(tracking_uri: str, experiment: str, results: Results) -> Iterator[tuple[MlflowClient, str]]:
    """The study's one report run, continued where there is one; FINISHED at the end, FAILED where the body raises."""
    client = MlflowClient(tracking_uri)
    found = client.get_experiment_by_name(experiment)
    assert found is not None, "the results were read from it"
    runs = client.search_runs([found.experiment_id], f"tags.`{TAG}trial` = 'report'", order_by=["start_time ASC"])
    if runs:
        run_id = str(runs[0].info.run_id)
        client.update_run(run_id, status="RUNNING")
    else:
        tags = {f"{TAG}part": "report", f"{TAG}trial": "report"}
        run_id = str(client.create_run(found.experiment_id, tags=tags, run_name="report").info.run_id)
    client.set_tag(run_id, DRAWN_FROM, results.digest)
    client.set_tag(run_id, f"{TAG}simulated", str(results.simulated).lower())
    status = "FAILED"
    try:
        yield client, run_id
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        client.set_terminated(run_id, status)


def _log(client: MlflowClient, tracking_uri: str, run_id: str, staged: Path) -> None:
    """Log the files, and remove those of an earlier report that this one does not have."""
    client.log_artifacts(run_id, str(staged))
    kept = {path.relative_to(staged).as_posix() for path in staged.rglob("*")}
    stale = [
        entry.path for folder in _FOLDERS for entry in client.list_artifacts(run_id, folder) if entry.path not in kept
    ]
    repository: Any = get_artifact_repository(client.get_run(run_id).info.artifact_uri, tracking_uri)
    for path in stale:
        repository.delete_artifacts(path)


def _move(staged: Path, out: Path) -> None:
    for name in (*_FOLDERS, PAGE):
        if (out / name).is_dir():
            shutil.rmtree(out / name)
        os.replace(staged / name, out / name)


def _page(results: Results, content: _Content, folder: Path) -> str:
    title = f"Study {escape(results.experiment)}"
    banner = '<p class="banner">Simulated data: nothing on this page says anything about real users.</p>\n'
    sections = [
        _section("State", _state(results)),
        _section("Missing", _list(content.missing)) if content.missing else "",
        _section("Tables", "".join(_table(table) for table in content.tables)),
        _section("Figures", "".join(_figure(figure, folder) for figure in content.figures)),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<header>\n<h1>{title}</h1>\n"
        f"{banner if results.simulated else ''}{_facts(results)}</header>\n<main>\n{''.join(sections)}</main>\n"
        "</body>\n</html>\n"
    )


def _section(heading: str, body: str) -> str:
    return f"<section>\n<h2>{heading}</h2>\n{body}</section>\n" if body else ""


def _facts(results: Results) -> str:
    facts = {"Remade by": f"study report {results.experiment}"}
    facts |= {name.replace("_", " ").capitalize(): ", ".join(values) for name, values in results.tags.items() if values}
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items()) + "</dl>\n"


def _state(results: Results) -> str:
    """Trials per part and status; those that failed or are unfinished by name."""
    trials = results.trials
    if trials.empty:
        return "<p>No trial has been logged.</p>\n"
    counts = trials.groupby(["part", "status"]).size().unstack(fill_value=0)
    frame = counts.reset_index().rename(columns=lambda name: str(name).capitalize())
    body = _grid("Trials per part and status", frame)
    lines = []
    for _, row in trials[trials["status"] != "FINISHED"].sort_values(["part", "cell", "name"]).iterrows():
        reason = f": {row['error']}" if row["error"] else ""
        lines.append(f"{row['part']} {row['cell']} {row['name']} is {row['status']}{reason}")
    lines += [f"{name} finished more than once; its newest run counts" for name in results.duplicates]
    if results.foreign:
        lines.append(f"{results.foreign} runs of this experiment were not logged by a study and are left out")
    return body + _list(lines)


def _list(lines: Sequence[str]) -> str:
    return "<ul>\n" + "".join(f"<li>{escape(line)}</li>\n" for line in lines) + "</ul>\n" if lines else ""


def _table(table: Table) -> str:
    notes = "".join(f'<p class="note">{escape(note)}</p>\n' for note in table.notes)
    return (
        _grid(table.caption, table.shown)
        + notes
        + f'<p class="note">Numbers: <code>tables/{table.name}.csv</code></p>\n'
    )


def _grid(caption: str, frame: pd.DataFrame) -> str:
    head = "".join(f'<th scope="col">{escape(str(name))}</th>' for name in frame.columns)
    rows = "".join(
        "<tr>" + "".join(f"<td>{_cell(str(cell))}</td>" for cell in row) + "</tr>\n"
        for row in frame.itertuples(index=False)
    )
    return (
        f'<div class="scroll"><table>\n<caption>{escape(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{rows}</tbody>\n</table></div>\n"
    )


def _cell(text: str) -> str:
    return re.sub(r"^\*\*(.*)\*\*$", r"<strong>\1</strong>", escape(text))


def _figure(figure: Figure, folder: Path) -> str:
    data = base64.b64encode((folder / f"{figure.head.name}.png").read_bytes()).decode("ascii")
    notes = " ".join(escape(note) for note in figure.head.notes)
    return (
        f'<figure>\n<img alt="{escape(figure.head.alt)}" src="data:image/png;base64,{data}">\n'
        f"<figcaption>{escape(figure.head.title)}. {notes} Points: <code>figures/{figure.head.name}.csv</code>"
        "</figcaption>\n</figure>\n"
    )
