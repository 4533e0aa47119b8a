"""What an engine runs while it generates, as it passes: the rows of every forward, their logits, what was drafted.

Forwards planned on the host are watched where the backend runs them.  Steps planned on the device (`device/loop.py`)
are read back from the rows that the kernels laid and ran; on a GPU they then run one launch at a time, not as graphs.
Either way a forward becomes `SequenceRows`, the same for both backends.  Not here: judging any of it (`replay.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from retrofit.adapters.rows import MASK, Block, SequenceRows
from retrofit.runtime.host import modes, steps

if TYPE_CHECKING:
    from retrofit.runtime.engine import Engine

TREE = 5
"""Which of the arguments of `draft_tokens` behind the first four is the tree."""
Key = tuple[int, int]
"""(request seed, output index of the first draft)."""


@dataclass(frozen=True)
class Proposal:
    """Drafted tokens; parents of row 0, the seed, and of each of them (a chain: -1, 0, 1, ...)."""

    tokens: list[int]
    parents: list[int]
    grown: bool = False
    """Whether its nodes are the first of a tree that was grown for the run, of however many nodes."""


@dataclass
class Recorded:
    """One forward.  All of it is on the CPU."""

    sequences: list[SequenceRows]
    logits: Tensor
    """[R, V] of the base rows whose logits were wanted."""
    positions: list[int]
    """Of all base rows, as the model was given them."""
    paths: list[list[int]] | None
    """Trees: for each base row the rows of its sequence that it stands on and sees, itself last.  None: chains."""
    proposals: dict[Key, Proposal] = field(default_factory=dict)
    """What was drafted after it."""
    grafted: dict[Key, Proposal] = field(default_factory=dict)
    """Trees of `hybrid` that were grown after it, to be verified by the next forward of each text."""


class _Recorder:
    """Hands each forward on as soon as the next one begins, when all that belongs to it is there."""

    def __init__(self, sink: Callable[[Recorded], None]):
        self.sink = sink
        self.last: Recorded | None = None

    def put(self, forward: Recorded | None) -> None:
        if self.last is not None:
            self.sink(self.last)
        self.last = forward


@contextmanager
def recording(engine: Engine, sink: Callable[[Recorded], None]) -> Iterator[None]:
    """Hand every forward of the generation inside to `sink`, one after another, none of them kept.

    A draft tree's logits are many: those of a large vocabulary would not fit into memory together.
    """
    recorder = _Recorder(sink)
    with ExitStack() as hooks:
        # What a text before this one left behind would be seen by no forward of this one.
        _replace(engine, "prefixes", None, hooks)
        _watch_host(engine, recorder, hooks)
        if engine.backend.name == "fused":
            _watch_device(engine, recorder, hooks)
        yield
    recorder.put(None)


def _replace(owner: Any, name: str, value: Any, hooks: ExitStack) -> None:
    """Set an attribute until the hooks are taken off, on the instance or module itself."""
    own, before = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    hooks.callback(lambda: setattr(owner, name, before) if own else delattr(owner, name))


def _watch_host(engine: Engine, recorder: _Recorder, hooks: ExitStack) -> None:
    backend, forward, draft = engine.backend, engine.backend.forward, modes.draft_tokens
    ran: list[Any] = []

    def recorded(plan: Any, cache: Any, *rest: Any, **named: Any) -> Any:
        out = forward(plan, cache, *rest, **named)
        count = sum(len(s.tokens) for s in plan.sequences)
        tree = any(s.parents is not None for s in plan.sequences)
        if ran:
            positions = ran[-1].positions[:count].tolist()
            paths = _fused_paths(ran[-1], count) if tree else None
        else:
            positions, paths = plan.positions[0, :count].tolist(), _group_paths(plan) if tree else None
        logits = out.base_logits.detach().cpu().clone()
        recorder.put(Recorded(list(plan.sequences), logits, positions, paths))
        ran.clear()
        return out

    def drafted(hidden: Any, previous: Any, seeds: Sequence[int], indices: Sequence[int], *rest: Any) -> Any:
        made = draft(hidden, previous, seeds, indices, *rest)
        tree = rest[TREE]
        if recorder.last is not None and any(
            part is backend.heads for part in rest
        ):  # another engine's drafts are none of ours
            for seed, index, tokens in zip(seeds, indices, made.tokens.tolist(), strict=True):
                parents = list(range(-1, len(tokens))) if tree is None else list(tree.parents)
                recorder.last.proposals[seed, index] = Proposal(tokens, parents, tree is not None)
        return made

    def grafted(run: Any, requests: Sequence[Any], rows: Sequence[int]) -> None:
        graft(run, requests, rows)
        if recorder.last is not None and run.backend is backend:
            for r in requests:
                recorder.last.grafted[r.seed, r.output_index] = Proposal(list(r.drafts), list(r.tree.parents), True)

    graft = steps.graft
    _replace(backend, "forward", recorded, hooks)
    _replace(modes, "draft_tokens", drafted, hooks)
    _replace(steps, "graft", grafted, hooks)
    if backend.name == "fused":
        run = backend.run  # type: ignore[attr-defined]

        def watched(rows: Any, *rest: Any, **named: Any) -> Any:
            ran[:] = [rows]
            return run(rows, *rest, **named)

        _replace(backend, "run", watched, hooks)


def _group_paths(plan: Any) -> list[list[int]]:
    """What each base row of a tree forward sees of its sequence's rows, from the matrix that attention gets."""
    group, paths = plan.base, []
    rows = [len(s.tokens) for s in plan.sequences if s.tokens]
    for seen, count in zip(group.ancestors, rows, strict=True):
        paths += [[int(j) for j in seen[t].nonzero()[0]] for t in range(count)]
    return paths


def _fused_paths(rows: Any, count: int) -> list[list[int]]:
    """Likewise from the table of the kernels: place of position start + d is start + paths[d]."""
    depth = (rows.positions[:count] - rows.starts[:count]).tolist()
    return [path[: d + 1] for path, d in zip(rows.paths[:count].tolist(), depth, strict=True)]


class _RecordedHead:
    """A vocabulary projection that keeps what it last gave."""

    def __init__(self, head: Any):
        self._head = head
        self.logits: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._head, name)

    def __call__(self, hidden: Tensor) -> Tensor:
        self.logits = self._head(hidden)
        return self.logits


def _watch_device(engine: Engine, recorder: _Recorder, hooks: ExitStack) -> None:
    backend, stepper = engine.backend, engine.backend.stepper
    head = _RecordedHead(backend.head)

    def with_steps(*arguments: Any) -> Any:
        steps = stepper(*arguments)
        if hasattr(steps, "loop"):
            _watch_loop(steps.loop, head, recorder, hooks)
        return steps

    _replace(backend, "head", head, hooks)
    _replace(backend, "stepper", with_steps, hooks)


def _watch_loop(loop: Any, head: _RecordedHead, recorder: _Recorder, hooks: ExitStack) -> None:
    right = loop.step

    def stepped(plan: Any, lanes: int) -> Any:
        step = right(plan, lanes)
        assert head.logits is not None
        forward = _read_back(loop, step, head.logits)
        if forward.sequences:
            recorder.put(forward)
        return step

    _replace(loop, "step", stepped, hooks)
    _replace(loop, "steps", {}, hooks)  # a recorded graph shows nothing of what happens in it
    _replace(loop, "_capture", lambda step: None, hooks)


def _read_back(loop: Any, step: Any, logits: Tensor) -> Recorded:
    """The rows that a step on the device ran, lane by lane; lanes without a request have none in use."""
    tensors, rows, state, K = step.tensors, step.rows, loop.state, loop.layout.block
    W, base, blocks, follows = tensors.base_rows, rows.num_base, tensors.blocks, tensors.parents.tolist()
    ids, positions, limits = rows.ids.tolist(), rows.positions.tolist(), rows.limits.tolist()
    high = rows.high.tolist()
    table = None if rows.paths is None else rows.paths.tolist()
    found = Recorded([], logits[:0], [], None if table is None else [])
    wanted: list[int] = []
    for lane, slot in enumerate(loop.lanes[: base // W].tolist()):
        used = [j for j in range(W) if limits[lane * W + j] > 0]
        if not used:
            continue
        number, first = {j: n for n, j in enumerate(used)} | {-1: -1}, lane * W
        start = positions[first]
        hung = []
        for m in range(blocks):
            begin = (lane * blocks + m) * K
            own = [base + begin + i for i in range(K) if high[begin + i] > 0]
            if own:
                depth = positions[own[0]] - start - 1
                anchor = depth if table is None else number[table[own[0]][depth]]
                hung.append(Block(positions[own[0]], [MASK if ids[r] < 0 else ids[r] for r in own], anchor))
        parents = None if table is None else [number.get(follows[j], W) for j in used]
        found.sequences.append(SequenceRows(slot, start, [ids[first + j] for j in used], hung, parents=parents))
        found.positions += [positions[first + j] for j in used]
        if table is not None and found.paths is not None:
            found.paths += [
                [number.get(i, W) for i in table[first + j][: positions[first + j] - start + 1]] for j in used
            ]
        wanted += [first + j for j in used]
        count = int(state.num_drafts[slot])
        if count:
            key = int(state.seed[slot]), int(state.length[slot] - state.origin[slot])
            found.proposals[key] = Proposal(
                state.drafts[slot, :count].tolist(), tensors.draft_parents.tolist(), table is not None
            )
    found.logits = logits[wanted].detach().cpu().clone()
    return found
