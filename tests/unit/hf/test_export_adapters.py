"""LoRA by LLaMA's module names on the model that travels with exports: adapts whole maps, and merges exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
)
from torch import Tensor

from megatron_crnet.hf.configuration_crnet import VARIANTS
from megatron_crnet.hf.linear_crnet import CrossLayerLinear
from megatron_crnet.hf.modeling_crnet import CRNetConfig, CRNetForCausalLM, CRNetForSequenceClassification
from tests.unit.export_helpers import SHAPE, SHAPES

pytestmark = pytest.mark.fault("4: LoRA")

PROJECTIONS = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]


def make(variant: str = "crnet", **changes: Any) -> CRNetForCausalLM:
    torch.manual_seed(1)
    model = CRNetForCausalLM(CRNetConfig(**{**SHAPE, "variant": variant, "rank": 8, **changes})).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def lora(**changes: Any) -> LoraConfig:
    how: dict[str, Any] = {"r": 3, "lora_alpha": 6, "target_modules": PROJECTIONS, "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**how, **changes})


def tokens() -> Tensor:
    return torch.randint(64, (3, 12), generator=torch.Generator().manual_seed(2))


def train(model: Any, steps: int = 5) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("targets", [PROJECTIONS, "all-linear", ["q_proj", "v_proj"]], ids=["named", "all", "qv"])
def test_a_fresh_adapter_changes_nothing_and_trains_every_map(variant: str, targets: Any, tmp_path: Path) -> None:
    model = make(variant)
    before, base = model(tokens()).logits, {name: value.clone() for name, value in model.state_dict().items()}
    adapted = get_peft_model(model, lora(target_modules=targets))
    assert torch.equal(adapted(tokens()).logits, before)
    names = [name for name, _ in adapted.named_parameters() if "lora_A" in name]
    assert len(names) == (2 if len(targets) == 2 else 7) * 4
    assert not any(".a." in name or ".b." in name for name in names), "maps are adapted, not their factors"
    losses = train(adapted)
    assert losses[-1] < losses[0]
    gradients = [p.grad for name, p in adapted.named_parameters() if "lora_" in name]
    assert all(g is not None and g.abs().sum() > 0 for g in gradients)
    with adapted.disable_adapter():
        assert torch.equal(adapted(tokens()).logits, before)
    after = adapted(tokens()).logits
    assert (after - before).abs().max() > 1e-2
    adapted.save_pretrained(tmp_path)
    fresh = make(variant)
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    assert torch.equal(loaded(tokens()).logits, after)
    unloaded = loaded.unload()
    assert unloaded is fresh
    assert all(torch.equal(value, base[name]) for name, value in unloaded.state_dict().items())


@pytest.mark.parametrize(
    ("variant", "architecture"),
    [
        *(("crnet", "llama"), ("low_rank", "llama"), ("full_rank", "llama")),
        *(("crnet", "gpt2"), ("crnet", "qwen3"), ("crnet", "qwen3_moe")),
    ],
)
@pytest.mark.parametrize("targets", [PROJECTIONS, ["q_proj", "down_proj", "lm_head", "embed_tokens"]])
def test_a_merged_adapter_gives_the_same_logits_and_is_saved_as_a_wider_rank(
    variant: str, architecture: str, targets: list[str], tmp_path: Path
) -> None:
    adapted = get_peft_model(make(variant, **SHAPES[architecture]), lora(target_modules=targets, use_rslora=True))
    train(adapted)
    wanted = adapted.double()(tokens()).logits
    merged = adapted.merge_and_unload()
    assert type(merged) is CRNetForCausalLM
    assert not any("lora" in name for name, _ in merged.named_modules())
    torch.testing.assert_close(merged(tokens()).logits, wanted, rtol=1e-11, atol=1e-11)
    for layer in range(4):
        for name in ("q", "up"):
            full = variant == "full_rank" or layer == 0
            wide = 11 if f"{name}_proj" in targets else 8
            assert merged.config.rank_of(layer, name) == (0 if full else wide)
    merged.float().save_pretrained(tmp_path)
    again = CRNetForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(tokens()).logits, wanted.float(), rtol=1e-4, atol=1e-4)
    # and what was merged takes another adapter
    assert torch.equal(get_peft_model(again, lora())(tokens()).logits, again(tokens()).logits)


def test_experts_without_an_adapter_get_the_ranks_of_those_with_one(tmp_path: Path) -> None:
    """The configuration has one rank for all experts of a layer."""
    adapted = get_peft_model(make(**SHAPES["qwen3_moe"]), lora(target_modules=r".*layers\.2.*experts\.0\.up_proj"))
    train(adapted)
    wanted = adapted.double()(tokens()).logits
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(tokens()).logits, wanted, rtol=1e-11, atol=1e-11)
    merged.float().save_pretrained(tmp_path)
    again = CRNetForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(tokens()).logits, wanted.float(), rtol=1e-4, atol=1e-4)
    assert [again.config.rank_of(layer, "up") for layer in range(4)] == [0, 8, 11, 8]


def test_a_router_is_left_out_of_all_linear_maps() -> None:
    config = lora(target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(make(**SHAPES["qwen3_moe"]), config).double()
    assert not any("mlp.gate." in name for name, _ in adapted.named_parameters() if "lora_" in name)
    wanted = adapted(tokens()).logits
    torch.testing.assert_close(adapted.merge_and_unload()(tokens()).logits, wanted, rtol=1e-11, atol=1e-11)


def test_the_gradient_of_an_adapter_is_that_of_a_wider_map() -> None:
    adapted = get_peft_model(make(), lora(target_modules=["up_proj"])).double()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted(input_ids=tokens(), labels=tokens()).loss.backward()
    layer = "base_model.model.model.layers.2.mlp.up_proj"
    down, up = (adapted.get_parameter(f"{layer}.lora_{x}.default.weight").grad for x in "AB")
    wide = adapted.merge_and_unload().requires_grad_(True)
    wide(input_ids=tokens(), labels=tokens()).loss.backward()
    factors = wide.model.layers[2].mlp.up_proj
    torch.testing.assert_close(factors.a.weight.grad[8:], down)
    torch.testing.assert_close(2 * factors.b.weight.grad[:, 8:], up)  # lora_alpha / r


@pytest.mark.fault("4 gradient checkpointing")
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_gradients_of_an_adapter_are_exact(reentrant: bool) -> None:
    gradients = []
    for checkpointed in (False, True):
        adapted = get_peft_model(make(), lora()).train()
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(3))
        if checkpointed:
            adapted.gradient_checkpointing_enable({"use_reentrant": reentrant})
            adapted.enable_input_require_grads()
        adapted(input_ids=tokens(), labels=tokens()).loss.backward()
        gradients.append([p.grad for name, p in adapted.named_parameters() if "lora_" in name])
    assert len(gradients[0]) == 56
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.fault("4 sequence classification")
def test_an_adapted_classifier_merges() -> None:
    torch.manual_seed(1)
    model = CRNetForSequenceClassification(CRNetConfig(**SHAPE, rank=8, pad_token_id=0, num_labels=3)).eval()
    adapted = get_peft_model(model, lora(task_type="SEQ_CLS", target_modules="all-linear"))
    assert not any("score.lora" in name for name, _ in adapted.named_parameters())
    adapted(input_ids=tokens(), labels=torch.tensor([0, 1, 2])).loss.backward()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    wanted = adapted.double()(tokens()).logits
    torch.testing.assert_close(adapted.merge_and_unload()(tokens()).logits, wanted, rtol=1e-11, atol=1e-11)


def test_several_adapters_merge_by_name() -> None:
    adapted = get_peft_model(make(), lora())
    train(adapted)
    adapted.add_adapter("other", lora(r=2))
    adapted.set_adapter("other")
    train(adapted)
    wanted = adapted.double()(tokens()).logits
    merged = adapted.merge_and_unload(adapter_names=["other"])
    torch.testing.assert_close(merged(tokens()).logits, wanted, rtol=1e-11, atol=1e-11)
    assert merged.config.rank_of(1, "q") == 10


REFUSED: dict[str, tuple[str, Any]] = {
    "cola": ("cola", lora()),
    "bias": ("low_rank", lora(lora_bias=True)),
    "adalora": (
        "crnet",
        AdaLoraConfig(target_modules=["q_proj"], total_step=9, init_r=4, target_r=2, task_type="CAUSAL_LM"),
    ),
    "loha": ("crnet", LoHaConfig(target_modules=["q_proj"], r=2)),
    "ia3": ("crnet", IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_merged_is_refused_in_one_line_and_stays_as_it_is(name: str) -> None:
    variant, config = REFUSED[name]
    adapted = get_peft_model(make(variant, full_rank_layers=[]), config)
    train(adapted)
    before = adapted(tokens()).logits
    with pytest.raises(ValueError, match=r"cannot be merged into .*: keep it beside the model") as caught:
        adapted.merge_and_unload()
    assert "\n" not in str(caught.value)
    assert torch.equal(adapted(tokens()).logits, before)


def test_values_that_are_not_finite_are_not_merged() -> None:
    adapted = get_peft_model(make(), lora())
    adapted.get_parameter("base_model.model.model.layers.3.mlp.up_proj.lora_B.default.weight").data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers|3\.mlp\.up_proj \(its values are not finite"):
        adapted.merge_and_unload(safe_merge=True)


@pytest.mark.parametrize(
    "how", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}], ids=str
)
def test_what_needs_a_dense_matrix_says_that_there_is_none(how: dict[str, Any]) -> None:
    with pytest.raises((AttributeError, TypeError), match=r"no dense weight|NoDenseWeight"):
        get_peft_model(make(), lora(**how))


def test_merging_in_place_is_refused_and_nothing_computes_otherwise() -> None:
    adapted = get_peft_model(make(full_rank_layers=[]), lora())
    train(adapted)
    before = adapted(tokens()).logits
    with pytest.raises(AttributeError, match="adapters merge by merge_and_unload"):
        adapted.merge_adapter()
    assert torch.equal(adapted(tokens()).logits, before)


def test_a_map_has_no_matrix_to_read_or_replace() -> None:
    linear = make().model.layers[1].self_attn.q_proj
    assert isinstance(linear, CrossLayerLinear)
    assert (tuple(linear.weight.shape), linear.weight.dtype) == ((32, 32), torch.float32)
    for touch in (
        lambda: linear.weight.data,
        lambda: setattr(linear, "weight", torch.ones(32, 32)),
        lambda: setattr(linear, "weight", torch.nn.Parameter(torch.ones(32, 32))),
    ):
        with pytest.raises((AttributeError, KeyError), match=r"dense weight|already exists"):
            touch()


def test_prompt_tuning_trains() -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_layers=4, token_dim=32)
    losses = train(get_peft_model(make(), config))
    assert losses[-1] < losses[0]


def test_an_adapter_in_bf16_leaves_beta_in_fp32() -> None:
    adapted = get_peft_model(make().bfloat16(), lora())
    losses = train(adapted)
    assert losses[-1] < losses[0]
    betas = [p for name, p in adapted.named_parameters() if name.endswith("beta")]
    assert {beta.dtype for beta in betas} == {torch.float32}
    wanted = adapted(tokens()).logits.float()
    merged = adapted.merge_and_unload()
    assert merged.model.layers[1].self_attn.q_proj.a.weight.dtype == torch.bfloat16
    torch.testing.assert_close(merged(tokens()).logits.float(), wanted, rtol=0.1, atol=0.1)
