"""What was read of a corpus and what was not, file by file."""

from __future__ import annotations

from collections.abc import Iterable
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
    """Documents of one file that were left out for one reason."""

    count: int
    first: int
    """Line or row of the first one, from 1 on; 0 for a whole file."""


@dataclass
class CorpusStats:
    """What was read and what was left out."""

    documents: int = 0
    """Documents handed out."""
    text_bytes: int = 0
    """Their UTF-8 size."""
    by_file: dict[tuple[str, Kind], Skipped] = field(default_factory=dict)
    """Documents that were left out, by file and reason."""
    passed_over: list[str] = field(default_factory=list)
    """Entries of folders that were not opened, and why."""
    remarks: list[str] = field(default_factory=list)
    """What else a reader of the figures should know."""

    def skip(self, source: str, kind: Kind, place: int) -> None:
        """Count a document that is left out; `place` is its line or row, 0 for a whole file."""
        self._merge((source, kind), Skipped(1, place))

    def count(self, kind: Kind) -> int:
        """Documents that were left out for one reason."""
        return sum(skipped.count for (_, of_kind), skipped in self.by_file.items() if of_kind == kind)

    @property
    def skipped(self) -> int:
        """Documents that were left out."""
        return sum(skipped.count for skipped in self.by_file.values())

    def add(self, other: CorpusStats) -> None:
        """Add the counts of a later part of the corpus."""
        self.documents += other.documents
        self.text_bytes += other.text_bytes
        for key, skipped in other.by_file.items():
            self._merge(key, skipped)
        self.passed_over += other.passed_over
        self.remarks += other.remarks

    def totals(self) -> str:
        """How many were left out, for every reason that there was."""
        counts = ((self.count(kind), words) for kind, words in WORDS.items())
        return ", ".join(f"{count:,} {words}" for count, words in counts if count) or "nothing was left out"

    def summary(self) -> list[str]:
        """A line for every file of which something was left out, and for every entry that was not opened."""
        lines = [f"skipped {self.skipped:,}: {self.totals()}"] if self.skipped else []
        files: dict[str, list[str]] = {}
        for (source, kind), skipped in self.by_file.items():
            where = f" (first at {skipped.first})" if skipped.first else ""
            files.setdefault(source, []).append(f"{skipped.count:,} {WORDS[kind]}{where}")
        lines += [f"  {source}: {', '.join(reasons)}" for source, reasons in files.items()]
        return lines + _listed("passed over", self.passed_over) + _listed("note", self.remarks)

    def _merge(self, key: tuple[str, Kind], skipped: Skipped) -> None:
        if (mine := self.by_file.get(key)) is None:
            self.by_file[key] = Skipped(skipped.count, skipped.first)
        else:
            mine.count += skipped.count
            mine.first = min(mine.first, skipped.first)  # what has no token is found after what has no text


def _listed(title: str, lines: Iterable[str]) -> list[str]:
    return [f"{title}: {line}" for line in lines]
