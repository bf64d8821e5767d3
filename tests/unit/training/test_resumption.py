"""What a resumed run says that it does not share with the run that it continues."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from megatron_crnet.config.loading import resolved
from megatron_crnet.config.recompute_section import RecomputeConfig
from megatron_crnet.config.schema import Config, DataConfig, ModelConfig
from megatron_crnet.data.fingerprint import TrainedOn
from megatron_crnet.training.resumption import changed_layout, differences
from megatron_crnet.utils.versions import library_versions
from tests.helpers import ARCHITECTURES, tiny_config

CHECKPOINT = Path("step_00000004")


def remarks_after(config: Config, *, saved: Config | None = None, **state: Any) -> list[str]:
    whole = {"samples": 32, "versions": library_versions(), "trained_on": TrainedOn("a", {"train": "x"}).values()}
    now = TrainedOn("a", {"train": "x"})
    return differences(config, CHECKPOINT, resolved(saved or config), {**whole, **state}, now)


@pytest.mark.parametrize(
    ("before", "line"),
    [
        ({"pad_widths_to": 1}, "parallel.pad_widths_to 1 -> 64"),
        ({"sequence_parallel": False}, "parallel.sequence_parallel False -> True"),
        (
            {"expert_model_parallel_size": 2, "moe_token_dispatcher_type": "alltoall"},
            "parallel.moe_token_dispatcher_type alltoall -> allgather",
        ),
        ({"distributed_timeout_minutes": 3.0, "overlap_tp_communication": False}, None),
        # said with the layout
        ({"tensor_model_parallel_size": 1}, None),
        ({"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 3}, None),
    ],
)
def test_what_rounds_otherwise_in_the_same_layout_is_said(before: dict[str, Any], line: str | None) -> None:
    model, tp = (
        ARCHITECTURES["qwen3_moe"] if "moe_token_dispatcher_type" in before else {},
        {"tensor_model_parallel_size": 2},
    )
    found = remarks_after(tiny_config(model, tp), saved=tiny_config(model, {**tp, **before}))
    assert found == ([f"note: changed since the checkpoint: {line}"] if line else [])


def test_segments_that_are_planned_anew_are_said() -> None:
    for strategy, said in (("inverse", 1), ("replay", 0)):
        config = dataclasses.replace(tiny_config(), recompute=RecomputeConfig(strategy=strategy))
        assert sum("plans its segments anew" in line for line in remarks_after(config)) == said


def test_a_dispatcher_is_said_of_a_checkpoint_that_is_older_than_the_choice() -> None:
    experts, spread = ARCHITECTURES["qwen3_moe"], {"expert_model_parallel_size": 2}
    before = resolved(tiny_config(experts, spread))
    del before["parallel"]["moe_token_dispatcher_type"]
    now = tiny_config(experts, {**spread, "moe_token_dispatcher_type": "alltoall"})
    state = {"samples": 32, "trained_on": TrainedOn("a", {"train": "x"}).values()}
    assert differences(now, CHECKPOINT, before, state, TrainedOn("a", {"train": "x"})) == [
        "note: changed since the checkpoint: parallel.moe_token_dispatcher_type allgather -> alltoall"
    ]


@pytest.mark.fault("L5")
def test_the_same_run_says_nothing() -> None:
    assert remarks_after(tiny_config()) == []


@pytest.mark.fault("L5")
def test_a_checkpoint_that_has_seen_no_sample_is_no_other_run() -> None:
    assert remarks_after(tiny_config(), saved=tiny_config(training={"seed": 1}), samples=0, trained_on=None) == []


@pytest.mark.fault("L5")
@pytest.mark.parametrize("name", ["seq_length", "seed", "train_steps", "global_batch_size"])
def test_each_field_that_changes_the_order_of_samples_is_a_warning_of_its_own(name: str) -> None:
    now = tiny_config()
    saved = tiny_config(training={name: 32})
    (line,) = remarks_after(now, saved=saved)
    assert line.startswith(f"warning: training.{name} differs from the checkpoint's (")


@pytest.mark.fault("L5")
def test_a_split_counts_only_where_data_are_cut_by_it() -> None:
    def config(split: str, **paths: list[str]) -> Config:
        return dataclasses.replace(tiny_config(), data=DataConfig(split=split, **paths))

    assert remarks_after(config("9,1", train_data_path=["a"]), saved=config("8,2", train_data_path=["a"])) == []
    (line,) = remarks_after(config("9,1", data_path=["a"]), saved=config("8,2", data_path=["a"]))
    assert line.startswith("warning: data.split differs from the checkpoint's (9,1 instead of 8,2)")


@pytest.mark.fault("L5")
def test_other_settings_are_one_note_and_what_changes_no_weight_is_none() -> None:
    saved = tiny_config(
        optimizer={"lr": 0.5}, training={"dtype": "bf16", "eval_steps": 3}, deepspeed_section={"dump_state": True}
    )
    (line,) = remarks_after(tiny_config(), saved=saved)
    assert line == (
        "note: changed since the checkpoint: training.dtype bf16 -> fp32, optimizer.lr 0.5 -> 0.003, "
        "deepspeed.dump_state True -> None"
    )


@pytest.mark.parametrize("older", [False, True])
def test_another_optimizer_is_a_warning_that_says_what_becomes_of_the_moments(older: bool) -> None:
    """Moments are converted; a checkpoint of an older version, which does not name its optimizer, is AdamW's."""
    adamw, eight_bit = tiny_config(), tiny_config(optimizer={"name": "adamw8bit"})
    saved = resolved(adamw)
    if older:
        del saved["optimizer"]["name"]
    state = {"samples": 1, "trained_on": TrainedOn("a").values()}
    assert differences(adamw, CHECKPOINT, saved, state, TrainedOn("a")) == []
    (line,) = differences(eight_bit, CHECKPOINT, saved, state, TrainedOn("a"))
    assert line == (
        "warning: optimizer.name differs from the checkpoint's (adamw8bit instead of adamw): its moments are rounded "
        "to 8 bits from here"
    )
    (line,) = remarks_after(adamw, saved=eight_bit)
    assert line.endswith("(adamw instead of adamw8bit): its moments go on in fp32 from their values in 8 bits")


def test_another_layout_rounds_8_bit_moments_again() -> None:
    assert "8 bits" not in changed_layout(tiny_config(), "device cpu")
    assert "rounded to 8 bits again" in changed_layout(tiny_config(optimizer={"name": "adamw8bit"}), "device cpu")


@pytest.mark.fault("L5")
def test_how_samples_are_masked_is_warned_of_once_and_where_they_lie_is_not() -> None:
    config = tiny_config()
    saved = resolved(config)
    saved["data"] |= {"eod_mask_loss": True, "cache_path": "elsewhere"}
    saved["data"] |= {"train_data_path": ["moved"], "tokenizer_model": "moved", "split": "1,1", "num_workers": 7}
    state = {"samples": 1, "trained_on": TrainedOn("a").values()}
    (line,) = differences(config, CHECKPOINT, saved, state, TrainedOn("a"))
    assert line.startswith("warning: data.eod_mask_loss differs from the checkpoint's (False instead of True)")


@pytest.mark.fault("L5")
def test_other_libraries_are_one_note() -> None:
    versions = {**library_versions(), "torch": "2.0.0"}
    (line,) = remarks_after(tiny_config(), versions=versions)
    assert line.startswith("note: other libraries than the checkpoint's, which may round otherwise: torch 2.0.0 -> ")


@pytest.mark.fault("B4")
def test_a_field_that_an_earlier_version_did_not_know_is_no_change() -> None:
    config, saved = tiny_config(), resolved(tiny_config())
    del saved["training"]["cross_layer_fusion"]
    assert (
        differences(config, CHECKPOINT, saved, {"samples": 1, "trained_on": TrainedOn("a").values()}, TrainedOn()) == []
    )


@pytest.mark.fault("B2")
def test_dropout_is_mentioned_where_there_is_some() -> None:
    config = tiny_config()
    assert "dropout" not in changed_layout(config, "device cpu instead of cuda")
    dropping = dataclasses.replace(config, model=ModelConfig(hidden_dropout=0.1))
    assert changed_layout(dropping, "x").endswith("not to the bit, and dropout draws other numbers")
