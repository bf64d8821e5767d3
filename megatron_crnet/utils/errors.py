"""The exceptions a user can meet.

Every message names the value, the rule that it breaks and the remedy, in one line. Commands print that line and end
with `exit_status`; any other exception is a defect of this code and shows its traceback.
"""

from __future__ import annotations

import math


class CrnetError(Exception):
    """Base of this project's exceptions; whitespace in messages becomes single spaces."""

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
    """Training met a step that would do harm: loss or gradient norm not finite, a loss spike, or too many of them.

    Attributes:
        problem: the message without what is left and what to do.
    """

    exit_status = 3

    def __init__(self, message: str, problem: str | None = None) -> None:
        super().__init__(message)
        self.problem = message if problem is None else problem


def multiples_near(value: int, of: int) -> str:
    """For a remedy: the multiples of `of` on either side of a value that is none, but not 0."""
    below = value // of * of
    return f"{below} or {below + of}" if below else f"{of}"


def describe(error: BaseException) -> str:
    """An exception in one line: a message of this project as it is, any other with its type."""
    if isinstance(error, CrnetError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def cannot_be_written(what: object, error: BaseException, remedy: str = "choose another folder") -> str:
    """The message for a file or folder that an exception says cannot be written."""
    reason = getattr(error, "strerror", None) or error
    return f"{what} cannot be written ({reason}): free some space, correct the permissions or {remedy}"


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def require_positive(section: str, **values: float) -> None:
    """Refuse values below one (integers), and not above zero or not finite (floats)."""
    for name, value in values.items():
        require(
            value > 0 and math.isfinite(value),
            f"{section}.{name} is {value}, but must be above 0 and finite: give a positive number",
        )
