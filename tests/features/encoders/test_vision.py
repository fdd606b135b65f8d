"""Vision-language encoders of three architectures, against one prompt at a time in float64; and extraction by them."""

from __future__ import annotations

import io
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForImageTextToText

from features.domains.domain import Domain
from features.encoders.encoder import load_encoder
from features.encoders.inputs import EncoderInput
from features.encoders.spec import EncoderSpec, resolve_encoder
from features.encoders.vision import ImageTextEncoder
from features.encoders.weights import load_processor_of
from features.errors import InputError
from features.extraction.extract import estimate
from features.extraction.prompts import PROMPTS
from features.extraction.spec import FeatureSpec, feature_key, shortfall
from features.images.gather import ImageSpec, gather_images, images_folder, open_image
from tests.features.one_table import extract
from tests.features.seeing import SEEING, picture, save_seeing

TOLERANCE = 1e-5  # of a component, float32 against float64; components are about 1


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", params=sorted(SEEING))
def seeing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Qwen3-VL, InternVL and MiniCPM-V 4.6."""
    return save_seeing(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="session")
def one_seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_seeing(tmp_path_factory.mktemp("one-seeing"))


def spec_of(folder: Path, **fields: Any) -> EncoderSpec:
    given = {"max_tokens": 24, "dtype": "float32", "store_dtype": "float32", **fields}
    return EncoderSpec(model=str(folder), sees=True, **given)


def store_pictures(store: Path, count: int) -> list[str]:
    """Pictures of several sizes in the store of images; their names."""
    data = store / "raw"
    data.mkdir(parents=True)
    for i in range(count):
        picture(i, 24 + 8 * (i % 3), 32).save(data / f"{i}.png")
    gathered = gather_images([f"{i}.png" for i in range(count)], data, store, ImageSpec())
    return [gathered.names[f"{i}.png"] for i in range(count)]


def key_of(spec: FeatureSpec, domain: Domain) -> str:
    return feature_key(spec, domain, resolve_encoder(spec.encoder))


def some_rows(names: Sequence[str], seed: int = 0) -> list[EncoderInput]:
    """A row per image, and half as many without."""
    draw = random.Random(seed)
    texts = [" ".join(f"w{draw.randrange(90)}" for _ in range(draw.randint(1, 30))) for _ in range(3 * len(names) // 2)]
    return [
        EncoderInput(texts=(text,), image=name)
        for text, name in zip(texts, [*names, *[None] * len(names)], strict=False)
    ]


def load(spec: EncoderSpec, store: Path) -> ImageTextEncoder:
    encoder = load_encoder(replace(resolve_encoder(spec), images=images_folder(store)))
    assert isinstance(encoder, ImageTextEncoder)
    return encoder


def slow_reference(spec: EncoderSpec, rows: Sequence[EncoderInput], store: Path) -> NDArray[np.float64]:
    """One prompt at a time, token by token, in float64, from all hidden states of the whole model."""
    model = AutoModelForImageTextToText.from_pretrained(spec.model).double().eval()
    processor = load_processor_of("reference", Path(spec.model))
    result = []
    for row in rows:
        words = row.texts[0].split()[: spec.max_tokens]
        content: list[dict[str, Any]] = [{"type": "text", "text": " ".join(words)}]
        images = None
        if row.image is not None:
            content.insert(0, {"type": "image"})
            images = [open_image(images_folder(store), row.image, spec.max_pixels)]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        inputs = processor(text=[prompt], images=images, add_special_tokens=False, return_tensors="pt")
        inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        with torch.no_grad():
            states = model(**inputs, output_hidden_states=True).hidden_states
        kept = []
        for token, number in enumerate(inputs["input_ids"][0].tolist()):
            if spec.states == "all" or number != model.config.image_token_id:
                kept.append((states[1][0, token].numpy() + states[-1][0, token].numpy()) / 2)
        result.append(np.mean(kept, axis=0))
    return np.stack(result)


@pytest.mark.parametrize("states", ["all", "text"])
def test_vectors_equal_the_slow_reference(seeing: Path, tmp_path: Path, states: str) -> None:
    spec, rows = spec_of(seeing, states=states), some_rows(store_pictures(tmp_path, 6))
    encoded = load(spec, tmp_path).encode(rows)
    assert encoded.failed == {}
    np.testing.assert_allclose(encoded.vectors, slow_reference(spec, rows, tmp_path), atol=TOLERANCE)


def test_company_order_padding_and_budget_change_a_vector_by_the_tolerance_at_most(
    seeing: Path, tmp_path: Path
) -> None:
    rows = some_rows(store_pictures(tmp_path, 6))
    encoder = load(spec_of(seeing), tmp_path)
    together = encoder.encode(rows).vectors
    alone = np.concatenate([encoder.encode([row]).vectors for row in rows])
    np.testing.assert_allclose(alone, together, atol=TOLERANCE)
    order = np.random.default_rng(0).permutation(len(rows))
    tight = load(spec_of(seeing, batch_tokens=40), tmp_path).encode([rows[i] for i in order]).vectors
    np.testing.assert_allclose(tight, together[order], atol=TOLERANCE)
    for mine in ([i for i, row in enumerate(rows) if row.image], [i for i, row in enumerate(rows) if not row.image]):
        prompts = [encoder._prompt(rows[i].texts[0], rows[i].image) for i in mine]
        assert len({len(prompt) for prompt in prompts}) > 1, "padded"
        for side in ("left", "right"):  # of the tokenizer; ours is on the right
            encoder.tokenizer.padding_side = side
            np.testing.assert_allclose(encoder._vectors(prompts), together[mine], atol=TOLERANCE)


def test_lengths_are_those_that_the_model_reads(seeing: Path, tmp_path: Path) -> None:
    rows = some_rows(store_pictures(tmp_path, 4))
    encoder = load(spec_of(seeing), tmp_path)
    for row in rows:
        prompt = encoder._prompt(row.texts[0], row.image)
        images = [prompt.image] if prompt.image is not None else None
        inputs = encoder.processor(text=[prompt.text], images=images, return_tensors="pt")
        assert inputs["input_ids"].shape[1] == len(prompt)


def test_the_image_matters_and_a_long_text_is_cut_before_the_template(one_seeing: Path, tmp_path: Path) -> None:
    first, second = store_pictures(tmp_path, 2)
    encoder = load(spec_of(one_seeing, max_tokens=5), tmp_path)
    rows = [
        EncoderInput(texts=("w1 w2 w3 w4 w5",), image=first),
        EncoderInput(texts=("w1 w2 w3 w4 w5 w6 w7",), image=first),
        EncoderInput(texts=("w1 w2 w3 w4 w5",), image=second),
        EncoderInput(texts=("w1 w2 w3 w4 w5",)),
    ]
    a, cut, other, without = encoder.encode(rows).vectors
    np.testing.assert_allclose(a, cut, atol=TOLERANCE)
    assert min(np.abs(a - other).max(), np.abs(a - without).max(), np.abs(other - without).max()) > 1e-2


def test_two_states_are_held_and_the_head_is_not_computed(one_seeing: Path, tmp_path: Path) -> None:
    encoder = load(spec_of(one_seeing), tmp_path)
    rows = some_rows(store_pictures(tmp_path, 2))
    calls: list[str] = []
    encoder.model.lm_head.register_forward_hook(lambda *_: calls.append("head"))
    encoder.model.get_decoder().register_forward_hook(lambda *a: calls.append(str(a[2].get("hidden_states"))))
    encoder.encode(rows)
    assert set(calls) == {"None"}
    assert not hasattr(encoder._first, "state")


def test_an_image_that_is_gone_costs_that_row_only(one_seeing: Path, tmp_path: Path) -> None:
    (name,) = store_pictures(tmp_path, 1)
    rows = [
        EncoderInput(texts=("w1",), image=name),
        EncoderInput(texts=("w1",), image="0" * 64),
        EncoderInput(texts=("w2",)),
    ]
    encoded = load(spec_of(one_seeing), tmp_path).encode(rows)
    assert list(encoded.failed) == [1]
    assert encoded.failed[1].startswith("FileNotFoundError")
    assert np.isfinite(encoded.vectors).all(1).tolist() == [True, False, True]


def test_a_text_model_has_no_processor(tiny_bert: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be loaded \(ValueError: Unrecognized configuration class") as caught:
        load(spec_of(tiny_bert), tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="transformers has no processor for bert"):
        load_processor_of("encoder x", tiny_bert)


# --- through extraction -------------------------------------------------------------------------------------------


@pytest.fixture
def domain_of(make_domain: Callable[..., Any]) -> Callable[..., Any]:
    """A domain whose items have the given images (item -> bytes of a file, a reference, or None)."""

    def make(images: dict[str, bytes | str | None]) -> Any:
        items = [(name, f"w{n} w{n + 1}", None, None) for n, name in enumerate(images)]
        domain = make_domain([("u", name, "w1") for name in images], items)
        references = []
        for name, image in images.items():
            if isinstance(image, bytes):
                (domain.data_folder / f"{name}.img").write_bytes(image)
            references.append(f"{name}.img" if isinstance(image, bytes) else image)
        path = domain.path / "items.parquet"
        table = pq.read_table(path)
        column = table.schema.get_field_index("image")
        pq.write_table(table.set_column(column, "image", pa.array(references, pa.string())), path)
        return domain

    return make


def png(seed: int) -> bytes:
    stream = io.BytesIO()
    picture(seed).save(stream, "PNG")
    return stream.getvalue()


def items_spec(folder: Path, missing: float = 0.05, **fields: Any) -> FeatureSpec:
    images = ImageSpec(max_missing_fraction=missing, tries=1)
    return FeatureSpec(kind="items", encoder=spec_of(folder, **fields), prompt="key-features-1", images=images)


def test_items_without_a_readable_image_are_read_by_their_text_and_flagged(one_seeing, domain_of, tmp_path) -> None:
    broken = png(1)
    images: dict[str, bytes | str | None] = {"a": png(0), "b": broken[: len(broken) // 2], "c": None, "d": "gone.png"}
    domain, spec = domain_of(images), items_spec(one_seeing, missing=0.7)
    table = extract(spec, domain, tmp_path)
    assert table.ids == ["a", "b", "c", "d"]
    flagged = table.manifest["rows"]["without_image"]
    assert list(flagged) == ["b", "c", "d"]
    assert flagged["b"].startswith("not a whole image (OSError: ")
    assert (flagged["c"], flagged["d"]) == ("no image", "No such file or directory")
    assert shortfall(table) == f"2 read without their image; delete {table.path} to try them again"
    ask = PROMPTS["key-features-1"].ask
    names = gather_images(["a.img"], domain.data_folder, tmp_path, ImageSpec()).names
    rows = [
        EncoderInput(texts=(f"{ask}\nTitle: w{n} w{n + 1}",), image=names.get(f"{name}.img"))
        for n, name in enumerate("abcd")
    ]
    np.testing.assert_allclose(table.vectors, load(spec.encoder, tmp_path).encode(rows).vectors, atol=TOLERANCE)


def test_the_share_of_the_peak_counts_the_tokens_and_patches_of_images(
    one_seeing, domain_of, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr("features.extraction.encoding._PEAK_AFTER", 0.0)
    monkeypatch.setattr("features.extraction.encoding.matrix_peak", lambda device, dtype: 1.0)

    def operations(name: str, image: bytes | None) -> float:
        speed = extract(items_spec(one_seeing), domain_of({"a": image}), tmp_path / name, workers=1).manifest[
            "throughput"
        ]
        return speed["share_of_peak"] * speed["busy_seconds"]

    model = load_encoder(replace(resolve_encoder(spec_of(one_seeing)), images=tmp_path)).model
    layers = [layer for layer in model.get_decoder().modules() if isinstance(layer, torch.nn.Linear)]
    per_token = 2 * sum(layer.weight.numel() for layer in layers)
    assert operations("blind", None) > 10 * per_token
    assert operations("seen", png(0)) > operations("blind", None) + 10 * per_token


def test_too_many_missing_images_are_an_error_before_any_model_is_loaded(one_seeing, domain_of, tmp_path) -> None:
    domain = domain_of({"a": png(0), "b": b"not an image", "c": None})
    message = (
        r"features of books items: 1 of 2 images are missing, and images\.max_missing_fraction is 0\.05; first b\.img"
    )
    with pytest.raises(InputError, match=message) as caught:
        extract(items_spec(one_seeing), domain, tmp_path, loader=lambda resolved: pytest.fail("loaded"))
    assert "\n" not in str(caught.value)


def test_an_image_that_is_mended_encodes_its_item_again_and_no_other(one_seeing, domain_of, tmp_path) -> None:
    spec = items_spec(one_seeing, missing=0.5)
    seen: list[EncoderInput] = []

    def counting(resolved: Any) -> Any:
        inner = load_encoder(resolved)

        class Counting:
            def encode(self, rows: Sequence[EncoderInput]) -> Any:
                seen.extend(rows)
                return inner.encode(rows)

        return Counting()

    domain = domain_of({"a": png(0), "b": b"broken", "c": png(2)})
    old = extract(spec, domain, tmp_path, loader=counting)
    (domain.data_folder / "b.img").write_bytes(png(1))
    seen.clear()
    assert extract(spec, domain, tmp_path, loader=counting).key == old.key  # a finished table stays as it is
    assert seen == []
    left = estimate(spec, replace(domain, key="another"), tmp_path)
    assert (left.rows, left.rows_left) == (3, 0)  # as far as is known before the image is looked at
    new = extract(spec, replace(domain, key="another"), tmp_path, loader=counting)
    assert len(seen) == 1
    assert "b" in old.manifest["rows"]["without_image"]
    assert new.manifest["rows"]["without_image"] == {}
    changed = (np.asarray(old.vectors) != np.asarray(new.vectors)).any(1)
    assert changed.tolist() == [False, True, False]
    shutil.rmtree(old.path)  # as `shortfall` says
    again = extract(spec, domain, tmp_path, loader=counting)
    assert shortfall(again) is None
    np.testing.assert_array_equal(again.vectors, new.vectors)


def test_what_the_model_sees_is_part_of_the_key_and_where_it_comes_from_is_not(one_seeing, domain_of) -> None:
    domain, spec = domain_of({"a": png(0)}), items_spec(one_seeing)
    key = key_of(spec, domain)
    assert key_of(replace(spec, images=ImageSpec(parallel=2, timeout=1, private_addresses=True)), domain) == key
    for change in ({"states": "text"}, {"max_pixels": 64}):
        assert key_of(replace(spec, encoder=replace(spec.encoder, **change)), domain) != key


def test_users_have_no_images(one_seeing: Path, tiny_bert: Path) -> None:
    with pytest.raises(InputError, match="which reads images, and users have none; give a text encoder"):
        FeatureSpec(kind="users", encoder=spec_of(one_seeing))
    with pytest.raises(InputError, match=r"encoder\.states is 'text', but .* sees no images; leave it out"):
        EncoderSpec(model=str(tiny_bert), states="text")
