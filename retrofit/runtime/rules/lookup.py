"""Prompt lookup: drafts that the text itself proposes, and how good they have been in it.

What followed the latest earlier occurrence of the last n tokens, n = 3, 2, 1 (Saxena 2023, "Prompt Lookup Decoding").
A text need not be decoded this way to know how that would go: each proposal is held against what came instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

LONGEST = 3
"""Tokens that an occurrence has to share at most."""
FORGETS = 1 / 12
"""Weight of the newest step in the means."""


class Lookup:
    """One text while it grows.

    Attributes: `emitted`, mean tokens of a step that verifies what is proposed, and `rows`, its mean rows; both as the
    text so far would have gone.
    """

    def __init__(self, tokens: Sequence[int], count: int):
        """count: most drafts of a proposal."""
        self.count = count
        self.tokens: list[int] = []
        self.after: dict[tuple[int, ...], int] = {}
        """Tokens -> the position behind their latest occurrence but one that ends the text."""
        self.before: list[list[int]] = [[] for _ in range(LONGEST)]
        """before[n - 1][p]: of the n tokens that end at p, the position behind their occurrence before; -1: none."""
        self.emitted = self.rows = 1.0
        for token in tokens:
            self._append(token)
        self.right = 0
        """Tokens of the proposal that have come true."""
        self.proposed = self.proposal()

    def follow(self, tokens: Sequence[int]) -> None:
        """The text is now this, which begins with what it was."""
        for token in tokens[len(self.tokens) :]:
            self.add(token)

    def add(self, token: int) -> None:
        """The text goes on with this."""
        came_true = self.right < len(self.proposed) and self.proposed[self.right] == token
        self._append(token)
        if came_true:
            self.right += 1
            return
        self.emitted += FORGETS * (1 + self.right - self.emitted)
        self.rows += FORGETS * (1 + len(self.proposed) - self.rows)
        self.right, self.proposed = 0, self.proposal()

    def proposal(self) -> list[int]:
        """Up to `count` tokens; none where nothing of the end occurred before."""
        for n in range(min(LONGEST, len(self.tokens) - 1), 0, -1):
            at = self.after.get(tuple(self.tokens[-n:]))
            if at is not None:
                return self.tokens[at : at + self.count]
        return []

    def occurrences(self, tail: Sequence[int], n: int) -> Iterator[int]:
        """Positions behind those of the last n tokens of `tail`, the latest first; n = 1 .. LONGEST."""
        at = self.after.get(tuple(tail[-n:]), -1) if n <= len(tail) else -1
        while at >= 0:
            yield at
            at = self.before[n - 1][at]

    def _append(self, token: int) -> None:
        end = len(self.tokens)
        for n, before in enumerate(self.before, 1):
            gram = tuple(self.tokens[end - n : end]) if n <= end else ()
            before.append(self.after.get(gram, -1))
            if gram:
                self.after[gram] = end
        self.tokens.append(token)
