"""Shared by all tests: the CPU platform, and what is skipped without a GPU."""

from __future__ import annotations

import gc
import os

import pytest
import torch

# one thread for each of several ranks on few cores; the entry point's own processes inherit it
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

from megatron_crnet.distributed import cpu_backend  # noqa: E402

cpu_backend.install()


@pytest.fixture(autouse=True, scope="module")
def _imports_are_no_garbage() -> None:
    """A collection would look at a million objects of imported libraries, and a run collects several times."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A run in which everything was skipped has shown nothing."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if exitstatus == pytest.ExitCode.OK and reporter is not None and not reporter.stats.get("passed"):
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
