"""The step of mode `diffusion`: denoise a block until it is full, then commit it by base rows.

The tokens of a block are the drafter's own choice; only the one after it is a target of a base row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from retrofit.adapters.rows import MASK
from retrofit.runtime.host.modes import Paths, _constrain, _params, _path_counts, _path_seen, _targets
from retrofit.runtime.plan import diffusion_rows, new_block
from retrofit.runtime.request import Request
from retrofit.runtime.rules.sampling import choose, path_counts, process_logits
from retrofit.runtime.run import Run


def diffusion_step(run: Run, requests: Sequence[Request]) -> None:
    """One denoise or commit forward for each request."""
    for r in requests:
        if not r.block:
            r.block = new_block(r, run.layout, run.limits)
    planned = [diffusion_rows(r, run.layout, run.limits, run.vocab) for r in requests]
    out = run.backend.forward(run.backend.row_plan([row for row, _ in planned]), run.cache)
    commits = [(r, row) for r, (row, kind) in zip(requests, planned, strict=True) if kind == "commit"]
    owners = [r for r, _ in commits]
    last = torch.tensor([len(row.tokens) for _, row in commits], dtype=torch.long).cumsum(0) - 1
    rows = [row for _, row in commits]
    seen, counts = _path_seen(owners, rows), _path_counts(owners, rows)
    targets = _targets(
        run,
        out.base_logits[last],
        owners,
        [len(row.tokens) - 1 for _, row in commits],
        Paths(
            None if seen is None else seen[last],
            [list(row.tokens[1:]) for row in rows],
            None if counts is None else counts[last],
        ),
    )
    bonus = {r.index: target for r, target in zip(owners, targets, strict=True)}
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
    seen = counts = None
    known = [t for t in r.block if t != MASK]
    if r.seen is not None:
        seen = r.seen.index_fill(0, torch.tensor(known, device=device), True).expand(len(rows), -1)
    if r.counts is not None:  # the block begins with the seed, which is counted already
        counts = path_counts(r.counts, known[1:])[-1:].expand(len(rows), -1)
    seed = torch.full((len(rows),), r.seed, dtype=torch.int64, device=device)
    index = torch.tensor([r.output_index + i - 1 for i in open_slots], dtype=torch.int64, device=device)
    constrain = _constrain([r] * len(rows), [r.block[1:i] for i in open_slots])
    params = _params(run, [r])
    tokens = choose(process_logits(logits, params, seen, constrain, counts), params, seed, index)
    sure = torch.softmax(logits, dim=-1).gather(-1, tokens[:, None]).squeeze(-1)
    best = int(sure.argmax())
    for n, (slot, token, confidence) in enumerate(zip(open_slots, tokens.tolist(), sure.tolist(), strict=True)):
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
