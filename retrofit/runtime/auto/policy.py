"""Choose the plans of the next steps by what steps cost, and learn from what they did: what stands behind `auto`.

    begin      `ar`, whose price everything is held against; nothing is run to be timed before the first token
    choose     the cycle that promises most; one that has not been run here yet is tried for a few steps
    account    seconds spent beyond what `ar` would have taken for the same tokens; once they are more than a hundredth
               of all and a few steps, nothing but `ar` runs until they are less

So a drafter that is worth nothing, or whose artifact says ten times too much, costs a hundredth, not what it costs.
Runs nothing: steps are the steppers' (`host/steps.py`, `device/steps.py`).  Not here: the cost model.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retrofit.adapters.layout import DraftLayout
from retrofit.runtime.auto.cost import CostModel, Looked
from retrofit.runtime.auto.times import doublings
from retrofit.runtime.plan import AR, Cycle, StepPlan, num_rows
from retrofit.runtime.rules.tree import grow, largest_tree

RETHINK = 32
"""Steps between two comparisons of all cycles: comparing costs as much as a small model's layer."""
BEGIN = 3
"""Steps of `ar` before anything else, and steps of a kind after which its price is known."""
TRY = 4
"""Steps of each of its plans for which a cycle of unknown price is run."""
AGAIN = 256
"""Steps of something else after which `ar` is timed again, for one step: the machine may have changed.  Sooner as long
as few steps of it are known: the first ones are slow."""
ANEW = 1024
"""Steps of `ar` in a row after which what drafting costs is forgotten, and may be tried again."""
IN_TURN = (7, 15)
"""Nodes of the trees that may be verified with no block beside them."""
SHARE = 0.01
"""Of all time, what may be lost against `ar`."""
FREE, SAVED = 3.0, 10.0
"""Steps of `ar` that may be lost besides; and that a good past can pay for at most."""
STUMBLES = 1.5
"""A step counts for so many times what was expected of it, at most: the machine may have stumbled over it.  So what the
first step of a kind takes beyond that is lost without being counted."""


@dataclass(frozen=True)
class Verified:
    """What a step accepted of one request's drafts.  expected: of drafts that branch, how many were; None: a chain."""

    accepted: int
    verified: int
    expected: float | None = None


@dataclass
class Held:
    """What is being run for a batch size and a context."""

    cycle: Cycle = AR
    left: int = 0
    """For how many more steps."""
    since: int = 0
    """Steps since `ar` was timed."""
    alone: int = 0
    """Steps since anything else was."""
    ar: float = 0.0
    """Seconds of a step of `ar`."""


Place = tuple[bool, int, int]
"""sampled?, requests, doublings of the context."""


class AutoPolicy:
    """Cost models of one engine, greedy and sampled apart.

    Calls in several threads share them: what one has timed and seen accepted, all plan by.
    """

    def __init__(self, layout: DraftLayout, acceptance: Mapping[str, Any]):
        """acceptance: as measured at conversion."""
        self.layout = layout
        self.acceptance = acceptance
        self.costs: dict[bool, CostModel] = {}
        self.timed: set[tuple[bool, int]] = set()
        """(sampled, batch) whose trials a device has run."""
        self.held: dict[Place, Held] = {}
        self.spent = self.behind = 0.0
        """Seconds of all steps, and of those beyond what `ar` would have taken."""
        self.written: dict[Path, float] = {}
        """Files that step times were read from -> when they were last kept there (`kept.py`)."""
        self.lock = threading.RLock()
        """Over all of the above; held by no step."""

    def model(self, sampled: bool) -> CostModel:
        with self.lock:
            if sampled not in self.costs:
                self.costs[sampled] = self._new_model("sampled" if sampled else "greedy")
            return self.costs[sampled]

    def trials(self, sampled: bool, batch: int, room: int, rows: int | None) -> list[StepPlan]:
        """What a device times before the first choice for a batch size; nothing where that was done.

        room: positions there are.  rows: most rows of a request.
        """
        return [] if (sampled, batch) in self.timed else self.model(sampled).trials(room, rows)

    def choose(
        self, sampled: bool, batch: int, rows: int | None, context: int = 0, looked: Looked | None = None
    ) -> Cycle:
        """The cycle of the next step.  rows: most rows of a request; context: positions behind them."""
        with self.lock:
            held = self.held.setdefault((sampled, batch, doublings(context)), Held())
            if held.left <= 0 or (held.cycle != AR and self._over(held)):
                self._decide(held, self.model(sampled), batch, rows, context, looked)
            held.left -= 1
            held.since, held.alone = (0, held.alone + 1) if held.cycle == AR else (held.since + 1, 0)
            return held.cycle

    def learn(
        self,
        sampled: bool,
        rows: int,
        drafts: bool,
        seconds: float,
        verified: Sequence[Verified] = (),
        *,
        batch: int = 0,
        context: int = 0,
        emitted: int = 0,
        cycle: Cycle = AR,
    ) -> None:
        """A step, or a trial, of so many rows took so long, and this came of the drafts in it.

        drafts: whether it drafted; batch: its requests, and emitted: their new tokens, by which it is held against
        `ar`; without them it is not.  cycle: what it was a step of, where that is `hybrid`.
        """
        with self.lock:
            model = self.model(sampled)
            held = self.held.get((sampled, batch, doublings(context)))
            if held is not None and held.ar:
                took = min(seconds, STUMBLES * model.times.seconds(rows, drafts, context))
                self.spent += took
                if drafts or rows > batch:
                    self.behind = max(self.behind + took - emitted / batch * held.ar, -SAVED * held.ar)
            model.times.observe(rows, drafts, seconds, context)
            if cycle[-1].rows is not None:
                model.observe_hybrid(cycle, emitted / batch)
            for one in verified:
                model.observe(one.accepted, one.verified, one.expected)

    def _over(self, held: Held) -> bool:
        return self.behind > SHARE * self.spent + FREE * held.ar

    def _decide(
        self, held: Held, model: CostModel, batch: int, rows: int | None, context: int, looked: Looked | None
    ) -> None:
        """What runs next, and for how long."""
        if (known := model.times.steps(batch, False)) < BEGIN:
            held.cycle, held.left = AR, BEGIN - known
            return
        if model.times.typical(batch, False, context) is None:
            held.cycle, held.left = AR, 1
            return
        held.ar = model.times.seconds(batch, False, context)
        if held.alone >= ANEW:
            held.alone = 0
            model.times.forget_drafting()
        if held.since >= min(AGAIN, 2 << known):
            held.cycle, held.left = AR, 1
            return
        held.cycle = AR if self._over(held) else model.best(batch, rows, context, looked)
        held.left = RETHINK if self._known(held.cycle, model, batch, looked) else TRY * len(held.cycle)

    def _known(self, cycle: Cycle, model: CostModel, batch: int, looked: Looked | None) -> bool:
        """Whether steps like these have been run."""
        if looked is not None and cycle[-1].verify and not any(plan.blocks for plan in cycle):
            return model.times.steps(looked.rows, False) >= BEGIN
        return all(model.times.steps(batch * num_rows(plan, self.layout), plan.blocks > 0) >= BEGIN for plan in cycle)

    def _new_model(self, kind: str) -> CostModel:
        measured = self.acceptance.get("conditional", {}).get(kind, [])
        prior = [*measured, *[0.0] * self.layout.drafts][: self.layout.drafts]
        chance = self.acceptance.get("ranks", {}).get(kind)
        largest = largest_tree(self.layout)
        if not chance or not self.layout.anchored:
            return CostModel(self.layout, prior)
        sizes = sorted({largest // 4, largest // 2, largest} - {0})
        trees, in_turn = ([tree for n in some if (tree := grow(chance, n)).nodes] for some in (sizes, IN_TURN))
        return CostModel(self.layout, prior, trees, in_turn=in_turn)
