"""Pseudo-interactions (LPG, LGCD section 3.1): what single-domain users might want in the other domain, as real items.

train       the local model, where that is the generator: on overlapping users, less those kept out to measure recall
generate    a prompt for each single-domain user -> an answer of `texts` lines (eq. 4), cached block by block
encode      every different text once, by the encoder of the item tables (eq. 5), cached block by block
retrieve    each text takes its most similar real item that the user's list does not hold yet (eq. 6)

One query for each text is (ours): eqs. 5 and 6 average all of a user's texts into one vector and take its n_K nearest
items, which are like each other; here the first n_K texts give the first n_K pseudo-items. The texts' vectors are kept, so
that a model may do as the paper says (LGCD's `retrieval: per_user`).

Kill it anywhere and start it again: what is on disk is not done again. Only the users that are passed in are read: the
caller passes training users, so no validation or test user is in any prompt or in any text that a model is trained on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from features.encoders.encoder import Encoder, load_encoder
from features.encoders.inputs import EncoderInput, input_key
from features.encoders.spec import EncoderSpec, ResolvedEncoder, resolve_encoder
from features.errors import InputError
from features.extraction.encoding import encode_inputs
from features.extraction.prompts import clean, find_prompt
from features.extraction.workers import Actors
from features.progress import PhaseProgress, Progress
from features.pseudo.generation_cache import generate_cached
from features.pseudo.generator import (
    LOCAL,
    Generator,
    GeneratorSpec,
    ResolvedGenerator,
    load_generator,
    resolve_generator,
)
from features.pseudo.local_model import TRAINING, Example, train_local_model
from features.pseudo.prompts import PseudoPrompt, find_wording, parse_texts, short_title
from features.pseudo.recall import UserItems, measure_recall
from features.pseudo.retrieval import Nearest, choose_items, nearest_by_key, vectors_by_key
from features.pseudo.table import SCHEMA, PseudoTable, open_pseudo, write_pseudo
from features.store.folders import read_json
from features.store.shards import VectorStore
from features.store.tables import FeatureTable, digest

if TYPE_CHECKING:
    from features.domains.domain import Domain

VERSION = 2  # of retrieval and of the table; part of every key


@dataclass(frozen=True, kw_only=True)
class History:
    """The items of one training user: domain name -> item ids, oldest first; a domain may be missing."""

    user: str
    items: Mapping[str, Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How the work is done, which changes nothing in its results. Fields are those of `extract_tables`."""

    progress: PhaseProgress | None = None  # phases are "train", "generate" and "encode", all told of texts
    workers: int | Actors | None = None
    use_ray: bool | None = None
    load_generator: Callable[[ResolvedGenerator], Generator] = load_generator
    load_encoder: Callable[[ResolvedEncoder], Encoder] = load_encoder

    def phase_progress(self, phase: str) -> Progress | None:
        """Return the progress callback of one phase."""
        return None if self.progress is None else partial(self.progress, phase)


def describe_generator(spec: GeneratorSpec) -> dict[str, Any]:
    """Return all that pseudo-items depend on besides users, titles and vectors."""
    if spec.model == LOCAL:
        model: dict[str, Any] = {"local": asdict(spec.local), "training": TRAINING}
    else:
        model = dict(resolve_generator(spec).identity)
    return {
        "version": VERSION,
        "generator": {"name": spec.model, **model, **spec.sampling},
        "prompt": {"history": spec.history, "title_words": spec.title_words},
        "recall_users": spec.recall_users,
    }


def item_titles(domain: Domain) -> dict[str, str]:
    """Return the title of each item of a domain as a generator reads it; '' where there is none."""
    items = pq.read_table(domain.path / "items.parquet", columns=["item_id", "title"])
    return dict(zip(items["item_id"].to_pylist(), map(clean, items["title"].to_pylist()), strict=True))


def make_pseudo(
    spec: GeneratorSpec,
    encoder: EncoderSpec,
    users: Sequence[History],
    titles: Mapping[str, Mapping[str, str]],
    tables: Mapping[str, FeatureTable],
    store: Path,
    execution: Execution | None = None,
) -> PseudoTable:
    """Return `spec.texts` different real items of the other domain for each user of one domain; made if the store has none.

    users: the training users, and nobody else. titles: domain name -> item id -> title (`item_titles`). tables: domain
    name -> vectors of its items, made by `encoder`. Both directions of a pair of domains are made together.
    The manifest holds figures of the items, and their recall (`features.pseudo.recall`).
    Raises InputError for a generator or encoder that is missing or not what it should be, unknown items, or no user to
    learn from.
    """
    start = time.monotonic()
    maker = _PseudoMaker(spec, resolve_encoder(encoder), titles, tables, store, execution or Execution())
    users = sorted(users, key=lambda user: user.user)
    maker.check(users)
    document = maker.describe(users)
    key = digest(document)
    folder = store / "pseudo" / f"{'-'.join(sorted(tables))}-{key[:12]}"
    if folder.exists():
        return open_pseudo(folder, key)

    single = [user for user in users if len(maker.domains_of(user)) == 1]
    held_out, fit = maker.hold_out([user for user in users if len(maker.domains_of(user)) == 2])
    generator = maker.generator(fit)
    requests = [(user, maker.other_domain(maker.domains_of(user)[0])) for user in single]
    requests += [(user, target) for target in sorted(tables) for user in held_out]
    lists = maker.lists(requests, generator)
    recall = [
        row
        for n, target in enumerate(sorted(tables))
        for row in maker.recall(held_out, fit, target, lists[len(single) + n * len(held_out) :][: len(held_out)])
    ]
    lists = lists[: len(single)]
    text_rows, vectors = maker.text_vectors(requests[: len(single)], lists)
    rows = pa.table(
        {
            "user_id": [user.user for user in single],
            "items": [one.items for one in lists],
            "similarity": [one.similarity for one in lists],
            "texts": [one.texts for one in lists],
            "text_rows": text_rows,
        },
        schema=SCHEMA,
    )
    figures = {**_figures(lists), "recall": recall, "seconds": round(time.monotonic() - start, 1)}
    return write_pseudo(folder, rows, vectors, {"key": key, **document, **figures})


def read_recall(table: PseudoTable) -> list[dict[str, Any]]:
    """Return the recall of a table's items: rows of `features.pseudo.recall.Recall`; none where no user was kept out."""
    rows: list[dict[str, Any]] = read_json(table.path / "manifest.json")["recall"]
    return rows


@dataclass(frozen=True)
class _UserList:
    """One user's items of one domain, and the texts that they were retrieved by."""

    items: list[str]
    similarity: list[float]
    texts: list[str]


def _figures(lists: Sequence[_UserList]) -> dict[str, Any]:
    similarity = [cosine for one in lists for cosine in one.similarity]
    return {
        "users": len(lists),
        "without_items": sum(not one.items for one in lists),
        "texts": sum(len(one.texts) for one in lists),
        "different_texts": len({text for one in lists for text in one.texts}),
        "items": sum(len(one.items) for one in lists),
        "different_items": len({item for one in lists for item in one.items}),
        "mean_similarity": round(float(np.mean(similarity)), 4) if similarity else None,
    }


class _PseudoMaker:
    """The inputs of one call of `make_pseudo`, and its steps."""

    def __init__(
        self,
        spec: GeneratorSpec,
        encoder: ResolvedEncoder,
        titles: Mapping[str, Mapping[str, str]],
        tables: Mapping[str, FeatureTable],
        store: Path,
        execution: Execution,
    ) -> None:
        self.spec, self.encoder, self.tables, self.store, self.execution = spec, encoder, tables, store, execution
        self.titles = {
            name: {item: short_title(title, spec.title_words) for item, title in domain_titles.items()}
            for name, domain_titles in titles.items()
        }

    def check(self, users: Sequence[History]) -> None:
        """Raise InputError where users, titles, tables and encoder do not fit."""
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
        """Return all that the table depends on."""
        return {
            **describe_generator(self.spec),
            "encoder": self.encoder.key,
            "tables": {name: table.key for name, table in sorted(self.tables.items())},
            "titles": digest({name: dict(titles) for name, titles in self.titles.items()}),
            "histories": digest({user.user: {d: list(user.items[d]) for d in self.domains_of(user)} for user in users}),
        }

    def other_domain(self, domain: str) -> str:
        """Return the other one of the two domains."""
        (other,) = set(self.tables) - {domain}
        return other

    def domains_of(self, user: History) -> list[str]:
        """Return the domains in which the user has items."""
        return [name for name in sorted(self.tables) if user.items.get(name)]

    def distinct_titles(self, domain: str, items: Sequence[str]) -> tuple[str, ...]:
        """Return the titles of items, each once, without those that have none."""
        titles = self.titles[domain]
        return tuple(dict.fromkeys(titles[item] for item in items if titles[item]))

    def prompt(self, user: History, target: str) -> PseudoPrompt:
        """Return a user's prompt for items of `target`."""
        source = self.other_domain(target)
        titles = self.distinct_titles(source, user.items[source][::-1])[: self.spec.history]
        return PseudoPrompt(user=user.user, source=source, target=target, titles=titles)

    def hold_out(self, overlapping: Sequence[History]) -> tuple[list[History], list[History]]:
        """Split overlapping users: (those kept out of all training to measure recall, all others)."""
        count = min(self.spec.recall_users, len(overlapping) // 10)
        order = np.random.default_rng(self.spec.seed).permutation(len(overlapping)).tolist()
        return [overlapping[i] for i in sorted(order[:count])], [overlapping[i] for i in sorted(order[count:])]

    def generator(self, fit: Sequence[History]) -> ResolvedGenerator:
        """Find the generator; the local model is trained on the users `fit`."""
        if self.spec.model != LOCAL:
            return resolve_generator(self.spec)
        pairs = [
            (self.prompt(user, target), self.distinct_titles(target, user.items[target]))
            for user in fit
            for target in user.items
        ]
        examples = [Example(prompt=prompt, titles=titles) for prompt, titles in pairs if prompt.titles and titles]
        wording, spec, progress = find_wording(self.spec.prompt), self.spec, self.execution.phase_progress("train")
        folder = train_local_model(spec.local, examples, wording, spec.seed, self.store, progress)
        return resolve_generator(spec, folder)

    def lists(self, requests: Sequence[tuple[History, str]], generator: ResolvedGenerator) -> list[_UserList]:
        """Return items for each request: (user, domain of the items)."""
        texts = self._texts([self.prompt(user, target) for user, target in requests], generator)
        excluded = [self._excluded(user, target) for user, target in requests]
        depth = self.spec.texts + max(map(len, excluded), default=0)
        nearest = self._nearest(requests, texts, depth)
        lists = []
        for (_, domain), user_texts, user_excluded in zip(requests, texts, excluded, strict=True):
            candidates = [nearest[domain][text] for text in user_texts if text in nearest[domain]]
            chosen = choose_items(candidates, self.spec.texts, user_excluded)
            ids = self.tables[domain].ids
            lists.append(_UserList([ids[n] for n in chosen.items], chosen.similarity, user_texts))
        return lists

    def _texts(self, prompts: Sequence[PseudoPrompt], generator: ResolvedGenerator) -> list[list[str]]:
        """Generate texts for each prompt; none for one without titles."""
        execution, with_titles = self.execution, [n for n, prompt in enumerate(prompts) if prompt.titles]
        answers = generate_cached(
            [prompts[n] for n in with_titles], generator, self.store, progress=execution.phase_progress("generate"),
            workers=execution.workers, use_ray=execution.use_ray, loader=execution.load_generator,
        )  # fmt: skip
        texts: list[list[str]] = [[] for _ in prompts]
        for n, answer in zip(with_titles, answers, strict=True):
            texts[n] = parse_texts(answer, self.spec.texts)
        return texts

    def _nearest(
        self, requests: Sequence[tuple[History, str]], texts: Sequence[Sequence[str]], depth: int
    ) -> dict[str, dict[str, Nearest]]:
        """Return domain -> text -> its `depth` nearest items, for all texts that can be encoded."""
        different: dict[str, set[str]] = {domain: set() for domain in self.tables}
        for (_, domain), user_texts in zip(requests, texts, strict=True):
            different[domain].update(user_texts)
        inputs = {
            domain: {text: self._encoder_input(domain, text) for text in sorted(different[domain])}
            for domain in sorted(different)
        }
        vectors = self._encode({one for domain_inputs in inputs.values() for one in domain_inputs.values()})
        nearest: dict[str, dict[str, Nearest]] = {}
        for domain, domain_inputs in inputs.items():
            keys = {text: input_key(one) for text, one in domain_inputs.items()}
            by_key = nearest_by_key(vectors, set(keys.values()), self.tables[domain].vectors, depth)
            nearest[domain] = {text: by_key[key] for text, key in keys.items() if key in by_key}
        return nearest

    def text_vectors(
        self, requests: Sequence[tuple[History, str]], lists: Sequence[_UserList]
    ) -> tuple[list[list[int]], NDArray[Any]]:
        """Return the rows of each list's texts among the vectors of all different ones, and these vectors [G, F]."""
        different = {(domain, text) for (_, domain), one in zip(requests, lists, strict=True) for text in one.texts}
        key = {pair: input_key(self._encoder_input(*pair)) for pair in different}
        width = next(iter(self.tables.values())).vectors.shape[1]
        keys, vectors = vectors_by_key(VectorStore.open(self.store, self.encoder.key), set(key.values()), width)
        row = {one: number for number, one in enumerate(keys)}
        rows = [
            [row.get(key[domain, text], -1) for text in one.texts]
            for (_, domain), one in zip(requests, lists, strict=True)
        ]
        return rows, vectors

    def _excluded(self, user: History, target: str) -> list[int]:
        """Return the numbers of the user's source items that the target domain lists under the same id."""
        numbers = self._numbers[target]
        return [numbers[item] for item in dict.fromkeys(user.items[self.other_domain(target)]) if item in numbers]

    @cached_property
    def _numbers(self) -> dict[str, dict[str, int]]:
        """Domain -> item id -> its number in the item table."""
        return {name: {item: n for n, item in enumerate(table.ids)} for name, table in self.tables.items()}

    def _encoder_input(self, domain: str, text: str) -> EncoderInput:
        """Return a text as the encoder reads it: as the title of an item of that domain."""
        prompt = find_prompt(self.tables[domain].manifest["prompt"]["name"])
        return EncoderInput(texts=(prompt.title.format(text),))

    def _encode(self, inputs: Collection[EncoderInput]) -> VectorStore:
        """Return the store that holds the vectors of all inputs but those that cannot be encoded."""
        execution = self.execution
        vectors, failed = encode_inputs(
            inputs, self.encoder, self.store, progress=execution.phase_progress("encode"),
            workers=execution.workers, use_ray=execution.use_ray, loader=execution.load_encoder,
        )  # fmt: skip
        if inputs and len(failed) == len(inputs):
            raise InputError(f"pseudo-items: no generated text can be encoded; the first: {min(failed.values())}")
        return vectors

    def recall(
        self, held_out: Sequence[History], fit: Sequence[History], target: str, lists: Sequence[_UserList]
    ) -> list[dict[str, Any]]:
        """Measure the recall of the lists of the users kept out."""
        source = self.other_domain(target)

        def user_items(user: History) -> UserItems:
            listed = {name: [item for item in user.items[name] if item in self._numbers[name]] for name in self.tables}
            return UserItems(source=listed[source], target=listed[target])

        pairs = [(user_items(user), one.items) for user, one in zip(held_out, lists, strict=True)]
        pairs = [(user, items) for user, items in pairs if user.source and user.target]
        tables = (self.tables[source], self.tables[target])
        users, pseudo = [user for user, _ in pairs], [items for _, items in pairs]
        fit_items = [user_items(user) for user in fit]
        return measure_recall(users, pseudo, fit_items, tables, (source, target), self.spec.seed)
