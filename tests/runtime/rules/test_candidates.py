"""Which tokens of a row are best: found without sorting them all, and chosen among a few as among all."""

import math

import pytest
import torch

from retrofit.runtime.rules.sampling import Processing, choose, likeliest, ranked


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
