"""When tokens came, and every measure of speed that is made of it.

    TTFT    from sending a request to its first token
    ITL     gap between two chunks of one request; drafts that are accepted together come as one chunk
    TPOT    (end - first token) / (tokens - 1) of a request of two tokens or more
    E2EL    from sending a request to its last token
    tokens/s per user   1 / TPOT, the median over requests;  total  all tokens / (last end - first sending)

Not here: tokens per forward (`trace.py`), the runs (`clocked.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np


@dataclass
class Timeline:
    """One request: when it was sent, and (time, tokens) of each chunk that came of it.  Times in seconds."""

    sent: float
    prompt_tokens: int = 0
    chunks: list[tuple[float, int]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(count for _, count in self.chunks)

    @property
    def end(self) -> float:
        return self.chunks[-1][0]

    @property
    def ttft(self) -> float:
        return self.chunks[0][0] - self.sent

    @property
    def e2el(self) -> float:
        return self.end - self.sent

    @property
    def gaps(self) -> list[float]:
        times = [time for time, _ in self.chunks]
        return [after - before for before, after in pairwise(times)]

    @property
    def tpot(self) -> float | None:
        """None of a request of one token, whose end is its first token."""
        return (self.e2el - self.ttft) / (self.tokens - 1) if self.tokens > 1 else None


def speed_figures(timelines: Sequence[Timeline]) -> dict[str, Any]:
    """Latencies in milliseconds and rates in tokens per second as a JSON-able dict.

    None stands where nothing was measured: there were no requests, or none of two tokens.
    """
    done = [timeline for timeline in timelines if timeline.chunks]
    tpots = [tpot for timeline in done if (tpot := timeline.tpot) is not None]
    gaps = [gap for timeline in done for gap in timeline.gaps]
    per_token = percentile(tpots, 50)
    return {
        "requests": len(done),
        "tokens": sum(timeline.tokens for timeline in done),
        "ttft_p50_ms": in_ms(percentile([timeline.ttft for timeline in done], 50)),
        "ttft_p99_ms": in_ms(percentile([timeline.ttft for timeline in done], 99)),
        "itl_p50_ms": in_ms(percentile(gaps, 50)),
        "itl_p99_ms": in_ms(percentile(gaps, 99)),
        "itl_max_ms": in_ms(max(gaps, default=None)),
        "tpot_p50_ms": in_ms(per_token),
        "tokens_per_s_user": round(1 / per_token, 4) if per_token else None,
        "tokens_per_s_total": total_rate(done),
    }


def total_rate(timelines: Sequence[Timeline]) -> float | None:
    """Tokens per second of all requests together, None where no time passed."""
    if not timelines:
        return None
    seconds = max(t.end for t in timelines) - min(t.sent for t in timelines)
    return round(sum(t.tokens for t in timelines) / seconds, 4) if seconds > 0 else None


def percentile(values: Sequence[float], q: float) -> float | None:
    """Linear between neighbours; None of nothing."""
    return float(np.percentile(values, q)) if len(values) else None


def in_ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 4)


def bench_serve(timelines: Sequence[Timeline], duration: float, percentiles: Sequence[float] = (99,)) -> dict[str, Any]:
    """What `vllm bench serve` prints, by its names and its formulas.  duration: of the whole run, in seconds."""
    done = [timeline for timeline in timelines if timeline.chunks]
    output = sum(timeline.tokens for timeline in done)
    found: dict[str, Any] = {
        "completed": len(done),
        "failed": len(timelines) - len(done),
        "total_input_tokens": sum(timeline.prompt_tokens for timeline in done),
        "total_output_tokens": output,
        "request_throughput": len(done) / duration,
        "output_throughput": output / duration,
        "total_token_throughput": (sum(timeline.prompt_tokens for timeline in done) + output) / duration,
    }
    measures: dict[str, list[float]] = {
        "ttft": [timeline.ttft for timeline in done],
        "tpot": [tpot for timeline in done if (tpot := timeline.tpot) is not None],
        "itl": [gap for timeline in done for gap in timeline.gaps],
        "e2el": [timeline.e2el for timeline in done],
    }
    statistics: dict[str, Callable[[Any], Any]] = {"mean": np.mean, "median": np.median, "std": np.std}
    for name, values in measures.items():
        for statistic, function in statistics.items():
            found[f"{statistic}_{name}_ms"] = 1000 * float(function(values or [0.0]))
        for q in percentiles:
            found[f"p{q:g}_{name}_ms"] = 1000 * float(np.percentile(values or [0.0], q))
    return found
