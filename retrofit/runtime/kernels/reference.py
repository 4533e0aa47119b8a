"""What every kernel computes, in plain torch: slow, short, and the specification the kernels are tested against.

Shapes: R rows, H hidden size, N output features, V vocabulary, D head width, B requests.  A matrix product arrives as
`parts` [S, R, N]: S partial sums in fp32 (or one finished product in the model's dtype), added in index order and then
rounded to the model's dtype, as the original rounds the output of a linear layer.  LoRA's first factor is part of the
product: its columns stand behind the layer's own, and only draft rows read them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from retrofit.runtime.kernels.rows import PAGE, Rows
from retrofit.runtime.kernels.state import ALL, LAST, Outcome, State, StepTensors


def split_matmul(x_RK: Tensor, weight_NK: Tensor, splits: int, block_k: int) -> Tensor:
    """x W^T as fp32 partial sums [splits, R, N]: split s takes whole blocks of block_k columns, in order."""
    K = x_RK.shape[1]
    width = math.ceil(math.ceil(K / block_k) / splits) * block_k
    x, w = x_RK.float(), weight_NK.float()
    return torch.stack([x[:, s * width : (s + 1) * width] @ w[:, s * width : (s + 1) * width].T for s in range(splits)])


def total(parts_SRN: Tensor, dtype: torch.dtype, bias_N: Tensor | None = None) -> Tensor:
    """Partial sums added in index order, plus the bias, rounded to dtype: the output of a linear layer."""
    out = parts_SRN[0].float()
    for part in parts_SRN[1:]:
        out = out + part
    if bias_N is not None:
        out = out + bias_N.float()
    return out.to(dtype)


def with_lora(out_RN: Tensor, hidden_Rr: Tensor, up_rN: Tensor | None, num_base: int) -> Tensor:
    """out + hidden up on draft rows (LoRA's second factor, scaled), base rows untouched; the sum rounded as out is.

    hidden: sums of the columns behind the layer's own, rounded to out's dtype.
    """
    if up_rN is None:
        return out_RN
    update = (hidden_Rr[num_base:].float() @ up_rN.float()).to(out_RN.dtype)
    return torch.cat([out_RN[:num_base], (out_RN[num_base:].float() + update.float()).to(out_RN.dtype)])


def rms_norm(x_RH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """weight * x / rms(x); like transformers, rounds before the weight is multiplied in (arXiv 1910.07467)."""
    x = x_RH.float()
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return (weight_H.float() * x.to(x_RH.dtype).float()).to(x_RH.dtype)


def embed_rms_norm(
    ids_R: Tensor, table_VH: Tensor, mask_vector_H: Tensor, weight_H: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(token embeddings, the mask vector where the id is -1; the same normed)."""
    x = torch.where(ids_R[:, None] < 0, mask_vector_H.to(table_VH.dtype), table_VH[ids_R.clamp(min=0)])
    return x, rms_norm(x, weight_H, eps)


def add_rms_norm(
    parts_SRN: Tensor,
    residual_RH: Tensor,
    weight_H: Tensor,
    eps: float,
    up_rH: Tensor | None,
    rows: Rows,
    bias_H: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """residual + linear output (with LoRA on draft rows), and that normed.  N = H + r."""
    H, dtype = residual_RH.shape[1], residual_RH.dtype
    out = with_lora(total(parts_SRN[..., :H], dtype, bias_H), total(parts_SRN[..., H:], dtype), up_rH, rows.num_base)
    residual = (residual_RH.float() + out.float()).to(dtype)
    return residual, rms_norm(residual, weight_H, eps)


def swiglu(
    parts_SRN: Tensor, width: int, up_rW: Tensor | None, rows: Rows, dtype: torch.dtype, bias_W: Tensor | None = None
) -> Tensor:
    """silu(gate) * up, [R, width], from the product [gate | up | LoRA of gate (r) | LoRA of up (r)]; W = 2 width."""
    out = total(parts_SRN[..., : 2 * width], dtype, bias_W)
    r = 0 if up_rW is None else up_rW.shape[0]
    hidden = total(parts_SRN[..., 2 * width :], dtype)
    gate, up = (
        with_lora(
            out[:, half],
            hidden[:, i * r : (i + 1) * r],
            None if up_rW is None else up_rW[:, half],
            rows.num_base,
        )
        for i, half in enumerate((slice(0, width), slice(width, 2 * width)))
    )
    return (torch.nn.functional.silu(gate.float()).to(dtype).float() * up.float()).to(dtype)


def qkv(
    parts_SRN: Tensor,
    heads: tuple[int, int, int],
    bias: Tensor | None,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    cos_PD: Tensor,
    sin_PD: Tensor,
    up_rN: Tensor | None,
    rows: Rows,
    key_cache: Tensor,
    value_cache: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """From the product [q | k | v | LoRA of q (r) | of k (r) | of v (r)] to rotated queries and stored K and V.

    heads: (query heads, K/V heads, head width).  norms: Qwen3's weights of q_norm and k_norm.  cos, sin: by position,
    second half of the columns equal to the first (arXiv 2104.09864, halves rotated as in transformers).  Base rows
    write K and V at `rows.places` of the cache; those of draft rows are returned.
    Returns q [R, Hq, D], draft k and v [num_draft, Hkv, D].
    """
    Hq, Hkv, D = heads
    R = parts_SRN.shape[1]
    widths = (Hq * D, Hkv * D, Hkv * D)
    n = sum(widths)
    out = total(parts_SRN[..., :n], dtype, bias)
    hidden = total(parts_SRN[..., n:], dtype)
    r = 0 if up_rN is None else up_rN.shape[0]
    parts, start = [], 0
    for i, width in enumerate(widths):
        columns = slice(start, start + width)
        start += width
        up = None if up_rN is None else up_rN[:, columns]
        parts.append(with_lora(out[:, columns], hidden[:, i * r : (i + 1) * r], up, rows.num_base).view(R, -1, D))
    q, k, v = parts
    if norms is not None:
        q, k = rms_norm(q, norms[0], eps), rms_norm(k, norms[1], eps)
    cos, sin = (t[rows.positions[:R]][:, None].float() for t in (cos_PD, sin_PD))
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    written = rows.places >= 0
    places = rows.places[written]
    base = slice(0, rows.num_base)
    key_cache[places // PAGE, :, places % PAGE] = k[base][written]
    value_cache[places // PAGE, :, places % PAGE] = v[base][written]
    draft = slice(rows.num_base, rows.num_rows)
    return q, k[draft].contiguous(), v[draft].contiguous()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x cos + rotate_half(x) sin, each product and the sum rounded to x's dtype, as transformers rounds them."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    first, second = (x.float() * cos).to(x.dtype), (turned.float() * sin).to(x.dtype)
    return (first.float() + second.float()).to(x.dtype)


def row_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    draft_key: Tensor,
    draft_value: Tensor,
    rows: Rows,
    scale: float,
    window: int | None,
    softcap: float | None,
    causal_blocks: bool,
) -> Tensor:
    """softmax(scale q k^T [soft-capped]) v of every row over what it sees -> [R, Hq * D]; padding rows are arbitrary.

    query [R, Hq, D]; caches [pages, Hkv, PAGE, D]; block_table int32 [slots, pages per slot]; draft_key, draft_value
    [num_draft, Hkv, D].  A row sees base positions < limit (within the window: position - k < window), a draft row also
    draft rows low <= d < high (d <= its own if causal; |position - other| < window).  A row that sees nothing gets 0.
    """
    R, Hq, D = query.shape
    out = query.new_zeros(R, Hq, D)
    groups = Hq // key_cache.shape[1]
    for row in range(rows.num_rows):
        limit, position = int(rows.limits[row]), int(rows.positions[row])
        seen = torch.arange(limit, device=query.device)
        if window is not None:
            seen = seen[position - seen < window]
        place = seen
        if rows.starts is not None and rows.paths is not None:
            start = int(rows.starts[row])
            ahead = (seen - start).clamp(0, rows.paths.shape[1] - 1)
            place = torch.where(seen >= start, start + rows.paths[row][ahead], seen)
        page = block_table[int(rows.slots[row])].long()[place // PAGE]
        key, value = key_cache[page, :, place % PAGE], value_cache[page, :, place % PAGE]
        if row >= rows.num_base:
            own = row - rows.num_base
            other = torch.arange(int(rows.low[own]), int(rows.high[own]), device=query.device)
            if causal_blocks:
                other = other[other <= own]
            if window is not None:
                other = other[(position - rows.positions[rows.num_base + other]).abs() < window]
            key, value = torch.cat([key, draft_key[other]]), torch.cat([value, draft_value[other]])
        if not len(key):
            continue
        key, value = (t.float().repeat_interleave(groups, dim=1) for t in (key, value))
        scores = torch.einsum("hd,lhd->hl", query[row].float(), key) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        out[row] = torch.einsum("hl,lhd->hd", scores.softmax(-1), value).to(query.dtype)
    return out.view(R, Hq * D)


def choose(logits_RV: Tensor, temperature: float, seed_R: Tensor, index_R: Tensor) -> Tensor:
    """argmax(logits / temperature + g), ties to the lowest id, int64 [R]; at temperature 0 argmax(logits).

    g: Gumbel noise keyed by (seed, output index, token id); see `gumbel`.
    """
    scores = noisy(logits_RV, temperature, seed_R, index_R)
    return first_of_largest(scores)


def noisy(logits_RV: Tensor, temperature: float, seed_R: Tensor, index_R: Tensor) -> Tensor:
    """fp32 scores whose argmax is the choice."""
    if temperature == 0:
        return logits_RV.float()
    tokens = torch.arange(logits_RV.shape[1], device=logits_RV.device)
    noise = gumbel(hash_bits(seed_R[:, None], index_R[:, None], tokens[None]))
    return logits_RV.float() / temperature + noise


def first_of_largest(scores: Tensor) -> Tensor:
    """Lowest index among the largest of the last dimension."""
    ids = torch.arange(scores.shape[-1], device=scores.device)
    return torch.where(scores < scores.amax(-1, keepdim=True), scores.shape[-1], ids).amin(-1)


def hash_bits(seed: Tensor, index: Tensor, token: Tensor) -> Tensor:
    """The 32 noise bits of (request seed, output index, token id), int64 0..2^32 - 1; arguments int64, broadcast.

    Two multiply-xorshift rounds [16 21f0aaad 15 d35a2d97 15] (skeeto/hash-prospector, issue 19); the row's 64-bit key
    is xored in half before and half between the rounds.
    """
    word = 0xFFFFFFFF

    def half(x: Tensor) -> Tensor:
        return (x ^ x >> 16) * 0x21F0AAAD & word

    def rest(x: Tensor) -> Tensor:
        x = (x ^ x >> 15) * 0xD35A2D97 & word
        return x ^ x >> 15

    def row_key(start: int) -> Tensor:
        x = half((seed + start) & word) ^ (seed >> 32 & word)
        x = ((x ^ x >> 15) * 0xD35A2D97 & word) ^ (index & word)
        return rest(half(x))

    x = rest(half((token + 0xBB67AE85) & word)) ^ row_key(0x9E3779B9)
    return rest(half(x) ^ row_key(0x6A09E667))


def gumbel(bits: Tensor) -> Tensor:
    """Standard Gumbel noise -log(-log(u)), fp32, u = (top 23 bits + 1/2) 2^-23."""
    uniform = ((bits >> 9).to(torch.float32) + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))


def candidates(
    logits_RV: Tensor, chosen_C: Tensor, count: int, temperature: float, seed_C: Tensor, index_C: Tensor
) -> Tensor:
    """The `count` ids with the largest noisy scores in rows chosen[c] of the logits, best first, ties to the lowest id.

    Returns int64 [C, count]; where chosen[c] is -1 the ids are arbitrary (but valid).  count <= V.
    """
    scores = noisy(logits_RV[chosen_C.clamp(min=0).long()], temperature, seed_C, index_C)
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def draft(
    logits_RV: Tensor,
    chosen_BK: Tensor,
    candidates_BKC: Tensor,
    previous_B: Tensor,
    w1: Tensor | None,
    w2: Tensor | None,
    parents: Sequence[int],
    ranks: Sequence[int],
    depths: Sequence[int],
    temperature: float,
    seed_B: Tensor,
    index_B: Tensor,
) -> Tensor:
    """Tokens of the nodes 1..n of a draft tree, int64 [B, n]; a chain is the tree whose every rank is 0.

    Node j is the candidate of rank ranks[j] among those of slot depths[j] (1-based), ordered by
    (trunk logit + w2[candidate] . w1[previous token]) / temperature + g, the previous token being that of node
    parents[j] (node 0: previous_B); ties to the lowest id.  g is keyed by output index index_B + depths[j] - 1.
    chosen[b, k] is the row of the logits that proposes slot k + 1; -1: the drafts of that slot are arbitrary (valid).
    """
    B, n = len(previous_B), len(parents) - 1
    tokens = torch.zeros(B, n + 1, dtype=torch.int64, device=logits_RV.device)
    tokens[:, 0] = previous_B
    for b in range(B):
        for j in range(1, n + 1):
            slot = depths[j] - 1
            ids = candidates_BKC[b, slot]
            scores = logits_RV[int(chosen_BK[b, slot].clamp(min=0)), ids].float()
            if w1 is not None and w2 is not None:
                scores = scores + w2[ids].float() @ w1[tokens[b, parents[j]]].float()
            if temperature:
                index = index_B[b] + slot
                scores = scores / temperature + gumbel(hash_bits(seed_B[b], index, ids))
            order = sorted(range(len(ids)), key=lambda c: (-float(scores[c]), int(ids[c])))
            tokens[b, j] = ids[order[ranks[j]]]
    return tokens[:, 1:]


def lay_rows(
    state: State,
    lanes: Tensor,
    step: StepTensors,
    block_table: Tensor,
    context: int,
    noise_inputs: int | None,
    rows: Rows,
    seeds: Tensor,
    indices: Tensor,
) -> None:
    """Write the rows of a step into `rows` (whose tiles are laid already), and each base row's noise key.

    lanes: int64 [lanes] slot that each lane serves; -1: idle.  Lane b has base rows b * base_rows + j and, from
    num_base on, draft rows (b * blocks + m) * block + i.  seeds, indices: int64 [num_base], of the token that a base
    row emits; written for all.  noise_inputs: draft rows read the vocabulary id hash(seed, position, 0) % noise_inputs
    instead of the mask vector.

    Base row j is in use if its request is active, j <= num_drafts, and the token it emits is still wanted:
    position + 1 < end.  A block is in use if its anchor is; of its rows those below `context`.  Rows not in use have
    limit 0, place -1, an empty scratch range, id 0, slot 0 and position 0.
    """
    W, base = step.base_rows, rows.num_base
    for t in (rows.ids, rows.positions, rows.slots, rows.limits, rows.low, rows.high, seeds, indices):
        t.zero_()
    rows.places.fill_(-1)
    for b, slot in enumerate(lanes.tolist()):
        if slot < 0 or not int(state.active[slot]):
            continue
        p, drafted = int(state.length[slot]) - 1, int(state.num_drafts[slot])
        end, seed = int(state.end[slot]), int(state.seed[slot])
        used = [j <= drafted and p + int(step.depths[j]) + 1 < end for j in range(W)]
        for j in range(W):
            if not used[j]:
                continue
            row, depth = b * W + j, int(step.depths[j])
            rows.ids[row] = state.tokens[slot, p] if j == 0 else state.drafts[slot, j - 1]
            rows.positions[row], rows.slots[row], rows.limits[row] = p + depth, slot, p + depth + 1
            rows.places[row] = int(block_table[slot, (p + j) // PAGE]) * PAGE + (p + j) % PAGE
            seeds[row], indices[row] = seed, p + depth + 1 - int(state.origin[slot])
            if rows.starts is not None and rows.paths is not None:
                rows.starts[row], rows.paths[row] = p, step.paths[j]
        for m in range(step.blocks):
            anchor = anchor_of(state, step, slot, m)
            if not 0 <= anchor < W or not used[anchor]:
                continue
            start = p + int(step.depths[anchor]) + 1
            low = (b * step.blocks + m) * step.block
            for i in range(min(step.block, context - start)):
                row = base + low + i
                rows.ids[row] = -1
                if noise_inputs is not None:
                    bits = hash_bits(*(torch.tensor(v) for v in (seed, start + i, 0)))
                    rows.ids[row] = int(bits) % noise_inputs
                rows.positions[row], rows.slots[row], rows.limits[row] = start + i, slot, start
                rows.low[low + i], rows.high[low + i] = low, low + min(step.block, context - start)
                if rows.starts is not None and rows.paths is not None:
                    rows.starts[row], rows.paths[row] = p, step.paths[anchor]


def anchor_of(state: State, step: StepTensors, slot: int, m: int) -> int:
    """The base row that block m of a request hangs on."""
    if step.hang == ALL:
        return m
    return int(state.num_drafts[slot]) if step.hang == LAST else int(state.anchors[slot, m])


def accept(
    state: State, lanes: Tensor, step: StepTensors, targets: Tensor, rows: Rows, first_drafting_row: int
) -> Outcome:
    """Follow the drafts that equal their targets, emit the targets of the rows on that path, move the state on.

    targets: int64 [num_base].  From row 0, go on to the lowest row in use whose parent is the present row and whose
    draft is the present row's target, while there is one.  Targets of the path are emitted in order up to and including
    the first EOS, and up to length == end; either ends the request (active 0).  num_drafts becomes 0.  The block that
    came true hangs on the last row of the path; none if the request ended, or if no block in use hangs there, or if
    fewer than two more tokens are wanted (a draft could not be verified).  Its row i + first_drafting_row proposes
    slot i + 1; slots whose row is not in use are -1.
    """
    W, n = step.base_rows, len(lanes)
    made: dict[str, Any] = {"dtype": torch.int64, "device": targets.device}
    record = torch.zeros(n, 3 + step.deepest + 1, **made)
    path_out = torch.zeros(n, step.deepest + 1, **made)
    kept = torch.zeros(n, **made)
    chosen = torch.full((n, max(1, step.block)), -1, **made)
    for b, slot in enumerate(lanes.tolist()):
        if slot < 0 or not int(state.active[slot]):
            continue
        used = [int(rows.limits[b * W + j]) > 0 for j in range(W)]
        anchors = [anchor_of(state, step, slot, m) for m in range(step.blocks)]
        path = [0]
        while True:
            target = int(targets[b * W + path[-1]])
            following = [
                j
                for j in range(1, W)
                if used[j] and int(step.parents[j]) == path[-1] and int(state.drafts[slot, j - 1]) == target
            ]
            if not following:
                break
            path.append(following[0])
        taken = 0
        for j in path:
            token = int(targets[b * W + j])
            state.tokens[slot, int(state.length[slot])] = token
            state.length[slot] += 1
            record[b, 3 + taken] = token
            taken += 1
            if token in state.eos.tolist() or int(state.length[slot]) >= int(state.end[slot]):
                state.active[slot] = 0
                break
        verified = max(int(step.depths[j]) for j in range(W) if used[j])
        record[b, 0], record[b, 1], record[b, 2] = taken, min(len(path) - 1, taken), verified
        path_out[b, : len(path)] = torch.tensor(path)
        kept[b] = len(path)
        state.num_drafts[slot] = 0
        if not int(state.active[slot]) or int(state.end[slot]) - int(state.length[slot]) < 2:
            continue
        for m, anchor in enumerate(anchors):
            if anchor != path[-1]:
                continue
            for i in range(step.block - first_drafting_row):
                row = (b * step.blocks + m) * step.block + i + first_drafting_row
                if int(rows.high[row]) > 0:
                    chosen[b, i] = rows.num_base + row
            break
    return Outcome(record, path_out, kept, chosen)


def compact(
    cache: Tensor, block_table: Tensor, lanes: Tensor, length_before: Tensor, path: Tensor, kept: Tensor
) -> None:
    """Move the K or V of an accepted tree path to its final places, in every layer: place p + path[d] to p + d.

    cache [layers, pages, Hkv, PAGE, D]; length_before int64 [lanes], so p = length_before - 1.  path rises strictly and
    path[d] >= d, so moving in order of d never overwrites what is still to be moved.
    """
    for b, slot in enumerate(lanes.tolist()):
        p = int(length_before[b]) - 1
        for d in range(1, int(kept[b])):
            source, target = p + int(path[b, d]), p + d
            if slot < 0 or source == target:
                continue
            pages = [int(block_table[slot, place // PAGE]) for place in (source, target)]
            cache[:, pages[1], :, target % PAGE] = cache[:, pages[0], :, source % PAGE]
