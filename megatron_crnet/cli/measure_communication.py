"""Count what a configuration sends: run on as many processes as its layout has ranks, or a multiple.

    crnet launch --nproc_per_node=4 measure-communication --config examples/quickstart.yaml \\
        --parallel.tensor_model_parallel_size 2 --parallel.pipeline_model_parallel_size 2

On one process, without parallelism: %(prog)s --config examples/quickstart.yaml
"""

from __future__ import annotations

from typing import Any

from megatron_crnet.cli.main import Call
from megatron_crnet.config.loading import ConfigParser
from megatron_crnet.config.schema import VARIANTS, Config
from megatron_crnet.distributed.launcher import read_launch, take_local_rank
from megatron_crnet.utils.record_file import add_record_options, check_record_file, report_record
from megatron_crnet.utils.tables import table


def build_parser(prog: str) -> ConfigParser:
    """The options."""
    parser = ConfigParser(prog=prog, description=__doc__, needs_model=True)
    add_record_options(parser)
    return parser


def measure(config: Config) -> dict[str, Any]:
    """Traffic of a layer of each variant, and of the pipeline's boundaries; a collective call."""
    from megatron_crnet.distributed import cpu_backend

    cpu_backend.install()
    from megatron_crnet.config.batch import data_parallel_size
    from megatron_crnet.distributed.process_groups import join_processes, shutdown_parallel
    from megatron_crnet.distributed.watchdog import report_lost_ranks
    from megatron_crnet.planning.measurements import boundary_traffic, layer_traffic

    data_parallel_size(config, read_launch().world_size)
    _, heartbeat = join_processes(config)
    with heartbeat, report_lost_ranks(heartbeat, config.parallel.distributed_timeout_minutes):
        layers = {variant: layer_traffic(config, variant) for variant in VARIANTS}
        boundaries = boundary_traffic(config) if config.parallel.pipeline_model_parallel_size > 1 else {}
    shutdown_parallel()
    return {"layers": layers, "boundaries": boundaries}


def figures(config: Config, found: dict[str, Any]) -> str:
    """The figures as tables: elements for one token, also in units of h, and the bytes that were sent."""
    h = config.model.hidden_size
    header = ("variant", "forward", "in h", "step", "in h", "bytes/step", "gradients, elements/step")
    rows = [
        (
            variant,
            f"{t['forward']:,.0f}",
            f"{t['forward'] / h:.3f}",
            f"{t['step']:,.0f}",
            f"{t['step'] / h:.3f}",
            f"{t['step_bytes']:,.0f}",
            f"{t['gradients']:,.0f}",
        )
        for variant, t in found["layers"].items()
    ]
    lines = [
        f"tensor-parallel traffic of one layer per token (h = {h}, {config.training.dtype})",
        "",
        table(header, rows),
    ]
    if found["boundaries"]:
        sent = sorted(found["boundaries"].items())
        sizes = [(str(rank), f"{t['elements']:,.0f}", f"{t['bytes']:,.0f}") for rank, t in sent]
        title = "pipeline: what a rank sends forward per token"
        lines += ["", title, "", table(("pipeline rank", "elements", "bytes"), sizes)]
    return "\n".join(lines)


def run(call: Call) -> int:
    """Count and write."""
    options, config = build_parser(call.prog).read(take_local_rank(call.argv))
    is_first = read_launch().rank == 0
    check_record_file(options.json if is_first else None, overwrite=options.overwrite)
    found = measure(config)
    if is_first:
        from megatron_crnet.utils.environment import run_metadata

        record = {**run_metadata("communication", call.words), **found}
        report_record(options.json, record, figures(config, found))
    return 0
