"""Every shipped configuration, found by itself, through the real entry point."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_crnet.arithmetic import total_parameters
from megatron_crnet.settings import load_config
from tests.integration.conftest import ROOT, Corpus, lines_of

EXAMPLES = sorted((ROOT / "examples").glob("**/*.yaml"))
PARAMETERS = {  # benchmark-protocol figures: CR-Net at CoLA's rank, and full rank
    "llama2_60m": (44.7e6, 58.1e6),
    "llama2_130m": (97.3e6, 134.1e6),
    "llama2_350m": (192.8e6, 368.0e6),
    "llama2_1b": (639.7e6, 1339.1e6),
    "llama2_3b": (1209.1e6, 2686e6),
    "llama2_7b": (2943e6, 6738e6),
    "llama2_13b": (5527e6, 13015e6),
}
# one process for all of them, because importing the libraries takes longer than two steps
DRIVER = """
import sys
from pretrain_crnet import main
for line in sys.stdin.read().splitlines():
    status = main(line.split("\\t"))
    if status:
        sys.exit(f"{line}: {status}")
"""


def test_there_are_examples() -> None:
    assert {path.stem for path in EXAMPLES} >= {"quickstart", *PARAMETERS}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_those_of_the_protocol(name: str) -> None:
    path = ROOT / "examples" / f"{name}.yaml"
    crnet, full_rank = PARAMETERS[name]
    assert total_parameters(load_config(path).model) == pytest.approx(crnet, rel=1e-3)
    assert total_parameters(load_config(path, ["--model.variant", "full_rank"]).model) == pytest.approx(
        full_rank, rel=1e-3
    )


def test_every_example_trains_two_steps_at_a_small_size(corpus: Corpus, tmp_path: Path) -> None:
    commands = []
    for path in EXAMPLES:
        options = corpus.options(
            tmp_path / path.stem,
            training__train_steps=2,
            parallel__tensor_model_parallel_size=1,
            parallel__pipeline_model_parallel_size=1,
        )
        commands.append("\t".join(["--config", str(path), *options]))
    result = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input="\n".join(commands),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    for path in EXAMPLES:
        assert set(lines_of(tmp_path / path.stem, "loss")) == {1, 2}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_can_be_examined_at_its_own_size(path: Path) -> None:
    from megatron_crnet.report import dry_run_report

    config = load_config(path)
    ranks = config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size
    assert "parameters (" in dry_run_report(config, world_size=max(ranks, 1 if path.stem == "quickstart" else 8))
