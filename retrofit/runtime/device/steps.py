"""One step of all running requests, planned on the device; the host reads what happened later.

    host     launch n | launch n+1 | read n | launch n+2 | read n+1 ...
    device   [ step n ][ step n+1 ][ step n+2 ] ...

Not here: admission and prefill (`engine.py`), what a step computes (`loop.py`), what `auto` finds best (`policy.py`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from retrofit.runtime.auto.policy import AutoPolicy, Verified
from retrofit.runtime.device.loop import loop_over
from retrofit.runtime.device.lowering import draft_parents, verified_parents
from retrofit.runtime.plan import Cycle, StepPlan, cut_cycle, kind_of_forward, num_rows
from retrofit.runtime.request import Request
from retrofit.runtime.run import Run

LAG = 1
"""Steps in flight beyond the one that is being read."""


@dataclass
class Flight:
    """A step that runs or has run, and where its record arrives."""

    plan: StepPlan
    requests: list[Request]
    rows_each: int
    rows: int
    record: Tensor
    events: tuple[torch.cuda.Event, torch.cuda.Event, torch.cuda.Event] | None
    seconds: float


class DeviceSteps:
    """The stepper of one `generate` call: `ar`, `two_forward`, `fused` and `auto`."""

    def __init__(self, run: Run, requests: Sequence[Request], slots: int, policy: AutoPolicy):
        """policy: what `auto` goes by.  A fixed cycle is cut once, to what `slots` requests leave each other."""
        self.run, self.policy = run, policy
        self.loop = loop_over(run)
        room = run.rows_each(self.loop.lanes_for(slots))
        self.fixed = None if run.cycle is None else cut_cycle(run.cycle, run.layout, room)
        self.flights: deque[Flight] = deque()
        self.drafted: tuple[int, ...] = (-1,)
        """Parents of the drafts on the device."""
        self.left: list[StepPlan] = []
        """What is left of the present cycle."""
        self.loop.reset(ignore_eos=all(not r.eos for r in requests))

    def start(self, requests: Sequence[Request]) -> None:
        """Take over requests that have just been prefilled."""
        for request in requests:
            request.committed = request.position
            self.loop.start(request)

    def finish(self, request: Request) -> None:
        """A request that is done, perhaps by a stop string, of which the device knows nothing."""
        self.loop.stop(request.slot)

    def step(self, running: list[Request]) -> None:
        """Launch one step for the running requests, read what an earlier one did."""
        slots = [r.slot for r in running]
        if self.fixed is None:
            self._time_plans(len(slots))
        lanes = self.loop.serve(slots)
        plan = self._next(self.fixed or self.policy.choose(self.run.sampled, lanes, self.run.rows_each(lanes)))
        if plan.verify and verified_parents(plan) != self.drafted:
            self.loop.forget_drafts()
        if plan.blocks:
            self.drafted = draft_parents(plan)
        self.flights.append(self._launch(plan, list(running), lanes))
        while len(self.flights) > LAG:
            self._read(self.flights.popleft())

    def _next(self, cycle: Cycle) -> StepPlan:
        """The next plan of a cycle, from its beginning where the one before it was of another."""
        if not self.left or self.left[0] not in cycle:
            self.left = list(cycle)
        return self.left.pop(0)

    def _time_plans(self, batch: int) -> None:
        """Run the trials of so many requests once, without requests: products and launches, which dominate.

        Times go by rows, so what was timed for many requests tells about few.
        """
        lanes, sampled, policy = self.loop.lanes_for(batch), self.run.sampled, self.policy
        if (sampled, lanes) in policy.timed:
            return
        known = policy.model(sampled).times.rows(True)
        if len(known) > 2 and any(was == sampled and timed > lanes for was, timed in policy.timed):
            return
        self.loop.serve([self.loop.idle] * batch)
        for plan in policy.trials(sampled, lanes, self.run.limits.context, self.run.rows_each(lanes)):
            if (plan, lanes) not in self.loop.steps:
                self.loop.step(plan, lanes)
            flight = self._launch(plan, [], lanes)
            self._wait(flight)
            policy.learn(sampled, flight.rows, plan.blocks > 0, flight.seconds)
        policy.timed.add((sampled, lanes))

    def _launch(self, plan: StepPlan, requests: list[Request], lanes: int) -> Flight:
        each = num_rows(plan, self.run.layout)
        begin = time.perf_counter()
        events = None
        if self.loop.backend.device.type == "cuda":
            events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True), torch.cuda.Event())
            events[0].record()
        record = self.loop.step(plan, lanes).record
        assert record is not None
        if events is None:
            return Flight(plan, requests, each, lanes * each, record.clone(), None, time.perf_counter() - begin)
        events[1].record()
        arrived = torch.empty(record.shape, dtype=record.dtype, pin_memory=True)
        arrived.copy_(record, non_blocking=True)
        events[2].record()
        return Flight(plan, requests, each, lanes * each, arrived, events, 0.0)

    def _wait(self, flight: Flight) -> None:
        if flight.events is not None:
            begin, end, done = flight.events
            done.synchronize()
            flight.seconds = begin.elapsed_time(end) / 1e3

    def _read(self, flight: Flight) -> None:
        """Tell the requests, and the policy, what a step did."""
        self._wait(flight)
        plan, learned = flight.plan, []
        for request, record in zip(flight.requests, flight.record.tolist(), strict=False):
            taken, accepted, verified, *tokens = record
            if request.done:
                continue
            if not taken:
                raise RuntimeError(f"request {request.index} has ended on the device, and the host was not told")
            request.stats.count(kind_of_forward(verified, plan.blocks), flight.rows_each)
            request.emit(tokens[:taken])
            request.committed = request.position
            if verified:
                request.stats.accepted.append(accepted)
                request.stats.verified.append(verified)
                if self.fixed is None:
                    learned.append(Verified(accepted, verified, None if plan.tree is None else plan.tree.expected))
        if self.fixed is None:
            self.policy.learn(self.run.sampled, flight.rows, plan.blocks > 0, flight.seconds, learned)
