"""What a user of transformers does with a LLaMA does the same on an export, or is refused by name."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    StaticCache,
    Trainer,
    TrainingArguments,
)

from megatron_crnet.hf.configuration_crnet import VARIANTS
from megatron_crnet.hf.modeling_crnet import CRNetConfig, CRNetForCausalLM, CRNetForSequenceClassification
from megatron_crnet.planning.counters import LiveMemory
from tests.unit.export_helpers import SHAPE, SHAPES, twin_of, write_export


def make(variant: str = "crnet", model: type = CRNetForCausalLM, **changes: Any) -> Any:
    torch.manual_seed(1)
    config = CRNetConfig(**{**SHAPE, "variant": variant, "rank": 8, "pad_token_id": 0, **changes})
    made = model(config).eval()
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    return made


def tokens(rows: int = 2, length: int = 12) -> Tensor:
    return torch.randint(1, 64, (rows, length), generator=torch.Generator().manual_seed(2))


def parts(value: Any, path: str = "") -> dict[str, Any]:
    """What an output holds, by its place in it."""
    if hasattr(value, "keys"):
        value = dict(value)
        return {name: one for key in value for name, one in parts(value[key], f"{path}.{key}").items()}
    if isinstance(value, tuple | list):
        return {name: one for i, item in enumerate(value) for name, one in parts(item, f"{path}.{i}").items()}
    return {path: value if isinstance(value, Tensor) else type(value).__name__}


def assert_same_parts(one: Any, other: Any, values: bool = True) -> None:
    found, wanted = parts(one), parts(other)
    assert list(found) == list(wanted)
    for path, value in wanted.items():
        if values and isinstance(value, Tensor):
            torch.testing.assert_close(found[path], value, rtol=1e-4, atol=1e-5, msg=lambda m, p=path: f"{p}: {m}")
        else:
            assert getattr(found[path], "shape", found[path]) == getattr(value, "shape", value), path


KINDS = [*((variant, "llama") for variant in VARIANTS), ("crnet", "gpt2"), ("crnet", "qwen3")]
IDS, LABELS = tokens(), tokens().masked_fill(torch.arange(12) > 7, -100)
LEFT = (torch.arange(12) >= torch.tensor([[4], [0]])).long()
CAUSAL = torch.ones(12, 12).tril().bool()[None, None].expand(2, 1, 12, 12)
GREEDY = {"max_new_tokens": 6, "do_sample": False}


def with_eager(use: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def run(model: Any) -> Any:
        model.set_attn_implementation("eager")
        return use(model)

    return run


def with_config(**fields: Any) -> Callable[[Any], Any]:
    def run(model: Any) -> Any:
        for name, value in fields.items():
            setattr(model.config, name, value)
        return model(IDS)

    return run


def with_static_cache(model: Any) -> Any:
    cache = StaticCache(config=model.config, max_cache_len=16)
    first = model(IDS[:, :8], past_key_values=cache).logits
    return first, model(IDS[:, 8:], past_key_values=cache, position_ids=torch.arange(8, 12)[None]).logits


def after_resizing(model: Any) -> Any:
    torch.manual_seed(4)
    model.resize_token_embeddings(70)
    return model.config.vocab_size, model(IDS + 6, labels=IDS + 6)


USES: dict[str, Callable[[Any], Any]] = {
    "tuple": lambda m: m(IDS, return_dict=False),
    "tuple of the base": lambda m: m.base_model(IDS, return_dict=False),
    "hidden states": lambda m: m(IDS, output_hidden_states=True),
    "hidden states by config": with_config(output_hidden_states=True),
    "not after all": lambda m: (setattr(m.config, "output_hidden_states", True), m(IDS, output_hidden_states=False)),
    "attentions": with_eager(lambda m: m(IDS, output_attentions=True)),
    "attentions of padding": with_eager(lambda m: m(IDS, attention_mask=LEFT, output_attentions=True)),
    "attentions in generate": with_eager(
        lambda m: m.generate(
            IDS, output_attentions=True, output_hidden_states=True, return_dict_in_generate=True, **GREEDY
        )
    ),
    "labels": lambda m: m(IDS, labels=LABELS),
    "items in batch": lambda m: m(IDS, labels=LABELS, num_items_in_batch=torch.tensor(5)).loss,
    "shifted labels": lambda m: m(IDS, labels=LABELS, shift_labels=LABELS).loss,
    "last logits": lambda m: m(IDS, logits_to_keep=2).logits,
    "some logits": lambda m: m(IDS, logits_to_keep=torch.tensor([0, 5])).logits,
    "2D mask": lambda m: m(IDS, attention_mask=LEFT).logits[LEFT.bool()],
    "4D mask": lambda m: m(IDS, attention_mask=CAUSAL & LEFT.bool()[:, None, None]).logits[LEFT.bool()],
    "not causal": lambda m: m(IDS, is_causal=False).logits,
    "positions": lambda m: m(IDS, position_ids=torch.arange(5, 17)[None]).logits,
    "packed positions": lambda m: m(IDS, position_ids=(torch.arange(12) % 5)[None].expand(2, -1)).logits,
    "embeddings": lambda m: m(inputs_embeds=m.get_input_embeddings()(IDS)).logits,
    "generate from embeddings": lambda m: m.generate(inputs_embeds=m.get_input_embeddings()(IDS), **GREEDY),
    "left padding": lambda m: m.generate(IDS, attention_mask=LEFT, **GREEDY),
    "beams": lambda m: m.generate(IDS, num_beams=3, num_return_sequences=2, **GREEDY),
    "static cache": with_static_cache,
    "static cache in generate": lambda m: m.generate(IDS, cache_implementation="static", **GREEDY),
    "no cache": lambda m: (m(IDS, use_cache=False), m.train()(IDS).keys()),
    "contrast": lambda m: m.generate(IDS[:1], prompt_lookup_num_tokens=2, **GREEDY),
    "sampled": lambda m: (torch.manual_seed(3), m.generate(IDS, max_new_tokens=6, do_sample=True, top_k=5))[1],
    "scores": lambda m: m.generate(IDS, output_scores=True, return_dict_in_generate=True, **GREEDY).scores,
    "resized": lambda m: after_resizing(m)[0],
    "pickled": lambda m: pickle.loads(pickle.dumps(m))(IDS).logits,
    "copied": lambda m: copy.deepcopy(m)(IDS).logits,
}


MOST = ("attentions", "labels", "some logits", "packed positions", "embeddings", "left padding", "beams", "resized")
"""Uses in which other architectures go ways of their own."""


@pytest.mark.fault("D12")
@pytest.mark.parametrize(
    ("architecture", "name"),
    [*(("llama", name) for name in USES), *((other, name) for other in ("gpt2", "qwen3") for name in MOST)],
)
def test_it_gives_what_transformers_own_model_gives(architecture: str, name: str) -> None:
    model = make("full_rank", **SHAPES[architecture])
    twin = twin_of(model)
    assert_same_parts(USES[name](model), USES[name](twin))


@pytest.mark.fault("D12")
@pytest.mark.parametrize("name", ["tuple", "hidden states by config", "attentions", "shifted labels"])
def test_layers_that_hand_their_outputs_on_give_the_same_parts(name: str) -> None:
    assert_same_parts(USES[name](make()), USES[name](twin_of(make("full_rank"))), values=False)


@pytest.mark.fault("D12")
def test_a_tuple_by_configuration_is_a_tuple() -> None:
    model = make()
    model.config.return_dict = False
    logits, _ = model(IDS)
    assert torch.equal(logits, make()(IDS).logits)


@pytest.mark.fault("D12")
def test_attentions_of_a_fused_kernel_are_refused() -> None:
    model = make()
    for ask in (lambda: model(IDS, output_attentions=True), lambda: model.generate(IDS, output_attentions=True)):
        with pytest.raises(ValueError, match=r"output_attentions needs eager attention, but this model has sdpa"):
            ask()
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    assert len(model(IDS).attentions) == 4
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="needs eager attention"):
        model(IDS)


@pytest.mark.fault("D12")
def test_the_former_name_of_an_argument_is_refused() -> None:
    with pytest.raises(TypeError, match="num_logits_to_keep is called logits_to_keep"):
        make()(IDS, num_logits_to_keep=1)


FOREIGN: dict[str, dict[str, Any]] = {
    "rope_type 'linear'": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "rope_type 'yarn'": {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}},
    "hidden_act is 'gelu'": {"hidden_act": "gelu"},
    "attention_bias": {"attention_bias": True},
    "attention_dropout": {"attention_dropout": 0.1},
    "mlp_bias": {"mlp_bias": True},
    "head_dim is 7": {"head_dim": 7},
    "architecture is 'gpt3'": {"architecture": "gpt3"},
    "sliding_window": {"sliding_window": 8},
    "variant is 'llama'": {"variant": "llama"},
    "does not divide": {"num_key_value_heads": 3},
    "each of 4 layers": {"rank": [8, 8]},
    "rank names": {"rank": {"q": 8}},
    "positive integer": {"rank": 0},
}


@pytest.mark.fault("D12")
@pytest.mark.parametrize("message", FOREIGN)
def test_a_field_that_the_model_would_ignore_is_refused(message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        CRNetConfig(**{**SHAPE, **FOREIGN[message]})
    make().save_pretrained(tmp_path)
    with pytest.raises((ValueError, TypeError, OSError)):
        CRNetForCausalLM.from_pretrained(tmp_path, **FOREIGN[message])


@pytest.mark.fault("D12")
def test_fields_that_say_what_the_model_does_are_taken() -> None:
    same = {"hidden_act": "silu", "attention_bias": False, "head_dim": 8, "attention_dropout": 0.0}
    model = make(**same, rope_parameters={"rope_type": "default", "rope_theta": 77.0})
    assert torch.equal(model(IDS).logits, make(rope_theta=77.0)(IDS).logits)
    assert not torch.equal(model(IDS).logits, make()(IDS).logits)


@pytest.mark.fault("D12")
def test_quantized_and_sharded_loading_is_refused(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    for how in (
        {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
        {"load_in_8bit": True},
        {"tp_plan": "auto"},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(how))} is given, but CR-Net is loaded neither"):
            CRNetForCausalLM.from_pretrained(tmp_path, **how)
    with pytest.raises(ValueError, match=r"quantization_config is .*, which CR-Net does not have"):
        make(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})


@pytest.mark.fault("D12")
@pytest.mark.parametrize(("variant", "architecture"), KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_comes_back_bit_for_bit(variant: str, architecture: str, tied: bool, tmp_path: Path) -> None:
    model = make(variant, tie_word_embeddings=tied, **SHAPES[architecture])
    wanted = model(IDS).logits
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    again = CRNetForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    assert torch.equal(again(IDS).logits, wanted)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    low = CRNetForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
    assert (low.dtype, low.config._attn_implementation) == (torch.bfloat16, "eager")
    assert {p.dtype for n, p in low.named_parameters() if n.endswith("beta")} <= {torch.float32}


@pytest.mark.fault("4 gradient checkpointing")
@pytest.mark.parametrize(("variant", "architecture"), KINDS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_gradients_are_exact(variant: str, architecture: str, reentrant: bool) -> None:
    plain, saving = (make(variant, **SHAPES[architecture]).train() for _ in range(2))
    saving.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for model in (plain, saving):
        model(IDS, attention_mask=LEFT, labels=LABELS).loss.backward()
    for (name, one), other in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert one.grad is not None, name
        assert torch.equal(one.grad, other.grad), name
    saving.gradient_checkpointing_disable()
    assert not any(getattr(module, "gradient_checkpointing", False) for module in saving.modules())


@pytest.mark.fault("4 gradient checkpointing")
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_lowers_the_memory_of_a_step(reentrant: bool) -> None:
    peaks = {}
    for variant in ("crnet", "full_rank"):
        for checkpointed in (False, True):
            model = make(variant, num_hidden_layers=8).train()
            if checkpointed:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            ids = tokens(4, 64)
            with LiveMemory() as memory:
                kept = model(ids, labels=ids).loss
                peaks[variant, checkpointed] = memory.current
                kept.backward()
    assert peaks["full_rank", True] < 0.2 * peaks["full_rank", False]
    # the outputs that a layer hands on have to be kept
    assert peaks["crnet", True] < 0.5 * peaks["crnet", False]


@pytest.mark.fault("4 gradient checkpointing")
def test_checkpointing_frozen_weights_reaches_the_embeddings_hook() -> None:
    model = make().train().requires_grad_(False)
    model.model.layers[1].mlp.up_proj.b.weight.requires_grad_(True)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model(IDS, labels=IDS).loss.backward()
    plain = make().train()
    plain(IDS, labels=IDS).loss.backward()
    wanted = plain.model.layers[1].mlp.up_proj.b.weight.grad
    assert torch.equal(model.model.layers[1].mlp.up_proj.b.weight.grad, wanted)


def classifier(**changes: Any) -> CRNetForSequenceClassification:
    return make("crnet", CRNetForSequenceClassification, num_labels=3, **changes)


@pytest.mark.fault("4 sequence classification")
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_text_is_classified_by_its_last_token_on_whatever_side_the_padding_is(architecture: str) -> None:
    model = classifier(**SHAPES[architecture])
    alone = torch.cat([model(IDS[:1, :7]).logits, model(IDS[1:, :5]).logits])
    right, left = torch.zeros(2, 9, dtype=torch.int64), torch.zeros(2, 9, dtype=torch.int64)
    for row, length in enumerate((7, 5)):
        right[row, :length] = left[row, -length:] = IDS[row, :length]
    for padded in (right, left):
        found = model(padded, attention_mask=(padded != 0).long())
        torch.testing.assert_close(found.logits, alone, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no padding token"):
        classifier(pad_token_id=None)(IDS)
    assert classifier(pad_token_id=None)(IDS[:1]).logits.shape == (1, 3)


@pytest.mark.fault("4 sequence classification")
@pytest.mark.parametrize(
    ("problem", "labels"),
    [(None, torch.tensor([0, 2])), ("regression", torch.randn(2, 3)), ("multi_label_classification", torch.ones(2, 3))],
)
def test_a_classifier_trains_and_comes_back(problem: str | None, labels: Tensor, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "language model")
    model = CRNetForSequenceClassification.from_pretrained(
        tmp_path / "language model", num_labels=3, problem_type=problem, pad_token_id=0
    )
    assert torch.equal(model.model.embed_tokens.weight, make().model.embed_tokens.weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        loss = model(IDS, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path / "classifier")
    again = CRNetForSequenceClassification.from_pretrained(tmp_path / "classifier")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = tokens(8)[index]
        return {"input_ids": ids, "labels": ids}


@pytest.mark.fault("D12")
def test_transformers_trainer_trains_it(tmp_path: Path) -> None:
    model = make()
    before = copy.deepcopy(model.state_dict())
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Rows())
    trainer.train()
    assert all(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    again = CRNetForCausalLM.from_pretrained(tmp_path / "checkpoint-2").eval()
    assert torch.equal(again(IDS).logits, model.eval()(IDS).logits)


@pytest.mark.fault("4 sequence classification", "D12")
def test_the_auto_classes_open_an_export(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from transformers import dynamic_module_utils, pipeline

    export = write_export(tmp_path)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    config = AutoConfig.from_pretrained(export, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True, dtype="auto", device_map="auto")
    assert (type(config).__module__, type(model).__module__) != (CRNetConfig.__module__, CRNetForCausalLM.__module__)
    own = CRNetForCausalLM.from_pretrained(export)
    assert torch.equal(model(IDS).logits, own(IDS).logits)
    heads = AutoModelForSequenceClassification.from_pretrained(export, trust_remote_code=True, num_labels=5)
    assert heads(IDS).logits.shape == (2, 5)
    heads.save_pretrained(tmp_path / "classifier")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier", trust_remote_code=True)
    assert torch.equal(again(IDS).logits, heads(IDS).logits)
    write = pipeline("text-generation", model=str(export), trust_remote_code=True)
    assert write("import os", max_new_tokens=3, do_sample=False)[0]["generated_text"].startswith("import os")
