"""Options of the tools that stand beside `--section.field value`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from megatron_crnet.errors import require


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

    A command line that names no model would silently work on the defaults of `config.py`, which nobody trains.
    """
    if {"-h", "--help"} & set(argv):
        print(usage.strip())
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
    require(text.isdecimal() and int(text) > 0, f"{name} is {text}, but must be an integer above 0: correct it")
    return int(text)
