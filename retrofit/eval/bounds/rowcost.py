"""What steps take by their rows: plain decoding of so many requests at once, and the drafter's own steps.

Steps are those of decoding, whatever the backend: nothing is run apart from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from retrofit.errors import ResourceError
from retrofit.eval.clocked import by_engine
from retrofit.eval.trace import Trace, figures

if TYPE_CHECKING:
    from retrofit.runtime.engine import Engine

STEPS, REPEATS = 8, 3
"""New tokens of each request, and how often it is run, once more than that first."""


class Cost(NamedTuple):
    """Rows of a step, all requests together, and its seconds."""

    rows: float
    seconds: float


class Drafting(NamedTuple):
    """The steps of a drafter, one request at a time: on average."""

    step: Cost
    tokens_per_forward: float


def row_costs(engine: Engine, prompt: Sequence[int], clock: Callable[[], float], rows: Sequence[int]) -> list[Cost]:
    """Median seconds of a step of `ar` by how many requests run together, as far as memory reaches."""
    found = []
    for count in rows:
        gaps: list[float] = []
        try:
            for repeat in range(1 + REPEATS):
                timeline = by_engine(
                    engine, [prompt] * count, {"mode": "ar"}, clock=clock, max_new_tokens=STEPS, temperature=0.0
                )[0]
                gaps += timeline.gaps if repeat else []
        except ResourceError:
            break
        found.append(Cost(count, median(gaps)))
    return found


def drafting(
    engine: Engine, prompts: Sequence[Sequence[int]], way: Mapping[str, Any], temperature: float, max_new_tokens: int
) -> Drafting | None:
    """way: strategy of `self_spec`.  None where no prompt led to a second step."""
    options: dict[str, Any] = {"temperature": temperature, "ignore_eos": True, "original_settings": False}
    engine.generate(prompts[:1], "self_spec", **way, max_new_tokens=max_new_tokens, **options)
    results = engine.generate(
        prompts, "self_spec", **way, batch_size=1, max_new_tokens=max_new_tokens, **options
    )  # fmt: skip
    found = figures(Trace.of(results))
    if not found["forwards"]:
        return None
    seconds = sum(result.stats.seconds - result.stats.prefill_seconds for result in results)
    rows = sum(result.stats.rows for result in results)
    return Drafting(Cost(rows / found["forwards"], seconds / found["forwards"]), found["tpf"])
