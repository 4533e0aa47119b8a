"""The matrix product against its specification, and a row's bits whatever stands beside it."""

import pytest
import torch
from torch import Tensor

from retrofit.runtime.kernels import gemm, reference
from retrofit.runtime.kernels.gemm import split_matmul, split_plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAN = float("nan")


def operands(R: int, N: int, K: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Drawn on the CPU: the same on every device."""
    return tuple((torch.randn(n, K) * K**-0.5).to(DEVICE, dtype) for n in (R, N))  # type: ignore[return-value]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("R", "N", "K", "splits", "block_k"),
    [
        (1, 40, 32, 1, 32),
        (5, 64, 12, 1, 16),  # a block wider than K
        (9, 77, 200, 2, 64),  # the last block is partly filled
        (17, 130, 48, 3, 16),  # more than one tile of rows if forced, and of features
        (3, 65, 130, 3, 32),  # five blocks: 2, 2, 1
        (2, 16, 48, 4, 16),  # three blocks: the last split has none
    ],
)
def test_every_partial_sum_is_the_references(
    R: int, N: int, K: int, splits: int, block_k: int, dtype: torch.dtype
) -> None:
    x, weight = operands(R, N, K, dtype)
    expected = reference.split_matmul(x, weight, splits, block_k)
    for block_rows in (None, 16):
        parts = split_matmul(x, weight, splits, block_k, block_rows=block_rows)
        assert parts.dtype == torch.float32
        # Products of two bf16 or fp16 are exact in fp32, so all dtypes differ in the order of additions alone.
        torch.testing.assert_close(parts, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_x_may_lie_apart(dtype: torch.dtype) -> None:
    x, weight = operands(5, 20, 48, dtype)
    wide = torch.full((5, 70), NAN, device=DEVICE, dtype=dtype)
    wide[:, 3:51] = x
    assert torch.equal(split_matmul(wide[:, 3:51], weight, 1, 32), split_matmul(x, weight, 1, 32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_beside_any_others(dtype: torch.dtype) -> None:
    x, weight = operands(40, 20, 100, dtype)
    alone = torch.cat([split_matmul(x[r : r + 1], weight, 2, 32) for r in (0, 1, 2, 39)], dim=1)
    for R in (3, 9, 16, 17, 40):
        assert torch.equal(split_matmul(x[:R], weight, 2, 32)[:, :3], alone[:, :3]), R
    assert torch.equal(split_matmul(x, weight, 2, 32)[:, 39], alone[:, 3])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_any_place_and_tile(dtype: torch.dtype) -> None:
    x, weight = operands(40, 20, 100, dtype)
    whole = split_matmul(x, weight, 2, 32)
    order = torch.randperm(40).to(DEVICE)
    assert torch.equal(split_matmul(x[order], weight, 2, 32), whole[:, order])
    for block_rows in (16, 32, 128):
        assert torch.equal(split_matmul(x, weight, 2, 32, block_rows=block_rows), whole), block_rows
    assert torch.equal(split_matmul(x, weight, 2, 32, block_n=128, num_warps=8, num_stages=2), whole)


@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_what_other_rows_hold_never_reaches_a_row(value: float) -> None:
    x, weight = operands(18, 70, 100, torch.bfloat16)
    clean = split_matmul(x, weight, 2, 32)
    x[[0, 2, 17]] = value
    weight[[1, 69]] = value
    rows, features = ([i for i in range(n) if i not in bad] for n, bad in ((18, (0, 2, 17)), (70, (1, 69))))
    for block_rows in (16, 32):
        parts = split_matmul(x, weight, 2, 32, block_rows=block_rows)
        assert torch.equal(parts[:, rows][:, :, features], clean[:, rows][:, :, features])
        assert not parts[:, [0, 2, 17]].isfinite().any()
        assert not parts[:, :, [1, 69]].isfinite().any()


def test_nothing_is_read_or_written_outside() -> None:
    """Around x, W and the result lies NaN, and stays."""
    x, weight = operands(5, 20, 50, torch.float32)
    around = [torch.full((n + 2, 50), NAN, device=DEVICE) for n in (5, 20)]
    around[0][1:-1], around[1][1:-1] = x, weight
    assert torch.equal(split_matmul(around[0][1:-1], around[1][1:-1], 2, 16), split_matmul(x, weight, 2, 16))


SHAPES = [(6192, 4096), (4128, 14336), (128256, 4096), (37952, 3584), (928, 4864), (1152, 896), (8224, 8192)]
SMALL = [(64, 48), (80, 32), (40, 12), (16, 96), (1, 1), (100, 513)]


@pytest.mark.parametrize(("n", "k"), SHAPES + SMALL)
def test_the_plan_fits_the_weight(n: int, k: int) -> None:
    splits, block_k = split_plan(n, k)
    blocks = -(-k // block_k)
    assert 16 <= block_k <= max(16, 2 * k - 1) and block_k & (block_k - 1) == 0
    # No split is empty.
    assert 1 <= splits <= blocks and (splits - 1) * -(-blocks // splits) < blocks
    tiles = -(-n // gemm._block_n(n, k))
    assert splits == 1 or splits * tiles <= gemm.PROGRAMS
    if (n, k) in SHAPES[:3]:
        assert splits * tiles > 0.9 * gemm.PROGRAMS


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_bits_of_real_shapes_do_not_depend_on_the_number_of_rows(n: int, k: int, dtype: torch.dtype) -> None:
    plan = split_plan(n, k)
    x, weight = operands(150, n, k, dtype)
    whole = split_matmul(x, weight, *plan)
    torch.testing.assert_close(whole, reference.split_matmul(x, weight, *plan), rtol=1e-4, atol=1e-4)
    for rows in (1, 9, 16, 17, 40, 64, 100, 128):
        assert torch.equal(split_matmul(x[:rows], weight, *plan), whole[:, :rows]), rows
        assert torch.equal(split_matmul(x[-rows:], weight, *plan), whole[:, -rows:]), rows
