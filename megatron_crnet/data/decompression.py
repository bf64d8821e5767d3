"""Reads gzip, zstd, bzip2 and xz, member by member.

The libraries' own file readers silently lose data: zstd's takes a cut frame for a whole one, those of bzip2 and xz
ignore damaged data after the first stream. Here all of a file is decompressed, or it is an error.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Iterator
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
    """A compressed stream is cut or damaged."""


def compression_of(head: bytes) -> Compression | None:
    """How a file that begins with `head` is compressed."""
    return next((kind for kind, beginnings in MAGIC.items() if head.startswith(beginnings)), None)


def decompressed(raw: BinaryIO, compression: Compression | None, size: int) -> Iterator[tuple[bytes, int]]:
    """Blocks of the contents of `raw`, read `size` bytes at a time, each with the number of bytes read for it.

    Raises:
        DamagedError: a member is cut or damaged.
        OSError: `raw` cannot be read.
    """
    member = None
    while data := raw.read(size):
        block, member = _decompress(data, compression, member)
        yield block, len(data)
    if member is not None:
        raise DamagedError("the end is missing")


def beginning(head: bytes, compression: Compression | None) -> bytes:
    """What can be decompressed of the first bytes of a file; raises DamagedError if they are damaged."""
    return _decompress(head, compression, None)[0]


def _decompress(data: bytes, compression: Compression | None, member: Any) -> tuple[bytes, Any]:
    """The contents of `data`, and the decompressor of an unfinished last member."""
    if compression is None:
        return data, None
    blocks = []
    while data:
        if member is None:
            data = data.lstrip(b"\0")  # members may be padded
            if not data:
                break
            member = _new_member(compression)
        try:
            blocks.append(member.decompress(data))
        except Exception as error:  # zlib.error, OSError, LZMAError, ZstdError: nothing is read here
            raise DamagedError(str(error)) from error
        data = member.unused_data if member.eof else b""
        member = None if member.eof else member
    return b"".join(blocks), member


def _new_member(compression: Compression) -> Any:
    if compression == "zstd":
        import zstandard

        return zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj()
    if compression == "gzip":
        return zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    return bz2.BZ2Decompressor() if compression == "bzip2" else lzma.LZMADecompressor()
