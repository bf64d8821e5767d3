"""Runs a function on several gloo ranks in processes of its own."""

from __future__ import annotations

import gc
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from megatron.core import parallel_state

from tests.forked import begin, forking, variables_of


def run_distributed(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 600) -> list[Any]:
    """Call `function(*args)` on `world_size` ranks of one gloo group.

    Ranks have this process's environment and folder.

    Returns:
        What it returned, by rank (picklable values).

    Raises:
        AssertionError: a rank raised (its traceback is the message), died, or took longer than `timeout_s`.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = _context()
        processes = [
            context.Process(
                target=_rank_main, args=(function, rank, world_size, folder, args, dict(os.environ)), daemon=True
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            _wait(processes, Path(folder), timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [torch.load(Path(folder) / f"result_{rank}", weights_only=False) for rank in range(world_size)]


def _context() -> Any:
    """Ranks are forked; where there is CUDA, which does not survive a fork, each is a process of its own."""
    return mp.get_context("spawn") if torch.cuda.is_available() else forking()


def _wait(processes: list[Any], folder: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while any(process.is_alive() for process in processes):
        errors = sorted(folder.glob("error_*"))
        assert not errors, errors[0].read_text()
        assert time.monotonic() < deadline, f"ranks still run after {timeout_s} s"
        time.sleep(0.05)
    errors = sorted(folder.glob("error_*"))
    assert not errors, errors[0].read_text()
    codes = [process.exitcode for process in processes]
    assert not any(codes), f"exit codes of the ranks: {codes}"


_store: dist.Store
_worlds = 0


def fresh_world() -> None:
    """Leave all process groups and join new ones; a collective call.

    Every group of gloo has threads of its own, and a test that builds many models would otherwise pile up thousands.
    """
    parallel_state.destroy_model_parallel()
    gc.collect()
    if dist.is_initialized():
        dist.barrier()
        if deepspeed.comm.is_initialized():
            deepspeed.comm.destroy_process_group()
        if dist.is_initialized():
            dist.destroy_process_group()
    gc.collect()
    _join_world(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


def _join_world(rank: int, world_size: int) -> None:
    global _worlds
    _worlds += 1
    store = dist.PrefixStore(f"world{_worlds}", _store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=120))


def _rank_main(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    folder: str,
    args: tuple[Any, ...],
    environment: dict[str, str],
) -> None:
    try:
        # as the trainer: else each of a model's thirty groups connects all ranks before its first call
        begin({**environment, **variables_of(rank, world_size), "TORCH_GLOO_LAZY_INIT": "1"})
        from megatron_crnet.distributed import cpu_backend

        cpu_backend.install()
        global _store
        _store = dist.FileStore(str(Path(folder) / "store"), world_size)
        _join_world(rank, world_size)
        torch.save(function(*args), Path(folder) / f"result_{rank}")
        dist.barrier()
        os._exit(0)  # the groups of many engines need not be taken down one by one
    except BaseException:
        # its name only when it is whole: somebody looks for it all the time
        unnamed = Path(folder, f"half_an_error_{rank}")
        unnamed.write_text(f"rank {rank}:\n{traceback.format_exc()}")
        unnamed.replace(Path(folder, f"error_{rank}"))
        os._exit(1)
