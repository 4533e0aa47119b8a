"""Checks that run the engine: the gate, greedy and sampled equality in fp32.

Each returns a `Verdict`; one that cannot be had for lack of memory raises ResourceError.  Not here: weights
(`weights.py`), the auditor (`audit.py`, `replay.py`), bits in the run type (`bitwise.py`), `ar`'s distribution
(`distribution.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from retrofit.adapters.rows import MASK, Block, SequenceRows
from retrofit.eval.differences import first_difference, score_margin
from retrofit.eval.replay import Sampling
from retrofit.eval.subject import Subject
from retrofit.runtime.engine import Engine
from retrofit.runtime.plan import noise_token

Prompts = Sequence[Sequence[int]]
BATCH = 8
EXCUSED_MARGIN = 1e-5
"""fp64 scores closer than this: fp32 cannot tell the two tokens apart."""
SAMPLINGS = (Sampling(0.8), Sampling(0.8, top_k=50, top_p=0.95, repetition_penalty=1.2))
SEED = 17
PLAIN: Mapping[str, Any] = {"ignore_eos": True, "original_settings": False}
"""Texts of one length, and none of the base's own generation settings: the references know none either."""
LISTED = 16


class Verdict(NamedTuple):
    """ok (None: there was nothing that could be certified), one line for people, everything for machines."""

    ok: bool | None
    detail: str
    details: dict[str, Any]


def strategies(engine: Engine, prepare: str | int) -> list[dict[str, Any]]:
    """Every strategy once, in different batch sizes; `prepare` is for `fused`."""
    every = [
        {"strategy": "two_forward", "batch_size": BATCH},
        {"strategy": "auto", "batch_size": 4},
        {"strategy": "prompt_lookup", "batch_size": 3},
    ]
    if not engine.layout.anchored:
        return every
    return [
        {"strategy": "fused", "prepare": prepare, "batch_size": 5},
        {"strategy": "hybrid", "batch_size": 3},
        *every,
    ]


@contextmanager
def nan_adapter(engine: Engine) -> Iterator[None]:
    """Adapter and heads as NaN, where this engine's backend keeps them, and back again, bit for bit."""
    held = adapter_tensors(engine)
    saved = [p.detach().clone() for p in held]
    try:
        with torch.no_grad():
            for tensor in held:
                tensor.fill_(float("nan"))
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(held, saved, strict=True):
                tensor.copy_(value)


def adapter_tensors(engine: Engine) -> list[Tensor]:
    """Everything the adapter added, as the engine's backend holds it."""
    if engine.backend.name != "fused":
        return [*engine.attached.parameters(), *engine.attached.heads.buffers()]
    backend: Any = engine.backend
    heads, weights = backend.heads, backend.weights
    stacked = [linear for linear in weights.linears() if linear.up is not None]
    factors = [part for linear in stacked for part in (linear.weight[linear.width :], linear.up)]
    return [*factors, *heads.parameters(), *heads.buffers()]


@torch.no_grad()  # not inference mode: the fused backend uses the memory of a cache again
def gate(subject: Subject, prompts: Prompts) -> Verdict:
    """Base rows of mixed forwards with the trained adapter and with NaN in its place: bitwise the same."""
    engine = subject.run
    tail, size = _forward_size(engine)
    rows = changed = forwards = 0
    for start in range(0, len(prompts), size):
        group = prompts[start : start + size]
        trained = _mixed_forwards(engine, group, tail)
        with nan_adapter(engine):
            broken = _mixed_forwards(engine, group, tail)
        for (logits, hidden), (other_logits, other_hidden) in zip(trained, broken, strict=True):
            same = _same_bits(logits, other_logits) & _same_bits(hidden, other_hidden)
            rows, changed, forwards = rows + len(same), changed + int((~same).sum()), forwards + 1
    details = {"forwards": forwards, "base_rows": rows, "changed": changed}
    return Verdict(rows > 0 and not changed, f"{rows - changed} of {rows} base rows unchanged", details)


def _forward_size(engine: Engine) -> tuple[int, int]:
    """(base rows of a sequence, sequences) of a forward with a block on every base row."""
    most, each = engine.backend.most_rows, 1 + engine.layout.block
    tail = 5 if most is None else max(1, min(5, most // each))
    return tail, 4 if most is None else max(1, min(4, most // (tail * each)))


def _mixed_forwards(engine: Engine, prompts: Prompts, tail: int) -> list[tuple[Tensor, Tensor]]:
    """(logits, hidden) of base rows in forwards that hold blocks too: prompt tails verified, a block on each.

    The first verifies chains.  The second, where base rows can anchor blocks, verifies trees: every base row follows
    the first, which is kept.  The last one runs on what the others left, so a draft row that reached the cache shows as
    well; a state that has gone one row on cannot skip any, so behind a tree it runs all rows but the one that was kept.
    """
    longest = max(map(len, prompts)) + engine.layout.block
    cache = engine.backend.new_cache(len(prompts), longest)
    for slot, prompt in enumerate(prompts):
        cache.open(slot, len(prompt) + engine.layout.block)
    tail = min(tail, min(map(len, prompts)))
    out = []
    try:
        branched = tail > 1 and engine.layout.anchored
        for step, count in enumerate((tail, tail, tail - 1 if branched else 1)):
            plan, tree = [], step == 1
            for slot, prompt in enumerate(prompts):
                known = len(prompt) - count
                if step == 0 and known:
                    head = SequenceRows(slot, 0, list(prompt[:known]), last_logits_only=True)
                    engine.backend.forward(engine.backend.row_plan([head]), cache)
                parents = [-1, *[0] * (count - 1)] if tree and count > 1 else None
                blocks = _blocks(engine, known, count, parents)
                plan.append(SequenceRows(slot, known, list(prompt[known:]), blocks, parents=parents))
            if tree and not branched:
                continue
            got = engine.backend.forward(engine.backend.row_plan(plan), cache)
            out.append((got.base_logits, got.base_hidden))
            if tree:
                _store_first_rows(engine, prompts, tail, cache)
    finally:
        cache.release()
    return out


def _store_first_rows(engine: Engine, prompts: Prompts, tail: int, cache: Any) -> None:
    """Keep the first row of each tree; the others' places keep what the chains before them wrote."""
    where = [
        [n * tail for n in range(len(prompts))],
        list(range(len(prompts))),
        [len(prompt) - tail for prompt in prompts],
    ]
    cache.store(*(torch.tensor(values, device=engine.backend.device) for values in where))


def _blocks(engine: Engine, known: int, count: int, parents: list[int] | None) -> list[Block]:
    """A block on each of `count` base rows from position `known`, as far as the context reaches."""
    vocab, blocks = engine.backend.head.vocab, []
    for row in range(count):
        at = known + 1 + (row if parents is None else min(row, 1))
        if at + engine.layout.block <= engine.limits.context:
            blocks.append(Block(at, _inputs(engine, at, vocab), row))
    return blocks


def _same_bits(a_RN: Tensor, b_RN: Tensor) -> Tensor:
    """[R] rows that are bitwise equal and hold no NaN."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a_RN.element_size()]
    return (a_RN.view(bits) == b_RN.view(bits)).all(-1) & ~a_RN.isnan().any(-1)


def _inputs(engine: Engine, start: int, vocab: int) -> list[int]:
    rows = range(engine.layout.block)
    return [noise_token(0, start + i, vocab) if engine.layout.input == "noise" else MASK for i in rows]


def greedy(subject: Subject, prompts: Prompts, limit: int) -> Verdict:
    """`self_spec` in fp32 against transformers `generate` of a separate, clean copy of the base."""
    engine = subject.fp32()
    want = [reference(subject.base(torch.float32), prompt, limit) for prompt in prompts]
    differences: list[dict[str, Any]] = []
    compared = 0
    for options in strategies(engine, "all"):
        results = engine.generate(prompts, "self_spec", max_new_tokens=limit, temperature=0.0, **PLAIN, **options)
        differences += differing(options, want, [r.tokens for r in results])
        compared += len(results)
    bad = mark_excused(subject, prompts, want, differences)
    detail = f"{compared - len(differences)} of {compared} texts identical to transformers"
    details = {"texts": compared, "tokens": compared * limit}
    return _equality(compared, differences, bad, detail, details)


def differing(
    options: dict[str, Any], want: Sequence[Sequence[int]], got: Sequence[Sequence[int]]
) -> list[dict[str, Any]]:
    """Where texts leave those they should equal: prompt, token, the two tokens there."""
    found = []
    for number, (text, other) in enumerate(zip(want, got, strict=True)):
        at = first_difference(text, other)
        if at is not None:
            pair = [*text[at : at + 1], *other[at : at + 1]]
            found.append({**options, "prompt": number, "token": at, "tokens": pair})
    return found


def mark_excused(
    subject: Subject,
    prompts: Prompts,
    want: Sequence[Sequence[int]],
    differences: Sequence[dict[str, Any]],
    sampling: Sampling | None = None,
) -> int:
    """Write down the fp64 margin of each difference, and whether it excuses it; returns how many are not excused."""
    for difference in differences:
        number, at, pair = difference["prompt"], difference["token"], difference["tokens"]
        margin = float("inf")
        if len(pair) == 2:
            base, text = subject.base(torch.float64), want[number][:at]
            margin = score_margin(base, prompts[number], text, pair, sampling, SEED + number)
        difference["fp64_margin"] = margin
        difference["excused"] = margin < EXCUSED_MARGIN
    return sum(not difference["excused"] for difference in differences)


def _equality(
    compared: int, differences: list[dict[str, Any]], bad: int, detail: str, details: dict[str, Any]
) -> Verdict:
    excused = len(differences) - bad
    if excused:
        detail += f", {excused} leave it at an fp64 margin below {EXCUSED_MARGIN:g}"
    if bad:
        detail += f", {bad} differ"
    details = {**details, "excused": excused, "differences": differences[:LISTED]}
    return Verdict(compared > 0 and not bad, detail, details)


def reference(model: PreTrainedModel, prompt: Sequence[int], limit: int) -> list[int]:
    """New tokens of transformers' own greedy decoding of one prompt, no EOS."""
    return references(model, [prompt], limit)[0]


@torch.inference_mode()
def references(model: PreTrainedModel, prompts: Prompts, limit: int) -> list[list[int]]:
    """Those of prompts of one length, in one batch."""
    ids = torch.tensor([list(prompt) for prompt in prompts], device=model.device)
    # The padding id must be given, but pads nothing: the prompts have one length, and the mask is explicit.
    neutral = GenerationConfig(max_new_tokens=limit, do_sample=False, num_beams=1, eos_token_id=None, pad_token_id=0)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=neutral)
    tokens: list[list[int]] = out[:, ids.shape[1] :].tolist()
    return tokens


def sampled(subject: Subject, prompts: Prompts, limit: int) -> Verdict:
    """`self_spec` against `ar` in fp32 at equal seeds, without and with top-k, top-p and penalty."""
    engine = subject.fp32()
    differences: list[dict[str, Any]] = []
    compared = accepted = bad = 0
    for sampling, prepare in zip(SAMPLINGS, ("all", "last"), strict=True):
        common = {"max_new_tokens": limit, "seed": SEED, **PLAIN, **sampling.options()}
        want = [r.tokens for r in engine.generate(prompts, "ar", batch_size=BATCH, **common)]
        found: list[dict[str, Any]] = []
        for options in strategies(engine, prepare):
            results = engine.generate(prompts, "self_spec", **options, **common)
            compared += len(results)
            accepted += sum(sum(result.stats.accepted) for result in results)
            named = {**options, "sampling": sampling.options()}
            found += differing(named, want, [r.tokens for r in results])
        bad += mark_excused(subject, prompts, want, found, sampling)
        differences += found
    detail = f"{compared - len(differences)} of {compared} texts identical to ar at equal seed"
    details = {"texts": compared, "tokens": compared * limit, "accepted_drafts": accepted}
    return _equality(compared, differences, bad, detail, details)
