"""Output of `--dry-run`, `estimate`, `simulate` and `plan`: tables, the verdict, and values for JSON."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import yaml

from megatron_crnet.config.loading import resolved
from megatron_crnet.config.model_size import active_parameters, parameters_by_part, total_parameters
from megatron_crnet.config.positions import METHODS, position_table
from megatron_crnet.config.schema import Config
from megatron_crnet.planning.estimate import Estimate, estimate
from megatron_crnet.planning.machines import GIB
from megatron_crnet.planning.profile import CommVolume, Crossing, Memory
from megatron_crnet.utils.progress import format_duration


def memory_table(columns: dict[str, Memory]) -> list[str]:
    """Parts of memory as rows in GiB, with a column per rank or method."""
    names = [field.name for field in dataclasses.fields(Memory)]
    rows = [(name, [getattr(memory, name) for memory in columns.values()]) for name in names]
    peaks = [memory.total for memory in columns.values()]
    rows = [(name, values) for name, values in rows if name != "host" or any(values)]
    rows = [(name, values) for name, values in rows if name != "start" or any(map(operator.eq, values, peaks))]
    rows.append(("peak", peaks))
    return [
        f"  {'':<12}" + "".join(f"{name:>12}" for name in columns),
        *(f"  {name:<12}" + "".join(f"{value / GIB:>12.3f}" for value in values) for name, values in rows),
    ]


def volume_rows(volumes: list[CommVolume], crossings: dict[str, Crossing] | None = None) -> list[str]:
    """A line per kind and group, with the share between nodes if `crossings` are given."""
    rows = []
    for volume in volumes:
        share = crossings[volume.group].of(volume.kind) if crossings else None
        links = "" if share is None else f"  {100 * share:.3g}% between nodes" if share else "  inside a node"
        line = f"  {volume.group:<8}{volume.kind:<16}{volume.size:>5} ranks{volume.bytes / GIB:>12.3f} GiB"
        rows.append(line + links)
    return rows or ["  nothing"]


def verdict(found: Estimate) -> str:
    """One line: whether it fits, tokens per second, time of the whole run."""
    available, steps = found.machine.memory_bytes, found.config.training.train_steps
    fits = "fits" if found.peak <= available else "DOES NOT FIT"
    return (
        f"{fits}: {found.peak / GIB:,.1f} of {available / GIB:,.1f} GiB per {found.machine.name}; "
        f"{found.tokens_per_second:,.0f} tokens/s on {found.world_size} "
        f"(MFU {found.utilization():.1%}, non-causal {found.utilization(whole_attention=True):.1%}); "
        f"{steps:,} steps in {format_duration(found.run_seconds)}"
    )


def estimate_tables(found: Estimate, with_time: bool = True) -> list[str]:
    """Memory of the first, the fullest and the last stage, operations, volume, and time on a machine."""
    stage, operations = found.stages[found.fullest], found.stages[found.fullest].operations
    shown = sorted({0, found.fullest, len(found.stages) - 1})
    lines = [
        "memory of a rank, GiB (peak: state plus the largest of kept + transient, reduction, update; or start)",
        *memory_table({f"stage {rank}": found.stages[rank].memory for rank in shown}),
        f"operations of a step: {found.model_flops():.3e} useful over all ranks; on a rank of stage {found.fullest} "
        f"{operations.passes:.3e}, recomputation {operations.recomputation:.3e} (attention without the mask)"
        + (f", update {operations.update:.3e}" if operations.update else ""),
        f"volume of a rank of stage {found.fullest} in a step",
        *volume_rows(stage.flows, found.crossings),
        *(
            f"steps {phase.start + 1:,} to {phase.stop:,} train a {step.config.model.variant} of "
            f"{total_parameters(step.config.model):,} parameters, with a peak of {step.peak / GIB:.3f} GiB per rank"
            for phase, step in found.others
        ),
        *_handover_lines(found),
    ]
    if not with_time:
        return lines
    machine, dtype = found.machine, found.config.training.dtype
    peak = f"{machine.peak(dtype) / 1e12:.3g} TFLOP/s"
    return [
        *lines,
        f"time of a step on {found.world_size} x {machine.name}, seconds (roofline: {dtype} matmul at "
        f"{machine.product_efficiency:.0%} of {peak}, links at {machine.link_efficiency:.0%}, no overlap)",
        *(f"  {name:<16}{value:>10.4f}" for name, value in dataclasses.asdict(found.time).items()),
        f"  {'step':<16}{found.time.total:>10.4f}",
    ]


def _handover_lines(found: Estimate) -> list[str]:
    """What a rank holds on the host while fp32 weights, and moments where ranks change, go from phase to phase."""
    if not found.others:
        return []
    is_warm_start = METHODS[found.config.model.variant].has_frozen
    model = found.others[0][1].config.model if is_warm_start else found.config.model
    tp, pp, _ = found.config.parallel.sizes
    held = (4 if is_warm_start else 12) * total_parameters(model) / (tp * pp)
    return [f"between them a rank holds {held / GIB:.3f} GiB in the host's memory, as a mean over stages"]


def as_values(found: Estimate) -> dict[str, Any]:
    """The estimate for JSON, in bytes, operations and seconds."""
    stages = [dataclasses.asdict(stage) for stage in found.stages]
    for values, stage in zip(stages, found.stages, strict=True):
        values["memory"]["peak"], values["operations"]["total"] = stage.memory.total, stage.operations.total
        for entry, volume in zip(values["flows"], stage.flows, strict=True):
            entry["wire_bytes"] = volume.wire_bytes
            entry["wire_bytes_between_nodes"] = volume.wire_bytes * found.crossings[volume.group].of(volume.kind)
    return {
        "world_size": found.world_size,
        "data_parallel_size": found.plan.dp_size,
        "micro_batches": found.plan.num_microbatches,
        "machine": dataclasses.asdict(found.machine),
        "stages": stages,
        "model_flops": found.model_flops(),
        "seconds": {**dataclasses.asdict(found.time), "step": found.time.total},
        "tokens_per_second": found.tokens_per_second,
        "model_flops_utilization": found.utilization(),
        "fits": found.peak <= found.machine.memory_bytes,
    }


def dry_run_report(config: Config, world_size: int) -> str:
    """Configuration, parameters by part, batch arithmetic, and the estimate.

    Raises:
        ConfigError: the batch or the layout does not fit `world_size` ranks.
    """
    found = estimate(config, world_size)
    plan, model, training = found.plan, found.config.model, config.training
    rows = [*parameters_by_part(model).items(), ("total", total_parameters(model))]
    rows += [("active", active_parameters(model))] if model.num_experts else []
    lines = [
        yaml.safe_dump(resolved(config), sort_keys=False),
        f"parameters ({model.variant}, {model.architecture})",
        *(f"  {name:<16}{count:>16,}" for name, count in rows),
        *_padding_lines(found.config),
        f"batch on {world_size} process{'es' if world_size > 1 else ' (set WORLD_SIZE=N before this command for N)'}",
        f"  {plan.micro_batch_size} sequences x {plan.num_microbatches} micro-batches x {plan.dp_size} data-parallel "
        f"ranks = {plan.global_batch_size} sequences = {plan.tokens_per_step:,} tokens per step",
        *([f"  {ramp}"] if (ramp := plan.ramp_line()) else []),
        f"  {training.train_steps:,} steps = {plan.tokens_of_run(training.train_steps):,} tokens",
        *estimate_tables(found, with_time=False),
    ]
    return "\n".join(lines)


def _padding_lines(config: Config) -> list[str]:
    """Widths that are computed with zeros behind them; nothing where none is."""
    parallel = config.parallel
    found = position_table(config.model, parallel.tensor_model_parallel_size, parallel.pad_widths_to).padding()
    lines = [
        f"  {name:<16}{width:>16,} -> " + (f"{parts} x {part:,} = " if parts > 1 else "") + f"{parts * part:,}"
        for name, width, parts, part in found
    ]
    heading = f"padded by zeros to multiples of {parallel.pad_widths_to} or less (parallel.pad_widths_to)"
    return [heading, *lines] if lines else []
