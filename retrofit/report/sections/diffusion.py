"""Diffusion: threshold against tokens per forward, and against how often the original would have said the same.

On the curve what reaches the threshold is kept, whatever the base would have said; beside it stands what users get by
default, where the base takes back what is less likely than the tolerance allows.

Agreement is the share of tokens that are the base's own first choice behind the text so far, in percent.  It is no
quality score: a text may be as good and say other things.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from retrofit.eval.differences import margins
from retrofit.eval.trace import Trace, figures
from retrofit.report.setting import Data, Earlier, Setting
from retrofit.runtime.options import SHORT
from retrofit.runtime.results import Result

BATCH = 8
ALLOWED = 5.0
"""Points of percent below the first that a point may lie and still count."""
STEEPNESS = 3.0


def diffusion(setting: Setting, earlier: Earlier) -> Data:
    """A point for `ar` and one for each threshold, the area under them, and a point of the mode's defaults."""
    setting.need("diffusion")
    suite = setting.suite
    prompts = setting.ids(suite.prompts, suite.tokens)

    def decoded(mode: str, **options: Any) -> list[Result]:
        return setting.engine.generate(
            prompts, mode, max_new_tokens=suite.tokens, batch_size=BATCH, ignore_eos=True, original_settings=False,
            **options,
        )  # fmt: skip

    runs: dict[float | None, list[Result]] = {None: decoded("ar")}
    for threshold in suite.thresholds:
        runs[threshold] = decoded("diffusion", threshold=threshold, tolerance=math.inf)
    points = [{"threshold": threshold, **_point(setting, results)} for threshold, results in runs.items()]
    curve = [(point["tpf"], point["agreement_percent"]) for point in points if point["tpf"] is not None]
    default = {"tolerance": SHORT, **_point(setting, decoded("diffusion"))}
    return {
        "new_tokens": suite.tokens, "points": points, "area_under_points": area_under(curve), "default": default,
    }  # fmt: skip


def _point(setting: Setting, results: Sequence[Result]) -> Data:
    base, dtype = setting.subject.base(setting.subject.dtype), setting.subject.dtype
    short = [margin for r in results for margin in margins(base, r.prompt, r.tokens, dtype)]
    found = figures(Trace.of(results))
    return {
        **{name: found[name] for name in ("tokens", "tpf", "rows_per_token", "forwards_per_token")},
        "agreement_percent": round(100 * sum(margin <= 0 for margin in short) / len(short), 3) if short else 0.0,
    }


def area_under(curve: Sequence[tuple[float, float]]) -> float | None:
    """d3LLM's area under (TPF, percent) points; None of no points.

    Points far below the first are left out, those below the best count less.
    """
    points = sorted(curve)
    if not points:
        return None
    best = max(y for _, y in points)
    kept = [(rho, y) for rho, y in points if y >= points[0][1] - ALLOWED]

    def weighted(y: float) -> float:
        return y * min(math.exp(-STEEPNESS * (1 - y / best)), 1.0) if best else 0.0

    area = kept[0][0] * kept[0][1]
    for (before, low), (rho, y) in pairwise(kept):
        area += 0.5 * (rho - before) * (weighted(y) + weighted(low))
    return round(area, 4)
