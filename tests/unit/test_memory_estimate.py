from __future__ import annotations

import dataclasses

import pytest

from megatron_crnet.arithmetic import total_parameters
from megatron_crnet.config import Config, ParallelConfig
from megatron_crnet.memory_estimate import estimate_memory, kept_and_transient, rank_parameters, stage_layers
from megatron_crnet.settings import parse_arguments
from megatron_crnet.transformer_config import build_transformer_config
from tests.helpers import tiny_config

SEVEN_B = ["--config=examples/llama2_7b.yaml", "--training.seq_length=4096", "--training.micro_batch_size=1"]


def with_layout(config: Config, tp: int, pp: int) -> Config:
    layout = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    return dataclasses.replace(config, parallel=layout)


def test_memory_shrinks_with_every_zero_stage() -> None:
    totals = [
        estimate_memory(tiny_config(deepspeed_section={"zero_optimization": {"stage": stage}}), dp_size=4).total
        for stage in range(1, 4)
    ]
    assert totals[0] > totals[1] > totals[2]


def test_stages_hold_all_parameters_once_without_tensor_parallelism() -> None:
    config = tiny_config()
    for pp in (1, 2, 4):
        split = with_layout(config, 1, pp)
        assert sum(rank_parameters(split, stage) for stage in range(pp)) == total_parameters(config.model)


def test_uneven_stages() -> None:
    config = parse_arguments(
        [*SEVEN_B, "--parallel.pipeline_model_parallel_size=4", "--parallel.num_layers_in_last_pipeline_stage=5"]
    ).config
    assert [len(layers) for layers in stage_layers(config)] == [9, 9, 9, 5]


def test_seven_h_r_of_a_low_rank_layer_are_on_every_tensor_parallel_rank() -> None:
    config = parse_arguments(SEVEN_B).config
    h, r, layers = 4096, 1024, 31
    whole, half = rank_parameters(config, 0), rank_parameters(with_layout(config, 2, 1), 0)
    replicated = layers * (7 * h * r + 7) + (2 * 32 + 1) * h
    assert half == replicated + (whole - replicated) // 2


@pytest.mark.parametrize(
    ("strategy", "attention_kept", "counted"),
    [
        ("none", False, 25444),
        ("replay", False, 5932),
        ("replay", True, 6730),
        ("inverse", False, 5704),
        ("inverse", True, 6679),
        ("full", False, 5420),
    ],
)
def test_activations_are_what_was_counted_in_a_pass(strategy: str, attention_kept: bool, counted: int) -> None:
    """The table of docs/results.md, MiB of 32 layers of 7B on one sequence of 4096, from tools/measure_recompute.py."""
    options = [f"--recompute.strategy={strategy}", f"--recompute.keep_attention_output={str(attention_kept).lower()}"]
    config = build_transformer_config(parse_arguments([*SEVEN_B, *options]).config)
    kept, transient = kept_and_transient(config, range(32), 1)
    assert (kept + transient) * 4096 * 2 / 2**20 == pytest.approx(counted, rel=0.04)


def test_a_pipeline_keeps_as_many_micro_batches_as_stages() -> None:
    options = [*SEVEN_B, "--parallel.pipeline_model_parallel_size=2"]
    one, two = (estimate_memory(parse_arguments(o).config, 8).activations for o in (SEVEN_B, options))
    # the first stage keeps two micro-batches of half the layers, and has no logits
    assert two == pytest.approx(one, rel=0.05)
