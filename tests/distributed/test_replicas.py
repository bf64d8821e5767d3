"""Copies of weights that drift apart are named at the next checkpoint; the fullest rank's memory is the run's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_crnet.checkpoint.manager import Checkpointer
from megatron_crnet.checkpoint.replicas import _sums
from megatron_crnet.checkpoint.train_state import TrainingState
from megatron_crnet.distributed.process_groups import initialize_parallel
from megatron_crnet.engine.engine import TrainEngine
from megatron_crnet.model.gpt import build_model_chunks
from megatron_crnet.model.weights import EMBEDDING
from megatron_crnet.training.metrics import largest_peak_memory_bytes, peak_memory_bytes
from tests.distributed.spawn import fresh_world, run_distributed
from tests.distributed.test_checkpoint import row_config
from tests.helpers import ARCHITECTURES, local_weights, micro_batches

TP = {"tensor_model_parallel_size": 2}
PP = {"pipeline_model_parallel_size": 2}
EP, MOE = {"expert_model_parallel_size": 2}, ARCHITECTURES["qwen3_moe"]
TIED = {"tie_word_embeddings": True}
NORM, WHOLE = "model.layers.1.input_layernorm.weight", "model.layers.2.mlp.down_proj.a.weight"
ROWS: dict[str, tuple[dict[str, Any], str, bool]] = {
    "tp2": ({"parallel": TP}, NORM, True),
    "tp2-zero3-bf16": ({"parallel": TP, "stage": 3, "dtype": "bf16"}, NORM, True),
    "tp2-cut": ({"parallel": TP}, "lm_head.weight", False),
    "dp2": ({}, WHOLE, True),
    "dp2-zero1-bf16": ({"stage": 1, "dtype": "bf16"}, WHOLE, True),
    "dp2-zero3": ({"stage": 3}, WHOLE, False),
    "pp2-tied": ({"parallel": PP, "stage": 1, "dtype": "bf16", "model": TIED}, EMBEDDING, True),
    "dp2-ep2": ({"parallel": EP, "model": MOE, "stage": 1}, "model.layers.2.mlp.experts.3.down_proj.a.weight", False),
    "dp2-ep2-router": ({"parallel": EP, "model": MOE}, "model.layers.2.mlp.gate.weight", True),
    "pp2-untied": ({"parallel": PP}, "lm_head.weight", False),
}
"""Configuration, the weight that rank 1 changes, and whether another rank has a copy of it."""


ON_FOUR = {
    # rank 3 has the other copy of the experts of rank 1
    "dp4-ep2": (
        {"parallel": EP, "model": MOE, "stage": 1, "sequences": 8},
        "model.layers.2.mlp.experts.3.down_proj.a.weight",
        True,
    ),
}


def drift(folder: str, rows: dict[str, tuple[dict[str, Any], str, bool]] = ROWS) -> dict[str, list[list[str]]]:
    found = {}
    for name, (row, changed, _) in rows.items():
        config = row_config(f"{folder}/{name}", **row)
        context = initialize_parallel(config)
        engine = TrainEngine(config, build_model_chunks(config), context)
        checkpointer = Checkpointer(config, engine)
        batches = micro_batches(config, context.dp_rank, context.world_size)
        engine.forward_backward(batches, config.training.global_batch_size * config.training.seq_length)
        engine.update()
        remarks = []
        for step in range(2):
            checkpointer.save(TrainingState(step + 1))
            checkpointer.wait()
            remarks.append(checkpointer.take_remarks())
            if dist.get_rank() == 1:
                (weight,) = [weight for weight in local_weights(engine) if weight.name == changed]
                held = weight.parameter.ds_tensor if engine.stage == 3 else weight.local()  # type: ignore[attr-defined]
                with torch.no_grad():
                    held.view(-1)[0] *= 1.01
        found[name] = remarks
        engine.close()
        context.heartbeat.close()
        fresh_world()
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[list[str]]]]:
    return run_distributed(drift, 2, str(tmp_path_factory.mktemp("drift")))


def test_a_copy_of_an_expert_that_drifts_is_named(tmp_path: Path) -> None:
    _, changed, _ = ON_FOUR["dp4-ep2"]
    for rank in run_distributed(drift, 4, str(tmp_path), ON_FOUR):
        before, (after,) = rank["dp4-ep2"]
        assert before == []
        assert changed in after


@pytest.mark.fault("B9")
@pytest.mark.parametrize("name", ROWS)
def test_a_copy_that_drifts_is_named_on_every_rank_and_nothing_else_is(name: str, found: list[Any]) -> None:
    _, changed, copied = ROWS[name]
    for rank in found:
        before, after = rank[name]
        assert before == [], "a step leaves all copies alike"
        assert len(after) == copied
        if copied:
            assert after[0].startswith("rank ")
            assert f"holds other bits of {changed} than the ranks with copies of it" in after[0]


def peak(_: str) -> tuple[int, int]:
    held = torch.ones(50_000_000 if dist.get_rank() == 1 else 1)
    own = peak_memory_bytes()
    largest = largest_peak_memory_bytes(torch.device("cpu"))
    del held
    return own, largest


@pytest.mark.fault("B13")
def test_the_peak_memory_is_that_of_the_fullest_rank() -> None:
    (own_0, largest_0), (own_1, largest_1) = run_distributed(peak, 2, "")
    assert own_1 > own_0 + 150e6
    assert largest_0 == largest_1
    assert largest_0 >= own_1


@pytest.mark.fault("B9")
def test_weights_of_which_some_are_on_the_host_are_summed_in_one_place() -> None:
    """Under offload_param on a GPU DeepSpeed keeps small parameters on the device, the others on the host."""
    with FakeTensorMode():
        found = _sums([torch.ones(3), torch.ones(3, device="cuda"), torch.ones(3, dtype=torch.bfloat16)])
        assert found.device == torch.device("cpu")
