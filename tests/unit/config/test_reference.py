"""docs/reference.md says what the schema says."""

from __future__ import annotations

from pathlib import Path

from megatron_crnet.config.reference import markdown

PAGE = Path(__file__).parents[3] / "docs" / "reference.md"


def test_the_reference_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == markdown(), "run `make reference`"


def test_every_field_and_every_usable_key_of_deepspeed_is_in_it() -> None:
    text = markdown()
    for name in ("model.rank", "data.reset_attention_mask", "faults.spike_window", "deepspeed.zero_optimization.stage"):
        assert f"| `{name}` |" in text
    assert "round_robin_gradients" not in text, "it takes DeepSpeed's default alone"
