"""What readers and filters do to a user's data beside reading it, to be said with its number."""

from __future__ import annotations


class Notes:
    """Sentences about one domain, each said once; those about rows count them and name the first."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._first: dict[str, str] = {}

    def add(self, sentence: str) -> None:
        """Say a sentence once."""
        self._counts.setdefault(sentence, 0)

    def count(self, sentence: str, rows: int, first: str) -> None:
        """Count rows of which a sentence holds ("rows have asin and no parent_asin"); `first`: where the first one is."""
        if rows:
            self._counts[sentence] = self._counts.get(sentence, 0) + rows
            self._first.setdefault(sentence, first)

    def lines(self) -> list[str]:
        """Return the sentences, counted ones with their number and first place."""
        return [
            f"{count:,} {sentence} (first: {self._first[sentence]})" if count else sentence
            for sentence, count in self._counts.items()
        ]
