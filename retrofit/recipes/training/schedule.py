"""The learning rate of every step, and what of a recipe may change when a conversion goes on.

`wsd` (warm-up, constant, decay: MiniCPM, arXiv 2404.06395) has the same rates until its decay begins, however many
steps there are to be: steps may be added, and the decay run from any checkpoint before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from retrofit.recipes.schema import Recipe, Train

KEYS = ("train.steps", "train.lr", "train.warmup", "train.schedule", "train.decay")
"""Keys that a step's weights depend on by its learning rate alone."""
FLOOR = 0.05
"""Share of the peak that a decay ends at."""
DECAYING = 5
"""Where a recipe does not say how many, one step of so many is of the decay of `wsd`."""

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1 - progress,
    "wsd": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
}
"""What is left of the rate above the floor, by how much of the decay is done, 0 to 1."""


def learning_rate(recipe: Recipe, step: int) -> float:
    """Of a step, from 0: linear warm-up, then cosine or linear decay to 5 %, constant, or constant with a decay."""
    train = recipe.train
    if step < train.warmup:
        return train.lr * (step + 1) / train.warmup
    first = _decay_begins(train)
    progress = max(0, step - first) / max(1, train.steps - first)
    return train.lr * (FLOOR + (1 - FLOOR) * SCHEDULES[train.schedule](progress))


def _decay_begins(train: Train) -> int:
    """The step, from 0, of which the rate begins to fall."""
    if train.schedule != "wsd":
        return train.warmup
    decay = max(1, train.steps // DECAYING) if train.decay is None else train.decay
    return max(train.warmup, train.steps - decay)


def same_rates(settings: Mapping[str, Any], recipe: Recipe, steps: int) -> bool:
    """Whether the first so many steps had the learning rates, and the lengths of blocks, that `recipe` gives them.

    settings: what they were trained with, by dotted key.
    """
    then = {key.removeprefix("train."): settings[key] for key in KEYS if key in settings}
    old = recipe.model_copy(update={"train": recipe.train.model_copy(update=then)})
    if old.train.schedule not in SCHEDULES:  # of another version
        return False
    return all(
        learning_rate(old, step) == learning_rate(recipe, step) and block_of(old, step) == block_of(recipe, step)
        for step in range(steps)
    )


def block_of(recipe: Recipe, step: int) -> int:
    """How long a step's blocks are, from 0: of `train.curriculum`'s lengths, each has its equal share of the steps."""
    lengths = (*recipe.train.curriculum, recipe.draft.block)
    return lengths[min(len(lengths) - 1, step * len(lengths) // recipe.train.steps)]
