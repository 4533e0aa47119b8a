"""Prompt lookup against a plain search, and what it would have done in a text against decoding that way."""

from __future__ import annotations

import random

from retrofit.runtime.rules.lookup import FORGETS, Lookup


def plainly(tokens: list[int], count: int, longest: int = 3) -> list[int]:
    """What followed the latest earlier occurrence of the last n tokens."""
    for n in range(min(longest, len(tokens) - 1), 0, -1):
        for i in range(len(tokens) - n - 1, -1, -1):
            if tokens[i : i + n] == tokens[-n:]:
                return tokens[i + n : i + n + count]
    return []


def test_proposals_against_a_plain_search() -> None:
    rng = random.Random(0)
    proposed = 0
    for _ in range(300):
        tokens = [rng.randrange(5) for _ in range(rng.randrange(1, 30))]
        begin = rng.randrange(1, len(tokens) + 1)
        found = Lookup(tokens[:begin], 4)
        for end in range(begin, len(tokens) + 1, rng.choice([1, 3])):
            found.follow(tokens[:end])
            assert found.proposal() == plainly(tokens[:end], 4)
            proposed += bool(found.proposal())
    assert proposed > 300
    assert Lookup([5, 6, 7, 5, 6], 2).proposal() == [7, 5]
    assert Lookup([1], 4).proposal() == Lookup([1, 2, 3], 4).proposal() == []


def test_what_it_would_have_done_is_what_decoding_that_way_does() -> None:
    """However the text came: token by token, or several in a step."""
    rng = random.Random(1)
    for _ in range(50):
        text = [rng.randrange(4) for _ in range(60)]
        emitted = rows = 1.0
        at = 10
        while at < len(text):
            proposal = plainly(text[:at], 4)
            right = 0
            while right < len(proposal) and at + right < len(text) and text[at + right] == proposal[right]:
                right += 1
            if at + right >= len(text):
                break
            emitted += FORGETS * (1 + right - emitted)
            rows += FORGETS * (1 + len(proposal) - rows)
            at += right + 1
        found, end = Lookup(text[:10], 4), 10
        while end < len(text):
            end = min(len(text), end + rng.randrange(1, 6))
            found.follow(text[:end])
        assert (found.emitted, found.rows) == (emitted, rows)
