"""Choose tokens from logits with keyed Gumbel noise: the best of each row, or its `count` best.

Both run in two launches, because one row of a large vocabulary is too much for one program:

    logits of a row    | chunk 0 | chunk 1 | ... | chunk n-1 |     stage 1: one program per (row, chunk)
                          best      best            best
                            \\________|______________/             stage 2: one program per row
                                 best of the row

A score travels with its token id in one signed 64-bit key, so every maximum is the best score and, among equal
scores, the lowest id, in whatever order it is taken:

    key = order-preserving integer of the fp32 score (high 32 bits) | 0xFFFFFFFF - id (low 32 bits)

-0.0 ties with +0.0.  NaN sorts by its bits: the choice is arbitrary, but always a valid id.
Not here: top-k, top-p, the repetition penalty (they arrive as changed logits), and acceptance.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 2048
"""Scores per program of stage 1: a row of 128k gives 64 programs, half the SMs of an H100 even when it is alone, and
16 keys per thread stay in registers."""
CHUNK_WARPS = 4
MERGE_WARPS = 8
"""128 chunks x 64 keys in one program: 32 keys per thread, no spills."""

# Below every key: the integer of any score is above -2^31.
NO_KEY = tl.constexpr(-(2**63))


@triton.jit
def hash_bits(seed, index, token):
    """Noise bits of (request seed int64, output index, token id), uint32; `reference.hash_bits` in 32-bit words."""
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    index, token = tl.cast(index, tl.uint32), tl.cast(token, tl.uint32)
    first, second = _row_key(low + 0x9E3779B9, high, index), _row_key(low + 0x6A09E667, high, index)
    x = _rest(_half(token + 0xBB67AE85)) ^ first
    return _rest(_half(x) ^ second)


@triton.jit
def _row_key(start, high, index):
    x = _half(start) ^ high
    x = (x ^ (x >> 15)) * 0xD35A2D97 ^ index
    return _rest(_half(x))


@triton.jit
def _half(x):
    return (x ^ (x >> 16)) * 0x21F0AAAD


@triton.jit
def _rest(x):
    x = (x ^ (x >> 15)) * 0xD35A2D97
    return x ^ (x >> 15)


@triton.jit
def gumbel(bits):
    """Standard Gumbel noise -log(-log(u)), fp32, u = (top 23 bits + 1/2) 2^-23."""
    uniform = ((bits >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return -tl.log(-tl.log(uniform))


@triton.jit
def with_noise(scores, temperature, seed, index, ids):
    """scores / temperature + noise; the division rounds correctly, which Triton's `/` does not."""
    return tl.math.div_rn(scores, temperature) + gumbel(hash_bits(seed, index, ids))


@triton.jit
def pack_keys(scores, ids):
    """int64 keys of fp32 scores and their token ids, see the top of this file."""
    bits = scores.to(tl.int32, bitcast=True)
    # Sign and magnitude to two's complement, which makes the two zeros one.
    image = tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    return (image.to(tl.int64) << 32) | (0xFFFFFFFF - ids.to(tl.int64))


@triton.jit
def id_of(keys):
    """Token ids of keys, int64."""
    return 0xFFFFFFFF - (keys & 0xFFFFFFFF)


@triton.jit
def _chunk_keys(
    logits_ptr, row, chunk, stride, V, temperature, seed, index, SAMPLED: tl.constexpr, CHUNK: tl.constexpr
):
    """Keys of one chunk of a row; NO_KEY beyond the vocabulary."""
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    scores = tl.load(logits_ptr + row.to(tl.int64) * stride + ids, mask=ids < V, other=0.0).to(tl.float32)
    if SAMPLED:
        scores = with_noise(scores, temperature, seed, index, ids)
    return tl.where(ids < V, pack_keys(scores, ids), NO_KEY)


@triton.jit
def _choose_chunk(
    logits_ptr,
    seed_ptr,
    index_ptr,
    best_ptr,
    stride,
    V,
    chunks,
    temperature,
    SAMPLED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row, chunk = tl.program_id(0), tl.program_id(1)
    seed, index = tl.load(seed_ptr + row), tl.load(index_ptr + row)
    keys = _chunk_keys(logits_ptr, row, chunk, stride, V, temperature, seed, index, SAMPLED, CHUNK)
    tl.store(best_ptr + row * chunks + chunk, tl.max(keys, 0))


@triton.jit
def _choose_merge(best_ptr, out_ptr, chunks, CHUNKS: tl.constexpr):
    row, chunk = tl.program_id(0), tl.arange(0, CHUNKS)
    keys = tl.load(best_ptr + row * chunks + chunk, mask=chunk < chunks, other=NO_KEY)
    tl.store(out_ptr + row, id_of(tl.max(keys, 0)))


def choose(logits_RV: Tensor, temperature: float, seed_R: Tensor, index_R: Tensor, *, chunk: int = CHUNK) -> Tensor:
    """argmax(logits / temperature + g), ties to the lowest id, int64 [R]; at temperature 0 argmax(logits).

    g: Gumbel noise keyed by (seed, output index, token id).  logits: any float type, rows may be apart.
    """
    R, V = logits_RV.shape
    assert logits_RV.stride(1) == 1 and seed_R.is_contiguous() and index_R.is_contiguous()
    chunks = triton.cdiv(V, chunk)
    best = torch.empty(R, chunks, dtype=torch.int64, device=logits_RV.device)
    out = torch.empty(R, dtype=torch.int64, device=logits_RV.device)
    _choose_chunk[(R, chunks)](
        logits_RV,
        seed_R,
        index_R,
        best,
        logits_RV.stride(0),
        V,
        chunks,
        float(temperature),
        SAMPLED=temperature != 0,
        CHUNK=chunk,
        num_warps=CHUNK_WARPS,
    )
    _choose_merge[(R,)](best, out, chunks, CHUNKS=triton.next_power_of_2(chunks), num_warps=1)
    return out


@triton.jit
def _order_pairs(x, bit: tl.constexpr, flip, dims: tl.constexpr):
    """Put each pair of keys whose places differ in `bit` in rising order, or falling where `flip` is 1.

    x: 2^dims keys as a hypercube, its innermost dimension being bit 0 of a key's place.  As in tl.topk, but for the
    sum in place of an xor, which Triton's interpreter takes element by element.
    """
    other = tl.sum(x, dims - 1 - bit, keep_dims=True) - x  # the pair's sum may wrap; what is left is exact
    upper = tl.reshape(tl.arange(0, 2), [1] * (dims - 1 - bit) + [2] + [1] * bit)
    return tl.where((x > other) != ((flip ^ upper) != 0), other, x)


@triton.jit
def _merge_runs(x, bits: tl.constexpr, dims: tl.constexpr):
    """Sort each run of 2^bits keys, bitonic at first: by turns rising and falling, one alone falling."""
    flip = 1
    if bits < dims:
        flip = tl.reshape(tl.arange(0, 2), [1] * (dims - 1 - bits) + [2] + [1] * bits)
    for i in tl.static_range(bits):
        x = _order_pairs(x, bits - 1 - i, flip, dims)
    return x


@triton.jit
def _sort_runs(x, bits: tl.constexpr, dims: tl.constexpr):
    """Sort each run of 2^bits keys, by turns rising and falling, one alone falling (bitonic sort, Batcher 1968)."""
    for i in tl.static_range(1, bits + 1):
        x = _merge_runs(x, i, dims)
    return x


@triton.jit
def _best_of_runs(x, bits: tl.constexpr, dims: tl.constexpr):
    """The 2^bits largest of 2^dims keys that stand in runs of 2^bits, sorted up and down by turns; best first, 1-D.

    The larger of each two keys at the same place of a rising and a falling run are the best of both, and bitonic
    (Shanbhag et al. 2018, "Efficient Top-K Query Processing on GPUs").
    """
    for i in tl.static_range(dims - bits):
        x = tl.max(x, dims - i - bits - 1)
        x = _merge_runs(x, bits, dims - i - 1)
    return tl.reshape(x, [2**bits])


@triton.jit
def _candidates_chunk(
    logits_ptr,
    chosen_ptr,
    seed_ptr,
    index_ptr,
    best_ptr,
    stride,
    V,
    chunks,
    temperature,
    SAMPLED: tl.constexpr,
    LOG_COUNT: tl.constexpr,
    LOG_CHUNK: tl.constexpr,
):
    c, chunk = tl.program_id(0), tl.program_id(1)
    row = tl.load(chosen_ptr + c)
    if row >= 0:
        seed, index = tl.load(seed_ptr + c), tl.load(index_ptr + c)
        keys = _chunk_keys(logits_ptr, row, chunk, stride, V, temperature, seed, index, SAMPLED, 2**LOG_CHUNK)
        keys = tl.reshape(keys, [2] * LOG_CHUNK)
        keys = _best_of_runs(_sort_runs(keys, LOG_COUNT, LOG_CHUNK), LOG_COUNT, LOG_CHUNK)
        place = (c.to(tl.int64) * chunks + chunk) * (2**LOG_COUNT)
        tl.store(best_ptr + place + tl.arange(0, 2**LOG_COUNT), keys)


@triton.jit
def _candidates_merge(chosen_ptr, best_ptr, out_ptr, chunks, count, LOG_COUNT: tl.constexpr, LOG_CHUNKS: tl.constexpr):
    c = tl.program_id(0)
    COUNT: tl.constexpr = 2**LOG_COUNT
    rank = tl.arange(0, COUNT)
    ids = rank.to(tl.int64)
    if tl.load(chosen_ptr + c) >= 0:
        chunk = tl.arange(0, 2**LOG_CHUNKS)[:, None]
        # Odd chunks are read backwards: merging wants runs that fall and rise by turns.
        place = tl.where(chunk % 2 == 0, rank[None, :], COUNT - 1 - rank[None, :])
        place += (c.to(tl.int64) * chunks + chunk) * COUNT
        keys = tl.load(best_ptr + place, mask=chunk < chunks, other=NO_KEY)
        keys = tl.reshape(keys, [2] * (LOG_CHUNKS + LOG_COUNT))
        ids = id_of(_best_of_runs(keys, LOG_COUNT, LOG_CHUNKS + LOG_COUNT))
    tl.store(out_ptr + c * count + rank, ids, mask=rank < count)


def candidates(
    logits_RV: Tensor,
    chosen_C: Tensor,
    count: int,
    temperature: float,
    seed_C: Tensor,
    index_C: Tensor,
    *,
    chunk: int = CHUNK,
) -> Tensor:
    """The `count` ids with the largest noisy scores in rows chosen[c] of the logits, best first, ties to the lowest id.

    Returns int64 [C, count]; where chosen[c] is -1 the ids are 0 .. count - 1, at no cost.  count <= V.
    """
    C, V = len(chosen_C), logits_RV.shape[1]
    assert logits_RV.stride(1) == 1 and all(t.is_contiguous() for t in (chosen_C, seed_C, index_C))
    width = max(2, triton.next_power_of_2(count))
    chunk = max(chunk, width)
    chunks = triton.cdiv(V, chunk)
    log_count, log_chunk, log_chunks = (triton.next_power_of_2(n).bit_length() - 1 for n in (width, chunk, chunks))
    best = torch.empty(C, chunks, width, dtype=torch.int64, device=logits_RV.device)
    out = torch.empty(C, count, dtype=torch.int64, device=logits_RV.device)
    _candidates_chunk[(C, chunks)](
        logits_RV,
        chosen_C,
        seed_C,
        index_C,
        best,
        logits_RV.stride(0),
        V,
        chunks,
        float(temperature),
        SAMPLED=temperature != 0,
        LOG_COUNT=log_count,
        LOG_CHUNK=log_chunk,
        num_warps=CHUNK_WARPS,
    )
    _candidates_merge[(C,)](
        chosen_C, best, out, chunks, count, LOG_COUNT=log_count, LOG_CHUNKS=log_chunks, num_warps=MERGE_WARPS
    )
    return out
