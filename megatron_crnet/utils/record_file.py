"""The JSON file of a tool's figures: checked before anything is measured, and written whole."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from megatron_crnet.utils.errors import require
from megatron_crnet.utils.files import atomic_files

STDOUT = Path("-")


def add_record_options(parser: argparse.ArgumentParser) -> None:
    """`--json [FILE]` and `--overwrite`."""
    parser.add_argument(
        "--json",
        type=Path,
        nargs="?",
        const=STDOUT,
        metavar="FILE",
        help="also write the figures here; without a FILE print them instead of the table",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an older file")


def check_record_file(path: Path | None, option: str = "--json", overwrite: bool = False) -> None:
    """Refuse a file that could not be written; None is no file.

    Raises:
        ConfigError: it exists and `overwrite` is false, is a folder, or lies in one that is missing or not writable.
    """
    if path is None or path == STDOUT:
        return
    folder = path.absolute().parent
    require(folder.is_dir(), f"{option} {path} lies in a folder that does not exist: make {folder}, or choose another")
    require(not path.is_dir(), f"{option} {path} is a folder: write a file's name")
    require(
        overwrite or not path.exists(),
        f"{option} {path} exists already: remove it, choose another name, or add --overwrite",
    )
    require(os.access(folder, os.W_OK), f"{option} {path} lies in a folder that cannot be written: choose another")


def report_record(path: Path | None, record: dict[str, Any], text: str) -> None:
    """Print `text`, or the record as JSON for `STDOUT`; any other path is replaced by the record, whole.

    Raises:
        DataError: the file cannot be written.
    """
    written = json.dumps(record, indent=1)
    print(written if path == STDOUT else text, flush=True)
    if path is not None and path != STDOUT:
        with atomic_files(path, overwrite=True) as (temporary,):
            temporary.write_text(written + "\n")
