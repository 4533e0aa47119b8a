"""silu(gate) * up with LoRA on draft rows: against the reference, and a base row's bits against its surroundings."""

import pytest
import torch

from retrofit.runtime.kernels import reference
from retrofit.runtime.kernels.rows import Rows
from retrofit.runtime.kernels.swiglu import swiglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EPSILON = {torch.float32: 5e-7, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def make_rows(num_base, num_draft, padded):
    """Of Rows, the kernel reads the counts alone."""
    nothing = torch.zeros(0, device=DEVICE)
    return Rows(num_base, num_draft, padded, *[nothing] * 9, base_tiles=0)


def make(num_base, num_draft, width, rank, dtype, splits=3, padding=0, bias=False):
    """(parts, up, bias), the padding rows of parts NaN."""
    R = num_base + num_draft
    parts = torch.randn(splits, R + padding, 2 * width + 2 * rank, device=DEVICE)
    parts[:, R:] = torch.nan
    up = (torch.randn(rank, 2 * width, device=DEVICE) * 0.3).to(dtype) if rank else None
    return parts, up, torch.randn(2 * width, device=DEVICE).to(dtype) if bias else None


def assert_agree(got, expected, equal=0.99):
    """Close, and below fp32 nearly all equal: only exp, or a dot product added in another order, may turn a bit."""
    epsilon = EPSILON[expected.dtype]
    torch.testing.assert_close(got, expected, rtol=2 * epsilon, atol=2 * epsilon)
    if expected.dtype != torch.float32:
        assert (got == expected).float().mean() >= equal


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_base", "num_draft", "width", "rank", "bias"),
    [(5, 3, 24, 4, False), (17, 18, 130, 20, True), (0, 7, 40, 16, False), (19, 0, 8, 4, False), (3, 18, 160, 0, True)],
)
@pytest.mark.usefixtures("poisoned_memory")
def test_computes_the_reference(dtype, num_base, num_draft, width, rank, bias):
    parts, up, bias_W = make(num_base, num_draft, width, rank, dtype, padding=2, bias=bias)
    rows = make_rows(num_base, num_draft, num_base + num_draft + 2)
    got = swiglu(parts, width, up, rows, dtype, bias_W)
    assert got.shape == (num_base + num_draft + 2, width) and got.dtype == dtype
    expected = reference.swiglu(parts, width, up, rows, dtype, bias_W)
    n = rows.num_rows
    if dtype == torch.float32:
        torch.testing.assert_close(got[:n], expected[:n], rtol=1e-5, atol=1e-5)
    else:
        assert_agree(got[:n], expected[:n], equal=0.97)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("poisoned_memory")
def test_takes_one_finished_product_in_the_models_dtype(dtype):
    parts, up, _ = make(4, 5, 24, 4, dtype, splits=1)
    rows = make_rows(4, 5, 9)
    got = swiglu(parts.to(dtype), 24, up, rows, dtype)
    assert_agree(got, reference.swiglu(parts.to(dtype), 24, up, rows, dtype), equal=0.97)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter, where silu is -0
def test_silu_is_torchs_over_its_whole_range(dtype):
    gate = torch.cat([torch.linspace(-110, 110, 500), torch.randn(524)]).to(DEVICE)
    parts = torch.cat([gate, torch.ones_like(gate)]).view(1, 1, -1)
    got = swiglu(parts, len(gate), None, make_rows(1, 0, 1), dtype)[0]
    assert_agree(got, torch.nn.functional.silu(gate.to(dtype).float()).to(dtype), equal=0.995)


@pytest.mark.parametrize("splits", [1, 4])
def test_base_rows_have_the_same_bits_whatever_stands_around_them(splits):
    parts, up, bias = make(21, 18, 140, 4, torch.bfloat16, splits=splits, bias=True)
    together = swiglu(parts, 140, up, make_rows(21, 18, 39), torch.bfloat16, bias)
    for row in (0, 7, 20):
        alone = parts[:, row : row + 1].contiguous()
        for adapter in (up, None):
            assert torch.equal(swiglu(alone, 140, adapter, make_rows(1, 0, 1), torch.bfloat16, bias)[0], together[row])
    order = torch.randperm(21)
    moved = torch.cat([parts[:, order], parts[:, 21:24]], dim=1)
    assert torch.equal(swiglu(moved, 140, up, make_rows(21, 3, 24), torch.bfloat16, bias)[:21], together[order])


def test_nan_in_the_adapter_reaches_draft_rows_only():
    parts, up, _ = make(18, 5, 40, 4, torch.bfloat16)
    rows = make_rows(18, 5, 23)
    clean = swiglu(parts, 40, up, rows, torch.bfloat16)
    parts[..., 80:] = torch.nan
    poisoned = swiglu(parts, 40, torch.full_like(up, torch.nan), rows, torch.bfloat16)
    assert torch.equal(poisoned[:18], clean[:18]) and poisoned[18:].isnan().all()


def test_nan_in_one_row_stays_there():
    parts, up, _ = make(18, 5, 40, 4, torch.bfloat16)
    rows = make_rows(18, 5, 23)
    clean = swiglu(parts, 40, up, rows, torch.bfloat16)
    parts[:, [2, 20]] = torch.nan
    got = swiglu(parts, 40, up, rows, torch.bfloat16)
    others = [row for row in range(23) if row not in (2, 20)]
    assert torch.equal(got[others], clean[others]) and got[[2, 20]].isnan().all()


@pytest.mark.usefixtures("poisoned_memory")
def test_padding_rows_are_not_written():
    parts, up, _ = make(3, 2, 24, 4, torch.float32)
    got = swiglu(torch.cat([parts, parts], dim=1), 24, up, make_rows(3, 2, 10), torch.float32)
    assert got[:5].isfinite().all() and got[5:].isnan().all()


@pytest.mark.usefixtures("poisoned_memory")
def test_tiles_of_base_rows_leave_draft_rows_alone(monkeypatch):
    """On a GPU it would be a race; the interpreter, which runs tiles in order, would hide it."""
    monkeypatch.setattr("retrofit.runtime.kernels.swiglu.row_tiles", lambda rows: 1)
    parts, up, _ = make(3, 2, 24, 4, torch.float32)
    got = swiglu(parts, 24, up, make_rows(3, 2, 5), torch.float32)
    assert got[:3].isfinite().all() and got[3:].isnan().all()
