"""Reads YAML and JSON for configurations.

Unlike PyYAML's `safe_load`: duplicate keys are refused with both lines, as are values without an end; numbers are those
of YAML 1.2 (1e-3 is a number, 010 is ten, 1:30 is text); text that looks like a number keeps its spelling where text is
expected.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from megatron_crnet.utils.errors import ConfigError, describe

MOST_BYTES = 2**20
MOST_VALUES, DEEPEST = 100_000, 50
TEXT = "tag:yaml.org,2002:str"
SPELT = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:bool")

AsText = Callable[[tuple[str, ...]], bool]
"""Whether the scalar under these keys is expected to be text."""


class Loader(yaml.SafeLoader):
    """PyYAML's, with YAML 1.2's numbers and without its dates."""

    yaml_implicit_resolvers = {}


for _tag, _pattern, _first in (
    ("bool", r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", "yYnNtTfFoO"),
    ("int", r"[-+]?[0-9][0-9_]*", "-+0123456789"),
    (
        "float",
        r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
):
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value.replace("_", "")))


def read_file(path: str, as_text: AsText) -> Any:
    """The values of a YAML file, or of a JSON file by its name.

    Raises:
        ConfigError: it cannot be read, is not valid, or has duplicate keys.
    """
    try:
        with open(path, "rb") as stream:
            data = stream.read(MOST_BYTES + 1)
        text = data.decode("utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: NUL in the path, bytes that are not UTF-8
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{path} cannot be read ({reason}): give an existing file of text") from error
    if len(data) > MOST_BYTES:
        raise ConfigError(f"{path} has more than {MOST_BYTES} bytes, so it is not a configuration: give another file")
    return _json(text, path) if Path(path).suffix == ".json" else read_text(text, path, as_text)


def read_text(text: str, source: str, as_text: AsText = lambda keys: False) -> Any:
    """The value of YAML text; messages name its `source`.

    Raises:
        ConfigError: it is not valid YAML, or has duplicate keys.
    """
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_tree(node, source)
        _keep_spelling(node, (), as_text)
        return loader.construct_document(node)
    # ValueError: thousands of digits; the others: a tag that does not fit its value
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise ConfigError(f"{source} is not valid YAML ({describe(error)}): correct it") from error


def _check_tree(root: yaml.Node, source: str) -> None:
    """Raise ConfigError for duplicate keys, aliases that multiply, and nodes that hold themselves."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node, depth: int) -> int:
        if depth > DEEPEST:
            raise ConfigError(f"{source} nests deeper than {DEEPEST} levels: make it flatter")
        if id(node) in sizes:
            return sizes[id(node)]
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            _check_keys_once(node, source)
            children = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        sizes[id(node)] = total = 1 + sum(size(child, depth + 1) for child in children)
        if total > MOST_VALUES:
            raise ConfigError(f"{source} has more than {MOST_VALUES} values with its aliases written out: use fewer")
        return total

    size(root, 0)


def _check_keys_once(node: yaml.MappingNode, source: str) -> None:
    lines: dict[tuple[str, str], int] = {}
    for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
        line, place = key.start_mark.line + 1, (key.tag, key.value)
        if place in lines:
            raise ConfigError(f"{source} has the key {key.value} twice, in lines {lines[place]} and {line}: remove one")
        lines[place] = line


def _keep_spelling(node: yaml.Node, keys: tuple[str, ...], as_text: AsText) -> None:
    """Tag the plain scalars of fields that take text as text: 2024.10 stays as it is."""
    if isinstance(node, yaml.ScalarNode) and node.tag in SPELT and as_text(keys):
        node.tag = TEXT
    elif isinstance(node, yaml.MappingNode) and len(keys) < 2:
        for key, value in node.value:
            _keep_spelling(value, (*keys, str(key.value)), as_text)


def _json(text: str, source: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError(f"{source} has the key {twice} twice: remove one")
        return found

    try:
        return json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source} is not valid JSON ({describe(error)}): correct it") from error
