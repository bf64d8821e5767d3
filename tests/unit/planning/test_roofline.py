"""The table of docs/planning.md that compares the roofline with times measured on a GPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_crnet.config.loading import read_config
from megatron_crnet.config.model_size import total_parameters
from megatron_crnet.planning.estimate import Estimate, estimate
from megatron_crnet.planning.machines import MACHINES, machine_of_gpu

ROOT = Path(__file__).parents[3]
MODELS = {
    "7B widths, 16 layers, 1 x 4096": ("llama2_7b", 1, 4, 4096, ["--model.num_layers=16"]),
    "60M, 128 x 256": ("llama2_60m", 128, 1, 256, []),
}
ROW = r"^\| ([^|]+) \| (\w+) \| (\d+) \| (\d+) \| ([+-]\d+)% \| ([\d,]+) \| ([\d,]+) \| ([+-][\d.]+)% \|$"


def predicted(model: str, variant: str) -> Estimate:
    example, sequences, micro_batches, length, options = MODELS[model]
    config = read_config(
        [
            f"--config={ROOT / 'examples' / example}.yaml",
            *options,
            f"--model.variant={variant}",
            "--model.full_rank_layers=null",
            f"--training.micro_batch_size={sequences}",
            f"--training.global_batch_size={sequences * micro_batches}",
            f"--training.seq_length={length}",
            "--training.dtype=bf16",
            "--deepspeed.zero_optimization.stage=1",
            "--deepspeed.zero_optimization.reduce_bucket_size=50000000",
        ]
    )
    return estimate(config, 1, MACHINES["h200"])


def test_the_predicted_columns_are_the_estimates_of_today() -> None:
    rows = re.findall(ROW, (ROOT / "docs" / "planning.md").read_text(), re.MULTILINE)
    assert [(row[0], row[1]) for row in rows] == [
        *((next(iter(MODELS)), variant) for variant in ("full_rank", "crnet", "low_rank")),
        ("60M, 128 x 256", "full_rank"),
    ]
    for model, variant, ms, measured_ms, off, mib, measured_mib, memory_off in rows:
        found = predicted(model, variant)
        time, peak = 1e3 * found.time.total, found.peak / 2**20
        assert (f"{time:.0f}", f"{peak:,.0f}") == (ms, mib), (model, variant)
        assert f"{100 * (time / int(measured_ms) - 1):+.0f}" == off, (model, variant)
        error = 100 * (peak / int(measured_mib.replace(",", "")) - 1)
        assert f"{error:+.1f}" == memory_off, (model, variant)
        assert abs(error) < 10 or "60M" in model, (model, variant)


def test_a_graphs_kernels_are_launched_at_once() -> None:
    options = ("--config=examples/llama2_60m.yaml", "--training.dtype=bf16", "--deepspeed.zero_optimization.stage=1")
    graph, each = (estimate(read_config((*options, f"--training.cuda_graphs={on}")), 1) for on in ("true", "false"))
    assert graph.time.launches == 0 < each.time.launches


def test_whole_weights_before_zero_3_partitions_them_are_a_peak() -> None:
    words = ("--model.variant=full_rank", "--model.num_layers=250", "--recompute.strategy=full")
    stage = ("--training.micro_batch_size=1", "--deepspeed.zero_optimization.stage=3")
    found = estimate(read_config(("--config=examples/llama2_7b.yaml", *words, *stage)), 64)
    assert found.peak == found.stages[0].memory.start == 2 * total_parameters(found.config.model)
    assert found.peak > MACHINES["h100"].memory_bytes


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
