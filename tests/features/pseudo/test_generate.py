"""Pseudo-items end to end: real items only, resumed after a kill, and nobody in them who was not handed in."""

from __future__ import annotations

import json
import pickle
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from features.domains.domain import Domain
from features.encoders.spec import EncoderSpec
from features.errors import InputError
from features.extraction.spec import FeatureSpec
from features.pseudo import generate as module
from features.pseudo.generate import Execution, History, item_titles, make_pseudo, read_recall
from features.pseudo.generator import GeneratorSpec, ResolvedGenerator, load_generator
from features.pseudo.local_model import Example, LocalModelSpec, train_local_model
from features.pseudo.prompts import PseudoPrompt
from features.pseudo.table import PseudoTable
from features.store.tables import FeatureTable
from tests.features.one_table import extract

from ...patience import PATIENCE_S

ITEMS = 30
SMALL = LocalModelSpec(width=32, layers=1, epochs=2, vocabulary=600)


@dataclass(frozen=True)
class World:
    """Two domains whose items share some ids, and their tables."""

    encoder: EncoderSpec
    titles: Mapping[str, Mapping[str, str]]
    tables: Mapping[str, FeatureTable]

    def make(self, users: Sequence[History], store: Path, spec: GeneratorSpec, **execution: Any) -> PseudoTable:
        return make_pseudo(spec, self.encoder, users, self.titles, self.tables, store, Execution(**execution))


@pytest.fixture
def world(make_domain: Callable[..., Domain], tiny_bert: Path, tmp_path: Path) -> World:
    encoder = EncoderSpec(
        model=str(tiny_bert), max_tokens=32, dtype="float32", store_dtype="float32", max_failed_fraction=0.1
    )
    domains = {}
    for name, first in (("books", 0), ("movies", 20)):  # i020 to i029 are in both
        items = [(f"i{i:03d}", title_of(name, i), None, None) for i in range(first, first + ITEMS)]
        domains[name] = make_domain([("u", item[0], "w1") for item in items], items, name)
    tables = {
        name: extract(FeatureSpec(kind="items", encoder=encoder), domain, tmp_path / "features", use_ray=False)
        for name, domain in domains.items()
    }
    return World(encoder, {name: item_titles(domain) for name, domain in domains.items()}, tables)


def title_of(domain: str, item: int) -> str | None:
    draw = random.Random(f"{domain} {item}")
    return " ".join(f"w{draw.randrange(90)}" for _ in range(3)) if item != 25 else None


def ids(domain: str, seed: object, count: int) -> list[str]:
    first = {"books": 0, "movies": 20}[domain]
    return [f"i{i:03d}" for i in random.Random(f"{domain} {seed}").sample(range(first, first + ITEMS), count)]


def people(overlapping: int = 40, single: int = 30) -> list[History]:
    users = [
        History(user=f"o{u:03d}", items={"books": ids("books", u, 4), "movies": ids("movies", u, 3)})
        for u in range(overlapping)
    ]
    for u in range(single):
        domain = ("books", "movies")[u % 2]
        users.append(History(user=f"s{u:03d}", items={domain: ids(domain, u, 5)}))
    return users


def local(**fields: Any) -> GeneratorSpec:
    given = {"texts": 6, "max_new_tokens": 60, "dtype": "float32", "local": SMALL, "temperature": 1.0} | fields
    return GeneratorSpec(**given)


def rows_of(table: PseudoTable) -> list[dict[str, Any]]:
    """Rows, each with the vectors of its texts in the place of their numbers."""
    rows: list[dict[str, Any]] = pq.read_table(table.path / "pseudo.parquet").to_pylist()
    vectors = np.load(table.vectors)
    assert all(number >= 0 for row in rows for number in row["text_rows"])
    return [{**row, "text_rows": vectors[row["text_rows"]].tolist()} for row in rows]


def check_rows(world: World, users: Sequence[History], rows: Sequence[Mapping[str, Any]], texts: int) -> None:
    """Every rule that a table of pseudo-items keeps."""
    single = {user.user: user for user in users if len(user.items) == 1}
    assert [row["user_id"] for row in rows] == sorted(single)
    for row in rows:
        ((domain, own),) = single[row["user_id"]].items.items()
        (other,) = set(world.tables) - {domain}
        assert set(row["items"]) <= set(world.tables[other].ids)
        assert len(set(row["items"])) == len(row["items"]) == len(row["similarity"]) <= texts
        assert not set(row["items"]) & set(own)
        assert all(-1.001 <= value <= 1.001 for value in row["similarity"])


class Spy:
    """The real generator, writing down what it is asked."""

    def __init__(self, resolved: ResolvedGenerator, seen: list[PseudoPrompt]) -> None:
        self.generator = load_generator(resolved)
        self.seen = seen

    def generate(self, prompts: Sequence[PseudoPrompt]) -> list[str]:
        self.seen += prompts
        return self.generator.generate(prompts)


def spying(seen: list[PseudoPrompt]) -> Callable[[ResolvedGenerator], Spy]:
    return lambda resolved: Spy(resolved, seen)


class Says:
    """A generator that says what a test wants it to say."""

    def __init__(self, answers: Callable[[PseudoPrompt], str]) -> None:
        self.answers = answers

    def generate(self, prompts: Sequence[PseudoPrompt]) -> list[str]:
        return [self.answers(prompt) for prompt in prompts]


def test_the_local_model_gives_every_single_domain_user_real_items(world: World, tmp_path: Path) -> None:
    users = people()
    table = world.make(users, tmp_path / "store", local())
    rows = rows_of(table)
    check_rows(world, users, rows, 6)
    assert all(len(row["items"]) == 6 for row in rows if row["texts"])
    manifest = json.loads((table.path / "manifest.json").read_text())
    assert manifest["users"] == 30
    assert manifest["items"] == sum(len(row["items"]) for row in rows)
    assert len({tuple(row["items"]) for row in rows}) > 15


def test_any_other_model_goes_the_same_way(world: World, tiny_generator: Path, tmp_path: Path) -> None:
    users = people()
    table = world.make(users, tmp_path / "store", local(model=str(tiny_generator)))
    check_rows(world, users, rows_of(table), 6)
    assert {row["items"] for row in read_recall(table)} == {"pseudo", "popular", "random", "nearest"}
    assert not (tmp_path / "store" / "generators").exists()


def test_a_text_that_is_a_title_finds_its_item_first(world: World, tiny_llama: Path, tmp_path: Path) -> None:
    wanted = {"books": ["i003", "i004", "i003", "i005"], "movies": ["i040", "i041", "i040", "i042"]}
    says = Says(lambda prompt: "".join(f"- {world.titles[prompt.target][item]}\n" for item in wanted[prompt.target]))
    spec = local(model=str(tiny_llama))
    rows = rows_of(world.make(people(), tmp_path, spec, load_generator=lambda _: says))
    for row in rows:
        right = wanted["movies" if row["user_id"] in {f"s{u:03d}" for u in range(0, 30, 2)} else "books"]
        assert row["items"][:3] == list(dict.fromkeys(right))
        assert row["similarity"][:3] == pytest.approx([1, 1, 1], abs=1e-3)
        assert len(row["items"]) == 6  # filled with what is most similar to the three texts


def test_answers_without_texts_give_no_items_and_short_ones_are_filled(
    world: World, tiny_llama: Path, tmp_path: Path
) -> None:
    says = Says(lambda prompt: "" if prompt.user < "s010" else "w1 w2" if prompt.user < "s020" else "w1\nw2\n" * 20)
    spec = local(model=str(tiny_llama), recall_users=0)
    table = world.make(people(), tmp_path, spec, load_generator=lambda _: says)
    counts = [(len(row["texts"]), len(row["items"])) for row in rows_of(table)]
    assert counts == [(0, 0)] * 10 + [(1, 6)] * 10 + [(2, 6)] * 10
    assert read_recall(table) == []


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6), st.integers(1, 40), st.lists(st.sampled_from(["w1 w2", "w3", "", "w1 w2", "w9 w8 w7"])))
def test_whatever_is_answered_the_items_are_real_different_and_not_the_users_own(
    world: World, tiny_llama: Path, tmp_path: Path, seed: int, texts: int, lines: list[str]
) -> None:
    draw = random.Random(seed)
    users = people(overlapping=0, single=draw.randint(1, 12))
    store = tmp_path / f"{seed} {texts} {len(lines)} {draw.random()}"
    spec = local(model=str(tiny_llama), texts=texts)
    says = Says(lambda prompt: "\n".join(random.Random(f"{seed} {prompt.user}").sample(lines, len(lines))))
    rows = rows_of(world.make(users, store, spec, load_generator=lambda _: says))
    check_rows(world, users, rows, texts)


# --- who is read --------------------------------------------------------------------------------------------------


def test_prompts_show_single_domain_users_and_training_shows_the_overlapping_ones(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    users, seen, trained = people(overlapping=40), [], []

    def train(spec: Any, examples: Sequence[Example], *rest: Any) -> Path:
        trained.extend(examples)
        return train_local_model(spec, examples, *rest)

    monkeypatch.setattr(module, "train_local_model", train)
    world.make(users, tmp_path, local(recall_users=3), load_generator=spying(seen))
    learned = {example.prompt.user for example in trained}
    asked = {prompt.user for prompt in seen}
    assert len(learned) == 37
    assert all(user.startswith("o") for user in learned)
    assert {user for user in asked if user.startswith("s")} == {f"s{u:03d}" for u in range(30)}
    kept_out = {user for user in asked if user.startswith("o")}
    assert len(kept_out) == 3  # asked for their value in both directions, and never learned from
    assert not kept_out & learned
    assert len(seen) == 30 + 2 * 3
    own = {user.user: user.items for user in users}
    for prompt in [*seen, *(example.prompt for example in trained)]:
        theirs = [world.titles[prompt.source][item] for item in own[prompt.user][prompt.source]]
        assert list(prompt.titles) == [
            title for title in theirs[::-1] if title
        ]  # newest first, of their own items only


def test_the_order_of_users_changes_nothing(world: World, tmp_path: Path) -> None:
    table = world.make(people(), tmp_path / "a", local())
    again = world.make(people()[::-1], tmp_path / "b", local())
    assert again.key == table.key
    assert (again.path / "pseudo.parquet").read_bytes() == (table.path / "pseudo.parquet").read_bytes()


def test_what_is_shown_is_cut_to_the_newest_and_first_words(world: World, tiny_llama: Path, tmp_path: Path) -> None:
    seen: list[PseudoPrompt] = []
    spec = local(model=str(tiny_llama), history=2, title_words=1, recall_users=0)
    user = History(user="a", items={"books": ["i001", "i002", "i003"]})
    world.make([user], tmp_path, spec, load_generator=spying(seen))
    expected = [str(title_of("books", item)).split()[0] for item in (3, 2)]
    assert [list(prompt.titles) for prompt in seen] == [expected]


# --- done once, and resumed ---------------------------------------------------------------------------------------


def test_what_is_made_is_opened_and_what_changes_makes_anew_only_what_changed(world: World, tmp_path: Path) -> None:
    users, seen = people(), []
    first = world.make(users, tmp_path, local(), load_generator=spying(seen))
    count = len(seen)
    again = world.make(users, tmp_path, local(batch_tokens=999), load_generator=spying(seen))
    assert (again.path, len(seen)) == (first.path, count)
    another = [*users, History(user="s999", items={"books": ids("books", "new", 3)})]
    wider = world.make(another, tmp_path, local(), load_generator=spying(seen))
    assert wider.key != first.key
    assert [prompt.user for prompt in seen[count:]] == ["s999"]
    same = {row["user_id"]: row for row in rows_of(wider)}
    assert [same[row["user_id"]] for row in rows_of(first)] == rows_of(first)
    for change in ({"texts": 5}, {"seed": 1}, {"temperature": 0.5}, {"history": 2}, {"recall_users": 0}):
        assert world.make(users, tmp_path, local(**change)).key != first.key


KILLED = """
    import sys, time, pickle
    from pathlib import Path
    from features.pseudo.generator import load_generator
    from features.pseudo.generate import Execution, make_pseudo

    class Slow:
        def __init__(self, resolved): self.generator = load_generator(resolved)
        def generate(self, prompts):
            time.sleep(0.3)
            return self.generator.generate(prompts)

    call, store = sys.argv[1:]
    make_pseudo(*pickle.loads(Path(call).read_bytes()), Path(store), Execution(load_generator=Slow, workers=1))
"""


def test_a_killed_run_goes_on_where_it_was(world: World, tmp_path: Path) -> None:
    users, spec, store = people(single=400), local(), tmp_path / "killed"
    call = tmp_path / "call"
    call.write_bytes(pickle.dumps((spec, world.encoder, users, world.titles, world.tables)))
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(call), str(store)], cwd=Path(__file__).parents[3]
    )
    deadline = time.monotonic() + PATIENCE_S
    while len(list(store.glob("answers/*/*.arrow"))) < 3 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (answers,) = store.glob("answers/*")
    kept = sum(pa.ipc.open_file(str(path)).read_all().num_rows for path in answers.glob("*.arrow"))
    (model,) = store.glob("generators/*/model.safetensors")
    stamp = model.stat().st_mtime_ns
    assert 0 < kept < 400
    assert not list(store.glob("pseudo/*"))

    seen: list[PseudoPrompt] = []
    resumed = world.make(users, store, spec, load_generator=spying(seen))
    assert len(seen) == 400 + 2 * 4 - kept
    assert model.stat().st_mtime_ns == stamp
    whole = world.make(users, tmp_path / "whole", spec)
    assert (resumed.path / "pseudo.parquet").read_bytes() == (whole.path / "pseudo.parquet").read_bytes()
    assert {path.name: path.read_bytes() for path in answers.iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "whole" / "answers" / answers.name).iterdir()
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
def test_ray_actors_give_the_same_table_and_every_phase_tells_how_far_it_is(world: World, tmp_path: Path) -> None:
    users, calls = people(), []
    by_ray = world.make(
        users, tmp_path / "ray", local(), use_ray=True, workers=2, progress=lambda *call: calls.append(call)
    )
    alone = world.make(users, tmp_path / "alone", local(), use_ray=False)
    assert (by_ray.path / "pseudo.parquet").read_bytes() == (alone.path / "pseudo.parquet").read_bytes()
    assert list(dict.fromkeys(phase for phase, *_ in calls)) == ["train", "generate", "encode"]
    for phase in ("train", "generate"):
        done = [(n, todo) for name, n, todo, *_ in calls if name == phase]
        assert done[-1][0] == done[-1][1]
    assert next(todo for name, _, todo, *_ in calls if name == "generate") == 6 * (30 + 2 * 4)


# --- bad input ----------------------------------------------------------------------------------------------------


def test_input_that_does_not_fit(world: World, tmp_path: Path) -> None:
    def refused(
        message: str, users: Sequence[History] = (), encoder: EncoderSpec = world.encoder, **changed: Any
    ) -> None:
        other = replace(world, encoder=encoder, **changed)
        with pytest.raises(InputError, match=message) as caught:
            other.make(users or people(), tmp_path, local())
        assert "\n" not in str(caught.value)

    refused("give pseudo-items the encoder of the item tables", encoder=replace(world.encoder, pooling="mean"))
    refused("domain books has no item 'i999'", [History(user="a", items={"books": ["i999"]})])
    refused("two domains with titles and tables are needed", tables={"books": world.tables["books"]})
    refused("no training user has items in both domains", people(overlapping=0))


def test_lost_answers_are_noticed(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from features.pseudo import generation_cache

    monkeypatch.setattr(generation_cache, "write_shard", lambda *_: None)
    with pytest.raises(RuntimeError, match=r"38 of 38 answers were lost; run it again"):
        world.make(people(), tmp_path, local())


def test_shared_ids_are_not_given_back(world: World, tiny_llama: Path, tmp_path: Path) -> None:
    """i020 to i029 are items of both domains: whoever has one has it, whatever the domain."""
    user = History(user="a", items={"books": ["i020", "i021", "i022"]})
    says = Says(lambda prompt: "".join(f"{world.titles['movies'][item]}\n" for item in ("i020", "i021", "i030")))
    spec = local(model=str(tiny_llama), texts=40)
    (row,) = rows_of(world.make([user], tmp_path, spec, load_generator=lambda _: says))
    assert set(row["items"]) == set(world.tables["movies"].ids) - {"i020", "i021", "i022"}
