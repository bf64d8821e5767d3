"""Exports and imports of a checkpoint that is written by hand: values, files, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader

from megatron_crnet.checkpoint import weight_files
from megatron_crnet.checkpoint.compatibility import check_resumable
from megatron_crnet.checkpoint.contents import find_checkpoint
from megatron_crnet.checkpoint.directory import MANIFEST, PARTIAL, damage
from megatron_crnet.checkpoint.weight_files import CheckpointWeights, ExportWeights
from megatron_crnet.config.architectures import LLAMA
from megatron_crnet.config.loading import resolved
from megatron_crnet.config.schema import Config, DataConfig
from megatron_crnet.hf.evaluate import evaluate_rows, rows_to_evaluate
from megatron_crnet.hf.export import from_hf, saved_config, to_hf
from megatron_crnet.hf.export_tokenizer import note_on_added_tokens
from megatron_crnet.hf.generate import open_model
from megatron_crnet.hf.modeling_crnet import CRNetForCausalLM
from megatron_crnet.model.reference import ReferenceCRNet
from megatron_crnet.utils.errors import ConfigError, CrnetError, DataError
from tests.helpers import tiny_config
from tests.unit.data_helpers import train_small_tokenizer
from tests.unit.export_helpers import EXPORTED, Weights, random_weights, write_checkpoint


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return train_small_tokenizer(tmp_path_factory.mktemp("tokenizer"), 400)


def config_of(tokenizer: str, **model: Any) -> Config:
    return dataclasses.replace(
        tiny_config(model={"vocab_size": 416, **model}), data=DataConfig(tokenizer_model=tokenizer)
    )


@pytest.fixture(scope="module")
def config(tokenizer: str) -> Config:
    return config_of(tokenizer, rank=dict.fromkeys(LLAMA.names, 8))


@pytest.fixture(scope="module")
def weights(config: Config) -> Weights:
    found = random_weights(config)
    found["model.layers.1.mlp.up_proj.beta"].zero_()  # which is no mistake
    return found


@pytest.fixture(scope="module")
def checkpoint(weights: Weights, config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("run") / "checkpoints" / "step_00000007", weights, config)


@pytest.fixture(scope="module")
def export(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "fp32"
    to_hf(checkpoint, out)
    return out


@pytest.fixture(scope="module", params=["llama", *EXPORTED])
def each(
    request: pytest.FixtureRequest, tokenizer: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Weights, Config]:
    """An export of each architecture, its weights and configuration."""
    folder = tmp_path_factory.mktemp(request.param)
    config = config_of(tokenizer, **EXPORTED.get(request.param, {}))
    weights = random_weights(config)
    weights["model.layers.1.self_attn.o_proj.beta"].zero_()  # which is no mistake
    for name in weights:
        if name.endswith("k_proj.bias"):
            weights[name].zero_()  # nor is this
    to_hf(write_checkpoint(folder / "step_00000007", weights, config), folder / "out")
    return folder / "out", weights, config


def test_the_export_holds_every_weight_bit_for_bit(each: tuple[Path, Weights, Config]) -> None:
    export, weights, _ = each
    found = load_file(export / "model.safetensors")
    assert set(found) == set(weights)
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in weights.items())
    assert {path.name for path in export.iterdir()} == {
        "config.json",
        "configuration_crnet.py",
        "generation_config.json",
        "layer_crnet.py",
        "linear_crnet.py",
        "model.safetensors",
        "modeling_crnet.py",
        "tokenization_crnet.py",
        "tokenizer.model",
        "tokenizer_config.json",
    }
    assert len({path.stat().st_mode for path in export.iterdir()}) == 1


def test_transformers_opens_it_and_gives_the_references_logits(each: tuple[Path, Weights, Config]) -> None:
    export, weights, config = each
    model = CRNetForCausalLM.from_pretrained(export)
    reference = ReferenceCRNet(config.model)
    reference.load_state_dict(weights)
    ids = torch.randint(416, (2, 16))
    torch.testing.assert_close(model(ids).logits, reference(ids), rtol=1e-5, atol=1e-5)
    assert torch.equal(open_model(export).model(ids).logits, model(ids).logits)
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (1, 0)


def test_learned_positions_have_an_end(each: tuple[Path, Weights, Config], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("import os\n" * 20)
    opened = open_model(each[0])
    asked: dict[str, Any] = {"text": tmp_path / "text.txt", "seq_length": 17, "allow_longer": True}
    if each[2].model.architecture == "gpt2":
        with pytest.raises(ConfigError, match="17 tokens is longer than the 16 positions that the model has learned"):
            rows_to_evaluate(opened, **asked)
    else:
        assert evaluate_rows(opened.model, rows_to_evaluate(opened, **asked), 2).tokens > 17


def test_an_opened_checkpoint_is_the_opened_export(export: Path, checkpoint: Path) -> None:
    ids = torch.randint(416, (2, 16))
    opened = [open_model(path) for path in (export, checkpoint, checkpoint.parent, checkpoint.parents[1])]
    logits = [one.model(ids).logits for one in opened]
    assert all(torch.equal(logits[0], other) for other in logits[1:])
    assert {one.tokenizer.vocab_size for one in opened} == {400}


def test_bf16_rounds_all_but_beta_and_opens(checkpoint: Path, weights: Weights, tmp_path: Path) -> None:
    to_hf(checkpoint, tmp_path / "out", dtype="bf16")
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in weights.items():
        wanted = value if name.endswith("beta") else value.bfloat16()
        assert (found[name].dtype, found[name].tolist()) == (wanted.dtype, wanted.tolist())
    model = open_model(tmp_path / "out", dtype="bf16").model
    assert all(torch.equal(model.get_parameter(name), value) for name, value in found.items())


def test_large_exports_are_cut_with_an_index(checkpoint: Path, weights: Weights, tmp_path: Path) -> None:
    to_hf(checkpoint, tmp_path / "out", shard_size="40KB")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert "model.safetensors" not in files
    source = ExportWeights(tmp_path / "out")
    found = source.read(source.shapes)
    assert all(torch.equal(found[name], value) for name, value in weights.items())
    model = CRNetForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(model.get_parameter(name), value) for name, value in weights.items())


def test_a_checkpoint_of_an_older_version_lacks_later_fields(config: Config, tmp_path: Path) -> None:
    older = resolved(config)
    del older["model"]["only_lr_act"], older["model"]["relora_scale"], older["relora"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(older))
    (tmp_path / "state.json").write_text('{"step": 1}')
    check_resumable(config, tmp_path)
    cola = dataclasses.replace(config, model=dataclasses.replace(config.model, variant="cola", only_lr_act=True))
    with pytest.raises(ConfigError, match="only_lr_act False instead of True"):
        check_resumable(cola, tmp_path)


def test_the_way_out_and_back_changes_no_bit(each: tuple[Path, Weights, Config], tmp_path: Path) -> None:
    export, weights, config = each
    back = from_hf(export, tmp_path / "checkpoints")
    assert damage(back) is None
    assert (back.name, (back.parent / "latest").read_text()) == ("step_00000000", "step_00000000\n")
    saved = load_file(back / "shard-00001-model-00001-of-00001.safetensors")
    assert set(saved) == {f"{kind}.{name}" for kind in ("master", "exp_avg", "exp_avg_sq") for name in weights}
    assert all(torch.equal(saved[f"master.{name}"], value) for name, value in weights.items())
    assert not any(value.any() for name, value in saved.items() if name.startswith("exp_avg"))
    about = json.loads((back / "state.json").read_text())
    assert (about["step"], about["tokens"], about["samples"], about["adam_steps"]) == (0, 0, 0, 0)
    check_resumable(config, back)
    assert saved_config(back).checkpoint.dir == str(tmp_path / "checkpoints")  # where a run with this file goes on
    to_hf(back, tmp_path / "again")
    for file in export.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def change(weights: Weights, name: str, value: Tensor | None) -> Weights:
    changed = {**weights}
    if value is None:
        del changed[name]
    else:
        changed[name] = value
    return changed


UP = "model.layers.2.mlp.up_proj.b.weight"
MISTAKES: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "missing": (lambda w: change(w, UP, None), f"lacks the weight {UP}"),
    "extra": (lambda w: change(w, "model.layers.4.beta", torch.ones(())), "holds the weight model.layers.4.beta"),
    "shape": (lambda w: change(w, UP, torch.ones(48, 4)), "in the shape (48, 4), but the model needs (48, 8)"),
    "zero matrix": (lambda w: change(w, UP, torch.zeros(48, 8)), f"only zeros in {UP}"),
    "zero norm": (lambda w: change(w, "model.norm.weight", torch.zeros(32)), "only zeros in model.norm.weight"),
    "not finite": (lambda w: change(w, UP, torch.full((48, 8), torch.inf)), f"in {UP} that are not finite"),
    "not a number": (
        lambda w: change(w, "model.layers.1.mlp.up_proj.beta", torch.tensor(torch.nan)),
        "model.layers.1.mlp.up_proj.beta that are not finite",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_bad_weight_is_named_and_nothing_left_behind(
    name: str, weights: Weights, config: Config, export: Path, tmp_path: Path
) -> None:
    damaged, message = MISTAKES[name][0](weights), MISTAKES[name][1]
    checkpoint = write_checkpoint(tmp_path / "step_00000001", damaged, config)
    with pytest.raises(DataError) as out:
        to_hf(checkpoint, tmp_path / "out")
    bad = tmp_path / "bad"
    shutil.copytree(export, bad)
    save_file(damaged, bad / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError) as back:
        from_hf(bad, tmp_path / "checkpoints")
    with pytest.raises(DataError) as opened:
        open_model(bad)
    for caught in (out, back, opened):
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} <= {"step_00000001", "bad", "checkpoints"}
    assert not list((tmp_path / "checkpoints").glob("*"))


def test_a_part_that_no_file_holds_is_found(weights: Weights, config: Config, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "step_00000001", weights, config)
    file = next(checkpoint.glob("shard-00001*"))
    parts = {name: part for name, part in load_file(file).items() if name != f"master.{UP}"}
    offsets = {name: {"saved_offsets": [0] * part.dim()} for name, part in parts.items()}
    save_file(parts, file, metadata={"format": "pt", "DCP_SHARDING_INFO": json.dumps(offsets)})
    with pytest.raises(DataError, match="not finite"):
        CheckpointWeights(checkpoint).checked([UP], lambda _, value: value)


def test_only_an_older_export_is_overwritten(checkpoint: Path, export: Path, tmp_path: Path) -> None:
    shutil.copytree(export, tmp_path / "out")
    (tmp_path / "out" / "stale").write_text("")
    with pytest.raises(DataError, match="exists already"):
        to_hf(checkpoint, tmp_path / "out")
    to_hf(checkpoint, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "stale").exists()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis").write_text("years of work")
    with pytest.raises(DataError, match="is not an export"):
        to_hf(checkpoint, tmp_path / "home", overwrite=True)
    assert (tmp_path / "home" / "thesis").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "home"}


def test_a_folder_with_checkpoints_takes_no_import(export: Path, checkpoint: Path) -> None:
    with pytest.raises(DataError, match="continues from the newest"):
        from_hf(export, checkpoint.parent)


HOLDER = """
import sys
from pathlib import Path
from megatron_crnet.checkpoint.run_folder import RunFolders
with RunFolders() as folders:
    folders.hold("the folder", Path(sys.argv[1]))
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_refused_writer_leaves_what_another_one_has_begun(export: Path, tmp_path: Path) -> None:
    begun = tmp_path / f"{PARTIAL}step_00000000"
    begun.mkdir()
    (begun / "shard").write_text("hours of work")
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(CrnetError, match="in use"):
            from_hf(export, tmp_path)
        other.communicate("")
    assert (begun / "shard").exists()


def test_a_disk_without_room_for_an_import_is_said_before_it_is_written(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(DataError, match=r"0.00 GiB free, but the checkpoint takes 0.00 GiB: free some space"):
        from_hf(export, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.fault("F7")
def test_contents_are_checked_as_for_a_run_that_goes_on(weights: Weights, config: Config, tmp_path: Path) -> None:
    """Whatever the checksums say: here a tensor is missing, and a step is not that of the name."""
    folder = tmp_path / "run" / "checkpoints"
    whole = write_checkpoint(folder / "step_00000001", weights, config)
    lacking = {name: tensor for name, tensor in weights.items() if name != UP}
    write_checkpoint(folder / "step_00000002", lacking, config)
    renamed = write_checkpoint(folder / "step_00000009", weights, config).rename(folder / "step_00000003")
    found, notes = find_checkpoint(folder)
    assert found == whole
    assert f"{renamed} has step 9 in its state.json and another in its name: skipped" in notes[0]
    assert f"step_00000002 lacks the tensor master.{UP} of its model: skipped" in notes[1]
    with pytest.raises(DataError, match=f"lacks the tensor master.{UP}"):
        open_model(folder / "step_00000002")


def test_headers_are_read_once_from_the_search_to_the_last_weight(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    opened = []
    read_metadata = HuggingFaceStorageReader.read_metadata

    def counted(self: HuggingFaceStorageReader) -> Any:
        opened.append(self.path)
        return read_metadata(self)

    monkeypatch.setattr(HuggingFaceStorageReader, "read_metadata", counted)
    monkeypatch.setattr(weight_files, "BYTES_AT_ONCE", 1)
    to_hf(find_checkpoint(copy)[0], tmp_path / "out", shard_size="10KB")
    assert len(opened) == 1
    other = write_checkpoint(tmp_path / "other" / checkpoint.name, {UP: torch.ones(4, 4)}, saved_config(checkpoint))
    shutil.rmtree(copy)
    other.rename(copy)
    assert set(CheckpointWeights(copy).shapes) == {UP}, "another one of that name"


def test_the_newest_whole_checkpoint_is_found(weights: Weights, config: Config, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    for step in (1, 2):
        write_checkpoint(folder / f"step_{step:08d}", weights, config)
    assert find_checkpoint(tmp_path / "run") == (folder / "step_00000002", [])
    (folder / "step_00000002" / "config.yaml").unlink()
    found, notes = find_checkpoint(folder)
    assert (found.name, len(notes)) == ("step_00000001", 1)
    assert "lacks config.yaml: skipped" in notes[0]
    with pytest.raises(DataError, match=r"lacks config.yaml"):
        find_checkpoint(folder / "step_00000002")
    (folder / "step_00000001" / MANIFEST).unlink()
    for path, message in (
        (folder, "has no whole checkpoint"),
        (folder / "step_00000001", "has no manifest.json"),
        (tmp_path, "holds no checkpoint"),
        (tmp_path / "absent", "holds no checkpoint"),
    ):
        with pytest.raises(DataError, match=message):
            find_checkpoint(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "of type 'bert'"),
        ({"architecture": "gpt3"}, 'model.architecture is "gpt3"'),
        ({"architecture": "gpt2"}, "names the position 'gate'"),
        ({"rank": None}, "model.rank is null, but must be a rank"),
        ({"tie_word_embeddings": True}, "holds the weight lm_head.weight, which the model does not have"),
        ({"hidden_size": 33}, "in the shape"),
        ({"variant": "full_rank", "full_rank_layers": [0, 1, 2, 3]}, "lacks the weight"),
        ({"num_key_value_heads": 3}, "num_query_groups"),
    ],
)
def test_another_kind_of_config_is_refused(changes: dict[str, Any], message: str, export: Path, tmp_path: Path) -> None:
    shutil.copytree(export, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(CrnetError, match=message) as caught:
        from_hf(tmp_path / "out", tmp_path / "checkpoints")
    assert isinstance(caught.value, DataError | ConfigError)


def test_files_that_cannot_be_read_are_named(export: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        folder = tmp_path / name
        shutil.copytree(export, folder)
        (folder / name).write_bytes(b"\x80rubbish")
        with pytest.raises(DataError, match="readable"):
            open_model(folder)
        (folder / name).unlink()
        with pytest.raises(DataError, match=r"readable|no checkpoint"):
            open_model(folder)


def test_the_tokenizer_may_have_moved(weights: Weights, config: Config, tokenizer: str, tmp_path: Path) -> None:
    for path, message in ((None, "names no tokenizer"), ("gone.model", "gone.model cannot be read")):
        moved = dataclasses.replace(config, data=DataConfig(tokenizer_model=path))
        checkpoint = write_checkpoint(tmp_path / str(path) / "step_00000001", weights, moved)
        with pytest.raises(DataError, match=f"{message}.*--tokenizer"):
            to_hf(checkpoint, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    to_hf(checkpoint, tmp_path / "out", tokenizer=tokenizer)
    assert open_model(checkpoint, tokenizer=tokenizer).tokenizer.vocab_size == 400
    back = from_hf(tmp_path / "out", tmp_path / "checkpoints")
    assert saved_config(back).data.tokenizer_model == str(tmp_path / "out" / "tokenizer.model")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "fp16"}, "dtype is 'fp16', but must be fp32 or bf16"),
        ({"shard_size": None}, "--shard-size is None, but must be a number above 0"),
    ],
    ids=["dtype", "shard size"],
)
def test_values_that_only_python_can_give_are_refused(
    checkpoint: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        to_hf(checkpoint, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_an_export_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nope is no folder: give that of an export"):
        note_on_added_tokens(tmp_path / "nope")
