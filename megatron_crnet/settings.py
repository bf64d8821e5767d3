"""Reads a configuration: YAML files, then `--section.field value` on the command line; writes it back resolved."""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace
from jsonargparse import set_parsing_settings as jsonargparse_settings

from megatron_crnet.atomic import replace_text
from megatron_crnet.config import Config
from megatron_crnet.errors import ConfigError
from megatron_crnet.ranks import resolve_full_rank_layers
from megatron_crnet.rules import sequence_parallel

jsonargparse_settings(docstring_parse_attribute_docstrings=True)

SECTIONS = {f.name: f for f in dataclasses.fields(Config)}
DEEPSPEED = "--deepspeed."


@dataclass(frozen=True)
class Arguments:
    """The parsed command line of `pretrain_crnet.py`."""

    config: Config
    dry_run: bool


def build_parser() -> ArgumentParser:
    """Every field of every section as an option, with its documentation as help."""
    parser = ArgumentParser(
        prog="pretrain_crnet.py",
        description="Pre-train CR-Net. Give a YAML file and override any field as --section.field value; "
        "DeepSpeed's keys as --deepspeed.zero_optimization.stage 2.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file; later files override earlier ones")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and stop")
    for name, section in SECTIONS.items():
        if name == "deepspeed":
            parser.add_argument("--deepspeed", type=dict[str, Any], default={}, help="DeepSpeed's own JSON")
        else:
            factory: Any = section.default_factory
            parser.add_argument(f"--{name}", type=factory, default=factory())
    return parser


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """The configuration that files and command line define together.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, or sizes that do not fit.
    """
    options, deepspeed = _split_deepspeed(argv)
    _check_options(options)
    for path in _config_files(options):
        check_keys(_read_yaml(path), path)
    parser = build_parser()
    try:
        namespace = parser.parse_args(options)
        sections = parser.instantiate_classes(namespace)
    except ConfigError:
        raise
    except Exception as error:  # jsonargparse raises its own, argparse's and yaml's errors here
        raise ConfigError(f"{_first_lines(error)}: correct the value, or see --help") from error
    return Arguments(_build(sections, deepspeed), bool(namespace.dry_run))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file with overrides in command-line form."""
    return parse_arguments(["--config", str(path), *overrides]).config


def resolved(config: Config) -> dict[str, Any]:
    """The configuration as plain values, with everything that defaults depend on filled in."""
    values = dataclasses.asdict(config)
    model, parallel = config.model, config.parallel
    values["model"]["full_rank_layers"] = resolve_full_rank_layers(
        model.variant, model.full_rank_layers, model.num_layers
    )
    values["model"]["num_query_groups"] = model.num_query_groups or model.num_attention_heads
    values["model"]["max_position_embeddings"] = model.max_position_embeddings or config.training.seq_length
    values["parallel"]["virtual_pipeline_model_parallel_size"] = parallel.virtual_pipeline_model_parallel_size or 1
    values["parallel"]["sequence_parallel"] = sequence_parallel(parallel)
    values["checkpoint"]["dir"] = config.checkpoint.dir or str(Path(config.logging.output_dir) / "checkpoints")
    return values


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration, which `--config` reads back."""
    replace_text(path, yaml.safe_dump(resolved(config), sort_keys=False))


def check_keys(values: Any, source: str) -> None:
    """Refuse sections and fields that do not exist, naming the nearest that does."""
    if values is None:
        return
    if not isinstance(values, dict):
        raise ConfigError(f"{source} holds no mapping of sections: write sections such as model: and data: in it")
    for section, fields in values.items():
        if section not in SECTIONS:
            raise ConfigError(f"{source}: unknown section {section!r}: {_nearest(section, SECTIONS)}")
        if section == "deepspeed" or fields is None:
            continue
        known = [f.name for f in dataclasses.fields(SECTIONS[section].default_factory)]  # type: ignore[arg-type]
        if not isinstance(fields, dict):
            raise ConfigError(f"{source}: section {section} is {fields!r}, but must be a mapping: write its fields")
        for key in fields:
            if key not in known:
                raise ConfigError(f"{source}: unknown key {section}.{key}: {_nearest(key, known)}")


def _nearest(name: object, known: Any) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"did you mean {close[0]}?" if close else f"choose one of {', '.join(known)}"


def _check_options(options: Sequence[str]) -> None:
    for option in options:
        name = option.partition("=")[0]
        if name.startswith("--") and "." in name:
            section, _, key = name[2:].partition(".")
            check_keys({section: {key.partition(".")[0]: None}}, "command line")


def _config_files(options: Sequence[str]) -> list[str]:
    files = [value for option, value in pairwise(options) if option == "--config"]
    return files + [option.partition("=")[2] for option in options if option.startswith("--config=")]


def _read_yaml(path: str) -> Any:
    try:
        return yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read ({error.strerror}): give an existing file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is no valid YAML ({_first_lines(error)}): correct it") from error


def _split_deepspeed(argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Take `--deepspeed.a.b value` out of the options: DeepSpeed's keys nest deeper than a typed field."""
    rest: list[str] = []
    nested: dict[str, Any] = {}
    waiting = iter(argv)
    for option in waiting:
        if not option.startswith(DEEPSPEED):
            rest.append(option)
            continue
        name, equals, value = option.partition("=")
        if not equals:
            value = next(waiting, None)  # type: ignore[assignment]
        if value is None or not name[len(DEEPSPEED) :]:
            raise ConfigError(f"{option} has no value: write {option} VALUE")
        _set_nested(nested, name[len(DEEPSPEED) :].split("."), _scalar(name, value))
    return rest, nested


def _scalar(name: str, text: str) -> Any:
    """A YAML value; 5e8, DeepSpeed's own spelling, is a number, which YAML 1.1 takes for text."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} {text} is no valid YAML: correct the value") from error
    return float(value) if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value) else value


def _set_nested(target: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        target = target.setdefault(key, {})
        if not isinstance(target, dict):
            raise ConfigError(f"--deepspeed key {'.'.join(keys)} goes below {key}, which has a value: give one of them")
    target[keys[-1]] = value


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _build(sections: Namespace, deepspeed: dict[str, Any]) -> Config:
    values = {name: sections[name] for name in SECTIONS if name != "deepspeed"}
    return Config(**values, deepspeed=_merge(dict(sections["deepspeed"] or {}), deepspeed))


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def is_help(argv: Sequence[str]) -> bool:
    """Whether the command line only asks for help."""
    return any(option in ("-h", "--help") for option in argv)


def print_help() -> None:
    """Print every option with its documentation."""
    build_parser().print_help(sys.stdout)
