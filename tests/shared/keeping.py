"""Engines that keep prefixes whatever a machine's bits are like, and how many rows of prompts they run."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from decoding import randomise
from tiny_models import build

from retrofit.adapters.layout import DraftLayout
from retrofit.runtime.backends.hf.backend import HFBackend
from retrofit.runtime.backends.hf.exact_attention import GROUPED
from retrofit.runtime.engine import Engine
from retrofit.runtime.prefixes.pieces import Pieces

LAYOUT = DraftLayout(block=4)
SIZE = 8
"""Positions of a piece."""


def keeping(name: str, dtype: torch.dtype = torch.float32, budget: int | None = None) -> Engine:
    """An engine that keeps small pieces, whatever this machine's bits are like."""
    engine = randomise(Engine.from_model(build(name).to(dtype), layout=LAYOUT, exact="off"))
    assert isinstance(engine.backend, HFBackend)
    engine.backend.hold("invariant", GROUPED, 2)
    engine.prefixes = Pieces(budget, SIZE)
    return engine


@contextmanager
def prompt_rows(engine: Engine) -> Iterator[list[int]]:
    """How many rows of prompts each forward inside has."""
    rows: list[int] = []
    plan = engine.backend.row_plan

    def counted(sequences: Any) -> Any:
        if any(s.last_logits_only for s in sequences):
            rows.append(sum(len(s.tokens) for s in sequences))
        return plan(sequences)

    engine.backend.row_plan = counted  # type: ignore[method-assign]
    try:
        yield rows
    finally:
        engine.backend.row_plan = plan  # type: ignore[method-assign]
