"""Choosing kernels: the noise against its specification, choices and candidates against the reference, ties, and rows
that know nothing of each other."""

import math
import random

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from retrofit.runtime.kernels import reference
from retrofit.runtime.kernels.sampling import candidates, choose, gumbel, hash_bits, with_noise
from retrofit.runtime.rules import sampling
from retrofit.runtime.rules.sampling import Processing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EDGE_SEEDS = [0, 1, -1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, -(2**63)]
EDGE_WORDS = [0, 1, 2**31 - 1]


def integers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=DEVICE)


def keys(rows: int) -> tuple[Tensor, Tensor]:
    """A seed and an output index for each row."""
    return torch.randint(2**62, (rows,)).to(DEVICE) * 2 + 1, torch.randint(1000, (rows,)).to(DEVICE)


@triton.jit
def noise_kernel(seed_ptr, index_ptr, token_ptr, x_ptr, temperature, bits_ptr, noise_ptr, scores_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    seed, index, token = tl.load(seed_ptr + i), tl.load(index_ptr + i), tl.load(token_ptr + i)
    bits = hash_bits(seed, index, token)
    tl.store(bits_ptr + i, bits.to(tl.int64))
    tl.store(noise_ptr + i, gumbel(bits))
    tl.store(scores_ptr + i, with_noise(tl.load(x_ptr + i), temperature, seed, index, token))


def run_noise(seed: Tensor, index: Tensor, token: Tensor, x: Tensor, temperature: float) -> tuple[Tensor, ...]:
    N = len(seed)
    bits = torch.empty(N, dtype=torch.int64, device=DEVICE)
    noise, scores = torch.empty(N, device=DEVICE), torch.empty(N, device=DEVICE)
    noise_kernel[(1,)](seed, index, token, x, temperature, bits, noise, scores, N)
    return bits, noise, scores


def test_noise_bits_are_those_of_the_specification():
    rng = random.Random(0)
    cases = [(seed, index, token) for seed in EDGE_SEEDS for index in EDGE_WORDS for token in EDGE_WORDS]
    while len(cases) < 1024:
        cases.append((rng.randrange(-(2**63), 2**63), rng.randrange(2**31), rng.randrange(2**18)))
    seed, index, token = (integers(*column) for column in zip(*cases, strict=True))
    bits, _, _ = run_noise(seed, index, token, torch.zeros(1024, device=DEVICE), 1.0)
    assert bits.tolist() == [sampling.hash_bits_plain(*case) for case in cases]
    assert torch.equal(bits, reference.hash_bits(seed, index, token))


def test_noise_and_scores():
    """Noise within 2 ulp of torch's (of 1, where it is smaller); logits are divided, not multiplied by 1 / 0.7."""
    V = 4096
    seed, index, token, x = integers(2**63 - 5), integers(77), torch.arange(V, device=DEVICE), torch.randn(V) * 9
    _, noise, scores = run_noise(seed.repeat(V), index.repeat(V), token, x.to(DEVICE), 0.7)
    expected = sampling.gumbel_noise(seed, index, V)[0]
    assert ((noise - expected).abs() <= 2 * 2.0**-23 * expected.abs().clamp(min=1)).all()
    assert torch.equal(scores.cpu(), x / 0.7 + noise.cpu())
    assert (x / 0.7 + noise.cpu() != x * (1 / 0.7) + noise.cpu()).any()


@triton.jit
def gumbel_kernel(bits_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, gumbel(tl.load(bits_ptr + i).to(tl.uint32)))


def test_noise_is_finite_at_both_ends():
    bits, out = integers(0, 511, 2**31, 2**32 - 1), torch.empty(4, device=DEVICE)
    gumbel_kernel[(1,)](bits, out, 4)
    torch.testing.assert_close(out, reference.gumbel(bits), rtol=1e-6, atol=1e-6)
    assert out.isfinite().all() and out[3] > 16


@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize(
    ("V", "dtype"),
    [(1, torch.float32), (63, torch.float32), (63, torch.bfloat16), (2048, torch.float16), (5000, torch.bfloat16)],
)
def test_choose(poisoned_memory: None, V: int, temperature: float, dtype: torch.dtype):
    """Also with a row of which one token is left, and with one of which none is."""
    logits = (torch.randn(4, V, device=DEVICE) * 3).to(dtype)
    logits[1, : V // 2] = -math.inf
    logits[1, V // 2 + 1 :] = -math.inf
    logits[2] = -math.inf
    seed, index = keys(4)
    chosen = choose(logits, temperature, seed, index)
    assert torch.equal(chosen, reference.choose(logits, temperature, seed, index))
    assert chosen[1] == V // 2 and chosen[2] == 0
    params = Processing(temperature=temperature)
    assert torch.equal(chosen, sampling.choose(sampling.process_logits(logits, params, None), params, seed, index))


def test_choose_takes_the_lowest_of_equals():
    """Within a chunk and across chunks; the two zeros are equal."""
    seed, index = keys(3)
    logits = torch.full((3, 200), -1.0, device=DEVICE)
    logits[0, [40, 41, 130]] = 2.0
    logits[1, 70], logits[1, 150], logits[1, 60] = 0.0, 0.0, -0.0
    logits[2] = -1e30
    assert choose(logits, 0, seed, index, chunk=64).tolist() == [40, 60, 0]
    coarse = torch.randint(3, (6, 200), device=DEVICE).float() - 1
    assert torch.equal(choose(coarse, 0, *keys(6), chunk=64), reference.first_of_largest(coarse))


def test_negative_and_huge_scores_are_in_order():
    values = torch.tensor([-math.inf, -3e38, -1.5, -1.0, -1e-42, 0.0, 1e-42, 1.0, 1.5, 3e38, math.inf], device=DEVICE)
    order = torch.randperm(len(values), device=DEVICE)
    seed, index = keys(1)
    ranked = candidates(values[order][None], integers(0), len(values), 0, seed, index)[0]
    assert torch.equal(values[order][ranked], values.flip(0))


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_a_nan_row_gives_a_valid_id(temperature: float):
    seed, index = keys(2)
    logits = torch.full((2, 100), math.nan, device=DEVICE)
    logits[1] = -logits[1]
    logits[1, 7] = 1.0
    chosen = choose(logits, temperature, seed, index, chunk=64)
    found = candidates(logits, integers(0, 1), 8, temperature, seed, index, chunk=64)
    for ids in (chosen, found):
        assert ((ids >= 0) & (ids < 100)).all()


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_a_row_is_chosen_alike_alone_and_among_others(temperature: float):
    """Coarse logits, so that ties decide; the others hold NaN; rows may be apart in memory."""
    seed, index = keys(5)
    wide = torch.randint(4, (5, 400), device=DEVICE).to(torch.bfloat16)
    logits = wide[:, :300]
    alone = torch.cat([choose(logits[i : i + 1], temperature, seed[i : i + 1], index[i : i + 1]) for i in range(5)])
    assert torch.equal(choose(logits, temperature, seed, index, chunk=128), alone)
    order = torch.tensor([3, 1, 4, 0, 2], device=DEVICE)
    assert torch.equal(choose(logits[order], temperature, seed[order], index[order], chunk=64), alone[order])
    logits[[0, 1, 3]] = math.nan
    assert torch.equal(choose(logits, temperature, seed, index)[[2, 4]], alone[[2, 4]])

    best = candidates(logits, integers(2, -1, 4), 16, temperature, *(t[[2, 0, 4]] for t in (seed, index)), chunk=128)
    for i, row in ((0, 2), (2, 4)):
        single = candidates(logits[row : row + 1], integers(0), 16, temperature, seed[[row]], index[[row]], chunk=256)
        assert torch.equal(best[i], single[0])


def test_same_request_in_two_rows_differs_by_output_index():
    logits = torch.zeros(4, 256, device=DEVICE)
    chosen = choose(logits, 1.0, integers(5, 5, 5, 6), integers(1, 2, 1, 1))
    assert chosen[0] == chosen[2] and chosen[0] != chosen[1] and chosen[0] != chosen[3]


@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize(
    ("V", "count", "chunk", "dtype"),
    [
        (1, 1, 16, torch.float32),
        (63, 63, 16, torch.bfloat16),
        (100, 64, 2048, torch.float16),
        (300, 5, 64, torch.float32),
        (700, 64, 256, torch.bfloat16),
    ],
)
def test_candidates(poisoned_memory: None, V: int, count: int, chunk: int, temperature: float, dtype: torch.dtype):
    """Best first, from the rows asked for; a slot that no row proposes gets the first ids."""
    logits = (torch.randn(3, V + 3, device=DEVICE) * 3).to(dtype)[:, :V]
    logits[1] = math.nan
    chosen = integers(2, -1, 0)
    seed, index = keys(3)
    found = candidates(logits, chosen, count, temperature, seed, index, chunk=chunk)
    expected = reference.candidates(logits, chosen, count, temperature, seed, index)
    assert torch.equal(found[[0, 2]], expected[[0, 2]])
    assert found[1].tolist() == list(range(count))
    rows = integers(2, 0)
    assert torch.equal(found[[0, 2], 0], choose(logits[rows], temperature, seed[[0, 2]], index[[0, 2]]))


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_candidates_of_a_row_with_few_tokens_left(temperature: float):
    """Equal scores, here -inf, are in order of their ids."""
    logits = torch.full((1, 150), -math.inf, device=DEVICE)
    logits[0, [140, 30, 77]] = torch.tensor([3.0, 1.0, 2.0], device=DEVICE)
    seed, index = keys(1)
    found = candidates(logits, integers(0), 8, temperature, seed, index, chunk=32)
    assert torch.equal(found, reference.candidates(logits, integers(0), 8, temperature, seed, index))
    assert found[0, 3:].tolist() == [0, 1, 2, 3, 4]
