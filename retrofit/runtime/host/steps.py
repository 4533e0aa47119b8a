"""One step of all running requests, planned on the host: any backend, mode and strategy.

Not here: admission, what a step does (`modes.py`), what `auto` finds best (`policy.py`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from retrofit.runtime.auto.cost import Looked
from retrofit.runtime.auto.kept import Kept
from retrofit.runtime.auto.policy import AutoPolicy, Verified
from retrofit.runtime.backends.threads import thread_limit
from retrofit.runtime.host.diffusion import diffusion_step
from retrofit.runtime.host.grafting import graft
from retrofit.runtime.host.modes import prefill_step, speculative_step
from retrofit.runtime.host.prefixes import keep_text
from retrofit.runtime.plan import AR, Cycle, StepPlan, cut, cut_cycle, lookup, num_rows, planned, shared
from retrofit.runtime.request import Request
from retrofit.runtime.run import Run


class HostSteps:
    """The stepper of one `generate` call."""

    def __init__(self, run: Run, policy: AutoPolicy):
        """policy: what `auto` goes by."""
        self.run, self.policy = run, policy
        self.kept: Kept | None = None
        """Where what is learnt of steps is kept."""
        priced = run.backend.priced_by() if run.strategy == "auto" else None
        if priced is not None:
            self.kept = Kept(policy, {**priced, "draft": run.layout.to_dict()})

    def start(self, requests: Sequence[Request]) -> None:
        """Requests that have just been prefilled."""

    def finish(self, request: Request) -> None:
        """A request that is done."""
        if self.kept is not None:
            self.kept.write()

    def step(self, running: list[Request]) -> None:
        """One forward for each running request."""
        for group in self._groups(running):
            self._step(self._restarted(group))
        keep_text(self.run, running)

    def _groups(self, running: list[Request]) -> list[list[Request]]:
        """Requests that may share a forward.

        Those on either side of a longrope boundary may not: it picks one set of frequencies.  A bucket of rows holds so
        many requests and no more.
        """
        boundary, most = self.run.limits.boundary, self.run.backend.most_rows
        sides = [running]
        if boundary is not None:
            sides = [[r for r in running if (r.position >= boundary) == side] for side in (False, True)]
        if most is None:
            return [side for side in sides if side]
        size = max(1, most // (1 + self.run.layout.block)) if self.run.strategy == "diffusion" else most
        return [side[i : i + size] for side in sides for i in range(0, len(side), size)]

    def _restarted(self, running: list[Request]) -> list[Request]:
        """Run texts that cross a longrope boundary again from their start, which is their step; returns the others."""
        boundary = self.run.limits.boundary
        if boundary is None or not self.run.backend.rope_restarts or running[0].position < boundary:
            return running
        crossing = [r for r in running if not r.long_rope]
        if crossing:
            for request in crossing:
                request.drop_drafts()
                request.block = []
            prefill_step(self.run, crossing)
        return [r for r in running if r not in crossing]

    def _step(self, running: list[Request]) -> None:
        if not running:
            return
        run, count = self.run, len(running)
        cycle = self._chosen(running) if run.strategy == "auto" else run.cycle
        if run.strategy == "auto" and cycle is not None:
            rows = cycle[-1].rows or 1 + cycle[-1].verify + cycle[-1].blocks * run.layout.block
        else:
            rows = 1 if run.strategy == "ar" else 1 + run.layout.block
        with thread_limit(run.backend.device, count * rows * run.backend.work_per_row):
            if cycle is None:
                diffusion_step(run, running)
            elif run.strategy == "auto":
                self._timed(cycle, running)
            else:
                speculative_step(run, running, self._plans(cycle, running))

    def _chosen(self, running: Sequence[Request]) -> Cycle:
        """What `auto` does next."""
        run, count = self.run, len(running)
        looked = [request.looked_up(run.layout.drafts) for request in running]
        rows = max(count, round(sum(one.rows for one in looked)))
        texts = Looked(sum(one.emitted for one in looked) / count, rows)
        return self.policy.choose(run.sampled, count, run.rows_each(count), _context(running), texts)

    def _plans(self, cycle: Cycle, running: Sequence[Request]) -> list[StepPlan]:
        """What each request does next of a cycle."""
        run, room = self.run, self.run.rows_each(len(running))
        if run.strategy == "ar":
            return list(AR) * len(running)
        if cycle[-1].rows is not None:
            plans = [cut(cycle[0] if r.came_true is None else cycle[-1], run.layout, room) for r in running]
            graft(run, running, [num_rows(plan, run.layout) for plan in plans])
            return [shared(plan, r, run.layout, run.limits) for plan, r in zip(plans, running, strict=True)]
        if cycle == lookup(run.layout):
            for request in running:
                request.drop_drafts()
                request.drafts = request.looked_up(run.layout.drafts).proposal()
        chance: Sequence[float] = ()
        if run.strategy == "auto" and isinstance(cycle[-1].hang, int):
            chance = self.policy.model(run.sampled).conditional()
        if run.strategy in ("fused", "two_forward"):
            cycle = cut_cycle(cycle, run.layout, room)
        return [cut(planned(cycle, r, run.layout, run.limits, chance), run.layout, room) for r in running]

    def _timed(self, cycle: Cycle, running: Sequence[Request]) -> None:
        """Take a step of `auto`, and tell the policy what it did."""
        begin = time.perf_counter()
        plans = self._plans(cycle, running)
        before = [(r.stats.rows, len(r.stats.accepted), len(r.tokens)) for r in running]
        context = _context(running)
        trees = [r.tree if p.verify else None for r, p in zip(running, plans, strict=True)]
        speculative_step(self.run, running, plans)
        seconds = time.perf_counter() - begin
        rows = sum(r.stats.rows - ran for r, (ran, *_) in zip(running, before, strict=True))
        emitted = sum(len(r.tokens) - had for r, (*_, had) in zip(running, before, strict=True))
        verified = [
            Verified(r.stats.accepted[-1], r.stats.verified[-1], None if tree is None else tree.expected)
            for r, (_, verifications, _), tree in zip(running, before, trees, strict=True)
            if len(r.stats.accepted) > verifications
        ]
        if cycle == lookup(self.run.layout):
            verified = []  # what the drafter is worth, they do not say
        drafts = any(p.hang for p in plans)
        if cycle[-1].rows is not None:  # what it promises is of both, and its price that of all rows it may have
            verified, rows = [], sum(num_rows(p, self.run.layout) for p in plans)
            drafts = any(p.worth > 0 for p in plans)
        self.policy.learn(
            self.run.sampled, rows, drafts, seconds, verified, batch=len(running), context=context, emitted=emitted,
            cycle=cycle,
        )  # fmt: skip


def _context(running: Sequence[Request]) -> int:
    """Positions behind requests, on average."""
    return sum(r.position for r in running) // len(running)
