"""One step of all running requests, planned on the host: any backend, mode and strategy.

Not here: admission, what a step does (`modes.py`), which plan `auto` picks (`policy.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from retrofit.runtime.auto.policy import AutoPolicy
from retrofit.runtime.backends.threads import thread_limit
from retrofit.runtime.host.diffusion import diffusion_step
from retrofit.runtime.host.modes import Run, prefill_step, speculative_step
from retrofit.runtime.plan import fitted, looked_up, speculative_choice
from retrofit.runtime.request import Request


@dataclass
class HostSteps:
    """The stepper of one `generate` call."""

    run: Run
    policy: AutoPolicy
    mode: str
    strategy: str
    prepare: str | int

    def start(self, requests: Sequence[Request]) -> None:
        """Requests that have just been prefilled."""

    def finish(self, request: Request) -> None:
        """A request that is done."""

    def step(self, running: list[Request]) -> None:
        """One forward for each running request."""
        for group in self._groups(running):
            self._step(group)

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
        size = max(1, most // self.run.layout.block) if self.mode == "diffusion" else most
        return [side[i : i + size] for side in sides for i in range(0, len(side), size)]

    def _step(self, running: list[Request]) -> None:
        run, boundary = self.run, self.run.limits.boundary
        if boundary is not None and run.backend.rope_restarts and running[0].position >= boundary:
            crossing = [r for r in running if not r.long_rope]
            if crossing:
                for request in crossing:
                    request.drafts, request.shape, request.block = [], None, []
                prefill_step(run, crossing)
                running = [r for r in running if r not in crossing]
                if not running:
                    return
        rows = len(running) if self.mode == "ar" else len(running) * (1 + run.layout.block)
        if self.mode == "self_spec" and self.strategy == "auto":
            rows = self.policy.rows(run, len(running))
        with thread_limit(run.backend.device, rows * run.backend.work_per_row):
            self._step_group(running)

    def _step_group(self, running: list[Request]) -> None:
        run = self.run
        if self.mode == "diffusion":
            diffusion_step(run, running)
            return
        if self.mode == "self_spec" and self.strategy == "auto":
            self.policy.step(run, running)
            return
        if self.strategy == "prompt_lookup" and self.mode == "self_spec":
            for request in running:
                request.drafts = looked_up(request.tokens, run.layout.drafts)
        name = "ar" if self.mode == "ar" else self.strategy
        choices = [speculative_choice(r, name, self.prepare, run.layout, run.limits) for r in running]
        speculative_step(run, running, [fitted(c, run.layout, run.rows_each(len(running))) for c in choices])
