"""Checkpoints whose checksums are right and whose contents are not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from megatron_crnet.checkpoint.contents import saved_shapes, wrong_contents
from megatron_crnet.checkpoint.directory import MANIFEST, PARTIAL, complete, damage, file_entries, seal
from megatron_crnet.checkpoint.weight_files import canonical_shapes
from megatron_crnet.config.schema import Config
from megatron_crnet.data.fingerprint import TrainedOn
from megatron_crnet.hf.starting_checkpoint import _fresh_state, _write_masters
from tests.helpers import tiny_config

SHARD = "shard-00001-model-00001-of-00001.safetensors"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return written(tmp_path, tiny_config())


def written(tmp_path: Path, config: Config) -> Path:
    target = tmp_path / "step_00000000"
    partial = tmp_path / f"{PARTIAL}step_00000000"
    partial.mkdir()
    weights = {name: torch.ones(shape) for name, shape in canonical_shapes(config.model).items()}
    names = [_write_masters(partial, 1, weights, saved_shapes(config.model, config.optimizer))]
    seal(partial, target, config, _fresh_state(TrainedOn(), "a test"), file_entries(partial, names))
    return target


def sealed_again(checkpoint: Path) -> None:
    """Make the checksums fit."""
    names = [path.name for path in checkpoint.iterdir() if path.name != MANIFEST]
    partial = checkpoint.rename(checkpoint.with_name("partial"))
    complete(partial, checkpoint, file_entries(partial, names))


def state(**changes: Any) -> Callable[[Path], None]:
    def change(checkpoint: Path) -> None:
        values = json.loads((checkpoint / "state.json").read_text())
        values = {name: value for name, value in {**values, **changes}.items() if value != "gone"}
        (checkpoint / "state.json").write_text(json.dumps(values))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(checkpoint: Path) -> None:
        found = load_file(checkpoint / SHARD)
        change(found)
        save_file(found, checkpoint / SHARD, metadata={"format": "pt"})

    return apply


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint / name).write_text(content) and None


NORM = "master.model.norm.weight"
WRONG: dict[str, tuple[Callable[[Path], None], str]] = {
    "negative samples": (state(samples=-1), "state.json that is wrong in samples"),
    "truth for a number": (state(tokens=True), "wrong in tokens"),
    "text for a number": (state(step="0"), "wrong in step"),
    "no Adam's count": (state(adam_steps="gone"), "wrong in adam_steps"),
    "no layout": (state(layout="gone"), "wrong in layout"),
    "layout of text": (state(layout="x"), "wrong in layout"),
    "not finite": (state(unlogged_loss=float("nan")), "wrong in unlogged_loss"),
    "losses of text": (state(recent_losses=["x"]), "wrong in recent_losses"),
    "another step": (state(step=7), "step 7 in its state.json and another in its name"),
    "changes of ranks of text": (state(rank_changes=["1"]), "wrong in rank_changes"),
    "changes of ranks to come": (state(rank_changes=[1]), "after the steps [1], which do not ascend to its step 0"),
    "skipped": (state(skipped=3), "has skipped 3 of 0 steps"),
    "a list": (text("state.json", "[]"), "state.json that is wrong"),
    "deep": (text("state.json", "[" * 100000), "wrong in the whole"),
    "no mapping": (text("config.yaml", "5"), "config.yaml without a model section"),
    "no YAML": (text("config.yaml", "a: [1"), "cannot be read"),
    "model of text": (text("config.yaml", yaml.safe_dump({"model": "x"})), "config.yaml without a model section"),
    "model of another type": (text("config.yaml", yaml.safe_dump({"model": {"num_layers": "x"}})), "num_layers"),
    "garbage": (lambda checkpoint: (checkpoint / SHARD).write_bytes(b"\xff" * 999) and None, "cannot be read"),
    "empty": (lambda checkpoint: (checkpoint / SHARD).write_bytes(b"") and None, "cannot be read"),
    "bool masters": (tensors(lambda t: t.update({NORM: t[NORM].bool()})), f"has {NORM} in torch.bool instead"),
    "half moments": (tensors(lambda t: t.update({f"exp_avg{NORM[6:]}": t[NORM].half()})), "in torch.float16 instead"),
    "a missing one": (tensors(lambda t: t.pop(NORM)), f"lacks the tensor {NORM}"),
    "another shape": (tensors(lambda t: t.update({NORM: torch.ones(3)})), f"has {NORM} in the shape (3,) instead of"),
}


def test_a_good_one_is_good_also_when_an_earlier_version_wrote_less(checkpoint: Path) -> None:
    assert wrong_contents(checkpoint) is None
    state(versions="gone", validation_due="gone", recent_losses="gone", skipped="gone", something_new=1)(checkpoint)
    assert wrong_contents(checkpoint) is None


@pytest.mark.fault("F7")
@pytest.mark.parametrize("name", WRONG)
def test_contents_are_checked_whatever_the_checksums_say(name: str, checkpoint: Path) -> None:
    change, message = WRONG[name]
    change(checkpoint)
    sealed_again(checkpoint)
    assert damage(checkpoint) is None
    found = wrong_contents(checkpoint)
    assert found is not None
    assert message in found
    assert "\n" not in found


@pytest.mark.fault("F6")
@pytest.mark.parametrize(
    "manifest",
    [{"format": 1, "files": None}, {"format": 1, "files": {}}, {"format": 1}, [], {"format": 1, "files": {"x": 5}}],
)
def test_a_manifest_of_other_types_is_damage(manifest: Any, checkpoint: Path) -> None:
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    assert damage(checkpoint) is not None


@pytest.mark.fault("F6", "F7")
def test_files_that_the_manifest_does_not_know_are_damage(checkpoint: Path) -> None:
    (checkpoint / "more.safetensors").write_bytes(b"")
    assert damage(checkpoint) == f"holds more.safetensors, of which {MANIFEST} knows nothing"


def test_states_of_galore_have_the_shapes_of_their_subspaces(tmp_path: Path) -> None:
    optimizer = {"name": "galore", "galore_rank": 4}
    checkpoint = written(tmp_path, tiny_config({"variant": "full_rank"}, optimizer=optimizer))
    assert wrong_contents(checkpoint) is None
    name = "exp_avg.model.layers.0.mlp.down_proj.weight"

    def widen(found: dict[str, torch.Tensor]) -> None:
        assert found[name].shape == (4, 48)
        found[name] = torch.zeros(32, 48)

    tensors(widen)(checkpoint)
    sealed_again(checkpoint)
    assert wrong_contents(checkpoint) == f"has {name} in the shape (32, 48) instead of (4, 48)"
