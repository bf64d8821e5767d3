"""Text columns of Parquet files. pyarrow, whose import is slow, is imported at need."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_crnet.utils.errors import DataError

ROWS = 1024
"""Rows that are decoded at once: a row group may be larger than memory."""


def check_parquet(path: Path, text_key: str) -> None:
    """Raise DataError unless `path` is a whole Parquet file with text under `text_key`."""
    _open(path, text_key).close()


def parquet_texts(path: Path, text_key: str) -> tuple[int, Iterator[list[bytes | None]]]:
    """The number of rows of a file, and batches of its texts: undecoded bytes, None for a missing one.

    Args:
        text_key: a column, or a field in structs: `data.text`. A column whose name holds the dots comes first.

    Raises:
        DataError: the file is damaged, or has no text of that name.
    """
    file = _open(path, text_key)
    return file.metadata.num_rows, _batches(path, file, text_key)


def _batches(path: Path, file: Any, text_key: str) -> Iterator[list[bytes | None]]:
    import pyarrow as pa
    import pyarrow.compute as pc

    first, *inner = [text_key] if text_key in file.schema_arrow.names else text_key.split(".")
    with file:
        try:
            for batch in file.iter_batches(ROWS, columns=[text_key], use_threads=False):
                column = pc.struct_field(batch.column(first), inner) if inner else batch.column(first)
                if pa.types.is_dictionary(column.type):
                    column = column.dictionary_decode()
                yield column.cast(pa.large_binary()).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise _damaged(path, error) from error


def _open(path: Path, text_key: str) -> Any:
    """A ParquetFile whose text key leads to strings or bytes."""
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(f"{path} needs the package pyarrow, which is not installed: pip install pyarrow") from error
    import pyarrow as pa

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from error
    schema = file.schema_arrow
    found: Any = pa.struct(list(schema))
    for part in [text_key] if text_key in schema.names else text_key.split("."):
        if not pa.types.is_struct(found) or found.get_field_index(part) < 0:
            names = ", ".join(schema.names[:10])
            raise DataError(f"{path} has no column {text_key!r}, but {names}: name the one of the text with --text-key")
        found = found.field(part).type
    value = found.value_type if pa.types.is_dictionary(found) else found
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    if not any(test(value) for test in tests):
        raise DataError(f"{path} has {found} in the column {text_key!r}, not text: name the one of the text")
    return file


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} is truncated or damaged, or not Parquet ({error}): fetch it again")
