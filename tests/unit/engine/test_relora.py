"""What a restart prunes, and the jagged cosine, against the authors' formulas written out."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from megatron_crnet.config.schema import ReloraConfig
from megatron_crnet.engine.determinism import deterministic_algorithms
from megatron_crnet.engine.optimizer import build_scheduler
from megatron_crnet.engine.relora import pruned
from megatron_crnet.model.reference_relora import prune_by_magnitude
from tests.helpers import tiny_config


def prune(moment: torch.Tensor, how: str, share: float = 0.9) -> torch.Tensor:
    return pruned(moment, ReloraConfig(prune=how, prune_share=share), torch.Generator().manual_seed(1))


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 0.999, 1.0])
def test_the_smallest_magnitudes_are_those_below_the_quantile(share: float) -> None:
    moment = torch.randn(37, 53, generator=torch.Generator().manual_seed(0))
    assert torch.equal(prune(moment, "magnitude", share), prune_by_magnitude(moment, share))


def test_moments_of_more_elements_than_quantile_takes_are_pruned() -> None:
    """`torch.quantile` refuses more than 2^24 elements: factors of a 13B model are larger."""
    moment = torch.arange(1.0, 2**24 + 2).view(1, -1)
    with pytest.raises(RuntimeError, match="too large"):
        moment.quantile(0.5)
    assert prune(moment, "magnitude").count_nonzero() == round(0.1 * 2**24)


@pytest.mark.gpu
def test_moments_on_gpus_are_pruned_as_on_cpus_where_results_must_repeat() -> None:
    moment = torch.randn(37, 53, generator=torch.Generator().manual_seed(0))
    with deterministic_algorithms(wanted=True):
        assert torch.equal(prune(moment.cuda(), "magnitude").cpu(), prune(moment, "magnitude"))


def test_moments_that_are_still_zero_stay_so() -> None:
    assert not prune(torch.zeros(4, 5), "magnitude").any()


def test_random_pruning_zeroes_its_share_and_a_reset_everything() -> None:
    moment = torch.ones(100, 200)
    assert prune(moment, "random", 0.8).mean().item() == pytest.approx(0.2, abs=0.02)
    assert not prune(moment, "reset").any()


def authors_rate(step: int, total: int, warmup: int, cycle: int, restart_warmup: int, least: float) -> float:
    """`_get_cosine_schedule_with_multiple_warmups_lambda` of peft_pretraining, as a share of the peak, for step >= 1.

    Its steps count from 0 and ours from 1, where a cycle ends with the last step that the authors would give it.
    """

    def cosine(at: int) -> float:
        return least + (1 - least) * (1 + math.cos(math.pi * (at - warmup) / (total - warmup))) / 2

    if step < warmup:
        return step / warmup
    number, within = divmod(step - 1, cycle)
    if number and within + 1 < restart_warmup:
        return (within + 1) / restart_warmup * cosine(number * cycle + restart_warmup)
    return cosine(step)


def test_the_jagged_cosine_is_the_authors() -> None:
    config = tiny_config(
        training={"train_steps": 60},
        optimizer={
            **{"lr": 2.0, "lr_warmup_steps": 5, "min_lr_ratio": 0.1, "lr_decay_style": "cosine_restarts"},
            **{"lr_restart_interval": 20, "lr_restart_warmup_steps": 4},
        },
    )
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.0, "weight_decay": 0.0, "params": [], "lr_mult": 0.5}])
    scheduler, found = build_scheduler(config, optimizer), []
    for _ in range(60):
        found.append(optimizer.param_groups[0]["lr"])
        scheduler.step(1)
    wanted = [authors_rate(step, 60, 5, 20, 4, 0.1) for step in range(1, 61)]
    assert found == pytest.approx(wanted)
    assert found[20] < 0.3 * found[19] < found[23]
