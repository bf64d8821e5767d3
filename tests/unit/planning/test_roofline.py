"""The table of docs/planning.md that compares the roofline with times measured on a GPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_crnet.config.loading import read_config
from megatron_crnet.planning.estimate import estimate
from megatron_crnet.planning.machines import MACHINES, machine_of_gpu

ROOT = Path(__file__).parents[3]
MODELS = {
    "1B, ffn 5504, 2 x 4096": ("llama2_1b", 2, 4096, ["--model.ffn_hidden_size=5504"]),
    "7B widths, 8 layers, 1 x 4096": ("llama2_7b", 1, 4096, ["--model.num_layers=8"]),
    "60M, 128 x 256": ("llama2_60m", 128, 256, []),
}


def predicted_ms(model: str, variant: str) -> float:
    example, sequences, length, options = MODELS[model]
    config = read_config(
        [
            f"--config={ROOT / 'examples' / example}.yaml",
            *options,
            f"--model.variant={variant}",
            "--model.full_rank_layers=null",
            f"--training.micro_batch_size={sequences}",
            f"--training.global_batch_size={sequences}",
            f"--training.seq_length={length}",
            "--training.dtype=bf16",
            "--deepspeed.zero_optimization.stage=1",
            "--deepspeed.zero_optimization.reduce_bucket_size=50000000",
        ]
    )
    return 1e3 * estimate(config, 1, MACHINES["h200"]).time.total


def test_the_predicted_column_is_the_roofline_of_today() -> None:
    text = (ROOT / "docs" / "planning.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| (\w+) \| (\d+) \| (\d+) \| (-?\d+)% \|$", text, re.MULTILINE)
    assert [row[0] for row in rows] == [model for model in MODELS for _ in range(2 if "60M" in model else 3)]
    for model, variant, predicted, measured, error in rows:
        found = predicted_ms(model, variant)
        assert f"{found:.0f}" == predicted, (model, variant)
        assert f"{100 * (found / int(measured) - 1):.0f}" == error, (model, variant)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("Tesla T4", None),
    ],
)
def test_a_gpu_is_known_by_the_name_that_cuda_gives(device: str, name: str | None) -> None:
    found = machine_of_gpu(device)
    assert (found.name if found else None) == name
