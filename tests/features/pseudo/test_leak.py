"""No leak, byte for byte: from raw files to pseudo-items, what held-out users did changes nothing that is made."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from features.domains.domain import Domain, DomainSpec, prepare_domain
from features.encoders.spec import EncoderSpec
from features.extraction.spec import FeatureSpec
from features.pseudo.generate import History, item_titles, make_pseudo
from features.pseudo.generator import GeneratorSpec
from features.pseudo.local_model import LocalModelSpec
from tests.features.one_table import extract
from trainables.tasks.sequential import SequenceSpec
from trainables.tasks.sequential_build import training_users

DOMAINS = ("books", "movies")
SPEC = SequenceSpec(overlap_ratio=0.8)


def interactions(seed: int, held_out: Mapping[str, str]) -> pd.DataFrame:
    """60 users, 40 of them in both domains; `seed` is of the items of the held-out users, and of nobody else's."""
    rows = []
    for number in range(60):
        user = f"u{number:02d}"
        draw = random.Random(f"{user} {seed if user in held_out else 'training'}")
        domains = [*DOMAINS * 3] if number < 40 else [DOMAINS[number % 2]] * 5
        items = {domain: draw.sample(range(25), len(domains)) for domain in DOMAINS}
        rows += [(user, d, f"{d[0]}{items[d][place]:02d}", place) for place, d in enumerate(domains)]
    rows += [("everything", d, f"{d[0]}{item:02d}", item) for d in DOMAINS for item in range(25)]  # the catalogue stays
    return pd.DataFrame(rows, columns=["user_id", "domain", "item_id", "position"])


def domains_of(table: pd.DataFrame, folder: Path) -> dict[str, Domain]:
    folder.mkdir()
    table.to_parquet(folder / "interactions.parquet")
    names = sorted(set(table["domain"] + " " + table["item_id"]))
    titles = [" ".join(f"w{random.Random(f'{name} {word}').randrange(90)}" for word in range(3)) for name in names]
    domain, item = zip(*(name.split() for name in names), strict=True)
    pd.DataFrame({"domain": domain, "item_id": item, "title": titles}).to_parquet(folder / "items.parquet")

    def spec(name: str) -> DomainSpec:
        return DomainSpec(
            name=name, reader="table", interactions="interactions.parquet", items="items.parquet",
            columns={"timestamp": "position"}, where={"domain": name}, feedback="implicit",
        )  # fmt: skip

    return {name: prepare_domain(spec(name), folder, folder / "domains") for name in DOMAINS}


def made(table: pd.DataFrame, split: Mapping[str, str], model: Path, folder: Path) -> dict[str, bytes]:
    """All that is made for pseudo-items, by its place in the store; of their table only the rows."""
    encoder = EncoderSpec(model=str(model), max_tokens=32, dtype="float32", store_dtype="float32")
    domains = domains_of(table, folder)
    tables = {name: extract(FeatureSpec(kind="items", encoder=encoder), domains[name], folder) for name in DOMAINS}
    people = training_users(SPEC, domains["books"], domains["movies"], split)
    users = []
    for number, user in enumerate(people.user):
        own = slice(people.starts[number], people.starts[number + 1])
        item, movie = people.item[own], people.in_target[own]
        users.append(History(user=str(user), items={"books": list(item[~movie]), "movies": list(item[movie])}))
    assert {user.user.partition("@")[0] for user in users} == {user for user, part in split.items() if part == "train"}
    spec = GeneratorSpec(
        texts=6, dtype="float32", max_new_tokens=60, local=LocalModelSpec(width=32, layers=1, epochs=2, vocabulary=600)
    )
    titles = {name: item_titles(domain) for name, domain in domains.items()}
    pseudo = make_pseudo(spec, encoder, users, titles, tables, folder / "store")
    kept = [*folder.glob("store/generators/*/*.safetensors"), *folder.glob("store/generators/*/tok*")]
    kept += folder.glob("store/answers/*/*.arrow")
    files = {str(path.relative_to(folder)): path.read_bytes() for path in kept}
    return files | {"pseudo": (pseudo.path / "pseudo.parquet").read_bytes()}


@pytest.mark.parametrize("who", ["valid", "test"])
def test_what_held_out_users_did_changes_no_model_no_answer_and_no_item(
    who: str, tiny_bert: Path, tmp_path: Path
) -> None:
    parts = np.random.default_rng(0).choice(["train", "train", "valid", "test"], 40)
    split = {f"u{n:02d}": str(parts[n]) if n < 40 else "train" for n in range(60)} | {"everything": "test"}
    held_out = {user: part for user, part in split.items() if part == who}
    before, after = (interactions(seed, held_out) for seed in (0, 1))
    changed = before.ne(after).any(axis=1)
    assert set(before.loc[changed, "user_id"]) == set(held_out) - {"everything"}
    one, other = (made(table, split, tiny_bert, tmp_path / str(n)) for n, table in enumerate((before, after)))
    assert len(one) > 4
    assert one == other


def test_what_training_users_did_changes_all_of_it(tiny_bert: Path, tmp_path: Path) -> None:
    split = {f"u{n:02d}": "train" for n in range(60)} | {"everything": "test"}
    one, other = (made(interactions(seed, split), split, tiny_bert, tmp_path / str(seed)) for seed in (0, 1))
    assert one["pseudo"] != other["pseudo"]
    assert not (set(one) & set(other)) - {"pseudo"}
