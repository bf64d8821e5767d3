"""What all ranks must agree on: at start-up that they mean the same run, in training whether to stop or save.

A rank that sees another file or another option would train on, or hang, far from the cause. Here every rank
learns what every other found, also that it failed, and all of them stop with the same line. The configuration
comes first, before it decides who is in a collective call with whom.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_crnet.config.loading import resolved
from megatron_crnet.config.schema import Config
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


def agree_on_configuration(config: Config) -> None:
    """Compare configuration and libraries with all other ranks; a collective call that no setting changes.

    Raises:
        ConfigError: ranks differ; names a rank, the fact and both values.
    """
    facts = configuration_facts(config)
    everyone: list[Any] = [None] * dist.get_world_size()
    # all facts of all ranks only where a digest differs
    dist.all_gather_object(everyone, hashlib.sha256(repr(sorted(facts.items())).encode()).digest())
    if len(set(everyone)) > 1:
        dist.all_gather_object(everyone, facts)
        compare_facts(everyone)


def report_together(examine: Callable[[], Found]) -> list[Found]:
    """Run `examine` on every rank. Returns what each of them found; a collective call.

    Raises:
        CrnetError: `examine` raised on some rank; every rank raises the same kind, naming it. A defect, which is any
            other exception, is raised as it is where it happened.
    """
    found: Any = None
    problem: Exception | None = None
    try:
        found = examine()
    except Exception as error:  # also a defect must reach the ranks that wait below
        problem = error
    everyone: list[Any] = [None] * dist.get_world_size()
    kind = type(problem) if isinstance(problem, CrnetError) else DataError
    dist.all_gather_object(everyone, (found, (kind, describe(problem)) if problem else None))
    if problem is not None:
        raise problem
    for rank, (_, failure) in enumerate(everyone):
        if failure:
            raise failure[0](f"rank {rank} stopped at start: {failure[1]}")
    return [found for found, _ in everyone]


def examine_together(examine: Callable[[], tuple[Found, dict[str, str]]]) -> Found:
    """Run `examine` on every rank and compare what it found; a collective call.

    Args:
        examine: opens this rank's input; gives what it opened and facts that must be equal everywhere.

    Raises:
        CrnetError: `examine` raised on some rank; every rank raises, naming it. A defect, which is any other
            exception, is raised as it is where it happened.
        ConfigError: ranks differ; names a rank, the fact and both values.
    """
    opened: list[Found] = []

    def facts_of_opened() -> dict[str, str]:
        found, facts = examine()
        opened.append(found)
        return facts

    compare_facts(report_together(facts_of_opened))
    return opened[0]


def run_on_all_ranks(action: Callable[[], Found]) -> Found:
    """Run `action` on every rank and give its own result to each; an error on one is raised on all, as above."""
    return examine_together(lambda: (action(), {}))


def run_on_main(action: Callable[[], Found]) -> Found | None:
    """Run `action` on rank 0, None on the others; an error is raised on all ranks."""
    return run_on_all_ranks(lambda: action() if dist.get_rank() == 0 else None)


def compare_facts(facts: list[dict[str, str]]) -> None:
    """Raise ConfigError when a rank's facts differ from those of most ranks."""
    for name in facts[0]:
        values = [mine.get(name, "nothing") for mine in facts]
        usual, _ = Counter(values).most_common(1)[0]
        different = [rank for rank, value in enumerate(values) if value != usual]
        if different:
            ranks = ", ".join(str(rank) for rank in different)
            remedy = REMEDIES.get(name, "start every rank with the same configuration, libraries and files")
            raise ConfigError(f"rank {ranks} has {name} {values[different[0]]}, but the others have {usual}: {remedy}")


class Vote:
    """What some rank alone knows, such as a signal, made known to all by the all-reduce of a batch's loss.

    Every rank asks itself just before that call and has the same answers just after it, so all decide alike, and no
    group or call of its own is needed.

    Args:
        questions: what each rank asks itself.
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
