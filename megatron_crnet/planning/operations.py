"""Floating-point operations of one rank's step, as PyTorch's counter counts them.

A product of [m, k] and [k, n] is 2 m k n; backward does two products for each of forward. Attention counts without
the causal mask: 2 products of s x s forward, 5 backward. Element-wise work is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_crnet.config.batch import BatchPlan
from megatron_crnet.config.model_size import position_shapes
from megatron_crnet.config.positions import GROUPS
from megatron_crnet.planning.shards import Chunk, LocalModel


@dataclass(frozen=True)
class Operations:
    """Of one rank and step.

    Attributes:
        passes: forward and backward.
        recomputation: what backward does again.
        attention: how much of both is attention.
    """

    passes: int
    recomputation: int
    attention: int

    @property
    def total(self) -> int:
        """What the hardware does."""
        return self.passes + self.recomputation


@dataclass(frozen=True)
class LayerProducts:
    """Forward operations of one layer for one micro-batch.

    Attributes:
        inputs: products with A, or with full-rank weights.
        outputs: products with B, by group; none in a full-rank layer.
        attention: q k and its product with v.
    """

    inputs: int
    outputs: dict[str, int]
    attention: int

    @property
    def linear(self) -> int:
        """All products with weights."""
        return self.inputs + sum(self.outputs.values())


def estimate_operations(model: LocalModel, plan: BatchPlan) -> Operations:
    """The step of a rank of this stage."""
    tokens = plan.micro_batch_size * plan.seq_length
    passes = again = attention = 0
    for chunk in model.chunks:
        for layer in chunk.layers:
            products = layer_products(model, layer, plan)
            passes += 3 * products.linear + products.attention * 7 // 2
            attention += products.attention * 7 // 2
        if chunk.predicts:
            vocabulary = model.config.model.vocab_size // model.tp
            passes += 3 * 2 * tokens * model.config.model.hidden_size * vocabulary
        repeated, repeated_attention = _recomputation(model, chunk, plan)
        again, attention = again + repeated, attention + repeated_attention
    count = plan.num_microbatches
    return Operations(passes * count, again * count, attention * count)


def layer_products(model: LocalModel, layer: int, plan: BatchPlan) -> LayerProducts:
    """Products of layer `layer` (from 0)."""
    tokens, t = plan.micro_batch_size * plan.seq_length, model.tp
    # what is not split over its width is split over the sequence, or done by every rank
    local = tokens // t if model.transformer.sequence_parallel else tokens
    shapes, ranks = position_shapes(model.config.model), model.transformer.ranks[layer]
    attention = 4 * tokens * plan.seq_length * model.config.model.hidden_size // t
    if model.transformer.is_full_rank(layer):
        return LayerProducts(sum(2 * tokens * h_in * h_out // t for h_in, h_out in shapes.values()), {}, attention)
    inputs, outputs = 0, {}
    for name, positions in GROUPS.items():
        is_row, h_in, rank = len(positions) == 1, shapes[positions[0]][0], sum(ranks[p] for p in positions)
        inputs += 2 * tokens * (h_in // t) * rank if is_row else 2 * local * h_in * rank
        outputs[name] = sum(
            2 * local * shapes[p][1] * ranks[p] if is_row else 2 * tokens * (shapes[p][1] // t) * ranks[p]
            for p in positions
        )
    return LayerProducts(inputs, outputs, attention)


def _recomputation(model: LocalModel, chunk: Chunk, plan: BatchPlan) -> tuple[int, int]:
    """What the backward pass of one micro-batch repeats (`recompute/segment.py`), and how much of it is attention."""
    config, again, attention = model.transformer, 0, 0
    for segment in chunk.segments:
        for layer in segment:
            products = layer_products(model, layer, plan)
            if config.recompute_strategy == "full":
                again, attention = again + products.linear, attention + products.attention
                continue
            attention += 0 if config.recompute_keep_attention_output else products.attention
            if config.recompute_strategy == "inverse" and len(segment) > 1:
                # every layer but the first is gone down from, which repeats its products with B
                again += 0 if layer == segment[0] else sum(products.outputs.values())
                continue
            again += 0 if outputs_are_kept(model, chunk, segment, layer) else _repeated(model, layer, products)
    return again + attention, attention


def outputs_are_kept(model: LocalModel, chunk: Chunk, segment: range, layer: int) -> bool:
    """Whether a layer's outputs lie where the next segment starts: under `replay`, or in a segment of one layer."""
    return layer == segment[-1] and model.transformer.has_next(layer) and segment is not chunk.segments[-1]


def _repeated(model: LocalModel, layer: int, products: LayerProducts) -> int:
    # a full-rank layer is a segment of its own, so its products are repeated where its outputs are not kept
    return products.linear if model.transformer.is_full_rank(layer) else sum(products.outputs.values())
