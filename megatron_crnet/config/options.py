"""Options of the tools that stand beside `--section.field value`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_crnet.config.field_types import FilePath, checked
from megatron_crnet.utils.errors import ConfigError, require
from megatron_crnet.utils.versions import version_line

LONGEST = 300
"""Characters of a message that are printed."""
MOST = 2**20
"""Largest number of ranks, rows or layers that a tool takes."""


class Version(argparse.Action):
    """Prints the versions and ends, as `--version` does everywhere."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(nargs=0, **arguments)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        """Print; the libraries are asked for their versions, not imported."""
        print(version_line())
        parser.exit()


class ToolParser(argparse.ArgumentParser):
    """The command line of a tool: its documentation as it stands, `--version`, and one line for a mistake."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **arguments)
        self.register("type", Path, _path_argument)
        self.add_argument("--version", action=Version, help="print the versions of this project and its libraries")

    def error(self, message: str) -> NoReturn:
        """End with status 2 and one line, without argparse's usage."""
        self.exit(2, f"error: {self.refusal(message)}\n")

    @staticmethod
    def refusal(message: str) -> str:
        """argparse's message in one line of a length that can be read, with a remedy."""
        words = " ".join(message.split()).encode("utf-8", "backslashreplace").decode()
        return f"{words if len(words) <= LONGEST else words[:LONGEST] + '...'}: correct the command line, or see --help"


def _path_argument(text: str) -> Path:
    try:
        return file_path("it", text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def file_path(name: str, text: str) -> Path:
    """The path that an option names, `~` and environment variables replaced as in the configuration.

    Raises:
        ConfigError: it cannot be a path.
    """
    if not text.isascii() and text.encode("utf-8", "ignore").decode() != text:
        return Path(text)  # bytes that are not UTF-8 are a name on Linux, though not text
    return Path(checked(name, FilePath, text))


def take_options(defaults: Mapping[str, str | None], argv: Sequence[str]) -> tuple[dict[str, str | None], list[str]]:
    """A tool's own options with their values, and what is left for the configuration.

    Raises:
        ConfigError: an option has no value.
    """
    found, rest, waiting = dict(defaults), [], iter(argv)
    for argument in waiting:
        name, equals, value = argument.partition("=")
        if name not in defaults:
            rest.append(argument)
            continue
        given = value if equals else next(waiting, None)
        require(given is not None and not given.startswith("--"), f"{name} has no value: write {name} VALUE")
        found[name] = given
    return found, rest


def only_usage(usage: str, argv: Sequence[str]) -> int | None:
    """The exit status of a command line that gets no more than `usage`; None for one that asks for work.

    A command line that names no model would silently work on the defaults of `config/schema.py`, which nobody trains.
    """
    if {"-h", "--help"} & set(argv):
        print(usage.strip())
        return 0
    if "--version" in argv:
        print(version_line())
        return 0
    if any(name.partition("=")[0] == "--config" or name.startswith("--model.") for name in argv):
        return None
    print(
        f"{usage.strip()}\n\nerror: no model is named: add --config FILE, such as examples/quickstart.yaml",
        file=sys.stderr,
    )
    return 2


def positive_integer(name: str, text: str) -> int:
    """The value of an option that counts something.

    Raises:
        ConfigError: it is no integer above 0.
    """
    value = int(text) if text.isdecimal() and len(text) <= len(str(MOST)) else 0
    require(0 < value <= MOST, f"{name} is {text[:80]}, but must be an integer above 0, at most {MOST}: correct it")
    return value
