"""The loss curve of a run as a picture."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a metrics.jsonl; a line that a crash cut short, or that is none of ours, is left out."""
    lines = []
    for line in path.read_text(errors="replace").splitlines():
        with suppress(ValueError, RecursionError):
            found = json.loads(line)
            if isinstance(found, dict):
                lines.append(found)
    return lines


def validated_steps(path: Path) -> set[int]:
    """Steps whose validation loss stands in a metrics.jsonl."""
    if not path.is_file():
        return set()
    steps = (line.get("step") for line in read_metrics(path) if "validation_loss" in line)
    return {step for step in steps if isinstance(step, int)}


def plot_loss(metrics: Path, picture: Path, *, title: str, unigram_entropy: float | None = None) -> None:
    """Training and validation loss over tokens, with the unigram entropy of the validation tokens as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = read_metrics(metrics)
    training = [(line["tokens"], line["loss"]) for line in lines if "loss" in line]
    validation = [(line["tokens"], line["validation_loss"]) for line in lines if "validation_loss" in line]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    if training:
        axes.plot(*zip(*training, strict=True), label="training", color="tab:blue", linewidth=1)
    if validation:
        axes.plot(*zip(*validation, strict=True), label="validation", color="tab:orange", marker="o", markersize=4)
    if unigram_entropy is not None:
        axes.axhline(unigram_entropy, color="gray", linestyle="--", label="unigram entropy of the validation tokens")
    axes.set(xlabel="tokens", ylabel="loss (nats a token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=120)
    plt.close(figure)
