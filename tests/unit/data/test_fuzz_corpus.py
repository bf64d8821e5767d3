"""Damaged corpora: one line and status 2, or all that can be read with every loss counted; nothing left behind."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megatron_crnet.data.preprocess import PreprocessResult, preprocess
from megatron_crnet.utils.errors import CrnetError
from tests.unit.data_helpers import read_indexed, train_small_tokenizer

SEED, CASES = 20261126, 240
TEXTS = [f"def f{i}(x):\n    return x + {i}  # é漢\u2581" for i in range(40)]
ODD = [b"\xff", b"\0", b"\n", b"\xef\xbb\xbf", b"\r", b'"', b"{", b"[[", b"\\ud800", b"\x1f\x8b", b"1e999", b"null"]


def parquet() -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table({"text": TEXTS}), stream, row_group_size=7)
    return stream.getvalue()


LINES = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)
FILES: dict[str, Callable[[], bytes]] = {
    "a.jsonl": lambda: LINES,
    "a.json.gz": lambda: gzip.compress(LINES[:900], mtime=0) + gzip.compress(LINES[900:], mtime=0),
    "a.jsonl.zst": lambda: zstandard.ZstdCompressor().compress(LINES),
    "a.jsonl.bz2": lambda: bz2.compress(LINES),
    "a.jsonl.xz": lambda: lzma.compress(LINES),
    "a.parquet": parquet,
    "a.txt": lambda: "\n".join(TEXTS).encode(),
}


def damaged(content: bytes, generator: random.Random) -> bytes:
    """One to three changes: bits, cuts, insertions, doubled or removed parts."""
    data = bytearray(content)
    for _ in range(generator.randrange(1, 4)):
        place, end = sorted(generator.randrange(len(data) + 1) for _ in range(2))
        kind = generator.randrange(5)
        if kind == 0 and place < len(data):
            data[place] ^= 1 << generator.randrange(8)
        elif kind == 1:
            del data[place:]
        elif kind == 2:
            data[place:place] = generator.choice(ODD)
        elif kind == 3:
            data[place:place] = data[place:end]
        else:
            del data[place : min(end, place + 50)]
    return bytes(data)


def attempt(folder: Path, output: Path, model: str) -> tuple[PreprocessResult | None, CrnetError | None]:
    try:
        return preprocess([folder], output, "sentencepiece", model, workers=0), None
    except CrnetError as error:
        return None, error


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return train_small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.fault("D3", "F11")
@pytest.mark.parametrize("name", FILES)
def test_damaged_corpora(model: str, tmp_path: Path, name: str) -> None:
    generator, content = random.Random(f"{SEED} {name}"), FILES[name]()
    refused = read = 0
    for case in range(CASES // len(FILES)):
        folder = tmp_path / str(case)
        folder.mkdir()
        (folder / name).write_bytes(damaged(content, generator))
        output = tmp_path / f"out-{case}"
        result, error = attempt(folder, output, model)
        if error is not None:
            refused += 1
            assert error.exit_status == 2
            assert "\n" not in str(error)
            assert str(folder / name) in str(error) or "holds no document" in str(error)
            assert not list(tmp_path.glob(f"out-{case}*")), "nothing may be left"
        elif result is not None:
            read += 1
            assert len(read_indexed(output)) == result.documents
            counted = sum(int(line.split()[1].replace(",", "").rstrip(":")) for line in result.summary()[:1])
            assert counted == result.skipped
    assert refused + read == CASES // len(FILES)
