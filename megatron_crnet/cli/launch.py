"""Start ranks as torchrun does, with the exit status and the signals that preemptible jobs need.

    %(prog)s --nproc_per_node=8 train --config examples/llama2_7b.yaml
    %(prog)s --nnodes=2 --node_rank=1 --master_addr=node0 --nproc_per_node=8 train --config examples/llama2_7b.yaml
    %(prog)s --standalone --nproc_per_node=2 my_program.py

Takes torchrun's options but --max_restarts (`torchrun --help` lists all of them), then a command of crnet or a program.
The exit status is that of the first rank that failed (torchrun's own is always 1). SIGTERM, SIGUSR1 and Ctrl-C are
forwarded to the ranks, which save and exit; torchrun would kill them after 30 seconds.
With more than one rank each computes on one CPU thread, unless OMP_NUM_THREADS says otherwise.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

from megatron_crnet.cli.main import COMMANDS, Call
from megatron_crnet.config.loading import ConfigParser
from megatron_crnet.config.options import ToolParser
from megatron_crnet.utils.errors import ConfigError, require


def build_parser(prog: str) -> ToolParser:
    """What most need of torchrun's options, for `--help` and completion; torchrun's own parser takes them all."""
    parser = ToolParser(prog=prog, description=__doc__)
    parser.add_argument("--nproc_per_node", metavar="N", help="ranks on this node, or gpu, cpu, auto (default: 1)")
    parser.add_argument("--nnodes", metavar="N", help="nodes of the run (default: 1)")
    parser.add_argument("--node_rank", metavar="K", help="which of them this is (default: 0)")
    parser.add_argument("--master_addr", metavar="HOST", help="name of the first node (default: 127.0.0.1)")
    parser.add_argument("--master_port", metavar="PORT", help="a free port there (default: 29500)")
    parser.add_argument("--standalone", action="store_true", help="one node, on a free port")
    parser.add_argument("program", nargs=argparse.REMAINDER, help="a command of crnet or a program, and its options")
    return parser


def run(call: Call) -> int:
    """Run torchrun's agent on this node; returns the exit status."""
    if call.argv in ([], ["-h"], ["--help"], ["--version"]):  # at once, without torch
        build_parser(call.prog).parse_args(call.argv or ["--help"])
    from megatron_crnet.distributed.agent import parse, run_agent

    arguments = parse(call.argv)
    require(
        not arguments.max_restarts,
        f"--max_restarts is {arguments.max_restarts}, but a rank that has saved and ended must not be started again "
        "here: leave it out; the same command resumes from the last checkpoint",
    )
    world_size = _world_size(arguments)
    name = arguments.training_script
    if name in COMMANDS and not (arguments.module or arguments.no_python or Path(name).is_file()):
        _check(name, arguments.training_script_args, world_size)
        arguments.module, arguments.training_script = True, "megatron_crnet"
        arguments.training_script_args = [name, *arguments.training_script_args]
    return run_agent(arguments)


def _world_size(arguments: argparse.Namespace) -> int | None:
    """Ranks on all nodes; None where the number of nodes may change."""
    from torch.distributed.run import determine_local_world_size, parse_min_max_nnodes

    try:
        least, most = parse_min_max_nnodes(arguments.nnodes)
        ranks = determine_local_world_size(arguments.nproc_per_node)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"--nnodes is {arguments.nnodes} and --nproc_per_node {arguments.nproc_per_node}, but must be numbers (or "
            f"gpu, cpu, auto for the ranks of this node): {error}"
        ) from error
    require(
        ranks >= 1 and 1 <= least <= most,
        f"--nnodes is {arguments.nnodes} and --nproc_per_node {arguments.nproc_per_node}, but both must be at least "
        "1, and a range of nodes must ascend: correct them",
    )
    return most * ranks if least == most else None


def _check(name: str, argv: list[str], world_size: int | None) -> None:
    """Refuse a mistake once, before there are ranks that would each print it."""
    from megatron_crnet.config.batch import plan_batches

    parser = import_module(f"megatron_crnet.cli.{COMMANDS[name][0]}").build_parser(f"crnet {name}")
    if not isinstance(parser, ConfigParser):
        parser.parse_args(argv)
        return
    _, config = parser.read(argv)
    if name == "train" and world_size is not None:
        plan_batches(config, world_size)
