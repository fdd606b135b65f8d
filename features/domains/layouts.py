"""Layouts: what known releases call our columns, and how to tell a release by its columns.

A layout gives each of our columns the names that it may have in a file, in order of preference. A reader is the name of a
layout; the file's format (parquet, JSON, text with a separator) is told by the file itself.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["interactions", "items", "users"]

# Our names of raw columns, which `columns` and `item_columns` may map to a file's own.
COLUMNS: Mapping[Kind, tuple[str, ...]] = {
    "interactions": ("user_id", "item_id", "rating", "review_title", "text", "timestamp"),
    "items": ("item_id", "title", "description", "categories", "image"),
    "users": ("user_id", "split"),
}
REQUIRED: Mapping[Kind, tuple[str, ...]] = {
    "interactions": ("user_id", "item_id", "rating"),
    "items": ("item_id",),
    "users": ("user_id", "split"),
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Column names of one release."""

    title: str
    interactions: Mapping[str, tuple[str, ...]]  # our column -> the file's, in order of preference
    items: Mapping[str, tuple[str, ...]]
    header: tuple[str, ...] = ()  # of interactions that come as text without a header
    unrated: tuple[float, ...] = ()  # ratings that mean none

    def names(self, kind: Kind) -> Mapping[str, tuple[str, ...]]:
        """Return the names of one kind of file."""
        if kind == "users":
            return _own(kind)
        return self.interactions if kind == "interactions" else self.items


def _own(kind: Kind) -> dict[str, tuple[str, ...]]:
    return {name: (name,) for name in COLUMNS[kind]}


def _old_amazon(title: str, header: tuple[str, ...]) -> Layout:
    return Layout(
        title=title,
        interactions={
            "user_id": ("reviewerID",), "item_id": ("asin",), "rating": ("overall",), "review_title": ("summary",),
            "text": ("reviewText",), "timestamp": ("unixReviewTime",),
        },
        items={
            "item_id": ("asin",), "title": ("title",), "description": ("description",),
            "categories": ("category", "categories"), "image": ("imageURLHighRes", "imageURL", "imUrl"),
        },
        header=header,
    )  # fmt: skip


LAYOUTS: Mapping[str, Layout] = {
    "table": Layout(title="our own names", interactions=_own("interactions"), items=_own("items")),
    "recbole": Layout(title="RecBole", interactions=_own("interactions"), items=_own("items")),
    # Hou et al. 2024
    "amazon2023": Layout(
        title="Amazon Reviews 2023",
        interactions={
            "user_id": ("user_id",), "item_id": ("parent_asin", "asin"), "rating": ("rating",),
            "review_title": ("title",), "text": ("text",), "timestamp": ("timestamp",),
        },
        items={
            "item_id": ("parent_asin", "asin"), "title": ("title",), "description": ("description",),
            "categories": ("categories", "category"), "image": ("images", "image", "imUrl"),
        },
    ),
    # Ni et al. 2019; the files with ratings alone name the item first
    "amazon2018": _old_amazon("Amazon 2018", ("asin", "reviewerID", "overall", "unixReviewTime")),
    # McAuley et al. 2015; the files with ratings alone name the user first
    "amazon2014": _old_amazon("Amazon 2014", ("reviewerID", "asin", "overall", "unixReviewTime")),
    # Wan and McAuley 2018: 0 stars are a shelf without a rating
    "goodreads": Layout(
        title="Goodreads",
        interactions={
            "user_id": ("user_id",), "item_id": ("book_id",), "rating": ("rating",), "review_title": (),
            "text": ("review_text", "review_text_incomplete"), "timestamp": ("date_updated", "date_added", "timestamp"),
        },
        items={
            "item_id": ("book_id",), "title": ("title", "title_without_series"), "description": ("description",),
            "categories": ("popular_shelves", "genres"), "image": ("image_url",),
        },
        unrated=(0.0,),
    ),
    "yelp": Layout(
        title="Yelp",
        interactions={
            "user_id": ("user_id",), "item_id": ("business_id",), "rating": ("stars",), "review_title": (),
            "text": ("text",), "timestamp": ("date",),
        },
        items={
            "item_id": ("business_id",), "title": ("name",), "description": (), "categories": ("categories",),
            "image": (),
        },
    ),
}  # fmt: skip

# Other names that people give our columns, lower case and without punctuation
_OFTEN: Mapping[str, tuple[str, ...]] = {
    "user_id": ("userid", "user", "uid", "reviewerid", "customerid", "memberid", "username"),
    "item_id": ("itemid", "item", "iid", "movieid", "bookid", "asin", "parentasin", "productid", "isbn", "businessid",
                "songid", "trackid", "artistid", "animeid"),
    "rating": ("rating", "ratings", "overall", "stars", "score", "star", "bookrating"),
    "timestamp": ("timestamp", "time", "date", "unixreviewtime", "datetime", "reviewtime", "createdat"),
    "text": ("text", "review", "reviewtext", "comment", "content"),
    "title": ("title", "name", "booktitle", "itemname"),
}  # fmt: skip
_NUMBER = re.compile(r"[+-]?\d+([.,]\d+)?([eE][+-]?\d+)?|\d{4}-\d\d-\d\d[T\d:. ]*")


def recognise(present: Collection[str], kind: Kind, reader: str) -> str:
    """Return what a file's columns look like and how to read it, as the end of a message; empty where nothing is known."""
    for name, layout in LAYOUTS.items() if kind != "users" else ():
        wanted = layout.names(kind)
        required = REQUIRED[kind] if kind == "interactions" else ("item_id", "title")
        found = [next((alias for alias in wanted[key] if alias in present), None) for key in required]
        if name not in (reader, "recbole") and not (name == "table" and reader == "recbole") and all(found):
            if name == "amazon2018" and {"helpful", "imUrl", "salesRank"} & set(present):
                name, layout = "amazon2014", LAYOUTS["amazon2014"]
            return f"these are columns of {layout.title} ({', '.join(map(str, found))}): set reader: {name}"
    guessed = {}
    for ours in COLUMNS[kind]:
        near = [column for column in present if len(column) <= 40 and _plain(column) in _OFTEN.get(ours, ())]
        if len(near) == 1 and near[0] != ours:
            guessed[ours] = near[0]
    if guessed and reader in ("table", "recbole"):
        pairs = ", ".join(f"{ours}: {column}" for ours, column in guessed.items())
        return f"perhaps `{'item_columns' if kind == 'items' else 'columns'}: {{{pairs}}}`"
    return ""


def seems_data(names: Collection[str]) -> bool:
    """Whether what stands where a header is expected is a row: some field of it is a number or a date.

    0, 1, 2 ... are a header, as pandas writes it for columns without names.
    """
    numbers = [name for name in names if _NUMBER.fullmatch(name.strip())]
    counted = [name for name in names if name.strip()]
    return bool(numbers) and counted != [str(i) for i in range(len(counted))]


def _plain(column: str) -> str:
    return re.sub(r"[^a-z0-9]", "", column.lower())
