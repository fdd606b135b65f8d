"""Encoder inputs: the texts of one item, or of one user of one domain, in the words of a prompt.

MuSiC sections 3.2 and 4.1.1: item features from title, description and categories; user features from the user's review
texts of one domain, which are read as they are (the paper's prompt for users is not printed). A prompt is data, has a
name, and its very words are part of every feature key, so an edited prompt extracts again and an unchanged one never
does.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from features.domains.ties import tie_hash
from features.encoders.inputs import EncoderInput
from features.errors import InputError

if TYPE_CHECKING:
    from features.domains.domain import Domain


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """The words around an input's content. `{}` stands for the content; absent fields of an item leave no line behind."""

    title: str
    categories: str
    description: str
    review: str
    ask: str = ""  # what a chat model is asked to do with an item; comes before its fields

    @property
    def document(self) -> dict[str, str]:
        """The prompt's words as part of a feature key."""
        return {name: words for name, words in asdict(self).items() if words or name != "ask"}


PROMPTS: Mapping[str, Prompt] = {
    # Nothing but the content: sentence encoders were trained on bare sentences, and each word costs tokens per review.
    "plain-1": Prompt(title="{}", categories="{}", description="{}", review="{}"),
    # Field names for language models, which can use them.
    "named-1": Prompt(title="Title: {}", categories="Categories: {}", description="Description: {}", review="{}"),
    # MuSiC section 3.2: the model is guided to summarise the key features from image and text. The words are ours.
    "key-features-1": Prompt(
        ask="Summarize the key features of this item, from its image and its text.",
        title="Title: {}",
        categories="Categories: {}",
        description="Description: {}",
        review="{}",
    ),
}

CLEANING = "html-unescape-1"  # what `clean` does; part of every feature key
NO_TEXT = "no title, categories or description"
NO_REVIEW = "no review text"


def find_prompt(name: str) -> Prompt:
    """Return the prompt of that name. Raises InputError for an unknown one."""
    if name not in PROMPTS:
        raise InputError(f"prompt is {name!r}; choose from {', '.join(sorted(PROMPTS))}, or add it to PROMPTS")
    return PROMPTS[name]


def clean(text: str | None) -> str:
    """Return a raw field as a language model should read it: HTML entities resolved, no space around; '' for none."""
    return html.unescape(text or "").strip()


def item_text(item: Mapping[str, Any], prompt: Prompt) -> str:
    """Return title, categories and description of one item, a line each; empty if it has none of them."""
    lines = (
        template.format(value)
        for template, value in (
            (prompt.title, clean(item["title"])),
            (prompt.categories, clean(item["categories"])),
            (prompt.description, clean(item["description"])),
        )
        if value
    )
    return "\n".join(lines)


def item_inputs(domain: Domain, prompt: Prompt) -> Iterator[tuple[str, EncoderInput | str]]:
    """Yield (item id, its input, or the reason why it has none), sorted by id, read in bounded memory."""
    columns = ["item_id", "title", "description", "categories"]
    for batch in pq.ParquetFile(domain.path / "items.parquet").iter_batches(columns=columns):
        for item in batch.to_pylist():
            text = item_text(item, prompt)
            yield item["item_id"], EncoderInput(texts=(_with_request(prompt, text),)) if text else NO_TEXT


def item_images(domain: Domain) -> Iterator[str | None]:
    """Yield where each item's image lies (a path in the domain's data folder, or a URL), in the order of `item_inputs`."""
    for batch in pq.ParquetFile(domain.path / "items.parquet").iter_batches(columns=["image"]):
        for image in _values(batch, 0):
            yield image or None


def item_image_inputs(
    domain: Domain, prompt: Prompt, images: Mapping[str, str]
) -> Iterator[tuple[str, EncoderInput | str]]:
    """Yield what `item_inputs` yields, with images (reference -> name). An item without text is read by its image alone."""
    for (item, text_input), image in zip(item_inputs(domain, prompt), item_images(domain), strict=True):
        name = images.get(image) if image else None
        if isinstance(text_input, EncoderInput):
            yield item, replace(text_input, image=name)
        elif name is not None:
            yield item, EncoderInput(texts=(_with_request(prompt, ""),), image=name)
        else:
            yield item, text_input


def _with_request(prompt: Prompt, text: str) -> str:
    return "\n".join(filter(None, (prompt.ask, text)))


def user_inputs(
    domain: Domain, prompt: Prompt, users: str, max_reviews: int
) -> Iterator[tuple[str, EncoderInput | str]]:
    """Yield (user id, the input of the user's reviews in this domain, or the reason why there is none), sorted by id.

    The newest `max_reviews` reviews with text are taken (0: all), newest first; those of one time, or without any, in an
    order that a hash draws.
    `review_mean`: one text per review, so the vector is the mean of the reviews' vectors; `concat`: one text with all
    of them, cut by the encoder at its longest input.
    """
    for user, reviews in _by_user(domain.path / "interactions.parquet"):
        if max_reviews or users == "concat":
            order = [(-time, tie_hash(user, item, domain.name, 0)) for _, time, item in reviews]
            reviews = [reviews[row] for row in sorted(range(len(reviews)), key=order.__getitem__)]
        else:  # the mean of all has no order
            reviews = sorted(reviews, key=lambda review: review[1], reverse=True)
        texts = [prompt.review.format(text) for text, _, _ in reviews[: max_reviews or None]]
        if not texts:
            yield user, NO_REVIEW
        else:
            yield user, EncoderInput(texts=tuple(texts) if users == "review_mean" else ("\n".join(texts),))


def _by_user(interactions: Path) -> Iterator[tuple[str, Sequence[tuple[str, int, str]]]]:
    """Yield (user, [(text, timestamp, item)] of the reviews with text), streamed from a file that is sorted by user."""
    current: str | None = None
    reviews: list[tuple[str, int, str]] = []
    for batch in pq.ParquetFile(interactions).iter_batches(columns=["user_id", "item_id", "text", "timestamp"]):
        for user, item, text, timestamp in zip(*(_values(batch, i) for i in range(4)), strict=True):
            if user != current:
                if current is not None:
                    yield current, reviews
                current, reviews = user, []
            if text is not None and text.strip():
                reviews.append((text.strip(), timestamp if timestamp is not None else 0, item))
    if current is not None:
        yield current, reviews


def _values(batch: pa.RecordBatch, column: int) -> list[Any]:
    values: list[Any] = batch.column(column).to_pylist()
    return values
