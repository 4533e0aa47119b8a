"""Which rows a request runs in its next forward.  Pure functions of its state; no tensor, no model.

    self_spec, seed at p, drafts d1 d2 (K = 3), verify 2, prepare {0, 2}:
      base rows    seed d1 d2           at p p+1 p+2
      block of 0   M M M                at p+1 p+2 p+3       used if no draft is accepted
      block of 2   M M M                at p+3 p+4 p+5       used if both are
    `ar` is verify 0, prepare {}.  `two_forward` alternates (0, {0}) and (K, {}).

Rows at or beyond the context limit are never planned, nor is what the remaining budget cannot use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.rows import MASK, Block, SequenceRows
from retrofit.runtime.request import Request
from retrofit.runtime.rules.sampling import hash_bits_plain


@dataclass(frozen=True)
class Choice:
    """What a forward does for one request: verify so many drafts, hang a block on these accept lengths.

    Where drafts branch both count base rows: verify the first nodes of the tree, hang a block on these rows.
    """

    verify: int = 0
    prepare: tuple[int, ...] = ()

    @property
    def kind(self) -> str:
        if self.verify:
            return "fused" if self.prepare else "verify"
        return "draft" if self.prepare else "ar"


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


def speculative_choice(
    request: Request, strategy: str, prepare: str | int, layout: DraftLayout, limits: Limits
) -> Choice:
    """The choice of a fixed strategy: `two_forward`, `fused`, `prompt_lookup` (verify what was looked up), `ar`."""
    verify = min(len(request.drafts), max_verify(request, limits))
    if strategy in ("ar", "prompt_lookup"):
        return Choice(verify)
    if request.shape is not None and strategy == "fused":
        verify = len(request.drafts)
        rows = request.shape.likeliest_ends(verify + 1 if prepare in ("all", "last") else int(prepare))
        return Choice(verify, useful(request, rows, layout, limits))
    if strategy == "two_forward":
        return Choice(verify) if verify else Choice(0, useful(request, (0,), layout, limits))
    if prepare == "all":
        lengths: tuple[int, ...] = tuple(range(verify + 1))
    elif prepare == "last":
        lengths = (verify,)
    else:
        lengths = likeliest_lengths(request.confidence[:verify], verify, int(prepare))
    return Choice(verify, useful(request, lengths, layout, limits))


def fitted(choice: Choice, layout: DraftLayout, rows: int | None) -> Choice:
    """A choice cut to `rows` rows of a request (None: any number): blocks go first, then drafts; `ar` always fits."""
    if rows is None or choice.kind == "ar":
        return choice
    base = 1 if layout.anchored or not choice.prepare else 0
    verify, blocks = choice.verify, choice.prepare
    if blocks and base + layout.block <= rows:
        verify = min(verify, rows - base - layout.block)
    verify = min(verify, rows - 1)
    return Choice(verify, tuple(j for j in blocks if j <= verify)[: max(0, (rows - base - verify) // layout.block)])


def max_verify(request: Request, limits: Limits) -> int:
    """How many drafts can still be used: one forward emits one token more than it accepts."""
    return max(0, min(request.remaining - 1, limits.end(request) - 1 - request.position))


def useful(request: Request, lengths: Sequence[int], layout: DraftLayout, limits: Limits) -> tuple[int, ...]:
    """Accept lengths whose block could still be verified: two tokens left after it, and room for a first draft."""
    kept = []
    for j in lengths:
        depth = j if request.shape is None else request.shape.depths[j]
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


def speculative_rows(request: Request, choice: Choice, layout: DraftLayout, limits: Limits, vocab: int) -> SequenceRows:
    """Rows of an `ar`, `draft`, `verify` or `fused` forward."""
    p, shape = request.position, request.shape
    if not layout.anchored and choice.prepare:
        block = draft_block(request, p, request.tokens[-1], -1, layout, limits, vocab)
        return SequenceRows(slot=request.slot, start=request.committed, blocks=[block])
    tokens = [request.tokens[-1], *request.drafts[: choice.verify]]
    depth = list(range(len(tokens))) if shape is None else shape.depths
    blocks = [draft_block(request, p + depth[j] + 1, None, j, layout, limits, vocab) for j in choice.prepare]
    parents = None if shape is None or not choice.verify else shape.parents[: len(tokens)]
    return SequenceRows(slot=request.slot, start=request.committed, tokens=tokens, blocks=blocks, parents=parents)


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


def diffusion_rows(request: Request, layout: DraftLayout, limits: Limits, vocab: int) -> tuple[SequenceRows, str]:
    """A `denoise` forward while the block has masks, then a `commit` forward of base rows over the full block.

    Gate 1 on all rows of the block, known ones too; the block begins with the seed.
    """
    if MASK not in request.block:
        return SequenceRows(slot=request.slot, start=request.committed, tokens=list(request.block)), "commit"
    start = request.position
    inputs = [
        noise_token(request.seed, start + i, vocab) if token == MASK and layout.input == "noise" else token
        for i, token in enumerate(request.block)
    ]
    return SequenceRows(slot=request.slot, start=request.committed, blocks=[Block(start, inputs)]), "denoise"


def new_block(request: Request, layout: DraftLayout, limits: Limits) -> list[int]:
    """The next block to denoise: the seed, then masks, cut to the context and, as it is filled whole, to the budget."""
    size = min(layout.block, request.remaining + 1, limits.end(request) - request.position)
    return [request.tokens[-1]] + [MASK] * (size - 1)


def looked_up(tokens: Sequence[int], count: int, longest: int = 3) -> list[int]:
    """Prompt lookup: what followed the latest earlier occurrence of the last n tokens, n = longest..1.

    Training-free n-gram drafts (Saxena 2023, "Prompt Lookup Decoding").
    """
    for n in range(min(longest, len(tokens) - 1), 0, -1):
        tail = list(tokens[-n:])
        for i in range(len(tokens) - n - 1, -1, -1):
            if tokens[i] == tail[0] and list(tokens[i : i + n]) == tail:
                return list(tokens[i + n : i + n + count])
    return []
