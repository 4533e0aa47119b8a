"""Choose the plans of the next steps by measured cost, and learn from what they did: what stands behind `auto`.

Runs nothing: steps and trials are the steppers' (`host/steps.py`, `device/steps.py`).  Not here: the cost model.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from retrofit.adapters.layout import DraftLayout
from retrofit.runtime.auto.cost import CostModel
from retrofit.runtime.plan import Cycle, StepPlan
from retrofit.runtime.rules.tree import grow, largest_tree

RETHINK = 128
"""Steps between two comparisons of all cycles: comparing costs as much as a small model's layer."""


@dataclass(frozen=True)
class Verified:
    """What a step accepted of one request's drafts.  expected: of drafts that branch, how many were; None: a chain."""

    accepted: int
    verified: int
    expected: float | None = None


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
        """(sampled, batch) whose trials have been run."""
        self.chosen: dict[tuple[bool, int], tuple[Cycle, int]] = {}
        """(sampled, batch) -> current cycle, and for how many more steps it holds."""
        self.lock = threading.RLock()
        """Over all of the above; held by no step, but by trials: another call that needs the same times waits."""

    def model(self, sampled: bool) -> CostModel:
        with self.lock:
            if sampled not in self.costs:
                self.costs[sampled] = self._new_model("sampled" if sampled else "greedy")
            return self.costs[sampled]

    def trials(self, sampled: bool, batch: int, room: int, rows: int | None) -> list[StepPlan]:
        """What is to be timed before the first choice for a batch size; nothing where that was done.

        room: positions there are.  rows: most rows of a request.
        """
        return [] if (sampled, batch) in self.timed else self.model(sampled).trials(room, rows)

    def choose(self, sampled: bool, batch: int, rows: int | None) -> Cycle:
        """The best cycle, thought over every RETHINK steps.  rows: most rows of a request."""
        with self.lock:
            cycle, left = self.chosen.get((sampled, batch), ((), 0))
            if left <= 0:
                cycle, left = self.model(sampled).best(batch, rows), RETHINK
            self.chosen[sampled, batch] = cycle, left - 1
            return cycle

    def learn(
        self,
        sampled: bool,
        rows: int,
        drafts: bool,
        seconds: float,
        verified: Sequence[Verified] = (),
        *,
        trial: bool = False,
    ) -> None:
        """A step, or a trial, of so many rows took so long, and this came of the drafts in it.

        drafts: whether it drafted.
        """
        with self.lock:
            model = self.model(sampled)
            model.observe_time(rows, drafts, seconds, trial=trial)
            for one in verified:
                model.observe(one.accepted, one.verified, one.expected)

    def _new_model(self, kind: str) -> CostModel:
        measured = self.acceptance.get("conditional", {}).get(kind, [])
        prior = [*measured, *[0.0] * self.layout.drafts][: self.layout.drafts]
        chance = self.acceptance.get("ranks", {}).get(kind)
        largest = largest_tree(self.layout)
        sizes = sorted({largest // 4, largest // 2, largest} - {0}) if chance and self.layout.anchored else []
        return CostModel(self.layout, prior, [tree for n in sizes if (tree := grow(chance, n)).nodes])
