"""Exports that someone else has written or damaged: named in one line, nothing left behind, no code of theirs run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_crnet.checkpoint.weight_files import INDEX, WEIGHTS
from megatron_crnet.config.schema import DataConfig
from megatron_crnet.hf.export import CODE, from_hf, saved_config, to_hf
from megatron_crnet.hf.export_config import read_export_config
from megatron_crnet.hf.export_tokenizer import note_on_added_tokens
from megatron_crnet.hf.generate import open_model
from megatron_crnet.hf.modeling_crnet import CRNetForCausalLM
from megatron_crnet.hf.tokenization_crnet import CRNetTokenizer
from megatron_crnet.utils.errors import ConfigError, CrnetError, DataError
from tests.helpers import tiny_config
from tests.unit.data_helpers import train_small_tokenizer
from tests.unit.export_helpers import random_weights, write_checkpoint, write_export

pytestmark = pytest.mark.fault("F9")

UP = "model.layers.2.mlp.up_proj.b.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_export(tmp_path_factory.mktemp("original"))


@pytest.fixture
def export(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "export")
    return tmp_path / "export"


def replace_weight(export: Path, tensor: torch.Tensor) -> None:
    weights = load_file(export / WEIGHTS)
    save_file({**weights, UP: tensor}, export / WEIGHTS, metadata={"format": "pt"})


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def assert_refused(export: Path, message: str) -> None:
    """By the way back and by what opens a model, in one line, and no folder is left."""
    for use in (lambda: from_hf(export, export.parent / "back" / "checkpoints"), lambda: open_model(export)):
        with pytest.raises(CrnetError, match=message) as caught:
            use()
        assert caught.value.exit_status == 2
        assert "\n" not in str(caught.value)
    assert not (export.parent / "back").exists()


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.int64, torch.int8, torch.uint8, torch.complex64, torch.float8_e4m3fn], ids=str
)
def test_a_weight_that_is_not_a_float_is_named(dtype: torch.dtype, export: Path) -> None:
    replace_weight(export, torch.ones(48, 8).to(dtype))
    assert_refused(export, rf"holds {UP} as \w+, but weights are one of F64, F32, F16, BF16")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_other_floats_are_read_as_fp32(dtype: torch.dtype, export: Path) -> None:
    value = torch.randn(48, 8).to(dtype)
    replace_weight(export, value)
    back = from_hf(export, export.parent / "back")
    saved = load_file(back / "shard-00001-model-00001-of-00001.safetensors")
    assert torch.equal(saved[f"master.{UP}"], value.float())
    assert torch.equal(open_model(export).model.get_parameter(UP), value.float())


@pytest.mark.parametrize(
    ("value", "message"),
    [(1e39, "not finite as float32"), (1e-60, "only zeros in .* as float32"), (torch.nan, "not finite as float32")],
)
def test_values_that_fp32_cannot_hold_are_refused(value: float, message: str, export: Path) -> None:
    replace_weight(export, torch.full((48, 8), value, dtype=torch.float64))
    assert_refused(export, message)


def test_values_that_the_precision_of_an_export_cannot_hold_are_refused(tmp_path: Path) -> None:
    tokenizer = train_small_tokenizer(tmp_path, 400)
    config = dataclasses.replace(tiny_config(model={"vocab_size": 416}), data=DataConfig(tokenizer_model=tokenizer))
    weights = {**random_weights(config), UP: torch.full((48, 8), torch.finfo(torch.float32).max)}
    checkpoint = write_checkpoint(tmp_path / "step_00000001", weights, config)
    with pytest.raises(DataError, match=f"values in {UP} that are not finite as bfloat16"):
        to_hf(checkpoint, tmp_path / "made" / "out", dtype="bf16")
    with pytest.raises(DataError, match="not finite as bfloat16"):
        open_model(checkpoint, dtype="bf16")
    assert not (tmp_path / "made").exists()
    to_hf(checkpoint, tmp_path / "out")


def test_an_export_of_an_older_version_lacks_later_fields(export: Path) -> None:
    values = json.loads((export / "config.json").read_text())
    del values["only_lr_act"], values["scale_residual_init"]
    (export / "config.json").write_text(json.dumps(values))
    model = read_export_config(export).model
    assert (model.only_lr_act, model.scale_residual_init) == (False, False)


@pytest.mark.parametrize(
    ("field", "value", "ours"), [("beta_init", 1, "beta_init"), ("rope_theta", 10000.0, "rotary_base")]
)
def test_legal_json_is_taken(field: str, value: Any, ours: str, export: Path) -> None:
    change_json(export / "config.json", **{field: value})
    assert getattr(read_export_config(export).model, ours) == value
    assert getattr(saved_config(from_hf(export, export.parent / "back")).model, ours) == value


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_parameters": [1]},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        {"rope_parameters": {"rope_theta": None}},
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"head_dim": 7},
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        {"beta_init": "1"},
        {"beta_init": float("nan")},
        {"rope_theta": 1e400},
        {"rope_theta": 10000.5},
        {"hidden_size": True},
        {"max_position_embeddings": None},
        {"rank": {"q": 8}},
        {"variant": ["crnet"]},
    ],
    ids=str,
)
def test_what_a_configuration_must_not_say_is_named(changes: dict[str, Any], export: Path) -> None:
    change_json(export / "config.json", **changes)
    ours = {"rope_theta": "rotary_base|rope_theta", "rope_scaling": "rope", "head_dim": "kv_channels"}
    name = next(iter(changes))
    assert_refused(export, ours.get(name, name))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "5",
        '{"model_type": []}',
        '{"model_type": ' * 2000,
        '"' + "\\ud800" * 3,
        '{"model_type": 1' + "0" * 5000 + "}",
    ],
)
def test_a_damaged_configuration_is_named(text: str, export: Path) -> None:
    (export / "config.json").write_text(text)
    assert_refused(export, "config.json")


def sharded(export: Path) -> dict[str, str]:
    model = CRNetForCausalLM.from_pretrained(export)
    (export / WEIGHTS).unlink()
    model.save_pretrained(export, max_shard_size="60KB")
    weight_map: dict[str, str] = json.loads((export / INDEX).read_text())["weight_map"]
    return weight_map


def test_what_transformers_has_saved_comes_back(export: Path) -> None:
    before = load_file(export / WEIGHTS)
    assert len(set(sharded(export).values())) > 2
    back = from_hf(export, export.parent / "back")
    saved = load_file(back / "shard-00001-model-00001-of-00001.safetensors")
    assert all(torch.equal(saved[f"master.{name}"], value) for name, value in before.items())


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "folder/file.safetensors", "..", ".", ""])
def test_an_index_that_leads_out_of_the_folder_is_refused(name: str, export: Path) -> None:
    shutil.copyfile(export / WEIGHTS, export.parent / "outside.safetensors")
    named = {**sharded(export), UP: name}
    (export / INDEX).write_text(json.dumps({"weight_map": named}))
    assert_refused(export, "not a file of this folder")


@pytest.mark.parametrize("index", ["[]", '{"weight_map": 5}', '{"weight_map": {"a": 5}}', '{"weight_map": {"a": "b"}}'])
def test_a_damaged_index_is_named(index: str, export: Path) -> None:
    sharded(export)
    (export / INDEX).write_text(index)
    assert_refused(export, "no readable weights")


def test_a_weight_in_two_files_is_refused(export: Path) -> None:
    files = sorted(set(sharded(export).values()))
    save_file({**load_file(export / files[0]), **load_file(export / files[1])}, export / files[0])
    assert_refused(export, rf"stands in {files[0]} and in {files[1]}")


def test_linked_files_are_read_as_in_a_cache_of_the_hub(export: Path) -> None:
    blobs = export.parent / "blobs"
    blobs.mkdir()
    for file in list(export.iterdir()):
        file.rename(blobs / file.name)
        file.symlink_to(blobs / file.name)
    assert open_model(export).tokenizer.vocab_size == 400
    from_hf(export, export.parent / "back")


def test_missing_tokenizer_files_are_named(export: Path) -> None:
    moved = export.parent / "moved.model"
    (export / "tokenizer.model").rename(moved)
    assert_refused(export, r"has no tokenizer.model.* or give another tokenizer with --tokenizer")
    back = from_hf(export, export.parent / "back", str(moved))
    assert saved_config(back).data.tokenizer_model == str(moved)
    named = json.loads((back / "state.json").read_text())["trained_on"]
    assert named == {"tokenizer": hashlib.sha256(moved.read_bytes()).hexdigest(), "data": {}}
    shutil.rmtree(export.parent / "back")
    for name in ("tokenization_crnet.py", "tokenizer_config.json"):
        (export / name).unlink()
    assert_refused(export, "has no tokenizer: copy its files there")


def test_the_tokenizer_needs_no_code_beside_it(export: Path) -> None:
    (export / "tokenization_crnet.py").unlink()
    assert open_model(export).tokenizer.vocab_size == 400
    assert saved_config(from_hf(export, export.parent / "back")).data.tokenizer_type == "sentencepiece"


def test_tokens_that_the_sentencepiece_model_lacks_are_noted(export: Path) -> None:
    assert note_on_added_tokens(export) is None
    tokenizer = CRNetTokenizer.from_pretrained(export)
    tokenizer.add_tokens(["<call>", "<turn>"])
    tokenizer.save_pretrained(export)
    assert "2 tokens that were added" in str(note_on_added_tokens(export))
    assert any("2 tokens" in note for note in open_model(export).notes)


@pytest.mark.parametrize("added", [["x"], 5, {"x": {}}, None])
def test_damaged_added_tokens_are_named_before_anything_is_written(added: Any, export: Path) -> None:
    change_json(export / "tokenizer_config.json", added_tokens_decoder=added)
    assert_refused(export, "tokenizer_config.json is not readable")


def test_no_code_of_an_export_runs(export: Path) -> None:
    for name in (*CODE, "tokenization_crnet.py"):
        (export / name).write_text(f"open({str(export.parent / 'ran')!r}, 'w')\nraise SystemExit(9)\n")
    open_model(export)
    from_hf(export, export.parent / "back")
    assert not (export.parent / "ran").exists()


PLACES: dict[str, Callable[[Path], Path]] = {
    "below a file": lambda folder: folder / "file" / "out",
    "/proc": lambda _: Path("/proc/nobody/out"),
    "too long": lambda folder: folder / ("x" * 300),
    "a byte 0": lambda folder: folder / "a\0b",
    "a loop": lambda folder: folder / "loop" / "out",
}


@pytest.mark.parametrize("name", PLACES)
def test_a_place_that_cannot_be_written_is_refused(name: str, original: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    place, before = PLACES[name](tmp_path), sorted(tmp_path.iterdir())
    for write in (
        lambda: to_hf(original.parent / "step_00000001", place),
        lambda: to_hf(original.parent / "step_00000001", place, overwrite=True),
        lambda: from_hf(original, place),
    ):
        with pytest.raises(CrnetError) as caught:
            write()
        assert caught.value.exit_status == 2
        assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_a_linked_target_stays_a_link(original: Path, tmp_path: Path) -> None:
    shutil.copytree(original, tmp_path / "real")
    (tmp_path / "real" / "stale").write_text("")
    (tmp_path / "link").symlink_to("real")
    to_hf(original.parent / "step_00000001", tmp_path / "link", overwrite=True)
    assert os.readlink(tmp_path / "link") == "real"
    assert not (tmp_path / "real" / "stale").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"real", "link"}


def test_a_configuration_error_is_one(export: Path) -> None:
    change_json(export / "config.json", hidden_act="gelu")
    with pytest.raises(ConfigError, match=r"config.json holds a value that does not fit \(hidden_act is 'gelu'"):
        read_export_config(export)
