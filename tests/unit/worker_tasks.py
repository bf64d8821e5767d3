"""Tasks for worker processes, which import this file: so it imports nothing heavy."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable


def make_worker_task(mode: str) -> Callable[[int], tuple[int, int]]:
    """A task for worker processes: returns the job and the process, or ends badly on job 3."""

    def task(job: int) -> tuple[int, int]:
        if job == 3 and mode == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if job == 3 and mode == "raise":
            raise ZeroDivisionError("job 3")
        return job, os.getpid()

    return task
