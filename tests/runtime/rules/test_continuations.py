"""What a text proposes behind drafts, against a plain search; and the record of how often that comes true."""

from __future__ import annotations

import random

import pytest

from retrofit.runtime.rules.continuations import (
    FROM,
    LINE,
    LONGEST_MATCH,
    OCCURRENCES,
    PROPOSED,
    SURE,
    USUAL,
    WEIGHT,
    Continuations,
)
from retrofit.runtime.rules.lookup import LONGEST, Lookup


def plainly(text: list[int], path: list[int]) -> list[tuple[int, int]]:
    """(token, tokens shared with the whole of text and path) of the occurrences of their end, the longest first."""
    whole = [*text, *path]
    for n in range(LONGEST, 0, -1):
        found: dict[int, int] = {}
        ends = [e for e in range(len(text) - 1, n - 1, -1) if n <= len(whole) and text[e - n : e] == whole[-n:]]
        for end in ends[:OCCURRENCES]:
            length = n
            while length < LONGEST_MATCH and length < end and text[end - 1 - length] == whole[-1 - length]:
                length += 1
            found[text[end]] = max(length, found.get(text[end], 0))
        if found:
            return sorted(found.items(), key=lambda item: -item[1])
    return []


def test_what_is_proposed_behind_a_path_against_a_plain_search() -> None:
    rng = random.Random(0)
    proposed = 0
    for _ in range(300):
        text = [rng.randrange(4) for _ in range(rng.randrange(1, 60))]
        path = [rng.randrange(4) for _ in range(rng.randrange(4))]
        found = Continuations(Lookup(text, 4)).next(path)
        want = plainly(text, path)[:PROPOSED]
        left, chances = SURE, []
        for token, length in want:
            chances.append((token, pytest.approx(left * USUAL[LINE[length]])))
            left -= left * USUAL[LINE[length]]
        assert found == chances
        proposed += len(found)
    assert proposed > 300


def test_the_record_is_what_came_true_in_this_text_however_it_came() -> None:
    rng = random.Random(1)
    for _ in range(20):
        text = [rng.randrange(3) for _ in range(50)]
        tried, right = [WEIGHT] * len(FROM), [WEIGHT * usual for usual in USUAL]
        for end in range(10, len(text)):
            if found := plainly(text[:end], []):
                token, length = found[0]
                tried[LINE[length]] += 1
                right[LINE[length]] += token == text[end]
        known, end = Continuations(Lookup(text[:10], 4)), 10
        while end < len(text):
            end = min(len(text), end + rng.randrange(1, 6))
            known.follow(text[:end])
        assert (known.tried, known.right) == (tried, right)
        assert known.lookup.proposal() == Lookup(text, 4).proposal()
