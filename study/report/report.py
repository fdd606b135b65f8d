"""The report of a study, made from its MLflow store alone: figures, tables, one HTML page; logged back to the store.

What the store lacks is listed as missing; failed and unfinished trials are counted and named. The same store gives the
same bytes: no date, no random number, a fixed order.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from features.errors import InputError, one_line
from features.store.tables import digest
from study.labels import Labels
from study.provenance import commit
from study.report import drawing, tables
from study.report.claims.judge import Judged, counts, judge, unread
from study.report.claims.tables import UNTESTED, claims_table, contrasts_table, untested_table
from study.report.comparison import Comparison, compare
from study.report.comparison_table import comparison_table, difference_table, full_ranking_table
from study.report.cost import cost_table
from study.report.figures import Figure, search, tradeoffs
from study.report.figures.common import row_name
from study.report.figures.sensitivity import sensitivity
from study.report.findings import findings
from study.report.page import Content, page
from study.report.table import Table
from study.tracking import tags
from study.tracking.addresses import without_password
from study.tracking.results import Results, TooFewError, UnreadError, load_results

PAGE = "report.html"
_FOLDERS = ("figures", "tables")


@dataclass(frozen=True)
class ReportResult:
    """What `report` wrote and logged."""

    out: Path
    page: Path
    figures: tuple[Path, ...]  # the PNGs
    tables: tuple[Path, ...]  # the Markdown files
    missing: tuple[str, ...]
    run_id: str  # empty where the report could not be logged
    unlogged: str  # why that is, in one line
    results: Results  # that it was made from
    comparison: Comparison | None  # for the table that a study ends with; None where nothing is scored
    claims: tuple[Judged, ...]


@dataclass
class _Content:
    """What has been drawn so far."""

    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    few: list[str] = field(default_factory=list)
    unread: bool = False
    """Whether something could not be made because a part of the store cannot be read."""
    comparison: Comparison | None = None
    claims: tuple[Judged, ...] = ()


def report(
    tracking_uri: str,
    experiment: str,
    labels: Labels,
    out: Path,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> ReportResult:
    """Write figures/, tables/ and report.html to `out` and log them as the study's report run.

    `progress(done, total)` is called after each figure and table. Raises InputError where the store does not hold the
    experiment; anything else that is lacking is listed in `missing`. What cannot be logged is in `out` all the same.
    """
    results = load_results(tracking_uri, experiment, labels)
    if results.trials.empty and (out / PAGE).is_file():
        raise InputError(
            f"report: {without_password(tracking_uri)} holds no trial of {experiment}; the last report stays in {out}; "
            "name the home folder or the store that has them"
        )
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".report-") as name:
        staged = Path(name)
        for folder in _FOLDERS:
            (staged / folder).mkdir()
        content = _make(results, progress or (lambda done, total: None), staged)
        cost = _cost(results, staged)
        found = findings(labels, content.claims, content.comparison)
        all_ = Content(
            figures=content.figures, tables=content.tables, findings=found, missing=content.missing,
            few=content.few, cost=cost,
        )  # fmt: skip
        (staged / PAGE).write_text(page(results, all_, staged / "figures"), encoding="utf-8")
        if content.unread:
            _keep_old(out, staged, figure_names(results))
        _move(staged, out)
    run_id = unlogged = ""
    try:
        with _silent_database(), _report_run(results, content.claims) as (client, run_id):
            _log(client, tracking_uri, run_id, out)
    except (MlflowException, OSError) as error:
        run_id = ""
        reason = one_line(error, 300)
        unlogged = f"MLflow at {without_password(tracking_uri)} does not take the report ({reason}); only {out} has it"
    return ReportResult(
        out=out,
        page=out / PAGE,
        figures=tuple(out / "figures" / f"{figure.head.name}.png" for figure in content.figures),
        tables=tuple(out / "tables" / f"{table.name}.md" for table in content.tables),
        missing=tuple(content.missing),
        run_id=run_id,
        unlogged=unlogged,
        results=results,
        comparison=content.comparison,
        claims=content.claims,
    )


def redraw(tracking_uri: str, experiment: str, labels: Labels, out: Path, name: str) -> Path:
    """Draw one figure anew, by the name of its files; the page and MLflow keep theirs. Returns the PNG."""
    results = load_results(tracking_uri, experiment, labels)
    named = _figures(results)
    if name not in named:
        raise InputError(f"report: no figure {name!r}; choose from {', '.join(named)}")
    figure = named[name]()
    (out / "figures").mkdir(parents=True, exist_ok=True)
    return drawing.save(figure, out / "figures")["png"]


def figure_names(results: Results) -> list[str]:
    """Return the names that `redraw` takes."""
    return list(_figures(results))


_SEARCHED: Mapping[str, Callable[[Results, str], Figure]] = {
    "importance": search.importance,
    "history": search.history,
    "learning_curves": search.curves,
    "pareto": tradeoffs.pareto,
    "cost_quality": tradeoffs.cost,
}


def _figures(results: Results) -> dict[str, Callable[[], Figure]]:
    """Return every figure of the study by the name of its files, in the order of the page.

    The search of the subject is drawn in all figures, that of its rivals in its history alone.
    """
    labels = results.labels
    asked = [name for name, look in labels.figures.items() if look.name and labels.asks_for(f"sweep:{name}")]
    swept = [*asked, *(name for name in results.sweeps() if name not in asked)]
    figures: dict[str, Callable[[], Figure]] = {}
    for name in swept:
        look = labels.figures.get(name)
        figures[look.name if look and look.name else f"sensitivity_{name}"] = partial(sensitivity, results, name)
    figures |= {name: partial(draw, results, labels.model) for name, draw in _SEARCHED.items()}
    searched = results.finished("search", labels.model)
    for cell in sorted(str(cell) for cell in searched["cell"].unique()):
        figures[search.parallel_name(cell)] = partial(search.parallel, results, labels.model, cell)
    rivals = [row for row in results.rows_in("search") if row != labels.model]
    return figures | {row_name("history", results, row): partial(search.history, results, row) for row in rivals}


def _cost(results: Results, staged: Path) -> Table | None:
    table = cost_table(results)
    if table is not None:
        table.save(staged / "tables")
    return table


def current(results: Results, out: Path) -> Mapping[str, str] | None:
    """Return the tags of the report run whose page is in `out`; None where the page would be another one now."""
    client = MlflowClient(results.tracking_uri)
    stored = client.get_experiment_by_name(results.experiment)
    if stored is None or not (out / PAGE).is_file():
        return None
    runs = client.search_runs([stored.experiment_id], f"tags.`{tags.TRIAL}` = 'report'")
    finished = (run.data.tags for run in runs if run.info.status == "FINISHED")
    now = _drawn_from(results)
    return next((run_tags for run_tags in finished if run_tags.get(tags.DRAWN_FROM) == now), None)


def _drawn_from(results: Results) -> str:
    """Return a hash of all that a report is made from: trials, data, what was published, and the code."""
    labels, trials = results.labels, results.trials
    return digest(
        {
            "trials": sorted(trials["run_id"] + " " + trials["status"]),
            "others": [results.foreign, results.domains, results.cells, results.pseudo, results.lost, results.way],
            "published": [repr(labels.published), repr(labels.paper)],
            "rows": [repr(row) for row in labels.rows.values()],
            "parts": labels.parts,
            "commit": commit(),
        }
    )


def _make(results: Results, progress: Callable[[int, int], None], staged: Path) -> _Content:
    labels = results.labels
    claims = tuple(judge(results))
    lost = [*results.lost, *unread(claims)]
    content = _Content(missing=lost, unread=bool(lost), claims=claims)

    def compared() -> Table:
        content.comparison = compare(results)
        return comparison_table(content.comparison, results)

    def less_printed() -> Table:
        return difference_table(results, content.comparison or compare(results))

    behind = [partial(contrasts_table, results, claims)]
    if any(one.verdict in UNTESTED for one in claims):
        behind.append(partial(untested_table, results, claims))
    makers: list[Callable[[], Figure | Table]] = [
        *([partial(claims_table, results, claims)] if labels.paper else []),
        *(behind if claims else []),
        compared,
        *([less_printed] if labels.published else []),
        partial(tables.domains_table, results),
        partial(tables.splits_table, results),
        *([partial(tables.ablation_table, results)] if labels.asks_for("ablate") else []),
        *([partial(tables.cold_item_table, results)] if labels.task_type.cold_items else []),
        *([partial(full_ranking_table, results)] if labels.task_type.full else []),
        *([partial(tables.pseudo_table, results)] if results.pseudo else []),
        *_figures(results).values(),
    ]
    for done, make in enumerate(makers, start=1):
        try:
            item = make()
        except InputError as error:  # the page lists it
            (content.few if isinstance(error, TooFewError) else content.missing).append(str(error))
            content.unread |= isinstance(error, UnreadError)
        else:
            if isinstance(item, Table):
                item.save(staged / "tables")
                content.tables.append(item)
            else:
                drawing.save(item, staged / "figures")
                content.figures.append(item)
        progress(done, len(makers))
    return content


@contextmanager
def _silent_database() -> Iterator[None]:
    """Keep MLflow's own words on a database that refuses, a traceback of a page, from the terminal."""
    logger = logging.getLogger("mlflow.store.db")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def _report_run(results: Results, claims: Sequence[Judged]) -> Iterator[tuple[MlflowClient, str]]:
    """Open the study's one report run, continued where there is one; FINISHED at the end, FAILED where the body raises."""
    client = MlflowClient(results.tracking_uri)
    stored = client.get_experiment_by_name(results.experiment)
    assert stored is not None, "the results were read from it"
    runs = client.search_runs([stored.experiment_id], f"tags.`{tags.TRIAL}` = 'report'", order_by=["start_time ASC"])
    if runs:
        run_id = str(runs[0].info.run_id)
        client.update_run(run_id, status="RUNNING")
    else:
        named = {tags.PART: "report", tags.TRIAL: "report"}
        run_id = str(client.create_run(stored.experiment_id, tags=named, run_name="report").info.run_id)
    client.set_tag(run_id, tags.DRAWN_FROM, _drawn_from(results))
    client.set_tag(run_id, tags.CLAIMS, counts(claims) if claims else "")
    client.set_tag(run_id, tags.SIMULATED, str(results.simulated).lower())
    status = "FAILED"
    try:
        yield client, run_id
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        client.set_terminated(run_id, status)


def _log(client: MlflowClient, tracking_uri: str, run_id: str, out: Path) -> None:
    """Log the files, and remove those of an earlier report that this one does not have."""
    client.log_artifact(run_id, str(out / PAGE))
    for folder in _FOLDERS:
        client.log_artifacts(run_id, str(out / folder), folder)
    kept = {path.relative_to(out).as_posix() for folder in _FOLDERS for path in (out / folder).iterdir()}
    stale = [
        entry.path for folder in _FOLDERS for entry in client.list_artifacts(run_id, folder) if entry.path not in kept
    ]
    repository: Any = get_artifact_repository(client.get_run(run_id).info.artifact_uri, tracking_uri)
    for path in stale:
        repository.delete_artifacts(path)


def _keep_old(out: Path, staged: Path, figures: Sequence[str]) -> None:
    """Put beside the new files those of the last report that this one lacks: they may not be made again."""
    for folder in _FOLDERS:
        for path in (out / folder).glob("*"):
            asked = folder == "tables" or path.stem in figures
            if asked and not (staged / folder / path.name).exists():
                shutil.copy2(path, staged / folder / path.name)


def _move(staged: Path, out: Path) -> None:
    for name in (*_FOLDERS, PAGE):
        if (out / name).is_dir():
            shutil.rmtree(out / name)
        os.replace(staged / name, out / name)
