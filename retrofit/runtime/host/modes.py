"""The steps of `ar` and `self_spec` over a batch of requests: one forward each, then what follows from it.

    prefill       prompt rows                         emits the first token
    speculative   `ar` and every strategy alike: the plan says which drafts to verify and where to hang blocks

Tokens that are emitted are always targets y_j = argmax(log p_j + g_j) of base rows.
Not here: admission, `diffusion`, choosing among strategies, what a token means to a request (`Request.emit`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from retrofit.adapters.rows import SequenceRows
from retrofit.runtime.backends.threads import thread_limit
from retrofit.runtime.host.drafting import draft_tokens
from retrofit.runtime.host.prefixes import (
    begin_with,
    copy_prompt,
    keep_prompt,
    keep_text,
    kept_of,
    shared_prompts,
    waits_for,
)
from retrofit.runtime.host.telling import tell, tell_prompts
from retrofit.runtime.plan import StepPlan, max_verify, speculative_rows
from retrofit.runtime.request import Request
from retrofit.runtime.rules.accept import accepted_length
from retrofit.runtime.rules.processors import Constrain, Guard, constrained
from retrofit.runtime.rules.sampling import Processing, path_counts, path_seen, process_logits
from retrofit.runtime.rules.tree import DraftTree, accepted_path, depths, paths_of
from retrofit.runtime.run import Run


@dataclass(frozen=True)
class Paths:
    """What stands on the way to each of R base rows, as far as the settings need to know."""

    seen: Tensor | None
    """[R, V] tokens of the text and of the row's own drafts, under a repetition penalty."""
    drafts: Sequence[Sequence[int]] | None
    """The row's own drafts, under rules."""
    counts: Tensor | None = None
    """[R, V] how often the output and the row's own drafts have each token, under presence or frequency penalty."""

    def of(self, rows: Sequence[int]) -> Paths:
        """Of some of the rows."""
        index = list(rows)
        return Paths(
            None if self.seen is None else self.seen[index],
            None if self.drafts is None else [self.drafts[row] for row in index],
            None if self.counts is None else self.counts[index],
        )


@dataclass(frozen=True)
class Hanging:
    """The drafting rows of a block that came true: hidden [D, H], and logits [D, V] where the forward made them."""

    request: Request
    hidden: Tensor
    logits: Tensor | None = None


def prefill_step(run: Run, requests: Sequence[Request]) -> None:
    """Run whole prompts (or, at a longrope crossing, whole sequences) and emit one token each.

    Of requests that share a prompt one runs it; where prefixes are kept, a prompt runs from what is kept of it on.
    """
    copies = shared_prompts(requests)
    pending = {r.index: r for r in requests if r not in copies}
    for r in requests:
        r.committed = r.kept = 0
        r.long_rope = run.limits.boundary is not None and r.position >= run.limits.boundary
    while pending:
        ran, rows = _next_prompts(run, list(pending.values()))
        with thread_limit(run.backend.device):
            out = run.backend.forward(run.backend.row_plan(rows), run.cache)
        tell_prompts(run.backend.head, ran, rows, out.every_base)
        keep_text(run, ran)
        complete = [i for i, r in enumerate(ran) if r.committed == len(r.tokens)]
        if not complete:
            continue
        for i in complete:
            keep_prompt(ran[i], run.cache, out.base_logits[i])
            del pending[ran[i].index]
        _first_tokens(run, [ran[i] for i in complete], out.base_logits[complete])
    if copies:
        _first_tokens(run, copies, torch.stack([copy_prompt(r, run.cache) for r in copies]))


def _next_prompts(run: Run, pending: Sequence[Request]) -> tuple[list[Request], list[SequenceRows]]:
    """Whose prompts run in the next forward, and their rows: the first, and of the others those that fit beside it.

    So a prompt is cut where it would be alone, and one that can copy what runs now waits for it.
    """
    room = min(run.backend.prefill_rows, run.cache.most_rows or run.backend.prefill_rows)
    ran: list[Request] = []
    rows: list[SequenceRows] = []
    for r in pending:
        found = kept_of(run, r)
        kept = len(found) * run.pieces.size if run.pieces is not None else 0
        left = len(r.tokens) - r.committed - kept
        if rows and (r.long_rope or left > room or waits_for(run, r, kept, ran, rows)):
            continue
        begin_with(run, r, found)
        # Long RoPE factors are chosen by the largest position of a forward, so such a sequence goes in one piece.
        count = left if r.long_rope else min(left, room)
        if r.given is not None and not r.long_rope:
            count = r.given.whole(r.committed, count)
            if not count:
                break  # an image that does not fit beside the others
        part = r.tokens[r.committed : r.committed + count]
        ran.append(r)
        row = SequenceRows(r.slot, r.committed, part, last_logits_only=True, given=r.given, whole=len(r.tokens))
        rows.append(row)
        r.committed += count
        # A token emitted by re-running a sequence at a longrope crossing costs a decode forward.
        r.stats.count("prefill" if r.output_index == 0 else "ar", count)
        room -= count
        if r.long_rope or run.backend.prefill_alone or room <= 0:
            break
    return ran, rows


def _first_tokens(run: Run, requests: Sequence[Request], logits_RV: Tensor) -> None:
    """Emit what follows each of these texts."""
    paths = Paths(_stack_seen(requests), [[] for _ in requests], _stack_counts(requests))
    chosen = _targets(run, logits_RV, requests, [0] * len(requests), paths)
    for r, token in zip(requests, chosen, strict=True):
        r.emit([token], prefill=r.output_index == 0)
    if run.told:
        tell(requests, [[n] for n in range(len(requests))], logits_RV)


def speculative_step(run: Run, requests: Sequence[Request], plans: Sequence[StepPlan]) -> None:
    """One forward of `ar` or `self_spec`: verify, emit, and draft from the block that came true.

    plans: of each request, all of one cycle.
    """
    rows = [speculative_rows(r, p, run.layout, run.limits, run.vocab) for r, p in zip(requests, plans, strict=True)]
    row_plan = run.backend.row_plan(rows)
    out = run.backend.forward(row_plan, run.cache)
    owners = [r for r, row in zip(requests, rows, strict=True) for _ in row.tokens]
    steps = [step for row in rows for step in depths(row.follows)]
    drafted = [path for row in rows for path in _row_paths(row)] if run.ruled else None
    on_paths = Paths(_path_seen(requests, rows), drafted, _path_counts(requests, rows))
    if all(p.kind == "ar" for p in plans):
        for r, token in zip(requests, _targets(run, out.base_logits, owners, steps, on_paths), strict=True):
            r.stats.count("ar", 1)
            r.drop_drafts()
            r.emit([token])
            r.committed += 1
        if run.told:
            tell(requests, [[n] for n in range(len(requests))], out.base_logits)
        return
    targets = _split(_targets(run, out.base_logits, owners, steps, on_paths), rows)
    paths = _paths(rows, targets)
    if row_plan.tree:
        _store(run, requests, rows, paths)
    hangs: list[Hanging] = []
    emitted: list[list[int]] = []
    """Base rows whose targets each request took."""
    offset = first_row = 0
    for r, p, row, target, path in zip(requests, plans, rows, targets, paths, strict=True):
        r.stats.count(p.kind, len(row.tokens) + sum(len(b.inputs) for b in row.blocks))
        r.drop_drafts()
        taken = r.emit([target[j] for j in path]) if target else 0
        emitted.append([first_row + j for j in path[:taken]])
        first_row += len(row.tokens)
        if target:
            r.committed += len(path)
            if p.verify:
                r.stats.accepted.append(min(len(path) - 1, taken))
                r.stats.verified.append(max(depths(row.follows)))
        end = path[-1] if target else 0
        assert isinstance(p.hang, tuple)
        for anchor, block in zip(p.hang, row.blocks, strict=True):
            if anchor == end and not r.done:
                drafting = slice(offset + run.layout.first_drafting_row, offset + len(block.inputs))
                known = None if out.draft_logits is None else out.draft_logits[drafting]
                hangs.append(Hanging(r, out.draft_hidden[drafting], known))
            offset += len(block.inputs)
    if run.told:
        tell(requests, emitted, out.base_logits)
    if plans[0].rows is not None:  # drafted when it is known how many rows there are, with what the text proposes
        for hanging in hangs:
            hanging.request.came_true = hanging.hidden, hanging.logits
        return
    for group in _groups(run, [hanging.request for hanging in hangs]):
        _draft(run, [hangs[n] for n in group], plans[0].tree)


def _row_paths(row: SequenceRows) -> list[list[int]]:
    """Drafts on the way from the seed to each base row, its own included."""
    return [[row.tokens[j] for j in path[1:]] for path in paths_of(row.follows)]


def _path_seen(requests: Sequence[Request], rows: Sequence[SequenceRows]) -> Tensor | None:
    """[R, V] tokens on each base row's own path, where a repetition penalty needs them."""
    return _on_paths([r.seen for r in requests], rows, path_seen)


def _path_counts(requests: Sequence[Request], rows: Sequence[SequenceRows]) -> Tensor | None:
    """[R, V] how often each base row's own path has a token in the output, where a penalty needs that."""
    return _on_paths([r.counts for r in requests], rows, path_counts)


def _on_paths(
    known: Sequence[Tensor | None], rows: Sequence[SequenceRows], along: Callable[[Tensor, list[int]], Tensor]
) -> Tensor | None:
    """What each text has [V], and on its base rows' paths [R, V]; along: the same of drafts that do not branch."""
    found = []
    for text_V, row in zip(known, rows, strict=True):
        if text_V is None or not row.tokens:
            continue
        if row.parents is None:
            found.append(along(text_V, list(row.tokens[1:])))
            continue
        paths = text_V.repeat(len(row.tokens), 1)
        for j, parent in enumerate(row.parents):
            if parent >= 0:  # the seed is in the text already
                paths[j] = paths[parent]
                paths[j, row.tokens[j]] += True
        found.append(paths)
    return torch.cat(found) if found else None


def _paths(rows: Sequence[SequenceRows], targets: Sequence[list[int]]) -> list[list[int]]:
    """Base rows of each request whose targets are emitted, in order; empty without base rows."""
    if all(row.parents is None for row in rows):
        kept = _accepted([list(row.tokens[1:]) for row in rows], list(targets))
        return [list(range(n + 1)) if target else [] for n, target in zip(kept, targets, strict=True)]
    return [accepted_path(row.tokens, row.follows, target) for row, target in zip(rows, targets, strict=True)]


def _store(run: Run, requests: Sequence[Request], rows: Sequence[SequenceRows], paths: list[list[int]]) -> None:
    """Write the K/V of the accepted paths of a tree forward to their final places."""
    index: list[int] = []
    slots: list[int] = []
    positions: list[int] = []
    first = 0
    for r, row, path in zip(requests, rows, paths, strict=True):
        index += [first + j for j in path]
        slots += [r.slot] * len(path)
        positions += range(r.committed, r.committed + len(path))
        first += len(row.tokens)
    run.cache.store(*(torch.tensor(v, device=run.backend.device) for v in (index, slots, positions)))


def _draft(run: Run, hangs: Sequence[Hanging], tree: DraftTree | None) -> None:
    """Draft tokens for each request from the block that came true; tree: to hang them on.

    A chain is drafted whole, whatever the plan: the next one may verify more of it.
    """
    wanted = [min(len(hanging.hidden), max_verify(hanging.request, run.limits)) for hanging in hangs]
    hangs = [hanging for hanging, n in zip(hangs, wanted, strict=True) if n > 0]
    wanted = [n for n in wanted if n > 0]
    if not hangs:
        return
    width = max(wanted)
    widest = None if tree is None else tree.cut(width)
    requests = [hanging.request for hanging in hangs]
    heads = run.backend.heads
    assert heads is not None
    hidden_BDH = _stack([hanging.hidden for hanging in hangs], width)
    known = [hanging.logits for hanging in hangs if hanging.logits is not None]
    drafted = draft_tokens(
        hidden_BDH,
        [r.tokens[-1] for r in requests],
        [r.seed for r in requests],
        [r.output_index for r in requests],
        _stack_seen(requests),
        _stack(known, width) if known else run.backend.head(hidden_BDH.flatten(0, 1)).unflatten(0, (-1, width)),
        heads,
        _params(run, requests),
        run.with_confidence,
        widest,
        _guards(requests),
        _stack_counts(requests),
    )
    tokens = drafted.tokens.tolist()
    confidence = drafted.confidence.tolist() if drafted.confidence is not None else [[]] * len(requests)
    for r, d, c, n in zip(requests, tokens, confidence, wanted, strict=True):
        if widest is None:
            r.drafts, r.confidence = d[:n], c[:n]
        else:
            r.drafts = [t for t, depth in zip(d, widest.depths[1:], strict=True) if depth <= n]
            r.tree = widest.cut(n)


def _stack(rows: Sequence[Tensor], width: int) -> Tensor:
    """[B, width, .] of as many first rows of each, zeros where there are fewer."""
    return torch.stack([F.pad(some[:width], (0, 0, 0, max(0, width - len(some)))) for some in rows])


def _targets(
    run: Run,
    logits_RV: Tensor,
    owners: Sequence[Request],
    steps: Sequence[int],
    paths: Paths,
) -> list[int]:
    """y of each base row: row n belongs to owners[n] and stands steps[n] tokens after its seed.

    paths: what stands on the way to each row.
    """
    chosen = [0] * len(owners)
    for group in _groups(run, owners):
        if len(group) == len(owners):
            return _chosen(run, logits_RV, owners, steps, paths)
        some = _chosen(run, logits_RV[group], [owners[n] for n in group], [steps[n] for n in group], paths.of(group))
        for n, token in zip(group, some, strict=True):
            chosen[n] = token
    return chosen


def _chosen(run: Run, logits_RV: Tensor, owners: Sequence[Request], steps: Sequence[int], paths: Paths) -> list[int]:
    """`_targets` of rows that are processed alike."""
    params = _params(run, owners)
    scores = process_logits(logits_RV, params, paths.seen, _constrain(owners, paths.drafts), paths.counts)
    device = logits_RV.device
    if params.temperature == 0:
        seed = index = torch.empty(0, dtype=torch.int64, device=device)  # a greedy choice draws no noise
    else:
        seed = torch.tensor([r.seed for r in owners], dtype=torch.int64, device=device)
        index = torch.tensor([r.output_index + j for r, j in zip(owners, steps, strict=True)], device=device)
    chosen: list[int] = run.backend.choose(scores, params, seed, index).tolist()
    return chosen


def _params(run: Run, requests: Sequence[Request]) -> Processing:
    """Of requests of one group."""
    return (run.mixed and requests[0].processing) or run.params


def _groups(run: Run, requests: Sequence[Request]) -> list[list[int]]:
    """Numbers of the requests whose rows are processed together, group by group."""
    if not run.mixed:
        return [list(range(len(requests)))] if requests else []
    groups: dict[int, list[int]] = {}
    for n, request in enumerate(requests):
        groups.setdefault(request.group, []).append(n)
    return list(groups.values())


def _guards(requests: Sequence[Request]) -> list[Guard] | None:
    """The rules over each text; None: there are none."""
    return [r.guard for r in requests if r.guard is not None] or None


def _constrain(owners: Sequence[Request], paths: Sequence[Sequence[int]] | None) -> Constrain | None:
    """The base's rules for rows of these requests, after these drafts; None: there are none."""
    guards = _guards(owners)
    return None if guards is None or paths is None else partial(constrained, guards=guards, paths=paths)


def _accepted(drafts: list[list[int]], targets: list[list[int]]) -> list[int]:
    """Accepted drafts of each request; lists are ragged."""
    width = max(len(d) for d in drafts)
    if width == 0:
        return [0] * len(drafts)
    draft_BK = torch.tensor([d + [0] * (width - len(d)) for d in drafts])
    target_BK1 = torch.tensor([t + [0] * (width + 1 - len(t)) for t in targets])
    accepted: list[int] = accepted_length(draft_BK, target_BK1, torch.tensor([len(d) for d in drafts])).tolist()
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


def _stack_counts(requests: Sequence[Request]) -> Tensor | None:
    counts = [r.counts for r in requests if r.counts is not None]
    return torch.stack(counts) if counts else None
