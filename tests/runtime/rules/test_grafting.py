"""Trees of two sources: the best nodes of all, against growing every node there is; shared beginnings; shared rows."""

from __future__ import annotations

import itertools
import random

import pytest

from retrofit.runtime.plan import shared_rows
from retrofit.runtime.rules.grafting import UNSEEN, Growing, both
from retrofit.runtime.rules.tree import DraftTree

DEEP = 4


def children(rng: random.Random, count: int) -> list[tuple[int, float]]:
    left, found = 1.0, []
    for token in rng.sample(range(9), count):
        found.append((token, left * rng.uniform(0.1, 0.7)))
        left -= found[-1][1]
    return found


@pytest.mark.parametrize("nodes", [1, 4, 12])
def test_the_nodes_that_survive_most_often_are_kept(nodes: int) -> None:
    for seed in range(20):
        rng = random.Random(seed)
        offers = {path: children(rng, 3) for d in range(DEEP) for path in itertools.product(range(9), repeat=d)}
        tree = Growing(0, nodes)
        while tree.level and tree.depths[tree.level[0]] < DEEP:
            tree.add([offers[tuple(tree.path(j))] for j in tree.level])
        tokens, grown = tree.grown()
        every: dict[tuple[int, ...], float] = {(): 1.0}
        for path in offers:  # the shorter ones come first
            if path in every:
                every |= {(*path, token): every[path] * chance for token, chance in offers[path]}
        best = sorted(every, key=lambda path: -every[path])[: nodes + 1]
        paths = [()]
        for token, parent in zip(tokens, grown.parents[1:], strict=True):
            paths.append((*paths[parent], token))
        assert paths == best
        assert grown.survival == pytest.approx([every[path] for path in best])


def test_what_both_propose_is_one_node_and_the_block_shares_what_the_text_leaves() -> None:
    assert dict(both([(5, 0.6)], [(5, 0.5), (7, 0.2)])) == pytest.approx({5: 0.6 + 0.4 * 0.5, 7: 0.4 * 0.2})
    assert dict(both([(5, 0.6)], [])) == {5: 0.6}
    assert dict(both([], [(7, 0.2)])) == {7: 0.2}
    assert dict(both([(5, 0.6)], [(7, 0.5)])) == pytest.approx({5: UNSEEN * 0.6, 7: (1 - UNSEEN * 0.6) * 0.5})


def test_rows_go_where_they_promise_most() -> None:
    """Against every number of nodes with every choice of rows to hang blocks on."""
    rng = random.Random(0)
    chosen = set()
    for _ in range(40):
        growing = Growing(0, 9)
        for _ in range(DEEP):
            growing.add([children(rng, 2) for _ in growing.level])
        tree: DraftTree = growing.grown()[1]
        rows, block, worth = rng.randrange(1, 16), rng.choice([1, 2, 4]), rng.uniform(0.1, 2)

        def promised(nodes: int, hang: tuple[int, ...], tree: DraftTree = tree, worth: float = worth) -> float:
            some = tree.first(nodes)
            return some.expected + worth * sum(some.ends[j] for j in hang)

        nodes, hang = shared_rows(tree, rows, block, worth)
        assert 1 + nodes + block * len(hang) <= rows
        every = [
            promised(n, some)
            for n in range(min(rows, tree.nodes + 1))
            for some in itertools.combinations(range(n + 1), min(n + 1, (rows - 1 - n) // block))
        ]
        assert promised(nodes, hang) == pytest.approx(max(every))
        chosen.add((nodes > 0, bool(hang)))
    assert {(True, True), (True, False), (False, True)} <= chosen
