"""Rules of a base against transformers' own processors, bit for bit, for rows in any order."""

import random
from typing import Any

import pytest
import torch
from transformers.generation.logits_process import (
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from retrofit.runtime.rules.processors import Guard, Rules, constrained

RULES = [
    Rules(no_repeat_ngram_size=1),
    Rules(no_repeat_ngram_size=2),
    Rules(no_repeat_ngram_size=4),
    Rules(eos=(1, 2), bad_words_ids=((3,), (1,), (4, 5), (4, 6), (0, 1, 0), (2, 2, 2, 7))),
    Rules(eos=(1, 2), min_length=9),
    Rules(eos=(1,), min_length=3, min_new_tokens=4),
    Rules(forced_bos_token_id=3, begin_suppress_tokens=(3, 5)),
    Rules(forced_eos_token_id=(6, 4), suppress_tokens=(4,)),
    Rules(begin_suppress_tokens=(0, 7)),
    Rules((2,), 3, ((1, 2), (5,)), 5, None, 4, (2,), (6,), (7,)),
]


def transformers_processors(rules: Rules, prompt: int, max_length: int) -> LogitsProcessorList:
    """Those of `generate`, on its conditions and in its order."""
    made: list[Any] = []
    if rules.no_repeat_ngram_size:
        made.append(NoRepeatNGramLogitsProcessor(rules.no_repeat_ngram_size))
    if rules.bad_words_ids:
        made.append(NoBadWordsLogitsProcessor([list(w) for w in rules.bad_words_ids], list(rules.eos)))
    least = rules.min_length if rules.min_new_tokens is None else prompt + rules.min_new_tokens
    if rules.eos and least > 0:
        made.append(MinLengthLogitsProcessor(least, list(rules.eos)))
    if rules.eos and rules.min_new_tokens:
        made.append(MinNewTokensLengthLogitsProcessor(prompt, rules.min_new_tokens, list(rules.eos)))
    if rules.forced_bos_token_id is not None:
        made.append(ForcedBOSTokenLogitsProcessor(rules.forced_bos_token_id))
    if rules.forced_eos_token_id:
        made.append(ForcedEOSTokenLogitsProcessor(max_length, list(rules.forced_eos_token_id)))
    if rules.suppress_tokens:
        made.append(SuppressTokensLogitsProcessor(rules.suppress_tokens))
    if rules.begin_suppress_tokens:
        begin = prompt if prompt > 1 or rules.forced_bos_token_id is None else prompt + 1
        made.append(SuppressTokensAtBeginLogitsProcessor(rules.begin_suppress_tokens, begin))
    return LogitsProcessorList(made)


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_rules_are_bitwise_those_of_transformers(rules: Rules) -> None:
    """Texts over 8 tokens, so that everything repeats; they grow between calls, as a request's does."""
    rng = random.Random(0)
    generator = torch.Generator().manual_seed(1)
    guards = [Guard(rules, [rng.randrange(8) for _ in range(prompt)], prompt + 6) for prompt in (1, 1, 2, 3, 7, 12) * 3]
    prompts = [len(guard.tokens) for guard in guards]
    for _ in range(6):
        rows = [rng.randrange(len(guards)) for _ in range(40)]
        paths = [[rng.randrange(8) for _ in range(rng.randrange(5))] for _ in rows]
        scores = torch.randn(len(rows), 8, generator=generator)
        before = scores.clone()
        got = constrained(scores, [guards[r] for r in rows], paths)
        for n, (row, path) in enumerate(zip(rows, paths, strict=True)):
            ids = torch.tensor([[*guards[row].tokens, *path]])
            processors_ = transformers_processors(rules, prompts[row], guards[row].max_length)
            assert torch.equal(got[n : n + 1], processors_(ids, scores[n : n + 1])), (ids, rules)
            assert torch.equal(constrained(scores[n : n + 1], [guards[row]], [path])[0], got[n])
        assert torch.equal(scores, before)
        for guard in guards:
            guard.tokens += [rng.randrange(8) for _ in range(rng.randrange(3))]


def test_what_is_not_known_yet_bans_nothing() -> None:
    guard = Guard(Rules(no_repeat_ngram_size=2, bad_words_ids=((3, 4),)), [1, 2, 3], 99)
    assert guard.banned([-1]) == set()
    assert guard.banned([-1, 2]) == {3}
    assert guard.banned([2, -1, 2]) == {3, -1}
    assert torch.isinf(constrained(torch.zeros(1, 8), [guard], [[2, -1, 2]])).nonzero().tolist() == [[0, 3]]
