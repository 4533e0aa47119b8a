"""Noise against its specification and its law, processors against transformers, choices against exact
laws."""

import math
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from retrofit.errors import UsageError
from retrofit.runtime.params import SamplingParams
from retrofit.runtime.rules import sampling
from retrofit.runtime.rules.sampling import (
    Processing,
    choose,
    gumbel_noise,
    hash_bits,
    hash_bits_plain,
    likeliest,
    path_counts,
    path_seen,
    process_logits,
    ranked,
)

Chooser = Callable[[Tensor, Processing, Tensor, Tensor], Tensor]
EDGE_SEEDS = [0, 1, -1, 2**31, 2**32 - 1, 2**32, -(2**63), 2**63 - 1]


def integers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


# parameters


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.5),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", 0),
        ("top_k", 2.5),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
    ],
)
def test_values_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=rf"{name} is {value}; (allowed: |it must be a whole number from 1)"):
        SamplingParams(**{name: value})  # type: ignore[arg-type]


# noise


def test_hash_equals_its_specification() -> None:
    rng = random.Random(0)
    cases = [(seed, index) for seed in EDGE_SEEDS for index in (0, 1, 2**31)]
    cases += [(rng.getrandbits(64) - 2**63, rng.getrandbits(32)) for _ in range(100)]
    seeds, indices = zip(*cases, strict=True)
    bits = hash_bits(integers(*seeds), integers(*indices), 37).long() & 0xFFFFFFFF
    assert bits.tolist() == [[hash_bits_plain(seed, index, token) for token in range(37)] for seed, index in cases]


def test_noise_is_the_stated_function_of_the_bits() -> None:
    noise = gumbel_noise(integers(3, 3), integers(0, 9), 50).double()
    bits = torch.tensor([[hash_bits_plain(3, index, token) >> 9 for token in range(50)] for index in (0, 9)])
    expected = -torch.log(-torch.log((bits.double() + 0.5) / 2**23))
    assert (noise - expected).abs().max() < 2e-6  # fp32: an ulp at 16 is 2e-6


def test_extreme_bits_give_finite_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = torch.tensor([[0, -1]], dtype=torch.int32)
    monkeypatch.setattr(sampling, "hash_bits", lambda *_: ends)
    low, high = gumbel_noise(integers(0), integers(0), 2)[0].tolist()
    assert -2.82 < low < -2.81
    assert 16.63 < high < 16.64


@pytest.mark.parametrize("vocab", [3, 64, 2049])
def test_noise_of_a_row_does_not_depend_on_its_batch(vocab: int) -> None:
    seeds, indices = integers(5, 5, 8, -1, 5), integers(0, 1, 0, 7, 2)
    together = gumbel_noise(seeds, indices, vocab)
    for row in range(len(seeds)):
        assert torch.equal(gumbel_noise(seeds[row : row + 1], indices[row : row + 1], vocab)[0], together[row])


def test_noise_of_some_tokens_is_that_of_all() -> None:
    seeds, indices, ids = integers(5, -1), integers(0, 7), torch.tensor([[2, 9, 40], [0, 9, 49]])
    assert torch.equal(gumbel_noise(seeds, indices, 50, ids), gumbel_noise(seeds, indices, 50).gather(1, ids))


def kolmogorov_smirnov(noise: Tensor) -> float:
    """sqrt(n) times the largest distance of the empirical from the Gumbel distribution function."""
    ordered = noise.flatten().double().sort().values
    count = len(ordered)
    law = torch.exp(-torch.exp(-ordered))
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    return float(torch.maximum((law - steps[:-1]).abs(), (law - steps[1:]).abs()).max()) * math.sqrt(count)


def chi_square_p(observed: Tensor, expected: Tensor) -> float:
    """p-value of the chi-square goodness of fit; outcomes that cannot happen must not."""
    if (observed[expected == 0] > 0).any():
        return 0.0
    observed, expected = observed[expected > 0].double(), expected[expected > 0]
    statistic = ((observed - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2.0).double(), statistic / 2))


STREAMS = {  # one coordinate of the key moves, the others stand still: [streams, neighbours]
    "token": lambda: hash_bits(torch.arange(400), torch.full((400,), 3), 600),
    "index": lambda: hash_bits(torch.full((600,), 11), torch.arange(600), 400).T,
    "seed": lambda: hash_bits(torch.arange(600), torch.full((600,), 2), 400).T,
    "seed_high_half": lambda: hash_bits(torch.arange(600) << 32, torch.zeros(600, dtype=torch.int64), 400).T,
    "index_four_words": lambda: (
        hash_bits(torch.arange(1000).repeat_interleave(60), torch.arange(60).repeat(1000), 4)
        .view(1000, 60, 4)
        .transpose(1, 2)
        .reshape(4000, 60)
    ),
}


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS.keys())
def test_noise_is_gumbel_and_neighbours_are_independent(stream: Callable[[], Tensor]) -> None:
    bits = stream()
    uniform = ((bits.long() & 0xFFFFFFFF) >> 9).double().add(0.5) / 2**23
    assert kolmogorov_smirnov(-torch.log(-torch.log(uniform))) < 1.95  # p = 0.001
    for shift in (29, 9):  # the highest and the lowest bits that the noise uses
        eighths = (bits.long() >> shift) & 7
        triples = (eighths[:, :-2] * 8 + eighths[:, 1:-1]) * 8 + eighths[:, 2:]
        # disjoint triples, so that the counts are multinomial
        counts = torch.bincount(triples[:, ::3].flatten(), minlength=512)
        assert chi_square_p(counts, torch.full((512,), float(counts.sum()) / 512).double()) > 0.001


# processors


def transformers_scores(logits: Tensor, ids: Tensor, params: Processing) -> Tensor:
    """What `generate` does with these settings: the same classes on the same conditions, in the same
    order."""
    scores = logits.float()
    if params.logit_bias:
        bias = {(token,): added for token, added in params.logit_bias}
        scores = SequenceBiasLogitsProcessor(bias)(ids, scores)
    if params.repetition_penalty not in (None, 1.0):
        scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, scores)
    if params.temperature > 0:
        if params.temperature != 1.0:
            scores = TemperatureLogitsWarper(params.temperature)(ids, scores)
        if params.top_k is not None:
            scores = TopKLogitsWarper(params.top_k)(ids, scores)
        if params.top_p is not None and params.top_p < 1.0:
            scores = TopPLogitsWarper(params.top_p)(ids, scores)
        if params.min_p is not None:
            scores = MinPLogitsWarper(params.min_p)(ids, scores)
    return scores


SETTINGS = [
    Processing(),
    Processing(repetition_penalty=1.3),
    Processing(temperature=0.7),
    Processing(temperature=1.0, repetition_penalty=0.8),
    Processing(temperature=0.7, top_k=5),
    Processing(temperature=1.3, top_k=10_000),
    Processing(temperature=1.0, top_p=1.0),
    Processing(temperature=0.9, top_p=0.9),
    Processing(temperature=0.6, top_p=1e-6),
    Processing(temperature=0.8, top_k=20, top_p=0.5, repetition_penalty=1.2),
    Processing(temperature=0.8, min_p=0.1),
    Processing(temperature=1.0, min_p=1.0),
    Processing(logit_bias=((0, 2.5), (3, -1.0), (40, 9.0))),
    Processing(temperature=0.9, top_k=9, top_p=0.9, min_p=0.2, repetition_penalty=1.4, logit_bias=((4, 3.0),)),
]
LOGITS = {  # each catches a different bug
    "smooth": lambda: 3 * torch.randn(7, 101, generator=torch.Generator().manual_seed(1)),
    "ties": lambda: torch.randint(-3, 4, (7, 64), generator=torch.Generator().manual_seed(2)).float(),
    "bfloat16": lambda: (4 * torch.randn(3, 257, generator=torch.Generator().manual_seed(3))).bfloat16(),
    "masked": lambda: torch.randn(3, 50, generator=torch.Generator().manual_seed(4)).index_fill(
        1, torch.arange(0, 50, 2), -math.inf
    ),
}
TIED = ("ties", "bfloat16")


@pytest.mark.parametrize("params", SETTINGS, ids=str)
@pytest.mark.parametrize("name", LOGITS)
def test_processors_are_bitwise_those_of_transformers(
    name: str, params: Processing, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = LOGITS[name]()
    if name in TIED:  # which of the tied tokens top-p keeps is left to an unstable sort
        monkeypatch.setattr(torch, "sort", partial(torch.sort, stable=True))
    before = scores.clone()
    ids = torch.randint(scores.shape[1], (len(scores), 9), generator=torch.Generator().manual_seed(5))
    seen = torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, ids, True)
    result = process_logits(scores, params, seen)
    assert result.dtype == torch.float32
    assert torch.equal(result, transformers_scores(scores, ids, params))
    assert torch.equal(scores, before)
    for row in range(len(scores)):
        assert torch.equal(process_logits(scores[row : row + 1], params, seen[row : row + 1])[0], result[row])


def test_top_p_at_its_borders() -> None:
    """Of four tokens of 1/4 each, .75 keeps three; and however little is asked for, the likeliest stays."""
    kept = process_logits(torch.zeros(1, 4), Processing(temperature=1.0, top_p=0.75), None).isfinite()
    assert kept.tolist() == [[False, True, True, True]]
    scores = torch.randn(200, 999, generator=torch.Generator().manual_seed(12))
    scores = process_logits(scores, Processing(temperature=1.0, top_p=1e-12), None)
    assert (scores.isfinite().sum(1) == 1).all()


def test_penalty_without_seen_tokens_is_a_programming_error() -> None:
    with pytest.raises(ValueError, match="needs `seen`"):
        process_logits(torch.zeros(1, 3), Processing(repetition_penalty=1.2), None)


def test_frequency_and_presence_stand_between_repetition_and_temperature() -> None:
    """As vLLM has them: minus frequency times the count, minus presence for a token that is there at all."""
    scores = 3 * torch.randn(3, 20, generator=torch.Generator().manual_seed(13))
    counts = torch.randint(0, 3, (3, 20), generator=torch.Generator().manual_seed(14)).float()
    seen = counts > 0
    params = Processing(temperature=0.7, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=-0.6)
    penalised = process_logits(
        scores, replace(params, temperature=0.0, presence_penalty=0.0, frequency_penalty=0.0), seen
    )
    want = (penalised + 0.6 * counts - 0.4 * seen.float()) / 0.7
    torch.testing.assert_close(process_logits(scores, params, seen, counts=counts), want)
    with pytest.raises(ValueError, match="needs `counts`"):
        process_logits(scores, params, seen)


def test_each_row_counts_its_own_path() -> None:
    base = torch.tensor([2.0, 0.0, 0.0, 1.0])
    rows = path_counts(base, [3, 1, 3])
    assert rows.tolist() == [[2, 0, 0, 1], [2, 0, 0, 2], [2, 1, 0, 2], [2, 1, 0, 3]]
    assert torch.equal(path_counts(base, []), base[None])
    assert base.tolist() == [2, 0, 0, 1]


def test_min_p_elsewhere_is_the_ratio_itself() -> None:
    scores = torch.randn(50, 300, generator=torch.Generator().manual_seed(15)) * 4
    kept = process_logits(scores, Processing(temperature=1.0, min_p=0.05), None).isfinite()
    assert torch.equal(kept, (scores - scores.amax(1, keepdim=True)).exp() >= 0.05)


def test_fixed_point_mass_is_the_cumulative_softmax() -> None:
    ascending = (4 * torch.randn(20, 3001, generator=torch.Generator().manual_seed(6))).sort(dim=-1).values
    mass = sampling._mass_in_fixed_point(ascending)
    assert (mass - ascending.double().softmax(dim=-1).cumsum(dim=-1)).abs().max() < 1e-6
    assert torch.equal(mass[:, -1], torch.ones(20, dtype=torch.float64))


def test_each_row_has_seen_its_own_path() -> None:
    base = torch.tensor([True, False, False, False, False])
    rows = path_seen(base, [3, 1, 3])
    assert [row.nonzero().flatten().tolist() for row in rows] == [[0], [0, 3], [0, 1, 3], [0, 1, 3]]
    assert torch.equal(path_seen(base, torch.tensor([3, 1, 3])), rows)
    assert torch.equal(path_seen(base, []), base[None])
    assert base.tolist() == [True, False, False, False, False]


# choices


def test_ties_go_to_the_lowest_id() -> None:
    generator = torch.Generator().manual_seed(7)
    for vocab in (5, 100, 4097):  # tails and several vector widths
        scores = torch.randint(0, 3, (30, vocab), generator=generator).float()
        lowest = [row.index(max(row)) for row in scores.tolist()]
        rows = torch.zeros(30, dtype=torch.int64)
        assert choose(scores, Processing(), rows, rows).tolist() == lowest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [8, 100, 4096, 4097])  # fewer columns than asked for, a last column cut short
def test_likeliest_are_the_largest_in_rising_order(vocab: int, dtype: torch.dtype) -> None:
    logits = torch.randn(6, vocab, generator=torch.Generator().manual_seed(3)).to(dtype)
    logits[1] = logits[1].sort().values  # all of the largest in one place
    logits[2] = logits[2].sort(descending=True).values
    for count in (1, 7):
        ids = likeliest(logits, count)
        assert torch.equal(logits.gather(1, ids).sort(descending=True).values, logits.topk(count).values)
        assert (ids.diff(dim=1) > 0).all()


def test_likeliest_are_tokens_also_where_hardly_any_is_possible() -> None:
    logits = torch.full((1, 100), -math.inf)
    logits[0, [4, 99]] = 1.0
    ids = likeliest(logits, 5)
    assert {4, 99} <= set(ids[0].tolist()) and ids.max() < 100


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_ranked_among_some_tokens(temperature: float) -> None:
    """Among all of them as without saying so; among others, what is best of those, equal ones by id."""
    scores, params = torch.randn(4, 60, generator=torch.Generator().manual_seed(4)), Processing(temperature=temperature)
    seeds, indices, every = torch.arange(4), torch.arange(4) + 9, torch.arange(60).expand(4, -1)
    for count in (1, 3):
        whole = ranked(scores, params, seeds, indices, count)
        assert torch.equal(ranked(scores, params, seeds, indices, count, 60, every), whole)
        assert torch.equal(whole[:, 0], choose(scores, params, seeds, indices))
        others = torch.stack([row[~torch.isin(row, best)][:30] for row, best in zip(every, whole, strict=True)])
        found = ranked(scores.gather(1, others), params, seeds, indices, count, 60, others)
        removed = scores.scatter(1, every, -math.inf).scatter(1, others, scores.gather(1, others))
        assert torch.equal(found, ranked(removed, params, seeds, indices, count))
    ties = ranked(torch.ones(1, 3), Processing(), seeds[:1], indices[:1], 1, 60, torch.tensor([[7, 8, 30]]))
    assert ties.tolist() == [[7]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_chooses_as_the_cpu_does() -> None:
    scores = torch.randint(0, 3, (30, 40_001), generator=torch.Generator().manual_seed(8)).float()
    seeds, indices = torch.arange(30), torch.arange(30)
    assert torch.equal(hash_bits(seeds.cuda(), indices.cuda(), 999).cpu(), hash_bits(seeds, indices, 999))
    chosen = choose(scores.cuda(), Processing(), seeds.cuda(), indices.cuda())
    assert torch.equal(chosen.cpu(), choose(scores, Processing(), seeds, indices))


WORDS = 4
TABLE = torch.tensor([[0.9, 0.0, -0.6, 0.3], [-0.2, 1.1, 0.4, -1.0], [0.5, 0.5, -0.3, 0.8], [-0.8, 0.2, 0.7, 0.1]])
"""Logits of a Markov chain, a row for each previous token; the first token follows token 0, the prompt."""


def sample_texts(params: Processing, count: int, chooser: Chooser) -> Tensor:
    """Three tokens of the chain for each of `count` request seeds, [count, 3]."""
    seeds = torch.arange(count) + 10**10
    seen = torch.zeros(count, WORDS, dtype=torch.bool)
    previous, texts = torch.zeros(count, dtype=torch.int64), []
    for index in range(3):
        seen = seen.scatter(1, previous[:, None], True)
        scores = process_logits(TABLE[previous], params, seen)
        previous = chooser(scores, params, seeds, torch.full((count,), index))
        texts.append(previous)
    return torch.stack(texts, dim=1)


def exact_joint(params: Processing) -> Tensor:
    """Probability of every text of three tokens, fp64 [64], from transformers' processors."""
    joint = torch.ones(1, dtype=torch.float64)
    paths = torch.zeros(1, 1, dtype=torch.int64)
    for _ in range(3):
        scores = transformers_scores(TABLE[paths[:, -1]], paths, params)
        joint = (joint[:, None] * scores.double().softmax(dim=-1)).flatten()
        paths = torch.cat([paths.repeat_interleave(WORDS, 0), torch.arange(WORDS).repeat(len(paths))[:, None]], 1)
    return joint


def joint_p_value(params: Processing, chooser: Chooser = choose, count: int = 20_000) -> float:
    texts = sample_texts(params, count, chooser)
    cells = torch.bincount((texts * torch.tensor([16, 4, 1])).sum(dim=1), minlength=64)
    return chi_square_p(cells, exact_joint(params) * count)


def holm_rejects(p_values: list[float], level: float = 0.001) -> bool:
    """Whether Holm's step-down procedure rejects any hypothesis: the first step decides that."""
    return min(p_values) <= level / len(p_values)


SAMPLED = [
    Processing(temperature=1.0),
    Processing(temperature=0.8),
    Processing(temperature=1.5),
    Processing(temperature=1.0, top_k=3),
    Processing(temperature=1.0, top_p=0.8),
    Processing(temperature=0.9, repetition_penalty=1.5),
]


def test_joint_of_three_tokens_has_the_processed_distribution() -> None:
    p_values = [joint_p_value(params) for params in SAMPLED]
    assert not holm_rejects(p_values), p_values


def noise_key_reused(logits: Tensor, params: Processing, seed: Tensor, index: Tensor) -> Tensor:
    return choose(logits, params, seed, torch.zeros_like(index))


def wrong_temperature(logits: Tensor, params: Processing, seed: Tensor, index: Tensor) -> Tensor:
    return choose(logits / 1.1, params, seed, index)


def noise_left_out(logits: Tensor, params: Processing, seed: Tensor, index: Tensor) -> Tensor:
    return logits.argmax(dim=-1)


@pytest.mark.parametrize("mutant", [noise_key_reused, wrong_temperature, noise_left_out])
def test_planted_fault_moves_the_joint(mutant: Chooser) -> None:
    assert holm_rejects([joint_p_value(params, mutant) for params in SAMPLED[:3]])
