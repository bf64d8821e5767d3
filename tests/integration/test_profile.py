"""`logging.profile_steps` on a real run: what is written, and that the run computes what it computes without it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from megatron_crnet.config.loading import read_config
from megatron_crnet.reporting.inputs import read_inputs
from megatron_crnet.reporting.scaling_report import build_sections
from megatron_crnet.training.callbacks import profile
from megatron_crnet.training.callbacks.base import Callback, Step
from megatron_crnet.training.trainer import Trainer, run_training
from tests.integration.conftest import Corpus, lines_of, start_here
from tests.integration.kills import saved_tensors


def test_a_profile_is_written_and_changes_no_bit(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile, "LISTED", 10**6)  # which operations take the most time differs from run to run
    plain, profiled = tmp_path / "plain", tmp_path / "profiled"
    assert start_here(corpus.options(plain)).status == 0
    done = start_here(corpus.options(profiled, logging__profile_steps="[4, 5]", checkpoint__save_interval=4))
    assert done.status == 0, done.stderr
    folder = profiled / "profile" / "steps_4-5"
    assert f"profile of steps 4 to 5: {folder}" in done.stdout
    assert not (plain / "profile").exists()
    assert lines_of(plain, "loss") == lines_of(profiled, "loss")
    assert lines_of(plain, "grad_norm") == lines_of(profiled, "grad_norm")
    wanted, found = (saved_tensors(run / "checkpoints" / "step_00000006") for run in (plain, profiled))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())

    assert sorted(path.name for path in folder.parent.iterdir()) == ["steps_4-5"]
    assert sorted(path.name for path in folder.iterdir()) == ["profile.json", "profile.txt", "trace.json.gz"]
    with gzip.open(folder / "trace.json.gz") as trace:
        names = {event.get("name") for event in json.load(trace)["traceEvents"]}
    assert {"aten::mm", "Optimizer.step#AdamW.step"} <= names
    record = json.loads((folder / "profile.json").read_text())
    assert (record["kind"], record["steps"], record["device"]) == ("profile", [4, 5], "cpu")
    kinds = {row["kind"]: row for row in record["kinds"]}
    assert {"products", "attention", "glue", "optimizer", "copies", "host"} <= set(kinds)
    assert sum(row["share"] for row in kinds.values()) == pytest.approx(1)
    assert 0 < sum(row["ms"] for row in kinds.values()) < record["step_s"] * 1e3
    # two micro-batches of four layers, forward alone, a kernel of its own for each
    attention = [row for row in record["kernels"] if row["name"] == "aten::_scaled_dot_product_flash_attention_for_cpu"]
    assert [row["launches"] for row in attention] == [8]
    text = (folder / "profile.txt").read_text()
    assert "steps 4 to 5 of rank 0" in text
    assert "aten::mm" in text


class Fails(Callback):
    """Ends the run after step 3."""

    def on_step_end(self, trainer: Trainer, step: Step) -> None:
        if trainer.state.step == 3:
            raise OSError("something else")


def test_a_run_that_fails_inside_the_range_leaves_nothing_behind(corpus: Corpus, tmp_path: Path) -> None:
    config = read_config(corpus.options(tmp_path / "run", logging__profile_steps="[2, 5]"))
    with pytest.raises(OSError, match="something else"):
        run_training(config, callbacks=[Fails()])
    assert not torch.autograd._profiler_enabled()
    assert not (tmp_path / "run" / "profile").exists()


def test_a_profile_that_cannot_be_written_costs_no_step(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(record: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(profile, "profile_text", fails)
    done = start_here(corpus.options(tmp_path / "run", logging__profile_steps="[2, 3]"))
    assert done.status == 0
    assert "the profile of logging.profile_steps failed and is left out: " in done.stderr
    assert "No space left on device" in done.stderr
    assert not (tmp_path / "run" / "profile").exists()


class Stops(Callback):
    """Stops the run after a step."""

    def __init__(self, step: int) -> None:
        self._step, self._done = step, 0

    def on_step_end(self, trainer: Trainer, step: Step) -> None:
        self._done = trainer.state.step

    def wants_stop(self) -> bool:
        return self._done == self._step - 1


def test_a_run_that_stops_inside_the_range_goes_on_in_it_and_says_when_it_is_over(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = corpus.options(tmp_path / "run", logging__profile_steps="[2, 4]")
    folder = tmp_path / "run" / "profile"
    assert not run_training(read_config(options), callbacks=[Stops(3)]).complete
    assert "note: the run stops inside logging.profile_steps [2, 4]: no profile is written" in capsys.readouterr().out
    assert not folder.exists()
    assert not torch.autograd._profiler_enabled()

    assert not run_training(read_config(options), callbacks=[Stops(5)]).complete
    assert [path.name for path in folder.iterdir()] == ["steps_4-4"]
    capsys.readouterr()

    assert run_training(read_config(options)).complete
    found = [line for line in capsys.readouterr().out.splitlines() if "profile_steps" in line]
    assert found == [
        "note: logging.profile_steps [2, 4] is over, because the run continues from step 5: nothing is profiled; name "
        "later steps"
    ]


def test_a_report_has_a_section_for_it(corpus: Corpus, tmp_path: Path) -> None:
    run_training(read_config(corpus.options(tmp_path / "run", logging__profile_steps="[2, 2]")))
    inputs = read_inputs([tmp_path / "run"])
    assert inputs.problems == []
    (record,) = inputs.of_kind("profile")
    assert record["name"] == "run, steps 2 to 2"
    (section,) = (s for s in build_sections(inputs, None, "") if s.title == "Where the time of a step goes")
    kinds, kernels = (pd.DataFrame(table.rows) for table in section.tables)
    assert [*kinds.columns] == ["kind", "ms per step", "share", "launches per step"]
    assert [*kernels.columns] == ["name", "kind", "ms per step", "launches per step"]
    assert [*kinds["kind"]] == [row["kind"] for row in record["kinds"]]
    assert "run, steps 2 to 2: " in section.tables[0].title
    assert "aten::mm" in section.markdown()
