"""Say before a run whether it fits and how fast it will be: memory by part, operations, bytes on the wire, time.

    python tools/estimate.py --config examples/llama2_7b.yaml --world-size 8 --gpu h100

Any `--section.field value` of pretrain_crnet.py is taken, and:

    --world-size N       ranks of the run (default: one tensor-parallel group in each pipeline stage)
    --gpu NAME           a100-80g, h100, h200, or a YAML file with the fields of `megatron_crnet/planning/machines.py`
                         (default h100)
    --gpus-per-node N    ranks that share a node (default 8)
    --json               print the figures as JSON instead of tables; tools/scaling_report.py takes it

What the figures mean and where they come from: docs/planning.md.
"""

from __future__ import annotations

from megatron_crnet.utils.errors import ctrl_c_is_one_line

if __name__ == "__main__":
    ctrl_c_is_one_line()  # during the imports below as well

import json
import sys

from megatron_crnet.config.loading import read_config
from megatron_crnet.config.options import only_usage, positive_integer, take_options
from megatron_crnet.utils.errors import reported

OPTIONS = {"--world-size": None, "--gpu": "h100", "--gpus-per-node": "8"}


def run(argv: list[str]) -> int:
    """Estimate and print; returns the exit status."""
    options, rest = take_options(OPTIONS, [argument for argument in argv if argument != "--json"])
    config = read_config(rest)
    from megatron_crnet.distributed import cpu_backend

    cpu_backend.install()
    from megatron_crnet.planning.estimate import estimate
    from megatron_crnet.planning.estimate_report import as_values, estimate_tables, verdict
    from megatron_crnet.planning.machines import find_machine
    from megatron_crnet.reporting.step_identity import identify_step
    from megatron_crnet.utils.environment import command_line, versions

    parallel = config.parallel
    least = str(parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)
    world_size = positive_integer("--world-size", options["--world-size"] or least)
    machine = find_machine(str(options["--gpu"]))
    found = estimate(config, world_size, machine, positive_integer("--gpus-per-node", str(options["--gpus-per-node"])))
    if "--json" not in argv:
        print("\n".join([verdict(found, machine, config.training.train_steps), "", *estimate_tables(found, machine)]))
        return 0
    record = {
        "kind": "estimate",
        "command": command_line([__file__, *argv]),
        "versions": versions(),
        "step": identify_step(config, world_size),
        **as_values(found, machine),
    }
    print(json.dumps(record, indent=1))
    return 0


def main(argv: list[str]) -> int:
    """Run; returns the exit status."""
    status = only_usage(str(__doc__), argv)
    return reported(lambda: run(argv)) if status is None else status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
