"""Digests of the tokenizer and of the token files of each split.

`preprocess` writes them beside the data (PREFIX.fingerprint.json), every checkpoint holds them (state.json). So token
ids are never read by another tokenizer than the one that made them, and a resumed run names what has changed.
Imports neither torch nor Megatron-Core.
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
"""A file up to this size is read whole; of a larger one, BLOCKS blocks of BLOCK_BYTES."""
BLOCKS, BLOCK_BYTES = 64, 4096
SHOWN = 12
"""Hexadecimal digits of a digest in messages."""


def sidecar(prefix: str | Path) -> Path:
    """The file that names the tokenizer of PREFIX.bin."""
    return Path(f"{prefix}.fingerprint.json")


def digest_of_files(bin_path: str | Path, idx_path: str | Path) -> str:
    """A digest of a .bin/.idx pair, 32 hexadecimal digits, from its sizes and blocks spread over both files.

    A corpus is too large to be read at each start. Changed text changes the lengths of documents, and each block of
    the index depends on all lengths before it. Blocks of the .bin show tokens that changed under equal lengths, such as
    those of another tokenizer; a few changed tokens are not found.
    """
    known = known_digests((str(bin_path), str(idx_path)))
    return hashlib.sha256(b"".join(digest for _, _, digest in known.values())).hexdigest()[:32]


FileDigest = tuple[int, int, bytes]
"""Size and time of change of a file, ns, and a digest of it as it was then."""

_known: dict[str, FileDigest] = {}


def known_digests(paths: Iterable[str]) -> dict[str, FileDigest]:
    """The digest of each file, which is read only if it has changed since the last call."""
    for path in paths:
        status = os.stat(path)
        if _known.get(path, ())[:2] != (status.st_size, status.st_mtime_ns):
            _known[path] = (status.st_size, status.st_mtime_ns, _digest_of_file(path, status.st_size))
    return {path: _known[path] for path in paths}


def learn_digests(digests: Mapping[str, FileDigest]) -> None:
    """Add digests that another process has found in the same files."""
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
    """Write to `path` what a finished .bin/.idx pair, which may have temporary names, was made with."""
    about = {
        "format": FORMAT,
        "data": digest_of_files(bin_path, idx_path),
        "tokenizer": {**tokenizer.unique_identifiers, "vocab_size": tokenizer.vocab_size, "eod": tokenizer.eod},
        "append_eod": append_eod,
    }
    path.write_text(json.dumps(about, indent=1) + "\n")


def tokenizer_of_data(prefix: str) -> str | None:
    """Digest of the tokenizer that made PREFIX.bin; None unless the sidecar names it, for these contents."""
    try:
        about = json.loads(sidecar(prefix).read_text())
        digest, data, version = about["tokenizer"]["sha256"], about["data"], about["format"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    # the sidecar may be of another version of this project, or of data that another tool has replaced since
    return digest if version == FORMAT and isinstance(digest, str) and data == digest_of_prefix(prefix) else None


def check_tokenizer_of_data(prefix: str, tokenizer: Tokenizer) -> None:
    """Raise DataError if the sidecar names another tokenizer; data without a sidecar is accepted."""
    made_with, given = tokenizer_of_data(prefix), digest_of_tokenizer(tokenizer)
    if made_with and given and made_with != given:
        raise DataError(
            f"{prefix}.bin was made with the tokenizer {made_with[:SHOWN]}, but is to be read with {given[:SHOWN]}, "
            "by which its ids mean other text: give the tokenizer that made it (data.tokenizer_model), or preprocess "
            "again"
        )


def remark_on_unnamed(prefixes: Iterable[str]) -> str | None:
    """A line on the token files whose tokenizer is not known; None if there are none."""
    unnamed = [prefix for prefix in prefixes if tokenizer_of_data(prefix) is None]
    if not unnamed:
        return None
    rest = f" and {len(unnamed) - 1} more" if len(unnamed) > 1 else ""
    return (
        f"{unnamed[0]}.bin{rest} does not say which tokenizer made it, as files of other tools and earlier versions "
        "do not: its ids are taken for those of data.tokenizer_model"
    )


def digest_of_tokenizer(tokenizer: Tokenizer) -> str:
    """SHA-256 of what decides its ids, "" if unknown; see `Tokenizer.unique_identifiers`."""
    return tokenizer.unique_identifiers.get("sha256", "")


@dataclass(frozen=True)
class TrainedOn:
    """What a checkpoint was trained on: the tokenizer's digest, "" if unknown, and a digest of the files per split."""

    tokenizer: str = ""
    data: dict[str, str] = field(default_factory=dict)

    def values(self) -> dict[str, Any]:
        """For state.json."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> TrainedOn | None:
        """Inverse of `values`; None for a checkpoint of an older version."""
        found = state.get("trained_on")
        if not isinstance(found, dict) or not isinstance(found.get("data"), dict):
            return None
        return cls(str(found.get("tokenizer", "")), {str(key): str(value) for key, value in found["data"].items()})

    def check_tokenizer(self, checkpoint: Path, given: str) -> None:
        """Raise ConfigError if the run's tokenizer is another one, whose ids mean other text."""
        if self.tokenizer and given and self.tokenizer != given:
            raise ConfigError(
                f"checkpoint {checkpoint} was trained with the tokenizer {self.tokenizer[:SHOWN]}, but "
                f"data.tokenizer_model is {given[:SHOWN]}: give that tokenizer, or start anew with another "
                "logging.output_dir"
            )

    def other_data(self, now: TrainedOn) -> list[str]:
        """A line per split whose files have other contents, order or weights than at the checkpoint."""
        consequence = {"train": "the run goes on with samples of the new data, from the same position"}
        return [
            f"the {split} data are not those of the checkpoint: "
            f"{consequence.get(split, 'its losses cannot be compared with those before')}"
            for split, digest in now.data.items()
            if self.data.get(split, digest) != digest
        ]
