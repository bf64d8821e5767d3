"""What a run reports: metrics.jsonl, TensorBoard, Weights & Biases, and what a person watches."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from netrc import NetrcParseError, netrc
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from tqdm import tqdm

from megatron_crnet.config.batch import BatchPlan
from megatron_crnet.config.loading import resolved
from megatron_crnet.config.model_size import flops_per_token, total_parameters
from megatron_crnet.config.schema import Config
from megatron_crnet.utils.duration import spell
from megatron_crnet.utils.errors import ConfigError, describe
from megatron_crnet.utils.files import replace_text, unused_name

PATIENCE, LOOK = 5.0, 1.0
"""Seconds without a line after which there is a sign of life, the first time; and between two looks at the clock."""


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
    """Whether W&B needs no key, or finds one where its documentation says that it looks."""
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


class MetricsWriter:
    """Writes every metric to every sink; on ranks other than the main one it writes nothing.

    Args:
        start_step: step that the run continues from; later lines of an earlier run are dropped. A file none of whose
            steps would stay is kept under another name.
        wandb_id: by which Weights & Biases knows the run; None for a new one.
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
        _keep_earlier(path) if start_step == 0 else _drop_lines_after(path, start_step)
        self._file = path.open("a")
        with self._keeping_on("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(folder / "tensorboard", purge_step=start_step + 1)
        if project := config.logging.wandb_project:
            with self._keeping_on("wandb"):
                import wandb

                self._wandb = wandb.init(
                    project=project, dir=str(folder), config=resolved(config), id=wandb_id, resume="allow"
                )

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl and one point of every curve."""
        if self._file is None:
            return
        with self._keeping_on("metrics.jsonl"):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()  # what a full disk does not take now stays in the buffer for the next line
        if self._tensorboard is not None:
            with self._keeping_on("tensorboard"):
                for name, value in values.items():
                    self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            with self._keeping_on("wandb"):
                self._wandb.log(values, step=step)

    @contextmanager
    def _keeping_on(self, sink: str) -> Iterator[None]:
        """Whatever goes wrong, it must not end the training whose state is in memory: warn, once for each sink."""
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
                with self._keeping_on(name):
                    sink.close()
        if self._wandb is not None:
            with self._keeping_on("wandb"):
                self._wandb.finish()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _keep_earlier(path: Path) -> None:
    """Give the metrics of a run that is not continued another name."""
    if path.exists() and path.stat().st_size:
        path.rename(unused_name(path.with_name("metrics.earlier.jsonl")))


def _drop_lines_after(path: Path, step: int) -> None:
    """Remove lines of steps that the resumed run does again, and a line that was cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    replace_text(path, "".join(kept))


def printable(text: str, stream: TextIO) -> str:
    """Text with what the stream's encoding does not know written as escapes."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def cost_of_run(config: Config, plan: BatchPlan, world_size: int) -> str:
    """What all steps take, in a line to be read before they start."""
    steps, per_step = config.training.train_steps, plan.tokens_per_step
    tokens, ramp = plan.tokens_of_run(steps), plan.ramp_line()
    flops = flops_per_token(config.model, plan.seq_length) * tokens
    return (
        f"{config.model.variant} of {total_parameters(config.model):,} parameters on {world_size} "
        f"{'process' if world_size == 1 else 'processes'}: {steps:,} steps x {per_step:,} tokens"
        f"{f' ({ramp})' if ramp else ''} = {tokens:,} tokens, {flops:.2e} FLOP"
    )


class Progress:
    """A bar on a terminal, plain lines where the output goes to a file; silent on ranks other than the main one.

    As a context manager it also gives a sign of life while a step takes long, first after 5 seconds without a line.

    Args:
        total: steps of the run.
        start: steps that are done.
    """

    def __init__(self, total: int, start: int, is_main: bool) -> None:
        self.total, self.is_main = total, is_main
        self._lines = is_main and not (sys.stdout.isatty() and sys.stderr.isatty())
        bar = is_main and sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True) if bar else None
        self._step, self._first = start, start
        self._started = self._after_first = time.monotonic()
        self._said, self._patience = self._started, PATIENCE
        self._ended = threading.Event()

    def advance(self, step: int, values: dict[str, Any] | None) -> None:
        """One step done; `values` are given on logged steps."""
        self._step = step
        if step == self._first + 1:  # what starts up is in the first step
            self._after_first = time.monotonic()
        if self._bar is not None:
            with suppress(OSError):  # a terminal that has gone
                self._bar.update(1)
                if values:
                    speed = f"{values['tokens_per_s']:,.0f} tokens/s"
                    self._bar.set_postfix_str(f"loss {values['loss']:.4f} lr {values['lr']:.2e} {speed}")
        if values and self._lines:
            self.line(
                f"step {step}/{self.total} | loss {values['loss']:.4f} | grad norm {values['grad_norm']:.3f} | "
                f"lr {values['lr']:.3e} | {values['tokens_per_s']:.0f} tokens/s | "
                f"{values['step_time_s'] * 1000:.0f} ms | ETA {self.time_left()}"
            )
        elif self._lines and time.monotonic() - self._said >= self._patience:
            self._sign_of_life(f"step {step}/{self.total} | ETA {self.time_left()}")

    def time_left(self) -> str:
        """By the mean time of all steps but the first, validation and saving included."""
        done, left = self._step - self._first, self.total - self._step
        if left <= 0:
            return spell(0.0)
        if done < 1:
            return "?"
        now = time.monotonic()
        if done == 1:  # which holds what starts up
            return f"under {spell(left * (now - self._started))}"
        return spell(left * (now - self._after_first) / (done - 1))

    def line(self, text: str) -> None:
        """One line of text that does not break the bar."""
        if not self.is_main:
            return
        self._said = time.monotonic()
        with suppress(OSError):  # a log file on a full disk, a terminal that has gone
            if self._bar is not None and not self._lines:
                self._bar.write(printable(text, sys.stderr))
            else:
                print(printable(text, sys.stdout), flush=True)

    def _sign_of_life(self, text: str) -> None:
        """A line between two logged steps; the more there have been, the rarer they come."""
        self.line(text)
        self._patience = min(2 * self._patience, 60.0)

    def _watch(self) -> None:
        while not self._ended.wait(LOOK):
            waited = time.monotonic() - self._said
            if self._bar is not None:
                self._bar.refresh()
            elif waited >= self._patience:
                self._sign_of_life(
                    f"running for {spell(waited)} since step {self._step}/{self.total} | ETA {self.time_left()}"
                )

    def __enter__(self) -> Progress:
        if self.is_main:
            self._started = self._said = time.monotonic()
            threading.Thread(target=self._watch, daemon=True, name="progress").start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._ended.set()
        if self._bar is not None:
            self._bar.close()
