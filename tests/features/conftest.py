"""Tiny encoders on disk, and tiny domains made by `prepare_domain`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from features.domains.domain import Domain, DomainSpec, prepare_domain
from features.pseudo.local_model import train_tokenizer

WORDS = [f"w{i}" for i in range(90)]
SPECIAL = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "broken",
]  # "broken" is the last id: no model here has an embedding for it


OTHERS = ("qwen3", "gte", "modernbert")  # architectures of presets besides BERT (MiniLM) and Llama


def save_tokenizer(folder: Path, kind: str) -> None:
    """A word-level tokenizer; BERT's adds [CLS] and [SEP], Llama's nothing, and has no padding token."""
    words = [*SPECIAL[:4], *WORDS, SPECIAL[4]]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    if kind == "bert":
        tokenizer.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"} if kind == "bert" else {}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **special).save_pretrained(folder)


def build_model(kind: str) -> PreTrainedModel:
    vocabulary = len(WORDS) + 4
    torch.manual_seed(0)
    sizes: dict[str, int] = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    }
    if kind in OTHERS:
        heads = {"num_key_value_heads": 2, "head_dim": 8} if kind == "qwen3" else {}
        return AutoModel.from_config(AutoConfig.for_model(kind, pad_token_id=0, **sizes, **heads))
    if kind == "bert":
        return BertModel(BertConfig(**sizes))
    return LlamaModel(LlamaConfig(num_key_value_heads=2, **sizes))


def save_encoder(folder: Path, kind: str, model: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    build_model(model or kind).save_pretrained(folder)
    save_tokenizer(folder, kind)
    return folder


@pytest.fixture(scope="session", params=["bert", "llama"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random BERT, then of a tiny random Llama: 3 layers, width 32."""
    return save_encoder(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="session", params=OTHERS)
def tiny_other(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(
        tmp_path_factory.mktemp(request.param), "llama" if request.param == "qwen3" else "bert", request.param
    )


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("one-bert"), "bert")


TITLES = [f"{maker} {thing}" for maker in ("Bodum", "Lipton", "Norpro") for thing in ("Tea Press", "Green Tea", "Pan")]
CHAT_TEMPLATE = (
    "{% for m in messages %}<user>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<reply>{% endif %}"
)


def save_generator(folder: Path, kind: str = "llama", chat: bool = False) -> Path:
    """A tiny random causal language model with a byte-level tokenizer that knows a few titles as a whole."""
    tokenizer = train_tokenizer((title for title in TITLES for _ in range(2)), 512)
    if chat:
        tokenizer.add_special_tokens({"eos_token": "<end>", "additional_special_tokens": ["<user>", "<reply>"]})
        tokenizer.chat_template = CHAT_TEMPLATE
    sizes = {
        "vocab_size": len(tokenizer),
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }
    torch.manual_seed(0)
    model: LlamaForCausalLM | GPT2LMHeadModel
    if kind == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                initializer_range=0.3,
                **sizes,
            )
        )
    else:
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, initializer_range=0.3, **sizes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=["llama", "gpt2", "llama-chat"])
def tiny_generator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Llama, of a GPT-2, and of a Llama with a chat template."""
    kind, _, chat = request.param.partition("-")
    return save_generator(tmp_path_factory.mktemp(request.param), kind, bool(chat))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_generator(tmp_path_factory.mktemp("one-llama"))


MakeDomain = Callable[..., Domain]


@pytest.fixture
def make_domain(tmp_path: Path) -> MakeDomain:
    """Makes a domain of reviews (user, item, text[, timestamp]) and items (item, title, categories, description)."""

    def make(
        reviews: Iterable[tuple[str, str, str | None] | tuple[str, str, str | None, int]],
        items: Iterable[tuple[str, str | None, str | None, str | None]] = (),
        name: str = "books",
    ) -> Domain:
        data = tmp_path / f"raw-{name}"
        data.mkdir(exist_ok=True)
        rows = [(*review, None)[:4] for review in reviews]
        described = {item[0]: item for item in items}
        interactions = {
            "user_id": pa.array([row[0] for row in rows], pa.string()),
            "item_id": pa.array([row[1] for row in rows], pa.string()),
            "rating": pa.array([3.0] * len(rows), pa.float64()),
            "text": pa.array([row[2] for row in rows], pa.string()),
            "timestamp": pa.array([row[3] for row in rows], pa.int64()),
        }
        pq.write_table(pa.table(interactions), data / "interactions.parquet")
        columns = ("item_id", "title", "categories", "description")
        table = {column: pa.array([i[n] for i in described.values()], pa.string()) for n, column in enumerate(columns)}
        pq.write_table(pa.table(table), data / "items.parquet")
        spec = DomainSpec(name=name, reader="table", interactions="interactions.parquet", items="items.parquet")
        return prepare_domain(spec, data, tmp_path / "domains")

    return make
