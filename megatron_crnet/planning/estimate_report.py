"""The estimate as tables and as plain values."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_crnet.planning.estimate import Estimate
from megatron_crnet.planning.figures import Flow, Memory
from megatron_crnet.planning.machines import Machine
from megatron_crnet.utils.duration import spell

GIB = 2**30
PARTS = [field.name for field in dataclasses.fields(Memory)]


def memory_table(columns: dict[str, Memory]) -> list[str]:
    """Parts as rows, one column for each rank or way of counting; GiB."""
    rows = [(part, [getattr(memory, part) for memory in columns.values()]) for part in PARTS]
    rows = [(part, values) for part, values in rows if part != "host" or any(values)]
    rows.append(("peak", [memory.total for memory in columns.values()]))
    return [
        f"  {'':<12}" + "".join(f"{name:>12}" for name in columns),
        *(f"  {part:<12}" + "".join(f"{value / GIB:>12.3f}" for value in values) for part, values in rows),
    ]


def flow_rows(flows: list[Flow], crossings: dict[str, float] | None = None) -> list[str]:
    """A line for each kind and group; the links where `crossings` tells them."""
    if not flows:
        return ["  nothing"]
    return [
        f"  {flow.group:<8}{flow.kind:<16}{flow.size:>5} ranks{flow.bytes / GIB:>12.3f} GiB" + _links(flow, crossings)
        for flow in flows
    ]


def _links(flow: Flow, crossings: dict[str, float] | None) -> str:
    if crossings is None:
        return ""
    share = crossings[flow.group]
    return "  inside a node" if share == 0 else f"  {100 * share:.3g}% between nodes"


def verdict(found: Estimate, machine: Machine, train_steps: int) -> str:
    """What most people ask for, in one line: whether it fits, how fast it is, and how long the whole run takes."""
    assert found.time is not None
    peak, there = found.stages[found.fullest].memory.total, machine.memory_bytes
    room = f"{'fits' if peak <= there else 'DOES NOT FIT'}: {peak / GIB:,.1f} of {there / GIB:,.1f} GiB"
    return (
        f"{room} per {machine.name}; {found.tokens_per_second:,.0f} tokens/s on {found.world_size} "
        f"(MFU {found.utilization(machine):.1%}, whole {found.utilization(machine, whole_attention=True):.1%}); "
        f"{train_steps:,} steps in {spell(train_steps * found.time.total)}"
    )


def estimate_tables(found: Estimate, machine: Machine | None) -> list[str]:
    """What `tools/estimate.py` and `--dry-run` print."""
    stage = found.stages[found.fullest]
    shown = sorted({0, found.fullest, len(found.stages) - 1})
    operations = stage.operations
    lines = [
        "memory of a rank, GiB (peak: state plus the largest of kept + transient, reduction, update)",
        *memory_table({f"stage {rank}": found.stages[rank].memory for rank in shown}),
        f"operations of a step: {found.model_flops:.3e} useful over all ranks; on a rank of stage {found.fullest} "
        f"{operations.passes:.3e}, recomputation {operations.recomputation:.3e} (attention without the mask)",
        f"volume of a rank of stage {found.fullest} in a step",
        *flow_rows(stage.flows, found.crossings),
    ]
    return [*lines, *_time_lines(found, machine)] if machine is not None else lines


def _time_lines(found: Estimate, machine: Machine) -> list[str]:
    assert found.time is not None
    peak = f"{machine.peak(found.dtype) / 1e12:.3g} TFLOP/s"
    products = f"{found.dtype} products at {machine.product_efficiency:.0%} of {peak}"
    return [
        f"time of a step on {found.world_size} x {machine.name}, seconds (roofline: {products}, "
        f"links at {machine.link_efficiency:.0%}, nothing overlaps)",
        *(f"  {name:<16}{value:>10.4f}" for name, value in dataclasses.asdict(found.time).items()),
        f"  {'step':<16}{found.time.total:>10.4f}",
    ]


def as_values(found: Estimate, machine: Machine) -> dict[str, Any]:
    """Everything as JSON knows it; bytes, operations, seconds."""
    assert found.time is not None
    return {
        "world_size": found.world_size,
        "data_parallel_size": found.plan.dp_size,
        "micro_batches": found.plan.num_microbatches,
        "machine": dataclasses.asdict(machine),
        "stages": [
            {
                "memory": {**dataclasses.asdict(stage.memory), "peak": stage.memory.total},
                "operations": {**dataclasses.asdict(stage.operations), "total": stage.operations.total},
                "flows": [
                    {
                        **dataclasses.asdict(flow),
                        "wire_bytes": flow.wire_bytes,
                        "wire_bytes_between_nodes": flow.wire_bytes * found.crossings[flow.group],
                    }
                    for flow in stage.flows
                ],
            }
            for stage in found.stages
        ],
        "model_flops": found.model_flops,
        "seconds": {**dataclasses.asdict(found.time), "step": found.time.total},
        "tokens_per_second": found.tokens_per_second,
        "model_flops_utilization": found.utilization(machine),
        "fits": found.stages[found.fullest].memory.total <= machine.memory_bytes,
    }
