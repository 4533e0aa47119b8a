"""Grow the draft tree of one request from two sources: candidates of its draft block, and what its text proposes.

A node's children are the candidates of both, a token that both propose once.  The text is right or not with a chance of
its own (`continuations.py`), less where the block does not think of its token, and where it is not right, the block's
candidates share what is left:

    chance(x) = text(x) + (1 - sum of text) block(x)

A node survives with the product of the chances on its path; the tree is the nodes that survive most often, so rows go
where they pay, deep or wide as this block and this text are sure of themselves.  Grown level by level, since a level's
candidates are computed together; a level keeps what can still be among the best.  (Best-first trees of one block: Li et
al. 2024, EAGLE-2, arXiv 2406.16858.)  Not here: tensors, how rows are shared between nodes and blocks (`plan.py`).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from retrofit.runtime.rules.tree import DraftTree

WIDEST = 24
"""Nodes of a level that are followed further."""
UNSEEN = 0.6
"""Of the chance of what the text proposes, what is left where it is no candidate of the block (LOG.md)."""
Chances = Sequence[tuple[int, float]]
"""(token, chance that it comes next)."""


class Growing:
    """A tree while it grows.  tokens[j], parents[j], survival[j], depths[j] of node j; node 0 is the seed."""

    def __init__(self, seed: int, nodes: int):
        """nodes: how many it is to have at most, the seed not counted."""
        self.nodes = nodes
        self.tokens, self.parents, self.survival, self.depths = [seed], [-1], [1.0], [0]
        self.level = [0] if nodes else []
        """Nodes whose children come next."""
        self._best: list[float] = []
        """The largest survivals so far, the smallest of them first."""

    def path(self, node: int) -> list[int]:
        """Drafts on the way to a node, its own included."""
        found: list[int] = []
        while node:
            found.append(self.tokens[node])
            node = self.parents[node]
        return found[::-1]

    def add(self, children: Sequence[Chances]) -> None:
        """The next level.  children: of each node of the present one."""
        offered = []
        for parent, chances in zip(self.level, children, strict=True):
            for token, chance in chances:
                alive = self.survival[parent] * chance
                if alive > 0 and (len(self._best) < self.nodes or alive > self._best[0]):
                    offered.append((-alive, parent, token))
                    push = heapq.heappush if len(self._best) < self.nodes else heapq.heappushpop
                    push(self._best, alive)
        first = len(self.tokens)
        for minus, parent, token in sorted(offered)[:WIDEST]:
            self.tokens.append(token)
            self.parents.append(parent)
            self.survival.append(-minus)
            self.depths.append(self.depths[parent] + 1)
        self.level = [j for j in range(first, len(self.tokens)) if self.survival[j] >= self._best[0]]

    def grown(self) -> tuple[list[int], DraftTree]:
        """(tokens, tree): the nodes in order of falling survival, parents before their children."""
        order = sorted(range(len(self.tokens)), key=lambda j: (-self.survival[j], j))[: self.nodes + 1]
        number = {j: n for n, j in enumerate(order)} | {-1: -1}
        tree = DraftTree(
            tuple(number[self.parents[j]] for j in order),
            (0,) * len(order),
            tuple(self.survival[j] for j in order),
        )
        return [self.tokens[j] for j in order[1:]], tree


def both(text: Chances, block: Chances) -> list[tuple[int, float]]:
    """Children by both sources; block: empty where it has no slot there."""
    known = {token for token, _ in block}
    found = {token: chance if token in known or not known else UNSEEN * chance for token, chance in text}
    left = 1 - sum(found.values())
    for token, chance in block:
        found[token] = found.get(token, 0.0) + left * chance
    return list(found.items())
