"""x W^T for few rows x and a large W, as fp32 partial sums: what a decoder spends its time on is reading W.

    program (row tile, weight tile, split)          out[split]^T, BLOCK_N x BLOCK_R
    weight tile   BLOCK_N x BLOCK_K of W            the wide dimension of the tensor core's instruction
    row tile      BLOCK_K x BLOCK_R of x^T          its narrow one: 16 rows cost 16, not 64

Programs that share a weight tile are neighbours, so W comes from memory once and from L2 for every further row tile.
Whoever reads the partial sums adds them in index order; nothing is reduced here, and nothing is added atomically.

Exact: BLOCK_K and the splits, which fix the order of a row's additions, depend on the weight's shape alone.  How many
rows there are decides BLOCK_R, the width of the instruction, and how many warps and steps share the work; that all
widths add in the same order is a property of the GPU, and is checked when an engine is loaded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_K = 64
"""Columns of a step: 128 bytes of a bf16 row, one cache line; many short steps are in flight at once."""
PROGRAMS = 264
"""Programs wanted: two for each of the 132 multiprocessors of an H100, which together run in one wave."""
COLUMNS = 256
"""Fewest columns of a split: partial sums are written and read back, which must stay small beside reading W."""
WIDE = 1 << 23
"""Weights of at least so many values take 128 rows per tile, others 64.  Every weight tile reads x again, and every
split writes sums; with the number of programs given, the cost of both is least at BLOCK_N = sqrt(N K / 4 PROGRAMS)."""
SHARED = 112 * 1024
"""Shared memory of a program, in bytes: half of an H100's multiprocessor."""


def split_plan(n: int, k: int) -> tuple[int, int]:
    """(splits, block_k) for a weight [n, k], a function of its shape alone."""
    block_k = min(BLOCK_K, max(16, triton.next_power_of_2(k)))
    blocks = triton.cdiv(k, block_k)
    wanted = min(PROGRAMS // triton.cdiv(n, _block_n(n, k)), k // COLUMNS)
    # Rounding the blocks of a split up may leave the last splits without any.
    return triton.cdiv(blocks, triton.cdiv(blocks, max(1, wanted))), block_k


def split_matmul(
    x_RK: Tensor,
    weight_NK: Tensor,
    splits: int,
    block_k: int,
    *,
    block_rows: int | None = None,
    block_n: int | None = None,
    num_warps: int | None = None,
    num_stages: int | None = None,
) -> Tensor:
    """x W^T as fp32 partial sums [splits, R, N]: split s takes whole blocks of block_k columns, in order.

    The rows of x may lie any distance apart.  block_rows, block_n, num_warps, num_stages change the speed only.
    """
    R, K = x_RK.shape
    N = weight_NK.shape[0]
    itemsize = x_RK.element_size()
    if block_rows is None:
        block_rows = _block_rows(R, itemsize)
    if block_n is None:
        block_n = _block_n(N, K)
    if num_warps is None:
        num_warps = _num_warps(block_n, block_rows, itemsize)
    if num_stages is None:
        num_stages = _num_stages(block_n, block_rows, block_k, itemsize)
    parts = torch.empty(splits, R, N, dtype=torch.float32, device=x_RK.device)
    grid = (triton.cdiv(R, block_rows), triton.cdiv(N, block_n), splits)
    _matmul[grid](
        x_RK,
        weight_NK,
        parts,
        R,
        N,
        K,
        x_RK.stride(0),
        triton.cdiv(triton.cdiv(K, block_k), splits),
        BLOCK_R=block_rows,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        EVEN_K=K % block_k == 0,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return parts


def _block_n(n: int, k: int) -> int:
    return 128 if n * k >= WIDE else 64


def _block_rows(rows: int, itemsize: int) -> int:
    """The rows there are, within what tensor cores take and what registers hold: 128 rows, 64 in fp32."""
    return min(256 // itemsize, max(16, triton.next_power_of_2(rows)))


def _num_warps(block_n: int, block_rows: int, itemsize: int) -> int:
    """Four warps share one instruction; eight where a tile would fill the registers of four (fp32: operands too)."""
    return 8 if block_n * block_rows * itemsize > 64 * 256 else 4


def _num_stages(block_n: int, block_rows: int, block_k: int, itemsize: int) -> int:
    """Steps in flight: as many as fit, but more than six hide nothing further, and fewer than two hide nothing."""
    return max(2, min(6, SHARED // ((block_n + block_rows) * block_k * itemsize)))


# R takes many values and none of them is worth code of its own.
@triton.jit(do_not_specialize=["R", "blocks_per_split"])
def _matmul(
    x_ptr,
    weight_ptr,
    parts_ptr,
    R,
    N,
    K,
    x_stride,
    blocks_per_split,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    # In int64: N * K, R * N and R * x_stride can exceed 2^31.  Offsets within a tile cannot.
    row = tl.program_id(0).to(tl.int64) * BLOCK_R
    feature = tl.program_id(1).to(tl.int64) * BLOCK_N
    split = tl.program_id(2)
    r, n, k = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    row_used, feature_used = row + r < R, feature + n < N

    x_ptr += row * x_stride
    weight_ptr += feature * K
    total = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    first = split * blocks_per_split * BLOCK_K
    for start in range(first, tl.minimum(first + blocks_per_split * BLOCK_K, K), BLOCK_K):
        weight_mask, x_mask = feature_used[:, None], row_used[None, :]
        if not EVEN_K:
            weight_mask, x_mask = weight_mask & (start + k < K)[None, :], x_mask & (start + k < K)[:, None]
        weight = tl.load(weight_ptr + start + (n[:, None] * K + k[None, :]), mask=weight_mask, other=0.0)
        x = tl.load(x_ptr + start + (r[None, :] * x_stride + k[:, None]), mask=x_mask, other=0.0)
        total = tl.dot(weight, x, total, input_precision="ieee")

    parts_ptr += (split.to(tl.int64) * R + row) * N + feature
    tl.store(parts_ptr + (r[None, :] * N + n[:, None]), total, mask=feature_used[:, None] & row_used[None, :])
