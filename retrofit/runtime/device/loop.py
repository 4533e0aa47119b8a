"""One step of all running requests, planned, decided and drafted on the device; the host reads what happened later.

    host     launch n | launch n+1 | read n | launch n+2 | read n+1 ...
    device   [ step n ][ step n+1 ][ step n+2 ] ...

A step is one CUDA graph, replayed: plan the rows, forward, choose targets, accept, draft.  The state of the requests
(tokens, lengths, drafts) stays on the device, so a step waits for nothing.  A request ends on the device at EOS and at
its length; stop strings are found by the host, and what was decoded meanwhile is dropped.
Without CUDA the same steps run one launch at a time.

Not here: admission and prefill (`engine.py`), what the kernels compute (`kernels/`), which plan `auto` picks.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from retrofit.adapters.layout import DraftLayout
from retrofit.errors import ResourceError
from retrofit.runtime.auto.cost import Template
from retrofit.runtime.auto.policy import AutoPolicy
from retrofit.runtime.backends.fused.backend import FusedGQA
from retrofit.runtime.backends.fused.paged import HEADROOM, PagedCache
from retrofit.runtime.device.kinds import Kind, chain, kinds_of, name_of
from retrofit.runtime.host.modes import Run
from retrofit.runtime.kernels.drafting import draft
from retrofit.runtime.kernels.rows import Rows
from retrofit.runtime.kernels.sampling import candidates
from retrofit.runtime.kernels.state import GIVEN, Outcome, State, StepShape
from retrofit.runtime.kernels.steps import accept, allocate_rows, compact, plan_rows
from retrofit.runtime.request import Request
from retrofit.runtime.rules.sampling import Processing, process_logits
from retrofit.runtime.rules.tree import depths

CANDIDATES = 64
"""Tokens per slot among which the Markov head chooses: the trunk's likeliest."""
LOOPS = 4
"""Sampling parameters whose recorded steps are kept: each has a state and graphs of its own."""
LAG = 1
"""Steps in flight beyond the one that is being read."""


@dataclass
class Step:
    """A kind of step for so many lanes: its rows and tables on the device, and the graph that runs it."""

    kind: Kind
    shape: StepShape
    rows: Rows
    seeds: Tensor
    indices: Tensor
    draft_parents: Tensor
    draft_ranks: Tensor
    draft_depths: Tensor
    draft_depth: int
    anchors: Tensor | None
    """Rows that blocks always hang on."""
    record: Tensor | None = None
    graph: torch.cuda.CUDAGraph | None = None


def loop_over(run: Run) -> DeviceLoop:
    """The steps recorded over a cache with these sampling parameters, or none yet."""
    assert isinstance(run.backend, FusedGQA) and isinstance(run.cache, PagedCache)
    loops = run.cache.loops
    loop = loops.pop(run.params, None) or DeviceLoop(run.backend, run.cache, run.params)
    while len(loops) >= LOOPS:
        del loops[next(iter(loops))]
    loops[run.params] = loop
    return loop


class DeviceLoop:
    """State of the requests on the device, and the steps over it, captured once each."""

    def __init__(
        self,
        backend: FusedGQA,
        cache: PagedCache,
        params: Processing,
        override: Callable[[State], None] | None = None,
    ):
        """override: changes the drafts after they were made; for benchmarks with a stated acceptance."""
        self.backend, self.cache, self.params, self.override = backend, cache, params, override
        self.layout: DraftLayout = backend.layout
        self.idle = cache.slots
        """The state has one row more than there are slots: idle lanes serve it, and it is never active."""
        self.state = State.empty(cache.slots + 1, cache.capacity + 1, HEADROOM, sorted(backend.eos), backend.device)
        self.lanes = torch.full((cache.slots,), self.idle, dtype=torch.int64, device=backend.device)
        self.serving: list[int] = []
        """Slots that the lanes serve now."""
        self.steps: dict[tuple[Kind, int], Step] = {}
        self.pool = torch.cuda.graph_pool_handle() if backend.device.type == "cuda" else None

    def reset(self, ignore_eos: bool) -> None:
        """Forget all requests."""
        self.serving = []
        self.state.active.zero_()
        eos = [-1] if ignore_eos else sorted(self.backend.eos) or [-1]
        self.state.eos.copy_(torch.tensor(eos + [-1] * (len(self.state.eos) - len(eos))))

    def start(self, request: Request) -> None:
        """Take over a prefilled request."""
        state, slot = self.state, request.slot
        state.tokens[slot, : len(request.tokens)] = torch.tensor(request.tokens, device=state.tokens.device)
        for column, value in (
            (state.length, len(request.tokens)),
            (state.end, len(request.prompt) + request.max_new_tokens),
            (state.origin, len(request.prompt)),
            (state.seed, request.seed),
            (state.active, 1),
        ):
            column[slot] = value
        self.forget_drafts(slot)

    def forget_drafts(self, slot: int | slice = slice(None)) -> None:
        self.state.num_drafts[slot] = 0
        self.state.anchors[slot, 0] = 0
        self.state.anchors[slot, 1:] = -1

    def stop(self, slot: int) -> None:
        self.state.active[slot] = 0

    def serve(self, slots: Sequence[int]) -> int:
        """Give each lane its slot; returns how many lanes the step has."""
        if self.serving != list(slots):
            self.serving = list(slots)
            self.lanes.copy_(torch.tensor([*slots, *[self.idle] * (self.cache.slots - len(slots))]))
        return self.lanes_for(len(slots))

    def lanes_for(self, requests: int) -> int:
        return min(self.backend.lanes(requests), self.cache.slots)

    def step(self, kind: Kind, lanes: int) -> Step:
        """Run one step for the lanes; its record is on the device when the stream gets there."""
        step = self.steps.get((kind, lanes)) or self._new_step(kind, lanes)
        if step.graph is None:
            self._body(step)
        else:
            step.graph.replay()
        return step

    def _new_step(self, kind: Kind, lanes: int) -> Step:
        device, layout = self.backend.device, self.layout
        shape = StepShape.of(kind.parents, kind.blocks, layout.block, kind.hang, device)
        rows = allocate_rows(shape, lanes, self.backend.most_rows, self.backend.groups, device)
        if self.backend.most_rows is not None and rows.num_rows > self.backend.most_rows:
            raise RuntimeError(
                f"{kind.name} of {lanes} lanes has {rows.num_rows} rows, the bucket {self.backend.most_rows}"
            )
        keys = [torch.zeros(rows.num_base, dtype=torch.int64, device=device) for _ in range(2)]
        depth = depths(kind.draft_parents)
        parents, ranks, deep = (
            torch.tensor(list(v), device=device) for v in (kind.draft_parents, kind.draft_ranks, depth)
        )
        anchors = None if kind.anchors is None else torch.tensor(kind.anchors, device=device)
        step = Step(kind, shape, rows, keys[0], keys[1], parents, ranks, deep, max(depth), anchors)
        if device.type == "cuda":
            self._capture(step)
        self.steps[kind, lanes] = step
        return step

    def _capture(self, step: Step) -> None:
        """Compile every kernel in a run without requests, then record the step.

        Raises ResourceError when the memory that the step works in is not there.
        """
        serving = self.lanes.clone()
        self.lanes.fill_(self.idle)
        try:
            step.graph = self._recorded(step)
        except torch.cuda.OutOfMemoryError as error:
            raise ResourceError(
                f"there is no memory left to decode {len(self.lanes)} requests in", "run fewer requests at once"
            ) from error
        finally:
            self.lanes.copy_(serving)

    def _recorded(self, step: Step) -> torch.cuda.CUDAGraph:
        stream = self.backend.recording_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._body(step)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # One pool for all: steps never run beside each other, and a step's record is copied before the next one runs.
        with torch.cuda.graph(graph, pool=self.pool, stream=stream):
            self._body(step)
        return graph

    def _body(self, step: Step) -> None:
        backend, state, cache, rows, shape = self.backend, self.state, self.cache, step.rows, step.shape
        lanes = self.lanes[: rows.num_base // shape.base_rows]
        noise = backend.head.vocab if self.layout.input == "noise" else None
        plan_rows(state, lanes, shape, cache.block_table, backend.context_length, noise, rows, step.seeds, step.indices)
        hidden = backend.run(rows, cache)
        # One pass over the vocabulary's weights serves targets and drafts; a bucket never changes its row count.
        all_rows = shape.blocks > 0 or backend.exact == "bucket"
        logits = backend.head(hidden if all_rows else hidden[: rows.num_base])
        scores = process_logits(logits[: rows.num_base], self.params, None) if self.params.temperature else logits
        targets = backend.choose(scores[: rows.num_base], self.params, step.seeds, step.indices)
        before = None if shape.chain else state.length[lanes]
        outcome = accept(state, lanes, shape, targets, rows, self.layout.first_drafting_row)
        if before is not None:
            compact(cache.keys, cache.values, cache.block_table, lanes, before, outcome.path, outcome.kept)
        if shape.blocks:
            self._draft(step, logits, hidden, outcome, lanes)
        step.record = outcome.record

    def _draft(self, step: Step, logits: Tensor, hidden: Tensor, outcome: Outcome, lanes: Tensor) -> None:
        """Draft from the block that came true, and say where the next blocks hang."""
        state, heads, D = self.state, self.backend.heads, step.draft_depth
        assert heads is not None
        temperature = self.params.temperature
        length, seed = state.length[lanes], state.seed[lanes]
        previous, index = state.tokens[lanes, length - 1], length - state.origin[lanes]
        chosen = outcome.chosen[:, :D].contiguous()
        slots = index[:, None] + torch.arange(D, device=index.device)
        count = min(CANDIDATES, logits.shape[1])
        ids = candidates(
            logits, chosen.view(-1), count, temperature, seed.repeat_interleave(D), slots.reshape(-1)
        ).view(len(lanes), D, count)
        tokens = draft(
            logits, chosen, ids, previous, heads.markov_w1, heads.markov_w2,
            step.draft_parents, step.draft_ranks, step.draft_depths, temperature, seed, index,
        )  # fmt: skip
        made = chosen[:, 0] >= 0
        state.drafts[lanes, : tokens.shape[1]] = tokens
        state.num_drafts[lanes] = torch.where(made, tokens.shape[1], 0)
        if step.shape.hang == GIVEN:
            rows = self._likeliest(step, hidden, chosen, previous, tokens)
            none = torch.full_like(rows, -1)
            none[:, 0] = 0
            state.anchors[lanes, : rows.shape[1]] = torch.where(made[:, None], rows, none)
        if self.override is not None:
            self.override(state)

    def _likeliest(self, step: Step, hidden: Tensor, chosen: Tensor, previous: Tensor, tokens: Tensor) -> Tensor:
        """[lanes, blocks] rows at which the accepted path most likely ends; as `plan.likeliest_lengths`."""
        if step.anchors is not None:
            return step.anchors.expand(len(tokens), -1)
        heads, k = self.backend.heads, tokens.shape[1]
        assert heads is not None
        before = torch.cat([previous[:, None], tokens[:, :-1]], dim=1).reshape(-1)
        logits = heads.confidence_logits(hidden[chosen.clamp(min=0).view(-1)], before)
        if logits is None:
            sure = torch.full(tokens.shape, 0.5, device=tokens.device)
        else:
            kind = int(self.params.temperature > 0)
            sure = torch.sigmoid(logits[:, kind].view(-1, k) / heads.confidence_temperature[kind, :k])
        alive = torch.nn.functional.pad(sure.cumprod(1), (1, 0), value=1.0)
        ends = alive * (1 - torch.nn.functional.pad(sure, (0, 1), value=0.0))
        return ends.topk(step.shape.blocks, dim=1).indices.sort(dim=1).values


@dataclass
class Flight:
    """A step that runs or has run, and where its record arrives."""

    kind: Kind
    template: Template
    requests: list[Request]
    rows_each: int
    rows: int
    record: Tensor
    events: tuple[torch.cuda.Event, torch.cuda.Event, torch.cuda.Event] | None
    seconds: float


class DeviceSteps:
    """The stepper of one `generate` call on the fused backend: `ar`, `two_forward`, `fused` and `auto`."""

    def __init__(self, run: Run, loop: DeviceLoop, policy: AutoPolicy, template: Template | None, ignore_eos: bool):
        """template: the fixed plan; None: `auto`."""
        self.run, self.loop, self.policy, self.fixed = run, loop, policy, template
        self.flights: deque[Flight] = deque()
        self.drafted: tuple[int, ...] = (-1,)
        """Shape of the drafts on the device."""
        self.turn: list[Kind] = []
        """What is left of the present plan's steps."""
        loop.reset(ignore_eos)

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
            self._calibrate(len(slots))
        lanes = self.loop.serve(slots)
        template = self.fixed or self.policy.template(self.run, lanes)
        if not self.turn or self.turn[0] not in kinds_of(template):
            self.turn = kinds_of(template)
        kind = self.turn.pop(0)
        if kind.rows > 1 and kind.parents != self.drafted:
            self.loop.forget_drafts()
        if kind.blocks:
            self.drafted = kind.draft_parents
        self.flights.append(self._launch(kind, template, list(running), lanes))
        while len(self.flights) > LAG:
            self._read(self.flights.popleft())

    def _calibrate(self, batch: int) -> None:
        """Time the plans once, without requests: products and launches, which dominate.

        Times go by rows, so what was timed for many requests tells about few.
        """
        lanes, sampled = self.loop.lanes_for(batch), self.run.params.temperature > 0
        if (sampled, lanes) in self.policy.calibrated:
            return
        known = self.policy.costs[sampled].times[True] if sampled in self.policy.costs else {}
        if len(known) > 2 and any(was == sampled and timed > lanes for was, timed in self.policy.calibrated):
            return
        self.loop.serve([self.loop.idle] * batch)

        def step(verified: int, prepared: int) -> float:
            if not prepared:
                kind = Kind("verify", chain(verified))
            elif not verified:
                kind = kinds_of(Template("two_forward", self.run.layout.drafts))[0]
            else:
                trees = {shape.nodes: shape for shape in self.policy.costs[sampled].shapes}
                tree = trees.get(verified) if prepared == verified + 1 else None
                kind = kinds_of(Template("fused", verified, prepared, tree))[0]
            if (kind, lanes) not in self.loop.steps:
                self.loop.step(kind, lanes)
            flight = self._launch(kind, Template("ar"), [], lanes)
            self._wait(flight)
            return flight.seconds

        self.policy.learn(sampled, lanes, step, self.run.limits.context, self.run.rows_each(lanes))

    def _launch(self, kind: Kind, template: Template, requests: list[Request], lanes: int) -> Flight:
        cuda = self.loop.backend.device.type == "cuda"
        each = kind.rows + kind.blocks * self.run.layout.block
        begin = time.perf_counter()
        events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) if cuda else None
        if events is not None:
            events[0].record()
        record = self.loop.step(kind, lanes).record
        assert record is not None
        if events is None:
            record = record.clone()
        else:
            events[1].record()
            arrived = torch.empty(record.shape, dtype=record.dtype, pin_memory=True)
            record = arrived.copy_(record, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
            return Flight(kind, template, requests, each, lanes * each, record, (events[0], events[1], done), 0.0)
        return Flight(kind, template, requests, each, lanes * each, record, None, time.perf_counter() - begin)

    def _wait(self, flight: Flight) -> None:
        if flight.events is not None:
            begin, end, done = flight.events
            done.synchronize()
            flight.seconds = begin.elapsed_time(end) / 1e3

    def _read(self, flight: Flight) -> None:
        """Tell the requests, and the cost model, what a step did."""
        self._wait(flight)
        costs = self.policy.costs[self.run.params.temperature > 0] if self.fixed is None else None
        for request, record in zip(flight.requests, flight.record.tolist(), strict=False):
            taken, accepted, verified, *tokens = record
            if request.done:
                continue
            if not taken:
                raise RuntimeError(f"request {request.index} has ended on the device, and the host was not told")
            request.stats.count(name_of(flight.kind, verified), flight.rows_each)
            request.emit(tokens[:taken])
            request.committed = request.position
            if verified:
                request.stats.accepted.append(accepted)
                request.stats.verified.append(verified)
            if costs is not None and verified:
                tree = flight.template.shape
                costs.observe(accepted, verified, None if tree is None else tree.expected)
        if costs is not None:
            costs.observe_time(flight.rows, flight.kind.blocks > 0, flight.seconds)
