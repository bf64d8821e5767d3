"""Transformers' own classes as the judge of each architecture: their models in, equal logits, and back bit for bit."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_crnet.config.schema import DataConfig
from megatron_crnet.hf.configuration_crnet import ARCHITECTURES
from megatron_crnet.hf.export import from_hf, open_export, to_hf
from megatron_crnet.hf.generate import open_model
from megatron_crnet.hf.plain import FORMATS
from megatron_crnet.model.reference import ReferenceCRNet
from megatron_crnet.utils.errors import ConfigError, CrnetError
from tests.helpers import tiny_config
from tests.unit.data_helpers import train_small_tokenizer
from tests.unit.export_helpers import EXPORTED, PLAIN, random_weights, theirs, write_checkpoint

IDS = torch.randint(416, (2, 16), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return train_small_tokenizer(tmp_path_factory.mktemp("tokenizer"), 400)


def reference_of(folder: Path) -> ReferenceCRNet:
    config, source = open_export(folder)
    reference = ReferenceCRNet(config.model)
    reference.load_state_dict(source.read(source.shapes))
    return reference.requires_grad_(False)


def test_every_architecture_of_exports_has_a_class() -> None:
    assert FORMATS.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize("name", PLAIN)
def test_a_model_comes_in_with_its_logits_and_goes_back_bit_for_bit(name: str, tokenizer: str, tmp_path: Path) -> None:
    wanted = theirs(tmp_path / "theirs", name)(IDS).logits
    torch.testing.assert_close(reference_of(tmp_path / "theirs")(IDS), wanted, rtol=1e-5, atol=1e-5)
    checkpoint = from_hf(tmp_path / "theirs", tmp_path / "run" / "checkpoints", tokenizer)
    torch.testing.assert_close(open_model(checkpoint).model(IDS).logits, wanted, rtol=1e-5, atol=1e-5)
    to_hf(checkpoint, tmp_path / "back", plain=True)
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("theirs", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(again).__name__ == FORMATS[PLAIN[name][0]].model_class
    assert torch.equal(again(IDS).logits, wanted)
    first, second = (AutoConfig.from_pretrained(tmp_path / folder).to_dict() for folder in ("theirs", "back"))
    told = {key for key in FORMATS[PLAIN[name][0]].fields if first.get(key) is not None}
    assert {key: second[key] for key in told} == {key: first[key] for key in told}
    assert first.get("rope_parameters") == second.get("rope_parameters")
    assert {file.name for file in (tmp_path / "back").glob("*.py")} == {"tokenization_crnet.py"}
    to_hf(checkpoint, tmp_path / "back", plain=True, overwrite=True)


Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def change_weights(folder: Path, change: Change) -> None:
    file = folder / "model.safetensors"
    save_file({name: value.contiguous() for name, value in change(load_file(file)).items()}, file)


def change_fields(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_gpt2s_own_files_lack_the_prefix_and_hold_buffers(tokenizer: str, tmp_path: Path) -> None:
    wanted = theirs(tmp_path, "gpt2")(IDS).logits
    change_weights(
        tmp_path,
        lambda weights: {
            **{name.removeprefix("transformer."): value for name, value in weights.items()},
            "h.0.attn.bias": torch.ones(1, 1, 16, 16).tril(),
            "h.0.attn.masked_bias": torch.tensor(-1e4),
        },
    )
    change_fields(tmp_path, n_ctx=16, activation_function="gelu_new", task_specific_params={})
    torch.testing.assert_close(open_model(tmp_path, tokenizer=tokenizer).model(IDS).logits, wanted)


def test_a_copy_of_a_tied_output_layer_may_be_in_the_files(tokenizer: str, tmp_path: Path) -> None:
    wanted = theirs(tmp_path, "qwen3, tied")(IDS).logits
    change_weights(tmp_path, lambda w: {**w, "lm_head.weight": w["model.embed_tokens.weight"].clone()})
    torch.testing.assert_close(open_model(tmp_path, tokenizer=tokenizer).model(IDS).logits, wanted)


C_ATTN = "transformer.h.1.attn.c_attn.weight"
WRONG: dict[str, tuple[str, Change | dict[str, Any], str]] = {
    "missing": ("gpt2", lambda w: {n: v for n, v in w.items() if n != C_ATTN}, f"lacks the weight {C_ATTN}, which the"),
    "extra": ("qwen3", lambda w: {**w, "model.layers.0.self_attn.q_proj.bias": torch.ones(48)}, "q_proj.bias, which"),
    "shape": ("gpt2", lambda w: {**w, C_ATTN: w[C_ATTN].T}, f"{C_ATTN} in the shape (96, 32), but the model needs"),
    "not finite": ("gpt2", lambda w: {**w, C_ATTN: w[C_ATTN] * torch.inf}, "not finite"),
    "head of its own": ("gpt2", lambda w: {**w, "lm_head.weight": torch.ones(416, 32)}, "with other values: set tie"),
    "architecture": ("llama", {"model_type": "qwen3"}, "lacks the weight model.layers.0.self_attn.q_norm.weight"),
    "activation": ("gpt2", {"activation_function": "relu"}, "activation_function is 'relu', but a gpt2 has 'gelu_new'"),
    "scale": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
    "cross": ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
    "dropout": ("gpt2", {"embd_pdrop": 0.2}, "embd_pdrop is 0.2, but another field 0.1, and both are model.hidden"),
    "dropout of 1": ("gpt2", {"attn_pdrop": 1.5}, "model.attention_dropout is 1.5"),
    "dense layers": ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers is [0]"),
    "experts": ("qwen3_moe", {"num_local_experts": 4}, "mlp.gate.weight in the shape (5, 32)"),
    "biases": ("qwen3", {"attention_bias": True}, "attention_bias is True, but a qwen3 has False here"),
    "window": ("qwen3", {"use_sliding_window": True, "sliding_window": 8}, "sliding_window is 8"),
    "layers": ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is ['full_attention'"),
    "rope": ("qwen3", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}}, "rope_type is 'ya"),
    "scaling": ("qwen3", {"rope_parameters": None, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "'linear'"),
    "type": ("qwen3", {"hidden_size": "32"}, "hidden_size"),
    "epsilon": ("llama", {"rms_norm_eps": math.nan}, "model.layernorm_epsilon is .nan"),
    "one expert": ("qwen3_moe", {"num_experts_per_tok": 1}, "num_experts_per_tok is 1, whose normalised weight is 1"),
    "quantized": ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config is"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_a_model_is_one_line_and_writes_nothing(case: str, tokenizer: str, tmp_path: Path) -> None:
    name, change, message = WRONG[case]
    theirs(tmp_path / "theirs", name)
    change_weights(tmp_path / "theirs", change) if callable(change) else change_fields(tmp_path / "theirs", **change)
    with pytest.raises(CrnetError) as caught:
        from_hf(tmp_path / "theirs", tmp_path / "new" / "run", tokenizer)
    assert message in str(caught.value)
    assert (caught.value.exit_status, "\n" in str(caught.value)) == (2, False)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_a_larger_tokenizer_than_the_models_is_refused(tmp_path: Path) -> None:
    larger = train_small_tokenizer(tmp_path, 500)
    theirs(tmp_path / "theirs", "llama")
    with pytest.raises(ConfigError, match=r"ids up to 499: give the tokenizer that the model was trained with \(--tok"):
        from_hf(tmp_path / "theirs", tmp_path / "new", larger)


def checkpoint_of(folder: Path, tokenizer: str, **model: Any) -> Path:
    config = tiny_config(model={"vocab_size": 416, **model})
    config = dataclasses.replace(config, data=DataConfig(tokenizer_model=tokenizer))
    return write_checkpoint(folder / "step_00000001", random_weights(config), config)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3_moe"])
def test_relora_goes_out_merged(architecture: str, tokenizer: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, tokenizer, variant="relora", **EXPORTED.get(architecture, {}))
    to_hf(checkpoint, tmp_path / "out", plain=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(model(IDS).logits, open_model(checkpoint).model(IDS).logits, rtol=1e-5, atol=1e-5)


NOT_PLAIN: dict[str, tuple[dict[str, Any], str]] = {
    "variant": ({}, "model.variant is crnet, but a LlamaForCausalLM holds full-rank weights: leave out --plain"),
    "groups": (
        {"variant": "full_rank", "architecture": "gpt2", "max_position_embeddings": 16, "num_query_groups": 2},
        "model.num_query_groups is 2, but 4 in every GPT2LMHeadModel of these sizes: leave out --plain",
    ),
    "heads": (
        {"variant": "full_rank", "architecture": "gpt2", "max_position_embeddings": 16, "kv_channels": 6},
        "model.kv_channels is 6, but 8 in every GPT2LMHeadModel of these sizes: leave out --plain",
    ),
}


@pytest.mark.parametrize("case", NOT_PLAIN)
def test_what_transformers_has_no_class_for_is_refused(case: str, tokenizer: str, tmp_path: Path) -> None:
    model, message = NOT_PLAIN[case]
    checkpoint = checkpoint_of(tmp_path, tokenizer, **model)
    with pytest.raises(ConfigError) as caught:
        to_hf(checkpoint, tmp_path / "out", plain=True)
    assert str(caught.value) == message
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_a_model_of_others_is_not_overwritten(tokenizer: str, tmp_path: Path) -> None:
    theirs(tmp_path / "theirs", "llama")
    checkpoint = checkpoint_of(tmp_path, tokenizer, variant="full_rank")
    with pytest.raises(CrnetError, match="is not an export, so --overwrite does not replace it"):
        to_hf(checkpoint, tmp_path / "theirs", plain=True, overwrite=True)
