"""What two domains share: users, items, interactions; and whether it looks like an accident or a leak."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from features.domains.database import open_database
from features.domains.domain import Domain

_WRITINGS: Mapping[str, Callable[[str], str]] = {  # what two ways of writing one id may differ in
    ".0 at the end": lambda name: re.sub(r"\.0+$", "", name),
    "leading zeros": lambda name: name.lstrip("0") or "0",
    "blanks around them": str.strip,
    "quotes around them": lambda name: name.strip("\"'"),
    "upper and lower case": str.casefold,
}
_FEW = 0.05  # share of the smaller domain's users; fewer shared ones are questioned


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """What two domains share."""

    source: str
    target: str
    users: int  # in both
    smaller: int  # users of the domain that has fewer
    items: int  # ids in both
    pairs: int  # (user, item) in both
    verbatim: int  # of these, with the same rating and time
    target_rows: int  # interactions of the shared users in the target domain
    notes: tuple[str, ...]

    @property
    def verbatim_share(self) -> float:
        """Share of the shared users' target interactions that stand in the source domain as they are."""
        return self.verbatim / self.target_rows if self.target_rows else 0.0


def compare_domains(source: Domain, target: Domain) -> Overlap:
    """Count what two domains share, and say what of it is odd."""
    with tempfile.TemporaryDirectory() as work, open_database(Path(work)) as database:
        for name, domain in (("s", source), ("t", target)):
            path = str(domain.path).replace("'", "''")
            for table in ("users", "items", "interactions"):
                database.execute(f"CREATE VIEW {name}_{table} AS SELECT * FROM read_parquet('{path}/{table}.parquet')")
        row = database.execute(
            """
            SELECT
                (SELECT count(*) FROM s_users JOIN t_users USING (user_id)),
                (SELECT least((SELECT count(*) FROM s_users), (SELECT count(*) FROM t_users))),
                (SELECT count(*) FROM s_items JOIN t_items USING (item_id)),
                (SELECT coalesce(sum(t_users.interactions), 0) FROM s_users JOIN t_users USING (user_id))
            """
        ).fetchone()
        assert row is not None
        users, smaller, items, target_rows = map(int, row)
        pairs = verbatim = 0
        if users and items:
            row = database.execute(
                """
                SELECT count(*), count_if(s.rating IS NOT DISTINCT FROM t.rating
                    AND s.timestamp IS NOT DISTINCT FROM t.timestamp)
                FROM s_interactions s JOIN t_interactions t USING (user_id, item_id)
                """
            ).fetchone()
            assert row is not None
            pairs, verbatim = map(int, row)
    counts = Overlap(
        source=source.name, target=target.name, users=users, smaller=smaller, items=items, pairs=pairs, verbatim=verbatim,
        target_rows=target_rows, notes=(),
    )  # fmt: skip
    return Overlap(**{**vars(counts), "notes": tuple(_notes(source, target, counts))})


def _notes(source: Domain, target: Domain, overlap: Overlap) -> Iterator[str]:
    place = f"{source.name} and {target.name}"
    if overlap.users < _FEW * overlap.smaller or overlap.users < 2:
        hint = writing_hint(source.users()["user_id"], target.users()["user_id"], source.name, target.name)
        yield f"{place} share {overlap.users:,} users, of {overlap.smaller:,} in the smaller domain; {hint}"
    elif hint := _other_writing(source.users()["user_id"], target.users()["user_id"]):
        yield f"{place} share {overlap.users:,} users; {hint}"
    ids = [domain.manifest["profile"]["user_ids"] for domain in (source, target)]
    if all(writing["gapless"] for writing in ids):
        yield (
            f"user ids of {place} are whole numbers without a gap, as numbering each file anew makes them: make sure that "
            "one number is one person in both, or nothing transfers"
        )
    if overlap.items:
        of_pairs = f", and {overlap.pairs:,} pairs of user and item" if overlap.pairs else ""
        yield (
            f"{place} have {overlap.items:,} item ids in common{of_pairs}; they are taken for different items: make sure "
            "that no item is in both domains"
        )
    scales = [domain.rating_scale for domain in (source, target)]
    if scales[0] != scales[1]:
        shown = " and ".join(f"{low:g} to {high:g}" for low, high in scales)
        yield f"ratings of {place} are on scales of {shown}; errors are in points of the target's"
    kinds = [domain.manifest["profile"]["times"]["units"] for domain in (source, target)]
    units = [set(unit) for unit in kinds]
    if all(units) and units[0] != units[1]:
        shown = " and ".join("/".join(sorted(unit)) for unit in units)
        yield f"timestamps of {place} were in {shown}; both are read as milliseconds since 1970"


def writing_hint(source: Collection[str], target: Collection[str], source_name: str, target_name: str) -> str:
    """Return ids of both sets side by side, and which other way of comparing them would find more in common."""
    shown = " and ".join(
        f"{', '.join(repr(str(name)) for name in sorted(ids)[:3])} ... in {domain}"
        for ids, domain in ((source, source_name), (target, target_name))
    )
    return f"ids are {shown}" + (f"; {more}" if (more := _other_writing(source, target)) else "")


def _other_writing(source: Collection[str], target: Collection[str]) -> str:
    """Return how many ids more two sets would share if a way of writing them did not count; empty where none matters."""
    left, right = set(source), set(target)
    best, words = len(left & right), ""
    for name, plain in _WRITINGS.items():
        ours, theirs = ({plain(str(each)): each for each in ids} for ids in (left, right))
        common = ours.keys() & theirs.keys()
        if len(common) > best:
            example = min((each for each in common if ours[each] != theirs[each]), default=None)
            if example is not None:
                best = len(common)
                words = (
                    f"{len(common):,} would be shared without {name} (such as {ours[example]!r} beside {theirs[example]!r})"
                    "; write them alike"
                )
    return words
