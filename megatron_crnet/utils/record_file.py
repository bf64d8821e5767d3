"""The JSON file of a tool's figures: checked before anything is measured, and written whole."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from megatron_crnet.utils.errors import require
from megatron_crnet.utils.files import atomic_files


def add_record_options(parser: argparse.ArgumentParser) -> None:
    """`--json FILE` and `--overwrite`."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    parser.add_argument("--overwrite", action="store_true", help="replace an older file")


def check_record_file(path: Path | None, option: str = "--json", overwrite: bool = False) -> None:
    """Refuse a file that could not be written; None is no file.

    Raises:
        ConfigError: it exists and `overwrite` is false, is a folder, or lies in one that is missing or not writable.
    """
    if path is None:
        return
    folder = path.absolute().parent
    require(folder.is_dir(), f"{option} {path} lies in a folder that does not exist: make {folder}, or choose another")
    require(not path.is_dir(), f"{option} {path} is a folder: write a file's name")
    require(
        overwrite or not path.exists(),
        f"{option} {path} exists already: remove it, choose another name, or add --overwrite",
    )
    require(os.access(folder, os.W_OK), f"{option} {path} lies in a folder that cannot be written: choose another")


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Replace `path` by the figures, whole; raises DataError if it cannot be written."""
    if path is None:
        return
    with atomic_files(path, overwrite=True) as (temporary,):
        temporary.write_text(json.dumps(record, indent=1) + "\n")
