"""What decoding did, as whole numbers, and every measure of acceptance that is made of them.

    tau    tokens emitted per verify cycle, bonus included, cut at EOS and the limit; sum / sum (`tau`), mean over
           requests (`tau_macro`)
    TPF    tokens emitted after prefill / forwards after prefill, sum / sum; read it beside rows per token
    cond   P(slot k accepted | verified, and all before it accepted);  joint  the running product of cond
    acceptance length   1 + accepted drafts / cycles that verified any: bonus included, not cut
    acceptance rate     accepted drafts / verified drafts, in percent

A forward of kind `ar` is a cycle without drafts: so tau is 1 for mode `ar`, and a drafter that often has
nothing to propose, as prompt lookup, is not judged by its good moments alone.

A cycle that verified fewer than k drafts says nothing about slot k, so it is left out of that slot's
denominator (the product-limit estimator of Kaplan and Meier, 1958).  Of a tree, drafts are those of its longest path.
Not here: time (`latency.py`).  This file imports nothing heavy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from retrofit.runtime.results import CYCLES, Result


@dataclass(frozen=True)
class Trace:
    """What finished requests did; traces of several runs add up."""

    cycles: Mapping[tuple[int, int], int] = field(default_factory=dict)
    """(verified, accepted) drafts -> how many verify cycles, those without drafts left out."""
    forwards: Mapping[str, int] = field(default_factory=dict)
    """By kind, prefill among them."""
    requests: tuple[tuple[int, int], ...] = ()
    """(tokens after prefill, verify cycles and forwards of kind `ar`) of each request."""
    rows: int = 0
    widest: int = 0
    """Most rows of one request in a forward."""

    @classmethod
    def of(cls, results: Iterable[Result]) -> Trace:
        stats = [result.stats for result in results]
        cycles: Counter[tuple[int, int]] = Counter()
        forwards: Counter[str] = Counter()
        for one in stats:
            cycles.update(zip(one.verified, one.accepted, strict=True))
            forwards.update(one.forwards)
        requests = tuple((one.tokens, num_cycles(one.forwards)) for one in stats)
        rows, widest = sum(one.rows for one in stats), max((one.widest for one in stats), default=0)
        return cls(dict(sorted(cycles.items())), dict(forwards), requests, rows, widest)

    def __add__(self, other: Trace) -> Trace:
        cycles, forwards = Counter(self.cycles), Counter(self.forwards)
        cycles.update(other.cycles)
        forwards.update(other.forwards)
        return Trace(
            dict(sorted(cycles.items())), dict(forwards), self.requests + other.requests, self.rows + other.rows,
            max(self.widest, other.widest),
        )  # fmt: skip

    @property
    def tokens(self) -> int:
        return sum(tokens for tokens, _ in self.requests)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; `from_dict` reads it back."""
        return {
            "cycles": [[verified, accepted, count] for (verified, accepted), count in self.cycles.items()],
            "forwards": dict(self.forwards),
            "requests": [list(request) for request in self.requests],
            "rows": self.rows,
            "widest": self.widest,
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Trace:
        cycles = {(verified, accepted): count for verified, accepted, count in stored["cycles"]}
        requests = tuple((tokens, count) for tokens, count in stored["requests"])
        return cls(cycles, dict(stored["forwards"]), requests, stored["rows"], stored["widest"])


def num_cycles(forwards: Mapping[str, int]) -> int:
    """Verify cycles among forwards by kind, those of kind `ar` included."""
    return sum(forwards.get(kind, 0) for kind in CYCLES)


def ratio(numerator: float, denominator: float) -> float | None:
    """Rounded to 4 places; None instead of a division by zero."""
    return round(numerator / denominator, 4) if denominator else None


def figures(trace: Trace) -> dict[str, Any]:
    """Every measure of the trace as a JSON-able dict.

    `most_rows`: rows of one request in its widest forward after prefill.  `forwards_per_token`: by kind; their sum is
    1 / TPF.  `tau` is None for mode `diffusion`, which has no verify cycles.
    """
    after = {kind: count for kind, count in trace.forwards.items() if kind != "prefill"}
    tokens, forwards = trace.tokens, sum(after.values())
    per_request = [emitted / count for emitted, count in trace.requests if count]
    accepted_histogram: Counter[int] = Counter()
    for (_, accepted), count in trace.cycles.items():
        accepted_histogram[accepted] += count
    verified_of, accepted_of = every_cycle(trace)
    return {
        "requests": len(trace.requests),
        "tokens": tokens,
        "forwards": forwards,
        "forwards_by_kind": dict(trace.forwards),
        "forwards_per_token": {kind: ratio(count, tokens) for kind, count in after.items()},
        "tpf": ratio(tokens, forwards),
        "tau": ratio(tokens, num_cycles(trace.forwards)),
        "tau_macro": ratio(sum(per_request), len(per_request)),
        "rows_per_token": ratio(trace.rows, tokens),
        "most_rows": trace.widest,
        "accepted_histogram": dict(sorted(accepted_histogram.items())),
        **by_slot(accepted_of, verified_of),
    }


def every_cycle(trace: Trace) -> tuple[list[int], list[int]]:
    """(verified drafts, accepted drafts) of each cycle, in no order of time."""
    verified = [v for (v, _), count in trace.cycles.items() for _ in range(count)]
    return verified, [a for (_, a), count in trace.cycles.items() for _ in range(count)]


def by_slot(accepted: Sequence[int], verified: Sequence[int]) -> dict[str, list[float] | list[int]]:
    """Acceptance of slots 1, 2, ... over verify cycles: `accept_cond`, `accept_joint`, and counts `tried`.

    Ends before the first slot that no cycle ever reached.
    """
    cond: list[float] = []
    joint: list[float] = []
    tried: list[int] = []
    alive = 1.0
    for slot in range(1, max(verified, default=0) + 1):
        reached = [a for a, v in zip(accepted, verified, strict=True) if v >= slot and a >= slot - 1]
        if not reached:
            break
        share = sum(a >= slot for a in reached) / len(reached)
        alive *= share
        tried.append(len(reached))
        cond.append(round(share, 4))
        joint.append(round(alive, 4))
    return {"accept_cond": cond, "accept_joint": joint, "tried": tried}


def bench_serve(trace: Trace) -> dict[str, Any]:
    """The speculative part of what `vllm bench serve` prints, by its names and its formulas.

    There a position's rate is a share of all cycles that drafted, however few drafts they verified.  Empty where
    nothing was drafted, as there.
    """
    drafting = {cycle: count for cycle, count in trace.cycles.items() if cycle[0]}
    drafts = sum(drafting.values())
    if not drafts:
        return {}
    draft_tokens = sum(verified * count for (verified, _), count in drafting.items())
    accepted_tokens = sum(accepted * count for (_, accepted), count in drafting.items())
    positions = range(1, max(verified for verified, _ in drafting) + 1)
    at_least = [sum(count for (_, accepted), count in drafting.items() if accepted >= k) for k in positions]
    return {
        "spec_decode_acceptance_rate": 100 * accepted_tokens / draft_tokens,
        "spec_decode_acceptance_length": 1 + accepted_tokens / drafts,
        "spec_decode_num_drafts": drafts,
        "spec_decode_draft_tokens": draft_tokens,
        "spec_decode_accepted_tokens": accepted_tokens,
        "spec_decode_per_position_acceptance_rates": [count / drafts for count in at_least],
    }
