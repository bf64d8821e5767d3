from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megatron_crnet.config import Config, FaultsConfig
from megatron_crnet.deepspeed_rules import OWNED_BY_OTHER_SECTIONS
from megatron_crnet.deepspeed_settings import check_deepspeed_keys, deepspeed_config
from megatron_crnet.errors import ConfigError
from tests.helpers import tiny_config

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model": {"hidden_size": 34}}, "model.hidden_size 34 does not divide by model.num_attention_heads 4: use"),
    ({"model": {"hidden_size": 36}}, "heads of width 9"),
    ({"model": {"num_query_groups": 3}}, "num_query_groups 3"),
    ({"model": {"num_layers": 0}}, "model.num_layers is 0"),
    ({"model": {"hidden_dropout": 1.0}}, "must be a finite number from 0 to below 1"),
    ({"model": {"max_position_embeddings": 8}}, "max_position_embeddings 8 is below training.seq_length 16"),
    ({"model": {"ffn_hidden_size": 49}, "parallel": TP2}, "model.ffn_hidden_size 49 .* use 48 or 50"),
    ({"model": {"vocab_size": 65}, "parallel": TP2}, "model.vocab_size 65"),
    ({"model": {"num_query_groups": 1}, "parallel": TP2}, "model.num_query_groups 1"),
    ({"training": {"seq_length": 15}, "parallel": TP2}, "training.seq_length 15"),
    ({"training": {"train_steps": 0}}, "training.train_steps is 0"),
    ({"optimizer": {"lr": 0.0}}, "optimizer.lr is 0.0"),
    ({"optimizer": {"adam_beta2": 1.0}}, "optimizer.adam_beta2"),
    ({"optimizer": {"lr_warmup_steps": 1000}}, "optimizer.lr_warmup_steps 1000"),
    ({"optimizer": {"lr_decay_style": "wsd", "lr_wsd_decay_steps": -5}}, "optimizer.lr_wsd_decay_steps is -5"),
    ({"optimizer": {"lr_decay_style": "wsd", "lr_wsd_decay_steps": 999}}, "more than training.train_steps"),
    ({"optimizer": {"lr_decay_style": "wsd", "lr_warmup_steps": 950}}, "lr_wsd_decay_steps 100 are more than"),
    ({"parallel": {"sequence_parallel": True}}, "parallel.sequence_parallel is true"),
    ({"parallel": {"virtual_pipeline_model_parallel_size": 2}}, "needs pipeline_model_parallel_size above 1"),
    ({"parallel": PP2, "deepspeed_section": {"zero_optimization": {"stage": 2}}}, "use stage 1"),
    (
        {"parallel": TP2, "training": {"dtype": "bf16"}},
        "stage 0 does not work with training.dtype bf16, .* use stage 1",
    ),
    ({"deepspeed_section": {"zero_optimization": {"stage": 4}}}, "stages 0, 1, 2 and 3"),
    ({"deepspeed_section": {"zero_optimization": 1}}, "must be a mapping"),
]


@pytest.mark.fault("M8")
@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_cannot_work_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        tiny_config(**changes)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 2


# zero_optimization, parallel section, message
OFFLOAD = {"device": "cpu"}
REFUSED_BY_ZERO: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"stage": 1, "cpu_offload": True}, {}, "use offload_optimizer"),
    ({"stage": 3, "cpu_offload_param": True}, {}, "use offload_param"),
    ({"stage": 2, "cpu_offload_use_pin_memory": False}, {}, "use offload_optimizer.pin_memory"),
    ({"offload_optimizer": OFFLOAD}, {}, "use stage 1, 2 or 3"),
    ({"stage": 2, "offload_optimizer": OFFLOAD}, TP2, "use tensor_model_parallel_size 1"),
    ({"stage": 1, "offload_optimizer": OFFLOAD}, PP2, "use pipeline_model_parallel_size 1"),
    ({"stage": 2, "offload_param": OFFLOAD}, {}, "use stage 3"),
    ({"stage": 1, "offload_optimizer": {"device": "nvme"}}, {}, "offload_optimizer.device is 'nvme', .* use stage 3"),
    ({"stage": 3, "offload_optimizer": {**OFFLOAD, "super_offload": True}}, {}, "optimizer of its own"),
    ({"stage": 2, "zenflow": {"topk_ratio": 0.1}}, {}, "optimizer of its own"),
    ({"stage": 1, "compute_grad_norm": False}, {}, "compute_grad_norm is False, but the engine clips"),
    ({"stage": 1, "legacy_stage1": True}, {}, "legacy_stage1 is True"),
    ({"stage": 1, "round_robin_gradients": True}, {}, "round_robin_gradients is True"),
    ({"stage": 1, "overlap_comm": True}, {}, "leave it out, or use stage 2 or 3"),
    ({"overlap_comm": True}, {}, "gradients of stage 0"),
    ({"stage": 1, "allgather_bucket_size": 5}, {}, "use an even number"),
    ({"stage": 3, "zero_quantized_gradients": True}, {}, "rounds"),
    ({"stage": 3, "zero_quantized_weights": True}, {}, "rounds"),
    ({"stage": 3, "zero_quantized_nontrainable_weights": True}, {}, "rounds"),
    ({"stage": 3, "zero_hpz_partition_size": 2}, TP2, "under tensor_model_parallel_size 2: use"),
    ({"stage": 2, "zero_hpz_partition_size": 2}, {}, "stage 2 does not read it: use stage 3"),
    ({"stage": 2, "sub_group_size": 1000}, {}, "stage 2 does not read it: use stage 3"),
    ({"stage": 1, "stage3_prefetch_bucket_size": 0}, {}, "stage 1 does not read it: use stage 3"),
]


@pytest.mark.parametrize(("section", "parallel", "message"), REFUSED_BY_ZERO)
def test_what_deepspeed_would_get_wrong_is_refused(
    section: dict[str, Any], parallel: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        tiny_config(parallel=parallel, deepspeed_section={"zero_optimization": section})
    assert str(caught.value).startswith("deepspeed.zero_optimization.")


@pytest.mark.parametrize(
    ("section", "parallel"),
    [
        ({"stage": 2, "overlap_comm": True}, {}),
        ({"stage": 1, "overlap_comm": False, "allgather_bucket_size": 4}, {}),
        ({"stage": 1, "offload_optimizer": {"device": "none"}}, TP2),
        ({"stage": 1, "offload_optimizer": None}, PP2),
        ({"stage": 3, "zero_hpz_partition_size": 2, "sub_group_size": 1000}, {}),
        ({"stage": 3, "zero_hpz_partition_size": 1}, TP2),
        ({"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}, {}),
        ({"stage": 3, "stage3_param_persistence_threshold": 0, "zero_quantized_weights": False}, TP2),
    ],
)
def test_what_works_is_not_refused(section: dict[str, Any], parallel: dict[str, Any]) -> None:
    config = tiny_config(parallel=parallel, deepspeed_section={"zero_optimization": section})
    check_deepspeed_keys(config)


@pytest.mark.parametrize("key", ["elasticity", "sparse_gradients", "disable_allgather", "compile", "autotuning"])
def test_keys_without_an_effect_here_are_unknown(key: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown key deepspeed.{key}"):
        check_deepspeed_keys(tiny_config(deepspeed_section={key: {}}))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_gradients_are_added_up_in_fp32(stage: int) -> None:
    section = {"zero_optimization": {"stage": stage}}
    settings = deepspeed_config(tiny_config(training={"dtype": "bf16"}, deepspeed_section=section), dp_size=2)
    assert (settings["data_types"]["grad_accum_dtype"], settings["communication_data_type"]) == ("fp32", "fp32")


@pytest.mark.parametrize("key", sorted(OWNED_BY_OTHER_SECTIONS))
def test_deepspeed_keys_that_other_sections_own_are_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=f"deepspeed.{key} is set, but "):
        tiny_config(deepspeed_section={key: {}})


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ({"on_bad_step": "skip"}, "offload_optimizer is on, .* use on_bad_step stop, or no offload"),
        ({"spike_window": 1}, "faults.spike_window is 1, but must be an integer from 2 to"),
        ({"spike_deviations": 0.0}, "faults.spike_deviations is 0.0"),
        ({"max_skips": -1}, "faults.max_skips is -1"),
    ],
)
def test_faults_that_cannot_be_handled_so_are_refused(faults: dict[str, Any], message: str) -> None:
    offloaded = tiny_config(deepspeed_section={"zero_optimization": {"stage": 2, "offload_optimizer": OFFLOAD}})
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(offloaded, faults=FaultsConfig(**faults))
    dataclasses.replace(offloaded, faults=FaultsConfig())


def test_the_defaults_are_valid() -> None:
    Config()
