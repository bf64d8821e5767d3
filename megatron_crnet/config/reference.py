"""The reference of configuration fields, generated from the schema.

`--help` prints it as text; `make reference` writes docs/reference.md, and a test checks that it is current.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import docstring_parser

from megatron_crnet.config.deepspeed_keys import DEEPSPEED_KEYS
from megatron_crnet.config.field_types import Reason, describe, shown, types_of
from megatron_crnet.config.schema import Config

HEAD = """# Configuration reference

Generated from the schema by `make reference`; a test keeps it current. How values are read: [train.md](train.md).
"""


class FieldText(NamedTuple):
    """A field of the configuration."""

    name: str
    meaning: str
    values: str
    default: str


def sections() -> Iterator[tuple[str, str, list[FieldText]]]:
    """Name, meaning and fields of each section but `deepspeed`."""
    for field in dataclasses.fields(Config):
        make: Any = field.default_factory
        if make is dict:
            continue  # deepspeed, whose keys are DeepSpeed's
        documented = docstring_parser.parse_from_object(make)
        meanings = {entry.arg_name: " ".join((entry.description or "").split()) for entry in documented.params}
        defaults = make()
        fields = [
            FieldText(f"{field.name}.{key}", meanings.get(key, ""), describe(kind), shown(getattr(defaults, key)))
            for key, kind in types_of(make).items()
        ]
        yield field.name, documented.short_description or "", fields


def deepspeed_meaning() -> str:
    """The meaning of the `deepspeed` section."""
    documented = docstring_parser.parse_from_object(Config)
    return next(" ".join((p.description or "").split()) for p in documented.params if p.arg_name == "deepspeed")


def deepspeed_keys(kinds: dict[str, Any] = DEEPSPEED_KEYS, prefix: str = "deepspeed") -> Iterator[tuple[str, str]]:
    """Each key of the `deepspeed` section that can be set, and its values."""
    for key, inner in kinds.items():
        if isinstance(inner, dict):
            yield from deepspeed_keys(inner, f"{prefix}.{key}")
        elif not any(isinstance(note, Reason) for note in getattr(inner, "__metadata__", ())):
            yield f"{prefix}.{key}", describe(inner)


def help_lines() -> Iterator[str]:
    """The text of `--help`."""
    for section, meaning, fields in sections():
        yield f"{section}: {meaning}"
        for field in fields:
            yield f"  --{field.name} VALUE"
            yield f"      {field.meaning}"
            yield f"      {field.values}; default {field.default}"
        yield ""
    yield "deepspeed:"
    yield "  --deepspeed FILE, --deepspeed_config FILE, --deepspeed.KEY.KEY VALUE"
    yield f"      {deepspeed_meaning()}"
    yield ""


def markdown() -> str:
    """docs/reference.md."""
    lines = [HEAD]
    for section, meaning, fields in sections():
        lines += [f"## {section}", "", meaning, ""]
        lines += ["| field | meaning | values | default |", "| --- | --- | --- | --- |"]
        lines += [f"| `{f.name}` | {_cell(f.meaning)} | {_cell(f.values)} | `{_cell(f.default)}` |" for f in fields]
        lines.append("")
    lines += ["## deepspeed", "", deepspeed_meaning(), "", "| key | values |", "| --- | --- |"]
    lines += [f"| `{key}` | {_cell(values)} |" for key, values in deepspeed_keys()]
    return "\n".join([*lines, ""])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    print(markdown(), end="")
