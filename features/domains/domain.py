"""Domains: raw files -> readers -> duplicates merged -> filters -> a content-addressed folder of parquet.

A prepared domain is `store/<name>-<key[:12]>/` with `interactions.parquet` (user_id, item_id, rating, text, timestamp;
sorted, each pair once), `items.parquet` (item_id, title, description, categories, image), `users.parquet` (user_id,
interactions) and `manifest.json`. The key hashes the source files and the spec: a changed input is prepared anew, an
unchanged one never again. The folder appears whole or not at all.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features.checks import choice, refuse
from features.domains.database import open_database
from features.domains.filters import ITEM_FLAGS, FilterSpec, apply_filters, one_number
from features.domains.layouts import COLUMNS, LAYOUTS
from features.domains.notes import Notes
from features.domains.profile import find_clock, profile_kept, profile_raw
from features.domains.readers import INTERACTIONS, ITEMS, READERS, read_interactions, read_items
from features.errors import InputError
from features.progress import AdvanceBy
from features.store.external_sort import external_sort
from features.store.folders import SIMULATED, whole_folder, work_folder, write_json
from features.store.tables import digest

VERSION = 2  # of the folder's contents; part of the key
TABLE = pa.schema([*(field for field in INTERACTIONS if field.name != "words")]).set(
    2, pa.field("rating", pa.float32())
)
DUPLICATES = ("mean", "last", "first", "keep")
FEEDBACK = ("explicit", "implicit")
CATALOGUES = ("used", "listed")


@dataclass(frozen=True, kw_only=True)
class DomainSpec:
    """One domain: which files, how to read them, what to keep."""

    name: str  # letters, digits, - and _
    reader: str  # a layout: amazon2014 | amazon2018 | amazon2023 | goodreads | yelp | recbole | table
    interactions: str | tuple[str, ...]  # files of interactions, relative to the data folder; a name may be a pattern
    items: str | tuple[str, ...] | None = None  # files of items (metadata); they may hold those of other domains too
    columns: Mapping[str, str] = field(default_factory=dict)  # our column name -> the file's
    item_columns: Mapping[str, str] = field(default_factory=dict)  # the same for items, where it is not as in `columns`
    header: tuple[str, ...] = ()  # names of the columns of interactions that come as text without a header
    where: Mapping[str, str] = field(default_factory=dict)  # the file's column -> the value of rows to read
    feedback: str = "explicit"  # explicit: ratings | implicit: none are read, the rating is null
    duplicates: str = (
        # of the same (user, item): mean rating with the last text | last | first (by time, then line) | keep: each that
        # has a time of its own, for sequences
        "mean"
    )
    catalogue: str = "used"  # used: the items that have an interaction | listed: all that the items file lists
    rating_scale: tuple[float, float] = (1.0, 5.0)  # lowest and highest rating allowed
    unrated: tuple[float, ...] | None = None  # ratings that mean none; None: the layout's
    filters: FilterSpec = field(default_factory=FilterSpec)

    def __post_init__(self) -> None:
        if not self.name or not self.name.replace("-", "").replace("_", "").isalnum():
            raise InputError(f"domain name {self.name!r}: use letters, digits, - and _ only")
        scale = tuple(self.rating_scale)
        numbers = all(isinstance(bound, int | float) and not isinstance(bound, bool) for bound in scale)
        refuse(
            choice(self, "reader", READERS),
            *(choice(self, "duplicates", DUPLICATES), choice(self, "feedback", FEEDBACK)),
            choice(self, "catalogue", CATALOGUES),
            "catalogue is 'listed', but no items file is given; set items"
            if self.listed and self.items is None
            else "",
            *self._file_faults(),
            *self._column_faults(),
            ""
            if numbers and len(scale) == 2 and scale[0] < scale[1]
            else f"rating_scale is {list(scale)}; give the lowest and the highest rating, in order",
            place=f"domains.{self.name}.",
        )
        object.__setattr__(self, "rating_scale", (float(scale[0]), float(scale[1])))

    def _file_faults(self) -> Iterator[str]:
        """Yield the faults of files and of the rows that are chosen."""
        for kind in ("interactions", "items"):
            names = self.files(kind)
            if (kind == "interactions" and not names) or not all(names) or len(set(names)) < len(names):
                yield f"{kind} is {list(names)}; name at least one file, each once"
        for column, value in self.where.items():
            if not isinstance(value, str):
                yield f"where.{column} is {value!r}; give the value as text, in quotes"
        if len(set(self.header)) < len(self.header):
            yield f"header names {', '.join(sorted({name for name in self.header if self.header.count(name) > 1}))} twice"

    def _column_faults(self) -> Iterator[str]:
        """Yield the faults of `columns` and `item_columns`: unknown names, and columns that are not read."""
        ours = dict.fromkeys((*COLUMNS["interactions"], *COLUMNS["items"]))
        for name in self.columns:
            if name not in ours:
                yield f"columns: unknown {name!r}; choose from {', '.join(ours)}"
            elif self.items is None and name not in COLUMNS["interactions"]:
                yield f"columns: {name} is a column of items, but no items file is given; set items"
        for name in self.item_columns:
            if name not in COLUMNS["items"]:
                yield f"item_columns: unknown {name!r}; choose from {', '.join(COLUMNS['items'])}"
            elif self.items is None:
                yield f"item_columns: {name} is a column of items, but no items file is given; set items"
        if self.implicit and "rating" in self.columns:
            yield "columns: rating is not read where feedback is implicit; leave one of them out"

    def files(self, kind: str) -> tuple[str, ...]:
        """Return names and patterns of the files of `interactions` or `items`."""
        names: str | tuple[str, ...] | None = getattr(self, kind)
        return (names,) if isinstance(names, str) else tuple(names or ())

    @property
    def no_rating(self) -> tuple[float, ...]:
        """Ratings that mean none: those that the plan names, else the layout's."""
        return LAYOUTS[self.reader].unrated if self.unrated is None else tuple(map(float, self.unrated))

    @property
    def listed(self) -> bool:
        """Whether items without interactions belong to the domain."""
        return self.catalogue == "listed"

    @property
    def implicit(self) -> bool:
        """Whether the data holds what users did, but no ratings."""
        return self.feedback == "implicit"


@dataclass(frozen=True, kw_only=True)
class Domain:
    """A prepared domain on disk."""

    name: str
    path: Path  # its folder
    key: str  # sha256 over sources and spec
    simulated: bool  # the raw files are of features.simulate.simulator
    rating_scale: tuple[float, float]
    manifest: Mapping[str, Any]

    def interactions(self, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """Return user_id, item_id, rating (float32), text, timestamp; sorted by user and item, each pair once.

        All ratings of implicit feedback are NaN.
        """
        return self._read("interactions", columns)

    def items(self) -> pd.DataFrame:
        """Return item_id, title, description, categories, image (a path in `data_folder`, or a URL); sorted."""
        return self._read("items", None)

    def users(self) -> pd.DataFrame:
        """Return user_id and their number of interactions; sorted."""
        return self._read("users", None)

    @property
    def data_folder(self) -> Path:
        """The folder of the raw files, to which relative image paths refer."""
        return Path(self.manifest["data"])

    def _read(self, table: str, columns: Sequence[str] | None) -> pd.DataFrame:
        return pd.read_parquet(self.path / f"{table}.parquet", columns=list(columns) if columns is not None else None)


# --- keys ---------------------------------------------------------------------------------------------------------


def domain_key(spec: DomainSpec, sources: Sequence[Mapping[str, Any]], simulated: bool) -> str:
    """Return the key of a prepared domain: sha256 over version, spec (without names of files) and file contents.

    sources: the raw files, see `find_sources`.
    """
    apart = {"interactions", "items", *(() if spec.listed else ("catalogue",))}  # keys are as before there was a choice
    content = {
        "version": VERSION,
        "spec": {name: value for name, value in asdict(spec).items() if name not in apart},
        "sources": [source["sha256"] for source in sources],
        "simulated": simulated,
    }
    return digest(content)


def find_sources(spec: DomainSpec, data: Path, store: Path) -> list[dict[str, Any]]:
    """Return kind, name, hash and size of each raw file. Raises InputError for a missing one.

    Files of one kind are read in the order in which the plan lists them; those of a pattern in the order of their hashes,
    because their names say nothing about which interaction is the later one.
    """
    sources = []
    for kind in ("interactions", "items"):
        for name in spec.files(kind):
            found = matching_files(data, name)
            if not found:
                what = "no file matches" if is_pattern(name) else "no such file"
                where = f"the data folder {data.resolve()}" + ("" if data.is_dir() else ", which does not exist")
                raise InputError(
                    f"{data / name}: {what}; domain {spec.name} looks for {name} in {where}; name another folder"
                )
            matched = [
                {
                    "kind": kind, "file": file, "sha256": _file_hash(data / file, store),
                    "bytes": (data / file).stat().st_size,
                }
                for file in found
            ]  # fmt: skip
            sources += sorted(matched, key=lambda source: str(source["sha256"]))
    return sources


def is_pattern(name: str) -> bool:
    """Return whether the name of a file stands for several."""
    return "*" in name or "?" in name


def matching_files(data: Path, name: str) -> list[str]:
    """Return the files in the data folder that a name or pattern stands for, sorted."""
    if (data / name).is_file():
        return [name]
    if not is_pattern(name) or Path(name).is_absolute():
        return []
    return sorted(path.relative_to(data).as_posix() for path in data.glob(name) if path.is_file())


def _file_hash(path: Path, store: Path) -> str:
    """Return the sha256 of a file; the store remembers it for as long as size and time of change stay the same."""
    status = path.stat()
    stamp = {"path": str(path.resolve()), "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    note = store / ".hashes" / f"{hashlib.sha256(stamp['path'].encode()).hexdigest()[:32]}.json"  # type: ignore[attr-defined]
    with suppress(OSError, ValueError):
        remembered = json.loads(note.read_text())
        if {name: remembered.get(name) for name in stamp} == stamp:
            return str(remembered["sha256"])
    with path.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    note.parent.mkdir(parents=True, exist_ok=True)
    write_json(note, {**stamp, "sha256": sha256})
    return sha256


def _simulated(spec: DomainSpec, data: Path) -> bool:
    """Return whether the simulator's label lies beside the interactions or in a folder above them, up to `data`."""
    paths = [data / name for name in spec.files("interactions")]
    folders = [folder for path in paths for folder in path.parents if folder.is_relative_to(data)]
    return any((folder / SIMULATED).is_file() for folder in folders)


# --- preparing ----------------------------------------------------------------------------------------------------


def open_domain(path: Path) -> Domain:
    """Open a prepared domain. Raises InputError if `path` holds none."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: no prepared domain here (no manifest.json); prepare it first") from None
    except ValueError as error:
        raise InputError(f"{path}/manifest.json: not JSON ({error}); delete the folder and prepare it again") from None
    low, high = manifest["rating_scale"]
    return Domain(
        name=manifest["name"],
        path=path,
        key=manifest["key"],
        simulated=manifest["simulated"],
        rating_scale=(low, high),
        manifest=manifest,
    )


def prepare_domain(spec: DomainSpec, data: Path, store: Path, progress: AdvanceBy | None = None) -> Domain:
    """Read, merge, filter and store a domain, or open it if the store has it already.

    data: the folder of raw files. store: the folder of prepared domains. progress: told of rows read. Raises InputError
    for whatever is wrong with the files.
    """
    sources = find_sources(spec, data, store)
    simulated = _simulated(spec, data)
    key = domain_key(spec, sources, simulated)
    path = store / f"{spec.name}-{key[:12]}"
    if (path / "manifest.json").is_file():
        return _relocated(open_domain(path), data)
    if path.exists():  # only deleting by hand leaves a folder without its manifest
        shutil.rmtree(path)
    with whole_folder(path) as partial, work_folder(partial) as work:
        counts = _write_tables(spec, data, sources, partial, work, progress or (lambda rows: None))
        for source in sources:
            if _file_hash(data / source["file"], store) != source["sha256"]:
                raise InputError(f"{data / source['file']}: changed while it was read; try again when it is still")
        manifest = {
            "name": spec.name,
            "key": key,
            "version": VERSION,
            "reader": spec.reader,
            "simulated": simulated,
            "rating_scale": list(spec.rating_scale),
            "data": str(data.resolve()),
            "sources": sources,
            "spec": asdict(spec),
            **counts,
        }
        write_json(partial / "manifest.json", manifest)
    return open_domain(path)


def find_domain(spec: DomainSpec, data: Path, store: Path) -> Domain | None:
    """Return the prepared domain, if the store has it."""
    if not any(store.glob(f"{spec.name}-*/manifest.json")):
        return None
    key = domain_key(spec, find_sources(spec, data, store), _simulated(spec, data))
    path = store / f"{spec.name}-{key[:12]}"
    return open_domain(path) if (path / "manifest.json").is_file() else None


def _relocated(domain: Domain, data: Path) -> Domain:
    """Write down where the raw files lie now: relative image paths refer to that folder."""
    if domain.data_folder == data.resolve():
        return domain
    write_json(domain.path / "manifest.json", {**domain.manifest, "data": str(data.resolve())})
    return open_domain(domain.path)


def _write_tables(
    spec: DomainSpec,
    data: Path,
    sources: Sequence[Mapping[str, Any]],
    folder: Path,
    work: Path,
    progress: AdvanceBy,
) -> dict[str, Any]:
    """Write the three tables into `folder`, by way of `work`; return counts, notes and profile for the manifest."""
    notes = Notes()
    paths = {kind: [data / source["file"] for source in sources if source["kind"] == kind] for kind in COLUMNS}
    if not _stage(raw_interactions(spec, paths["interactions"], notes), INTERACTIONS, work / "raw.parquet", progress):
        chosen = "".join(f" where {column} is {value!r}" for column, value in spec.where.items())
        names = ", ".join(map(str, paths["interactions"]))
        raise InputError(f"{names}: holds no interactions{chosen}; give a file that does")
    _stage(raw_items(spec, paths["items"], notes), ITEMS, work / "meta.parquet", progress)
    with open_database(work) as database:
        _number(spec, database, work, notes)
        raw = profile_raw(database)
        counts = [_count(database, "read")]
        repeats = _merge_duplicates(database, spec.duplicates, notes)
        counts.append(_count(database, f"duplicates={spec.duplicates}"))
        for step in apply_filters(spec.filters, database):
            counts.append(_count(database, step))
            if not counts[-1]["interactions"]:
                raise InputError(
                    f"{data / spec.files('interactions')[0]}: nothing is left of domain {spec.name} after the filter "
                    f"{step}: {ladder(counts)}; loosen the filter"
                )
        _export(spec, database, work, folder)
        profile = raw | profile_kept(database)
    first, last = counts[1], counts[-1]
    return {
        "counts": counts,
        "duplicates": {"rule": spec.duplicates, "rows": repeats},
        "users_dropped": first["users"] - last["users"],
        "items_dropped": first["items"] - last["items"],
        "notes": notes.lines(),
        "profile": profile,
    }


def raw_interactions(spec: DomainSpec, paths: Sequence[Path], notes: Notes) -> Iterator[pa.RecordBatch]:
    """Yield the interactions of a domain's files, one after another."""
    scale = None if spec.implicit else spec.rating_scale
    return chain.from_iterable(
        read_interactions(
            spec.reader, path, spec.columns, scale, spec.where, unrated=spec.no_rating, header=spec.header, notes=notes
        )
        for path in paths
    )


def raw_items(spec: DomainSpec, paths: Sequence[Path], notes: Notes) -> Iterator[pa.RecordBatch]:
    """Yield the items of a domain's files, one after another."""
    shared = {name: column for name, column in spec.columns.items() if name in COLUMNS["items"]}
    optional = () if "item_id" in spec.item_columns else ("item_id",)  # which `columns` names for interactions
    return chain.from_iterable(
        read_items(
            spec.reader, path, shared | dict(spec.item_columns), spec.where, optional=optional,
            every_where=spec.listed, notes=notes,
        )
        for path in paths
    )  # fmt: skip


def ladder(counts: Sequence[Mapping[str, Any]]) -> str:
    """Return what each step left, in a line."""
    return ", ".join(
        f"{row['step']} {row['interactions']:,} interactions of {row['users']:,} users and {row['items']:,} items"
        for row in counts
    )


def _stage(batches: Iterator[pa.RecordBatch], schema: pa.Schema, path: Path, progress: AdvanceBy) -> int:
    """Write a reader's batches to a parquet file as they come; return the number of rows."""
    rows = 0
    with pq.ParquetWriter(path, schema, compression="lz4", use_dictionary=False) as writer:
        for batch in batches:
            writer.write_batch(batch)
            rows += batch.num_rows
            progress(batch.num_rows)
    return rows


def _number(spec: DomainSpec, database: duckdb.DuckDBPyConnection, work: Path, notes: Notes) -> None:
    """Number users and items in the order of their ids, so that all later steps work on numbers: table `kept`."""
    for name in ("raw", "meta"):
        source = f"read_parquet('{_quoted(work / name)}.parquet', file_row_number = true)"
        database.execute(f"CREATE VIEW {name} AS SELECT *, file_row_number AS row FROM {source}")
    clock = find_clock(database, notes)
    named = "SELECT DISTINCT item_id FROM raw" + (" UNION SELECT item_id FROM meta" if spec.listed else "")
    database.execute(
        f"""
        CREATE TABLE users AS
            SELECT user_id, CAST(row_number() OVER (ORDER BY user_id) AS INTEGER) AS u
            FROM (SELECT DISTINCT user_id FROM raw);
        CREATE TABLE described AS
            SELECT item_id, min(row) AS row FROM meta GROUP BY item_id;  -- an item listed twice counts as first listed
        CREATE TABLE items AS
            SELECT item_id, CAST(row_number() OVER (ORDER BY item_id) AS INTEGER) AS i, described.row AS row,
                coalesce(described, false) AS described, coalesce(pictured, false) AS pictured,
                coalesce(titled, false) AS titled, coalesce(worded, false) AS worded
            FROM ({named}) LEFT JOIN described USING (item_id) LEFT JOIN (
                SELECT row, description IS NOT NULL AS described, image IS NOT NULL AS pictured,
                    title IS NOT NULL AS titled, coalesce(title, description, categories) IS NOT NULL AS worded
                FROM meta  -- the texts themselves would be held in memory by the join
            ) AS flags ON flags.row = described.row;
        CREATE TABLE kept AS
            SELECT u, i, rating, words, timestamp, row
            FROM (SELECT user_id, item_id, rating, words, {clock} AS timestamp, row FROM raw)
                JOIN users USING (user_id) JOIN (SELECT item_id, i FROM items) USING (item_id);
        """
    )


def _merge_duplicates(database: duckdb.DuckDBPyConnection, rule: str, notes: Notes) -> int:
    """Leave one row for each (user, item), with `keep` one for each of its times; return how many repeat one.

    The mean is over decimals, whose sum does not depend on its order.
    """
    way = "ASC" if rule == "first" else "DESC"
    rating = "avg(CAST(rating AS DECIMAL(30, 12))) OVER pair" if rule == "mean" else "rating"
    one = "u, i, timestamp" if rule == "keep" else "u, i"
    database.execute(
        """
        CREATE TABLE repeated AS SELECT u, i, count(*) AS n FROM kept GROUP BY u, i HAVING n > 1;
        """
    )
    without_order = """
        SELECT count(*) FROM (
            SELECT u FROM kept SEMI JOIN repeated USING (u, i) GROUP BY u, i HAVING count(*) > count(DISTINCT timestamp))
    """
    if rule != "mean" and (tied := one_number(database, without_order)):
        later = "earlier" if rule == "first" else "later"
        notes.add(
            f"{tied:,} repeated pairs of user and item have no times that differ; the {later} line of the files counts"
        )
    database.execute(
        f"""
        CREATE TABLE merged AS
            SELECT u, i, {rating} AS rating, words, timestamp, row FROM kept SEMI JOIN repeated USING (u, i)
            WINDOW pair AS (PARTITION BY u, i)
            QUALIFY row_number() OVER (PARTITION BY {one} ORDER BY timestamp {way} NULLS LAST, row {way}) = 1;
        CREATE OR REPLACE TABLE kept AS
            SELECT u, i, rating, words, timestamp, row FROM kept ANTI JOIN repeated USING (u, i) UNION ALL FROM merged;
        """
    )
    return one_number(database, "SELECT coalesce(sum(n - 1), 0) FROM repeated")


def _count(database: duckdb.DuckDBPyConnection, step: str) -> dict[str, Any]:
    """Count what a step has left."""
    return {
        "step": step,
        "interactions": one_number(database, "SELECT count(*) FROM kept"),
        "users": one_number(database, "SELECT count(DISTINCT u) FROM kept"),
        "items": one_number(database, "SELECT count(DISTINCT i) FROM kept"),
    }


def _export(spec: DomainSpec, database: duckdb.DuckDBPyConnection, work: Path, folder: Path) -> None:
    """Write the three tables; `item_place` holds the items that there are then.

    DuckDB decides which raw row goes where; the texts themselves do not pass through it.
    """
    flags = [column for name, column in ITEM_FLAGS.items() if getattr(spec.filters, name)]
    listed = " AND ".join(["row IS NOT NULL", *flags]) if spec.listed else "false"
    database.execute(
        f"""
        CREATE TABLE place AS
            SELECT row, CAST(rating AS FLOAT) AS rating, timestamp,
                row_number() OVER (ORDER BY u, i, timestamp) - 1 AS position
            FROM kept ORDER BY row;
        CREATE TABLE item_place AS
            SELECT row, item_id, row_number() OVER (ORDER BY i) - 1 AS position
            FROM items WHERE i IN (SELECT i FROM kept) OR ({listed}) ORDER BY row;
        """
    )
    bare = database.execute("SELECT item_id, position FROM item_place WHERE row IS NULL").to_arrow_table()
    without_metadata = pa.table([bare["item_id"], *[pa.nulls(len(bare), pa.string())] * 4], schema=ITEMS)
    items = [without_metadata.append_column("position", bare["position"])]
    for name, place, schema, more in (("raw", "place", TABLE, []), ("meta", "item_place", ITEMS, items)):
        with pq.ParquetFile(work / f"{name}.parquet") as file:
            size = sum(file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups))
            tables = chain(more, _placed(database, place, file))
            rows = one_number(database, f"SELECT count(*) FROM {place}")
            target = folder / ("interactions.parquet" if name == "raw" else "items.parquet")
            external_sort(tables, schema, rows, size, target, work)
    users = "SELECT user_id, count(*) AS interactions FROM kept JOIN users USING (u) GROUP BY u, user_id ORDER BY u"
    pq.write_table(database.execute(users).to_arrow_table(), folder / "users.parquet", compression="zstd")


def _placed(database: duckdb.DuckDBPyConnection, place: str, file: pq.ParquetFile) -> Iterator[pa.Table]:
    """Yield the rows of `file` that the table `place` (row, position, ..) lists, with the columns of both."""
    start = 0
    for group in range(file.num_row_groups):
        rows = file.read_row_group(group)
        end = start + rows.num_rows
        query = f"SELECT * FROM {place} WHERE row >= {start} AND row < {end} ORDER BY row"
        chosen = database.execute(query).to_arrow_table()
        taken = rows.take(pc.subtract(chosen["row"], start))
        kept = [name for name in taken.column_names if name not in chosen.column_names]
        yield pa.table({**{name: taken[name] for name in kept}, **{name: chosen[name] for name in chosen.column_names}})
        start = end


def _quoted(path: Path) -> str:
    return str(path).replace("'", "''")
