"""Types of configuration fields with their ranges, and the message for a value outside them.

A field is annotated with one of these types, such as `lr: Annotated[float, Ge(SMALLEST), Le(1000)]`. `Section` checks
all fields of a section when it is created, from YAML, the command line or Python.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import re
import types
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Le, Lt
from pydantic import AfterValidator, BeforeValidator, ConfigDict, StringConstraints, TypeAdapter, ValidationError

from megatron_crnet.utils.errors import ConfigError

STRICT = ConfigDict(strict=True, allow_inf_nan=False)
SMALLEST = 1e-30
"""Least value of a number that has to be above 0: smaller ones become 0 in fp32."""
MOST = 2**31 - 1
"""Largest count: the indices of Megatron-Core and DeepSpeed are signed 32-bit numbers."""
PART_BYTES, PATH_BYTES = 255, 4095
"""What Linux's file systems allow for each part of a path and for the whole."""


class Rule(str):
    """Metadata of a type: its description in messages, where `describe` cannot derive it."""


class Reason(str):
    """Metadata of a type: why other values are refused, and the remedy."""


def _expanded(path: str) -> str:
    """Expand `~`, `~user`, `$NAME` and `${NAME}`; ValueError if one is unknown."""
    found = os.path.expandvars(os.path.expanduser(path))
    if match := re.search(r"\$(\w+|\{[^}]*\})", found):
        raise ValueError(f"the environment variable {match[0]} is not set: set it, or write the path out")
    if re.match(r"~[^/]", path) and found == path:
        raise ValueError(f"there is no user {path.partition('/')[0][1:]}: write the path out, or ./{path}")
    size = len(os.fsencode(found))
    longest = max(len(os.fsencode(part)) for part in found.split("/"))
    if longest > PART_BYTES or size > PATH_BYTES:
        raise ValueError(
            f"a path has at most {PATH_BYTES} bytes and each of its parts at most {PART_BYTES}: give a shorter one"
        )
    return found


def _no_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("text must not contain a NUL character: remove it")
    return text


Count = Annotated[int, Ge(0), Le(MOST)]
"""A number of things, 0 allowed."""
PositiveCount = Annotated[int, Ge(1), Le(MOST)]
"""A number of things, at least one."""
Parallelism = Annotated[int, Ge(1), Le(65536)]
"""Ranks along one dimension of parallelism."""
Positive = Annotated[float, Ge(SMALLEST), Le(1e6)]
"""A number above 0."""
NonNegative = Annotated[float, Ge(0), Le(1e6)]
"""A number from 0."""
LearningRate = Annotated[float, Ge(SMALLEST), Le(1000)]
"""A peak learning rate."""
Epsilon = Annotated[float, Ge(SMALLEST), Le(1)]
"""A small number that keeps a division away from 0."""
Share = Annotated[float, Ge(0), Le(1)]
"""A part of a whole."""
Probability = Annotated[float, Ge(0), Lt(1)]
"""A part of a whole that is not all of it: dropout, decays of moments."""
Minutes = Annotated[float, Ge(0.001), Le(525600)]
"""A span of time above 0 and up to a year."""
Seed = Annotated[int, Ge(0), Le(2**32 - 1)]
"""What NumPy and PyTorch both take."""
Text = Annotated[str, AfterValidator(_no_nul), Rule("text")]
"""Any text, the empty one too."""
Name = Annotated[str, StringConstraints(min_length=1), AfterValidator(_no_nul), Rule("text that is not empty")]
"""Text that is not empty."""
FilePath = Annotated[
    str,
    BeforeValidator(lambda value: os.fspath(value) if isinstance(value, os.PathLike) else value),
    *(StringConstraints(min_length=1), AfterValidator(_no_nul), AfterValidator(_expanded), Rule("a path")),
]
"""A path: `~` and environment variables are replaced."""


class Section:
    """Base of the configuration's sections, `class ModelConfig(Section, name="model")`.

    Raises:
        ConfigError: a field's value is not of its type.
    """

    section: ClassVar[str]

    def __init_subclass__(cls, name: str) -> None:
        cls.section = name

    def __post_init__(self) -> None:
        """Check every field and store the converted value."""
        made: Any = type(self)
        hints = types_of(made)
        for field in dataclasses.fields(made):
            name, value = f"{self.section}.{field.name}", getattr(self, field.name)
            object.__setattr__(self, field.name, checked(name, hints[field.name], value, remedy_of(field)))

    def changed(self) -> list[str]:
        """Names of the fields that have another value than their default."""
        made: Any = type(self)
        defaults = {
            field.name: field.default_factory() if callable(field.default_factory) else field.default
            for field in dataclasses.fields(made)
        }
        return [name for name, default in defaults.items() if getattr(self, name) != default]


@cache
def types_of(section: Any) -> dict[str, Any]:
    """The type of each field, with its ranges."""
    hints = get_type_hints(section, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(section)}


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind, config=STRICT)


def checked(name: str, kind: Any, value: Any, remedy: str = "correct it") -> Any:
    """The value converted to its type: an integer to a float, a tuple to a list, a path expanded.

    Raises:
        ConfigError: it is not of the type.
    """
    try:
        return _adapter(kind).validate_python(_with_lists(value))
    except ValidationError as error:
        own = [found["ctx"]["error"] for found in error.errors() if found["type"] == "value_error"]
        reasons = [note for note in get_args(kind)[1:] if isinstance(note, Reason)]
        literals = [part for part in _alternatives(kind) if get_origin(part) is Literal]
        choices = [choice for part in literals for choice in get_args(part) if isinstance(choice, str)]
        remedy = nearest(value, choices, remedy) if isinstance(value, str) else remedy
        rule = next(iter([*reasons, *own]), f"must be {describe(kind)}: {remedy}")
        raise ConfigError(f"{name} is {shown(value)}, but {rule}") from error


def _with_lists(value: Any) -> Any:
    """Tuples, which YAML does not have, as lists; also in a mapping."""
    if isinstance(value, dict):
        return {key: list(entry) if isinstance(entry, tuple) else entry for key, entry in value.items()}
    return [_with_lists(entry) for entry in value] if isinstance(value, tuple) else value


def remedy_of(field: dataclasses.Field[Any]) -> str:
    """The remedy for an invalid value, with the default."""
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if default is dataclasses.MISSING:
        return "correct it"
    return f"correct it, or leave it out for {shown(default)}"


MOST_NAMES = 20
"""That a message lists."""


def nearest(name: object, known: Iterable[str], otherwise: str = "") -> str:
    """The remedy for an unknown name: a similar known one, else `otherwise` or the list of all."""
    names = list(known)
    close = difflib.get_close_matches(str(name), names, n=1)
    if close:
        return f"did you mean {close[0]}?"
    return otherwise or (f"choose one of {', '.join(names)}" if len(names) <= MOST_NAMES else "see docs/reference.md")


def _alternatives(kind: Any) -> Iterator[Any]:
    """The types of a union, without their ranges."""
    if get_origin(kind) is Annotated:
        yield from _alternatives(get_args(kind)[0])
    elif get_origin(kind) in (Union, types.UnionType):
        for part in get_args(kind):
            yield from _alternatives(part)
    else:
        yield kind


def is_text(kind: Any) -> bool:
    """Whether the type is text (or null), so that a YAML scalar such as 2024 stays text."""
    return all(part in (str, type(None)) for part in _alternatives(kind))


def describe(kind: Any) -> str:
    """The description of a type, with its range."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        for note in parts[1:]:
            if isinstance(note, Rule):
                return str(note)
        return describe(parts[0]) + _range(parts[1:])
    if origin in (Union, types.UnionType):
        return " or ".join(describe(part) for part in parts)
    if origin is Literal:
        return ("one of " if len(parts) > 1 else "") + ", ".join(c if isinstance(c, str) else shown(c) for c in parts)
    if origin is list:
        return f"a list whose entries are {describe(parts[0])}"
    return {int: "an integer", float: "a finite number", bool: "true or false", type(None): "null"}.get(kind, "text")


def _range(notes: tuple[Any, ...]) -> str:
    lower = upper = ""
    for note in notes:
        if isinstance(note, Ge):
            lower = " above 0" if note.ge == SMALLEST else f" from {_number(note.ge)}"
        elif isinstance(note, Le):
            upper = f" {'and up ' if 'above' in lower else ''}to {_number(note.le)}"
        elif isinstance(note, Lt):
            upper = f" to below {_number(note.lt)}"
    return lower + upper


def _number(value: Any) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def shown(value: Any, limit: int = 80) -> str:
    """A value in one line of YAML, cut where it is long."""
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    try:
        text = json.dumps(value, default=repr, ensure_ascii=False)
    except (ValueError, TypeError, RecursionError):  # recursive, too deep, or keys that are not text
        text = f"a {type(value).__name__}"
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= limit else f"{text[:limit]}..."
