"""A recipe with its preset and its share of a time filled in, as `retrofit convert` runs it.

Not here: the choice itself (`choice.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from retrofit.errors import ResourceError, UsageError, out_of_memory
from retrofit.hub import check_device, resolved_device
from retrofit.launch import is_launched
from retrofit.recipes.budget.choice import CHOSEN, Choice, choose, chosen_before, seconds_of
from retrofit.recipes.budget.curve import Curve, curves
from retrofit.recipes.budget.presets import Preset, changes_of
from retrofit.recipes.dry_run.fit import changed
from retrofit.recipes.dry_run.timing import Took, timed
from retrofit.recipes.schema import Recipe, by_key, load_recipe, recipe_names
from retrofit.recipes.training.checkpoint import Checkpoints, folder_of

FREE = frozenset({*CHOSEN, "train.seed", "train.save_every", "train.checkpointing", "data.held_out"} - {"draft.block"})
"""Keys of a recipe that a curve holds for at any value."""

MOST_NAMED = 4
"""Keys of a recipe that are told."""

Say = Callable[[str], None]


def scaled(
    plan: Recipe,
    preset: Preset | None,
    budget: str | None,
    kept: Collection[str],
    out: Path,
    device: str = "auto",
    offline: bool = False,
    trust_remote_code: bool = False,
    *,
    again: bool = False,
    fresh: bool = True,
    say: Say = lambda message: None,
) -> tuple[Recipe, dict[str, Any]]:
    """(the recipe at a preset, or within a time at the preset that fits, and what was chosen, as plain data).

    kept: keys that stay as they are.  out: the artifact's place.  again: choose anew though there is a checkpoint.
    fresh: it begins with an untrained adapter.
    Raises UsageError, ResourceError, and what loading the base raises.
    """
    if budget is None:
        return (plan, {}) if preset is None else (changed(plan, changes_of(preset, plan, kept)), {"preset": preset})
    plan, found = _within(plan, budget, out, preset, kept, again, fresh, device, offline, trust_remote_code, say)
    return plan, {} if found is None else {"budget": found.to_dict()}


def _within(
    plan: Recipe,
    budget: str,
    out: Path,
    preset: Preset | None,
    kept: Collection[str],
    again: bool,
    fresh: bool,
    device: str,
    offline: bool,
    trust_remote_code: bool,
    say: Say,
) -> tuple[Recipe, Choice | None]:
    """(the recipe, how it was chosen): measured here; None where a checkpoint says what was chosen before."""
    begin, seconds = time.perf_counter(), seconds_of(budget)
    if is_launched():
        raise UsageError(
            "--budget measures one process, and several were started",
            "run it with --dry-run in one process first, and give train.steps here",
        )
    saved = folder_of(out)
    newest = Checkpoints(saved).newest(say) if saved.is_dir() and not again else None
    if newest is not None:
        before = chosen_before(newest.state["settings"])
        say(f"going on with what was chosen before: {written(before)}; --restart chooses anew")
        return changed(plan, {key: value for key, value in before.items() if key not in kept}), None
    device = resolved_device(device)
    check_device(device)

    def time_of(one: Recipe) -> Took:
        say("measuring a few steps")
        try:
            return timed(one, device, offline, trust_remote_code)
        except Exception as error:
            if out_of_memory(error) is None:
                raise
            raise ResourceError(
                "a step does not fit into the memory that is free", "see `retrofit convert --dry-run --fit SIZE`"
            ) from None

    found = choose(
        plan, seconds, time_of, preset=preset, kept=kept, curve=measured_curve(plan) if fresh else None,
        spent=lambda: time.perf_counter() - begin,
    )  # fmt: skip
    for line in told(found, seconds, unknown(plan, fresh)):
        say(line)
    return changed(plan, found.changes), found


def measured_curve(plan: Recipe) -> Curve | None:
    """The curve of runs of the recipe that ships for a base; None for another base, and for a recipe that would come to
    something else after as many draft rows."""
    return curves()[plan.base.model] if _measured(plan) and not _others(plan) else None


def _measured(plan: Recipe) -> bool:
    """Whether there are curves of a base, and the recipe they are of."""
    return plan.base.model in curves() and plan.base.model in recipe_names()


def _others(plan: Recipe) -> list[str]:
    """Keys of a recipe that a curve does not hold for."""
    wanted, own = by_key(load_recipe(plan.base.model)), by_key(plan)
    return [key for key, value in wanted.items() if key not in FREE and own[key] != value]


def unknown(plan: Recipe, fresh: bool) -> str:
    """Why nothing is foretold of a recipe, where nothing is.  fresh: it begins with an untrained adapter."""
    if not fresh:
        return "it begins with trained weights, and only conversions from the beginning were measured"
    if not _measured(plan):
        return "no conversions of such a base were measured"
    named = ", ".join(_others(plan)[:MOST_NAMED])
    return f"conversions of this base were measured with another recipe; {named} differ there"


def told(found: Choice, budget: float, why: str) -> list[str]:
    """A choice for people.  why: nothing is foretold, where nothing is."""
    changes = f", {written(found.changes)}" if found.changes else ""
    lines = [
        f"--budget: preset {found.preset}{changes}; a step takes {found.step:.3g} s here, all of it about "
        f"{found.seconds:.0f} of {budget:.0f} s, {found.rows:,} draft rows"
    ]
    if found.tau is None:
        return [*lines, f"what to expect is not known: {why}"]
    beyond = ", though no run of that length was measured" if found.beyond else ""
    return [*lines, f"expect tau {found.tau:.2f} on held-out text{beyond}"]


def written(changes: dict[str, object]) -> str:
    """As on the command line."""
    return " ".join(f"{key}={value}" for key, value in changes.items())
