"""Section `parallel` of the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_crnet.config.field_types import Minutes, Parallelism, Section
from megatron_crnet.config.recompute_section import Layers

Dispatcher = Literal["allgather", "alltoall"]


@dataclass(frozen=True)
class ParallelConfig(Section, name="parallel"):
    """Model parallelism; the remaining factor of the world size is data parallelism."""

    tensor_model_parallel_size: Parallelism = 1
    """Ranks over which each layer is sharded."""
    pipeline_model_parallel_size: Parallelism = 1
    """Pipeline stages."""
    virtual_pipeline_model_parallel_size: Parallelism | None = None
    """Virtual stages per pipeline rank (interleaved schedule); null or 1 means one."""
    sequence_parallel: bool | None = None
    """Shard the residual stream along the sequence; null means on when tensor parallelism is."""
    expert_model_parallel_size: Parallelism = 1
    """Ranks over which experts are spread: 1 or a multiple of tensor_model_parallel_size (docs/parallelism.md)."""
    moe_token_dispatcher_type: Dispatcher = "allgather"
    """How tokens reach experts on other ranks: every rank is sent all tokens of the group, or each token goes to its
    experts, which is less where these ranks are many (docs/decisions/experts.md)."""
    num_layers_in_first_pipeline_stage: Layers | None = None
    """Layers of the first pipeline rank, if layers are not distributed evenly."""
    num_layers_in_last_pipeline_stage: Layers | None = None
    """Layers of the last pipeline rank, if layers are not distributed evenly."""
    pad_widths_to: Literal[1, 8, 16, 32, 64, 128, 256] = 64
    """On each tensor-parallel rank, pad the feed-forward width, the vocabulary and the ranks of low-rank maps by zeros
    to a multiple of this, or of the largest of its halves from 8 on that adds at most 1/16; 1 does not pad. Weights in
    checkpoints and exports, parameter counts and losses are those without padding (docs/parallelism.md)."""
    overlap_tp_communication: bool = True
    """On CUDA, overlap the gathers and scatters of the low-rank products' backward with independent work."""
    distributed_timeout_minutes: Minutes = 10.0
    """Time that a rank waits for its peers before the run is stopped."""

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Ranks of a tensor-parallel group, pipeline stages, and virtual stages of each."""
        virtual = self.virtual_pipeline_model_parallel_size or 1
        return self.tensor_model_parallel_size, self.pipeline_model_parallel_size, virtual

    @property
    def shards_sequence(self) -> bool:
        """Whether the residual stream is sharded along the sequence."""
        return self.tensor_model_parallel_size > 1 if self.sequence_parallel is None else self.sequence_parallel
