"""Odd values, and ways to damage a value, a text or a file; everything is drawn from one `random.Random`."""

from __future__ import annotations

import copy
import json
import pickle
import struct
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.runner import CANARY

YAML = [
    *("null", "", "''", "x", "-1", "0", "1", "2", "3", "1.5", ".inf", "-.inf", ".nan", "true", "1e3", "0x10", "1_000"),
    *("2147483648", "4294967296", "9223372036854775808", "1" + 400 * "0", "1e-320", "1e308", "-0.0", "010", "12:30"),
    *(
        "[]",
        "{}",
        "[1]",
        "[x, y]",
        "[[[[]]]]",
        "[null]",
        "{a: 1}",
        "2020-01-01",
        "[0.3, train, 0.7]",
        "['2023', '2024']",
    ),
    *(
        "../run",
        "/dev/null",
        "/proc/self/mem",
        "~nobody_here/x",
        "$NO_SUCH_VARIABLE/x",
        '"a\\0b"',
        '"\\uD800"',
        300 * "a",
    ),
    *(
        f"!!python/object/apply:os.system ['touch {CANARY}']",
        f"!!python/object/new:open ['{CANARY}', w]",
        "!!binary aaaa",
    ),
    *(
        "&a [*a]",
        "*missing",
        "{<<: {lr: 1}}",
        2000 * "[" + 2000 * "]",
        "auto",
        "cuda:0",
        "train",
        "text",
        "config.yaml",
    ),
]
"""Values as YAML spells them."""

JSON = [None, True, False, -1, 0, 1, 2.5, 10**400, 1e308, float("nan"), float("inf"), "", "x", "../../x", "\ud800"]
"""Values as JSON holds them; containers are added by `json_value`."""

WORDS = ["", "x", "-1", "0", "1", "1.5", "nan", "inf", "1e-320", "1e3", "9" * 400, "9223372036854775808", "True"]
WORDS += [
    "null",
    "run",
    "export",
    "train",
    "text",
    "missing",
    ".",
    "..",
    "/",
    "/dev/null",
    "a\0b"[:1],
    "\udcff",
    "a" * 300,
]
WORDS += [
    "config.yaml",
    "valid.jsonl",
    "tokenizer.model",
    "export/config.json",
    "run/checkpoints/latest",
    "--",
    "-",
    "[",
    "{}",
]
"""Words of a command line."""


class Planted:
    """Makes the canary when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (CANARY, "w")


def json_value(rng: Random) -> Any:
    """One of any kind, containers too."""
    nested: Any = []
    for _ in range(rng.choice([1, 5000])):
        nested = [nested]
    return rng.choice([*JSON, [], {}, {"": {}}, nested])


def damaged_json(value: Any, rng: Random) -> Any:
    """A copy in which one place, at any depth, is gone, replaced, doubled or added."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    if not places:
        return json_value(rng)
    container, key = rng.choice(places)
    match rng.randrange(4):
        case 0:
            del container[key]
        case 1 if isinstance(container, dict):
            container[rng.choice(["zz", "", key.upper() if isinstance(key, str) else "K"])] = json_value(rng)
        case 1:
            container.append(copy.deepcopy(container[key]))
        case _:
            container[key] = json_value(rng)
    return value


def _places(value: Any) -> Any:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    for key in keys:
        yield value, key
        yield from _places(value[key])


def spelled(value: Any) -> str:
    """JSON as Python spells it: numbers that are none and lone surrogates included; what is too deep for it by hand."""
    try:
        return json.dumps(value)
    except RecursionError:
        return '{"step": ' + 5000 * "[" + 5000 * "]" + "}"


def write_json(path: Path, value: Any) -> None:
    path.write_text(spelled(value))


def damage_text(text: str, rng: Random) -> str:
    """One line or character of a text is doubled, gone or odd."""
    lines = text.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    match rng.randrange(7):
        case 0:
            lines.insert(rng.randrange(len(lines)), lines[at])
        case 1:
            del lines[at]
        case 2:
            lines[at] = lines[at].replace(" ", "\t")
        case 3:
            lines[at] = lines[at].replace(":", "", 1)
        case 4:
            return "\ufeff" + text.replace("\n", "\r\n")
        case 5:
            return text[: rng.randrange(len(text))]
        case _:
            position = rng.randrange(len(text))
            return text[:position] + rng.choice("{}[]:,&*!|>%@`\0\x07\u2028é") + text[position + 1 :]
    return "".join(lines)


def damage_bytes(data: bytes, rng: Random) -> bytes:
    """Flipped, cut, doubled, emptied, or another kind of file."""
    if not data:
        return b"\0"
    at = rng.randrange(len(data))
    match rng.randrange(8):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + data[at:] * 2
        case 2:
            return b""
        case 3:
            return pickle.dumps(Planted())
        case 4:
            return data[:at] + struct.pack("<q", rng.choice([-1, 0, 2**31 - 1, 2**62])) + data[at + 8 :]
        case 5:
            return rng.randbytes(min(len(data), 4096))
        case _:
            head = rng.randrange(min(len(data), 256))
            flipped = data[head] ^ (1 << rng.randrange(8))
            return data[:head] + bytes([flipped]) + data[head + 1 :]


def damage_file(path: Path, rng: Random) -> None:
    """Its bytes, or the file itself."""
    match rng.randrange(10):
        case 0:
            path.unlink()
        case 1:
            path.unlink()
            path.mkdir()
        case 2:
            path.unlink()
            path.symlink_to("missing")
        case _:
            path.write_bytes(damage_bytes(path.read_bytes(), rng))
