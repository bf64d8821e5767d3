"""Reads and writes the tensors of a training state by canonical name: torch.distributed.checkpoint on safetensors.

Each rank writes the boxes of whole tensors that it owns; any rank of any layout reads the boxes that it needs.
Nothing is unpickled (docs/decisions/checkpoint-format.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core import parallel_state
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageWriter
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_crnet.checkpoint.directory import unwritable
from megatron_crnet.checkpoint.weight_files import ShardReader, headers_of, portions
from megatron_crnet.distributed.consensus import run_on_all_ranks, run_on_main
from megatron_crnet.distributed.process_groups import replica_group
from megatron_crnet.engine.state_kinds import KINDS
from megatron_crnet.engine.zero import local_shape
from megatron_crnet.engine.zero_state import ZeroState
from megatron_crnet.model.weights import Weight, by_parameter
from megatron_crnet.utils.errors import CheckpointError, describe


class Box:
    """A part of a whole tensor.

    Args:
        tensor: the part.
        shape: shape of the whole.
        offsets: where the part lies in it.
    """

    def __init__(self, tensor: Tensor, shape: tuple[int, ...], offsets: tuple[int, ...]) -> None:
        self.tensor, self.shape = tensor, torch.Size(shape)
        self.chunk = ChunkStorageMetadata(torch.Size(offsets), tensor.size())

    def write_item(self, name: str) -> WriteItem:
        """For a save plan."""
        data = TensorWriteData(self.chunk, TensorProperties.create_from_tensor(self.tensor), self.shape)
        return WriteItem(MetadataIndex(name, self.chunk.offsets), WriteItemType.SHARD, tensor_data=data)

    def read_items(self, name: str, saved: TensorStorageMetadata | None) -> list[ReadItem]:
        """For a load plan; raises ValueError if `name` is not saved, or in another shape."""
        if saved is None:
            raise ValueError(f"{name} is missing")
        if saved.size != self.shape:
            raise ValueError(f"{name} has the shape {tuple(saved.size)} instead of {tuple(self.shape)}")
        return create_read_items_for_chunk_list(name, saved, [self.chunk])


Boxes = Mapping[str, Box | Exception]
"""By name of the whole tensor; an exception where the part could not be copied, which fails the write on all ranks."""


class _SavePlanner(DefaultSavePlanner):
    def create_local_plan(self) -> SavePlan:
        for name, box in self.state_dict.items():
            if isinstance(box, Exception):
                raise MemoryError(f"{name} was not copied: {describe(box)}") from box
        self.plan = SavePlan([box.write_item(name) for name, box in self.state_dict.items()])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].tensor


class _LoadPlanner(DefaultLoadPlanner):
    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        # the default searches nested dictionaries for tensors and drops other types
        self.state_dict = self.original_state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        saved = self.metadata.state_dict_metadata
        return LoadPlan(
            [item for name, box in self.state_dict.items() for item in box.read_items(name, saved.get(name))]
        )

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].tensor


def whole(tensor: Tensor) -> Box:
    """The box of a whole tensor, which one rank holds alone."""
    return Box(tensor, tuple(tensor.shape), (0,) * tensor.dim())


def _box(weight: Weight, local: Tensor) -> Box:
    offsets = [0] * len(weight.shape)
    if weight.shard_dim is not None:
        offsets[weight.shard_dim] = weight.span.start
    return Box(local, weight.shape, tuple(offsets))


def collect(zero: ZeroState, weights: list[Weight]) -> dict[str, Box | Exception]:
    """Copy to host memory what this rank will write; a collective call over replicas.

    Every master and moment has one owner among the ranks that hold it, in turn, so that all write equally much. A copy
    that fails is reported by `write`: here the replicas still wait for this rank's slices.
    """
    dp_rank, dp_size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    tp_rank, tp_size = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    boxes: dict[str, Box | Exception] = {}
    turn = 0
    for parameter, parts in by_parameter(w for w in weights if not w.is_copy).items():
        group = replica_group(parameter)
        for kind in zero.kinds_of(parameter):
            owners: dict[str, int] = {}
            for weight in parts:
                turn += 1
                if weight.shard_dim is not None or turn // group.size() % tp_size == tp_rank:
                    owners[weight.name] = turn % group.size()
            values = zero.read(parameter, kind, {*owners.values()})
            for weight in parts:
                if values is not None and owners.get(weight.name) == group.rank():
                    boxes[f"{kind}.{weight.name}"] = _copied(partial(_box, weight), weight.local(values))
    # where replicas keep the same, they take turns
    for turn, (name, state) in enumerate(zero.galore.states().items() if zero.galore is not None else ()):
        if zero.stage > 0 or turn % dp_size == dp_rank:
            boxes |= {f"{kind}.{name}": _copied(whole, tensor) for kind, tensor in state.items()}
    return boxes


def _copied(box: Callable[[Tensor], Box], values: Tensor) -> Box | Exception:
    try:
        # a copy, because the values may be a view of a larger tensor
        return box(values.to("cpu", copy=True))
    except Exception as error:  # out of memory
        return error


def write(folder: Path, boxes: Boxes, group: dist.ProcessGroup) -> None:
    """Write the boxes of all ranks; a collective call of `group`, which must be a gloo group of all ranks.

    Raises:
        CheckpointError: some rank cannot write; raised on all of them.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        planner = _SavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        dcp.save(dict(boxes), storage_writer=writer, planner=planner, process_group=group)
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise CheckpointError(f"rank {rank} {unwritable(folder, cause)}") from error


def own_files(folder: Path) -> list[str]:
    """Names of the files that this rank has written with `write`."""
    mine = f"shard-{dist.get_rank() + 1:05d}-"
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(mine))


def shared_reader(folder: Path) -> ShardReader:
    """A reader whose headers rank 0 has read for all ranks; a collective call.

    Raises:
        CheckpointError: rank 0 cannot read them; raised on every rank.
    """

    def headers() -> Metadata:
        try:
            return headers_of(folder)
        except Exception as error:
            raise CheckpointError(f"checkpoint {folder} cannot be read ({describe(error)}): use another one") from error

    return ShardReader(folder, run_on_main(headers))


def read(reader: ShardReader, boxes: Mapping[str, Box]) -> None:
    """Fill the boxes from the files that any layout has written; no collective call.

    Raises:
        CheckpointError: a tensor is missing, or has another shape, or a file cannot be read.
    """
    try:
        planner = _LoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        dcp.load(dict(boxes), storage_reader=reader, planner=planner, no_dist=True)
    except (CheckpointException, RuntimeError, ValueError, OSError) as error:
        reason = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        problem = f"cannot be read ({describe(reason)}): use another one"
        if isinstance(reason, ValueError):  # of `Box.read_items`
            problem = f"does not fit this model ({reason}): use the configuration that it was written with"
        raise CheckpointError(f"checkpoint {reader.checkpoint} {problem}") from error


def fill(
    reader: ShardReader,
    zero: ZeroState,
    weights: list[Weight],
    steps: int,
    kinds: Sequence[str] = KINDS,
) -> None:
    """Load masters, moments and weights of this rank into DeepSpeed's buffers; a collective call.

    Args:
        steps: Adam's count of updates.
        kinds: KINDS, or MASTER alone; then moments are zero.

    Raises:
        CheckpointError: some rank cannot read its part; raised on every rank.
    """
    zero.begin()
    run_on_all_ranks(partial(_fill_own, reader, zero, weights, kinds))
    zero.finish(steps)


def _fill_own(reader: ShardReader, zero: ZeroState, weights: list[Weight], kinds: Sequence[str]) -> None:
    parts = by_parameter(weights)
    for parameters in portions({p: 4 * len(KINDS) * local_shape(p).numel() for p in parts}):
        values = {p: {kind: torch.zeros(local_shape(p)) for kind in zero.kinds_of(p)} for p in parameters}
        read(
            reader,
            {
                f"{kind}.{weight.name}": _box(weight, weight.local(values[parameter][kind]))
                for parameter in parameters
                for weight in parts[parameter]
                for kind in kinds
                if kind in values[parameter]
            },
        )
        for parameter, found in values.items():
            zero.write(parameter, {kind: tensor.to(parameter.device) for kind, tensor in found.items()})
    if zero.galore is not None:
        for name, state in zero.galore.states().items():
            found = {kind: torch.zeros(tensor.shape) for kind, tensor in state.items()}
            if len(kinds) > 1:
                read(reader, {f"{kind}.{name}": whole(tensor) for kind, tensor in found.items()})
            zero.galore.load(name, found if len(kinds) > 1 else {})
