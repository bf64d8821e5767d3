from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_crnet.config.batch import check_memory, plan_batches
from megatron_crnet.utils.errors import ConfigError
from tests.helpers import tiny_config


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


def test_virtual_stages_need_micro_batches_in_multiples_of_the_stages() -> None:
    parallel = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
    config = tiny_config(parallel=parallel, training={"global_batch_size": 6})
    with pytest.raises(ConfigError, match="3 micro-batches a step do not divide"):
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
