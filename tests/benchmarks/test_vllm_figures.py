"""What `python -m benchmarks.vllm` makes of answers, counts and samples, without vLLM."""

import random
from collections import Counter

import pytest
import torch

from benchmarks.vllm import parity, samples
from benchmarks.vllm.__main__ import as_here, identical
from benchmarks.vllm.inside import misreported, row_by_row
from retrofit.adapters.heads import Heads
from retrofit.serving.vllm.drafts import Sampling

WANTED = {(a, b): (a + 1) * (b + 2) / 540 for a in range(8) for b in range(3, 6)}
WANTED = {pair: p / sum(WANTED.values()) for pair, p in WANTED.items()}


def test_one_other_token_misses_the_bar():
    without = {"alone": [[[1, 2]], [[3]]], "one token": [[[4]]]}
    drafted = {"alone": [[[1, 2]], [[5]]], "one token": [[[4]]]}
    assert parity.equal(without, without) == {"alone": [2, 2], "one token": [1, 1]}
    bars, _ = identical(parity.equal(drafted, without))
    assert [(bar.figure, bar.met) for bar in bars] == [("1 of 2", False), ("1 of 1", True)]
    bars, _ = identical(parity.equal(drafted, without), stated=True)
    assert {bar.met for bar in bars} == {None}


def test_answers_part_where_the_first_tokens_differ():
    found = parity.partings([[[7, 8, 9]], [[1, 2]]], [[[7, 5, 9]], [[1, 2]]], [[0], [0]])
    assert found == [([0, 7], 5, 8)]


@pytest.mark.parametrize(
    ("counts", "close"),
    [
        ([100, 100, 50, 20], True),
        ([108, 108, 50, 20], True),  # eight requests, each a cycle more
        ([109, 109, 50, 20], False),
        ([100, 98, 50, 20], False),  # a root that is refused was no base row's
        ([100, 100, 55, 20], False),
        ([100, 100, 50, 25], False),
    ],
)
def test_counts_of_accepted_drafts_are_compared_slot_by_slot(counts, close):
    assert parity.as_close(counts, [100, 50, 20], requests=8) is close


def test_drafts_are_compared_over_the_requests_whose_texts_are_the_same():
    theirs, own = [[[1, 2]], [[3, 4]]], [([1, 2], [10, 5]), ([3, 9], [20, 5])]
    bar, found = as_here(theirs, [[10, 10, 5], [12, 12, 12]], own)
    assert bar.met and bar.figure == "5 in 10 cycles, 5 in 10 (1 of 2 texts)" and found["texts"] == [1, 2]
    bar, _ = as_here(theirs, [[10, 10, 7], [12, 12, 12]], own)
    assert not bar.met
    bar, _ = as_here(theirs, [[10, 10, 5], [12, 12, 12]], [([0], [1, 1]), ([0], [1, 1])])
    assert bar.met is None


def drawn(weights, number=2000):
    pairs = random.Random(0).choices(list(weights), list(weights.values()), k=number)
    return Counter(pairs)


def test_samples_of_the_target_pass_and_of_another_distribution_fail():
    assert samples.chance(drawn(WANTED), WANTED) > samples.SIGNIFICANT
    likely = {pair: p**1.5 for pair, p in WANTED.items()}
    assert samples.chance(drawn(likely), WANTED) < samples.SIGNIFICANT
    with pytest.raises(ValueError, match="not to be"):
        samples.chance({**drawn(WANTED), (99, 99): 1}, WANTED)


def test_rows_computed_alone_are_those_of_one_row():
    weight = torch.randn(5, 7)

    def counting(x, w):
        return x @ w.T + len(x)

    alone = row_by_row(counting)
    x = torch.randn(4, 7)
    torch.testing.assert_close(alone(x, weight), x @ weight.T + 1)
    assert alone.of_all is counting


def test_the_planted_fault_reports_what_was_drawn_from_and_hands_over_the_likeliest():
    heads = Heads(hidden=4, vocab=5, drafts=2, markov_rank=0, confidence=False).requires_grad_(False)
    root, trunk = torch.randn(3, 5), torch.randn(3, 2, 5)
    tokens, drawn_from = misreported(root, trunk, heads, Sampling(torch.full((3,), 0.8)))
    assert tokens.tolist() == drawn_from.argmax(-1).tolist()
    torch.testing.assert_close(drawn_from[:, 0], torch.softmax(root / 0.8, -1))
