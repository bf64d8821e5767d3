"""The kernel of `model/residual_product.py`; imported only where Triton is there and used.

It is persistent: each of `PROGRAMS` programs goes on to the next tile, whose inputs arrive while it writes the last
one. The residual is read, and the sum written, in two halves, as a whole tile of each would leave no room for inputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE, DEPTH, GROUP, WARPS, STAGES = (128, 256), 64, 8, 8, 3
"""One choice for all shapes: what is launched, and rounds, follows from nothing else."""
PLAIN_ARGUMENTS = ("rows", "width", "rank", "z_stride", "y_stride")
POINTERS = ("z_at", "b_at", "y_at", "out_at", "beta_at")


# a product by its name (`training/callbacks/profile.py`);
# no variants for numbers with special divisors nor for addresses: what was tried is what runs
@triton.jit(do_not_specialize=PLAIN_ARGUMENTS, do_not_specialize_on_alignment=POINTERS)
def residual_product_gemm(
    z_at: tl.tensor,
    b_at: tl.tensor,
    y_at: tl.tensor,
    out_at: tl.tensor,
    beta_at: tl.tensor,
    eps: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    rank: tl.tensor,
    z_stride: tl.tensor,
    y_stride: tl.tensor,
    M: tl.constexpr,  # noqa: N803
    N: tl.constexpr,  # noqa: N803
    K: tl.constexpr,  # noqa: N803
    GROUP: tl.constexpr,  # noqa: N803
    PROGRAMS: tl.constexpr,  # noqa: N803
) -> None:
    """out = s(beta) y + z b^T, summed in fp32, rounded once. Beyond the edges all reads as 0, and nothing is written.

    Args:
        z_at, b_at, y_at, out_at: of one dtype; [rows, rank], [width, rank] and twice [rows, width]. b and out are
            contiguous, rows of z and y begin at multiples of their strides.
        beta_at: one number in fp32.
        M, N, K: rows and columns of a tile, and how much of the rank is multiplied at a time.
        GROUP: rows of tiles that are done together, so that they share what they read of b.
    """
    z = tl.make_tensor_descriptor(z_at, [rows, rank], [z_stride, 1], [M, K])
    b = tl.make_tensor_descriptor(b_at, [width, rank], [rank, 1], [N, K])
    y = tl.make_tensor_descriptor(y_at, [rows, width], [y_stride, 1], [M, N // 2])
    out = tl.make_tensor_descriptor(out_at, [rows, width], [width, 1], [M, N // 2])
    beta = tl.load(beta_at)
    scale = tl.where(beta < 0, beta - eps, beta + eps)
    down, across = tl.cdiv(rows, M), tl.cdiv(width, N)
    for tile in tl.range(tl.program_id(0), down * across, PROGRAMS, flatten=True):
        first = tile // (GROUP * across) * GROUP
        together = min(down - first, GROUP)
        row = (first + tile % (GROUP * across) % together) * M
        column = tile % (GROUP * across) // together * N
        total = tl.zeros((M, N), tl.float32)
        for k in range(0, rank, K):
            total = tl.dot(z.load([row, k]), b.load([column, k]).T, total)
        left, right = tl.split(tl.permute(tl.reshape(total, (M, 2, N // 2)), (0, 2, 1)))
        left += scale * y.load([row, column]).to(tl.float32)
        out.store([row, column], left.to(out.dtype))
        right += scale * y.load([row, column + N // 2]).to(tl.float32)
        out.store([row, column + N // 2], right.to(out.dtype))


def launch(z: Tensor, b: Tensor, y: Tensor, beta: Tensor, eps: float, programs: int) -> Tensor:
    """s(beta) y + z b^T, [rows, width]; arguments as the kernel's, each of which TMA can read.

    Args:
        programs: processors of the device.
    """
    (rows, rank), width = z.shape, b.shape[0]
    out = torch.empty_like(y, memory_format=torch.contiguous_format)
    tiles = triton.cdiv(rows, TILE[0]) * triton.cdiv(width, TILE[1])
    # a setting of the thread, as backward's is another; torch.compile sets the same one before its kernels
    triton.set_allocator(_memory_of_descriptors)
    with torch.cuda.device_of(z):
        residual_product_gemm[min(programs, tiles),](
            z, b, y, out, beta, eps, rows, width, rank, z.stride(0), y.stride(0),
            *TILE, DEPTH, GROUP, programs, num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
    return out


def _memory_of_descriptors(size: int, alignment: int, stream: int | None) -> Tensor:
    """From PyTorch's allocator, which keeps it until the stream is past the kernel, and records it in a CUDA graph."""
    return torch.empty(size, dtype=torch.int8, device="cuda")
