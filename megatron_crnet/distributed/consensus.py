"""Agreement between ranks: at start-up on configuration and files, in training on stopping and saving.

A rank with another file or option would train on, or hang, far from the cause. So every rank learns what every other
found, failures included, and all stop with one line. The configuration comes first, because the groups of collective
calls follow from it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_crnet.config.loading import resolved
from megatron_crnet.config.schema import Config
from megatron_crnet.distributed.watchdog import ranks_line
from megatron_crnet.utils.errors import ConfigError, CrnetError, DataError, describe
from megatron_crnet.utils.versions import LIBRARIES, library_versions

CHECKPOINT = "the checkpoint"
REMEDIES = {
    CHECKPOINT: "checkpoint.dir (logging.output_dir by default) must be a folder that all ranks share: put it on a "
    "shared file system"
}

Found = TypeVar("Found")


def configuration_facts(config: Config) -> dict[str, str]:
    """Every resolved field as `section.field`, and the versions of the libraries that decide how a run computes."""
    facts = {
        f"{section}.{name}": repr(value)
        for section, values in resolved(config).items()
        for name, value in values.items()
    }
    # where Triton is absent or another one, its kernels round differently
    matters = {library: library != "triton" or config.training.cross_layer_fusion for library in LIBRARIES}
    versions = library_versions([library for library in LIBRARIES if matters[library]])
    return {**facts, **{f"version of {library}": version for library, version in versions.items()}}


def gather(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """The values of all ranks; a collective call of `group`, by default of all ranks."""
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, value, group)
    return everyone


def digest_of(values: Mapping[str, Any]) -> bytes:
    """A digest of named values, whatever their order."""
    return hashlib.sha256(repr(sorted(values.items())).encode()).digest()


def agree_on_configuration(config: Config) -> None:
    """Compare configuration and libraries with all other ranks; a collective call that no setting changes.

    Raises:
        ConfigError: ranks differ; names a rank, the fact and both values.
    """
    facts = configuration_facts(config)
    # all facts of all ranks only where a digest differs
    if len(set(gather(digest_of(facts)))) > 1:
        compare_facts(gather(facts))


def run_on_all_ranks(action: Callable[[], Found], group: dist.ProcessGroup | None = None) -> Found:
    """Run `action` on every rank. Returns this rank's own result; a collective call.

    Raises:
        CrnetError: `action` raised on some rank; every rank raises the same kind, naming it. A defect, which is any
            other exception, is raised as it is where it happened, and as DataError elsewhere.
    """
    problem: Exception | None = None
    try:
        found = action()
    except Exception as error:  # also a defect must reach the ranks that wait below
        problem = error
    kind = type(problem) if isinstance(problem, CrnetError) else DataError
    failures = gather((kind, describe(problem)) if problem else None, group)
    if problem is not None:
        raise problem
    for rank, failure in enumerate(failures):
        if failure:
            raise failure[0](f"rank {rank} failed: {failure[1]}")
    return found


def report_together(examine: Callable[[], Found], group: dist.ProcessGroup | None = None) -> list[Found]:
    """As `run_on_all_ranks`, with the results of all ranks."""
    return gather(run_on_all_ranks(examine, group), group)


def examine_together(examine: Callable[[], tuple[Found, dict[str, str]]]) -> Found:
    """As `run_on_all_ranks`, where `examine` also gives facts that must be equal on all ranks.

    Raises:
        ConfigError: ranks differ; names a rank, the fact and both values.
    """
    found, facts = run_on_all_ranks(examine)
    compare_facts(gather(facts))
    return found


def run_on_main(action: Callable[[], Found], group: dist.ProcessGroup | None = None) -> Found:
    """Run `action` on rank 0. Returns its result on every rank; a collective call. Errors as in `run_on_all_ranks`."""
    outcome: list[Any] = [None, None]
    problem: Exception | None = None
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except Exception as error:
            problem = error
            outcome[1] = error if isinstance(error, CrnetError) else DataError(f"rank 0 failed: {describe(error)}")
    dist.broadcast_object_list(outcome, src=0, group=group)
    if problem := problem or outcome[1]:
        raise problem
    found: Found = outcome[0]
    return found


def on_any_rank(fact: bool, device: torch.device) -> bool:
    """Whether a fact holds on some rank; a collective call of all ranks."""
    found = torch.tensor(float(fact), device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found)


def compare_facts(facts: list[dict[str, str]]) -> None:
    """Raise ConfigError when a rank's facts differ from those of most ranks."""
    for name in facts[0]:
        values = [mine.get(name, "nothing") for mine in facts]
        usual, _ = Counter(values).most_common(1)[0]
        different = [rank for rank, value in enumerate(values) if value != usual]
        if different:
            remedy = REMEDIES.get(name, "start every rank with the same configuration, libraries and files")
            raise ConfigError(
                f"{ranks_line(different)} has {name} {values[different[0]]}, but the others have {usual}: {remedy}"
            )


class Vote:
    """Yes-or-no questions, such as whether a signal came, answered for all ranks by the all-reduce of a batch's loss.

    Each rank answers just before that call and has the answer of any rank just after it, so all decide alike without a
    call of its own.

    Args:
        questions: answered by each rank.
    """

    def __init__(self, *questions: Callable[[], bool]) -> None:
        self._questions = questions
        self.answers = [False] * len(questions)
        """For each question, whether some rank said yes at the last all-reduce."""

    def cast(self) -> list[float]:
        """This rank's answers, to be summed over all ranks."""
        return [float(question()) for question in self._questions]

    def count(self, sums: Sequence[float]) -> None:
        """Take the sums over all ranks."""
        self.answers = [total > 0 for total in sums]
