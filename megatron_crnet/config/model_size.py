"""Parameters and useful floating-point operations of the whole model, from formulas.

Symbols: h hidden, f FFN width, L layers, V vocabulary, s sequence, r rank. For one rank: `planning/estimate.py`.
"""

from __future__ import annotations

from typing import NamedTuple

from megatron_crnet.config.architectures.base import NORMS, QK_NORMS
from megatron_crnet.config.positions import FULL_RANK, PositionTable, head_width, position_table, ties_head
from megatron_crnet.config.schema import ModelConfig

UNUSED_SHARE = 0.05
"""Share of the parameters above which unused rows are reported; padding to a round number stays below."""


class MapCounts(NamedTuple):
    """Weights of linear maps: of full rank, of factors, r (h_in + h_out), and of frozen maps beside the factors."""

    full: int
    factors: int
    frozen: int


def map_counts(table: PositionTable, layer: int, *, active: bool = False, experts: bool = False) -> MapCounts:
    """Of a layer.

    Args:
        active: of experts, only as many as a token passes.
        experts: those of experts alone.
    """
    full = factors = frozen = 0
    for name, (h_in, h_out) in table.shapes.items():
        if experts and name in table.architecture.names:
            continue
        rank, count = table.ranks[layer][name], table.uses(name) if active else table.copies(name)
        full += count * h_in * h_out * (rank == FULL_RANK)
        factors += count * rank * (h_in + h_out)  # FULL_RANK is 0
        frozen += count * h_in * h_out * (rank != FULL_RANK and table.method.has_frozen)
    return MapCounts(full, factors, frozen)


def _all_layers(table: PositionTable, **which: bool) -> MapCounts:
    each = (map_counts(table, layer, **which) for layer in range(len(table.ranks)))
    return MapCounts(*map(sum, zip(*each, strict=True)))


def parameters_by_part(model: ModelConfig) -> dict[str, int]:
    """Parameter counts of the whole model: embedding, full-rank and low-rank maps, betas, norms, output."""
    h, table = model.hidden_size, position_table(model)
    (full, factors, frozen), architecture = _all_layers(table), table.architecture
    qk_norms = model.num_layers * len(QK_NORMS) * head_width(model) if architecture.has_qk_norm else 0
    return {
        "embedding": model.vocab_size * h,
        **({} if architecture.is_rotary else {"positions": (model.max_position_embeddings or 0) * h}),
        "full-rank maps": full,
        "low-rank maps": factors,
        **({"frozen maps": frozen} if frozen else {}),
        **({"routers": model.num_layers * table.num_experts * h} if table.num_experts else {}),
        "betas": len(architecture.names) * (model.num_layers - len(table.chain_starts)),
        **({"biases": model.num_layers * sum(w for _, w in table.shapes.values())} if architecture.has_biases else {}),
        "norms": (len(NORMS) * model.num_layers + 1) * h * len(architecture.norm_suffixes) + qk_norms,
        **({} if table.ties_head else {"output layer": model.vocab_size * h}),
    }


def total_parameters(model: ModelConfig) -> int:
    """All parameters, embeddings included."""
    return sum(parameters_by_part(model).values())


def expert_parameters(model: ModelConfig) -> int:
    """Parameters of all experts, which expert parallelism spreads."""
    return sum(_all_layers(position_table(model), experts=True))


def active_parameters(model: ModelConfig) -> int:
    """Parameters that a token passes: of experts, `model.moe_router_topk`."""
    table = position_table(model)
    return total_parameters(model) - sum(_all_layers(table)) + sum(_all_layers(table, active=True))


def remark_on_unused_rows(model: ModelConfig, tokens: int) -> str:
    """A remark on rows of embedding and output layer that no token uses; empty if they are few.

    Args:
        tokens: the tokenizer's largest id plus one. Rows beyond it are never trained on a token.
    """
    copies = 1 if ties_head(model) else 2
    unused, total = copies * (model.vocab_size - tokens) * model.hidden_size, total_parameters(model)
    if unused < UNUSED_SHARE * total:
        return ""
    return (
        f"{unused / 1e6:.1f}M of {total / 1e6:.1f}M parameters ({unused / total:.0%}) are rows of the embedding and "
        f"the output layer that are never used: model.vocab_size is {model.vocab_size}, the tokenizer's largest id "
        f"{tokens - 1}"
    )


def flops_per_token(model: ModelConfig, seq_length: float, whole_attention: bool = False) -> float:
    """Floating-point operations of forward and backward for one token.

    Matrix products count 2 per weight forward and 4 backward (2 of frozen weights), causal attention 2 s h per layer
    forward; of experts those that a token passes, and the router. Element-wise operations are left out.

    Args:
        seq_length: where attention stays within documents of lengths n: sum(n^2) / sum(n).
        whole_attention: count attention without the causal mask, 4 s h per layer forward (12 L h s in all), as PaLM,
            torchtitan and nanochat do.
    """
    table = position_table(model)
    full, factors, frozen = _all_layers(table, active=True)
    linear = full + factors + model.num_layers * table.num_experts * model.hidden_size
    width = model.num_attention_heads * head_width(model)
    attention = (4 if whole_attention else 2) * seq_length * width * model.num_layers
    return 4.0 * frozen + 3.0 * (2 * (linear + model.hidden_size * model.vocab_size) + attention)
