"""The steps of the three modes over a batch of requests: one forward each, then what follows from it.

    prefill       prompt rows                         emits the first token
    speculative   `ar`, `two_forward`, `fused` alike: the choice says how many drafts to verify and where to hang blocks
    diffusion     denoise a block until it is full, then commit it by base rows

Tokens that are emitted are always targets y_j = argmax(log p_j + g_j) of base rows (diffusion's are its own).
Not here: admission, choosing among strategies, what a token means to a request (`Request.emit`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.rows import MASK, SequenceRows
from retrofit.runtime.accept import accepted_length
from retrofit.runtime.backends.hf import HFBackend
from retrofit.runtime.cache import KVCache
from retrofit.runtime.drafting import draft_tokens
from retrofit.runtime.plan import Choice, Limits, diffusion_rows, max_verify, new_block, speculative_rows
from retrofit.runtime.request import Request
from retrofit.runtime.sampling import SamplingParams, choose, path_seen, process_logits

PREFILL_ROWS = 2048
"""Prompt rows per forward; bounds activations and attention masks."""


@dataclass
class Run:
    """What all steps of one `generate` call share."""

    backend: HFBackend
    cache: KVCache
    params: SamplingParams
    layout: DraftLayout
    limits: Limits
    threshold: float = 0.9
    """Diffusion: confidence from which a position is committed."""
    with_confidence: bool = False

    @property
    def vocab(self) -> int:
        return self.backend.head.vocab

    def watch(self, requests: Sequence[Request]) -> None:
        """Keep the tokens each request has seen, where a repetition penalty needs them."""
        if self.params.repetition_penalty not in (None, 1.0):
            for request in requests:
                request.watch(self.vocab, self.backend.device)


def prefill_step(run: Run, requests: Sequence[Request]) -> None:
    """Run whole prompts (or, at a longrope crossing, whole sequences) and emit one token each."""
    pending = {r.index: r for r in requests}
    for r in requests:
        r.committed = 0
        r.long_rope = run.limits.boundary is not None and r.position >= run.limits.boundary
    while pending:
        rows, finished, room = [], [], PREFILL_ROWS
        for r in list(pending.values()):
            # Long RoPE factors are chosen by the largest position of a forward, so such a sequence goes in one piece.
            count = len(r.tokens) - r.committed if r.long_rope else min(len(r.tokens) - r.committed, room)
            if count <= 0 or (r.long_rope and rows):
                continue
            part = r.tokens[r.committed : r.committed + count]
            rows.append(SequenceRows(slot=r.slot, start=r.committed, tokens=part, last_logits_only=True))
            r.committed += count
            # A token emitted by re-running a sequence at a longrope crossing costs a decode forward.
            r.stats.count("prefill" if r.output_index == 0 else "ar", count)
            finished.append((r, r.committed == len(r.tokens)))
            room -= count
            if r.long_rope:
                break
        out = run.backend.forward(run.backend.plan(rows), run.cache)
        complete = [i for i, (_, done) in enumerate(finished) if done]
        if not complete:
            continue
        ready = [finished[i][0] for i in complete]
        chosen = _targets(run, out.base_logits[complete], ready, [0] * len(ready))
        for r, token in zip(ready, chosen, strict=True):
            del pending[r.index]
            r.emit([token], prefill=r.output_index == 0)


def speculative_step(run: Run, requests: Sequence[Request], choices: Sequence[Choice]) -> None:
    """One forward of `ar` or `self_spec`: verify, emit, and draft from the block that came true."""
    rows = [
        speculative_rows(r, c, run.layout, run.limits, run.vocab)
        for r, c in zip(requests, choices, strict=True)
    ]
    out = run.backend.forward(run.backend.plan(rows), run.cache)
    owners = [r for r, row in zip(requests, rows, strict=True) for _ in row.tokens]
    steps = [j for row in rows for j in range(len(row.tokens))]
    drafts = [list(row.tokens[1:]) for row in rows]
    targets = _split(
        _targets(run, out.base_logits, owners, steps, list(zip(requests, drafts, strict=True))), rows
    )
    accepted = _accepted(drafts, targets)
    hangs: list[tuple[Request, Tensor]] = []
    offset = 0
    for r, c, row, target, kept in zip(requests, choices, rows, targets, accepted, strict=True):
        size = len(row.tokens) + sum(len(b.inputs) for b in row.blocks)
        r.stats.count(c.kind, size)
        r.drafts, r.confidence = [], []
        if target:
            if c.verify:
                taken = r.emit(target[: kept + 1])
                r.stats.accepted.append(min(kept, taken))
                r.stats.verified.append(c.verify)
            else:
                r.emit(target[:1])
            r.committed += kept + 1
        for length, block in zip(c.prepare, row.blocks, strict=True):
            if length == kept and not r.done:
                first = offset + run.layout.first_drafting_row
                hangs.append((r, out.draft_hidden[first : offset + len(block.inputs)]))
            offset += len(block.inputs)
    if hangs:
        _draft(run, hangs)


def _draft(run: Run, hangs: list[tuple[Request, Tensor]]) -> None:
    """Draft tokens for each request from the drafting rows [D, H] of the block that came true."""
    wanted = [min(len(hidden), max_verify(r, run.limits)) for r, hidden in hangs]
    hangs = [hang for hang, n in zip(hangs, wanted, strict=True) if n > 0]
    wanted = [n for n in wanted if n > 0]
    if not hangs:
        return
    width = max(wanted)
    requests = [r for r, _ in hangs]
    hidden_BDH = torch.stack(
        [torch.nn.functional.pad(h[:width], (0, 0, 0, max(0, width - len(h)))) for _, h in hangs]
    )
    heads = run.backend.heads
    assert heads is not None
    drafted = draft_tokens(
        hidden_BDH,
        [r.tokens[-1] for r in requests],
        [r.seed for r in requests],
        [r.output_index for r in requests],
        _stack_seen(requests),
        run.backend.head,
        heads,
        run.params,
        run.with_confidence,
    )
    tokens = drafted.tokens.tolist()
    confidence = drafted.confidence.tolist() if drafted.confidence is not None else [[]] * len(requests)
    for r, d, c, n in zip(requests, tokens, confidence, wanted, strict=True):
        r.drafts, r.confidence = d[:n], c[:n]


def diffusion_step(run: Run, requests: Sequence[Request]) -> None:
    """One denoise or commit forward for each request."""
    for r in requests:
        if not r.block:
            r.block = new_block(r, run.layout, run.limits)
    planned = [diffusion_rows(r, run.layout, run.limits, run.vocab) for r in requests]
    out = run.backend.forward(run.backend.plan([row for row, _ in planned]), run.cache)
    base = [(r, row) for r, (row, kind) in zip(requests, planned, strict=True) if kind == "commit"]
    last = torch.tensor([len(row.tokens) for _, row in base], dtype=torch.long).cumsum(0) - 1
    owners = [r for r, _ in base]
    steps = [len(row.tokens) - 1 for _, row in base]
    paths = [(r, list(row.tokens[1:])) for r, row in base]
    bonus = dict(
        zip(
            [r.index for r in owners],
            _last_targets(run, out.base_logits[last], owners, steps, paths),
            strict=True,
        )
    )
    offset = 0
    for r, (row, kind) in zip(requests, planned, strict=True):
        r.stats.count(kind, len(row.tokens) + sum(len(b.inputs) for b in row.blocks))
        if kind == "commit":
            r.committed += len(row.tokens)
            r.emit([*row.tokens[1:], bonus[r.index]])
            r.block = []
            continue
        size = len(row.blocks[0].inputs)
        _fill(run, r, out.draft_hidden[offset : offset + size])
        offset += size
        _end_early(r)


def _fill(run: Run, r: Request, hidden_KH: Tensor) -> None:
    """Commit every masked position whose confidence reaches the threshold, and the most confident one in any case."""
    heads = run.backend.heads
    assert heads is not None
    open_slots = [i for i, token in enumerate(r.block) if token == MASK]
    rows = [i - run.layout.shift for i in open_slots]
    left = [r.block[i - 1] if r.block[i - 1] != MASK else heads.unknown for i in open_slots]
    device = hidden_KH.device
    logits = heads.draft_logits(run.backend.head(hidden_KH[rows]), torch.tensor(left, device=device))
    seen = None
    if r.seen is not None:
        known = torch.tensor([t for t in r.block if t != MASK], device=device)
        seen = r.seen.index_fill(0, known, True).expand(len(rows), -1)
    seed = torch.full((len(rows),), r.seed, dtype=torch.int64, device=device)
    index = torch.tensor([r.output_index + i - 1 for i in open_slots], dtype=torch.int64, device=device)
    tokens = choose(process_logits(logits, run.params, seen), run.params, seed, index)
    sure = torch.softmax(logits, dim=-1).gather(-1, tokens[:, None]).squeeze(-1)
    best = int(sure.argmax())
    for n, (slot, token, confidence) in enumerate(
        zip(open_slots, tokens.tolist(), sure.tolist(), strict=True)
    ):
        if n == best or confidence >= run.threshold:
            r.block[slot] = token


def _end_early(r: Request) -> None:
    """EOS with no mask before it ends the request; so does a full block that exhausts the budget: no commit is owed."""
    known = r.block[1 : r.block.index(MASK)] if MASK in r.block else r.block[1:]
    ends = next((i for i, token in enumerate(known) if token in r.eos), None)
    if ends is not None:
        r.emit(known[: ends + 1])
    elif len(known) >= r.remaining:
        r.emit(known)


def _targets(
    run: Run,
    logits_RV: Tensor,
    owners: Sequence[Request],
    steps: Sequence[int],
    paths: list[tuple[Request, list[int]]] | None = None,
) -> list[int]:
    """y of each base row: row n belongs to owners[n] and stands steps[n] tokens after its seed.

    paths: the drafts each request's rows run over, so that the repetition penalty sees every row's own path.
    """
    if not owners:
        return []
    seen = None
    if owners[0].seen is not None:
        seen = (
            torch.cat([path_seen(r.seen, drafts) for r, drafts in paths if r.seen is not None])
            if paths is not None
            else _stack_seen(owners)
        )
    device = logits_RV.device
    scores = process_logits(logits_RV, run.params, seen)
    seed = torch.tensor([r.seed for r in owners], dtype=torch.int64, device=device)
    index = torch.tensor([r.output_index + j for r, j in zip(owners, steps, strict=True)], device=device)
    chosen: list[int] = choose(scores, run.params, seed, index).tolist()
    return chosen


def _last_targets(
    run: Run,
    logits_RV: Tensor,
    owners: Sequence[Request],
    steps: Sequence[int],
    paths: list[tuple[Request, list[int]]],
) -> list[int]:
    """As `_targets`, for the last base row of each commit only."""
    seen = [path_seen(r.seen, drafts)[-1:] for r, drafts in paths if r.seen is not None]
    if not owners:
        return []
    device = logits_RV.device
    scores = process_logits(logits_RV, run.params, torch.cat(seen) if seen else None)
    seed = torch.tensor([r.seed for r in owners], dtype=torch.int64, device=device)
    index = torch.tensor([r.output_index + j for r, j in zip(owners, steps, strict=True)], device=device)
    chosen: list[int] = choose(scores, run.params, seed, index).tolist()
    return chosen


def _accepted(drafts: list[list[int]], targets: list[list[int]]) -> list[int]:
    """Accepted drafts of each request; lists are ragged."""
    width = max(len(d) for d in drafts)
    if width == 0:
        return [0] * len(drafts)
    draft_BK = torch.tensor([d + [0] * (width - len(d)) for d in drafts])
    target_BK1 = torch.tensor([t + [0] * (width + 1 - len(t)) for t in targets])
    accepted: list[int] = accepted_length(
        draft_BK, target_BK1, torch.tensor([len(d) for d in drafts])
    ).tolist()
    return accepted


def _split(values: list[int], rows: Sequence[SequenceRows]) -> list[list[int]]:
    parts, start = [], 0
    for row in rows:
        parts.append(values[start : start + len(row.tokens)])
        start += len(row.tokens)
    return parts


def _stack_seen(requests: Sequence[Request]) -> Tensor | None:
    seen = [r.seen for r in requests if r.seen is not None]
    return torch.stack(seen) if seen else None
