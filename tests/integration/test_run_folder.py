"""What the folder of a run survives: bad steps, other writers, starts without a checkpoint, damage beside the state."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path

import pytest

from megatron_crnet.checkpoint.directory import damage
from megatron_crnet.utils.folder_lock import this_process
from tests.integration.commands import Command, run_commands
from tests.integration.conftest import Corpus, lines_of

FAULTY_DEVICE = """
from megatron_crnet.engine.engine import TrainEngine
patch.setattr(TrainEngine, "forward_backward", lambda *_: float("nan"))
"""
QUIET = {"training__eval_steps": 0, "checkpoint__save_interval": 0}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.fault("B1")
def test_a_bad_first_step_leaves_the_only_checkpoint_as_it_is_and_the_next_start_continues_it(
    corpus: Corpus, tmp_path: Path
) -> None:
    output, checkpoint = tmp_path / "run", tmp_path / "run" / "checkpoints" / "step_00000002"
    copy = tmp_path / "copy"
    going_on = corpus.options(output, training__train_steps=4, **QUIET)
    before = f"import shutil; shutil.copytree({str(checkpoint)!r}, {str(copy)!r})\n{FAULTY_DEVICE}"
    first, bad, again, last = run_commands(
        [
            Command(corpus.options(output, training__train_steps=2, **QUIET)),
            Command(going_on, before),
            Command(going_on, FAULTY_DEVICE),
            Command(going_on),
        ],
    )
    assert first.status == 0, first.text
    assert (bad.status, again.status) == (3, 3), bad.text
    assert f"a new start continues from {checkpoint}, as there is none before it" in bad.error
    assert contents(checkpoint) == contents(copy)
    aside = [checkpoint.with_name(f"rejected_step_00000002.from_step_00000003{n}") for n in ("", ".2")]
    assert all(damage(path) is None for path in aside)
    assert aside[1].name in again.error
    assert last.status == 0, last.text
    assert f"continuing from {checkpoint}, step 2" in last.text
    assert set(lines_of(output, "loss")) == {1, 2, 3, 4}


FAULTY_AT_4 = """
from megatron_crnet.checkpoint import manager
from megatron_crnet.distributed.watchdog import Heartbeat
from megatron_crnet.training.trainer import TrainEngine
passes, calls = TrainEngine.forward_backward, []
def faulty(*arguments):
    calls.append(1)
    return passes(*arguments) if len(calls) < 4 else float("nan")
patch.setattr(TrainEngine, "forward_backward", faulty)
reports = []
patch.setattr(Heartbeat, "report", lambda *arguments, **more: reports.append((arguments[1:], more)))
def fail(*_):
    print("while", reports[-1])
    raise PermissionError(13, "Permission denied")
patch.setattr(manager, "quarantine", fail)
"""


@pytest.mark.fault("B1")
def test_a_checkpoint_that_cannot_be_set_aside_does_not_hide_the_bad_step(corpus: Corpus, tmp_path: Path) -> None:
    options = corpus.options(tmp_path / "run", training__eval_steps=0, checkpoint__save_interval=1)
    (bad,) = run_commands([Command(options, FAULTY_AT_4)])
    assert bad.status == 3, bad.text
    assert "error: the loss is nan, but must be finite at step 4" in bad.error
    assert "checkpoints of step 3 and later could not be set aside (cannot write a checkpoint into" in bad.error
    assert "Permission denied" in bad.error
    # reading all of an older checkpoint may take longer than a step
    assert "while (('the checkpoint of step 3',), {'may_take_long': True})" in bad.text
    assert bad.error.endswith("is kept beside it as rejected_step_00000003.from_step_00000004")


@pytest.mark.fault("B1", "L1")
def test_no_start_begins_from_random_weights_where_an_earlier_run_has_left_anything(
    corpus: Corpus, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    options = corpus.options(output, training__train_steps=2, **QUIET)
    bad, refused, renamed = run_commands(
        [
            Command(options, FAULTY_DEVICE),
            Command(options),
            Command(
                options,
                f"import os; os.chdir({str(output / 'checkpoints')!r})\n"
                "os.rename('rejected_step_00000000.from_step_00000001', 'step_00000000')",
            ),
        ],
    )
    assert bad.status == 3, bad.text
    assert "there is no checkpoint: rename rejected_step_00000000.from_step_00000001 to step_00000000" in bad.error
    assert refused.status == 2, refused.text
    assert "holds rejected_step_00000000.from_step_00000001, but no whole step_ folder" in refused.error
    assert renamed.status == 0, renamed.text
    assert set(lines_of(output, "loss")) == {1, 2}

    cases = {
        "rejected": ("rejected_step_00000002", "holds rejected_step_00000002, but no whole step_ folder"),
        "damaged": ("damaged_step_00000002", "holds damaged_step_00000002"),
        "unfinished": (".partial_step_00000002.0", "holds .partial_step_00000002.0"),
        "another name": ("my backup", "holds my backup"),
        "superscript": ("step_²", "holds step_²"),
        "away": (None, "holds the metrics of 2 steps, but checkpoint.dir"),
    }
    commands = []
    for name, (new_name, _) in cases.items():
        shutil.copytree(output, tmp_path / name)
        state = tmp_path / name / "checkpoints" / "step_00000002"
        shutil.rmtree(state.with_name("step_00000000"), ignore_errors=True)
        for path in state.parent.glob("rejected_*"):
            shutil.rmtree(path)
        state.rename(state.with_name(new_name)) if new_name else state.rename(tmp_path / "away" / "elsewhere")
        commands.append(Command(corpus.options(tmp_path / name, training__train_steps=2, **QUIET)))
    shutil.copytree(output, tmp_path / "moved")
    commands.append(
        Command(corpus.options(tmp_path / "moved", training__train_steps=2, checkpoint__dir=tmp_path / "new", **QUIET))
    )
    with (tmp_path / "away" / "metrics.jsonl").open("a") as file:
        file.write('{"step": Infinity}\n{"step": NaN}\n')
    kept = {name: contents(tmp_path / name) for name in (*cases, "moved")}
    found = run_commands(commands)
    for printed, (_, message) in zip(found, cases.values(), strict=False):
        assert printed.status == 2, printed.text
        assert message in printed.error
    assert f"(those of that run are in {output / 'checkpoints'})" in found[-1].error
    assert {name: contents(tmp_path / name) for name in kept} == kept


@pytest.mark.fault("B1")
def test_a_run_that_has_saved_nothing_yet_starts_again_and_its_metrics_are_kept(corpus: Corpus, tmp_path: Path) -> None:
    """What a node failure before the first checkpoint leaves, in the middle of its save."""
    output = tmp_path / "run"
    killed = """
from megatron_crnet.checkpoint import manager
from megatron_crnet.training.trainer import Trainer
def leave(*_):
    raise RuntimeError("as if killed here")
patch.setattr(manager, "seal", leave)
patch.setattr(manager.shutil, "rmtree", lambda *_, **__: None)
"""
    options = corpus.options(output, training__train_steps=2, **QUIET)
    first, second = run_commands([Command(options, killed), Command(options)])
    assert first.status == 1, first.text
    assert "cannot write a checkpoint into" in first.error
    assert second.status == 0, second.text
    assert set(lines_of(output, "loss")) == {1, 2}
    earlier = [json.loads(line) for line in (output / "metrics.earlier.jsonl").read_text().splitlines()]
    assert [line["step"] for line in earlier if "loss" in line] == [1, 2]
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["latest", "step_00000002"]


@pytest.mark.fault("B5", "L1", "L3")
def test_what_could_not_be_written_at_the_end_is_refused_at_the_start(corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for name in ("picture/loss.png", "latest/checkpoints/latest"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("stacks/stacks", "board/tensorboard", "used/in_use.lock"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("")
    owner = this_process()
    (tmp_path / "used" / "in_use.lock").write_text(json.dumps(owner.__dict__))
    (tmp_path / "link").symlink_to(tmp_path / "used")
    rows = {
        "L3": ({"checkpoint__dir": tmp_path / "file"}, f"checkpoint.dir {tmp_path / 'file'} cannot be written"),
        "under it": ({"checkpoint__dir": tmp_path / "file" / "x"}, "checkpoint.dir"),
        "picture": ({}, "holds a folder loss.png"),
        "latest": ({}, "holds a folder latest"),
        "stacks": ({}, "holds a file stacks"),
        "board": ({}, "holds a file tensorboard"),
        "used": ({}, f"is in use by process {os.getpid()} on host {socket.gethostname()}"),
        "other": ({"checkpoint__dir": tmp_path / "link"}, f"checkpoint.dir {tmp_path / 'link'} is in use by process"),
        "full": ({}, "0.00 GiB free, but one checkpoint of this run takes up to 0.00 GiB: free some space"),
    }
    there = {name for name in rows if (tmp_path / name).exists()}
    before = contents(tmp_path)
    full = "import shutil, types; patch.setattr(shutil, 'disk_usage', lambda _: types.SimpleNamespace(free=1000))"
    commands = [
        Command(corpus.options(tmp_path / name, **{**QUIET, **changes}), full if name == "full" else "")
        for name, (changes, _) in rows.items()
    ]
    found = run_commands(commands)
    for printed, (name, (_, message)) in zip(found, rows.items(), strict=True):
        assert printed.status == 2, (name, printed.text)
        assert message in printed.error, name
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    assert contents(tmp_path) == before
    assert {name for name in rows if (tmp_path / name).exists()} == there


BROKEN = """
import torch.utils.tensorboard as board
from megatron_crnet.training import trainer
from megatron_crnet.training.callbacks import results
def fail(*_, **__):
    raise ZeroDivisionError("as if something was wrong")
patch.setattr(trainer.TrainEngine, "evaluation_losses", fail)
patch.setattr(results, "plot_loss", fail)
patch.setattr(results, "continue_text", fail)
patch.setattr(board.SummaryWriter, "add_scalar", fail)
"""
LOST = """
from megatron_crnet.training import evaluation
evaluate = evaluation.evaluate
def die(trainer, *arguments, **more):
    if trainer.state.step == 6:
        raise RuntimeError("as if killed here")
    return evaluate(trainer, *arguments, **more)
patch.setattr(evaluation, "evaluate", die)
"""
WANDB = """
import json, pathlib
class Run:
    def log(self, values, step): raise RuntimeError("no answer")
    def finish(self): pass
def init(**options):
    with open(pathlib.Path(__file__).with_name("started.jsonl"), "a") as file:
        print(json.dumps([options["id"], options["resume"], options["project"]]), file=file)
    return Run()
"""


@pytest.mark.fault("B15", "B14", "L12", "F6", "B18", "B1")
def test_nothing_beside_the_state_ends_a_run_or_costs_its_state(corpus: Corpus, tmp_path: Path) -> None:
    output, sinks = tmp_path / "run", tmp_path / "sinks"
    sinks.mkdir()
    (sinks / "wandb.py").write_text(WANDB)
    find = f"patch.syspath_prepend({str(sinks)!r})\nimport sys; sys.modules.pop('wandb', None)\n"
    find += f"patch.setenv('NETRC', {str(sinks / 'netrc')!r})\npatch.delenv('WANDB_API_KEY', raising=False)\n"
    project = {"logging__wandb_project": "mine"}
    asks = {"logging__sample_prompt": "", "logging__sample_tokens": 3}
    login = "open(os.environ['NETRC'], 'w').write('machine api.wandb.ai login user password x\\n')\n"

    damaged = f"open({str(output / 'metrics.jsonl')!r}, 'ab').write(b'\\xff\\n5\\n{{')\n"

    def command(before: str, steps: int, **changes: object) -> Command:
        return Command(corpus.options(output, training__train_steps=steps, **changes), f"import os\n{before}")

    no_key, broken, lost, due, prompt = run_commands(
        [
            command(find, 3, **project),
            command(find + login + BROKEN, 3, **project, **asks),
            command(find + LOST, 6, **project),
            command(find + damaged, 6, **project, **asks),
            Command(corpus.options(tmp_path / "odd", logging__sample_prompt="\ud800")),
        ],
    )
    assert no_key.status == 2, no_key.text
    assert no_key.error.endswith("run wandb login, set WANDB_API_KEY, or set WANDB_MODE=offline")
    assert broken.status == 0, broken.text
    for what in ("the validation of step 3", "loss.png", "the sampled continuation", "tensorboard", "wandb"):
        (_,) = [line for line in broken.text.splitlines() if what in line and line.startswith("warning")]
    assert damage(output / "checkpoints" / "step_00000003") is None
    # ended inside the last validation: all is saved, and the same command does what is left
    assert (lost.status, "as if killed here" in lost.text) == (1, True), lost.text
    assert damage(output / "checkpoints" / "step_00000006") is None
    assert due.status == 0, due.text
    assert "--- a sampled continuation ---" in due.text
    assert "step 6/6 | loss" not in due.text
    assert set(lines_of(output, "validation_loss")) == {3, 6}
    started = [json.loads(line) for line in (sinks / "started.jsonl").read_text().splitlines()]
    assert len({tuple(line) for line in started}) == 1
    assert len(started) == 3
    assert started[0][1:] == ["allow", "mine"]
    assert prompt.status == 2, prompt.text
    assert "logging.sample_prompt is " in prompt.error
