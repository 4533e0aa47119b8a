"""The acceptance rule, exhaustively: every draft against every target sequence over four words."""

from collections import Counter
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from retrofit.runtime.rules.accept import accepted_length

WORDS = 4
Rule = Callable[[Tensor, Tensor, Tensor], Tensor]
Path = tuple[int, ...]
Model = Callable[[Path], int]  # the target after a path: what y_j is, given everything row j has read


def on_and_off(text: Path) -> Model:
    """A model that says `text` on its own path and something else, which depends on the path, off it."""

    def target(path: Path) -> int:
        if path == text[: len(path)]:
            return text[len(path)]
        return (sum((place + 1) * word for place, word in enumerate(path)) + text[-1]) % WORDS

    return target


def plain_decoding(model: Model, count: int) -> Path:
    path: Path = ()
    for _ in range(count):
        path += (model(path),)
    return path


def exact_on_every_draft(rule: Rule, block: int) -> bool:
    """Whether what is emitted is always plain decoding's text and never shorter than it could be."""
    drafts, targets, lengths, plain, longest = [], [], [], [], []
    for text in product(range(WORDS), repeat=block + 1):
        model = on_and_off(text)
        decoded = plain_decoding(model, block + 1)
        for draft in product(range(WORDS), repeat=block):
            y = [model(draft[:row]) for row in range(block + 1)]
            common = next((slot for slot in range(block) if draft[slot] != decoded[slot]), block)
            for length in range(block + 1):
                drafts.append(draft)
                # rows past the real drafts were never run; zeros agree with many a padded slot
                targets.append(y[: length + 1] + [0] * (block - length))
                lengths.append(length)
                plain.append(decoded)
                longest.append(min(common, length))
    target_BK1 = torch.tensor(targets)
    accepted = rule(torch.tensor(drafts), target_BK1, torch.tensor(lengths))
    not_emitted_BK1 = torch.arange(block + 1) > accepted[:, None]
    same_text = bool(((target_BK1 == torch.tensor(plain)) | not_emitted_BK1).all())
    return same_text and torch.equal(accepted, torch.tensor(longest))


def one_too_many(draft_BK: Tensor, target_BK1: Tensor, lengths_B: Tensor) -> Tensor:
    return torch.minimum(accepted_length(draft_BK, target_BK1, lengths_B) + 1, lengths_B)


def every_agreement(draft_BK: Tensor, target_BK1: Tensor, lengths_B: Tensor) -> Tensor:
    return (draft_BK == target_BK1[:, :-1]).sum(dim=1).minimum(lengths_B)


def padding_counted(draft_BK: Tensor, target_BK1: Tensor, lengths_B: Tensor) -> Tensor:
    return accepted_length(draft_BK, target_BK1, torch.full_like(lengths_B, draft_BK.shape[1]))


def shifted_by_one(draft_BK: Tensor, target_BK1: Tensor, lengths_B: Tensor) -> Tensor:
    return accepted_length(draft_BK, target_BK1.roll(-1, dims=1), lengths_B)


@pytest.mark.parametrize("block", [1, 2, 3])
def test_every_draft_emits_plain_decoding(block: int) -> None:
    assert exact_on_every_draft(accepted_length, block)


@pytest.mark.parametrize("mutant", [one_too_many, every_agreement, padding_counted, shifted_by_one])
def test_planted_fault_emits_another_text(mutant: Rule) -> None:
    assert not exact_on_every_draft(mutant, block=2)


def joint_distribution(rule: Rule, draft: Path, count: int) -> Counter[Path]:
    """How often each text of `count` tokens is emitted, over every value of the noise.

    `draft` is offered in each cycle.  y_j = table[path][noise at the output index]: a conditional
    distribution in quarters, coupled by its noise.
    """
    generator = torch.Generator().manual_seed(5)
    paths = [path for length in range(count + len(draft)) for path in product(range(WORDS), repeat=length)]
    table = dict(zip(paths, torch.randint(WORDS, (len(paths), WORDS), generator=generator).tolist(), strict=True))
    noise = list(product(range(WORDS), repeat=count))
    texts: list[Path] = [()] * len(noise)
    draft_BK = torch.tensor([draft] * len(noise), dtype=torch.int64)
    while min(map(len, texts)) < count:
        lengths = [max(0, min(len(draft), count - len(text) - 1)) for text in texts]
        targets = []
        for text, omega, length in zip(texts, noise, lengths, strict=True):
            rows = range(length + 1 if len(text) < count else 0)
            y = [table[text + draft[:row]][omega[len(text) + row]] for row in rows]
            targets.append(y + [0] * (len(draft) + 1 - len(y)))
        accepted = rule(draft_BK, torch.tensor(targets), torch.tensor(lengths)).tolist()
        texts = [(text + tuple(y[: kept + 1]))[:count] for text, y, kept in zip(texts, targets, accepted, strict=True)]
    return Counter(texts)


def test_emitted_distribution_does_not_depend_on_the_draft() -> None:
    plain = joint_distribution(accepted_length, (), 3)
    assert len(plain) > 10  # a distribution worth the name
    drafts = list(product(range(WORDS), repeat=2))
    assert all(joint_distribution(accepted_length, draft, 3) == plain for draft in drafts)
    assert any(joint_distribution(one_too_many, draft, 3) != plain for draft in drafts)


def test_empty_drafts_and_ragged_lengths() -> None:
    no_drafts = torch.zeros(2, 0, dtype=torch.int64)
    assert accepted_length(no_drafts, torch.tensor([[1], [2]]), torch.tensor([0, 0])).tolist() == [0, 0]
    draft = torch.tensor([[1, 2, 3], [1, 2, 3], [1, 2, 3], [9, 2, 3]])
    target = torch.tensor([[1, 2, 3, 0], [1, 2, 3, 0], [1, 9, 3, 0], [1, 2, 3, 0]])
    assert accepted_length(draft, target, torch.tensor([3, 1, 3, 3])).tolist() == [3, 1, 1, 0]
