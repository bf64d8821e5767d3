"""Megatron-Core's `TransformerConfig` of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_crnet.config.deepspeed import zero_stage
from megatron_crnet.config.positions import PositionTable, head_width, position_table
from megatron_crnet.config.recompute_section import STRATEGIES, Strategy
from megatron_crnet.config.schema import Config

DEFAULT_INVERSE_TOLERANCE = {"bf16": 2.0**-4, "fp32": 1e-4}


@dataclass
class CRNetTransformerConfig(TransformerConfig):
    """Megatron-Core's configuration with CR-Net's fields."""

    table: PositionTable = field(default_factory=PositionTable)
    """Positions, ranks, widths and chains."""
    cross_layer_epsilon: float = 1e-6
    """eps of s(b) = sign(b)(|b| + eps)."""
    beta_init: float = 1.0
    """Initial value of every beta."""
    scale_residual_init: bool = False
    """`model.scale_residual_init`."""
    cross_layer_fusion: bool = True
    """What lies between matrix products is compiled (CUDA only)."""
    next_layer_scales: bool = True
    """In backward a layer multiplies what the next one sends back by that one's s(beta): where its betas are whole."""
    overlap_tp_communication: bool = True
    """Overlap the backward's gathers and scatters with independent products (CUDA only)."""

    recompute_strategy: str = "none"
    """`recompute.strategy`. (Megatron-Core's own `recompute_*` fields stay unset.)"""
    recompute_segment_length: int | None = None
    """Layers in a segment; None chooses."""
    recompute_keep_attention_output: bool = False
    """Keep attention's output instead of recomputing it."""
    recompute_inverse_tolerance: float = 0.0
    """Largest relative error of an output rebuilt by `inverse`."""

    @property
    def strategy(self) -> Strategy:
        """What `recompute_strategy` saves."""
        return STRATEGIES[self.recompute_strategy]

    @property
    def has_dropout(self) -> bool:
        """Whether dropout is on."""
        return self.hidden_dropout > 0 or self.attention_dropout > 0

    @property
    def initial_device(self) -> torch.device:
        """Where weights are made."""
        return torch.device("cpu" if self.use_cpu_initialization else torch.cuda.current_device())

    def local_width(self, position: str) -> int:
        """Elements of an output per local sequence position.

        A tensor [s, b, w/t] holds as many elements as [s/t, b, w], so with sequence parallelism, where rows of the
        residual stream are [s/t, b, h], every output is counted in the second form. Padding is included.
        """
        return self._spread(position, 1, position not in self.table.architecture.rows)

    def local_input(self, position: str) -> int:
        """The same of its input."""
        return self._spread(position, 0, position in self.table.architecture.rows)

    def _spread(self, position: str, side: int, is_split: bool) -> int:
        width = self.table.local_shapes[position][side]
        return width * self.tensor_model_parallel_size if is_split and self.sequence_parallel else width


def build_transformer_config(config: Config) -> CRNetTransformerConfig:
    """The Megatron-Core configuration of a run. Weights are drawn by `model/weights.py`, not by Megatron."""
    model, parallel, recompute = config.model, config.parallel, config.recompute
    tp, pp, vpp = parallel.sizes
    dtype = torch.bfloat16 if config.training.bf16 else torch.float32
    return CRNetTransformerConfig(
        table=position_table(model, parallel.tensor_model_parallel_size, parallel.pad_widths_to),
        cross_layer_epsilon=model.cross_layer_epsilon,
        beta_init=model.beta_init,
        scale_residual_init=model.scale_residual_init,
        cross_layer_fusion=config.training.cross_layer_fusion,
        next_layer_scales=zero_stage(config) < 3,
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups or model.num_attention_heads,
        layernorm_epsilon=model.layernorm_epsilon,
        kv_channels=head_width(model),
        normalization="RMSNorm",
        add_bias_linear=False,
        gated_linear_unit=True,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        init_method_std=model.init_method_std,
        perform_initialization=False,
        use_cpu_initialization=not torch.cuda.is_available(),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=config.training.bf16,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        sequence_parallel=parallel.shards_sequence,
        **(_experts(config) if model.num_experts else {}),
        num_layers_in_first_pipeline_stage=parallel.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=parallel.num_layers_in_last_pipeline_stage,
        overlap_tp_communication=parallel.overlap_tp_communication,
        recompute_strategy=recompute.strategy,
        recompute_segment_length=None if recompute.segment_length == "auto" else recompute.segment_length,
        recompute_keep_attention_output=recompute.keep_attention_output,
        recompute_inverse_tolerance=recompute.inverse_tolerance or DEFAULT_INVERSE_TOLERANCE[config.training.dtype],
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        deallocate_pipeline_outputs=True,
        deterministic_mode=config.training.deterministic,
        batch_p2p_comm=torch.cuda.is_available(),
    )


def _experts(config: Config) -> dict[str, Any]:
    """Megatron-Core's options of a mixture of experts. They are not cut: expert tensor parallelism is 1."""
    model = config.model
    return {
        "num_moe_experts": model.num_experts,
        "moe_ffn_hidden_size": model.ffn_hidden_size,
        "moe_router_topk": model.moe_router_topk,
        "moe_router_pre_softmax": model.moe_router_pre_softmax,
        "moe_router_dtype": "fp32",
        "moe_aux_loss_coeff": model.moe_aux_loss_coeff,
        "moe_z_loss_coeff": model.moe_z_loss_coeff or None,
        "moe_token_dispatcher_type": config.parallel.moe_token_dispatcher_type,
        "expert_model_parallel_size": config.parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": 1,
    }
