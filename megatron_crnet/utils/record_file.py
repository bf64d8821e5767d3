"""The file in which a tool records what it found: refused before anything is measured, figures written whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from megatron_crnet.utils.errors import require
from megatron_crnet.utils.files import atomic_files


def check_record_file(path: Path | None, option: str = "--json", overwrite: bool = False) -> None:
    """Refuse a file that could not be written, while nothing has been spent on what it is to hold.

    Args:
        path: None where no file was asked for.
        option: which names it.
        overwrite: an older file may be replaced.

    Raises:
        ConfigError: it is there already, is a folder, or lies in one that is not there or cannot be written.
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
    """Write the figures; an older file is there until they are whole.

    Raises:
        DataError: the disk is full, or the folder can no longer be written.
    """
    with atomic_files(path, overwrite=True) as (temporary,):
        temporary.write_text(json.dumps(record, indent=1) + "\n")
