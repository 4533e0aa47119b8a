"""Attention over pages and scratch: against the reference, and a row's bits against the same row elsewhere or alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from retrofit.runtime.kernels import reference
from retrofit.runtime.kernels.attention import row_attention
from retrofit.runtime.kernels.rows import PAGE, Rows, cut_tiles, tile_rows

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = float("nan")


@dataclass(frozen=True)
class Heads:
    query: int
    kv: int
    width: int


@dataclass
class Request:
    """Base rows (a tree given by its parents) from position `start` on, and blocks of draft rows on some of them.

    Row j's K and V are at place start + j, those of earlier tokens at their positions.
    """

    start: int
    parents: list[int] = field(default_factory=lambda: [-1])
    blocks: list[tuple[int, int]] = field(default_factory=list)
    """(anchor, rows); anchor -1: not in use."""
    unused: int = 0
    """Base rows at the end, and rows at the end of every block, that are not in use."""
    key: Tensor = field(default_factory=lambda: torch.empty(0))
    value: Tensor = field(default_factory=lambda: torch.empty(0))
    query: Tensor = field(default_factory=lambda: torch.empty(0))
    draft_query: Tensor = field(default_factory=lambda: torch.empty(0))
    draft_key: Tensor = field(default_factory=lambda: torch.empty(0))
    draft_value: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def num_base(self) -> int:
        return len(self.parents)

    @property
    def num_draft(self) -> int:
        return sum(count for _, count in self.blocks)

    def path(self, j: int) -> list[int]:
        return [*(self.path(self.parents[j]) if self.parents[j] >= 0 else []), j]

    def filled(self, heads: Heads, dtype: torch.dtype) -> Request:
        def made(n: int, h: int) -> Tensor:
            return torch.randn(n, h, heads.width, device=DEVICE).to(dtype)

        n = self.start + self.num_base
        return replace(
            self,
            key=made(n, heads.kv), value=made(n, heads.kv), query=made(self.num_base, heads.query),
            draft_query=made(self.num_draft, heads.query),
            draft_key=made(self.num_draft, heads.kv), draft_value=made(self.num_draft, heads.kv),
        )  # fmt: skip

    def alone(self, j: int) -> Request:
        """Base row j as plain decoding runs it, the tokens on its path before it."""
        path = self.path(j)
        places = [*range(self.start), *(self.start + node for node in path)]
        start = self.start + len(path) - 1
        return Request(start, key=self.key[places], value=self.value[places], query=self.query[j : j + 1])


def chain(length: int) -> list[int]:
    return list(range(-1, length - 1))


@dataclass
class Batch:
    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    table: Tensor
    draft_key: Tensor
    draft_value: Tensor
    rows: Rows

    def attend(self, window=None, softcap=None, causal=False, attention=row_attention, **options) -> Tensor:
        """[rows, Hq * D], padding cut off."""
        scale = self.query.shape[2] ** -0.5
        out = attention(
            self.query, self.key_cache, self.value_cache, self.table, self.draft_key, self.draft_value,
            self.rows, scale, window, softcap, causal, **options,
        )  # fmt: skip
        return out[: self.rows.num_rows]


def batch(
    sequences: Sequence[Request], pages: int, slots: Sequence[int] | None = None, tree: bool = False, pad: int = 3
) -> Batch:
    """Rows of filled sequences; shuffled pages, NaN in all that is not written, and in the query of padding rows."""
    slots = slots or range(len(sequences))
    _, Hkv, D = sequences[0].key.shape
    dtype, Hq = sequences[0].key.dtype, sequences[0].query.shape[1]
    num_base, num_draft = sum(s.num_base for s in sequences), sum(s.num_draft for s in sequences)
    count = max(slots) + 1
    table = (torch.randperm(count * pages) + 1).to(torch.int32).view(count, pages)
    caches = torch.full((2, count * pages + 1, Hkv, PAGE, D), NAN, dtype=dtype, device=DEVICE)
    depth = max(len(s.path(j)) for s in sequences for j in range(s.num_base))
    padded = num_base + num_draft + pad
    ints = {"dtype": torch.int32, "device": DEVICE}
    tile_first, tile_count, base_tiles = cut_tiles(
        [s.num_base for s in sequences], [s.num_draft for s in sequences], tile_rows(Hq // Hkv), DEVICE
    )
    rows = Rows(
        num_base, num_draft, padded,
        ids=torch.zeros(padded, dtype=torch.int64, device=DEVICE),
        positions=torch.zeros(padded, dtype=torch.int64, device=DEVICE),
        slots=torch.zeros(padded, **ints), limits=torch.zeros(padded, **ints),
        places=torch.full((num_base,), -1, dtype=torch.int64, device=DEVICE),
        low=torch.zeros(num_draft, **ints), high=torch.zeros(num_draft, **ints),
        tile_first=tile_first, tile_count=tile_count, base_tiles=base_tiles,
        starts=torch.zeros(padded, **ints) if tree else None,
        paths=torch.zeros(padded, depth, **ints) if tree else None,
    )  # fmt: skip

    def lay(row: int, slot: int, position: int, limit: int, start: int, path: list[int]) -> None:
        rows.positions[row], rows.slots[row], rows.limits[row] = position, slot, limit
        if rows.starts is not None and rows.paths is not None:
            rows.starts[row] = start
            rows.paths[row, : len(path)] = torch.tensor(path)

    row, own = 0, 0
    for slot, s in zip(slots, sequences, strict=True):
        for place in range(s.start + s.num_base - s.unused):
            page = int(table[slot, place // PAGE])
            caches[0, page, :, place % PAGE], caches[1, page, :, place % PAGE] = s.key[place], s.value[place]
        for j in range(s.num_base - s.unused):
            path = s.path(j)
            position = s.start + len(path) - 1
            lay(row + j, slot, position, position + 1, s.start, path)
        row += s.num_base
        for anchor, block in s.blocks:
            if anchor < 0:
                own += block
                continue
            path = s.path(anchor)
            start = s.start + len(path)
            for i in range(block - s.unused):
                lay(num_base + own + i, slot, start + i, start, s.start, path)
                rows.low[own + i], rows.high[own + i] = own, own + block - s.unused
            own += block
    padding = torch.full((pad, Hq, D), NAN, dtype=dtype, device=DEVICE)
    query = torch.cat([s.query for s in sequences] + [s.draft_query for s in sequences if s.blocks] + [padding])
    scratch = [
        torch.cat([t.new_zeros(0, Hkv, D), *ts])
        for t, ts in (
            (caches[0], [s.draft_key for s in sequences if s.blocks]),
            (caches[1], [s.draft_value for s in sequences if s.blocks]),
        )
    ]
    return Batch(query, *caches, table.to(DEVICE), *scratch, rows)


def assert_as_reference(b: Batch, **options) -> None:
    dtype = b.query.dtype
    split = {"split": options.pop("split")} if "split" in options else {}
    got, want = b.attend(**options, **split), b.attend(**options, attention=reference.row_attention)
    # In 16 bits the weights are rounded before the product with V: at most an ulp of each, relative to the largest V.
    tolerance = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


RAGGED = (
    Request(130, chain(3), [(-1, 2), (0, 4), (2, 3)]),
    Request(61, chain(5), [(3, 3)], unused=1),
    Request(0),
    Request(7, chain(9), [(0, 9)]),
)
"""Ends of pages met and crossed; rows and a block not in use; a sequence of one token; for 8 heads two tiles."""


@pytest.mark.parametrize(
    ("dtype", "heads", "options"),
    [
        (torch.float32, Heads(2, 1, 12), {"split": 64}),
        (torch.float32, Heads(2, 2, 12), {"split": 128, "causal": True}),
        (torch.float32, Heads(7, 1, 16), {"split": 64, "window": 1}),
        (torch.float32, Heads(4, 2, 12), {"window": 66, "causal": True, "softcap": 2.0}),
        (torch.float16, Heads(8, 1, 80), {"split": 128, "softcap": 30.0}),
        (torch.bfloat16, Heads(4, 1, 128), {"causal": True, "window": 70}),
    ],
    ids=str,
)
def test_against_reference(dtype: torch.dtype, heads: Heads, options: dict) -> None:
    sequences = [s.filled(heads, dtype) for s in RAGGED]
    assert_as_reference(batch(sequences, pages=3, slots=[3, 0, 4, 1]), **options)


def test_more_draft_rows_than_a_tile_and_a_page() -> None:
    b = batch([Request(9, [-1], [(0, 70)]).filled(Heads(2, 1, 12), torch.float32)], pages=1)
    assert_as_reference(b, window=50, split=64)


def test_one_split_walks_everything() -> None:
    heads = Heads(2, 1, 12)
    b = batch([Request(120, chain(34)).filled(heads, torch.float32)], pages=4)
    assert_as_reference(b, split=4 * PAGE)


@pytest.mark.parametrize("softcap", [2.0, 50.0])
def test_softcap_of_huge_and_tiny_scores(softcap: float) -> None:
    heads = Heads(2, 1, 12)
    for size in (1e-3, 1e3):
        s = Request(20, chain(2), [(1, 3)]).filled(heads, torch.float32)
        b = batch([replace(s, query=s.query * size, draft_query=s.draft_query * size)], pages=1)
        assert_as_reference(b, softcap=softcap)


def test_rows_that_see_nothing_are_zero() -> None:
    heads = Heads(2, 1, 12)
    b = batch([Request(5, chain(3), [(0, 3)], unused=2).filled(heads, torch.float32)], pages=2)
    out = b.attend(split=64)
    assert not out[[1, 2, 4, 5]].any()
    assert out[[0, 3]].any(1).all() and out.isfinite().all()


def test_block_without_base_tokens_before_it() -> None:
    """A draft block whose first row is the seed of a prompt of one token."""
    heads = Heads(2, 1, 12)
    b = batch([Request(0, chain(1), [(0, 3)]).filled(heads, torch.float32)], pages=2)
    b.rows.limits.zero_()
    assert_as_reference(b, split=64)


# A base row's bits

EXACT = [
    (torch.float32, Heads(8, 1, 12), None, 64),
    (torch.bfloat16, Heads(4, 1, 64), 66, 128),
    (torch.float16, Heads(2, 2, 12), 5, 64),
]


@pytest.mark.parametrize(("dtype", "heads", "window", "split"), EXACT, ids=str)
def test_base_row_equals_itself_alone(dtype: torch.dtype, heads: Heads, window: int | None, split: int) -> None:
    """Among other rows, sequences and drafts, with the pages elsewhere and more of them; no base row reads scratch."""
    sequences = [s.filled(heads, dtype) for s in RAGGED]
    together = batch(sequences, pages=3, slots=[2, 1, 0, 3])
    for t in (together.draft_key, together.draft_value):
        t.fill_(NAN)
    out = together.attend(window, split=split)
    row = 0
    for s in sequences:
        for j in range(s.num_base - s.unused):
            if j in (1, s.num_base - s.unused - 1):
                alone = batch([s.alone(j)], pages=3 + j % 2, slots=[j % 2])
                assert torch.equal(alone.attend(window, split=split)[0], out[row + j]), (s.start, j)
        row += s.num_base


TREE = [-1, 0, 0, 1, 1, 2, 4, 6]
"""Depths 0 to 4, siblings at depths 1 and 2."""


@pytest.mark.parametrize(
    ("start", "heads", "options"),
    [
        (0, Heads(2, 1, 12), {"split": 64}),
        (62, Heads(2, 2, 12), {"split": 128, "window": 4}),
        (126, Heads(8, 1, 16), {"split": 64, "softcap": 5.0}),
        (130, Heads(4, 1, 12), {"split": 128, "causal": True}),
    ],
    ids=str,
)
def test_tree_against_reference(start: int, heads: Heads, options: dict) -> None:
    sequences = [
        Request(start, TREE, [(0, 2), (5, 2), (7, 2)]).filled(heads, torch.float32),
        Request(9, TREE[:6], [(3, 4)], unused=2).filled(heads, torch.float32),
    ]
    assert_as_reference(batch(sequences, pages=3, slots=[1, 0], tree=True), **options)


@pytest.mark.parametrize(
    ("start", "dtype", "heads", "window", "split"),
    [(start, *case) for start, case in zip((62, 62, 125), EXACT, strict=True)],
    ids=str,
)
def test_tree_row_equals_itself_in_a_chain(
    start: int, dtype: torch.dtype, heads: Heads, window: int | None, split: int
) -> None:
    """The base rows of a tree, and the drafts of one block on its deepest row."""
    anchor = len(TREE) - 1
    tree = Request(start, TREE, [(anchor, 3)]).filled(heads, dtype)
    other = Request(30, TREE[:3]).filled(heads, dtype)
    out = batch([other, tree], pages=3, slots=[1, 2], tree=True).attend(window, split=split)
    first = other.num_base
    for j in (2, 3, 5):
        alone = batch([tree.alone(j)], pages=4).attend(window, split=split)
        assert torch.equal(alone[0], out[first + j]), j
    path = tree.path(anchor)
    straight = replace(
        tree.alone(anchor), blocks=[(0, 3)],
        draft_query=tree.draft_query, draft_key=tree.draft_key, draft_value=tree.draft_value,
    )  # fmt: skip
    assert straight.start == start + len(path) - 1
    alone = batch([straight], pages=4).attend(window, split=split)
    assert torch.equal(alone, out[first + anchor :])
