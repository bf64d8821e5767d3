"""What a checkpoint of another model is refused with: the fields whose values differ, and no others."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_crnet.checkpoint.compatibility import check_resumable
from megatron_crnet.config.loading import resolved
from megatron_crnet.utils.errors import ConfigError
from tests.helpers import ARCHITECTURES, tiny_config

GPT2 = ARCHITECTURES["gpt2"]


def refusal(folder: Path, saved: dict[str, Any], asked: dict[str, Any]) -> set[str]:
    """Fields that the message names, of a checkpoint whose model section has `saved`; empty where it is taken."""
    values = resolved(tiny_config({k: v for k, v in saved.items() if v != "unknown"}))
    values["model"] |= {name: value for name, value in saved.items() if value == "unknown"}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    (folder / "state.json").write_text(json.dumps({"step": 2, "adam_steps": 2}))
    try:
        check_resumable(tiny_config(asked), folder)
    except ConfigError as error:
        return set(re.findall(r"model\.(\w+)", str(error)))
    return set()


@pytest.mark.parametrize(
    ("saved", "asked", "named"),
    [
        ({"variant": "full_rank"}, {}, {"variant", "full_rank_layers"}),
        ({}, {"variant": "full_rank"}, {"variant"}),
        ({}, {"variant": "low_rank", "rank": 4}, {"variant", "rank", "full_rank_layers"}),
        ({}, GPT2, {"architecture", "tie_word_embeddings"}),
        (GPT2, {"ffn_hidden_size": 40}, {"architecture", "ffn_hidden_size", "tie_word_embeddings"}),
        ({"rank": [8, 8, 8, 8]}, {"rank": 8}, set()),
        ({"full_rank_layers": [0]}, {"full_rank_layers": [1]}, {"full_rank_layers"}),
        ({**GPT2, "max_position_embeddings": 64}, GPT2, {"max_position_embeddings"}),
        ({"rotary_base": 77}, {}, {"rotary_base"}),
        ({"max_position_embeddings": 64}, {}, set()),
        ({"architecture": "unknown"}, {}, {"architecture"}),
        ({"variant": "unknown"}, {}, {"variant"}),
    ],
)
def test_the_fields_that_differ_are_named(
    saved: dict[str, Any], asked: dict[str, Any], named: set[str], tmp_path: Path
) -> None:
    assert refusal(tmp_path, saved, asked) == named
