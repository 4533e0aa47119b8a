"""Turn logits into tokens: processors in transformers' order, keyed Gumbel noise, and the choice itself.

A token is y = argmax(log p + g) (the Gumbel-max trick): p the processed distribution, g Gumbel noise that is
a pure function of (request seed, output index, token id).  Nothing here has state, so the same request draws
the same token at any strategy, batch or load, and a draft that uses the same noise is coupled to its target
(see accept.py).

The noise is defined on integers: `hash_bits` is 32-bit arithmetic only, so a uint32 kernel gives the same
bits; `hash_bits_plain` is its specification in plain Python.

Not here: the model, acceptance, EOS and stop strings, which tokens a request has seen so far, and the tokens that a
base's own settings forbid (`processors.py`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

# Shapes: R rows (one token choice each), V vocabulary, k drafted tokens


@dataclass(frozen=True)
class Processing:
    """What is done to scores before a token is chosen: the part of `SamplingParams` that rows are computed by."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    min_p: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    @property
    def needs_seen(self) -> bool:
        """Whether it matters which tokens stood in prompt or output."""
        return self.repetition_penalty not in (None, 1.0)

    @property
    def needs_counts(self) -> bool:
        """Whether it matters how often a token stood in the output."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def warps_only(self) -> bool:
        """Temperature, top-k and top-p at most."""
        return not (self.needs_seen or self.needs_counts or self.min_p or self.logit_bias)


# Two multiply-xorshift rounds, [16 21f0aaad 15 d35a2d97 15] in the notation of skeeto/hash-prospector: a
# permutation of 32-bit integers with an exact avalanche bias of 0.108, found by TheIronBorn (issue 19 there);
# lowbias32 has 0.174.
_MULTIPLY_1 = 0x21F0AAAD
_MULTIPLY_2 = 0xD35A2D97
# Where the three hash chains start: fraction bits of the golden ratio and of the square roots of 2 and 3.
# They keep seed 0 and token 0 off zero, the fixed point of the mixer, and set the two row keys apart.
_KEYS = (0x9E3779B9, 0x6A09E667)
_TOKEN = 0xBB67AE85
_WORD = 0xFFFFFFFF
FOLDS = 16
"""Tokens of a column, of which `likeliest` looks at the largest first."""


def hash_bits_plain(seed: int, index: int, token: int) -> int:
    """The 32 noise bits of one token, 0..2^32 - 1: the specification of `hash_bits`, in plain integers.

    seed: request seed, its low 64 bits count; index: output index, its low 32 bits count; token: token id.
    """

    def mix(x: int) -> int:
        x = (x ^ x >> 16) * _MULTIPLY_1 & _WORD
        x = (x ^ x >> 15) * _MULTIPLY_2 & _WORD
        return x ^ x >> 15

    def row_key(start: int) -> int:
        x = (seed + start) & _WORD
        x = (x ^ x >> 16) * _MULTIPLY_1 & _WORD ^ (seed >> 32 & _WORD)
        x = (x ^ x >> 15) * _MULTIPLY_2 & _WORD ^ (index & _WORD)
        return mix(x)

    x = mix((token + _TOKEN) & _WORD) ^ row_key(_KEYS[0])
    x = (x ^ x >> 16) * _MULTIPLY_1 & _WORD ^ row_key(_KEYS[1])
    x = (x ^ x >> 15) * _MULTIPLY_2 & _WORD
    return x ^ x >> 15


def _signed(word: int) -> int:
    """The int32 with the bits of an unsigned 32-bit integer."""
    return word - 2**32 if word >= 2**31 else word


def _xor_shift(x: Tensor, bits: int) -> Tensor:
    """x ^ (x >> bits), in place, with the logical (zero-filling) shift of uint32."""
    return x.bitwise_xor_((x >> bits).bitwise_and_((1 << 32 - bits) - 1))


def _mix(x: Tensor) -> Tensor:
    """The mixer, in place.  int32 products keep their low 32 bits, exactly those of uint32."""
    _xor_shift(x, 16).mul_(_signed(_MULTIPLY_1))
    _xor_shift(x, 15).mul_(_signed(_MULTIPLY_2))
    return _xor_shift(x, 15)


@lru_cache(maxsize=8)
def hash_constants(vocab: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """What no request changes: the hash of each token alone, int32 [V], and the key starts, int32 [2, 1]."""
    tokens = torch.arange(vocab, dtype=torch.int32, device=device).add_(_signed(_TOKEN))
    starts = torch.tensor([[_signed(word)] for word in _KEYS], dtype=torch.int32, device=device)
    return _mix(tokens), starts


def hash_bits(seed: Tensor, index: Tensor, vocab: int, ids: Tensor | None = None) -> Tensor:
    """Noise bits of every token of every row, keyed by (request seed, output index, token id).

    seed, index: int64 [R]; of the index the low 32 bits count.  Returns int32 [R, V] that holds the uint32
    bit patterns of `hash_bits_plain` (int32 is about four times as fast as int64 on a CPU).
    ids: int64 [R, M], tokens below `vocab` whose bits alone are wanted, int32 [R, M].

    Each row has a 64-bit key, half of it xored into the well-mixed token, half between the two rounds of the
    mixer.
    """
    token_V, start_21 = hash_constants(vocab, seed.device)
    keys = start_21 + seed.to(torch.int32)  # [2, R]: both keys of every row
    _xor_shift(keys, 16).mul_(_signed(_MULTIPLY_1)).bitwise_xor_((seed >> 32).to(torch.int32))
    _xor_shift(keys, 15).mul_(_signed(_MULTIPLY_2)).bitwise_xor_(index.to(torch.int32))
    first, second = _mix(keys).unsqueeze(-1)
    x = (token_V if ids is None else token_V[ids]) ^ first
    _xor_shift(x, 16).mul_(_signed(_MULTIPLY_1)).bitwise_xor_(second)
    _xor_shift(x, 15).mul_(_signed(_MULTIPLY_2))
    return _xor_shift(x, 15)


def gumbel_noise(seed: Tensor, index: Tensor, vocab: int, ids: Tensor | None = None) -> Tensor:
    """Standard Gumbel noise of every token of every row: g = -log(-log(u)), fp32 [R, V], all finite.

    seed, index: int64 [R], request seed and output index of each row.  ids: as in `hash_bits`.
    u = (top 23 hash bits + 0.5) * 2^-23 is exact in fp32 and never 0 or 1, so -2.82 < g < 16.64.  The grain of u
    shows in tokens of probability near 2^-23 and below, which are drawn too rarely, as with any fp32 uniform.
    """
    uniform = (hash_bits(seed, index, vocab, ids) >> 9).bitwise_and_((1 << 23) - 1).to(torch.float32)
    uniform.add_(0.5).mul_(2.0**-23)
    return uniform.log_().neg_().log_().neg_()


def process_logits(
    logits: Tensor,
    params: Processing,
    seen: Tensor | None,
    constrain: Callable[[Tensor], Tensor] | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """Scores after all processors, in transformers' order and arithmetic; the distribution is their softmax.

    logits: [R, V], any float type.  seen: bool [R, V], tokens of each row's own path (`path_seen`), needed
    only with a repetition penalty.  constrain: the rules for these rows (`processors.constrained`), where there are
    any.  counts: fp32 [R, V], how often each row's own path has a token in the output (`path_counts`), needed only
    with a presence or frequency penalty.  Returns fp32 [R, V], removed tokens at -inf; it may be `logits` itself,
    which is never written.

    Bias, repetition penalty (Keskar et al. 2019, "CTRL", arXiv 1909.05858), frequency and presence penalty (as in
    vLLM), the rules, then, unless greedy, temperature, top-k, top-p (Holtzman et al. 2020, arXiv 1904.09751) and min-p
    (Nguyen et al. 2024, arXiv 2407.01082).  On the CPU the result is bitwise that of transformers' processors, but for
    tokens exactly tied at the border of top-p: transformers leaves their order to an unstable sort, here the lowest ids
    are removed first.  A row's result does not depend on the rows beside it.
    """
    scores = logits.float()
    if params.logit_bias:
        ids, added = _bias_tensors(params.logit_bias, scores.device)
        scores = scores.index_add(1, ids, added.expand(len(scores), -1))
    penalty = params.repetition_penalty
    if penalty is not None and penalty != 1:
        if seen is None:
            raise ValueError("a repetition penalty needs `seen`")
        scores = torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
    if params.needs_counts:
        if counts is None:
            raise ValueError("a presence or frequency penalty needs `counts`")
        scores = scores - params.frequency_penalty * counts
        scores = scores - params.presence_penalty * (counts > 0)
    if constrain is not None:
        scores = constrain(scores)
    if params.temperature == 0:
        return scores
    if params.temperature != 1:
        scores = scores / params.temperature
    if params.top_k is not None:
        smallest_kept = scores.topk(min(params.top_k, scores.shape[1])).values[:, -1:]
        scores = scores.masked_fill(scores < smallest_kept, -math.inf)
    if params.top_p is not None and params.top_p < 1:
        scores = _keep_top_p(scores, params.top_p)
    if params.min_p:
        scores = _keep_min_p(scores, params.min_p)
    return scores


@lru_cache(maxsize=8)
def _bias_tensors(bias: tuple[tuple[int, float], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids, int64 [b], and what is added to their scores, fp32 [b]."""
    ids, added = zip(*bias, strict=True)
    return torch.tensor(ids, device=device), torch.tensor(added, dtype=torch.float32, device=device)


def _keep_min_p(scores: Tensor, min_p: float) -> Tensor:
    """Set tokens less than min_p times as likely as the likeliest to -inf."""
    if scores.device.type == "cpu":
        chances = scores.softmax(dim=-1)
    else:  # the ratio itself: it needs no sum, whose order would be the device's
        chances = (scores - scores.amax(dim=-1, keepdim=True)).exp()
    return scores.masked_fill(chances < min_p * chances.amax(dim=-1, keepdim=True), -math.inf)


def _keep_top_p(scores: Tensor, top_p: float) -> Tensor:
    """Set the least likely tokens, up to a total probability of 1 - top_p, to -inf; the likeliest stays."""
    ascending, ids = scores.sort(dim=-1, stable=True)
    if scores.device.type == "cpu":
        mass = ascending.softmax(dim=-1).cumsum(dim=-1)
    else:
        mass = _mass_in_fixed_point(ascending)
    removed = mass <= 1 - top_p
    removed[:, -1] = False
    return scores.masked_fill(removed.scatter(1, ids, removed), -math.inf)


def _mass_in_fixed_point(ascending: Tensor) -> Tensor:
    """Cumulative probability of ascending logits [R, V], fp64, summed in integers.

    The unit is 2^-40 of the likeliest token's weight, so 2^22 tokens cannot overflow.

    A floating-point scan on a GPU adds in an order that depends on the number of rows and may change from run
    to run (torch lists CUDA `cumsum` as nondeterministic), so verifying could keep another set of tokens than
    decoding one by one.  Integer sums have no order.
    """
    weights = (ascending - ascending[:, -1:]).exp().double()
    sums = (weights * 2.0**40).round().long().cumsum(dim=-1).double()
    return sums / sums[:, -1:]


def choose(logits: Tensor, params: Processing, seed: Tensor, index: Tensor) -> Tensor:
    """The token of each row: argmax(log p + g), ties to the lowest id, int64 [R].

    logits: fp32 [R, V] from `process_logits`.  seed, index: int64 [R], request seed and output index.  Greedy
    (g = 0) draws no noise.  log p is the logits minus one constant per row, which moves no argmax, so
    log-softmax is skipped.
    """
    if params.temperature == 0:
        return _lowest_argmax(logits)
    return _lowest_argmax(gumbel_noise(seed, index, logits.shape[1]).add_(logits))


def ranked(
    logits: Tensor,
    params: Processing,
    seed: Tensor,
    index: Tensor,
    count: int,
    vocab: int | None = None,
    ids: Tensor | None = None,
) -> Tensor:
    """The `count` best tokens of each row by log p + g, best first, int64 [R, count]: what drafts are made of.

    Arguments as `choose`.  ids: int64 [R, M] in rising order, where logits [R, M] are those of some of `vocab` tokens.
    One token is the one that `choose` finds among these; of several with equal scores the order is torch's.
    """
    scores = logits
    if params.temperature != 0:
        scores = gumbel_noise(seed, index, vocab or logits.shape[1], ids).add_(logits)
    best = _lowest_argmax(scores)[:, None] if count == 1 else scores.topk(count, dim=-1).indices
    return best if ids is None else ids.gather(1, best)


def likeliest(logits: Tensor, count: int) -> Tensor:
    """Ids of the `count` largest logits of each row [N, V], int64 [N, count] in rising order.

    Which of equal ones, is torch's.
    """
    N, V = logits.shape
    columns = -(-V // FOLDS)
    if columns < count:
        return logits.topk(count, dim=-1).indices.sort(dim=-1).values
    # They are in the columns with the largest maxima: to sort only those takes half the time.
    folded = F.pad(logits, (0, columns * FOLDS - V), value=-math.inf).view(N, FOLDS, columns)
    column = folded.amax(1).topk(count, dim=-1, sorted=False).indices
    among = folded.gather(2, column[:, None].expand(-1, FOLDS, -1)).flatten(1)
    place = among.topk(count, dim=-1, sorted=False).indices
    ids = place // count * columns + column.gather(1, place % count)
    return ids.clamp(max=V - 1).sort(dim=-1).values  # what was padded is found where the rest is minus infinity


def _lowest_argmax(scores: Tensor) -> Tensor:
    """Lowest id among the largest scores of each row, int64 [R]."""
    if scores.device.type == "cpu":
        # Documented, and tested: the first of several maxima.  `argmax` has them too and takes three times as long.
        return scores.max(dim=-1).indices
    # Elsewhere the order of a parallel reduction is spelled out rather than trusted.
    ids = torch.arange(scores.shape[1], device=scores.device)
    below = scores < scores.amax(dim=-1, keepdim=True)
    return torch.where(below, scores.shape[1], ids).amin(dim=-1)


def path_seen(base_seen: Tensor, drafts: list[int] | Tensor) -> Tensor:
    """Tokens each base row of one request has on its own path, bool [k + 1, V].

    base_seen: bool [V], tokens of prompt and output so far (seed included).  drafts: d_1..d_k, a list or
    int64 [k]. Row j has seen base_seen and d_1..d_j: row 0 the committed text only, row k every draft.
    """
    tokens = torch.as_tensor(drafts, dtype=torch.int64, device=base_seen.device)
    count = tokens.shape[0]
    rows = base_seen.repeat(count + 1, 1)
    earlier, slot = torch.tril_indices(count, count, device=base_seen.device)  # slot <= earlier
    rows[earlier + 1, tokens[slot]] = True
    return rows


def path_counts(base_counts: Tensor, drafts: list[int] | Tensor) -> Tensor:
    """How often each base row of one request has a token on its own path, fp32 [k + 1, V]; as `path_seen`."""
    tokens = torch.as_tensor(drafts, dtype=torch.int64, device=base_counts.device)
    count = tokens.shape[0]
    rows = base_counts.repeat(count + 1, 1)
    earlier, slot = torch.tril_indices(count, count, device=base_counts.device)
    return rows.index_put_((earlier + 1, tokens[slot]), rows.new_ones(()), accumulate=True)
