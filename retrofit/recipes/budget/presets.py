"""`fast`, `balanced` and `best`: a recipe for less time or for more.

`balanced` is the recipe as it is written.  The others change how many draft rows it is trained on, by factors, so that
they mean the same for any recipe.
Not here: choosing one (`choice.py`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from retrofit.recipes.schema import Recipe, by_key

Preset = Literal["fast", "balanced", "best"]


@dataclass(frozen=True)
class Scale:
    """steps, anchors: of a recipe's own, the part a preset has."""

    steps: float
    anchors: float


SCALES: dict[Preset, Scale] = {"fast": Scale(0.36, 0.375), "balanced": Scale(1.0, 1.0), "best": Scale(2.0, 1.0)}


def changes_of(preset: Preset, plan: Recipe, kept: Collection[str] = ()) -> dict[str, Any]:
    """What a preset changes of a recipe, by dotted key.  kept: keys that stay, as somebody has set them."""
    scale, train = SCALES[preset], plan.train
    steps = train.steps if "train.steps" in kept else max(1, round(train.steps * scale.steps))
    anchors = max(1, round(train.anchors * scale.anchors))
    wanted = {"train.anchors": anchors, **steps_changes(plan, steps)}
    return {key: value for key, value in wanted.items() if key not in kept and by_key(plan)[key] != value}


def steps_changes(plan: Recipe, steps: int) -> dict[str, Any]:
    """So many steps, and a warm-up and a decay that leave most of them."""
    train = plan.train
    share = train.warmup / train.steps
    found: dict[str, Any] = {"train.steps": steps, "train.warmup": min(train.warmup, round(share * steps))}
    if train.decay is not None:
        found["train.decay"] = max(1, min(train.decay, round(train.decay / train.steps * steps)))
    return found
