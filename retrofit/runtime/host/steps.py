"""One step of all running requests, planned on the host: any backend, mode and strategy.

Not here: admission, what a step does (`modes.py`), what `auto` finds best (`policy.py`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from retrofit.runtime.auto.policy import AutoPolicy, Verified
from retrofit.runtime.backends.threads import thread_limit
from retrofit.runtime.host.diffusion import diffusion_step
from retrofit.runtime.host.modes import prefill_step, speculative_step
from retrofit.runtime.host.prefixes import keep_text
from retrofit.runtime.plan import AR, Cycle, StepPlan, cut, cut_cycle, looked_up, num_rows, planned
from retrofit.runtime.request import Request
from retrofit.runtime.run import Run

TRIAL_CAPACITY = 512
"""Positions of the cache that trials run on."""
TRIAL_PROMPT = 16
"""Tokens that stand in for a context while plans are timed."""


class HostSteps:
    """The stepper of one `generate` call."""

    def __init__(self, run: Run, requests: Sequence[Request], slots: int, policy: AutoPolicy):
        """policy: what `auto` goes by; its plans of `slots` requests are timed now, if they never were."""
        self.run, self.policy = run, policy
        if run.strategy == "auto" and requests:
            time_plans(run, slots, policy)

    def start(self, requests: Sequence[Request]) -> None:
        """Requests that have just been prefilled."""

    def finish(self, request: Request) -> None:
        """A request that is done."""

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
        size = max(1, most // self.run.layout.block) if self.run.strategy == "diffusion" else most
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
        cycle = self.policy.choose(run.sampled, count, run.rows_each(count)) if run.strategy == "auto" else run.cycle
        if run.strategy == "auto" and cycle is not None:
            rows = 1 + cycle[-1].verify + cycle[-1].blocks * run.layout.block
        else:
            rows = 1 if run.strategy == "ar" else 1 + run.layout.block
        with thread_limit(run.backend.device, count * rows * run.backend.work_per_row):
            if cycle is None:
                diffusion_step(run, running)
            elif run.strategy == "auto":
                self._timed(cycle, running)
            else:
                speculative_step(run, running, self._plans(cycle, running))

    def _plans(self, cycle: Cycle, running: Sequence[Request]) -> list[StepPlan]:
        """What each request does next of a cycle."""
        run = self.run
        if run.strategy == "ar":
            return list(AR) * len(running)
        if run.strategy == "prompt_lookup":
            for request in running:
                request.drafts = looked_up(request.tokens, run.layout.drafts)
        chance: Sequence[float] = ()
        if run.strategy == "auto" and isinstance(cycle[-1].hang, int):
            chance = self.policy.model(run.sampled).conditional()
        room = run.rows_each(len(running))
        if run.strategy in ("fused", "two_forward"):
            cycle = cut_cycle(cycle, run.layout, room)
        return [cut(planned(cycle, r, run.layout, run.limits, chance), run.layout, room) for r in running]

    def _timed(self, cycle: Cycle, running: Sequence[Request]) -> None:
        """Take a step of `auto`, and tell the policy what it did."""
        plans = self._plans(cycle, running)
        before = [(r.stats.rows, len(r.stats.accepted)) for r in running]
        trees = [r.tree if p.verify else None for r, p in zip(running, plans, strict=True)]
        begin = time.perf_counter()
        speculative_step(self.run, running, plans)
        seconds = time.perf_counter() - begin
        rows = sum(r.stats.rows - ran for r, (ran, _) in zip(running, before, strict=True))
        verified = [
            Verified(r.stats.accepted[-1], r.stats.verified[-1], None if tree is None else tree.expected)
            for r, (_, verifications), tree in zip(running, before, trees, strict=True)
            if len(r.stats.accepted) > verifications
        ]
        self.policy.learn(self.run.sampled, rows, any(p.hang for p in plans), seconds, verified)


def time_plans(run: Run, batch: int, policy: AutoPolicy) -> None:
    """Run the trials of a batch size once, on a scratch cache.  Another thread's call waits for them."""
    capacity = min(run.limits.context, TRIAL_CAPACITY)
    prompt = [1] * min(TRIAL_PROMPT, run.limits.context // 4)
    with policy.lock, torch.inference_mode():
        trials = policy.trials(run.sampled, batch, capacity - len(prompt), run.rows_each(batch))
        if trials:
            cache = run.backend.new_cache(batch, capacity)
            for slot in range(batch):
                cache.open(slot, capacity)
            scratch = replace(
                run, cache=cache, mixed=False, ruled=False, seen=False, counts=False, told=False, pieces=None
            )
            prefill_step(scratch, _stand_ins(scratch, prompt, batch))
            for plan in trials:
                seconds = _seconds(scratch, plan, _stand_ins(scratch, prompt, batch))
                policy.learn(run.sampled, batch * num_rows(plan, run.layout), plan.blocks > 0, seconds, trial=True)
            cache.release()
        policy.timed.add((run.sampled, batch))


def _stand_ins(run: Run, prompt: Sequence[int], batch: int) -> list[Request]:
    requests = [Request(i, list(prompt), 0, run.limits.context, frozenset(), slot=i) for i in range(batch)]
    run.watch(requests)
    return requests


def _seconds(run: Run, plan: StepPlan, requests: Sequence[Request]) -> float:
    """Of one step of these requests, whose prompts are in the cache; a tree runs as the chain of its nodes."""
    for request in requests:
        request.committed = len(request.prompt) - 1
        request.drafts = [2] * plan.verify
    plans = [StepPlan(plan.verify, tuple(range(plan.blocks)))] * len(requests)
    work = len(requests) * (1 + plan.verify + plan.blocks * run.layout.block) * run.backend.work_per_row
    with thread_limit(run.backend.device, work):
        begin = time.perf_counter()
        speculative_step(run, requests, plans)
        return time.perf_counter() - begin
