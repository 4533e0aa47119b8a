"""The state of all requests on the device, and the steps over it: planned, decided and drafted there.

A step is one CUDA graph, replayed: lay the rows, forward, choose targets, accept, draft.  The state of the requests
(tokens, lengths, drafts) stays on the device, so a step waits for nothing.  A request ends on the device at EOS and at
its length; stop strings are found by the host, and what was decoded meanwhile is dropped.
Without CUDA the same steps run one launch at a time.

Not here: which step is next, and reading what it did (`steps.py`), what the kernels compute (`kernels/`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from retrofit.adapters.layout import DraftLayout
from retrofit.errors import ResourceError
from retrofit.runtime.backends.fused.backend import FusedGQA
from retrofit.runtime.backends.fused.paged import HEADROOM, PagedCache
from retrofit.runtime.device.lowering import lowered
from retrofit.runtime.kernels.drafting import draft
from retrofit.runtime.kernels.rows import Rows
from retrofit.runtime.kernels.sampling import candidates
from retrofit.runtime.kernels.state import GIVEN, Outcome, State, StepTensors
from retrofit.runtime.kernels.steps import accept, allocate_rows, compact, lay_rows
from retrofit.runtime.plan import StepPlan
from retrofit.runtime.request import Request
from retrofit.runtime.rules.sampling import Processing, process_logits
from retrofit.runtime.run import Run

CANDIDATES = 64
"""Tokens per slot among which the Markov head chooses: the trunk's likeliest."""
LOOPS = 4
"""Sampling parameters whose recorded steps are kept: each has a state and graphs of its own."""


@dataclass
class Step:
    """A plan for so many lanes: its rows and tables on the device, and the graph that runs it."""

    plan: StepPlan
    tensors: StepTensors
    rows: Rows
    seeds: Tensor
    indices: Tensor
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
        self.steps: dict[tuple[StepPlan, int], Step] = {}
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

    def step(self, plan: StepPlan, lanes: int) -> Step:
        """Run one step for the lanes; its record is on the device when the stream gets there."""
        step = self.steps.get((plan, lanes)) or self._new_step(plan, lanes)
        if step.graph is None:
            self._body(step)
        else:
            step.graph.replay()
        return step

    def _new_step(self, plan: StepPlan, lanes: int) -> Step:
        device, most = self.backend.device, self.backend.most_rows
        tensors = lowered(plan, self.layout.block, device)
        rows = allocate_rows(tensors, lanes, most, self.backend.groups, device)
        if most is not None and rows.num_rows > most:
            raise RuntimeError(f"a {plan.kind} step of {lanes} lanes has {rows.num_rows} rows, the bucket {most}")
        seeds = torch.zeros(rows.num_base, dtype=torch.int64, device=device)
        step = Step(plan, tensors, rows, seeds, torch.zeros_like(seeds))
        if device.type == "cuda":
            self._capture(step)
        self.steps[plan, lanes] = step
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
        backend, state, cache, rows, tensors = self.backend, self.state, self.cache, step.rows, step.tensors
        lanes = self.lanes[: rows.num_base // tensors.base_rows]
        noise = backend.head.vocab if self.layout.input == "noise" else None
        lay_rows(
            state, lanes, tensors, cache.block_table, backend.context_length, noise, rows, step.seeds, step.indices
        )
        hidden = backend.run(rows, cache)
        # One pass over the vocabulary's weights serves targets and drafts; a bucket never changes its row count.
        all_rows = tensors.blocks > 0 or backend.exact == "bucket"
        logits = backend.head(hidden if all_rows else hidden[: rows.num_base])
        scores = process_logits(logits[: rows.num_base], self.params, None) if self.params.temperature else logits
        targets = backend.choose(scores[: rows.num_base], self.params, step.seeds, step.indices)
        before = None if tensors.chain else state.length[lanes]
        outcome = accept(state, lanes, tensors, targets, rows, self.layout.first_drafting_row)
        if before is not None:
            compact(cache.keys, cache.values, cache.block_table, lanes, before, outcome.path, outcome.kept)
        if tensors.blocks:
            self._draft(tensors, logits, hidden, outcome, lanes)
        step.record = outcome.record

    def _draft(self, step: StepTensors, logits: Tensor, hidden: Tensor, outcome: Outcome, lanes: Tensor) -> None:
        """Draft from the block that came true, and say where the next blocks hang."""
        state, heads, D = self.state, self.backend.heads, step.draft_deepest
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
        if step.hang == GIVEN:
            rows = self._likeliest(step, hidden, chosen, previous, tokens)
            none = torch.full_like(rows, -1)
            none[:, 0] = 0
            state.anchors[lanes, : rows.shape[1]] = torch.where(made[:, None], rows, none)
        if self.override is not None:
            self.override(state)

    def _likeliest(self, step: StepTensors, hidden: Tensor, chosen: Tensor, previous: Tensor, tokens: Tensor) -> Tensor:
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
        return ends.topk(step.blocks, dim=1).indices.sort(dim=1).values
