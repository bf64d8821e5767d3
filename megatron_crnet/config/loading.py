"""Reads a configuration from YAML files and `--section.field value` options; writes it back resolved.

Files and options are merged into one nested mapping, from which `Config` is created, so errors read the same wherever a
value comes from. Every command with configuration options uses `ConfigParser`.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_crnet.config.field_types import FilePath, checked, is_text, nearest, shown, types_of
from megatron_crnet.config.options import ToolParser
from megatron_crnet.config.positions import METHODS, head_width, position_table, resolve_full_rank_layers
from megatron_crnet.config.schema import Config
from megatron_crnet.utils.errors import require
from megatron_crnet.utils.files import replace_text
from megatron_crnet.utils.yaml_files import read_file, read_text

SECTIONS: dict[str, Any] = {f.name: f.default_factory for f in dataclasses.fields(Config)}
DEEPSPEED = "deepspeed"

Values = dict[str, dict[str, Any]]


class ConfigParser(ToolParser):
    """A command line with options of its own, and `--config FILE` and `--section.field value` of the configuration.

    Args:
        lists_fields: `--help` shows every field of the configuration.
        needs_model: refuse a command line without a model, which would run on the defaults of `schema.py`.
    """

    def __init__(self, *, lists_fields: bool = False, needs_model: bool = False, **arguments: Any) -> None:
        more = "Any --section.field VALUE of the configuration is taken: see crnet train --help"
        super().__init__(epilog=None if lists_fields else more, **arguments)
        self._lists_fields, self._needs_model = lists_fields, needs_model
        self.add_argument(
            "--config",
            action="append",
            default=[],
            metavar="FILE",
            help="YAML file; may be repeated: a later file overrides an earlier one field by field",
        )

    def own_options(self, argv: Sequence[str]) -> argparse.Namespace:
        """This parser's own options, where `base` of `read` depends on them.

        Raises:
            ConfigError: an unknown option or a value outside its type.
        """
        return self.parse_args(_split(argv)[0])

    def read(self, argv: Sequence[str], base: Values | None = None) -> tuple[argparse.Namespace, Config]:
        """This parser's own options, and the configuration, with `base` as defaults.

        The options have `configuration`: the words of the command line that define it.

        Raises:
            ConfigError: an unknown option or key, a value outside its type, or sizes that do not fit.
        """
        options, (_, given) = self.own_options(argv), _split(argv)
        words = [*(("--config", file) for file in options.config), *given]
        options.configuration = [f"{name}={value}" for name, value in words]
        values: Values = {} if base is None else base
        for path in options.config:
            _merge_file(values, checked("--config", FilePath, path))
        for option, value in given:
            _merge_option(values, option, value)
        require(
            not self._needs_model or bool(values.get("model")),
            f"no model is given: write {self.prog} --config FILE, such as examples/quickstart.yaml, or see --help",
        )
        return options, build(values)

    def format_help(self) -> str:
        """With every field of the configuration, if they are listed; argparse itself does not parse them."""
        if not self._lists_fields:
            return super().format_help()
        from megatron_crnet.config.reference import help_lines

        return "\n".join([super().format_help(), *help_lines()])


def read_config(argv: Sequence[str]) -> Config:
    """The configuration that a command line of configuration options defines.

    Raises:
        ConfigError: an unknown option or key, a value outside its type, or sizes that do not fit.
    """
    return ConfigParser().read(argv)[1]


def load_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file or of nested values, with overrides.

    Args:
        source: path of the file, or nested values: `{"model": {"num_layers": 4}}`.
        overrides: in command-line form: `["--training.train_steps=10"]`.

    Raises:
        ConfigError: an unknown key, a value outside its type, or sizes that do not fit.
    """
    if not isinstance(source, Mapping):
        return read_config([f"--config={source}", *overrides])
    values: Values = {}
    for section, fields in source.items():
        _merge_section(values, section, fields, "the configuration")
    return ConfigParser().read(overrides, values)[1]


def resolved(config: Config, layout: bool = True) -> dict[str, Any]:
    """The configuration as plain values, with derived defaults filled in, with `layout` of the section parallel too."""
    values = dataclasses.asdict(config)
    model, parallel = config.model, config.parallel
    values["model"]["full_rank_layers"] = resolve_full_rank_layers(
        model.variant, model.full_rank_layers, model.num_layers
    )
    values["model"]["full_rank_experts"] = model.full_rank_experts and not METHODS[model.variant].is_full_rank
    table = position_table(model)
    values["model"]["only_lr_act"] = not table.activates
    values["model"]["tie_word_embeddings"] = table.ties_head
    if head_width(model) * model.num_attention_heads == model.hidden_size:
        values["model"]["kv_channels"] = None
    values["model"]["num_query_groups"] = model.num_query_groups or model.num_attention_heads
    values["model"]["max_position_embeddings"] = model.max_position_embeddings or config.training.seq_length
    if layout:
        values["parallel"]["virtual_pipeline_model_parallel_size"] = parallel.sizes[2]
        values["parallel"]["sequence_parallel"] = parallel.shards_sequence
    values["checkpoint"]["dir"] = config.checkpoint.dir or str(Path(config.logging.output_dir) / "checkpoints")
    return values


def save_config(config: Config, path: str | Path) -> None:
    """Write the configuration as YAML for `load_config`: what follows from other fields is left open."""
    replace_text(Path(path), yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))


def save_resolved(config: Config, path: Path, layout: bool = True) -> None:
    """Write the configuration as YAML with derived defaults filled in: as a checkpoint was written (`resolved`)."""
    replace_text(path, yaml.safe_dump(resolved(config, layout), sort_keys=False))


def build(values: Values) -> Config:
    """The configuration of nested values with known keys."""
    sections = {name: make(**values.get(name, {})) for name, make in SECTIONS.items() if name != DEEPSPEED}
    return Config(**sections, deepspeed=values.get(DEEPSPEED, {}))


def _fields(section: str) -> dict[str, Any]:
    return {} if section == DEEPSPEED else types_of(SECTIONS[section])


def _wants_text(keys: tuple[str, ...]) -> bool:
    kinds = _fields(keys[0]) if len(keys) == 2 and keys[0] in SECTIONS else {}
    return bool(kinds) and keys[-1] in kinds and is_text(kinds[keys[-1]])


def _merge_file(values: Values, path: str) -> None:
    found = read_file(path, _wants_text)
    require(
        found is None or isinstance(found, dict),
        f"{path} is not a mapping of sections: write sections such as model: and data:",
    )
    for section, fields in (found or {}).items():
        _merge_section(values, section, fields, path)


def _merge_section(values: Values, section: Any, fields: Any, source: str) -> None:
    """Override fields of a section; an empty section changes nothing."""
    require(section in SECTIONS, f"{source}: unknown section {_named(section)}: {nearest(section, SECTIONS)}")
    require(
        fields is None or isinstance(fields, dict),
        f"{source}: section {section} is {shown(fields)}, but must be a mapping: write its fields",
    )
    if section == DEEPSPEED:
        values[DEEPSPEED] = merged(values.get(DEEPSPEED, {}), fields or {})
        return
    known = _fields(section)
    for key, value in (fields or {}).items():
        require(key in known, f"{source}: unknown key {section}.{key}: {_field_meant(key, known)}")
        values.setdefault(section, {})[key] = value


def _merge_option(values: Values, option: str, text: str) -> None:
    section, *keys = option[2:].split(".")
    source = "command line"
    if section in (DEEPSPEED, "deepspeed_config") and not keys:
        is_mapping = text.lstrip().startswith("{")
        found = read_text(text, option) if is_mapping else read_file(checked(option, FilePath, text), _wants_text)
        require(isinstance(found, dict), f"{option} {text} is not a mapping: give a file with DeepSpeed's settings")
        _merge_section(values, DEEPSPEED, found, source)
        return
    as_written = _wants_text((section, *keys)) and text != "null"
    value = text if as_written else read_text(text, f"the value of {option}")
    if len(keys) > 1 and section != DEEPSPEED and keys[0] in _fields(section):
        base = values.get(section, {}).get(keys[0])
        value = merged(base if isinstance(base, dict) else {}, _nested(keys[1:], value))
        keys = keys[:1]
    _merge_section(values, section, _nested(keys, value), source)


def _nested(keys: Sequence[str], value: Any) -> Any:
    for key in reversed(keys):
        value = {key: value}
    return value


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` updated with `over`, recursively; null in `over` removes a key."""
    found = dict(base)
    for key, value in over.items():
        laid = value
        if isinstance(value, dict):
            below = found.get(key)
            laid = merged(below if isinstance(below, dict) else {}, value)
        if laid is None or (laid == {} and value):
            found.pop(key, None)
        else:
            found[key] = laid
    return found


def _named(key: object) -> str:
    return repr(key) if isinstance(key, str) else shown(key)


def _field_meant(key: object, known: Any) -> str:
    """The remedy for an unknown key: the field of that name in another section, or a similar one."""
    elsewhere = [f"{section}.{key}" for section in SECTIONS if key in _fields(section)]
    return f"did you mean {' or '.join(elsewhere)}?" if elsewhere else nearest(key, known)


def _split(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """The command line without configuration fields, and these with their values, in order."""
    rest: list[str] = []
    given: list[tuple[str, str]] = []
    words = list(argv)
    names = [word.partition("=")[0] for word in words]
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        section = name[2:].partition(".")[0]
        if not name.startswith("--") or not ("." in name or section in SECTIONS or section == "deepspeed_config"):
            rest.append(word)
            continue
        if not equals and words and not words[0].startswith("--"):
            value = words.pop(0)
        elif not equals and name == "--deepspeed":  # DeepSpeed's own flag, which goes with --deepspeed_config
            require(
                "--deepspeed_config" in names,
                "--deepspeed has no value, but DeepSpeed is always on here: leave it out, or give its settings as "
                "--deepspeed FILE, --deepspeed_config FILE or --deepspeed.zero_optimization.stage 1",
            )
            continue
        else:
            require(bool(equals), f"{name} has no value: write {name} VALUE")
        given.append((name, value))
    return rest, given
