"""The model file that travels with exports: against the reference, cached against uncached, batches against rows."""

from __future__ import annotations

import ast
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_crnet.config.architectures import ARCHITECTURES as TRAINED
from megatron_crnet.config.megatron import build_transformer_config
from megatron_crnet.hf import configuration_crnet, layer_crnet, linear_crnet, modeling_crnet, tokenization_crnet
from megatron_crnet.hf.export_config import hugging_face_fields
from megatron_crnet.hf.modeling_crnet import CRNetConfig, CRNetForCausalLM
from megatron_crnet.model.reference import ReferenceCRNet
from megatron_crnet.model.weights import initial_value
from tests.helpers import positions_within, tiny_config
from tests.unit.export_helpers import EXPORTED

PER_POSITION = {"q": [3, 4, 5, 6], "k": 4, "v": 4, "o": 6, "gate": 7, "up": 7, "down": [9, 8, 7, 6]}
MODELS: dict[str, dict[str, Any]] = {
    "crnet": {},
    "full_rank": {"variant": "full_rank"},
    "low_rank": {"variant": "low_rank"},
    "cola": {"variant": "cola"},
    "cola_only_lr_act": {"variant": "cola", "only_lr_act": True},
    "grouped_query": {"num_query_groups": 2},
    "multi_query_cola": {"variant": "cola", "num_query_groups": 1},
    "ranks_by_layer": {"rank": [2, 4, 6, 8]},
    "ranks_by_position": {"rank": PER_POSITION},
    "two_chains": {"full_rank_layers": [0, 2]},
    "first_layer_low_rank": {"full_rank_layers": []},
    "other_constants": {"rotary_base": 500, "layernorm_epsilon": 1e-3, "cross_layer_epsilon": 1e-2},
    **EXPORTED,
    "gpt2_full_rank_untied": {**EXPORTED["gpt2"], "variant": "full_rank", "tie_word_embeddings": False},
    "gpt2_cola": {**EXPORTED["gpt2"], "variant": "cola"},
    "gpt2_low_rank": {**EXPORTED["gpt2"], "variant": "low_rank", "kv_channels": 5, "num_query_groups": 2},
    "qwen3_full_rank": {**EXPORTED["qwen3"], "variant": "full_rank"},
    "qwen3_cola": {**EXPORTED["qwen3"], "variant": "cola", "tie_word_embeddings": False},
    "qwen3_moe_full_rank": {**EXPORTED["qwen3_moe"], "variant": "full_rank", "moe_router_pre_softmax": True},
    "qwen3_moe_full_rank_experts": {
        **EXPORTED["qwen3_moe"],
        "full_rank_experts": True,
        "rank": dict.fromkeys("qkvo", 5),
    },
    "qwen3_moe_cola": {**EXPORTED["qwen3_moe"], "variant": "cola", "only_lr_act": True},
}


def pair(changes: dict[str, Any]) -> tuple[CRNetForCausalLM, ReferenceCRNet]:
    """The model and the reference with the same weights, among them a beta of zero and a negative one."""
    config = tiny_config(model=changes)
    torch.manual_seed(1)
    reference = ReferenceCRNet(config.model)
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.2) if parameter.dim() else parameter.data.add_(0.1 * torch.randn(()))
    betas = [parameter for name, parameter in reference.named_parameters() if name.endswith("beta")]
    for beta, value in zip(betas, (0.0, -0.7), strict=False):
        beta.data.fill_(value)
    model = CRNetForCausalLM(CRNetConfig(**hugging_face_fields(config)))
    found = model.load_state_dict(reference.state_dict(), strict=False)
    assert found.missing_keys == (["lm_head.weight"] if reference.ties_head else [])
    assert not found.unexpected_keys
    return model.eval(), reference


def tokens(rows: int = 3, length: int = 12) -> torch.Tensor:
    return torch.randint(64, (rows, length), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_every_gradient_equal_the_reference(name: str) -> None:
    model, reference = pair(MODELS[name])
    model.double(), reference.double()
    ids = tokens()
    logits, plain = model(ids).logits, reference(ids)
    torch.testing.assert_close(logits, plain, rtol=1e-10, atol=1e-10)
    cotangent = torch.randn(logits.shape, dtype=torch.float64)
    logits.backward(cotangent)
    plain.backward(cotangent)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, rtol=1e-6, atol=1e-9)


def test_labels_give_the_loss_of_the_labels_that_count() -> None:
    model, reference = pair({})
    ids = tokens()
    assert model(ids, labels=ids).loss.item() == pytest.approx(reference.loss(ids[:, :-1], ids[:, 1:]).item(), rel=1e-6)
    some = ids.masked_fill(torch.arange(12) > 6, -100)
    first = reference.loss(ids[:, :6], ids[:, 1:7])
    assert model(ids, labels=some).loss.item() == pytest.approx(first.item(), rel=1e-6)


def test_fp32_logits_differ_from_the_reference_by_rounding_alone() -> None:
    model, reference = pair({})
    for kind in ("sdpa", "eager"):
        model.set_attn_implementation(kind)
        torch.testing.assert_close(model(tokens()).logits, reference(tokens()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["crnet", "full_rank", "cola", "grouped_query", "two_chains", *EXPORTED])
def test_decoding_with_the_cache_gives_the_logits_of_the_whole(name: str) -> None:
    model, _ = pair(MODELS[name])
    ids = tokens()
    whole = model(ids, use_cache=False).logits
    first = model(ids[:, :5], use_cache=True)
    found, cache = [first.logits], first.past_key_values
    for step in range(5, ids.shape[1]):
        out = model(ids[:, step : step + 1], past_key_values=cache)
        found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, dim=1), whole, rtol=1e-5, atol=1e-5)
    assert cache.get_seq_length() == ids.shape[1]


@pytest.mark.parametrize("name", ["crnet", *EXPORTED])
def test_a_row_padded_on_the_left_is_the_row_alone(name: str) -> None:
    model, _ = pair(MODELS[name])
    ids = tokens(1, 7)
    padded = torch.cat((torch.zeros(1, 5, dtype=torch.int64), ids), dim=1)
    other = tokens(1, 12)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, :5] = 0
    batch = model(torch.cat((padded, other)), attention_mask=mask).logits
    torch.testing.assert_close(batch[0, 5:], model(ids).logits[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(batch[1], model(other).logits[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["crnet", "full_rank", "grouped_query", *EXPORTED])
def test_generate_batches_caches_and_repeats(name: str) -> None:
    model, _ = pair(MODELS[name])
    ids = tokens(2, 4)
    ids[0, :2] = 0
    mask = (torch.arange(4) >= torch.tensor([[2], [0]])).long()
    how: dict[str, Any] = {"max_new_tokens": 10, "pad_token_id": 0}
    together = model.generate(ids, attention_mask=mask, do_sample=False, **how)
    assert torch.equal(together, model.generate(ids, attention_mask=mask, do_sample=False, use_cache=False, **how))
    alone = model.generate(ids[:1, 2:], do_sample=False, **how)
    assert torch.equal(together[0, 4:], alone[0, 2:])
    sampled = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        sampled.append(model.generate(ids, attention_mask=mask, do_sample=True, top_k=0, **how))
    assert torch.equal(sampled[0], sampled[1])
    assert not torch.equal(sampled[0], sampled[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_beta_keeps_every_bit_whatever_the_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    model, _ = pair({})
    name = "model.layers.2.mlp.up_proj.beta"
    exact = model.get_parameter(name).detach().clone()
    assert exact != exact.to(dtype).float()
    model.save_pretrained(tmp_path)
    loaded = CRNetForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for low in (loaded, model.to(dtype)):
        beta = low.get_parameter(name)
        assert (beta.dtype, beta.item()) == (torch.float32, exact.item())
        assert low.lm_head.weight.dtype == low(tokens()).logits.dtype == dtype


def test_the_configuration_comes_back_from_its_file(tmp_path: Path) -> None:
    config = CRNetConfig(**hugging_face_fields(tiny_config(model={"rank": PER_POSITION, "num_query_groups": 2})))
    config.save_pretrained(tmp_path)
    again = CRNetConfig.from_pretrained(tmp_path)
    assert hugging_face_fields(tiny_config(model={"rank": PER_POSITION, "num_query_groups": 2})).items() <= (
        again.to_dict().items()
    )
    assert [again.rank_of(layer, "down") for layer in range(4)] == [0, 8, 7, 6]


@pytest.mark.parametrize(("name", "scaled"), [("crnet", False), ("crnet", True), ("gpt2", True), ("qwen3", False)])
def test_initial_values_are_drawn_as_the_trainer_draws_them(name: str, scaled: bool) -> None:
    config = tiny_config(
        model={
            **MODELS[name],
            **{"hidden_size": 128, "ffn_hidden_size": 192, "kv_channels": 16, "rank": 32, "vocab_size": 256},
            "scale_residual_init": scaled,
        }
    )
    model = CRNetForCausalLM(CRNetConfig(**hugging_face_fields(config)))
    for name, value in model.state_dict().items():
        trainers = initial_value(name, tuple(value.shape), build_transformer_config(config), 1)
        if value.dim() < 2:
            assert torch.equal(value, trainers), name
        else:
            assert value.std().item() == pytest.approx(trainers.std().item(), rel=0.1), name


def test_hidden_states_and_kept_logits() -> None:
    model, _ = pair({})
    found = model(tokens(), output_hidden_states=True, logits_to_keep=2)
    assert len(found.hidden_states) == 5
    assert torch.equal(found.logits, model.lm_head(found.hidden_states[-1][:, -2:]))
    embedded = model(inputs_embeds=model.model.embed_tokens(tokens())).logits
    assert torch.equal(embedded, model(tokens()).logits)


def test_the_files_that_travel_import_nothing_of_this_package() -> None:
    for module, allowed in (
        (configuration_crnet, {"__future__", "dataclasses", "typing", "transformers"}),
        (layer_crnet, {"__future__", "collections", "typing", "torch", "transformers"}),
        (linear_crnet, {"__future__", "collections", "typing", "torch"}),
        (modeling_crnet, {"__future__", "collections", "typing", "torch", "transformers"}),
        (tokenization_crnet, {"__future__", "itertools", "re", "typing", "transformers"}),
    ):
        tree = ast.parse(Path(str(module.__file__)).read_text())
        names = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
        parts = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        names |= {str(node.module) for node in parts if not node.level}
        assert {name.partition(".")[0] for name in names} <= allowed
        # beside it in every export
        assert {str(node.module) for node in parts if node.level} <= {
            "configuration_crnet",
            "layer_crnet",
            "linear_crnet",
        }


def test_the_traits_that_travel_are_those_that_are_trained() -> None:
    for name, traits in configuration_crnet.ARCHITECTURES.items():
        for field in fields(traits):
            trained = getattr(
                TRAINED[name], {"positions": "maps", "has_experts": "experts"}.get(field.name, field.name)
            )
            if field.name == "positions":
                trained = tuple(position.name for position in trained)
            if field.name == "has_experts":
                trained = trained is not None
            assert getattr(traits, field.name) == trained, (name, field.name)


@pytest.mark.fault("documents")
# transformers' eager attention takes its softmax in fp32
@pytest.mark.parametrize(("implementation", "tolerance"), [("eager", 1e-6), ("sdpa", 1e-9)])
@pytest.mark.parametrize("name", ["crnet", "full_rank", "low_rank", "cola", "grouped_query", *EXPORTED])
def test_positions_that_start_anew_keep_documents_apart(name: str, implementation: str, tolerance: float) -> None:
    model, reference = pair(MODELS[name])
    model.double(), reference.double()
    model.set_attn_implementation(implementation)
    ids, lengths = tokens(), torch.tensor([12, 1, 1, 4, 6, 3, 9])
    documents = torch.arange(len(lengths)).repeat_interleave(lengths).view_as(ids)
    positions = positions_within(lengths).view_as(ids)
    logits = model(ids, position_ids=positions, use_cache=False).logits
    plain = reference(ids, documents, positions)
    torch.testing.assert_close(logits, plain, rtol=tolerance, atol=tolerance)
    for one in (logits, plain):
        torch.nn.functional.cross_entropy(one.flatten(0, 1), ids.roll(-1).flatten()).backward()
    wanted = dict(reference.named_parameters())
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[key].grad, rtol=tolerance, atol=tolerance)
