"""A frozen dense teacher beside the model in training: PELA's second step (docs/from-dense.md).

The teacher is cut as the model is: over tensor-parallel ranks, and a chunk of it beside each chunk of the model. It has
no optimizer and no gradients, and DeepSpeed does not know it: ZeRO does not partition it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_crnet.config.schema import Config, RecomputeConfig
from megatron_crnet.config.variants import as_variant
from megatron_crnet.model.block import pack
from megatron_crnet.model.distillation import FeatureMatch, add_gradient, masked_difference, squared_sum
from megatron_crnet.model.gpt import CRNetModel, build_model_chunks, call_model
from megatron_crnet.model.weights import Weight


def teacher_config(config: Config) -> Config:
    """The configuration of the teacher of a run: the full-rank model of the same shape, in the same layout."""
    # takes every layout and dtype
    plain = replace(config, recompute=RecomputeConfig(), deepspeed={"zero_optimization": {"stage": 1}})
    return as_variant(plain, "full_rank", hidden_dropout=0.0, attention_dropout=0.0)


def build_teacher(config: Config, value_of: Callable[[Weight], Tensor] | None = None) -> list[CRNetModel] | None:
    """This rank's part of the teacher of a run, frozen: a chunk beside each chunk of the model. None without one.

    Args:
        value_of: gives a whole weight; None draws initial ones, where only shapes count.
    """
    if config.distillation.teacher is None:
        return None
    chunks = build_model_chunks(teacher_config(config), value_of)
    for chunk in chunks:
        chunk.requires_grad_(False).eval()
        if chunk.post_process and not config.distillation.kd_beta:
            chunk.post_process, chunk.decoder.final_layernorm = False, None
            del chunk.output_layer
    return chunks


class Distillation:
    """Runs the teacher before the model on every micro-batch of a step, and adds both losses' gradients.

    Args:
        teacher: see `build_teacher`.
    """

    def __init__(self, config: Config, teacher: list[CRNetModel]) -> None:
        self.teacher, self.section = teacher, config.distillation
        transformer = teacher[0].config
        self._tp = parallel_state.get_tensor_model_parallel_world_size()
        self._tp_rank = parallel_state.get_tensor_model_parallel_rank()
        self._shards_sequence = transformer.sequence_parallel
        self._elements = transformer.hidden_size * transformer.num_layers, config.model.vocab_size
        self._device = next(teacher[0].parameters()).device
        self.begin_step(1)

    @property
    def weights(self) -> list[Tensor]:
        """Every tensor of the teacher's weights."""
        return [weight for chunk in self.teacher for weight in chunk.parameters()]

    @property
    def width(self) -> int:
        """What crosses to the next pipeline stage for the teacher, per local sequence position."""
        return int(self.teacher[0].config.hidden_size)

    def begin_step(self, tokens: float) -> None:
        """Before the micro-batches of a step.

        Args:
            tokens: trained tokens of the global batch.
        """
        # DeepSpeed averages gradients over data-parallel ranks, as run_schedule says
        scale = 2.0 * parallel_state.get_data_parallel_world_size() / max(tokens, 1.0)
        weights = self.section.kd_alpha, self.section.kd_beta
        self._factors = [scale * weight / count for weight, count in zip(weights, self._elements, strict=True)]
        self.squares = torch.zeros(2, dtype=torch.float64, device=self._device)
        """Sums of the squared differences of features and logits, as `loss_totals` takes them."""

    def losses(self, tokens: float) -> dict[str, float]:
        """The losses by name, without their weights, once `squares` has the sums over all ranks; those whose weight is
        0 are left out."""
        weights = {"feature_loss": self.section.kd_alpha, "logit_loss": self.section.kd_beta}
        means = (total / tokens / count for total, count in zip(self.squares.tolist(), self._elements, strict=True))
        return {name: mean for (name, weight), mean in zip(weights.items(), means, strict=True) if weight}

    def forward(
        self, model: CRNetModel, call: Callable[..., Tensor], batch: dict[str, Tensor], received: Tensor | None
    ) -> Tensor:
        """One micro-batch: what `call_model` returns, and behind it, for another stage, the teacher's residual stream.

        Args:
            model: the chunk; `call` runs its forward pass.
            received: what the stage before has sent; None on the first one.
        """
        teacher = self.teacher[model.vp_stage or 0]
        if received is not None:
            own, of_teacher = _split(received, self.width)
            model.set_input_tensor(own)
            teacher.set_input_tensor(of_teacher.detach())
        targets, taught = self._taught(teacher, batch)
        trained = batch["loss_mask"].bool()
        match = FeatureMatch(targets, self._local(trained.t()), self._factors[0]) if targets else None
        if model.post_process:
            output = self._token_losses(model, call, batch, match, taught if teacher.post_process else None)
        else:
            output = pack(call_model(call, batch, match), (taught,))
        if match is not None:
            self.squares[0] += match.squares * (self._tp if self._shards_sequence else 1)
        return output

    @torch.no_grad()
    def _taught(self, teacher: CRNetModel, batch: dict[str, Tensor]) -> tuple[dict[int, Tensor], Tensor]:
        """The outputs of the teacher's blocks by layer, if they are used, and what its chunk returns."""
        targets: dict[int, Tensor] = {}

        def keep(layer: int, x: Tensor) -> Tensor:
            targets[layer] = x
            return x

        return targets, call_model(teacher, _without_labels(batch), keep if self.section.kd_alpha else None)

    def _local(self, per_token: Tensor) -> Tensor:
        """This rank's part of [s, b]."""
        return per_token.chunk(self._tp)[self._tp_rank] if self._shards_sequence else per_token

    def _token_losses(
        self,
        model: CRNetModel,
        call: Callable[..., Tensor],
        batch: dict[str, Tensor],
        match: FeatureMatch | None,
        targets: Tensor | None,
    ) -> Tensor:
        """Cross-entropy of every token, [b, s], of logits [b, s, V/t] that are drawn to `targets`."""
        if targets is None:
            return call_model(call, batch, match)
        logits = call_model(call, _without_labels(batch), match)
        difference = masked_difference(logits, targets, batch["loss_mask"].bool())
        self.squares[1] += squared_sum(difference) * self._tp
        logits = add_gradient(logits, difference, self._factors[1])
        return model.losses_of_logits(logits, batch["labels"])


def _split(joined: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The inverse of `pack` with one output, which has this width; views, no copies."""
    local, b, whole = joined.shape
    own, of_teacher = joined.flatten().split([local * b * (whole - width), local * b * width])
    return own.view(local, b, -1), of_teacher.view(local, b, -1)


def _without_labels(batch: dict[str, Tensor]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != "labels"}
