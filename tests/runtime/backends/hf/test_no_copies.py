"""No step copies K/V: what a step writes does not grow with the context."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoding import randomise
from tiny_models import build
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.rows import MASK, Block, SequenceRows
from retrofit.runtime.backends.hf import attention
from retrofit.runtime.backends.hf.exact_attention import KERNEL
from retrofit.runtime.engine import Engine

STEPS = {
    "ar": ([1], None, []),
    "chain": ([1, 2, 3, 4], None, [Block(2, [MASK] * 4), Block(5, [MASK] * 4)]),
    "tree": ([1, 2, 3, 4], [-1, 0, 0, 1], [Block(2, [MASK] * 4, anchor=0)]),
}
CONTEXTS = (1100, 2100)


class Written(TorchDispatchMode):
    """Bytes of the results of operations that are no views and make as many numbers as K or V of a context have."""

    def __init__(self, least: int):
        super().__init__()
        self.least, self.ops = least, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        for made in tree_iter(out):
            new = isinstance(made, torch.Tensor) and made.untyped_storage()._cdata not in given
            if new and made.numel() >= self.least:
                self.ops.append(f"{func} {tuple(made.shape)}")
        return out


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "off"])
@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("kind", STEPS)
@torch.inference_mode()
def test_no_operation_of_a_step_writes_as_much_as_k_or_v(kind: str, slots: int, exact: bool) -> None:
    if not exact and kind == "tree":
        pytest.skip("where nothing is promised, a tree's base rows attend in one call over keys that are joined")
    model = build("llama")
    model.config.max_position_embeddings = 4096
    engine = randomise(Engine.from_model(model, layout=DraftLayout(block=4), exact="off"))
    if exact:
        engine.backend.hold("invariant", KERNEL, 2)
    tokens, parents, blocks = STEPS[kind]
    for context in CONTEXTS:
        cache = engine.backend.new_cache(slots, context + 64)
        starts = [context - 3 * slot for slot in range(slots)]
        for slot in range(slots):
            engine.backend.forward(engine.backend.row_plan([SequenceRows(slot, 0, [1])]), cache)
        rows = []
        for slot, start in enumerate(starts):
            hung = [Block(start + block.start, block.inputs, anchor=block.anchor) for block in blocks]
            rows.append(SequenceRows(slot, start, tokens, hung, parents=parents))
        plan = engine.backend.row_plan(rows)
        keys = cache.layers[0][0]
        written = Written(slots * keys.shape[1] * context * keys.shape[3])
        with written:
            engine.backend.forward(plan, cache)
        assert not written.ops, written.ops
    engine.close()


@torch.inference_mode()
def test_the_count_sees_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention._exact_rows

    def copying(group: Any, query: Any, key: Any, value: Any, *rest: Any) -> Any:
        return right(group, query, key.clone(), value, *rest)

    monkeypatch.setattr(attention, "_exact_rows", copying)
    with pytest.raises(AssertionError, match="clone"):
        test_no_operation_of_a_step_writes_as_much_as_k_or_v("ar", 1, True)
