"""A row that attends alone takes fewer operations, and has the bits that all others' way gives it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from retrofit.adapters.rows import RowPlan, SequenceRows
from retrofit.runtime.backends.hf import exact_attention
from retrofit.runtime.backends.hf.exact_attention import GROUPED, TILED, base_attention


@pytest.mark.parametrize("form", [GROUPED, TILED], ids=lambda form: form.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("keys", [1, 15, 16, 200, 1024, 1030])
@pytest.mark.parametrize("width", [16, 12])
def test_one_row_has_the_bits_of_the_general_form(
    width: int, keys: int, dtype: torch.dtype, form: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys that fill their piece, or go on behind it; values whose columns are filled up."""
    generator = torch.Generator().manual_seed(keys)
    group = RowPlan([SequenceRows(0, keys - 1, [0])]).base
    assert group is not None
    query, key, value = (
        torch.randn(1, heads, rows, w, generator=generator).to(dtype)
        for heads, rows, w in ((9, 1, 16), (3, 2048, 16), (3, 2048, width))
    )
    columns = form.columns(keys, 2048, dtype)
    given = (group, query, key[:, :, :columns], value[:, :, :columns], None, 0.25, None, None, form)
    made = base_attention(*given)
    monkeypatch.setattr(exact_attention, "_unfilled", lambda *_: False)
    assert torch.equal(made, base_attention(*given))
