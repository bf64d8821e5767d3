"""What `--dry-run` prints: the resolved configuration and what follows from it."""

from __future__ import annotations

import yaml

from megatron_crnet.config.loading import resolved
from megatron_crnet.config.model_size import parameters_by_part, total_parameters
from megatron_crnet.config.schema import Config
from megatron_crnet.planning.estimate import estimate
from megatron_crnet.planning.estimate_report import estimate_tables


def dry_run_report(config: Config, world_size: int) -> str:
    """Configuration, parameters by part, batch arithmetic, and the estimate of `estimate.py`.

    Raises:
        ConfigError: the batch or the layout does not fit `world_size` ranks.
    """
    found = estimate(config, world_size)
    plan, model, training = found.plan, config.model, config.training
    rows = [*parameters_by_part(model).items(), ("total", total_parameters(model))]
    lines = [
        yaml.safe_dump(resolved(config), sort_keys=False),
        f"parameters ({model.variant})",
        *(f"  {name:<16}{count:>16,}" for name, count in rows),
        f"batch on {world_size} process{'es' if world_size > 1 else ' (set WORLD_SIZE=N before this command for N)'}",
        f"  {plan.micro_batch_size} sequences x {plan.num_microbatches} micro-batches x {plan.dp_size} data-parallel "
        f"ranks = {plan.global_batch_size} sequences = {plan.tokens_per_step:,} tokens a step",
        *([f"  {ramp}"] if (ramp := plan.ramp_line()) else []),
        f"  {training.train_steps:,} steps = {plan.tokens_of_run(training.train_steps):,} tokens",
        *estimate_tables(found, None),
    ]
    return "\n".join(lines)
