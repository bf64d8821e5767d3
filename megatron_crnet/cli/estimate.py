"""Estimate whether a run fits and how fast it is: memory by part, operations, communication volume, time.

    %(prog)s --config examples/llama2_7b.yaml --world-size 8 --gpu h100
    %(prog)s --config examples/quickstart.yaml --json

What the figures mean and where they come from: docs/planning.md.
"""

from __future__ import annotations

import json
from functools import partial

from megatron_crnet.cli.main import Call
from megatron_crnet.config.loading import ConfigParser
from megatron_crnet.config.options import positive_integer


def build_parser(prog: str) -> ConfigParser:
    """The options."""
    parser = ConfigParser(prog=prog, description=__doc__, needs_model=True)
    parser.add_argument(
        "--world-size",
        type=partial(positive_integer, "--world-size"),
        metavar="N",
        help="ranks of the run (default: one tensor-parallel group in each pipeline stage)",
    )
    add_gpu_options(parser)
    parser.add_argument(
        "--json", action="store_true", help="print the figures as JSON instead of tables; crnet report takes it"
    )
    return parser


def add_gpu_options(parser: ConfigParser) -> None:
    """The machine that is estimated."""
    parser.add_argument(
        "--gpu",
        default="h100",
        metavar="NAME",
        help="a100-80g, h100, h200, or a YAML file with the fields of megatron_crnet/planning/machines.py "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--gpus-per-node",
        type=partial(positive_integer, "--gpus-per-node"),
        default=8,
        metavar="N",
        help="GPUs that share a node (default: %(default)s)",
    )


def run(call: Call) -> int:
    """Estimate and print; returns the exit status."""
    options, config = build_parser(call.prog).read(call.argv)
    from megatron_crnet.distributed import cpu_backend

    cpu_backend.install()
    from megatron_crnet.planning.estimate import estimate
    from megatron_crnet.planning.machines import find_machine
    from megatron_crnet.planning.tables import as_values, estimate_tables, verdict
    from megatron_crnet.reporting.step_identity import identify_step
    from megatron_crnet.utils.environment import command_line, versions

    parallel = config.parallel
    stage = max(parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size)
    least = stage * parallel.pipeline_model_parallel_size
    world_size = options.world_size or least
    found = estimate(config, world_size, find_machine(options.gpu), options.gpus_per_node)
    if not options.json:
        print("\n".join([verdict(found), "", *estimate_tables(found)]))
        return 0
    record = {
        "kind": "estimate",
        "command": command_line(call.words),
        "versions": versions(),
        "step": identify_step(config, world_size),
        **as_values(found),
    }
    print(json.dumps(record, indent=1))
    return 0
