"""`logging.profile_steps`: where a few steps of rank 0 spend time and memory, in `profile/` of the run's folder.

A folder per range of steps, written whole or not at all: trace.json.gz (chrome://tracing, Perfetto), profile.json and
profile.txt (time by kind and by kernel, on CPUs by operation) and, on CUDA, memory.pickle (pytorch.org/memory_viz).
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from megatron_crnet.training.callbacks.base import Callback, Step, as_warning
from megatron_crnet.training.preflight import Preflight
from megatron_crnet.utils.environment import run_metadata
from megatron_crnet.utils.files import atomic_folder
from megatron_crnet.utils.tables import table

if TYPE_CHECKING:
    from megatron_crnet.training.trainer import Trainer

KINDS = {
    "communication": ("nccl", "c10d::", "gloo:"),
    "attention": ("sdpa", "flash", "fmha", "attention"),
    "optimizer": ("multi_tensor", "adam"),
    "products": ("gemm", "nvjet", "cutlass", "cublas", "splitk", "aten::mm", "aten::addmm", "bmm"),
    "copies": ("memcpy", "memset", "copy", "catarray", "aten::cat", "aten::fill_", "aten::zero_"),
}
"""The first kind of which a part is in the name, in lower case; else glue, and on CPUs `host` for what is no operation:
Python and autograd. What PyTorch's optimizer calls there counts as optimizer."""
ALLOCATIONS = 100_000
"""Last allocations and frees that the memory snapshot has."""
LISTED = 40
"""Kernels in profile.json, those that take the most time."""


class Profiler(Callback):
    """Profiles steps `first` to `last` on rank 0. Called before other callbacks, whose work is no part of a step."""

    def __init__(self, preflight: Preflight) -> None:
        steps = preflight.config.logging.profile_steps if preflight.context.is_main else None
        self.first, self.last = steps or (1, 0)
        self._profiler: profile | None = None
        self._begun, self._seconds = 0, 0.0

    def on_start(self, trainer: Trainer) -> None:
        """See Callback."""
        if self.last and trainer.state.step >= self.last:
            trainer.progress.line(
                f"note: logging.profile_steps {[self.first, self.last]} is over, because the run continues from step "
                f"{trainer.state.step}: nothing is profiled; name later steps"
            )

    def on_step_begin(self, trainer: Trainer) -> None:
        """Before the step that follows `trainer.state`, if it is in the range."""
        done = trainer.state.step
        if self._profiler is not None or trainer.stopping or not self.first <= done + 1 <= self.last:
            return
        with as_warning(trainer.preflight, "the profile of logging.profile_steps"):
            activities = [ProfilerActivity.CPU]
            if trainer.context.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
                torch.cuda.memory._record_memory_history(max_entries=ALLOCATIONS, stacks="python")
                torch.cuda.synchronize()
            self._begun, self._seconds = done + 1, trainer.training_s
            self._profiler = profile(activities=activities)
            self._profiler.start()

    def on_step_end(self, trainer: Trainer, step: Step) -> None:
        """After a step: write the profile if it was the last one of the range."""
        done = trainer.state.step
        if self._profiler is None or (done < self.last and not trainer.stopping):
            return
        if trainer.stopping:  # the checkpoint must not wait
            self.abandon()
            trainer.progress.line(
                f"note: the run stops inside logging.profile_steps {[self.first, self.last]}: no profile is written"
            )
            return
        trainer.context.heartbeat.report(f"the profile of steps {self._begun} to {done}", may_take_long=True)
        folder = Path(trainer.config.logging.output_dir) / "profile" / f"steps_{self._begun}-{done}"
        with as_warning(trainer.preflight, "the profile of logging.profile_steps"):
            cuda = trainer.context.device.type == "cuda"
            if cuda:
                torch.cuda.synchronize()
            self._profiler.stop()
            count, seconds = done + 1 - self._begun, trainer.training_s - self._seconds
            rows = kernel_rows(self._profiler.events(), cuda, count)
            facts = {"steps": [self._begun, done], "device": "cuda" if cuda else "cpu", "step_s": seconds / count}
            record = {**run_metadata("profile", sys.argv), **facts, "kinds": kind_rows(rows), "kernels": rows[:LISTED]}
            with atomic_folder(folder, overwrite=True) as files:
                self._profiler.export_chrome_trace(str(files / "trace.json.gz"))
                if cuda:
                    torch.cuda.memory._dump_snapshot(str(files / "memory.pickle"))
                (files / "profile.json").write_text(json.dumps(record, indent=1) + "\n")
                (files / "profile.txt").write_text(profile_text(record))
            trainer.progress.line(f"profile of steps {self._begun} to {done}: {folder}")
        self.abandon()

    def abandon(self) -> None:
        """Stop recording, also after an error inside the range; what was not written is lost."""
        found, self._profiler = self._profiler, None
        if found is None:
            return
        if torch.cuda.is_initialized():
            torch.cuda.memory._record_memory_history(enabled=None)
        if torch.autograd._profiler_enabled():
            found.stop()


def kind_of(name: str) -> str:
    """The kind of a kernel, or of an operation of PyTorch on CPUs."""
    lower = name.lower()
    if lower.startswith("triton_"):  # named after all that they fuse
        return "glue"
    return next((kind for kind, parts in KINDS.items() if any(part in lower for part in parts)), "glue")


def kernel_rows(events: Iterable[Any], cuda: bool, steps: int) -> list[dict[str, Any]]:
    """Milliseconds and launches per step by kernel, the longest first; on CPUs by operation, without what it calls.

    Args:
        events: of torch.profiler.
        steps: how many they are of.
    """
    ms: Counter[tuple[str, str]] = Counter()
    launches: Counter[tuple[str, str]] = Counter()
    events = list(events)
    # a compiled optimizer's have no name of their own
    launched = {k.name for e in events if e.kernels and _in_optimizer(e) for k in e.kernels} if cuda else set()
    for event in events:
        if (event.device_type == DeviceType.CUDA) != cuda or (cuda and event.is_user_annotation):
            continue
        optimizes = event.name.startswith("triton_") and event.name in launched if cuda else _in_optimizer(event)
        kind = "optimizer" if optimizes else kind_of(event.name)
        row = (event.name, "host" if not cuda and kind == "glue" and "::" not in event.name else kind)
        ms[row] += (event.time_range.elapsed_us() if cuda else event.self_cpu_time_total) / 1e3 / steps
        launches[row] += 1
    return [
        {"name": name, "kind": kind, "ms": time, "launches": launches[name, kind] / steps}
        for (name, kind), time in ms.most_common()
    ]


def _in_optimizer(event: Any) -> bool:
    while event is not None and not event.name.startswith("Optimizer.step"):
        event = event.cpu_parent
    return event is not None


def kind_rows(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same by kind, with each kind's share of the time of all kernels."""
    ms: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    for row in rows:
        ms[row["kind"]] += row["ms"]
        launches[row["kind"]] += row["launches"]
    whole = sum(ms.values()) or 1.0
    return [
        {"kind": kind, "ms": time, "share": time / whole, "launches": launches[kind]} for kind, time in ms.most_common()
    ]


def profile_text(record: dict[str, Any]) -> str:
    """profile.txt."""
    what = "kernels" if record["device"] == "cuda" else "operations"
    first, last = record["steps"]
    kinds = [[r["kind"], f"{r['ms']:.2f}", f"{r['share']:.1%}", f"{r['launches']:.0f}"] for r in record["kinds"]]
    longest = [[r["name"][:120], r["kind"], f"{r['ms']:.3f}", f"{r['launches']:.0f}"] for r in record["kernels"]]
    return (
        f"steps {first} to {last} of rank 0: {record['step_s'] * 1e3:.1f} ms each, of which {what} are "
        f"{sum(r['ms'] for r in record['kinds']):.1f} ms (profiled steps are slower)\n\n"
        f"{table(['kind', 'ms per step', 'share', 'launches per step'], kinds, 1)}\n\n"
        f"{table([what, 'kind', 'ms per step', 'launches per step'], longest, 2)}\n"
    )
