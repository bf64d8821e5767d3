"""Saves the whole state of a run and loads it in any layout: weights, moments, counters, RNG states.

Saving has two parts: the state is copied to host memory, for which training waits; a thread writes it while training
continues. The folder gets its final name when every rank's files are on disk.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_crnet.checkpoint.compatibility import saved_state
from megatron_crnet.checkpoint.contents import wrong_contents
from megatron_crnet.checkpoint.directory import (
    PARTIAL,
    REJECTED,
    checkpoint_dir,
    checkpoint_name,
    checkpoints,
    damage,
    file_entries,
    name_latest,
    newest_without,
    prune,
    quarantine,
    remove_partial,
    restore_replaced,
    saved_step,
    seal,
    writing_into,
)
from megatron_crnet.checkpoint.replicas import Checksums, checksums, compare_copies
from megatron_crnet.checkpoint.storage import Box, collect, fill, own_files, read, shared_reader, whole, write
from megatron_crnet.checkpoint.train_state import TrainingState
from megatron_crnet.checkpoint.weight_files import ShardReader
from megatron_crnet.config.loading import resolved
from megatron_crnet.config.schema import Config
from megatron_crnet.data.fingerprint import TrainedOn
from megatron_crnet.distributed.consensus import report_together, run_on_all_ranks, run_on_main
from megatron_crnet.engine.engine import TrainEngine
from megatron_crnet.engine.state_kinds import KINDS, MASTER
from megatron_crnet.recompute.rng import RngStates
from megatron_crnet.utils.environment import note_in_run_file
from megatron_crnet.utils.errors import CheckpointError, describe
from megatron_crnet.utils.files import unused_name
from megatron_crnet.utils.versions import library_versions

WRITING_LIMIT = timedelta(minutes=30)
"""Timeout of the collective calls of a save, longer than that of training: a slow file system is not a lost rank."""
Result = TypeVar("Result")
EXPERT_RANKS = "expert_model_parallel_size"
LAYOUT = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size")


class Checkpointer:
    """Saves and loads the state of one engine; every public method is a collective call.

    Args:
        trained_on: tokenizer and data of the run.
        may_write: called on rank 0 before anything is written; raises FolderTakenError where the folder is another's.
    """

    def __init__(
        self,
        config: Config,
        engine: TrainEngine,
        trained_on: TrainedOn | None = None,
        may_write: Callable[[], object] = lambda: None,
    ) -> None:
        self.config, self.folder, self._may_write = config, checkpoint_dir(config), may_write
        self.trained_on = trained_on or TrainedOn()
        self.attach(engine)
        # of its own, because the thread's calls must not meet those of training
        self._group = dist.new_group(backend="gloo", timeout=WRITING_LIMIT)
        self._saving: Future[Path] | None = None
        self._remarks: list[str] = []
        self.loaded_from: dict[str, Any] | None = None
        """What checkpoint.load gave the run at its step 0, for state.json."""
        self.changed_layout: str | None = None
        """How devices or layout differ from those of the loaded checkpoint, whose RNG states are not restored then."""

    def attach(self, engine: TrainEngine) -> None:
        """Save and load the state of another engine from now on."""
        self.zero, self.weights, self.guard = engine.zero, engine.weights, engine.guard

    def detach(self) -> None:
        """Let go of the engine, before the next one takes memory."""
        del self.zero, self.weights, self.guard

    def save(self, state: TrainingState, aside: bool = False) -> None:
        """Copy the state and write it in the background.

        Args:
            aside: write it for inspection, not to be resumed from.

        Raises:
            CheckpointError: the checkpoint before this one could not be written.
        """
        self.wait()
        copies = checksums(self.weights, self.zero.stage)
        boxes = collect(self.zero, self.weights)
        random = RngStates.capture().tensors()
        boxes.update({_random_name(name): whole(tensor.clone()) for name, tensor in random.items()})
        about = {
            **asdict(state),
            "adam_steps": self.zero.steps,
            "layout": self._layout(),
            "device": self.zero.device.type,
            "versions": library_versions(),
            "trained_on": self.trained_on.values(),
            "loaded_from": self.loaded_from,
            **({"norm_ratios": self.guard.ratios_of_all_stages()} if self.guard else {}),
        }
        name = checkpoint_name(state.step)
        if aside:
            name = f"{REJECTED}{name}.from_{checkpoint_name(state.step + 1)}"
        thread = ThreadPoolExecutor(1, "checkpoint")
        self._saving = thread.submit(self._write, name, state, boxes, about, copies)
        thread.shutdown(wait=False)  # it ends with this save

    def wait(self) -> Path | None:
        """Return when the last checkpoint is on disk: its folder, or None if there was nothing to wait for.

        Raises:
            CheckpointError: it could not be written; earlier ones are untouched.
            FolderTakenError: another process writes this folder now.
        """
        saving, self._saving = self._saving, None
        return saving.result() if saving else None

    def _layout(self) -> dict[str, Any]:
        values = resolved(self.config)["parallel"]
        found = {"world_size": dist.get_world_size(), **{name: values[name] for name in LAYOUT}}
        # where it is 1 it is left out, as earlier versions do
        return found | ({EXPERT_RANKS: values[EXPERT_RANKS]} if values[EXPERT_RANKS] > 1 else {})

    def take_remarks(self) -> list[str]:
        """Remarks of finished saves, each returned once."""
        found, self._remarks = self._remarks, []
        return found

    def _write(
        self,
        name: str,
        state: TrainingState,
        boxes: dict[str, Box | Exception],
        about: dict[str, Any],
        copies: Checksums,
    ) -> Path:
        partial: Path | None = None
        try:
            if drift := compare_copies(copies, self._group):
                self._remarks.append(drift)
            partial, target = self._on_main(lambda: self._prepare(name))
            write(partial, boxes, self._group)
            boxes.clear()
            files = report_together(lambda: self._entries(partial), self._group)
            entries = {name: entry for mine in files for name, entry in mine.items()}
            self._on_main(lambda: self._finish(partial, target, state, entries, about))
        except BaseException:
            if dist.get_rank() == 0 and partial is not None:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        return target

    def _prepare(self, name: str) -> tuple[Path, Path]:
        """A new folder to write into, and its final name."""
        self.folder.mkdir(parents=True, exist_ok=True)
        restore_replaced(self.folder)
        remove_partial(self.folder)
        target = self.folder / name
        partial = self.folder / f"{PARTIAL}{name}.{secrets.token_hex(4)}"
        partial.mkdir()
        return partial, unused_name(target) if name.startswith(REJECTED) else target

    def _entries(self, partial: Path) -> dict[str, dict[str, Any]]:
        """The manifest entries of the files that this rank has written."""
        with writing_into(self.folder):
            return file_entries(partial, own_files(partial))

    def _finish(
        self, partial: Path, target: Path, state: TrainingState, entries: dict[str, Any], about: dict[str, Any]
    ) -> None:
        seal(partial, target, self.config, about, entries)
        note_in_run_file(Path(self.config.logging.output_dir), checkpoints=saved_facts(self.config, state.step))
        if not target.name.startswith(REJECTED):
            named = name_latest(target)
            prune(self.folder, self.config.checkpoint.keep_last, self.config.checkpoint.keep_every, state.good_step)
            if not named:  # a full disk, which has room again
                name_latest(target)

    def _on_main(self, action: Callable[[], Result]) -> Result:
        """Run `action`, which writes, on rank 0. Returns its result on every rank.

        Raises:
            CheckpointError, FolderTakenError: it failed there; raised on every rank.
        """

        def act() -> Result:
            with writing_into(self.folder):
                self._may_write()
                return action()

        return run_on_main(act, self._group)

    def load(self, checkpoint: Path) -> TrainingState:
        """Fill engine and optimizer, and in the same layout on the same kind of device the random generators.

        The engine's schedule is the caller's (`TrainEngine.restore_schedule`).

        Raises:
            CheckpointError: the checkpoint does not fit the model.
        """
        about, reader = run_on_all_ranks(lambda: saved_state(checkpoint)), shared_reader(checkpoint)
        steps = about["adam_steps"]
        fill(reader, self.zero, self.weights, steps, KINDS if steps else (MASTER,))
        self.changed_layout = run_on_all_ranks(lambda: self._restore_random_states(reader, about))
        self.loaded_from = about.get("loaded_from")
        if self.guard and "norm_ratios" in about:
            try:  # the same on all ranks
                self.guard.restore(about["norm_ratios"])
            except (TypeError, ValueError, RuntimeError) as error:
                raise CheckpointError(
                    f"checkpoint {checkpoint} cannot be read ({describe(error)}): use another one"
                ) from error
        return TrainingState.from_values(about)

    def load_initial(self, checkpoint: Path, optimizer: bool) -> None:
        """Fill the weights of a new run from another's checkpoint, and with `optimizer` its moments.

        Raises:
            CheckpointError: the checkpoint does not fit the model.
        """
        steps = run_on_all_ranks(lambda: saved_state(checkpoint))["adam_steps"] if optimizer else 0
        fill(shared_reader(checkpoint), self.zero, self.weights, steps, KINDS if steps else (MASTER,))

    def _restore_random_states(self, reader: ShardReader, about: dict[str, Any]) -> str | None:
        """Restore the random generators; else return why that is not possible, such as another kind of device."""
        layout = self._layout()
        if about["layout"] != layout:
            now, before = ({EXPERT_RANKS: 1, **found} for found in (layout, about["layout"]))
            names = [name for name, value in now.items() if before.get(name) != value]
            return ", ".join(f"{name} {now[name]} instead of {before.get(name)}" for name in names)
        device = about.get("device", self.zero.device.type)  # absent in earlier versions
        if device != self.zero.device.type:
            return f"device {self.zero.device.type} instead of {device}"
        states = {name: torch.empty_like(state) for name, state in RngStates.capture().tensors().items()}
        saved = reader.read_metadata().state_dict_metadata
        for name, state in states.items():
            if getattr(saved.get(_random_name(name)), "size", None) != state.shape:
                return f"the random generator {name} has a state of another size"
        read(reader, {_random_name(name): whole(state) for name, state in states.items()})
        RngStates.from_tensors(states).restore()
        return None

    def quarantine(self, step: int, prefix: str = REJECTED) -> Path | None:
        """Rename checkpoints of `step` and later, so that none is resumed from. Returns the newest that is left."""
        return self._on_main(lambda: quarantine(self.folder, step, prefix))

    def step_back(self, step: int) -> Path | None:
        """Quarantine checkpoints of `step` and later, if there is an intact one before it: else nothing good may stay.

        Returns:
            The checkpoint from which the next start will resume; None if there is none.
        """
        found = checkpoints(self.folder)
        older, _ = newest_complete([path for path in found if saved_step(path) < step])
        if older is None:
            return newest_complete(found)[0]
        self.quarantine(step)
        return older


def _random_name(name: str) -> str:
    return f"random.{dist.get_rank():05d}.{name}"


def newest_complete(found: Sequence[Path]) -> tuple[Path | None, list[str]]:
    """The newest intact checkpoint of rank 0's list, and a line on each newer one that is damaged; a collective call.

    In a folder that is being written, or through a file server's cache, another rank may see other names.

    Args:
        found: checkpoints, the oldest first.
    """
    return newest_without(_problem_together, run_on_main(lambda: found))


def _problem_together(checkpoint: Path) -> str | None:
    """Why files or contents of a checkpoint are unusable; ranks share the work of comparing checksums."""
    problems = report_together(lambda: damage(checkpoint, dist.get_rank(), dist.get_world_size()))
    return next(filter(None, problems), None) or run_on_main(lambda: wrong_contents(checkpoint))


def saved_facts(config: Config, newest: int | None) -> dict[str, Any]:
    """The entry of run.json on the checkpoints of a run.

    Args:
        newest: step of the newest that was written or continued; None of a run that has none yet.
    """
    return {"dir": str(checkpoint_dir(config).resolve()), "newest_step": newest}


def tidy(folder: Path) -> None:
    """Finish renames of a killed run in its folder; a collective call, before any rank reads it.

    Raises:
        CrnetError: rank 0 cannot write the folder; raised on every rank.
    """

    def finish() -> None:
        with writing_into(folder):
            restore_replaced(folder)

    run_on_main(finish)
