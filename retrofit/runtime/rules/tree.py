"""Drafts that branch: a draft tree, chosen once from measured chances.

Row 0 of a tree is the seed; node j >= 1 follows `parents[j]` and is its `rank`-th best candidate.  The chance that
the target is the candidate of rank r, given that the path before it came true, hardly depends on the tokens but much on
the slot, so one table chance[slot][rank] gives every node a survival and the best tree of any size:

    grow(2 slots, 5 nodes)      0 ─┬─ 1 (rank 0) ─── 3 (rank 0)
                                   ├─ 2 (rank 1)
                                   ├─ 4 (rank 2)
                                   └─ 5 (rank 3)

Nodes are in order of falling survival, so the first n are the best tree of n nodes, and parents precede children.
A chain is the tree whose every node has rank 0.  (Static trees: Cai et al. 2024, Medusa, arXiv 2401.10774.)
Not here: tokens, masks, acceptance.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from retrofit.adapters.layout import DraftLayout

ROWS = 96
"""Rows of one request and forward that a draft tree is grown to: about what a GPU computes at the price of one."""
IN_TURN = 15
"""Draft nodes of a tree that is verified with no block beside it: with the seed a tile of a CPU's matrix units."""
UNKNOWN_CHANCE = ((0.4, 0.15, 0.1, 0.05),)
"""Chances of the candidates of a slot where none were measured; they shape the tree and change no output."""


@dataclass(frozen=True)
class DraftTree:
    """parents[j], ranks[j] and survival[j] of row j; row 0 is the seed (parent -1, rank 0, survival 1)."""

    parents: tuple[int, ...]
    ranks: tuple[int, ...]
    survival: tuple[float, ...]

    @property
    def nodes(self) -> int:
        return len(self.parents) - 1

    @cached_property
    def depths(self) -> tuple[int, ...]:
        return tuple(depths(self.parents))

    @property
    def expected(self) -> float:
        """Expected accepted length: the sum of the nodes' survivals."""
        return sum(self.survival[1:])

    def cut(self, depth: int) -> DraftTree:
        """Without the nodes deeper than `depth`."""
        kept = [j for j, d in enumerate(self.depths) if d <= depth]
        if len(kept) == len(self.parents):
            return self
        number = {j: n for n, j in enumerate(kept)} | {-1: -1}
        return DraftTree(
            tuple(number[self.parents[j]] for j in kept),
            tuple(self.ranks[j] for j in kept),
            tuple(self.survival[j] for j in kept),
        )

    def first(self, nodes: int) -> DraftTree:
        """The best tree of at most so many of its nodes."""
        n = nodes + 1
        return self if n >= len(self.parents) else DraftTree(self.parents[:n], self.ranks[:n], self.survival[:n])

    def likeliest_ends(self, count: int) -> tuple[int, ...]:
        """The `count` rows at which the accepted path most likely ends."""
        best = sorted(range(len(self.ends)), key=lambda j: (-self.ends[j], j))[:count]
        return tuple(sorted(best))

    @cached_property
    def ends(self) -> tuple[float, ...]:
        """Chance of each row that the accepted path ends there: survival minus that of the children."""
        ends = list(self.survival)
        for j in range(1, len(self.parents)):
            ends[self.parents[j]] -= self.survival[j]
        return tuple(ends)


SEED_ALONE = DraftTree((-1,), (0,), (1.0,))


def depths(parents: Sequence[int]) -> list[int]:
    """Depth of each row; the seed has 0."""
    found: list[int] = []
    for parent in parents:
        found.append(0 if parent < 0 else found[parent] + 1)
    return found


def paths_of(parents: Sequence[int]) -> list[list[int]]:
    """The rows on the way from the seed to each row, both included."""
    paths: list[list[int]] = []
    for j, parent in enumerate(parents):
        paths.append([j] if parent < 0 else [*paths[parent], j])
    return paths


def fixed_tree(
    layout: DraftLayout,
    acceptance: Mapping[str, Any],
    prepare: str | int,
    nodes: int | None,
    sampled: bool,
    rows: int = ROWS,
) -> DraftTree | None:
    """The draft tree of strategy `fused`; None for chains: `prepare="last"`, 0 nodes, or candidates not measured.

    nodes: None: as many as fit, or IN_TURN where no block is prepared.  rows: most rows of a request and forward.
    """
    chance = acceptance.get("ranks", {}).get("sampled" if sampled else "greedy")
    if prepare == "none":
        nodes = min(IN_TURN if nodes is None else nodes, rows - 1)
    if nodes == 0 or prepare == "last" or (nodes is None and chance is None):
        return None
    if nodes is None:
        nodes = largest_tree(layout, rows) if prepare == "all" else rows - 1 - int(prepare) * layout.block
        if nodes <= layout.drafts:
            return None
    tree = grow(chance or UNKNOWN_CHANCE * layout.drafts, nodes)
    return tree if tree.nodes else None


def largest_tree(layout: DraftLayout, rows: int = ROWS) -> int:
    """Draft nodes that fit into so many rows with a block on the seed and on each of them."""
    return max(0, rows // (1 + layout.block) - 1)


def grow(chance: Sequence[Sequence[float]], nodes: int) -> DraftTree:
    """The tree of so many nodes with the largest expected accepted length; smaller only where candidates run out.

    chance[slot][rank]: probability that the target is that candidate, given that the path before it came true; need
    not fall with the rank.  Greedy is optimal: a child never survives more often than its parent.
    A chance of 0 says that few were measured, not that the candidate never comes true: such nodes are taken last, in
    the order they would have if every rank came true half as often as the one before it.
    """
    parents, ranks, survival, level = [-1], [0], [1.0], [0]
    halvings = [0]
    """Of each node: how often 1 is halved on its path, once a step and once more a rank."""
    heap: list[tuple[float, int, int, int, int]] = []

    def offer(parent: int) -> None:
        for rank, c in enumerate(chance[level[parent]] if level[parent] < len(chance) else ()):
            alive, halved = survival[parent] * c, halvings[parent] + rank + 1
            heapq.heappush(heap, (-alive, 0 if alive else halved, parent, rank, halved))

    offer(0)
    while heap and len(parents) <= nodes:
        minus, _, parent, rank, halved = heapq.heappop(heap)
        parents.append(parent)
        ranks.append(rank)
        survival.append(abs(minus))
        halvings.append(halved)
        level.append(level[parent] + 1)
        offer(len(parents) - 1)
    return DraftTree(tuple(parents), tuple(ranks), tuple(survival))


def accepted_path(tokens: Sequence[int], parents: Sequence[int], targets: Sequence[int]) -> list[int]:
    """Rows of the accepted path, from row 0: follow the child that holds the row's target while there is one.

    tokens[j], parents[j], targets[j] of row j; row 0 is the seed.  What is emitted is targets of these rows.  Exact for
    any drafts, as in `accept.py`: a row's target never looks at its children.
    """
    child = {(parents[j], tokens[j]): j for j in range(len(tokens) - 1, 0, -1)}
    path = [0]
    while (following := child.get((path[-1], targets[path[-1]]))) is not None:
        path.append(following)
    return path
