"""`retrofit convert --budget 30m`: preset, steps and block for the time there is, by what a step takes here.

What is chosen are keys of the recipe, so the run is one of a plain recipe: it is written into the artifact, and goes on
from its checkpoints without measuring again.
Not here: running steps (`dry_run/timing.py`), what to expect of them (`curve.py`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from retrofit.errors import ResourceError, UsageError
from retrofit.recipes.budget.curve import Curve
from retrofit.recipes.budget.presets import SCALES, Preset, changes_of, steps_changes
from retrofit.recipes.dry_run.fit import changed
from retrofit.recipes.dry_run.timing import Took
from retrofit.recipes.schema import Recipe, by_key

SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd])")
MARGIN = 0.1
"""Of the time, left for text, checkpoints and a machine that gets slower."""
LEAST_STEPS = 10
MOST_STEPS = 4
"""Times the steps of the preset `best`: beyond that the same text is only read again."""
REACHED = 0.05
"""A slot is worth training where drafting reaches it more often than this."""
CHOSEN = ("train.steps", "train.warmup", "train.decay", "train.anchors", "draft.block")
"""Keys that a budget decides."""


@dataclass(frozen=True)
class Choice:
    """changes: of the recipe, by dotted key.  step: seconds of one, and seconds: of the whole conversion, expected.
    rows: draft rows in all.  tau: tokens per verify cycle to expect, None where no run of such a base is known;
    beyond: whether that is beyond the runs it is known from."""

    preset: Preset
    changes: dict[str, Any]
    step: float
    seconds: float
    rows: int
    tau: float | None
    beyond: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {
            "preset": self.preset,
            "changes": self.changes,
            "step_seconds": round(self.step, 4),
            "seconds": round(self.seconds, 1),
            "draft_rows": self.rows,
            "tau": None if self.tau is None else round(self.tau, 3),
            "beyond_what_was_measured": self.beyond,
        }


def seconds_of(text: str) -> float:
    """`90s`, `30m`, `1.5h`, `2d`, or several together, `1h 30m`.  Raises UsageError."""
    parts = _TIME.findall(text)
    total = sum(float(amount) * SECONDS[unit] for amount, unit in parts)
    if not parts or re.sub(r"\s", "", _TIME.sub("", text)) or not 0 < total < math.inf:
        raise UsageError(f"--budget {text}: no time", "write a number and s, m, h or d, such as 30m or 1h30m")
    return total


def choose(
    plan: Recipe,
    budget: float,
    time_of: Callable[[Recipe], Took],
    *,
    preset: Preset | None = None,
    kept: Collection[str] = (),
    curve: Curve | None = None,
    spent: Callable[[], float] = lambda: 0.0,
) -> Choice:
    """The preset that has about as many steps as there is time for, and so many steps.

    budget, spent: seconds there are in all, and those that are gone.  time_of: what a recipe takes here.  preset: the
    one to take.  kept: keys that stay as they are.  Raises ResourceError where the time is too short.
    """
    if "train.steps" in kept:
        raise UsageError("--budget chooses train.steps, which is given", "leave one of them out")
    tried: dict[Preset, Choice] = {}

    def at(name: Preset) -> Choice:
        if name not in tried:
            tried[name] = _within(plan, budget, time_of, name, kept, curve, spent)
        return tried[name]

    if preset is not None:
        return at(preset)
    try:
        balanced = at("balanced")
    except ResourceError:
        return at("fast")
    steps = balanced.changes.get("train.steps", plan.train.steps)
    between = {name: math.sqrt(SCALES[name].steps) for name in SCALES}
    if steps < plan.train.steps * between["fast"]:
        return at("fast")
    return at("best") if steps > plan.train.steps * between["best"] else balanced


def _within(
    plan: Recipe,
    budget: float,
    time_of: Callable[[Recipe], Took],
    preset: Preset,
    kept: Collection[str],
    curve: Curve | None,
    spent: Callable[[], float],
) -> Choice:
    """A preset with as many steps as fit."""
    scaled = changed(plan, changes_of(preset, plan, kept))
    took = time_of(scaled)
    around = took.opening + took.measuring
    left = budget * (1 - MARGIN) - spent() - around
    most = MOST_STEPS * SCALES["best"].steps * plan.train.steps
    steps = int(min(most, left // took.step)) if took.step else int(most)
    if steps < LEAST_STEPS:
        needs = (spent() + around + LEAST_STEPS * took.step) / (1 - MARGIN)
        raise ResourceError(
            f"{budget:.0f} s are too short: a step takes {took.step:.2g} s here, and {LEAST_STEPS} steps with all that "
            f"goes with them {needs:.0f} s",
            f"give --budget {math.ceil(needs)}s or more, a smaller base, or a faster device",
        )
    found = changed(scaled, steps_changes(scaled, steps))
    found = changed(found, _block(found, kept, curve))
    rows = draft_rows(found)
    return Choice(
        preset, _differences(plan, found), took.step, spent() + around + steps * took.step, rows,
        None if curve is None else curve.tau(rows), curve is not None and not curve.least <= rows <= curve.most,
    )  # fmt: skip


def draft_rows(plan: Recipe) -> int:
    """Of a whole training, where every window is long enough for all its blocks."""
    train = plan.train
    return train.steps * train.batch_size * train.accumulation * train.anchors * plan.draft.block


def _block(plan: Recipe, kept: Collection[str], curve: Curve | None) -> dict[str, Any]:
    """A block as long as drafting reaches, and as many that the draft rows stay as many; nothing where no acceptance is
    known or the length is given."""
    if curve is None or "draft.block" in kept or plan.draft.shift == 0:
        return {}
    block = worth_drafting(curve.tau(draft_rows(plan)), plan.draft.block)
    anchors = max(1, plan.train.anchors * plan.draft.block // block)
    return {"draft.block": block, "train.anchors": anchors}


def worth_drafting(tau: float, slots: int) -> int:
    """Slots that drafting reaches, if a chain of so many slots yields tau and all are accepted alike: at least 2, at
    most twice as many as those tau is known of."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if 1 + sum(middle**k for k in range(1, slots + 1)) < tau else (low, middle)
    reached = 2 * slots if low >= 1 else math.ceil(math.log(REACHED) / math.log(max(low, 1e-9)))
    return max(2, min(2 * slots, reached))


def _differences(old: Recipe, new: Recipe) -> dict[str, Any]:
    before, after = by_key(old), by_key(new)
    return {key: after[key] for key in CHOSEN if after[key] != before[key]}


def chosen_before(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What was chosen for a conversion that a checkpoint is of.  settings: its recipe, by dotted key."""
    return {key: settings[key] for key in CHOSEN if key in settings}
