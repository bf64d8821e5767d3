"""Batch arithmetic: micro-batches over replicas, and Megatron's ramp of the batch size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

from megatron_crnet.config.batch import BatchSizes, check_memory, plan_batches
from megatron_crnet.config.schema import Config
from megatron_crnet.engine.optimizer import build_scheduler
from megatron_crnet.planning.tables import dry_run_report
from megatron_crnet.utils.errors import ConfigError
from tests.helpers import ARCHITECTURES, tiny_config


def test_the_global_batch_is_micro_batches_times_replicas() -> None:
    plan = plan_batches(tiny_config(parallel={"tensor_model_parallel_size": 2}), world_size=4)
    assert (plan.dp_size, plan.num_microbatches, plan.tokens_per_step) == (2, 2, 128)


def test_a_batch_that_does_not_fit_names_one_that_does() -> None:
    with pytest.raises(ConfigError, match=r"global_batch_size 8 does not divide .* use 6 or 12"):
        plan_batches(tiny_config(), world_size=3)
    with pytest.raises(ConfigError, match=r"x 5 data-parallel ranks: use 10, or another micro_batch_size"):
        plan_batches(tiny_config(), world_size=5)


def test_a_world_that_does_not_divide_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"size 3 does not divide by .* multiple of 2 .*nproc_per_node=2; .* WORLD_SIZE=2;"
    ):
        plan_batches(tiny_config(parallel={"tensor_model_parallel_size": 2}), world_size=3)


def test_experts_over_replicas_need_as_many_replicas() -> None:
    experts = {**ARCHITECTURES["qwen3_moe"], "num_experts": 8}
    over_four = tiny_config(experts, {"expert_model_parallel_size": 4})
    assert plan_batches(over_four, world_size=4).dp_size == 4
    with pytest.raises(
        ConfigError, match=r"size 4 spreads experts over 4 replicas, but the 2 .* use .*size 2, or a multiple of 4 pro"
    ):
        plan_batches(over_four, world_size=2)
    with_tp = tiny_config(experts, {"expert_model_parallel_size": 4, "tensor_model_parallel_size": 2})
    assert plan_batches(with_tp, world_size=4).dp_size == 2
    with pytest.raises(ConfigError, match=r"over 2 replicas, but the 1 .* use .*size 2, or a multiple of 4 processes"):
        plan_batches(with_tp, world_size=2)


def test_virtual_stages_need_micro_batches_in_multiples_of_the_stages() -> None:
    parallel = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
    config = tiny_config(parallel=parallel, training={"global_batch_size": 6})
    with pytest.raises(ConfigError, match="3 micro-batches per step do not divide"):
        plan_batches(config, world_size=2)


@pytest.mark.fault("F12")
@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"hidden_size": 2**20, "num_layers": 1000}},
        {"training": {"seq_length": 2**24, "micro_batch_size": 64}},
    ],
)
def test_what_exceeds_all_memory_is_refused_before_it_is_asked_for(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"need more than [\d,]+ GiB, but cpu has [\d,]+ GiB: make the model or the"):
        check_memory(tiny_config(**changes), torch.device("cpu"))
    check_memory(tiny_config(), torch.device("cpu"))


RAMPS = [(32, 8, 8, 400), (32, 8, 8, 401), (64, 4, 4, 100), (64, 4, 60, 1000), (512, 32, 32, 100_000)]


def ramped(ramp: list[int], **training: Any) -> Config:
    return tiny_config(training={"rampup_batch_size": ramp, "train_steps": 40, **training})


@pytest.mark.parametrize(("full", "start", "increment", "samples"), RAMPS)
def test_sizes_are_those_of_megatrons_calculator(full: int, start: int, increment: int, samples: int) -> None:
    sizes = BatchSizes(full, start, increment, samples)
    megatron = RampupBatchsizeNumMicroBatchesCalculator(full, 2, 2, False, 0, start, increment, samples)
    seen = 0
    for step, size in enumerate(sizes.steps(0, 2000)):
        megatron.update(seen, True)
        assert size == megatron.get_current_global_batch_size(), (step, seen)
        assert sizes.after(step) == seen
        seen += size
    assert sizes.at(seen) == full
    assert [*sizes.steps(0, sizes.ramp_steps + 1)][-1] == full
    assert all(size < full for size in sizes.steps(0, sizes.ramp_steps))


@pytest.mark.parametrize(("full", "start", "increment", "samples"), RAMPS)
def test_a_run_that_goes_on_takes_the_sizes_that_it_would_have_taken(
    full: int, start: int, increment: int, samples: int
) -> None:
    sizes = BatchSizes(full, start, increment, samples)
    whole = [*sizes.steps(0, 60)]
    for done in (1, 7, 30):
        assert [*sizes.steps(sizes.after(done), 60 - done)] == whole[done:]
        assert sizes.after(60 - done, sizes.after(done)) == sum(whole)


def test_without_a_ramp_all_steps_are_alike() -> None:
    sizes = BatchSizes.of(tiny_config().training)
    assert not sizes.has_ramp
    assert [*sizes.steps(0, 3)] == [8, 8, 8]
    assert (sizes.after(5, 3), sizes.ramp_steps) == (43, 0)


@pytest.mark.parametrize(
    ("ramp", "message"),
    [
        ([2, 2], "has 2 numbers: give"),
        ([16, 2, 100], "starts above training.global_batch_size 8"),
        ([2, 4, 100], "does not reach training.global_batch_size 8 from 2 in steps of 4"),
        ([2, 0, 100], "rampup_batch_size"),
    ],
)
def test_a_ramp_that_does_not_end_at_the_global_batch_is_refused(ramp: list[int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ramped(ramp)


@pytest.mark.parametrize(("ramp", "name"), [([3, 1, 100], "start 3"), ([4, 1, 100], "increment 1")])
def test_sizes_that_micro_batches_do_not_divide_are_refused(ramp: list[int], name: str) -> None:
    with pytest.raises(ConfigError, match=f"has the {name}, which does not divide by 2"):
        plan_batches(ramped(ramp), 1)
    plan_batches(ramped([4, 2, 100]), 1)
    with pytest.raises(ConfigError, match="increment 2, which does not divide by 4"):
        plan_batches(ramped([4, 2, 100]), 2)


def test_the_dry_run_counts_the_smaller_steps() -> None:
    report = dry_run_report(ramped([2, 2, 60]), 1)
    sizes = BatchSizes(8, 2, 2, 60)
    assert "batch size from 2 to 8 sequences in steps of 2, over 64 sequences in 19 steps" in report
    assert sizes.after(19) == 10 * 2 + 5 * 4 + 4 * 6
    assert f"40 steps = {sizes.after(40) * 16:,} tokens" in report


@pytest.mark.parametrize("style", ["cosine", "wsd", "constant"])
def test_the_learning_rate_goes_by_sequences_on_a_ramp_and_meets_the_steps_ends(style: str) -> None:
    """As with Megatron, a small step moves the rate less; warm-up and decay end with the steps that they name."""

    class Optimizer:
        def __init__(self) -> None:
            self.param_groups: list[dict[str, Any]] = [{"lr": 0.0, "weight_decay": 0.0}]

    config = tiny_config(
        training={"rampup_batch_size": [2, 2, 60], "train_steps": 40},
        optimizer={"lr_warmup_steps": 10, "lr_decay_style": style, "lr": 1.0},
    )
    sizes, optimizer = BatchSizes.of(config.training), Optimizer()
    scheduler, rates = build_scheduler(config, optimizer), []
    for size in [*sizes.steps(0, 41)][1:]:
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(size)
    seen = [sizes.after(step) for step in range(1, 41)]
    assert rates[:10] == pytest.approx([s / seen[9] for s in seen[:10]])
    assert rates[9] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(1.0 if style == "constant" else 0.1)
