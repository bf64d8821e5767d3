"""The rows of a benchmark, each a configuration on a number of processes, and predefined sweeps of them."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_crnet.config.loading import read_config
from megatron_crnet.config.schema import OF_VARIANT, Config, ReloraConfig
from megatron_crnet.utils.errors import ConfigError, require

OWN_ROWS = "rows"
"""The sweep that rows of the command line belong to."""


@dataclass(frozen=True)
class Row:
    """One thing to measure.

    Attributes:
        sweep: rows of one sweep are compared with its first.
        name: for tables, once in a sweep.
        processes: ranks of its world.
        overrides: options after those of the command line.
    """

    sweep: str
    name: str
    processes: int = 1
    overrides: tuple[str, ...] = ()

    def config(self, options: Sequence[str]) -> Config:
        """The configuration; ConfigError names what is wrong with it."""
        return read_config([*options, *self.overrides])


def parse_row(text: str) -> Row:
    """A row of the command line, `NAME: OPTIONS` or `NAME xPROCESSES: OPTIONS`.

    Raises:
        ConfigError: it has another form.
    """
    found = re.fullmatch(r"\s*(?P<name>[^:]+?)(\s+x(?P<processes>\d+))?\s*:(?P<options>.*)", text, re.DOTALL)
    rule = "must be 'NAME: OPTIONS' or 'NAME xPROCESSES: OPTIONS': write for example 'two x2: --model.rank 32'"
    require(found is not None, f"--row is {text!r}, but {rule}")
    assert found is not None
    processes = int(found["processes"] or 1)
    require(processes > 0, f"--row is {text!r}, but must have a process at least: write x1 or leave it out")
    try:
        return Row(OWN_ROWS, found["name"], processes, tuple(shlex.split(found["options"])))
    except ValueError as error:
        raise ConfigError(f"--row is {text!r}, but its quotes do not close: correct it") from error


def sweep_rows(sweep: str, config: Config, processes: int) -> list[Row]:
    """The rows of a predefined sweep around `config`; `processes` is the largest number of ranks."""
    return [Row(sweep, name, ranks, tuple(words.split())) for name, ranks, words in SWEEPS[sweep](config, processes)]


Options = list[tuple[str, int, str]]
"""Name, processes and options of rows."""


def _each(words: dict[str, str]) -> Callable[[Config, int], Options]:
    """A row for each name, with its options."""
    return lambda _, processes: [(name, processes, options) for name, options in words.items()]


def _ranks(config: Config, processes: int) -> Options:
    return [(f"r = h/{n}", processes, f"--model.rank {config.model.hidden_size // n}") for n in (8, 4, 2)]


def _layouts(config: Config, processes: int) -> Options:
    rows = []
    for tp, pp in itertools.product(_powers(processes), repeat=2):
        dp, rest = divmod(processes, tp * pp)
        if dp and not rest:
            sizes = f"--parallel.tensor_model_parallel_size {tp} --parallel.pipeline_model_parallel_size {pp}"
            batch = _batch(config, config.training.global_batch_size, dp)
            rows.append((f"TP {tp} x PP {pp} x DP {dp}", processes, f"{sizes} {batch}"))
    return rows


def _scaling(config: Config, processes: int, weak: bool) -> Options:
    size = config.training.global_batch_size
    return [
        (f"{n} process{'es' * (n > 1)}", n, _batch(config, size * n if weak else size, n)) for n in _powers(processes)
    ]


def _batch(config: Config, global_batch_size: int, replicas: int) -> str:
    """The batch of `replicas` data-parallel ranks; micro-batches as large as asked for, where they fit."""
    micro = max(min(config.training.micro_batch_size, global_batch_size // replicas), 1)
    return f"--training.global_batch_size {global_batch_size} --training.micro_batch_size {micro}"


def _powers(largest: int) -> list[int]:
    return [2**k for k in range(largest.bit_length())]


def _variant(config: Config, name: str) -> str:
    """Options of a variant under AdamW, without what belongs to the method of `config`."""
    values: dict[str, Any] = {"model.variant": name, **{f"model.{option}": None for option in OF_VARIANT}}
    if config.optimizer.name == "galore":
        values["optimizer.name"] = "adamw"
    if name != config.model.variant:
        values |= {f"relora.{field}": getattr(ReloraConfig, field) for field in config.relora.changed()}
        if config.optimizer.lr_decay_style == "cosine_restarts":
            values |= {"optimizer.lr_decay_style": "cosine", "optimizer.lr_restart_interval": None}
    return " ".join(
        f"--{option} {value if isinstance(value, str) else json.dumps(value)}" for option, value in values.items()
    )


def _variants(config: Config, processes: int) -> Options:
    return _each({name: _variant(config, name) for name in VARIANTS})(config, processes)


def _methods(config: Config, processes: int) -> Options:
    rank = config.model.rank
    galore = f"--optimizer.name galore{f' --optimizer.galore_rank {rank}' if isinstance(rank, int) else ''}"
    words = {name: _variant(config, name) for name in (*VARIANTS, "relora")}
    return _each({**words, "full_rank, GaLore": f"{words['full_rank']} {galore}"})(config, processes)


VARIANTS = ("full_rank", "crnet", "low_rank", "cola")
SWEEPS: dict[str, Callable[[Config, int], Options]] = {
    "variants": _variants,
    "methods": _methods,
    "ranks": _ranks,
    "recompute": _each(
        {
            "none": "--recompute.strategy none",
            "replay": "--recompute.strategy replay",
            "replay, attention kept": "--recompute.strategy replay --recompute.keep_attention_output true",
            "inverse": "--recompute.strategy inverse",
            "full": "--recompute.strategy full",
        }
    ),
    "layouts": _layouts,
    "strong": partial(_scaling, weak=False),
    "weak": partial(_scaling, weak=True),
}
"""By the names that the command line takes."""
