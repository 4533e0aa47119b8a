"""Tokens that a base's own settings forbid or force: the processors of transformers' `generate`, for rows in any order.

    ids of a row     prompt + emitted (seed included) | drafts on the row's own path
    scores           bias, penalties -> rules -> temperature, top-k, top-p, min-p

One forward holds many rows of one text, so what a text has so far is kept once (`Guard`) and each row adds its path.
A row's result does not depend on the rows beside it.  Not here: where rules come from (`settings.py`), the penalty and
the warpers (`sampling.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

Constrain = Callable[[Tensor], Tensor]
"""Scores [R, V] to scores [R, V]."""


@dataclass(frozen=True)
class Rules:
    """What is forbidden or forced, by the names a generation_config has for it; token ids are inside the vocabulary."""

    eos: tuple[int, ...] = ()
    """Tokens that end a text; without any, no minimum length holds."""
    no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    min_length: int = 0
    """Of prompt and output together."""
    min_new_tokens: int | None = None
    """Stands in for `min_length` where it is given."""
    forced_bos_token_id: int | None = None
    """First token after a prompt of one token."""
    forced_eos_token_id: tuple[int, ...] = ()
    """What the last token that may be emitted must be one of."""
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    """What a minimum keeps off beside EOS.  Unlike EOS, bad words may hold them."""

    @property
    def active(self) -> bool:
        """Whether anything is forbidden or forced at all."""
        return (
            self.no_repeat_ngram_size > 0
            or bool(self.bad_words_ids or self.suppress_tokens or self.begin_suppress_tokens)
            or (bool(self.eos or self.stop_tokens) and max(self.min_length, self.min_new_tokens or 0) > 0)
            or self.forced_bos_token_id is not None
            or bool(self.forced_eos_token_id)
        )

    @cached_property
    def bad_tokens(self) -> tuple[int, ...]:
        """Bad words of one token; EOS is none."""
        return tuple(word[0] for word in self.bad_words_ids if len(word) == 1 and word[0] not in self.eos)

    @cached_property
    def bad_endings(self) -> dict[tuple[int, ...], frozenset[int]]:
        """Longer bad words: all but their last token -> the tokens that would complete one."""
        endings: dict[tuple[int, ...], set[int]] = {}
        for word in self.bad_words_ids:
            if len(word) > 1:
                endings.setdefault(word[:-1], set()).add(word[-1])
        return {beginning: frozenset(ends) for beginning, ends in endings.items()}

    @cached_property
    def bad_lengths(self) -> tuple[int, ...]:
        return tuple(sorted({len(beginning) for beginning in self.bad_endings}))


class Guard:
    """The rules over one text.  `tokens` is the request's own list, which grows as tokens are emitted."""

    def __init__(self, rules: Rules, tokens: list[int], max_length: int):
        """tokens: the prompt so far; max_length: of prompt and output, as asked for, before any cut to the context."""
        self.rules, self.tokens, self.max_length = rules, tokens, max_length
        prompt = len(tokens)
        self.min_length = rules.min_length if rules.min_new_tokens is None else prompt + rules.min_new_tokens
        self.begin = prompt + (prompt == 1 and rules.forced_bos_token_id is not None)
        self._followers: dict[tuple[int, ...], set[int]] = {}
        """All but the last token of each n-gram so far -> the last tokens it had."""
        self._indexed = 0

    def banned(self, path: Sequence[int]) -> set[int]:
        """Tokens that may not come after the text and the path, but for those that are banned in every row."""
        found: set[int] = set()
        length = len(self.tokens) + len(path)
        if length < self.min_length:
            found.update(self.rules.eos, self.rules.stop_tokens)
        for size in self.rules.bad_lengths:
            if size <= length:
                found |= self.rules.bad_endings.get(self._tail(path, size), frozenset())
        if self.rules.no_repeat_ngram_size > 0 and length >= self.rules.no_repeat_ngram_size:
            found |= self._repeats(path)
        return found

    def forced(self, path: Sequence[int]) -> tuple[int, ...]:
        """Tokens of which the next must be one; empty: any."""
        length = len(self.tokens) + len(path)
        if self.rules.forced_eos_token_id and length == self.max_length - 1:
            return self.rules.forced_eos_token_id
        if self.rules.forced_bos_token_id is not None and length == 1:
            return (self.rules.forced_bos_token_id,)
        return ()

    def begins(self, path: Sequence[int]) -> bool:
        """Whether the next token is the first that is the model's own."""
        return len(self.tokens) + len(path) == self.begin

    def _tail(self, path: Sequence[int], size: int) -> tuple[int, ...]:
        """The last `size` tokens of the text and the path."""
        if size <= len(path):
            return tuple(path[len(path) - size :])
        return (*self.tokens[len(self.tokens) - (size - len(path)) :], *path)

    def _repeats(self, path: Sequence[int]) -> set[int]:
        """Tokens that would complete an n-gram which the text and the path hold already."""
        size = self.rules.no_repeat_ngram_size
        for end in range(max(self._indexed, size - 1), len(self.tokens)):
            beginning = tuple(self.tokens[end + 1 - size : end])
            self._followers.setdefault(beginning, set()).add(self.tokens[end])
        self._indexed = len(self.tokens)
        tail = self._tail(path, size - 1)
        found = set(self._followers.get(tail, ()))
        for end in range(len(path)):
            if len(self.tokens) + end + 1 >= size and self._tail(path[:end], size - 1) == tail:
                found.add(path[end])
        return found


def constrained(scores_RV: Tensor, guards: Sequence[Guard], paths: Sequence[Sequence[int]]) -> Tensor:
    """Scores after the rules, in the order of `generate`: what is banned, what is forced, what is suppressed.

    Row r follows the text of guards[r] and then paths[r]; a path of diffusion may hold tokens below 0, which are not
    known yet.  Returns a new tensor, banned tokens at -inf, forced ones at 0.
    """
    if not guards:
        return scores_RV
    rules, vocab, device = guards[0].rules, scores_RV.shape[1], scores_RV.device
    scores = scores_RV.clone()
    if rules.bad_tokens:
        scores.masked_fill_(_mask(rules.bad_tokens, vocab, device), -math.inf)
    banned = [
        (row, token)
        for row, (guard, path) in enumerate(zip(guards, paths, strict=True))
        for token in guard.banned(path)
        if token >= 0
    ]
    if banned:
        rows, tokens = torch.tensor(banned, device=device).T
        scores[rows, tokens] = -math.inf
    for row, (guard, path) in enumerate(zip(guards, paths, strict=True)):
        if must := guard.forced(path):
            scores[row] = -math.inf
            scores[row, list(must)] = 0.0
    if rules.suppress_tokens:
        scores.masked_fill_(_mask(rules.suppress_tokens, vocab, device), -math.inf)
    if rules.begin_suppress_tokens:
        begins = [guard.begins(path) for guard, path in zip(guards, paths, strict=True)]
        first = torch.tensor(begins, device=device)[:, None]
        scores.masked_fill_(first & _mask(rules.begin_suppress_tokens, vocab, device), -math.inf)
    return scores


@lru_cache(maxsize=8)
def _mask(tokens: tuple[int, ...], vocab: int, device: torch.device) -> Tensor:
    """bool [V]: which tokens are among these."""
    mask = torch.zeros(vocab, dtype=torch.bool, device=device)
    mask[list(tokens)] = True
    return mask
