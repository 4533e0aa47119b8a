"""Drafts of `hybrid`: one tree for each request, of its block that came true and of what its text proposes.

Level by level: the block's candidates behind every node of a level come from one call for all requests, those of the
text from its index.  A request whose block did not come true, or that has just been prefilled, has its text alone.
Not here: how the tree grows (`rules/grafting.py`), which nodes are verified and where blocks hang (`plan.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from retrofit.runtime.host.drafting import Slots, slots_of
from retrofit.runtime.host.modes import _constrain, _groups, _params, _stack
from retrofit.runtime.plan import max_verify
from retrofit.runtime.request import Request
from retrofit.runtime.rules.grafting import Chances, Growing, both
from retrofit.runtime.run import Run

DEEPEST = 20
"""Drafts in a row, at most: a text that is copied is proposed for longer than a block is."""
CANDIDATES = 16
"""Of a slot, behind each node."""


def graft(run: Run, requests: Sequence[Request], rows: Sequence[int]) -> None:
    """Draft a tree for each request; rows: that each may have in the next forward, the seed's included."""
    most = run.backend.most_nodes
    nodes = [n - 1 if most is None else min(n - 1, most) for n in rows]
    for group in _groups(run, requests):
        _graft(run, [requests[n] for n in group], [nodes[n] for n in group])


def _graft(run: Run, requests: Sequence[Request], nodes: Sequence[int]) -> None:
    trees = [Growing(r.tokens[-1], count) for r, count in zip(requests, nodes, strict=True)]
    texts = [r.continued(run.layout.drafts) for r in requests]
    deepest = [min(DEEPEST, max_verify(r, run.limits)) for r in requests]
    hung = [n for n, r in enumerate(requests) if r.came_true is not None and deepest[n]]
    lengths = [_slots_in(requests[n]) for n in hung]
    slots = _slots(run, [requests[n] for n in hung], max(lengths)) if hung else None
    for depth in range(max(deepest, default=0)):
        block: dict[int, list[Chances]] = {}
        drafting = [n for n, length in zip(hung, lengths, strict=True) if depth < length and trees[n].level]
        if slots is not None and drafting:
            # All of them, for the slots are a batch: what stands for those that have no slot left is not read.
            found = _candidates(run, slots, [requests[n] for n in hung], [trees[n] for n in hung], depth)
            block = {n: some for n, some in zip(hung, found, strict=True) if n in drafting}
        for n, tree in enumerate(trees):
            if depth >= deepest[n] or not tree.level:
                tree.level = []
                continue
            own = block.get(n) or [()] * len(tree.level)
            tree.add([both(texts[n].next(tree.path(j)), some) for j, some in zip(tree.level, own, strict=True)])
    for request, tree in zip(requests, trees, strict=True):
        request.drop_drafts()
        request.drafts, request.tree = tree.grown()


def _slots_in(request: Request) -> int:
    assert request.came_true is not None
    return len(request.came_true[0])


def _slots(run: Run, requests: Sequence[Request], width: int) -> Slots:
    """The slots of the requests' blocks, `width` of each."""
    heads = run.backend.heads
    assert heads is not None
    blocks = [r.came_true for r in requests if r.came_true is not None]
    known = [logits for _, logits in blocks if logits is not None]
    if known:
        trunk = _stack(known, width)
    else:
        trunk = run.backend.head(_stack([hidden for hidden, _ in blocks], width).flatten(0, 1)).unflatten(
            0, (-1, width)
        )
    seeds, indices = [r.seed for r in requests], [r.output_index for r in requests]
    return slots_of(seeds, indices, trunk, heads, _params(run, requests), ruled=run.ruled)


def _candidates(
    run: Run, slots: Slots, requests: Sequence[Request], trees: Sequence[Growing], depth: int
) -> list[list[Chances]]:
    """Of each request and node of its tree's level: the candidates of the slot at this depth, with their chances."""
    P = max(len(tree.level) for tree in trees)
    paths = [[tree.path(j) for j in tree.level] + [[]] * (P - len(tree.level)) for tree in trees]
    before = [[tree.tokens[j] for j in tree.level] + [0] * (P - len(tree.level)) for tree in trees]
    flat = [path for of in paths for path in of]
    constrain = _constrain([r for r in requests for _ in range(P)], flat if run.ruled else None)
    tokens, chance = slots.likeliest(
        depth,
        torch.tensor(before, device=run.backend.device),
        CANDIDATES,
        _along([r.seen for r in requests], paths),
        _along([r.counts for r in requests], paths),
        constrain,
    )
    return [
        [list(zip(*some, strict=True)) for some in zip(ids[: len(tree.level)], chances[: len(tree.level)], strict=True)]
        for tree, ids, chances in zip(trees, tokens.tolist(), chance.tolist(), strict=True)
    ]


def _along(known: Sequence[Tensor | None], paths: Sequence[Sequence[Sequence[int]]]) -> Tensor | None:
    """[B * P, V] what each text has [V], its own drafts on each of its paths added; None where nothing needs it."""
    found = []
    for text_V, of in zip(known, paths, strict=True):
        if text_V is None:
            continue
        rows = text_V.repeat(len(of), 1)
        for row, path in zip(rows, of, strict=True):
            for token in path:
                row[token] += True
        found.append(rows)
    return torch.cat(found) if found else None
