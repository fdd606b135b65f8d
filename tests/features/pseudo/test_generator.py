"""The batched generator against transformers' own greedy search, its random numbers, and what it refuses."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from features.errors import InputError
from features.pseudo.generator import (
    CausalGenerator,
    GeneratorSpec,
    load_generator,
    resolve_generator,
)
from features.pseudo.prompts import PseudoPrompt, find_wording, parse_texts, write_prompt
from features.pseudo.sampling import draw_tokens, uniforms
from tests.features.conftest import TITLES, save_generator


def spec_of(folder: Path, **fields: Any) -> GeneratorSpec:
    given = {"texts": 3, "temperature": 1.0, "max_new_tokens": 40, "dtype": "float32"} | fields
    return GeneratorSpec(model=str(folder), **given)


def load(folder: Path, **fields: Any) -> CausalGenerator:
    return load_generator(resolve_generator(spec_of(folder, **fields)))


def prompts(count: int = 12) -> list[PseudoPrompt]:
    return [
        PseudoPrompt(user=f"u{i}", source="food", target="kitchen", titles=tuple(TITLES[: 1 + i % len(TITLES)]))
        for i in range(count)
    ]


def test_every_kind_of_model_answers_every_prompt(tiny_generator: Path) -> None:
    answers = load(tiny_generator).generate(prompts())
    assert len(answers) == 12
    assert len(set(answers)) > 6
    assert all(isinstance(answer, str) for answer in answers)
    assert not any("<pad>" in answer or "<end>" in answer for answer in answers)


def test_a_chat_template_is_used_where_there_is_one(tiny_generator: Path) -> None:
    generator, prompt = load(tiny_generator), prompts()[3]
    text = generator.tokenizer.decode(generator._tokens(prompt))
    chat = "chat" in str(tiny_generator)
    expected = write_prompt(prompt, find_wording("items-1"), 3, chat=chat)
    assert text == (f"<user>{expected}<reply>" if chat else expected)


def greedy(folder: Path, generator: CausalGenerator, prompt: PseudoPrompt) -> str:
    """Transformers' own greedy search, one unpadded prompt, without cache."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = generator._tokens(prompt)
    for _ in range(generator.spec.max_new_tokens):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        logits[tokenizer.pad_token_id] = -torch.inf
        ids = [*ids, int(logits.argmax())]
        if ids[-1] == tokenizer.eos_token_id:
            break
    return str(tokenizer.decode(ids[len(generator._tokens(prompt)) :], skip_special_tokens=True))


def test_at_temperature_zero_padded_batches_give_the_greedy_answer(tiny_generator: Path) -> None:
    generator = load(tiny_generator, temperature=0.0, max_new_tokens=12, texts=20)
    generator.lines_V[:] = False  # the rule that no line is written twice is not transformers'
    asked = prompts(6)
    assert generator.generate(asked) == [greedy(tiny_generator, generator, prompt) for prompt in asked]


def test_an_answer_depends_on_seed_and_user_but_not_on_company_order_or_budget(tiny_generator: Path) -> None:
    asked = prompts()
    together = load(tiny_generator).generate(asked)
    assert [load(tiny_generator).generate([prompt])[0] for prompt in asked[:4]] == together[:4]
    small = load(tiny_generator, batch_tokens=1)
    assert small.generate(asked[::-1])[::-1] == together
    assert load(tiny_generator, seed=1).generate(asked) != together
    namesake = replace(asked[5], user="somebody else")
    assert load(tiny_generator).generate([namesake])[0] != together[5]


def test_an_answer_ends_with_the_line_that_makes_it_enough(tmp_path: Path) -> None:
    generator = load(save_generator(tmp_path, "llama"), texts=2, max_new_tokens=300)
    for answer in generator.generate(prompts(8)):
        assert len(parse_texts(answer, 3)) == 2
        assert answer.endswith("\n")
        assert len(parse_texts("\n".join(answer.split("\n")[:-2]), 3)) == 1


def prefer(generator: CausalGenerator, logits: Mapping[int, float]) -> None:
    """Give these tokens the same logits always, and all others 0."""
    head = torch.nn.Linear(32, len(generator.tokenizer))
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    with torch.no_grad():
        for token, logit in logits.items():
            head.bias[token] = logit
    generator.model.lm_head = head


def test_a_title_that_is_a_token_is_written_once(tmp_path: Path) -> None:
    generator = load(save_generator(tmp_path, "llama"), texts=len(TITLES), temperature=0.0)
    titles = [generator.tokenizer(f"{title}\n")["input_ids"] for title in TITLES]
    assert all(len(ids) == 1 for ids in titles)
    assert generator.lines_V[[ids[0] for ids in titles]].all()

    prefer(generator, {ids[0]: 99 - rank for rank, ids in enumerate(titles)})
    (answer,) = generator.generate(prompts(1))
    assert answer.splitlines() == TITLES


def test_the_end_token_ends_an_answer(tmp_path: Path) -> None:
    generator = load(save_generator(tmp_path, "llama", chat=True), temperature=0.0)
    end = generator.tokenizer.eos_token_id
    assert end in generator.ends
    prefer(generator, {end: 9})
    assert generator.generate(prompts(2)) == ["", ""]


# --- random numbers -----------------------------------------------------------------------------------------------


def test_uniforms_are_a_users_own() -> None:
    assert uniforms(0, "a", 5).tolist() == uniforms(0, "a", 9)[:5].tolist()
    assert len({uniforms(seed, user, 1)[0] for seed in (0, 1) for user in "abc"}) == 6
    assert abs(np.mean([uniforms(0, f"u{i}", 8) for i in range(500)]) - 0.5) < 0.02


def reference(logits: Sequence[float], uniform: float, temperature: float, top_p: float) -> int:
    """Inverse of the cumulative distribution, token by token, in float64."""
    weight = np.exp((np.array(logits, np.float64) - max(logits)) / temperature)
    order = np.argsort(-weight, kind="stable")
    kept, total = set(), 0.0
    for token in order:
        if total >= top_p * weight.sum():
            break
        kept.add(int(token))
        total += weight[token]
    passed = 0.0
    for token in sorted(kept):
        passed += weight[token]
        if uniform * total < passed:
            return token
    return max(kept)


@given(st.integers(0, 10**6), st.sampled_from([0.3, 1.0, 2.0]), st.sampled_from([0.3, 0.8, 1.0]))
def test_tokens_are_drawn_as_the_slow_reference_draws_them(seed: int, temperature: float, top_p: float) -> None:
    draw = np.random.default_rng(seed)
    logits, uniform = draw.normal(0, 2, (4, 9)).astype(np.float32), draw.random(4, np.float32)
    tokens = draw_tokens(torch.tensor(logits), torch.tensor(uniform), temperature, top_p)
    assert tokens.tolist() == [reference(row, u, temperature, top_p) for row, u in zip(logits, uniform, strict=True)]


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-24])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_an_impossible_token_is_never_drawn(uniform: float, temperature: float) -> None:
    logits = torch.full((1, 7), -torch.inf)
    logits[0, 3] = 0.0
    assert draw_tokens(logits, torch.tensor([uniform]), temperature, 1.0).tolist() == [3]


def test_frequencies_follow_the_tempered_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    uniform = torch.tensor(np.concatenate([uniforms(0, f"u{i}", 10) for i in range(2000)]))
    tokens = draw_tokens(logits.expand(len(uniform), -1), uniform, 0.5, 1.0)
    observed = torch.bincount(tokens, minlength=4) / len(tokens)
    torch.testing.assert_close(observed, (logits[0] / 0.5).softmax(0), atol=0.01, rtol=0)


# --- finding and loading ------------------------------------------------------------------------------------------


def test_all_faults_of_a_spec_at_once() -> None:
    with pytest.raises(InputError, match=r"generator\.texts is 0; give a whole number from 1 to 100") as caught:
        GeneratorSpec(texts=0, temperature=-1, top_p=0, dtype="int8", history=0)
    for part in (
        "generator.temperature is -1; give a number from 0 to 5",
        "generator.top_p is 0; give a number above 0, up to 1",
        "generator.dtype is 'int8'; choose from auto, float32, bfloat16",
        "generator.history is 0; give a whole number of at least 1",
    ):
        assert part in str(caught.value)
    with pytest.raises(InputError, match=r"generator\.prompt is 'x'; choose from items-1"):
        GeneratorSpec(prompt="x")


@pytest.mark.parametrize(
    ("model", "revision", "message"),
    [
        (
            "no-such",
            None,
            r"generator no-such: neither local nor a preset \(gte, .*\) nor a folder nor a GGUF file",
        ),
        ("someone/model", None, "a hub id needs a pinned revision; set generator.revision to a commit"),
        ("someone/model", "0" * 40, "is not in the hub's cache; run hf download someone/model --revision 0000"),
    ],
)
def test_a_model_that_is_nowhere(model: str, revision: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve_generator(GeneratorSpec(model=model, revision=revision))


def test_missing_weights_are_an_error(tiny_generator: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_generator, tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    weights.pop(next(name for name in sorted(weights) if name.endswith("weight") and "mlp" in name))
    save_file(weights, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        InputError, match=r"generator \S+: .* does not fit \w+: 1 missing keys .* in generator\.allow_keys"
    ):
        load(tmp_path / "m")


def test_a_model_of_states_is_refused(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "_is_stateful", True)
    message = r"generator \S+: LlamaForCausalLM keeps a state, not keys and values; give a model with attention$"
    with pytest.raises(InputError, match=message):
        load(tiny_llama)


def test_a_worker_whose_auto_is_another_type_says_so(tiny_llama: Path) -> None:
    resolved = resolve_generator(spec_of(tiny_llama, dtype="auto"))
    other = "float32" if resolved.dtype == "bfloat16" else "bfloat16"
    message = rf"dtype auto is {resolved.dtype} on node \S+ and {other} where .*; set generator\.dtype to one of them$"
    with pytest.raises(InputError, match=message):
        load_generator(replace(resolved, dtype=other))


def test_the_key_follows_what_answers_depend_on_and_nothing_else(tiny_generator: Path, tmp_path: Path) -> None:
    def key(folder: Path, **fields: Any) -> str:
        return resolve_generator(spec_of(folder, **fields)).key

    shutil.copytree(tiny_generator, tmp_path / "moved")
    same = key(tmp_path / "moved", batch_tokens=7, recall_users=3)
    assert same == key(tiny_generator)
    changes: list[dict[str, Any]] = [
        {"texts": 4}, {"temperature": 0.9}, {"top_p": 0.9}, {"max_new_tokens": 41}, {"seed": 1}, {"dtype": "bfloat16"},
    ]  # fmt: skip
    assert len({key(tiny_generator, **change) for change in changes} | {same}) == 7
    (tmp_path / "moved" / "generation_config.json").write_text('{"eos_token_id": 5}')
    assert key(tmp_path / "moved") != same
