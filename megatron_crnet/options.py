"""Options of the tools that stand beside `--section.field value`."""

from __future__ import annotations

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


def positive_integer(name: str, text: str) -> int:
    """The value of an option that counts something.

    Raises:
        ConfigError: it is no integer above 0.
    """
    require(text.isdecimal() and int(text) > 0, f"{name} is {text}, but must be an integer above 0: correct it")
    return int(text)
