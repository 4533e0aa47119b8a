"""One request: its tokens, how far its base K/V is committed, what was drafted for it, where it ends.

    tokens      prompt ............ | emitted ........ seed
    position    0 .. n-1            | n ..             p
    committed   K/V of positions < p ("the seed is not in the cache yet")

Not here: the model, sampling, which rows to run.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from retrofit.adapters.given import Given
from retrofit.runtime.results import Logprobs, Stats
from retrofit.runtime.rules.continuations import Continuations
from retrofit.runtime.rules.lookup import Lookup
from retrofit.runtime.rules.processors import Guard, Rules
from retrofit.runtime.rules.sampling import Processing
from retrofit.runtime.rules.tree import DraftTree
from retrofit.runtime.text import Detokenizer, Text


@dataclass(eq=False)
class Request:
    """State of one generation.  Engine code calls `emit` with tokens in order; it cuts and ends by itself."""

    index: int
    prompt: list[int]
    seed: int
    max_new_tokens: int
    """Already clipped to the context."""
    eos: frozenset[int]
    text: Text | None = None
    """The output as text while it grows; None: nobody asks before its end."""
    stop_tokens: frozenset[int] = frozenset()
    """End the text before themselves, as stop strings do."""
    asked: int | None = None
    """`max_new_tokens` before it was clipped; None: it was not."""
    prompt_index: int = 0
    sample: int = 0
    """Which output of its prompt."""
    prefix: Prefix | None = None
    """What the outputs of one prompt share; None: it has only this one."""
    processing: Processing | None = None
    """How its tokens are chosen; None: as the run's."""
    rules: Rules | None = None
    """What is forbidden and forced; None: nothing."""
    group: int = 0
    """Requests of one group have equal processing and rules."""
    top: int | None = None
    """So many likeliest tokens are told with each emitted one; None: no log-probabilities."""
    prompt_top: int | None = None
    """The same for the tokens of the prompt."""
    given: Given | None = None
    """The prompt as the text decoder takes it in, where it has images."""

    slot: int = -1
    tokens: list[int] = field(default_factory=list)
    committed: int = 0
    kept: int = 0
    """Positions from the beginning whose K/V were kept for other texts, or came from there."""
    long_rope: bool = False
    """Whether the cached K/V were computed beyond a longrope boundary."""
    drafts: list[int] = field(default_factory=list)
    """Drafted tokens: a chain, or the nodes of `tree` in its order."""
    tree: DraftTree | None = None
    """What the drafts hang on where they branch; None: each follows the one before."""
    lookup: Lookup | None = None
    """What the text itself proposes; None: nobody asks."""
    continuations: Continuations | None = None
    """The same behind drafts, with chances, for `hybrid`."""
    came_true: tuple[Tensor, Tensor | None] | None = None
    """For `hybrid`: the drafting rows of the block that came true, hidden [D, H], and logits [D, V] where the forward
    made them."""
    confidence: list[float] = field(default_factory=list)
    """Per draft: probability that it is accepted, given all before it are.  Empty without a confidence head."""
    block: list[int] = field(default_factory=list)
    """Diffusion: the seed, then what was filled in and is to be committed; empty: nothing.  Infilling: the gap between
    the seed and known tokens, `MASK` where unknown."""
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    """The stop token or string that ended it."""
    logprobs: list[Logprobs] = field(default_factory=list)
    prompt_logprobs: list[Logprobs | None] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)
    seen: Tensor | None = None
    """bool [V] tokens of prompt and output, kept only under a repetition penalty."""
    counts: Tensor | None = None
    """fp32 [V] how often each token is in the output, kept only under a presence or frequency penalty."""
    guard: Guard | None = None
    """The base's rules over this text, where it has any."""
    started: float = 0.0

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    @property
    def emitted(self) -> list[int]:
        return self.tokens[len(self.prompt) :]

    @property
    def output_index(self) -> int:
        """Index of the next token to be emitted; keys its noise."""
        return len(self.tokens) - len(self.prompt)

    @property
    def remaining(self) -> int:
        return self.max_new_tokens - self.output_index

    @property
    def position(self) -> int:
        """Of the seed, the newest token."""
        return len(self.tokens) - 1

    @property
    def done(self) -> bool:
        return self.finish_reason is not None

    def drop_drafts(self) -> None:
        self.drafts, self.confidence, self.tree, self.came_true = [], [], None, None

    def guarded(self) -> None:
        """Put the text under its rules."""
        limit = len(self.prompt) + (self.asked or self.max_new_tokens)
        self.guard = Guard(self.rules or Rules(), self.tokens, limit)

    def looked_up(self, count: int) -> Lookup:
        """Prompt lookup of the text as it is; count: most drafts of a proposal."""
        if self.lookup is None:
            self.lookup = Lookup(self.tokens, count)
        (self.continuations or self.lookup).follow(self.tokens)
        return self.lookup

    def continued(self, count: int) -> Continuations:
        """What the text as it is proposes behind drafts; count: as of `looked_up`."""
        if self.continuations is None:
            self.continuations = Continuations(self.looked_up(count))
        self.continuations.follow(self.tokens)
        return self.continuations

    def watch(self, vocab: int, device: torch.device, seen: bool = True, counts: bool = False) -> None:
        """Start keeping `seen`, `counts`."""
        if seen:
            self.seen = torch.zeros(vocab, dtype=torch.bool, device=device)
            self.seen[torch.tensor(self.tokens, device=device)] = True
        if counts:
            emitted = torch.tensor(self.emitted, dtype=torch.int64, device=device)
            self.counts = torch.bincount(emitted, minlength=vocab).float()

    def emit(self, tokens: Sequence[int], *, prefill: bool = False) -> int:
        """Append tokens up to the first that ends the request; returns how many were taken.

        Ends at EOS (kept), at a stop token or the token completing a stop string (kept in `tokens`, cut from the text),
        at the limit.
        """
        taken = 0
        for token in tokens:
            self.tokens.append(token)
            taken += 1
            if self.seen is not None:
                self.seen[token] = True
            if self.counts is not None:
                self.counts[token] += 1
            stop = None if self.text is None else self.text.add(token)
            if token in self.eos:
                self.finish_reason = "stop"
            elif token in self.stop_tokens or stop is not None:
                self.finish_reason = "stop"
                self.stop_reason = token if token in self.stop_tokens else stop
            elif self.remaining <= 0:
                self.finish_reason = "length"
            if self.done:
                break
        if not prefill:
            self.stats.tokens += taken
        if self.done:
            self.stats.seconds = time.perf_counter() - self.started
        return taken

    def whole_text(self, detokenizer: Detokenizer) -> str:
        """The finished output without special tokens, cut before the stop string or token."""
        at_token = self.stop_reason is not None and self.tokens[-1] in self.stop_tokens
        tokens = self.emitted[:-1] if at_token else self.emitted
        text = detokenizer.decode(tokens)
        return text if self.text is None else self.text.ended(text, len(tokens), self.stop_reason is not None)


@dataclass(eq=False)
class Prefix:
    """A prompt that several requests continue: the first to run prefills it, the others copy what that left."""

    waiting: int
    """Requests that have not started."""
    kept: Any = None
    """The prompt's K/V, as the cache gave it out; None: not prefilled yet."""
    logits: Tensor | None = None
    """[V] after the prompt's last token."""
    logprobs: list[Logprobs | None] = field(default_factory=list)
