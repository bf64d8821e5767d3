from __future__ import annotations

from typing import Any

import pytest

from megatron_crnet.config import Config
from megatron_crnet.errors import ConfigError
from megatron_crnet.rules import OWNED_BY_OTHER_SECTIONS
from tests.helpers import tiny_config

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model": {"hidden_size": 34}}, "model.hidden_size 34 does not divide by model.num_attention_heads 4: use"),
    ({"model": {"hidden_size": 36}}, "heads of width 9"),
    ({"model": {"num_query_groups": 3}}, "num_query_groups 3"),
    ({"model": {"num_layers": 0}}, "model.num_layers is 0"),
    ({"model": {"hidden_dropout": 1.0}}, r"must lie in \[0, 1\)"),
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
    ({"parallel": {"sequence_parallel": True}}, "parallel.sequence_parallel is true"),
    ({"parallel": {"virtual_pipeline_model_parallel_size": 2}}, "needs pipeline_model_parallel_size above 1"),
    ({"parallel": PP2, "deepspeed_section": {"zero_optimization": {"stage": 2}}}, "use stage 1"),
    ({"deepspeed_section": {"zero_optimization": {"stage": 4}}}, "stages 0, 1, 2 and 3"),
    ({"deepspeed_section": {"zero_optimization": 1}}, "must be a mapping"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_cannot_work_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        tiny_config(**changes)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 2


@pytest.mark.parametrize("key", sorted(OWNED_BY_OTHER_SECTIONS))
def test_deepspeed_keys_that_other_sections_own_are_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=f"deepspeed.{key} is set, but "):
        tiny_config(deepspeed_section={key: {}})


def test_the_defaults_are_valid() -> None:
    Config()
