"""The norms against their specification; what the adapter holds never reaches a base row."""

from typing import Any

import pytest
import torch
from torch import Tensor

from retrofit.runtime.kernels import interpreter, norm, reference
from retrofit.runtime.kernels.rows import Rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-6
NAN = float("nan")


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


def made_rows(num_base: int, num_draft: int, padded: int) -> Rows:
    """Nothing but the counts: all that the norms look at."""
    none = torch.empty(0)
    return Rows(num_base, num_draft, padded, *[none] * 9, base_tiles=0)


def assert_agrees(actual: Tensor, expected: Tensor) -> None:
    """fp32 to rounding; narrower dtypes in nearly every bit, the rest one step apart."""
    assert actual.dtype == expected.dtype
    if actual.dtype == torch.float32:
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        return
    step = torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual, expected, rtol=step, atol=step / 16)
    assert (actual == expected).float().mean() > 0.99


def normed_rows(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Rows of x as if they were the embeddings of tokens 0, 1, ..., normed."""
    ids = torch.arange(len(x), device=DEVICE)
    return norm.embed_rms_norm(ids, x, torch.zeros(x.shape[1], device=DEVICE), weight, eps)[1]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("H", [12, 64, 100])
def test_rms_norm(H: int, dtype: torch.dtype) -> None:
    x, weight = randn(5, H, dtype=dtype), randn(H, dtype=dtype)
    normed = normed_rows(x, weight, EPS)
    assert_agrees(normed, reference.rms_norm(x, weight, EPS))
    assert torch.equal(normed_rows(x[2:3], weight, EPS), normed[2:3])
    assert torch.equal(normed_rows(x[[4, 2, 0]], weight, EPS), normed[[4, 2, 0]])


def test_rms_norm_rounds_before_the_weight_and_adds_eps_inside() -> None:
    """Rows so small that eps matters, weights that make the two roundings show."""
    x, weight = randn(4, 64, dtype=torch.bfloat16) * 1e-3, randn(64, dtype=torch.bfloat16) / 3
    for eps in (1e-5, 1e-6):
        assert_agrees(normed_rows(x, weight, eps), reference.rms_norm(x, weight, eps))
    zero = torch.zeros(1, 64, device=DEVICE, dtype=torch.bfloat16)
    assert torch.equal(normed_rows(zero, weight, EPS).abs(), zero)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask_dtype", DTYPES)
def test_embed_rms_norm(mask_dtype: torch.dtype, dtype: torch.dtype) -> None:
    table, mask_vector, weight = randn(9, 40, dtype=dtype), randn(40, dtype=mask_dtype), randn(40, dtype=dtype)
    ids = torch.tensor([3, -1, 0, 8, -1], device=DEVICE)
    embedded, normed = norm.embed_rms_norm(ids, table, mask_vector, weight, EPS)
    expected = reference.embed_rms_norm(ids, table, mask_vector, weight, EPS)
    assert torch.equal(embedded, expected[0])
    assert_agrees(normed, expected[1])
    # The mask vector may be NaN, and the other rows may be absent: a base row does not change.
    broken = norm.embed_rms_norm(ids, table, mask_vector * NAN, weight, EPS)
    alone = norm.embed_rms_norm(ids[3:4], table, mask_vector, weight, EPS)
    for before, nan_mask, one in zip((embedded, normed), broken, alone, strict=True):
        assert torch.equal(nan_mask[[0, 2, 3]], before[[0, 2, 3]])
        assert nan_mask[[1, 4]].isnan().all()
        assert torch.equal(one, before[3:4])


def layer(
    S: int, R: int, H: int, rank: int, dtype: torch.dtype, finished: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """parts (a product in the model's dtype if finished), residual, weight, up."""
    parts = randn(S, R, H + rank, dtype=dtype if finished else torch.float32)
    return parts, randn(R, H, dtype=dtype), randn(H, dtype=dtype), randn(rank, H, dtype=dtype) * 0.3


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("S", "H", "rank", "bias", "finished"),
    [(1, 64, 8, False, False), (3, 40, 3, True, False), (1, 100, 20, True, True), (4, 12, 0, False, False)],
)
def test_add_rms_norm(S: int, H: int, rank: int, bias: bool, finished: bool, dtype: torch.dtype) -> None:
    parts, residual, weight, up = layer(S, 7, H, rank, dtype, finished)
    parts[:, 6] = residual[6] = NAN  # padding
    rows = made_rows(num_base=3, num_draft=3, padded=7)
    bias_H = randn(H, dtype=dtype) if bias else None
    lora = up if rank else None
    actual = norm.add_rms_norm(parts, residual, weight, EPS, lora, rows, bias_H)
    expected = reference.add_rms_norm(parts[:, :6], residual[:6], weight, EPS, lora, rows, bias_H)
    assert all(t.shape == (7, H) for t in actual)
    assert torch.equal(actual[0][:3], expected[0][:3])
    for a, b in zip(actual, expected, strict=True):
        assert_agrees(a[:6], b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_of_lora_are_ignored_without_its_second_factor(dtype: torch.dtype) -> None:
    parts, residual, weight, _ = layer(2, 4, 40, 8, dtype)
    parts[..., 40:] = NAN
    actual = norm.add_rms_norm(parts, residual, weight, EPS, None, made_rows(2, 2, 4))
    for a, b in zip(
        actual, reference.add_rms_norm(parts, residual, weight, EPS, None, made_rows(2, 2, 4)), strict=True
    ):
        assert_agrees(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_beside_any_others(dtype: torch.dtype) -> None:
    parts, residual, weight, up = layer(3, 8, 40, 5, dtype)
    whole = norm.add_rms_norm(parts, residual, weight, EPS, up, made_rows(5, 3, 8))
    for row, kind in ((0, (1, 0, 1)), (3, (1, 0, 1)), (6, (0, 1, 1))):
        one = slice(row, row + 1)
        alone = norm.add_rms_norm(parts[:, one].contiguous(), residual[one], weight, EPS, up, made_rows(*kind))
        assert all(torch.equal(a, w[one]) for a, w in zip(alone, whole, strict=True)), row
    order = torch.tensor([4, 2, 0, 1, 3, 7, 5, 6], device=DEVICE)
    moved = norm.add_rms_norm(parts[:, order].contiguous(), residual[order], weight, EPS, up, made_rows(5, 3, 8))
    assert all(torch.equal(m, w[order]) for m, w in zip(moved, whole, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_adapter_of_nan_leaves_base_rows_alone(dtype: torch.dtype) -> None:
    parts, residual, weight, up = layer(2, 6, 40, 8, dtype)
    rows = made_rows(4, 2, 6)
    clean = norm.add_rms_norm(parts, residual, weight, EPS, up, rows)
    parts[..., 40:] = NAN
    broken = norm.add_rms_norm(parts, residual, weight, EPS, up * NAN, rows)
    for before, after in zip(clean, broken, strict=True):
        assert torch.equal(after[:4], before[:4])
        assert after[4:].isnan().all()


@pytest.mark.skipif(not interpreter.interpreted(), reason="counts the reads of Triton's interpreter")
def test_programs_of_base_rows_never_read_the_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    parts, residual, weight, up = layer(2, 4, 40, 8, torch.bfloat16)
    first, size, reads = up.data_ptr(), up.numel() * up.element_size(), 0
    load = InterpreterBuilder.create_masked_load

    def counted(self: Any, pointers: Any, mask: Any, *args: Any) -> Any:
        nonlocal reads
        offset = pointers.data.astype("int64") - first
        reads += int(((offset >= 0) & (offset < size) & mask.data).sum())
        return load(self, pointers, mask, *args)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted)
    norm.add_rms_norm(parts, residual, weight, EPS, up, made_rows(4, 0, 4))
    assert reads == 0
    norm.add_rms_norm(parts, residual, weight, EPS, up, made_rows(3, 1, 4))
    assert reads == up.numel()
