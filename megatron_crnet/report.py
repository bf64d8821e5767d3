"""What `--dry-run` prints: the resolved configuration and what follows from it."""

from __future__ import annotations

import yaml

from megatron_crnet.arithmetic import flops_per_token, parameters_by_part, total_parameters
from megatron_crnet.batch import plan_batches
from megatron_crnet.config import Config
from megatron_crnet.deepspeed_settings import check_deepspeed_keys
from megatron_crnet.memory_estimate import estimate_memory
from megatron_crnet.settings import resolved


def dry_run_report(config: Config, world_size: int) -> str:
    """Configuration, parameters by part, batch arithmetic, operations and a memory estimate.

    Raises:
        ConfigError: the batch or the layout does not fit `world_size` ranks.
    """
    check_deepspeed_keys(config)
    plan, model, training = plan_batches(config, world_size), config.model, config.training
    parts, memory = parameters_by_part(model), estimate_memory(config, plan.dp_size)
    rows = [*parts.items(), ("total", total_parameters(model))]
    lines = [
        yaml.safe_dump(resolved(config), sort_keys=False),
        f"parameters ({model.variant})",
        *(f"  {name:<16}{count:>16,}" for name, count in rows),
        "batch",
        f"  {plan.micro_batch_size} sequences x {plan.num_microbatches} micro-batches x {plan.dp_size} data-parallel "
        f"ranks = {plan.global_batch_size} sequences = {plan.tokens_per_step:,} tokens a step",
        f"  {training.train_steps:,} steps = {training.train_steps * plan.tokens_per_step:,} tokens",
        f"  {flops_per_token(model, plan.seq_length) * plan.tokens_per_step:.3e} operations a step",
        "memory of the fullest rank, an estimate (GiB)",
        *(
            f"  {name:<16}{value / 2**30:>10.2f}"
            for name, value in (
                ("weights", memory.weights),
                ("gradients", memory.gradients),
                ("optimizer", memory.optimizer),
                ("activations", memory.activations),
                ("total", memory.total),
            )
        ),
    ]
    return "\n".join(lines)
