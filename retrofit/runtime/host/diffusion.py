"""The step of mode `diffusion`: what a pass over masks is sure of is committed by base rows, which may take it back.

    commit       seed d1 d2           base rows over what was filled in: K/V, and a token of the base's own behind it
                      M  M  M  M      the next block, on each end that the commit may have
    next commit       y  d1'          y: the base's own; d1': reached the threshold; the rest is masked again

A slot that is not sure enough is not waited for: the base's own token comes in its place, and the slots behind are
predicted anew with it.  Passes that go on filling one block cost a forward each, and their text agrees with the base
less (LOG.md).  The base keeps d_j where d_j falls short of its own choice y_j by no more than `tolerance`, in
log-probability, keyed noise included where tokens are drawn.  With 0 the text is that of `ar`; with inf it keeps all.
Layouts whose seed is a draft row have no row to hang a block on: a denoise forward comes before each commit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from retrofit.adapters.rows import MASK, SequenceRows
from retrofit.runtime.host.modes import Paths, _constrain, _groups, _params, _path_counts, _path_seen, _targets
from retrofit.runtime.plan import diffusion_rows
from retrofit.runtime.request import Request
from retrofit.runtime.rules.sampling import choose, gumbel_noise, path_counts, process_logits
from retrofit.runtime.run import Run


def diffusion_step(run: Run, requests: Sequence[Request]) -> None:
    """One denoise or commit forward for each request."""
    room, revised = run.rows_each(len(requests)), run.tolerance < math.inf
    planned = [diffusion_rows(r, run.layout, run.limits, run.vocab, revised, room) for r in requests]
    out = run.backend.forward(run.backend.row_plan([row for row, _ in planned]), run.cache)
    commits = [(r, row) for r, (row, kind) in zip(requests, planned, strict=True) if kind == "commit"]
    kept = dict(zip((r.index for r, _ in commits), _kept(run, commits, out.base_logits), strict=True))
    offset = 0
    for r, (row, kind) in zip(requests, planned, strict=True):
        sizes = [len(block.inputs) for block in row.blocks]
        r.stats.count(kind, len(row.tokens) + sum(sizes))
        hidden = list(out.draft_hidden[offset : offset + sum(sizes)].split(sizes)) if sizes else []
        offset += sum(sizes)
        end = -1
        if kind == "commit":
            end, bonus = kept[r.index]
            r.committed += 1 + end
            r.emit([*row.tokens[1 : 1 + end], bonus])
            r.block, r.confidence = [], []
        came_true = next((n for n, block in enumerate(row.blocks) if block.anchor == end), None)
        if came_true is not None and not r.done:
            _fill(run, r, hidden[came_true], revised)
            if not revised:
                _end_early(r)


def _kept(run: Run, commits: Sequence[tuple[Request, SequenceRows]], logits_RV: Tensor) -> list[tuple[int, int]]:
    """Of each committed block, how many tokens behind the seed the base keeps, and its own token after them."""
    owners = [r for r, row in commits for _ in row.tokens]
    steps = [n for _, row in commits for n in range(len(row.tokens))]
    rows, requests = [row for _, row in commits], [r for r, _ in commits]
    drafts = [list(row.tokens[1 : n + 1]) for row in rows for n in range(len(row.tokens))]
    paths = Paths(_path_seen(requests, rows), drafts, _path_counts(requests, rows))
    targets = _targets(run, logits_RV, owners, steps, paths)
    following = [token for row in rows for token in (*row.tokens[1:], MASK)]
    short = None
    if 0 < run.tolerance < math.inf:
        short = _shortfalls(run, logits_RV, owners, steps, paths, following)
    found, first = [], 0
    for row in rows:
        count = 0
        while count < len(row.tokens) - 1:
            at = first + count
            close = run.tolerance == math.inf or (short is not None and short[at] <= run.tolerance)
            if following[at] != targets[at] and not close:
                break
            count += 1
        found.append((count, targets[first + count]))
        first += len(row.tokens)
    return found


def _shortfalls(
    run: Run, logits_RV: Tensor, owners: Sequence[Request], steps: Sequence[int], paths: Paths, following: Sequence[int]
) -> list[float]:
    """By how much the token after each base row falls short of the best in what the base chooses by."""
    found = [0.0] * len(owners)
    for group in _groups(run, owners):
        some, part = [owners[n] for n in group], paths.of(group)
        params = _params(run, some)
        scores = process_logits(logits_RV[group], params, part.seen, _constrain(some, part.drafts), part.counts)
        if params.temperature > 0:
            seed = torch.tensor([r.seed for r in some], dtype=torch.int64, device=scores.device)
            index = torch.tensor([owners[n].output_index + steps[n] for n in group], device=scores.device)
            scores = gumbel_noise(seed, index, run.vocab) + scores
        token = torch.tensor([max(0, following[n]) for n in group], device=scores.device)
        short = scores.amax(-1) - scores.gather(-1, token[:, None])[:, 0]
        for n, value in zip(group, short.tolist(), strict=True):
            found[n] = value
    return found


def _fill(run: Run, r: Request, hidden_KH: Tensor, revised: bool) -> None:
    """Fill the next block's slots, left to right, up to the first whose confidence does not reach the threshold."""
    most = r.remaining - 1 if revised else r.remaining
    drafting = hidden_KH[run.layout.first_drafting_row :][: max(0, most)]
    r.block = [r.tokens[-1]]
    room = run.limits.end(r) - r.position - 1
    for logits in run.backend.head(drafting[: max(0, room)]):
        token, sure = best_of_slot(run, r, len(r.block), logits[None])
        if sure < run.threshold:
            break
        r.block.append(token)
        r.confidence.append(sure)


def best_of_slot(run: Run, r: Request, slot: int, trunk_1V: Tensor) -> tuple[int, float]:
    """The token of a slot of the block, and the drafter's probability of it."""
    heads, device = run.backend.heads, trunk_1V.device
    assert heads is not None
    left = r.block[slot - 1]
    logits = heads.draft_logits(trunk_1V, torch.tensor([heads.unknown if left == MASK else left], device=device))
    known = [token for token in r.block if token != MASK]
    seen = counts = None
    if r.seen is not None:
        seen = r.seen.index_fill(0, torch.tensor(known, device=device), True)[None]
    if r.counts is not None:  # the block begins with the seed, which is counted already
        counts = path_counts(r.counts, known[1:])[-1:]
    params = _params(run, [r])
    scores = process_logits(logits, params, seen, _constrain([r], [r.block[1:slot]]), counts)
    seed = torch.tensor([r.seed], dtype=torch.int64, device=device)
    index = torch.tensor([r.output_index + slot - 1], dtype=torch.int64, device=device)
    token = int(choose(scores, params, seed, index))
    return token, float(torch.softmax(logits, dim=-1)[0, token])


def _end_early(r: Request) -> None:
    """EOS ends the request, and so does a block that exhausts the budget: where all is kept, no commit is owed."""
    known = r.block[1:]
    ends = next((i for i, token in enumerate(known) if token in r.eos), None)
    if ends is not None:
        r.emit(known[: ends + 1])
    elif len(known) >= r.remaining:
        r.emit(known)
