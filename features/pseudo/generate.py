"""Pseudo-interactions (LPG, LGCD section 3.1): what single-domain users might want in the other domain, as real items.

train       the embedded generator, where that is the generator: on overlapping users, less those kept for `value`
generate    a prompt per single-domain user -> an answer of n_K lines (eq. 4), kept block by block
encode      every different text once, by the encoder of the item tables (eq. 5), kept block by block
retrieve    each text takes its most similar real item that the user's list does not hold yet (eq. 6)

One query a text is (ours): eqs. 5 and 6 make one vector of all of a user's texts and take its n_K nearest items, which are
like each other; here n_K of the sweeps means the first n_K texts.

Kill it anywhere and start it again: what is on disk is not done again. Only the users that are handed in are read: the
caller hands in training users, so no validation or test user is in any prompt or in any text that a model is trained on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from features.encoders.encoder import Encoder, EncoderSpec, ResolvedEncoder, load_encoder, resolve_encoder
from features.errors import InputError
from features.extraction.extract import encode_rows
from features.extraction.prompts import Row, clean, find_prompt
from features.extraction.workers import Actors
from features.pseudo.generation_cache import answer
from features.pseudo.generator import (
    EMBEDDED,
    Generator,
    GeneratorSpec,
    ResolvedGenerator,
    load_generator,
    resolve_generator,
)
from features.pseudo.local_model import TRAINING, Example, train_embedded
from features.pseudo.prompts import Wish, find_words, parse_texts, short_title
from features.pseudo.recall import Pair, measure_value
from features.pseudo.retrieval import Nearest, choose_items, nearest_of_keys
from features.pseudo.table import SCHEMA, PseudoTable, open_pseudo, write_pseudo
from features.store.tables import FeatureTable, RowStore, digest, row_key

if TYPE_CHECKING:
    from features.domains.domain import Domain

VERSION = 1  # of retrieval and of what is written; part of every key
Told = Callable[..., None]  # texts done, texts to do, and tokens where they are counted
Progress = Callable[..., None]  # ("train" | "generate" | "encode", texts done, texts to do[, tokens])


@dataclass(frozen=True, kw_only=True)
class History:
    """What one training user has in each domain: domain name -> item ids, oldest first; a domain may be missing."""

    user: str
    items: Mapping[str, Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Means:
    """How the work is done; changes nothing of what is made."""

    progress: Progress | None = None
    workers: int | Actors | None = None  # as in `features.extraction.extract.extract`, and the same with
    use_ray: bool | None = None
    load_generator: Callable[[ResolvedGenerator], Generator] = load_generator
    load_encoder: Callable[[ResolvedEncoder], Encoder] = load_encoder

    def told(self, phase: str) -> Told | None:
        return None if self.progress is None else partial(self.progress, phase)


def describe_generator(spec: GeneratorSpec) -> dict[str, Any]:
    """All that pseudo-items depend on besides users, titles and vectors."""
    if spec.model == EMBEDDED:
        model: dict[str, Any] = {"embedded": asdict(spec.embedded), "training": TRAINING}
    else:
        model = dict(resolve_generator(spec).identity)
    return {
        "version": VERSION,
        "generator": {"name": spec.model, **model, **spec.sampling},
        "shown": {"history": spec.history, "title_words": spec.title_words},
        "value_users": spec.value_users,
    }


def item_titles(domain: Domain) -> dict[str, str]:
    """Title of each item of a domain as a generator reads it; '' where there is none."""
    items = pq.read_table(domain.path / "items.parquet", columns=["item_id", "title"])
    return dict(zip(items["item_id"].to_pylist(), map(clean, items["title"].to_pylist()), strict=True))


def make_pseudo(
    spec: GeneratorSpec,
    encoder: EncoderSpec,
    users: Sequence[History],
    titles: Mapping[str, Mapping[str, str]],
    tables: Mapping[str, FeatureTable],
    store: Path,
    means: Means | None = None,
) -> PseudoTable:
    """`spec.texts` different real items of the other domain for each user of one domain; made if the store has none.

    users: the training users, and nobody else. titles: domain name -> item id -> title (`item_titles`). tables: domain
    name -> vectors of its items, made by `encoder`. Both directions of a pair of domains share what is made.
    The manifest says what was made, and what it is worth (`features.pseudo.recall`).
    Raises InputError: generator or encoder missing or not what it should be, unknown items, no user to learn from.
    """
    start = time.monotonic()
    work = _Work(spec, resolve_encoder(encoder), titles, tables, store, means or Means())
    users = sorted(users, key=lambda user: user.user)
    work.check(users)
    document = work.describe(users)
    key = digest(document)
    folder = store / "pseudo" / f"{'-'.join(sorted(tables))}-{key[:12]}"
    if folder.exists():
        return open_pseudo(folder, key)

    single = [user for user in users if len(work.domains_of(user)) == 1]
    held, fit = work.keep_out([user for user in users if len(work.domains_of(user)) == 2])
    generator = work.generator(fit)
    asked = [(user, work.other(work.domains_of(user)[0])) for user in single]
    asked += [(user, target) for target in sorted(tables) for user in held]
    lists = work.lists(asked, generator)
    value = [
        row
        for n, target in enumerate(sorted(tables))
        for row in work.value(held, fit, target, lists[len(single) + n * len(held) :][: len(held)])
    ]
    made = lists[: len(single)]
    rows = pa.table(
        {
            "user_id": [user.user for user in single],
            "items": [one.items for one in made],
            "similarity": [one.similarity for one in made],
            "texts": [one.texts for one in made],
        },
        schema=SCHEMA,
    )
    manifest = {"key": key, **document, **_counts(made), "value": value, "seconds": round(time.monotonic() - start, 1)}
    return write_pseudo(folder, rows, manifest)


def read_value(table: PseudoTable) -> list[dict[str, Any]]:
    """What the items of a table are worth: rows of `features.pseudo.recall.Value`; none where no user could be kept out."""
    rows: list[dict[str, Any]] = json.loads((table.path / "manifest.json").read_text())["value"]
    return rows


@dataclass(frozen=True)
class _List:
    """One user's items of one domain, and the texts that they were found by."""

    items: list[str]
    similarity: list[float]
    texts: list[str]


def _counts(lists: Sequence[_List]) -> dict[str, Any]:
    similarity = [value for one in lists for value in one.similarity]
    return {
        "users": len(lists),
        "without_items": sum(not one.items for one in lists),
        "texts": sum(len(one.texts) for one in lists),
        "different_texts": len({text for one in lists for text in one.texts}),
        "items": sum(len(one.items) for one in lists),
        "different_items": len({item for one in lists for item in one.items}),
        "mean_similarity": round(float(np.mean(similarity)), 4) if similarity else None,
    }


class _Work:
    """What one call of `make_pseudo` reads, and its steps."""

    def __init__(
        self,
        spec: GeneratorSpec,
        encoder: ResolvedEncoder,
        titles: Mapping[str, Mapping[str, str]],
        tables: Mapping[str, FeatureTable],
        store: Path,
        means: Means,
    ) -> None:
        self.spec, self.encoder, self.tables, self.store, self.means = spec, encoder, tables, store, means
        self.titles = {
            name: {item: short_title(title, spec.title_words) for item, title in of_domain.items()}
            for name, of_domain in titles.items()
        }

    def check(self, users: Sequence[History]) -> None:
        if len(self.tables) != 2 or set(self.titles) != set(self.tables):
            raise InputError(f"pseudo-items: two domains with titles and tables are needed, not {sorted(self.tables)}")
        for name, table in self.tables.items():
            if (made_by := table.manifest["encoder"]["key"]) != self.encoder.key:
                raise InputError(
                    f"{table.path}: made by encoder {made_by[:12]}, not by {self.encoder.spec.model} "
                    f"({self.encoder.key[:12]}); give pseudo-items the encoder of the item tables"
                )
            items = {item for user in users for item in user.items.get(name, ())}
            if unknown := sorted(items - set(self.titles[name])):
                raise InputError(
                    f"pseudo-items: domain {name} has no item {unknown[0]!r}; give titles of all its items"
                )
        ids = [user.user for user in users]
        assert len(set(ids)) == len(ids), "each user once"

    def describe(self, users: Sequence[History]) -> dict[str, Any]:
        """All that the table depends on."""
        return {
            **describe_generator(self.spec),
            "encoder": self.encoder.key,
            "tables": {name: table.key for name, table in sorted(self.tables.items())},
            "titles": digest({name: dict(titles) for name, titles in self.titles.items()}),
            "histories": digest({user.user: {d: list(user.items[d]) for d in self.domains_of(user)} for user in users}),
        }

    def other(self, domain: str) -> str:
        (other,) = set(self.tables) - {domain}
        return other

    def domains_of(self, user: History) -> list[str]:
        """Domains in which the user has items."""
        return [name for name in sorted(self.tables) if user.items.get(name)]

    def shown(self, domain: str, items: Sequence[str]) -> tuple[str, ...]:
        """Titles of items, each once, without those that have none."""
        titles = self.titles[domain]
        return tuple(dict.fromkeys(titles[item] for item in items if titles[item]))

    def wish(self, user: History, target: str) -> Wish:
        source = self.other(target)
        shown = self.shown(source, user.items[source][::-1])[: self.spec.history]
        return Wish(user=user.user, source=source, target=target, titles=shown)

    def keep_out(self, overlapping: Sequence[History]) -> tuple[list[History], list[History]]:
        """(users kept out of all training to measure the items' value, all others)."""
        count = min(self.spec.value_users, len(overlapping) // 10)
        order = np.random.default_rng(self.spec.seed).permutation(len(overlapping)).tolist()
        return [overlapping[i] for i in sorted(order[:count])], [overlapping[i] for i in sorted(order[count:])]

    def generator(self, fit: Sequence[History]) -> ResolvedGenerator:
        if self.spec.model != EMBEDDED:
            return resolve_generator(self.spec)
        pairs = [
            (self.wish(user, target), self.shown(target, user.items[target])) for user in fit for target in user.items
        ]
        examples = [Example(wish=wish, titles=titles) for wish, titles in pairs if wish.titles and titles]
        words, spec = find_words(self.spec.prompt), self.spec
        folder = train_embedded(spec.embedded, examples, words, spec.seed, self.store, self.means.told("train"))
        return resolve_generator(spec, folder)

    def lists(self, asked: Sequence[tuple[History, str]], generator: ResolvedGenerator) -> list[_List]:
        """Items for each (user, domain that they are to be of)."""
        texts = self._texts([self.wish(user, target) for user, target in asked], generator)
        own = [self._own(user, target) for user, target in asked]
        depth = self.spec.texts + max(map(len, own), default=0)
        said: dict[str, set[str]] = {domain: set() for domain in self.tables}
        for (_, domain), mine in zip(asked, texts, strict=True):
            said[domain].update(mine)
        rows = {domain: {text: self._row(domain, text) for text in sorted(said[domain])} for domain in sorted(said)}
        vectors = self._encode({row for of_domain in rows.values() for row in of_domain.values()})
        nearest: dict[str, dict[str, Nearest]] = {}
        for domain, of_domain in rows.items():
            keys = {text: row_key(row) for text, row in of_domain.items()}
            found = nearest_of_keys(vectors, set(keys.values()), self.tables[domain].vectors, depth)
            nearest[domain] = {text: found[key] for text, key in keys.items() if key in found}
        lists = []
        for (_, domain), mine, without in zip(asked, texts, own, strict=True):
            near = [nearest[domain][text] for text in mine if text in nearest[domain]]
            chosen = choose_items(near, self.spec.texts, without)
            ids = self.tables[domain].ids
            lists.append(_List([ids[n] for n in chosen.items], chosen.similarity, mine))
        return lists

    def _texts(self, wishes: Sequence[Wish], generator: ResolvedGenerator) -> list[list[str]]:
        """Texts for each wish; none for one that shows nothing."""
        means, telling = self.means, [n for n, wish in enumerate(wishes) if wish.titles]
        answers = answer(
            [wishes[n] for n in telling], generator, self.store, progress=means.told("generate"),
            workers=means.workers, use_ray=means.use_ray, loader=means.load_generator,
        )  # fmt: skip
        texts: list[list[str]] = [[] for _ in wishes]
        for n, text in zip(telling, answers, strict=True):
            texts[n] = parse_texts(text, self.spec.texts)
        return texts

    def _own(self, user: History, target: str) -> list[int]:
        """Numbers of what the user has in the source domain and the target domain lists under the same id."""
        place = self._places[target]
        return [place[item] for item in dict.fromkeys(user.items[self.other(target)]) if item in place]

    @cached_property
    def _places(self) -> dict[str, dict[str, int]]:
        return {name: {item: n for n, item in enumerate(table.ids)} for name, table in self.tables.items()}

    def _row(self, domain: str, text: str) -> Row:
        """A text as the encoder reads it: as a title of an item of that domain."""
        prompt = find_prompt(self.tables[domain].manifest["prompt"]["name"])
        return Row(texts=(prompt.title.format(text),))

    def _encode(self, rows: Collection[Row]) -> RowStore:
        """The store that holds the vectors of all rows but those that cannot be encoded."""
        means = self.means
        vectors, failed = encode_rows(
            rows, self.encoder, self.store, progress=means.told("encode"),
            workers=means.workers, use_ray=means.use_ray, loader=means.load_encoder,
        )  # fmt: skip
        if rows and len(failed) == len(rows):
            raise InputError(f"pseudo-items: no generated text can be encoded; the first: {min(failed.values())}")
        return vectors

    def value(
        self, held: Sequence[History], fit: Sequence[History], target: str, lists: Sequence[_List]
    ) -> list[dict[str, Any]]:
        """What the lists of the users kept out are worth."""
        source = self.other(target)

        def pair(user: History) -> Pair:
            theirs = {name: [item for item in user.items[name] if item in self._places[name]] for name in self.tables}
            return Pair(source=theirs[source], target=theirs[target])

        measured = [(pair(user), one.items) for user, one in zip(held, lists, strict=True)]
        measured = [(mine, items) for mine, items in measured if mine.source and mine.target]
        tables = (self.tables[source], self.tables[target])
        real, items = [mine for mine, _ in measured], [items for _, items in measured]
        return measure_value(real, items, [pair(user) for user in fit], tables, (source, target), self.spec.seed)
