"""DeepSpeed's engine under Megatron-Core's schedules: who accumulates, who reduces, who divides.

Two ways, by ZeRO stage:

    0, 1   plain autograd accumulates into `.grad` (also through a pipeline); everything is reduced once
           after the last backward pass
    2, 3   DeepSpeed's hooks reduce and partition gradients during every backward pass, so the forward pass
           goes through the engine

Megatron-Core counts micro-batches and DeepSpeed is told 1, or gradients would be divided twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import deepspeed
import torch
from deepspeed.runtime.activation_checkpointing import checkpointing
from deepspeed.runtime.constants import PIPE_REPLICATED
from deepspeed.runtime.utils import clip_grad_norm_
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_crnet.config.cuda_graphs import uses_cuda_graphs
from megatron_crnet.config.deepspeed import deepspeed_config, is_plain, offloads_optimizer, zero_stage
from megatron_crnet.config.positions import METHODS
from megatron_crnet.config.schema import Config
from megatron_crnet.distributed.consensus import Vote
from megatron_crnet.distributed.process_groups import MegatronMpu, NormMpu, ParallelContext
from megatron_crnet.engine.cuda_graph import MicroBatchGraph
from megatron_crnet.engine.distillation import Distillation
from megatron_crnet.engine.expert_parallel import clip_with_experts, forget_groups, spread_experts
from megatron_crnet.engine.galore import is_projected
from megatron_crnet.engine.inverse_guard import InverseGuard
from megatron_crnet.engine.optimizer import (
    ParamGroup,
    build_optimizer,
    build_scheduler,
    count_groups,
    lr_multiplier,
    parameter_groups,
    position,
)
from megatron_crnet.engine.rank_change import States
from megatron_crnet.engine.reduction import sum_over_tensor_parallel, sum_over_tied_copies
from megatron_crnet.engine.relora import restart
from megatron_crnet.engine.schedule import (
    Batch,
    ScheduledChunk,
    loss_scale,
    loss_totals,
    run_logits,
    run_micro_batch,
    run_schedule,
)
from megatron_crnet.engine.state_kinds import MASTER
from megatron_crnet.engine.zero import release, zero_state
from megatron_crnet.model.gpt import CRNetModel
from megatron_crnet.model.linear import LowRankGroup
from megatron_crnet.model.reference import EMBEDDING
from megatron_crnet.model.weights import Weight, by_parameter, canonical_weights
from megatron_crnet.recompute.rng import RngStates
from megatron_crnet.utils.noise import without_memory_lines


class TrainEngine:
    """A model on its ranks with its optimizer and schedule.

    Args:
        chunks: this rank's model chunks.
        teacher: of `distillation` (`build_teacher`), where there is one.
    """

    def __init__(
        self,
        config: Config,
        chunks: list[CRNetModel],
        context: ParallelContext,
        teacher: list[CRNetModel] | None = None,
    ) -> None:
        self.config, self.chunks, self.context = config, chunks, context
        self.distillation = Distillation(config, teacher) if teacher else None
        self.stage = zero_stage(config)
        self._graph: MicroBatchGraph | None = None
        if context.device.type == "cuda" and uses_cuda_graphs(config):
            self._graph = MicroBatchGraph(lambda *args: run_micro_batch(self.scheduled, *args), context.device)
        modules: list[nn.Module] = [*chunks, *spread_experts(config, chunks)]
        module = modules[0] if len(modules) == 1 else nn.ModuleList(modules)
        in_fp32: dict[nn.Parameter, Tensor] = {}
        # an fp32 model is not cast, and DeepSpeed keeps the factory, so these values would stay; stage 3 packs all
        # parameters into one buffer of one dtype: see _weights_changed
        if config.training.bf16 and self.stage < 3:
            in_fp32 = {p: p.detach().clone() for p in module.parameters() if p.dtype == torch.float32}
        elements = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        settings = deepspeed_config(config, context.dp_size, elements)
        with without_memory_lines():
            self.deepspeed, *_ = deepspeed.initialize(
                model=module,
                optimizer=self._optimizer_factory(in_fp32),
                model_parameters=self._parameter_groups(),
                config=settings,
                mpu=MegatronMpu(),
                dist_init_required=False,
            )
        checkpointing.configure(MegatronMpu(), deepspeed_config=settings)
        self.optimizer = self.deepspeed.optimizer
        inverts = config.recompute.traits.inverts
        self.guard = InverseGuard([chunk.decoder for chunk in chunks], context.device) if inverts else None
        """Of `inverse`."""
        self.zero = zero_state(self.deepspeed, self.stage)
        self.zero.forget_first_step()
        self.zero.prepare(self._projected, context.heartbeat.progress, chunks[0].glue.accumulate_)
        self._weights_changed()
        self.scheduler, self._steps = build_scheduler(config, self.optimizer), 0
        self.last_grad_norm: float | None = None
        self.distillation_losses: dict[str, float] = {}
        """Of the last step, by name, without their weights."""
        self.restarts = 0
        """ReLoRA's restarts of the run so far."""
        hooked = self.stage >= 2
        self.scheduled = [
            ScheduledChunk(
                chunk,
                (self.deepspeed if hooked else chunk).__call__,
                self._accumulating if hooked else None,
                context.heartbeat.progress,
            )
            for chunk in chunks
        ]

    def _parameter_groups(self) -> list[ParamGroup]:
        section, config, weights = self.config.optimizer, self.config, self.weights
        needs_equal_numbers = config.parallel.pipeline_model_parallel_size > 1 and not config.training.bf16
        return parameter_groups(
            self.chunks,
            section.weight_decay,
            partial_apart=self.stage >= 2,
            multipliers={weight.parameter: lr_multiplier(weight.name, section.lr_multipliers) for weight in weights},
            projected={weight.parameter for weight in self._projected},
            at_least=count_groups(config) if needs_equal_numbers else 0,
        )

    @property
    def weights(self) -> list[Weight]:
        """This rank's part of every canonical weight."""
        return [weight for chunk in self.chunks for weight in canonical_weights(chunk)]

    @property
    def _projected(self) -> list[Weight]:
        section, table = self.config.optimizer, self.chunks[0].config.table
        return [weight for weight in self.weights if is_projected(weight.name, section, table)]

    def _optimizer_factory(
        self, in_fp32: dict[nn.Parameter, Tensor]
    ) -> Callable[[list[ParamGroup]], torch.optim.Optimizer]:
        def factory(groups: list[ParamGroup]) -> torch.optim.Optimizer:
            # DeepSpeed has just cast every parameter to bf16; beta goes back to fp32 before ZeRO sees it
            for parameter, value in in_fp32.items():
                parameter.data = value.to(parameter.device)
            return build_optimizer(groups, self.config.optimizer, on_host=offloads_optimizer(self.config))

        return factory

    def _weights_changed(self) -> None:
        """What follows from new betas: fp32 copies under bf16 ZeRO-3, segments under `inverse`. A collective call."""
        rounded = self.stage == 3 and self.config.training.bf16
        if not self.guard and not rounded:
            return
        groups = [group for chunk in self.chunks for group in chunk.modules() if _has_residual(group)]
        betas = {group: self.zero.exact(group.beta) for group in groups}
        if rounded:
            for group, beta in betas.items():
                group.beta_fp32 = beta
        if self.guard:
            self.guard.plan(betas)

    @torch.no_grad()
    def calibrate_output_norms(self, batches: list[Batch]) -> None:
        """Before the first step under `inverse`: plan segments by the norms of outputs, from a few micro-batches."""
        if not self.guard or self.guard.is_calibrated or not METHODS[self.config.model.variant].is_chained:
            return
        self.deepspeed.train()
        with RngStates.capture().scope():
            # virtual stages need as many micro-batches as there are stages
            few = batches[: self.config.parallel.pipeline_model_parallel_size]
            run_schedule(self.scheduled, few, forward_only=True)
        self._weights_changed()
        self.guard.is_calibrated = True

    @contextmanager
    def _accumulating(self) -> Iterator[None]:
        self.deepspeed.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self.deepspeed.set_gradient_accumulation_boundary(True)

    def forward_backward(self, batches: list[Batch], tokens: int, vote: Vote | None = None) -> float:
        """All micro-batches of one step; gradients are left reduced over every group. Returns the mean cross-entropy.

        Args:
            batches: this rank's micro-batches, tensors of [b, s].
            tokens: trained tokens of the global batch.
            vote: is counted together with the loss.
        """
        results = self.accumulate(batches, tokens)
        self.context.heartbeat.progress()
        self.reduce_gradients()
        squares = self.distillation.squares if self.distillation else None
        loss_sum, count = loss_totals(results, self.context.device, vote, squares)
        if not count:  # a batch without labels: see training/callbacks/faults.py
            return math.nan
        if self.distillation:
            self.distillation_losses = self.distillation.losses(count)
        return loss_sum / count

    def accumulate(self, batches: list[Batch], tokens: int) -> list[dict[str, Tensor]]:
        """The passes of one step alone; see `forward_backward` and `run_schedule`."""
        assert bool(self.distillation) == bool(self.config.distillation.teacher), "a run trains with its teacher"
        self.calibrate_output_norms(batches)
        self.deepspeed.train()
        checkpointing.reset()  # frees what an abandoned step has left in DeepSpeed's hands
        self.deepspeed.set_gradient_accumulation_boundary(True)
        if self._graph is not None and self._graph.is_for(batches):
            return self._graph.run(batches, loss_scale(len(batches), tokens), self.context.heartbeat.progress)
        return run_schedule(self.scheduled, batches, tokens=tokens, distillation=self.distillation)

    def update(self) -> tuple[float, float]:
        """Clip, update the weights, advance the schedule. Returns gradient norm and learning rate.

        A gradient norm that is not finite changes no weight and no moment: DeepSpeed drops such gradients.
        """
        self.context.heartbeat.progress()
        lr, plain = self.current_lr, is_plain(self.config)
        norm = self._clip() if plain else 0.0
        if math.isfinite(norm):
            self.deepspeed.step()
        else:
            self.deepspeed.zero_grad()
        self._weights_changed()
        self._advance_schedule()
        self.last_grad_norm = norm if plain else float(self.deepspeed.get_global_grad_norm())
        return self.last_grad_norm, lr

    def discard(self) -> None:
        """Instead of `update`: drop the gradients and advance the schedule; weights and moments stay as they are.

        Each ZeRO stage keeps gradients in places of its own; what all of them share is that DeepSpeed drops
        gradients that are not finite, so they are made so: all of them, because in some stages each rank decides by
        the part that it keeps.
        """
        if is_plain(self.config):
            self.deepspeed.zero_grad()
        else:
            self.zero.poison_gradients()
            self.deepspeed.step()
        self._advance_schedule()

    def restart_if_due(self) -> None:
        """ReLoRA's restart after an update, or a step that was dropped, where the configuration says so."""
        interval = self.config.relora.restart_interval
        if interval and self._steps % interval == 0 and self._steps < self.config.training.train_steps:
            self.restarts += 1
            restart(self.zero, self.chunks, self.config.relora, self.config.training.seed, self.restarts)

    def _advance_schedule(self, steps: int = 1) -> None:
        before, self._steps = self._steps, self._steps + steps
        # the scheduler stands at the step to come
        self.scheduler.step(position(self.config, self._steps + 1) - position(self.config, before + 1))

    @torch.no_grad()
    def states(self, kinds: Sequence[str] = (MASTER,)) -> States:
        """This rank's fp32 weights, or also moments, by canonical name, in host memory; a collective call."""
        found: States = {}
        for parameter, weights in self._weights_by_parameter().items():
            for kind in (kind for kind in kinds if kind in self.zero.kinds_of(parameter)):
                whole = self.zero.read(parameter, kind)
                assert whole is not None
                for weight in weights:
                    found.setdefault(weight.name, {})[kind] = weight.local(whole).to("cpu", copy=True)
        return found

    @torch.no_grad()
    def start_from(self, states: States, steps: int = 0) -> None:
        """Take the weights and moments that another model of the same layout has; a collective call.

        Args:
            states: `states()` of its engine. Weights that it does not hold keep their initial values, moments are 0.
            steps: Adam's count of updates.
        """
        self.zero.begin()
        for parameter, weights in self._weights_by_parameter().items():
            whole = self.zero.read(parameter, MASTER)
            assert whole is not None
            moments = {kind: torch.zeros_like(whole) for kind in self.zero.kinds_of(parameter) if kind != MASTER}
            values = {MASTER: whole, **moments}
            for weight in weights:
                for kind, found in states.get(weight.name, {}).items():
                    weight.local(values[kind]).copy_(found)
            self.zero.write(parameter, values)
        self.zero.finish(steps)

    def _weights_by_parameter(self) -> dict[nn.Parameter, list[Weight]]:
        return by_parameter(self.weights)

    def close(self) -> None:
        """Take DeepSpeed's hooks off the weights, which would keep the engine, and through it the groups, alive."""
        try:
            release(self.deepspeed)
        finally:
            forget_groups()
            if self._graph is not None:
                self._graph.close()

    @property
    def current_lr(self) -> float:
        """Learning rate of the next step, before `optimizer.lr_multipliers`."""
        return float(self.scheduler.get_lr({}))

    def restore_schedule(self, steps: int) -> None:
        """Put the learning rate, and what follows from loaded weights, where `steps` steps have led.

        A checkpoint brings its own optimizer settings along, in some stages: this run's are put back.
        """
        self._weights_changed()
        section = self.config.optimizer
        for group in self.optimizer.param_groups:
            group.update(betas=(section.adam_beta1, section.adam_beta2), eps=section.adam_eps)
        if not is_plain(self.config):
            self.optimizer.clip_grad = section.clip_grad
        self.scheduler, self._steps = build_scheduler(self.config, self.optimizer), 0
        self._advance_schedule(steps)

    @torch.no_grad()
    def evaluation_losses(self, batches: list[Batch]) -> list[dict[str, Tensor]]:
        """This rank's losses of one global batch, for `loss_totals`; see `run_schedule`."""
        self.deepspeed.eval()
        return run_schedule(self.scheduled, batches, forward_only=True)

    def evaluate(self, batches: list[Batch]) -> tuple[float, float]:
        """Sum of the loss in nats and number of tokens of one global batch, over all ranks."""
        return loss_totals(self.evaluation_losses(batches), self.context.device)

    @torch.no_grad()
    def next_token_logits(self, tokens: list[int]) -> Tensor | None:
        """Logits [vocabulary] after `tokens` (1 to seq_length); None before the last pipeline stage."""
        if not tokens:
            raise ValueError("tokens is empty, but logits follow a token: begin a document with the tokenizer's eod")
        self.deepspeed.eval()
        length, device = self.config.training.seq_length, self.context.device
        # right padding changes nothing under causal attention and keeps the pipeline's shapes fixed
        padded = torch.tensor(tokens + [0] * (length - len(tokens)), device=device).unsqueeze(0)
        batch = {"tokens": padded, "position_ids": torch.arange(length, device=device).unsqueeze(0)}
        copies = self.config.parallel.pipeline_model_parallel_size if len(self.chunks) > 1 else 1
        return run_logits(self.scheduled, batch, copies, len(tokens) - 1)

    def _clip(self) -> float:
        limit = self.config.optimizer.clip_grad or float("inf")
        parameters = list(self.deepspeed.module.parameters())
        if self.deepspeed.has_moe_layers:
            return clip_with_experts(parameters, limit)
        copied = [p for p in parameters if hasattr(p, PIPE_REPLICATED)]
        norm = clip_grad_norm_([p for p in parameters if not hasattr(p, PIPE_REPLICATED)], limit, mpu=NormMpu())
        for parameter in copied:  # the same operations as DeepSpeed's on the other copy, the same bits
            assert parameter.grad is not None
            parameter.grad.mul_((torch.full((1,), limit, device=norm.device) / (norm + 1e-6)).clamp(max=1))
        return float(norm)

    def reduce_gradients(self) -> None:
        """Sum partial gradients over tensor-parallel ranks and average over replicas, where no hook has."""
        if parallel_state.get_tensor_model_parallel_world_size() > 1:
            sum_over_tensor_parallel(self.zero.partial_gradients())
        # without stages the embedding is its own copy
        is_tied = self.config.parallel.pipeline_model_parallel_size > 1 and self.chunks[0].config.table.ties_head
        tied = [w.parameter for w in self.weights if w.name == EMBEDDING] if is_tied else []
        if not self.zero.reduces_in_place:
            sum_over_tied_copies(self.zero, tied)
        self.zero.reduce_gradients()
        if self.zero.reduces_in_place:
            sum_over_tied_copies(self.zero, tied)


def _has_residual(module: nn.Module) -> bool:
    return isinstance(module, LowRankGroup) and module.beta is not None
