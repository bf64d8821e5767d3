"""A fingerprint changes with everything that decides a step, and with nothing else."""

from __future__ import annotations

import pytest

from megatron_crnet.config.loading import load_config, read_config
from megatron_crnet.reporting.step_identity import identify_step


def fingerprint(*options: str, world_size: int = 4) -> str:
    return identify_step(read_config(options), world_size)["fingerprint"]


@pytest.mark.parametrize(
    "options",
    [
        "--model.rank 64",
        "--model.variant cola",
        "--training.seq_length 128",
        "--training.micro_batch_size 2",
        "--training.global_batch_size 16",
        "--training.dtype bf16",
        "--training.cross_layer_fusion false",
        "--optimizer.clip_grad 0",
        "--parallel.tensor_model_parallel_size 4",
        "--parallel.tensor_model_parallel_size 2 --parallel.sequence_parallel false",
        "--parallel.pipeline_model_parallel_size 2",
        "--recompute.strategy replay",
        "--deepspeed.zero_optimization.stage 1",
        "--optimizer.name adamw8bit",
        "--distillation.teacher exports/dense",
        "--rank_schedule.steps [5] --rank_schedule.ranks [96]",
        "--deepspeed.zero_optimization.reduce_bucket_size 1000000",
    ],
)
def test_what_decides_a_step_changes_the_fingerprint(options: str) -> None:
    assert fingerprint(*options.split()) not in (
        fingerprint(),
        fingerprint("--parallel.tensor_model_parallel_size", "2"),
    )


def test_galores_states_and_learned_positions_decide_a_step_too() -> None:
    full, gpt2 = ("--model.variant", "full_rank"), ("--model.architecture=gpt2", "--model.max_position_embeddings")
    galore = (*full, "--optimizer.name=galore", "--optimizer.galore_rank")
    assert len({fingerprint(*full), *(fingerprint(*galore, rank) for rank in ("4", "8"))}) == 3
    assert fingerprint(*gpt2, "512") != fingerprint(*gpt2, "999")


def test_experts_are_named_by_where_they_are_and_how_tokens_come_there() -> None:
    def identity(*options: str) -> dict[str, str]:
        return identify_step(load_config("examples/qwen3_30b_a3b.yaml", options), 8)

    sent = "--parallel.moe_token_dispatcher_type=alltoall"
    found = [identity(), identity(sent)]
    for one, way in zip(found, ("allgather", "alltoall"), strict=True):
        assert f", EP 4 by {way}, ZeRO" in one["line"]
    assert found[0]["fingerprint"] != found[1]["fingerprint"]
    alone = "--parallel.expert_model_parallel_size=1"
    assert identity(alone) == identity(alone, sent)


def test_the_world_changes_the_fingerprint() -> None:
    assert fingerprint(world_size=2) != fingerprint()


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ("--training.seed 1 --training.train_steps 700 --optimizer.lr 1e-4 --logging.output_dir elsewhere", ""),
        ("--data.num_workers 2 --checkpoint.save_interval 5 --training.eval_interval 3", ""),
        ("--parallel.distributed_timeout_minutes 1 --model.max_position_embeddings 999", ""),
        ("--model.full_rank_layers [0] --parallel.virtual_pipeline_model_parallel_size 1", ""),
        ("--deepspeed.zero_optimization.stage 0", ""),
        (
            "--deepspeed.zero_optimization.reduce_bucket_size 1e6",
            "--deepspeed.zero_optimization.reduce_bucket_size 1000000",
        ),
    ],
)
def test_what_does_not_decide_a_step_leaves_it(options: str, same: str) -> None:
    assert fingerprint(*options.split()) == fingerprint(*same.split())


def test_the_line_says_model_batch_and_layout() -> None:
    options = ["--parallel.tensor_model_parallel_size", "2", "--recompute.strategy", "replay"]
    assert identify_step(read_config(options), 4)["line"] == (
        "crnet of 21.55M parameters, 8 x 256 tokens per step in micro-batches of 8, fp32, recomputation replay, "
        "4 ranks: TP 2 x PP 1 x DP 2, ZeRO-0"
    )
