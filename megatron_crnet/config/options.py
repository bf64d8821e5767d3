"""Command-line parsers; `loading.ConfigParser` adds the configuration."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

from megatron_crnet.config.field_types import FilePath, checked
from megatron_crnet.utils.errors import ConfigError, require
from megatron_crnet.utils.versions import version_line

LONGEST = 300
"""Characters of a message."""
MOST = 2**20
"""Largest count of an option."""


class ToolParser(argparse.ArgumentParser):
    """An ArgumentParser with `--version`, an unwrapped description and errors of one line."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **arguments)
        self.register("type", Path, _path_argument)
        versions = "print the versions of this project and its libraries"
        self.add_argument("--version", action="version", version=version_line(), help=versions)

    def error(self, message: str) -> NoReturn:
        """Raise argparse's message as ConfigError: one line of a length that can be read, with a remedy."""
        words = " ".join(message.split()).encode("utf-8", "backslashreplace").decode()
        words = words if len(words) <= LONGEST else f"{words[:LONGEST]}..."
        raise ConfigError(f"{words}: correct the command line, or see --help")


def _path_argument(text: str) -> Path:
    try:
        return file_path("it", text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def file_path(name: str, text: str) -> Path:
    """The path of an option, with `~` and environment variables expanded.

    Raises:
        ConfigError: it cannot be a path.
    """
    if not text.isascii() and text.encode("utf-8", "ignore").decode() != text:
        return Path(text)  # a file name on Linux may be bytes that are not UTF-8
    return Path(checked(name, FilePath, text))


def positive_integer(name: str, text: str) -> int:
    """The value of an option that is a count.

    Raises:
        ConfigError: it is not an integer above 0.
    """
    value = int(text) if text.isdecimal() and len(text) <= len(str(MOST)) else 0
    require(0 < value <= MOST, f"{name} is {text[:80]}, but must be an integer above 0, at most {MOST}: correct it")
    return value
