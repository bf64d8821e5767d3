"""The residual's operations as Triton kernels: each input is read once and each output written once.

They stand in for the plain functions of `model/residual.py`, with the same arguments, and are imported only where they
are used: CUDA builds of PyTorch bring Triton, others do not. All arithmetic is fp32.

Rules that keep a run repeatable bit for bit:

- No atomics. Every program writes its part of beta's gradient to a place of its own; one sum adds them in fixed order.
- What is compiled follows from shapes and dtypes alone. Left to itself Triton also looks at strides and addresses, and
  adds up in another order; but a recomputed tensor need not lie where the first one did. `_rows` sees to it.
- Multiply-add is written out, and no compiler may make its own (`enable_fp_fusion`), so none chooses where to round.

Rows are read 16 bytes at a time where 16 divides their width. Rows of another width, such as 5461, count as one long
row, which is read so where 16 divides its length: for 16 tokens and any multiple of that.

One launch handles one position. The seven differ in width and strides and lie in tensors of their own: one launch for a
group would need a copy of the kernel's body for each. As it is, PyTorch's 28 operations of a bf16 layer become 7 in
forward, and 35 become 14 in backward. At 7B with 4096 tokens a launch moves 100 to 270 MB, 30 to 80 microseconds at
3.35 TB/s; only far shorter ones, as with tensor parallelism of 8, could gain from being joined.

Triton launches on the current device, which every entry point sets to the rank's own: there is no guard for another.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ALIGNMENT = 16
"""Bytes of an address and elements of a stride by which Triton tells fast variants from slow ones."""
TILE = 1024
"""Elements of a program: 8 for each of 128 threads, which bf16 reads in one instruction of 16 bytes."""


@triton.jit
def _tile(
    rows: tl.tensor, width: tl.tensor, tile_rows: tl.constexpr, tile_columns: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Rows [R, 1] in int64 (elements may be more than 2^31), columns [1, C] and mask [R, C] of this program."""
    # rounded up; `tl.cdiv` would add first and could pass 2^31
    across = (width - 1) // tile_columns + 1
    program = tl.program_id(0)
    row = (program // across).to(tl.int64) * tile_rows + tl.arange(0, tile_rows)[:, None]
    column = (program % across) * tile_columns + tl.arange(0, tile_columns)[None, :]
    return row, column, (row < rows) & (column < width)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["scale"])
def add_previous_kernel(
    output: tl.tensor,
    update: tl.tensor,
    previous: tl.tensor,
    scale: tl.tensor,
    update_stride: tl.tensor,
    previous_stride: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
) -> None:
    """Store update + s previous."""
    row, column, inside = _tile(rows, width, tile_rows, tile_columns)
    u = tl.load(update + row * update_stride + column, mask=inside).to(tl.float32)
    y = tl.load(previous + row * previous_stride + column, mask=inside).to(tl.float32)
    tl.store(output + row * width + column, tl.fma(y, tl.load(scale), u), mask=inside)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["scale"])
def gradients_kernel(
    grad_previous: tl.tensor,
    partial_sums: tl.tensor,
    grad: tl.tensor,
    previous: tl.tensor,
    scale: tl.tensor,
    grad_stride: tl.tensor,
    previous_stride: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
) -> None:
    """Store s grad, and this program's part of <grad, previous>."""
    row, column, inside = _tile(rows, width, tile_rows, tile_columns)
    g = tl.load(grad + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(previous + row * previous_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad_previous + row * width + column, g * tl.load(scale), mask=inside)
    tl.store(partial_sums + tl.program_id(0), tl.sum(tl.sum(g * y, axis=1), axis=0))


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["scale"])
def remove_update_kernel(
    previous: tl.tensor,
    output: tl.tensor,
    update: tl.tensor,
    scale: tl.tensor,
    output_stride: tl.tensor,
    update_stride: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
) -> None:
    """Store (output - update) / s."""
    row, column, inside = _tile(rows, width, tile_rows, tile_columns)
    y = tl.load(output + row * output_stride + column, mask=inside).to(tl.float32)
    u = tl.load(update + row * update_stride + column, mask=inside).to(tl.float32)
    # `/` would be an approximation
    tl.store(previous + row * width + column, tl.div_rn(y - u, tl.load(scale)), mask=inside)


def add_previous(update: Tensor, previous: Tensor, scale: Tensor) -> Tensor:
    """`residual.add_previous` in one pass."""
    output = _empty_like(update)
    _launch(add_previous_kernel, (output,), (update, previous), scale)
    return output


def gradients(grad: Tensor, previous: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """`residual.gradients` in one pass, and a sum of one number for each program."""
    grad_previous = _empty_like(grad)
    partial_sums = torch.empty(_tiles(grad.shape)[0], dtype=torch.float32, device=grad.device)
    _launch(gradients_kernel, (grad_previous, partial_sums), (grad, previous), scale)
    return grad_previous, partial_sums.sum()


def remove_update(output: Tensor, update: Tensor, scale: Tensor) -> Tensor:
    """`residual.remove_update` in one pass."""
    previous = _empty_like(output)
    _launch(remove_update_kernel, (previous,), (output, update), scale)
    return previous


def _launch(kernel: Any, results: tuple[Tensor, ...], inputs: tuple[Tensor, Tensor], scale: Tensor) -> None:
    """Start a kernel on two inputs of one shape, [..., width]."""
    programs, *tile = _tiles(inputs[0].shape)
    if programs > 0:
        one, other = (_rows(x) for x in inputs)
        strides = one.stride(0), other.stride(0)
        kernel[programs,](*results, one, other, scale, *strides, *one.shape, *tile, enable_fp_fusion=False)


def _matrix(shape: torch.Size) -> tuple[int, int]:
    """Rows and their width as the kernels see them; rows that do not start at fast addresses are joined to one."""
    rows, width = shape[:-1].numel(), shape[-1]
    return (rows, width) if width % ALIGNMENT == 0 else (1, rows * width)


def _tiles(shape: torch.Size) -> tuple[int, int, int]:
    """Number of programs, and the rows and columns of each; both are powers of two, as Triton wants them."""
    rows, width = _matrix(shape)
    tile_columns = min(TILE, triton.next_power_of_2(max(width, 1)))
    tile_rows = TILE // tile_columns
    return triton.cdiv(rows, tile_rows) * triton.cdiv(width, tile_columns), tile_rows, tile_columns


def _rows(x: Tensor) -> Tensor:
    """`_matrix` of x: where it lies, if what is compiled for it is the same as for a fresh tensor, else a copy."""
    rows = x.reshape(_matrix(x.shape))
    (stride, unit), width = rows.stride(), rows.shape[1]
    # shards and views of one wider tensor lie so
    spread = stride % ALIGNMENT == 0 and width % ALIGNMENT == 0
    if unit == 1 and (stride == width or spread) and rows.data_ptr() % ALIGNMENT == 0:
        return rows
    return rows.clone(memory_format=torch.contiguous_format)


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
