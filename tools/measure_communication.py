"""Count what a configuration sends: run on as many processes as its layout has ranks, or a multiple.

    torchrun --nproc_per_node=4 tools/measure_communication.py --config examples/quickstart.yaml \\
        --parallel.tensor_model_parallel_size 2 --parallel.pipeline_model_parallel_size 2

Any `--section.field value` of pretrain_crnet.py is taken. `--json FILE` writes the figures as well.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

from megatron_crnet import cpu_platform
from megatron_crnet.config import Config
from megatron_crnet.errors import CrnetError
from megatron_crnet.settings import parse_arguments

VARIANTS = ("crnet", "low_rank", "cola", "full_rank")


def measure(config: Config) -> dict[str, Any]:
    """Traffic of a layer of each variant, and of the pipeline's boundaries; a collective call."""
    cpu_platform.install()
    from megatron_crnet.communication_report import boundary_elements, layer_traffic
    from megatron_crnet.parallel import join_processes, shutdown_parallel

    join_processes(config)
    layers = {variant: dataclasses.asdict(layer_traffic(config, variant)) for variant in VARIANTS}
    boundaries = boundary_elements(config) if config.parallel.pipeline_model_parallel_size > 1 else {}
    shutdown_parallel()
    return {"layers": layers, "boundaries": boundaries, "bytes": 2 if config.training.dtype == "bf16" else 4}


def table(config: Config, found: dict[str, Any]) -> str:
    """The figures as Markdown: elements for one token, also in units of h, and bytes in the run's dtype."""
    h, size = config.model.hidden_size, found["bytes"]
    lines = [
        f"tensor-parallel traffic of one layer, for one token (h = {h}; {size} bytes an element)",
        "",
        "| variant | forward | in h | step | in h | bytes a step | gradients, elements a step |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for variant, t in found["layers"].items():
        row = (t["forward"], t["forward"] / h, t["step"], t["step"] / h, t["step"] * size, t["gradients"])
        lines.append("| {} | {:.0f} | {:.3f} | {:.0f} | {:.3f} | {:.0f} | {:.0f} |".format(variant, *row))
    if found["boundaries"]:
        lines += ["", "pipeline: what a rank sends forward for one token", "", "| pipeline rank | elements | bytes |"]
        lines += ["| --- | --- | --- |"]
        lines += [f"| {rank} | {n:.0f} | {n * size:.0f} |" for rank, n in sorted(found["boundaries"].items())]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Run; returns the exit status."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    target = None
    if "--json" in argv[:-1]:
        at = argv.index("--json")
        target, argv = argv[at + 1], argv[:at] + argv[at + 2 :]
    try:
        config = parse_arguments(argv).config
        found = measure(config)
    except CrnetError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    if os.environ.get("RANK", "0") == "0":
        print(table(config, found))
        if target:
            Path(target).write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
