"""A run's files beside its checkpoints: metrics.jsonl, TensorBoard, Weights & Biases, run.json and loss.png."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import secrets
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from megatron_crnet.checkpoint.manager import saved_facts
from megatron_crnet.config.loading import resolved, save_config
from megatron_crnet.config.schema import Config
from megatron_crnet.utils.environment import read_run_file, write_run_file
from megatron_crnet.utils.errors import ConfigError, cannot_be_written, describe
from megatron_crnet.utils.files import read_json_lines, replace_text, unused_name

if TYPE_CHECKING:
    from megatron_crnet.training.preflight import Preflight


def peak_memory_bytes() -> int:
    """Largest memory of this rank so far: the CUDA allocator's, or the resident set of the process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def largest_peak_memory_bytes(device: torch.device) -> int:
    """`peak_memory_bytes` of the fullest rank; a collective call.

    Args:
        device: of this rank.
    """
    peak = torch.tensor(peak_memory_bytes(), dtype=torch.int64, device=device)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return int(peak)


def check_sinks(config: Config) -> None:
    """Raise ConfigError for a sink whose package or key is missing."""
    project = config.logging.wandb_project
    if project and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"logging.wandb_project is {project}, but the package wandb is not installed: pip install wandb, or leave "
            "the project out"
        )
    if project and not _has_wandb_key():
        raise ConfigError(
            f"logging.wandb_project is {project}, but there is no key to log in with: run wandb login, set "
            "WANDB_API_KEY, or set WANDB_MODE=offline"
        )


def _has_wandb_key() -> bool:
    """Whether W&B needs no key, or finds one in the places that its documentation names."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return True
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    named = os.environ.get("NETRC")
    for path in [Path(named)] if named else [Path("~/.netrc").expanduser(), Path("~/_netrc").expanduser()]:
        with suppress(OSError, NetrcParseError, UnicodeDecodeError):
            if netrc(path).authenticators(host):
                return True
    return False


class MetricsWriter(AbstractContextManager["MetricsWriter"]):
    """Writes every metric to every sink; on ranks other than the main one it writes nothing.

    Args:
        start_step: step that the run continues from; later lines of an earlier run are dropped. At 0 an earlier file
            is kept under another name.
        wandb_id: the run's id at Weights & Biases; None for a new one.
    """

    def __init__(self, config: Config, is_main: bool, start_step: int = 0, wandb_id: str | None = None) -> None:
        self._file: TextIO | None = None
        self._tensorboard: Any = None
        self._wandb: Any = None
        self._failed: set[str] = set()
        if not is_main:
            return
        folder = Path(config.logging.output_dir)
        path = folder / "metrics.jsonl"
        if start_step:
            _drop_lines_after(path, start_step)
        elif path.exists() and path.stat().st_size:
            path.rename(unused_name(path.with_name("metrics.earlier.jsonl")))
        self._file = path.open("a")
        with self._warning_once("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(folder / "tensorboard", purge_step=start_step + 1)
        if project := config.logging.wandb_project:
            with self._warning_once("wandb"):
                import wandb

                self._wandb = wandb.init(
                    project=project, dir=str(folder), config=resolved(config), id=wandb_id, resume="allow"
                )

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl and one point of every curve."""
        if self._file is None:
            return
        with self._warning_once("metrics.jsonl"):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()  # on a full disk the line stays in the buffer
        if self._tensorboard is not None:
            with self._warning_once("tensorboard"):
                for name, value in values.items():
                    self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            with self._warning_once("wandb"):
                self._wandb.log(values, step=step)

    @contextmanager
    def _warning_once(self, sink: str) -> Iterator[None]:
        """Turn an error into a warning, one per sink: it must not end the training."""
        try:
            yield
        except Exception as error:
            if sink not in self._failed:
                self._failed.add(sink)
                reason = (error.strerror if isinstance(error, OSError) else None) or describe(error)
                with suppress(OSError):
                    print(f"warning: cannot write {sink}: {reason}; training goes on", file=sys.stderr)

    def close(self) -> None:
        """Flush and close every sink."""
        for name, sink in (("metrics.jsonl", self._file), ("tensorboard", self._tensorboard)):
            if sink is not None:
                with self._warning_once(name):
                    sink.close()
        if self._wandb is not None:
            with self._warning_once("wandb"):
                self._wandb.finish()

    def __exit__(self, *_: object) -> None:
        self.close()


def open_metrics(preflight: Preflight, loaded_from: dict[str, Any] | None, step: int) -> MetricsWriter:
    """Write config.yaml and run.json, and open the metrics of the steps after `step`.

    Args:
        loaded_from: see `Checkpointer.loaded_from`.

    Raises:
        ConfigError: the folder of the run cannot be written.
    """
    config, is_main, wandb_id = preflight.config, preflight.context.is_main, None
    folder = Path(config.logging.output_dir)
    try:
        if is_main:
            folder.mkdir(parents=True, exist_ok=True)
            save_config(config, folder / "config.yaml")
            facts: dict[str, Any] = {
                "checkpoints": saved_facts(config, preflight.step if preflight.checkpoint else None)
            }
            if loaded_from:
                facts["loaded_from"] = loaded_from
            if config.logging.wandb_project:
                # a resumed run is the same run there
                before = read_run_file(folder).get("wandb_id") if preflight.checkpoint else None
                facts["wandb_id"] = wandb_id = before if isinstance(before, str) else secrets.token_hex(8)
            write_run_file(folder, sys.argv, preflight.context.world_size, **facts)
        return MetricsWriter(config, is_main, step, wandb_id)
    except OSError as error:
        raise ConfigError(cannot_be_written(f"logging.output_dir {folder}", error)) from error


def _drop_lines_after(path: Path, step: int) -> None:
    """Remove lines of steps that the resumed run repeats, and truncated ones."""
    if path.exists():
        kept = [
            line for line in read_json_lines(path) if isinstance(line.get("step"), int | float) and line["step"] <= step
        ]
        replace_text(path, "".join(json.dumps(line) + "\n" for line in kept))


def steps_with(metric: str, path: Path) -> set[int]:
    """Steps for which a metrics.jsonl holds this metric."""
    if not path.is_file():
        return set()
    steps = (line.get("step") for line in read_json_lines(path) if metric in line)
    return {step for step in steps if isinstance(step, int)}


def plot_loss(metrics: Path, picture: Path, *, title: str, unigram_entropy: float | None = None) -> None:
    """Training and validation loss over tokens, with the unigram entropy of the validation tokens as a line."""
    from matplotlib.figure import Figure

    lines = read_json_lines(metrics)
    training = [(line["tokens"], line["loss"]) for line in lines if "loss" in line]
    validation = [(line["tokens"], line["validation_loss"]) for line in lines if "validation_loss" in line]
    # without pyplot, whose back end is that of the process
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    if training:
        axes.plot(*zip(*training, strict=True), label="training", color="tab:blue", linewidth=1)
    if validation:
        axes.plot(*zip(*validation, strict=True), label="validation", color="tab:orange", marker="o", markersize=4)
    if unigram_entropy is not None:
        axes.axhline(unigram_entropy, color="gray", linestyle="--", label="unigram entropy of the validation tokens")
    axes.set(xlabel="tokens", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=120)
