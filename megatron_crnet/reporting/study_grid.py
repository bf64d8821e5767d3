"""The YAML file of a study: a base configuration, axes of options with their values, seeds and a budget of tokens."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from annotated_types import Ge, Le

from megatron_crnet.config.batch import plan_batches
from megatron_crnet.config.field_types import FilePath, Rule, Seed, checked, nearest, shown
from megatron_crnet.config.loading import load_config, resolved
from megatron_crnet.config.rank_section import RankScheduleConfig
from megatron_crnet.config.relora_section import ReloraConfig
from megatron_crnet.config.schema import Config
from megatron_crnet.data.indexed import blends_of, read_index
from megatron_crnet.utils.errors import ConfigError, require
from megatron_crnet.utils.yaml_files import read_file

T = TypeVar("T")
KEYS = {
    "base": FilePath,
    "options": Annotated[dict[str, Any], Rule("a mapping of options such as training.train_steps to values")],
    "axes": Annotated[dict[str, Any], Rule("a mapping of options to lists of values, or of names to options")],
    "seeds": Annotated[list[Seed], Rule("a list of integers from 0")],
    "tokens": Annotated[int, Ge(1), Le(10**15)] | None,
    "keep_checkpoints": bool,
}
"""Keys of the file."""
Factor = Annotated[float, Ge(1.01), Le(1000)]
MOST_EXTENSIONS = 4
"""Values by which an axis is extended on each side at most."""
UNSCHEDULED = {
    **{"training.train_steps": 1, "logging.profile_steps": None, "optimizer.lr_restart_interval": None},
    **{"optimizer.lr_warmup_steps": 0, "optimizer.lr_decay_style": "constant"},
    **{f"relora.{name}": value for name, value in asdict(ReloraConfig()).items()},
    **{f"rank_schedule.{name}": value for name, value in asdict(RankScheduleConfig()).items()},
}
"""Of a run whose steps are not known yet: no schedule, so that only the batch is checked."""
NOT_COMPARED = (
    *("logging.", "checkpoint.dir", "checkpoint.save_", "checkpoint.keep_"),
    *("data.cache_path", "data.num_workers", "training.seed"),
)
"""Prefixes of fields that may change within a study."""


@dataclass(frozen=True)
class Axis:
    """An option and its values, or a name for values of several options that belong together.

    Attributes:
        extend: factor between the values that are added until the best value lies inside; None adds none.
        together: the options of each value, if it is a name.
    """

    name: str
    values: tuple[Any, ...]
    extend: float | None = None
    together: Mapping[str, Mapping[str, Any]] | None = None

    @property
    def label(self) -> str:
        """The option without its section."""
        return self.name.partition(".")[2] or self.name

    def options(self, value: Any) -> Mapping[str, Any]:
        """The options that a value sets."""
        return {self.name: value} if self.together is None else self.together[value]

    @property
    def all_options(self) -> list[str]:
        """The options that any value sets."""
        return [self.name] if self.together is None else [name for v in self.together.values() for name in v]


@dataclass(frozen=True)
class Run:
    """One run of a study: the values of its axes, and its seed."""

    settings: Mapping[str, Any]
    seed: int

    @property
    def key(self) -> str:
        """The same for equal runs."""
        return json.dumps([self.settings, self.seed], sort_keys=True)

    @property
    def name(self) -> str:
        """The name of its folder."""
        words = ",".join(f"{name.rpartition('.')[2]}={text_of(value)}" for name, value in self.settings.items())
        readable = re.sub(r"[^\w.,=-]+", "_", f"{words},seed={self.seed}")
        return f"{readable[:120]}-{hashlib.sha256(self.key.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Study:
    """What the file says.

    Attributes:
        path: of the file.
        output: folder of the results.
        base: file of the configuration that all runs share.
        options: fields that differ from it in all runs.
        tokens: budget of each run, rounded down to whole steps; None takes training.train_steps.
        keep_checkpoints: of finished runs.
    """

    path: Path
    output: Path
    base: str
    axes: tuple[Axis, ...]
    options: Mapping[str, Any]
    seeds: tuple[int, ...] = (1234,)
    tokens: int | None = None
    keep_checkpoints: bool = False

    def runs(self) -> Iterator[Run]:
        """Every run of the grid."""
        names = [axis.name for axis in self.axes]
        for values in itertools.product(*(axis.values for axis in self.axes)):
            for seed in self.seeds:
                yield Run(dict(zip(names, values, strict=True)), seed)

    def with_axis(self, axis: Axis) -> Study:
        """The study with other values of one axis."""
        return replace(self, axes=tuple(axis if old.name == axis.name else old for old in self.axes))

    def config(self, run: Run) -> Config:
        """The configuration of a run.

        Raises:
            ConfigError: it cannot be honoured.
        """
        values = {
            **self.options,
            **{k: v for axis in self.axes for k, v in axis.options(run.settings[axis.name]).items()},
            "training.seed": run.seed,
            "logging.output_dir": str(self.output / "runs" / run.name),
            "checkpoint.dir": None,
        }
        if self.tokens is not None:
            plan = plan_batches(self._load({**values, **UNSCHEDULED}), 1)
            steps = range(1, self.tokens + 1)
            values["training.train_steps"] = max(bisect_right(steps, self.tokens, key=plan.tokens_of_run), 1)
        config = self._load(values)
        plan_batches(config, 1)
        return config

    def _load(self, values: Mapping[str, Any]) -> Config:
        try:
            return load_config(self.base, [f"--{name}={text_of(value)}" for name, value in values.items()])
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {str(error).removeprefix('command line: ')}") from error

    def check(self) -> None:
        """Refuse what would fail in every run, or in some for a mistake in the file.

        Raises:
            ConfigError: an option is unknown or its value cannot be honoured, or no run would be validated.
            DataError: the data cannot be read.
        """
        prefixes: set[str] = set()
        for run in self.runs():
            config = self.config(run)
            blends = blends_of(config.data)
            require(not config.training.eval_only, f"{self.path}: runs of a study train: leave training.eval_only out")
            require(
                "train" in blends and "valid" in blends and config.training.eval_steps > 0,
                f"{self.path}: runs are compared by validation loss, but {self.base} gives no data for training or "
                "validation, or training.eval_steps is 0: set them",
            )
            prefixes |= {prefix for blend in blends.values() for prefix in blend.prefixes}
        for prefix in sorted(prefixes):
            read_index(prefix)

    def difference(self, run: Run, before: Mapping[str, Any]) -> str | None:
        """The first field in which a run's configuration differs from that of earlier results.

        Args:
            before: resolved configuration of a run of the same settings.
        """
        now = json.loads(json.dumps(resolved(self.config(run))))
        for section, fields in now.items():
            for name in fields if section != "deepspeed" else {**fields, **before.get(section, {})}:
                old = before.get(section, {})
                known = name in old or section == "deepspeed"
                if known and old.get(name) != fields.get(name) and not f"{section}.{name}".startswith(NOT_COMPARED):
                    return f"{section}.{name} {shown(old.get(name))} instead of {shown(fields.get(name))}"
        return None


def text_of(value: Any) -> str:
    """A value as an option takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def read_study(path: Path, output: Path) -> Study:
    """The study of a file.

    Raises:
        ConfigError: the file cannot be read, or is not a study.
    """
    found = read_file(str(path), lambda keys: False)
    require(isinstance(found, dict), f"{path} is not a mapping: write the keys {', '.join(KEYS)}")
    for key in found:
        require(key in KEYS, f"{path}: unknown key {shown(key)}: {nearest(key, KEYS)}")
    for key in ("base", "axes"):
        require(key in found, f"{path} has no {key}: a study needs a configuration, base, and axes of options: add it")
    values = {key: checked(f"{path}: {key}", KEYS[key], value) for key, value in found.items()}
    axes = tuple(_axis(f"{path}: axes.{name}", name, given) for name, given in values.pop("axes").items())
    require(bool(axes), f"{path}: axes is empty: give at least one option and its values")
    of_axes = [{*axis.all_options} for axis in axes]
    for name in (*values.get("options", {}), *itertools.chain(*of_axes)):
        require("." in name, f"{path}: {name} is not an option of a section: write section.field")
        require(
            name not in ("training.seed", "logging.output_dir", "checkpoint.dir"),
            f"{path}: {name} is set by the study: give seeds, and --output for the folder of all runs",
        )
        require(
            "tokens" not in values or name != "training.train_steps",
            f"{path}: training.train_steps follows from tokens: leave one of the two out",
        )
    for axis in axes:
        kept = axis.name not in values.get("options", {})
        require(kept, f"{path}: {axis.name} is an axis and an option: keep one")
    for one, other in itertools.combinations(of_axes, 2):
        twice = min(one & other, default=None)
        require(twice is None, f"{path}: {twice} is in two axes: keep one")
    seeds = tuple(values.pop("seeds", (1234,)))
    require(bool(seeds), f"{path}: seeds is empty: give at least one, or leave it out")
    _once(f"{path}: seeds", seeds)
    return Study(path, output, axes=axes, seeds=seeds, **{"options": {}, **values})


def _axis(where: str, name: str, given: Any) -> Axis:
    """`[values]`, or `{values: [values], extend: factor}`; under a name of its own `{value: {option: value}}`."""
    if "." not in name:
        options = isinstance(given, dict) and all(isinstance(v, dict) and v for v in given.values())
        require(
            options and bool(given),
            f"{where} is {shown(given)}: {name} is not an option of a section, so its values are names with options, "
            "{NAME: {section.field: VALUE}}: correct it",
        )
        return Axis(name, tuple(given), together=given)
    given = {"values": given} if isinstance(given, list) else given
    require(
        isinstance(given, dict) and {"values"} <= given.keys() <= {"values", "extend"},
        f"{where} is {shown(given)}, but must be a list of values, or {{values: [...], extend: FACTOR}}: correct it",
    )
    values = given["values"]
    require(isinstance(values, list) and bool(values), f"{where} has no values: give at least one, or remove the axis")
    _once(where, values)
    factor = given.get("extend")
    if factor is not None:
        factor = checked(f"{where}.extend", Factor, factor)
        numbers = [isinstance(v, int | float) and not isinstance(v, bool) and v > 0 for v in values]
        require(all(numbers), f"{where} is extended by a factor, so its values must be numbers above 0: correct them")
    return Axis(name, tuple(values), factor)


def _once(where: str, values: Any) -> None:
    texts = [text_of(value) for value in values]
    twice = next((text for text in texts if texts.count(text) > 1), None)
    require(twice is None, f"{where} holds {twice} twice: remove one")
