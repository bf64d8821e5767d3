"""Stopping on a signal, or because another process has taken over the folder of the run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_crnet.checkpoint.run_folder import RunFolders
from megatron_crnet.training.callbacks.base import Callback
from megatron_crnet.utils.signals import Interruption

if TYPE_CHECKING:
    from megatron_crnet.training.trainer import Trainer


class StopOnSignal(Callback):
    """Requests a stop on every rank after the first signal to any of them."""

    def __init__(self, interruption: Interruption, folders: RunFolders) -> None:
        self._interruption, self._folders = interruption, folders

    def on_start(self, trainer: Trainer) -> None:
        """See Callback."""
        self._interruption.arm()

    def wants_stop(self) -> bool:
        """See Callback."""
        return self._interruption.received is not None or self._folders.taken

    def on_end(self, trainer: Trainer) -> None:
        """See Callback."""
        if trainer.stopping:
            received = self._interruption.received
            trainer.progress.line(
                f"stopped by {received.name if received else 'a callback or a signal to another rank'} after step "
                f"{trainer.state.step}; the same command goes on from {trainer.newest_checkpoint}"
            )
