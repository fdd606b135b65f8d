"""Which feature table is wanted, and the key by which the store knows it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from features.checks import choice, refuse, whole
from features.encoders.spec import EncoderSpec, ResolvedEncoder, resolve_encoder
from features.extraction.prompts import CLEANING, NO_REVIEW, NO_TEXT, PROMPTS, find_prompt
from features.images.gather import NO_IMAGE, ImageSpec
from features.store.tables import FeatureTable, digest, open_table, table_path

if TYPE_CHECKING:
    from features.domains.domain import Domain

KINDS = ("items", "users")
USER_FEATURES = ("review_mean", "concat")


@dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """One feature table: whose vectors, from which words, by which encoder."""

    # "items": title, categories, description; "users": the user's reviews of this one domain
    kind: str
    encoder: EncoderSpec
    # "review_mean": mean of the reviews' vectors; "concat": one text of all reviews, cut at max_tokens. Not a detail:
    # the top-10 neighbours of the two overlap by 0.10. Only read for users.
    users: str = "review_mean"
    # newest reviews of a user that are read (0: all). Only read for users.
    max_reviews: int = 0
    # name in features.extraction.prompts.PROMPTS
    prompt: str = "plain-1"
    # where items' images come from, for a vision-language model
    images: ImageSpec = field(default_factory=ImageSpec)

    def __post_init__(self) -> None:
        refuse(
            *(choice(self, "kind", KINDS), choice(self, "users", USER_FEATURES)),
            choice(self, "prompt", tuple(sorted(PROMPTS))),
            whole(self, "max_reviews", least=0),
            f"encoder is {self.encoder.model}, which reads images, and users have none; give a text encoder"
            if self.kind == "users" and self.encoder.reads_images
            else "",
            place="features.",
        )


def feature_key(spec: FeatureSpec, domain: Domain, resolved: ResolvedEncoder) -> str:
    """Return the key of a table: the encoder by content, the prompt by its words, and the domain by its content key."""
    users = {"users": spec.users, "max_reviews": spec.max_reviews} if spec.kind == "users" else {}
    prompt = {"name": spec.prompt, "cleaning": CLEANING} | find_prompt(spec.prompt).document
    return digest({"encoder": resolved.key, "prompt": prompt, "kind": spec.kind, "domain": domain.key} | users)


def table_place(spec: FeatureSpec, domain: Domain, resolved: ResolvedEncoder, store: Path) -> tuple[Path, str]:
    """Return the folder of a table, and its key."""
    key = feature_key(spec, domain, resolved)
    return table_path(store, domain.name, spec.kind, key), key


def find_table(spec: FeatureSpec, domain: Domain, store: Path) -> FeatureTable | None:
    """Open the finished table; None if it is still to be extracted. Raises InputError for a broken one."""
    path, key = table_place(spec, domain, resolve_encoder(spec.encoder), store)
    return open_table(path, key) if path.exists() else None


def shortfall(table: FeatureTable) -> str | None:
    """Describe what another try might add to a finished table, and how to have it; None where there is nothing."""
    rows = table.manifest["rows"]
    failed = sum(row["reason"] not in (NO_TEXT, NO_REVIEW) for row in rows["failed"])
    without_image = sum(reason != NO_IMAGE for reason in rows.get("without_image", {}).values())
    counts = [f"{failed:,} rows failed"] if failed else []
    counts += [f"{without_image:,} read without their image"] if without_image else []
    return f"{', '.join(counts)}; delete {table.path} to try them again" if counts else None
