"""An export against Megatron-Core's model, and checkpoints of several layouts through an export and back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_crnet.checkpoint.manager import Checkpointer, TrainingState
from megatron_crnet.checkpoint.weight_files import CheckpointWeights
from megatron_crnet.cli.main import main
from megatron_crnet.config.positions import NEEDS_TEXT
from megatron_crnet.config.schema import CheckpointConfig, Config, DataConfig
from megatron_crnet.distributed.process_groups import initialize_parallel, shutdown_parallel
from megatron_crnet.engine.engine import TrainEngine
from megatron_crnet.hf.export import from_hf, to_hf
from megatron_crnet.hf.export_config import hugging_face_fields
from megatron_crnet.hf.generate import open_model
from megatron_crnet.hf.modeling_crnet import CRNetConfig, CRNetForCausalLM
from megatron_crnet.model.gpt import build_model_chunks
from megatron_crnet.model.weights import canonical_weights, load_canonical
from tests.distributed.spawn import fresh_world, run_distributed
from tests.helpers import PADDED, micro_batches, random_mask, random_tokens, tiny_config
from tests.unit.data_helpers import train_small_tokenizer
from tests.unit.export_helpers import EXPORTED, random_weights, write_checkpoint

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"parallel": {"tensor_model_parallel_size": 2}, "stage": 1, "model": PADDED},
    "pp2": {"parallel": {"pipeline_model_parallel_size": 2}, "stage": 1, "model": PADDED},
    "zero3": {"parallel": {}, "stage": 3, "model": PADDED},
}
MODELS: dict[str, dict[str, Any]] = {
    "crnet": {"rank": {"q": [3, 4, 5, 6], "k": 4, "v": 4, "o": 6, "gate": 7, "up": 7, "down": [9, 8, 7, 6]}},
    "full_rank": {"variant": "full_rank"},
    "low_rank": {"variant": "low_rank"},
    "cola": {"variant": "cola"},
    "grouped_query": {"num_query_groups": 2, "full_rank_layers": [0, 2]},
    **EXPORTED,
}
SIZES = {"vocab_size": 400}
EXPERTS = {**EXPORTED["qwen3_moe"], "rank": 7}
SPREAD = {"ep2": {"parallel": {"expert_model_parallel_size": 2}, "stage": 1}}
IMPORTED = "imported"
STARTS: dict[str, tuple[str, dict[str, Any], dict[str, dict[str, Any]]]] = {
    IMPORTED: ("back", PADDED, LAYOUTS),
    "converted": ("converted", PADDED, LAYOUTS),
    "adapted": ("adapted", {**PADDED, "variant": "relora"}, LAYOUTS),
    "converted_experts": ("experts", EXPERTS, SPREAD),
}
"""What checkpoints of step 0 are in, where what they give is saved, its model, and the layouts that it is given to."""


def layout_config(
    folder: str, tokenizer: str, parallel: dict[str, Any], stage: int, model: dict[str, Any] | None = None
) -> Config:
    section = {"zero_optimization": {"stage": stage}}
    config = tiny_config({**SIZES, **(model or {})}, parallel, {"train_steps": 4}, None, section)
    return dataclasses.replace(
        config, checkpoint=CheckpointConfig(dir=folder), data=DataConfig(tokenizer_model=tokenizer)
    )


def save_trained(config: Config, steps: int = 2) -> None:
    """Train and save, as any layout."""
    context = initialize_parallel(config)
    engine = TrainEngine(config, build_model_chunks(config), context)
    for step in range(steps):
        _step(config, engine, context, step)
        engine.update()
    _finish(engine, context, Checkpointer(config, engine), steps)


def first_loss(config: Config, checkpoint: Path) -> float:
    """Load, compute the loss of one global batch, and save again without an update."""
    context = initialize_parallel(config)
    engine = TrainEngine(config, build_model_chunks(config), context)
    checkpointer = Checkpointer(config, engine)
    state = checkpointer.load(checkpoint)
    assert (state, checkpointer.zero.steps) == (TrainingState(), 0)
    loss = _step(config, engine, context, 9)
    _finish(engine, context, checkpointer, 1)
    return loss


def _step(config: Config, engine: TrainEngine, context: Any, step: int) -> float:
    batches = micro_batches(config, context.dp_rank, context.world_size, step)
    return engine.forward_backward(batches, int(random_mask(config, step).sum()))


def _finish(engine: TrainEngine, context: Any, checkpointer: Checkpointer, step: int) -> None:
    checkpointer.save(TrainingState(step))
    checkpointer.wait()
    engine.close()
    context.heartbeat.close()
    fresh_world()


def out_and_back(folder: str, tokenizer: str) -> dict[str, dict[str, float]]:
    """Train and save in every layout, export one, and load its import into every layout: the losses.

    The same with what a dense model was turned into.
    """
    for name, layout in LAYOUTS.items():
        save_trained(layout_config(f"{folder}/{name}", tokenizer, **layout))
    if dist.get_rank() == 0:
        to_hf(Path(folder, "tp2", "step_00000002"), Path(folder, "hf-tp2"))
        from_hf(Path(folder, "hf-tp2"), Path(folder, "imported"))
    dist.barrier()
    return {
        start: {
            name: first_loss(
                layout_config(f"{folder}/{back}-{name}", tokenizer, **{**layout, "model": model}),
                Path(folder, start, "step_00000000"),
            )
            for name, layout in layouts.items()
        }
        for start, (back, model, layouts) in STARTS.items()
    }


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return train_small_tokenizer(tmp_path_factory.mktemp("tokenizer"), SIZES["vocab_size"])


def convert_dense(folder: Path, tokenizer: str, start: str) -> None:
    """A dense model of random weights, and what it becomes, of uneven widths and ranks."""
    target = layout_config("no_folder", tokenizer, {}, 0, STARTS[start][1])
    model = dataclasses.replace(target.model, variant="full_rank", rank=8)
    dense = dataclasses.replace(target, model=dataclasses.replace(model, max_position_embeddings=16))
    (folder / "text.txt").write_text("def read(path):\n    return open(path)\n" * 100)
    checkpoint = write_checkpoint(folder / f"dense_{start}" / "step_00000001", random_weights(dense), dense)
    words = [f"--model.rank={json.dumps(target.model.rank)}", f"--model.variant={target.model.variant}"]
    text = [f"--text={folder / 'text.txt'}"] if NEEDS_TEXT[target.model.variant] else []
    assert main(["init", str(checkpoint), str(folder / start), *words, *text]) == 0


def masters(checkpoint: Path) -> dict[str, Tensor]:
    source = CheckpointWeights(checkpoint)
    return source.checked(source.shapes, lambda _, tensor: tensor)


def test_every_layouts_checkpoint_is_exported_and_comes_back_into_every_layout(tmp_path: Path, tokenizer: str) -> None:
    for start in STARTS.keys() - {IMPORTED}:
        convert_dense(tmp_path, tokenizer, start)
    losses = run_distributed(out_and_back, 2, str(tmp_path), tokenizer)[0]
    exported = open_model(tmp_path / "hf-tp2").model.state_dict()
    assert exported["model.layers.1.mlp.up_proj.b.weight"].shape == (125, 30)
    for name in ("pp2", "zero3"):  # the same training, to rounding
        to_hf(tmp_path / name / "step_00000002", tmp_path / f"hf-{name}")
        other = open_model(tmp_path / f"hf-{name}").model.state_dict()
        torch.testing.assert_close(dict(other), dict(exported), rtol=1e-4, atol=1e-5)
    (tokens, labels), mask = (
        of(layout_config("no_folder", "no_tokenizer", {}, 0), 9) for of in (random_tokens, random_mask)
    )
    for start, (_, _, layouts) in STARTS.items():
        logits = open_model(tmp_path / start).model(tokens).logits
        each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        wanted = float((each * mask.flatten()).sum() / mask.sum())
        assert losses[start] == pytest.approx(dict.fromkeys(layouts, wanted), rel=1e-6)
    for name in LAYOUTS:
        again = masters(tmp_path / f"back-{name}" / "step_00000001")
        assert set(again) == set(exported)
        assert all(torch.equal(value, exported[weight]) for weight, value in again.items()), name


@pytest.fixture
def groups() -> Iterator[None]:
    initialize_parallel(tiny_config()).heartbeat.close()
    yield
    shutdown_parallel()


@pytest.mark.parametrize("name", MODELS)
def test_the_exports_logits_are_the_trainers(name: str, groups: None, tokenizer: str, tmp_path: Path) -> None:
    config = layout_config(str(tmp_path), tokenizer, {}, 0, MODELS[name])
    (model,) = build_model_chunks(config)
    torch.manual_seed(4)
    values = {
        weight.name: torch.randn(weight.shape) * 0.2 if weight.shape else torch.rand(()) - 0.5
        for weight in canonical_weights(model)
    }
    load_canonical(model, values)
    tokens, _ = random_tokens(config)
    with torch.no_grad():
        logits = model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)
    fields = hugging_face_fields(config)
    exported = CRNetForCausalLM(CRNetConfig(**fields)).eval()
    found = exported.load_state_dict(values, strict=False)
    assert (found.unexpected_keys, {*found.missing_keys} - {"lm_head.weight"}) == ([], set())
    vocabulary = config.model.vocab_size
    torch.testing.assert_close(exported(tokens).logits, logits[..., :vocabulary], rtol=1e-5, atol=1e-5)
    assert not logits[..., vocabulary:].any(), "padding"
