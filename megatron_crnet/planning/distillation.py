"""What a teacher adds to a step of a rank (`distillation`): its weights, what its losses keep, its forward pass.

Everything is nothing without a teacher.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_crnet.planning.shards import LocalModel


def teacher_weights(model: LocalModel) -> int:
    """Bytes of the teacher's weights, which ZeRO does not partition."""
    return sum(p.numel for p in model.teacher.weights) * model.element if model.teacher else 0


def boundary_width(model: LocalModel) -> int:
    """What crosses to another pipeline stage for the teacher, in elements per local token."""
    return model.config.model.hidden_size if model.teacher else 0


def kept_differences(model: LocalModel, passes: list[int]) -> float:
    """Bytes of the differences that backward needs, of the outputs of blocks and of logits.

    Args:
        passes: in flight, of each chunk.
    """
    if model.teacher is None:
        return 0.0
    section, shape, last = model.config.distillation, model.config.model, model.chunks[-1]
    layers = sum(n * len(chunk.layers) for n, chunk in zip(passes, model.chunks, strict=True))
    features = layers * model.local_tokens * shape.hidden_size if section.kd_alpha else 0
    vocabulary = model.transformer.table.local_vocabulary
    logits = model.tokens * vocabulary if section.kd_beta and last.predicts else 0
    return (features + logits) * model.element


def embedding_call(model: LocalModel) -> str:
    """The tensor-parallel call that sums the parts of the embedding's rows."""
    # learned positions are added to the whole sequence, which is cut after that
    cuts = model.transformer.sequence_parallel and model.transformer.table.architecture.is_rotary
    return "reduce_scatter" if cuts else "all_reduce"


def teacher_traffic(model: LocalModel) -> Iterator[tuple[str, float]]:
    """Tensor-parallel calls of the teacher's forward pass and their elements per token."""
    for chunk in model.teacher.chunks if model.teacher else ():
        h, pairs = model.config.model.hidden_size, len(model.transformer.table.architecture.rows) * len(chunk.layers)
        columns = pairs + chunk.predicts
        if model.transformer.sequence_parallel:
            yield from (("all_gather", columns * h), ("reduce_scatter", pairs * h))
        else:
            yield "all_reduce", pairs * h
        if chunk.embeds:
            yield embedding_call(model), h
