"""The language model that is trained here: its tokenizer, its loss against the full softmax, and that it learns."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from features.errors import InputError
from features.pseudo.generator import GeneratorSpec, load_generator, resolve_generator
from features.pseudo.local_model import Example, LocalModelSpec, contrastive_loss, train_local_model, train_tokenizer
from features.pseudo.prompts import PseudoPrompt, find_wording
from tests.features.conftest import TITLES

WORDS = find_wording("items-1")
SMALL = LocalModelSpec(width=32, layers=1, epochs=8, vocabulary=600)


def pairs(users: int = 160, first: int = 0) -> list[Example]:
    """Users whose food says what kitchen they want: kind k has food k, and kitchen titles k and k + 1."""
    draw = random.Random(first)
    examples = []
    for user in range(first, first + users):
        kind = draw.randrange(4)
        prompt = PseudoPrompt(
            user=f"u{user}", source="food", target="kitchen", titles=(f"Food {kind}", f"Salt {user % 3}")
        )
        examples.append(Example(prompt=prompt, titles=(TITLES[2 * kind], TITLES[2 * kind + 1])))
    return examples


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_local_model(SMALL, pairs(), WORDS, 0, tmp_path_factory.mktemp("store"))


def test_it_learns_which_titles_go_together_and_is_loaded_like_any_model(trained: Path) -> None:
    spec = GeneratorSpec(texts=2, temperature=0.0, dtype="float32")
    generator = load_generator(resolve_generator(spec, trained))
    unseen = pairs(40, first=1000)
    answers = generator.generate([example.prompt for example in unseen])
    right = [set(answer.splitlines()) == set(example.titles) for answer, example in zip(answers, unseen, strict=True)]
    assert sum(right) >= 36
    losses = json.loads((trained / "manifest.json").read_text())["losses"]
    assert losses[-1] < losses[0] - 1


def test_training_is_deterministic_done_once_and_leaves_the_process_as_it_was(trained: Path, tmp_path: Path) -> None:
    torch.set_num_threads(2)
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    calls: list[tuple[int, int]] = []
    again = train_local_model(SMALL, pairs(), WORDS, 0, tmp_path, lambda *done: calls.append(done))
    assert torch.get_num_threads() == 2
    assert torch.equal(torch.random.get_rng_state(), before)
    assert again.name == trained.name
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (again / name).read_bytes() == (trained / name).read_bytes()
    assert calls == [(160 * epoch, 1280) for epoch in range(1, 9)]
    stamp = (again / "model.safetensors").stat().st_mtime_ns
    assert train_local_model(SMALL, pairs(), WORDS, 0, tmp_path) == again
    assert (again / "model.safetensors").stat().st_mtime_ns == stamp


def test_another_seed_other_users_or_another_shape_is_another_model(trained: Path, tmp_path: Path) -> None:
    quick = LocalModelSpec(width=32, layers=1, epochs=1, vocabulary=600)
    names = {trained.name, train_local_model(quick, pairs(), WORDS, 0, tmp_path).name}
    names.add(train_local_model(quick, pairs(), WORDS, 1, tmp_path).name)
    names.add(train_local_model(quick, pairs(159), WORDS, 0, tmp_path).name)
    assert len(names) == 4


def test_nobody_to_learn_from(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no training user has items in both domains; give generator\.model a folder"):
        train_local_model(SMALL, [], WORDS, 0, tmp_path)


def test_all_faults_of_a_spec_at_once() -> None:
    with pytest.raises(InputError, match=r"generator\.local\.width is 40; give a multiple of 32") as caught:
        LocalModelSpec(width=40, layers=0, epochs=0, vocabulary=9)
    for name, value in (("layers", 0), ("epochs", 0), ("vocabulary", 9)):
        assert f"generator.local.{name} is {value}; give a whole number of at least" in str(caught.value)


# --- tokenizer ----------------------------------------------------------------------------------------------------


def test_frequent_titles_are_tokens_as_far_as_the_vocabulary_goes() -> None:
    titles = [title for rank, title in enumerate(TITLES) for _ in range(20 - rank)]
    tokenizer = train_tokenizer(iter(titles), 5000)
    assert [len(tokenizer(f"{title}\n")["input_ids"]) for title in TITLES] == [1] * len(TITLES)
    small = train_tokenizer(iter(titles), 257)
    assert len(small) == 257
    assert all(len(small(f"{title}\n")["input_ids"]) > 4 for title in TITLES)


@pytest.fixture(scope="module")
def tokenizers(trained: Path) -> tuple[object, object]:
    return train_tokenizer(iter(TITLES), 600), AutoTokenizer.from_pretrained(trained)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_comes_back(tokenizers: tuple, text: str) -> None:
    for tokenizer in tokenizers:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_text_has_the_tokens_of_its_lines(tokenizers: tuple) -> None:
    lines = ["food:\n", f"{TITLES[0]}\n", "Something unknown\n", f"{TITLES[4]}\n"]
    for tokenizer in tokenizers:
        apart = [token for line in lines for token in tokenizer(line)["input_ids"]]
        assert tokenizer("".join(lines))["input_ids"] == apart


# --- loss ---------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_full_softmax_where_the_batch_holds_every_token() -> None:
    torch.manual_seed(0)
    states, embedding = torch.randn(40, 8), torch.randn(20, 8)
    wanted = torch.arange(40) % 20
    loss = contrastive_loss(states, wanted, embedding, torch.Generator().manual_seed(0))
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(states @ embedding.T, wanted))


def test_the_estimated_denominator_is_right_on_average() -> None:
    torch.manual_seed(0)
    states, embedding, wanted = torch.randn(6, 8) / 2, torch.randn(5000, 8) / 2, torch.arange(6)
    logits = states @ embedding.T
    draw = torch.Generator().manual_seed(0)
    target = logits[range(6), wanted].mean()
    denominators = [float(contrastive_loss(states, wanted, embedding, draw) + target) for _ in range(60)]
    assert sum(denominators) / 60 == pytest.approx(float(logits.logsumexp(1).mean()), abs=0.01)
