"""Count what each recomputation strategy keeps, holds at its peak and computes, on the layers of a configuration.

    python tools/measure_recompute.py --config examples/llama2_7b.yaml --training.micro_batch_size 1

Any `--section.field value` of pretrain_crnet.py is taken, and:

    --tensors fake    shapes without memory, so any size fits (the default); `real` runs the pass
    --segments N      also measure replay and full with segments of N layers
    --resident        run real training steps, one process for each strategy, and report peak resident memory (of the
                      host; on CPUs that is where activations are)
    --json [FILE]     write the figures to the file as well; without a file, print them instead of the table
    --overwrite       replace an older file

One micro-batch, one rank without parallelism, the decoder's layers alone.
"""

from __future__ import annotations

from megatron_crnet.utils.errors import ctrl_c_is_one_line

if __name__ == "__main__":
    ctrl_c_is_one_line()  # during the imports below as well

import dataclasses
import itertools
import json
import subprocess
import sys
from typing import Any

from megatron_crnet.config.loading import read_config
from megatron_crnet.config.options import file_path, only_usage, positive_integer, take_options
from megatron_crnet.config.schema import Config
from megatron_crnet.utils.errors import reported, require
from megatron_crnet.utils.record_file import check_record_file, write_record
from megatron_crnet.utils.tables import table

OPTIONS = {"--tensors": "fake", "--segments": None, "--json": None, "--resident-of": None}


def own_options(argv: list[str]) -> tuple[dict[str, str | None], list[str]]:
    """This tool's own options, and what is left for the configuration."""
    following = [*argv, "--"][1:]
    bare = [name == "--json" and after.startswith("--") for name, after in zip(argv, following, strict=True)]
    found, rest = take_options(OPTIONS, ["--json=-" if alone else word for word, alone in zip(argv, bare, strict=True)])
    kind = found["--tensors"]
    require(kind in ("fake", "real"), f"--tensors is {kind}, but must be fake or real: correct it")
    return found, rest


def measure(config: Config, options: dict[str, str | None]) -> list[dict[str, Any]]:
    """One record for each strategy."""
    from megatron_crnet.distributed.process_groups import shutdown_parallel
    from megatron_crnet.planning.recompute_report import measure_strategies

    segments = options["--segments"]
    length = positive_integer("--segments", segments) if segments else None
    found = measure_strategies(config, fake=options["--tensors"] == "fake", segment_length=length)
    shutdown_parallel()
    return [{**dataclasses.asdict(m), "transient": m.transient} for m in found]


def figures(config: Config, found: list[dict[str, Any]]) -> str:
    """The figures as a table, in MiB and as shares of no recomputation."""
    none, size = found[0], 2**20
    title = (
        f"{config.model.num_layers} layers, h = {config.model.hidden_size}, {config.training.micro_batch_size} x "
        f"{config.training.seq_length} tokens, {config.training.dtype}; MiB and GFLOP\n\n"
    )
    header = ("strategy", "kept", "formula", "transient", "peak", "of none", "GFLOP", "extra", "segments")
    return title + table(
        header,
        [
            (
                m["name"],
                *(f"{m[key] / size:,.1f}" for key in ("kept", "formula", "transient", "peak")),
                f"{m['peak'] / none['peak']:.3f}",
                f"{m['flops'] / 1e9:,.1f}",
                f"{m['flops'] / none['flops'] - 1:.1%}",
                _segments(m["segments"]),
            )
            for m in found
        ],
    )


def _segments(lengths: list[int]) -> str:
    """Layers of each segment, equal ones together: 8 x 4, 2."""
    return ", ".join(f"{len(list(same))} x {n}" for n, same in itertools.groupby(lengths)).replace("1 x ", "") or "-"


def resident(argv: list[str]) -> list[dict[str, Any]]:
    """Peak resident memory of a process that trains two steps, for each strategy."""
    found = []
    for strategy in ("none", "replay", "inverse", "full"):
        command = [sys.executable, __file__, *argv, "--recompute.strategy", strategy, "--resident-of", strategy]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        require(done.returncode == 0, f"the process of strategy {strategy} failed: {done.stderr.strip()[-300:]}")
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return found


def resident_of(config: Config) -> dict[str, Any]:
    """Train two steps on random tokens in this process. Returns its memory before and at the peak."""
    import resource
    import time

    import torch

    from megatron_crnet.distributed.process_groups import initialize_parallel
    from megatron_crnet.engine.engine import TrainEngine
    from megatron_crnet.model.gpt import build_model_chunks

    context = initialize_parallel(config)
    engine = TrainEngine(config, build_model_chunks(config), context)
    training = config.training
    shape = (training.micro_batch_size, training.seq_length)
    tokens = torch.randint(config.model.vocab_size, shape, device=context.device)
    positions = torch.arange(shape[1], device=context.device).expand(shape).contiguous()
    batch = {
        "tokens": tokens,
        "labels": tokens,
        "position_ids": positions,
        "loss_mask": torch.ones(shape, device=context.device),
    }
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    for _ in range(2):
        engine.forward_backward([batch], tokens.numel())
        engine.update()
    seconds, peak = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    name = config.recompute.strategy
    return {"name": name, "before_kib": before, "peak_kib": peak, "seconds": seconds}


def resident_figures(found: list[dict[str, Any]]) -> str:
    """Peak resident memory as a table."""
    none, kib = found[0]["peak_kib"] - found[0]["before_kib"], 1024
    rows = [
        (
            m["name"],
            f"{m['before_kib'] / kib:,.0f}",
            f"{m['peak_kib'] / kib:,.0f}",
            f"{(m['peak_kib'] - m['before_kib']) / none:.3f}",
        )
        for m in found
    ]
    return table(("strategy", "before training, MiB", "peak, MiB", "peak - before, of none"), rows)


def run(argv: list[str]) -> int:
    """Count, print and write."""
    options, rest = own_options([argument for argument in argv if argument not in ("--resident", "--overwrite")])
    config = read_config(rest)
    require(
        config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size == 1,
        "the configuration asks for tensor or pipeline parallelism, but this tool counts one rank without: set "
        "both sizes to 1",
    )
    target = file_path("--json", options["--json"]) if options["--json"] not in (None, "-") else None
    check_record_file(target, overwrite="--overwrite" in argv)
    from megatron_crnet.distributed import cpu_backend

    cpu_backend.install()
    if options["--resident-of"]:
        print(json.dumps(resident_of(config)))
        return 0
    from megatron_crnet.utils.environment import provenance

    is_resident = "--resident" in argv
    found = resident(rest) if is_resident else measure(config, options)
    record = {**provenance("resident memory" if is_resident else "recompute", [__file__, *argv]), "rows": found}
    if options["--json"] == "-":
        print(json.dumps(record, indent=1))
        return 0
    print(resident_figures(found) if is_resident else figures(config, found))
    if target is not None:
        write_record(target, record)
    return 0


def main(argv: list[str]) -> int:
    """Run; returns the exit status."""
    status = only_usage(str(__doc__), argv)
    return reported(lambda: run(argv)) if status is None else status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
