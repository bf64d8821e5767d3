"""Weights and moments through files: the layout that wrote them goes on bit for bit, any other to rounding."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from safetensors import safe_open

from megatron_crnet.checkpoint.storage import collect, fill, shared_reader, write
from megatron_crnet.config.schema import Config
from megatron_crnet.distributed.process_groups import initialize_parallel
from megatron_crnet.engine.engine import TrainEngine
from megatron_crnet.engine.state_kinds import KINDS
from megatron_crnet.model.gpt import build_model_chunks
from megatron_crnet.utils.errors import CheckpointError
from tests.distributed.spawn import fresh_world, run_distributed
from tests.helpers import (
    ARCHITECTURES,
    PADDED,
    PADDED_GPT2,
    PADDED_MOE,
    largest_padding,
    local_weights,
    micro_batches,
    tiny_config,
)

STEPS, SAVED_AT = 4, 2
TP: dict[str, Any] = {"tensor_model_parallel_size": 2}
PP: dict[str, Any] = {"pipeline_model_parallel_size": 2}
LAYOUTS: dict[str, tuple[dict[str, Any], int]] = {
    "dp2-zero0": ({}, 0),
    "dp2-zero1": ({}, 1),
    "dp2-zero1-unpadded": ({"pad_widths_to": 1}, 1),
    "dp2-zero2": ({}, 2),
    "dp2-zero3": ({}, 3),
    "tp2-zero1": (TP, 1),
    "tp2-zero3-without-sp": ({**TP, "sequence_parallel": False}, 3),
    "tp2-ep2-zero1": ({**TP, "expert_model_parallel_size": 2}, 1),
    "dp2-ep2-zero0": ({"expert_model_parallel_size": 2}, 0),
    "dp2-ep2-zero1": ({"expert_model_parallel_size": 2}, 1),
    "pp2-zero1": (PP, 1),
    "pp2-vpp2-zero1": ({**PP, "virtual_pipeline_model_parallel_size": 2}, 1),
}
MODELS: dict[str, dict[str, Any]] = {
    "fp32": PADDED,
    "bf16": PADDED,
    "gpt2": PADDED_GPT2,  # its output layer is tied to the embedding
    "qwen3": {**ARCHITECTURES["qwen3"], "variant": "low_rank"},
    "qwen3_moe": PADDED_MOE,
}
WRITERS = {
    "fp32": ("tp2-zero1",),
    "bf16": ("dp2-zero1", "dp2-zero3"),
    "gpt2": ("pp2-vpp2-zero1",),
    "qwen3": ("tp2-zero3-without-sp",),
    "qwen3_moe": ("dp2-ep2-zero1",),
}
READERS = {
    "fp32": ("tp2-zero1", "dp2-zero1-unpadded", "pp2-vpp2-zero1"),
    "bf16": ("dp2-zero1", "dp2-zero3", "tp2-zero1"),
    "gpt2": ("pp2-vpp2-zero1", "dp2-zero3"),
    "qwen3": ("tp2-zero3-without-sp", "pp2-zero1"),
    "qwen3_moe": ("dp2-ep2-zero1", "tp2-ep2-zero1", "dp2-zero3"),
}
FROM_EACH = {
    **{"fp32": "tp2-zero1", "bf16": "dp2-zero3", "gpt2": "pp2-vpp2-zero1"},
    **{"qwen3": "tp2-zero3-without-sp", "qwen3_moe": "dp2-ep2-zero1"},
}
"""The writer whose files every reader takes; those of the others only the same layout takes."""


def layout_config(name: str, kind: str, **model: Any) -> Config:
    parallel, stage = LAYOUTS[name]
    training = {"dtype": "bf16" if kind == "bf16" else "fp32", "train_steps": STEPS, "global_batch_size": 4}
    return tiny_config(
        {**MODELS[kind], **model}, parallel, training, deepspeed_section={"zero_optimization": {"stage": stage}}
    )


def train(config: Config, load: Path | None = None, save: Path | None = None) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step, from the start or from files; a collective call."""
    context = initialize_parallel(config)
    engine = TrainEngine(config, build_model_chunks(config), context)
    zero, weights, measured = engine.zero, local_weights(engine), []
    if load:
        fill(shared_reader(load), zero, weights, SAVED_AT)
        engine.restore_schedule(SAVED_AT)
    for step in range(SAVED_AT if load else 0, STEPS):
        batches = micro_batches(config, context.dp_rank, context.world_size, step)
        loss = engine.forward_backward(batches, config.training.global_batch_size * config.training.seq_length)
        measured.append((loss, engine.update()[0]))
        if save and step + 1 == SAVED_AT:
            assert zero.steps == SAVED_AT
            write(save, collect(zero, weights), dist.new_group(backend="gloo"))
    assert largest_padding(engine) == 0.0
    engine.close()
    context.heartbeat.close()
    fresh_world()
    return measured


Plan = dict[tuple[str, str], tuple[str, ...]]
"""By kind of model and writer, the layouts that read its files."""
SOON: Plan = {
    (kind, writer): READERS[kind] if writer == FROM_EACH[kind] else (writer,)
    for kind, writers in WRITERS.items()
    for writer in writers
}
MORE_READERS = {
    "fp32": ("dp2-zero0", "dp2-zero1", "dp2-zero2", "dp2-zero3", "tp2-zero3-without-sp", "pp2-zero1"),
    "bf16": ("dp2-zero0",),
    "gpt2": ("tp2-zero1",),
    "qwen3_moe": ("dp2-ep2-zero0", "tp2-zero1", "pp2-zero1"),
}
MORE_WRITERS = {
    "fp32": ("dp2-zero0", "dp2-zero3", "pp2-vpp2-zero1"),
    "gpt2": ("tp2-zero3-without-sp",),
    "qwen3_moe": ("tp2-ep2-zero1", "dp2-zero3", "dp2-ep2-zero0"),
}
RARE: Plan = {(kind, FROM_EACH[kind]): readers for kind, readers in MORE_READERS.items()}
RARE |= {(kind, writer): (writer,) for kind, writers in MORE_WRITERS.items() for writer in writers}


def through_files(folder: str, plan: Plan) -> dict[tuple[str, str, str], tuple[Any, Any]]:
    """By kind of model, writer and reader: what the writer measured after saving, and what the reader measured."""
    found = {}
    for (kind, writer), readers in plan.items():
        saved = Path(folder, f"{kind}-{writer}")
        whole = train(layout_config(writer, kind), save=saved)
        for reader in readers:
            found[kind, writer, reader] = whole[SAVED_AT:], train(layout_config(reader, kind), load=saved)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="module")
def runs(folder: str) -> dict[tuple[str, str, str], tuple[Any, Any]]:
    return run_distributed(through_files, 2, folder, SOON)[0]


@pytest.mark.parametrize("kind", WRITERS)
def test_the_same_layout_goes_on_bit_for_bit(runs: Any, kind: str) -> None:
    for writer in WRITERS[kind]:
        whole, resumed = runs[kind, writer, writer]
        assert resumed == whole, writer


@pytest.mark.parametrize(
    ("kind", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-2), ("gpt2", 1e-5), ("qwen3", 1e-5), ("qwen3_moe", 1e-5)]
)
def test_any_other_layout_goes_on_to_rounding(runs: Any, kind: str, tolerance: float) -> None:
    for reader in READERS[kind]:
        whole, resumed = runs[kind, FROM_EACH[kind], reader]
        for step, other in zip(whole, resumed, strict=True):
            assert other == pytest.approx(step, rel=tolerance), reader


@pytest.mark.long
def test_more_layouts_go_on_to_rounding(tmp_path: Path) -> None:
    found = run_distributed(through_files, 2, str(tmp_path), RARE)[0]
    for (kind, writer, reader), (whole, resumed) in found.items():
        assert writer != reader or resumed == whole, (kind, writer)
        for step, other in zip(whole, resumed, strict=True):
            assert other == pytest.approx(step, rel=2e-2 if kind == "bf16" else 1e-5), kind


def through_files_of_four(folder: str) -> list[Any]:
    """Of experts over two of four replicas: after saving, resumed there, and with experts over all four."""
    spread, saved = layout_config("dp2-ep2-zero1", "qwen3_moe"), Path(folder, "four")
    spread = dataclasses.replace(spread, training=dataclasses.replace(spread.training, global_batch_size=8))
    whole = train(spread, save=saved)[SAVED_AT:]
    over_all = dataclasses.replace(spread, parallel=dataclasses.replace(spread.parallel, expert_model_parallel_size=4))
    return [whole, train(spread, load=saved), train(over_all, load=saved)]


def test_copies_of_experts_are_written_once_and_read_by_all(tmp_path: Path) -> None:
    whole, resumed, over_all = run_distributed(through_files_of_four, 4, str(tmp_path))[0]
    assert resumed == whole
    for step, other in zip(whole, over_all, strict=True):
        assert other == pytest.approx(step, rel=1e-5)


def test_every_value_is_written_once_and_nothing_needs_unpickling(runs: Any, folder: str) -> None:
    saved = Path(folder, "fp32-tp2-zero1")
    assert {path.suffix for path in saved.iterdir()} == {".safetensors"}
    elements: dict[str, int] = {}
    for path in saved.iterdir():
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                elements[name] = elements.get(name, 0) + file.get_tensor(name).numel()
    names = {name.partition(".")[2] for name in elements}
    assert set(elements) == {f"{kind}.{name}" for kind in KINDS for name in names}
    model = layout_config("dp2-zero0", "fp32").model
    assert elements["master.lm_head.weight"] == model.vocab_size * model.hidden_size
    assert elements["exp_avg.model.norm.weight"] == model.hidden_size
    assert elements["master.model.layers.1.mlp.up_proj.b.weight"] == 125 * 30


def load_another_model(folder: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        train(layout_config("dp2-zero0", "fp32", num_layers=5), load=Path(folder, "fp32-tp2-zero1"))
    fresh_world()
    return str(caught.value)


def test_files_of_another_model_are_refused(runs: Any, folder: str) -> None:
    (message,) = run_distributed(load_another_model, 1, folder)
    assert "does not fit this model" in message
    assert "model.layers.4." in message
