"""Where a rank keeps its part of a parameter's fp32 master weights and moments."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_crnet.engine.adam8bit import BlockwiseMoment


@dataclass(frozen=True)
class ParamShard:
    """Elements [offset, offset + numel) of a flattened parameter: elements [start, start + numel) of a master.

    Attributes:
        master: an fp32 tensor that the optimizer updates; the moments in its state have the same shape.
    """

    master: Tensor
    start: int
    offset: int
    numel: int

    def read(self, tensor: Tensor | BlockwiseMoment) -> Tensor:
        """This shard of the master or of one of its moments: a view, or fp32 values of an 8-bit moment."""
        if isinstance(tensor, BlockwiseMoment):
            return tensor.read(self.start)
        return tensor.detach().view(-1).narrow(0, self.start, self.numel)

    def write(self, tensor: Tensor | BlockwiseMoment, values: Tensor) -> None:
        """Set this shard of the master or of one of its moments."""
        if isinstance(tensor, BlockwiseMoment):
            tensor.write(self.start, values)
        else:
            self.read(tensor).copy_(values)

    def cut(self, whole: Tensor) -> Tensor:
        """This shard of the whole parameter's values."""
        return whole.view(-1).narrow(0, self.offset, self.numel)
