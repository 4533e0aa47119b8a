"""Turn the hidden states of a draft block into proposed tokens, left to right through the Markov head.

Drafts go through the same processors and the same keyed noise as the targets they are held against (coupled drafts):
    d_i = argmax(log q_i(. | d_{i-1}) + g),  g keyed by (request seed, output index of d_i, token)
Not here: which block came true, acceptance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from retrofit.adapters.heads import Heads
from retrofit.runtime.rules.processors import Constrain, Guard, constrained
from retrofit.runtime.rules.sampling import Processing, choose, process_logits, ranked
from retrofit.runtime.rules.tree import DraftTree


@dataclass(frozen=True)
class Drafted:
    """tokens [B, D] (a tree: [B, nodes]); confidence [B, D] that each is accepted given all before it are, or None."""

    tokens: Tensor
    confidence: Tensor | None


def draft_tokens(
    hidden_BDH: Tensor,
    previous: Sequence[int],
    seeds: Sequence[int],
    indices: Sequence[int],
    seen_BV: Tensor | None,
    project: Callable[[Tensor], Tensor],
    heads: Heads,
    params: Processing,
    with_confidence: bool,
    tree: DraftTree | None = None,
    guards: Sequence[Guard] | None = None,
    counts_BV: Tensor | None = None,
) -> Drafted:
    """Draft D tokens for each of B blocks, or the nodes of a tree.

    previous: the token before the first draft (the newest emitted one); indices: output index of the first draft;
    seen_BV: tokens of each request's path so far, needed under a repetition penalty; counts_BV: how often each is in
    its output, needed under a presence or frequency penalty; guards: the rules over the text of each request, where it
    has any.
    """
    B, D, H = hidden_BDH.shape
    device = hidden_BDH.device
    trunk_BDV = project(hidden_BDH.reshape(B * D, H)).view(B, D, -1)
    token = torch.tensor(previous, device=device)
    seed = torch.tensor(seeds, dtype=torch.int64, device=device)
    index = torch.tensor(indices, dtype=torch.int64, device=device)
    if tree is not None:
        return Drafted(
            _draft_tree(trunk_BDV, token, seed, index, seen_BV, heads, params, tree, guards, counts_BV), None
        )
    seen, counts = (None if known is None else known.clone() for known in (seen_BV, counts_BV))
    paths: list[list[int]] = [[] for _ in range(B)]
    tokens, confidence = [], []
    for slot in range(D):
        if (
            with_confidence
            and (c := heads.confidence(hidden_BDH[:, slot], token, slot, params.temperature > 0)) is not None
        ):
            confidence.append(c)
        logits = heads.draft_logits(trunk_BDV[:, slot], token)
        scores = process_logits(logits, params, seen, _constrain(guards, paths), counts)
        token = choose(scores, params, seed, index + slot)
        tokens.append(token)
        if guards is not None:
            for path, drafted in zip(paths, token.tolist(), strict=True):
                path.append(drafted)
        if seen is not None:
            seen[torch.arange(B, device=device), token] = True
        if counts is not None:
            counts[torch.arange(B, device=device), token] += 1
    return Drafted(torch.stack(tokens, 1), torch.stack(confidence, 1) if confidence else None)


def _draft_tree(
    trunk_BDV: Tensor,
    previous_B: Tensor,
    seed_B: Tensor,
    index_B: Tensor,
    seen_BV: Tensor | None,
    heads: Heads,
    params: Processing,
    tree: DraftTree,
    guards: Sequence[Guard] | None,
    counts_BV: Tensor | None,
) -> Tensor:
    """[B, nodes] tokens of a tree: each row's children are its best candidates by log q + g, level by level."""
    B, _, V = trunk_BDV.shape
    tokens = trunk_BDV.new_zeros((B, len(tree.parents)), dtype=torch.long)
    tokens[:, 0] = previous_B
    seen, counts = {0: seen_BV}, {0: counts_BV}
    routes: dict[int, list[list[int]]] = {0: [[] for _ in range(B)]}
    for depth in range(max(tree.depths)):
        children = [j for j, d in enumerate(tree.depths) if d == depth + 1]
        parents = sorted({tree.parents[j] for j in children})
        P, widest = len(parents), 1 + max(tree.ranks[j] for j in children)
        before = tokens[:, parents].reshape(-1)
        logits = heads.draft_logits(trunk_BDV[:, depth].repeat_interleave(P, 0), before)
        on_paths = [
            None if known[0] is None else torch.stack([_known(known[p]) for p in parents], 1).view(B * P, V)
            for known in (seen, counts)
        ]
        step = index_B.repeat_interleave(P) + depth
        each = None if guards is None else [guard for guard in guards for _ in parents]
        constrain = _constrain(each, [] if guards is None else [routes[p][b] for b in range(B) for p in parents])
        scores = process_logits(logits, params, on_paths[0], constrain, on_paths[1])
        best = ranked(scores, params, seed_B.repeat_interleave(P), step, widest)
        best = best.view(B, P, widest)
        for j in children:
            tokens[:, j] = best[:, parents.index(tree.parents[j]), tree.ranks[j]]
            if seen_BV is not None:
                seen[j] = _known(seen[tree.parents[j]]).scatter(1, tokens[:, j : j + 1], True)
            if counts_BV is not None:
                one = counts_BV.new_ones(B, 1)
                counts[j] = _known(counts[tree.parents[j]]).scatter_add(1, tokens[:, j : j + 1], one)
            if guards is not None:
                before_j = routes[tree.parents[j]]
                routes[j] = [[*path, token] for path, token in zip(before_j, tokens[:, j].tolist(), strict=True)]
    return tokens[:, 1:]


def _constrain(guards: Sequence[Guard] | None, paths: Sequence[Sequence[int]]) -> Constrain | None:
    return None if guards is None else partial(constrained, guards=guards, paths=paths)


def _known(seen: Tensor | None) -> Tensor:
    assert seen is not None
    return seen
