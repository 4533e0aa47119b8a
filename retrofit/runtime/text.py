"""Tokens to text while they come, in time linear in the output, and the stop strings that end it.

    text of n tokens      fixed ....................... | tail
    later tokens          leave it as it is             | may change it: half a character, which decodes to U+FFFD

A token is decoded beside the few before it (`DecodeStream` of `tokenizers`, or the same window by hand for a tokenizer
that is not of that library), never the whole output again.  Stop strings may hold special tokens, which the text leaves
out, so under stop strings a second text with them grows beside the first.
Where a tokenizer spells unknown characters in bytes and a broken one follows a whole one, decoding both together takes
the whole one back: what was sent stays sent, and `Result.text` is the text of all tokens.
Not here: what the end of an output means to a request (`request.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, cast

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

HALF = "\ufffd"
"""What bytes decode to that are no character, or not yet."""
WINDOW = 16
"""So many tokens are waited for while their text ends in HALF, or does not grow; then all but the last count."""
LONGEST = 4
"""Tokens that a character may have: one for each byte."""


class Detokenizer:
    """Text of token ids by one tokenizer."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self.backend: Tokenizer | None = backend if isinstance(backend, Tokenizer) else None

    def decode(self, tokens: Sequence[int], special: bool = False) -> str:
        """Text of all these tokens; special: with special tokens."""
        return str(
            self.tokenizer.decode(list(tokens), skip_special_tokens=not special, clean_up_tokenization_spaces=False)
        )

    @cached_property
    def special_tokens(self) -> frozenset[int]:
        """Tokens that `decode` leaves out, where the backend says."""
        added = {} if self.backend is None else self.backend.get_added_tokens_decoder()
        return frozenset(token for token, what in added.items() if what.special)


class Growing:
    """The text of a list of tokens that grows at its end.  Keeps the last characters, as far as they are needed."""

    def __init__(self, detokenizer: Detokenizer, special: bool = False):
        self.detokenizer, self.special = detokenizer, special
        self.left_out = frozenset() if special else detokenizer.special_tokens
        self.stream = None if detokenizer.backend is None else DecodeStream(skip_special_tokens=not special)
        self.context: list[int] = []
        """The tokens before `pending`, decoded with them for what only neighbours tell, such as a space."""
        self.pending: list[int] = []
        """Tokens whose text is the tail."""
        self.start = 0
        """Characters before `recent`, which are not kept."""
        self.recent = ""
        self.tail = ""
        self.lengths = [0]
        """Characters of the text after each number of tokens."""

    @property
    def fixed(self) -> int:
        """Characters that later tokens cannot change."""
        return self.start + len(self.recent)

    def add(self, token: int) -> None:
        if token not in self.left_out:
            self._grow(token)
        self.lengths.append(self.fixed + len(self.tail))

    def _grow(self, token: int) -> None:
        self.pending.append(token)
        new = self._streamed(token)
        if new is not None:
            self._fix(new, len(self.pending))
            return
        self.tail = self._beside(self.pending)
        if self.stream is None and self.tail and not self.tail.endswith(HALF):
            self._fix(self.tail, len(self.pending))
        elif len(self.pending) >= WINDOW:
            self.stream = None  # it would go on waiting, with ever more tokens
            settled = len(self.pending) - LONGEST
            self._fix(self._beside(self.pending[:settled]), settled)
            self.tail = self._beside(self.pending)

    def _beside(self, tokens: list[int]) -> str:
        """The text of tokens that follow the context."""
        before = self.detokenizer.decode(self.context, self.special)
        return self.detokenizer.decode([*self.context, *tokens], self.special)[len(before) :]

    def _fix(self, text: str, tokens: int) -> None:
        """The text of so many pending tokens is final."""
        self.recent, self.tail = self.recent + text, ""
        self.context, self.pending = self.pending[:tokens], self.pending[tokens:]

    def _streamed(self, token: int) -> str | None:
        if self.stream is None:
            return None
        try:
            return self.stream.step(cast(Tokenizer, self.detokenizer.backend), token)
        except Exception:  # its prefix changed under it: a decoder that looks further back than a stream can
            self.stream = None
            return None

    def forget(self, end: int) -> None:
        """Nobody asks for the characters before `end` any more."""
        gone = min(end, self.fixed) - self.start
        if gone > 0:
            self.recent = self.recent[gone:]
            self.start += gone

    def find(self, text: str, begin: int) -> int | None:
        """Where this text first stands at or after character `begin`."""
        at = (self.recent + self.tail).find(text, max(0, begin - self.start))
        return None if at < 0 else self.start + at

    def settled(self) -> str:
        """The characters that are kept, but for half ones that may become whole."""
        return self.recent + self.tail.rstrip(HALF)


class Text:
    """The output of one request as text, token by token: where a stop string cuts it, and what can be sent already."""

    def __init__(self, detokenizer: Detokenizer, stops: Sequence[str] = (), sent: bool = True):
        """sent: whether `take` will be called."""
        self.detokenizer, self.stops = detokenizer, tuple(stops)
        self.plain = Growing(detokenizer)
        self.spelled = Growing(detokenizer, special=True) if stops else None
        self.kept = max(map(len, stops), default=0)
        """Characters before the fixed end that a stop string may begin in."""
        self.sent = 0 if sent else None
        """Characters taken so far."""
        self.cut: int | None = None
        """Characters before the stop string that is complete."""
        self.longer = 0
        """Characters that the text of all tokens has more than the one that grew."""

    def add(self, token: int) -> str | None:
        """The next token; returns the stop string that it completes, of several the one that begins first."""
        texts = [text for text in (self.plain, self.spelled) if text is not None]
        before = [text.fixed for text in texts]
        for text in texts:
            text.add(token)
        found = [
            (at if text is self.plain else self._before(at), stop)
            for text, begin in zip(texts, before, strict=True)
            for stop in self.stops
            if (at := text.find(stop, begin - len(stop) + 1)) is not None
        ]
        self._forget()
        if not found:
            return None
        self.cut, stop = min(found, key=lambda one: one[0])
        return stop

    def ended(self, whole: str, tokens: int, stopped: bool = False) -> str:
        """The finished output; stopped: before its stop string.  whole: the text of so many tokens, decoded at once.

        Where a broken character has taken whole ones back it is longer or shorter than the text that grew, and alike
        from there on: what is left to say is counted from the end.
        """
        self.longer = len(whole) - self.plain.lengths[tokens]
        return whole[: max(0, self.cut + self.longer)] if stopped and self.cut is not None else whole

    def take(self, whole: str | None = None) -> str:
        """New text that later tokens cannot change, so no possible start of a stop string; whole: from `ended`."""
        assert self.sent is not None
        if whole is not None:
            return whole[max(0, self.sent + self.longer) :]
        end = self._stable()
        text = (self.plain.recent + self.plain.tail)[self.sent - self.plain.start : max(0, end - self.plain.start)]
        self.sent += len(text)
        self._forget()
        return text

    def _stable(self) -> int:
        ends = []
        for text in (self.plain, self.spelled):
            if text is None:
                continue
            settled = text.settled()
            end = text.start + len(settled)
            if text is self.plain:
                ends.append(end)
            for stop in self.stops:
                if size := _overlap(settled, stop):
                    ends.append(end - size if text is self.plain else self._before(end - size))
        return min(ends)

    def _before(self, end: int) -> int:
        """How much of the text without special tokens stands before character `end` of that with them."""
        assert self.spelled is not None
        plain, spelled = self.plain.lengths, self.spelled.lengths
        whole = next(n for n in range(len(spelled) - 1, -1, -1) if spelled[n] <= end)
        if whole == len(spelled) - 1:
            return plain[whole]
        # A special token adds nothing to the text; of another the characters before `end` belong to it.
        return (
            min(plain[whole + 1], plain[whole] + end - spelled[whole])
            if plain[whole + 1] > plain[whole]
            else plain[whole]
        )

    def _forget(self) -> None:
        end = self.plain.fixed - self.kept
        self.plain.forget(end if self.sent is None else min(end, self.sent))
        if self.spelled is not None:
            self.spelled.forget(self.spelled.fixed - self.kept)


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of the text that are the beginning of the stop string."""
    return next((n for n in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:n])), 0)
