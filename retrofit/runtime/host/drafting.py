"""Turn what the trunk says of a draft block into proposed tokens, left to right through the Markov head.

Drafts go through the same processors and the same keyed noise as the targets they are held against (coupled drafts):
    d_i = argmax(log q_i(. | d_{i-1}) + g),  g keyed by (request seed, output index of d_i, token)
Of a large vocabulary only the tokens that the trunk finds best, noise included, take part: whatever is drafted, what is
emitted are targets.  Not here: which block came true, acceptance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from retrofit.adapters.heads import Heads
from retrofit.runtime.rules.processors import Constrain, Guard, constrained
from retrofit.runtime.rules.sampling import Processing, gumbel_noise, likeliest, process_logits, ranked
from retrofit.runtime.rules.tree import DraftTree

CANDIDATES = 128
"""Tokens of a slot among which a draft is chosen."""
LARGE_VOCABULARY = 8192
"""Tokens from which finding candidates costs less than the Markov head and the processors do over all."""
ERROR, ERROR_DRAWN = 1.0, 1.5
"""How far scores of drafts are from those of their targets, as `Slots.likeliest` has it: greedy, and where tokens are
drawn with equal noise (a drafter is as good as its distribution says; LOG.md)."""


@dataclass(frozen=True)
class Drafted:
    """tokens [B, D] (a tree: [B, nodes]); confidence [B, D] that each is accepted given all before it are, or None."""

    tokens: Tensor
    confidence: Tensor | None


@dataclass
class Slots:
    """What the trunk says of the slots of B blocks, and how tokens are chosen there."""

    trunk_BDM: Tensor
    """Logits of the candidates."""
    ids_BDM: Tensor | None
    """The candidates, in rising order; None: all tokens, M = V."""
    vocab: int
    seed_B: Tensor
    index_B: Tensor
    """Output index of the first slot's token."""
    heads: Heads
    params: Processing

    def best(
        self,
        depth: int,
        before_BP: Tensor,
        count: int,
        seen: Tensor | None,
        counts: Tensor | None,
        constrain: Constrain | None,
    ) -> Tensor:
        """[B, P, count] best tokens of a slot after P tokens each.  seen, counts: [B * P, V], of their paths."""
        scores, ids, seed, index = self._scores(depth, before_BP, seen, counts, constrain)
        best = ranked(scores, self.params, seed, index, count, self.vocab, ids)
        return best.view(*before_BP.shape, count)

    def likeliest(
        self,
        depth: int,
        before_BP: Tensor,
        count: int,
        seen: Tensor | None,
        counts: Tensor | None,
        constrain: Constrain | None,
    ) -> tuple[Tensor, Tensor]:
        """[B, P, count] best tokens of a slot, as `best`, and the chance that each is the target.

        The scores that tokens are ranked by, log q, or log q + g where tokens are drawn, differ from the target's by
        how far off the drafter is.  Were that error Gumbel noise of scale b, the target would be drawn from
        softmax(scores / b).
        """
        scores, ids, seed, index = self._scores(depth, before_BP, seen, counts, constrain)
        if self.params.temperature > 0:
            scores = gumbel_noise(seed, index, self.vocab, ids).add_(scores)
        error = ERROR_DRAWN if self.params.temperature > 0 else ERROR
        chance, best = scores.div(error).softmax(-1).topk(min(count, scores.shape[1]), dim=-1)
        tokens = best if ids is None else ids.gather(1, best)
        return tokens.view(*before_BP.shape, -1), chance.view(*before_BP.shape, -1)

    def _scores(
        self,
        depth: int,
        before_BP: Tensor,
        seen: Tensor | None,
        counts: Tensor | None,
        constrain: Constrain | None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Processed scores [B * P, M] of the candidates after P tokens each, their ids, seeds and output indices."""
        P = before_BP.shape[1]
        trunk = self.trunk_BDM[:, depth].repeat_interleave(P, 0)
        ids = None if self.ids_BDM is None else self.ids_BDM[:, depth].repeat_interleave(P, 0)
        if ids is not None:
            seen, counts = (None if known is None else known.gather(1, ids) for known in (seen, counts))
        logits = self.heads.draft_logits(trunk, before_BP.reshape(-1), ids)
        scores = process_logits(logits, self.params, seen, constrain, counts)
        seed, index = self.seed_B.repeat_interleave(P), self.index_B.repeat_interleave(P) + depth
        return scores, ids, seed, index


def draft_tokens(
    hidden_BDH: Tensor,
    previous: Sequence[int],
    seeds: Sequence[int],
    indices: Sequence[int],
    seen_BV: Tensor | None,
    trunk_BDV: Tensor,
    heads: Heads,
    params: Processing,
    with_confidence: bool,
    tree: DraftTree | None = None,
    guards: Sequence[Guard] | None = None,
    counts_BV: Tensor | None = None,
) -> Drafted:
    """Draft D tokens for each of B blocks, or the nodes of a tree.

    previous: the token before the first draft (the newest emitted one); indices: output index of the first draft;
    trunk_BDV: logits of the hidden states; seen_BV: tokens of each request's path so far, needed under a repetition
    penalty; counts_BV: how often each is in its output, needed under a presence or frequency penalty; guards: the rules
    over the text of each request, where it has any.
    """
    B, D, _ = trunk_BDV.shape
    device = trunk_BDV.device
    slots = slots_of(seeds, indices, trunk_BDV, heads, params, ruled=guards is not None)
    token = torch.tensor(previous, device=device)
    if tree is not None:
        return Drafted(_draft_tree(slots, token, seen_BV, tree, guards, counts_BV), None)
    seen, counts = (None if known is None else known.clone() for known in (seen_BV, counts_BV))
    paths: list[list[int]] = [[] for _ in range(B)]
    path = [token]
    for slot in range(D):
        token = slots.best(slot, token[:, None], 1, seen, counts, _constrain(guards, paths))[:, 0, 0]
        path.append(token)
        if guards is not None:
            for drafts, drafted in zip(paths, token.tolist(), strict=True):
                drafts.append(drafted)
        if seen is not None:
            seen[torch.arange(B, device=device), token] = True
        if counts is not None:
            counts[torch.arange(B, device=device), token] += 1
    tokens = torch.stack(path, 1)
    confidence = heads.confidence(hidden_BDH, tokens[:, :-1], params.temperature > 0) if with_confidence else None
    return Drafted(tokens[:, 1:], confidence)


def slots_of(
    seeds: Sequence[int], indices: Sequence[int], trunk_BDV: Tensor, heads: Heads, params: Processing, ruled: bool
) -> Slots:
    """The slots of B blocks; arguments as `draft_tokens`.  ruled: whether there are rules over the texts."""
    B, _, V = trunk_BDV.shape
    seed, index = (torch.tensor(values, dtype=torch.int64, device=trunk_BDV.device) for values in (seeds, indices))
    # Rules and a bias name tokens by their place in the vocabulary.
    if V < LARGE_VOCABULARY or ruled or params.logit_bias:
        return Slots(trunk_BDV, None, V, seed, index, heads, params)
    ids = torch.stack([_candidates(trunk_BDV[b], seed[b], index[b], params) for b in range(B)])
    return Slots(trunk_BDV.gather(2, ids), ids, V, seed, index, heads, params)


def _candidates(trunk_DV: Tensor, seed: Tensor, index: Tensor, params: Processing) -> Tensor:
    """[D, CANDIDATES] tokens of each slot that would be best without the Markov head, in rising order.

    With their noise: at a temperature of 1 the 128 likeliest of 49,152 have nine tenths of the probability, no more.
    """
    if params.temperature == 0:
        return likeliest(trunk_DV, CANDIDATES)
    D, V = trunk_DV.shape
    noise = gumbel_noise(seed.expand(D), index + torch.arange(D, device=index.device), V)
    return likeliest(noise.add_(trunk_DV, alpha=1 / params.temperature), CANDIDATES)


def _draft_tree(
    slots: Slots,
    previous_B: Tensor,
    seen_BV: Tensor | None,
    tree: DraftTree,
    guards: Sequence[Guard] | None,
    counts_BV: Tensor | None,
) -> Tensor:
    """[B, nodes] tokens of a tree: each row's children are its best candidates by log q + g, level by level."""
    B = len(previous_B)
    tokens = previous_B.new_zeros((B, len(tree.parents)))
    tokens[:, 0] = previous_B
    seen, counts = {0: seen_BV}, {0: counts_BV}
    routes: dict[int, list[list[int]]] = {0: [[] for _ in range(B)]}
    for depth in range(max(tree.depths)):
        children = [j for j, d in enumerate(tree.depths) if d == depth + 1]
        parents = sorted({tree.parents[j] for j in children})
        seen_here, counts_here = (
            None if known[0] is None else torch.stack([_known(known[p]) for p in parents], 1).flatten(0, 1)
            for known in (seen, counts)
        )
        each = None if guards is None else [guard for guard in guards for _ in parents]
        constrain = _constrain(each, [] if guards is None else [routes[p][b] for b in range(B) for p in parents])
        parent_of, rank_of = [parents.index(tree.parents[j]) for j in children], [tree.ranks[j] for j in children]
        best = slots.best(depth, tokens[:, parents], 1 + max(rank_of), seen_here, counts_here, constrain)
        tokens[:, children] = best[:, parent_of, rank_of]
        for j in children:
            parent = tree.parents[j]
            if seen_BV is not None:
                seen[j] = _known(seen[parent]).scatter(1, tokens[:, j : j + 1], True)
            if counts_BV is not None:
                one = counts_BV.new_ones(B, 1)
                counts[j] = _known(counts[parent]).scatter_add(1, tokens[:, j : j + 1], one)
            if guards is not None:
                drafted = zip(routes[parent], tokens[:, j].tolist(), strict=True)
                routes[j] = [[*path, token] for path, token in drafted]
    return tokens[:, 1:]


def _constrain(guards: Sequence[Guard] | None, paths: Sequence[Sequence[int]]) -> Constrain | None:
    return None if guards is None else partial(constrained, guards=guards, paths=paths)


def _known(seen: Tensor | None) -> Tensor:
    assert seen is not None
    return seen
