"""The exceptions a user can meet.

Every message names the value, the rule that it breaks and the remedy, in one line. The command-line
entry points print that line and end with `exit_status`; nothing else is caught there, so a defect
of this code still shows its traceback.
"""

from __future__ import annotations


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


class PeerLostError(CrnetError):
    """Another rank died, or did not come to a collective call within the time limit."""

    exit_status = 4


class NonFiniteLossError(CrnetError):
    """Training met a loss or a gradient norm that is not a finite number."""

    exit_status = 3
