"""The `distillation` section."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_crnet.config.field_types import FilePath, NonNegative, Section
from megatron_crnet.utils.errors import require


@dataclass(frozen=True)
class DistillationConfig(Section, name="distillation"):
    """Training beside a frozen dense teacher, PELA's second step (CVPR 2024; docs/from-dense.md).

    The weights have the names and defaults of its authors' code.
    """

    teacher: FilePath | None = None
    """Folder of a Hugging Face model (LLaMA, GPT-2, Qwen3, Qwen3-MoE), or of an export of variant full_rank, of the
    model's shape and vocabulary; null trains without a teacher."""
    kd_alpha: NonNegative = 1.0
    """Weight of the feature loss: mean over blocks, trained tokens and width of the squared difference between the
    outputs of the model's blocks and the teacher's."""
    kd_beta: NonNegative = 0.0
    """Weight of the logit loss: mean over trained tokens and vocabulary of the squared difference between the logits
    of both. 0 leaves the teacher's output layer out."""

    def __post_init__(self) -> None:
        """Check the fields; a teacher teaches something."""
        super().__post_init__()
        require(
            self.teacher is None or self.kd_alpha > 0 or self.kd_beta > 0,
            "distillation.kd_alpha and kd_beta are 0, so that the teacher teaches nothing: set one above 0, or leave "
            "distillation.teacher out",
        )
