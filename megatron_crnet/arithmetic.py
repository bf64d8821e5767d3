"""Parameters, floating-point operations and memory, from formulas.

Symbols: h hidden, f FFN width, L layers, V vocabulary, s sequence, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_crnet.config import Config, ModelConfig
from megatron_crnet.deepspeed_rules import zero_stage
from megatron_crnet.ranks import FULL_RANK, POSITIONS, chain_starts, model_ranks
from megatron_crnet.rules import sequence_parallel


def position_shapes(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """(h_in, h_out) of each position."""
    h, f = model.hidden_size, model.ffn_hidden_size
    kv = h // model.num_attention_heads * (model.num_query_groups or model.num_attention_heads)
    return {"q": (h, h), "k": (h, kv), "v": (h, kv), "o": (h, h), "gate": (h, f), "up": (h, f), "down": (f, h)}


def linear_parameters(model: ModelConfig, layer: int) -> int:
    """Weights of the seven linear maps of a layer, without betas: h_in h_out, or r (h_in + h_out)."""
    shapes, ranks = position_shapes(model), model_ranks(model)[layer]
    return sum(
        h_in * h_out if ranks[p] == FULL_RANK else ranks[p] * (h_in + h_out) for p, (h_in, h_out) in shapes.items()
    )


def parameters_by_part(model: ModelConfig) -> dict[str, int]:
    """Parameter counts of the whole model: embedding, full-rank and low-rank maps, betas, norms, output."""
    h, layers = model.hidden_size, range(model.num_layers)
    full = [layer for layer in layers if model_ranks(model)[layer]["q"] == FULL_RANK]
    return {
        "embedding": model.vocab_size * h,
        "full-rank maps": sum(linear_parameters(model, layer) for layer in full),
        "low-rank maps": sum(linear_parameters(model, layer) for layer in layers if layer not in full),
        "betas": len(POSITIONS) * (model.num_layers - len(chain_starts(model))),
        "norms": (2 * model.num_layers + 1) * h,
        "output layer": model.vocab_size * h,
    }


def total_parameters(model: ModelConfig) -> int:
    """All parameters, embeddings included."""
    return sum(parameters_by_part(model).values())


def flops_per_token(model: ModelConfig, seq_length: int) -> float:
    """Floating-point operations of forward and backward for one token.

    Two for each weight of a matrix product forward, twice that backward; causal attention counts the half
    of the s x s products that is needed: 2 s h a layer forward. Element-wise work is left out.
    """
    linear = sum(linear_parameters(model, layer) for layer in range(model.num_layers))
    attention = 2 * seq_length * model.hidden_size * model.num_layers
    return 3.0 * (2 * (linear + model.hidden_size * model.vocab_size) + attention)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the fullest rank, from formulas; fragmentation and communication buffers are left out."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        """Sum of the parts."""
        return self.weights + self.gradients + self.optimizer + self.activations


def activation_elements(model: ModelConfig, layer: int) -> float:
    """Elements kept for backward for one token of one layer, without recomputation.

    12 h + 4 f + sum r with cross-layer outputs (Y of all positions is kept for beta's gradient); 8 h + 4 f + sum r
    without. Multi-head attention; grouped-query attention keeps less.
    """
    h, f = model.hidden_size, model.ffn_hidden_size
    ranks = sum(rank for rank in model_ranks(model)[layer].values() if rank != FULL_RANK)
    cross_layer = layer + 1 < model.num_layers and layer + 1 not in chain_starts(model)
    return (12 if cross_layer else 8) * h + 4 * f + ranks


def estimate_memory(config: Config, dp_size: int) -> MemoryEstimate:
    """A first estimate for one rank: states divided as ZeRO says, activations of the first pipeline stage."""
    model, parallel, stage = config.model, config.parallel, zero_stage(config)
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    size = 2 if config.training.dtype == "bf16" else 4
    weights = total_parameters(model) / (tp * pp)
    optimizer = weights * (8 if config.training.dtype == "fp32" and stage == 0 else 12)
    tokens = config.training.micro_batch_size * config.training.seq_length
    layers = range(-(-model.num_layers // pp))
    elements = sum(activation_elements(model, layer) for layer in layers)
    # 1F1B keeps as many micro-batches in flight on the first stage as there are stages
    activations = tokens * elements * size * pp / tp
    if not sequence_parallel(parallel):
        activations *= 1 if tp == 1 else 1.5  # norms and residual stream are then on every rank
    logits = tokens * model.vocab_size / tp * (size + 4)
    return MemoryEstimate(
        weights=weights * size / (dp_size if stage == 3 else 1),
        gradients=weights * 4 / (dp_size if stage >= 2 else 1),
        optimizer=optimizer / (dp_size if stage >= 1 else 1),
        activations=activations + (logits if pp == 1 else 0),
    )
