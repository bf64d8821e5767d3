"""Print the final losses of runs side by side, from their metrics.jsonl and config.yaml.

python tools/compare_runs.py runs/compare/*
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_crnet.arithmetic import total_parameters
from megatron_crnet.errors import DataError, reported
from megatron_crnet.options import ToolParser
from megatron_crnet.plot import read_metrics
from megatron_crnet.settings import load_config


def row(folder: Path) -> tuple[str, ...]:
    """Variant, learning rate, parameters, steps, tokens, validation loss and perplexity of a run."""
    if not (folder / "metrics.jsonl").exists():
        raise DataError(f"{folder} holds no metrics.jsonl: give the folder of a run")
    config = load_config(folder / "config.yaml")
    validations = [line for line in read_metrics(folder / "metrics.jsonl") if "validation_loss" in line]
    if not validations:
        raise DataError(f"{folder}/metrics.jsonl has no validation line: run with training.eval_steps above 0")
    last = validations[-1]
    return (
        config.model.variant,
        f"{config.optimizer.lr:g}",
        f"{total_parameters(config.model) / 1e6:.2f}M",
        str(last["step"]),
        f"{last['tokens']:,}",
        f"{last['validation_loss']:.4f}",
        f"{last['validation_perplexity']:.2f}",
    )


def show(folders: list[Path]) -> int:
    """Print the table."""
    rows = [row(folder) for folder in folders]
    header = ("variant", "lr", "parameters", "steps", "tokens", "validation loss", "perplexity")
    for line in (header, tuple("---" for _ in header), *rows):
        print("| " + " | ".join(line) + " |")
    return 0


def main() -> int:
    """Run; returns the exit status."""
    parser = ToolParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    args = parser.parse_args()
    return reported(lambda: show(args.runs))


if __name__ == "__main__":
    sys.exit(main())
