"""Documents as far as they are written: up to where the next response has to come.

`Rewritten` goes by tokens: the prompt is what stands before the first response token; plain text keeps a random first
part; a prompt alone is all prompt.

    document    u1 u1 a1 a1 a1 END | u2 u2 a2 a2 END
    asked       u1 u1 ..             -> b1 b1 END      answered as the document ends a turn, so the next one follows
    asked       u1 u1 b1 b1 END u2 u2 .. -> b2 b2 b2   cut by the limit: the document ends here

`Answered` goes by messages: each time the conversation so far, with the answers it got, is put through the chat
template as a chat puts it.  Where what the template makes of it does not begin with the tokens so far, as of one that
drops earlier reasoning, the turn begins a document of its own: both are trained on exactly as they were asked.
Not here: who writes the responses, and where they are kept (`regenerate.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from retrofit.recipes.text.documents import Document
from retrofit.recipes.text.faults import RowError
from retrofit.recipes.text.sources import document_rng, stable_hash
from retrofit.recipes.text.tokens import asked_tokens

SHORTEST_PROMPT = 8
NEW_TOKENS = 512
"""Most tokens of a response where neither the recipe nor a response of the row's own says how many."""


class Limits(NamedTuple):
    """window: most tokens of a document; response: of a response, None for as many as the row's own text had."""

    window: int
    response: int | None = None

    def left(self, before: int, whole: int | None) -> int:
        """Tokens that may follow `before`, of a document that was `whole` tokens long; None: it had no response."""
        if self.response is not None:
            return min(self.response, self.window - before)
        return min(NEW_TOKENS, self.window - before) if whole is None else min(whole, self.window) - before


class Rewritten:
    """A document by its tokens."""

    def __init__(self, document: Document, seed: int, limits: Limits):
        self._document, self._seed, self._limits = document, seed, limits
        self._whole = len(document.tokens) if any(document.response) else None
        self._turns = _turns(document, prompt_length(document, seed))
        """What is left to answer: where each response of the document begins and ends."""
        self._answered = 0
        self.prompt: list[int] = list(document.tokens[: self._turns[0][0]]) if self._turns else []
        """The tokens so far, which the next response goes on from."""
        self._flags = [False] * len(self.prompt)

    def limit(self) -> int:
        """Most tokens of the next response; none where nothing can be asked: no prompt, no turn left, or no room."""
        return self._limits.left(len(self.prompt), self._whole) if self._turns and self.prompt else 0

    def draw(self) -> int:
        """Seed of the next response."""
        return _draw(self._seed, self._document, self._answered)

    def take(self, response: list[int]) -> None:
        """Add a response, and the text up to the next one where this one ended as the document's own did."""
        _, end = self._turns.pop(0)
        self._answered += 1
        self.prompt += response
        self._flags += [True] * len(response)
        if not self._turns or response[-1:] != [self._document.tokens[end - 1]]:
            self._turns = []
            return
        between = self._document.tokens[end : self._turns[0][0]]
        if self._limits.left(len(self.prompt) + len(between), self._whole) <= 0:
            self._turns = []  # no room to answer, and nothing to learn from the rest
            return
        self.prompt += between
        self._flags += [False] * len(between)

    def written(self) -> Iterator[Document]:
        """The document, if any response came."""
        if self._answered:
            yield replace(self._document, tokens=tuple(self.prompt), response=tuple(self._flags), chat=None)


class Answered:
    """A conversation by its messages."""

    def __init__(self, document: Document, seed: int, limits: Limits, tokenizer: Any, ends: Collection[int]):
        """ends: tokens that end a response.  Raises RowError for messages that the template refuses."""
        assert document.chat is not None
        self._document, self._seed, self._limits = document, seed, limits
        self._tokenizer, self._ends, self._chat = tokenizer, ends, document.chat
        messages = self._chat.messages
        self._turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        self._own = len(self._turns)
        if messages[-1]["role"] != "assistant":
            self._turns.append(len(messages))
        self._said = list(messages[: self._turns[0]])
        self._answered = 0
        self._parts: list[Document] = []
        self.prompt: list[int] = self._asked()
        self._flags = [False] * len(self.prompt)

    def _asked(self) -> list[int]:
        return asked_tokens(self._chat._replace(messages=self._said), self._tokenizer, self._document.where)

    def limit(self) -> int:
        """As of `Rewritten`."""
        if self._answered == len(self._turns) or not self.prompt:
            return 0
        own = len(self._document.tokens) if self._answered < self._own else None
        return self._limits.left(len(self.prompt), own)

    def draw(self) -> int:
        """Seed of the next response."""
        return _draw(self._seed, self._document, self._answered)

    def take(self, response: list[int]) -> None:
        """Add a response, and the messages up to the next one where this one came to its end.

        What a tool answered belongs to the call that the row's own assistant made, so nothing follows then, nor where
        the assistant spoke twice.
        """
        self.prompt += response
        self._flags += [True] * len(response)
        turn = self._turns[self._answered]
        self._answered += 1
        messages, ended = self._chat.messages, response[-1:] and response[-1] in self._ends
        following = messages[turn + 1 : turn + 2]
        if self._answered == len(self._turns) or not ended or following[0]["role"] in ("tool", "assistant"):
            self._answered = len(self._turns)
            return
        text = self._tokenizer.decode(response[:-1], skip_special_tokens=True)
        self._said += [{"role": "assistant", "content": text}, *messages[turn + 1 : self._turns[self._answered]]]
        try:
            asked = self._asked()
        except RowError:  # a template need not take every answer back
            self._answered = len(self._turns)
            return
        so_far = len(self.prompt)
        if asked[:so_far] == self.prompt:
            self._flags += [False] * (len(asked) - so_far)
        else:
            self._parts.append(self._part())
            self._flags = [False] * len(asked)
        self.prompt = asked

    def _part(self) -> Document:
        name = self._document.id + (f" part {len(self._parts) + 1}" if self._parts else "")
        end = len(self._flags) - self._flags[::-1].index(True)  # what was asked and found no room teaches nothing
        tokens, flags = tuple(self.prompt[:end]), tuple(self._flags[:end])
        return replace(self._document, id=name, tokens=tokens, response=flags, chat=None)

    def written(self) -> Iterator[Document]:
        """The documents it became, one where the template keeps what it wrote; none if no response came."""
        yield from self._parts
        if any(self._flags):
            yield self._part()


def _draw(seed: int, document: Document, answered: int) -> int:
    turn = f" turn {answered}" if answered else ""
    return stable_hash(f"{seed} {document.id}{turn}") % (1 << 31)


def _turns(document: Document, prompt: int) -> list[tuple[int, int]]:
    """Where the document's responses begin and end, those after the first `prompt` tokens; where one is to come."""
    if not any(document.response):
        return [(len(document.tokens), len(document.tokens))]
    edges = np.flatnonzero(np.diff(np.asarray([False, *document.response, False], dtype=np.int8)))
    runs = [(max(int(first), prompt), int(last)) for first, last in edges.reshape(-1, 2)]
    return [(first, last) for first, last in runs if first < last]


def prompt_length(document: Document, seed: int) -> int:
    """Tokens before the first response token; of plain text a random part up to one half."""
    first = int(np.argmax(document.response)) if any(document.response) else 0
    half = len(document.tokens) // 2
    if first or half <= SHORTEST_PROMPT:
        return first or half
    return int(document_rng(seed, 0, document.id).integers(SHORTEST_PROMPT, half))
