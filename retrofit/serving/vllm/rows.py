"""Where the rows of a draft forward stand, as vLLM counts requests, positions and slots of its paged cache.

    rows         s_1 .. s_N | M_11 .. M_1K | .. | M_N1 .. M_NK      seeds first, so that draft rows are one slice
    requests     N of one query, which see p + 1 positions; then N of K queries, which see p + 1 + K

Shapes: N requests, K draft rows each, B blocks of a request's table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DraftRows:
    """One draft forward."""

    positions: Tensor
    """[N + N K] int64."""
    slots: Tensor
    """[N + N K] int64: where each row's K and V go."""
    query_start: Tensor
    """[2N + 1] int32: the first row of each request."""
    lengths: Tensor
    """[2N] int32: positions that each request sees."""
    table_RB: Tensor
    """[2N, B]: the blocks of each request."""


def draft_rows(seed_position_N: Tensor, table_NB: Tensor, draft_rows: int, block_size: int) -> DraftRows:
    """The rows that hang on seeds at the given positions, int64, on the device of the block table.

    draft_rows: K.  block_size: positions of a block of the table.
    """
    N, K, device = len(seed_position_N), draft_rows, table_NB.device
    each = torch.arange(N, device=device)
    ahead = torch.arange(1, K + 1, device=device)
    positions = torch.cat([seed_position_N, (seed_position_N[:, None] + ahead).flatten()])
    request = torch.cat([each, each.repeat_interleave(K)])
    slots = table_NB[request, positions // block_size].long() * block_size + positions % block_size
    starts = torch.cat([torch.arange(N + 1, device=device), N + K * torch.arange(1, N + 1, device=device)])
    lengths = torch.cat([seed_position_N + 1, seed_position_N + 1 + K])
    return DraftRows(positions, slots, starts.to(torch.int32), lengths.to(torch.int32), torch.cat([table_NB, table_NB]))
