"""A dense model as low_rank and crnet: exact at full rank, as the fits say below it; one line for what cannot be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_crnet.analysis.fit import truncated_svd
from megatron_crnet.analysis.from_dense import Conversion, beta_of, compressed_ranks
from megatron_crnet.analysis.source import SourceModel, open_source
from megatron_crnet.checkpoint.directory import damage
from megatron_crnet.cli.main import main
from megatron_crnet.config.loading import load_config
from megatron_crnet.config.model_size import total_parameters
from megatron_crnet.config.positions import position_table
from megatron_crnet.hf.generate import open_model
from megatron_crnet.model.glue import signed_scale
from tests.unit.analysis.models import activations, changed, dense_checkpoint, random_rows, reference
from tests.unit.analysis.products import low_rank_error
from tests.unit.export_helpers import EXPORTED, PLAIN, SCALED, theirs

CPU = [torch.device("cpu")]


def smaller_sides(dense: SourceModel) -> dict[str, int]:
    """The ranks at which no map loses anything."""
    return {position: min(shape) for position, shape in dense.table.shapes.items()}


def converted(dense: SourceModel, rows: Tensor | None = None, **model: Any) -> tuple[Conversion, dict[str, Tensor]]:
    target = changed(dense.config, **{"variant": "crnet", "full_rank_layers": None, **model})
    conversion = Conversion(dense, target, rows, CPU, batch_size=2, damping=1e-4)
    return conversion, {name: value for portion in conversion.weights() for name, value in portion.items()}


@pytest.mark.parametrize(
    ("architecture", "variant", "text"),
    [
        *(("llama", variant, text) for variant, text in (("crnet", True), ("low_rank", True), ("low_rank", False))),
        *((other, "crnet", True) for other in EXPORTED),
        *(("qwen3_moe", "low_rank", text) for text in (True, False)),
    ],
)
def test_at_full_rank_the_model_is_the_dense_one(
    architecture: str, variant: str, text: bool, tokenizer: str, tmp_path: Path
) -> None:
    dense = open_source(dense_checkpoint(tmp_path, tokenizer, **EXPORTED.get(architecture, {})))
    ranks = smaller_sides(dense)
    conversion, weights = converted(dense, random_rows(40) if text else None, variant=variant, rank=ranks)
    tokens = random_rows(2)
    wanted = reference(dense.config, dense.read(""))(tokens)
    torch.testing.assert_close(reference(conversion.target, weights)(tokens), wanted, rtol=1e-4, atol=1e-4)


def test_full_rank_experts_are_those_of_the_dense_model(dense_moe: SourceModel) -> None:
    conversion, weights = converted(dense_moe, random_rows(40), rank=smaller_sides(dense_moe), full_rank_experts=True)
    assert {fit.position for fit in conversion.fits} == {*"qkvo"}
    kept = {name: value for name, value in dense_moe.read("").items() if ".experts." in name}
    assert len(kept) == 4 * 4 * 3
    assert all(torch.equal(weights[name], value) for name, value in kept.items())
    tokens = random_rows(2)
    wanted = reference(dense_moe.config, dense_moe.read(""))(tokens)
    torch.testing.assert_close(reference(conversion.target, weights)(tokens), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("source", "name", "others"),
    [
        ("dense", "model.layers.2.mlp.down_proj", ()),
        ("dense_moe", "model.layers.2.mlp.experts.3.down_proj", ("mlp.gate", "self_attn.q_norm")),
    ],
)
def test_low_rank_without_text_is_the_svd_of_each_weight(
    source: str, name: str, others: tuple[str, ...], request: pytest.FixtureRequest
) -> None:
    dense: SourceModel = request.getfixturevalue(source)
    conversion, weights = converted(dense, variant="low_rank", rank=5)
    a, b = truncated_svd(dense.read(f"{name}.weight")[""], 5)
    assert torch.equal(weights[f"{name}.a.weight"], a)
    assert torch.equal(weights[f"{name}.b.weight"], b)
    assert conversion.fits == []
    in_layer = (f"model.layers.1.{other}.weight" for other in ("input_layernorm", *others))
    for kept in ("model.embed_tokens.weight", "lm_head.weight", *in_layer):
        assert torch.equal(weights[kept], dense.read(kept)[""])


def test_experts_are_fitted_to_the_tokens_that_they_are_given(dense_moe: SourceModel) -> None:
    """Against SVDs of each expert's outputs, in the first layer, whose inputs are the dense model's."""
    rows, experts = random_rows(60), range(4)
    maps = activations(dense_moe, rows)[0]
    conversion, weights = converted(dense_moe, rows, variant="low_rank", rank=6)
    found = {fit.position: fit for fit in conversion.fits if fit.layer == 0}
    assert conversion.unfitted == 0
    for position in ("gate", "up", "down"):
        whole = sum(float(maps[f"{position} {e}"][1].square().sum()) for e in experts)
        least = sum(low_rank_error(maps[f"{position} {e}"][1], 6) for e in experts)
        left = 0.0
        for e in experts:
            x, y = maps[f"{position} {e}"]
            name = f"model.layers.0.mlp.experts.{e}.{position}_proj"
            a, b = (weights[f"{name}.{factor}.weight"].double() for factor in "ab")
            left += float((y - x @ a.T @ b.T).square().sum())
        assert (found[position].scale, found[position].fitted) == (None, 4)
        assert (left / whole) ** 0.5 == pytest.approx((least / whole) ** 0.5, rel=1e-3)
        assert found[position].error == found[position].plain_error == pytest.approx((least / whole) ** 0.5, rel=1e-2)


def test_an_expert_of_few_tokens_keeps_the_svd_of_its_weights(dense_moe: SourceModel) -> None:
    conversion, weights = converted(dense_moe, random_rows(1), rank=5)
    assert conversion.unfitted == 3 * 4 * 3
    assert [fit.position for fit in conversion.fits] == 3 * ["q", "k", "v", "o"]
    name = "model.layers.1.mlp.experts.2.up_proj"
    a, b = truncated_svd(dense_moe.read(f"{name}.weight")[""], 5)
    assert torch.equal(weights[f"{name}.a.weight"], a)
    assert torch.equal(weights[f"{name}.b.weight"], b)
    dense = "model.layers.0.mlp.experts.2.up_proj.weight"
    assert torch.equal(weights[dense], dense_moe.read(dense)[""])


def test_errors_are_those_of_the_converted_model(dense: SourceModel) -> None:
    """Each layer is run by hand: what it meets, what the dense layer would give, what the converted one gives."""
    rows = random_rows(30)
    conversion, weights = converted(dense, rows, rank=6, full_rank_layers=[0, 2])
    before, after = (reference(*one) for one in ((dense.config, dense.read("")), (conversion.target, weights)))
    hidden = after.model["embed_tokens"](rows)
    outputs: dict[str, Tensor] = {}
    errors = {(fit.layer, fit.position): fit.error for fit in conversion.fits}
    assert {layer for layer, _ in errors} == {1, 3}
    pairs = zip(before.model["layers"], after.model["layers"], strict=True)
    for index, (old, new) in enumerate(pairs):
        wanted = old(hidden, {})[1]
        previous = outputs
        hidden_before = hidden
        hidden, outputs = new(hidden, outputs)
        for position in "qkv" if index in (1, 3) else "":  # the others' inputs differ within the layer
            error = float((outputs[position] - wanted[position]).norm() / wanted[position].norm())
            assert errors[index, position] == pytest.approx(error, rel=1e-2)
        assert len(hidden_before) == 30
        assert (index == 0) == (not previous)


def test_a_fit_to_the_text_is_better_there_than_the_svd_of_weights(dense: SourceModel) -> None:
    rows = random_rows(60)
    tokens = random_rows(4)
    wanted = reference(dense.config, dense.read(""))(tokens)
    found = {}
    for name, text in (("svd", None), ("fit", rows)):
        conversion, weights = converted(dense, text, variant="low_rank", rank=8)
        found[name] = float((reference(conversion.target, weights)(tokens) - wanted).norm())
    assert found["fit"] < found["svd"]


def test_beta_gives_the_coefficient(dense: SourceModel) -> None:
    model = changed(dense.config, cross_layer_epsilon=1e-3).model
    for scale in (-1.5, -2e-3, 0.5):
        assert float(signed_scale(beta_of(scale, model), 1e-3)) == pytest.approx(scale)
    assert float(beta_of(1e-3, model)) == abs(float(beta_of(1e-4, model))) == 0.0


@pytest.mark.parametrize("source", ["dense", "dense_moe"])
def test_relora_starts_with_the_dense_weights_and_factors_of_no_effect(
    source: str, request: pytest.FixtureRequest
) -> None:
    dense: SourceModel = request.getfixturevalue(source)
    conversion, weights = converted(dense, variant="relora", rank=4, full_rank_layers=[2])
    before = dense.read("")
    assert all(torch.equal(weights.pop(name), value) for name, value in before.items())
    assert {name.rpartition(".a.")[0] for name in weights if ".a." in name} == {
        name.removesuffix(".weight") for name in before if "_proj" in name and ".layers.2." not in name
    }
    assert all(bool(value.any()) == (".a." in name) for name, value in weights.items())
    tokens, plain = random_rows(2), reference(dense.config, before)
    assert torch.equal(reference(conversion.target, {**before, **weights})(tokens), plain(tokens))


def test_ranks_of_a_compression_leave_that_share_of_the_parameters(dense: SourceModel) -> None:
    shapes = position_table(dense.config.model).shapes
    for factor in (1.5, 2.0, 4.0):
        for position, rank in compressed_ranks(dense.table, factor).items():
            h_in, h_out = shapes[position]
            assert rank * (h_in + h_out) <= h_in * h_out / factor < (rank + 1) * (h_in + h_out)


TEXT = "def read(path):\n    with open(path) as file:\n        return file.read()\n" * 40


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize("source", ["dense", "dense_moe"])
def test_the_command_writes_a_checkpoint(
    source: str, request: pytest.FixtureRequest, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense: SourceModel = request.getfixturevalue(source)
    folder = tmp_path / "run" / "checkpoints"
    assert main(["init", str(dense.path), str(folder), "--model.rank=[8, 4, 5, 6]", f"--text={text}"]) == 0
    printed = capsys.readouterr().out
    opened = open_model(folder)
    assert damage(folder / "step_00000000") is None
    parameters = total_parameters(opened.config.model)
    assert f"{parameters:,} parameters of {total_parameters(dense.config.model):,}" in printed
    assert printed.count("\n") == 2 + 3 * 7 + 1
    again = load_config(folder / "step_00000000" / "config.yaml")
    assert (again.checkpoint.dir, again.model) == (str(folder), opened.config.model)
    assert opened.config.model.variant == "crnet"
    assert opened.model.state_dict()["model.layers.1.self_attn.q_proj.a.weight"].shape == (4, 32)
    assert opened.tokenizer.unique_identifiers == dense.tokenizer.unique_identifiers
    assert main(["init", str(dense.path), str(folder), "--compression", "3", f"--text={text}"]) == 2
    assert "step_00000000, and a run continues from the newest" in capsys.readouterr().err


REFUSED: dict[str, tuple[list[str], str]] = {
    "rank above a side": (
        ["--model.rank", "17"],
        "model.rank is 17 for k of layer 1, but that linear map has 32 inputs and",
    ),
    "all layers": (["--model.full_rank_layers", "[0,1,2,3]", "--text", "TEXT"], "names all 4 layers, so that nothing"),
    "no text": ([], "variant crnet is fitted to outputs on calibration text"),
    "variant": (
        ["--model.variant", "cola"],
        "model.variant is cola, but a dense model becomes one of low_rank, crnet, relora",
    ),
    "shape": (["--model.hidden_size", "64"], "model.hidden_size is 64, but 32 in the dense model"),
    "warm start": (
        ["--model.variant", "relora", "--relora.restart_interval", "5", "--relora.warm_start_steps", "5"],
        "relora.warm_start_steps is 5, but the dense model is the warm start",
    ),
    "idle text": (["--model.variant", "relora", "--text", "TEXT"], "relora keeps the dense weights and fits nothing"),
    "both": (["--model.rank", "8", "--compression", "2", "--text", "TEXT"], "--compression and model.rank are both"),
    "compression": (["--compression", "1000"], "leaves no rank to q"),
    "below zero": (["--compression", "-1"], "init.compression is -1.0, but must be above 0"),
    "short text": (["--model.rank", "8", "--text", "SHORT"], "but a row of calibration has 16: give more text"),
    "long rows": (["--model.rank", "8", "--text", "TEXT", "--seq-length", "17"], "max_position_embeddings 16"),
    "no file": (["--model.rank", "8", "--text", "absent"], "absent is neither a file nor a folder"),
    "no tokens": (["--tokens", "0"], "calibration.tokens is 0, but must be above 0"),
    "layers": (["--model.full_rank_layers", "[9]", "--text", "TEXT"], "model.full_rank_layers holds 9"),
    "experts' rank": (
        ["--model.rank", json.dumps({**dict.fromkeys(("q", "k", "v", "o", "up", "down"), 8), "gate": 21})],
        "model.rank is 21 for gate of layer 1, but that linear map has 32 inputs and 20 outputs",
    ),
    "experts without text": (["--model.rank", "8"], "variant crnet is fitted to outputs on calibration text"),
    "more experts": (["--model.num_experts", "8"], "model.num_experts is 8, but 4 in the dense model"),
    "router": (["--model.moe_router_pre_softmax", "true"], "model.moe_router_pre_softmax is True, but False in the"),
}
MOE = ("expert", "router")
"""In the names of those for a model with experts."""


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_one_line_and_writes_nothing(
    name: str, dense: SourceModel, dense_moe: SourceModel, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = dense_moe if any(word in name for word in MOE) else dense
    (text.parent / "short.txt").write_text("x")
    options, message = REFUSED[name]
    words = {"TEXT": str(text), "SHORT": str(text.parent / "short.txt")}
    before = sorted(text.parent.rglob("*"))
    status = main(["init", str(source.path), str(text.parent / "new" / "run"), *(words.get(o, o) for o in options)])
    errors = capsys.readouterr().err
    assert (status, errors.count("\n")) == (2, 1), errors
    assert message in errors
    assert sorted(text.parent.rglob("*")) == before


def test_a_converted_model_is_not_converted_again(
    dense: SourceModel, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = text.parent / "run"
    assert main(["init", str(dense.path), str(folder), "--model.variant=low_rank"]) == 0
    assert main(["init", str(folder), str(text.parent / "again"), f"--text={text}"]) == 2
    assert "the model to convert is low_rank, but only full_rank ones" in capsys.readouterr().err


def with_tokenizer(folder: Path, name: str, dense: SourceModel, **changes: Any) -> Any:
    """A model of Transformers' own class, with the dense model's tokenizer."""
    model = theirs(folder, name, **changes)
    shutil.copyfile(str(dense.config.data.tokenizer_model), folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CRNetTokenizer"}))
    return model


@pytest.mark.parametrize("name", PLAIN)
def test_a_model_of_transformers_is_converted(name: str, dense: SourceModel, tmp_path: Path) -> None:
    model = with_tokenizer(tmp_path / "theirs", name, dense)
    wanted = model(random_rows(2)).logits
    ranks = json.dumps(smaller_sides(open_source(tmp_path / "theirs")))
    words = ["init", str(tmp_path / "theirs"), str(tmp_path / "low"), "--model.variant=low_rank"]
    assert main([*words, f"--model.rank={ranks}"]) == 0
    found = open_model(tmp_path / "low").model(random_rows(2)).logits
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_an_older_llama_is_read(dense: SourceModel, tmp_path: Path) -> None:
    """Without newer fields, and with a buffer among its weights."""
    model = with_tokenizer(tmp_path / "llama", "llama", dense, rope_theta=10000.0, num_key_value_heads=4)
    path = tmp_path / "llama" / "config.json"
    values = json.loads(path.read_text())
    for name in ("rope_parameters", "num_key_value_heads", "initializer_range", "head_dim"):
        del values[name]
    path.write_text(json.dumps(values))
    file = tmp_path / "llama" / "model.safetensors"
    weights = load_file(file)
    save_file({**weights, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, file)
    tokens = random_rows(2)
    torch.testing.assert_close(
        open_model(tmp_path / "llama").model(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4
    )
    for changes, message in (
        ({next(iter(weights)): None}, "lacks the weight"),
        ({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}, "which the model does not have"),
    ):
        save_file({name: value for name, value in {**weights, **changes}.items() if value is not None}, file)
        with pytest.raises(Exception, match=message) as caught:
            open_source(tmp_path / "llama")
        assert getattr(caught.value, "exit_status", 0) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "a model of type 'mistral'"),
        ({"attention_bias": True}, "attention_bias is True"),
        (
            {"rope_parameters": {**SCALED, "low_freq_factor": 2.0}},
            "says that low_freq_factor is 2.0, but it is 1.0 here",
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 8.0}},
            "rope_type is 'linear'",
        ),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ],
)
def test_a_llama_that_crnet_cannot_be_is_one_line(
    changes: dict[str, Any], message: str, dense: SourceModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_tokenizer(tmp_path / "llama", "llama", dense)
    capsys.readouterr()  # of transformers
    path = tmp_path / "llama" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    assert main(["init", str(tmp_path / "llama"), str(tmp_path / "new"), "--model.variant=low_rank"]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert message in errors
    assert not (tmp_path / "new").exists()
