"""One request: its tokens, how far its base K/V is committed, what was drafted for it, and its statistics.

    tokens      prompt ............ | emitted ........ seed
    position    0 .. n-1            | n ..             p
    committed   K/V of positions < p ("the seed is not in the cache yet")

Not here: the model, sampling, which rows to run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from retrofit.runtime.rules.processors import Guard, Rules
from retrofit.runtime.rules.tree import DraftTree

CYCLES = ("ar", "verify", "fused")
"""Kinds of forward that end a verify cycle; a `draft` forward belongs to the cycle of the drafts it makes."""


@dataclass
class Stats:
    """What one request cost.  TPF = tokens / all forwards after prefill; tau = tokens / verify cycles."""

    forwards: dict[str, int] = field(default_factory=dict)
    """Forwards that held rows of this request, by kind."""
    rows: int = 0
    """Rows run after prefill, base and draft."""
    widest: int = 0
    """Most rows of this request in one forward after prefill."""
    tokens: int = 0
    """Tokens emitted after prefill, up to and including EOS, none after the end."""
    accepted: list[int] = field(default_factory=list)
    """Accepted drafts of each verify cycle."""
    verified: list[int] = field(default_factory=list)
    """Verified drafts of each verify cycle."""
    seconds: float = 0.0
    """From admission to the last token."""
    prefill_seconds: float = 0.0

    @property
    def decode_forwards(self) -> int:
        return sum(n for kind, n in self.forwards.items() if kind != "prefill")

    @property
    def tpf(self) -> float:
        return self.tokens / self.decode_forwards if self.decode_forwards else 0.0

    @property
    def tau(self) -> float:
        cycles = sum(self.forwards.get(kind, 0) for kind in CYCLES)
        return self.tokens / cycles if cycles else 0.0

    @property
    def rows_per_token(self) -> float:
        return self.rows / self.tokens if self.tokens else 0.0

    def count(self, kind: str, rows: int) -> None:
        """One forward of `kind` held so many rows of this request."""
        self.forwards[kind] = self.forwards.get(kind, 0) + 1
        if kind != "prefill":
            self.rows += rows
            self.widest = max(self.widest, rows)

    def to_dict(self) -> dict[str, object]:
        return {
            "tokens": self.tokens,
            "forwards": dict(self.forwards),
            "rows": self.rows,
            "widest": self.widest,
            "rows_per_token": round(self.rows_per_token, 4),
            "tpf": round(self.tpf, 4),
            "tau": round(self.tau, 4),
            "accepted": list(self.accepted),
            "verified": list(self.verified),
            "seconds": round(self.seconds, 6),
            "prefill_seconds": round(self.prefill_seconds, 6),
        }


@dataclass(eq=False)
class Request:
    """State of one generation.  Engine code calls `emit` with tokens in order; it cuts and ends by itself."""

    index: int
    prompt: list[int]
    seed: int
    max_new_tokens: int
    """Already clipped to the context."""
    eos: frozenset[int]
    stop: tuple[str, ...] = ()
    decode: Callable[[Sequence[int]], str] | None = None
    """Text of token ids without special tokens; needed for stop strings."""
    spell: Callable[[Sequence[int]], str] | None = None
    """Text of token ids with special tokens, of which stop strings may be made; None: there are none."""
    stop_tokens: frozenset[int] = frozenset()
    """End the text before themselves, as stop strings do."""
    asked: int | None = None
    """`max_new_tokens` before it was clipped; None: it was not."""

    slot: int = -1
    tokens: list[int] = field(default_factory=list)
    committed: int = 0
    long_rope: bool = False
    """Whether the cached K/V were computed beyond a longrope boundary."""
    drafts: list[int] = field(default_factory=list)
    """Drafted tokens: a chain, or the nodes of `tree` in its order."""
    tree: DraftTree | None = None
    """What the drafts hang on where they branch; None: each follows the one before."""
    confidence: list[float] = field(default_factory=list)
    """Per draft: probability that it is accepted, given all before it are.  Empty without a confidence head."""
    block: list[int] = field(default_factory=list)
    """Diffusion: the block being filled, `MASK` where unknown; its first token is the seed."""
    finish_reason: str | None = None
    stats: Stats = field(default_factory=Stats)
    seen: Tensor | None = None
    """[V] tokens of prompt and output, kept only under a repetition penalty."""
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
        self.drafts, self.confidence, self.tree = [], [], None

    def guarded(self, rules: Rules) -> None:
        """Put the text under a base's rules."""
        self.guard = Guard(rules, self.tokens, len(self.prompt) + (self.asked or self.max_new_tokens))

    def watch(self, vocab: int, device: torch.device) -> None:
        """Start keeping `seen`."""
        self.seen = torch.zeros(vocab, dtype=torch.bool, device=device)
        self.seen[torch.tensor(self.tokens, device=device)] = True

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
            if token in self.eos:
                self.finish_reason = "eos"
            elif token in self.stop_tokens or (self.stop and self._stopped()):
                self.finish_reason = "stop"
            elif self.remaining <= 0:
                self.finish_reason = "length"
            if self.done:
                break
        if not prefill:
            self.stats.tokens += taken
        if self.done:
            self.stats.seconds = time.perf_counter() - self.started
        return taken

    def _stopped(self) -> bool:
        return any(s in text for text in self._texts() for s in self.stop)

    def _texts(self) -> list[str]:
        """The output without special tokens, and with them where it can differ."""
        assert self.decode is not None
        texts = [self.decode(self.emitted)]
        if self.stop and self.spell is not None:
            texts.append(self.spell(self.emitted))
        return texts

    def text(self) -> str:
        """Output without special tokens, cut before the stop string or token."""
        assert self.decode is not None
        plain, *spelled = self._texts()
        if self.finish_reason != "stop":
            return plain
        cuts = [plain[: plain.find(s)] for s in self.stop if s in plain]
        cuts += [self._before(text.find(s)) for text in spelled for s in self.stop if s in text]
        if self.tokens[-1] in self.stop_tokens:
            cuts.append(self.decode(self.emitted[:-1]))
        return min(cuts, key=len)

    def stable_text(self) -> str:
        """Output that later tokens cannot change: no half character at the end, no possible start of a stop string."""
        plain, *spelled = (text.rstrip("\ufffd") for text in self._texts())
        kept = [plain]
        for stop in self.stop:
            if size := _overlap(plain, stop):
                kept.append(plain[:-size])
            for text in spelled:
                if size := _overlap(text, stop):
                    kept.append(self._before(len(text) - size))
        return min(kept, key=len)

    def _before(self, end: int) -> str:
        """The output without special tokens, up to character `end` of that with them."""
        assert self.decode is not None and self.spell is not None
        emitted = self.emitted
        whole = next(n for n in range(len(emitted), -1, -1) if len(self.spell(emitted[:n])) <= end)
        text = self.decode(emitted[:whole])
        if whole == len(emitted):
            return text
        more = self.decode(emitted[: whole + 1])
        # A special token adds nothing to the text; of another the characters before `end` belong to it.
        return more[: len(text) + end - len(self.spell(emitted[:whole]))] if len(more) > len(text) else text


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of the text that are the beginning of the stop string."""
    return next((n for n in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:n])), 0)
