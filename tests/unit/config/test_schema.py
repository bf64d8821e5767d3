from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_crnet.config.deepspeed import deepspeed_config
from megatron_crnet.config.deepspeed_keys import DEEPSPEED_KEYS, OWNED_BY_OTHER_SECTIONS
from megatron_crnet.config.field_types import is_text, shown
from megatron_crnet.config.loading import read_config
from megatron_crnet.config.schema import Config, FaultsConfig
from megatron_crnet.utils.errors import ConfigError
from tests.helpers import ARCHITECTURES, FULL_RANK_EXPERTS, tiny_config

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
MOE, GPT2, QWEN3 = (ARCHITECTURES[name] for name in ("qwen3_moe", "gpt2", "qwen3"))
ZERO_1 = {"zero_optimization": {"stage": 1}}

RESTARTS = {"lr_decay_style": "cosine_restarts"}
NVME = {"device": "nvme", "nvme_path": "/tmp"}


def relora(**changes: Any) -> dict[str, Any]:
    return {"model": {"variant": "relora"}, "relora": changes}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model": {"architecture": "bert"}}, "architecture is .bert., but must be one of llama, gpt2, qwen3"),
    ({"model": {"architecture": "gpt2"}}, "max_position_embeddings is not set, but architecture gpt2 learns a vector"),
    ({"model": {**GPT2, "max_position_embeddings": 8}}, "max_position_embeddings 8 is below training.seq_length 16"),
    (
        {"model": {**GPT2, "rotary_base": 500}},
        "rotary_base is 500, but model.architecture is gpt2, which rotates nothing",
    ),
    ({"model": {**GPT2, "rank": {"gate": 4}}}, "names the position 'gate', but the positions are q, k, v, o, up, down"),
    ({"model": {**GPT2, "variant": "cola", "only_lr_act": True}}, "only_lr_act is true, but architecture gpt2 has no"),
    ({"model": {**QWEN3, "kv_channels": 7}}, "kv_channels gives heads of width 7, but rotary embeddings need an even"),
    ({"model": {**QWEN3, "num_attention_heads": 3}}, "num_attention_heads 3 does not divide by model.num_query_groups"),
    (
        {"model": QWEN3, "parallel": PP2, "optimizer": {"name": "adamw8bit"}, "deepspeed_section": ZERO_1},
        "adamw8bit with a tied output layer .* use adamw, stage 0 in fp32, or set model.tie_word_embeddings false",
    ),
    ({"model": {"hidden_size": 34}}, "model.hidden_size 34 does not divide by model.num_attention_heads 4: use"),
    ({"model": {"hidden_size": 36}}, "heads of width 9"),
    ({"model": {"num_query_groups": 3}}, "num_query_groups 3"),
    ({"model": {"num_layers": 0}}, "model.num_layers is 0"),
    ({"model": {"hidden_dropout": 1.0}}, "must be a finite number from 0 to below 1"),
    ({"model": {"max_position_embeddings": 8}}, "max_position_embeddings 8 is below training.seq_length 16"),
    (
        {"model": {"ffn_hidden_size": 49}, "parallel": {**TP2, "pad_widths_to": 1}},
        "model.ffn_hidden_size 49 .* use pad_widths_to 64",
    ),
    (
        {"model": {"ffn_hidden_size": 5, "rank": 4}, "parallel": {"tensor_model_parallel_size": 4}},
        "model.ffn_hidden_size 5 cannot be cut into 4 .* use 8",
    ),
    ({"parallel": {"pad_widths_to": 63}}, "parallel.pad_widths_to is 63, but must be one of 1, 8, 16"),
    ({"model": {"vocab_size": 65}, "parallel": {**TP2, "pad_widths_to": 1}}, "model.vocab_size 65 does not divide"),
    (
        {"model": {"vocab_size": 5, "num_attention_heads": 4}, "parallel": {"tensor_model_parallel_size": 4}},
        "model.vocab_size 5 cannot be cut into 4 equal parts",
    ),
    ({"model": {"num_query_groups": 1}, "parallel": TP2}, "model.num_query_groups 1"),
    ({"model": {"rank": 33}}, "model.rank is 33 for q of layer 1, .* 32 inputs and 32 outputs, .* use at most 32"),
    ({"model": {"num_query_groups": 1, "rank": 9, "variant": "cola"}}, "rank is 9 for k of layer 0, .* and 8 outputs"),
    ({"training": {"seq_length": 15}, "parallel": TP2}, "training.seq_length 15"),
    ({"training": {"train_steps": 0}}, "training.train_steps is 0"),
    ({"optimizer": {"lr": 0.0}}, "optimizer.lr is 0.0"),
    ({"optimizer": {"adam_beta2": 1.0}}, "optimizer.adam_beta2"),
    (
        {"optimizer": {"lr_warmup_steps": 1000}},
        r"lr_warmup_steps 1000 is not below .* 1000: set the first to at most 999 or the second to at least 1001",
    ),
    ({"optimizer": {"lr_decay_style": "wsd", "lr_wsd_decay_steps": -5}}, "optimizer.lr_wsd_decay_steps is -5"),
    ({"optimizer": {"lr_decay_style": "wsd", "lr_wsd_decay_steps": 999}}, "more than training.train_steps"),
    ({"optimizer": {"lr_decay_style": "wsd", "lr_warmup_steps": 950}}, "lr_wsd_decay_steps 100 are more than"),
    ({"optimizer": RESTARTS}, "neither optimizer.lr_restart_interval nor relora.restart_interval is set"),
    (
        {"optimizer": {**RESTARTS, "lr_restart_interval": 300}},
        r"lr_restart_interval 300 does not divide the 1000 steps .* use train_steps 900 or 1200",
    ),
    (
        {"optimizer": RESTARTS, **relora(restart_interval=50, warm_start_steps=25)},
        r"relora.restart_interval 50 does not divide the 975 steps .* 1000, less .* 25\): use train_steps 975 or 1025",
    ),
    ({"optimizer": {**RESTARTS, "lr_restart_interval": 1001}}, "does not divide .* use train_steps 1001, or"),
    (
        {"optimizer": RESTARTS, **relora(restart_interval=600)},
        r"\(training.train_steps 1000\): use train_steps 1200, or",
    ),
    ({"optimizer": {**RESTARTS, "lr_restart_interval": 100}, **relora(restart_interval=50)}, "50 is not a multiple of"),
    ({"optimizer": {**RESTARTS, "lr_restart_interval": 50}}, "lr_restart_warmup_steps 100 is above .* 50"),
    (
        {"optimizer": {**RESTARTS, "lr_restart_interval": 100}, "training": {"rampup_batch_size": [4, 4, 40]}},
        "cosine_restarts counts steps, but training.rampup_batch_size",
    ),
    ({"distillation": {"kd_beta": 0.5}}, "distillation.kd_beta is 0.5, but distillation.teacher is not set"),
    ({"distillation": {"teacher": "t", "kd_alpha": -1.0}}, "distillation.kd_alpha is -1.0, but must be"),
    ({"distillation": {"teacher": "t", "kd_alpha": 0.0}}, "kd_alpha and kd_beta are 0, so that the teacher teaches"),
    ({"relora": {"restart_interval": 10}}, "relora.restart_interval is 10, but model.variant is crnet"),
    ({**relora(prune="smallest")}, 'relora.prune is "smallest", but must be one of magnitude, random, reset'),
    ({**relora(prune_share=1.5)}, "relora.prune_share is 1.5"),
    (
        {**relora(prune="reset")},
        "relora.prune is .reset., but relora.restart_interval is not set, so that nothing reads it",
    ),
    (
        {**relora(restart_interval=50, prune="reset", prune_share=0.5)},
        "relora.prune_share is 0.5, but relora.prune reset zeroes all moments",
    ),
    (
        {**relora(), "model": {"variant": "relora", "full_rank_layers": [0, 1, 2, 3]}},
        "model.full_rank_layers names all 4 layers, so that relora has no factors",
    ),
    ({**relora(warm_start_lr=1e-3)}, "relora.warm_start_lr is 0.001, but relora.warm_start_steps is 0, so that"),
    (
        {**relora(), "model": {"variant": "relora", "rank": 33}},
        r"rank is 33 for q of layer 0, .* 32 inputs and 32 outputs",
    ),
    ({**relora(warm_start_steps=1000)}, "relora.warm_start_steps 1000 and optimizer.lr_warmup_steps 2"),
    ({**relora(warm_start_steps=998)}, "leave none of training.train_steps 1000"),
    ({**relora(restart_interval=500, warm_start_steps=500)}, "500 is not below the 500 steps after the warm start"),
    (
        {**relora(warm_start_steps=5), "training": {"rampup_batch_size": [4, 4, 40]}},
        "relora.warm_start_steps 5 with training.rampup_batch_size",
    ),
    (
        {**relora(), "deepspeed_section": {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}},
        "zero_hpz_partition_size is 2, but model.variant is relora",
    ),
    (
        {**relora(), "deepspeed_section": {"zero_optimization": {"stage": 3, "offload_param": NVME}}},
        "offload_param is .* model.variant is relora",
    ),
    (
        {"optimizer": {"name": "galore"}},
        "name is galore, but .* model.variant crnet .*: use variant full_rank",
    ),
    (
        {"model": {"variant": "full_rank", "num_query_groups": 2}, "optimizer": {"name": "galore", "galore_rank": 17}},
        "galore_rank 17 is above 16, the smaller side of the linear map k: use at most 16$",
    ),
    ({"optimizer": {"galore_rank": 0}}, "galore_rank is 0, but must be"),
    ({"optimizer": {"update_proj_gap": 0}}, "update_proj_gap is 0, but must be"),
    ({"optimizer": {"galore_scale": 0.0}}, "galore_scale is 0.0, but must be"),
    (
        {"optimizer": {"proj_type": "both"}},
        'proj_type is "both", but must be one of std, reverse_std, right',
    ),
    ({"optimizer": {"name": "adamw8bit", "adam_eps": 1e-11}}, "adam_eps is 1e-11, .* use at least 1e-10, or adamw"),
    ({"parallel": {"sequence_parallel": True}}, "parallel.sequence_parallel is true"),
    ({"model": {"architecture": "qwen3_moe"}}, "model.num_experts is not set, but architecture qwen3_moe needs it"),
    (
        {"model": {"num_experts": 4}},
        "num_experts is 4, but model.architecture is llama, which has no experts .qwen3_moe has",
    ),
    (
        {"model": {"full_rank_experts": True}},
        "full_rank_experts is true, but model.architecture is llama, which has no experts",
    ),
    ({"model": {**FULL_RANK_EXPERTS, "rank": {"q": 8, "k": 8, "v": 8}}}, "gives no rank for the position 'o'"),
    ({"model": {"moe_router_topk": 2}}, "moe_router_topk is 2, but model.architecture is llama, which has no experts"),
    ({"model": {**MOE, "num_experts": 1}}, "num_experts is 1, but must be"),
    ({"model": {**MOE, "moe_router_topk": 5}}, "moe_router_topk 5 is above model.num_experts 4: use at most that"),
    ({"model": {**MOE, "moe_router_topk": 1}}, "moe_router_topk is 1, .* set moe_router_pre_softmax"),
    ({"model": {**MOE, "variant": "relora", "rank": 24}}, "rank is 24 for k of layer 0, .* and 16 outputs"),
    (
        {"model": {**MOE, "variant": "relora", "rank": {**dict.fromkeys("qkvo", 8), "gate": 21, "up": 8, "down": 8}}},
        "rank is 21 for gate of layer 0, .* and 20 outputs",
    ),
    ({"model": {**MOE, "moe_aux_loss_coeff": -1.0}}, "moe_aux_loss_coeff is -1.0, but must be"),
    (
        {
            "model": {**MOE, "variant": "full_rank"},
            "optimizer": {"name": "galore", "galore_rank": 4},
            "parallel": TP2,
        },
        "optimizer.name is galore, .* ranks hold copies of experts or none of them: use 1 for both, or adamw",
    ),
    (
        {
            "model": {**MOE, "variant": "full_rank"},
            "optimizer": {"name": "galore", "galore_rank": 4},
            "parallel": {"expert_model_parallel_size": 2},
        },
        "expert_model_parallel_size 2 and .* use 1 for both, or adamw",
    ),
    ({"parallel": {"virtual_pipeline_model_parallel_size": 2}}, "needs pipeline_model_parallel_size above 1"),
    (
        {"model": {"num_layers": 3}, "parallel": {**PP2, "virtual_pipeline_model_parallel_size": 2}},
        "num_layers 3 leaves 3 layers for 2 pipeline stages of 2 virtual ones: use 4 or 8 layers$",
    ),
    (
        {"model": {"num_layers": 6}, "parallel": {**PP2, "virtual_pipeline_model_parallel_size": 2}},
        "use 4 or 8 layers, or set parallel.num_layers_in_first_pipeline_stage$",
    ),
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
    ({"stage": 1, "offload_optimizer": {"device": "nvme"}}, {}, "offload_optimizer is .*nvme.* use stage 3"),
    ({"stage": 3, "offload_optimizer": {**OFFLOAD, "super_offload": True}}, {}, "optimizer of its own"),
    ({"stage": 2, "zenflow": {"topk_ratio": 0.1}}, {}, "optimizer of its own"),
    ({"stage": 1, "compute_grad_norm": False}, {}, "compute_grad_norm is false, but the engine clips"),
    ({"stage": 1, "legacy_stage1": True}, {}, "legacy_stage1 is true"),
    ({"stage": 1, "round_robin_gradients": True}, {}, "round_robin_gradients is true"),
    ({"stage": 1, "overlap_comm": True}, {}, "leave it out, or use stage 2 or 3"),
    ({"overlap_comm": True}, {}, "gradients of stage 0"),
    ({"stage": 1, "allgather_bucket_size": 5}, {}, "must be an even number"),
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
    assert config.deepspeed["zero_optimization"] == {key: value for key, value in section.items() if value is not None}


@pytest.mark.parametrize("key", ["elasticity", "sparse_gradients", "disable_allgather", "compile", "autotuning"])
def test_keys_without_an_effect_here_are_unknown(key: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown key deepspeed.{key}"):
        tiny_config(deepspeed_section={key: {}})


def mappings(kinds: dict[str, Any], below: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """Every key of the section that has a type of its own, with the keys above it."""
    found = []
    for key, inner in kinds.items():
        found += mappings(inner, (*below, key)) if isinstance(inner, dict) else [((*below, key), inner)]
    return found


KEYS = mappings(DEEPSPEED_KEYS)


@pytest.mark.fault("F4")
@pytest.mark.parametrize(("keys", "kind"), KEYS, ids=[".".join(keys) for keys, _ in KEYS])
def test_every_key_of_deepspeed_has_a_type_and_says_so_in_the_same_words_from_everywhere(
    keys: tuple[str, ...], kind: Any, tmp_path: Path
) -> None:
    name, file = ".".join(("deepspeed", *keys)), tmp_path / "config.yaml"
    for value in (5.5, -1, 2**70, float("inf"), float("nan"), "x\0y" if is_text(kind) else "many", [[1]], {"zz": 1}):
        section: Any = value
        for key in reversed(keys):
            section = {key: section}
        with pytest.raises(ConfigError) as caught:
            tiny_config(deepspeed_section=section)
        said = str(caught.value)
        assert said.startswith(f"{name} is {shown(value)}, but "), said
        assert "\n" not in said
        file.write_text(yaml.safe_dump({"deepspeed": section}))
        for options in (["--config", str(file)], [f"--{name}={yaml.safe_dump(value, default_flow_style=True)}"]):
            with pytest.raises(ConfigError) as again:
                read_config(options)
            assert str(again.value) == said
    assert read_config([f"--{name}=null"]) == Config()


@pytest.mark.fault("F4")
@pytest.mark.parametrize(
    ("section", "message"),
    [
        (5, "deepspeed is 5, but must be a mapping"),
        ({1: 2}, "unknown key deepspeed.1"),
        ({"aio": 5}, "deepspeed.aio is 5, but must be a mapping"),
        ({"aio": {"zz": 1}}, "unknown key deepspeed.aio.zz"),
        ({"comms_logger": 5}, "deepspeed.comms_logger is 5, but must be a mapping"),
        ({"timers": 5}, "deepspeed.timers is 5, but must be a mapping"),
        ({"wall_clock_breakdown": "x"}, 'deepspeed.wall_clock_breakdown is "x", but must be true or false'),
        ({"dump_state": "x"}, 'deepspeed.dump_state is "x", but must be true or false'),
        ({"flops_profiler": {"enabled": True}}, "which the schedule here does instead: leave it out"),
        ({"zero_optimization": {"stage": True}}, "stage is true, but must be one of ZeRO's stages"),
        (
            {"zero_optimization": {"stage": 3, "prefetch_bucket_size": 1, "stage3_prefetch_bucket_size": 2}},
            "are both set, but mean the same",
        ),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "add nvme_path"),
        (
            {"train_batch_size": 8, "gradient_clipping": 1.0},
            "deepspeed.train_batch_size, deepspeed.gradient_clipping are set, but training.global_batch_size and "
            "optimizer.clip_grad decide this: remove them",
        ),
    ],
)
def test_a_deepspeed_section_that_cannot_be_honoured_is_refused(section: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        dataclasses.replace(tiny_config(), deepspeed=section)
    assert "\n" not in str(caught.value)


@pytest.mark.fault("M5")
def test_what_is_auto_or_null_in_deepspeeds_file_is_left_to_the_other_sections() -> None:
    section = {
        "bf16": {"enabled": "auto"},
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "wall_clock_breakdown": False,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", "sub_group_size": None, "overlap_comm": True},
    }
    assert tiny_config(deepspeed_section=section).deepspeed == {
        "wall_clock_breakdown": False,
        "zero_optimization": {"stage": 2, "overlap_comm": True},
    }


@pytest.mark.fault("5 (buckets)")
@pytest.mark.parametrize(("elements", "given", "chosen"), [(9, None, 9), (10**10, None, 500_000_000), (9, 20, 20)])
def test_the_bucket_is_as_large_as_the_model_unless_it_is_given(elements: int, given: int | None, chosen: int) -> None:
    config = tiny_config(deepspeed_section={"zero_optimization": {"stage": 2, "reduce_bucket_size": given}})
    assert deepspeed_config(config, dp_size=2, elements=elements)["zero_optimization"]["reduce_bucket_size"] == chosen


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_gradients_are_added_up_in_fp32(stage: int) -> None:
    section = {"zero_optimization": {"stage": stage}}
    settings = deepspeed_config(
        tiny_config(training={"dtype": "bf16"}, deepspeed_section=section), dp_size=2, elements=9
    )
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


@pytest.mark.parametrize("device", ["cpu", "nvme"])
@pytest.mark.parametrize("name", ["adamw8bit", "galore"])
def test_moments_of_another_form_than_the_weights_are_not_offloaded(name: str, device: str) -> None:
    model, optimizer = {"variant": "full_rank"}, {"name": name, "galore_rank": 8}
    zero = {"stage": 3, "offload_optimizer": {"device": device, "nvme_path": "/tmp"}}
    with pytest.raises(ConfigError, match=rf"optimizer.name is {name}, .*: use adamw, or leave offload_optimizer out$"):
        tiny_config(model, optimizer=optimizer, deepspeed_section={"zero_optimization": zero})
    tiny_config(model, optimizer=optimizer, deepspeed_section={"zero_optimization": {"stage": 3}})


def test_the_defaults_are_valid() -> None:
    Config()
