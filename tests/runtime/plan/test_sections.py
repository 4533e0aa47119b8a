"""Sections of a forward: the cheapest way to cut its sequences, and rows that see in a section what they see in all."""

import random
from collections.abc import Iterator
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from decoding import randomise
from tiny_models import build
from torch.utils._python_dispatch import TorchDispatchMode

from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.rows import MASK, Block, RowPlan, SequenceRows
from retrofit.adapters.sections import CALL, Section, cuts, sections
from retrofit.errors import GateError
from retrofit.runtime.backends.hf.exact_attention import KERNEL
from retrofit.runtime.engine import Engine

STEP = 16
LENGTHS = (30, 20, 700, 15, 90, 80, 300, 310)


@pytest.mark.parametrize(
    ("slots", "steps", "expected"),
    [
        ([0, 1, 2, 3, 4, 5], [2, 1, 20, 1, 4, 4], [(0, 2), (2, 3), (3, 6)]),  # 8 + 24 + 16: [3] apart costs 8 + 9
        ([0, 1, 2], [3, 3, 3], [(0, 3)]),
        ([0, 1, 3, 4], [1, 1, 1, 1], [(0, 2), (2, 4)]),  # a slot between them is not read
        (None, [1, 1, 1, 1], [(0, 4)]),
        (None, [1, 30, 1], [(0, 1), (1, 2), (2, 3)]),
        ([1, 0], [1, 1], [(0, 1), (1, 2)]),
        ([7], [40], [(0, 1)]),
    ],
)
def test_cuts(slots: list[int] | None, steps: list[int], expected: list[tuple[int, int]]) -> None:
    assert cuts(slots, steps) == expected


def ways_to_cut(count: int) -> Iterator[list[tuple[int, int]]]:
    for number in range(count):
        for inner in combinations(range(1, count), number):
            yield list(pairwise([0, *inner, count]))


def test_no_way_to_cut_takes_less_time() -> None:
    rng = random.Random(0)

    def cost(found: list[tuple[int, int]]) -> int:
        return sum(CALL + (stop - first) * max(steps[first:stop]) for first, stop in found)

    for _ in range(200):
        slots = np.cumsum([rng.choice((1, 1, 1, 2)) for _ in range(rng.randint(1, 8))]).tolist()
        steps = [rng.choice((1, 1, 2, 3, 5, 8, 20)) for _ in slots]
        allowed = [
            way
            for way in ways_to_cut(len(slots))
            if all(slots[stop - 1] - slots[first] == stop - 1 - first for first, stop in way)
        ]
        assert cuts(slots, steps) in allowed
        assert cost(cuts(slots, steps)) == min(map(cost, allowed))


def forward(kind: str, lengths: tuple[int, ...] = LENGTHS, without: int = 1) -> list[SequenceRows]:
    """A row of every third sequence, from `without` on, and of the others drafts too."""
    parents = [-1, 0, 0] if kind == "tree" else None
    rows = []
    for slot, start in enumerate(lengths):
        few = slot % 3 == without
        tokens = [5] if kind == "ar" or few else [5, 6, 7]
        anchor = 0 if kind == "tree" else -1
        blocks = [] if kind == "ar" or few else [Block(start + 1, [MASK] * 3, anchor=anchor)]
        rows.append(SequenceRows(slot, start, tokens, blocks, parents=parents and parents[: len(tokens)]))
    return rows


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("which", ["base", "draft"])
@pytest.mark.parametrize("kind", ["ar", "chain", "tree"])
def test_rows_see_the_same_in_a_section(kind: str, which: str, window: int | None) -> None:
    plan = RowPlan(forward(kind))
    group = getattr(plan, which)
    if group is None:
        pytest.skip("no draft rows")
    found: list[Section] = sections(plan, group, STEP, spanning=False)
    assert len(found) > 1
    assert [n for part, _ in found for n in range(len(group.slots))[part]] == list(range(len(group.slots)))

    def mask(of: RowPlan) -> torch.Tensor:
        rows, own = getattr(of, which), of.draft.width if which == "draft" else 0
        made = of.base_mask(window, torch.float32)[0] if which == "base" else of.draft_mask(window, torch.float32)
        return torch.zeros(len(rows.slots), rows.width, rows.keys + own) if made is None else made[:, 0]

    whole = mask(plan)
    for part, some in found:
        own = getattr(some, which)
        assert own.slots == group.slots[part]
        here, behind = mask(some), whole.shape[2] - group.keys
        assert torch.equal(here[..., : own.keys], whole[part][..., : own.keys])
        assert torch.equal(here[..., own.keys :], whole[part][..., whole.shape[2] - behind :])
        assert whole[part][..., own.keys : group.keys].isneginf().all()
        if kind == "tree" and which == "base":
            assert some.paths.starts == plan.paths.starts[part]


class KeysRead(TorchDispatchMode):
    """Numbers of all K that attention calls read."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "scaled_dot_product" in str(func):
            self.total += args[1].numel()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "off"])
@pytest.mark.parametrize("without", [1, 2], ids=["long one drafts", "long one does not"])
@pytest.mark.parametrize("kind", ["ar", "chain", "tree"])
@torch.inference_mode()
def test_a_short_text_does_not_read_as_much_as_a_long_one_beside_it(kind: str, without: int, exact: bool) -> None:
    model = build("llama")
    model.config.max_position_embeddings = 8192
    engine = randomise(Engine.from_model(model, layout=DraftLayout(block=4), exact="off"))
    if exact:
        engine.backend.hold("invariant", KERNEL, 2)
    lengths = (20, 40, 6000, 30, 10, 25, 50, 35)
    cache = engine.backend.new_cache(len(lengths), max(lengths) + 64)
    read = []
    for rows in (forward(kind, lengths, without), forward(kind, lengths[2:3], 1)):
        for row in rows:
            engine.backend.forward(engine.backend.row_plan([SequenceRows(row.slot, 0, [1])]), cache)
        with KeysRead() as counted:
            engine.backend.forward(engine.backend.row_plan(rows), cache)
        read.append(counted.total)
    engine.close()
    assert read[0] <= 2 * read[1]


@pytest.mark.parametrize("exact", ["off", "invariant"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["ar", "chain", "tree"])
@torch.inference_mode()
def test_logits_are_those_of_sequences_alone(kind: str, dtype: torch.dtype, exact: str) -> None:
    if exact == "off" and dtype == torch.bfloat16:
        pytest.skip("nothing is promised, and rounding is coarse")
    model = build("llama").to(dtype)
    model.config.max_position_embeddings = 2048
    try:
        engine = randomise(Engine.from_model(model, layout=DraftLayout(block=4), exact=exact))
    except GateError as error:
        pytest.skip(str(error))
    cache = engine.backend.new_cache(len(LENGTHS), 1024)
    generator = torch.Generator().manual_seed(0)
    for slot, length in enumerate(LENGTHS):
        text = torch.randint(20, (length,), generator=generator).tolist()
        for first in range(0, length, 256):
            rows = SequenceRows(slot, first, text[first : first + 256], last_logits_only=True)
            engine.backend.forward(engine.backend.row_plan([rows]), cache)
    rows = forward(kind)
    together = engine.backend.forward(engine.backend.row_plan(rows), cache)
    apart = [engine.backend.forward(engine.backend.row_plan([row]), cache) for row in rows]
    engine.close()
    of_base, of_drafts = (
        [getattr(together, what), torch.cat([getattr(one, what) for one in apart])]
        for what in ("base_logits", "draft_hidden")
    )
    if exact == "invariant":
        assert torch.equal(*of_base)
    torch.testing.assert_close(*of_base, atol=1e-4, rtol=1e-4)
    if dtype == torch.float32:
        torch.testing.assert_close(*of_drafts, atol=1e-4, rtol=1e-4)
