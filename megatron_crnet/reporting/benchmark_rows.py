"""What a benchmark compares: rows, each a configuration on a number of processes, and ready-made sweeps of them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_crnet.config.loading import parse_arguments
from megatron_crnet.config.schema import Config
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
        return parse_arguments([*options, *self.overrides]).config


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
    """The rows of a ready-made sweep around `config`; `processes` is the largest world."""
    return SWEEPS[sweep](config, processes)


def _variants(config: Config, processes: int) -> list[Row]:
    # chains are the variant's own
    own = ("--model.full_rank_layers", "null")
    names = ("full_rank", "crnet", "low_rank", "cola")
    return [Row("variants", name, processes, ("--model.variant", name, *own)) for name in names]


def _ranks(config: Config, processes: int) -> list[Row]:
    h = config.model.hidden_size
    return [Row("ranks", f"r = h/{part}", processes, ("--model.rank", str(h // part))) for part in (8, 4, 2)]


def _recompute(config: Config, processes: int) -> list[Row]:
    kept = ("--recompute.keep_attention_output", "true")
    rows = (
        ("none", ("none",)),
        ("replay", ("replay",)),
        ("replay, attention kept", ("replay", *kept)),
        ("inverse", ("inverse",)),
        ("full", ("full",)),
    )
    return [Row("recompute", name, processes, ("--recompute.strategy", *values)) for name, values in rows]


def _layouts(config: Config, processes: int) -> list[Row]:
    sizes = [(tp, pp) for tp in _powers(processes) for pp in _powers(processes // tp) if processes % (tp * pp) == 0]
    return [
        Row(
            "layouts",
            f"TP {tp} x PP {pp} x DP {processes // (tp * pp)}",
            processes,
            (
                *("--parallel.tensor_model_parallel_size", str(tp)),
                *("--parallel.pipeline_model_parallel_size", str(pp)),
                *_batch(config, config.training.global_batch_size, processes // (tp * pp)),
            ),
        )
        for tp, pp in sizes
    ]


def _strong(config: Config, processes: int) -> list[Row]:
    size = config.training.global_batch_size
    return [Row("strong", _count(n), n, _batch(config, size, n)) for n in _powers(processes)]


def _weak(config: Config, processes: int) -> list[Row]:
    size = config.training.global_batch_size
    return [Row("weak", _count(n), n, _batch(config, size * n, n)) for n in _powers(processes)]


def _batch(config: Config, global_batch_size: int, replicas: int) -> tuple[str, ...]:
    """The batch of `replicas` data-parallel ranks; micro-batches as large as asked for, where they fit."""
    micro = max(min(config.training.micro_batch_size, global_batch_size // replicas), 1)
    return "--training.global_batch_size", str(global_batch_size), "--training.micro_batch_size", str(micro)


def _count(processes: int) -> str:
    return "1 process" if processes == 1 else f"{processes} processes"


def _powers(largest: int) -> list[int]:
    return [2**k for k in range(largest.bit_length()) if 2**k <= largest]


SWEEPS: dict[str, Callable[[Config, int], list[Row]]] = {
    "variants": _variants,
    "ranks": _ranks,
    "recompute": _recompute,
    "layouts": _layouts,
    "strong": _strong,
    "weak": _weak,
}
"""By the names that the command line takes."""
