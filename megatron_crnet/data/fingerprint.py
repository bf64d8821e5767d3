"""What a run was trained on, in a few digests: the tokenizer, and the token files of each split.

`preprocess` leaves them beside the data (PREFIX.fingerprint.json), every checkpoint holds them (state.json). So token
ids are never read by another tokenizer than the one that made them, and a resumed run says what has changed.
Nothing in here imports torch or Megatron-Core.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_crnet.data.tokenizer import Tokenizer
from megatron_crnet.utils.errors import ConfigError, DataError

FORMAT = 1
WHOLE_BYTES = 1 << 20
"""A file up to this size is read whole, of a larger one BLOCKS blocks of BLOCK_BYTES."""
BLOCKS, BLOCK_BYTES = 64, 4096
SHOWN = 12
"""Hexadecimal digits of a digest that a message shows."""


def sidecar(prefix: str | Path) -> Path:
    """The file that says what PREFIX.bin was made with."""
    return Path(f"{prefix}.fingerprint.json")


def digest_of_files(bin_path: str | Path, idx_path: str | Path) -> str:
    """A digest of a .bin/.idx pair, 32 hexadecimal digits, from its sizes and blocks spread over both files.

    A corpus is too large to be read at each start. Text that changes also changes lengths of documents, and the
    index holds their sums: each of its blocks depends on all documents before it. Blocks of the .bin tell apart
    tokens that changed under equal lengths, such as those of another tokenizer; a few changed tokens are not found.
    """
    known = known_digests((str(bin_path), str(idx_path)))
    return hashlib.sha256(b"".join(digest for _, _, digest in known.values())).hexdigest()[:32]


FileDigest = tuple[int, int, bytes]
"""Size and time of change of a file, ns, and a digest of it as it was then."""

_known: dict[str, FileDigest] = {}


def known_digests(paths: Iterable[str]) -> dict[str, FileDigest]:
    """The digest of each file; read only if it is another one than at the last call."""
    for path in paths:
        status = os.stat(path)
        if _known.get(path, ())[:2] != (status.st_size, status.st_mtime_ns):
            _known[path] = (status.st_size, status.st_mtime_ns, _digest_of_file(path, status.st_size))
    return {path: _known[path] for path in paths}


def learn_digests(digests: Mapping[str, FileDigest]) -> None:
    """Take digests that another process has found in the very same files."""
    _known.update(digests)


def _digest_of_file(path: str, size: int) -> bytes:
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    with open(path, "rb") as stream:
        if size <= WHOLE_BYTES:
            digest.update(stream.read())
            return digest.digest()
        for block in range(BLOCKS):
            stream.seek((size - BLOCK_BYTES) * block // (BLOCKS - 1))
            digest.update(stream.read(BLOCK_BYTES))
    return digest.digest()


def digest_of_prefix(prefix: str) -> str:
    """`digest_of_files` of PREFIX.bin and PREFIX.idx."""
    return digest_of_files(f"{prefix}.bin", f"{prefix}.idx")


def digest_of_blend(prefixes: Iterable[str], weights: Iterable[float] | None) -> str:
    """A digest of the contents of token files in the order given and of their weights; their paths do not count."""
    facts = [[digest_of_prefix(prefix) for prefix in prefixes], list(weights) if weights is not None else None]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def write_sidecar(path: Path, bin_path: Path, idx_path: Path, tokenizer: Tokenizer, append_eod: bool) -> None:
    """Write what a finished .bin/.idx pair was made with.

    Args:
        path: where; the pair may have temporary names still.
        append_eod: whether each document ends with the tokenizer's `eod`.
    """
    about = {
        "format": FORMAT,
        "data": digest_of_files(bin_path, idx_path),
        "tokenizer": {**tokenizer.unique_identifiers, "vocab_size": tokenizer.vocab_size, "eod": tokenizer.eod},
        "append_eod": append_eod,
    }
    path.write_text(json.dumps(about, indent=1) + "\n")


def tokenizer_of_data(prefix: str) -> str | None:
    """Digest of the tokenizer that made PREFIX.bin; None where nothing beside it says so of this very content."""
    try:
        about = json.loads(sidecar(prefix).read_text())
        named = about["tokenizer"]["sha256"], about["data"], about["format"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    digest, data, version = named
    # of another version of this project, or left from data that another tool has replaced since
    if version != FORMAT or not isinstance(digest, str) or data != digest_of_prefix(prefix):
        return None
    return digest


def check_tokenizer_of_data(prefix: str, tokenizer: Tokenizer) -> None:
    """Refuse data that says that another tokenizer made it; data that says nothing is taken as it is.

    Raises:
        DataError: names both tokenizers by their digests.
    """
    made_with, given = tokenizer_of_data(prefix), digest_of_tokenizer(tokenizer)
    if made_with and given and made_with != given:
        raise DataError(
            f"{prefix}.bin was made with the tokenizer {made_with[:SHOWN]}, but is to be read with {given[:SHOWN]}, "
            "by which its ids mean other text: give the tokenizer that made it (data.tokenizer_model), or preprocess "
            "again"
        )


def remark_on_unnamed(prefixes: Iterable[str]) -> str | None:
    """A line on the token files that do not say which tokenizer made them; None if all do."""
    every = list(prefixes)
    unnamed = [prefix for prefix in every if tokenizer_of_data(prefix) is None]
    if not unnamed:
        return None
    rest = f" and {len(unnamed) - 1} more" if len(unnamed) > 1 else ""
    return (
        f"{unnamed[0]}.bin{rest} does not say which tokenizer made it, as files of other tools and earlier versions "
        "do not: its ids are taken for those of data.tokenizer_model"
    )


def digest_of_tokenizer(tokenizer: Tokenizer) -> str:
    """SHA-256 of what makes its ids, "" if it does not say; see `Tokenizer.unique_identifiers`."""
    return tokenizer.unique_identifiers.get("sha256", "")


@dataclass(frozen=True)
class TrainedOn:
    """What the weights of a checkpoint have seen.

    Attributes:
        tokenizer: its digest; "" where it is not known.
        data: a digest of the files of each split that the run uses, by the split's name.
    """

    tokenizer: str = ""
    data: dict[str, str] = field(default_factory=dict)

    def values(self) -> dict[str, Any]:
        """For state.json."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> TrainedOn | None:
        """What state.json says; None in a checkpoint of a version that did not say it."""
        found = state.get("trained_on")
        if not isinstance(found, dict) or not isinstance(found.get("data"), dict):
            return None
        return cls(str(found.get("tokenizer", "")), {str(key): str(value) for key, value in found["data"].items()})

    def check_tokenizer(self, checkpoint: Path, given: str) -> None:
        """Refuse to go on with another tokenizer: its ids mean other text, which the weights have not learnt.

        Raises:
            ConfigError: names both by their digests.
        """
        if self.tokenizer and given and self.tokenizer != given:
            raise ConfigError(
                f"checkpoint {checkpoint} was trained with the tokenizer {self.tokenizer[:SHOWN]}, but "
                f"data.tokenizer_model is {given[:SHOWN]}: give that tokenizer, or start anew with another "
                "logging.output_dir"
            )

    def other_data(self, now: TrainedOn) -> list[str]:
        """A line on each split whose files have another content, order or weight than those the weights have seen."""
        consequence = {"train": "the run goes on with samples of the new data, from the same position"}
        return [
            f"the {split} data are not those of the checkpoint: "
            f"{consequence.get(split, 'its losses cannot be compared with those before')}"
            for split, digest in now.data.items()
            if self.data.get(split, digest) != digest
        ]
