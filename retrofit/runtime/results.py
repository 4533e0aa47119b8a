"""What a call gives back: the results, the events of a stream, and what each request cost.

This file imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass, field

Logprobs = dict[int, float]
"""Token -> log-probability: the token that stands there, then the likeliest, best first."""

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
    reused: int = 0
    """Tokens of the prompt whose K/V were there already, from another text or another output of the prompt."""

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
            "reused": self.reused,
        }


@dataclass(frozen=True)
class Result:
    """One finished output.  tokens include EOS; text has no special tokens and ends before what stopped it."""

    index: int
    """Of the prompt."""
    prompt: list[int]
    tokens: list[int]
    text: str | None
    finish_reason: str
    """`stop`: at EOS, a stop token or a stop string; `length`: at max_new_tokens or the context."""
    stats: Stats
    stop_reason: int | str | None = None
    """The stop token or string that ended it; None: EOS or the length."""
    sample: int = 0
    """Which of the prompt's n outputs."""
    logprobs: list[Logprobs] | None = None
    """Of each token, by the model's own logits; None: not asked for."""
    prompt_logprobs: list[Logprobs | None] | None = None
    """Of each token of the prompt, None for the first, which follows nothing; None: not asked for."""


@dataclass(frozen=True)
class Event:
    """New output of one request: text that can no longer change, and the tokens since the last event."""

    index: int
    tokens: list[int]
    text: str
    result: Result | None
    sample: int = 0
