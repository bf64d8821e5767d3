"""`distillation.teacher`: the export of a dense model that a run trains beside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from megatron_crnet.checkpoint.weight_files import WeightSource, canonical_shapes
from megatron_crnet.config.loading import resolved
from megatron_crnet.config.model_fields import computing_fields
from megatron_crnet.config.model_size import total_parameters
from megatron_crnet.config.schema import Config
from megatron_crnet.data.fingerprint import SHOWN, TrainedOn, digest_of_tokenizer
from megatron_crnet.data.tokenizer import load_tokenizer
from megatron_crnet.distributed.consensus import examine_together, run_on_all_ranks
from megatron_crnet.engine.distillation import build_teacher, teacher_config
from megatron_crnet.model.gpt import CRNetModel
from megatron_crnet.model.weights import Weight
from megatron_crnet.utils.errors import ConfigError, CrnetError, DataError, require


@dataclass(frozen=True)
class Teacher:
    """A dense model in files, of the shape of the run's model.

    Attributes:
        remarks: lines for the log.
    """

    folder: Path
    weights: WeightSource
    remarks: tuple[str, ...]

    def build(self, config: Config) -> list[CRNetModel] | None:
        """This rank's part of it, frozen; a collective call.

        Raises:
            DataError: a weight is not finite, or zero all over.
        """
        return run_on_all_ranks(lambda: build_teacher(config, self._whole))

    def _whole(self, weight: Weight) -> Tensor:
        with _named(self.folder):
            return self.weights.checked([weight.name], lambda _, stored: stored.float())[weight.name]


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Errors say that the teacher is meant."""
    try:
        yield
    except CrnetError as error:
        raise type(error)(f"distillation.teacher {folder}: {error}") from error


def find_teacher(config: Config, trained_on: TrainedOn) -> Teacher | None:
    """The teacher that the configuration names, checked on all ranks, if the run trains; a collective call.

    Raises:
        ConfigError: it is of another variant or shape, or knows shorter sequences.
        DataError: there is no export, or its weights are not whole.
    """
    if config.distillation.teacher is None or config.training.eval_only:
        return None
    return examine_together(partial(_examine, config, Path(config.distillation.teacher), trained_on))


def _examine(config: Config, folder: Path, trained_on: TrainedOn) -> tuple[Teacher, dict[str, str]]:
    from megatron_crnet.hf.export import open_export  # brings transformers

    with _named(folder):
        found, weights = open_export(folder)
        _check_model(config, found)
        weights.check(canonical_shapes(teacher_config(config).model))  # also of as many learned positions
    line = f"the teacher is {folder}, of {total_parameters(found.model):,} parameters, frozen"
    remarks = (line, *_other_tokenizer(folder, trained_on))
    return Teacher(folder, weights, remarks), {"distillation.teacher": repr(sorted(weights.dtypes.items()))}


def _check_model(config: Config, found: Config) -> None:
    """The teacher is the dense model of the run's shape."""
    teacher = found.model
    require(
        teacher.variant == "full_rank",
        f"it is of variant {teacher.variant}, but a teacher is dense: give a Hugging Face model, or an export of "
        "variant full_rank",
    )
    length, longest = config.training.seq_length, teacher.max_position_embeddings
    require(
        longest is None or longest >= length,
        f"its max_position_embeddings {longest} is below training.seq_length {length}: lower the second",
    )
    theirs = resolved(found)["model"]
    for name, value in computing_fields(resolved(teacher_config(config))["model"]).items():
        require(
            name == "max_position_embeddings" or theirs[name] == value,
            f"its {name} is {theirs[name]}, but model.{name} is {value}, and both must be equal: give a teacher of "
            "the model's shape",
        )


def _other_tokenizer(folder: Path, trained_on: TrainedOn) -> list[str]:
    """A warning where the teacher's tokenizer is another one, or not there."""
    from megatron_crnet.hf.export_tokenizer import tokenizer_of

    try:
        digest = digest_of_tokenizer(load_tokenizer(*tokenizer_of(folder)))
    except (ConfigError, DataError):
        return [f"note: distillation.teacher {folder} has no tokenizer: its ids are taken for those of this run's"]
    if digest in ("", trained_on.tokenizer):
        return []
    return [
        f"warning: the tokenizer of distillation.teacher {folder} is {digest[:SHOWN]}, not data.tokenizer_model, which "
        f"is {trained_on.tokenizer[:SHOWN]}: to the teacher, ids may mean other text"
    ]
