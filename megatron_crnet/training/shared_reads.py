"""Reads the data files at a start: each once per node, and ranges of token ids not again while a file is the same.

If each of a hundred ranks scanned the same hundred files, every start would read terabytes from a shared file system.
Ranks of one node that see the same files divide them and exchange results; the ranges are cached by content.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist

from megatron_crnet.data.fingerprint import FileDigest, digest_of_prefix, known_digests, learn_digests
from megatron_crnet.data.indexed import IdRange, check_index, id_range, read_index
from megatron_crnet.distributed.consensus import report_together
from megatron_crnet.utils.errors import DataError
from megatron_crnet.utils.files import replace_text

FORMAT = 1


@dataclass(frozen=True)
class Known:
    """Results of reading token files.

    Attributes:
        ids: smallest and largest token id of each prefix, within the part that `indexed.id_range` scans.
        fresh: records for the cache, of the files that this rank has read.
    """

    ids: dict[str, IdRange]
    fresh: dict[Path, str] = field(default_factory=dict)

    def keep(self) -> None:
        """Write the records; a cache that cannot be written is ignored."""
        for path, text in self.fresh.items():
            with suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                replace_text(path, text)


_Pair = tuple[dict[str, FileDigest], IdRange]
"""Digests by path and the range of token ids of a .bin/.idx pair."""


def _this_node() -> str:
    """Identifies the machine, in a container as well."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


def view_of(prefixes: Sequence[str]) -> str:
    """Equal for ranks that see the very same files: the node, and which file lies behind each path.

    Raises:
        DataError: a file is missing, cut or of another kind.
    """
    digest = hashlib.sha256(_this_node().encode())
    for prefix in prefixes:
        read_index(prefix)
        for path in (f"{prefix}.bin", f"{prefix}.idx"):
            status = os.stat(path)
            digest.update(repr((status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)).encode())
    return digest.hexdigest()


def read_together(prefixes: Sequence[str], views: Sequence[str], cache: Path) -> Known:
    """Read all token files, each by one of the ranks with the same view; a collective call.

    Args:
        views: `view_of` these prefixes on each rank.
        cache: folder of the records.

    Raises:
        DataError: an index is damaged; raised on every rank.
    """
    rank = dist.get_rank()
    same = [other for other, view in enumerate(views) if view == views[rank]]
    fresh: dict[Path, str] = {}

    def read_share() -> dict[str, _Pair]:
        mine = prefixes[same.index(rank) :: len(same)]
        return {prefix: _pair(prefix, cache, fresh) for prefix in mine}

    found = report_together(read_share)
    pairs = {prefix: pair for other in same for prefix, pair in found[other].items()}
    for digests, _ in pairs.values():
        learn_digests(digests)
    return Known({prefix: ids for prefix, (_, ids) in pairs.items()}, fresh)


def _pair(prefix: str, cache: Path, fresh: dict[Path, str]) -> _Pair:
    try:
        name, paths = digest_of_prefix(prefix), (f"{prefix}.bin", f"{prefix}.idx")
        modified = [os.stat(path).st_mtime_ns for path in paths]
        record = cache / "checked" / f"{name}.json"
        ids = _cached(record, modified)
        if ids is None:
            files = read_index(prefix)
            check_index(files)
            ids = id_range(files)
            fresh[record] = json.dumps({"format": FORMAT, "modified": modified, "ids": ids})
    except OSError as error:
        raise DataError(f"{prefix}.bin or .idx cannot be read ({error.strerror}): correct its permissions") from error
    return known_digests(paths), ids


def _cached(record: Path, modified: list[int]) -> IdRange | None:
    """The range of ids in a record; not of files changed since, as equal digests allow a few other tokens."""
    try:
        found = json.loads(record.read_text())
        smallest, largest = found["ids"]
        known = found["format"] == FORMAT and found["modified"] == modified
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    whole = all(type(number) is int for number in (smallest, largest))
    return (smallest, largest) if known and whole else None
