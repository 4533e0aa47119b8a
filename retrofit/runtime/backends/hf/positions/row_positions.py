"""The rows' positions for models that take them from the length of their cache.

    what such a model computes    torch.arange(N) + past_key_values.get_seq_length()
    what it is to come out as     5 6 7 | 6 7 8: where each row stands

So what it is handed as its cache says the difference, row by row.  Not here: K/V (`cache.py`).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn


class RowPositions:
    """Stands where transformers has a cache; keeps nothing."""

    def __init__(self, positions_1N: Tensor):
        positions = positions_1N[0]
        self.before = positions - torch.arange(len(positions), device=positions.device)

    def get_seq_length(self, layer_idx: int = 0) -> Tensor:
        """[N]"""
        return self.before

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return key, value


def asked_of_cache(trunk: nn.Module, config: Any) -> str | None:
    """Who takes positions from the cache: `all` of the model, some `attention` of it beside the others, or None."""
    takes = inspect.signature(trunk.forward).parameters
    if "past_key_values" not in takes:
        return None
    if "position_ids" not in takes:
        return "all"  # the BART family
    return "attention" if getattr(config, "attn_temperature_tuning", False) else None  # Llama 4, by how far a row is


def instead_of_cache(asked: str | None, positions_1N: Tensor) -> dict[str, Any]:
    """Arguments of the trunk that say where the rows stand to who asks the cache."""
    if asked is None:
        return {}
    rows = RowPositions(positions_1N)
    if asked == "attention":
        return {"past_key_values": rows}
    # A mask that hides nothing: such a model would make one, of as many positions as its cache says.
    return {"past_key_values": rows, "attention_mask": torch.ones_like(positions_1N)}
