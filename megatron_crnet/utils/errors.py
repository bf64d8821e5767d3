"""The exceptions a user can meet.

Every message names the value, the rule that it breaks and the remedy, in one line. The command-line
entry points print that line and end with `exit_status`; anything else is a defect of this code and
shows its traceback.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Callable
from types import FrameType


class CrnetError(Exception):
    """Base of this project's exceptions."""

    exit_status = 1

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class ConfigError(CrnetError):
    """A configuration that cannot be honoured: unknown key, wrong type, sizes that do not fit."""

    exit_status = 2


class DataError(CrnetError):
    """Input files that are missing, damaged, empty or do not fit the model."""

    exit_status = 2


class CheckpointError(CrnetError):
    """A checkpoint that cannot be written, or that does not fit the model."""


class FolderTakenError(CheckpointError):
    """Another process writes into the folder of this run."""


class PeerLostError(CrnetError):
    """Another rank died, or did not come to a collective call within the time limit."""

    exit_status = 4


class BadStepError(CrnetError):
    """Training met a step that would do harm: loss or gradient norm not finite, a loss spike, or too many of them."""

    exit_status = 3


def describe(error: BaseException) -> str:
    """An exception in one line: a message of this project as it is, any other with its type."""
    if isinstance(error, CrnetError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def ctrl_c_is_one_line() -> None:
    """Let Ctrl-C end an entry point with one line while it imports its libraries; to be called before them.

    At once, because an exception inside of an import may become another one. `reported` takes it back.
    """
    signal.signal(signal.SIGINT, _end_interrupted)


def _end_interrupted(_number: int, _frame: FrameType | None) -> None:
    os.write(sys.stderr.fileno(), b"interrupted\n")
    os._exit(128 + signal.SIGINT)


def reported(run: Callable[[], int]) -> int:
    """The exit status of a tool; what a user has to know of an exception of this project goes to standard error.

    Ctrl-C and a reader that has seen enough (`| head`) are no defects either: they end a tool as they end a program of
    the shell, which counts 128 and the number of the signal.
    """
    if signal.getsignal(signal.SIGINT) is _end_interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what is half written is removed on its way
    try:
        status = run()
        sys.stdout.flush()
    except CrnetError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        if not _nobody_reads(sys.stdout.fileno()):
            raise  # of another pipe
        # Python flushes once more when it ends, and would complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return status


def _nobody_reads(pipe: int) -> bool:
    poll = select.poll()
    poll.register(pipe, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def require_positive(section: str, **values: float) -> None:
    """Refuse values below one (integers) or not above zero (floats)."""
    for name, value in values.items():
        require(value > 0, f"{section}.{name} is {value}, but must be above 0: give a positive number")
