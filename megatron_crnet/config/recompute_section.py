"""The `recompute` section, and what its strategies save."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Le

from megatron_crnet.config.field_types import Epsilon, Section

Layers = Annotated[int, Ge(1), Le(1000)]


@dataclass(frozen=True)
class Strategy:
    """What a recomputation strategy saves beside the start of every segment.

    Attributes:
        recomputes: anything at all.
        saves_z: the low-rank outputs of every layer, so that no product with A is repeated.
        inverts: the residual stream that enters every layer, and the outputs at the end of a chain, because outputs
            are rebuilt by division. Its segments follow from values, so they are planned after every update.
    """

    recomputes: bool = True
    saves_z: bool = False
    inverts: bool = False

    @property
    def repeats_layers(self) -> bool:
        """Whether whole layers run again, attention and all."""
        return self.recomputes and not self.saves_z


STRATEGIES = {
    "none": Strategy(recomputes=False),
    "full": Strategy(),
    "replay": Strategy(saves_z=True),
    "inverse": Strategy(saves_z=True, inverts=True),
}


@dataclass(frozen=True)
class RecomputeConfig(Section, name="recompute"):
    """Activation recomputation."""

    strategy: Literal["none", "replay", "inverse", "full"] = "none"
    """none keeps every activation. replay keeps low-rank outputs and segment starts and recomputes the rest, exactly.
    inverse is the paper's: it divides by s(beta) and is exact to inverse_tolerance. full runs the layers again."""
    segment_length: Layers | Literal["auto"] = "auto"
    """Layers in a segment; under inverse, at most. auto takes the least memory (inverse: 8)."""
    keep_attention_output: bool = False
    """Keep attention's output (not under full) instead of recomputing it; pays off for long sequences."""
    inverse_tolerance: Epsilon | None = None
    """Relative error up to which rounding may grow in backward order under inverse, by the rule of
    docs/recomputation.md; null means 1/16 in bf16 and 1e-4 in fp32. Where it would be passed, a layer is kept."""

    @property
    def traits(self) -> Strategy:
        """What the strategy saves."""
        return STRATEGIES[self.strategy]
