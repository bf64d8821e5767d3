"""Random configurations and command lines: one line and status 2, or a configuration that reads back as itself."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_crnet.config.deepspeed_keys import DEEPSPEED_KEYS
from megatron_crnet.config.field_types import types_of
from megatron_crnet.config.loading import SECTIONS, load_config, read_config, resolved, save_config
from megatron_crnet.utils.errors import ConfigError

SEED, CASES = 12, 400
BASE = (Path(__file__).parents[3] / "examples/llama2_7b.yaml").read_text()
VALUES = [
    *("null", "~", "true", "no", "1", "-1", "0", "1e-3", "1e400", "-.inf", ".nan", "", "''", "'x'", "[1,2]", "[[1]]"),
    *("{a: 1}", "{}", "[]", "&a [1]", "*a", "!!python/name:os", "!!binary aGk=", "!!set {a}", "2024-01-01", "0x10"),
    *("\u2581", "\U0001f600", "\ud800", "a" * 500, "9" * 5000, "1:30", "auto", "$HOME", "$NOPE", "~root", "\x00"),
    *('"\\0"', '"\\ud800"', "|\n  x", "<<", "? a", "- a", ": ", "{", "[", "}", "#", "%", "@x", "`x", "'", '"', "1_0"),
    *("{q: 1, k: 1, v: 1, o: 1, gate: 1, up: 1, down: [1]}", "+1", "5e8", "0.5", "1.5", "2147483648", "9" * 20),
]
ODD = [
    *("--config", "--deepspeed", "--deepspeed_config", "--model", "--dry-run", "-x", "--", "x", "--model.", "--.x"),
    *("--deepspeed.", "--deepspeed..a", "--model.rank.q.z", "--data.data_path.x", "--config=", "--deepspeed="),
    *("--config=\x00", "--model.rank+", "--model.=3", "--model={rank: 3}", "--version=3"),
]


def deepspeed_names(kinds: dict[str, Any], above: str = "deepspeed") -> Iterator[str]:
    for key, inner in kinds.items():
        yield f"{above}.{key}"
        if isinstance(inner, dict):
            yield from deepspeed_names(inner, f"{above}.{key}")


NAMES = [f"{section}.{name}" for section, make in SECTIONS.items() if section != "deepspeed" for name in types_of(make)]
NAMES += deepspeed_names(DEEPSPEED_KEYS)


def damaged(dice: random.Random) -> str:
    text = list(BASE)
    for _ in range(dice.randrange(1, 5)):
        place, how = dice.randrange(len(text)), dice.randrange(3)
        if how == 0:
            text[place] = dice.choice("{}[]:,'\"\n\t#&*!|>%@` \x00\x85\ufeff\u00e90~-")
        elif how == 1:
            del text[place : place + dice.randrange(1, 20)]
        else:
            text[place:place] = dice.choice(VALUES)
    return "".join(text)


def command_line(dice: random.Random, file: Path) -> list[str]:
    kind = dice.randrange(4)
    if kind == 0:
        return [f"--{dice.choice(NAMES)}={dice.choice(VALUES)}" for _ in range(dice.randrange(1, 4))]
    if kind == 1:
        return [word for _ in range(dice.randrange(1, 4)) for word in (f"--{dice.choice(NAMES)}", dice.choice(VALUES))]
    if kind == 2:
        file.write_bytes(damaged(dice).encode("utf-8", "surrogatepass"))
        return ["--config", str(file)]
    return [dice.choice(ODD), dice.choice(ODD), dice.choice(VALUES)]


@pytest.mark.fault("F2", "F3", "F4", "F12", "F13")
def test_any_configuration_is_refused_in_one_line_or_reads_back_as_itself(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    dice, file, saved = random.Random(SEED), tmp_path / "config.yaml", tmp_path / "saved.yaml"
    for _ in range(CASES):
        options = command_line(dice, file)
        try:
            config = read_config(options)
        except ConfigError as error:
            said = str(error)
            said.encode()
            assert "\n" not in said, options
            assert len(said) < 1500, options
        else:
            save_config(config, saved)
            assert resolved(load_config(saved)) == resolved(config), options
    assert {path.name for path in tmp_path.iterdir()} <= {"config.yaml", "saved.yaml"}
