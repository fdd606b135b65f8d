"""The command line. Heavy imports happen inside the verbs, so that `study --help` and errors come at once."""

from __future__ import annotations

import logging
import shlex
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from features.domains.domain import Domain
    from study.data.prepare import Inputs
    from study.plan.schema import Plan
    from study.progress import ProgressDisplay, ProgressLines
    from study.study import Study, Summary
    from trainables.interface import Selection

console = Console(emoji=False)  # ":smile:" in a title is text
errors = Console(stderr=True, emoji=False)

PLAN = click.argument("plan")
HOME = click.option(
    "--home", type=click.Path(path_type=Path, file_okay=False), default=Path("runs"), show_default=True,
    help="Folder of everything the study makes: domains, vectors, tasks, MLflow store, reports.",
)  # fmt: skip
DATA = click.option("--data", type=click.Path(path_type=Path), help="Folder that holds the plan's raw files.")
ADDRESS = click.option("--address", help="Ray cluster to run on, e.g. `auto`; default: this machine.")
ONLY = click.option(
    "--only", metavar="ROW", multiple=True, help="Train this row of the plan alone (may be given several times)."
)
REGISTER = click.option(
    "--register", metavar="ROW", multiple=True, help="Also register this rival's winners as models (may be repeated)."
)
REPLACE = click.option(
    "--replace", is_flag=True, help="Put this plan in the place of another one of its name in the home folder."
)
ROW = click.option("--row", metavar="ROW", help="Row of the plan; default: its subject.")
CONCURRENT = click.option(
    "--max-concurrent", type=click.IntRange(1), help="Trials side by side; default: all that fit."
)


def main() -> None:
    """Run a command; a known error is one line on the terminal and exit code 2, an interruption 130."""
    from study.provenance import packages_first

    packages_first()
    from study.engine.machine import direct_to_this_machine
    from study.terminal import prepare_streams

    debug = "--debug" in sys.argv
    prepare_streams()
    for package in ("study", "features"):
        logging.getLogger(package).handlers = [_WarningLines()]
    direct_to_this_machine()
    try:
        cli(prog_name="study", standalone_mode=False)
    except (KeyboardInterrupt, click.exceptions.Abort):  # click makes the second of the first
        errors.print("study: interrupted; what is finished is kept, the same command goes on from here", soft_wrap=True)
        sys.exit(130)
    except click.ClickException as error:
        usage = getattr(error, "ctx", None)
        hint = f"; see `{usage.command_path} --help`" if usage else ""
        errors.print(
            f"study: {error.format_message().rstrip('.')}{hint}", markup=False, highlight=False, soft_wrap=True
        )
        sys.exit(2)
    except Exception as error:
        lines = _known_lines(error)
        if lines is None:
            raise
        if debug:
            traceback.print_exc()
            sys.exit(2)
        for line in lines:
            errors.print(f"study: {line}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


class _WarningLines(logging.Handler):
    """Prints the warnings of our packages, a line each."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        errors.print(f"study: {record.getMessage()}", markup=False, highlight=False, soft_wrap=True)


def _known_lines(error: Exception) -> list[str] | None:
    """Return the lines of an error that users can act on: bad input, what a store or the system says; else None."""
    from features.errors import InputError, one_line
    from search_spaces import SpaceError

    if isinstance(error, InputError | SpaceError):
        return str(error).splitlines()  # a line for each fault
    if isinstance(error, OSError):
        return [one_line(error)]
    if isinstance(
        error, _class_if_imported("mlflow.exceptions", "MlflowException")
    ):  # a store that is not there, or refuses
        return [_without_statement(one_line(error))]
    if isinstance(error, _class_if_imported("sqlalchemy.exc", "SQLAlchemyError")):
        return [f"the store refuses: {_without_statement(one_line(error))}; the same command goes on from here"]
    return None


def _class_if_imported(module: str, name: str) -> type[Exception] | tuple[()]:
    """Return an error class of a module; () where nothing has imported the module, so that no error is of the class."""
    return getattr(sys.modules[module], name) if module in sys.modules else ()


def _without_statement(text: str) -> str:
    """Return a database's message without the SQL that it refused."""
    return text.partition(" [SQL: ")[0]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Hyperparameter studies of diffusion-based cross-domain recommendation.

    PLAN is the name of a plan that comes with the package (`study plans`) or a YAML file.
    """


@cli.command()
@click.option("--copy", metavar="NAME", help="Write this plan to the working directory, to edit and run there.")
def plans(copy: str | None) -> None:
    """List the plans that come with the package."""
    from study.plan.load import FOLDER, copy_plan, shipped_plans

    if copy is not None:
        _line(str(copy_plan(copy, Path.cwd())))
        return
    for name in shipped_plans():
        console.print(f"{name}  [dim]{escape(str(FOLDER / f'{name}.yaml'))}[/dim]", soft_wrap=True)


@cli.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--users", default=1000, show_default=True, help="Users of each domain.")
@click.option("--items", default=800, show_default=True, help="Items of each domain.")
@click.option("--ratings", default=30_000, show_default=True, help="Ratings of each domain.")
@click.option("--overlap", default=500, show_default=True, help="Users that both domains share.")
@click.option("--domains", default="books,movies", show_default=True, help="Names, separated by commas.")
@click.option("--images", default=1.0, show_default=True, help="Share of items with an image file.")
@click.option("--seed", default=0, show_default=True)
def simulate(
    out: Path, users: int, items: int, ratings: int, overlap: int, domains: str, images: float, seed: int
) -> None:
    """Write SIMULATED domains in the Amazon Reviews 2023 layout to the folder OUT."""
    from features.simulate.simulator import DomainSize, SimulateSpec
    from features.simulate.simulator import simulate as write

    size = DomainSize(users=users, items=items, ratings=ratings)
    names = {name.strip(): size for name in domains.split(",") if name.strip()}
    spec = SimulateSpec(domains=names, overlap=overlap, images=images, seed=seed)
    from study.progress import advance_by

    with _watching() as shown:
        write(spec, out, advance_by(shown.start("simulating", spec.rows)))
    console.print(f"{out}: {', '.join(names)}, simulated (seed {seed})", markup=False, soft_wrap=True)


@cli.command()
@PLAN
@DATA
@HOME
@click.option(
    "--cluster",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Also hold this Ray cluster-launcher file against Ray's rules and the plan's resources.",
)
def check(plan: str, data: Path | None, home: Path, cluster: Path | None) -> None:
    """Validate everything, print cells, ranges, trials and cost, and run nothing."""
    from study.plan.load import load_plan
    from study.show import describe

    loaded = load_plan(plan)
    _show_changes(loaded, home)
    side_by_side = None
    if cluster is not None:
        from study.engine.cluster import check_cluster

        checked = check_cluster(cluster, loaded.resources)
        side_by_side = checked.side_by_side
        console.print(checked.line, markup=False, soft_wrap=True)
    for part in describe(loaded, data, home, side_by_side):
        console.print(part, soft_wrap=True)


def _training_options(command: Any) -> Any:
    """The arguments and options of every verb that trains."""
    for option in (CONCURRENT, ADDRESS, ONLY, REPLACE, HOME, DATA, PLAN):
        command = option(command)
    return command


@cli.command()
@PLAN
@DATA
@HOME
@ADDRESS
@REPLACE
@click.option("--dry-run", is_flag=True, help="Read the domains, say what would be extracted and how long it takes.")
def extract(plan: str, data: Path | None, home: Path, address: str | None, replace: bool, dry_run: bool) -> None:
    """Make the domains, feature tables and tasks that the plan needs."""
    from study.data.domains import data_folder, given_split, prepare_domains
    from study.data.preview import extraction_lines
    from study.data.pseudo_items import users_to_generate_for
    from study.data.summary import data_tables

    with _study(plan, data=data, home=home, address=address, replace=replace) as study:
        if dry_run:
            study.quiet()
            domains: Mapping[str, Domain] = prepare_domains(study.plan, data, study.home, study.start_progress)
            for line in extraction_lines(study.plan, domains, study.home, study.cluster):
                _line(line)
        else:
            inputs = _extract(study)
            domains = inputs.domains
            for (cell, feature_set), task in inputs.tasks.items():
                _line(f"{cell} ({feature_set}): {task.task_dir}")
        split = given_split(study.plan, data_folder(study.plan, data, study.home, study.start_progress))
        for part in data_tables(study.plan, domains, split):
            console.print(part, soft_wrap=True)
        for name, users in users_to_generate_for(study.plan, domains, split).items() if dry_run else ():
            _line(f"pseudo-items of {name}: {users:,} users to generate for")


@cli.command()
@_training_options
def search(plan: str, **where: Any) -> None:
    """Search: trials by Optuna through Ray Tune in every cell, for every row, selected on validation."""
    with _study(plan, **where) as study:
        _say(study.search())


@cli.command()
@_training_options
def sweep(plan: str, **where: Any) -> None:
    """Sweeps: one field varied, everything else at the best configuration, or at the plan's `base`."""
    with _study(plan, **where) as study:
        if not study.plan.sweeps:
            raise click.UsageError(f"plan {study.plan.name} has no sweeps; add `sweeps` to it")
        _end([_shown(study.sweep(parameter)) for parameter in study.plan.sweeps])


@cli.command()
@_training_options
def ablate(plan: str, **where: Any) -> None:
    """Ablations: variants of the best configuration, or of the plan's `base`."""
    with _study(plan, **where) as study:
        _say(study.ablate())


@cli.command()
@_training_options
@REGISTER
def score(plan: str, register: tuple[str, ...], **where: Any) -> None:
    """Score: each row's best configuration and the simple baselines on test users."""
    from study.report.claims.judge import counts

    with _study(plan, **where) as study:
        summary = _shown(study.score(register))
        judged = study.claims()
        _claims(counts(judged) if judged else "")
        _end([summary])


@cli.command()
@_training_options
def run(plan: str, **where: Any) -> None:
    """Run all parts of a plan in order; what is done is skipped."""
    with _study(plan, **where) as study:
        _run_all(study)


@cli.command()
@_training_options
def resume(plan: str, **where: Any) -> None:
    """Go on with a study that was begun here: what `run` does, refused where there is nothing to go on with."""
    from features.errors import InputError

    with _study(plan, **where) as study:
        if not any(row.finished or row.failed or row.open for row in study.status()):
            raise InputError(f"plan {study.plan.name}: nothing of it has run in {study.home}; begin with `study run`")
        _run_all(study)


def _run_all(study: Study) -> None:
    _extract(study)  # made, and logged, before any part
    summaries = study.run(_shown)
    if not any(summary.ran for summary in summaries):
        console.print("Nothing was left to train.")
    _report(study, fresh=False)
    _end(summaries)


@cli.command("report")
@PLAN
@HOME
@click.option("--only", metavar="FIGURE", help="Draw one figure anew, by the name of its files.")
def _redraw(plan: str, home: Path, only: str | None) -> None:
    """Redraw figures, tables and claims from MLflow alone."""
    with _study(plan, home=home) as study:
        if only is None:
            _report(study, fresh=True)
        else:
            _line(f"figure  {study.redraw(only)}")


@cli.command()
@PLAN
@HOME
def status(plan: str, home: Path) -> None:
    """Say what is done, running, failed and left."""
    from study.plan.load import load_plan
    from study.study import Study

    table = Table("part", "row", "planned", "finished", "failed", "running", "left")
    for row in Study(load_plan(plan), home=home).status():
        counts = (row.planned, row.finished, row.failed, row.running, row.left)
        table.add_row(row.part, row.row, *map(str, counts))
    console.print(table)


@cli.command()
@PLAN
@HOME
@ROW
@click.option(
    "--export",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also write them to this YAML file, which the `base` of a plan may name.",
)
def best(plan: str, home: Path, row: str | None, export: Path | None) -> None:
    """Print a row's best configuration of each cell: the `base` of a plan that starts from them."""
    from features.errors import InputError
    from study.plan.load import load_plan
    from study.plan.start import fragment
    from study.study import Study

    study = Study(load_plan(plan), home=home)
    name = study.plan.row(row).name if row else study.plan.subject.name
    trials = {cell: trial for (owner, cell), trial in study.best().items() if owner == name}
    if not trials:
        command = shlex.join(["study", "search", plan, "--home", str(home)])
        raise InputError(f"plan {study.plan.name}: no search trial of {name} is finished in {home}; run `{command}`")
    text = fragment(study.plan.name, study.plan.selection.metric, trials)
    _line(text)
    if export:
        export.write_text(text)


@cli.command()
@click.argument("run_id")
@HOME
def rerun(run_id: str, home: Path) -> None:
    """Train a logged trial again from its logged configuration, and lay its metrics beside the logged ones.

    Exit code 1 where they are not the same to the last bit; then what differs from when they were logged is said.
    """
    from study.home import Home
    from study.rerun import rerun as train_again

    found = train_again(run_id, Home(home))
    table = Table("metric", "logged", "now", "difference", title=f"run {run_id}")
    for name, logged, now in found.metrics:
        table.add_row(name, f"{logged:.6f}", f"{now:.6f}", "none" if logged == now else f"{now - logged:+.2g}")
    console.print(table)
    if found.same:
        console.print("the same to the last bit")
        return
    for line in found.differences or (
        "commit, device and versions are as they were logged; the data are not compared",
    ):
        _line(f"differs: {line}")
    sys.exit(1)


@cli.command()
@PLAN
@HOME
@click.option("--user", required=True, help="Id of a user who has a history in the source domain.")
@click.option("--cell", help="Cell whose registered model is asked; default: the first that knows the user.")
@click.option("-n", "count", type=click.IntRange(1), default=10, show_default=True, help="Items to recommend.")
@ROW
def recommend(plan: str, home: Path, user: str, cell: str | None, count: int, row: str | None) -> None:
    """Show a user's source-domain history and the best target-domain items, by the registered model."""
    from features.errors import InputError
    from study.home import Home
    from study.plan.load import load_plan
    from study.study import Study

    if not Home(home).tasks.is_dir():
        raise InputError(f"{Home(home)}: holds no study; run one there first, or name another --home")
    found = Study(load_plan(plan), home=home).recommend(user, cell, count, row)
    known = Table("item", "title", title=Text(f"{user} has, in the source domain (oldest first)"))
    for item, title in found.history.itertuples(index=False):
        known.add_row(Text(item), Text(title))
    recommended = Table("", "item", "title", "score", title=f"{found.cell}: the best {len(found.items)}")
    for number, (item, title, score) in enumerate(found.items.itertuples(index=False), start=1):
        recommended.add_row(str(number), Text(item), Text(title), f"{score:.3f}")
    for table in (known, recommended):
        console.print(table, markup=False)
    console.print(f"model  models:/{found.model}@best (version {found.version})", markup=False, soft_wrap=True)


@cli.command()
@click.argument("plan", required=False)
@HOME
@click.option("--port", type=click.IntRange(0, 65535), default=5000, show_default=True, help="0: any that is free.")
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen on; this machine alone unless told."
)
def ui(plan: str | None, home: Path, port: int, host: str) -> None:
    """Open MLflow on the store of the home folder, and print links to its views, of PLAN alone where it is given."""
    from features.errors import InputError
    from study.home import Home
    from study.plan.load import load_plan
    from study.study import named_uri, store_uri
    from study.tracking.addresses import is_server, without_password
    from study.tracking.ui import serve

    loaded = load_plan(plan) if plan else None
    uri = store_uri(Home(home), loaded)
    if is_server(uri):
        raise InputError(f"{without_password(uri)}: is a server with a UI of its own; open it in a browser")
    if named_uri(loaded) is None and not Home(home).database.is_file():
        raise InputError(
            f"{home}: holds no MLflow store; run a study there first, name another --home, or a store in "
            "MLFLOW_TRACKING_URI"
        )
    serve(uri, Home(home), host=host, port=port, plan=loaded.name if loaded else None, say=_line)


# --- what is seen -------------------------------------------------------------------------------------------------


def _extract(study: Study) -> Inputs:
    """Make what trials read, and say which feature tables are not whole."""
    from features.extraction.spec import shortfall

    inputs = study.extract()
    for name, table in inputs.tables.items():
        if (missing := shortfall(table)) is not None:
            _line(f"features of {name}: {missing}")
    return inputs


def _say(summary: Summary) -> None:
    """Show what a verb did, and end with exit code 1 where trials have failed."""
    _end([_shown(summary)])


def _end(summaries: Sequence[Summary]) -> None:
    failed = sum(len(summary.failures) for summary in summaries)
    if failed:
        errors.print(f"study: {failed} trials failed; MLflow has their reasons; the same command tries them again")
        sys.exit(1)


def _shown(summary: Summary) -> Summary:
    done = f"{summary.ran} trials run" if summary.ran else "nothing left to do"
    failed = f", [red]{len(summary.failures)} failed[/red]" if summary.failures else ""
    console.print(f"[bold]{summary.part}[/bold]: {summary.planned} planned, {done}{failed}")
    for failure in summary.failures[:5]:
        console.print(f"  {failure.trial}: {failure.reason}", markup=False, soft_wrap=True)
    if summary.stopped:
        console.print(f"  {summary.stopped}; a larger budget goes on where this one stopped", soft_wrap=True)
    for note in summary.notes:
        _line(f"  {note}")
    if summary.superseded:
        console.print(
            f"  {summary.superseded} runs that the plan no longer asks for are left out; they count again when it does"
        )
    return summary


def _report(study: Study, *, fresh: bool) -> None:
    """Draw the report, unless it shows the study as it is; print the table, the figures and the way on."""
    from features.errors import InputError
    from study.report.claims.judge import counts
    from study.report.comparison_table import TABLE_WIDTH, summary_table
    from study.report.report import current
    from study.tracking import tags

    page = study.report_folder / "report.html"
    results, comparison = None if fresh else study.results(), None
    drawn = None if results is None else current(results, study.report_folder)
    if results is None or drawn is None:
        advance = study.start_progress("drawing the report", 0)
        made = study.report(lambda done, total: advance(done))
        results, comparison = made.results, made.comparison
        _claims(counts(made.claims) if made.claims else "")
        if made.unlogged:
            console.print(made.unlogged, markup=False, soft_wrap=True)
    else:
        _claims(drawn[tags.CLAIMS])
    try:
        wide = Console(
            file=console.file, width=max(console.width, TABLE_WIDTH), soft_wrap=True
        )  # rich would cut numbers
        wide.print(summary_table(results, comparison))
    except InputError as missing:
        console.print(str(missing), markup=False, soft_wrap=True)
    for path in sorted((study.report_folder / "figures").glob("*.png")):
        _line(f"figure  {path}")
    _line(f"report  {page}")
    _line(f"MLflow  {_way_to_mlflow(study)}")
    journal = study.home.journal(study.plan.name)
    if journal.is_file():
        _line(f"Optuna  optuna-dashboard {shlex.quote(str(journal))}")


def _way_to_mlflow(study: Study) -> str:
    """What opens the study's store: a server's address, or a command."""
    from study.study import store_uri
    from study.tracking.addresses import without_password

    uri = study.tracking_uri
    if uri.startswith("http"):
        return without_password(uri)
    if uri == store_uri(study.home):
        return shlex.join(["study", "ui", study.named, "--home", str(study.home)])
    return shlex.join(["mlflow", "ui", "--backend-store-uri", without_password(uri)])


def _claims(counted: str) -> None:
    """How many of the paper's claims hold, in a line."""
    if counted:
        console.print(f"claims: {counted} (study report)", soft_wrap=True)


@contextmanager
def _watching(selection: Selection | None = None) -> Iterator[ProgressDisplay | ProgressLines]:
    """Show progress for the time of the block: bars on a terminal, lines elsewhere."""
    from study.progress import LiveBars, ProgressDisplay, ProgressLines

    if console.is_terminal:
        with LiveBars(console) as bars:
            yield ProgressDisplay(bars)
        return
    lines = ProgressLines(_line, selection)
    with lines.ticking():
        yield lines


def _line(text: str) -> None:
    """Print a line as it is, however long."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _show_changes(plan: Plan, home: Path) -> None:
    from study.plan.diff import changes

    for line in changes(plan, home):
        _line(f"changed since the last run: {line}")


@contextmanager
def _study(
    plan: str, *, home: Path, data: Path | None = None, address: str | None = None, max_concurrent: int | None = None,
    only: Sequence[str] = (), replace: bool = False,
) -> Iterator[Study]:  # fmt: skip
    from study.engine.machine import user_folders

    user_folders(home)  # before packages are imported that look for their caches

    from study.home import Home
    from study.plan.load import full_name, load_plan
    from study.specs import Cluster
    from study.study import Study

    loaded, named = load_plan(plan), full_name(plan)
    _show_changes(loaded, home)
    log = Home(home).ray_log(loaded.name)
    resume = shlex.join(
        ["study", "resume", named, "--home", str(home.absolute()), *(["--data", str(data)] if data else [])]
    )
    cluster = Cluster(address=address, max_concurrent=max_concurrent, log=log, resume=resume)
    with _streams(log), _watching(loaded.selection) as shown:
        yield Study(
            plan, home=home, data=data, only=only, replace=replace, cluster=cluster, start_progress=shown.start,
            show_jobs=shown.show_jobs,
        )  # fmt: skip


@contextmanager
def _streams(log: Path) -> Iterator[None]:
    """Keep the terminal for what this file prints; what libraries print goes to the log."""
    from study.terminal import only_ours

    with only_ours(log) as (out, err):
        console.file, errors.file = out, err
        try:
            yield
        finally:
            # None: where `sys.stdout` and `sys.stderr` go at the time.
            console.file = errors.file = None  # type: ignore[assignment]
