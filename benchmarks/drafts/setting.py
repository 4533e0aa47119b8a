"""What is the same for every recipe that is compared, and what a recipe keeps of its own.

A recipe is named by itself or with keys changed, `tiny adapter.targets=[o]`.  Of it are adapter, layout of the block
and objective; base, data and schedule are those of the own recipe, by default `OWN`.  Blocks are as long as it takes to
propose the drafts asked for, and as many as the draft rows allow.

The learning rate of the own one, with keys changed or not, is what its file says.  Of others it is RATE over their
alpha / rank, so that the first steps change the weights as much, times a factor.  Of several factors each recipe but
the own one takes what its held-out text says is best.
Not here: running anything (`runs.py`).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from retrofit.recipes.schema import Recipe, by_key, load_recipe

OWN = "tiny"
"""The embedded base's own recipe, which the others are held against."""
PUBLISHED = "baselines/"
"""How names of published designs begin."""
RATE = 2e-2
"""Learning rate of the others at an alpha / rank of 1."""
SHARED = ("base.", "data.", "train.")


@dataclass(frozen=True)
class Setting:
    """steps: of training.  rows: draft rows of a sequence and step.  drafts: of a block.  prompts, new_tokens: of the
    decoding that is measured.  rates: factors of the learning rate."""

    steps: int
    rows: int
    drafts: int
    prompts: int
    new_tokens: int
    rates: tuple[float, ...]
    own: str = OWN
    """Recipe of retrofit's own that the others are held against, and whose base, data and schedule all have."""

    def to_dict(self) -> dict[str, Any]:
        """What it was before there was more than one own recipe, where it is that one."""
        found = {**asdict(self), "rates": list(self.rates)}
        return found if self.own != OWN else {key: value for key, value in found.items() if key != "own"}


def plan_of(spec: str, setting: Setting, seed: int, rate: float = 1.0) -> Recipe:
    """The recipe that is trained.  Raises UsageError, as `load_recipe` does."""
    name, *changes = spec.split()
    own_name, *own_changes = setting.own.split()
    named, own = load_recipe(name, changes), load_recipe(own_name, own_changes)
    changed = {change.partition("=")[0] for change in changes}
    block = setting.drafts + (named.draft.shift == 0)  # whose first row drafts nothing
    block = named.draft.block if "draft.block" in changed else block
    least = 2 - named.draft.shift
    shared = {key: value for key, value in by_key(own).items() if key.startswith(SHARED)}
    equal = {
        "draft.block": block,
        "train.steps": setting.steps,
        "train.warmup": min(own.train.warmup, setting.steps),
        "train.anchors": max(1, setting.rows // block),
        "train.curriculum": [length for length in named.train.curriculum if least <= length < block],
        "train.lr": min(1.0, (own.train.lr if name == own_name else RATE / scale(named)) * rate),
        "train.seed": seed,
    }
    kept = {key: value for key, value in by_key(named).items() if key in changed}
    return load_recipe(name, {**shared, **equal, **kept})


def scale(recipe: Recipe) -> float:
    return recipe.adapter.alpha / recipe.adapter.rank


def folder_name(spec: str, plan: Recipe) -> str:
    """Of the artifact: the same for the same recipe only."""
    digest = hashlib.sha256(json.dumps(by_key(plan), sort_keys=True).encode()).hexdigest()[:12]
    return f"{spec.split()[0].replace('/', '-')}-{digest}"
