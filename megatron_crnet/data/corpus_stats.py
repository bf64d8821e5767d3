"""Counts what was read of a corpus and what was skipped, by file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["empty", "invalid_utf8", "invalid_json", "missing_text", "not_text", "two_texts"]

WORDS: dict[Kind, str] = {
    "empty": "empty",
    "invalid_utf8": "not UTF-8",
    "invalid_json": "not a JSON object",
    "missing_text": "without the text key",
    "not_text": "whose text is not a string",
    "two_texts": "with the text key twice",
}


@dataclass
class Skipped:
    """Documents of one file that were skipped for one reason."""

    count: int
    first: int
    """Line or row of the first one, from 1 on; 0 for a whole file."""


@dataclass
class CorpusStats:
    """What was read and what was skipped.

    Attributes:
        text_bytes: UTF-8 size of the `documents` that were read.
        by_file: skipped documents by file and reason.
        passed_over: entries of folders that were not opened, and why.
        remarks: other notes for the summary.
    """

    documents: int = 0
    text_bytes: int = 0
    by_file: dict[tuple[str, Kind], Skipped] = field(default_factory=dict)
    passed_over: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def skip(self, source: str, kind: Kind, place: int, count: int = 1) -> None:
        """Count skipped documents; `place` is the line or row of the first, 0 for a whole file."""
        found = self.by_file.setdefault((source, kind), Skipped(0, place))
        found.count += count
        found.first = min(found.first, place)  # documents without tokens are found after those without text

    def count(self, kind: Kind) -> int:
        """Documents skipped for one reason."""
        return sum(skipped.count for (_, of_kind), skipped in self.by_file.items() if of_kind == kind)

    @property
    def skipped(self) -> int:
        """Documents skipped."""
        return sum(skipped.count for skipped in self.by_file.values())

    def add(self, other: CorpusStats) -> None:
        """Add the counts of a later part of the corpus."""
        self.documents += other.documents
        self.text_bytes += other.text_bytes
        for (source, kind), skipped in other.by_file.items():
            self.skip(source, kind, skipped.first, skipped.count)

    def totals(self) -> str:
        """Skipped documents per reason."""
        counts = ((self.count(kind), words) for kind, words in WORDS.items())
        return ", ".join(f"{count:,} {words}" for count, words in counts if count) or "nothing was skipped"

    def summary(self) -> list[str]:
        """A line per file with skipped documents, and per entry that was not opened."""
        lines = [f"skipped {self.skipped:,}: {self.totals()}"] if self.skipped else []
        files: dict[str, list[str]] = {}
        for (source, kind), skipped in self.by_file.items():
            where = f" (first at {skipped.first})" if skipped.first else ""
            files.setdefault(source, []).append(f"{skipped.count:,} {WORDS[kind]}{where}")
        lines += [f"  {source}: {', '.join(reasons)}" for source, reasons in files.items()]
        return [*lines, *(f"passed over: {x}" for x in self.passed_over), *(f"note: {x}" for x in self.remarks)]
