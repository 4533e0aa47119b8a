"""What a text proposes behind any path of drafts, and with which chance it comes true.

The last three tokens of text and path are looked up (`lookup.py`), else two, else one.  An occurrence that shares more
tokens is right more often, how much more is a matter of the text: so each text keeps its record by match length, which
begins at what texts in general have.  Of several occurrences with different next tokens the longest is asked first; the
others share what it leaves.  Not here: the index, the tree.
"""

from __future__ import annotations

from collections.abc import Sequence

from retrofit.runtime.rules.lookup import LONGEST, Lookup

LONGEST_MATCH = 16
"""Tokens beyond which a match is not followed back."""
OCCURRENCES = 12
"""Latest occurrences that are looked at."""
PROPOSED = 2
"""Different next tokens that are proposed at most."""
FROM = (1, 2, 3, 4, 5, 7, 10, 14)
"""Shortest match of each line of the record."""
USUAL = (0.12, 0.4, 0.55, 0.65, 0.7, 0.75, 0.85, 0.9)
"""How often the first proposal of each line comes true in texts in general."""
WEIGHT = 6.0
"""Proposals that counts for."""
SURE = 0.98
"""No chance is larger: survival has to fall along a path."""

LINE = [sum(least <= n for least in FROM) - 1 for n in range(LONGEST_MATCH + 1)]
"""Line of the record of each match length from 1 on."""


class Continuations:
    """Of one text while it grows.  right[i] of tried[i] first proposals of line i came true."""

    def __init__(self, lookup: Lookup):
        """lookup: of the text, which from now on grows by this."""
        self.lookup = lookup
        self.tried = [WEIGHT] * len(FROM)
        self.right = [WEIGHT * usual for usual in USUAL]

    def follow(self, tokens: Sequence[int]) -> None:
        """The text is now this: hold what was proposed for its new tokens against them."""
        for token in tokens[len(self.lookup.tokens) :]:
            if found := self._found(()):
                proposed, length = found[0]
                self.tried[LINE[length]] += 1
                self.right[LINE[length]] += proposed == token
            self.lookup.add(token)

    def next(self, path: Sequence[int]) -> list[tuple[int, float]]:
        """Tokens that may follow text and path, with their chances, the largest first."""
        left, proposed = SURE, []
        for token, length in self._found(path)[:PROPOSED]:
            line = LINE[length]
            chance = left * self.right[line] / self.tried[line]
            proposed.append((token, chance))
            left -= chance
        return proposed

    def _found(self, path: Sequence[int]) -> list[tuple[int, int]]:
        """(token, tokens shared) of different next tokens, the longest match first, then the latest."""
        text = self.lookup.tokens
        tail = [*text[-LONGEST_MATCH:], *path][-LONGEST_MATCH:]
        shared: dict[int, int] = {}
        for n in range(LONGEST, 0, -1):
            for count, at in enumerate(self.lookup.occurrences(tail, n)):
                if count == OCCURRENCES:
                    break
                length = n
                while length < min(at, len(tail)) and text[at - 1 - length] == tail[-1 - length]:
                    length += 1
                shared[text[at]] = max(shared.get(text[at], 0), length)
            if shared:
                break
        return sorted(shared.items(), key=lambda item: -item[1])
