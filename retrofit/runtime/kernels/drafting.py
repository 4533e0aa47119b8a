"""Draft the tokens of a tree from its slots' candidates: one program per request, node after node.

    slot (depth - 1)     0            1                 every slot has `count` candidates, whatever the node;
    node             0 ─┬─ 1 ──── 3                     the Markov bias w2[candidate] . w1[previous token] makes
                        └─ 2 ──── 4                     them depend on the token of the node's parent

The Markov head is looked up at the candidates only, so no launch and no vocabulary-wide product stands between nodes.
Not here: finding the candidates (sampling.py), the confidence head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from retrofit.runtime.kernels.sampling import NO_KEY, id_of, pack_keys, with_noise

TILE = 8192
"""Elements of w2 held at once, 64 candidates x rank 128: 64 registers per thread in fp32."""
WARPS = 4


@triton.jit
def _draft(
    logits_ptr,
    chosen_ptr,
    candidates_ptr,
    previous_ptr,
    w1_ptr,
    w2_ptr,
    parents_ptr,
    ranks_ptr,
    depths_ptr,
    seed_ptr,
    index_ptr,
    out_ptr,
    temperature,
    stride,
    slots,
    count,
    nodes,
    SAMPLED: tl.constexpr,
    MARKOV_RANK: tl.constexpr,
    NODES: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    b = tl.program_id(0)
    node, c = tl.arange(0, NODES), tl.arange(0, COUNT)
    seed, index = tl.load(seed_ptr + b), tl.load(index_ptr + b)
    # The tokens so far stay in registers: a program need not see its own stores.
    tokens = tl.where(node == 0, tl.load(previous_ptr + b), 0)
    for j in range(1, nodes + 1):
        slot = tl.load(depths_ptr + j) - 1
        row = tl.maximum(tl.load(chosen_ptr + b * slots + slot), 0)
        ids = tl.load(candidates_ptr + (b * slots + slot) * count + c, mask=c < count, other=0)
        scores = tl.load(logits_ptr + row * stride + ids, mask=c < count, other=0.0).to(tl.float32)
        if MARKOV_RANK > 0:
            before = tl.sum(tl.where(node == tl.load(parents_ptr + j), tokens, 0), 0)
            bias = tl.zeros((COUNT,), tl.float32)
            for start in tl.static_range(0, MARKOV_RANK, BLOCK_R):
                r = start + tl.arange(0, BLOCK_R)
                w1 = tl.load(w1_ptr + before * MARKOV_RANK + r, mask=r < MARKOV_RANK, other=0.0).to(tl.float32)
                place = ids[:, None] * MARKOV_RANK + r[None, :]
                there = (c < count)[:, None] & (r < MARKOV_RANK)[None, :]
                w2 = tl.load(w2_ptr + place, mask=there, other=0.0).to(tl.float32)
                bias += tl.sum(w2 * w1[None, :], 1)
            scores += bias
        if SAMPLED:
            scores = with_noise(scores, temperature, seed, index + slot, ids)
        keys = tl.where(c < count, pack_keys(scores, ids), NO_KEY)
        for _ in range(tl.load(ranks_ptr + j)):
            keys = tl.where(keys == tl.max(keys, 0), NO_KEY, keys)
        tokens = tl.where(node == j, id_of(tl.max(keys, 0)), tokens)
    tl.store(out_ptr + b * nodes + node - 1, tokens, mask=(node > 0) & (node <= nodes))


def draft(
    logits_RV: Tensor,
    chosen_BK: Tensor,
    candidates_BKC: Tensor,
    previous_B: Tensor,
    w1: Tensor | None,
    w2: Tensor | None,
    parents: Tensor,
    ranks: Tensor,
    depths: Tensor,
    temperature: float,
    seed_B: Tensor,
    index_B: Tensor,
) -> Tensor:
    """Tokens of the nodes 1..n of a draft tree, int64 [B, n]; a chain is the tree whose every rank is 0.

    parents, ranks (below C), depths: int64 [n + 1], of every node; parents come first, node 0 is the root.
    Node j is the candidate of rank ranks[j] among those of slot depths[j] (1-based), ordered by
    (trunk logit + w2[candidate] . w1[previous token]) / temperature + g, the previous token being that of node
    parents[j] (node 0: previous_B); ties to the lowest id.  g is keyed by output index index_B + depths[j] - 1.
    chosen[b, k] is the row of the logits that proposes slot k + 1; -1: the drafts of that slot are arbitrary (valid).
    w1 [V + 1, r], w2 [V, r]: the Markov head, None without one.  The ids of a slot's candidates differ.
    """
    B, K, C = candidates_BKC.shape
    n, rank = len(parents) - 1, 0 if w1 is None or w2 is None else w1.shape[1]
    contiguous = (chosen_BK, candidates_BKC, previous_B, w1, w2, parents, ranks, depths, seed_B, index_B)
    assert logits_RV.stride(1) == 1 and all(t is None or t.is_contiguous() for t in contiguous)
    width = triton.next_power_of_2(C)
    out = torch.empty(B, n, dtype=torch.int64, device=logits_RV.device)
    _draft[(B,)](
        logits_RV,
        chosen_BK,
        candidates_BKC,
        previous_B,
        w1,
        w2,
        parents,
        ranks,
        depths,
        seed_B,
        index_B,
        out,
        float(temperature),
        logits_RV.stride(0),
        K,
        C,
        n,
        SAMPLED=temperature != 0,
        MARKOV_RANK=rank,
        NODES=triton.next_power_of_2(n + 1),
        COUNT=width,
        BLOCK_R=min(triton.next_power_of_2(max(1, rank)), max(1, TILE // width)),
        num_warps=WARPS,
    )
    return out
