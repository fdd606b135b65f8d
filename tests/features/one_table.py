"""Extraction of a single table, which is what most tests need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from features.domains.domain import Domain
from features.extraction.extract import extract_tables
from features.extraction.spec import FeatureSpec
from features.store.tables import FeatureTable


def extract(spec: FeatureSpec, domain: Domain, store: Path, **options: Any) -> FeatureTable:
    (table,) = extract_tables([(spec, domain)], store, **options)
    return table
