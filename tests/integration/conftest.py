"""A tiny corpus in the trainer's own format, and the entry point as a user starts it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

import pretrain_crnet
from megatron_crnet.distributed.process_groups import shutdown_parallel

ROOT = Path(__file__).parents[2]
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
            "logging.output_dir": output,
            **{key.replace("__", "."): value for key, value in changes.items()},
        }
        return [f"--{key}={value}" for key, value in values.items()]


def start(options: list[str], ranks: int = 1, program: str = "pretrain_crnet.py") -> subprocess.CompletedProcess[str]:
    """Run a program from the repository's root, under this project's agent for several ranks."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["tools/launch.py", "--standalone", f"--nproc_per_node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launcher, program, *options]
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


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """The json package's sources for training, the email package's for validation."""
    folder = tmp_path_factory.mktemp("corpus")
    library = Path(json.__file__).parents[1]
    tools, train, valid = ROOT / "tools", library / "json", library / "logging"
    commands = [
        [tools / "train_tokenizer.py", train, "--output", folder / "tokenizer", "--vocab-size", "512"],
        *(
            [
                tools / "preprocess_data.py",
                text,
                "--output",
                folder / name,
                "--tokenizer-model",
                folder / "tokenizer.model",
            ]
            for name, text in (("train", train), ("valid", valid))
        ),
    ]
    for command in commands:
        subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True, timeout=LIMIT_S)
    return Corpus(folder / "train", folder / "valid", folder / "tokenizer.model")
