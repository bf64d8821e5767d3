"""A tiny corpus in the trainer's own format, and the entry point as a user starts it."""

from __future__ import annotations

import gc
import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import pretrain_crnet
from megatron_crnet.distributed.process_groups import shutdown_parallel
from tests.forked import ROOT, Program, variables_of
from tests.ports import free_ports

LIMIT_S = 300.0
"""What takes seconds on an idle machine, and more on a busy one, has hung after this."""

TINY = {
    "model.num_layers": 4,
    "model.hidden_size": 32,
    "model.ffn_hidden_size": 48,
    "model.num_attention_heads": 4,
    "model.vocab_size": 512,
    "model.rank": 8,
    "training.train_steps": 6,
    "training.micro_batch_size": 2,
    "training.global_batch_size": 4,
    "training.seq_length": 32,
    "training.eval_interval": 3,
    "training.eval_steps": 2,
    "optimizer.lr_warmup_steps": 1,
    "logging.log_interval": 1,
}


@dataclass(frozen=True)
class Corpus:
    """Prefixes of .bin/.idx files and their tokenizer."""

    train: Path
    valid: Path
    tokenizer: Path

    def options(self, output: Path, **changes: object) -> list[str]:
        """Command line of a run that takes a second; `changes` use __ for the dot."""
        values: dict[str, object] = {
            **TINY,
            "data.train_data_path": f"[{self.train}]",
            "data.valid_data_path": f"[{self.valid}]",
            "data.tokenizer_model": self.tokenizer,
            "data.cache_path": output.parent / "cache",
            "data.num_workers": 0,  # each is a fork of this process, which takes a tenth of a second
            "logging.output_dir": output,
            **{key.replace("__", "."): value for key, value in changes.items()},
        }
        return [f"--{key}={value}" for key, value in values.items()]


def start(
    options: list[str], ranks: int = 1, program: str = "pretrain_crnet.py", before: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, in a forked process for each rank. The status is that of the first that failed."""
    port = free_ports(1)
    variables = [variables_of(rank, ranks, port) if ranks > 1 else {} for rank in range(ranks)]
    running = [Program(program, options, variables=of_rank, before=before) for of_rank in variables]
    try:
        printed = [process.communicate(timeout=LIMIT_S) for process in running]
    finally:
        for process in running:
            process.kill()
    status = next((process.returncode for process in running if process.returncode), 0)
    output, errors = ("".join(texts) for texts in zip(*printed, strict=True))
    return subprocess.CompletedProcess([program, *options], status, output, errors)


def start_alone(options: list[str], program: str = "pretrain_crnet.py") -> subprocess.CompletedProcess[str]:
    """Run a program from the repository's root as a shell does: with its own imports, ten times as slow."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, program, *options]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )


@dataclass(frozen=True)
class Outcome:
    """What a command line gave in this process."""

    status: int
    stdout: str
    stderr: str


def start_here(options: list[str]) -> Outcome:
    """The entry point on one rank, in this process: half a second instead of the imports' five."""
    stdout, stderr = io.StringIO(), io.StringIO()
    # DeepSpeed collects ten times while it builds an optimizer in bf16, to print how much memory is in use
    gc.collect()
    gc.freeze()
    try:
        with redirect_stdout(stdout), redirect_stderr(stderr):
            status = pretrain_crnet.main(options)
    finally:
        shutdown_parallel()
    return Outcome(status, stdout.getvalue(), stderr.getvalue())


def lines_of(output: Path, key: str) -> dict[int, float]:
    """A metric by step."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


def checkpoint(output: Path, step: int) -> Path:
    """Of a run."""
    return output / "checkpoints" / f"step_{step:08d}"


def saved(output: Path, step: int) -> dict[str, Tensor]:
    """Every tensor of a checkpoint."""
    files = checkpoint(output, step).glob("*.safetensors")
    return {name: value for file in files for name, value in load_file(file).items()}


def check_continued(whole: Path, cut: Path, step: int, options: list[str]) -> None:
    """A run that has only the checkpoint of `step` of a whole one goes on like that, to the bit.

    Args:
        options: of the run, whose output is `cut`.
    """
    shutil.copytree(checkpoint(whole, step), checkpoint(cut, step))
    outcome = start_here(options)
    assert outcome.status == 0, outcome.stderr
    losses = lines_of(whole, "loss")
    last = max(losses)
    assert lines_of(cut, "loss") == {s: losses[s] for s in range(step + 1, last + 1)}
    mine, theirs = saved(cut, last), saved(whole, last)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """The json package's sources for training, the email package's for validation."""
    folder, library = tmp_path_factory.mktemp("corpus"), Path(json.__file__).parents[1]
    made = Corpus(folder / "train", folder / "valid", folder / "tokenizer.model")
    model = f"--tokenizer-model={made.tokenizer}"
    for tool, text, *options in (
        ("train_tokenizer", "json", f"--output={folder / 'tokenizer'}", "--vocab-size=512"),
        ("preprocess_data", "json", f"--output={made.train}", model),
        ("preprocess_data", "logging", f"--output={made.valid}", model),
    ):
        start([str(library / text), *options], program=f"tools/{tool}.py").check_returncode()
    return made
