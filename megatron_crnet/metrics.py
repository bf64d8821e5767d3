"""What a run reports: metrics.jsonl, TensorBoard, Weights & Biases, and what a person watches."""

from __future__ import annotations

import importlib.util
import json
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch
from tqdm import tqdm

from megatron_crnet.atomic import replace_text
from megatron_crnet.config import Config
from megatron_crnet.errors import ConfigError
from megatron_crnet.settings import resolved


def peak_memory_bytes() -> int:
    """Largest memory of this rank so far: the CUDA allocator's, or the resident set of the process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def check_sinks(config: Config) -> None:
    """Raise ConfigError for a sink whose package is missing."""
    if config.logging.wandb_project and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"logging.wandb_project is {config.logging.wandb_project}, but the package wandb is not installed: "
            "pip install wandb, or leave the project out"
        )


class MetricsWriter:
    """Writes every metric to every sink; on ranks other than the main one it writes nothing.

    Args:
        start_step: step that the run continues from; later lines of an earlier run are dropped.
    """

    def __init__(self, config: Config, is_main: bool, start_step: int = 0) -> None:
        self._file: TextIO | None = None
        self._tensorboard: Any = None
        self._wandb: Any = None
        self._failed: set[str] = set()
        if not is_main:
            return
        folder = Path(config.logging.output_dir)
        path = folder / "metrics.jsonl"
        _drop_lines_after(path, start_step)
        self._file = path.open("a")
        from torch.utils.tensorboard import SummaryWriter

        self._tensorboard = SummaryWriter(folder / "tensorboard", purge_step=start_step + 1)
        if config.logging.wandb_project:
            import wandb

            self._wandb = wandb.init(
                project=config.logging.wandb_project, dir=str(folder), config=resolved(config), resume="allow"
            )

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl and one point of every curve."""
        if self._file is None:
            return
        with self._keeping_on("metrics.jsonl"):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()  # what a full disk does not take now stays in the buffer for the next line
        with self._keeping_on("tensorboard"):
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    @contextmanager
    def _keeping_on(self, sink: str) -> Iterator[None]:
        """A disk that is full must not end the training whose state is in memory: warn, once for each sink."""
        try:
            yield
        except OSError as error:
            if sink not in self._failed:
                self._failed.add(sink)
                print(f"warning: cannot write {sink}: {error.strerror or error}; training goes on", file=sys.stderr)

    def close(self) -> None:
        """Flush and close every sink."""
        for name, sink in (("metrics.jsonl", self._file), ("tensorboard", self._tensorboard)):
            if sink is not None:
                with self._keeping_on(name):
                    sink.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _drop_lines_after(path: Path, step: int) -> None:
    """Remove lines of steps that the resumed run does again, and a line that was cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    replace_text(path, "".join(kept))


class Progress:
    """A bar on a terminal, plain lines where the output goes to a file; silent on ranks other than the main one."""

    def __init__(self, total: int, start: int, is_main: bool) -> None:
        self.total, self.is_main = total, is_main
        self._lines = is_main and not (sys.stdout.isatty() and sys.stderr.isatty())
        bar = is_main and sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True) if bar else None

    def advance(self, step: int, values: dict[str, Any] | None) -> None:
        """One step done; `values` are given on logged steps."""
        if self._bar is not None:
            self._bar.update(1)
            if values:
                self._bar.set_postfix_str(f"loss {values['loss']:.4f} lr {values['lr']:.2e}")
        if values and self._lines:
            self.line(
                f"step {step}/{self.total} | loss {values['loss']:.4f} | grad norm {values['grad_norm']:.3f} | "
                f"lr {values['lr']:.3e} | {values['tokens_per_s']:.0f} tokens/s | {values['step_time_s'] * 1000:.0f} ms"
            )

    def line(self, text: str) -> None:
        """One line of text that does not break the bar."""
        if not self.is_main:
            return
        if self._bar is not None and not self._lines:
            self._bar.write(text)
        else:
            with suppress(OSError):  # a log file on a full disk
                print(text, flush=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
