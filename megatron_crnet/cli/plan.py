"""Find the layout in which a configuration trains fastest on N GPUs, by the estimate, and write it as a YAML file.

    %(prog)s --config examples/llama2_7b.yaml --gpus 8 --gpu h100 --output plan.yaml

Searches TP, PP, virtual stages, DP, ZeRO stage, micro-batch, recomputation, optimizer offload, and where experts are
spread EP and the dispatcher. The global batch and the model stay. Ctrl-C ends the search with what was found so far.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from megatron_crnet.cli.estimate import add_gpu_options
from megatron_crnet.cli.main import Call
from megatron_crnet.config.loading import ConfigParser, save_config
from megatron_crnet.config.options import file_path, positive_integer
from megatron_crnet.utils.errors import ConfigError, require
from megatron_crnet.utils.record_file import check_record_file
from megatron_crnet.utils.signals import INTERRUPTED
from megatron_crnet.utils.tables import table

GIB = 2**30


def build_parser(prog: str) -> ConfigParser:
    """The options."""
    parser = ConfigParser(prog=prog, description=__doc__, needs_model=True)
    parser.add_argument("--gpus", type=partial(positive_integer, "--gpus"), metavar="N", help="GPUs of the run")
    add_gpu_options(parser)
    parser.add_argument(
        "--output",
        type=partial(file_path, "--output"),
        default="plan.yaml",
        metavar="FILE",
        help="where the first choice is written (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an older file")
    parser.add_argument(
        "--show",
        type=partial(positive_integer, "--show"),
        default=10,
        metavar="N",
        help="how many plans are listed (default: %(default)s)",
    )
    return parser


def listed(plans: list[Any]) -> str:
    """The plans in their order, as a table."""
    header = ("", "TP", "PP", "VPP", "EP", "DP", "ZeRO", "micro", "recompute", "offload", "GiB", "s/step", "tokens/s")
    rows = []
    for number, plan in enumerate(plans, 1):
        c, e = plan.choice, plan.estimate
        layout = (
            number,
            c.tp,
            c.pp,
            c.vpp,
            f"{c.ep}" if c.dispatcher == "allgather" else f"{c.ep}, {c.dispatcher}",
            e.plan.dp_size,
            c.zero,
            c.micro_batch,
            c.recompute,
            "cpu" if c.offload else "-",
        )
        speed = (f"{e.peak / GIB:.1f}", f"{e.time.total:.3f}", f"{e.tokens_per_second:,.0f}")
        rows.append([*map(str, layout), *speed])
    return table(header, rows, text_columns=0)


def none_fits(found: Any, gpus: str) -> int:
    """What to do when nothing was found; the exit status if the search was stopped.

    Raises:
        ConfigError: the search went to its end.
    """
    if found.stopped:
        print("stopped before a layout that fits was found: nothing written", file=sys.stderr)
        return INTERRUPTED
    if found.least is None:
        raise ConfigError(f"no layout is allowed on {gpus}; of the simplest the rules say: {found.refusal}")
    raise ConfigError(
        f"no layout fits {gpus}, the smallest needs {found.least.estimate.peak / GIB:.1f} GiB: use more GPUs, GPUs "
        "with more memory, or shorter sequences"
    )


def run(call: Call) -> int:
    """Search, print, write. Returns the exit status."""
    options, config = build_parser(call.prog).read(call.argv)
    require(options.gpus is not None, "--gpus is missing, but says how many GPUs the run has: add --gpus N")
    gpus, output = options.gpus, options.output
    check_record_file(output, "--output", overwrite=options.overwrite)
    from megatron_crnet.distributed import cpu_backend

    cpu_backend.install()
    from tqdm import tqdm

    from megatron_crnet.planning.machines import find_machine
    from megatron_crnet.planning.search import RESERVE, explain, search
    from megatron_crnet.planning.tables import verdict

    machine = find_machine(options.gpu)
    found = search(config, gpus, machine, options.gpus_per_node, lambda all_choices: tqdm(all_choices, unit="layouts"))
    done = f"stopped after {found.tried} of {found.total}" if found.stopped else f"{found.total}"
    ranked = found.ranked()
    if ranked:
        print(verdict(ranked[0].estimate))
    print(
        f"{done} layouts tried: {found.refused} not allowed, {found.too_large} above {1 - RESERVE:.0%} of "
        f"{machine.memory_bytes / GIB:.0f} GiB, {len(found.fitting)} fit"
    )
    if not found.fitting:
        return none_fits(found, f"{gpus} x {machine.name}")
    save_config(ranked[0].config, output)  # before the tables, of which `| head` reads only the start
    lines = [listed(ranked[: options.show]), "the first, because of the search's estimate:"]
    print("\n".join([*lines, *(f"  {line}" for line in explain(found))]))
    print(
        f"written to {output}: start {gpus} processes of crnet train --config {output}; what they would do: "
        f"WORLD_SIZE={gpus} crnet train --config {output} --dry-run"
    )
    return INTERRUPTED if found.stopped else 0
