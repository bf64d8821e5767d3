"""Canonical weights: their names, their initial values, and where each lives on this rank.

The canonical form is the `state_dict` of `model/reference.py`, which is also the exported form. Initial values are
drawn for each canonical weight from a seed of its own, so they are the same in every parallel layout:

    full-rank maps, embeddings, output layer  N(0, init_method_std)
    A                                         N(0, 1/sqrt(h_in))
    B                                         N(0, init_method_std sqrt(h_in/r)), so A B looks full-rank
    beta                                      beta_init
    norms                                     1
    biases                                    0

Of relora, whose B starts at 0, A is uniform between -1/sqrt(h_in) and 1/sqrt(h_in), and drawn anew at each restart.
With `scale_residual_init`, full-rank maps and B of o and down are smaller by 1/sqrt(2 L).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from megatron_crnet.config.architectures.base import QK_NORMS
from megatron_crnet.model.reference import EMBEDDING, HEAD, LEARNED_POSITIONS
from megatron_crnet.utils.errors import CheckpointError

if TYPE_CHECKING:
    from megatron_crnet.config.architectures import Experts
    from megatron_crnet.model.gpt import CRNetModel

CPU = torch.device("cpu")
MOST_AT_ONCE = 8
"""Weights that are drawn at once, and so lie on the host in fp32."""


@dataclass(frozen=True)
class Weight:
    """One canonical weight and this rank's shard of it.

    Attributes:
        name: canonical name, e.g. `model.layers.3.mlp.up_proj.b.weight`.
        parameter: local parameter that holds the shard.
        index: part of `parameter` that is the shard.
        shape: shape of the whole weight.
        shard_dim: dimension split over tensor-parallel ranks; None for a replicated weight.
        span: elements of that dimension that this rank holds, if it is split; the last rank may hold fewer than others.
        is_copy: the weight lives on another pipeline stage, which writes it to checkpoints: a tied output layer.
    """

    name: str
    parameter: nn.Parameter
    index: tuple[Any, ...]
    shape: tuple[int, ...]
    shard_dim: int | None = None
    span: range = range(0)
    is_copy: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether the shard is all of the weight: it is replicated, or this rank alone holds it, as an expert."""
        return self.shard_dim is None or len(self.span) == self.shape[self.shard_dim]

    def local(self, tensor: Tensor | None = None) -> Tensor:
        """The shard inside the parameter, or inside `tensor` of the parameter's shape (its gradient)."""
        return (self.parameter if tensor is None else tensor)[self.index]

    def shard(self, full: Tensor) -> Tensor:
        """This rank's part of the whole weight `full`."""
        if self.shard_dim is None:
            return full
        return full.narrow(self.shard_dim, self.span.start, len(self.span))


def canonical_weights(model: CRNetModel) -> Iterator[Weight]:
    """Every canonical weight that this pipeline stage holds."""
    table, rank = model.config.table, model.pg_collection.tp.rank()
    rows, vocabulary = table.local_vocabulary, (table.vocabulary, model.config.hidden_size)
    span = range(rows * rank, min(rows * (rank + 1), table.vocabulary))
    held = (slice(len(span)),)
    if model.pre_process:
        yield Weight(EMBEDDING, model.embedding.word_embeddings.weight, held, vocabulary, 0, span)
        if not model.config.table.architecture.is_rotary:
            positions = model.embedding.position_embeddings.weight
            shape = model.max_sequence_length, model.config.hidden_size
            yield Weight(LEARNED_POSITIONS, positions, (...,), shape)
    for layer in model.decoder.layers:
        yield from _layer_weights(layer)
    if model.post_process:
        yield from _norm_weights("model.norm", model.decoder.final_layernorm, model.config.hidden_size)
        if not model.config.table.ties_head:
            yield Weight(HEAD, model.output_layer.weight, held, vocabulary, 0, span)
        elif not model.pre_process:
            yield Weight(EMBEDDING, model.output_layer.weight, held, vocabulary, 0, span, is_copy=True)


def _norm_weights(name: str, norm: Any, width: int) -> Iterator[Weight]:
    # not the parameter's own shape, which ZeRO-3 empties
    for suffix, parameter in norm.named_parameters():
        yield Weight(f"{name}.{suffix}", parameter, (...,), (width,))


def _layer_weights(layer: Any) -> Iterator[Weight]:
    prefix = f"model.layers.{layer.layer_number - 1}"
    architecture = layer.config.table.architecture
    for attribute, name in architecture.norms.items():
        width = layer.config.kv_channels if attribute in QK_NORMS else layer.config.hidden_size
        yield from _norm_weights(f"{prefix}.{name}", getattr(layer, attribute), width)
    modules = {position.name: position.module for position in architecture.positions}
    for shard in (shard for module in (*layer.groups, *layer.biases.values()) for shard in module.shards()):
        name = f"{prefix}.{modules[shard.position]}.{shard.suffix}"
        yield Weight(name, shard.parameter, shard.index, shard.shape, shard.shard_dim, shard.span)
    if architecture.experts is not None:
        yield from _expert_weights(prefix, architecture.experts, layer)


def _expert_weights(prefix: str, experts: Experts, layer: Any) -> Iterator[Weight]:
    shape = layer.config.table.num_experts, layer.config.hidden_size
    yield Weight(f"{prefix}.{experts.router}.weight", layer.experts.router.weight, (...,), shape)
    modules = {position.name: position.module for position in experts.positions}
    for number, shard in layer.experts.experts.shards():
        name = f"{prefix}.{experts.module}.{number}.{modules[shard.position]}.{shard.suffix}"
        yield Weight(name, shard.parameter, shard.index, shard.shape, shard.shard_dim, shard.span)


def by_parameter(weights: Iterable[Weight]) -> dict[nn.Parameter, list[Weight]]:
    """The canonical weights that each parameter holds."""
    found: dict[nn.Parameter, list[Weight]] = {}
    for weight in weights:
        found.setdefault(weight.parameter, []).append(weight)
    return found


def initial_value(
    name: str, shape: tuple[int, ...], config: Any, seed: int, restart: int = 0, device: torch.device = CPU
) -> Tensor:
    """The initial value of the whole weight `name`, in fp32, the same for every layout.

    Args:
        restart: ReLoRA's restart that draws it anew; 0 is the start.
        device: what draws it; a GPU draws other numbers, sooner.
    """
    if name.endswith("norm.weight"):
        return torch.ones(shape, device=device)
    if name.endswith("bias"):
        return torch.zeros(shape, device=device)
    if name.endswith("beta"):
        return torch.full(shape, config.beta_init, device=device)
    generator = canonical_generator(f"{name}@{restart}" if restart else name, seed, device)
    if name.endswith((".a.weight", ".b.weight")) and config.table.method.has_frozen:
        # kaiming_uniform_ with a = sqrt(5), as the authors' code draws A
        bound = shape[1] ** -0.5 if name.endswith(".a.weight") else 0.0
        return torch.empty(shape, device=device).uniform_(-bound, bound, generator=generator)
    return torch.empty(shape, device=device).normal_(std=_std(name, shape, config), generator=generator)


def canonical_generator(name: str, seed: int, device: torch.device = CPU) -> torch.Generator:
    """What draws numbers of a canonical weight, in whatever layout."""
    # one number of 32 bits: PyTorch's generator on CPUs takes no more of a seed
    return torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))


def _std(name: str, shape: tuple[int, ...], config: Any) -> float:
    """Standard deviation of the initial values of a matrix."""
    if name.endswith("a.weight"):
        return shape[1] ** -0.5
    std, position = config.init_method_std, config.table.position_of(name)
    if name.endswith("b.weight"):
        std *= (config.table.shapes[position][0] / shape[1]) ** 0.5
    if config.scale_residual_init and position in config.table.architecture.joining:
        std *= (2 * config.num_layers) ** -0.5
    return std


@torch.no_grad()
def initialize(model: CRNetModel, seed: int) -> None:
    """Draw every weight of this stage."""
    values = _drawn(model, seed)
    load_canonical(model, lambda _: next(values))


def _drawn(model: CRNetModel, seed: int) -> Iterator[Tensor]:
    """The initial values of `canonical_weights`, some drawn at a time: PyTorch draws each with one thread."""

    def draw(weight: Weight) -> Tensor:
        return initial_value(weight.name, weight.shape, model.config, seed)

    weights = list(canonical_weights(model))
    if is_in_torch_dispatch_mode():  # such as a simulation's, which other threads do not see
        yield from map(draw, weights)
        return
    at_once = min(torch.get_num_threads(), MOST_AT_ONCE)
    with ThreadPoolExecutor(at_once) as pool:
        for start in range(0, len(weights), at_once):
            yield from pool.map(draw, weights[start : start + at_once])


@torch.no_grad()
def load_canonical(model: CRNetModel, source: Mapping[str, Tensor] | Callable[[Weight], Tensor]) -> None:
    """Fill this stage's parameters from whole canonical weights.

    Args:
        source: whole weights by name, or a function that gives one.

    Raises:
        CheckpointError: a weight is missing or has another shape.
    """
    for weight in canonical_weights(model):
        if callable(source):
            full = source(weight)
        elif weight.name in source:
            full = source[weight.name]
        else:
            raise CheckpointError(f"weight {weight.name} is missing: give all weights of this model")
        if tuple(full.shape) != weight.shape:
            raise CheckpointError(
                f"weight {weight.name} has the shape {tuple(full.shape)}, but the model needs {weight.shape}: "
                "use the configuration that it was made with"
            )
        weight.local().copy_(weight.shard(full))


def mark_tensor_parallel(model: CRNetModel) -> None:
    """Set Megatron-Core's attributes on sharded parameters, so that the gradient norm counts each once."""
    for weight in canonical_weights(model):
        parameter = weight.parameter
        if weight.shard_dim is not None and not hasattr(parameter, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(parameter, True, weight.shard_dim, 1)
