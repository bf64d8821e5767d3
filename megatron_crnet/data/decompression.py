"""Reads gzip, zstd, bzip2 and xz, member by member.

The libraries' own file readers lose data without a word: zstd's takes a cut frame for a whole one, those of bzip2 and
xz pass over whatever follows the first stream and is damaged. Here all of a file is decompressed, or it is an error.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Literal

Compression = Literal["gzip", "zstd", "bzip2", "xz"]

SUFFIXES: dict[str, Compression] = {
    ".gz": "gzip",
    ".zst": "zstd",
    ".zstd": "zstd",
    ".bz2": "bzip2",
    ".xz": "xz",
    ".lzma": "xz",
}
MAGIC: dict[Compression, tuple[bytes, ...]] = {
    "gzip": (b"\x1f\x8b",),
    "zstd": (b"\x28\xb5\x2f\xfd", *(bytes([first]) + b"\x2a\x4d\x18" for first in range(0x50, 0x60))),
    "bzip2": tuple(b"BZh%d" % level + block for level in range(1, 10) for block in (b"1AY&SY", b"\x17rE8P\x90")),
    "xz": (b"\xfd7zXZ\0", b"\x5d\0\0"),
}
"""First bytes of each; of zstd also a frame to be skipped, of bzip2 an empty one, of xz also the format before it."""
ZSTD_WINDOW = 1 << 31
"""The largest window there is, of `zstd --ultra --long=31`. Memory is taken as a frame needs it."""


class DamagedError(Exception):
    """A compressed stream that is cut or is not what it begins as."""


def compression_of(head: bytes) -> Compression | None:
    """How a file that begins with `head` is compressed."""
    return next((kind for kind, beginnings in MAGIC.items() if head.startswith(beginnings)), None)


def decompressed(raw: BinaryIO, compression: Compression | None, size: int) -> Iterator[tuple[bytes, int]]:
    """Blocks of the contents, each with the bytes of `raw` that were read for it.

    Args:
        raw: a file, or a pipe.
        compression: how all its members are compressed; None means not at all.
        size: bytes that are read at once.

    Raises:
        DamagedError: a member is cut or damaged.
        OSError: `raw` cannot be read.
    """
    if compression is None:
        while block := raw.read(size):
            yield block, len(block)
        return
    new, member = _decompressor(compression), None
    while data := raw.read(size):
        block, member = _decompress(data, member, new)
        yield block, len(data)
    if member is not None:
        raise DamagedError("the end is missing")


def beginning(head: bytes, compression: Compression | None) -> bytes:
    """What can be decompressed of the first bytes of a file.

    Raises:
        DamagedError: they are damaged.
    """
    return head if compression is None else _decompress(head, None, _decompressor(compression))[0]


def _decompress(data: bytes, member: Any, new: Callable[[], Any]) -> tuple[bytes, Any]:
    """The contents of `data`, and the decompressor of the member that it ends within, if it does."""
    blocks = []
    while data:
        if member is None:
            data = data.lstrip(b"\0")  # members may be padded
            if not data:
                break
            member = new()
        try:
            blocks.append(member.decompress(data))
        except Exception as error:  # zlib.error, OSError, LZMAError, ZstdError: of the data, nothing is read here
            raise DamagedError(str(error)) from error
        data = member.unused_data if member.eof else b""
        member = None if member.eof else member
    return b"".join(blocks), member


def _decompressor(compression: Compression) -> Callable[[], Any]:
    if compression == "zstd":
        import zstandard

        return zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj
    if compression == "gzip":
        return lambda: zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    return bz2.BZ2Decompressor if compression == "bzip2" else lzma.LZMADecompressor
