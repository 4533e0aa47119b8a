"""Texts as token ids to be scored: a context with its continuation, and windows over a long text.

Windows are those of lm-evaluation-harness, so that both score the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

Pair = tuple[list[int], list[int]]
"""Context, at least one token, and continuation, at least one."""


def pair_of(tokenizer: Any, context: str, continuation: str) -> Pair:
    """A context and what follows it, split at the first token that the continuation has a part in.

    So where a token spans both (`(self` after `(`), every option of an item is scored on all of its text.
    """
    alone, whole = list(tokenizer(context)["input_ids"]), list(tokenizer(context + continuation)["input_ids"])
    shared = next((n for n, (a, b) in enumerate(zip(alone, whole, strict=False)) if a != b), len(alone))
    split = max(1, min(shared, len(whole) - 1))
    return whole[:split], whole[split:]


def windows(tokens: Sequence[int], prefix: int, room: int) -> Iterator[Pair]:
    """Every token of a text once as a continuation, in windows of `room` tokens, context included.

    prefix: the token before the first.  Each later window has one token of context, the last one as much as fits.
    """
    first = list(tokens[: room - 1])
    if first:
        yield [prefix], first
    for start in range(len(first), len(tokens), room - 1):
        end = min(start + room - 1, len(tokens))
        begin = max(0, min(start - 1, end - room))
        yield list(tokens[begin:start]), list(tokens[start:end])


def prefix_of(tokenizer: Any) -> int | None:
    """The token that a text begins after: BOS, else EOS; None where the tokenizer has neither."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
