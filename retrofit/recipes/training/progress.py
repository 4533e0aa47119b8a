"""What a running conversion shows of its steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from retrofit.progress import Progress
from retrofit.recipes.training import tracking
from retrofit.recipes.training.probe import line as probed


def progress(bar: Progress, tracker: tracking.Tracker) -> Callable[[int, dict[str, Any]], None]:
    tokens, drafts, seconds, clean, latest = [0], [0], [0.0], [0.0], [""]

    def show(step: int, record: dict[str, Any]) -> None:
        tokens[0] += record["rows"]["clean"]
        drafts[0] += record["rows"]["draft"]
        seconds[0] += record["seconds"]
        clean[0] += record.get("seconds_clean", 0.0)
        time = max(seconds[0], 1e-9)
        cost = f" step = {time / clean[0]:.1f} clean forwards" if clean[0] else ""
        loss, accept = record["loss"], record["accept"]["sampled"]
        if "probe" in record:
            latest[0] = f" probe {probed(record)}"
        bar.advance(
            text=f"loss {loss['total']:.3f} (ar {loss['ar']:.2f} diff {loss['diff']:.2f} draft {loss['draft']:.3f} "
            f"conf {loss['conf']:.2f}) accept {' '.join(f'{a:.2f}' for a in accept)} tau {record['tau']:.2f} "
            f"{tokens[0] / time:,.0f} tokens/s {drafts[0] / time:,.0f} draft rows/s{cost}{latest[0]}"
        )
        tracker.log(record)

    return show
