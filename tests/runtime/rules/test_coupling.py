"""Drafts drawn with the noise of their targets: speculative decoding of a chain equals plain decoding."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from retrofit.runtime.rules.accept import accepted_length
from retrofit.runtime.rules.sampling import Processing, choose, gumbel_noise, path_seen, process_logits

SeenRule = Callable[[Tensor, list[int]], Tensor]


def integers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


# the diagonal makes tokens repeat at once, within one draft
CHAIN = 1.5 * torch.randn(40, 40, generator=torch.Generator().manual_seed(9)) + 3 * torch.eye(40)
DRAFTER = CHAIN + 0.5 * torch.randn(40, 40, generator=torch.Generator().manual_seed(10))


def decode(params: Processing, seed: int, block: int, seen_rule: SeenRule, count: int = 12) -> list[int]:
    """Tokens of one request, drafted `block` at a time by a disturbed chain with the same noise."""
    text = [seed]
    while len(text) <= count:
        committed = torch.zeros(len(CHAIN), dtype=torch.bool).index_fill(0, integers(*text), True)
        path = text[-1:]  # the seed and the drafts after it
        for slot in range(block):
            scores = process_logits(DRAFTER[path[-1:]], params, path_seen(committed, path[1:])[-1:])
            path += choose(scores, params, integers(seed), integers(len(text) + slot)).tolist()
        scores = process_logits(CHAIN[path], params, seen_rule(committed, path[1:]))
        indices = len(text) + torch.arange(block + 1)
        targets = choose(scores, params, torch.full_like(indices, seed), indices)
        kept = int(accepted_length(integers(*path[1:])[None], targets[None], integers(block)))
        text += targets[: kept + 1].tolist()
    return text[1 : count + 1]


def committed_prefix_only(committed: Tensor, drafts: list[int]) -> Tensor:
    return committed.expand(len(drafts) + 1, -1)


def same_as_plain(params: Processing, seen_rule: SeenRule) -> bool:
    return all(
        decode(params, seed, block, seen_rule) == decode(params, seed, 0, path_seen)
        for seed in range(8)
        for block in (1, 3)
    )


PENALISED = [
    Processing(repetition_penalty=2.0),
    Processing(temperature=0.8, top_k=12, top_p=0.95, repetition_penalty=2.0),
]


@pytest.mark.parametrize("params", [Processing(temperature=0.8), *PENALISED], ids=str)
def test_speculative_equals_plain_at_equal_seed(params: Processing) -> None:
    assert same_as_plain(params, path_seen)


@pytest.mark.parametrize("params", PENALISED, ids=str)
def test_penalty_on_the_committed_prefix_only_is_caught(params: Processing) -> None:
    assert not same_as_plain(params, committed_prefix_only)


@pytest.mark.parametrize("distance", [0.2, 1.0, 3.0])
def test_coupled_agreement_lies_within_its_bounds(distance: float) -> None:
    generator = torch.Generator().manual_seed(11)
    count, vocab = 20_000, 16
    target = torch.randn(vocab, generator=generator)
    draft = target + distance * torch.randn(vocab, generator=generator)
    variation = float((target.softmax(0) - draft.softmax(0)).abs().sum() / 2)
    noise = gumbel_noise(torch.arange(count), torch.full((count,), 5), vocab)
    agreement = float(((target + noise).argmax(1) == (draft + noise).argmax(1)).double().mean())
    slack = 4 * math.sqrt(agreement * (1 - agreement) / count)
    assert (1 - variation) / (1 + variation) - slack <= agreement <= 1 - variation + slack
