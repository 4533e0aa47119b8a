"""What a step does for a request, and which rows that makes.  Pure functions of its state; no tensor, no model.

    self_spec, seed at p, drafts d1 d2 (K = 3), verify 2, blocks on the rows {0, 2}:
      base rows    seed d1 d2           at p p+1 p+2
      block of 0   M M M                at p+1 p+2 p+3       used if no draft is accepted
      block of 2   M M M                at p+3 p+4 p+5       used if both are

A strategy is a cycle of plans, taken in turn:

    ar              {seed}
    two_forward     {seed} + block  |  {seed, d_1 .. d_k}
    fused           {seed, d_1 .. d_k} + blocks on all rows, on the last, or on the likeliest h; drafts may branch
    prompt_lookup   {seed, d_1 .. d_k}, drafts that the text itself proposes
    hybrid          {seed, a tree of both} + blocks where it likely ends: which, is chosen for each request and step
    the same        {seed, a few of the text's} + block  |  {seed, a tree of both}: prepare="none"

On the host a plan is made for each request (`planned`), then cut to the rows there are (`cut`); on the device it is cut
once and lowered to tensors (`device/lowering.py`), and the kernels leave out what a request cannot use.
Rows at or beyond the context limit are never planned, nor is what the remaining budget cannot use.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.rows import MASK, Block, SequenceRows
from retrofit.errors import UsageError
from retrofit.runtime.backends.interface import Backend
from retrofit.runtime.options import Decoding
from retrofit.runtime.request import Request
from retrofit.runtime.rules.sampling import Processing, hash_bits_plain
from retrofit.runtime.rules.tree import ROWS, SEED_ALONE, DraftTree, fixed_tree

Hang = str | int | tuple[int, ...]
"""Base rows that blocks hang on: "all", "last", the likeliest so many, or just these.  Of a chain a row's number is the
accept length that makes its block come true."""


@dataclass(frozen=True)
class StepPlan:
    """What one step does for a request: which drafts it verifies, where it hangs blocks, what it drafts.

    The base rows are the seed and `verify` drafts, the first ones; they hang on the tree that they were made on.
    """

    verify: int = 0
    hang: Hang = ()
    draft: int = 0
    """Drafts to make of the block that comes true.  The host makes all that a block proposes, for whatever plan is
    next."""
    tree: DraftTree | None = None
    """What they are made on, its first nodes; None: a chain."""
    rows: int | None = None
    """Of `hybrid`: rows of a request that its drafts and blocks share, as pays most in this step; None: as above."""
    worth: float = 0.0
    """Drafts that a block is expected to have accepted in the next step."""

    @cached_property
    def blocks(self) -> int:
        """How many blocks it runs."""
        if isinstance(self.hang, tuple):
            return len(self.hang)
        if self.hang == "last":
            return 1
        return self.verify + 1 if self.hang == "all" else min(int(self.hang), self.verify + 1)

    @cached_property
    def kind(self) -> str:
        return kind_of_forward(self.verify, self.blocks)


WORTH = 1.0
"""`StepPlan.worth` where nothing was measured."""
BEYOND_TEXT = 0.8
"""Share of what a block has accepted that the text alone would not propose."""
TEXTS = 3
"""Drafts of the text alone that `hybrid` verifies beside a block where it drafts and verifies in turn."""
Cycle = tuple[StepPlan, ...]
AR: Cycle = (StepPlan(),)


@dataclass(frozen=True)
class Limits:
    """Positions that must not be reached: the context, and for longrope the boundary a forward may not cross."""

    context: int
    boundary: int | None = None

    def end(self, request: Request) -> int:
        """Rows of this request stay below this position."""
        if self.boundary is None or request.position >= self.boundary:
            return self.context
        return min(self.boundary, self.context)


def kind_of_forward(verified: int, blocks: int) -> str:
    """As what the statistics count a forward of one request."""
    if verified:
        return "fused" if blocks else "verify"
    return "draft" if blocks else "ar"


# Cycles of plans


def two_forward(drafts: int) -> Cycle:
    return StepPlan(0, "all", drafts), StepPlan(drafts)


def fused(drafts: int, hang: str | int = "all", tree: DraftTree | None = None) -> Cycle:
    return (StepPlan(drafts, hang, drafts, tree),)


def lookup(layout: DraftLayout) -> Cycle:
    """Verifies what the text itself proposes; it is the only cycle that verifies and never drafts."""
    return (StepPlan(layout.drafts),)


def hybrid(layout: DraftLayout, tree: DraftTree | None) -> Cycle:
    """tree: of the adapter alone; the rows are as many as it has with a block on each node, None: ROWS."""
    if tree is None:
        return (StepPlan(1, 1, 1, rows=ROWS, worth=WORTH),)
    return (StepPlan(1, 1, 1, rows=(1 + tree.nodes) * (1 + layout.block), worth=BEYOND_TEXT * tree.expected),)


def hybrid_in_turn(layout: DraftLayout, tree: DraftTree) -> Cycle:
    """As many drafts of both as the tree has, verified with no block beside them: fewer rows in two forwards."""
    drafting = StepPlan(1, 1, 1, rows=1 + TEXTS + layout.block, worth=BEYOND_TEXT * tree.expected)
    return drafting, StepPlan(1, rows=1 + tree.nodes)


def fixed_cycle(strategy: str, prepare: str | int, layout: DraftLayout, tree: DraftTree | None = None) -> Cycle:
    """The plans of `ar` or of a fixed strategy.  prepare, tree: of `fused`, where blocks hang and how drafts branch."""
    if strategy == "ar":
        return AR
    if strategy == "prompt_lookup":
        return lookup(layout)
    if strategy == "two_forward":
        return two_forward(layout.drafts)
    if strategy == "hybrid":
        return hybrid_in_turn(layout, tree) if prepare == "none" and tree is not None else hybrid(layout, tree)
    return fused(layout.drafts if tree is None else tree.nodes, prepare, tree)


def cycle_of(
    way: Decoding,
    layout: DraftLayout,
    acceptance: Mapping[str, Any],
    backend: Backend,
    processing: Processing,
    slots: int,
) -> Cycle | None:
    """The plans of `ar` or of a fixed strategy; None: of others.  acceptance: what the artifact says of its candidates.

    Raises UsageError for a tree that the backend cannot verify.
    """
    if way.name in ("auto", "diffusion"):
        return None
    grown, most = None, backend.most_nodes
    if way.name in ("fused", "hybrid"):
        room = ROWS if backend.most_rows is None else min(ROWS, backend.most_rows // backend.lanes(slots))
        grown = fixed_tree(layout, acceptance, way.prepare, way.tree, processing.temperature > 0, room)
    if grown is not None and most is not None and grown.nodes > most:
        raise UsageError(f"tree is {grown.nodes}; the {backend.name} backend verifies up to {most} draft nodes")
    return fixed_cycle(way.name, way.prepare, layout, grown)


def cut(plan: StepPlan, layout: DraftLayout, rows: int | None) -> StepPlan:
    """A plan cut to `rows` rows of a request (None: any number): blocks go first, then drafts; `ar` always fits."""
    if rows is None or not (plan.verify or plan.hang):
        return plan
    if plan.rows is not None:  # of `hybrid`, which shares them out itself
        return replace(plan, rows=min(plan.rows, rows))
    base = 1 if layout.anchored or not plan.hang else 0
    verify, hang = plan.verify, plan.hang
    if hang and base + layout.block <= rows:
        verify = min(verify, rows - base - layout.block)
    verify = min(verify, rows - 1)
    room = max(0, (rows - base - verify) // layout.block)
    if isinstance(hang, tuple):
        hang = tuple(j for j in hang if j <= verify)[:room]
    elif room < replace(plan, verify=verify).blocks:
        hang = room or ()
    return StepPlan(verify, hang, min(plan.draft, verify) if plan.verify else plan.draft, plan.tree)


def cut_cycle(cycle: Cycle, layout: DraftLayout, rows: int | None) -> Cycle:
    """The cycle of a fixed strategy whose steps all fit: where nothing can be verified beside a block, it is in turn
    with it; where no block fits, nothing is drafted."""
    if rows is None or cycle == AR:
        return cycle
    if (1 if layout.anchored else 0) + layout.block > rows:
        return AR
    last = cut(cycle[-1], layout, rows)
    return (last,) if len(cycle) == 1 and last.verify else two_forward(min(layout.drafts, rows - 1))


def num_rows(plan: StepPlan, layout: DraftLayout) -> int:
    """Rows that a plan runs for a request which has all its drafts."""
    if plan.rows is not None:
        return plan.rows
    base = 1 if layout.anchored or not plan.blocks else 0
    return base + plan.verify + plan.blocks * layout.block


# The plan of one request


def planned(
    cycle: Cycle, request: Request, layout: DraftLayout, limits: Limits, chance: Sequence[float] = ()
) -> StepPlan:
    """What a request does next of a cycle: what its drafts, its budget and the context leave of one of the plans.

    chance: that each draft of a chain is accepted, given those before it, where no confidence head has said so.
    """
    drafts, tree = len(request.drafts), request.tree
    verify = min(cycle[-1].verify, drafts, max_verify(request, limits)) if tree is None else drafts
    plan = cycle[-1] if verify else cycle[0]
    rows: Sequence[int]
    if not plan.hang or (tree is not None and plan.tree is None):
        rows = ()  # drafts of a tree that the plan does not have any more are verified, and nothing hangs on them
    elif plan.hang == "all":
        rows = range(verify + 1)
    elif plan.hang == "last":
        rows = (verify,)
    else:
        assert isinstance(plan.hang, int)
        confidence = (request.confidence or chance)[:verify]
        rows = likeliest_lengths(confidence, verify, plan.hang) if tree is None else tree.likeliest_ends(plan.hang)
    return StepPlan(verify, useful(request, rows, layout, limits), plan.draft, plan.tree)


def shared(plan: StepPlan, request: Request, layout: DraftLayout, limits: Limits) -> StepPlan:
    """What a request does next of `hybrid`: which nodes of its tree it verifies, and where it hangs blocks."""
    assert plan.rows is not None
    tree = request.tree or SEED_ALONE
    if plan.hang:
        nodes, hang = shared_rows(tree, plan.rows, layout.block, plan.worth)
    else:
        nodes, hang = min(tree.nodes, plan.rows - 1), ()
    return replace(plan, verify=nodes, hang=useful(request, hang, layout, limits))


def shared_rows(tree: DraftTree, rows: int, block: int, worth: float) -> tuple[int, tuple[int, ...]]:
    """(nodes, rows to hang blocks on) that promise most of so many rows: the seed's, the nodes' and `block` a block.

    n nodes promise the sum of their survivals, and a block `worth` times the chance that the accepted path ends where
    it hangs: a node more may take from a block's end what it does not give.
    """
    ends, rising = [1.0], [1.0]
    expected, best, found = 0.0, -1.0, 0
    for nodes in range(min(tree.nodes, rows - 1) + 1):
        if nodes:
            parent, alive = tree.parents[nodes], tree.survival[nodes]
            rising.pop(bisect_left(rising, ends[parent]))
            ends[parent] -= alive
            ends.append(alive)
            insort(rising, ends[parent])
            insort(rising, alive)
            expected += alive
        blocks = (rows - 1 - nodes) // block
        promised = expected + worth * sum(rising[max(0, len(rising) - blocks) :])
        if promised > best:
            best, found = promised, nodes
    return found, tree.first(found).likeliest_ends((rows - 1 - found) // block)


def max_verify(request: Request, limits: Limits) -> int:
    """How many drafts can still be used: one forward emits one token more than it accepts."""
    return max(0, min(request.remaining - 1, limits.end(request) - 1 - request.position))


def useful(request: Request, rows: Sequence[int], layout: DraftLayout, limits: Limits) -> tuple[int, ...]:
    """Base rows whose block could still be verified: two tokens left after it, and room for a first draft."""
    kept = []
    for j in rows:
        depth = j if request.tree is None else request.tree.depths[j]
        start = request.position + depth + 1 if layout.anchored else request.position
        emitted = depth + 1 if layout.anchored else 0
        if request.remaining - emitted >= 2 and start + 1 < limits.end(request):
            kept.append(j)
    return tuple(kept)


def likeliest_lengths(confidence: Sequence[float], verify: int, count: int) -> tuple[int, ...]:
    """The `count` likeliest accept lengths 0..verify: P(j) = c_1 .. c_j (1 - c_{j+1}).  Ties to the shorter."""
    alive, chance = 1.0, []
    for j in range(verify + 1):
        c = confidence[j] if j < min(verify, len(confidence)) else 0.0
        chance.append(alive * (1 - c))
        alive *= c
    best = sorted(range(verify + 1), key=lambda j: (-chance[j], j))[:count]
    return tuple(sorted(best))


# Its rows


def speculative_rows(request: Request, plan: StepPlan, layout: DraftLayout, limits: Limits, vocab: int) -> SequenceRows:
    """Rows of an `ar`, `draft`, `verify` or `fused` forward.  plan: of this request, so it says which rows."""
    p, tree = request.position, request.tree
    assert isinstance(plan.hang, tuple)
    if not layout.anchored and plan.hang:
        block = draft_block(request, p, request.tokens[-1], -1, layout, limits, vocab)
        return SequenceRows(request.slot, request.committed, blocks=[block], given=request.given)
    tokens = [request.tokens[-1], *request.drafts[: plan.verify]]
    depth = list(range(len(tokens))) if tree is None else tree.depths
    blocks = [draft_block(request, p + depth[j] + 1, None, j, layout, limits, vocab) for j in plan.hang]
    parents = None if tree is None or not plan.verify else tree.parents[: len(tokens)]
    if plan.rows is not None and parents == tuple(range(-1, len(tokens) - 1)):
        parents = None  # these drafts happen not to branch
    return SequenceRows(request.slot, request.committed, tokens, blocks, parents=parents, given=request.given)


def draft_block(
    request: Request,
    start: int,
    first: int | None,
    anchor: int,
    layout: DraftLayout,
    limits: Limits,
    vocab: int,
) -> Block:
    """An unfilled block at `start`; its first row reads `first` where the layout has the seed as a draft row.

    Only causal blocks are cut to the budget (exact there); the others run the trained K, up to the context.
    """
    rows = min(layout.block, limits.end(request) - start)
    if layout.causal:
        left = request.max_new_tokens + len(request.prompt) - start
        rows = max(1, min(rows, left - 1 + layout.first_drafting_row))
    inputs = [noise_token(request.seed, start + i, vocab) if layout.input == "noise" else MASK for i in range(rows)]
    if first is not None:
        inputs[0] = first
    return Block(start, inputs, anchor)


def noise_token(seed: int, position: int, vocab: int) -> int:
    """A vocabulary id that is a function of (seed, position) only: inputs have to be arbitrary and repeatable."""
    return hash_bits_plain(seed, position, 0) % vocab


def diffusion_rows(
    request: Request, layout: DraftLayout, limits: Limits, vocab: int, revised: bool, room: int | None
) -> tuple[SequenceRows, str]:
    """A `commit` forward of base rows over the seed and what was filled in behind it, and the blocks that hang on it.

    One block, or where the base may take tokens back (revised) one on each end, the likeliest of them if there is not
    room for all.  Where the seed is a draft row a `denoise` forward comes first, whose block hangs on none: anchor -1.
    room: rows that it may have; None: any number.
    """
    seed = request.tokens[-1]
    if not layout.anchored and not request.block and useful(request, (0,), layout, limits):
        block = draft_block(request, request.position, seed, -1, layout, limits, vocab)
        return SequenceRows(request.slot, request.committed, blocks=[block], given=request.given), "denoise"
    tokens = list(request.block) or [seed]
    last = len(tokens) - 1
    ends: Sequence[int] = ()
    if layout.anchored:
        most = last + 1 if room is None else max(0, room - len(tokens)) // layout.block
        ends = likeliest_lengths(request.confidence, last, most) if revised else (last,)[:most]
    hang = useful(request, ends, layout, limits)
    blocks = [draft_block(request, request.position + j + 1, None, j, layout, limits, vocab) for j in hang]
    return SequenceRows(request.slot, request.committed, tokens, blocks, given=request.given), "commit"
