"""Choose the plan of each step by measured cost: what stands behind `strategy="auto"`, and the trees of `fused`.

Not here: the cost model itself (`cost.py`), running rows (`modes.py`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from retrofit.adapters.layout import DraftLayout
from retrofit.runtime.auto.cost import CostModel, Template, calibrate
from retrofit.runtime.backends.interface import Cache
from retrofit.runtime.backends.threads import thread_limit
from retrofit.runtime.host.modes import Run, prefill_step, speculative_step
from retrofit.runtime.plan import Choice, Limits, fitted, likeliest_lengths, max_verify, useful
from retrofit.runtime.request import Request
from retrofit.runtime.rules.tree import Shape, grow

ROWS = 96
"""Rows of one request and forward that a draft tree is grown to: about what a GPU computes at the price of one."""
UNKNOWN_CHANCE = ((0.4, 0.15, 0.1, 0.05),)
"""Chances of the candidates of a slot where none were measured; they shape the tree and change no output."""
RETHINK = 128
"""Steps between two comparisons of all plans: comparing costs as much as a small model's layer."""
PROBE_CAPACITY = 512
"""Positions of the cache they are timed on."""
PROBE_PROMPT = 16
"""Tokens that stand in for a context while plans are timed."""


def tree_shape(
    layout: DraftLayout,
    acceptance: Mapping[str, Any],
    prepare: str | int,
    tree: int | None,
    sampled: bool,
    rows: int = ROWS,
) -> Shape | None:
    """The draft tree of strategy `fused`; None for chains: `prepare="last"`, tree=0, or candidates not measured.

    rows: most rows of a request and forward.
    """
    chance = acceptance.get("ranks", {}).get("sampled" if sampled else "greedy")
    if tree == 0 or prepare == "last" or (tree is None and chance is None):
        return None
    if tree is None:
        tree = largest_tree(layout, rows) if prepare == "all" else rows - 1 - int(prepare) * layout.block
        if tree <= layout.drafts:
            return None
    shape = grow(chance or UNKNOWN_CHANCE * layout.drafts, tree)
    return shape if shape.nodes else None


def largest_tree(layout: DraftLayout, rows: int = ROWS) -> int:
    """Draft nodes that fit into so many rows with a block on the seed and on each of them."""
    return max(0, rows // (1 + layout.block) - 1)


class AutoPolicy:
    """Cost models of one engine, greedy and sampled apart, and the step that obeys them.

    Calls in several threads share them: what one has timed and seen accepted, all plan by.
    """

    def __init__(self, layout: DraftLayout, limits: Limits, acceptance: Mapping[str, Any]):
        self.layout = layout
        self.limits = limits
        self.acceptance = acceptance
        self.costs: dict[bool, CostModel] = {}
        self.calibrated: set[tuple[bool, int]] = set()
        self.decided: dict[tuple[bool, int], tuple[Template, int]] = {}
        """(sampled, batch) -> current plan, and for how many more steps it holds."""
        self._lock = threading.RLock()
        """Over all of the above; never held by a step of a call, but for one that times the plans."""

    def step(self, run: Run, running: Sequence[Request]) -> None:
        """Run the plan that promises most tokens per second now, and learn from what it did."""
        room = run.rows_each(len(running))
        with self._lock:
            costs = self.costs[run.params.temperature > 0]
            template = self.template(run, len(running))
            choices = [fitted(self._choice(costs, template, request), self.layout, room) for request in running]
        run.shape = template.shape
        hoped = [
            r.shape.expected if r.shape is not None and c.verify else None
            for r, c in zip(running, choices, strict=True)
        ]
        cycles = [len(r.stats.accepted) for r in running]
        rows = sum(r.stats.rows for r in running)
        begin = time.perf_counter()
        speculative_step(run, running, choices)
        seconds = time.perf_counter() - begin
        rows = sum(r.stats.rows for r in running) - rows
        with self._lock:
            costs.observe_time(rows, any(c.prepare for c in choices), seconds)
            for request, count, expected in zip(running, cycles, hoped, strict=True):
                if len(request.stats.accepted) > count:
                    costs.observe(request.stats.accepted[-1], request.stats.verified[-1], expected)

    def rows(self, run: Run, batch: int) -> int:
        """About how many rows the next step will run."""
        known = self.decided.get((run.params.temperature > 0, batch))
        template = known[0] if known else Template("ar")
        return batch * (1 + template.verify + template.prepare * self.layout.block)

    def template(self, run: Run, batch: int) -> Template:
        """The best plan, thought over every RETHINK steps."""
        sampled = run.params.temperature > 0
        with self._lock:
            known = self.decided.get((sampled, batch))
            if known is None or known[1] <= 0:
                known = self.decided[sampled, batch] = (self.costs[sampled].best(batch, run.rows_each(batch)), RETHINK)
            self.decided[sampled, batch] = (known[0], known[1] - 1)
            return known[0]

    def _choice(self, costs: CostModel, template: Template, request: Request) -> Choice:
        """A template for one request: what it has drafted, and the accept lengths its confidence finds likeliest."""
        if request.shape is not None:
            rows = tuple(range(len(request.drafts) + 1)) if template.shape is not None else ()
            return Choice(len(request.drafts), useful(request, rows, self.layout, self.limits))
        verify = min(template.verify, len(request.drafts), max_verify(request, self.limits))
        if template.strategy == "ar" or (template.strategy == "two_forward" and verify):
            return Choice(verify)
        lengths: tuple[int, ...] = (0,)
        if verify:
            confidence = request.confidence or costs.conditional()
            lengths = likeliest_lengths(confidence[:verify], verify, template.prepare)
        return Choice(verify, useful(request, lengths, self.layout, self.limits))

    def calibrate(self, run: Run, batch: int) -> None:
        """Time the plans of this batch size once, on a scratch cache, and remember.  Another thread's waits for it."""
        with self._lock:
            if (run.params.temperature > 0, batch) not in self.calibrated:
                self._calibrate(run, batch)

    def _calibrate(self, run: Run, batch: int) -> None:
        prompt = [1] * min(PROBE_PROMPT, self.limits.context // 4)
        scratch = Run(
            run.backend,
            self._probe_cache(run, batch),
            run.params,
            run.layout,
            run.limits,
            with_confidence=run.with_confidence,
        )

        def fresh() -> list[Request]:
            requests = [Request(i, list(prompt), 0, self.limits.context, frozenset(), slot=i) for i in range(batch)]
            scratch.watch(requests)
            return requests

        def step(verified: int, prepared: int) -> float:
            requests = fresh()
            for request in requests:
                request.committed = len(prompt) - 1
                request.drafts = [2] * verified
            choices = [Choice(verified, tuple(range(prepared))) for _ in requests]
            rows = batch * (1 + verified + prepared * self.layout.block)
            with thread_limit(run.backend.device, rows * run.backend.work_per_row):
                begin = time.perf_counter()
                speculative_step(scratch, requests, choices)
                return time.perf_counter() - begin

        room = min(self.limits.context, PROBE_CAPACITY) - len(prompt)
        with torch.inference_mode():
            prefill_step(scratch, fresh())
            self.learn(run.params.temperature > 0, batch, step, room, run.rows_each(batch))
        scratch.cache.release()

    def learn(self, sampled: bool, batch: int, step: Callable[[int, int], float], room: int, rows: int | None) -> None:
        """Time the probe plans of a batch size: `step(verified, prepared)` runs one, returns its seconds."""
        if sampled not in self.costs:
            self.costs[sampled] = self._cost_model("sampled" if sampled else "greedy")
        calibrate(self.costs[sampled], batch, step, room, rows)
        self.calibrated.add((sampled, batch))

    def _probe_cache(self, run: Run, batch: int) -> Cache:
        capacity = min(self.limits.context, PROBE_CAPACITY)
        cache = run.backend.new_cache(batch, capacity)
        for slot in range(batch):
            cache.open(slot, capacity)
        return cache

    def _cost_model(self, kind: str) -> CostModel:
        measured = self.acceptance.get("conditional", {}).get(kind, [])
        prior = [*measured, *[0.0] * self.layout.drafts][: self.layout.drafts]
        chance = self.acceptance.get("ranks", {}).get(kind)
        largest = largest_tree(self.layout)
        sizes = sorted({largest // 4, largest // 2, largest} - {0}) if chance and self.layout.anchored else []
        return CostModel(self.layout, prior, [shape for n in sizes if (shape := grow(chance, n)).nodes])
