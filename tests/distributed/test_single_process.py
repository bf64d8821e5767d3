"""Megatron-Core's CR-Net against the reference with the same weights, in one process: logits, loss, gradients."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from itertools import product
from typing import Any

import pytest
import torch

from megatron_crnet.config.architectures import ARCHITECTURES
from megatron_crnet.config.model_size import total_parameters
from megatron_crnet.config.schema import DataConfig, RecomputeConfig
from megatron_crnet.data.documents import DOCUMENT_LENGTHS
from megatron_crnet.distributed.process_groups import ParallelContext, initialize_parallel, shutdown_parallel
from megatron_crnet.engine.engine import TrainEngine
from megatron_crnet.engine.state_kinds import KINDS
from megatron_crnet.model.gpt import build_model_chunks
from megatron_crnet.model.reference import ReferenceCRNet
from megatron_crnet.model.weights import Weight, canonical_weights, load_canonical
from megatron_crnet.planning.counters import LiveMemory
from tests.distributed.engines import run_step
from tests.helpers import EOD, PADDED, make_batch, random_tokens, relative_error, tiny_config

PER_POSITION = {"q": [3, 4, 5, 6], "k": 4, "v": 4, "o": 6, "gate": 7, "up": 7, "down": [9, 8, 7, 6]}
MODELS: dict[str, dict[str, Any]] = {
    "crnet": {},
    "full_rank": {"variant": "full_rank"},
    "low_rank": {"variant": "low_rank"},
    "cola": {"variant": "cola"},
    "cola_only_lr_act": {"variant": "cola", "only_lr_act": True},
    "relora": {"variant": "relora"},
    "padded_relora": {**PADDED, "variant": "relora", "rank": 31, "full_rank_layers": [1]},
    "grouped_query": {"num_query_groups": 2},
    "multi_query_cola": {"variant": "cola", "num_query_groups": 1},
    "ranks_by_layer": {"rank": [2, 4, 6, 8]},
    "ranks_by_position": {"rank": PER_POSITION},
    "two_chains": {"full_rank_layers": [0, 2]},
    "first_layer_low_rank": {"full_rank_layers": []},
    "wide": {"hidden_size": 64, "ffn_hidden_size": 43, "num_attention_heads": 2, "rank": 1},
    "padded": PADDED,
    "padded_cola": {**PADDED, "variant": "cola"},
    "padded_cola_only_lr_act": {**PADDED, "variant": "cola", "only_lr_act": True},
    "small_beta": {"beta_init": 0.0},
    "scaled_rope": {"rope_scaling_factor": 8.0, "rotary_base": 10**5, "hidden_size": 64},
}


@pytest.fixture(scope="module", autouse=True)
def groups() -> Any:
    yield initialize_parallel(tiny_config())
    shutdown_parallel()


def frozen(weight: Weight) -> bool:
    return not weight.parameter.requires_grad


@pytest.mark.parametrize("name", MODELS)
def test_logits_loss_and_every_gradient_equal_the_reference(name: str) -> None:
    compare_with_reference(MODELS[name])


def test_heads_are_normed_without_rotary_embedding_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    normed = dataclasses.replace(ARCHITECTURES["gpt2"], has_qk_norm=True)
    monkeypatch.setitem(ARCHITECTURES, "gpt2", normed)
    compare_with_reference({"architecture": "gpt2", "max_position_embeddings": 16})


def compare_with_reference(changes: dict[str, Any]) -> None:
    config = tiny_config(model=changes)
    (model,) = build_model_chunks(config)
    torch.manual_seed(1)
    reference = ReferenceCRNet(config.model)
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.2) if parameter.dim() else parameter.data.add_(0.1 * torch.randn(()))
    load_canonical(model, reference.state_dict())
    if changes == MODELS["small_beta"]:
        for group in (model.decoder.layers[1].linear["o"], model.decoder.layers[2].linear["qkv"]):
            torch.nn.init.zeros_(group.beta)
        values = {w.name: w.local().detach().clone() for w in canonical_weights(model)}
        reference.load_state_dict(values)
        assert any(v.item() < 0 for n, v in values.items() if n.endswith("beta"))
    reference.double()
    tokens, labels = random_tokens(config)
    batch = make_batch(tokens, labels)
    with torch.no_grad():
        logits = model(tokens, batch["position_ids"], None)
        torch.testing.assert_close(logits.double(), reference(tokens), rtol=1e-5, atol=1e-5)
    loss = model.token_losses(batch).mean()
    plain = reference.loss(tokens, labels)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    loss.backward()
    plain.backward()
    wanted = {n: p.grad for n, p in reference.named_parameters()}
    weights = {w.name: w for w in canonical_weights(model)}
    assert set(weights) == set(wanted)
    assert sum(w.local().numel() for w in weights.values()) == sum(p.numel() for p in reference.parameters())
    if not model.config.table.padding():
        assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in reference.parameters())
    assert {n for n, grad in wanted.items() if grad is None} == {n for n, w in weights.items() if frozen(w)}
    pairs = ((n, w.local(w.parameter.grad), wanted[n], wanted[n]) for n, w in weights.items() if not frozen(w))
    assert relative_error(pairs) < 1e-5


# of losses and of gradients; fp32 adds up the latter over twenty documents in another order, which fp64 (but for the
# loss, which is fp32 in any case) shows to be all
BOUNDS_OF_DOCUMENTS = {"fp64": (1e-6, 1e-6), "fp32": (1e-6, 3e-6), "bf16": (2e-2, 2e-2)}
WITHIN_DOCUMENTS = {"reset_attention_mask": True, "reset_position_ids": True, "eod_mask_loss": True}


@pytest.mark.fault("documents")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*(("crnet", dtype) for dtype in BOUNDS_OF_DOCUMENTS), *product(("low_rank", "cola", "grouped_query"), ["fp32"])],
)
def test_documents_of_packed_samples_learn_as_if_each_were_alone(name: str, dtype: str) -> None:
    """Losses of every token, and the summed gradients; without their ends, which only a packed sample has to mask."""
    within = DataConfig(**WITHIN_DOCUMENTS)
    config = tiny_config(
        model=MODELS[name], training={"dtype": "bf16" if dtype == "bf16" else "fp32", "seq_length": 48}
    )
    (model,) = build_model_chunks(config)
    if dtype == "fp64":
        model.double()
    of_losses, of_gradients = BOUNDS_OF_DOCUMENTS[dtype]
    tokens, labels = (x[:3] for x in random_tokens(dataclasses.replace(config, data=within)))
    packed = make_batch(tokens, labels, (tokens != EOD).float(), within)
    losses = model.token_losses(packed)
    (losses.float() * packed["loss_mask"]).sum().backward()
    weights = list(canonical_weights(model))
    together = {w.name: w.local(w.parameter.grad.clone()) for w in weights}
    summed = {w.name: torch.zeros_like(together[w.name], dtype=torch.float64) for w in weights}
    lengths, start = packed[DOCUMENT_LENGTHS].tolist(), 0
    assert len(lengths) > 20
    for length in lengths:
        part = slice(start, start + length)
        document, label = (x.flatten()[None, part] for x in (tokens, labels))
        alone = model.token_losses(make_batch(document, label))
        torch.testing.assert_close(losses.flatten()[part], alone[0], rtol=of_losses, atol=of_losses)
        model.zero_grad()
        (alone.float() * (document != EOD)).sum().backward()
        for weight in weights:
            summed[weight.name] += weight.local(weight.parameter.grad)
        start += length
    assert start == tokens.numel()
    error = relative_error((name, together[name], total, total) for name, total in summed.items())
    assert error < of_gradients


@pytest.mark.fault("documents")
@pytest.mark.parametrize("strategy", ["none", "replay", "inverse", "full"])
def test_documents_are_kept_once_for_all_layers(strategy: str) -> None:
    """A pass leaves one pair of rotations more than one over whole rows, whatever the number of layers.

    Without recomputation a layer also holds attention's output joined, beside the documents' own.
    """
    extra = []
    for layers in (4, 8):
        config = tiny_config(model={"num_layers": layers}, data=WITHIN_DOCUMENTS)
        recompute = RecomputeConfig(strategy=strategy, segment_length="auto" if strategy == "none" else 2)
        (model,) = build_model_chunks(dataclasses.replace(config, recompute=recompute))
        if strategy == "inverse":
            even = {layer: torch.ones(7) for layer in range(layers)}
            model.decoder.plan_inverse_segments(even, even)
        tokens, labels = (x[:4] for x in random_tokens(config))
        kept = []
        for data in (None, config.data):
            batch = make_batch(tokens, labels, data=data)
            gc.collect()
            with LiveMemory() as memory:
                losses = model.token_losses(batch)
                kept.append(memory.current)
            losses.sum().backward()
        extra.append(kept[1] - kept[0])
    print(extra)
    rotations, joined = 2 * 4 * 4 * 16 * 8, 4 * 4 * 16 * 32
    of_a_layer = joined if strategy == "none" else 0
    assert extra[0] - 4 * of_a_layer < 1.2 * rotations
    assert extra[1] - extra[0] - 4 * of_a_layer < 0.1 * rotations


def test_the_stacked_b_matrices_are_one_parameter_where_shapes_allow() -> None:
    (model,) = build_model_chunks(tiny_config())
    assert model.decoder.layers[1].linear["qkv"].b0.shape == (3, 32, 8)
    (grouped,) = build_model_chunks(tiny_config(model={"num_query_groups": 2}))
    qkv = grouped.decoder.layers[1].linear["qkv"]
    assert (qkv.b0.shape, qkv.b1.shape) == ((1, 32, 8), (2, 16, 8))


def test_beta_is_fp32_in_a_bf16_model() -> None:
    (model,) = build_model_chunks(tiny_config(training={"dtype": "bf16"}))
    group = model.decoder.layers[1].linear["qkv"]
    assert (group.a.dtype, group.beta.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_model_is_handed_on_whole_and_let_go_of_with_its_engine(stage: int, groups: ParallelContext) -> None:
    """Rank changes and ReLoRA's warm start build another in the same process, beside which it would fill a GPU."""
    config = tiny_config(training={"global_batch_size": 2}, deepspeed_section={"zero_optimization": {"stage": stage}})
    engine = TrainEngine(config, build_model_chunks(config), groups)
    for step in range(2):  # in the second, ZeRO-3 has its order of modules
        run_step(engine, step)
        engine.update()
    held = sum(x.numel() * x.element_size() for kinds in engine.states(KINDS).values() for x in kinds.values())
    assert held == 12 * total_parameters(config.model)  # on the host, as estimates say
    model = weakref.ref(engine.chunks[0])
    engine.close()
    del engine
    gc.collect()
    assert model() is None
