"""Every field of every section, found by itself, against values that it does not take."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

import numpy
import pytest
import yaml

from megatron_crnet.config.field_types import describe, is_text, types_of
from megatron_crnet.config.loading import SECTIONS, load_config, read_config
from megatron_crnet.config.schema import Config
from megatron_crnet.model.weights import initial_value
from megatron_crnet.utils.errors import ConfigError
from pretrain_crnet import main
from tests.helpers import tiny_config

FIELDS = [
    (section, field.name, types_of(make)[field.name])
    for section, make in SECTIONS.items()
    if dataclasses.is_dataclass(make)
    for field in dataclasses.fields(make)
]
NAMES = [f"{section}.{name}" for section, name, _ in FIELDS]
WRONG: dict[str, Any] = {
    "null": None,
    "bool": True,
    "fraction": 1.5,
    "infinite": float("inf"),
    "not a number": float("nan"),
    "negative": -1,
    "below all": -(2**70),
    "above all": 2**70,
    "above all floats": 10**400,
    "tiny": 1e-320,
    "number as text": "'8'",
    "text": "many",
    "long": "x" * 300,
    "NUL": "a\0b",
    "list": [True],
    "mapping": {"x": 1},
    "nested": [[[1]]],
}


def refusal(options: list[str]) -> str:
    """The one line of a configuration that is refused; empty where it is not."""
    try:
        read_config(options)
    except ConfigError as error:
        return str(error)
    return ""


def in_python(section: str, name: str, value: Any) -> str:
    try:
        dataclasses.replace(Config(), **{section: SECTIONS[section](**{name: value})})
    except ConfigError as error:
        return str(error)
    return ""


def spelt(value: Any) -> str:
    """As YAML and as the command line's value."""
    return str(value) if isinstance(value, int | str) and not isinstance(value, bool) else yaml_of(value)


def yaml_of(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()


@pytest.mark.fault("M1", "M2", "F2", "F3", "F12", "B16")
@pytest.mark.parametrize(("section", "name", "kind"), FIELDS, ids=NAMES)
def test_what_a_field_does_not_take_is_refused_in_the_same_words_from_everywhere(
    section: str, name: str, kind: Any, tmp_path: Path
) -> None:
    file, refused = tmp_path / "config.yaml", 0
    for value in WRONG.values():
        if is_text(kind) and value is not None and not isinstance(value, str):
            continue  # on the command line anything is text
        text = value if is_text(kind) and isinstance(value, str) else spelt(value)
        said = refusal([f"--{section}.{name}={text}"])
        if "\0" not in text:
            file.write_text(f"{section}:\n  {name}: {json.dumps(text) if is_text(kind) and value else text}\n")
            assert refusal(["--config", str(file)]) == said
        else:
            said = in_python(section, name, value)
        if said and not text.startswith("'"):
            assert in_python(section, name, value) == said
        refused += bool(said)
        assert "\n" not in said
    assert refused > 0, describe(kind)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.fault("M1", "F2")
@pytest.mark.parametrize(("section", "name", "kind"), FIELDS, ids=NAMES)
def test_null_is_refused_exactly_where_a_field_has_no_meaning_for_it(section: str, name: str, kind: Any) -> None:
    said = refusal([f"--{section}.{name}=null"])
    takes_null = type(None) in get_args(kind)
    assert takes_null or said.startswith(f"{section}.{name} is null, but must be {describe(kind)}: correct it")
    assert not takes_null or not said


@pytest.mark.parametrize(("section", "name", "kind"), FIELDS, ids=NAMES)
def test_every_number_has_a_range(section: str, name: str, kind: Any) -> None:
    said = [refusal([f"--{section}.{name}={value}"]) for value in (2**70, -(2**70))]
    assert is_text(kind) or all(f"{section}.{name} is" in line for line in said)


@pytest.mark.fault("F12")
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("training.train_steps=2147483648", "training.train_steps is 2147483648, but must be an integer from 1 to"),
        ("training.train_steps=2147483647", "x global_batch_size 8 is 17179869176 samples, but"),
        ("training.global_batch_size=1099511627776", "must be an integer from 1 to"),
        ("training.eval_steps=2147483648", "must be an integer from 0 to"),
        ("training.eval_steps=2147483647", "samples, but the index of a data set holds at most"),
        ("checkpoint.keep_every=10", "checkpoint.keep_every is 10, but checkpoint.keep_last keeps all"),
        ("model.num_layers=1000000", "must be an integer from 1 to 1000"),
        ("logging.output_dir=" + "x" * 300, "each of its parts at most 255"),
        ("checkpoint.dir=" + "x/" * 2100, "a path has at most 4095 bytes"),
        ("logging.output_dir=a\0b", "must not contain a NUL character"),
        ("training.seed=4294967296", "must be an integer from 0 to 4294967295"),
        ("training.seed=-1", "must be an integer from 0 to 4294967295"),
        ("optimizer.adam_eps=.inf", "optimizer.adam_eps is .inf, but must be a finite number above 0 and up to 1"),
        ("optimizer.adam_eps=1e-320", "must be a finite number above 0"),
        ("model.variant=crnett", 'model.variant is "crnett", but must be one of .*: did you mean crnet'),
    ],
)
def test_sizes_are_judged_before_anything_is_built(
    option: str, message: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        read_config([f"--{option}"])
    assert main([f"--{option}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault("L11")
def test_home_and_environment_stand_for_themselves_in_every_path(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("HOME", "/home/me")
    file = tmp_path / "config.yaml"
    file.write_text(
        "data: {train_data_path: [0.5, $SCRATCH/a, 0.5, ~/b], tokenizer_model: $SCRATCH/t, cache_path: ~/c}\n"
        "checkpoint: {dir: '${SCRATCH}/k'}\nlogging: {output_dir: ~/runs}\n"
    )
    config = load_config(file)
    assert config.data.train_data_path == [0.5, "/scratch/me/a", 0.5, "/home/me/b"]
    assert (config.data.tokenizer_model, config.data.cache_path) == ("/scratch/me/t", "/home/me/c")
    assert (config.checkpoint.dir, config.logging.output_dir) == ("/scratch/me/k", "/home/me/runs")
    assert load_config(file, ["--logging.output_dir", "$SCRATCH/r"]).logging.output_dir == "/scratch/me/r"
    monkeypatch.setenv("FOLDER", str(tmp_path))
    assert load_config("$FOLDER/config.yaml") == config
    with pytest.raises(ConfigError, match=r"logging.output_dir is .*, but the environment variable \$UNSET_X is not"):
        load_config(file, ["--logging.output_dir", "$UNSET_X/r"])
    with pytest.raises(ConfigError, match="there is no user nobody-of-that-name"):
        load_config(file, ["--logging.output_dir", "~nobody-of-that-name/r"])


@pytest.mark.fault("M2", "B16")
@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_every_seed_that_is_accepted_draws_weights_and_the_order_of_the_data(seed: int) -> None:
    config = tiny_config(training={"seed": seed})
    assert initial_value("a.weight", (2, 3), config.model, seed).isfinite().all()
    numpy.random.RandomState(config.training.seed)
