"""One step's forward and backward passes under Megatron-Core's schedules.

A schedule reads the shape of what crosses pipeline stages from the outermost model's `config.hidden_size`;
`ScheduledChunk` is that outermost model, and its configuration says how wide the packed boundary is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn

from megatron_crnet.config.megatron import CRNetTransformerConfig
from megatron_crnet.data.documents import DOCUMENT_LENGTHS
from megatron_crnet.distributed.consensus import Vote
from megatron_crnet.engine.distillation import Distillation
from megatron_crnet.model.block import boundary_widths, interleaved_width
from megatron_crnet.model.gpt import CRNetModel, call_model

Batch = dict[str, Tensor]


class ScheduledChunk(nn.Module):
    """What a schedule sees of a model chunk: a call, a configuration of its own, and `set_input_tensor`.

    Args:
        model: the chunk.
        call: runs the chunk's forward pass; DeepSpeed's engine where its hooks are needed.
        no_sync: context in which gradients of all but the last micro-batch are accumulated.
        progress: is told of each micro-batch.
    """

    def __init__(
        self,
        model: CRNetModel,
        call: Callable[..., Tensor],
        no_sync: Callable[[], Any] | None,
        progress: Callable[[], None],
    ) -> None:
        super().__init__()
        self.model, self.call, self.progress = model, call, progress
        self.config = copy.copy(model.config)
        self.config.no_sync_func = no_sync
        self.model_type = ModelType.encoder_or_decoder
        self.vp_stage = model.vp_stage
        self._received: Tensor | None = None

    def set_input_tensor(self, tensor: Any) -> None:
        """Hand over the packed boundary tensor that the stage before sent; None on the first stage."""
        self._received = tensor[0] if isinstance(tensor, list) else tensor

    def forward(self, batch: Batch, distillation: Distillation | None = None) -> Tensor:
        """Token losses [b, s] on the last stage (logits without labels), the packed boundary tensor elsewhere."""
        self.progress()
        received, self._received = self._received, None
        if distillation is not None:
            output = distillation.forward(self.model, self.call, batch, received)
        else:
            self.model.set_input_tensor(received)
            output = call_model(self.call, batch)
        self.progress()
        return output


def _received_width(config: CRNetTransformerConfig, rank: int) -> int | None:
    """Width of what pipeline rank `rank` receives under 1F1B; None for ranks that receive nothing."""
    if not 0 < rank < config.pipeline_model_parallel_size:
        return None
    return sum(boundary_widths(config, get_transformer_layer_offset(config, None, rank)))


def _shapes_of_this_rank(
    config: CRNetTransformerConfig, besides: int, receive: list[tuple[int, ...]], send: list[tuple[int, ...]]
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """What 1F1B receives from the stage before and sends to the stage after; boundaries may differ."""
    rank = parallel_state.get_pipeline_model_parallel_rank()
    received, sent = _received_width(config, rank), _received_width(config, rank + 1)
    return (
        [(*shape[:2], received + besides if received else shape[2]) for shape in receive],
        [(*shape[:2], sent + besides if sent else shape[2]) for shape in send],
    )


def _loss(mask: Tensor, factors: Iterable[float | Tensor], token_losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = total = (token_losses.float() * mask).sum()
    for factor in factors:
        loss = loss * factor
    return loss, {"loss_sum": total.detach(), "tokens": mask.sum()}


def _forward_step(
    factors: Sequence[float | Tensor],
    distillation: Distillation | None,
    iterator: Iterator[Batch],
    chunk: ScheduledChunk,
) -> tuple[Tensor, Any]:
    batch = next(iterator)
    return chunk(batch, distillation), partial(_loss, batch["loss_mask"], factors)


def _logits_at(position: int, logits: Tensor, non_loss_data: bool) -> Tensor:
    """Logits of all vocabulary shards at one position of the first sequence."""
    return gather_from_tensor_model_parallel_region(logits[0, position])


def _logits_step(position: int, iterator: Iterator[Batch], chunk: ScheduledChunk) -> tuple[Tensor, Any]:
    return chunk(next(iterator)), partial(_logits_at, position)


def _run(
    chunks: Sequence[ScheduledChunk], batches: list[Batch], forward_step: Any, besides: int = 0, **options: Any
) -> list[Any]:
    """Run a schedule.

    Args:
        besides: what crosses pipeline stages beside the chunks' own, in width.
    """
    shape, config = batches[0]["tokens"].shape, chunks[0].model.config
    one_f_one_b = config.pipeline_model_parallel_size > 1 and len(chunks) == 1
    for chunk in chunks:
        chunk.config.hidden_size = (interleaved_width(config) or config.hidden_size) + besides
    iterators = [iter(batches) for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=len(batches),
        seq_length=shape[1],
        micro_batch_size=shape[0],
        adjust_tensor_shapes_fn=partial(_shapes_of_this_rank, config, besides) if one_f_one_b else None,
        **options,
    )


def run_schedule(
    chunks: Sequence[ScheduledChunk],
    batches: list[Batch],
    *,
    forward_only: bool = False,
    tokens: float = 1.0,
    distillation: Distillation | None = None,
) -> list[dict[str, Tensor]]:
    """Run all micro-batches of one step.

    Megatron-Core divides each micro-batch's loss by their number and DeepSpeed averages gradients over
    data-parallel ranks; both are undone here, so that the gradient is that of the mean over all tokens.

    Args:
        batches: this rank's micro-batches, each with tokens, labels, position_ids, loss_mask of [b, s], and
            `document_lengths` where attention stays within documents.
        tokens: trained tokens of the global batch over all ranks.
        distillation: adds its losses' gradients, and counts them.

    Returns:
        On the last pipeline stage, loss sum and token count of each micro-batch; else an empty list.
    """
    besides = 0
    if distillation is not None:
        distillation.begin_step(tokens)
        besides = distillation.width
    step = partial(_forward_step, [loss_scale(len(batches), tokens)], distillation)
    return _run(chunks, batches, step, besides, forward_only=forward_only)


def loss_scale(micro_batches: int, tokens: float) -> float:
    """What the losses of a step's micro-batches are multiplied by, before they are divided by their number."""
    return micro_batches * parallel_state.get_data_parallel_world_size() / max(tokens, 1.0)


def run_micro_batch(chunks: Sequence[ScheduledChunk], batch: Batch, factors: Tensor) -> dict[str, Tensor]:
    """Both passes of one of a step's micro-batches, where there are no pipeline stages; see `run_schedule`.

    Args:
        factors: `loss_scale` and 1 / (number of micro-batches), [2] on the device.
    """
    (result,) = _run(chunks, [batch], partial(_forward_step, factors.unbind(), None))
    found: dict[str, Tensor] = result
    return found


def run_logits(chunks: Sequence[ScheduledChunk], batch: Batch, copies: int, position: int) -> Tensor | None:
    """Logits [vocabulary] at `position` of the batch's first sequence; None before the last pipeline stage.

    Args:
        copies: how often the batch passes through, because virtual stages need as many as there are stages.
    """
    step = partial(_logits_step, position)
    results = _run(chunks, [batch] * copies, step, forward_only=True, collect_non_loss_data=True)
    vocabulary = chunks[0].model.config.table.vocabulary
    return results[0][:vocabulary] if results else None  # without padding


@dataclass(frozen=True)
class GlobalWork:
    """What one step's global batch holds.

    Attributes:
        trained: tokens whose loss counts.
        context: sum over all positions of the length of their document, or of their row where attention reaches over
            whole rows.
    """

    trained: int
    context: float


def global_work(batches: list[Batch], device: torch.device) -> GlobalWork:
    """Add up every rank's micro-batches; a collective call."""
    context = 0.0
    for batch in batches:
        rows, length = batch["tokens"].shape
        lengths = batch.get(DOCUMENT_LENGTHS)
        context += rows * length**2 if lengths is None else float(lengths.double().square().sum())
    totals = torch.tensor([0.0, context], dtype=torch.float64, device=device)
    totals[0] = torch.stack([batch["loss_mask"].sum() for batch in batches]).sum()
    dist.all_reduce(totals)
    # ranks of the same replica have the same batches
    replicas = dist.get_world_size() // parallel_state.get_data_parallel_world_size()
    trained, context = (totals / replicas).tolist()
    return GlobalWork(round(trained), context)


def loss_totals(
    results: list[dict[str, Tensor]],
    device: torch.device,
    vote: Vote | None = None,
    others: Tensor | None = None,
) -> tuple[float, float]:
    """Sum of the loss in nats and number of tokens over all ranks; the same numbers on every rank.

    Only last pipeline stages contribute a loss, and their tensor-parallel ranks contribute the same.

    Args:
        vote: is counted by the same all-reduce.
        others: further sums, [n] in fp64, which become those over all ranks by the same all-reduce; what
            tensor-parallel ranks do not have alike, each has times their number.
    """
    own = [] if vote is None else vote.cast()
    totals = torch.tensor([0.0, 0.0, *own], dtype=torch.float64, device=device)
    for result in results:
        totals[:2] += torch.stack([result["loss_sum"].double(), result["tokens"].double()])
    if others is not None:
        totals = torch.cat([totals, others])
    dist.all_reduce(totals)
    replicas = parallel_state.get_tensor_model_parallel_world_size()
    if others is not None:
        totals, summed = totals.split([2 + len(own), len(others)])
        others.copy_(summed / replicas)
    loss_sum, tokens, *sums = totals.tolist()
    if vote is not None:
        vote.count(sums)
    return loss_sum / replicas, tokens / replicas
